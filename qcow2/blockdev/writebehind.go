package blockdev

import (
	"os"
	"sync"
)

// writeBehind sends what is written to the disk soon, and takes it out of the
// page cache once it is there. A file larger than that cache then takes no
// more memory than a small one, the final sync has little left to do, and the
// system is spared the cost of fresh pages: in a virtual machine, where the
// host has to provide them, that can be most of the cost of a write.
//
// It is for files that are written once, about in order.
type writeBehind struct {
	mu        sync.Mutex
	cur, prev window // being filled; on its way to the disk
	broken    bool   // the system cannot do it
}

type window struct{ start, end int64 }

const (
	behindWindow = 8 << 20  // bytes of a window
	behindFar    = 64 << 20 // a write so far from the window begins another
)

// wrote is told of each completed write. Its error is one of writing: it is
// not reported again by a later sync.
func (w *writeBehind) wrote(f *os.File, off, n int64) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.broken || n == 0 {
		return nil
	}
	if w.cur.end > 0 && (off+n < w.cur.start-behindFar || off > w.cur.end+behindFar) {
		if err := w.advance(f); err != nil {
			return err
		}
	}
	if w.cur.end == 0 {
		w.cur = window{off, off + n}
	}
	w.cur = window{min(w.cur.start, off), max(w.cur.end, off+n)}
	if w.cur.end-w.cur.start < behindWindow {
		return nil
	}
	return w.advance(f)
}

// advance starts the writing of the current window, and waits for the one
// before.
func (w *writeBehind) advance(f *os.File) error {
	ok, err := startWriting(f, w.cur)
	if ok && err == nil && w.prev.end > 0 {
		ok, err = finishWriting(f, w.prev)
	}
	w.broken = !ok
	w.prev, w.cur = w.cur, window{}
	return err
}

package qcow2

import (
	"fmt"
	"os"
	"sync"

	"qimg/qcow2/blockdev"
)

// CompressedWriter writes into an image that is open for writing, and stores
// clusters compressed, as Image.WriteCompressed does; those of zeroes give back
// their space, as by Image.Clear. It is a target of transfer.Copy.
//
// The disk is named from its beginning on, in whole clusters, by WriteAt,
// WriteSparse, WriteZeroes and Skip, from any number of goroutines, each of which
// takes the lowest part that no other has taken. Clusters are compressed by their
// callers side by side and get their places in the order of the guest, so that
// the same content makes the same image. A call waits until those before it have
// their places; if one of them will not come, Abort ends that.
//
// A write that ends inside a cluster, and not at the end of the disk, leaves that
// cluster as it is stored, but for the bytes that are written.
//
// The first error ends the CompressedWriter: every later call returns one that
// matches it. There is nothing to be closed; Image.Sync and Image.Close make
// durable what was written.
type CompressedWriter struct {
	im      *Image
	c       *compressor
	cluster int64

	mu   sync.Mutex
	turn sync.Cond // next or err has changed
	next int64     // all before it have their places
	busy bool      // what lies there gets it
	err  error
}

// NewCompressedWriter begins at the beginning of the disk. An image that is
// encrypted, or has an external data file, is an error that matches
// ErrUnsupported.
func (im *Image) NewCompressedWriter() (*CompressedWriter, error) {
	c, cluster, err := im.compressor(0, 0)
	if err != nil {
		return nil, err
	}
	w := &CompressedWriter{im: im, c: c, cluster: cluster}
	w.turn.L = &w.mu
	return w, nil
}

// Size returns the size of the disk in bytes.
func (w *CompressedWriter) Size() int64 { return w.im.Size() }

// Granularity implements transfer.Skipper by the size of a cluster.
func (w *CompressedWriter) Granularity() int64 { return w.cluster }

// WriteAt implements io.WriterAt.
func (w *CompressedWriter) WriteAt(p []byte, off int64) (int, error) {
	if err := w.WriteSparse(p, off, []blockdev.Range{{Off: off, Len: int64(len(p))}}); err != nil {
		return 0, err
	}
	return len(p), nil
}

// WriteSparse implements blockdev.SparseWriter; data are whole clusters, but for
// the end of the piece.
func (w *CompressedWriter) WriteSparse(p []byte, off int64, data []blockdev.Range) error {
	end := off + int64(len(p))
	var list []packed
	defer func() {
		for _, k := range list {
			w.c.drop(k)
		}
	}()
	for _, r := range data {
		for at := r.Off; at < r.Off+r.Len; {
			part := p[at-off:][:min(w.cluster, r.Off+r.Len-at)]
			k := packed{off: at, p: part}
			if n := int64(len(part)); n == w.cluster || at+n == w.Size() {
				var err error
				if k, err = w.c.pack(part, at, w.cluster); err != nil {
					return w.place(off, end, func() error { return err })
				}
			}
			if !k.zero {
				list = append(list, k)
			}
			at += int64(len(part))
		}
	}
	return w.place(off, end, func() error {
		at := off
		for _, k := range list {
			if err := w.zero(at, k.off); err != nil {
				return err
			}
			if err := w.im.placePacked(k); err != nil {
				return err
			}
			at = k.off + int64(len(k.p))
		}
		return w.zero(at, end)
	})
}

// zero makes a range read as zeroes.
func (w *CompressedWriter) zero(off, end int64) error {
	if off == end {
		return nil
	}
	return w.im.Clear(off, end-off)
}

// WriteZeroes implements blockdev.ZeroWriter.
func (w *CompressedWriter) WriteZeroes(off, n int64) error {
	return w.place(off, off+n, func() error { return w.zero(off, off+n) })
}

// Skip implements transfer.Skipper: the range stays as it is.
func (w *CompressedWriter) Skip(off, n int64) error {
	return w.place(off, off+n, func() error { return nil })
}

// place runs do when it is the turn of what lies from off to end.
func (w *CompressedWriter) place(off, end int64, do func() error) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for (off > w.next || w.busy) && w.err == nil {
		w.turn.Wait()
	}
	if w.err != nil {
		return w.err
	}
	err := fmt.Errorf("qcow2: write at %#x: all before %#x is written already", off, w.next)
	if off == w.next {
		w.busy = true
		w.mu.Unlock()
		err = do()
		w.mu.Lock()
		w.busy, w.next = false, end
	}
	if w.err == nil && err != nil {
		w.err = fmt.Errorf("qcow2: image cannot be written after an earlier error: %w", err)
	}
	w.turn.Broadcast()
	return err
}

// Abort wakes whoever waits: that and every later call returns an error that
// matches os.ErrClosed. What was written stays.
func (w *CompressedWriter) Abort() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.err = os.ErrClosed
	}
	w.turn.Broadcast()
}

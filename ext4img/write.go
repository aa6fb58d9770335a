package ext4img

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"runtime"
	"sync"

	"qimg/qcow2/blockdev"
)

// Sink takes the image. It reads as zeroes before, and has at least
// Layout.Size bytes. WriteAt is called from several goroutines, one at a time,
// for ranges that do not overlap, about ascending, only within Layout.Extents.
//
// A sink with a Granularity gets ranges that begin and end at its multiples
// (the last may end with the disk), zeroes filled in around the extents, and
// several calls at a time: it has work of its own to do.
//
// A sink with an Abort method is told so when the image will not be finished, so
// that no WriteAt goes on waiting for others.
//
// A sink that is a blockdev.RangeCopier is asked to take large files itself, by
// several calls at a time, also beside WriteAt.
type Sink interface {
	io.WriterAt
}

// granular is a Sink that wants whole units, such as a compressing one.
type granular interface {
	// Granularity is the unit in bytes, a power of two; 1: any range will do.
	Granularity() int64
}

// WriteOptions change how an image is written, never what is written.
type WriteOptions struct {
	// Workers is the number of goroutines that read and write; 0: GOMAXPROCS.
	Workers int
	// Progress, if not nil, is told the bytes written so far and in all. It
	// is called from the goroutine that called Write.
	Progress func(done, total int64)
}

// ErrChanged says that a source file is not what it was when it was scanned.
var ErrChanged = errors.New("changed while it was read")

const (
	unitSize    = 1 << 20  // what a worker assembles and writes at once
	copyMin     = 1 << 18  // shortest run that the sink is asked to copy itself
	copyUnit    = 64 << 20 // longest one
	maxInFlight = 64       // bound on Workers: each has a buffer
)

// Write writes the image: each block once, about ascending. On an error what
// the sink holds is of no use. A source file that changed since the scan gives
// an error that names it and matches ErrChanged.
func (l *Layout) Write(ctx context.Context, sink Sink, opts *WriteOptions) error {
	if opts == nil {
		opts = &WriteOptions{}
	}
	workers := opts.Workers
	if workers <= 0 {
		workers = runtime.GOMAXPROCS(0)
	}
	workers = min(workers, maxInFlight)

	w := newWriter(l, sink)
	total := int64(0)
	for _, r := range w.runs {
		total += min(r.end*l.geo.blockSize, l.size) - r.start*l.geo.blockSize
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if a, ok := sink.(interface{ Abort() }); ok {
		defer context.AfterFunc(ctx, a.Abort)()
	}
	done := make(chan int64, workers)
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			if err := w.work(ctx, done); err != nil {
				cancel(err)
			}
		})
	}
	go func() {
		wg.Wait()
		close(done)
	}()
	sum := int64(0)
	for n := range done {
		sum += n
		if opts.Progress != nil {
			opts.Progress(sum, total)
		}
	}
	return context.Cause(ctx)
}

// writer hands units of work to workers.
type writer struct {
	l      *Layout
	sink   Sink
	copier blockdev.RangeCopier // nil: files are read and written
	unit   int64                // blocks
	runs   []run                // what is written, ascending
	copies []fileRun            // parts of runs that the sink is asked to copy

	mu  sync.Mutex
	at  int64 // next block
	run int   // index into runs
	cp  int   // index into copies

	// writeMu is held by WriteAt: writers of one file wait for each other in the
	// kernel anyway, and burn the processor meanwhile.
	writeMu sync.Mutex
	many    bool // several WriteAt at a time
}

// fileRun is a run of blocks that holds a file from a byte on.
type fileRun struct {
	run
	inode uint32
	off   int64
}

func newWriter(l *Layout, sink Sink) *writer {
	bs := l.geo.blockSize
	w := &writer{l: l, sink: sink, unit: unitSize / bs}
	gran := int64(1)
	if g, ok := sink.(granular); ok && g.Granularity() > 1 {
		gran = max(g.Granularity()/bs, 1)
		w.many = true
	}
	w.unit = max(w.unit, gran)
	for off, n := range l.Extents() {
		r := run{off / bs / gran * gran, ceilDiv(off/bs+n/bs, gran) * gran}
		w.runs = append(w.runs, r)
	}
	w.runs = mergeRuns(w.runs)
	if c, ok := sink.(blockdev.RangeCopier); ok && !w.many {
		w.copier = c
		w.findCopies()
	}
	if len(w.runs) > 0 {
		w.at = w.runs[0].start
	}
	return w
}

// findCopies lists the runs of files that are long enough for the kernel.
func (w *writer) findCopies() {
	l := w.l
	bs := l.geo.blockSize
	var runs []run
	for k := range l.files.len() {
		f := l.files.at(uint32(k))
		if l.tree.inodes.at(f.inode).size < copyMin {
			continue
		}
		pos := f.pos
		runs = l.appendRuns(runs[:0], f.inode)
		for _, r := range runs {
			off := r.start * bs
			l.geo.physical(pos, r.len(), func(p run) bool {
				for ; p.len()*bs >= copyMin; p.start = min(p.start+copyUnit/bs, p.end) {
					part := run{p.start, min(p.start+copyUnit/bs, p.end)}
					w.copies = append(w.copies, fileRun{part, f.inode, off})
					off += part.len() * bs
				}
				off += p.len() * bs
				return true
			})
			pos += r.len()
		}
	}
}

// next returns the next unit: blocks to fill, or a run to copy.
func (w *writer) next() (r run, c *fileRun, ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.run == len(w.runs) {
		return run{}, nil, false
	}
	cur := w.runs[w.run]
	if w.cp < len(w.copies) && w.copies[w.cp].start == w.at {
		c = &w.copies[w.cp]
		w.cp++
		r = c.run
	} else {
		end := min(cur.end, (w.at/w.unit+1)*w.unit)
		if w.cp < len(w.copies) {
			end = min(end, w.copies[w.cp].start)
		}
		r = run{w.at, end}
	}
	w.at = r.end
	if w.at == cur.end {
		if w.run++; w.run < len(w.runs) {
			w.at = w.runs[w.run].start
		}
	}
	return r, c, true
}

func (w *writer) work(ctx context.Context, done chan<- int64) error {
	f := newFiller(w.l)
	buf := make([]byte, w.unit*w.l.geo.blockSize)
	for {
		r, c, ok := w.next()
		if !ok {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		bs := w.l.geo.blockSize
		n := min(r.end*bs, w.l.size) - r.start*bs
		if c != nil {
			copied, err := w.copyRun(c)
			if err != nil {
				return err
			}
			r.start += copied // the rest is read and written
		}
		for r.start < r.end {
			part := run{r.start, min(r.end, r.start+w.unit)}
			if err := w.fillRun(f, buf, part); err != nil {
				return err
			}
			r.start = part.end
		}
		select {
		case done <- n:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// fillRun assembles blocks in memory and writes them.
func (w *writer) fillRun(f *filler, buf []byte, r run) error {
	bs := w.l.geo.blockSize
	buf = buf[:r.len()*bs]
	if err := f.fill(buf, r.start); err != nil {
		return err
	}
	off := r.start * bs
	buf = buf[:min(int64(len(buf)), w.l.size-off)]
	if !w.many {
		w.writeMu.Lock()
		defer w.writeMu.Unlock()
	}
	_, err := w.sink.WriteAt(buf, off)
	return err
}

// copyRun has the sink copy a run of a file, and returns how many of its blocks
// it did.
func (w *writer) copyRun(c *fileRun) (blocks int64, err error) {
	l := w.l
	bs := l.geo.blockSize
	src, err := l.tree.openFile(c.inode)
	if err != nil {
		return 0, err
	}
	defer src.close()
	want := min(c.len()*bs, l.tree.inodes.at(c.inode).size-c.off)
	file := src.f.kernelFile()
	if file == nil {
		return 0, nil
	}
	n, err := w.copier.CopyRange(c.start*bs, file, c.off, want)
	switch {
	case errors.Is(err, errors.ErrUnsupported):
		if n == 0 {
			w.forgetCopies()
		}
		return n / bs, nil
	case err != nil:
		return 0, err
	case n < want:
		return n / bs, nil
	}
	return c.len(), src.check()
}

// forgetCopies gives up asking a sink that takes nothing.
func (w *writer) forgetCopies() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.copies, w.cp = nil, 0
}

// openFile is a regular file of the tree, opened for reading.
type openFile struct {
	t     *Tree
	inode uint32
	f     sourceFile
}

func (t *Tree) openFile(i uint32) (openFile, error) {
	n := t.inodes.at(i)
	o := openFile{t: t, inode: i}
	var err error
	if o.f, err = t.sources[n.src].open(n); errors.Is(err, fs.ErrNotExist) {
		err = o.changed("it is gone")
	} else if err != nil {
		err = o.error("open", err)
	}
	return o, err
}

func (o *openFile) close() { o.f.close() }

// error names the file that an error is about, and its source.
func (o *openFile) error(op string, err error) error {
	return &SourceError{int(o.t.inodes.at(o.inode).src), pathError(op, o.t.path(o.inode), err)}
}

// read fills b with the bytes from off on, and with zeroes behind the end.
func (o *openFile) read(b []byte, off int64) error {
	size := o.t.inodes.at(o.inode).size
	want := min(int64(len(b)), size-off)
	n, err := o.f.ReadAt(b[:want], off)
	if err != nil && err != io.EOF {
		return cmp.Or(o.check(), o.error("read", err))
	}
	if int64(n) < want {
		return o.changed(fmt.Sprintf("it ended at byte %d of %d", off+int64(n), size))
	}
	clear(b[want:])
	return nil
}

// check returns an error if the file is not what it was when it was scanned.
func (o *openFile) check() error {
	now, err := o.f.stat()
	if err == errNoStat {
		return nil
	}
	if err != nil {
		return o.error("stat", err)
	}
	n := o.t.inodes.at(o.inode)
	switch {
	case now.mode&modeType != modeReg:
		return o.changed("it is no regular file any more")
	case now.size > n.size:
		return o.changed(fmt.Sprintf("it grew from %d to %d bytes", n.size, now.size))
	case now.size < n.size:
		return o.changed(fmt.Sprintf("it shrank from %d to %d bytes", n.size, now.size))
	case now.id() == n.id:
		return nil
	case now.sec != n.sec || now.nsec != n.nsec:
		return o.changed("it was written to")
	}
	return o.changed("it was replaced, or its metadata changed")
}

func (o *openFile) changed(how string) error {
	return o.error("read", fmt.Errorf("%w: %s", ErrChanged, how))
}

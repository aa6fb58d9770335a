// Package transfer is the one engine that moves bytes between any two disks.
//
// Copy reads one disk by its extents, looks for zeroes in its data, and writes
// another, with several workers; Stream writes a disk to a pipe; Compare tells
// where two disks differ. What a disk is made of it learns from blockdev: this
// package knows no format.
package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"runtime"
	"sync"
	"time"

	"qimg/qcow2/blockdev"
)

// Target is what Copy writes: a blockdev.Device, or something that is made in
// one pass, as qcow2.Writer is. It is written from several goroutines. The
// optional interfaces blockdev.ZeroWriter, RangeCopier and SparseWriter, and
// Skipper, DataUnits and Aborter are used where it has them.
type Target interface {
	io.WriterAt
	Size() int64
}

// Skipper is a target that has to be told of everything, in order: each worker
// takes the lowest part that no other has taken. Skip names a range that is left
// as it is. A target with a Granularity gets whole units of that many bytes,
// except at its end.
type Skipper interface {
	Skip(off, n int64) error
	Granularity() int64
}

// DataUnits is a Skipper that takes smaller units of data in WriteSparse, as
// qcow2.Writer does with extended L2 entries: whole units of DataGranularity bytes,
// a part of those of Granularity.
type DataUnits interface{ DataGranularity() int64 }

// Aborter is a target whose writes wait for those before them. Abort is called after
// the first error, to wake those who wait for what will not come.
type Aborter interface{ Abort() }

const (
	// DefaultSparse is the shortest run of zeroes that is looked for in data,
	// that of qemu-img.
	DefaultSparse = 4096
	// MaxWorkers bounds the workers.
	MaxWorkers = 16
	// BufferSize is how many bytes are read and written at once at most. No
	// piece crosses a multiple of it.
	BufferSize = 1 << 20
	// maxInFlight bounds what all workers have in memory at once, in bytes.
	maxInFlight = 24 << 20
)

// Options says how Copy copies. The zero value, and nil, mean: everything, by one
// worker for each processor.
type Options struct {
	// Workers is how many pieces are on their way at the same time, at most
	// MaxWorkers, and as many as Copy has the memory for; 0 means one for each
	// processor.
	Workers int
	// Sparse is the shortest run of zeroes in data, in bytes, that is not written
	// as data: a multiple of 512. 0 means DefaultSparse. A negative number
	// writes everything, also what reads as zeroes by the extents.
	Sparse int64
	// TargetIsZero says that the target reads as zeroes, so that those are not
	// written.
	TargetIsZero bool
	// KernelCopy lets a target take data from the file of the source by itself
	// (blockdev.RangeCopier), with the zeroes in it.
	KernelCopy bool
	// Keep, if set, tells of the extents of the source that the target has
	// already: they are left as they are.
	Keep func(e blockdev.Extent) bool
	// Base, if set, is what the target reads as already: of data only those
	// blocks are written, whole and with their zeroes, that are not the same
	// there. A block is a unit of a Skipper, else 4 KiB.
	Base io.ReaderAt
	// InOrder writes one piece after the other, from the beginning of the disk
	// to its end, while others are read.
	InOrder bool
	// Salvage goes on where the source cannot be read: Salvage is told of each
	// such sector, one at a time, and zeroes are written there. With
	// ReadError.Extents it is told that the sector is tried to be read although
	// nothing tells what it is made of. Nil: the first error of reading ends
	// the copy.
	Salvage func(err *ReadError)
	// Rate bounds what is written, in bytes a second; 0 means no bound.
	Rate int64
	// Progress is told how many of the bytes of the source have been dealt
	// with, one call at a time. Nil: nobody is told.
	Progress func(done, total int64)
}

// ReadError is an error of reading the source, or Options.Base.
type ReadError struct {
	Off     int64 // in bytes
	Extents bool  // what was read is what the source is made of, not its data
	Err     error
}

func (e *ReadError) Error() string {
	if e.Extents {
		return fmt.Sprintf("error while reading block status at offset %d: %v", e.Off, e.Err)
	}
	return fmt.Sprintf("error while reading at byte %d: %v", e.Off, e.Err)
}
func (e *ReadError) Unwrap() error { return e.Err }

// WriteError is an error of writing the target.
type WriteError struct {
	Off int64 // in the target, in bytes
	Err error
}

func (e *WriteError) Error() string {
	return fmt.Sprintf("error while writing at byte %d: %v", e.Off, e.Err)
}
func (e *WriteError) Unwrap() error { return e.Err }

// Copy writes the content of src to dst, which has to be as long at least. What
// dst has behind the end of src is left alone. Copy does not sync.
//
// An error is a *ReadError, a *WriteError or that of ctx; dst has some of the
// data then. Memory is at most 24 MiB, with what the target makes of a unit in
// each worker: BufferSize, or a unit if that is larger, for each of them, twice
// with Options.Base.
func Copy(ctx context.Context, dst Target, src blockdev.Reader, opts *Options) error {
	c, err := newCopier(dst, src, opts)
	if err != nil {
		return err
	}
	return c.run(ctx)
}

// copier is a Copy that goes on.
type copier struct {
	opts    Options
	dst     Target
	src     blockdev.Reader
	size    int64
	sparse  blockdev.SparseWriter // nil: dst is none
	skipper Skipper
	copies  blockdev.RangeCopier // nil: no kernel copies
	grain   int64                // units of the target; 1: any
	block   int64                // units of the data in WriteSparse
	unit    int64                // in which zeroes are looked for
	buffer  int64                // bytes of a worker's buffer, whole units
	start   time.Time

	mu      sync.Mutex
	turn    sync.Cond        // done has changed, or err, where that is waited for
	next    int64            // the source is taken up to here
	extent  blockdev.Extent  // the last that was asked for
	asked   []blockdev.Range // extents of data that cuts has to know
	told    int64            // Options.Salvage was told of extents up to here
	err     error
	done    int64
	written int64
	salvage sync.Mutex
}

func newCopier(dst Target, src blockdev.Reader, opts *Options) (*copier, error) {
	c := &copier{dst: dst, src: src, size: src.Size(), grain: 1, start: time.Now()}
	c.turn.L = &c.mu
	if opts != nil {
		c.opts = *opts
	}
	if c.opts.Workers <= 0 {
		c.opts.Workers = runtime.GOMAXPROCS(0)
	}
	if c.opts.Sparse == 0 {
		c.opts.Sparse = DefaultSparse
	}
	if dst.Size() < c.size {
		return nil, fmt.Errorf("the target has %d bytes, the source %d", dst.Size(), c.size)
	}
	c.sparse, _ = dst.(blockdev.SparseWriter)
	c.skipper, _ = dst.(Skipper)
	if c.skipper != nil {
		c.grain = max(c.grain, c.skipper.Granularity())
	}
	c.block = c.grain
	if b, ok := dst.(DataUnits); ok {
		c.block = b.DataGranularity()
	}
	if c.grain > BufferSize*2 || c.grain&(c.grain-1) != 0 {
		return nil, fmt.Errorf("the target is written in units of %d bytes, at most %d are expected", c.grain, 2*BufferSize)
	}
	c.buffer = max(BufferSize, c.grain)
	needs := c.buffer + c.grain
	if c.opts.Base != nil {
		needs += c.buffer
	}
	c.opts.Workers = min(c.opts.Workers, MaxWorkers, int(maxInFlight/needs))
	// As in qemu-img, the shortest run is also the unit in which data is written.
	c.unit = c.block
	if c.opts.Sparse > 0 {
		c.unit = min(max(c.block, int64(1)<<(bits.Len64(uint64(c.opts.Sparse))-1)), c.buffer)
	}
	if c.opts.KernelCopy {
		c.copies, _ = dst.(blockdev.RangeCopier)
	}
	return c, nil
}

// piece is a run of the source.
type piece struct {
	off, n int64
	kind   pieceKind
	extent blockdev.Extent // of pieceData, where it is one
	// cuts are where zeroes are looked for anew, besides the multiples of a unit.
	cuts []int64
}

type pieceKind uint8

const (
	pieceData pieceKind = iota
	pieceZero           // reads as zeroes
	pieceKeep           // the target has it
)

func (c *copier) run(ctx context.Context) error {
	var wg sync.WaitGroup
	for range c.opts.Workers {
		wg.Go(func() {
			w := &worker{copier: c}
			for {
				p, ok := c.take(ctx)
				if !ok {
					return
				}
				if err := w.copy(p); err != nil {
					c.fail(err)
					return
				}
				if err := c.finished(ctx, p); err != nil {
					c.fail(err)
					return
				}
			}
		})
	}
	wg.Wait()
	return c.err
}

// fail keeps the first error, and wakes workers that wait for their turn.
func (c *copier) fail(err error) {
	c.mu.Lock()
	first := c.err == nil
	if first {
		c.err = err
	}
	c.turn.Broadcast()
	c.mu.Unlock()
	if a, ok := c.dst.(Aborter); ok && first {
		a.Abort()
	}
}

// take returns the next piece; ok is false if there is none, or after an error.
func (c *copier) take(ctx context.Context) (p piece, ok bool) {
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return p, false
	}
	p, err := c.nextPiece(ctx)
	c.mu.Unlock()
	if err != nil {
		c.fail(err)
		return p, false
	}
	return p, p.n > 0
}

// nextPiece finds the next piece: whole units of the target, of one kind, or
// data. Data ends at the next multiple of the buffer size.
func (c *copier) nextPiece(ctx context.Context) (piece, error) {
	p := piece{off: c.next}
	limit := p.off&^(c.buffer-1) + c.buffer
	end := p.off
	for end < c.size && (p.kind != pieceData || end < limit) {
		if err := ctx.Err(); err != nil {
			return p, err
		}
		e, kind, err := c.look(end)
		if err != nil {
			return p, err
		}
		if end == p.off {
			p.kind, p.extent = kind, e
		} else if kind != p.kind {
			break
		}
		end += e.Len
	}
	switch whole := end &^ (c.grain - 1); {
	case p.kind == pieceData:
		end = min((end+c.grain-1)&^(c.grain-1), limit, c.size)
	case end == c.size:
	case whole > p.off:
		end = whole
	default: // a unit of several kinds
		p.kind = pieceData
		end = min(p.off+c.grain, c.size)
	}
	if end > p.extent.Off+p.extent.Len {
		p.extent.Host = nil // of a part only
	}
	p.n = end - p.off
	c.next = end
	var err error
	if p.kind == pieceData && c.unit > c.block {
		p.cuts, err = c.cuts(p.off, end)
	}
	return p, err
}

// requestSize is how much qemu-img reads of data at once, from the beginning of an
// extent on. It looks for zeroes in each of these.
const requestSize = 2 << 20

// cuts returns where between off and end qemu-img would begin a request, but for
// multiples of a unit, where that makes no difference.
func (c *copier) cuts(off, end int64) (list []int64, err error) {
	for at := c.extent.Off + c.extent.Len; at < end; at = c.extent.Off + c.extent.Len {
		if _, _, err := c.look(at); err != nil {
			return nil, err
		}
	}
	done := 0
	for i, e := range c.asked {
		last := e.Off + e.Len
		if last <= end {
			done = i + 1
		}
		at := e.Off + max(off-e.Off, 0)/requestSize*requestSize
		for ; at < min(last, end); at += requestSize {
			list = c.cut(list, off, at)
		}
		if last < end {
			list = c.cut(list, off, last)
		}
	}
	c.asked = append(c.asked[:0], c.asked[done:]...)
	return list, nil
}

// cut adds a cut to those of a piece at off.
func (c *copier) cut(list []int64, off, at int64) []int64 {
	if at <= off || at&(c.unit-1) == 0 {
		return list
	}
	return append(list, at)
}

// look returns the extent at off from there on, and what is to be done with it.
func (c *copier) look(off int64) (blockdev.Extent, pieceKind, error) {
	e := &c.extent
	asks := off < e.Off || off >= e.Off+e.Len
	if asks {
		next, err := blockdev.NextExtent(c.src, off)
		switch {
		case err == nil:
			*e = next
		case c.opts.Salvage == nil:
			return next, 0, &ReadError{Off: off, Extents: true, Err: err}
		default:
			if off >= c.told {
				c.told = off + salvageUnit
				c.lost(&ReadError{Off: off, Extents: true, Err: err})
			}
			*e = blockdev.Extent{Off: off, Len: min(salvageUnit, c.size-off), Kind: blockdev.Data}
		}
	}
	rest := *e
	rest.Off, rest.Len = off, e.Off+e.Len-off
	rest.HostOff += off - e.Off
	switch {
	case c.opts.Keep != nil && c.opts.Keep(rest):
		return rest, pieceKeep, nil
	case rest.Kind.ReadsZero() && c.opts.Sparse > 0:
		return rest, pieceZero, nil
	}
	if asks && c.unit > c.block {
		c.asked = append(c.asked, blockdev.Range{Off: e.Off, Len: e.Len})
	}
	return rest, pieceData, nil
}

// await waits, if pieces are written in order, until all before off have been.
func (c *copier) await(off int64) error {
	if !c.opts.InOrder {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.done < off && c.err == nil {
		c.turn.Wait()
	}
	return c.err
}

// finished is told of each piece that was dealt with.
func (c *copier) finished(ctx context.Context, p piece) error {
	c.mu.Lock()
	c.done += p.n
	if p.kind == pieceData {
		c.written += p.n
	}
	c.turn.Broadcast()
	if c.opts.Progress != nil {
		c.opts.Progress(c.done, c.size)
	}
	written := c.written
	c.mu.Unlock()
	if c.opts.Rate <= 0 {
		return nil
	}
	due := time.Duration(float64(written) / float64(c.opts.Rate) * float64(time.Second))
	timer := time.NewTimer(time.Until(c.start.Add(due)))
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

// worker copies pieces.
type worker struct {
	*copier
	buf  []byte
	base []byte // what Options.Base has
	data []blockdev.Range
}

func (w *worker) copy(p piece) error {
	copies := w.copies != nil && w.opts.Base == nil && p.extent.Kind == blockdev.Data
	if p.kind != pieceData || copies {
		if err := w.await(p.off); err != nil {
			return err
		}
	}
	switch p.kind {
	case pieceKeep:
		return w.wrote(p.off, w.keep(p.off, p.n))
	case pieceZero:
		return w.wrote(p.off, w.zero(p.off, p.n))
	}
	start := p.off
	if copies {
		n, err := w.kernelCopy(p)
		if err != nil || n == p.n {
			return w.wrote(p.off+n, err)
		}
		p.off, p.n = p.off+n, p.n-n
	}
	if w.buf == nil {
		w.buf = make([]byte, w.buffer)
	}
	b := w.buf[:p.n]
	if err := w.read(b, p.off); err != nil {
		return err
	}
	switch {
	case w.opts.Base != nil:
		if err := w.differing(b, p.off); err != nil {
			return err
		}
	case w.opts.Sparse < 0:
		w.data = append(w.data[:0], blockdev.Range{Off: p.off, Len: p.n})
	default:
		w.findData(b, p)
	}
	if err := w.await(start); err != nil {
		return err
	}
	return w.wrote(p.off, w.write(b, p.off))
}

// findData looks for the data in b, the bytes of a piece.
func (w *worker) findData(b []byte, p piece) {
	if len(p.cuts) == 0 {
		w.data = dataRanges(w.data[:0], b, p.off, w.unit, w.opts.Sparse)
		return
	}
	w.data = w.data[:0]
	at := p.off
	for _, end := range append(p.cuts, p.off+p.n) {
		if end > at {
			w.data = append(w.data, dataRanges(nil, b[at-p.off:end-p.off], at, w.unit, w.opts.Sparse)...)
			at = end
		}
	}
	w.data = wholeBlocks(w.data, w.block, p.off+p.n)
}

// write writes what w.data says of b.
func (w *worker) write(b []byte, off int64) error {
	rest := w.zero
	switch {
	case w.opts.Base != nil:
		rest = w.keep
	case w.sparse != nil:
		return w.sparse.WriteSparse(b, off, w.data)
	}
	at, end := off, off+int64(len(b))
	for _, r := range w.data {
		if err := rest(at, r.Off-at); err != nil {
			return err
		}
		if _, err := w.dst.WriteAt(b[r.Off-off:][:r.Len], r.Off); err != nil {
			return err
		}
		at = r.Off + r.Len
	}
	return rest(at, end-at)
}

// keep leaves a range of the target as it is.
func (w *worker) keep(off, n int64) error {
	if n == 0 || w.skipper == nil {
		return nil
	}
	return w.skipper.Skip(off, n)
}

// zero makes a range of the target read as zeroes.
func (w *worker) zero(off, n int64) error {
	if n == 0 || w.opts.TargetIsZero && w.skipper == nil {
		return nil
	}
	if z, ok := w.dst.(blockdev.ZeroWriter); ok {
		return z.WriteZeroes(off, n)
	}
	if d, ok := w.dst.(blockdev.Device); ok {
		return blockdev.WriteZeroes(d, off, n)
	}
	zeroes := make([]byte, min(n, 64<<10))
	for ; n > 0; n -= int64(len(zeroes)) {
		zeroes = zeroes[:min(n, int64(len(zeroes)))]
		if _, err := w.dst.WriteAt(zeroes, off); err != nil {
			return err
		}
		off += int64(len(zeroes))
	}
	return nil
}

func (w *worker) wrote(off int64, err error) error {
	if err != nil {
		return &WriteError{off, err}
	}
	return nil
}

// kernelCopy has the target take the piece from the file that it lies in, and
// returns how much of it was taken.
func (w *worker) kernelCopy(p piece) (int64, error) {
	f, ok := p.extent.Host.(*blockdev.File)
	if !ok {
		return 0, nil
	}
	n, err := w.copies.CopyRange(p.off, f.OS(), p.extent.HostOff, p.n)
	if errors.Is(err, errors.ErrUnsupported) {
		err = nil
	}
	return n, err
}

// read fills b with the source at off.
func (w *worker) read(b []byte, off int64) error {
	n, err := w.src.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	if w.opts.Salvage == nil {
		if err == nil || err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return &ReadError{Off: off + int64(n), Err: err}
	}
	for at := 0; at < len(b); at += salvageUnit {
		part := b[at:min(at+salvageUnit, len(b))]
		if err := readFull(w.src, part, off+int64(at)); err != nil {
			clear(part)
			w.lost(&ReadError{Off: off + int64(at), Err: err})
		}
	}
	return nil
}

// salvageUnit is what is read at once where reading has failed, in bytes.
const salvageUnit = 512

// lost tells of what cannot be read.
func (c *copier) lost(err *ReadError) {
	c.salvage.Lock()
	defer c.salvage.Unlock()
	c.opts.Salvage(err)
}

// readFull reads all of p, which lies inside the device.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return err
}

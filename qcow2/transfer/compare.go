package transfer

import (
	"bytes"
	"context"
	"fmt"
	"runtime"
	"sync"

	"qimg/qcow2/blockdev"
)

// CompareOptions says how Compare compares. The zero value, and nil, mean: the
// content alone, by one worker for each processor.
type CompareOptions struct {
	// Workers is how many pieces are compared at the same time; 0 means one for
	// each processor, at most MaxWorkers.
	Workers int
	// Alike, if set, makes the comparison a strict one: the disks have to be made
	// of the same, too. It is asked of the extents of both, one call at a time,
	// wherever one of them begins, up to the end of the shorter disk.
	Alike func(a, b *blockdev.Extent) bool
	// Progress is told how many bytes have been dealt with, of those of the
	// longer disk, one call at a time. Nil: nobody is told.
	Progress func(done, total int64)
}

// DifferenceKind tells in what two disks differ.
type DifferenceKind uint8

const (
	// DifferentContent: they read differently.
	DifferentContent DifferenceKind = 1 + iota
	// DifferentAllocation: what they are made of is not alike.
	DifferentAllocation
)

func (k DifferenceKind) String() string {
	switch k {
	case DifferentContent:
		return "content"
	case DifferentAllocation:
		return "allocation"
	}
	return fmt.Sprintf("DifferenceKind(%d)", uint8(k))
}

// Difference is the first place, from the beginning, where two disks differ.
type Difference struct {
	Kind DifferenceKind
	// Off is the first byte that differs; that of DifferentAllocation begins an
	// extent of one of the disks.
	Off int64
}

// CompareError is an error of reading one of two disks.
type CompareError struct {
	Disk    int   // 0: the first, 1: the second
	Off     int64 // the first byte that cannot be read, to the sector
	Extents bool  // what the disk is made of cannot be told; else its data cannot be read
	Err     error
}

func (e *CompareError) Error() string {
	what := "reading"
	if e.Extents {
		what = "looking for extents"
	}
	return fmt.Sprintf("%s disk, %s at byte %d: %v", [...]string{"first", "second"}[e.Disk], what, e.Off, e.Err)
}

func (e *CompareError) Unwrap() error { return e.Err }

// Compare tells where a and b differ first; nil: nowhere. Behind the end of one
// disk the other has to read as zeroes.
//
// What both are made of is looked at first. Not read are ranges that are zeroes
// by the extents of both, and ranges that lie at one place of one file.
//
// An error is a *CompareError or that of ctx. What is found does not depend on
// the number of workers: of differences and errors it is the one with the lowest
// offset. Memory is that of the buffers: 2 x Workers x BufferSize.
func Compare(ctx context.Context, a, b blockdev.Reader, opts *CompareOptions) (*Difference, error) {
	c := &comparer{disks: [2]extents{{disk: a, size: a.Size()}, {disk: b, size: b.Size()}}, files: map[[2]*blockdev.File]bool{}}
	if opts != nil {
		c.opts = *opts
	}
	c.size = max(a.Size(), b.Size())
	c.stop = c.size
	workers := c.opts.Workers
	if workers <= 0 {
		workers = runtime.GOMAXPROCS(0)
	}
	var wg sync.WaitGroup
	for range min(workers, MaxWorkers) {
		wg.Go(func() { (&compareWorker{comparer: c}).run(ctx) })
	}
	wg.Wait()
	if c.ctxErr != nil {
		return nil, c.ctxErr
	}
	return c.difference, c.err
}

// extents are those of a disk, as they are gone through.
type extents struct {
	disk blockdev.Reader
	size int64
	last blockdev.Extent
}

// at returns the extent at off, from there on.
func (x *extents) at(off int64) (blockdev.Extent, error) {
	if off >= x.size { // as long as the other one is
		return blockdev.Extent{Off: off, Len: 1<<63 - 1 - off, Kind: blockdev.Unallocated}, nil
	}
	if off < x.last.Off || off >= x.last.Off+x.last.Len {
		next, err := blockdev.NextExtent(x.disk, off)
		if err != nil {
			return next, err
		}
		x.last = next
	}
	e := x.last
	e.Off, e.Len = off, x.last.Off+x.last.Len-off
	e.HostOff += off - x.last.Off
	return e, nil
}

// comparer is a Compare that goes on.
type comparer struct {
	opts CompareOptions
	size int64 // of the longer disk

	mu     sync.Mutex
	disks  [2]extents
	files  map[[2]*blockdev.File]bool // whether they are one
	next   int64                      // the disks are taken up to here
	done   int64
	ctxErr error
	// What was found with the lowest offset so far, and that offset; size if
	// nothing was.
	stop       int64
	difference *Difference
	err        error
}

// found keeps what has the lowest offset. c.mu is held.
func (c *comparer) found(off int64, d *Difference, err error) {
	if off < c.stop {
		c.stop, c.difference, c.err = off, d, err
	}
}

// dealt is told of bytes that need no more work. c.mu is held.
func (c *comparer) dealt(n int64) {
	c.done += n
	if c.opts.Progress != nil {
		c.opts.Progress(c.done, c.size)
	}
}

// segment is a range of which one disk or both have to be read; what is not read
// is zeroes.
type segment struct {
	off, n int64
	read   [2]bool
}

// maxSegments bounds the segments of a piece.
const maxSegments = 1024

// compareUnit is what is compared at once of data that is not compressed, in
// bytes: of both disks it stays in the cache of a processor.
const compareUnit = 256 << 10

// take appends the segments of the next piece to segs: one after the other, in
// one unit. There are none at the end, and behind what was found.
// c.mu is held.
func (c *comparer) take(ctx context.Context, segs []segment) []segment {
	limit, unit := c.size, int64(compareUnit)
	for c.next < min(limit, c.stop) && len(segs) < maxSegments && c.ctxErr == nil {
		if c.ctxErr = ctx.Err(); c.ctxErr != nil {
			break
		}
		var e [2]blockdev.Extent
		for i := range e {
			var err error
			if e[i], err = c.disks[i].at(c.next); err != nil {
				c.found(c.next, nil, &CompareError{i, c.next, true, err})
				return segs
			}
		}
		if c.opts.Alike != nil && c.next < min(c.disks[0].size, c.disks[1].size) && !c.opts.Alike(&e[0], &e[1]) {
			c.found(c.next, &Difference{DifferentAllocation, c.next}, nil)
			return segs
		}
		n := min(e[0].Len, e[1].Len, c.size-c.next)
		if c.sameBytes(&e[0], &e[1]) {
			if len(segs) > 0 {
				break
			}
			c.next += n
			c.dealt(n)
			continue
		}
		compressed := e[0].Kind == blockdev.Compressed || e[1].Kind == blockdev.Compressed
		if len(segs) == 0 {
			if compressed {
				unit = BufferSize // few clusters lie across the edges
			}
			limit = min(limit, c.next&^(unit-1)+unit)
		} else if compressed && unit < BufferSize {
			break
		}
		s := segment{c.next, min(n, limit-c.next), [2]bool{!e[0].Kind.ReadsZero(), !e[1].Kind.ReadsZero()}}
		if i := len(segs) - 1; i >= 0 && segs[i].read == s.read {
			segs[i].n += s.n
		} else {
			segs = append(segs, s)
		}
		c.next += s.n
	}
	return segs
}

// sameBytes reports whether two extents read the same without a look at their
// bytes. c.mu is held.
func (c *comparer) sameBytes(a, b *blockdev.Extent) bool {
	if a.Kind.ReadsZero() || b.Kind.ReadsZero() {
		return a.Kind.ReadsZero() && b.Kind.ReadsZero()
	}
	return a.Kind == blockdev.Data && b.Kind == blockdev.Data && a.Host != nil && b.Host != nil &&
		a.HostOff == b.HostOff && c.sameHost(a.Host, b.Host)
}

// sameHost is blockdev.SameHost, with a memory.
func (c *comparer) sameHost(a, b blockdev.Reader) bool {
	f, ok := a.(*blockdev.File)
	g, both := b.(*blockdev.File)
	if !ok || !both {
		return false // others are compared by their bytes
	}
	pair := [2]*blockdev.File{f, g}
	same, known := c.files[pair]
	if !known {
		same = blockdev.SameHost(f, g)
		c.files[pair] = same
	}
	return same
}

// compareWorker compares pieces.
type compareWorker struct {
	*comparer
	buf [2][]byte
}

func (w *compareWorker) run(ctx context.Context) {
	var segs []segment
	for {
		w.mu.Lock()
		segs = w.take(ctx, segs[:0])
		w.mu.Unlock()
		if len(segs) == 0 {
			return
		}
		off, d, err := w.compare(segs)
		w.mu.Lock()
		if d != nil || err != nil {
			w.found(off, d, err)
		}
		last := segs[len(segs)-1]
		w.dealt(last.off + last.n - segs[0].off)
		w.mu.Unlock()
	}
}

// compare looks for the lowest difference or error in a piece.
func (w *compareWorker) compare(segs []segment) (off int64, d *Difference, err error) {
	start := segs[0].off
	last := segs[len(segs)-1]
	end := last.off + last.n // of what could be read
	for i := range w.buf {
		if w.buf[i] == nil {
			w.buf[i] = make([]byte, BufferSize)
		}
		if at, e := w.fill(i, segs, end); e != nil {
			end, err = at, &CompareError{i, at, false, e}
		}
	}
	for _, s := range segs {
		n := min(s.n, end-s.off)
		if n <= 0 {
			break
		}
		a, b := w.buf[0][s.off-start:][:n], w.buf[1][s.off-start:][:n]
		at := -1
		switch {
		case s.read[0] && s.read[1]:
			at = firstDifference(a, b)
		case s.read[0]:
			at = firstNonZero(a)
		default:
			at = firstNonZero(b)
		}
		if at >= 0 {
			off = s.off + int64(at)
			return off, &Difference{DifferentContent, off}, nil
		}
	}
	return end, nil, err
}

// fill reads what has to be read of a disk, up to end, in as few reads as
// there can be. After an error off is the first byte that cannot be read.
func (w *compareWorker) fill(i int, segs []segment, end int64) (off int64, err error) {
	for at := 0; at < len(segs); at++ {
		s := segs[at]
		if !s.read[i] || s.off >= end {
			continue
		}
		for at+1 < len(segs) && segs[at+1].read[i] {
			at++
			s.n += segs[at].n
		}
		p := w.buf[i][s.off-segs[0].off:][:min(s.n, end-s.off)]
		if err := readFull(w.disks[i].disk, p, s.off); err != nil {
			return firstUnreadable(w.disks[i].disk, p, s.off, err)
		}
	}
	return end, nil
}

// firstUnreadable finds the sector that a failed read of p is about. What lies
// before it is read then.
func firstUnreadable(r blockdev.Reader, p []byte, off int64, err error) (int64, error) {
	const sector = 512
	for len(p) > sector {
		half := (len(p)/2 + sector - 1) &^ (sector - 1)
		if e := readFull(r, p[:half], off); e != nil {
			p, err = p[:half], e
		} else {
			p, off = p[half:], off+int64(half)
		}
	}
	return off, err
}

// firstDifference returns the index of the first byte in which a and b, of one
// length, differ; -1 if there is none.
func firstDifference(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	const block = 4096
	at := 0
	for ; at+block <= len(a) && bytes.Equal(a[at:at+block], b[at:at+block]); at += block {
	}
	for a[at] == b[at] {
		at++
	}
	return at
}

// firstNonZero returns the index of the first byte that is not zero; -1 if there
// is none.
func firstNonZero(p []byte) int {
	if IsZero(p) {
		return -1
	}
	at := 0
	for p[at] == 0 {
		at++
	}
	return at
}

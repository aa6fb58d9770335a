package ext4img

import (
	"fmt"
	"io"
	"sort"
	"sync"

	"qimg/qcow2/blockdev"
)

// LayoutReader is a layout as a disk that is read: a blockdev.Reader and
// ExtentReader, for sinks that Layout.Write cannot write to, such as a pipe or a
// partition. What it holds is what Write writes. It is safe for concurrent use.
type LayoutReader struct {
	l       *Layout
	runs    []run     // what is not zeroes, in blocks, ascending
	fillers sync.Pool // of *filler
}

// Reader returns the file system as a disk that is read. The tree may not be
// closed before the last read.
func (l *Layout) Reader() *LayoutReader {
	r := &LayoutReader{l: l, fillers: sync.Pool{New: func() any { return newFiller(l) }}}
	bs := l.geo.blockSize
	for off, n := range l.Extents() {
		r.runs = append(r.runs, run{off / bs, (off + n) / bs})
	}
	return r
}

// Size returns the size of the disk in bytes.
func (r *LayoutReader) Size() int64 { return r.l.size }

// NextExtent implements blockdev.ExtentReader.
func (r *LayoutReader) NextExtent(off int64) (blockdev.Extent, error) {
	if off < 0 || off >= r.l.size {
		return blockdev.Extent{}, fmt.Errorf("offset %d: %w", off, blockdev.ErrRange)
	}
	bs := r.l.geo.blockSize
	e := blockdev.Extent{Off: off, Len: r.l.size - off, Kind: blockdev.Zero}
	i := sort.Search(len(r.runs), func(i int) bool { return r.runs[i].end*bs > off })
	switch {
	case i == len(r.runs):
	case r.runs[i].start*bs <= off:
		e.Kind, e.Len = blockdev.Data, min(e.Len, r.runs[i].end*bs-off)
	default:
		e.Len = r.runs[i].start*bs - off
	}
	return e, nil
}

// ReadAt implements io.ReaderAt. Whole blocks are faster than others. A source
// file that changed since the scan gives an error that names it and matches
// ErrChanged.
func (r *LayoutReader) ReadAt(p []byte, off int64) (n int, err error) {
	size := r.l.size
	if off < 0 {
		return 0, fmt.Errorf("offset %d: %w", off, blockdev.ErrRange)
	}
	if off > size || off == size && len(p) > 0 {
		return 0, io.EOF
	}
	if int64(len(p)) > size-off {
		p, err = p[:size-off], io.EOF
	}
	f := r.fillers.Get().(*filler)
	defer r.fillers.Put(f)
	bs := r.l.geo.blockSize
	for n < len(p) {
		block, skip := (off+int64(n))/bs, (off+int64(n))%bs
		if whole := int64(len(p)-n) / bs * bs; skip == 0 && whole > 0 {
			if e := f.fill(p[n:n+int(whole)], block); e != nil {
				return n, e
			}
			n += int(whole)
			continue
		}
		b := make([]byte, bs)
		if e := f.fill(b, block); e != nil {
			return n, e
		}
		n += copy(p[n:], b[skip:])
	}
	return n, err
}

package parttable

import (
	"cmp"
	"fmt"
	"io"
	"slices"

	"qimg/qcow2/blockdev"
)

// Disk is a disk that does not exist as a whole: a partition table in memory, and
// in the partitions what other readers hold. Behind their ends, and between
// partitions, it reads as zeroes. It is as safe for concurrent use as the
// readers.
type Disk struct {
	table *blockdev.Memory
	parts []diskPart // by offset
}

type diskPart struct {
	off, n int64 // n is at most what the partition has
	r      blockdev.Reader
}

// NewDisk puts together a disk of size bytes. content has a reader for each
// partition of the spec; nil: zeroes. One that is longer than its partition is an
// error.
func NewDisk(size int64, spec *Spec, content []blockdev.Reader) (*Disk, error) {
	if size < 0 || len(content) != len(spec.Partitions) {
		return nil, fmt.Errorf("%d contents for %d partitions on a disk of %d bytes", len(content), len(spec.Partitions), size)
	}
	d := &Disk{table: blockdev.NewMemory(size)}
	if _, err := Write(d.table, spec); err != nil {
		return nil, err
	}
	for i, r := range content {
		if r == nil || r.Size() == 0 {
			continue
		}
		p := &spec.Partitions[i]
		if r.Size() > p.Size {
			return nil, fmt.Errorf("partition %d of %d bytes is too small for its content of %d bytes", i+1, p.Size, r.Size())
		}
		d.parts = append(d.parts, diskPart{p.Start, r.Size(), r})
	}
	slices.SortFunc(d.parts, func(a, b diskPart) int { return cmp.Compare(a.off, b.off) })
	return d, nil
}

// Size returns the size of the disk in bytes.
func (d *Disk) Size() int64 { return d.table.Size() }

// at returns what the disk is made of at off: a reader, its offset, and how many
// bytes from off on are in it.
func (d *Disk) at(off int64) (r blockdev.Reader, start, n int64) {
	end := d.Size()
	for _, p := range d.parts {
		if off < p.off {
			end = p.off
			break
		}
		if off < p.off+p.n {
			return p.r, p.off, p.off + p.n - off
		}
	}
	return d.table, 0, end - off
}

// ReadAt implements io.ReaderAt.
func (d *Disk) ReadAt(b []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, fmt.Errorf("offset %d: %w", off, blockdev.ErrRange)
	}
	for n < len(b) {
		pos := off + int64(n)
		if pos >= d.Size() {
			return n, io.EOF
		}
		r, start, left := d.at(pos)
		part := b[n:min(int64(len(b)), int64(n)+left)]
		m, err := r.ReadAt(part, pos-start)
		n += m
		if m < len(part) {
			if err == nil || err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return n, err
		}
	}
	return n, nil
}

// NextExtent implements blockdev.ExtentReader.
func (d *Disk) NextExtent(off int64) (blockdev.Extent, error) {
	if off < 0 || off >= d.Size() {
		return blockdev.Extent{}, fmt.Errorf("offset %d: %w", off, blockdev.ErrRange)
	}
	r, start, left := d.at(off)
	e, err := blockdev.NextExtent(r, off-start)
	if err != nil {
		return e, err
	}
	e.Off, e.Len = off, min(e.Len, left)
	return e, nil
}

package cli

import (
	"io"
	"sync"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
)

// guestDisk is the disk of an image in the way that QEMU tells of it
// (bdrv_block_status_above): in whole sectors; what lies behind the end of a
// backing file is zeroes; and so are the holes of an image file whose metadata
// was preallocated.
type guestDisk struct {
	blockdev.Reader
	size int64
	mu   sync.Mutex // of mapper
	*mapper
}

func newGuestDisk(img *image) *guestDisk {
	return &guestDisk{Reader: img.reader(), size: img.size(), mapper: newMapper(img)}
}

// Size returns the size in bytes, a multiple of 512.
func (d *guestDisk) Size() int64 { return d.size }

// ReadAt reads zeroes in the rest of the last sector.
func (d *guestDisk) ReadAt(p []byte, off int64) (int, error) {
	n, err := d.Reader.ReadAt(p, off)
	if end := off + int64(n); err == io.EOF && end == d.Reader.Size() && end < d.size {
		tail := p[n:min(int64(len(p)), int64(n)+d.size-end)]
		clear(tail)
		if n += len(tail); n == len(p) {
			err = nil
		}
	}
	return n, err
}

// NextExtent implements blockdev.ExtentReader.
func (d *guestDisk) NextExtent(off int64) (blockdev.Extent, error) {
	if off >= d.Reader.Size() && off < d.size {
		return blockdev.Extent{Off: off, Len: d.size - off, Kind: blockdev.Zero, Host: d.Reader, HostOff: off}, nil
	}
	x, err := blockdev.NextExtent(d.Reader, off)
	if err != nil {
		return x, err
	}
	layer := &d.chain[x.Depth]
	switch {
	case x.Kind == blockdev.Unallocated && layer.im != nil && layer.im.Backing() != nil:
		x.Kind = blockdev.Zero
	case x.Kind == blockdev.Data && x.Host != nil:
		e := mapEntry{length: x.Len, depth: x.Depth, offset: x.HostOff}
		d.mu.Lock()
		defer d.mu.Unlock()
		if err := d.lookBelow(&e, x.Host); err != nil {
			return x, err
		}
		if x.Len = e.length; e.zero {
			x.Kind = blockdev.Zero
		}
	}
	// QEMU does not look across slices of L2 tables, nor compressed clusters. It
	// tells whether what it has found reaches the end of the disk, so that the
	// last one counts.
	for i := range d.chain[:x.Depth+1] {
		im := d.chain[i].im
		if im == nil {
			break
		}
		h := im.Header()
		step := sliceSize(&h)
		if x.Kind == blockdev.Compressed && i == x.Depth {
			step = h.ClusterSize()
		}
		if last := (d.size - 1) / step * step; off < last {
			x.Len = min(x.Len, last-off)
		}
	}
	return x, nil
}

// sliceSize is how many bytes of a disk a slice of an L2 table maps: QEMU reads
// them in parts of 4 KiB.
func sliceSize(h *qcow2.Header) int64 {
	entry := int64(8)
	if h.IncompatibleFeatures&qcow2.IncompatExtendedL2 != 0 {
		entry = 16
	}
	return min(h.ClusterSize(), 4096) / entry * h.ClusterSize()
}

// blockStatus is QEMU's BDRV_BLOCK_*, what compare -s compares.
type blockStatus uint8

const (
	statusData blockStatus = 1 << iota
	statusZero
	statusOffset
	statusAllocated
	statusEnd // it reaches the end of the disk
)

// status tells what QEMU does of an extent of this disk.
func (d *guestDisk) status(x *blockdev.Extent) (s blockStatus) {
	if x.Host != nil {
		s |= statusOffset
	}
	if x.Off+x.Len == d.size {
		s |= statusEnd
	}
	if x.Kind == blockdev.Unallocated {
		// The layer that holds nothing tells of its own end.
		if im := d.chain[x.Depth].im; im != nil && x.Off+x.Len == im.Size() {
			s |= statusEnd
		}
		return s | statusZero
	}
	if x.Kind == blockdev.Zero {
		s |= statusZero
	} else {
		s |= statusData
	}
	if x.Kind == blockdev.Zero && d.chain[x.Depth].holes && x.Off < d.Reader.Size() {
		if was, err := blockdev.NextExtent(d.Reader, x.Off); err == nil && was.Kind == blockdev.Data {
			s |= statusData
		}
	}
	return s | statusAllocated
}

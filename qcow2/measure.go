package qcow2

import (
	"context"
	"math/bits"

	"qimg/qcow2/blockdev"
)

// Measurement is how large the file of a new image gets, in bytes. Sizes are
// those of qemu-img measure: an image of Writer or Create is not larger, but for
// an encrypted one, whose refcounts of the encryption header are not counted.
type Measurement struct {
	// Required is the size with the content that was measured, where nothing
	// is compressed. The tables are those of the whole disk.
	Required uint64
	// FullyAllocated is the size when the guest has written everything.
	FullyAllocated uint64
}

// Measure returns how large an image of src gets, or an empty one of size bytes
// if src is nil. Sizes are rounded up to clusters. With a backing file all of src
// counts, since nothing is known of what the two have in common; so it does with
// preallocation. Else the extents of src count, to whole clusters, in time in
// proportion to their number.
//
// Of opts it looks at ClusterSize, ExtendedL2, Version, RefcountBits, BackingFile,
// Encrypt and Preallocation. Those that are not allowed are an OptionError.
// As in qemu-img, a size that is too large for the cluster size is an error; that of
// src is not looked at.
func Measure(ctx context.Context, size int64, src blockdev.Reader, opts *CreateOptions) (m Measurement, err error) {
	if opts == nil {
		opts = &CreateOptions{}
	}
	h, err := opts.measured()
	if err != nil {
		return m, err
	}
	g := h.geometry()
	cluster := uint64(h.ClusterSize())
	if src != nil {
		size = src.Size()
	}
	disk := roundUp(uint64(size), cluster)
	switch tables := divUp(disk/cluster, 1<<g.l2Bits); {
	case size < 0:
		return m, OptionError("Image size cannot be negative")
	case src == nil && tables*l1EntrySize > maxL1Size:
		return m, OptionError("The image size is too large (try using a larger cluster size)")
	}
	luks, err := opts.Encrypt.check()
	if err != nil {
		return m, err
	}
	var data uint64
	switch {
	case opts.Preallocation >= PreallocationFalloc, src != nil && opts.BackingFile != "":
		data = disk
	case src != nil:
		if data, err = dataClusters(ctx, src, g.clusterBits); err != nil {
			return m, err
		}
	}
	m.FullyAllocated = fullSize(&g, disk)
	if luks != nil {
		m.FullyAllocated += roundUp(uint64(luks.PayloadOffset), cluster)
	}
	m.Required = m.FullyAllocated - disk + data
	return m, nil
}

// measured checks the options that Measure looks at.
func (o *CreateOptions) measured() (Header, error) {
	f := FormatOptions{ClusterSize: o.ClusterSize, ExtendedL2: o.ExtendedL2, RefcountBits: o.RefcountBits}
	h, err := f.header(0)
	if err == nil && o.Version == 2 && h.RefcountOrder != 4 {
		err = OptionError("Different refcount widths than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)")
	}
	return h, err
}

// dataClusters returns the bytes of the clusters that data of src lies in.
func dataClusters(ctx context.Context, src blockdev.Reader, clusterBits uint) (n uint64, err error) {
	cluster := uint64(1) << clusterBits
	for off, size := uint64(0), uint64(src.Size()); off < size; {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		e, err := blockdev.NextExtent(src, int64(off))
		if err != nil {
			return 0, err
		}
		end := off + uint64(e.Len)
		if !e.Kind.ReadsZero() {
			end = roundUp(end, cluster)
			n += end - off&^(cluster-1)
		}
		off = end
	}
	return n, nil
}

// fullSize returns the size of an image all of whose clusters, disk bytes, are
// stored: block/qcow2.c, qcow2_calc_prealloc_size.
func fullSize(g *geometry, disk uint64) uint64 {
	cluster := uint64(g.clusterSize)
	l2 := divUp(disk>>g.clusterBits, 1<<g.l2Bits)
	l1 := divUp(l2*l1EntrySize, cluster)
	used := 1 + l2 + l1 + disk>>g.clusterBits
	perBlock, perTable := uint64(g.refcountsPerBlock()), cluster/reftableEntrySize
	var blocks, table uint64
	for all := used; ; {
		blocks = divUp(all, perBlock)
		table = divUp(blocks, perTable)
		if used+blocks+table == all {
			return all << g.clusterBits
		}
		all = used + blocks + table
	}
}

// MeasureBitmaps returns the bytes that the persistent bitmaps of the image take
// in an image of another cluster size, which is a power of two, if they are
// stored whole.
func (im *Image) MeasureBitmaps(clusterSize int64) (uint64, error) {
	list, err := im.Bitmaps()
	if err != nil {
		return 0, err
	}
	h := im.Header()
	clusterBits := bits.TrailingZeros64(uint64(clusterSize))
	var n, directory uint64
	for i := range list {
		clusters := divUp(divUp(uint64(list[i].bits(h.bitmapSize())), 8), uint64(clusterSize))
		n += clusters<<clusterBits + roundUp(clusters*8, uint64(clusterSize))
		directory += uint64(list[i].entrySize())
	}
	return n + roundUp(directory, uint64(clusterSize)), nil
}

func divUp(n, by uint64) uint64 { return (n + by - 1) / by }

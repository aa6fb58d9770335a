package qcow2

import (
	"encoding/binary"
	"fmt"
)

// PreallocatedMetadata reports whether many more clusters of the image file are
// in use than its space on the disk can hold, by QEMU's measure
// (block/qcow2-refcount.c, qcow2_detect_metadata_preallocation). If so, guest
// clusters were given their place before they were written, and the holes of
// the file tell which read as zeroes. It is false for an image that is not in a
// *blockdev.File. It reads refcount blocks up to the cluster that decides.
func (im *Image) PreallocatedMetadata() (bool, error) {
	f, ok := im.dev.(interface{ Allocated() (int64, error) })
	if !ok {
		return false, nil
	}
	allocated, err := f.Allocated()
	if err != nil {
		return false, err
	}
	defer im.rlock()()
	h, g := &im.header, &im.geo
	onDisk := allocated >> g.clusterBits
	threshold := max(onDisk/9*10+onDisk%9*10/9, onDisk+2)
	clusters := g.clusters(im.dev.Size())
	table, err := readTable(im.dev, int64(h.RefcountTableOffset), int64(h.RefcountTableClusters)<<h.ClusterBits)
	if err != nil {
		return false, fmt.Errorf("qcow2: refcount table at %#x: %w", h.RefcountTableOffset, err)
	}
	slice := make([]byte, im.sliceSize())
	perSlice := im.sliceSize() * 8 / int64(g.refcountBits)
	perBlock := g.refcountsPerBlock()
	var used int64
	for cluster := int64(0); cluster < clusters && cluster/perBlock < int64(len(table)/reftableEntrySize); {
		entry := binary.BigEndian.Uint64(table[cluster/perBlock*reftableEntrySize:])
		off := int64(entry & reftableOffsetMask)
		if off <= 0 || off >= im.dev.Size() {
			cluster += perBlock - cluster%perBlock
			continue
		}
		if err := readFull(im.dev, slice, off+cluster%perBlock/perSlice*im.sliceSize()); err != nil {
			return false, fmt.Errorf("qcow2: refcount block at %#x: %w", off, err)
		}
		for end := min(cluster+perSlice, clusters); cluster < end; cluster++ {
			if g.refcountIn(slice, cluster) != 0 {
				if used++; used >= threshold {
					return true, nil
				}
			}
		}
	}
	return used >= threshold, nil
}

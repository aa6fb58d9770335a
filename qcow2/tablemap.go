package qcow2

import (
	"fmt"
	"slices"
)

// tableMap knows the clusters that the tables of an image lie in, so that
// nothing else is written there, whatever a damaged image says
// (block/qcow2-refcount.c, qcow2_check_metadata_overlap). The L2 tables of
// snapshots are not among them.
type tableMap struct {
	sorted []int64 // clusters
	more   map[int64]bool
	less   map[int64]bool
}

// maxInactiveL1 is how many clusters of L1 tables of snapshots are known at most.
const maxInactiveL1 = 1 << 20

// add notes a cluster that has become a table.
func (m *tableMap) add(cluster int64) {
	delete(m.less, cluster)
	m.more[cluster] = true
}

// remove notes that a cluster is free, or that it is none of a table.
func (m *tableMap) remove(cluster int64) {
	delete(m.more, cluster)
	if _, ok := slices.BinarySearch(m.sorted, cluster); ok {
		m.less[cluster] = true
	}
}

// hit returns the first cluster from first up to end that is of a table, or -1.
func (m *tableMap) hit(first, end int64) int64 {
	at, _ := slices.BinarySearch(m.sorted, first)
	for ; at < len(m.sorted) && m.sorted[at] < end; at++ {
		if !m.less[m.sorted[at]] {
			return m.sorted[at]
		}
	}
	if len(m.more) > 0 {
		for c := first; c < end; c++ {
			if m.more[c] {
				return c
			}
		}
	}
	return -1
}

// mapTables finds the clusters of all tables but the L2 tables of snapshots.
// Two tables in one cluster are an error that matches ErrCorrupt.
func (im *Image) mapTables() error {
	g := &im.geo
	m := &tableMap{more: make(map[int64]bool), less: make(map[int64]bool)}
	add := func(off, n int64) {
		for c := off >> g.clusterBits; c < (off+n+g.clusterSize-1)>>g.clusterBits; c++ {
			m.sorted = append(m.sorted, c)
		}
	}
	h := &im.header
	add(0, g.clusterSize)
	add(int64(h.L1TableOffset), int64(h.L1Size)*l1EntrySize)
	add(int64(h.RefcountTableOffset), int64(h.RefcountTableClusters)<<g.clusterBits)
	for _, off := range im.w.alloc.table {
		if off != 0 {
			add(int64(off), g.clusterSize)
		}
	}
	if h.NbSnapshots > 0 {
		add(int64(h.SnapshotsOffset), im.snapEnd-int64(h.SnapshotsOffset))
	}
	inactive := int64(0)
	for _, s := range im.snapshots {
		inactive += g.clusters(int64(s.L1Size) * l1EntrySize)
	}
	for _, s := range im.snapshots {
		if s.L1TableOffset < maxHostSize && inactive <= maxInactiveL1 {
			add(int64(s.L1TableOffset), int64(s.L1Size)*l1EntrySize)
		}
	}
	if x, ok := h.Bitmaps(); ok {
		add(int64(x.DirectoryOffset), int64(x.DirectorySize))
	}
	if x, ok := h.Crypto(); ok {
		add(int64(x.Offset), int64(x.Length))
	}
	for i := range int64(len(im.l1) / l1EntrySize) {
		if off := im.l1Entry(i) & l1OffsetMask; off != 0 {
			add(int64(off), g.clusterSize)
		}
	}
	slices.Sort(m.sorted)
	for i := 1; i < len(m.sorted); i++ {
		if m.sorted[i] == m.sorted[i-1] {
			return fmt.Errorf("qcow2: two tables lie in the cluster at %#x: run check: %w", m.sorted[i]<<g.clusterBits, ErrCorrupt)
		}
	}
	im.w.tables = m
	return nil
}

// checkOverlap refuses a write of guest data upon a table.
func (im *Image) checkOverlap(off, n int64) error {
	g := &im.geo
	if c := im.w.tables.hit(off>>g.clusterBits, (off+n+g.clusterSize-1)>>g.clusterBits); c >= 0 && !g.dataFile {
		return fmt.Errorf("qcow2: guest data at %#x would be written upon a table at %#x: run check: %w", off, c<<g.clusterBits, ErrCorrupt)
	}
	return nil
}

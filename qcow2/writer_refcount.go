package qcow2

import "fmt"

// refcountArea returns what has to lie behind the first used clusters of a
// file so that all of it is counted: so many refcount blocks, beyond the
// placed ones that lie among the used clusters, and a refcount table of so
// many clusters.
func (g *geometry) refcountArea(used, placed int64) (blocks, table int64, err error) {
	for {
		all := (used + blocks + table + g.refcountsPerBlock() - 1) / g.refcountsPerBlock()
		b, t := all-placed, g.clusters(all*reftableEntrySize)
		if t*g.clusterSize > maxReftableSize {
			return 0, 0, fmt.Errorf("qcow2: an image of %d clusters of %d bytes needs a refcount table of %d bytes, at most %d are allowed: %w",
				used, g.clusterSize, t*g.clusterSize, maxReftableSize, ErrLimit)
		}
		if b == blocks && t == table {
			return blocks, table, nil
		}
		blocks, table = b, t // neither ever shrinks
	}
}

// appender hands out the clusters of a new file in ascending order and counts
// them. Cluster 0 is the header's.
type appender struct {
	geo  *geometry
	next int64 // first free cluster

	block []byte   // refcounts of the block that next lies in
	full  [][]byte // refcounts of the blocks before it that have no place yet

	// free is where the next compressed cluster can go on, or 0. The cluster
	// it lies in has refcount freeCount and is counted in block.
	free      int64
	freeCount uint64
}

func newAppender(geo *geometry) *appender {
	a := &appender{geo: geo, block: make([]byte, geo.clusterSize)}
	a.clusters(1)
	return a
}

// clusters returns n new clusters in a row with refcount one.
func (a *appender) clusters(n int64) int64 {
	first := a.next
	for range n {
		per := a.geo.refcountsPerBlock()
		putRefcount(a.block, a.geo.refcountBits, a.next%per, 1)
		a.next++
		if a.next%per == 0 {
			a.full = append(a.full, a.block)
			a.block = make([]byte, a.geo.clusterSize)
			a.free = 0
		}
	}
	return first
}

// bytes returns the place of a compressed cluster of n bytes, at most a
// cluster. It goes on where the last one ended if there is room, which may
// take in the cluster behind, and if the refcount can grow.
func (a *appender) bytes(n int64) int64 {
	room := -a.free & (a.geo.clusterSize - 1)
	maxCount := ^uint64(0) >> (64 - a.geo.refcountBits)
	last := a.free >> a.geo.clusterBits
	if room == 0 || a.freeCount == maxCount || n > room && last+1 != a.next {
		a.free = a.clusters(1) << a.geo.clusterBits
		a.freeCount = 1
		return a.advance(a.free, n)
	}
	a.freeCount++
	putRefcount(a.block, a.geo.refcountBits, last%a.geo.refcountsPerBlock(), a.freeCount)
	off := a.free
	if n > room {
		a.clusters(1)
		a.freeCount = 1
	}
	return a.advance(off, n)
}

// advance takes n bytes at off. The last cluster of a refcount block is not
// gone on with: its refcount is final.
func (a *appender) advance(off, n int64) int64 {
	a.free = off + n
	if a.next%a.geo.refcountsPerBlock() == 0 {
		a.free = 0
	}
	return off
}

package qcow2

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"iter"
	"slices"

	"qimg/qcow2/blockdev"
)

// plannedRun is a run of planned guest clusters.
type plannedRun struct {
	cluster int64 // first guest cluster
	n       int64 // clusters
	rank    int64 // planned clusters before it
}

func (r plannedRun) end() int64 { return r.cluster + r.n }

// plan is the set of guest clusters that an image gets, ascending. Runs
// neither touch nor overlap.
type plan []plannedRun

// newPlan rounds extents out to clusters.
func newPlan(extents iter.Seq2[int64, int64], size int64, clusterBits uint) (plan, error) {
	var p plan
	if extents == nil {
		return nil, nil
	}
	var last int64
	for off, n := range extents {
		if off < last || n < 0 || n > size-off {
			return nil, fmt.Errorf("qcow2: planned extent of %d bytes at %#x: expected one between %#x and the end at %#x", n, off, last, size)
		}
		if n == 0 {
			continue
		}
		last = off + n
		first, end := off>>clusterBits, (last-1)>>clusterBits+1
		if len(p) > 0 && first <= p[len(p)-1].end() {
			r := &p[len(p)-1]
			r.n = end - r.cluster
			continue
		}
		p = append(p, plannedRun{first, end - first, p.clusters()})
	}
	return p, nil
}

// clusters returns how many clusters are planned.
func (p plan) clusters() int64 {
	if len(p) == 0 {
		return 0
	}
	r := p[len(p)-1]
	return r.rank + r.n
}

// find returns the run that holds a guest cluster.
func (p plan) find(cluster int64) (plannedRun, bool) {
	i, ok := slices.BinarySearchFunc(p, cluster, func(r plannedRun, cluster int64) int {
		switch {
		case r.end() <= cluster:
			return -1
		case r.cluster > cluster:
			return 1
		}
		return 0
	})
	if !ok {
		return plannedRun{}, false
	}
	return p[i], true
}

// tables yields the L2 tables that the plan needs, as L1 indexes.
func (p plan) tables(l2Bits uint) iter.Seq[int64] {
	return func(yield func(int64) bool) {
		next := int64(0)
		for _, r := range p {
			for t := max(next, r.cluster>>l2Bits); t <= (r.end()-1)>>l2Bits; t++ {
				if !yield(t) {
					return
				}
				next = t + 1
			}
		}
	}
}

// refcountsPerBlock returns how many entries a refcount block has.
func (g *geometry) refcountsPerBlock() int64 { return g.clusterSize * 8 / int64(g.refcountBits) }

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

// putRefcount sets entry i of a refcount block whose entries are bits wide.
func putRefcount(block []byte, bits uint, i int64, v uint64) {
	switch bits {
	case 64:
		binary.BigEndian.PutUint64(block[i*8:], v)
	case 32:
		binary.BigEndian.PutUint32(block[i*4:], uint32(v))
	case 16:
		binary.BigEndian.PutUint16(block[i*2:], uint16(v))
	case 8:
		block[i] = byte(v)
	default: // 1, 2, 4: the first entry lies in the lowest bits
		shift := uint(i) * bits & 7
		at := &block[i*int64(bits)>>3]
		*at = *at&^(byte(1<<bits-1)<<shift) | byte(v)<<shift
	}
}

// tableWriter writes tables one behind the other, in large pieces.
type tableWriter struct {
	*bufio.Writer // keeps the first error until Flush
	geo           *geometry
}

const tableBuffer = 1 << 20

func newTableWriter(dst blockdev.Device, geo *geometry, cluster int64) tableWriter {
	return tableWriter{bufio.NewWriterSize(io.NewOffsetWriter(dst, cluster<<geo.clusterBits), tableBuffer), geo}
}

func (w tableWriter) uint64(v uint64) {
	if w.Available() < 8 {
		w.Flush()
	}
	w.Write(binary.BigEndian.AppendUint64(w.AvailableBuffer(), v))
}

// zeroes writes n zero bytes.
func (w tableWriter) zeroes(n int64) {
	for n > 0 {
		if w.Available() == 0 && w.Flush() != nil {
			return
		}
		b := w.AvailableBuffer()
		b = b[:min(n, int64(cap(b)))]
		clear(b)
		w.Write(b)
		n -= int64(len(b))
	}
}

// padTo fills up the last cluster of a table of n bytes.
func (w tableWriter) pad(n int64) { w.zeroes(w.geo.clusters(n)<<w.geo.clusterBits - n) }

// l2Tables writes the L2 tables of a plan. host gives the place of a planned
// guest cluster; bitmap is the second word of extended entries.
func (w tableWriter) l2Tables(p plan, host func(cluster, rank int64) int64, bitmap uint64) {
	entries := int64(1) << w.geo.l2Bits
	table, next := int64(-1), entries // next entry of table
	for _, r := range p {
		for i := range r.n {
			c := r.cluster + i
			if t := c >> w.geo.l2Bits; t != table {
				w.zeroes((entries - next) * w.geo.l2EntrySize)
				table, next = t, 0
			}
			entry := c & (entries - 1)
			w.zeroes((entry - next) * w.geo.l2EntrySize)
			w.uint64(uint64(host(c, r.rank+i)) | oflagCopied)
			if w.geo.extended {
				w.uint64(bitmap)
			}
			next = entry + 1
		}
	}
	w.zeroes((entries - next) * w.geo.l2EntrySize)
}

// l1Table writes the L1 table of a plan whose L2 tables lie one behind the
// other from the host cluster first on.
func (w tableWriter) l1Table(p plan, l1Size, first int64) {
	next := int64(0)
	for t := range p.tables(w.geo.l2Bits) {
		w.zeroes((t - next) * l1EntrySize)
		w.uint64(uint64(first<<w.geo.clusterBits) | oflagCopied)
		first++
		next = t + 1
	}
	w.zeroes((l1Size - next) * l1EntrySize)
	w.pad(l1Size * l1EntrySize)
}

// refcounts writes the refcount blocks that have no place yet and the
// refcount table, and returns where the table lies, in clusters, and how many
// it takes. It goes at the host cluster used; placed are the offsets of the
// earlier blocks. block is the first that is written: it has the refcounts of
// the clusters below counted; those from there on have refcount one.
func (w tableWriter) refcounts(used int64, placed []int64, block []byte, counted int64) (at, clusters int64, err error) {
	blocks, clusters, err := w.geo.refcountArea(used, int64(len(placed)))
	if err != nil {
		return 0, 0, err
	}
	total, per := used+blocks+clusters, w.geo.refcountsPerBlock()
	for b := range blocks {
		start := (int64(len(placed)) + b) * per
		for c := max(start, counted); c < min(start+per, total); c++ {
			putRefcount(block, w.geo.refcountBits, c-start, 1)
		}
		w.Write(block)
		clear(block)
	}
	for _, off := range placed {
		w.uint64(uint64(off))
	}
	for b := range blocks {
		w.uint64(uint64((used + b) << w.geo.clusterBits))
	}
	w.pad((int64(len(placed)) + blocks) * reftableEntrySize)
	return used + blocks, clusters, nil
}

// allocator hands out the clusters of a file in ascending order and counts
// them. Cluster 0 is the header's.
type allocator struct {
	geo  *geometry
	next int64 // first free cluster

	block []byte   // refcounts of the block that next lies in
	full  [][]byte // refcounts of the blocks before it that have no place yet

	// free is where the next compressed cluster can go on, or 0. The cluster
	// it lies in has refcount freeCount and is counted in block.
	free      int64
	freeCount uint64
}

func newAllocator(geo *geometry) *allocator {
	a := &allocator{geo: geo, block: make([]byte, geo.clusterSize)}
	a.clusters(1)
	return a
}

// clusters returns n new clusters in a row with refcount one.
func (a *allocator) clusters(n int64) int64 {
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
func (a *allocator) bytes(n int64) int64 {
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
func (a *allocator) advance(off, n int64) int64 {
	a.free = off + n
	if a.next%a.geo.refcountsPerBlock() == 0 {
		a.free = 0
	}
	return off
}

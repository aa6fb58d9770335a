package qcow2

import (
	"cmp"
	"encoding/binary"
	"slices"
)

// overlap is a cluster that more than one structure lies in.
type overlap struct {
	cluster int64
	parts   [2]Part // the first two found
	n       int32   // structures found
	// fixed is how many of them cannot be moved.
	fixed      int32
	compressed bool
	// References by whole guest clusters, and by all else.
	data, other uint64
}

func (o *overlap) add(p Part, k uint64) {
	if o.n < int32(len(o.parts)) {
		o.parts[o.n] = p
	}
	o.n++
	switch p.Kind {
	case PartData:
		o.data += k
		return
	case PartCompressed: // these can share a cluster
		if !o.compressed {
			o.compressed = true
			o.fixed++
		}
	case PartHeader, PartCryptoHeader, PartBitmapDirectory, PartBitmapTable, PartOther:
		o.fixed++
	}
	o.other += k
}

// repairable reports whether all but one of the structures can be moved away.
func (o *overlap) repairable() bool { return o.fixed <= 1 }

// structures goes through all structures that are known, L2 tables and refcount
// blocks included, what L2 entries and bitmap tables name not.
func (c *checker) structures(f func(place)) {
	g := &c.im.geo
	for _, p := range c.places {
		f(p)
	}
	for _, v := range c.visits.list {
		f(place{Part{PartL2, v.off}, g.clusterSize, v.all})
	}
	for i := 0; i < len(c.table); i += reftableEntrySize {
		entry := binary.BigEndian.Uint64(c.table[i:])
		if off := entry & reftableOffsetMask; off != 0 && entry&reftableReservedMask == 0 && g.inCluster(off) == 0 && off < uint64(c.fileSz) {
			f(place{Part{PartRefcountBlock, int64(off)}, g.clusterSize, 1})
		}
	}
}

// findOverlaps finds the clusters that have more references than one structure
// in them accounts for. Guest clusters may share one another.
func (c *checker) findOverlaps() error {
	g := &c.im.geo
	var list []int64
	limit := 1 << 20 // length at which what is there twice goes
	c.structures(func(p place) {
		for i := p.Off >> g.clusterBits; i < min(c.refs.n, (p.Off+p.n+g.clusterSize-1)>>g.clusterBits); i++ {
			if c.refs.raw(i) > uint64(p.k) {
				list = appendDoubling(list, i)
			}
		}
		if len(list) > limit {
			slices.Sort(list)
			list = slices.Compact(list)
			limit = max(limit, 2*len(list))
		}
	})
	if len(list) == 0 {
		return nil
	}
	slices.Sort(list)
	list = slices.Compact(list)
	c.overlaps = make([]overlap, len(list))
	for i, cluster := range list {
		c.overlaps[i].cluster = cluster
	}
	c.structures(func(p place) {
		if p.n > 0 {
			c.eachOverlap(p.Off, p.n, func(o *overlap) { o.add(p.Part, uint64(p.k)) })
		}
	})
	// What is not accounted for is in L2 entries.
	if slices.ContainsFunc(c.overlaps, func(o overlap) bool { return o.data+o.other < c.refs.raw(o.cluster) }) {
		if err := c.eachL2(func(*l2Job) {}, c.overlapL2); err != nil {
			return err
		}
	}
	for i := range c.overlaps {
		o := &c.overlaps[i]
		if raw, known := c.refs.raw(o.cluster), o.data+o.other; known < raw {
			o.add(Part{PartOther, o.cluster << g.clusterBits}, raw-known)
		}
	}
	return nil
}

// eachOverlap calls f for the overlaps in n bytes at off.
func (c *checker) eachOverlap(off, n int64, f func(*overlap)) {
	g := &c.im.geo
	i, _ := slices.BinarySearchFunc(c.overlaps, off>>g.clusterBits, func(o overlap, at int64) int { return cmp.Compare(o.cluster, at) })
	for ; i < len(c.overlaps) && c.overlaps[i].cluster <= (off+n-1)>>g.clusterBits; i++ {
		f(&c.overlaps[i])
	}
}

// overlapL2 finds the entries in a part of an L2 table that name clusters of
// overlaps.
func (c *checker) overlapL2(j *l2Job) error {
	g := &c.im.geo
	for i := 0; i < len(j.b); i += int(g.l2EntrySize) {
		entry, bitmap := g.entryIn(j.b[i:])
		if part, off, n := g.named(entry); n > 0 && !c.becomesZero(entry, bitmap) {
			v, at := j.at(i, g)
			c.eachOverlap(off, n, func(o *overlap) { o.add(Part{part, v.off + at}, uint64(v.all)) })
		}
	}
	return nil
}

// checkOverlaps tells of structures that overlap. Clusters in a row that the
// same two lie in are one finding.
func (c *checker) checkOverlaps() error {
	g := &c.im.geo
	if err := c.findOverlaps(); err != nil {
		return err
	}
	var f Finding
	tell := func() {
		if f.Kind != 0 {
			c.found(f)
		}
	}
	for i := range c.overlaps {
		o := &c.overlaps[i]
		// Where the refcount is too low, or the block is shared, qemu-img tells too.
		severity := Corruption
		stored, err := c.refcount(o.cluster)
		if err != nil || stored < c.refs.get(o.cluster) || o.parts[0].Kind == PartRefcountBlock || o.parts[1].Kind == PartRefcountBlock {
			severity = Note
		}
		off := o.cluster << g.clusterBits
		if f.Kind != 0 && f.Parts == o.parts && f.Severity == severity && f.Repairable == o.repairable() && f.Off+int64(f.Value) == off {
			f.Value += uint64(g.clusterSize)
			continue
		}
		tell()
		f = Finding{Kind: Overlap, Severity: severity, Off: off, Index: o.cluster, Value: uint64(g.clusterSize), Parts: o.parts, Repairable: o.repairable()}
	}
	tell()
	return nil
}

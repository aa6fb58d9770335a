package qcow2

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"
)

// plan finds out which tables change, and gives all that is new its place.
func (r *repairer) plan() error {
	r.start = r.next
	for _, step := range []func() error{r.planCopies, r.planL2s, r.planL1s, r.planSnapshots, r.planRefcounts} {
		if err := step(); err != nil {
			return err
		}
	}
	p := &r.res.Plan
	p.Size = max(r.c.fileSz, r.next<<r.im.geo.clusterBits)
	p.grows = p.Size > r.c.fileSz
	return nil
}

// planCopies gives guest clusters that lie upon something else a place.
func (r *repairer) planCopies() error {
	g := &r.im.geo
	if !r.all {
		return nil
	}
	for i := range r.c.overlaps {
		o := &r.c.overlaps[i]
		if o.data == 0 {
			continue
		}
		to, err := r.alloc(1, int64(o.data))
		if err != nil {
			return err
		}
		off := o.cluster << g.clusterBits
		r.freeTable(off, g.clusterSize, int64(o.data))
		r.res.Plan.Copies = append(r.res.Plan.Copies, ClusterCopy{off, to})
	}
	return nil
}

// overlapped reports whether something else lies in n bytes at off.
func (r *repairer) overlapped(off, n int64) (found bool) {
	if r.all && n > 0 {
		r.c.eachOverlap(off, n, func(*overlap) { found = true })
	}
	return found
}

// planL2s finds the L2 tables that change.
func (r *repairer) planL2s() error {
	c, g, p := &r.c, &r.im.geo, &r.res.Plan
	var now TableChange // the table that is being looked at
	done := func() error {
		if now.k == 0 || now.Entries == 0 && !r.overlapped(now.Off, g.clusterSize) {
			return nil
		}
		var err error
		if now.To, err = r.alloc(1, now.k); err != nil {
			return err
		}
		if now.size > 0 {
			// One after the other in the order of the table.
			if now.zeros, err = r.alloc(now.size, now.k); err != nil {
				return err
			}
		}
		r.freeTable(now.Off, g.clusterSize, now.k)
		p.L2Tables = append(p.L2Tables, now)
		return nil
	}
	// Those in holes change only if they lie upon something.
	for _, v := range c.visits.list {
		if v.hole {
			now = TableChange{Off: v.off, k: v.all, active: v.active > 0}
			if err := done(); err != nil {
				return err
			}
		}
	}
	now = TableChange{}
	err := c.eachL2(func(*l2Job) {}, func(j *l2Job) error {
		for i := 0; i < len(j.b); i += int(g.l2EntrySize) {
			v, at := j.at(i, g)
			if v.off != now.Off || now.k == 0 {
				if err := done(); err != nil {
					return err
				}
				now = TableChange{Off: v.off, k: v.all, active: v.active > 0}
			}
			entry, bitmap := g.entryIn(j.b[i:])
			if entry|bitmap == 0 {
				continue
			}
			fixed, fixedBitmap, zero := r.entry(entry, bitmap)
			if flagged, refcount := r.copied(fixed); flagged != fixed && v.active > 0 {
				c.found(Finding{Kind: L2Copied, Count: v.active, Off: v.off + at, Index: at / g.l2EntrySize, Value: entry, Refcount: refcount})
				if r.flags {
					fixed = flagged
				}
			}
			if zero {
				now.size++
			}
			if fixed != entry || fixedBitmap != bitmap || zero {
				now.Entries++
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := done(); err != nil {
		return err
	}
	slices.SortFunc(p.L2Tables, func(a, b TableChange) int { return cmp.Compare(a.Off, b.Off) })
	return nil
}

// entry returns what becomes of an L2 entry, but for the copied flag. zero:
// it gets a new cluster of zeroes.
func (r *repairer) entry(entry, bitmap uint64) (newEntry, newBitmap uint64, zero bool) {
	c, g := &r.c, &r.im.geo
	if !r.all {
		return entry, bitmap, false
	}
	if entry&oflagCompressed != 0 {
		return entry &^ oflagCopied, bitmap, false
	}
	if c.becomesZero(entry, bitmap) {
		switch {
		case g.extended:
			// What was allocated reads as zeroes; that is none of it.
			return 0, (bitmap | bitmap<<32) &^ subclusterAllocMask, false
		case r.im.header.Version < 3:
			return 0, 0, r.im.header.BackingFile != ""
		}
		return oflagZero, 0, false
	}
	entry &^= l2ReservedMask
	if kind, off, _ := g.named(entry); kind == PartData {
		if i, ok := slices.BinarySearchFunc(r.res.Plan.Copies, off, func(c ClusterCopy, off int64) int { return cmp.Compare(c.Off, off) }); ok {
			entry = entry&^l2OffsetMask | uint64(r.res.Plan.Copies[i].To)
		}
	}
	return entry, bitmap, false
}

// copied returns an L2 entry of an active table with the copied flag that it
// should have, and the refcount that says so.
func (r *repairer) copied(entry uint64) (flagged, refcount uint64) {
	g := &r.im.geo
	switch g.clusterType(entry) {
	case clusterNormal, clusterZeroAlloc:
		refcount = 1 // of clusters in an external data file
		if !g.dataFile {
			refcount = r.refcount(int64(entry & l2OffsetMask))
		}
		return withCopied(entry, refcount == 1), refcount
	}
	return entry, 0
}

// refcount returns what the refcount of the cluster at off will be.
func (r *repairer) refcount(off int64) uint64 {
	cluster := off >> r.im.geo.clusterBits
	known := cluster < r.end || cluster < r.next
	if known && (r.all || cluster >= r.start) {
		return r.c.refs.get(cluster)
	}
	// Beyond the end it stays as it is. An error would have ended the check.
	stored, err := r.c.refcount(cluster)
	if known && err == nil {
		stored = min(stored, r.c.refs.get(cluster)) // one that is too low stays so
	}
	return stored
}

// l1Entry returns what becomes of an L1 entry. For one of the active table
// found, unless it is nil, is told of a wrong copied flag.
func (r *repairer) l1Entry(entry uint64, active bool, found func(refcount uint64)) uint64 {
	g := &r.im.geo
	off := int64(entry & l1OffsetMask)
	if entry == 0 {
		return 0
	}
	if r.all {
		entry &^= l1ReservedMask
		if off == 0 {
			return 0
		}
	}
	if off == 0 {
		return entry
	}
	if g.inCluster(uint64(off)) == 0 {
		list := r.res.Plan.L2Tables
		if i, ok := slices.BinarySearchFunc(list, off, func(t TableChange, off int64) int { return cmp.Compare(t.Off, off) }); ok {
			off = list[i].To
			entry = entry&^l1OffsetMask | uint64(off)
		}
	}
	if active {
		refcount := r.refcount(off)
		if flagged := withCopied(entry, refcount == 1); flagged != entry {
			if found != nil {
				found(refcount)
			}
			if r.flags {
				entry = flagged
			}
		}
	}
	return entry
}

// planL1s finds the L1 tables that change.
func (r *repairer) planL1s() error {
	h := &r.im.header
	if err := r.planL1(TableChange{Off: int64(h.L1TableOffset), size: int64(h.L1Size), k: 1, active: true}); err != nil {
		return err
	}
	for t := range r.c.inactiveL1s() {
		if err := r.planL1(TableChange{Off: t.off, size: t.size, k: t.k}); err != nil {
			return err
		}
	}
	return nil
}

func (r *repairer) planL1(t TableChange) error {
	c, g := &r.c, &r.im.geo
	bytes := t.size * l1EntrySize
	err := c.entries(t.Off, bytes, func(at int64, entry uint64) error {
		fixed := r.l1Entry(entry, t.active, func(refcount uint64) {
			c.found(Finding{Kind: L1Copied, Off: t.Off + at, Index: at / l1EntrySize, Value: entry, Refcount: refcount})
		})
		if fixed != entry {
			t.Entries++
		}
		return nil
	})
	if err != nil || t.Entries == 0 && !r.overlapped(t.Off, bytes) {
		return err
	}
	if t.To, err = r.alloc(g.clusters(bytes), t.k); err != nil {
		return err
	}
	r.freeTable(t.Off, bytes, t.k)
	r.res.Plan.L1Tables = append(r.res.Plan.L1Tables, t)
	return nil
}

// planSnapshots makes a new snapshot table where an entry changes.
func (r *repairer) planSnapshots() error {
	im, g, p := r.im, &r.im.geo, &r.res.Plan
	if im.header.NbSnapshots == 0 {
		return nil
	}
	off, n := int64(im.header.SnapshotsOffset), im.snapEnd-int64(im.header.SnapshotsOffset)
	changed := r.snapshotsBad || r.overlapped(off, n)
	type table struct{ off, size uint64 }
	moved := make(map[table]int64)
	for _, t := range p.L1Tables {
		if !t.active {
			moved[table{uint64(t.Off), uint64(t.size)}] = t.To
		}
	}
	list := slices.Clone(im.snapshots)
	for i := range list {
		s := &list[i]
		if to, ok := moved[table{s.L1TableOffset, uint64(s.L1Size)}]; ok {
			s.L1TableOffset = uint64(to)
			changed = true
		}
		changed = changed || r.all && im.header.Version >= 3 && s.ExtraDataSize < 16
	}
	if !changed {
		return nil
	}
	r.changed = true
	for _, s := range list {
		if r.snapshotTable = s.appendTo(r.snapshotTable); len(r.snapshotTable) > maxSnapshotTableSize {
			return fmt.Errorf("qcow2: repair: snapshot table of more than %d bytes: %w", maxSnapshotTableSize, ErrLimit)
		}
	}
	r.freeTable(off, n, 1)
	p.Snapshots = len(list)
	if len(list) == 0 {
		return nil
	}
	var err error
	p.SnapshotTable, err = r.alloc(g.clusters(int64(len(r.snapshotTable))), 1)
	return err
}

// planRefcounts gives the new refcount table and its blocks their places.
func (r *repairer) planRefcounts() error {
	c, g, p, h := &r.c, &r.im.geo, &r.res.Plan, &r.im.header
	if r.next == r.start && p.Raised+p.Freed == 0 && !p.Rebuilt && !r.changed {
		return nil
	}
	for i := 0; i < len(c.table); i += reftableEntrySize {
		entry := binary.BigEndian.Uint64(c.table[i:])
		if off := int64(entry); entry&reftableReservedMask == 0 && off > 0 && g.inCluster(entry) == 0 && off>>g.clusterBits < r.start {
			r.free(off, g.clusterSize, 1)
		}
	}
	r.free(int64(h.RefcountTableOffset), int64(h.RefcountTableClusters)<<h.ClusterBits, 1)
	if err := r.keepBeyond(); err != nil {
		return err
	}
	per := g.refcountsPerBlock()
	clusters := &r.tableClusters
	for changed := true; changed; {
		changed = false
		for i := c.refs.next(0); i < c.refs.n; i = c.refs.next((i/per + 1) * per) {
			if n := i/per + 1 - int64(len(r.table)); n > 0 {
				if (i/per+1)*reftableEntrySize > maxReftableSize {
					return fmt.Errorf("qcow2: repair: an image of %d clusters of %d bytes needs a refcount table of more than %d bytes: %w",
						c.refs.n, g.clusterSize, maxReftableSize, ErrLimit)
				}
				r.table = append(r.table, make([]uint64, n)...)
			}
			if r.table[i/per] == 0 {
				off, err := r.alloc(1, 1)
				if err != nil {
					return err
				}
				r.table[i/per] = uint64(off)
				p.RefcountBlocks++
				changed = true
			}
		}
		if n := g.clusters(int64(len(r.table)) * reftableEntrySize); n > *clusters {
			for i := range *clusters { // of a table that is too short now
				c.refs.put(p.RefcountTable>>g.clusterBits+i, 0)
			}
			var err error
			if p.RefcountTable, err = r.alloc(n, 1); err != nil {
				return err
			}
			*clusters = n
			changed = true
		}
	}
	return nil
}

// keepBeyond keeps the refcounts of clusters beyond the end of the file that
// something refers to.
func (r *repairer) keepBeyond() error {
	c, g := &r.c, &r.im.geo
	if r.res.Plan.Rebuilt {
		return nil // they mean nothing
	}
	per := g.refcountsPerBlock()
	step := min(per, refcountChunk)
	buf := make([]byte, step*int64(g.refcountBits)/8)
	for block := r.end / per; block < int64(len(c.table)/reftableEntrySize); block++ {
		off, err := c.refcountAt(block * per)
		if err != nil || off == 0 || c.hole(off, g.clusterSize) {
			continue
		}
		for start := block * per; start < (block+1)*per && start < maxCheckClusters; start += step {
			if err := r.ctx.Err(); err != nil {
				return err
			}
			b, err := c.readRefcounts(buf, start)
			if err != nil {
				return err
			}
			for i := max(start, r.next, r.end); i < start+step; i++ {
				stored := g.refcountIn(b, i)
				if at := i - r.end; stored != 0 && (at >= maxAhead || r.ahead.raw(at) != 0) {
					c.refs.grow(i + 1)
					c.refs.put(i, stored)
				}
			}
		}
	}
	return nil
}

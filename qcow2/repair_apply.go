package qcow2

import (
	"encoding/binary"
	"fmt"
	"math"

	"qimg/qcow2/blockdev"
)

// apply does what is planned. Order: new tables, sync, header, sync.
func (r *repairer) apply() error {
	p := &r.res.Plan
	if p.RefcountTable != 0 {
		if err := r.writeTables(); err != nil {
			return err
		}
		if err := blockdev.Sync(r.dev); err != nil {
			return err
		}
	}
	sector := make([]byte, sectorSize)
	if err := readFull(r.dev, sector, 0); err != nil {
		return fmt.Errorf("qcow2: header: %w", err)
	}
	r.patchHeader(sector)
	if err := r.write(sector, 0); err != nil {
		return err
	}
	return blockdev.Sync(r.dev)
}

// patchHeader changes the header to the new state.
func (r *repairer) patchHeader(b []byte) {
	h, p := &r.im.header, &r.res.Plan
	if p.RefcountTable != 0 {
		for _, t := range p.L1Tables {
			if t.active {
				binary.BigEndian.PutUint64(b[headerL1TableOffset:], uint64(t.To))
			}
		}
		binary.BigEndian.PutUint64(b[headerRefcountTableOffset:], uint64(p.RefcountTable))
		binary.BigEndian.PutUint32(b[headerRefcountTableClusters:], uint32(r.tableClusters))
		binary.BigEndian.PutUint32(b[headerNbSnapshots:], uint32(len(r.im.snapshots)))
		if p.SnapshotTable != 0 || len(r.im.snapshots) == 0 {
			binary.BigEndian.PutUint64(b[headerSnapshotsOffset:], uint64(p.SnapshotTable))
		}
	}
	if h.Version < 3 {
		return
	}
	incompatible := h.IncompatibleFeatures
	if p.ClearDirty {
		incompatible &^= IncompatDirty
	}
	if p.ClearCorrupt {
		incompatible &^= IncompatCorrupt
	}
	binary.BigEndian.PutUint64(b[headerIncompatible:], uint64(incompatible))
	binary.BigEndian.PutUint64(b[headerAutoclear:], uint64(h.AutoclearFeatures&(AutoclearBitmaps|AutoclearDataFileRaw)))
}

func (r *repairer) write(b []byte, off int64) error {
	if err := r.ctx.Err(); err != nil {
		return err
	}
	if _, err := r.dev.WriteAt(b, off); err != nil {
		return fmt.Errorf("qcow2: repair: write at %#x: %w", off, err)
	}
	return nil
}

// zero makes n bytes at off read as zeroes, without a write for each hole of a
// file that names many.
func (r *repairer) zero(off, n int64) error {
	if err := r.ctx.Err(); err != nil {
		return err
	}
	if err := blockdev.WriteZeroes(r.dev, off, n); err != nil {
		return fmt.Errorf("qcow2: repair: write zeroes at %#x: %w", off, err)
	}
	return nil
}

// writeTables writes all that is new, behind the last cluster in use.
func (r *repairer) writeTables() error {
	p, g := &r.res.Plan, &r.im.geo
	if size := r.dev.Size(); p.Size > size {
		t, ok := r.dev.(blockdev.Truncater)
		if !ok {
			return fmt.Errorf("qcow2: repair: the image needs %d bytes, the device has %d and cannot grow: %w", p.Size, size, blockdev.ErrRange)
		}
		if err := t.Truncate(p.Size); err != nil {
			return fmt.Errorf("qcow2: repair: grow the image file to %d bytes: %w", p.Size, err)
		}
	}
	buf := make([]byte, g.clusterSize)
	for _, c := range p.Copies {
		if r.c.hole(c.Off, g.clusterSize) {
			if err := r.zero(c.To, g.clusterSize); err != nil {
				return err
			}
			continue
		}
		if err := readFull(r.dev, buf, c.Off); err != nil {
			return fmt.Errorf("qcow2: repair: guest cluster at %#x: %w", c.Off, err)
		}
		if err := r.write(buf, c.To); err != nil {
			return err
		}
	}
	for _, t := range p.L2Tables {
		if err := r.writeL2(t, buf); err != nil {
			return err
		}
	}
	for _, t := range p.L1Tables {
		if err := r.writeL1(t); err != nil {
			return err
		}
	}
	if p.SnapshotTable != 0 {
		if err := r.writePadded(r.snapshotTable, p.SnapshotTable); err != nil {
			return err
		}
	}
	if err := r.writeRefcounts(buf); err != nil {
		return err
	}
	return r.writePadded(appendEntries(nil, r.table), p.RefcountTable)
}

// writePadded writes b with zeroes up to the end of the cluster.
func (r *repairer) writePadded(b []byte, off int64) error {
	return r.write(append(b, make([]byte, -int64(len(b))&(r.im.geo.clusterSize-1))...), off)
}

// writeL2 writes an L2 table in its new place.
func (r *repairer) writeL2(t TableChange, buf []byte) error {
	g := &r.im.geo
	if r.c.hole(t.Off, g.clusterSize) {
		return r.zero(t.To, g.clusterSize)
	}
	if err := readFull(r.dev, buf, t.Off); err != nil {
		return fmt.Errorf("qcow2: repair: l2 table at %#x: %w", t.Off, err)
	}
	zeros := t.zeros
	for i := int64(0); i < g.clusterSize; i += g.l2EntrySize {
		entry, bitmap := g.entryIn(buf[i:])
		if entry|bitmap == 0 {
			continue
		}
		entry, bitmap, zero := r.entry(entry, bitmap)
		if zero {
			entry = uint64(zeros)
			zeros += g.clusterSize
		}
		if r.flags && t.active {
			entry, _ = r.copied(entry)
		}
		binary.BigEndian.PutUint64(buf[i:], entry)
		if g.extended {
			binary.BigEndian.PutUint64(buf[i+8:], bitmap)
		}
	}
	if t.size > 0 {
		if err := r.zero(t.zeros, t.size<<g.clusterBits); err != nil {
			return err
		}
	}
	return r.write(buf, t.To)
}

// writeL1 writes an L1 table in its new place.
func (r *repairer) writeL1(t TableChange) error {
	n := t.size * l1EntrySize
	buf := make([]byte, min(maxSlice, n))
	for at := int64(0); at < n; at += maxSlice {
		b := buf[:min(maxSlice, n-at)]
		if err := readFull(r.dev, b, t.Off+at); err != nil {
			return fmt.Errorf("qcow2: repair: l1 table at %#x: %w", t.Off, err)
		}
		for i := 0; i < len(b); i += l1EntrySize {
			binary.BigEndian.PutUint64(b[i:], r.l1Entry(binary.BigEndian.Uint64(b[i:]), t.active, nil))
		}
		if err := r.writePadded(b, t.To+at); err != nil {
			return err
		}
	}
	return nil
}

// writeRefcounts writes the new refcount blocks.
func (r *repairer) writeRefcounts(buf []byte) error {
	c, g := &r.c, &r.im.geo
	per := g.refcountsPerBlock()
	counts := new(chunkCounts)
	step := min(per, refcountChunk)
	old := make([]byte, step*int64(g.refcountBits)/8)
	for i, off := range r.table {
		if off == 0 {
			continue
		}
		clear(buf)
		first := int64(i) * per
		for start := first; start < min(first+per, c.refs.n); start += step {
			c.refs.chunk(start&^(refcountChunk-1), counts)
			var stored []byte
			if !r.all {
				var err error
				if stored, err = c.readRefcounts(old, start); err != nil {
					return err
				}
			}
			for n := start; n < min(start+step, c.refs.n); n++ {
				count := uint64(counts.count[n%refcountChunk])
				if !r.all && n < r.start {
					count = min(count, g.refcountIn(stored, n)) // those that are too low stay so
				}
				if count != 0 {
					putRefcount(buf, g.refcountBits, n-first, count)
				}
			}
		}
		if err := r.write(buf, int64(off)); err != nil {
			return err
		}
	}
	return nil
}

// open opens the image without what a repair does not need, and with a snapshot
// table that is over the limits if that is to be repaired.
func (r *repairer) open() error {
	im := r.im
	b, err := readFirstCluster(im.dev)
	if err != nil {
		return err
	}
	noTable := false
	if r.all && len(b) >= headerSizeV2 {
		// parseHeader refuses these.
		if n := binary.BigEndian.Uint32(b[headerNbSnapshots:]); n > maxSnapshots {
			r.dropped(int64(n - maxSnapshots))
			binary.BigEndian.PutUint32(b[headerNbSnapshots:], maxSnapshots)
		}
		if noTable = binary.BigEndian.Uint32(b[headerRefcountTableClusters:]) == 0; noTable {
			binary.BigEndian.PutUint32(b[headerRefcountTableClusters:], 1)
			binary.BigEndian.PutUint64(b[headerRefcountTableOffset:], 0)
		}
	}
	if im.header, err = parseHeader(b); err != nil {
		return err
	}
	if noTable {
		im.header.RefcountTableClusters = 0
	}
	im.geo = im.header.geometry()
	if r.all {
		return r.readSnapshots()
	}
	im.snapshots, im.snapEnd, err = readSnapshots(im.dev, &im.header)
	return err
}

func (r *repairer) dropped(n int64) {
	r.c.found(Finding{Kind: SnapshotsTooMany, Off: int64(r.im.header.SnapshotsOffset), Value: uint64(n), Count: n})
	r.snapshotsBad = true
}

// readSnapshots reads a snapshot table as far as it can be: with the first
// bytes of extra data that is too long, and without the entries that are over
// the limits (block/qcow2-snapshot.c, qcow2_do_read_snapshots).
func (r *repairer) readSnapshots() error {
	im := r.im
	start := int64(im.header.SnapshotsOffset)
	table, end := int64(0), start // bytes that the entries take
	for e, err := range snapshotEntries(im.dev, &im.header) {
		if err != nil {
			return err
		}
		if e.stored > e.ExtraDataSize {
			r.c.found(Finding{Kind: SnapshotExtraData, Off: e.Off, Index: e.Index, Value: uint64(e.stored)})
			r.snapshotsBad = true
		}
		table = (table+7)&^7 + e.end - e.Off - int64(e.stored-e.ExtraDataSize)
		if table > maxSnapshotTableSize || e.end-start > math.MaxInt32 {
			break
		}
		im.snapshots = append(im.snapshots, e.Snapshot)
		end = e.end
	}
	if n := int64(im.header.NbSnapshots) - int64(len(im.snapshots)); n > 0 {
		r.dropped(n)
	}
	if r.snapshotsBad {
		end = min(end, max(start, im.dev.Size())) // what lies beyond is not kept
	}
	if im.header.NbSnapshots > 0 {
		im.snapEnd = end
	}
	return nil
}

package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"

	"qimg/qcow2/blockdev"
)

// txn is a change of the metadata of an image that takes effect at once. All
// that it writes goes to clusters that are free in the state on disk: new
// refcount blocks and a new refcount table, new L1 and L2 tables, a new
// snapshot table, and what its user allocates. The commit then writes the header,
// whose first sector names all of them: before that write the image is as it
// was, after it all is done. Neither state has leaks, since clusters are freed
// in the new refcounts only.
//
// It is used with Image.mu held for writing.
type txn struct {
	im  *Image
	ctx context.Context
	// header is the header to be, without the places of tables, which commit
	// sets.
	header Header
	// l1 is the active L1 table to be, in host order. Its length is l1_size.
	l1 []uint64
	// snapshots is the snapshot table to be, which is written anew if
	// snapshotsChanged is set.
	snapshots        []Snapshot
	snapshotsChanged bool

	alloced  bool  // something was allocated or freed
	wrote    bool  // something was written
	counted  bool  // references changed, so that copied flags can be wrong
	shrink   bool  // refcount blocks that have become empty are given up
	resized  bool  // the disk gets another size
	fileSize int64 // at the beginning
	taken    int64 // clusters that were handed out
	// placed are those clusters, if it is not nil.
	placed   map[int64]bool
	moveL1   bool  // the active L1 table is written anew in any case
	prepared bool  // all but the header is on disk
	named    bool  // the header may name the new tables
	snapEnd  int64 // of the snapshot table to be
	done     bool
}

// begin starts a transaction, after everything before it was flushed, and the
// writes that bitmaps record stored.
func (im *Image) begin(ctx context.Context) (*txn, error) {
	if err := im.bitmapsEnd(ctx); err != nil {
		return nil, err
	}
	return im.start(ctx)
}

// start is begin without the bitmaps.
func (im *Image) start(ctx context.Context) (*txn, error) {
	if im.w.txn != nil {
		panic("qcow2: internal error: transaction in a transaction")
	}
	if err := im.flush(); err != nil {
		return nil, im.fail(err)
	}
	im.w.packed = 0
	h := im.header
	h.Extensions = slices.Clone(h.Extensions)
	h.AutoclearFeatures &= AutoclearBitmaps | AutoclearDataFileRaw
	t := &txn{im: im, ctx: ctx, header: h, l1: im.l1Words(), snapshots: slices.Clone(im.snapshots), fileSize: im.w.dev.Size()}
	im.w.txn = t
	im.w.alloc.begin()
	return t, nil
}

// abort drops the transaction, unless it was committed. The file is as long as
// before, also after a failed write: a file system that is full gets back what
// was taken. Only where the header may have been written is nothing cut off.
func (t *txn) abort() {
	if t.done {
		return
	}
	t.done = true
	t.im.w.txn = nil
	t.im.w.alloc.end(false)
	dev := t.im.w.dev
	if dev.Size() <= t.fileSize || t.named {
		return
	}
	if d, ok := dev.(interface{ CutBack(size int64) error }); ok {
		t.im.fail(d.CutBack(t.fileSize))
	} else if d, ok := dev.(blockdev.Truncater); ok {
		t.im.fail(d.Truncate(t.fileSize))
	}
}

// refcount returns the refcount of a cluster, by its number, in the new state.
func (t *txn) refcount(cluster int64) (uint64, error) { return t.im.w.alloc.get(cluster) }

// addRef adds delta to the refcount of every cluster that n bytes at off lie in.
// The error matches ErrLimit if a refcount is too narrow, ErrCorrupt if one
// would be negative.
func (t *txn) addRef(off, n int64, delta int) error {
	t.counted = true
	return t.count(off, n, delta)
}

func (t *txn) count(off, n int64, delta int) error {
	t.alloced = true
	if off < 0 || n < 0 || off > maxHostSize-n {
		return fmt.Errorf("qcow2: %d bytes at %#x, which no file has: %w", n, off, ErrCorrupt)
	}
	g := &t.im.geo
	for c := off >> g.clusterBits; c < (off+n+g.clusterSize-1)>>g.clusterBits; c++ {
		if err := t.im.w.alloc.add(c, delta); err != nil {
			return t.failed(err)
		}
	}
	return nil
}

// failed makes the image read-only if an error of the allocator is one of the
// device.
func (t *txn) failed(err error) error {
	if errors.Is(err, ErrLimit) || errors.Is(err, ErrCorrupt) || errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	return t.im.fail(err)
}

// addEntryRef adds delta to the refcount of what an L2 entry refers to: its
// cluster, or the one or two host clusters of compressed data. Clusters in an
// external data file have none.
func (t *txn) addEntryRef(entry uint64, delta int) error {
	g := &t.im.geo
	if g.dataFile || entry == 0 {
		return nil
	}
	switch g.clusterType(entry) {
	case clusterNormal, clusterZeroAlloc:
		off := int64(entry & l2OffsetMask)
		if g.inCluster(uint64(off)) != 0 {
			return &FormatError{"l2 entry", -1, "cluster offset", fmt.Sprintf("%#x not aligned to %#x: run check", off, g.clusterSize), ErrCorrupt}
		}
		return t.addRef(off, g.clusterSize, delta)
	case clusterCompressed:
		off, n := g.compressed(entry)
		return t.addRef(off, n, delta)
	}
	return nil
}

// alloc returns the place of clusters in a row for n bytes, with refcount one,
// which are free in both states. The file reaches up to their end.
func (t *txn) alloc(n int64) (int64, error) {
	t.alloced = true
	if n > math.MaxInt64-t.im.geo.clusterSize {
		return 0, fmt.Errorf("qcow2: allocate %d bytes: %w", n, ErrLimit)
	}
	clusters := max(t.im.geo.clusters(n), 1)
	c, _, err := t.im.w.alloc.alloc(clusters, clusters)
	return c << t.im.geo.clusterBits, t.failed(err)
}

// write writes p into clusters that alloc returned.
func (t *txn) write(p []byte, off int64) error {
	t.wrote = true
	if _, err := t.im.w.dev.WriteAt(p, off); err != nil {
		return t.im.fail(fmt.Errorf("qcow2: write at %#x: %w", off, err))
	}
	return nil
}

// writeNew allocates clusters for b and writes it there, with zeroes behind.
func (t *txn) writeNew(b []byte) (int64, error) {
	off, err := t.alloc(int64(len(b)))
	if err != nil {
		return 0, err
	}
	if pad := -int64(len(b)) & (t.im.geo.clusterSize - 1); pad > 0 || len(b) == 0 {
		b = append(b[:len(b):len(b)], make([]byte, pad)...)
	}
	return off, t.write(b, off)
}

// l2 returns the L2 table that an L1 entry points at, of any L1 table, to be
// changed as one likes; nil if it points at none.
func (t *txn) l2(entry uint64) ([]byte, error) {
	if entry&l1OffsetMask == 0 {
		return nil, nil
	}
	return t.readL2(nil, entry)
}

// readL2 is l2 into b, which is made if it is nil, and left alone if the entry
// points at no table.
func (t *txn) readL2(b []byte, entry uint64) ([]byte, error) {
	g := &t.im.geo
	off := int64(entry & l1OffsetMask)
	if off == 0 {
		return b, nil
	}
	if g.inCluster(uint64(off)) != 0 {
		return nil, &FormatError{"l1 entry", -1, "l2 table offset", fmt.Sprintf("%#x not aligned to %#x: run check", off, g.clusterSize), ErrCorrupt}
	}
	if err := t.ctx.Err(); err != nil {
		return nil, err
	}
	if b == nil {
		b = make([]byte, g.clusterSize)
	}
	if err := readFull(t.im.dev, b, off); err != nil {
		return nil, fmt.Errorf("qcow2: l2 table at %#x: %w", off, err)
	}
	return b, nil
}

// writeL2 allocates and writes an L2 table.
func (t *txn) writeL2(b []byte) (int64, error) { return t.writeNew(b) }

// readL1 reads an L1 table of a snapshot.
func (t *txn) readL1(off int64, entries uint32) ([]uint64, error) {
	if entries > maxL1Size/l1EntrySize {
		return nil, &FormatError{"snapshot", -1, "l1_size", fmt.Sprintf("%d, expected at most %d", entries, maxL1Size/l1EntrySize), ErrLimit}
	}
	if t.im.geo.inCluster(uint64(off)) != 0 || off < 0 || off > maxHostSize {
		return nil, &FormatError{"snapshot", -1, "l1_table_offset", fmt.Sprintf("%#x not aligned to %#x", off, t.im.geo.clusterSize), ErrCorrupt}
	}
	b, err := readTable(t.im.dev, off, int64(entries)*l1EntrySize)
	if err != nil {
		return nil, fmt.Errorf("qcow2: l1 table at %#x: %w", off, err)
	}
	l1 := make([]uint64, entries)
	for i := range len(b) / l1EntrySize {
		l1[i] = binary.BigEndian.Uint64(b[i*l1EntrySize:])
	}
	return l1, nil
}

// writeL1 allocates and writes an L1 table of a snapshot.
func (t *txn) writeL1(l1 []uint64) (int64, error) { return t.writeNew(appendEntries(nil, l1)) }

// checkCounted refuses an image in which a table or a cluster of the disk has
// refcount 0. It would be given to something else. Changes that read all L2
// tables anyway begin with it.
func (t *txn) checkCounted() error {
	g := &t.im.geo
	counted := func(off, n int64) error {
		for c := off >> g.clusterBits; c <= (off+n-1)>>g.clusterBits; c++ {
			if refs, err := t.refcount(c); err != nil {
				return err
			} else if refs == 0 {
				return fmt.Errorf("qcow2: the cluster at %#x has refcount 0, but a table refers to it: run check -r all: %w", c<<g.clusterBits, ErrCorrupt)
			}
		}
		return nil
	}
	return t.eachTable(t.l1, func(i int64, b []byte) error {
		if err := counted(int64(t.l1[i]&l1OffsetMask), g.clusterSize); err != nil {
			return err
		}
		for at := int64(0); at < int64(len(b)); at += g.l2EntrySize {
			entry, _ := g.entryIn(b[at:])
			if entry == 0 {
				continue
			}
			if _, off, n := g.named(entry); n > 0 {
				if err := counted(off, n); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// settle makes the copied flags of the active tables agree with the refcounts.
// L2 tables in which one changes are written anew.
func (t *txn) settle() error {
	if !t.counted {
		return nil
	}
	t.counted = false
	im, g := t.im, &t.im.geo
	buf := make([]byte, g.clusterSize)
	for i, entry := range t.l1 {
		off := int64(entry & l1OffsetMask)
		if off == 0 {
			continue
		}
		if _, err := t.readL2(buf, entry); err != nil {
			return err
		}
		changed, err := im.settleFlags(buf)
		if err != nil {
			return err
		}
		if changed {
			to, err := t.writeL2(buf)
			if err != nil {
				return err
			}
			if err := t.count(off, g.clusterSize, -1); err != nil {
				return err
			}
			off = to
		}
		n, err := t.refcount(off >> g.clusterBits)
		if err != nil {
			return err
		}
		t.l1[i] = withCopied(uint64(off), n == 1)
	}
	return nil
}

// prepare writes and syncs all that the new state needs but the header. Nothing
// can be changed after it.
func (t *txn) prepare() (err error) {
	im, a := t.im, t.im.w.alloc
	if err := t.settle(); err != nil {
		return err
	}
	h := &t.header
	if err := t.putL1(); err != nil {
		return err
	}
	if t.snapEnd, err = t.putSnapshots(); err != nil {
		return err
	}
	if t.alloced || int64(len(a.table))*reftableEntrySize != int64(h.RefcountTableClusters)<<h.ClusterBits {
		if err := t.putRefcounts(); err != nil {
			return err
		}
	}
	t.prepared = true
	if !t.alloced && !t.wrote && !im.w.unsynced {
		return nil // the header is all there is
	}
	return im.fail(blockdev.Sync(im.w.dev))
}

// commit makes the new state that of the image. Order: all new tables, sync;
// the header, sync. An error before the header is written leaves the image as
// it was, and one after it makes the handle read-only.
func (t *txn) commit() error {
	im, a, h := t.im, t.im.w.alloc, &t.header
	if !t.prepared {
		if err := t.prepare(); err != nil {
			return err
		}
	}
	t.named = true
	if err := im.writeHeader(h); err != nil {
		return im.fail(err)
	}
	t.done = true
	im.w.txn = nil
	im.header, im.geo = *h, h.geometry()
	a.tableOff = int64(h.RefcountTableOffset)
	a.end(true)
	im.l1, im.l1Off = appendEntries(nil, t.l1), int64(h.L1TableOffset)
	im.size = int64(h.Size) &^ (sectorSize - 1)
	im.snapshots = t.snapshots
	im.snapEnd = t.snapEnd
	im.hole.Store(nil)
	im.shared.tables.forget(im.id)
	return im.fail(im.mapTables())
}

// putL1 writes the active L1 table if it has changed.
func (t *txn) putL1() error {
	h := &t.header
	if !t.moveL1 && slices.Equal(t.l1, t.im.l1Words()) {
		return nil
	}
	if len(t.l1) > maxL1Size/l1EntrySize {
		return fmt.Errorf("qcow2: l1 table of %d entries, expected at most %d: %w", len(t.l1), maxL1Size/l1EntrySize, ErrLimit)
	}
	off, err := t.writeL1(t.l1)
	if err != nil {
		return err
	}
	// An empty table has no cluster to be freed.
	if err := t.count(int64(h.L1TableOffset), int64(h.L1Size)*l1EntrySize, -1); err != nil {
		return err
	}
	h.L1TableOffset, h.L1Size = uint64(off), uint32(len(t.l1))
	return nil
}

// putSnapshots writes the snapshot table if it has changed and returns its end.
func (t *txn) putSnapshots() (int64, error) {
	im, h := t.im, &t.header
	if !t.snapshotsChanged {
		return im.snapEnd, nil
	}
	if n := im.snapEnd - int64(h.SnapshotsOffset); h.NbSnapshots > 0 {
		if err := t.count(int64(h.SnapshotsOffset), n, -1); err != nil {
			return 0, err
		}
	}
	h.NbSnapshots, h.SnapshotsOffset = uint32(len(t.snapshots)), 0
	if len(t.snapshots) == 0 {
		return 0, nil
	}
	if len(t.snapshots) > maxSnapshots {
		return 0, fmt.Errorf("qcow2: %d snapshots, expected at most %d: %w", len(t.snapshots), maxSnapshots, ErrLimit)
	}
	var b []byte
	for i := range t.snapshots {
		if b = t.snapshots[i].appendTo(b); len(b) > maxSnapshotTableSize {
			return 0, fmt.Errorf("qcow2: snapshot table of more than %d bytes: %w", maxSnapshotTableSize, ErrLimit)
		}
	}
	off, err := t.writeNew(b)
	h.SnapshotsOffset = uint64(off)
	return off + int64(len(b)), err
}

// putRefcounts writes the refcount blocks that have changed, and the table. A
// table that has become too short for what was allocated meanwhile is
// allocated again.
func (t *txn) putRefcounts() error {
	im, a, h, g := t.im, t.im.w.alloc, &t.header, &t.im.geo
	if err := t.count(int64(h.RefcountTableOffset), int64(h.RefcountTableClusters)<<h.ClusterBits, -1); err != nil {
		return err
	}
	if t.shrink {
		if err := a.dropEmpty(); err != nil {
			return err
		}
	}
	size := func() int64 { return g.clusters(int64(len(a.table)) * reftableEntrySize) }
	var n, off int64
	for n != size() {
		if n != 0 {
			if err := t.count(off, n<<g.clusterBits, -1); err != nil {
				return err
			}
		}
		n = size()
		var err error
		if off, err = t.alloc(n << g.clusterBits); err != nil {
			return err
		}
	}
	h.RefcountTableOffset, h.RefcountTableClusters = uint64(off), uint32(n)
	if err := a.writeBlocks(); err != nil {
		return im.fail(err)
	}
	b := appendEntries(make([]byte, 0, n<<g.clusterBits), a.table)
	return t.write(append(b, make([]byte, n<<g.clusterBits-int64(len(b)))...), off)
}

// writeHeader replaces the header, with its extensions and the backing file
// name, by one write of the first sector, after all that it needs beyond that
// sector is on disk. Where both old and new need the sectors behind it, a header
// without its feature name table, which nobody needs, is put between them.
//
// Two headers whose other extensions do not fit in one sector either cannot
// replace each other so. They are refused: the error matches ErrLimit.
func (im *Image) writeHeader(h *Header) error {
	next := h.appendTo(nil)
	if int64(len(next)) > h.ClusterSize() {
		return fmt.Errorf("qcow2: header of %d bytes does not fit into a cluster of %d bytes: %w", len(next), h.ClusterSize(), ErrLimit)
	}
	if len(next) > sectorSize {
		now := make([]byte, len(next))
		if err := readFull(im.dev, now, 0); err != nil {
			return fmt.Errorf("qcow2: header: %w", err)
		}
		if !slices.Equal(now[sectorSize:], next[sectorSize:]) {
			if err := im.bridgeHeader(h, int64(len(next))); err != nil {
				return err
			}
			if _, err := im.w.dev.WriteAt(next[sectorSize:], sectorSize); err != nil {
				return fmt.Errorf("qcow2: write header: %w", err)
			}
			if err := blockdev.Sync(im.w.dev); err != nil {
				return err
			}
		}
	}
	return im.writeFirstSector(next[:min(len(next), sectorSize)])
}

// writeFirstSector writes the first sector, with zeroes behind b, and syncs.
func (im *Image) writeFirstSector(b []byte) error {
	sector := make([]byte, sectorSize)
	copy(sector, b)
	if _, err := im.w.dev.WriteAt(sector, 0); err != nil {
		return fmt.Errorf("qcow2: write header: %w", err)
	}
	return blockdev.Sync(im.w.dev)
}

// bridgeHeader puts the new header in place in a form that needs nothing of the
// sectors from the first one up to end: the old header may use them.
func (im *Image) bridgeHeader(h *Header, end int64) error {
	bridge := *h
	bridge.Extensions = slices.DeleteFunc(slices.Clone(h.Extensions), func(e Extension) bool { return e.Type == extFeatureNames })
	bridge.BackingFile = ""
	b := bridge.appendTo(nil)
	if h.BackingFile != "" {
		// Where neither the old nor the new header has anything.
		old := im.header.appendTo(nil)
		at := max(end, int64(len(old)), int64(im.header.BackingFileOffset)+int64(im.header.BackingFileSize))
		at = (at + sectorSize - 1) &^ (sectorSize - 1)
		if len(b)+len(h.BackingFile) <= sectorSize {
			at = int64(len(b))
			b = append(b, h.BackingFile...)
		} else if at+int64(len(h.BackingFile)) > h.ClusterSize() {
			return errHeaderRoom(h)
		} else if _, err := im.w.dev.WriteAt([]byte(h.BackingFile), at); err != nil {
			return fmt.Errorf("qcow2: write header: %w", err)
		} else if err := blockdev.Sync(im.w.dev); err != nil {
			return err
		}
		binary.BigEndian.PutUint64(b[headerBackingFileOffset:], uint64(at))
		binary.BigEndian.PutUint32(b[headerBackingFileSize:], uint32(len(h.BackingFile)))
	}
	if len(b) > sectorSize {
		return errHeaderRoom(h)
	}
	return im.writeFirstSector(b)
}

func errHeaderRoom(h *Header) error {
	return fmt.Errorf("qcow2: the header extensions and the names in them do not fit into a sector of %d bytes, or a cluster of %d, so that they could be replaced safely: %w",
		sectorSize, h.ClusterSize(), ErrLimit)
}

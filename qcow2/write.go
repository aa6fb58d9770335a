package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"syscall"

	"qimg/qcow2/blockdev"
)

// writeState is what an image that is open for writing has besides. It is used
// with Image.mu held.
type writeState struct {
	dev    blockdev.Device // the image file
	data   blockdev.Device // where guest clusters lie
	alloc  *allocator
	tables *tableMap

	// dirty are the parts of L2 tables that have changed, by their offset; the
	// bytes are those that the table cache has.
	dirty map[int64]*dirtySlice
	// dirtyL1 are the sectors of the active L1 table that have changed.
	dirtyL1 map[int64]bool
	// frees are references that are given up when L2 entries are on disk.
	frees []freedRange
	// packed is the end of the last compressed cluster that was written, whose
	// host cluster has room for more; a multiple of the cluster size: there is none.
	packed int64

	unsynced bool           // something was written since the last flush
	prepared bool           // the image says that it is being written
	bitmaps  *bitmapTracker // nil: no bitmap is marked in use
	rebase   bool           // another backing file will show through than does now
	txn      *txn           // that goes on
	err      error          // the first failure: nothing is written after it
}

type dirtySlice struct {
	b      []byte
	lo, hi int64 // bytes that have changed
	fresh  bool  // of a table that nothing on disk points at
}

type freedRange struct {
	off, n  int64
	discard bool // give the space back to the file system
}

// Bounds of what is kept before it is flushed.
const (
	maxDirtyBytes = 8 << 20
	maxFrees      = 1 << 16
)

// openWrite prepares an image for writing, after it was opened.
func (im *Image) openWrite() error {
	dev, ok := im.dev.(blockdev.Device)
	if !ok {
		return fmt.Errorf("qcow2: open for writing: the device takes no writes: %w", blockdev.ErrReadOnly)
	}
	if im.snapshot != nil {
		return fmt.Errorf("qcow2: open for writing: a snapshot can only be read: %w", blockdev.ErrReadOnly)
	}
	h := &im.header
	if h.IncompatibleFeatures&IncompatCorrupt != 0 {
		return fmt.Errorf("qcow2: %w", ErrMarkedCorrupt)
	}
	if h.IncompatibleFeatures&IncompatDirty != 0 {
		if err := im.repairDirty(context.Background()); err != nil {
			return err
		}
	}
	w := &writeState{dev: dev, dirty: make(map[int64]*dirtySlice), dirtyL1: make(map[int64]bool)}
	if im.data != nil {
		if w.data, ok = im.data.(blockdev.Device); !ok {
			return fmt.Errorf("qcow2: open for writing: the data file takes no writes: %w", blockdev.ErrReadOnly)
		}
	}
	if err := im.newAllocator(w); err != nil {
		return err
	}
	// The table as far as the header says, not as far as the file goes.
	im.l1 = append(im.l1, make([]byte, int64(h.L1Size)*l1EntrySize-int64(len(im.l1)))...)
	im.w = w
	return im.mapTables()
}

func (im *Image) newAllocator(w *writeState) (err error) {
	if w.alloc, err = newAllocator(w.dev, &im.header, &im.geo); err != nil {
		return err
	}
	w.alloc.grow = im.growRefcountTable
	w.alloc.reserve = im.reserve
	w.alloc.taken = im.taken
	w.alloc.placed = func(cluster int64) { w.tables.add(cluster) }
	return nil
}

// taken notes that a cluster is handed out. One that a table lies in has a
// wrong refcount, of 0.
func (im *Image) taken(cluster int64) error {
	if t := im.w.txn; t != nil {
		t.taken++
		if t.placed != nil {
			t.placed[cluster] = true
		}
	}
	if im.w.tables.hit(cluster, cluster+1) >= 0 {
		return fmt.Errorf("qcow2: cluster at %#x has refcount 0, but a table lies in it: run check -r all: %w", cluster<<im.geo.clusterBits, ErrCorrupt)
	}
	return nil
}

// reserve makes the image file reach up to end at least.
func (im *Image) reserve(end int64) error {
	if end <= im.w.dev.Size() {
		return nil
	}
	t, ok := im.w.dev.(blockdev.Truncater)
	if !ok {
		return fmt.Errorf("qcow2: the image needs %d bytes, the device has %d and cannot grow: %w", end, im.w.dev.Size(), errors.ErrUnsupported)
	}
	if err := t.Truncate(end); errors.Is(err, errors.ErrUnsupported) {
		return im.fail(fmt.Errorf("qcow2: the image needs %d bytes, and the device has %d: %w", end, im.w.dev.Size(), syscall.ENOSPC))
	} else if err != nil {
		return im.fail(fmt.Errorf("qcow2: grow the image file to %d bytes: %w", end, err))
	}
	return nil
}

// fail makes the image read-only if err is not nil.
func (im *Image) fail(err error) error {
	if err != nil && im.w.err == nil {
		im.w.err = err
	}
	return err
}

// mayChange tells whether the image can be changed.
func (im *Image) mayChange(op string) error {
	switch {
	case im.closed.Load():
		return fmt.Errorf("qcow2: %s: %w", op, os.ErrClosed)
	case im.w == nil:
		return fmt.Errorf("qcow2: %s: image is open for reading: %w", op, blockdev.ErrReadOnly)
	case im.w.err != nil:
		return fmt.Errorf("qcow2: %s: %w after an earlier failure: %w", op, blockdev.ErrReadOnly, im.w.err)
	}
	return nil
}

// prepare is called before each change of guest data. Before the first one the
// autoclear features that this package does not know are cleared, and bitmaps
// marked in use.
func (im *Image) prepare() error {
	if im.w.prepared {
		return im.bitmapsBegin(context.Background())
	}
	h := im.header
	h.AutoclearFeatures &= AutoclearBitmaps | AutoclearDataFileRaw
	if h.AutoclearFeatures != im.header.AutoclearFeatures {
		if err := im.writeHeader(&h); err != nil {
			return err
		}
		im.header = h
	}
	im.w.prepared = true
	return im.bitmapsBegin(context.Background())
}

// change runs a change of guest data of n bytes at off.
func (im *Image) change(op string, off, n int64, do func() error) error {
	if im.w != nil {
		im.mu.Lock()
		defer im.mu.Unlock()
	}
	if err := im.mayChange(op); err != nil {
		return err
	}
	if err := im.readable(); err != nil {
		return err
	}
	if off < 0 || n < 0 || off > im.size || n > im.size-off {
		return fmt.Errorf("qcow2: %s: %d bytes at offset %d of a disk of %d bytes: %w", op, n, off, im.size, blockdev.ErrRange)
	}
	if n == 0 {
		return nil
	}
	if err := im.prepare(); err != nil {
		return im.fail(err)
	}
	im.w.unsynced = true
	im.bitmapsDirty(off, n)
	return im.fail(do())
}

// WriteAt implements io.WriterAt on what the guest sees. A write that reaches
// beyond Size writes nothing and is an error that matches blockdev.ErrRange.
//
// Order: data goes to disk at once, the tables with the next Sync or Close, or
// earlier when many have changed. Until then a crash leaves, sector by sector,
// what was there before or what was written.
func (im *Image) WriteAt(p []byte, off int64) (n int, err error) {
	err = im.change("write", off, int64(len(p)), func() error {
		n, err = im.writeGuest(p, off)
		return err
	})
	return n, err
}

// WriteZeroes makes n bytes at off read as zeroes. In version 3 whole clusters
// (subclusters with extended L2 entries) are marked, and keep the space that
// they have; in version 2 they give it back, unless a backing file would show
// through. The rest is written. Order: as WriteAt.
func (im *Image) WriteZeroes(off, n int64) error {
	return im.change("write zeroes", off, n, func() error { return im.zeroGuest(off, n) })
}

// Discard gives back the space of the clusters that lie wholly in n bytes at
// off, which then read as zeroes; the rest of the range is left as it is. In
// version 2 over a backing file it changes nothing. In an external data file it
// makes a hole at once, and leaves the tables alone where that file is raw.
//
// Order: as WriteAt; the space is given back when the tables are on disk.
func (im *Image) Discard(off, n int64) error {
	return im.change("discard", off, n, func() error { return im.discardGuest(off, n) })
}

// Clear makes n bytes at off read as zeroes, as WriteZeroes does, and gives back the
// space of the clusters that lie wholly in the range, as Discard does. Order: as
// Discard.
func (im *Image) Clear(off, n int64) error {
	return im.change("clear", off, n, func() error {
		if err := im.discardGuest(off, n); err != nil {
			return err
		}
		return im.zeroGuest(off, n)
	})
}

// Sync makes all completed changes survive a crash. Order: refcounts, new L2
// tables and data, sync; L2 and L1 entries, sync; refcounts of what was given up.
// On an image that is open for reading it does nothing.
func (im *Image) Sync() error {
	if im.w == nil {
		return nil
	}
	im.mu.Lock()
	defer im.mu.Unlock()
	if err := im.mayChange("sync"); err != nil {
		return err
	}
	return im.fail(im.flush())
}

// writeGuest writes p at off, which the L1 table has to map.
func (im *Image) writeGuest(p []byte, off int64) (int, error) {
	for done := 0; done < len(p); {
		n, err := im.writePiece(p[done:], off+int64(done))
		if err != nil {
			return done, err
		}
		done += n
	}
	return len(p), nil
}

// readGuest fills p from off, also behind the end of the disk.
func (im *Image) readGuest(p []byte, off int64) error {
	for done := 0; done < len(p); {
		r, err := im.lookup(off+int64(done), int64(len(p)-done))
		if err != nil {
			return err
		}
		if err := im.readRun(p[done:done+int(r.n)], off+int64(done), r); err != nil {
			return err
		}
		done += int(r.n)
	}
	return nil
}

// l2Place is an L2 entry of the active tables that may be changed.
type l2Place struct {
	off   int64  // of the slice in the file
	slice []byte // in the table cache
	at    int64  // of the entry in the slice
}

// l2ForWrite returns the place of the L2 entry of a guest offset. A table that
// is missing is made, one that a snapshot has too is copied.
func (im *Image) l2ForWrite(off int64) (l2Place, error) {
	g := &im.geo
	index := off >> g.l2Coverage()
	entry := im.l1Entry(index)
	l2 := int64(entry & l1OffsetMask)
	if g.inCluster(uint64(l2)) != 0 {
		return l2Place{}, &FormatError{"l1 entry", im.l1Off + index*l1EntrySize, "l2 table offset",
			fmt.Sprintf("%#x not aligned to %#x", l2, g.clusterSize), ErrCorrupt}
	}
	if l2 >= im.w.dev.Size() {
		return l2Place{}, &FormatError{"l1 entry", im.l1Off + index*l1EntrySize, "l2 table offset",
			fmt.Sprintf("%#x is beyond the end of the file at %#x: run check", l2, im.w.dev.Size()), ErrCorrupt}
	}
	if l2 == 0 || entry&oflagCopied == 0 {
		to, err := im.newL2(l2)
		if err != nil {
			return l2Place{}, err
		}
		if l2 != 0 {
			im.free(l2, g.clusterSize, false)
		}
		l2 = to
		im.setL1(index, uint64(l2)|oflagCopied)
	}
	inTable := (off >> g.clusterBits & (1<<g.l2Bits - 1)) * g.l2EntrySize
	at := inTable & (im.sliceSize() - 1)
	b, err := im.slice(l2 + inTable - at)
	if err != nil {
		return l2Place{}, fmt.Errorf("qcow2: l2 table at %#x: %w", l2, err)
	}
	return l2Place{l2 + inTable - at, b, at}, nil
}

// newL2 makes an L2 table, a copy of the one at from unless that is 0.
func (im *Image) newL2(from int64) (int64, error) {
	g := &im.geo
	c, _, err := im.w.alloc.alloc(1, 1)
	if err != nil {
		return 0, err
	}
	im.w.tables.add(c)
	to := c << g.clusterBits
	for at := int64(0); at < g.clusterSize; at += im.sliceSize() {
		b := make([]byte, im.sliceSize())
		if from != 0 {
			old, err := im.slice(from + at)
			if err != nil {
				return 0, fmt.Errorf("qcow2: l2 table at %#x: %w", from, err)
			}
			copy(b, old)
			if _, err := im.settleFlags(b); err != nil {
				return 0, err
			}
		}
		im.shared.tables.set(tableKey{im.id, to + at}, b)
		im.w.dirty[to+at] = &dirtySlice{b, 0, im.sliceSize(), true}
	}
	return to, nil
}

// settleFlags makes the copied flags of L2 entries agree with the refcounts,
// and reports whether one has changed.
func (im *Image) settleFlags(b []byte) (changed bool, err error) {
	for i := int64(0); i < int64(len(b)); i += im.geo.l2EntrySize {
		entry := binary.BigEndian.Uint64(b[i:])
		settled, err := im.settledEntry(entry)
		if err != nil {
			return false, err
		}
		if settled != entry {
			binary.BigEndian.PutUint64(b[i:], settled)
			changed = true
		}
	}
	return changed, nil
}

// settledEntry returns an L2 entry with the copied flag that its refcount asks for.
func (im *Image) settledEntry(entry uint64) (uint64, error) {
	g := &im.geo
	if entry == 0 {
		return 0, nil
	}
	if typ := g.clusterType(entry); g.dataFile || typ != clusterNormal && typ != clusterZeroAlloc {
		return entry, nil
	}
	n, err := im.w.alloc.get(int64(entry&l2OffsetMask) >> g.clusterBits)
	return withCopied(entry, n == 1), err
}

// setL1 changes an entry of the active L1 table.
func (im *Image) setL1(index int64, entry uint64) {
	im.w.unsynced = true
	binary.BigEndian.PutUint64(im.l1[index*l1EntrySize:], entry)
	im.w.dirtyL1[index*l1EntrySize/sectorSize] = true
	im.hole.Store(nil)
}

// set changes the entry at p.
func (im *Image) set(p l2Place, entry, bitmap uint64) {
	im.w.unsynced = true
	binary.BigEndian.PutUint64(p.slice[p.at:], entry)
	if im.geo.extended {
		binary.BigEndian.PutUint64(p.slice[p.at+8:], bitmap)
	}
	d := im.w.dirty[p.off]
	if d == nil {
		d = &dirtySlice{b: p.slice, lo: p.at}
		im.w.dirty[p.off] = d
	}
	d.lo, d.hi = min(d.lo, p.at), max(d.hi, p.at+im.geo.l2EntrySize)
}

// entry returns the entry at p, with its subcluster bitmap.
func (im *Image) entry(p l2Place) (entry, bitmap uint64) { return im.geo.entryIn(p.slice[p.at:]) }

// free gives up a reference to each cluster that n bytes at off lie in, after
// the next flush.
func (im *Image) free(off, n int64, discard bool) {
	im.w.unsynced = true
	if f := im.w.frees; len(f) > 0 && f[len(f)-1].off+f[len(f)-1].n == off && f[len(f)-1].discard == discard && off&(im.geo.clusterSize-1) == 0 {
		f[len(f)-1].n += n
		return
	}
	im.w.frees = append(im.w.frees, freedRange{off, n, discard})
}

// freeEntry gives up what an L2 entry refers to.
func (im *Image) freeEntry(entry uint64, discard bool) {
	g := &im.geo
	if g.dataFile {
		return
	}
	if kind, off, n := g.named(entry); n > 0 {
		im.free(off, n, discard && kind != PartCompressed)
	}
}

// relieve flushes when much has to be kept in memory. It is called between
// changes of single entries.
func (im *Image) relieve() error {
	if int64(len(im.w.dirty))*im.sliceSize() < maxDirtyBytes && len(im.w.frees) < maxFrees {
		return nil
	}
	return im.flush()
}

// flush writes all that has changed and syncs.
func (im *Image) flush() error {
	w := im.w
	if !w.unsynced {
		return nil
	}
	// What nothing on disk refers to.
	for _, off := range ascending(w.dirty) {
		if d := w.dirty[off]; d.fresh {
			if err := im.writeSlice(off, d); err != nil {
				return err
			}
			im.clean(off, d)
		}
	}
	if err := w.alloc.writeBlocks(); err != nil {
		return err
	}
	if im.geo.dataFile && w.data != nil {
		if err := blockdev.Sync(w.data); err != nil {
			return err
		}
	}
	if err := blockdev.Sync(w.dev); err != nil {
		return err
	}
	if w.alloc.tableLo != w.alloc.tableHi {
		if err := w.alloc.writeTable(); err != nil {
			return err
		}
		if err := blockdev.Sync(w.dev); err != nil {
			return err
		}
	}
	// What makes it the guest's.
	if len(w.dirty) > 0 || len(w.dirtyL1) > 0 {
		for _, off := range ascending(w.dirty) {
			d := w.dirty[off]
			if err := im.writeSlice(off, d); err != nil {
				return err
			}
			im.clean(off, d)
		}
		for _, sector := range ascending(w.dirtyL1) {
			at := sector * sectorSize
			end := min(at+sectorSize, int64(len(im.l1)))
			if err := im.reserve(im.l1Off + end); err != nil {
				return err
			}
			if _, err := w.dev.WriteAt(im.l1[at:end], im.l1Off+at); err != nil {
				return fmt.Errorf("qcow2: write l1 table at %#x: %w", im.l1Off, err)
			}
			delete(w.dirtyL1, sector)
		}
		if err := blockdev.Sync(w.dev); err != nil {
			return err
		}
	}
	// What is no longer the guest's.
	frees := w.frees
	w.frees = nil
	if len(frees) > 0 {
		w.packed = 0 // what lies there may be given up
	}
	for _, f := range frees {
		if err := im.release(f); err != nil {
			return err
		}
	}
	w.unsynced = false
	return w.alloc.writeBlocks()
}

// ascending returns the keys of a map in order, so that the same changes are
// written in the same order each time.
func ascending[V any](m map[int64]V) []int64 { return slices.Sorted(maps.Keys(m)) }

// clean notes that a slice is on disk. The cache may have read it again, before
// it changed.
func (im *Image) clean(off int64, d *dirtySlice) {
	delete(im.w.dirty, off)
	im.shared.tables.set(tableKey{im.id, off}, d.b)
}

func (im *Image) writeSlice(off int64, d *dirtySlice) error {
	lo, hi := d.lo&^(sectorSize-1), min((d.hi+sectorSize-1)&^(sectorSize-1), int64(len(d.b)))
	if err := im.reserve(off + hi); err != nil {
		return err
	}
	if _, err := im.w.dev.WriteAt(d.b[lo:hi], off+lo); err != nil {
		return fmt.Errorf("qcow2: write l2 table at %#x: %w", off, err)
	}
	return nil
}

// release gives up references that nothing on disk holds any more. Space goes
// back to the file system before another can get it.
func (im *Image) release(f freedRange) error {
	g := &im.geo
	for c := f.off >> g.clusterBits; c < (f.off+f.n+g.clusterSize-1)>>g.clusterBits; c++ {
		n, err := im.w.alloc.get(c)
		if err != nil {
			return err
		}
		if d, ok := im.w.dev.(blockdev.Discarder); ok && f.discard && n == 1 {
			off := c << g.clusterBits
			if err := d.Discard(off, min(g.clusterSize, im.w.dev.Size()-off)); err != nil {
				return fmt.Errorf("qcow2: discard %d bytes at %#x: %w", g.clusterSize, off, err)
			}
		}
		if err := im.w.alloc.add(c, -1); err != nil {
			return err
		}
		if n == 1 {
			im.w.tables.remove(c)
		}
	}
	return nil
}

// growRefcountTable makes room in the refcount table for the block index.
func (im *Image) growRefcountTable(index int64) error {
	a := im.w.alloc
	n := max(index+1, int64(len(a.table))*3/2)
	per := im.geo.clusterSize / reftableEntrySize
	n = min((n+per-1)/per*per, maxReftableSize/reftableEntrySize)
	if index >= n {
		return fmt.Errorf("qcow2: the image needs a refcount table of %d entries, expected at most %d: %w", index+1, n, ErrLimit)
	}
	if im.w.txn != nil {
		a.table = append(a.table, make([]uint64, n-int64(len(a.table)))...)
		return nil
	}
	t, err := im.begin(context.Background())
	if err != nil {
		return err
	}
	defer t.abort()
	a.table = append(a.table, make([]uint64, n-int64(len(a.table)))...)
	return t.commit()
}

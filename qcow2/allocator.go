package qcow2

import (
	"encoding/binary"
	"fmt"
	"slices"

	"qimg/qcow2/blockdev"
)

// blockCacheSize bounds the refcount blocks that an allocator keeps, in bytes;
// it keeps minCachedBlocks at least.
const (
	blockCacheSize  int64 = 8 << 20
	minCachedBlocks int64 = 4
)

// allocator hands out the clusters of a writable image by its refcounts.
//
// It knows two states of them: the one that is being made, and, while a
// transaction goes on, the one on disk. Outside a transaction blocks change
// where they lie, and new ones are put into the table on disk by the flush.
// Inside one no block on disk changes: the first change moves a block to a free
// cluster, and the whole table is written anew by the commit.
type allocator struct {
	dev   blockdev.Device
	geo   *geometry
	width uint // of a refcount in bits
	// table is the refcount table: the offsets of the refcount blocks. Its
	// length is that of the table on disk, or more inside a transaction.
	table    []uint64
	tableOff int64

	blocks map[int64]*refcountBlock // by index in table
	last   *refcountBlock           // the block used last
	lastID int64

	// cursor is where the search for free clusters begins: before it there is
	// none, or, inside a transaction, all have been handed out or passed over.
	cursor int64
	// Table entries from tableLo up to tableHi are not on disk yet.
	tableLo, tableHi int64

	// Inside a transaction: the state on disk, which blocks were moved, and
	// refcounts that have to follow from moving them.
	old     *refcountState
	moved   map[int64]bool
	pending []refcountChange
	busy    bool
	freed   clusterSet // gets the clusters whose refcount becomes 0
	// grow is told when a block is needed for which the table has no entry.
	grow func(index int64) error
	// reserve makes the file reach up to end.
	reserve func(end int64) error
	// taken is told each cluster that is handed out.
	taken func(cluster int64) error
	// placed is told where new refcount blocks lie.
	placed func(cluster int64)
}

// refcountBlock is a refcount block in memory.
type refcountBlock struct {
	off    int64
	b      []byte
	lo, hi int64 // bytes that have changed
}

// refcountState is the refcounts on disk.
type refcountState struct {
	table  []uint64
	width  uint
	cursor int64
	// The block read last.
	index int64
	b     []byte
	// from: nothing below this cluster is handed out.
	from int64
}

type refcountChange struct {
	cluster int64
	delta   int
}

func newAllocator(dev blockdev.Device, h *Header, geo *geometry) (*allocator, error) {
	a := &allocator{dev: dev, geo: geo, width: geo.refcountBits, tableOff: int64(h.RefcountTableOffset), blocks: make(map[int64]*refcountBlock)}
	b, err := readTable(dev, a.tableOff, int64(h.RefcountTableClusters)<<geo.clusterBits)
	if err != nil {
		return nil, fmt.Errorf("qcow2: refcount table at %#x: %w", a.tableOff, err)
	}
	a.table = make([]uint64, int64(h.RefcountTableClusters)<<geo.clusterBits/reftableEntrySize) // at most maxReftableSize
	for i := range len(b) / reftableEntrySize {
		entry := binary.BigEndian.Uint64(b[i*reftableEntrySize:])
		if entry&reftableReservedMask != 0 || geo.inCluster(entry) != 0 || entry>>63 != 0 {
			return nil, &FormatError{"refcount table entry", a.tableOff + int64(i)*reftableEntrySize, "",
				fmt.Sprintf("%#x not aligned to %#x: run check -r all", entry, geo.clusterSize), ErrCorrupt}
		}
		a.table[i] = entry
	}
	return a, nil
}

// perBlock returns log2 of the refcounts of a block.
func (a *allocator) perBlock() uint { return blockRefcounts(a.geo, a.width) }

// maxRefcount returns the largest refcount that can be stored.
func (a *allocator) maxRefcount() uint64 { return ^uint64(0) >> (64 - a.width) }

// block returns a refcount block, nil if there is none: all its refcounts are 0.
func (a *allocator) block(index int64) (*refcountBlock, error) {
	if a.last != nil && a.lastID == index {
		return a.last, nil
	}
	if b := a.blocks[index]; b != nil {
		a.last, a.lastID = b, index
		return b, nil
	}
	if index >= int64(len(a.table)) || a.table[index] == 0 {
		return nil, nil
	}
	b := &refcountBlock{off: int64(a.table[index]), b: make([]byte, a.geo.clusterSize)}
	if err := readFull(a.dev, b.b, b.off); err != nil {
		return nil, fmt.Errorf("qcow2: refcount block at %#x: %w", b.off, err)
	}
	return b, a.keep(index, b)
}

// keep puts a block into the cache. When that is full everything is written
// and forgotten: what a block may hold, it may hold on disk.
func (a *allocator) keep(index int64, b *refcountBlock) error {
	if int64(len(a.blocks)) >= max(blockCacheSize>>a.geo.clusterBits, minCachedBlocks) {
		if err := a.writeBlocks(); err != nil {
			return err
		}
		clear(a.blocks)
	}
	a.blocks[index] = b
	a.last, a.lastID = b, index
	return nil
}

// writeBlocks writes the blocks that have changed.
func (a *allocator) writeBlocks() error {
	for _, index := range ascending(a.blocks) {
		b := a.blocks[index]
		if b.lo == b.hi {
			continue
		}
		lo, hi := b.lo&^(sectorSize-1), (b.hi+sectorSize-1)&^(sectorSize-1)
		if err := a.reserve(b.off + hi); err != nil {
			return err
		}
		if _, err := a.dev.WriteAt(b.b[lo:hi], b.off+lo); err != nil {
			return fmt.Errorf("qcow2: write refcount block at %#x: %w", b.off, err)
		}
		b.lo, b.hi = 0, 0
	}
	return nil
}

// writeTable writes the table entries that are not on disk yet, and nothing
// else: the blocks are there.
func (a *allocator) writeTable() error {
	lo, hi := a.tableLo&^63, (a.tableHi+63)&^63 // whole sectors
	hi = min(hi, int64(len(a.table)))
	off := a.tableOff + lo*reftableEntrySize
	if err := a.reserve(a.tableOff + hi*reftableEntrySize); err != nil {
		return err
	}
	if _, err := a.dev.WriteAt(appendEntries(nil, a.table[lo:hi]), off); err != nil {
		return fmt.Errorf("qcow2: write refcount table at %#x: %w", off, err)
	}
	a.tableLo, a.tableHi = 0, 0
	return nil
}

// get returns the refcount of a cluster.
func (a *allocator) get(cluster int64) (uint64, error) {
	s := a.perBlock()
	b, err := a.block(cluster >> s)
	if b == nil || err != nil {
		return 0, err
	}
	return blockRefcount(b.b, a.width, cluster&(1<<s-1)), nil
}

// add adds delta to the refcount of a cluster.
func (a *allocator) add(cluster int64, delta int) error {
	a.pending = append(a.pending, refcountChange{cluster, delta})
	return a.settle()
}

// settle applies the pending changes, and those that follow from moving blocks
// for them.
func (a *allocator) settle() error {
	if a.busy {
		return nil // an outer call does it
	}
	a.busy = true
	defer func() { a.busy = false }()
	for len(a.pending) > 0 {
		c := a.pending[len(a.pending)-1]
		a.pending = a.pending[:len(a.pending)-1]
		if err := a.apply(c); err != nil {
			a.pending = a.pending[:0]
			return err
		}
	}
	return nil
}

func (a *allocator) apply(c refcountChange) error {
	if c.cluster < 0 || c.cluster >= maxHostSize>>a.geo.clusterBits {
		return fmt.Errorf("qcow2: refcount of cluster %#x, which no file has: %w", c.cluster, ErrCorrupt)
	}
	s := a.perBlock()
	if c.delta < 0 {
		if n, err := a.get(c.cluster); err != nil {
			return err
		} else if n < uint64(-c.delta) {
			return fmt.Errorf("qcow2: refcount %d of the cluster at %#x is lower than the references to it: run check -r all: %w",
				n, c.cluster<<a.geo.clusterBits, ErrCorrupt)
		}
	}
	b, err := a.change(c.cluster >> s)
	if err != nil {
		return err
	}
	i := c.cluster & (1<<s - 1)
	n := blockRefcount(b.b, a.width, i)
	if c.delta > 0 && a.maxRefcount()-n < uint64(c.delta) {
		return fmt.Errorf("qcow2: cluster at %#x: refcounts of %d bits cannot count %d references: %w",
			c.cluster<<a.geo.clusterBits, a.width, n+uint64(c.delta), ErrLimit)
	}
	n += uint64(int64(c.delta))
	a.put(b, i, n)
	if n == 0 && a.old == nil {
		a.cursor = min(a.cursor, c.cluster)
	} else if n == 0 {
		a.old.cursor = min(a.old.cursor, c.cluster)
		a.freed.add(c.cluster)
	}
	return nil
}

// put sets a refcount in a block that change returned.
func (a *allocator) put(b *refcountBlock, i int64, n uint64) {
	putRefcount(b.b, a.width, i, n)
	at, size := i*int64(a.width)/8, max(int64(a.width)/8, 1)
	if b.lo == b.hi {
		b.lo, b.hi = at, at+size
	}
	b.lo, b.hi = min(b.lo, at), max(b.hi, at+size)
}

// change returns a block that may be changed.
func (a *allocator) change(index int64) (*refcountBlock, error) {
	b, err := a.block(index)
	if err != nil {
		return nil, err
	}
	if b == nil {
		if err := a.addBlock(index); err != nil {
			return nil, err
		}
		return a.block(index)
	}
	if a.old == nil || a.moved[index] {
		return b, nil
	}
	to, err := a.find(1)
	if err != nil {
		return nil, err
	}
	a.blocks[index] = b // the search may have dropped it, as it is on disk
	a.last, a.lastID = b, index
	from := b.off >> a.geo.clusterBits
	b.off, b.lo, b.hi = to<<a.geo.clusterBits, 0, a.geo.clusterSize
	a.moved[index] = true
	a.table[index] = uint64(b.off)
	a.pending = append(a.pending, refcountChange{to, 1}, refcountChange{from, -1})
	if err := a.take(to); err != nil {
		return nil, err
	}
	return b, nil
}

// addBlock makes the refcount block of an index that has none. It lies in the
// first free cluster, which may be one that it counts itself.
func (a *allocator) addBlock(index int64) error {
	if index >= int64(len(a.table)) {
		if err := a.grow(index); err != nil {
			return err
		}
		// The larger table may have needed the block itself.
		if a.table[index] != 0 {
			return nil
		}
	}
	s := a.perBlock()
	at, err := a.find(1)
	if err != nil {
		return err
	}
	if in := at >> s; in != index {
		// Where it lies has to be counted too.
		b, err := a.block(in)
		if err != nil {
			return err
		}
		if b == nil {
			if err := a.addBlock(in); err != nil {
				return err
			}
			return a.addBlock(index)
		}
	}
	if err := a.take(at); err != nil {
		return err
	}
	b := &refcountBlock{off: at << a.geo.clusterBits, b: make([]byte, a.geo.clusterSize), hi: a.geo.clusterSize}
	a.table[index] = uint64(b.off)
	if a.old != nil {
		a.moved[index] = true
	} else {
		a.placed(at)
		if a.tableLo == a.tableHi {
			a.tableLo, a.tableHi = index, index
		}
		a.tableLo, a.tableHi = min(a.tableLo, index), max(a.tableHi, index+1)
	}
	if err := a.keep(index, b); err != nil {
		return err
	}
	if at>>s == index {
		a.put(b, at&(1<<s-1), 1)
		return nil
	}
	if a.old != nil {
		a.pending = append(a.pending, refcountChange{at, 1})
		return a.settle()
	}
	in, err := a.block(at >> s)
	if err != nil {
		return err
	}
	a.put(in, at&(1<<s-1), 1)
	return nil
}

// take notes that a cluster is handed out. Inside a transaction it is not
// found again, even before its refcount is set.
func (a *allocator) take(cluster int64) error {
	if a.old != nil {
		a.cursor = cluster + 1
	}
	return a.taken(cluster)
}

// find returns the first of n free clusters in a row.
func (a *allocator) find(n int64) (int64, error) {
	first, _, err := a.findRun(n, n)
	return first, err
}

// findRun returns the first run of at least min free clusters from the cursor
// on, and how many of up to want it has.
func (a *allocator) findRun(least, want int64) (first, n int64, err error) {
	s := a.perBlock()
	first = a.cursor
	for c := a.cursor; ; {
		if c >= maxHostSize>>a.geo.clusterBits {
			return 0, 0, fmt.Errorf("qcow2: image file of %d bytes is full: %w", int64(maxHostSize), ErrLimit)
		}
		free, end, err := a.isFree(c)
		if err != nil {
			return 0, 0, err
		}
		if !free {
			if c > first && c-first >= least {
				return first, c - first, nil
			}
			c++
			first = c
			if a.old == nil && n == 0 {
				a.cursor = c // nothing before it is free
			}
			continue
		}
		n = 1
		c = min(max(end, c+1), first+want, (c>>s+1)<<s)
		if c-first >= want {
			return first, want, nil
		}
	}
}

// maxHostSize is where an image file ends at most: the offsets in L2 entries
// have 56 bits.
const maxHostSize = 1 << 56

// isFree reports whether a cluster is free, in both states. If so, end is
// where the clusters end that are known to be free with it.
func (a *allocator) isFree(c int64) (free bool, end int64, err error) {
	s := a.perBlock()
	b, err := a.block(c >> s)
	if err != nil {
		return false, 0, err
	}
	if b != nil && blockRefcount(b.b, a.width, c&(1<<s-1)) != 0 {
		return false, 0, nil
	}
	end = c + 1
	if b == nil {
		end = (c>>s + 1) << s
	}
	if a.old == nil {
		return true, end, nil
	}
	n, oldEnd, err := a.oldRefcount(c)
	return n == 0, min(end, oldEnd), err
}

// oldRefcount returns the refcount of a cluster in the state on disk, and, if
// it is 0, where the clusters end that are known to have it too.
func (a *allocator) oldRefcount(c int64) (n uint64, end int64, err error) {
	o := a.old
	if c < o.from {
		return 1, 0, nil
	}
	s := blockRefcounts(a.geo, o.width)
	index := c >> s
	if index >= int64(len(o.table)) || o.table[index] == 0 {
		return 0, (index + 1) << s, nil
	}
	if o.b == nil || o.index != index {
		if o.b == nil {
			o.b = make([]byte, a.geo.clusterSize)
		}
		o.index = index
		if err := readFull(a.dev, o.b, int64(o.table[index])); err != nil {
			o.b = nil
			return 0, 0, fmt.Errorf("qcow2: refcount block at %#x: %w", o.table[index], err)
		}
	}
	return blockRefcount(o.b, o.width, c&(1<<s-1)), c + 1, nil
}

// alloc returns up to want free clusters in a row, least at least, with
// refcount one.
func (a *allocator) alloc(least, want int64) (first, n int64, err error) {
	for {
		if first, n, err = a.findRun(least, want); err != nil {
			return 0, 0, err
		}
		missing, err := a.missingBlock(first, n)
		if err != nil {
			return 0, 0, err
		}
		if missing < 0 {
			break
		}
		// It takes a cluster itself: the run is looked for anew.
		if err := a.addBlock(missing); err != nil {
			return 0, 0, err
		}
	}
	if a.old != nil {
		a.cursor = first + n
	}
	for c := first; c < first+n; c++ {
		if err := a.taken(c); err != nil {
			return 0, 0, err
		}
		a.pending = append(a.pending, refcountChange{c, 1})
		if err := a.settle(); err != nil {
			return 0, 0, err
		}
	}
	if a.old == nil && first == a.cursor {
		a.cursor = first + n
	}
	return first, n, a.reserve((first + n) << a.geo.clusterBits)
}

// missingBlock returns the first index for which n clusters from first on need
// a refcount block that is not there, or -1.
func (a *allocator) missingBlock(first, n int64) (int64, error) {
	s := a.perBlock()
	for i := first >> s; i <= (first+n-1)>>s; i++ {
		if b, err := a.block(i); b == nil || err != nil {
			return i, err
		}
	}
	return -1, nil
}

// setWidth begins the refcounts anew, in another width, inside a transaction
// that has changed nothing yet. The blocks and the table on disk, which nobody
// needs then, are given up. progress is told how many entries of the old table
// were gone through.
//
// That every refcount fits was seen before: see tooWide.
func (a *allocator) setWidth(width uint, progress func(done, total int64) error) error {
	old := a.old
	a.table, a.width = nil, width
	clear(a.blocks)
	a.last = nil
	err := a.eachOld(func(index int64, b []byte) error {
		if err := progress(index, int64(len(old.table))); err != nil || b == nil {
			return err
		}
		s := blockRefcounts(a.geo, old.width)
		for i := range int64(1) << s {
			n := blockRefcount(b, old.width, i)
			if n == 0 {
				continue
			}
			c := index<<s + i
			to, err := a.change(c >> a.perBlock())
			if err != nil {
				return err
			}
			a.put(to, c&(1<<a.perBlock()-1), n)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, off := range old.table {
		if off != 0 {
			if err := a.add(int64(off)>>a.geo.clusterBits, -1); err != nil {
				return err
			}
		}
	}
	return nil
}

// tooWide returns the first cluster on disk whose refcount does not fit a width,
// and its refcount, which is 0 if all fit.
func (a *allocator) tooWide(width uint) (cluster int64, refcount uint64, err error) {
	if width >= a.old.width {
		return 0, 0, nil
	}
	err = a.eachOld(func(index int64, b []byte) error {
		s := blockRefcounts(a.geo, a.old.width)
		for i := int64(0); b != nil && refcount == 0 && i < 1<<s; i++ {
			if n := blockRefcount(b, a.old.width, i); n>>width != 0 {
				cluster, refcount = index<<s+i, n
			}
		}
		return nil
	})
	return cluster, refcount, err
}

// eachOld calls f with each refcount block on disk, by its index in the table;
// nil if there is none. The bytes are valid until f returns.
func (a *allocator) eachOld(f func(index int64, b []byte) error) error {
	buf := make([]byte, a.geo.clusterSize)
	for i, off := range a.old.table {
		var b []byte
		if off != 0 {
			b = buf
			if err := readFull(a.dev, b, int64(off)); err != nil {
				return fmt.Errorf("qcow2: refcount block at %#x: %w", off, err)
			}
		}
		if err := f(int64(i), b); err != nil {
			return err
		}
	}
	return nil
}

// dropEmpty gives up, inside a transaction, the refcount blocks that count
// nothing but themselves.
func (a *allocator) dropEmpty() error {
	s := a.perBlock()
	for again := true; again; {
		again = false
		for i := int64(len(a.table)) - 1; i >= 0; i-- {
			b, err := a.block(i)
			if err != nil {
				return err
			}
			if b == nil {
				continue
			}
			own := int64(-1)
			if c := b.off >> a.geo.clusterBits; c>>s == i {
				own = c & (1<<s - 1)
			}
			if !a.emptyBut(b, own) {
				continue
			}
			off := b.off
			a.table[i] = 0
			delete(a.blocks, i)
			a.last = nil
			if own < 0 {
				if err := a.add(off>>a.geo.clusterBits, -1); err != nil {
					return err
				}
			}
			again = true
		}
	}
	return nil
}

// emptyBut reports whether all refcounts of a block are 0, but for that of the
// entry own if own is not negative.
func (a *allocator) emptyBut(b *refcountBlock, own int64) bool {
	if own >= 0 {
		n := blockRefcount(b.b, a.width, own)
		putRefcount(b.b, a.width, own, 0)
		defer putRefcount(b.b, a.width, own, n)
	}
	return !slices.ContainsFunc(b.b, func(x byte) bool { return x != 0 })
}

// lastUsed returns the last cluster that is in use, by its number.
func (a *allocator) lastUsed() (int64, error) {
	s := a.perBlock()
	for i := int64(len(a.table)) - 1; i >= 0; i-- {
		b, err := a.block(i)
		if err != nil {
			return 0, err
		}
		for c := int64(1)<<s - 1; b != nil && c >= 0; c-- {
			if blockRefcount(b.b, a.width, c) != 0 {
				return i<<s + c, nil
			}
		}
	}
	return 0, nil
}

// begin starts a transaction: the state on disk is kept.
func (a *allocator) begin() {
	a.old = &refcountState{table: append([]uint64(nil), a.table...), width: a.width, cursor: a.cursor}
	a.moved = make(map[int64]bool)
}

// end ends a transaction, in the new state or in the old one.
func (a *allocator) end(committed bool) {
	if !committed {
		a.table, a.width = a.old.table, a.old.width
	}
	a.cursor = a.old.cursor
	clear(a.blocks)
	a.last = nil
	a.old, a.moved, a.pending = nil, nil, nil
	a.tableLo, a.tableHi = 0, 0
}

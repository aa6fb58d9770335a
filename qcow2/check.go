package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"math"

	"qimg/qcow2/blockdev"
)

// CheckOptions are the options of Check.
type CheckOptions struct {
	// Found is told every finding, in an order that does not change; nil
	// means only the totals are wanted.
	Found func(Finding)
	// Stale also looks for copied flags in the tables of snapshots that do not
	// agree with the refcounts. The specification lets them be, so they are
	// Notes. It takes a second reading of the L2 tables.
	Stale bool
	// Progress is told bytes of metadata read, out of a guess of the total.
	Progress func(done, total int64)
}

// CheckResult is the totals of a check, with the meaning that they have in
// qemu-img check --output=json.
type CheckResult struct {
	ImageEndOffset     int64 // bytes: end of the last cluster in use
	TotalClusters      int64 // guest clusters
	AllocatedClusters  int64
	FragmentedClusters int64
	CompressedClusters int64
	CheckErrors        int64 // Internal
	Corruptions        int64
	Leaks              int64
}

// checkPartsBits is log2 of the parts of refcount blocks, of 4 KiB at most, that
// a check keeps.
const checkPartsBits = 12

// checker is a check that is going on.
type checker struct {
	ctx    context.Context
	im     *Image
	opts   CheckOptions
	res    CheckResult
	refs   *refcounts
	table  []byte // refcount table, as far as the file goes
	fileSz int64
	visits l2Visits        // of all L2 tables that are aligned and in the file
	extent blockdev.Extent // of the file, that hole looked at last
	places []place         // of all structures but L2 tables, refcount blocks and what L2 entries name
	next   int64           // where the last cluster of the L2 table that goes on ends
	// copiedBad: a copied flag of an active L2 table may disagree with the
	// stored refcount.
	copiedBad bool
	overlaps  []overlap // ascending
	fix       *repairer // nil unless this is for a repair

	done, total int64

	// Parts of refcount blocks, each where the hash of its offset says.
	parts [1 << checkPartsBits]struct {
		off int64
		b   []byte
	}
	// The part of a refcount block used last, and its clusters.
	slice      []byte
	start, end int64
}

// Check compares all refcounts with the references that the tables of the
// image hold, and checks those tables. It reads the image file only, no guest
// data, and no backing file. It finds what qemu-img check finds, and besides:
// zero flags in version 2 images, structures that overlap, and, if asked, stale
// copied flags in the tables of snapshots.
//
// An Overlap is a Corruption where nothing else is wrong with the refcounts of
// its clusters. Where qemu-img check tells of them the Overlap only explains it
// and is a Note, so that the totals are those of qemu-img.
//
// Memory follows the references that are found, not the size of the file: 3
// bits for each cluster in use where these lie close together and have one
// reference, 50 bytes at most for each entry of a table, and 64 for each 4096
// clusters of the file. Time is that of reading all tables once, the L2 tables
// on all processors, and of a step for each cluster of the file; L2 tables are
// read again where copied flags are wrong or structures overlap. L2 tables in
// holes of the file are not read. Where clusters then lie in no order, and
// refcount blocks have more than 16 MiB, 4 KiB of these are read for each entry
// of the active L2 tables.
//
// An error means that the check did not come to its end.
//
// An image that is open for writing is flushed first, and cannot be used
// meanwhile.
func (im *Image) Check(ctx context.Context, opts *CheckOptions) (CheckResult, error) {
	if im.w != nil {
		im.mu.Lock()
		defer im.mu.Unlock()
		if err := im.flush(); err != nil {
			return CheckResult{}, im.fail(err)
		}
	}
	c := &checker{ctx: ctx, im: im}
	if opts != nil {
		c.opts = *opts
	}
	return c.run()
}

func (c *checker) run() (CheckResult, error) {
	for _, step := range []func() error{c.prepare, c.countReferences, c.compareRefcounts, c.checkOverlaps, c.checkCopied} {
		if err := step(); err != nil {
			return c.res, err
		}
	}
	return c.res, nil
}

// prepare reads the refcount table.
func (c *checker) prepare() error {
	im := c.im
	c.fileSz = im.dev.Size()
	clusters := im.geo.clusters(c.fileSz)
	if clusters > maxCheckClusters {
		return fmt.Errorf("qcow2: check: file of %d clusters, expected at most %d: %w", clusters, int64(maxCheckClusters), ErrLimit)
	}
	c.refs = newRefcounts(clusters, im.geo.refcountBits)
	c.res.TotalClusters = im.geo.clusters(int64(im.header.Size) &^ 511)
	h := &im.header
	var err error
	if c.table, err = readTable(im.dev, int64(h.RefcountTableOffset), int64(h.RefcountTableClusters)<<h.ClusterBits); err != nil {
		return fmt.Errorf("qcow2: refcount table at %#x: %w", h.RefcountTableOffset, err)
	}
	c.table = c.table[:len(c.table)&^(reftableEntrySize-1)]
	return nil
}

func (c *checker) found(f Finding) {
	if f.Count == 0 {
		f.Count = 1
	}
	if f.Severity == 0 {
		f.Severity = findingKinds[f.Kind].severity
	}
	if f.Kind != Overlap {
		f.Repairable = f.Kind.repairable()
	}
	if c.fix != nil {
		if c.fix.again && f.Kind != RefcountTooLow && f.Kind != RefcountTooHigh {
			return // told already
		}
		c.fix.decide(&f)
		if c.fix.again {
			c.tell(f)
			return
		}
	}
	switch f.Severity {
	case Leak:
		c.res.Leaks += f.Count
	case Corruption:
		c.res.Corruptions += f.Count
	case Internal:
		c.res.CheckErrors += f.Count
	}
	c.tell(f)
}

func (c *checker) tell(f Finding) {
	if c.opts.Found != nil {
		c.opts.Found(f)
	}
}

// entries calls f with the offset in a table and the value of each of its
// entries, of 8 bytes, as far as the file goes. n is the bytes of the table.
func (c *checker) entries(off, n int64, f func(at int64, entry uint64) error) error {
	for at := int64(0); at < n; at += maxSlice {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		b, err := readTable(c.im.dev, off+at, min(maxSlice, n-at))
		if err != nil {
			return fmt.Errorf("qcow2: check: table at %#x: %w", off, err)
		}
		c.progress(int64(len(b)))
		for i := 0; i+8 <= len(b); i += 8 {
			if err := f(at+int64(i), binary.BigEndian.Uint64(b[i:])); err != nil {
				return err
			}
		}
		if len(b) < maxSlice {
			break // the end of the table or of the file
		}
	}
	return nil
}

func (c *checker) progress(n int64) {
	c.done += n
	if c.opts.Progress != nil {
		c.opts.Progress(min(c.done, c.total), c.total)
	}
}

// refcount returns the stored refcount of a cluster.
func (c *checker) refcount(cluster int64) (uint64, error) {
	if cluster < c.start || cluster >= c.end {
		b, err := c.refcountSlice(cluster)
		if err != nil {
			return 0, err
		}
		n := c.perSlice()
		c.slice, c.start = b, cluster&^(n-1)
		c.end = c.start + n
	}
	return c.im.geo.refcountIn(c.slice, cluster), nil
}

// perSlice returns how many refcounts refcountSlice has at once, a power of
// two.
func (c *checker) perSlice() int64 { return c.sliceSize() * 8 / int64(c.im.geo.refcountBits) }

// sliceSize is the bytes of a refcount block that are read at once. They are
// few since entries of L2 tables can name clusters in any order.
func (c *checker) sliceSize() int64 { return min(c.im.geo.clusterSize, 4096) }

// refcountSlice returns the part of a refcount block that holds the refcount
// of a cluster, as long as sliceSize, or nil if they are all 0. It is valid until
// the next call.
func (c *checker) refcountSlice(cluster int64) ([]byte, error) {
	off, err := c.refcountAt(cluster &^ (c.perSlice() - 1))
	if off == 0 || err != nil {
		return nil, err
	}
	part := &c.parts[uint64(off)*0x9e3779b97f4a7c15>>(64-checkPartsBits)]
	if part.b == nil {
		part.b = make([]byte, c.sliceSize())
	} else if part.off == off {
		return part.b, nil
	}
	part.off = off // an error ends the check
	if err := readFull(c.im.dev, part.b, off); err != nil {
		return nil, fmt.Errorf("qcow2: check: refcounts at %#x: %w", off, err)
	}
	return part.b, nil
}

// refcountAt returns where the stored refcount of a cluster lies, 0 if nowhere
// and it is 0. The cluster is the first of some whose refcounts fill bytes.
func (c *checker) refcountAt(cluster int64) (int64, error) {
	g := &c.im.geo
	perBlock := blockRefcounts(g, g.refcountBits)
	i := cluster >> perBlock
	if i >= int64(len(c.table)/reftableEntrySize) {
		return 0, nil
	}
	block := binary.BigEndian.Uint64(c.table[i*reftableEntrySize:]) & reftableOffsetMask
	if g.inCluster(block) != 0 {
		return 0, &FormatError{"refcount table entry", int64(c.im.header.RefcountTableOffset) + i*reftableEntrySize,
			"refcount block offset", fmt.Sprintf("%#x not aligned to %#x", block, g.clusterSize), ErrCorrupt}
	}
	if block == 0 || block >= uint64(c.fileSz) {
		return 0, nil
	}
	return int64(block) + (cluster&(1<<perBlock-1))*int64(g.refcountBits)/8, nil
}

// refer counts k references to each cluster of n bytes at off.
func (c *checker) refer(off, n, k int64, m mark) {
	g := &c.im.geo
	if n <= 0 {
		return
	}
	// The last cluster need not be there wholly.
	if off > math.MaxInt64-n || off+n-c.fileSz >= g.clusterSize {
		c.found(Finding{Kind: BeyondEnd, Off: off, Value: uint64(n), Count: k})
		c.copiedBad = c.copiedBad || m != 0
		if c.fix != nil {
			c.fix.beyond(off, n, k)
		}
		return
	}
	last := (off + n - 1) >> g.clusterBits
	c.refs.grow(last + 1) // one more than the file has at most
	for i := off >> g.clusterBits; i <= last; i++ {
		if over := c.refs.add(i, uint64(k), m); over > 0 {
			c.overflow(i, over)
		}
	}
}

// referClusters counts k references to each of n clusters at off, which is
// aligned.
func (c *checker) referClusters(off, n, k int64, m mark) {
	g := &c.im.geo
	inside := min(n, g.clusters(max(0, c.fileSz-off)))
	c.refs.addRun(off>>g.clusterBits, inside, uint64(k), m, c.overflow)
	for i := inside; i < n; i++ {
		c.refer(off+i<<g.clusterBits, g.clusterSize, k, m)
	}
}

func (c *checker) overflow(cluster int64, over uint64) {
	c.found(Finding{Kind: RefcountOverflow, Off: cluster << c.im.geo.clusterBits, Count: int64(over)})
}

// place is where a structure lies that k tables name.
type place struct {
	Part
	n, k int64 // bytes, times
}

// referPart counts k references to a structure of n bytes.
func (c *checker) referPart(kind PartKind, off, n, k int64) {
	if n > 0 {
		c.places = append(c.places, place{Part{kind, off}, n, k})
		c.refer(off, n, k, 0)
	}
}

// countReferences fills c.refs.
func (c *checker) countReferences() error {
	h, g := &c.im.header, &c.im.geo
	c.checkSnapshotTable()
	c.referPart(PartHeader, 0, g.clusterSize, 1)
	if err := c.checkL1(int64(h.L1TableOffset), int64(h.L1Size), 1, PartActiveL1); err != nil {
		return err
	}
	if err := c.checkSnapshots(); err != nil {
		return err
	}
	c.visits.merge()
	c.total = c.done + int64(len(c.visits.list))*g.clusterSize
	if err := c.eachL2(c.parseL2, c.countL2); err != nil {
		return err
	}
	if h.NbSnapshots > 0 {
		c.referPart(PartSnapshotTable, int64(h.SnapshotsOffset), c.im.snapEnd-int64(h.SnapshotsOffset), 1)
	}
	c.referPart(PartRefcountTable, int64(h.RefcountTableOffset), int64(h.RefcountTableClusters)<<h.ClusterBits, 1)
	if x, ok := h.Crypto(); ok {
		c.referPart(PartCryptoHeader, int64(x.Offset), int64(x.Length), 1) // checked by checkExtension
	}
	if err := c.checkBitmaps(); err != nil {
		return err
	}
	c.checkRefcountBlocks()
	return nil
}

// checkSnapshotTable checks what the entries of the snapshot table have to
// have (qcow2.txt "Snapshots": version 3 needs the disk size).
func (c *checker) checkSnapshotTable() {
	for i, s := range c.im.snapshots {
		if c.im.header.Version >= 3 && s.ExtraDataSize < 16 {
			c.found(Finding{Kind: SnapshotIncomplete, Off: int64(c.im.header.SnapshotsOffset), Index: int64(i), Value: uint64(s.ExtraDataSize)})
		}
	}
}

// checkSnapshots walks the L1 tables of the snapshots, each once.
func (c *checker) checkSnapshots() error {
	g := &c.im.geo
	if n := len(c.im.snapshots); n > 0 && g.dataFile {
		c.found(Finding{Kind: SnapshotsDataFile, Value: uint64(n)})
	}
	for _, s := range c.im.snapshots {
		name := snapshotName(&s)
		switch {
		case g.inCluster(s.L1TableOffset) != 0:
			c.found(Finding{Kind: SnapshotL1Unaligned, Value: s.L1TableOffset, Text: name})
		case s.L1Size > maxL1Size/l1EntrySize:
			c.found(Finding{Kind: SnapshotL1TooLarge, Value: uint64(s.L1Size), Text: name})
		}
	}
	var sum int64
	for t := range c.inactiveL1s() {
		// Tables that overlap could make this take forever.
		if sum += t.size * l1EntrySize; sum > c.fileSz+maxL1Size {
			c.found(Finding{Kind: SnapshotL1Overlap, Off: t.off, Text: t.name})
			return nil
		}
		if err := c.checkL1(t.off, t.size, t.k, PartInactiveL1); err != nil {
			return err
		}
	}
	return nil
}

func snapshotName(s *Snapshot) string { return fmt.Sprintf("%s (%s)", s.ID, s.Name) }

// inactiveL1 is an L1 table of k snapshots, of which name is the first.
type inactiveL1 struct {
	off, size int64 // bytes, entries
	k         int64
	name      string
}

// inactiveL1s goes through the L1 tables of snapshots that can be read, each
// once, in the order of the snapshot table.
func (c *checker) inactiveL1s() iter.Seq[inactiveL1] {
	type table struct{ off, size int64 }
	of := func(s *Snapshot) table {
		return table{int64(min(s.L1TableOffset, math.MaxInt64)), int64(s.L1Size)}
	}
	return func(yield func(inactiveL1) bool) {
		times := make(map[table]int64)
		for i := range c.im.snapshots {
			times[of(&c.im.snapshots[i])]++
		}
		for i := range c.im.snapshots {
			s := &c.im.snapshots[i]
			t := of(s)
			k := times[t]
			delete(times, t)
			if k == 0 || c.im.geo.inCluster(s.L1TableOffset) != 0 || s.L1Size > maxL1Size/l1EntrySize {
				continue
			}
			if !yield(inactiveL1{t.off, t.size, k, snapshotName(s)}) {
				return
			}
		}
	}
}

// checkL1 checks an L1 table that is used k times.
func (c *checker) checkL1(off, size, k int64, kind PartKind) error {
	g := &c.im.geo
	c.referPart(kind, off, size*l1EntrySize, k)
	return c.entries(off, size*l1EntrySize, func(at int64, entry uint64) error {
		if entry == 0 {
			return nil
		}
		if entry&l1ReservedMask != 0 {
			c.found(Finding{Kind: L1Reserved, Off: off + at, Index: at / l1EntrySize, Value: entry, Count: k})
		}
		l2 := int64(entry & l1OffsetMask)
		if l2 == 0 && c.fix != nil && c.fix.all {
			// It names no table, but is counted as if it named the header.
			if entry&l1ReservedMask == 0 {
				c.found(Finding{Kind: L1Reserved, Off: off + at, Index: at / l1EntrySize, Value: entry, Count: k})
			}
			return nil
		}
		c.refer(l2, g.clusterSize, k, 0)
		if g.inCluster(uint64(l2)) != 0 {
			c.found(Finding{Kind: L2TableUnaligned, Off: l2, Index: at / l1EntrySize, Value: entry, Count: k})
			return nil
		}
		// Nothing is in a table beyond the end, which refer has told.
		if l2 < c.fileSz {
			v := l2Visit{off: l2, all: k, hole: c.hole(l2, g.clusterSize)}
			if kind == PartActiveL1 {
				v.active = k
			}
			c.visits.add(v)
		}
		return nil
	})
}

// hole reports whether the file is known to hold nothing in n bytes at off,
// which is inside of it.
func (c *checker) hole(off, n int64) bool {
	if off < c.extent.Off || off >= c.extent.Off+c.extent.Len {
		e, err := blockdev.NextExtent(c.im.dev, off)
		if err != nil {
			return false // reading tells
		}
		c.extent = e
	}
	return c.extent.Kind.ReadsZero() && min(off+n, c.fileSz) <= c.extent.Off+c.extent.Len
}

// checkBitmaps counts what the bitmaps refer to.
func (c *checker) checkBitmaps() error {
	ext, ok := c.im.header.Bitmaps()
	if !ok {
		return nil
	}
	c.referPart(PartBitmapDirectory, int64(ext.DirectoryOffset), int64(ext.DirectorySize), 1)
	list, err := c.im.parseBitmaps(&c.im.header, c.im.header.bitmapSize())
	if errors.Is(err, ErrCorrupt) {
		c.found(Finding{Kind: BitmapDirectoryBad, Off: int64(ext.DirectoryOffset), Text: err.Error()})
		return nil
	} else if err != nil {
		return err
	}
	g := &c.im.geo
	type table struct{ off, size int64 }
	times := make(map[table]int64)
	for _, bm := range list {
		times[table{int64(bm.TableOffset), int64(bm.TableSize) * 8}]++
	}
	var sum int64
	for _, bm := range list {
		t := table{int64(bm.TableOffset), int64(bm.TableSize) * 8}
		k := times[t]
		if k == 0 {
			continue // done
		}
		delete(times, t)
		c.referPart(PartBitmapTable, t.off, t.size, k)
		// Tables that overlap could make this take forever.
		if sum += max(0, min(t.size, c.fileSz-t.off)); sum > c.fileSz {
			c.found(Finding{Kind: BitmapTableOverlap, Off: t.off, Text: bm.Name})
			return nil
		}
		err := c.entries(t.off, t.size, func(at int64, entry uint64) error {
			data := entry & bitmapTableOffsetMask
			if entry&bitmapTableReservedMask != 0 || g.inCluster(data) != 0 || data != 0 && entry&bitmapTableAllOnes != 0 {
				c.found(Finding{Kind: BitmapTableEntryBad, Off: t.off + at, Index: at / 8, Value: entry, Text: bm.Name, Count: k})
			} else if data != 0 {
				c.refer(int64(data), g.clusterSize, k, 0)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// checkRefcountBlocks counts the references to refcount blocks.
func (c *checker) checkRefcountBlocks() {
	g := &c.im.geo
	for i := 0; i < len(c.table); i += reftableEntrySize {
		entry := binary.BigEndian.Uint64(c.table[i:])
		off := entry & reftableOffsetMask
		f := Finding{Off: int64(min(off, math.MaxInt64)), Index: int64(i / reftableEntrySize), Value: entry}
		switch {
		case entry&reftableReservedMask != 0:
			f.Kind = RefcountTableReserved
		case g.inCluster(off) != 0:
			f.Kind = RefcountBlockUnaligned
		case off>>g.clusterBits >= uint64(c.refs.n):
			f.Kind = RefcountBlockBeyondEnd
		case off != 0:
			c.refer(int64(off), g.clusterSize, 1, 0)
			if f.Reference = c.refs.get(int64(off >> g.clusterBits)); f.Reference != 1 {
				f.Kind = RefcountBlockShared
			}
		}
		if f.Kind != 0 {
			c.found(f)
		}
	}
}

// compareRefcounts compares c.refs with the stored refcounts.
func (c *checker) compareRefcounts() error {
	g := &c.im.geo
	highest := int64(0)
	// Go by parts of refcount blocks, and pass over those that are as they are
	// in most images.
	step := min(g.refcountsPerBlock(), refcountChunk)
	buf := make([]byte, step*int64(g.refcountBits)/8)
	ones := make([]byte, len(buf))
	for i := range step {
		putRefcount(ones, g.refcountBits, i, 1)
	}
	counts := new(chunkCounts)
	filled := int64(-1)
	for start := int64(0); start < c.refs.n; start += step {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		end := min(start+step, c.refs.n)
		b, err := c.readRefcounts(buf, start)
		if errors.Is(err, ErrCorrupt) {
			c.found(Finding{Kind: RefcountUnreadable, Off: start << g.clusterBits, Index: start, Value: uint64(end - start), Count: end - start, Text: err.Error()})
			continue
		} else if err != nil {
			return err
		}
		empty := c.refs.empty(start)
		switch {
		case b == nil && empty:
			continue
		case end == start+step && bytes.Equal(b, ones) && c.refs.plain(start, step):
			highest = end - 1
			continue
		}
		if chunk := start &^ (refcountChunk - 1); chunk != filled {
			c.refs.chunk(chunk, counts)
			filled = chunk
		}
		for i := start; i < end; i++ {
			stored := g.refcountIn(b, i)
			at := i % refcountChunk
			counted := uint64(counts.count[at])
			if stored == 0 && counted == 0 {
				continue
			}
			highest = i
			if stored == 1 && counts.plain.has(at) || stored != 1 && counts.copied.has(at) {
				c.copiedBad = true
			}
			if stored != counted {
				c.mismatch(i, stored, counted)
			}
		}
	}
	c.res.ImageEndOffset = (highest + 1) << g.clusterBits
	return nil
}

// mismatch tells of a refcount that is not the number of references.
func (c *checker) mismatch(cluster int64, stored, counted uint64) {
	f := Finding{Kind: RefcountTooLow, Off: cluster << c.im.geo.clusterBits, Index: cluster, Refcount: stored, Reference: counted}
	if stored > counted {
		f.Kind = RefcountTooHigh
	}
	c.found(f)
}

// readRefcounts reads the stored refcounts from a cluster on, as many as fit in
// buf. Without any it returns nil.
func (c *checker) readRefcounts(buf []byte, cluster int64) ([]byte, error) {
	off, err := c.refcountAt(cluster)
	if off == 0 || err != nil {
		return nil, err
	}
	if err := readFull(c.im.dev, buf, off); err != nil {
		return nil, fmt.Errorf("qcow2: check: refcounts at %#x: %w", off, err)
	}
	c.progress(int64(len(buf)))
	return buf, nil
}

// checkCopied compares the copied flags of the active tables with the stored
// refcounts.
func (c *checker) checkCopied() error {
	h := &c.im.header
	err := c.checkCopiedL1(int64(h.L1TableOffset), int64(h.L1Size), func(f Finding, entry uint64) {
		if f.Kind = L1Copied; (f.Refcount == 1) != (entry&oflagCopied != 0) {
			c.found(f)
		}
	})
	if err != nil {
		return err
	}
	if c.opts.Stale {
		for t := range c.inactiveL1s() {
			err := c.checkCopiedL1(t.off, t.size, func(f Finding, entry uint64) {
				f.Kind, f.Text, f.Count = InactiveL1Copied, t.name, t.k
				if f.Refcount != 1 && entry&oflagCopied != 0 {
					c.found(f)
				}
			})
			if err != nil {
				return err
			}
		}
	}
	if !c.copiedBad && !c.opts.Stale {
		return nil
	}
	return c.eachL2(func(*l2Job) {}, c.checkCopiedL2)
}

// checkCopiedL1 calls f for each entry of an L1 table with the stored refcount
// of its L2 table.
func (c *checker) checkCopiedL1(off, size int64, f func(Finding, uint64)) error {
	return c.entries(off, size*l1EntrySize, func(at int64, entry uint64) error {
		l2 := int64(entry & l1OffsetMask)
		if l2 == 0 {
			return nil
		}
		stored, err := c.refcount(l2 >> c.im.geo.clusterBits)
		if errors.Is(err, ErrCorrupt) {
			return nil // compareRefcounts has told
		} else if err != nil {
			return err
		}
		f(Finding{Off: off + at, Index: at / l1EntrySize, Value: entry, Refcount: stored}, entry)
		return nil
	})
}

// checkCopiedL2 compares the copied flags of a part of an L2 table with the
// stored refcounts.
func (c *checker) checkCopiedL2(j *l2Job) error {
	g := &c.im.geo
	for i := 0; i < len(j.b); i += int(g.l2EntrySize) {
		v, at := j.at(i, g)
		if v.active == 0 && !c.opts.Stale {
			continue
		}
		entry := binary.BigEndian.Uint64(j.b[i:])
		if typ := g.clusterType(entry); typ != clusterNormal && typ != clusterZeroAlloc {
			continue
		}
		stored, err := uint64(1), error(nil) // of clusters in an external data file
		if !g.dataFile {
			stored, err = c.refcount(int64(entry&l2OffsetMask) >> g.clusterBits)
			if errors.Is(err, ErrCorrupt) {
				continue // compareRefcounts has told
			} else if err != nil {
				return err
			}
		}
		f := Finding{Kind: L2Copied, Count: v.active, Off: v.off + at, Index: at / g.l2EntrySize, Value: entry, Refcount: stored}
		switch copied := entry&oflagCopied != 0; {
		case v.active > 0 && (stored == 1) != copied:
			c.found(f)
		case v.active == 0 && stored != 1 && copied:
			f.Kind, f.Count = InactiveL2Copied, v.all
			c.found(f)
		}
	}
	return nil
}

package qcow2

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/bits"
	"slices"

	"qimg/qcow2/blockdev"
)

// Severity tells what a finding means.
type Severity uint8

const (
	// Leak: space is lost, nothing else.
	Leak Severity = 1 + iota
	// Corruption: data is damaged, or a write may damage it.
	Corruption
	// Internal: a part of the image could not be checked.
	Internal
)

func (s Severity) String() string {
	switch s {
	case Leak:
		return "leak"
	case Corruption:
		return "corruption"
	case Internal:
		return "internal"
	}
	return fmt.Sprintf("Severity(%d)", uint8(s))
}

// FindingKind is what is wrong.
type FindingKind uint8

// Kinds of findings. Off is the offset in the image file of what the comment
// names; Value is the entry or number in question.
const (
	RefcountTooLow         FindingKind = 1 + iota // cluster: stored refcount below the references
	RefcountTooHigh                               // cluster: stored refcount above the references
	RefcountOverflow                              // cluster: more references than a refcount can hold
	BeyondEnd                                     // region: ends a cluster or more beyond the file; Value: its size
	L1Reserved                                    // L1 entry: reserved bits set
	L2TableUnaligned                              // L2 table: not cluster-aligned
	L2Reserved                                    // L2 entry: reserved bits set
	ZeroFlagVersion2                              // L2 entry: zero flag in a version 2 image
	CompressedCopied                              // L2 entry: compressed cluster with the copied flag
	CompressedDataFile                            // L2 entry: compressed cluster with an external data file
	CompressedSubclusters                         // L2 entry: compressed cluster with a subcluster bitmap
	SubclustersContradict                         // L2 entry: subclusters both allocated and zero
	SubclustersUnallocated                        // L2 entry: subclusters of no cluster allocated
	DataUnaligned                                 // L2 entry: data cluster not cluster-aligned
	PreallocatedUnaligned                         // L2 entry: zero cluster not cluster-aligned
	L1Copied                                      // L1 entry: copied flag disagrees with the refcount
	L2Copied                                      // L2 entry: copied flag disagrees with the refcount
	SnapshotsDataFile                             // snapshots in an image with an external data file
	SnapshotL1Unaligned                           // L1 table of a snapshot: not cluster-aligned
	SnapshotL1TooLarge                            // L1 table of a snapshot: over the limit
	SnapshotL1Overlap                             // L1 tables of snapshots: larger together than the file
	RefcountTableReserved                         // refcount table entry: reserved bits set
	RefcountBlockUnaligned                        // refcount block: not cluster-aligned
	RefcountBlockBeyondEnd                        // refcount block: outside of the file
	RefcountBlockShared                           // refcount block: not referenced once
	RefcountUnreadable                            // clusters whose refcount cannot be read; Value: how many
	BitmapDirectoryBad                            // bitmap directory: cannot be parsed
	BitmapTableOverlap                            // bitmap tables: larger together than the file
	BitmapTableEntryBad                           // bitmap table entry: reserved bits or not aligned
)

// Finding is something wrong in an image.
type Finding struct {
	Kind     FindingKind
	Severity Severity
	// Count is how many findings this one stands for: a table that several
	// snapshots share is looked at once.
	Count int64
	Off   int64 // bytes in the image file
	Value uint64
	// Refcount is what is stored, Reference what was counted, for the kinds
	// that compare them.
	Refcount, Reference uint64
	Index               int64  // number of the entry, cluster or block
	Text                string // more, where there is more to say
}

// findingKinds has the name of each kind, its severity, and what qemu-img check
// prints for it, where it knows it. The arguments are those of Finding.String.
var findingKinds = [...]struct {
	name     string
	severity Severity
	text     string
}{
	RefcountTooLow:         {"refcount too low", Corruption, "ERROR cluster %[3]d refcount=%[4]d reference=%[5]d"},
	RefcountTooHigh:        {"refcount too high", Leak, "Leaked cluster %[3]d refcount=%[4]d reference=%[5]d"},
	RefcountOverflow:       {"refcount overflow", Corruption, "ERROR: overflow cluster offset=%#[1]x"},
	BeyondEnd:              {"beyond the end", Corruption, "ERROR: counting reference for region exceeding the end of the file by one cluster or more: offset %#[1]x size %#[2]x"},
	L1Reserved:             {"l1 entry reserved bits", Corruption, "ERROR found L1 entry with reserved bits set: %[2]x"},
	L2TableUnaligned:       {"l2 table unaligned", Corruption, "ERROR l2_offset=%[1]x: Table is not cluster aligned; L1 entry corrupted"},
	L2Reserved:             {"l2 entry reserved bits", Corruption, "ERROR found l2 entry with reserved bits set: %[2]x"},
	ZeroFlagVersion2:       {"zero flag in version 2", Corruption, "ERROR l2_entry=%[2]x at %#[1]x: zero flag in a version 2 image"},
	CompressedCopied:       {"compressed cluster copied", Corruption, "ERROR: coffset=%#[2]x: copied flag must never be set for compressed clusters"},
	CompressedDataFile:     {"compressed cluster with data file", Corruption, "ERROR compressed cluster %[3]d with data file, entry=%#[2]x"},
	CompressedSubclusters:  {"compressed cluster with subclusters", Corruption, "ERROR compressed cluster %[3]d with non-zero subcluster allocation bitmap, entry=%#[2]x"},
	SubclustersContradict:  {"subclusters contradict", Corruption, "ERROR offset=%[7]x: Allocated cluster has corrupted subcluster allocation bitmap"},
	SubclustersUnallocated: {"subclusters unallocated", Corruption, "ERROR: Unallocated cluster has non-zero subcluster allocation map%[6]s"},
	DataUnaligned:          {"data cluster unaligned", Corruption, "ERROR offset=%[7]x: Data cluster is not properly aligned; L2 entry corrupted."},
	PreallocatedUnaligned:  {"preallocated cluster unaligned", Corruption, "ERROR offset=%[7]x: Preallocated cluster is not properly aligned; L2 entry corrupted."},
	L1Copied:               {"l1 copied flag", Corruption, "ERROR OFLAG_COPIED L2 cluster: l1_index=%[3]d l1_entry=%[2]x refcount=%[4]d"},
	L2Copied:               {"l2 copied flag", Corruption, "ERROR OFLAG_COPIED data cluster: l2_entry=%[2]x refcount=%[4]d"},
	SnapshotsDataFile:      {"snapshots with data file", Corruption, "ERROR %[2]d snapshots in image with data file"},
	SnapshotL1Unaligned:    {"snapshot l1 table unaligned", Corruption, "ERROR snapshot %[6]s l1_offset=%#[2]x: L1 table is not cluster aligned; snapshot table entry corrupted"},
	SnapshotL1TooLarge:     {"snapshot l1 table too large", Corruption, "ERROR snapshot %[6]s l1_size=%#[2]x: L1 table is too large; snapshot table entry corrupted"},
	SnapshotL1Overlap:      {"snapshot l1 tables overlap", Corruption, "ERROR snapshot %[6]s: the L1 tables of the snapshots are larger than the file"},
	RefcountTableReserved:  {"refcount table reserved bits", Corruption, "ERROR refcount table entry %[3]d has reserved bits set"},
	RefcountBlockUnaligned: {"refcount block unaligned", Corruption, "ERROR refcount block %[3]d is not cluster aligned; refcount table entry corrupted"},
	RefcountBlockBeyondEnd: {"refcount block beyond the end", Corruption, "ERROR refcount block %[3]d is outside image"},
	RefcountBlockShared:    {"refcount block shared", Corruption, "ERROR refcount block %[3]d refcount=%[5]d"},
	RefcountUnreadable:     {"refcount unreadable", Internal, "Can't get refcount for cluster %[3]d: %[6]s"},
	BitmapDirectoryBad:     {"bitmap directory bad", Corruption, "ERROR bitmap directory: %[6]s"},
	BitmapTableOverlap:     {"bitmap tables overlap", Corruption, "ERROR bitmap %[6]s: the tables of the bitmaps are larger than the file"},
	BitmapTableEntryBad:    {"bitmap table entry bad", Corruption, "ERROR bitmap table entry %[3]d of %[6]s: %[2]x"},
}

func (k FindingKind) String() string {
	if k == 0 || int(k) >= len(findingKinds) {
		return fmt.Sprintf("FindingKind(%d)", uint8(k))
	}
	return findingKinds[k].name
}

// String is the line that qemu-img check prints for the finding, where it
// knows it.
func (f Finding) String() string {
	if f.Kind == 0 || int(f.Kind) >= len(findingKinds) {
		return fmt.Sprintf("%v at %#x", f.Kind, f.Off)
	}
	return fmt.Sprintf(findingKinds[f.Kind].text, f.Off, f.Value, f.Index, f.Refcount, f.Reference, f.Text, f.Value&l2OffsetMask)
}

// CheckOptions are the options of Check.
type CheckOptions struct {
	// Found is told every finding, in an order that does not change; nil
	// means only the totals are wanted.
	Found func(Finding)
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
	visits l2Visits        // of all L2 tables that are aligned and hold anything
	extent blockdev.Extent // of the file, that hole looked at last

	done, total int64
	buf         []byte // of readL2

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
// data, and no backing file. It finds what qemu-img check finds, and zero
// flags in version 2 images besides.
//
// Memory follows the references that are found, not the size of the file: a byte
// for each cluster in use where these lie close together, 50 bytes at most for
// each entry of a table, and 48 for each 4096 clusters of the file. Time is that
// of reading all tables once, the L2 tables twice, and of a step for each cluster
// of the file. L2 tables in holes of the file are not read. Where clusters lie in
// no order, and refcount blocks have more than 16 MiB, 4 KiB of these are read for
// each entry of the active L2 tables.
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
	c := &checker{ctx: ctx, im: im, fileSz: im.dev.Size()}
	if opts != nil {
		c.opts = *opts
	}
	clusters := im.geo.clusters(c.fileSz)
	if clusters > maxCheckClusters {
		return c.res, fmt.Errorf("qcow2: check: file of %d clusters, expected at most %d: %w", clusters, int64(maxCheckClusters), ErrLimit)
	}
	c.refs = newRefcounts(clusters, im.geo.refcountBits)
	c.res.TotalClusters = im.geo.clusters(int64(im.header.Size) &^ 511)
	var err error
	h := &im.header
	if c.table, err = readTable(im.dev, int64(h.RefcountTableOffset), int64(h.RefcountTableClusters)<<h.ClusterBits); err != nil {
		return c.res, fmt.Errorf("qcow2: refcount table at %#x: %w", h.RefcountTableOffset, err)
	}
	c.table = c.table[:len(c.table)&^(reftableEntrySize-1)]
	for _, step := range []func() error{c.countReferences, c.compareRefcounts, c.checkCopied} {
		if err := step(); err != nil {
			return c.res, err
		}
	}
	return c.res, nil
}

func (c *checker) found(f Finding) {
	if f.Count == 0 {
		f.Count = 1
	}
	f.Severity = findingKinds[f.Kind].severity
	switch f.Severity {
	case Leak:
		c.res.Leaks += f.Count
	case Corruption:
		c.res.Corruptions += f.Count
	case Internal:
		c.res.CheckErrors += f.Count
	}
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

// readL2 returns the L2 table at off, valid until the next call.
func (c *checker) readL2(off int64) ([]byte, error) {
	if err := c.ctx.Err(); err != nil {
		return nil, err
	}
	if c.buf == nil {
		c.buf = make([]byte, c.im.geo.clusterSize)
	}
	if off >= c.fileSz {
		return nil, nil
	}
	if err := readFull(c.im.dev, c.buf, off); err != nil {
		return nil, fmt.Errorf("qcow2: check: l2 table at %#x: %w", off, err)
	}
	c.progress(int64(len(c.buf)))
	return c.buf, nil
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
	g := &c.im.geo
	perBlock := g.clusterBits + 3 - uint(bits.Len(g.refcountBits)-1) // log2
	i := cluster >> perBlock
	if i >= int64(len(c.table)/reftableEntrySize) {
		return nil, nil
	}
	block := binary.BigEndian.Uint64(c.table[i*reftableEntrySize:]) & reftableOffsetMask
	if g.inCluster(block) != 0 {
		return nil, &FormatError{"refcount table entry", int64(c.im.header.RefcountTableOffset) + i*reftableEntrySize,
			"refcount block offset", fmt.Sprintf("%#x not aligned to %#x", block, g.clusterSize), ErrCorrupt}
	}
	if block == 0 || block >= uint64(c.fileSz) {
		return nil, nil
	}
	inBlock := (cluster & (1<<perBlock - 1)) * int64(g.refcountBits) / 8
	off := int64(block) + inBlock&^(c.sliceSize()-1)
	part := &c.parts[uint64(off)*0x9e3779b97f4a7c15>>(64-checkPartsBits)]
	if part.b == nil {
		part.b = make([]byte, c.sliceSize())
	} else if part.off == off {
		return part.b, nil
	}
	part.off = off // an error ends the check
	if err := readFull(c.im.dev, part.b, off); err != nil {
		return nil, fmt.Errorf("qcow2: check: refcount block at %#x: %w", block, err)
	}
	return part.b, nil
}

// refer counts k references to each cluster of n bytes at off.
func (c *checker) refer(off, n, k int64) {
	g := &c.im.geo
	if n <= 0 {
		return
	}
	// The last cluster need not be there wholly.
	if off > math.MaxInt64-n || off+n-c.fileSz >= g.clusterSize {
		c.found(Finding{Kind: BeyondEnd, Off: off, Value: uint64(n), Count: k})
		return
	}
	last := (off + n - 1) >> g.clusterBits
	c.refs.grow(last + 1) // one more than the file has at most
	for i := off >> g.clusterBits; i <= last; i++ {
		if over := c.refs.add(i, uint64(k)); over > 0 {
			c.found(Finding{Kind: RefcountOverflow, Off: i << g.clusterBits, Count: int64(over)})
		}
	}
}

// l2Visit is an L2 table with the number of L1 entries that point at it, of
// all L1 tables and of the active one.
type l2Visit struct {
	off         int64
	all, active int64
}

// l2Visits collects visits. Those of one table are put together from time to
// time, so that it stays in proportion to the tables that there are.
type l2Visits struct {
	list    []l2Visit
	compact int // length at which to put together
}

func (v *l2Visits) add(x l2Visit) {
	if len(v.list) >= max(v.compact, 1<<16) {
		v.merge()
		v.compact = 2 * len(v.list)
	}
	v.list = append(v.list, x)
}

func (v *l2Visits) merge() {
	slices.SortFunc(v.list, func(a, b l2Visit) int { return cmp.Compare(a.off, b.off) })
	n := 0
	for _, x := range v.list {
		if n > 0 && v.list[n-1].off == x.off {
			v.list[n-1].all += x.all
			v.list[n-1].active += x.active
			continue
		}
		v.list[n] = x
		n++
	}
	v.list = v.list[:n]
}

// countReferences fills c.refs.
func (c *checker) countReferences() error {
	h, g := &c.im.header, &c.im.geo
	c.refer(0, g.clusterSize, 1)
	if err := c.checkL1(int64(h.L1TableOffset), int64(h.L1Size), 1, true); err != nil {
		return err
	}
	if err := c.checkSnapshots(); err != nil {
		return err
	}
	c.visits.merge()
	c.total = c.done + int64(len(c.visits.list))*g.clusterSize*2
	for _, v := range c.visits.list {
		if err := c.checkL2(v); err != nil {
			return err
		}
	}
	if h.NbSnapshots > 0 {
		c.refer(int64(h.SnapshotsOffset), c.im.snapEnd-int64(h.SnapshotsOffset), 1)
	}
	c.refer(int64(h.RefcountTableOffset), int64(h.RefcountTableClusters)<<h.ClusterBits, 1)
	if x, ok := h.Crypto(); ok {
		c.refer(int64(x.Offset), int64(x.Length), 1) // checked by checkExtension
	}
	if err := c.checkBitmaps(); err != nil {
		return err
	}
	c.checkRefcountBlocks()
	return nil
}

// checkSnapshots walks the L1 tables of the snapshots, each once.
func (c *checker) checkSnapshots() error {
	g := &c.im.geo
	if n := len(c.im.snapshots); n > 0 && g.dataFile {
		c.found(Finding{Kind: SnapshotsDataFile, Value: uint64(n)})
	}
	type table struct {
		off  uint64
		size uint32
	}
	times := make(map[table]int64)
	var order []table
	var names []string
	for _, s := range c.im.snapshots {
		name := fmt.Sprintf("%s (%s)", s.ID, s.Name)
		switch t := (table{s.L1TableOffset, s.L1Size}); {
		case g.inCluster(s.L1TableOffset) != 0:
			c.found(Finding{Kind: SnapshotL1Unaligned, Value: s.L1TableOffset, Text: name})
		case s.L1Size > maxL1Size/l1EntrySize:
			c.found(Finding{Kind: SnapshotL1TooLarge, Value: uint64(s.L1Size), Text: name})
		default:
			if times[t]++; times[t] == 1 {
				order, names = append(order, t), append(names, name)
			}
		}
	}
	var sum int64
	for i, t := range order {
		// Tables that overlap could make this take forever.
		if sum += int64(t.size) * l1EntrySize; sum > c.fileSz+maxL1Size {
			c.found(Finding{Kind: SnapshotL1Overlap, Off: int64(min(t.off, math.MaxInt64)), Text: names[i]})
			return nil
		}
		if err := c.checkL1(int64(min(t.off, math.MaxInt64)), int64(t.size), times[t], false); err != nil {
			return err
		}
	}
	return nil
}

// checkL1 checks an L1 table that is used k times.
func (c *checker) checkL1(off, size, k int64, active bool) error {
	g := &c.im.geo
	c.refer(off, size*l1EntrySize, k)
	return c.entries(off, size*l1EntrySize, func(at int64, entry uint64) error {
		if entry == 0 {
			return nil
		}
		if entry&l1ReservedMask != 0 {
			c.found(Finding{Kind: L1Reserved, Off: off + at, Index: at / l1EntrySize, Value: entry, Count: k})
		}
		l2 := int64(entry & l1OffsetMask)
		c.refer(l2, g.clusterSize, k)
		if g.inCluster(uint64(l2)) != 0 {
			c.found(Finding{Kind: L2TableUnaligned, Off: l2, Index: at / l1EntrySize, Value: entry, Count: k})
			return nil
		}
		// Nothing is in a table beyond the end, which refer has told, or in a
		// hole of the file.
		if l2 < c.fileSz && !c.hole(l2, g.clusterSize) {
			v := l2Visit{l2, k, 0}
			if active {
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

// checkL2 checks an L2 table and counts what it refers to.
func (c *checker) checkL2(v l2Visit) error {
	g := &c.im.geo
	b, err := c.readL2(v.off)
	if err != nil {
		return err
	}
	next := int64(0) // where the last cluster ends
	for i := 0; int64(i)+g.l2EntrySize <= int64(len(b)); i += int(g.l2EntrySize) {
		entry := binary.BigEndian.Uint64(b[i:])
		var bitmap uint64
		if g.extended {
			bitmap = binary.BigEndian.Uint64(b[i+8:])
		}
		if entry|bitmap == 0 {
			continue
		}
		bad := func(kind FindingKind) {
			c.found(Finding{Kind: kind, Off: v.off + int64(i), Index: int64(i) / g.l2EntrySize, Value: entry, Count: v.all})
		}
		typ := g.clusterType(entry)
		if typ != clusterCompressed && entry&l2ReservedMask != 0 {
			bad(L2Reserved)
		}
		if entry&oflagZero != 0 && typ != clusterCompressed && c.im.header.Version < 3 {
			bad(ZeroFlagVersion2)
		}
		switch typ {
		case clusterCompressed:
			if entry&oflagCopied != 0 {
				bad(CompressedCopied)
			}
			if g.dataFile {
				bad(CompressedDataFile)
				continue
			}
			if bitmap != 0 {
				bad(CompressedSubclusters)
				continue
			}
			off, n := g.compressed(entry)
			c.refer(off, n, v.all)
			c.res.AllocatedClusters += v.active
			c.res.CompressedClusters += v.active
			c.res.FragmentedClusters += v.active
		case clusterZeroAlloc, clusterNormal:
			off := int64(entry & l2OffsetMask)
			if bitmap>>32&bitmap != 0 {
				bad(SubclustersContradict)
			}
			if g.inCluster(uint64(off)) != 0 {
				if g.extended && bitmap&subclusterAllocMask != 0 || !g.extended && typ == clusterNormal {
					bad(DataUnaligned)
				} else {
					bad(PreallocatedUnaligned)
				}
			}
			c.res.AllocatedClusters += v.active
			if next != 0 && off != next {
				c.res.FragmentedClusters += v.active
			}
			next = off + g.clusterSize
			if !g.dataFile {
				c.refer(off, g.clusterSize, v.all)
			}
		case clusterUnallocated:
			if bitmap&subclusterAllocMask != 0 {
				bad(SubclustersUnallocated)
			}
		}
	}
	return nil
}

// checkBitmaps counts what the bitmaps refer to.
func (c *checker) checkBitmaps() error {
	ext, ok := c.im.header.Bitmaps()
	if !ok {
		return nil
	}
	c.refer(int64(ext.DirectoryOffset), int64(ext.DirectorySize), 1)
	list, err := c.im.Bitmaps()
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
		c.refer(t.off, t.size, k)
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
				c.refer(int64(data), g.clusterSize, k)
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
			c.refer(int64(off), g.clusterSize, 1)
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
	// Go by parts of refcount blocks, and pass over those without refcounts
	// or references.
	step := min(c.perSlice(), refcountChunk)
	var counts [refcountChunk]uint32
	for start := int64(0); start < c.refs.n; start += step {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		end := min(start+step, c.refs.n)
		if start%refcountChunk == 0 { // step divides it
			c.refs.chunk(start, &counts)
		}
		b, err := c.refcountSlice(start)
		if errors.Is(err, ErrCorrupt) {
			c.found(Finding{Kind: RefcountUnreadable, Off: start << g.clusterBits, Index: start, Value: uint64(end - start), Count: end - start, Text: err.Error()})
			continue
		} else if err != nil {
			return err
		}
		if b == nil && c.refs.empty(start) {
			continue
		}
		for i := start; i < end; i++ {
			stored := g.refcountIn(b, i)
			counted := uint64(counts[i%refcountChunk])
			if stored != 0 || counted != 0 {
				highest = i
			}
			f := Finding{Off: i << g.clusterBits, Index: i, Refcount: stored, Reference: counted}
			switch {
			case stored < counted:
				f.Kind = RefcountTooLow
				c.found(f)
			case stored > counted:
				f.Kind = RefcountTooHigh
				c.found(f)
			}
		}
	}
	c.res.ImageEndOffset = (highest + 1) << g.clusterBits
	return nil
}

// checkCopied compares the copied flags of the active tables with the stored
// refcounts.
func (c *checker) checkCopied() error {
	h, g := &c.im.header, &c.im.geo
	err := c.entries(int64(h.L1TableOffset), int64(h.L1Size)*l1EntrySize, func(at int64, entry uint64) error {
		l2 := int64(entry & l1OffsetMask)
		if l2 == 0 {
			return nil
		}
		stored, err := c.refcount(l2 >> g.clusterBits)
		if errors.Is(err, ErrCorrupt) {
			return nil // compareRefcounts has told
		} else if err != nil {
			return err
		}
		if (stored == 1) != (entry&oflagCopied != 0) {
			c.found(Finding{Kind: L1Copied, Off: int64(h.L1TableOffset) + at, Index: at / l1EntrySize, Value: entry, Refcount: stored})
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, v := range c.visits.list {
		if v.active > 0 {
			if err := c.checkCopiedL2(v.off, v.active); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *checker) checkCopiedL2(l2, k int64) error {
	g := &c.im.geo
	b, err := c.readL2(l2)
	if err != nil {
		return err
	}
	for i := 0; int64(i)+g.l2EntrySize <= int64(len(b)); i += int(g.l2EntrySize) {
		entry := binary.BigEndian.Uint64(b[i:])
		if typ := g.clusterType(entry); typ != clusterNormal && typ != clusterZeroAlloc {
			continue
		}
		stored := uint64(1) // of clusters in an external data file
		if !g.dataFile {
			stored, err = c.refcount(int64(entry&l2OffsetMask) >> g.clusterBits)
			if errors.Is(err, ErrCorrupt) {
				continue // compareRefcounts has told
			} else if err != nil {
				return err
			}
		}
		if (stored == 1) != (entry&oflagCopied != 0) {
			c.found(Finding{Kind: L2Copied, Count: k, Off: l2 + int64(i), Index: int64(i) / g.l2EntrySize, Value: entry, Refcount: stored})
		}
	}
	return nil
}

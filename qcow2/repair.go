package qcow2

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"

	"qimg/qcow2/blockdev"
)

// ErrRebuild: only leaks were to be repaired, but the refcounts cannot be
// changed without building them anew.
var ErrRebuild = errors.New("refcount structures have to be rebuilt")

// RepairOptions are the options of Repair. The zero value, and nil, mean that
// everything is repaired that can be.
type RepairOptions struct {
	// Leaks repairs leaked clusters only, and, if nothing else is wrong, copied
	// flags.
	Leaks bool
	// DryRun only finds out what would be done. The device is not written to
	// and need not take writes.
	DryRun bool
	// Found is told every finding, in an order that does not change. Wrong
	// refcounts are told twice, as by qemu-img: as they were found, and, unless
	// all are built anew, when they are Repaired.
	Found func(Finding)
	// Progress is told bytes of metadata read, out of a guess of the total.
	Progress func(done, total int64)
}

// RepairResult tells what a repair found and did.
type RepairResult struct {
	Check                        CheckResult // before the repair
	LeaksFixed, CorruptionsFixed int64
	Plan                         RepairPlan
}

// Clean reports whether nothing wrong is left.
func (r *RepairResult) Clean() bool {
	return r.Check.Corruptions == r.CorruptionsFixed && r.Check.Leaks == r.LeaksFixed && r.Check.CheckErrors == r.Plan.unreadable && r.Plan.stuck == 0
}

// RepairPlan is what a repair changes. All of it takes effect at once.
type RepairPlan struct {
	L2Tables, L1Tables []TableChange
	Copies             []ClusterCopy
	// SnapshotTable is the place of a new snapshot table, 0 for none.
	SnapshotTable int64
	Snapshots     int // in the new table
	// Refcounts too low and too high that become right, of clusters.
	Raised, Freed int64
	// RefcountTable is the place of a new refcount table, 0 for none, and
	// RefcountBlocks how many new blocks it has.
	RefcountTable, RefcountBlocks int64
	// Rebuilt: the old refcount table could not be used.
	Rebuilt bool
	// The bits of the header that are cleared.
	ClearDirty, ClearCorrupt bool
	// Size is that of the file afterwards, in bytes.
	Size int64

	unreadable int64 // refcounts that could not be read, and are made anew
	grows      bool
	stuck      int64 // overlaps that are not counted, and stay
}

// TableChange is a table that is written anew in another place. Offsets are in
// bytes.
type TableChange struct {
	Off, To int64
	Entries int64 // that change; none does in a table that lay upon something else

	size, k int64 // entries of an L1 table; L1 entries or snapshots that name it
	active  bool
	zeros   int64 // place of new clusters for guest data that is zero
}

// ClusterCopy is a guest cluster that lay upon something else.
type ClusterCopy struct {
	Off, To int64
}

// Empty reports whether nothing is to be done.
func (p *RepairPlan) Empty() bool {
	return p.RefcountTable == 0 && !p.ClearDirty && !p.ClearCorrupt
}

// String says the plan in lines.
func (p *RepairPlan) String() string {
	if p.Empty() {
		return "nothing to do\n"
	}
	var b strings.Builder
	for _, c := range p.Copies {
		fmt.Fprintf(&b, "copy guest cluster at %#x to %#x\n", c.Off, c.To)
	}
	for _, t := range p.L2Tables {
		fmt.Fprintf(&b, "write L2 table at %#x anew at %#x: %d entries change\n", t.Off, t.To, t.Entries)
	}
	for _, t := range p.L1Tables {
		fmt.Fprintf(&b, "write L1 table at %#x anew at %#x: %d entries change\n", t.Off, t.To, t.Entries)
	}
	if p.SnapshotTable != 0 {
		fmt.Fprintf(&b, "write snapshot table anew at %#x: %d snapshots\n", p.SnapshotTable, p.Snapshots)
	}
	if p.RefcountTable != 0 {
		why := ""
		if p.Rebuilt {
			why = ", without the old ones"
		}
		fmt.Fprintf(&b, "raise the refcounts of %d clusters, free %d leaked clusters\n", p.Raised, p.Freed)
		fmt.Fprintf(&b, "write refcount table anew at %#x, with %d refcount blocks%s\n", p.RefcountTable, p.RefcountBlocks, why)
		if p.grows {
			fmt.Fprintf(&b, "make the file %d bytes long\n", p.Size)
		}
	}
	if p.ClearDirty {
		b.WriteString("clear the dirty bit\n")
	}
	if p.ClearCorrupt {
		b.WriteString("clear the corrupt bit\n")
	}
	return b.String()
}

// Repair checks the image in dev and makes right what it can. It opens images
// that Open refuses: those that have the corrupt bit set, for writing, or a
// snapshot table over the limits. It needs neither backing file nor data file,
// and no guest data is changed or lost.
//
// It repairs what qemu-img check -r all does: refcounts, with a new refcount
// table and new blocks; copied flags; preallocated clusters at impossible
// places, which read as zeroes; a snapshot table that is over the limits, of
// which the snapshots over them are dropped, or without what version 3 needs.
// The dirty bit and the corrupt bit are cleared if nothing wrong is left.
//
// Besides it clears reserved bits of L1 and L2 entries, and copied flags of
// compressed clusters. A zero flag in a version 2 image becomes an unallocated
// cluster, or one of zeroes where there is a backing file. Where structures
// overlap, what can be moved gets a place of its own; guest clusters are copied.
//
// While tables cannot be read that may refer to clusters (L1, L2 or bitmap
// tables in impossible places), leaked clusters are left alone: they may be what
// is missing.
//
// Nothing that the old state refers to is overwritten: all new tables are
// written behind the last cluster of the file that is in use. Order: new tables
// and copies, sync; the first 512 bytes of the header, sync. A crash leaves the
// image as it was or repaired. dev has to be a blockdev.Device unless DryRun is set, and a
// blockdev.Truncater where the file has to grow.
//
// Memory and time are those of Check, and 60 bytes for each L2 table that
// changes.
func Repair(ctx context.Context, dev blockdev.Reader, opts *RepairOptions) (RepairResult, error) {
	r := &repairer{ctx: ctx}
	if opts != nil {
		r.opts = *opts
	}
	r.all = !r.opts.Leaks
	if !r.opts.DryRun {
		var ok bool
		if r.dev, ok = dev.(blockdev.Device); !ok {
			return RepairResult{}, fmt.Errorf("qcow2: repair: the device takes no writes: %w", blockdev.ErrReadOnly)
		}
	}
	r.im = &Image{dev: dev, shared: newShared(nil)}
	err := r.run()
	r.res.Check = r.c.res
	return r.res, err
}

// maxDirtyRepairs is how often an image with the dirty bit is repaired before it
// is given up.
const maxDirtyRepairs = 3

// repairDirty makes right the refcounts of an image with the dirty bit, and all
// else, before it is opened for writing.
func (im *Image) repairDirty(ctx context.Context) error {
	res, err := Repair(ctx, im.dev, nil)
	// A repair that makes the file longer can be all that something else needs
	// to be right: another one finds that.
	for tries := 1; err == nil && !res.Clean() && !res.Plan.Empty() && tries < maxDirtyRepairs; tries++ {
		res, err = Repair(ctx, im.dev, nil)
	}
	if err != nil {
		return err
	}
	if !res.Clean() {
		return headerError(ErrCorrupt, "incompatible_features", "has the dirty bit, and the image is damaged beyond repair: run check")
	}
	if err := im.readHeader(); err != nil {
		return err
	}
	return im.readL1(im.header.L1Size)
}

// repairer is a repair that is going on.
type repairer struct {
	ctx  context.Context
	im   *Image
	dev  blockdev.Device // nil for a dry run
	opts RepairOptions
	res  RepairResult
	all  bool
	c    checker

	snapshotTable []byte // to be written, nil if the old one stays
	// flags: copied flags are made right.
	flags bool
	// again: wrong refcounts are told a second time.
	again bool
	// unsure: what cannot be read may refer to leaked clusters.
	unsure bool
	// end is one past the last cluster of the file. Clusters beyond it that
	// something refers to are counted in ahead, from end on.
	end   int64
	ahead *refcounts
	// far: something refers to clusters beyond those that ahead counts.
	far bool
	// Clusters from start up to next are handed out.
	start, next int64
	// changed: the refcount structure has to be made anew in any case.
	changed bool
	// snapshotsBad: the snapshot table has to.
	snapshotsBad bool
	// The new refcount table, and the clusters that it has.
	table         []uint64
	tableClusters int64
}

// maxAhead bounds the clusters that a repair adds to a file which something
// refers to beyond its end.
const maxAhead = 1 << 22

func (r *repairer) run() error {
	r.c = checker{ctx: r.ctx, im: r.im, fix: r, opts: CheckOptions{Found: r.opts.Found, Progress: r.opts.Progress}}
	if err := r.open(); err != nil {
		return err
	}
	c := &r.c
	if err := c.prepare(); err != nil {
		return err
	}
	r.end = c.refs.n
	r.ahead = newRefcounts(maxAhead, 64)
	if err := c.countReferences(); err != nil {
		return err
	}
	if err := c.compareRefcounts(); err != nil {
		return err
	}
	p := &r.res.Plan
	if p.Rebuilt && !r.all {
		return fmt.Errorf("qcow2: repair: %w", ErrRebuild)
	}
	if !p.Rebuilt && c.res.Corruptions+c.res.Leaks > 0 && !r.opts.DryRun {
		r.again = true
		if err := c.compareRefcounts(); err != nil {
			return err
		}
		r.again = false
	}
	r.next = c.refs.n
	if !r.unsure && p.unreadable == 0 {
		// Nothing in the file behind its last cluster in use is in use.
		r.next = max(c.refs.end(), c.res.ImageEndOffset>>r.im.geo.clusterBits)
	}
	if err := c.checkOverlaps(); err != nil {
		return err
	}
	r.flags = r.all || r.left() == 0
	if err := r.plan(); err != nil {
		return err
	}
	if c.res.Corruptions == r.res.CorruptionsFixed && c.res.CheckErrors == p.unreadable && p.stuck == 0 {
		p.ClearDirty = r.im.header.IncompatibleFeatures&IncompatDirty != 0
		p.ClearCorrupt = r.im.header.IncompatibleFeatures&IncompatCorrupt != 0
	}
	if r.opts.DryRun || p.Empty() {
		return nil
	}
	return r.apply()
}

// left returns how much is wrong and not repaired so far.
func (r *repairer) left() int64 {
	c := &r.c.res
	return c.Corruptions + c.Leaks + c.CheckErrors - r.res.CorruptionsFixed - r.res.LeaksFixed - r.res.Plan.unreadable
}

// decide tells whether a finding is repaired and notes what follows from it.
func (r *repairer) decide(f *Finding) {
	p := &r.res.Plan
	switch f.Kind {
	case RefcountTableReserved, RefcountBlockUnaligned, RefcountBlockShared:
		p.Rebuilt = true
	case RefcountBlockBeyondEnd:
		r.changed = r.all
	case RefcountTooLow, RefcountTooHigh:
		r.decideRefcount(f)
		return
	case L1Copied, L2Copied:
		f.Repaired = r.flags
	case L2TableUnaligned, SnapshotL1Unaligned, SnapshotL1TooLarge, SnapshotL1Overlap, BitmapDirectoryBad, BitmapTableOverlap,
		BitmapTableEntryBad, CompressedDataFile, CompressedSubclusters:
		r.unsure = true
	}
	f.Repaired = f.Repaired || r.all && f.Repairable && f.Kind != L1Copied && f.Kind != L2Copied
	if !f.Repaired {
		if f.Kind == Overlap && f.Severity == Note {
			p.stuck++
		}
		return
	}
	switch f.Severity {
	case Corruption:
		r.res.CorruptionsFixed += f.Count
	case Internal:
		p.unreadable += f.Count
	}
}

// decideRefcount is decide for a wrong refcount. It is repaired after all are
// known, and told again then.
func (r *repairer) decideRefcount(f *Finding) {
	p := &r.res.Plan
	f.Repaired = r.again && (r.all || f.Kind == RefcountTooHigh)
	switch {
	case r.again:
	case f.Kind == RefcountTooLow:
		p.Rebuilt = p.Rebuilt || f.Refcount == 0
		if r.all {
			p.Raised++
			r.res.CorruptionsFixed++
		}
	case r.unsure:
		f.Repairable = false
		r.c.refs.put(f.Index, f.Refcount)
	default:
		p.Freed++
		r.res.LeaksFixed++
	}
}

// beyond counts references to a structure that ends beyond the end of the file:
// the part of it that is in the file stays, and nothing new is put upon the
// rest.
func (r *repairer) beyond(off, n, k int64) {
	g := &r.im.geo
	if n > math.MaxInt64-off {
		n = math.MaxInt64 - off
	}
	first, end := off>>g.clusterBits, (off+n-1)>>g.clusterBits+1
	known := r.end + maxAhead
	r.far = r.far || end > known
	never := func(int64, uint64) {} // the counts are not those of a file
	if in := min(end, r.end); first < in {
		r.c.refs.addRun(first, in-first, uint64(k), 0, never)
	}
	if at, last := max(first, r.end), min(end, known); at < last {
		r.ahead.addRun(at-r.end, last-at, uint64(k), 0, never)
	}
}

// alloc hands out n clusters in a row behind all that is in use, with k
// references each.
func (r *repairer) alloc(n, k int64) (off int64, err error) {
	refs := r.c.refs
	first := r.next
	for i := first; i < first+n; i++ {
		at := i - r.end // of ahead
		if at >= maxAhead && r.far || i >= maxCheckClusters {
			return 0, fmt.Errorf("qcow2: repair: no room behind the end of the file at %#x: %w", r.end<<r.im.geo.clusterBits, ErrLimit)
		}
		refs.grow(i + 1)
		count := refs.raw(i)
		if at >= 0 && at < maxAhead {
			count += r.ahead.raw(at)
		}
		if count > 0 {
			refs.put(i, count) // the file reaches it now
			first = i + 1
		}
	}
	r.next = first + n
	refs.addRun(first, n, uint64(k), 0, func(int64, uint64) {})
	return first << r.im.geo.clusterBits, nil
}

// free takes k references from each cluster of n bytes at off.
func (r *repairer) free(off, n, k int64) {
	g := &r.im.geo
	take := func(refs *refcounts, i int64) {
		if count := refs.raw(i); count > 0 {
			refs.put(i, count-min(count, uint64(k)))
		}
	}
	for i := off >> g.clusterBits; i < min(r.end+maxAhead, (off+n+g.clusterSize-1)>>g.clusterBits); i++ {
		if i < r.next {
			take(r.c.refs, i)
		}
		if i >= r.end {
			take(r.ahead, i-r.end)
		}
	}
}

// freeTable is free for a table that has moved, unless something that cannot be
// read may refer to it.
func (r *repairer) freeTable(off, n, k int64) {
	if !r.unsure {
		r.free(off, n, k)
	}
}

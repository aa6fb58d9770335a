package ext4img

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

// growTarget is the number of blocks that a file system grows to on a device
// of so many.
func (s *Superblock) growTarget(blocks int64) (int64, error) {
	p := place{"superblock", 0, -1}
	if s.Incompat&Incompat64bit == 0 && blocks > math.MaxUint32 {
		return 0, p.unsupported("s_blocks_count", "%d blocks need the 64bit feature; without it there are at most %d (%d bytes)",
			blocks, int64(math.MaxUint32), int64(math.MaxUint32)*int64(s.BlockSize))
	}
	if n := max(s.roundBlocks(blocks), s.BlocksCount); n > s.BlocksCount {
		blocks = n
	} else {
		return s.BlocksCount, nil
	}
	if groups := ceilDiv(blocks-s.FirstDataBlock, s.BlocksPerGroup); groups*int64(s.InodesPerGroup) > math.MaxUint32 {
		most := s.FirstDataBlock + math.MaxUint32/int64(s.InodesPerGroup)*s.BlocksPerGroup
		return 0, p.unsupported("s_inodes_count", "%d: with %d inodes in each group there are at most %d blocks (%d bytes)",
			groups*int64(s.InodesPerGroup), s.InodesPerGroup, most, most*int64(s.BlockSize))
	}
	return blocks, nil
}

// grow makes the file system one of so many blocks, in as many transactions as
// it takes.
func (e *Editor) grow(ctx context.Context, blocks int64) error {
	for step := blocks; e.fs.sb.BlocksCount < blocks; step = blocks {
		s := e.fs.sb
		// The table of descriptors grows as far as there are blocks for it.
		// Only then, and if there are more groups to come, meta_bg begins.
		perBlock := int64(s.BlockSize / s.DescSize)
		if room := s.descBlocks() + s.ReservedGDT; s.Incompat&IncompatMetaBG == 0 && s.ReservedGDT > 0 {
			step = min(step, s.FirstDataBlock+room*perBlock*s.BlocksPerGroup)
		}
		for {
			err := e.growStep(ctx, step)
			if err == nil {
				break
			}
			// Half as many groups have half as many descriptors.
			more := ceilDiv(step-s.BlocksCount, s.BlocksPerGroup) / 2
			if !errors.Is(err, ErrTooLarge) || more == 0 {
				return err
			}
			step = s.FirstDataBlock + (s.groups+more)*s.BlocksPerGroup
		}
	}
	return nil
}

// growStep grows the file system in one transaction. Order: all that lies behind
// the old end; the transaction, which makes it part of the file system (Tx);
// copies of the superblock and of descriptors.
func (e *Editor) growStep(ctx context.Context, blocks int64) (err error) {
	old := *e.fs.sb
	next := old.withBlocks(blocks)
	next.layDescriptors(&old)
	t, err := e.Begin()
	if err != nil {
		return err
	}
	defer t.Discard()
	if old.Compat&CompatResizeInode != 0 && next.Compat&CompatResizeInode == 0 {
		if err := t.dropResizeInode(); err != nil {
			return err
		}
	}
	if err := t.extendLastGroup(&next); err != nil {
		return err
	}
	if next.Compat&CompatResizeInode != 0 {
		if err := t.putResizeInode(&next); err != nil {
			return err
		}
	}
	// The blocks of descriptors that are new: of those that are kept for them, or
	// behind the old end.
	perBlock := int64(next.BlockSize / next.DescSize)
	for n := old.descBlocks(); n < next.descBlocks(); n++ {
		block, _ := next.groupDescPlace(n * perBlock)
		if block >= old.BlocksCount {
			t.fresh(block)
			continue
		}
		b, err := t.edit(block)
		if err != nil {
			return err
		}
		clear(b)
	}
	used, err := t.addGroups(ctx, &old, &next)
	if err != nil {
		return err
	}
	s := t.sb()
	next.FreeBlocksCount += s.FreeBlocksCount - old.FreeBlocksCount
	next.FreeInodesCount += s.FreeInodesCount - old.FreeInodesCount
	*s = next
	if err := t.Commit(ctx); err != nil {
		return err
	}
	if err := e.reopen(); err != nil {
		return err
	}
	if err := e.writeBackups(ctx); err != nil {
		return err
	}
	if old.OverheadClusters == 0 {
		return nil
	}
	// For statfs; without it the kernel counts.
	return e.setOverhead(int64(old.OverheadClusters) + used)
}

// setOverhead writes s_overhead_clusters.
func (e *Editor) setOverhead(n int64) error {
	if n < 0 || n > math.MaxUint32 {
		n = 0 // not known
	}
	e.fs.sb.OverheadClusters = uint32(n)
	return e.writeSuperHalf(func(b []byte) { binary.LittleEndian.PutUint32(b[0x248:], uint32(n)) })
}

// extendLastGroup makes the blocks that the last group gets free ones.
func (t *Tx) extendLastGroup(next *Superblock) error {
	s := t.sb()
	g := s.groups - 1
	ratio := s.clusterRatio()
	from := ceilDiv(s.groupEnd(g)-s.groupStart(g), ratio)
	to := ceilDiv(next.groupEnd(g)-next.groupStart(g), ratio)
	if to <= from {
		return nil
	}
	b, err := t.editBlockBitmap(g)
	if err != nil {
		return err
	}
	setBits(b, from, 8*int64(len(b)))
	for i := from; i < to; i++ {
		clearBit(b, i)
	}
	return t.countClusters(g, b, to-from)
}

// addGroups makes the groups from old.groups on: writes what they are made of,
// and stages their descriptors. It returns how many clusters that takes. The
// counts of next grow by what is free.
func (t *Tx) addGroups(ctx context.Context, old, next *Superblock) (used int64, err error) {
	descs := next.layGroups(old.groups)
	owned := next.ownedRuns(old.groups, descs)
	csum := next.ROCompat&(ROCompatGDTCsum|ROCompatMetadataCsum) != 0
	ratio := next.clusterRatio()
	for i := range descs {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		g, d := old.groups+int64(i), &descs[i]
		start, end := next.groupStart(g), next.groupEnd(g)
		clusters := ceilDiv(end-start, ratio)
		b := make([]byte, next.BlockSize)
		setBits(b, 0, ceilDiv(next.baseBlocks(g), ratio))
		for len(owned) > 0 && owned[0].end <= start {
			owned = owned[1:]
		}
		for _, r := range owned {
			if r.start >= end {
				break
			}
			setBits(b, (max(r.start, start)-start)/ratio, ceilDiv(min(r.end, end)-start, ratio))
		}
		n := countBits(b)
		used += n
		d.freeBlocks = uint32(clusters - n)
		d.freeInodes = next.InodesPerGroup
		setBits(b, clusters, 8*int64(len(b)))
		// The last group always has a bitmap, and so does one that others have
		// structures in (kernel: fs/ext4/balloc.c, ext4_init_block_bitmap).
		if csum && ratio == 1 && g < next.groups-1 && string(b) == string(next.initialBlockBitmap(g, *d)) {
			d.flags |= bgBlockUninit
		} else {
			if next.hasCsum() {
				d.blockCsum = bitmapChecksum(next, b, next.ClustersPerGroup)
			}
			if err := t.writeData(b, d.blockBitmap); err != nil {
				return 0, err
			}
		}
		if err := t.initInodes(next, d, csum); err != nil {
			return 0, err
		}
		next.FreeBlocksCount += int64(d.freeBlocks) * ratio
		next.FreeInodesCount += d.freeInodes
		t.descs[g] = d
	}
	return used, nil
}

// initInodes writes the inode bitmap and the inode table of a new group, or
// says in its descriptor that they were not.
func (t *Tx) initInodes(s *Superblock, d *groupDesc, csum bool) error {
	bs := int64(s.BlockSize)
	off, n := d.inodeTable*bs, s.inodeTableBlocks()*bs
	if csum {
		d.flags |= bgInodeUninit
		d.itableUnused = s.InodesPerGroup
		if readsZero(t.e.dev, off, n) {
			d.flags |= bgInodeZeroed
		}
		return nil
	}
	if !readsZero(t.e.dev, off, n) {
		if err := blockdev.WriteZeroes(t.e.dev, off, n); err != nil {
			t.err = fmt.Errorf("ext4: write of zeroes from block %d on: %w", d.inodeTable, err)
			return t.err
		}
	}
	b := make([]byte, bs)
	setBits(b, int64(s.InodesPerGroup), 8*bs)
	return t.writeData(b, d.inodeBitmap)
}

// readsZero reports whether the device knows that a range reads as zeroes.
func readsZero(dev blockdev.Reader, off, n int64) bool {
	for n > 0 {
		x, err := blockdev.NextExtent(dev, off)
		if err != nil || !x.Kind.ReadsZero() {
			return false
		}
		off, n = off+x.Len, n-x.Len
	}
	return true
}

// layGroups decides where the bitmaps and inode tables of the groups from from
// on lie: in their group, or with flex_bg behind each other in the first of
// those that are new in their flex group (kernel: fs/ext4/resize.c,
// ext4_alloc_group_tables).
func (s *Superblock) layGroups(from int64) []groupDesc {
	descs := make([]groupDesc, s.groups-from)
	for first := from; first < s.groups; {
		end := min((first/s.GroupsPerFlex+1)*s.GroupsPerFlex, s.groups)
		if !s.layFlex(first, end, descs[first-from:end-from]) {
			for g := first; g < end; g++ { // each has room for its own
				s.layFlex(g, g+1, descs[g-from:g-from+1])
			}
		}
		first = end
	}
	return descs
}

// layFlex decides where the structures of groups up to end lie: behind each
// other from the beginning of the first on. It reports whether they fit.
func (s *Superblock) layFlex(first, end int64, descs []groupDesc) bool {
	at := s.groupStart(first)
	// take returns n blocks, all in one place, behind those taken before.
	take := func(n int64) int64 {
		for {
			g := (at - s.FirstDataBlock) / s.BlocksPerGroup
			if g >= end {
				return at
			}
			at = max(at, s.groupStart(g)+s.baseBlocks(g))
			// The next group that begins with something of its own.
			stop := g + 1
			for stop < end && s.baseBlocks(stop) == 0 {
				stop++
			}
			if at+n <= s.groupEnd(stop-1) {
				at += n
				return at - n
			}
			at = s.groupStart(stop)
		}
	}
	for i := range descs {
		descs[i].blockBitmap = take(1)
	}
	for i := range descs {
		descs[i].inodeBitmap = take(1)
	}
	for i := range descs {
		descs[i].inodeTable = take(s.inodeTableBlocks())
	}
	return at < s.groupStart(end)
}

// ownedRuns returns where the structures of groups lie, ascending.
func (s *Superblock) ownedRuns(from int64, descs []groupDesc) []run {
	list := make([]run, 0, 3*len(descs))
	for _, d := range descs {
		list = append(list, run{d.blockBitmap, d.blockBitmap + 1}, run{d.inodeBitmap, d.inodeBitmap + 1},
			run{d.inodeTable, d.inodeTable + s.inodeTableBlocks()})
	}
	slices.SortFunc(list, func(a, b run) int { return cmp.Compare(a.start, b.start) })
	return list
}

// countBits counts the bits that are set.
func countBits(b []byte) int64 {
	var n int64
	for i := 0; i+8 <= len(b); i += 8 {
		n += int64(onesCount(b[i:]))
	}
	return n
}

func onesCount(b []byte) int { return bits.OnesCount64(binary.LittleEndian.Uint64(b)) }

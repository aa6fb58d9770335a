package ext4img

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"
	"sort"
)

// So many groups keep their bitmaps and inode tables together (mke2fs's
// default).
const (
	logGroupsPerFlex = 4
	groupsPerFlex    = 1 << logGroupsPerFlex
)

// run is a run of blocks.
type run struct{ start, end int64 }

func (r run) len() int64 { return r.end - r.start }

// geometry is where everything lies that does not depend on the tree: groups,
// descriptors, bitmaps and inode tables. The rest of the blocks is free space,
// which the tree's blocks take from its beginning: a place in it is called a
// position, and counts free blocks.
type geometry struct {
	blockSize      int64
	blocks         int64 // s_blocks_count
	firstDataBlock int64
	blocksPerGroup int64
	groups         int64
	inodesPerGroup int64
	descBlocks     int64 // blocks of the descriptor table
	reservedGDT    int64 // s_reserved_gdt_blocks
	resizeInode    bool

	blockBitmap []int64 // of each flex group: those of its groups one behind another
	inodeBitmap []int64 // likewise
	inodeTable  []int64 // of each group

	meta []run     // all of the above, ascending, merged
	free []freeRun // the rest
}

type freeRun struct {
	run
	pos int64 // position of its first block
}

var errTooFewBlocks = errors.New("too few blocks for the file system's own structures")

// newGeometry lays out a file system of at most that many blocks. It has at
// least need inodes, and about wish of them as far as the format allows.
func newGeometry(blockSize, blocks, need, wish int64) (*geometry, error) {
	g := &geometry{
		blockSize:      blockSize,
		blocks:         blocks,
		blocksPerGroup: 8 * blockSize,
	}
	if blockSize == minBlockSize {
		g.firstDataBlock = 1 // block 0 holds the boot sectors alone
	}
	for {
		if err := g.divide(need, wish); err != nil {
			return nil, err
		}
		// A last group that could hold little more than its own structures is
		// left out, as by mke2fs (lib/ext2fs/initialize.c).
		last := g.groups - 1
		n := g.groupEnd(last) - g.groupStart(last)
		least := g.baseLen(last) + 2 + g.inodeTableBlocks() + 50
		if n >= least || g.groups == 1 {
			if n < least {
				return nil, errTooFewBlocks
			}
			break
		}
		g.blocks -= n
	}
	if err := g.place(); err != nil {
		return nil, err
	}
	return g, nil
}

// divide fixes the groups and the sizes of their structures.
func (g *geometry) divide(need, wish int64) error {
	g.groups = ceilDiv(g.blocks-g.firstDataBlock, g.blocksPerGroup)
	if g.groups < 1 {
		return errTooFewBlocks
	}
	g.descBlocks = ceilDiv(g.groups*descSize, g.blockSize)
	if g.descBlocks > g.blocksPerGroup*3/4 {
		return fmt.Errorf("a file system with %d-byte blocks can have %d GiB at most (with 4096-byte blocks 196608)",
			g.blockSize, g.blocksPerGroup*3/4*g.blockSize/descSize*g.blocksPerGroup*g.blockSize>>30)
	}
	// Inode tables fill whole blocks, inode bitmaps whole bytes and at most a
	// block; inode numbers have 32 bits.
	unit := max(8, g.blockSize/inodeSize)
	limit := min(8*g.blockSize, math.MaxUint32/g.groups/unit*unit)
	g.inodesPerGroup = min(max(ceilDiv(ceilDiv(wish, g.groups), unit), 2)*unit, limit)
	if g.inodesPerGroup*g.groups < need {
		return errTooFewBlocks
	}
	// Descriptors of a file system 1024 times as large, as far as one block
	// of pointers reaches (mke2fs: lib/ext2fs/initialize.c,
	// calc_reserved_gdt_blocks). Pointers have 32 bits: larger file systems
	// have no resize inode, and grow by meta_bg.
	g.resizeInode = g.blocks <= math.MaxUint32
	g.reservedGDT = 0
	if g.resizeInode {
		target := ceilDiv(min(g.blocks*1024, math.MaxUint32)-g.firstDataBlock, g.blocksPerGroup)
		g.reservedGDT = min(ceilDiv(target*descSize, g.blockSize)-g.descBlocks, g.blockSize/4, g.blocksPerGroup*3/4-g.descBlocks)
	}
	return nil
}

// place finds room for bitmaps and inode tables, flex group by flex group.
func (g *geometry) place() error {
	for i := range g.groups {
		if g.hasSuper(i) {
			g.meta = append(g.meta, run{g.groupStart(i), g.groupStart(i) + g.baseLen(i)})
		}
	}
	if g.firstDataBlock > 0 {
		g.meta = append(g.meta, run{0, g.firstDataBlock})
	}
	slices.SortFunc(g.meta, byStart)
	base := slices.Clone(g.meta)

	g.inodeTable = make([]int64, g.groups)
	for first := int64(0); first < g.groups; first += groupsPerFlex {
		at := g.groupStart(first)
		n := min(groupsPerFlex, g.groups-first)
		take := func(blocks int64) (int64, error) {
			// Skip what lies in the way; base is ascending.
			for i := sort.Search(len(base), func(i int) bool { return base[i].end > at }); i < len(base) && base[i].start < at+blocks; i++ {
				at = base[i].end
			}
			if at+blocks > g.blocks {
				return 0, errTooFewBlocks
			}
			start := at
			at += blocks
			g.meta = append(g.meta, run{start, at})
			return start, nil
		}
		bb, err := take(n)
		if err != nil {
			return err
		}
		ib, err := take(n)
		if err != nil {
			return err
		}
		g.blockBitmap = append(g.blockBitmap, bb)
		g.inodeBitmap = append(g.inodeBitmap, ib)
		for i := range n {
			if g.inodeTable[first+i], err = take(g.inodeTableBlocks()); err != nil {
				return err
			}
		}
	}

	slices.SortFunc(g.meta, byStart)
	g.meta = mergeRuns(g.meta)
	var at, pos int64
	for _, m := range append(g.meta, run{g.blocks, g.blocks}) {
		if m.start > at {
			g.free = append(g.free, freeRun{run{at, m.start}, pos})
			pos += m.start - at
		}
		at = m.end
	}
	return nil
}

func byStart(a, b run) int { return cmp.Compare(a.start, b.start) }

// mergeRuns joins runs that touch or overlap; they are ascending.
func mergeRuns(runs []run) []run {
	out := runs[:0]
	for _, r := range runs {
		if n := len(out); n > 0 && r.start <= out[n-1].end {
			out[n-1].end = max(out[n-1].end, r.end)
			continue
		}
		out = append(out, r)
	}
	return out
}

func (g *geometry) groupStart(i int64) int64 { return g.firstDataBlock + i*g.blocksPerGroup }

func (g *geometry) groupEnd(i int64) int64 { return min(g.groupStart(i+1), g.blocks) }

func (g *geometry) inodeTableBlocks() int64 { return g.inodesPerGroup * inodeSize / g.blockSize }

// hasSuper reports whether a group has a copy of superblock and descriptors:
// groups 0 and 1 and the powers of 3, 5 and 7 (sparse_super).
func (g *geometry) hasSuper(i int64) bool { return isSparseGroup(i) }

// isSparseGroup reports whether a group is 0, 1 or a power of 3, 5 or 7.
func isSparseGroup(i int64) bool {
	if i <= 1 {
		return true
	}
	for _, p := range [...]int64{3, 5, 7} {
		n := p
		for n < i {
			n *= p
		}
		if n == i {
			return true
		}
	}
	return false
}

// baseLen is the length of superblock, descriptors and reserved descriptors at
// the beginning of a group.
func (g *geometry) baseLen(i int64) int64 {
	if !g.hasSuper(i) {
		return 0
	}
	return 1 + g.descBlocks + g.reservedGDT
}

func (g *geometry) blockBitmapOf(group int64) int64 {
	return g.blockBitmap[group/groupsPerFlex] + group%groupsPerFlex
}

func (g *geometry) inodeBitmapOf(group int64) int64 {
	return g.inodeBitmap[group/groupsPerFlex] + group%groupsPerFlex
}

// freeBlocks is the number of positions.
func (g *geometry) freeBlocks() int64 {
	if len(g.free) == 0 {
		return 0
	}
	last := g.free[len(g.free)-1]
	return last.pos + last.len()
}

// physical calls yield with the runs of blocks that n positions from pos on
// are. The positions exist.
func (g *geometry) physical(pos, n int64, yield func(run) bool) {
	i := sort.Search(len(g.free), func(i int) bool { return g.free[i].pos > pos }) - 1
	for ; n > 0; i++ {
		f := &g.free[i]
		start := f.start + (pos - f.pos)
		end := min(f.end, start+n)
		if !yield(run{start, end}) {
			return
		}
		pos += end - start
		n -= end - start
	}
}

// block returns the block at a position.
func (g *geometry) block(pos int64) int64 {
	var b int64
	g.physical(pos, 1, func(r run) bool { b = r.start; return false })
	return b
}

// eachMeta calls fn with the parts of g.meta between two blocks.
func (g *geometry) eachMeta(start, end int64, fn func(run)) {
	i := sort.Search(len(g.meta), func(i int) bool { return g.meta[i].end > start })
	for ; i < len(g.meta) && g.meta[i].start < end; i++ {
		fn(run{max(g.meta[i].start, start), min(g.meta[i].end, end)})
	}
}

// metaBetween returns the number of blocks of g.meta between two blocks.
func (g *geometry) metaBetween(start, end int64) int64 {
	var n int64
	g.eachMeta(start, end, func(r run) { n += r.len() })
	return n
}

func ceilDiv(a, b int64) int64 { return (a + b - 1) / b }

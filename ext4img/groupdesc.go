package ext4img

import "encoding/binary"

const descSize = 64 // s_desc_size, with the 64bit feature

// bg_flags.
const (
	bgInodeUninit = 0x1 // the inode bitmap is not written: all free
	bgBlockUninit = 0x2 // the block bitmap is not written: only the group's own structures in use
	bgInodeZeroed = 0x4 // the inode table needs no zeroing
)

// groupState is what the tree's blocks and inodes make of a group.
type groupState struct {
	usedBlocks  int64
	usedInodes  int64
	blockUninit bool
}

func (l *Layout) groupState(group int64) groupState {
	g := l.geo
	start, end := g.groupStart(group), g.groupEnd(group)
	dense := min(max(l.denseEnd, start), end) // all blocks before are in use
	s := groupState{usedBlocks: dense - start + g.metaBetween(dense, end)}
	s.usedInodes = min(max(int64(l.lastIno())-group*g.inodesPerGroup, 0), g.inodesPerGroup)
	// The kernel takes the blocks of an uninitialised group to be free but for
	// the group's own superblock and descriptors (fs/ext4/balloc.c,
	// ext4_init_block_bitmap); the last group always has a bitmap.
	s.blockUninit = group > 0 && group < g.groups-1 && s.usedBlocks == g.baseLen(group)
	return s
}

// encodeGDT makes the table of group descriptors (kernel:
// Documentation/filesystems/ext4/group_descr.rst).
func (l *Layout) encodeGDT() []byte {
	g, le := l.geo, binary.LittleEndian
	table := make([]byte, g.descBlocks*g.blockSize)
	dirs := l.dirsPerGroup()
	bitmap := make([]byte, g.blockSize)
	for i := range g.groups {
		b := table[i*descSize : (i+1)*descSize]
		s := l.groupState(i)
		put := func(lo, hi int, v int64) {
			le.PutUint16(b[lo:], uint16(v))
			le.PutUint16(b[hi:], uint16(v>>16))
		}
		putBlock := func(lo, hi int, v int64) {
			le.PutUint32(b[lo:], uint32(v))
			le.PutUint32(b[hi:], uint32(v>>32))
		}
		flags := uint16(bgInodeZeroed)
		if s.blockUninit {
			flags |= bgBlockUninit
		} else {
			l.putBlockBitmap(bitmap, i)
			put(0x18, 0x38, int64(crc32c(l.csumSeed, bitmap[:g.blocksPerGroup/8])))
		}
		if s.usedInodes == 0 {
			flags |= bgInodeUninit
		} else {
			l.putInodeBitmap(bitmap, i)
			put(0x1a, 0x3a, int64(crc32c(l.csumSeed, bitmap[:g.inodesPerGroup/8])))
		}
		putBlock(0x0, 0x20, g.blockBitmapOf(i))
		putBlock(0x4, 0x24, g.inodeBitmapOf(i))
		putBlock(0x8, 0x28, g.inodeTable[i])
		put(0xc, 0x2c, g.groupEnd(i)-g.groupStart(i)-s.usedBlocks) // bg_free_blocks_count
		put(0xe, 0x2e, g.inodesPerGroup-s.usedInodes)              // bg_free_inodes_count
		if i < int64(len(dirs)) {
			put(0x10, 0x30, dirs[i]) // bg_used_dirs_count
		}
		le.PutUint16(b[0x12:], flags)
		put(0x1c, 0x32, g.inodesPerGroup-s.usedInodes) // bg_itable_unused
		var n [4]byte
		le.PutUint32(n[:], uint32(i))
		le.PutUint16(b[0x1e:], uint16(crc32c(crc32c(l.csumSeed, n[:]), b)))
	}
	return table
}

// dirsPerGroup counts the directories among the used inodes, group by group.
func (l *Layout) dirsPerGroup() []int64 {
	per := l.geo.inodesPerGroup
	n := make([]int64, (int64(l.lastIno())+per-1)/per)
	for d := range l.tree.dirs.len() {
		n[int64(l.ino(l.tree.dirs.at(uint32(d)).inode)-1)/per]++
	}
	if l.ownLostFound {
		n[(lostFoundIno-1)/per]++
	}
	return n
}

// putBlockBitmap writes the block bitmap of a group over b.
func (l *Layout) putBlockBitmap(b []byte, group int64) {
	g := l.geo
	clear(b)
	start, end := g.groupStart(group), g.groupEnd(group)
	if dense := min(l.denseEnd, end); dense > start {
		setBits(b, 0, dense-start)
	}
	g.eachMeta(start, end, func(r run) { setBits(b, r.start-start, r.end-start) })
	setBits(b, end-start, 8*g.blockSize) // beyond the end: in use
}

// putInodeBitmap writes the inode bitmap of a group over b.
func (l *Layout) putInodeBitmap(b []byte, group int64) {
	clear(b)
	setBits(b, 0, l.groupState(group).usedInodes)
	setBits(b, l.geo.inodesPerGroup, 8*l.geo.blockSize) // beyond the end: in use
}

// setBits sets bits from to to-1.
func setBits(b []byte, from, to int64) {
	for ; from < to && from%8 != 0; from++ {
		b[from/8] |= 1 << (from % 8)
	}
	for ; from+8 <= to; from += 8 {
		b[from/8] = 0xff
	}
	for ; from < to; from++ {
		b[from/8] |= 1 << (from % 8)
	}
}

package ext4img

import (
	"encoding/binary"
)

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

// groupDesc is one entry of the table of group descriptors (kernel:
// Documentation/filesystems/ext4/group_descr.rst).
type groupDesc struct {
	blockBitmap  int64  // 0x0, 0x20: bg_block_bitmap
	inodeBitmap  int64  // 0x4, 0x24: bg_inode_bitmap
	inodeTable   int64  // 0x8, 0x28: bg_inode_table
	freeBlocks   uint32 // 0xc, 0x2c: bg_free_blocks_count; clusters
	freeInodes   uint32 // 0xe, 0x2e: bg_free_inodes_count
	usedDirs     uint32 // 0x10, 0x30: bg_used_dirs_count
	flags        uint16 // 0x12: bg_flags; 0 without checksums
	blockCsum    uint32 // 0x18, 0x38: bg_block_bitmap_csum
	inodeCsum    uint32 // 0x1a, 0x3a: bg_inode_bitmap_csum
	itableUnused uint32 // 0x1c, 0x32: bg_itable_unused; 0 without checksums
}

// parseGroupDesc reads a descriptor of s.DescSize bytes.
func parseGroupDesc(s *Superblock, b []byte) groupDesc {
	le := binary.LittleEndian
	wide := len(b) >= descSize
	block := func(lo, hi int) int64 {
		n := int64(le.Uint32(b[lo:]))
		if wide {
			n |= int64(le.Uint32(b[hi:])) << 32
		}
		return n
	}
	count := func(lo, hi int) uint32 {
		n := uint32(le.Uint16(b[lo:]))
		if wide {
			n |= uint32(le.Uint16(b[hi:])) << 16
		}
		return n
	}
	d := groupDesc{
		blockBitmap: block(0x0, 0x20),
		inodeBitmap: block(0x4, 0x24),
		inodeTable:  block(0x8, 0x28),
		freeBlocks:  count(0xc, 0x2c),
		freeInodes:  count(0xe, 0x2e),
		usedDirs:    count(0x10, 0x30),
	}
	if s.ROCompat&(ROCompatGDTCsum|ROCompatMetadataCsum) != 0 {
		d.flags = le.Uint16(b[0x12:])
		d.blockCsum = count(0x18, 0x38)
		d.inodeCsum = count(0x1a, 0x3a)
		d.itableUnused = count(0x1c, 0x32)
	}
	return d
}

// put writes the descriptor of a group and its checksum over b, which has
// s.DescSize bytes and keeps those that are not known here.
func (d *groupDesc) put(s *Superblock, b []byte, group int64) {
	le := binary.LittleEndian
	wide := len(b) >= descSize
	block := func(lo, hi int, n int64) {
		le.PutUint32(b[lo:], uint32(n))
		if wide {
			le.PutUint32(b[hi:], uint32(n>>32))
		}
	}
	count := func(lo, hi int, n uint32) {
		le.PutUint16(b[lo:], uint16(n))
		if wide {
			le.PutUint16(b[hi:], uint16(n>>16))
		}
	}
	block(0x0, 0x20, d.blockBitmap)
	block(0x4, 0x24, d.inodeBitmap)
	block(0x8, 0x28, d.inodeTable)
	count(0xc, 0x2c, d.freeBlocks)
	count(0xe, 0x2e, d.freeInodes)
	count(0x10, 0x30, d.usedDirs)
	if s.ROCompat&(ROCompatGDTCsum|ROCompatMetadataCsum) != 0 {
		le.PutUint16(b[0x12:], d.flags)
		count(0x18, 0x38, d.blockCsum)
		count(0x1a, 0x3a, d.inodeCsum)
		count(0x1c, 0x32, d.itableUnused)
		le.PutUint16(b[0x1e:], groupDescChecksum(s, b, group))
	}
}

// groupDescChecksum is what bg_checksum has to be: the low half of a CRC-32C
// with metadata_csum, else a CRC-16 (kernel: fs/ext4/super.c,
// ext4_group_desc_csum).
func groupDescChecksum(s *Superblock, b []byte, group int64) uint16 {
	var n [4]byte
	binary.LittleEndian.PutUint32(n[:], uint32(group))
	if s.hasCsum() {
		crc := crc32c(crc32c(s.ChecksumSeed, n[:]), b[:0x1e])
		return uint16(crc32c(crc32c(crc, []byte{0, 0}), b[0x20:]))
	}
	crc := crc16(crc16(0xffff, s.UUID[:]), n[:])
	crc = crc16(crc, b[:0x1e])
	if s.Incompat&Incompat64bit != 0 && len(b) > 0x20 {
		crc = crc16(crc, b[0x20:])
	}
	return crc
}

// groupDescPlace is where the descriptor of a group lies: in one table behind
// the superblock or, with meta_bg, a block for each group of groups that it
// describes, inside of it.
func (s *Superblock) groupDescPlace(group int64) (block int64, off int) {
	perBlock := int64(s.BlockSize / s.DescSize)
	n := group / perBlock
	off = int(group%perBlock) * s.DescSize
	if s.Incompat&IncompatMetaBG == 0 || n < int64(s.FirstMetaBG) {
		// With blocks of 1 KiB the superblock lies in block 1, whatever
		// s_first_data_block says.
		return max(s.FirstDataBlock, int64(superblockOff/s.BlockSize)) + 1 + n, off
	}
	first := n * perBlock // the group that holds the block
	block = s.groupStart(first)
	if s.hasSuper(first) {
		block++
		if first == 0 && s.FirstDataBlock == 0 && s.BlockSize == minBlockSize {
			block++ // the superblock lies in block 1
		}
	}
	return block, off
}

// hasSuper reports whether a group has a copy of the superblock.
func (s *Superblock) hasSuper(group int64) bool {
	switch {
	case group == 0:
		return true
	case s.Compat&CompatSparseSuper2 != 0:
		return group == int64(s.BackupBgs[0]) || group == int64(s.BackupBgs[1])
	case s.ROCompat&ROCompatSparseSuper == 0:
		return true
	}
	return isSparseGroup(group)
}

// groupDesc reads the descriptor of a group. Its bitmaps and inode table lie
// inside the file system.
func (f *FS) groupDesc(group int64) (groupDesc, error) {
	if d := f.tx.stagedDesc(group); d != nil {
		return *d, nil
	}
	s := f.sb
	block, off := s.groupDescPlace(group)
	b, err := f.block(block)
	if err != nil {
		return groupDesc{}, err
	}
	b = b[off : off+s.DescSize]
	if s.ROCompat&(ROCompatGDTCsum|ROCompatMetadataCsum) != 0 && !f.ignoreChecksums {
		if found, want := binary.LittleEndian.Uint16(b[0x1e:]), groupDescChecksum(s, b, group); found != want {
			return groupDesc{}, descPlace(group, block).checksum(uint32(found), uint32(want))
		}
	}
	d := parseGroupDesc(s, b)
	for _, part := range [...]struct {
		field    string
		start, n int64
	}{
		{"bg_block_bitmap", d.blockBitmap, 1},
		{"bg_inode_bitmap", d.inodeBitmap, 1},
		{"bg_inode_table", d.inodeTable, s.inodeTableBlocks()},
	} {
		if part.start < s.FirstDataBlock || part.start == 0 || part.start > s.BlocksCount-part.n {
			return groupDesc{}, descPlace(group, block).corrupt(part.field, "%d, expected %d blocks inside of %d", part.start, part.n, s.BlocksCount)
		}
	}
	return d, nil
}

func descPlace(group, block int64) place {
	return place{"descriptor of group " + itoa(group), 0, block}
}

// inodeTableBlocks is the number of blocks of the inode table of a group.
func (s *Superblock) inodeTableBlocks() int64 {
	return ceilDiv(int64(s.InodesPerGroup)*int64(s.InodeSize), int64(s.BlockSize))
}

package ext4img

import (
	"encoding/binary"
	"math/bits"
)

// putSuperblock writes the superblock as the copy in that group has it
// (kernel: Documentation/filesystems/ext4/super.rst).
func (l *Layout) putSuperblock(b []byte, group int64) {
	g, le := l.geo, binary.LittleEndian
	put64 := func(lo, hi int, v int64) {
		le.PutUint32(b[lo:], uint32(v))
		le.PutUint32(b[hi:], uint32(v>>32))
	}
	le.PutUint32(b, uint32(g.groups*g.inodesPerGroup)) // s_inodes_count
	put64(0x4, 0x150, g.blocks)                        // s_blocks_count
	put64(0x8, 0x154, l.reservedBlocks)                // s_r_blocks_count
	put64(0xc, 0x158, l.freeBlocks())                  // s_free_blocks_count
	le.PutUint32(b[0x10:], uint32(l.FreeInodes()))     // s_free_inodes_count
	le.PutUint32(b[0x14:], uint32(g.firstDataBlock))   // s_first_data_block
	le.PutUint32(b[0x18:], logBlockSize(g.blockSize))  // s_log_block_size
	le.PutUint32(b[0x1c:], logBlockSize(g.blockSize))  // s_log_cluster_size
	le.PutUint32(b[0x20:], uint32(g.blocksPerGroup))   // s_blocks_per_group
	le.PutUint32(b[0x24:], uint32(g.blocksPerGroup))   // s_clusters_per_group
	le.PutUint32(b[0x28:], uint32(g.inodesPerGroup))   // s_inodes_per_group
	le.PutUint32(b[0x30:], uint32(l.time))             // s_wtime
	le.PutUint16(b[0x36:], 0xffff)                     // s_max_mnt_count: never
	le.PutUint16(b[0x38:], 0xef53)                     // s_magic
	le.PutUint16(b[0x3a:], 1)                          // s_state: clean
	le.PutUint16(b[0x3c:], 1)                          // s_errors: continue
	le.PutUint32(b[0x40:], uint32(l.time))             // s_lastcheck
	le.PutUint32(b[0x4c:], 1)                          // s_rev_level: dynamic
	le.PutUint32(b[0x54:], firstIno)                   // s_first_ino
	le.PutUint16(b[0x58:], inodeSize)                  // s_inode_size
	le.PutUint16(b[0x5a:], uint16(group))              // s_block_group_nr
	compat, incompat, roCompat := l.features()
	le.PutUint32(b[0x5c:], compat)                // s_feature_compat
	le.PutUint32(b[0x60:], incompat)              // s_feature_incompat
	le.PutUint32(b[0x64:], roCompat)              // s_feature_ro_compat
	copy(b[0x68:0x78], l.uuid[:])                 // s_uuid
	copy(b[0x78:0x88], l.label)                   // s_volume_name
	le.PutUint16(b[0xce:], uint16(g.reservedGDT)) // s_reserved_gdt_blocks
	for i, w := range l.hashSeed {
		le.PutUint32(b[0xec+4*i:], w) // s_hash_seed
	}
	b[0xfc] = hashVersionHalfMD4                 // s_def_hash_version
	le.PutUint16(b[0xfe:], descSize)             // s_desc_size
	le.PutUint32(b[0x100:], defaultMountOptions) // s_default_mount_opts
	le.PutUint32(b[0x108:], uint32(l.time))      // s_mkfs_time
	if l.journalBlocks > 0 {
		le.PutUint32(b[0xe0:], journalIno) // s_journal_inum
		b[0xfd] = 1                        // s_jnl_backup_type: inode
		n := l.journalDiskInode()          // s_jnl_blocks: i_block, size
		copy(b[0x10c:], n.block[:])
		le.PutUint32(b[0x10c+60:], uint32(n.size>>32))
		le.PutUint32(b[0x10c+64:], uint32(n.size))
	}
	le.PutUint16(b[0x15c:], extraIsize)                               // s_min_extra_isize
	le.PutUint16(b[0x15e:], extraIsize)                               // s_want_extra_isize
	le.PutUint32(b[0x160:], signedHash)                               // s_flags
	b[0x174] = logGroupsPerFlex                                       // s_log_groups_per_flex
	b[0x175] = 1                                                      // s_checksum_type: crc32c
	le.PutUint32(b[0x3fc:], crc32c(^uint32(0), b[:superblockSize-4])) // s_checksum
}

const (
	superblockSize      = 1024
	superblockOff       = 1024 // place of the primary superblock on the disk
	minBlockSize        = 1024
	defaultMountOptions = 0x4 | 0x8 // user_xattr, acl: mke2fs's default
	signedHash          = 1         // EXT2_FLAGS_SIGNED_HASH
)

// features returns the feature words of the superblock: mke2fs's defaults for
// ext4, and what the tree needs besides.
func (l *Layout) features() (compat, incompat, roCompat uint32) {
	compat = compatExtAttr | compatDirIndex
	if l.journalBlocks > 0 {
		compat |= compatHasJournal
	}
	if l.geo.resizeInode {
		compat |= compatResizeInode
	}
	incompat = incompatFiletype | incompatExtents | incompat64bit | incompatFlexBg
	if len(l.eaValues) > 0 {
		incompat |= incompatEAInode
	}
	if l.largeDir {
		incompat |= incompatLargedir
	}
	roCompat = roCompatSparseSuper | roCompatLargeFile | roCompatHugeFile | roCompatDirNlink | roCompatExtraIsize | roCompatMetadataCsum
	return compat, incompat, roCompat
}

// logBlockSize is s_log_block_size: 0 for 1 KiB.
func logBlockSize(size int64) uint32 {
	return uint32(bits.TrailingZeros64(uint64(size / minBlockSize)))
}

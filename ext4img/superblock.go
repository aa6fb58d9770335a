package ext4img

import (
	"encoding/binary"
	"math/bits"
	"strings"
	"time"
)

// State is s_state.
type State uint16

// Bits of State.
const (
	StateClean    State = 0x1 // unmounted in order
	StateErrors   State = 0x2 // the kernel found something wrong
	StateOrphans  State = 0x4 // orphans are being recovered
	StateFCReplay State = 0x20
)

// Superblock is what the primary superblock says (kernel:
// Documentation/filesystems/ext4/super.rst).
type Superblock struct {
	InodesCount      uint32    // 0x0: s_inodes_count
	BlocksCount      int64     // 0x4, 0x150: s_blocks_count
	RBlocksCount     int64     // 0x8, 0x154: s_r_blocks_count: for the superuser alone
	FreeBlocksCount  int64     // 0xc, 0x158: s_free_blocks_count: those of whole clusters with bigalloc
	FreeInodesCount  uint32    // 0x10: s_free_inodes_count
	FirstDataBlock   int64     // 0x14: s_first_data_block
	BlockSize        int       // 0x18: 1024 << s_log_block_size
	ClusterSize      int       // 0x1c: 1024 << s_log_cluster_size; BlockSize without bigalloc
	BlocksPerGroup   int64     // 0x20: s_blocks_per_group
	ClustersPerGroup int64     // 0x24: s_clusters_per_group; BlocksPerGroup without bigalloc
	InodesPerGroup   uint32    // 0x28: s_inodes_per_group
	Mtime            time.Time // 0x2c, 0x275: s_mtime: last mounted
	Wtime            time.Time // 0x30, 0x274: s_wtime: last written
	State            State     // 0x3a: s_state
	Lastcheck        time.Time // 0x40, 0x277: s_lastcheck
	CreatorOS        uint32    // 0x48: s_creator_os; 0 is Linux
	RevLevel         uint32    // 0x4c: s_rev_level
	FirstIno         Ino       // 0x54: s_first_ino
	InodeSize        int       // 0x58: s_inode_size
	Compat           Compat    // 0x5c: s_feature_compat
	Incompat         Incompat  // 0x60: s_feature_incompat
	ROCompat         ROCompat  // 0x64: s_feature_ro_compat
	UUID             UUID      // 0x68: s_uuid
	Label            string    // 0x78: s_volume_name
	LastMounted      string    // 0x88: s_last_mounted
	ReservedGDT      int64     // 0xce: s_reserved_gdt_blocks
	JournalUUID      UUID      // 0xd0: s_journal_uuid: of a journal outside
	JournalInum      Ino       // 0xe0: s_journal_inum
	JournalDev       uint32    // 0xe4: s_journal_dev
	LastOrphan       Ino       // 0xe8: s_last_orphan
	HashSeed         [4]uint32 // 0xec: s_hash_seed
	DefHashVersion   uint8     // 0xfc: s_def_hash_version
	DescSize         int       // 0xfe: s_desc_size; 32 without 64bit
	FirstMetaBG      uint32    // 0x104: s_first_meta_bg
	MkfsTime         time.Time // 0x108, 0x276: s_mkfs_time
	MinExtraIsize    uint16    // 0x15c: s_min_extra_isize
	WantExtraIsize   uint16    // 0x15e: s_want_extra_isize
	Flags            uint32    // 0x160: s_flags
	MMPBlock         int64     // 0x168: s_mmp_block
	GroupsPerFlex    int64     // 0x174: 1 << s_log_groups_per_flex; 1 without flex_bg
	ErrorCount       uint32    // 0x194: s_error_count
	UsrQuotaInum     Ino       // 0x240: s_usr_quota_inum
	GrpQuotaInum     Ino       // 0x244: s_grp_quota_inum
	OverheadClusters uint32    // 0x248: s_overhead_clusters
	BackupBgs        [2]uint32 // 0x24c: s_backup_bgs
	LpfIno           Ino       // 0x268: s_lpf_ino
	PrjQuotaInum     Ino       // 0x26c: s_prj_quota_inum
	ChecksumSeed     uint32    // 0x270: s_checksum_seed, or what takes its place
	Encoding         uint16    // 0x27c: s_encoding
	EncodingFlags    uint16    // 0x27e: s_encoding_flags
	OrphanFileInum   Ino       // 0x280: s_orphan_file_inum

	groups int64
}

// parseSuperblock reads a superblock of a device of that size. What it returns
// is safe to compute with: sizes are powers of two in range, nothing is 0 that
// is divided by, and all groups lie on the device.
func parseSuperblock(b []byte, size int64, ignoreChecksum bool) (*Superblock, error) {
	le := binary.LittleEndian
	p := place{name: "superblock", block: -1}
	if m := le.Uint16(b[0x38:]); m != superMagic {
		return nil, &FormatError{p.name, 0, -1, "s_magic", hexNot(uint32(m), superMagic), ErrFormat}
	}
	s := &Superblock{
		Compat:   Compat(le.Uint32(b[0x5c:])),
		Incompat: Incompat(le.Uint32(b[0x60:])),
		ROCompat: ROCompat(le.Uint32(b[0x64:])),
		RevLevel: le.Uint32(b[0x4c:]),
	}
	if s.RevLevel > 1 {
		return nil, p.unsupported("s_rev_level", "%d, expected 0 or 1", s.RevLevel)
	}
	if s.Incompat&IncompatJournalDev != 0 {
		return nil, p.unsupported("s_feature_incompat", "journal_dev: this is the journal of another file system")
	}
	if unknown := s.Incompat &^ incompatKnown; unknown != 0 {
		return nil, p.unsupported("s_feature_incompat", "has features that are not known: %v", unknown)
	}
	if s.ROCompat&ROCompatMetadataCsum != 0 {
		if t := b[0x175]; t != checksumCRC32C {
			return nil, p.unsupported("s_checksum_type", "%d, expected %d", t, checksumCRC32C)
		}
		found, want := le.Uint32(b[0x3fc:]), crc32c(^uint32(0), b[:superblockSize-4])
		if found != want && !ignoreChecksum {
			return nil, p.checksum(found, want)
		}
	}

	has64 := s.Incompat&Incompat64bit != 0
	wide := func(lo, hi int) int64 {
		n := int64(le.Uint32(b[lo:]))
		if has64 {
			n |= int64(le.Uint32(b[hi:])) << 32
		}
		return n
	}
	at := func(lo, hi int) time.Time { return time.Unix(int64(le.Uint32(b[lo:]))|int64(b[hi])<<32, 0) }
	text := func(b []byte) string { t, _, _ := strings.Cut(string(b), "\x00"); return t }
	s.InodesCount = le.Uint32(b)
	s.BlocksCount = wide(0x4, 0x150)
	s.RBlocksCount = wide(0x8, 0x154)
	s.FreeBlocksCount = wide(0xc, 0x158)
	s.FreeInodesCount = le.Uint32(b[0x10:])
	s.FirstDataBlock = int64(le.Uint32(b[0x14:]))
	s.BlocksPerGroup = int64(le.Uint32(b[0x20:]))
	s.ClustersPerGroup = int64(le.Uint32(b[0x24:]))
	s.InodesPerGroup = le.Uint32(b[0x28:])
	s.Mtime, s.Wtime = at(0x2c, 0x275), at(0x30, 0x274)
	s.State = State(le.Uint16(b[0x3a:]))
	s.Lastcheck = at(0x40, 0x277)
	s.CreatorOS = le.Uint32(b[0x48:])
	s.FirstIno, s.InodeSize = firstIno, oldInodeSize
	if s.RevLevel > 0 {
		s.FirstIno, s.InodeSize = Ino(le.Uint32(b[0x54:])), int(le.Uint16(b[0x58:]))
	}
	copy(s.UUID[:], b[0x68:])
	s.Label, s.LastMounted = text(b[0x78:0x88]), text(b[0x88:0xc8])
	s.ReservedGDT = int64(le.Uint16(b[0xce:]))
	copy(s.JournalUUID[:], b[0xd0:])
	s.JournalInum, s.JournalDev = Ino(le.Uint32(b[0xe0:])), le.Uint32(b[0xe4:])
	s.LastOrphan = Ino(le.Uint32(b[0xe8:]))
	for i := range s.HashSeed {
		s.HashSeed[i] = le.Uint32(b[0xec+4*i:])
	}
	s.DefHashVersion = b[0xfc]
	s.DescSize = minDescSize
	if has64 {
		s.DescSize = int(le.Uint16(b[0xfe:]))
	}
	s.FirstMetaBG = le.Uint32(b[0x104:])
	s.MkfsTime = at(0x108, 0x276)
	s.MinExtraIsize, s.WantExtraIsize = le.Uint16(b[0x15c:]), le.Uint16(b[0x15e:])
	s.Flags = le.Uint32(b[0x160:])
	s.MMPBlock = int64(le.Uint64(b[0x168:]))
	s.GroupsPerFlex = 1
	if n := b[0x174]; s.Incompat&IncompatFlexBG != 0 && n < 32 {
		s.GroupsPerFlex = 1 << n
	}
	s.ErrorCount = le.Uint32(b[0x194:])
	s.UsrQuotaInum, s.GrpQuotaInum = Ino(le.Uint32(b[0x240:])), Ino(le.Uint32(b[0x244:]))
	s.OverheadClusters = le.Uint32(b[0x248:])
	s.BackupBgs = [2]uint32{le.Uint32(b[0x24c:]), le.Uint32(b[0x250:])}
	s.LpfIno, s.PrjQuotaInum = Ino(le.Uint32(b[0x268:])), Ino(le.Uint32(b[0x26c:]))
	s.ChecksumSeed = crc32c(^uint32(0), s.UUID[:])
	if s.Incompat&IncompatCsumSeed != 0 {
		s.ChecksumSeed = le.Uint32(b[0x270:])
	}
	s.Encoding, s.EncodingFlags = le.Uint16(b[0x27c:]), le.Uint16(b[0x27e:])
	s.OrphanFileInum = Ino(le.Uint32(b[0x280:]))
	return s, s.check(p, le.Uint32(b[0x18:]), le.Uint32(b[0x1c:]), size)
}

// check is the part of parseSuperblock that looks at what the rest computes
// with (kernel: fs/ext4/super.c, ext4_check_geometry and around).
func (s *Superblock) check(p place, logBlock, logCluster uint32, size int64) error {
	if logBlock > 6 {
		return p.corrupt("s_log_block_size", "%d, expected at most 6", logBlock)
	}
	s.BlockSize = minBlockSize << logBlock
	bs := int64(s.BlockSize)
	s.ClusterSize = s.BlockSize
	if s.ROCompat&ROCompatBigalloc != 0 {
		if logCluster < logBlock || logCluster > 20 {
			return p.corrupt("s_log_cluster_size", "%d, expected %d to 20", logCluster, logBlock)
		}
		s.ClusterSize = minBlockSize << logCluster
	} else {
		s.ClustersPerGroup = s.BlocksPerGroup
	}
	ratio := int64(s.ClusterSize / s.BlockSize)
	switch want := int64(b2i(bs == minBlockSize)); {
	case s.FirstDataBlock == want:
	case s.FirstDataBlock == 0 && ratio > 1: // bigalloc with blocks of 1 KiB
	default:
		return p.corrupt("s_first_data_block", "%d, expected %d", s.FirstDataBlock, want)
	}
	switch n := s.ClustersPerGroup; {
	case n < 1 || n > 8*bs:
		return p.corrupt("s_clusters_per_group", "%d, expected 1 to %d", n, 8*bs)
	case s.BlocksPerGroup != n*ratio:
		return p.corrupt("s_blocks_per_group", "%d, expected %d", s.BlocksPerGroup, n*ratio)
	case s.InodeSize < oldInodeSize || s.InodeSize > s.BlockSize || s.InodeSize&(s.InodeSize-1) != 0:
		return p.corrupt("s_inode_size", "%d, expected a power of two from 128 to %d", s.InodeSize, bs)
	case s.FirstIno < firstIno:
		return p.corrupt("s_first_ino", "%d, expected at least %d", s.FirstIno, firstIno)
	}
	perBlock := uint32(s.BlockSize / s.InodeSize)
	if s.InodesPerGroup < perBlock || int64(s.InodesPerGroup) > 8*bs {
		return p.corrupt("s_inodes_per_group", "%d, expected %d to %d", s.InodesPerGroup, perBlock, 8*bs)
	}
	if d := s.DescSize; s.Incompat&Incompat64bit != 0 && (d < descSize || d > 1024 || d&(d-1) != 0) {
		return p.corrupt("s_desc_size", "%d, expected a power of two from 64 to 1024", d)
	}
	if s.BlocksCount <= s.FirstDataBlock || s.BlocksCount > size/bs {
		return p.corrupt("s_blocks_count", "%d blocks of %d bytes, and the device has %d bytes", s.BlocksCount, bs, size)
	}
	s.groups = ceilDiv(s.BlocksCount-s.FirstDataBlock, s.BlocksPerGroup)
	if s.groups*int64(s.InodesPerGroup) != int64(s.InodesCount) {
		return p.corrupt("s_inodes_count", "%d, expected %d in each of %d groups", s.InodesCount, s.InodesPerGroup, s.groups)
	}
	if s.Incompat&IncompatMetaBG != 0 && int64(s.FirstMetaBG) > ceilDiv(s.groups, bs/int64(s.DescSize)) {
		return p.corrupt("s_first_meta_bg", "%d, and there are %d groups", s.FirstMetaBG, s.groups)
	}
	return nil
}

// put writes the superblock over b, the bytes that it was read from: the
// fields that can change in a file system that is edited, and the checksum.
func (s *Superblock) put(b []byte) {
	le := binary.LittleEndian
	wide := func(lo, hi int, v int64) {
		le.PutUint32(b[lo:], uint32(v))
		if s.Incompat&Incompat64bit != 0 {
			le.PutUint32(b[hi:], uint32(v>>32))
		}
	}
	at := func(lo, hi int, t time.Time) {
		le.PutUint32(b[lo:], uint32(t.Unix()))
		b[hi] = byte(t.Unix() >> 32)
	}
	le.PutUint32(b, s.InodesCount)
	wide(0x4, 0x150, s.BlocksCount)
	wide(0x8, 0x154, s.RBlocksCount)
	wide(0xc, 0x158, s.FreeBlocksCount)
	le.PutUint32(b[0x10:], s.FreeInodesCount)
	at(0x2c, 0x275, s.Mtime)
	at(0x30, 0x274, s.Wtime)
	at(0x40, 0x277, s.Lastcheck)
	le.PutUint16(b[0x3a:], uint16(s.State))
	le.PutUint32(b[0x5c:], uint32(s.Compat))
	le.PutUint32(b[0x60:], uint32(s.Incompat))
	le.PutUint32(b[0x64:], uint32(s.ROCompat))
	copy(b[0x68:0x78], s.UUID[:])
	le.PutUint16(b[0xce:], uint16(s.ReservedGDT))
	le.PutUint32(b[0xe0:], uint32(s.JournalInum))
	le.PutUint32(b[0xe8:], uint32(s.LastOrphan))
	le.PutUint32(b[0x104:], s.FirstMetaBG)
	le.PutUint32(b[0x248:], s.OverheadClusters)
	if s.hasCsum() {
		le.PutUint32(b[0x3fc:], crc32c(^uint32(0), b[:superblockSize-4]))
	}
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// Groups is the number of block groups.
func (s *Superblock) Groups() int64 { return s.groups }

// groupStart is the first block of a group.
func (s *Superblock) groupStart(group int64) int64 { return s.FirstDataBlock + group*s.BlocksPerGroup }

// groupEnd is the block behind the last of a group.
func (s *Superblock) groupEnd(group int64) int64 {
	return min(s.groupStart(group+1), s.BlocksCount)
}

// hasCsum reports whether all metadata has checksums.
func (s *Superblock) hasCsum() bool { return s.ROCompat&ROCompatMetadataCsum != 0 }

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
	le.PutUint16(b[0x38:], superMagic)                 // s_magic
	le.PutUint16(b[0x3a:], 1)                          // s_state: clean
	le.PutUint16(b[0x3c:], 1)                          // s_errors: continue
	le.PutUint32(b[0x40:], uint32(l.time))             // s_lastcheck
	le.PutUint32(b[0x4c:], 1)                          // s_rev_level: dynamic
	le.PutUint32(b[0x54:], firstIno)                   // s_first_ino
	le.PutUint16(b[0x58:], inodeSize)                  // s_inode_size
	le.PutUint16(b[0x5a:], uint16(group))              // s_block_group_nr
	compat, incompat, roCompat := l.features()
	le.PutUint32(b[0x5c:], uint32(compat))        // s_feature_compat
	le.PutUint32(b[0x60:], uint32(incompat))      // s_feature_incompat
	le.PutUint32(b[0x64:], uint32(roCompat))      // s_feature_ro_compat
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
	unsignedHash        = 2         // EXT2_FLAGS_UNSIGNED_HASH

	superMagic     = 0xef53
	maxBlockSize   = 64 << 10
	oldInodeSize   = 128 // EXT2_GOOD_OLD_INODE_SIZE
	minDescSize    = 32  // of a file system without the 64bit feature
	checksumCRC32C = 1   // s_checksum_type
)

// features returns the feature words of the superblock: mke2fs's defaults for
// ext4, and what the tree needs besides.
func (l *Layout) features() (compat Compat, incompat Incompat, roCompat ROCompat) {
	compat = CompatExtAttr | CompatDirIndex
	if l.journalBlocks > 0 {
		compat |= CompatHasJournal
	}
	if l.geo.resizeInode {
		compat |= CompatResizeInode
	}
	incompat = IncompatFiletype | IncompatExtents | Incompat64bit | IncompatFlexBG
	if len(l.eaValues) > 0 {
		incompat |= IncompatEAInode
	}
	if l.largeDir {
		incompat |= IncompatLargedir
	}
	roCompat = ROCompatSparseSuper | ROCompatLargeFile | ROCompatHugeFile | ROCompatDirNlink | ROCompatExtraIsize | ROCompatMetadataCsum
	return compat, incompat, roCompat
}

// logBlockSize is s_log_block_size: 0 for 1 KiB.
func logBlockSize(size int64) uint32 {
	return uint32(bits.TrailingZeros64(uint64(size / minBlockSize)))
}

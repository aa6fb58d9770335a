package ext4img

// Feature bits of the superblock: s_feature_compat, s_feature_incompat and
// s_feature_ro_compat (kernel: Documentation/filesystems/ext4/super.rst).
const (
	compatHasJournal  = 0x0004
	compatExtAttr     = 0x0008
	compatResizeInode = 0x0010
	compatDirIndex    = 0x0020

	incompatFiletype = 0x0002
	incompatExtents  = 0x0040
	incompat64bit    = 0x0080
	incompatFlexBg   = 0x0200
	incompatEAInode  = 0x0400
	incompatLargedir = 0x4000

	roCompatSparseSuper  = 0x0001
	roCompatLargeFile    = 0x0002
	roCompatHugeFile     = 0x0008
	roCompatDirNlink     = 0x0020
	roCompatExtraIsize   = 0x0040
	roCompatMetadataCsum = 0x0400
)

// Inode numbers that the format reserves.
const (
	rootIno     = 2
	resizeIno   = 7
	journalIno  = 8
	firstIno    = 11 // s_first_ino; lost+found by convention
	lostFoundID = firstIno
)

// i_flags.
const (
	indexFl    = 0x1000   // the directory has an htree
	hugeFileFl = 0x40000  // i_blocks counts file system blocks
	extentsFl  = 0x80000  // i_block holds an extent tree
	eaInodeFl  = 0x200000 // the inode holds the value of an xattr
)

// i_mode: the type of a file.
const (
	modeType   = 0xf000
	modeFifo   = 0x1000
	modeChar   = 0x2000
	modeDir    = 0x4000
	modeBlock  = 0x6000
	modeReg    = 0x8000
	modeLink   = 0xa000
	modeSocket = 0xc000
)

// fileType is the file_type of a directory entry for a mode.
func fileType(mode uint16) uint8 {
	switch mode & modeType {
	case modeReg:
		return 1
	case modeDir:
		return 2
	case modeChar:
		return 3
	case modeBlock:
		return 4
	case modeFifo:
		return 5
	case modeSocket:
		return 6
	case modeLink:
		return 7
	}
	return 0
}

// Sizes of on-disk structures, in bytes.
const (
	superblockSize = 1024
	superblockOff  = 1024 // place of the primary superblock on the disk
	descSize       = 64   // group descriptor with the 64bit feature
	inodeSize      = 256
	extraIsize     = 32 // i_extra_isize: the inode ends with i_projid
	inodeBody      = 128 + extraIsize
	maxNameLen     = 255
	maxLinks       = 65000 // EXT4_LINK_MAX
)

// groupsPerFlex is 1<<s_log_groups_per_flex: so many groups keep their bitmaps
// and inode tables together (mke2fs's default).
const groupsPerFlex = 16

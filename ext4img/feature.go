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
	rootIno      = 2
	resizeIno    = 7
	journalIno   = 8
	firstIno     = 11 // s_first_ino; lost+found by convention
	lostFoundIno = firstIno
)

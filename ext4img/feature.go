package ext4img

import (
	"fmt"
	"strings"
)

// Compat is s_feature_compat: features that a program may ignore, to read and
// to write (kernel: Documentation/filesystems/ext4/super.rst).
type Compat uint32

// Compatible features, by the names of the kernel.
const (
	CompatDirPrealloc   Compat = 0x0001
	CompatImagicInodes  Compat = 0x0002
	CompatHasJournal    Compat = 0x0004
	CompatExtAttr       Compat = 0x0008
	CompatResizeInode   Compat = 0x0010
	CompatDirIndex      Compat = 0x0020
	CompatLazyBG        Compat = 0x0040
	CompatExcludeInode  Compat = 0x0080
	CompatExcludeBitmap Compat = 0x0100
	CompatSparseSuper2  Compat = 0x0200
	CompatFastCommit    Compat = 0x0400
	CompatStableInodes  Compat = 0x0800
	CompatOrphanFile    Compat = 0x1000
)

// String names the features as mke2fs does, separated by commas.
func (f Compat) String() string {
	return featureNames(uint32(f), "compat", []string{
		"dir_prealloc", "imagic_inodes", "has_journal", "ext_attr", "resize_inode", "dir_index", "lazy_bg",
		"exclude_inode", "exclude_bitmap", "sparse_super2", "fast_commit", "stable_inodes", "orphan_file",
	})
}

// Incompat is s_feature_incompat: features that a program must know to read.
type Incompat uint32

// Incompatible features, by the names of the kernel.
const (
	IncompatCompression Incompat = 0x0001
	IncompatFiletype    Incompat = 0x0002
	IncompatRecover     Incompat = 0x0004 // the journal has to be replayed
	IncompatJournalDev  Incompat = 0x0008 // the device is a journal
	IncompatMetaBG      Incompat = 0x0010
	IncompatExtents     Incompat = 0x0040
	Incompat64bit       Incompat = 0x0080
	IncompatMMP         Incompat = 0x0100
	IncompatFlexBG      Incompat = 0x0200
	IncompatEAInode     Incompat = 0x0400
	IncompatDirdata     Incompat = 0x1000
	IncompatCsumSeed    Incompat = 0x2000
	IncompatLargedir    Incompat = 0x4000
	IncompatInlineData  Incompat = 0x8000
	IncompatEncrypt     Incompat = 0x10000
	IncompatCasefold    Incompat = 0x20000

	incompatKnown = IncompatFiletype | IncompatRecover | IncompatMetaBG | IncompatExtents | Incompat64bit |
		IncompatMMP | IncompatFlexBG | IncompatEAInode | IncompatCsumSeed | IncompatLargedir | IncompatInlineData |
		IncompatEncrypt | IncompatCasefold
)

// String names the features as mke2fs does, separated by commas.
func (f Incompat) String() string {
	return featureNames(uint32(f), "incompat", []string{
		"compression", "filetype", "needs_recovery", "journal_dev", "meta_bg", "", "extent", "64bit", "mmp", "flex_bg",
		"ea_inode", "", "dirdata", "metadata_csum_seed", "large_dir", "inline_data", "encrypt", "casefold",
	})
}

// ROCompat is s_feature_ro_compat: features that a program must know to
// write.
type ROCompat uint32

// Features that are compatible for reading, by the names of the kernel.
const (
	ROCompatSparseSuper   ROCompat = 0x0001
	ROCompatLargeFile     ROCompat = 0x0002
	ROCompatHugeFile      ROCompat = 0x0008
	ROCompatGDTCsum       ROCompat = 0x0010
	ROCompatDirNlink      ROCompat = 0x0020
	ROCompatExtraIsize    ROCompat = 0x0040
	ROCompatHasSnapshot   ROCompat = 0x0080
	ROCompatQuota         ROCompat = 0x0100
	ROCompatBigalloc      ROCompat = 0x0200
	ROCompatMetadataCsum  ROCompat = 0x0400
	ROCompatReplica       ROCompat = 0x0800
	ROCompatReadonly      ROCompat = 0x1000
	ROCompatProject       ROCompat = 0x2000
	ROCompatSharedBlocks  ROCompat = 0x4000
	ROCompatVerity        ROCompat = 0x8000
	ROCompatOrphanPresent ROCompat = 0x10000
)

// String names the features as mke2fs does, separated by commas.
func (f ROCompat) String() string {
	return featureNames(uint32(f), "ro_compat", []string{
		"sparse_super", "large_file", "", "huge_file", "uninit_bg", "dir_nlink", "extra_isize", "snapshot", "quota", "bigalloc",
		"metadata_csum", "replica", "read-only", "project", "shared_blocks", "verity", "orphan_present",
	})
}

func featureNames(bits uint32, set string, names []string) string {
	var s []string
	for i := range 32 {
		switch {
		case bits>>i&1 == 0:
		case i < len(names) && names[i] != "":
			s = append(s, names[i])
		default:
			s = append(s, fmt.Sprintf("%s bit %d", set, i))
		}
	}
	return strings.Join(s, ",")
}

// Ino is the number of an inode.
type Ino uint32

// RootIno is the inode of the root directory.
const RootIno Ino = rootIno

// Inode numbers that the format reserves.
const (
	rootIno      = 2
	resizeIno    = 7
	journalIno   = 8
	firstIno     = 11 // s_first_ino; lost+found by convention
	lostFoundIno = firstIno
)

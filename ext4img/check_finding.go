package ext4img

import "fmt"

// Severity says what a finding means.
type Severity uint8

const (
	// Note: something that a mount or the next change puts right, or that says
	// nothing of the files. e2fsck -fn exits with 0 where there is nothing else.
	Note Severity = iota
	// Error: the file system is damaged.
	Error
)

func (s Severity) String() string {
	if s == Note {
		return "note"
	}
	return "error"
}

// Kind is a kind of finding.
type Kind uint8

// Kinds of findings.
const (
	SuperblockDamaged  Kind = 1 + iota // a field of the superblock, or its checksum
	FeaturesDamaged                    // features that exclude each other, or need others
	SuperblockCounts                   // free blocks or inodes of the superblock
	StateMarkedErrors                  // the kernel has found errors
	NotUnmounted                       // not unmounted in order
	JournalDirty                       // the journal has to be replayed
	JournalDamaged                     // the journal, its inode or its superblock
	OrphansLeft                        // inodes that a crash has left without names
	OrphansDamaged                     // the list of those, or the orphan file
	GroupDamaged                       // a group descriptor
	GroupCounts                        // free blocks, free inodes or directories of a group
	BlockBitmapDamaged                 // the checksum or the padding of a block bitmap
	InodeBitmapDamaged                 // likewise, of an inode bitmap
	BlockNotMarked                     // in use, and free in the bitmap
	BlockLeaked                        // in use in the bitmap, and nobody's
	InodeNotMarked                     // in use, and free in the bitmap
	InodeLeaked                        // in use in the bitmap alone
	BlockShared                        // a block that two things claim
	InodeDamaged                       // a field of an inode, or its checksum
	InodeSizeWrong                     // i_size does not fit what the inode maps
	InodeBlocksWrong                   // i_blocks is not what the inode has
	MapDamaged                         // an extent tree or block map
	ResizeInodeDamaged                 // the inode that holds reserved descriptor blocks
	DirDamaged                         // a directory block or one of its entries
	DirEntryUnused                     // an entry that leads to an inode that is not in use
	DirEntryType                       // an entry whose type is not its inode's
	DirNameTwice                       // two entries of one name
	DirLinkedTwice                     // a directory with two names
	DirParentWrong                     // ".." of a directory
	DirUnconnected                     // a directory that the root does not lead to
	InodeUnconnected                   // an inode in use that no name leads to
	LinkCountWrong                     // i_links_count
	IndexDamaged                       // the index of a directory
	XattrDamaged                       // xattrs of an inode or of a block
	XattrCountWrong                    // the reference count of a block or inode of xattrs
	TooMany                            // there are more findings than are told
	kindEnd
)

var kindNames = [...]string{
	SuperblockDamaged: "superblock-damaged", FeaturesDamaged: "features-damaged", SuperblockCounts: "superblock-counts",
	StateMarkedErrors: "state-errors", NotUnmounted: "not-unmounted", JournalDirty: "journal-dirty", JournalDamaged: "journal-damaged",
	OrphansLeft: "orphans-left", OrphansDamaged: "orphans-damaged", GroupDamaged: "group-damaged", GroupCounts: "group-counts",
	BlockBitmapDamaged: "block-bitmap-damaged", InodeBitmapDamaged: "inode-bitmap-damaged",
	BlockNotMarked: "block-not-marked", BlockLeaked: "block-leaked", InodeNotMarked: "inode-not-marked", InodeLeaked: "inode-leaked",
	BlockShared: "block-shared", InodeDamaged: "inode-damaged", InodeSizeWrong: "inode-size-wrong",
	InodeBlocksWrong: "inode-blocks-wrong", MapDamaged: "map-damaged", ResizeInodeDamaged: "resize-inode-damaged",
	DirDamaged: "directory-damaged", DirEntryUnused: "entry-unused", DirEntryType: "entry-type", DirNameTwice: "name-twice",
	DirLinkedTwice: "directory-linked-twice", DirParentWrong: "parent-wrong", DirUnconnected: "directory-unconnected",
	InodeUnconnected: "inode-unconnected", LinkCountWrong: "link-count-wrong", IndexDamaged: "index-damaged",
	XattrDamaged: "xattr-damaged", XattrCountWrong: "xattr-count-wrong", TooMany: "too-many",
}

// String names the kind.
func (k Kind) String() string {
	if k > 0 && k < kindEnd {
		return kindNames[k]
	}
	return fmt.Sprintf("Kind(%d)", uint8(k))
}

// severity is what a finding of the kind means.
func (k Kind) severity() Severity {
	switch k {
	case JournalDirty, OrphansLeft, SuperblockCounts, StateMarkedErrors, NotUnmounted:
		return Note
	}
	return Error
}

// Finding is something that Check has found.
type Finding struct {
	Kind     Kind
	Severity Severity
	Ino      Ino    // the inode that it is about; 0: none
	Block    int64  // the block of the file system; -1: none
	Group    int64  // the block group; -1: none
	Detail   string // what was found, and what was expected
}

// String tells the finding in one line.
func (f Finding) String() string {
	s := fmt.Sprintf("%v: %v: ", f.Severity, f.Kind)
	if f.Group >= 0 {
		s += fmt.Sprintf("group %d: ", f.Group)
	}
	if f.Ino != 0 {
		s += fmt.Sprintf("inode %d: ", f.Ino)
	}
	if f.Block >= 0 {
		s += fmt.Sprintf("block %d: ", f.Block)
	}
	return s + f.Detail
}

package qcow2

import (
	"fmt"
	"strings"
)

// Severity tells what a finding means.
type Severity uint8

const (
	// Leak: space is lost, nothing else.
	Leak Severity = 1 + iota
	// Corruption: data is damaged, or a write may damage it.
	Corruption
	// Internal: a part of the image could not be checked.
	Internal
	// Note: allowed, or told by another finding too. It is not counted.
	Note
)

func (s Severity) String() string {
	switch s {
	case Leak:
		return "leak"
	case Corruption:
		return "corruption"
	case Internal:
		return "internal"
	case Note:
		return "note"
	}
	return fmt.Sprintf("Severity(%d)", uint8(s))
}

// FindingKind is what is wrong.
type FindingKind uint8

// Kinds of findings. Off is the offset in the image file of what the comment
// names; Value is the entry or number in question.
const (
	RefcountTooLow         FindingKind = 1 + iota // cluster: stored refcount below the references
	RefcountTooHigh                               // cluster: stored refcount above the references
	RefcountOverflow                              // cluster: more references than a refcount can hold
	BeyondEnd                                     // region: ends a cluster or more beyond the file; Value: its size
	L1Reserved                                    // L1 entry: reserved bits set
	L2TableUnaligned                              // L2 table: not cluster-aligned
	L2Reserved                                    // L2 entry: reserved bits set
	ZeroFlagVersion2                              // L2 entry: zero flag in a version 2 image
	CompressedCopied                              // L2 entry: compressed cluster with the copied flag
	CompressedDataFile                            // L2 entry: compressed cluster with an external data file
	CompressedSubclusters                         // L2 entry: compressed cluster with a subcluster bitmap
	SubclustersContradict                         // L2 entry: subclusters both allocated and zero
	SubclustersUnallocated                        // L2 entry: subclusters of no cluster allocated
	DataUnaligned                                 // L2 entry: data cluster not cluster-aligned
	PreallocatedUnaligned                         // L2 entry: zero cluster not cluster-aligned
	L1Copied                                      // L1 entry: copied flag disagrees with the refcount
	L2Copied                                      // L2 entry: copied flag disagrees with the refcount
	SnapshotsDataFile                             // snapshots in an image with an external data file
	SnapshotL1Unaligned                           // L1 table of a snapshot: not cluster-aligned
	SnapshotL1TooLarge                            // L1 table of a snapshot: over the limit
	SnapshotL1Overlap                             // L1 tables of snapshots: larger together than the file
	RefcountTableReserved                         // refcount table entry: reserved bits set
	RefcountBlockUnaligned                        // refcount block: not cluster-aligned
	RefcountBlockBeyondEnd                        // refcount block: outside of the file
	RefcountBlockShared                           // refcount block: not referenced once
	RefcountUnreadable                            // clusters whose refcount cannot be read; Value: how many
	BitmapDirectoryBad                            // bitmap directory: cannot be parsed
	BitmapTableOverlap                            // bitmap tables: larger together than the file
	BitmapTableEntryBad                           // bitmap table entry: reserved bits or not aligned
	SnapshotIncomplete                            // snapshot table entry of version 3 without disk size
	SnapshotExtraData                             // snapshot table entry: extra data over the limit; Value: its size. Repair only
	SnapshotsTooMany                              // snapshot table: over the limit; Value: how many are over. Repair only
	Overlap                                       // Value bytes that two structures, Parts, lie in
	InactiveL1Copied                              // L1 entry of a snapshot: copied flag without refcount 1
	InactiveL2Copied                              // L2 entry of snapshots only: copied flag without refcount 1
)

// Finding is something wrong in an image.
type Finding struct {
	Kind     FindingKind
	Severity Severity
	// Count is how many findings this one stands for: a table that several
	// snapshots share is looked at once.
	Count int64
	Off   int64 // bytes in the image file
	Value uint64
	// Refcount is what is stored, Reference what was counted, for the kinds
	// that compare them.
	Refcount, Reference uint64
	Index               int64  // number of the entry, cluster or block
	Text                string // more, where there is more to say
	// Parts are the two structures of an Overlap.
	Parts [2]Part
	// Repairable is whether Repair removes it, and Repaired whether it has, or
	// would have without DryRun.
	Repairable, Repaired bool
}

// PartKind is what clusters of an image are used for.
type PartKind uint8

// Kinds of parts. Off is where the structure begins; for what holds guest data
// it is where the L2 entry lies.
const (
	PartHeader PartKind = 1 + iota
	PartActiveL1
	PartInactiveL1
	PartL2
	PartRefcountTable
	PartRefcountBlock
	PartSnapshotTable
	PartCryptoHeader
	PartBitmapDirectory
	PartBitmapTable
	PartData       // a guest cluster
	PartCompressed // a compressed guest cluster
	PartOther      // something else: bits of a bitmap, or what a damaged entry names; Off is that of the cluster
)

func (k PartKind) String() string {
	names := []string{"nothing", "header", "active l1 table", "inactive l1 table", "l2 table", "refcount table", "refcount block",
		"snapshot table", "encryption header", "bitmap directory", "bitmap table", "data cluster of l2 entry", "compressed cluster of l2 entry", "something else"}
	if int(k) < len(names) {
		return names[k]
	}
	return fmt.Sprintf("PartKind(%d)", uint8(k))
}

// Part is a structure of an image and its place in the file, in bytes.
type Part struct {
	Kind PartKind
	Off  int64
}

func (p Part) String() string { return fmt.Sprintf("%v at %#x", p.Kind, p.Off) }

// findingKinds has the name of each kind, its severity, and what qemu-img check
// prints for it, where it knows it. The arguments are those of Finding.String.
var findingKinds = [...]struct {
	name     string
	severity Severity
	text     string
}{
	RefcountTooLow:         {"refcount too low", Corruption, "ERROR cluster %[3]d refcount=%[4]d reference=%[5]d"},
	RefcountTooHigh:        {"refcount too high", Leak, "Leaked cluster %[3]d refcount=%[4]d reference=%[5]d"},
	RefcountOverflow:       {"refcount overflow", Corruption, "ERROR: overflow cluster offset=%#[1]x"},
	BeyondEnd:              {"beyond the end", Corruption, "ERROR: counting reference for region exceeding the end of the file by one cluster or more: offset %#[1]x size %#[2]x"},
	L1Reserved:             {"l1 entry reserved bits", Corruption, "ERROR found L1 entry with reserved bits set: %[2]x"},
	L2TableUnaligned:       {"l2 table unaligned", Corruption, "ERROR l2_offset=%[1]x: Table is not cluster aligned; L1 entry corrupted"},
	L2Reserved:             {"l2 entry reserved bits", Corruption, "ERROR found l2 entry with reserved bits set: %[2]x"},
	ZeroFlagVersion2:       {"zero flag in version 2", Corruption, "ERROR l2_entry=%[2]x at %#[1]x: zero flag in a version 2 image"},
	CompressedCopied:       {"compressed cluster copied", Corruption, "ERROR: coffset=%#[2]x: copied flag must never be set for compressed clusters"},
	CompressedDataFile:     {"compressed cluster with data file", Corruption, "ERROR compressed cluster %[3]d with data file, entry=%#[2]x"},
	CompressedSubclusters:  {"compressed cluster with subclusters", Corruption, "ERROR compressed cluster %[3]d with non-zero subcluster allocation bitmap, entry=%#[2]x"},
	SubclustersContradict:  {"subclusters contradict", Corruption, "ERROR offset=%[7]x: Allocated cluster has corrupted subcluster allocation bitmap"},
	SubclustersUnallocated: {"subclusters unallocated", Corruption, "ERROR: Unallocated cluster has non-zero subcluster allocation map%[6]s"},
	DataUnaligned:          {"data cluster unaligned", Corruption, "ERROR offset=%[7]x: Data cluster is not properly aligned; L2 entry corrupted."},
	PreallocatedUnaligned:  {"preallocated cluster unaligned", Corruption, "ERROR offset=%[7]x: Preallocated cluster is not properly aligned; L2 entry corrupted."},
	L1Copied:               {"l1 copied flag", Corruption, "ERROR OFLAG_COPIED L2 cluster: l1_index=%[3]d l1_entry=%[2]x refcount=%[4]d"},
	L2Copied:               {"l2 copied flag", Corruption, "ERROR OFLAG_COPIED data cluster: l2_entry=%[2]x refcount=%[4]d"},
	SnapshotsDataFile:      {"snapshots with data file", Corruption, "ERROR %[2]d snapshots in image with data file"},
	SnapshotL1Unaligned:    {"snapshot l1 table unaligned", Corruption, "ERROR snapshot %[6]s l1_offset=%#[2]x: L1 table is not cluster aligned; snapshot table entry corrupted"},
	SnapshotL1TooLarge:     {"snapshot l1 table too large", Corruption, "ERROR snapshot %[6]s l1_size=%#[2]x: L1 table is too large; snapshot table entry corrupted"},
	SnapshotL1Overlap:      {"snapshot l1 tables overlap", Corruption, "ERROR snapshot %[6]s: the L1 tables of the snapshots are larger than the file"},
	RefcountTableReserved:  {"refcount table reserved bits", Corruption, "ERROR refcount table entry %[3]d has reserved bits set"},
	RefcountBlockUnaligned: {"refcount block unaligned", Corruption, "ERROR refcount block %[3]d is not cluster aligned; refcount table entry corrupted"},
	RefcountBlockBeyondEnd: {"refcount block beyond the end", Corruption, "ERROR refcount block %[3]d is outside image"},
	RefcountBlockShared:    {"refcount block shared", Corruption, "ERROR refcount block %[3]d refcount=%[5]d"},
	RefcountUnreadable:     {"refcount unreadable", Internal, "Can't get refcount for cluster %[3]d: %[6]s"},
	BitmapDirectoryBad:     {"bitmap directory bad", Corruption, "ERROR bitmap directory: %[6]s"},
	BitmapTableOverlap:     {"bitmap tables overlap", Corruption, "ERROR bitmap %[6]s: the tables of the bitmaps are larger than the file"},
	BitmapTableEntryBad:    {"bitmap table entry bad", Corruption, "ERROR bitmap table entry %[3]d of %[6]s: %[2]x"},
	SnapshotIncomplete:     {"snapshot incomplete", Corruption, "ERROR snapshot table entry %[3]d is incomplete"},
	SnapshotExtraData:      {"snapshot extra data", Corruption, "Discarding too much extra metadata in snapshot table entry %[3]d (%[2]d > 1024)"},
	SnapshotsTooMany:       {"too many snapshots", Corruption, "Discarding %[2]d overhanging snapshots"},
	Overlap:                {"overlap", Corruption, "ERROR overlap at %#[1]x, %[2]d bytes: %[8]v, %[9]v"},
	InactiveL1Copied:       {"inactive l1 copied flag", Note, "NOTE OFLAG_COPIED L2 cluster of snapshot %[6]s: l1_index=%[3]d l1_entry=%[2]x refcount=%[4]d"},
	InactiveL2Copied:       {"inactive l2 copied flag", Note, "NOTE OFLAG_COPIED data cluster of snapshots: l2_entry=%[2]x refcount=%[4]d"},
}

func (k FindingKind) String() string {
	if k == 0 || int(k) >= len(findingKinds) {
		return fmt.Sprintf("FindingKind(%d)", uint8(k))
	}
	return findingKinds[k].name
}

// String is the line that qemu-img check prints for the finding, where it
// knows it.
func (f Finding) String() string {
	if f.Kind == 0 || int(f.Kind) >= len(findingKinds) {
		return fmt.Sprintf("%v at %#x", f.Kind, f.Off)
	}
	s := fmt.Sprintf(findingKinds[f.Kind].text, f.Off, f.Value, f.Index, f.Refcount, f.Reference, f.Text, f.Value&l2OffsetMask, f.Parts[0], f.Parts[1])
	if word, rest, _ := strings.Cut(s, " "); f.Repaired && (word == "ERROR" || word == "Leaked") {
		return "Repairing " + rest
	}
	return s
}

// repairable tells whether Repair removes findings of a kind.
func (k FindingKind) repairable() bool {
	switch k {
	case RefcountTooLow, RefcountTooHigh, L1Reserved, L2Reserved, ZeroFlagVersion2, CompressedCopied, PreallocatedUnaligned,
		L1Copied, L2Copied, RefcountTableReserved, RefcountBlockUnaligned, RefcountBlockBeyondEnd, RefcountBlockShared,
		RefcountUnreadable, SnapshotIncomplete, SnapshotExtraData, SnapshotsTooMany:
		return true
	}
	return false
}

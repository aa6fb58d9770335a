// Package fat makes FAT file systems (FAT12, FAT16, FAT32) from trees of files, as
// an EFI system partition or a seed disk needs them.
//
// New decides the whole file system; the result is a disk that is read, and the
// content of files is read when their clusters are. Nothing is written to a
// temporary place. Every file and directory lies in one piece, in the order of
// names.
//
// Kept: contents, names of up to 255 UTF-16 units in their case, and times of
// modification to two seconds, in UTC, from 1980 to 2107. FAT has no owners,
// modes and links: symbolic links and special files are an error. Names that FAT
// cannot hold, or that differ in case alone, are errors that name them.
//
// The same tree and options make the same bytes: neither the clock nor random
// numbers have a say.
//
// The format is specified by Microsoft's "FAT: General Overview of On-Disk Format"
// 1.03; the sizes of clusters and tables are those that mkfs.fat chooses. The
// writer of go-diskfs is not used: what it makes has lost clusters, clusters behind
// the end of the disk, empty files with a cluster, and short names that are used
// twice, all of which fsck.fat finds.
package fat

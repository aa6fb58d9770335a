// Package ext4img makes ext4 file systems from trees of files and reads ext2,
// ext3 and ext4 file systems, without root, without a mount and without any
// other program.
//
// # Building
//
// A build has three steps, and nothing is written before the last:
//
//	Scan        directory -> Tree: names, modes, owners, times, xattrs, holes; no content
//	Merge       the same of several sources, laid one over another: directories (Dir),
//	            tar archives (Tar), layers of container images (Layer), any fs.FS (FromFS),
//	            and lists of changes in the format of mtree (Manifest)
//	NewLayout   Tree -> Layout: every inode, block, extent, directory block, bitmap and
//	            checksum decided; a pure function; a disk that is too small is refused here
//	Write       Layout -> sink: written once, ascending, by several workers; holes and
//	            unused tables are never written
//
// The file system is what mke2fs makes by default (journal, extents, 64bit,
// flex_bg, metadata_csum, dir_index, resize_inode, sparse_super and the rest),
// with hashed directories already indexed. It mounts read-write and grows
// online.
//
// Kept exactly: contents, holes, modes with setuid, setgid and sticky, 32-bit
// owners, mtimes to the nanosecond from 1901 to 2446, hard links, symlinks,
// fifos, sockets, device numbers of 12:20 bits, names of any bytes, xattrs of
// the namespaces that ext4 has (POSIX ACLs in ext4's own encoding, values over
// one block in inodes of their own), and the root directory's own metadata.
// Not kept: atime and ctime, which every copy of a tree changes; both are set
// to the mtime, as is the creation time.
//
// The same tree and options give the same bytes: neither the clock, nor the
// order of readdir, nor the number of workers has a say. UUID and hash seed are
// derived from the tree unless given.
//
// # Reading
//
// Open reads a file system of any of the three kinds: an FS is an fs.FS, and
// has what that lacks besides: names of any bytes, inodes, xattrs, extents.
//
//	revisions    0 and 1; blocks of 1 to 64 KiB; inodes of 128 bytes and more
//	maps         extents, indirect blocks, inline data
//	directories  linear, hashed with every hash but siphash, large_dir
//	xattrs       in inodes, blocks and inodes of their own
//	layout       64bit, flex_bg, meta_bg, bigalloc, sparse_super2, uninit_bg
//	journal      replayed in memory: revoked and escaped blocks, checksums v1, v2 and
//	             v3, fast commits; not one on another device
//	checksums    verified wherever something is read; OpenOptions.IgnoreChecksums
//	casefold     names are found by a simpler rule than the kernel's: FS.LookupIn
//	encrypt      names and contents of encrypted files are ErrEncrypted
//	others       a feature that has to be known for reading, and is not, is
//	             refused by name
//
// What is damaged is an error where it is met, and the rest can be read. No
// file system, however damaged, makes reading panic, go on without end, or
// take memory that grows with what it claims.
//
// # Editing
//
// OpenEditor checks a file system and opens it for changes, which are made in
// transactions: a Tx is held in memory, shows the file system as it will be, and
// becomes part of it by Commit, wholly or not at all.
//
//	content      goes to free blocks at once, and is nobody's before the commit;
//	             what files have is never overwritten
//	journal      the commit goes through it, in every form that reading knows, and
//	             it is empty afterwards
//	no journal   blocks are written in an order that e2fsck repairs without loss
//	directories  indexes are kept, split and grown; a directory that gets its second
//	             block gets one
//	refused      what Check finds an error in; quota, encrypted and casefold
//	             directories, verity files; transactions larger than the journal
//
// Not done: default ACLs and setgid of a directory are not inherited, since owner
// and mode are given.
//
// # Checking
//
// Check verifies all that e2fsck verifies in its five passes, and changes nothing.
//
// # Resizing
//
// Resize makes a file system larger or smaller, in place and with nobody using
// it; PlanResize tells what it would do, MinimumSize how small it gets. At every
// moment the file system is valid, with all its files, if its journal is
// replayed; what was interrupted is begun again.
//
//	growing      descriptors in the blocks that the resize inode keeps for them, and
//	             behind those in meta_bg; every kind of file system
//	shrinking    blocks, inodes, xattrs, bitmaps, inode tables and the journal move;
//	             not with bigalloc, stable_inodes, bad blocks
//	no journal   one is lent, of 1024 blocks at least, while the work lasts
//
// The format is specified by the kernel's Documentation/filesystems/ext4.
package ext4img

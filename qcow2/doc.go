// Package qcow2 reads, writes, checks and repairs disk images in QEMU's qcow2
// format, versions 2 and 3, as docs/interop/qcow2.txt of QEMU describes it.
//
// Open and New give an Image, which is what the guest sees: ReadAt reads it,
// NextExtent tells what it is made of and where the bytes lie, Check compares
// its tables. Opened for writing (OpenOptions.Write) it takes WriteAt,
// WriteZeroes, Discard and Sync, and changes of its metadata: snapshots, bitmaps,
// Resize, Amend, Commit, Rebase. Repair mends a damaged image, NewDump shows
// one. Create makes an empty image, NewWriter a full one in one pass.
//
// Read and written is everything that QEMU 7.2 reads: clusters of 512 bytes to 2 MiB,
// refcounts of 1 to 64 bits, zero clusters, compressed clusters (zlib, zstd),
// extended L2 entries, external data files, backing files (qcow2 and raw, json:
// names), internal snapshots, and bitmaps, which record what is written. Images
// with the dirty or the corrupt bit are read; before it is written one with the
// dirty bit is repaired, and one with the corrupt bit is refused. The dirty bit
// is never set: refcounts are kept right also with lazy refcounts. Encrypted
// images (legacy AES, LUKS version 1 with AES) are opened and checked, and read
// and written with the passphrase that OpenOptions.Secret gives; without it their
// guest data is refused with ErrEncrypted. Other ciphers than AES are refused by
// name, and so are unknown incompatible features.
//
// An image can name other files, its backing file and its data file. They are
// opened only with BackingFollow, which is for images whose names can be
// trusted; without it an image that names some is refused. Errors that are in such
// a file name it.
//
// Create and Writer write the header last. A crash before that leaves no image,
// never one with wrong tables, if the device is synced in between
// (WriterOptions.Sync) or is put in place only when it is complete and synced
// (blockdev.CreateFile).
//
// An image that is written stays one whose tables agree, whenever the machine
// stops, and whatever the disk does with writes that were not synced yet.
// Refcounts and data go to disk before the tables that refer to them, and what is
// given up is freed after that: a crash leaves leaked clusters at most. What Sync
// acknowledged is there; what was written later is there or not, sector by
// sector. Changes of metadata, with the refcounts that they need, are written to
// free clusters, and then take effect by one write of the first sector: a crash
// leaves the state before or the one after, without leaks. A bitmap that records
// writes is marked in use before the first of them, and stored by Close or with the
// next change of metadata: a crash in between leaves it inconsistent, fit only to
// be removed.
//
// No image makes this package panic or go on for ever. Memory is 64 MiB and
// OpenOptions.CacheSize at most, besides what is in proportion to the metadata
// that is read. Reading takes time in proportion to the range and to the chain,
// NextExtent to the tables of the extent. Check reads the tables only, each a
// fixed number of times, and none of the L2 tables that lie in holes of the
// file.
//
// All of an Image but Close is safe for concurrent use.
package qcow2

// Package qcow2 reads, checks and makes disk images in QEMU's qcow2 format,
// versions 2 and 3, as docs/interop/qcow2.txt of QEMU describes it.
//
// Open and New give an Image, which is what the guest sees: ReadAt reads it,
// NextExtent tells what it is made of and where the bytes lie, Check compares
// its tables. Create makes an empty image, NewWriter a full one in one pass.
//
// Read is everything that QEMU 7.2 reads: clusters of 512 bytes to 2 MiB,
// refcounts of 1 to 64 bits, zero clusters, compressed clusters (zlib, zstd),
// extended L2 entries, external data files, backing files (qcow2 and raw, json:
// names), internal snapshots, and the bitmap directory. Images with the dirty
// or the corrupt bit are read. Encrypted images (legacy AES, LUKS) are opened
// and checked, but their guest data is refused with ErrEncrypted. Unknown
// incompatible features are refused by name.
//
// An image can name other files, its backing file and its data file, and they
// are opened unless BackingPolicy says otherwise: use BackingRefuse for images
// that come from elsewhere.
//
// No image makes this package panic, loop, or allocate more than the file has
// bytes beyond the bounds of OpenOptions. All of an Image but Close is safe
// for concurrent use.
package qcow2

package qcow2

// Limits on what an image may claim. Each is QEMU's (block/qcow2.h) unless
// the comment says otherwise, so that what QEMU opens is opened.
const (
	minClusterBits = 9
	maxClusterBits = 21

	maxRefcountOrder = 6

	maxL1Size       = 32 << 20 // bytes of one L1 table
	maxReftableSize = 8 << 20  // bytes of the refcount table

	maxSnapshots         = 65536
	maxSnapshotTableSize = 1024 * maxSnapshots // bytes
	maxSnapshotExtraData = 1024                // bytes of one entry

	maxBitmaps             = 65535
	maxBitmapDirectorySize = 1024 * maxBitmaps // bytes
	maxBitmapTableSize     = 0x8000000         // entries; block/qcow2-bitmap.c
	maxBitmapSize          = 0x20000000        // bytes of the bits of one bitmap
	maxBitmapNameSize      = 1023
	minBitmapGranularity   = 9
	maxBitmapGranularity   = 31

	maxBackingFileSize   = 1023 // bytes of the backing file name
	maxBackingFormatSize = 15   // bytes of the backing format name
	maxDataFileSize      = 4095 // bytes; this package's own: PATH_MAX

	// maxCryptoSize is this package's own: bytes of the encryption header. That
	// of LUKS takes 2 MiB, and a check counts all its clusters.
	maxCryptoSize = 16 << 20

	maxLUKSKeySize = 64 // bytes of a master key: that of AES-256-XTS

	// maxKeyWork is this package's own: hashes that PBKDF2 may take to open an
	// image, all its key slots together, counted as iterations times the
	// hashes that the length of the key needs. A slot that needs more than is
	// left is refused. It is half a minute with sha256 and two with sha512;
	// QEMU and cryptsetup choose what took themselves two seconds for a slot.
	maxKeyWork = 1 << 27

	// maxChain is this package's own: images in a backing chain.
	maxChain = 200

	// maxCheckClusters is QEMU's limit on the clusters of a file that is
	// checked (block/qcow2-refcount.c: INT_MAX).
	maxCheckClusters = 1<<31 - 1
)

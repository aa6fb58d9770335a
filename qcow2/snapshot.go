package qcow2

// Sizes of the parts of a snapshot table entry.
const (
	snapshotHeaderSize    = 40
	snapshotExtraDataSize = 24 // that is known: VM state size, disk size, icount
)

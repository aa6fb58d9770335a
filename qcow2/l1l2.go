package qcow2

import (
	"encoding/binary"
	"slices"
)

// Bits of L1 entries, L2 entries and refcount table entries.
const (
	l1EntrySize         = 8
	l2EntrySizeStandard = 8
	l2EntrySizeExtended = 16
	reftableEntrySize   = 8

	oflagCopied     = 1 << 63 // the refcount of what is pointed at is one
	oflagCompressed = 1 << 62 // L2 only: compressed cluster descriptor
	oflagZero       = 1 << 0  // L2 only: reads as zeroes; version 3, no subclusters

	l1OffsetMask   = 0x00fffffffffffe00
	l1ReservedMask = 0x7f000000000001ff
	l2OffsetMask   = 0x00fffffffffffe00
	// l2ReservedMask is for standard cluster descriptors.
	l2ReservedMask       = 0x3f000000000001fe
	reftableOffsetMask   = 0xfffffffffffffe00
	reftableReservedMask = 0x00000000000001ff

	subclustersPerCluster = 32
	// Subcluster x is allocated if bit x of the subcluster bitmap is set,
	// reads as zeroes if bit x+32 is.
	subclusterAllocMask = 1<<32 - 1

	compressedSectorSize = 512
)

// clusterType is what an L2 entry says of a cluster, before its subclusters
// are looked at.
type clusterType uint8

const (
	clusterUnallocated clusterType = iota
	clusterZeroPlain               // reads as zeroes, no host cluster
	clusterZeroAlloc               // reads as zeroes, host cluster kept
	clusterNormal
	clusterCompressed
)

// geometry is what follows from a header that parseHeader accepted.
type geometry struct {
	clusterBits  uint   // 9 to 21
	clusterSize  int64  // bytes
	l2EntrySize  int64  // 8 or 16
	l2Bits       uint   // log2 of the entries of an L2 table
	subBits      uint   // log2 of the subcluster size; clusterBits without subclusters
	extended     bool   // extended L2 entries
	dataFile     bool   // guest clusters lie in an external data file
	csizeShift   uint   // compressed descriptor: bits of the offset
	csizeMask    uint64 // compressed descriptor: mask of the additional sectors
	refcountBits uint   // 1 to 64
}

func (h *Header) geometry() geometry {
	g := geometry{
		clusterBits:  uint(h.ClusterBits),
		clusterSize:  1 << h.ClusterBits,
		l2EntrySize:  l2EntrySizeStandard,
		l2Bits:       uint(h.ClusterBits) - 3,
		subBits:      uint(h.ClusterBits),
		extended:     h.IncompatibleFeatures&IncompatExtendedL2 != 0,
		dataFile:     h.IncompatibleFeatures&IncompatDataFile != 0,
		csizeShift:   62 - (uint(h.ClusterBits) - 8),
		csizeMask:    1<<(h.ClusterBits-8) - 1,
		refcountBits: 1 << h.RefcountOrder,
	}
	if g.extended {
		g.l2EntrySize = l2EntrySizeExtended
		g.l2Bits--
		g.subBits -= 5
	}
	return g
}

// l2Coverage returns log2 of the guest bytes that one L2 table maps.
func (g *geometry) l2Coverage() uint { return g.clusterBits + g.l2Bits }

// l1Entries returns how many L1 entries map size guest bytes.
func (g *geometry) l1Entries(size uint64) uint64 {
	s := g.l2Coverage()
	n := size >> s
	if size&(1<<s-1) != 0 {
		n++
	}
	return n
}

// clusters returns how many clusters hold n bytes.
func (g *geometry) clusters(n int64) int64 {
	c := n >> g.clusterBits
	if n&(g.clusterSize-1) != 0 {
		c++
	}
	return c
}

func (g *geometry) inCluster(off uint64) uint64 { return off & uint64(g.clusterSize-1) }

// clusterType reads an L2 entry as QEMU does (block/qcow2.h,
// qcow2_get_cluster_type): with an external data file offset 0 is a place
// like any other if the copied flag is set.
func (g *geometry) clusterType(entry uint64) clusterType {
	switch {
	case entry&oflagCompressed != 0:
		return clusterCompressed
	case entry&oflagZero != 0 && !g.extended:
		if entry&l2OffsetMask != 0 {
			return clusterZeroAlloc
		}
		return clusterZeroPlain
	case entry&l2OffsetMask == 0 && !(g.dataFile && entry&oflagCopied != 0):
		return clusterUnallocated
	}
	return clusterNormal
}

// compressed splits a compressed cluster descriptor into the place of its
// first byte and the number of bytes up to the end of its last sector.
func (g *geometry) compressed(entry uint64) (off, n int64) {
	off = int64(entry & (1<<g.csizeShift - 1) & (1<<61 - 1))
	sectors := int64(entry>>g.csizeShift&g.csizeMask) + 1
	return off, sectors*compressedSectorSize - off&(compressedSectorSize-1)
}

// withCopied returns an L1 or L2 entry with the copied flag or without.
func withCopied(entry uint64, set bool) uint64 {
	if set {
		return entry | oflagCopied
	}
	return entry &^ oflagCopied
}

// entryIn returns the L2 entry at the start of b, with its subcluster bitmap.
func (g *geometry) entryIn(b []byte) (entry, bitmap uint64) {
	if g.extended {
		bitmap = binary.BigEndian.Uint64(b[8:])
	}
	return binary.BigEndian.Uint64(b), bitmap
}

// named returns what part of the image file an L2 entry names.
func (g *geometry) named(entry uint64) (kind PartKind, off, n int64) {
	switch typ := g.clusterType(entry); {
	case g.dataFile:
	case typ == clusterCompressed:
		off, n = g.compressed(entry)
		return PartCompressed, off, n
	case (typ == clusterNormal || typ == clusterZeroAlloc) && g.inCluster(entry&l2OffsetMask) != 0:
		return PartOther, int64(entry & l2OffsetMask), g.clusterSize // of no use
	case typ == clusterNormal || typ == clusterZeroAlloc:
		return PartData, int64(entry & l2OffsetMask), g.clusterSize
	}
	return 0, 0, 0
}

// appendEntries appends the entries of a table as they are stored.
func appendEntries(b []byte, entries []uint64) []byte {
	b = slices.Grow(b, 8*len(entries))
	for _, e := range entries {
		b = binary.BigEndian.AppendUint64(b, e)
	}
	return b
}

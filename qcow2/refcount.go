package qcow2

import (
	"encoding/binary"
	"math/bits"
)

// refcountEntry reads an entry of a refcount block that starts at bit shift of
// b[0]; shift is 0 unless width is below 8.
func refcountEntry(b []byte, shift, width uint) uint64 {
	switch width {
	case 64:
		return binary.BigEndian.Uint64(b)
	case 32:
		return uint64(binary.BigEndian.Uint32(b))
	case 16:
		return uint64(binary.BigEndian.Uint16(b))
	}
	return uint64(b[0]>>shift) & (1<<width - 1)
}

// refcountIn returns the refcount of a cluster from the part of its refcount
// block that checker.refcountSlice returned.
func (g *geometry) refcountIn(slice []byte, cluster int64) uint64 {
	if slice == nil {
		return 0
	}
	bit := cluster * int64(g.refcountBits) & (int64(len(slice))*8 - 1) // len is a power of two
	return refcountEntry(slice[bit/8:], uint(bit&7), g.refcountBits)
}

// blockRefcount returns entry i of a refcount block.
func blockRefcount(b []byte, width uint, i int64) uint64 {
	bit := i * int64(width)
	return refcountEntry(b[bit/8:], uint(bit&7), width)
}

// putRefcount sets entry i of a refcount block whose entries are bits wide.
func putRefcount(block []byte, bits uint, i int64, v uint64) {
	switch bits {
	case 64:
		binary.BigEndian.PutUint64(block[i*8:], v)
	case 32:
		binary.BigEndian.PutUint32(block[i*4:], uint32(v))
	case 16:
		binary.BigEndian.PutUint16(block[i*2:], uint16(v))
	case 8:
		block[i] = byte(v)
	default: // 1, 2, 4: the first entry lies in the lowest bits
		shift := uint(i) * bits & 7
		at := &block[i*int64(bits)>>3]
		*at = *at&^(byte(1<<bits-1)<<shift) | byte(v)<<shift
	}
}

// refcountsPerBlock returns how many entries a refcount block has.
func (g *geometry) refcountsPerBlock() int64 { return g.clusterSize * 8 / int64(g.refcountBits) }

// blockRefcounts returns log2 of how many entries of a width a refcount block
// has.
func blockRefcounts(g *geometry, width uint) uint {
	return g.clusterBits + 3 - uint(bits.TrailingZeros(width))
}

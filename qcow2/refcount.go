package qcow2

import "encoding/binary"

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

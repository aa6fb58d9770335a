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

// refcountChunk is the number of clusters that refcounts allocates for at
// once.
const refcountChunk = 1 << 16

// refcounts counts references to clusters. Only chunks of clusters that have
// references take memory.
type refcounts struct {
	chunks [][]uint32
	n      int64 // clusters
	max    uint64
}

func newRefcounts(n int64, width uint) *refcounts {
	// More than 2^32-1 references are not counted, whatever the width.
	r := &refcounts{max: min(^uint64(0)>>(64-width), 1<<32-1)}
	r.grow(n)
	return r
}

func (r *refcounts) grow(n int64) {
	if n <= r.n {
		return
	}
	r.n = n
	chunks := (n + refcountChunk - 1) / refcountChunk // at most maxCheckClusters/refcountChunk+1
	r.chunks = append(r.chunks, make([][]uint32, int(chunks)-len(r.chunks))...)
}

func (r *refcounts) get(cluster int64) uint64 {
	c := r.chunks[cluster/refcountChunk]
	if c == nil {
		return 0
	}
	return uint64(c[cluster%refcountChunk])
}

// add adds k references and returns how many of them did not fit.
func (r *refcounts) add(cluster int64, k uint64) (over uint64) {
	c := &r.chunks[cluster/refcountChunk]
	if *c == nil {
		*c = make([]uint32, refcountChunk)
	}
	p := &(*c)[cluster%refcountChunk]
	sum := uint64(*p) + k
	if sum > r.max {
		over, sum = sum-r.max, r.max
	}
	*p = uint32(sum)
	return over
}

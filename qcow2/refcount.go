package qcow2

import (
	"encoding/binary"
	"fmt"
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
// block that refcountSlice returned.
func (g *geometry) refcountIn(slice []byte, cluster int64) uint64 {
	if slice == nil {
		return 0
	}
	bit := cluster * int64(g.refcountBits) & (int64(len(slice))*8 - 1) // len is a power of two
	return refcountEntry(slice[bit/8:], uint(bit&7), g.refcountBits)
}

// refcountSlice returns the part of a refcount block that holds the refcount
// of a cluster, as long as sliceSize, or nil if they are all 0. table is the
// refcount table as far as the file goes.
func (im *Image) refcountSlice(table []byte, cluster int64) ([]byte, error) {
	g := &im.geo
	perBlock := g.clusterBits + 3 - uint(bits.Len(g.refcountBits)-1) // log2
	i := cluster >> perBlock
	if i >= int64(len(table)/reftableEntrySize) {
		return nil, nil
	}
	block := binary.BigEndian.Uint64(table[i*reftableEntrySize:]) & reftableOffsetMask
	if g.inCluster(block) != 0 {
		return nil, &FormatError{"refcount table entry", int64(im.header.RefcountTableOffset) + i*reftableEntrySize,
			"refcount block offset", fmt.Sprintf("%#x not aligned to %#x", block, g.clusterSize), ErrCorrupt}
	}
	if block == 0 || block >= uint64(im.dev.Size()) {
		return nil, nil
	}
	inBlock := (cluster & (1<<perBlock - 1)) * int64(g.refcountBits) / 8
	b, err := im.slice(int64(block) + inBlock&^(im.sliceSize()-1))
	if err != nil {
		return nil, fmt.Errorf("qcow2: refcount block at %#x: %w", block, err)
	}
	return b, nil
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

// empty reports whether no cluster of the chunk of cluster has references.
func (r *refcounts) empty(cluster int64) bool { return r.chunks[cluster/refcountChunk] == nil }

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

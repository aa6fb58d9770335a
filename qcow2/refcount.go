package qcow2

import (
	"cmp"
	"encoding/binary"
	"math"
	"slices"
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

// refcountChunk is the number of clusters of a refcounts chunk.
const refcountChunk = 4096

// refcounts counts references to clusters. Its memory follows the references,
// not the clusters: a chunk of clusters holds 8 bytes for each cluster that has
// any, or 1 byte for each cluster, or 4 where counts above 255 are many,
// whichever is less.
type refcounts struct {
	chunks []countChunk
	n      int64 // clusters
	max    uint64
}

// countChunk has one of three forms. sparse becomes small or wide when it takes
// as much memory as that.
type countChunk struct {
	sparse []uint64 // place in the chunk << 32 | count, ascending
	small  *[refcountChunk]uint8
	wide   *[refcountChunk]uint32
	above  bool // a count is above 255: small will not do
}

func newRefcounts(n int64, width uint) *refcounts {
	// More than 2^32-1 references are not counted, whatever the width.
	r := &refcounts{max: min(^uint64(0)>>(64-width), math.MaxUint32)}
	r.grow(n)
	return r
}

func (r *refcounts) grow(n int64) {
	if n <= r.n {
		return
	}
	r.n = n
	chunks := (n + refcountChunk - 1) / refcountChunk // at most maxCheckClusters/refcountChunk+1
	r.chunks = append(r.chunks, make([]countChunk, int(chunks)-len(r.chunks))...)
}

// empty reports whether no cluster of the chunk of cluster has references.
func (r *refcounts) empty(cluster int64) bool {
	c := &r.chunks[cluster/refcountChunk]
	return c.sparse == nil && c.small == nil && c.wide == nil
}

// add adds k references and returns how many of them did not fit.
func (r *refcounts) add(cluster int64, k uint64) (over uint64) {
	c, i := &r.chunks[cluster/refcountChunk], cluster%refcountChunk
	if c.small != nil { // the usual case
		if sum := uint64(c.small[i]) + k; sum <= min(r.max, math.MaxUint8) {
			c.small[i] = uint8(sum)
			return 0
		}
	}
	sum := c.get(i) + k
	if sum > r.max {
		over, sum = sum-r.max, r.max
	}
	if sum > 0 {
		c.set(i, uint32(sum))
	}
	return over
}

func (r *refcounts) get(cluster int64) uint64 {
	return r.chunks[cluster/refcountChunk].get(cluster % refcountChunk)
}

// chunk returns the counts of the chunk of cluster, in buf.
func (r *refcounts) chunk(cluster int64, buf *[refcountChunk]uint32) {
	c := &r.chunks[cluster/refcountChunk]
	switch {
	case c.wide != nil:
		*buf = *c.wide
	case c.small != nil:
		for i, count := range c.small {
			buf[i] = uint32(count)
		}
	default:
		clear(buf[:])
		for _, x := range c.sparse {
			buf[x>>32] = uint32(x)
		}
	}
}

func (c *countChunk) get(i int64) uint64 {
	switch {
	case c.small != nil:
		return uint64(c.small[i])
	case c.wide != nil:
		return uint64(c.wide[i])
	}
	if at, ok := c.find(i); ok {
		return c.sparse[at] & math.MaxUint32
	}
	return 0
}

// find returns where in sparse the count of cluster i is, or would be.
func (c *countChunk) find(i int64) (int, bool) {
	if n := len(c.sparse); n == 0 || c.sparse[n-1]>>32 < uint64(i) { // clusters come in order mostly
		return n, false
	}
	return slices.BinarySearchFunc(c.sparse, uint64(i), func(x, i uint64) int { return cmp.Compare(x>>32, i) })
}

func (c *countChunk) set(i int64, count uint32) {
	c.above = c.above || count > math.MaxUint8
	switch {
	case c.wide != nil:
		c.wide[i] = count
	case c.small != nil && !c.above:
		c.small[i] = uint8(count)
	default:
		if c.small != nil {
			for j, n := range c.small {
				if n > 0 {
					c.sparse = append(c.sparse, uint64(j)<<32|uint64(n))
				}
			}
			c.small = nil
		}
		at, ok := c.find(i)
		if !ok {
			c.sparse = slices.Insert(c.sparse, at, uint64(i)<<32)
		}
		c.sparse[at] = uint64(i)<<32 | uint64(count)
		c.shrink()
	}
}

// shrink gives up the sparse form where another takes less memory.
func (c *countChunk) shrink() {
	switch {
	case !c.above && len(c.sparse) > refcountChunk/8:
		c.small = new([refcountChunk]uint8)
		for _, x := range c.sparse {
			c.small[x>>32] = uint8(x)
		}
	case len(c.sparse) > refcountChunk/2:
		c.wide = new([refcountChunk]uint32)
		for _, x := range c.sparse {
			c.wide[x>>32] = uint32(x)
		}
	default:
		return
	}
	c.sparse = nil
}

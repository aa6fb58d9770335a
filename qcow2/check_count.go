package qcow2

import (
	"cmp"
	"math"
	"math/bits"
	"slices"
)

// refcountChunk is the number of clusters of a refcounts chunk.
const refcountChunk = 4096

// mark tells what an entry of an active L2 table says of its cluster.
type mark uint8

const (
	markCopied mark = 1 << iota // an entry has the copied flag
	markPlain                   // an entry does not
)

// bitmask has a bit for each cluster of a chunk.
type bitmask [refcountChunk / 64]uint64

func (m *bitmask) has(i int64) bool { return m[i/64]>>(i%64)&1 != 0 }

// words calls f with each word that a range lies in, and the bits of the range.
func (m *bitmask) words(start, end int64, f func(w *uint64, bits uint64)) {
	for i := start; i < end; {
		n := min(64-i%64, end-i)
		f(&m[i/64], (^uint64(0)>>(64-n))<<(i%64))
		i += n
	}
}

func (m *bitmask) set(start, end int64) {
	m.words(start, end, func(w *uint64, bits uint64) { *w |= bits })
}

func (m *bitmask) any(start, end int64) (found bool) {
	m.words(start, end, func(w *uint64, bits uint64) { found = found || *w&bits != 0 })
	return found
}

func (m *bitmask) all(start, end int64) bool {
	missing := uint64(0)
	m.words(start, end, func(w *uint64, bits uint64) { missing |= bits &^ *w })
	return missing == 0
}

// refcounts counts references to clusters. Its memory follows the references,
// not the clusters: a chunk of clusters holds 8 bytes for each cluster that has
// any, or 3 bits for each cluster, or 10 bits where counts above 1 are many,
// or 34 where counts above 255 are, whichever is less.
type refcounts struct {
	chunks []countChunk
	n      int64 // clusters
	max    uint64
}

// countChunk has one of four forms. sparse becomes another when it takes as
// much memory as that.
type countChunk struct {
	sparse []uint64 // place in the chunk << 34 | marks << 32 | count, ascending
	dense  *denseMarks
	ones   *bitmask // the count is 1
	small  *[refcountChunk]uint8
	wide   *[refcountChunk]uint32
	most   uint32 // the largest count
}

// denseMarks are the marks of a chunk that is not sparse.
type denseMarks struct{ copied, plain bitmask }

func (d *denseMarks) set(start, end int64, m mark) {
	if m&markCopied != 0 {
		d.copied.set(start, end)
	}
	if m&markPlain != 0 {
		d.plain.set(start, end)
	}
}

func (d *denseMarks) get(i int64) (m mark) {
	if d.copied.has(i) {
		m |= markCopied
	}
	if d.plain.has(i) {
		m |= markPlain
	}
	return m
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
	return c.sparse == nil && c.dense == nil
}

// add adds k references and returns how many of them are more than a refcount
// holds.
func (r *refcounts) add(cluster int64, k uint64, m mark) (over uint64) {
	c, i := &r.chunks[cluster/refcountChunk], cluster%refcountChunk
	if c.small != nil { // the usual case
		if sum := uint64(c.small[i]) + k; sum <= min(r.max, math.MaxUint8) {
			c.small[i] = uint8(sum)
			c.most = max(c.most, uint32(sum))
			c.dense.set(i, i+1, m)
			return 0
		}
	}
	count, marks := c.get(i)
	sum := count + k
	if sum > r.max {
		over = sum - max(r.max, count)
	}
	if sum = min(sum, math.MaxUint32); sum > 0 {
		c.set(i, uint32(sum), marks|m)
	}
	return over
}

// addRun adds k references to each of n clusters. It calls over for those whose
// refcount is too small, in order.
func (r *refcounts) addRun(cluster, n int64, k uint64, m mark, over func(cluster int64, n uint64)) {
	for end := cluster + n; cluster < end; {
		c, i := &r.chunks[cluster/refcountChunk], cluster%refcountChunk
		part := min(refcountChunk-i, end-cluster)
		if k == 1 && part > maxSparseOnes && c.sparse == nil && c.dense == nil {
			c.dense, c.ones = new(denseMarks), new(bitmask)
		}
		if k == 1 && c.ones != nil && !c.ones.any(i, i+part) {
			c.ones.set(i, i+part)
			c.dense.set(i, i+part, m)
			c.most = 1
		} else {
			for j := cluster; j < cluster+part; j++ {
				if n := r.add(j, k, m); n > 0 {
					over(j, n)
				}
			}
		}
		cluster += part
	}
}

// get returns the count of a cluster as its refcount should be.
func (r *refcounts) get(cluster int64) uint64 { return min(r.raw(cluster), r.max) }

// raw returns the count of a cluster, which can be more than a refcount holds.
func (r *refcounts) raw(cluster int64) uint64 {
	count, _ := r.chunks[cluster/refcountChunk].get(cluster % refcountChunk)
	return count
}

// put makes count the count of a cluster.
func (r *refcounts) put(cluster int64, count uint64) {
	c, i := &r.chunks[cluster/refcountChunk], cluster%refcountChunk
	if old, marks := c.get(i); old != count {
		c.set(i, uint32(min(count, math.MaxUint32)), marks)
	}
}

// chunkCounts are the counts and marks of a chunk.
type chunkCounts struct {
	count [refcountChunk]uint32
	denseMarks
}

// chunk fills buf with the chunk of cluster.
func (r *refcounts) chunk(cluster int64, buf *chunkCounts) {
	c := &r.chunks[cluster/refcountChunk]
	if c.dense != nil {
		buf.denseMarks = *c.dense
	} else {
		buf.denseMarks = denseMarks{}
	}
	limit := uint32(r.max) // at most math.MaxUint32
	switch {
	case c.wide != nil:
		for i, count := range c.wide {
			buf.count[i] = min(count, limit)
		}
	case c.small != nil:
		for i, count := range c.small {
			buf.count[i] = min(uint32(count), limit)
		}
	case c.ones != nil:
		for i := range buf.count {
			buf.count[i] = uint32(c.ones[i/64] >> (i % 64) & 1)
		}
	default:
		clear(buf.count[:])
		for _, x := range c.sparse {
			i := x >> 34
			buf.count[i] = min(uint32(x), limit)
			buf.set(int64(i), int64(i)+1, mark(x>>32)&3)
		}
	}
}

// plain reports whether all of n clusters have the count 1, and a copied flag
// where an active table refers to them: what a good image has most of.
func (r *refcounts) plain(cluster, n int64) bool {
	c, i := &r.chunks[cluster/refcountChunk], cluster%refcountChunk
	return c.ones != nil && c.ones.all(i, i+n) && !c.dense.plain.any(i, i+n)
}

// next returns the first cluster from cluster on that has references; n if
// there is none.
func (r *refcounts) next(cluster int64) int64 {
	for cluster < r.n {
		c, i := &r.chunks[cluster/refcountChunk], cluster%refcountChunk
		switch {
		case c.dense == nil:
			at, _ := c.find(i)
			for ; at < len(c.sparse); at++ {
				if uint32(c.sparse[at]) != 0 {
					return cluster - i + int64(c.sparse[at]>>34)
				}
			}
		case c.ones != nil:
			for ; i < refcountChunk; i = (i | 63) + 1 {
				if w := c.ones[i/64] >> (i % 64); w != 0 {
					return cluster&^(refcountChunk-1) + i + int64(bits.TrailingZeros64(w))
				}
			}
		default:
			for ; i < refcountChunk; i++ {
				if n, _ := c.get(i); n != 0 {
					return cluster&^(refcountChunk-1) + i
				}
			}
		}
		cluster = cluster&^(refcountChunk-1) + refcountChunk
	}
	return r.n
}

// end returns one past the last cluster that has references.
func (r *refcounts) end() int64 {
	for i := r.n; i > 0; i-- {
		if chunk := (i - 1) &^ (refcountChunk - 1); r.empty(i - 1) {
			i = chunk + 1
		} else if r.raw(i-1) != 0 {
			return i
		}
	}
	return 0
}

func (c *countChunk) get(i int64) (uint64, mark) {
	switch {
	case c.ones != nil:
		return c.ones[i/64] >> (i % 64) & 1, c.dense.get(i)
	case c.small != nil:
		return uint64(c.small[i]), c.dense.get(i)
	case c.wide != nil:
		return uint64(c.wide[i]), c.dense.get(i)
	}
	if at, ok := c.find(i); ok {
		return c.sparse[at] & math.MaxUint32, mark(c.sparse[at]>>32) & 3
	}
	return 0, 0
}

// find returns where in sparse the count of cluster i is, or would be.
func (c *countChunk) find(i int64) (int, bool) {
	if n := len(c.sparse); n == 0 || c.sparse[n-1]>>34 < uint64(i) { // clusters come in order mostly
		return n, false
	}
	return slices.BinarySearchFunc(c.sparse, uint64(i), func(x, i uint64) int { return cmp.Compare(x>>34, i) })
}

func (c *countChunk) set(i int64, count uint32, m mark) {
	c.most = max(c.most, count)
	if c.dense != nil {
		c.dense.set(i, i+1, m)
	}
	switch {
	case c.wide != nil:
		c.wide[i] = count
	case c.small != nil && c.most <= math.MaxUint8:
		c.small[i] = uint8(count)
	case c.ones != nil && c.most <= 1:
		if count == 1 {
			c.ones.set(i, i+1)
		} else {
			c.ones[i/64] &^= 1 << (i % 64)
		}
	default:
		c.loosen()
		at, ok := c.find(i)
		if !ok {
			c.sparse = slices.Insert(c.sparse, at, 0)
		}
		c.sparse[at] = uint64(i)<<34 | uint64(m)<<32 | uint64(count)
		c.shrink()
	}
}

// loosen makes the form sparse, as that of ones or small will not do any more.
func (c *countChunk) loosen() {
	if c.dense == nil {
		return
	}
	var list []uint64
	for i := range int64(refcountChunk) {
		if count, m := c.get(i); count != 0 || m != 0 {
			list = append(list, uint64(i)<<34|uint64(m)<<32|count)
		}
	}
	c.sparse, c.dense, c.ones, c.small = list, nil, nil, nil
}

// How many clusters a chunk has at most in the sparse form, by the largest
// count: it takes less memory than the other up to there.
const (
	maxSparseOnes  = refcountChunk * 3 / 8 / 8
	maxSparseSmall = refcountChunk * 10 / 8 / 8
	maxSparseWide  = refcountChunk * 34 / 8 / 8
)

// shrink gives up the sparse form where another takes less memory.
func (c *countChunk) shrink() {
	switch n := len(c.sparse); {
	case c.most <= 1 && n > maxSparseOnes:
		c.ones = new(bitmask)
	case c.most <= math.MaxUint8 && n > maxSparseSmall:
		c.small = new([refcountChunk]uint8)
	case n > maxSparseWide:
		c.wide = new([refcountChunk]uint32)
	default:
		return
	}
	c.dense = new(denseMarks)
	for _, x := range c.sparse {
		i, count := int64(x>>34), uint32(x)
		c.dense.set(i, i+1, mark(x>>32)&3)
		switch {
		case c.wide != nil:
			c.wide[i] = count
		case c.small != nil:
			c.small[i] = uint8(count)
		case count == 1:
			c.ones.set(i, i+1)
		}
	}
	c.sparse = nil
}

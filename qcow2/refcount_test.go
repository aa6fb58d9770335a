package qcow2

import (
	"math"
	"math/rand/v2"
	"runtime"
	"testing"
)

// TestRefcounts: all forms of a chunk count as a map does.
func TestRefcounts(t *testing.T) {
	const n = 5 * refcountChunk
	rng := rand.New(rand.NewPCG(1, 2))
	for _, c := range []struct {
		name    string
		width   uint
		adds    int
		largest uint64 // of what is added at once
	}{
		{"few", 16, 300, 3},
		{"many", 16, 30000, 3},
		{"few and large", 16, 300, 1000},
		{"many and large", 16, 30000, 1000},
		{"width 1", 1, 10000, 2},
		{"width 64", 64, 10000, math.MaxUint32},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, want, max := newRefcounts(n-7, c.width), map[int64]uint64{}, min(uint64(math.MaxUint32), 1<<c.width-1)
			if c.width == 64 {
				max = math.MaxUint32
			}
			r.grow(n)
			for i := range c.adds {
				cluster, k := rng.Int64N(n-refcountChunk), 1+rng.Uint64N(c.largest)
				if i < c.adds/2 {
					k = 1 // the large ones come when there is a form already
				}
				over := r.add(cluster, k, 0)
				want[cluster] += k
				if x := want[cluster]; x > max && over != x-max || x <= max && over != 0 {
					t.Fatalf("%d of %d did not fit", over, x)
				}
				want[cluster] = min(want[cluster], max)
			}
			var buf chunkCounts
			for i := range int64(n) {
				if i%refcountChunk == 0 {
					r.chunk(i, &buf)
				}
				if r.get(i) != want[i] || uint64(buf.count[i%refcountChunk]) != want[i] {
					t.Fatalf("cluster %d: %d and %d, expected %d", i, r.get(i), buf.count[i%refcountChunk], want[i])
				}
			}
			if !r.empty(n-1) || r.empty(0) {
				t.Error("the wrong chunks are empty")
			}
			for i, x := range r.chunks {
				forms := 0
				for _, has := range []bool{x.sparse != nil, x.ones != nil, x.small != nil, x.wide != nil} {
					if has {
						forms++
					}
				}
				if forms > 1 {
					t.Errorf("chunk %d has %d forms", i, forms)
				}
			}
		})
	}
}

// TestRefcountsMemory: references far apart cost as many bytes as the tables
// that name them times four, those in a row a byte.
func TestRefcountsMemory(t *testing.T) {
	heap := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	const n = 1 << 20
	for _, c := range []struct {
		name    string
		n, step int64
		k       uint64
		limit   int64
	}{
		{"far", maxCheckClusters, maxCheckClusters / n, 1, 64<<20 + 4*8*n},
		{"far and many times", maxCheckClusters, maxCheckClusters / n, 300, 64<<20 + 4*8*n},
		{"in a row", n, 1, 1, n * 5 / 4},
		{"every other", 2 * n, 2, 1, 2 * n * 5 / 4},
	} {
		before := heap()
		r := newRefcounts(c.n, 16)
		for i := range int64(n) {
			r.add(i*c.step, c.k, 0)
		}
		if got := heap() - before; got > c.limit {
			t.Errorf("%s: %d bytes, expected at most %d", c.name, got, c.limit)
		}
		runtime.KeepAlive(r)
	}
}

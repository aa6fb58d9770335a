package qcow2

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"qimg/qcow2/blockdev/oracle"
)

// allocModel is what an allocator has to say: the refcounts of the clusters
// that the test has.
type allocModel struct {
	t    *testing.T
	im   *Image
	rand *rand.Rand
	refs map[int64]uint64 // now
	old  map[int64]uint64 // in the state on disk while a transaction goes on; nil otherwise
	from int64            // no cluster above it was handed out
}

// pick returns a cluster that the test has, or -1.
func (m *allocModel) pick() int64 {
	list := make([]int64, 0, len(m.refs))
	for c := range m.refs {
		list = append(list, c)
	}
	if len(list) == 0 {
		return -1
	}
	slices.Sort(list)
	return list[m.rand.IntN(len(list))]
}

// take notes clusters that were handed out, which nobody may have.
func (m *allocModel) take(first, n int64) {
	m.t.Helper()
	for c := first; c < first+n; c++ {
		if m.refs[c] != 0 || m.old[c] != 0 {
			m.t.Fatalf("cluster %d is handed out, its refcount is %d, on disk %d", c, m.refs[c], m.old[c])
		}
		if m.im.w.tables.hit(c, c+1) >= 0 {
			m.t.Fatalf("cluster %d is handed out, a table lies in it", c)
		}
		m.refs[c] = 1
	}
	m.from = max(m.from, first+n)
}

// add changes a refcount, and reports whether it can be changed so.
func (m *allocModel) add(c int64, delta int, add func(c int64, delta int) error) bool {
	m.t.Helper()
	n := m.refs[c]
	err := add(c, delta)
	if delta > 0 && n == m.im.w.alloc.maxRefcount() {
		if !errors.Is(err, ErrLimit) {
			m.t.Fatalf("refcount of cluster %d goes beyond %d: %v", c, n, err)
		}
		return false
	}
	if err != nil {
		m.t.Fatalf("cluster %d with refcount %d, %+d: %v", c, n, delta, err)
	}
	if m.refs[c] += uint64(int64(delta)); m.refs[c] == 0 {
		delete(m.refs, c)
	}
	return true
}

// compare looks at every refcount that the test knows, and at free clusters.
func (m *allocModel) compare(get func(c int64) (uint64, error)) {
	m.t.Helper()
	for c, want := range m.refs {
		if n, err := get(c); n != want || err != nil {
			m.t.Fatalf("refcount of cluster %d is %d, %v, expected %d", c, n, err, want)
		}
	}
}

// onDisk compares with an allocator that reads the image anew, and with what
// a check counts: what the test has nobody refers to.
func (m *allocModel) onDisk() {
	m.t.Helper()
	im, err := New(m.im.dev, nil)
	if err != nil {
		m.t.Fatal(err)
	}
	a, err := newAllocator(m.im.w.dev, &im.header, &im.geo)
	if err != nil {
		m.t.Fatal(err)
	}
	m.compare(a.get)
	res, err := im.Check(m.t.Context(), nil)
	if err != nil || res.Corruptions != 0 || res.Leaks != int64(len(m.refs)) {
		m.t.Fatalf("check: %d corruptions, %d leaks, %v, expected %d leaks", res.Corruptions, res.Leaks, err, len(m.refs))
	}
}

// jump lets the search for free clusters go on elsewhere, so that few clusters
// need many refcount blocks.
func (m *allocModel) jump() {
	blocks := int64(200) // more than a table of a cluster of 512 bytes has
	if m.im.geo.clusterSize > 2048 {
		blocks = 10 // more than are kept of 2 MiB
	}
	m.im.w.alloc.cursor = m.rand.Int64N(min(blocks<<m.im.w.alloc.perBlock(), 1<<40>>m.im.geo.clusterBits))
}

// step does something at random.
func (m *allocModel) step(steps int) {
	a := m.im.w.alloc
	n := 1 + m.rand.Int64N(6)
	switch m.rand.IntN(8) {
	case 0:
		m.jump()
	case 1, 2, 3:
		least := 1 + m.rand.Int64N(n)
		first, got, err := a.alloc(least, n)
		if err != nil || got < least || got > n {
			m.t.Fatalf("%d to %d clusters: %d, %v", least, n, got, err)
		}
		m.im.w.unsynced = true
		m.take(first, got)
	case 4, 5:
		if c := m.pick(); c >= 0 {
			m.add(c, 1-2*m.rand.IntN(2), a.add)
			m.im.w.unsynced = true
		}
	case 6:
		if err := m.im.flush(); err != nil {
			m.t.Fatal(err)
		}
		m.onDisk()
	case 7:
		m.transaction(1 + m.rand.IntN(steps))
	}
}

func (m *allocModel) transaction(steps int) {
	t, err := m.im.begin(m.t.Context())
	if err != nil {
		m.t.Fatal(err)
	}
	defer t.abort()
	size := m.im.geo.clusterSize
	m.old = map[int64]uint64{}
	for c, n := range m.refs {
		m.old[c] = n
	}
	whole := true
	for i := 0; whole && i < steps; i++ {
		n := 1 + m.rand.Int64N(6)
		switch m.rand.IntN(4) {
		case 0:
			m.jump()
		case 1, 2:
			off, err := t.alloc(n * size)
			if err != nil {
				m.t.Fatal(err)
			}
			m.take(off/size, n)
		case 3:
			if c := m.pick(); c >= 0 {
				// What has failed cannot be committed.
				whole = m.add(c, 1-2*m.rand.IntN(2), func(c int64, delta int) error { return t.addRef(c*size, size, delta) })
			}
		}
	}
	if whole {
		m.compare(t.refcount)
	}
	if whole && m.rand.IntN(3) > 0 {
		if err := t.commit(); err != nil {
			m.t.Fatal(err)
		}
	} else {
		m.refs = m.old
		t.abort()
	}
	m.old = nil
	m.compare(m.im.w.alloc.get)
	m.onDisk()
}

// TestAllocatorModel runs the allocator beside a map of refcounts: it hands out
// nothing that anybody has, in either state of a transaction, and counts as
// the map does, in memory and on disk.
func TestAllocatorModel(t *testing.T) {
	for cluster := int64(512); cluster <= 2<<20; cluster *= 2 {
		for width := 1; width <= 64; width *= 2 {
			t.Run(fmt.Sprintf("%d-%d", cluster, width), func(t *testing.T) {
				if oracle.SlowBuild && (width*int(cluster>>9))%9 != 1 || testing.Short() && (width*int(cluster>>9))%3 != 1 {
					t.Skip("only some of them in a short run")
				}
				im, d := newWritable(t, 1<<20, FormatOptions{ClusterSize: cluster, RefcountBits: width})
				defer im.Close()
				seed := uint64(cluster)*100 + uint64(width)
				m := &allocModel{t: t, im: im, rand: rand.New(rand.NewPCG(seed, 1)), refs: map[int64]uint64{}}
				for range 40 {
					m.step(20)
				}
				if err := im.flush(); err != nil {
					t.Fatal(err)
				}
				m.onDisk()
				t.Logf("seed %d: %d clusters of %d, refcount table of %d clusters", seed, len(m.refs), d.Size()/cluster, im.header.RefcountTableClusters)
			})
		}
	}
}

package qcow2_test

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/oracle"
)

// guestModel is an image and what its guest has to read.
type guestModel struct {
	t    *testing.T
	rand *rand.Rand
	dev  *blockdev.Memory
	open qcow2.OpenOptions
	im   *qcow2.Image
	want []byte
	c    int64 // cluster size
	// snapshots are what they hold, by name; at most as many as can be counted.
	snapshots map[string][]byte
	most      int
}

// span returns a range of the guest: small or of several clusters, aligned or not.
func (m *guestModel) span() (off, n int64) {
	size := int64(len(m.want))
	n = 1 + m.rand.Int64N([]int64{600, m.c, 4 * m.c, 20 * m.c}[m.rand.IntN(4)])
	n = min(n, size, 1<<20)
	off = m.rand.Int64N(size - n + 1)
	switch m.rand.IntN(4) {
	case 0: // clusters
		off = off / m.c * m.c
		n = min((n+m.c-1)/m.c*m.c, size-off)
	case 1: // sectors
		off = off / 512 * 512
		n = min((n+511)/512*512, size-off)
	case 2: // up to the end
		off = size - n
	}
	return off, n
}

func (m *guestModel) reopen() {
	m.t.Helper()
	if m.im != nil {
		if err := m.im.Close(); err != nil {
			m.t.Fatal(err)
		}
	}
	opts := m.open
	opts.Write = true
	var err error
	if m.im, err = qcow2.New(m.dev, &opts); err != nil {
		m.t.Fatal(err)
	}
}

// step changes something at random.
func (m *guestModel) step() {
	m.t.Helper()
	off, n := m.span()
	p := m.want[off : off+n]
	switch m.rand.IntN(11) {
	case 0, 1, 2, 3:
		if m.rand.IntN(5) == 0 {
			clear(p)
		} else {
			var seed [32]byte
			seed[0], seed[1], seed[2] = byte(m.rand.Uint32()), byte(m.rand.Uint32()), byte(m.rand.Uint32())
			rand.NewChaCha8(seed).Read(p)
		}
		if w, err := m.im.WriteAt(p, off); int64(w) != n || err != nil {
			m.t.Fatalf("write %d+%d: %d, %v", off, n, w, err)
		}
	case 4, 5:
		zero := m.im.WriteZeroes
		if m.rand.IntN(2) == 0 {
			zero = m.im.Clear
		}
		if err := zero(off, n); err != nil {
			m.t.Fatalf("zero %d+%d: %v", off, n, err)
		}
		clear(p)
	case 6, 7:
		if err := m.im.Discard(off, n); err != nil {
			m.t.Fatalf("discard %d+%d: %v", off, n, err)
		}
		// What it makes zeroes is the image's to say, cluster by cluster.
		got := make([]byte, n)
		m.read(got, off)
		for i := int64(0); i < n; {
			end := min((off+i)/m.c*m.c+m.c-off, n)
			if zero := make([]byte, end-i); bytes.Equal(got[i:end], zero) {
				copy(p[i:end], zero)
			}
			i = end
		}
		if !bytes.Equal(got, p) {
			m.t.Fatalf("discard %d+%d has left other bytes", off, n)
		}
	case 8:
		if err := m.im.Sync(); err != nil {
			m.t.Fatal(err)
		}
	case 9:
		got := make([]byte, n)
		m.read(got, off)
		if !bytes.Equal(got, p) {
			m.t.Fatalf("read %d+%d differs", off, n)
		}
	case 10:
		if m.most > 0 {
			m.snapshot()
		}
	}
}

// snapshot makes, applies or deletes a snapshot.
func (m *guestModel) snapshot() {
	m.t.Helper()
	ctx, name := m.t.Context(), fmt.Sprintf("s%d", m.rand.IntN(m.most))
	content, exists := m.snapshots[name]
	var err error
	switch {
	case !exists:
		_, err = m.im.CreateSnapshot(ctx, name, nil)
		m.snapshots[name] = bytes.Clone(m.want)
	case m.rand.IntN(2) == 0:
		err = m.im.ApplySnapshot(ctx, name)
		m.want = bytes.Clone(content)
	default:
		err = m.im.DeleteSnapshot(ctx, name)
		delete(m.snapshots, name)
	}
	if err != nil {
		m.t.Fatalf("snapshot %s, there %v: %v", name, exists, err)
	}
}

func (m *guestModel) read(p []byte, off int64) {
	m.t.Helper()
	if n, err := m.im.ReadAt(p, off); n != len(p) || err != nil && err != io.EOF {
		m.t.Fatalf("read %d+%d: %d, %v", off, len(p), n, err)
	}
}

// check compares all of the guest, and all refcounts with what is referred to.
func (m *guestModel) check() {
	m.t.Helper()
	res, err := m.im.Check(m.t.Context(), &qcow2.CheckOptions{Found: func(f qcow2.Finding) { m.t.Errorf("check: %v", f) }})
	if err != nil || m.t.Failed() {
		m.t.Fatalf("check: %+v, %v", res, err)
	}
	got := make([]byte, len(m.want))
	m.read(got, 0)
	if i := firstDifference(got, m.want); i >= 0 {
		m.t.Fatalf("guest byte %d is %#x, expected %#x", i, got[i], m.want[i])
	}
	for name, content := range m.snapshots {
		opts := m.open
		opts.Snapshot = name
		sn, err := qcow2.New(m.dev, &opts)
		if err != nil {
			m.t.Fatal(err)
		}
		if i := firstDifference(bytesOf(m.t, sn), content); i >= 0 {
			m.t.Fatalf("byte %d of snapshot %s differs", i, name)
		}
		sn.Close()
	}
}

func firstDifference(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	i := 0
	for i < len(a) && i < len(b) && a[i] == b[i] {
		i++
	}
	return i
}

// TestEngineModel runs random changes beside an array of bytes, with every
// cluster size and refcount width, and checks, and opens anew, now and then.
func TestEngineModel(t *testing.T) {
	base := filepath.Join(t.TempDir(), "base.raw")
	for cluster := int64(512); cluster <= 2<<20; cluster *= 2 {
		for width := 1; width <= 64; width *= 2 {
			if oracle.SlowBuild && (width*int(cluster>>9))%9 != 1 || testing.Short() && (width*int(cluster>>9))%3 != 1 {
				continue
			}
			t.Run(fmt.Sprintf("%d-%d", cluster, width), func(t *testing.T) {
				seed := uint64(cluster)*100 + uint64(width)
				m := &guestModel{t: t, rand: rand.New(rand.NewPCG(seed, 2)), dev: blockdev.NewMemory(0), c: cluster, snapshots: map[string][]byte{}}
				// One reference is needed in between, to apply a snapshot.
				m.most = max(0, min(1<<min(width, 4)-3, 4))
				size := 512 * (3 + m.rand.Int64N(min(80*cluster, 6<<20)/512))
				m.want = make([]byte, size)
				o := qcow2.FormatOptions{ClusterSize: cluster, RefcountBits: width}
				if width == 16 && m.rand.IntN(2) == 0 {
					o.Version = 2
				}
				o.ExtendedL2 = o.Version == 0 && cluster >= 16<<10 && m.rand.IntN(2) == 0
				o.LazyRefcounts = o.Version == 0 && m.rand.IntN(4) == 0
				if m.rand.IntN(2) == 0 {
					below := noise(byte(width), int(m.rand.Int64N(size)))
					copy(m.want, below)
					if err := os.WriteFile(base, below, 0o600); err != nil {
						t.Fatal(err)
					}
					o.BackingFile, o.BackingFormat = base, "raw"
					m.open.Backing = qcow2.BackingFollow
				}
				if m.rand.IntN(2) == 0 {
					m.open.CacheSize = 1 // as little as there can be
				}
				if err := qcow2.Create(t.Context(), m.dev, size, &qcow2.CreateOptions{FormatOptions: o}); err != nil {
					t.Fatal(err)
				}
				t.Logf("seed %d, %d bytes, %+v", seed, size, o)
				for range 6 {
					m.reopen()
					for range 20 {
						m.step()
					}
					m.check()
				}
				m.reopen()
				m.check()
				if err := m.im.Close(); err != nil {
					t.Fatal(err)
				}
			})
		}
	}
}

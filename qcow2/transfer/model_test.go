package transfer_test

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/transfer"
)

// modelDisk is a disk of random extents of all kinds.
type modelDisk struct {
	content []byte
	extents []blockdev.Extent
	// unit is how much at most is read of an extent that reads as zeroes, as it
	// shares a unit of the target with another; 0: such a read is an error.
	unit  int64
	holes atomic.Int64 // bytes that were read against that
}

// newModelDisk makes one whose extents begin at multiples of align. Some of the
// data is zeroes.
func newModelDisk(r *rand.Rand, size, align int64) *modelDisk {
	m := &modelDisk{content: make([]byte, size)}
	for off := int64(0); off < size; {
		n := align * (1 + r.Int64N(max(1, 256<<10/align)))
		if r.IntN(8) == 0 {
			n *= 8
		}
		e := blockdev.Extent{Off: off, Len: min(n, size-off), Kind: blockdev.ExtentKind(1 + r.IntN(4)), Depth: r.IntN(3)}
		if !e.Kind.ReadsZero() {
			for b := m.content[off : off+e.Len]; len(b) > 0; {
				part := b[:min(int64(len(b)), 512*(1+r.Int64N(64)))]
				if r.IntN(3) > 0 {
					noise(r, part)
				}
				b = b[len(part):]
			}
		}
		m.extents = append(m.extents, e)
		off += e.Len
	}
	return m
}

func noise(r *rand.Rand, p []byte) {
	x := r.Uint64() | 1
	for i := range p {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		p[i] = byte(x)
	}
}

func (m *modelDisk) Size() int64 { return int64(len(m.content)) }

func (m *modelDisk) ReadAt(p []byte, off int64) (int, error) {
	for _, e := range m.extents {
		lo, hi := max(e.Off, off), min(e.Off+e.Len, off+int64(len(p)))
		if e.Kind.ReadsZero() && lo < hi && (m.unit == 0 || hi-lo >= m.unit) {
			m.holes.Add(hi - lo)
		}
	}
	return bytes.NewReader(m.content).ReadAt(p, off)
}

func (m *modelDisk) NextExtent(off int64) (blockdev.Extent, error) {
	for _, e := range m.extents {
		if off < e.Off+e.Len {
			e.Off, e.Len = off, e.Off+e.Len-off
			return e, nil
		}
	}
	return blockdev.Extent{}, blockdev.ErrRange
}

// plainTarget has only what a transfer.Target has to have.
type plainTarget struct{ m *blockdev.Memory }

func (p plainTarget) Size() int64                              { return p.m.Size() }
func (p plainTarget) WriteAt(b []byte, off int64) (int, error) { return p.m.WriteAt(b, off) }

// skippingTarget is a Skipper, and checks that it is told of everything once, in
// whole units.
type skippingTarget struct {
	*blockdev.Memory
	unit int64
	mu   sync.Mutex
	told map[int64]bool
	bad  error
}

func (s *skippingTarget) Granularity() int64 { return s.unit }

func (s *skippingTarget) tell(off, n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if off%s.unit != 0 || n%s.unit != 0 && off+n != s.Size() {
		s.bad = fmt.Errorf("%d bytes at %d are no whole units", n, off)
	}
	for at := off; at < off+n; at += s.unit {
		if s.told[at] {
			s.bad = fmt.Errorf("told of %d twice", at)
		}
		s.told[at] = true
	}
}

func (s *skippingTarget) Skip(off, n int64) error {
	s.tell(off, n)
	return nil
}

func (s *skippingTarget) WriteZeroes(off, n int64) error {
	s.tell(off, n)
	return s.Memory.WriteZeroes(off, n)
}

func (s *skippingTarget) WriteAt(p []byte, off int64) (int, error) {
	s.tell(off, int64(len(p)))
	return s.Memory.WriteAt(p, off)
}

// modelTarget is where a model is copied to.
type modelTarget struct {
	transfer.Target
	unit   int64 // of a Skipper; 0: it is none
	before []byte
	after  func() (blockdev.Reader, error) // what was written, as a disk
}

func filled(t *testing.T, b []byte) *blockdev.Memory {
	t.Helper()
	m := blockdev.NewMemory(int64(len(b)))
	if _, err := m.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return m
}

// modelTargets are targets that hold before.
var modelTargets = map[string]func(t *testing.T, r *rand.Rand, before []byte) *modelTarget{
	"memory": func(t *testing.T, r *rand.Rand, before []byte) *modelTarget {
		m := filled(t, before)
		return &modelTarget{m, 0, before, func() (blockdev.Reader, error) { return m, nil }}
	},
	"plain": func(t *testing.T, r *rand.Rand, before []byte) *modelTarget {
		m := filled(t, before)
		return &modelTarget{plainTarget{m}, 0, before, func() (blockdev.Reader, error) { return m, nil }}
	},
	"skipping": func(t *testing.T, r *rand.Rand, before []byte) *modelTarget {
		unit := int64(512) << r.IntN(13)
		s := &skippingTarget{Memory: filled(t, before), unit: unit, told: make(map[int64]bool)}
		return &modelTarget{s, unit, before, func() (blockdev.Reader, error) {
			if n := (s.Size() + unit - 1) / unit; int64(len(s.told)) != n && s.bad == nil {
				s.bad = fmt.Errorf("told of %d units of %d", len(s.told), n)
			}
			return s.Memory, s.bad
		}}
	},
	"image": func(t *testing.T, r *rand.Rand, before []byte) *modelTarget {
		dev := blockdev.NewMemory(0)
		format := qcow2.FormatOptions{ClusterSize: 512 << r.IntN(8), Version: 2 + r.IntN(2)}
		if err := qcow2.Create(t.Context(), dev, int64(len(before)), &qcow2.CreateOptions{FormatOptions: format}); err != nil {
			t.Fatal(err)
		}
		im, err := qcow2.New(dev, &qcow2.OpenOptions{Write: true})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := im.WriteAt(before, 0); err != nil {
			t.Fatal(err)
		}
		return &modelTarget{im, 0, before, func() (blockdev.Reader, error) { return reopened(t, im.Close(), dev, nil) }}
	},
	"writer": func(t *testing.T, r *rand.Rand, before []byte) *modelTarget {
		return writerTarget(t, before, &qcow2.WriterOptions{InOrder: true, Compress: r.IntN(2) == 0, FormatOptions: qcow2.FormatOptions{
			ClusterSize: 512 << r.IntN(13), Version: 2 + r.IntN(2), BackingFile: "before", BackingFormat: "raw",
		}})
	},
	"extended writer": func(t *testing.T, r *rand.Rand, before []byte) *modelTarget {
		return writerTarget(t, before, &qcow2.WriterOptions{InOrder: true, FormatOptions: qcow2.FormatOptions{
			ClusterSize: 16 << 10 << r.IntN(3), ExtendedL2: true, BackingFile: "before", BackingFormat: "raw",
		}})
	},
	"zstd writer": func(t *testing.T, r *rand.Rand, before []byte) *modelTarget {
		return writerTarget(t, before, &qcow2.WriterOptions{InOrder: true, Compress: true, FormatOptions: qcow2.FormatOptions{
			ClusterSize: 4096 << r.IntN(5), Compression: qcow2.CompressionZstd, BackingFile: "before", BackingFormat: "raw",
		}})
	},
}

// writerTarget is a new image over before.
func writerTarget(t *testing.T, before []byte, opts *qcow2.WriterOptions) *modelTarget {
	t.Helper()
	dev := blockdev.NewMemory(0)
	w, err := qcow2.NewWriter(t.Context(), dev, int64(len(before)), opts)
	if err != nil {
		t.Fatal(err)
	}
	return &modelTarget{w, w.Granularity(), before, func() (blockdev.Reader, error) {
		var below blockdev.Reader
		if opts.BackingFile != "" {
			below = filled(t, before)
		}
		return reopened(t, w.Finish(), dev, below)
	}}
}

// reopened opens an image that was written and checks it.
func reopened(t *testing.T, err error, dev, below blockdev.Reader) (blockdev.Reader, error) {
	if err != nil {
		return nil, err
	}
	im, err := qcow2.New(dev, &qcow2.OpenOptions{BackingDevice: below})
	if err != nil {
		return nil, err
	}
	res, err := im.Check(t.Context(), nil)
	if err == nil && res.Corruptions+res.Leaks > 0 {
		err = fmt.Errorf("check: %d corruptions, %d leaks", res.Corruptions, res.Leaks)
	}
	return im, err
}

// want is what the target reads as after a copy.
func (m *modelDisk) want(to *modelTarget, keep func(blockdev.Extent) bool) []byte {
	want := bytes.Clone(to.before)
	copy(want, m.content)
	if keep == nil {
		return want
	}
	unit := max(to.unit, 1)
	for i := 0; i < len(m.extents); i++ {
		// What is kept of units that are kept as a whole.
		from, end := m.extents[i].Off, m.extents[i].Off
		for ; i < len(m.extents) && keep(m.extents[i]); i++ {
			end = m.extents[i].Off + m.extents[i].Len
		}
		from = (from + unit - 1) / unit * unit
		if end < m.Size() {
			end = end / unit * unit
		}
		if from < end {
			copy(want[from:end], to.before[from:end])
		}
	}
	return want
}

// Whatever it is copied by, the target reads as the source does, and what reads
// as zeroes is not read.
func TestCopyModel(t *testing.T) {
	for name, target := range modelTargets {
		t.Run(name, func(t *testing.T) {
			seeds := uint64(40)
			if testing.Short() {
				seeds = 6
			}
			for seed := range seeds {
				r := rand.New(rand.NewPCG(seed, 1))
				size := 512 * (1 + r.Int64N(6<<10))
				if seed == 0 {
					size = 0
				}
				src := newModelDisk(r, size, 512<<r.IntN(8))
				before := make([]byte, size)
				writer := name != "memory" && name != "plain" && name != "image"
				if !writer && r.IntN(2) == 0 {
					before = append(before, make([]byte, 512*r.Int64N(1000))...)
				}
				opts := &transfer.Options{Workers: r.IntN(6), InOrder: r.IntN(4) == 0}
				if opts.TargetIsZero = r.IntN(3) == 0; !opts.TargetIsZero {
					noise(r, before)
				}
				opts.Sparse = []int64{0, 512, 4096, 64 << 10, 3 << 20, -1}[r.IntN(6)]
				if r.IntN(2) == 0 {
					opts.Keep = func(e blockdev.Extent) bool { return e.Depth == 2 }
				}
				last := int64(0)
				opts.Progress = func(done, total int64) {
					if done <= last || done > total || total != size {
						t.Errorf("seed %d: %d of %d bytes after %d, of %d", seed, done, total, last, size)
					}
					last = done
				}
				to := target(t, r, before)
				src.unit = to.unit
				if err := transfer.Copy(t.Context(), to.Target, src, opts); err != nil {
					t.Fatalf("seed %d: %v", seed, err)
				}
				if last != size {
					t.Errorf("seed %d: progress ended at %d of %d", seed, last, size)
				}
				if n := src.holes.Load(); opts.Sparse >= 0 && n > 0 {
					t.Errorf("seed %d: %d bytes of holes were read", seed, n)
				}
				disk, err := to.after()
				if err != nil {
					t.Fatalf("seed %d: %v", seed, err)
				}
				got := make([]byte, len(before))
				if _, err := disk.ReadAt(got, 0); err != nil && err != io.EOF {
					t.Fatalf("seed %d: %v", seed, err)
				}
				if want := src.want(to, opts.Keep); !bytes.Equal(got, want) {
					at := 0
					for got[at] == want[at] {
						at++
					}
					t.Fatalf("seed %d: other bytes at %d of %d, %+v", seed, at, size, opts)
				}
			}
		})
	}
}

package transfer_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/blocktest"
	"qimg/qcow2/transfer"
)

func bytesOf(t *testing.T, d blockdev.Reader) []byte {
	t.Helper()
	b := make([]byte, d.Size())
	if _, err := d.ReadAt(b, 0); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	return b
}

// The image does not depend on the number of workers.
func TestCopyWorkers(t *testing.T) {
	src := newModelDisk(rand.New(rand.NewPCG(1, 2)), 6<<20+512, 4096)
	step := 1
	if testing.Short() {
		step = 5
	}
	for name, opts := range map[string]*qcow2.WriterOptions{
		"plain": {InOrder: true},
		"small": {InOrder: true, FormatOptions: qcow2.FormatOptions{ClusterSize: 512}},
		"zlib":  {InOrder: true, Compress: true},
		"zstd":  {InOrder: true, Compress: true, FormatOptions: qcow2.FormatOptions{Compression: qcow2.CompressionZstd}},
	} {
		var want []byte
		for workers := 1; workers <= transfer.MaxWorkers; workers += step {
			dev := blockdev.NewMemory(0)
			w, err := qcow2.NewWriter(t.Context(), dev, src.Size(), opts)
			if err != nil {
				t.Fatal(err)
			}
			if err := transfer.Copy(t.Context(), w, src, &transfer.Options{Workers: workers}); err != nil {
				t.Fatal(err)
			}
			if err := w.Finish(); err != nil {
				t.Fatal(err)
			}
			got := bytesOf(t, dev)
			if want == nil {
				want = got
			}
			if !bytes.Equal(got, want) {
				t.Errorf("%s: %d workers make another image than one", name, workers)
			}
		}
	}
}

// recordingTarget keeps what is written, in pieces, and checks that they do not
// overlap.
type recordingTarget struct {
	*blockdev.Memory
	mu      sync.Mutex
	pieces  map[int64]int64 // length by offset
	data    []blockdev.Range
	ordered bool // each piece has to begin where the last one ended, or behind
	end     int64
	bad     error
}

func (r *recordingTarget) note(off, n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ordered && off < r.end {
		r.bad = fmt.Errorf("%d bytes at %d come after %d", n, off, r.end)
	}
	r.end = off + n
	r.pieces[off] = n
}

func (r *recordingTarget) WriteAt(p []byte, off int64) (int, error) {
	r.note(off, int64(len(p)))
	return r.Memory.WriteAt(p, off)
}

func (r *recordingTarget) WriteZeroes(off, n int64) error {
	r.note(off, n)
	return r.Memory.WriteZeroes(off, n)
}

// sparseTarget is a recordingTarget that is a blockdev.SparseWriter.
type sparseTarget struct{ recordingTarget }

func (s *sparseTarget) WriteSparse(p []byte, off int64, data []blockdev.Range) error {
	s.note(off, int64(len(p)))
	s.mu.Lock()
	s.data = append(s.data, data...)
	s.mu.Unlock()
	for _, d := range data {
		if _, err := s.Memory.WriteAt(p[d.Off-off:][:d.Len], d.Off); err != nil {
			return err
		}
	}
	return nil
}

// Runs of zeroes are found that are as long as asked for, and no shorter ones.
func TestCopySparse(t *testing.T) {
	const sector, size = 512, 3 << 20
	for seed := range uint64(30) {
		r := rand.New(rand.NewPCG(seed, 3))
		b := make([]byte, size)
		for at := 0; at < size; {
			n := sector * (1 + r.IntN(40))
			if r.IntN(2) == 0 {
				noise(r, b[at:min(at+n, size)])
			}
			at += n
		}
		sparse := int64(sector) << r.IntN(7)
		to := &sparseTarget{recordingTarget{Memory: blockdev.NewMemory(size), pieces: make(map[int64]int64)}}
		src := onlyReader{filled(t, b)}
		if err := transfer.Copy(t.Context(), to, src, &transfer.Options{Sparse: sparse, Workers: 3}); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(bytesOf(t, to.Memory), b) {
			t.Fatalf("seed %d: other bytes", seed)
		}
		var want []blockdev.Range
		for at := int64(0); at < size; at += sparse {
			end := min(at+sparse, size)
			switch n := len(want); {
			case transfer.IsZero(b[at:end]):
			case n > 0 && want[n-1].Off+want[n-1].Len == at && at%transfer.BufferSize != 0:
				want[n-1].Len += end - at
			default:
				want = append(want, blockdev.Range{Off: at, Len: end - at})
			}
		}
		slices.SortFunc(to.data, func(a, b blockdev.Range) int { return int(a.Off - b.Off) })
		if diff := cmp.Diff(want, to.data); diff != "" {
			t.Fatalf("seed %d: runs of %d zeroes: -want +got\n%s", seed, sparse, diff)
		}
	}
}

// onlyReader is a disk that knows no extents.
type onlyReader struct{ blockdev.Reader }

// Pieces are written one after the other where that is asked for.
func TestCopyInOrder(t *testing.T) {
	src := newModelDisk(rand.New(rand.NewPCG(1, 4)), 12<<20, 512)
	to := &recordingTarget{Memory: blockdev.NewMemory(src.Size()), pieces: make(map[int64]int64), ordered: true}
	if err := transfer.Copy(t.Context(), to, src, &transfer.Options{Workers: 8, InOrder: true}); err != nil {
		t.Fatal(err)
	}
	if to.bad != nil {
		t.Error(to.bad)
	}
	if !bytes.Equal(bytesOf(t, to.Memory), src.content) {
		t.Error("other bytes")
	}
}

// With a base only blocks that differ are written, as a whole.
func TestCopyBase(t *testing.T) {
	const block, size = 4096, 4<<20 + 512
	r := rand.New(rand.NewPCG(1, 5))
	base := make([]byte, size)
	noise(r, base)
	b := bytes.Clone(base)
	differ := make(map[int64]bool)
	for range 300 {
		at := r.Int64N(size)
		b[at]++
		differ[at/block*block] = true
	}
	to := &recordingTarget{Memory: filled(t, base), pieces: make(map[int64]int64)}
	if err := transfer.Copy(t.Context(), to, onlyReader{filled(t, b)}, &transfer.Options{Base: filled(t, base)}); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(bytesOf(t, to.Memory), b) {
		t.Error("other bytes")
	}
	got := make(map[int64]bool)
	for off, n := range to.pieces {
		for at := off; at < off+n; at += block {
			got[at] = true
		}
	}
	if !maps.Equal(got, differ) {
		t.Errorf("%d blocks were written, %d differ", len(got), len(differ))
	}
	bad := badReader{filled(t, base), 2 << 20, errBad}
	var read *transfer.ReadError
	err := transfer.Copy(t.Context(), to, onlyReader{filled(t, b)}, &transfer.Options{Base: bad})
	if !errors.As(err, &read) || read.Off < 1<<20 || !errors.Is(err, errBad) {
		t.Errorf("a base that cannot be read: %v", err)
	}
}

var errBad = errors.New("bad sector")

// sickDisk has sectors that cannot be read, and extents that cannot be told.
type sickDisk struct {
	*modelDisk
	sick  map[int64]bool // by offset
	blind map[int64]bool // extents, by 64 KiB
}

func (s sickDisk) ReadAt(p []byte, off int64) (int, error) {
	for at := off &^ 511; at < off+int64(len(p)); at += 512 {
		if s.sick[at] {
			return 0, errBad
		}
	}
	return s.modelDisk.ReadAt(p, off)
}

func (s sickDisk) NextExtent(off int64) (blockdev.Extent, error) {
	if s.blind[off>>16] {
		return blockdev.Extent{}, errBad
	}
	e, err := s.modelDisk.NextExtent(off)
	for at := off>>16 + 1; at<<16 < off+e.Len; at++ {
		if s.blind[at] {
			e.Len = at<<16 - off
		}
	}
	return e, err
}

// What cannot be read is told, sector by sector, and becomes zeroes.
func TestCopySalvage(t *testing.T) {
	for name, target := range modelTargets {
		for seed := range uint64(6) {
			r := rand.New(rand.NewPCG(seed, 6))
			src := sickDisk{newModelDisk(r, 2<<20+1536, 512), make(map[int64]bool), make(map[int64]bool)}
			want := bytes.Clone(src.content)
			for range 40 {
				at := r.Int64N(src.Size()) &^ 511
				e, err := src.modelDisk.NextExtent(at)
				if err != nil {
					t.Fatal(err)
				}
				if !e.Kind.ReadsZero() { // else it need not be read
					src.sick[at] = true
					clear(want[at:min(at+512, src.Size())])
				}
			}
			for range 3 {
				src.blind[r.Int64N(src.Size())>>16] = true
			}
			got := make(map[int64]bool)
			blind := int64(-1)
			to := target(t, r, make([]byte, src.Size()))
			err := transfer.Copy(t.Context(), to.Target, src, &transfer.Options{Workers: 1 + r.IntN(5), Salvage: func(err *transfer.ReadError) {
				switch {
				case !errors.Is(err, errBad), err.Extents && (!src.blind[err.Off>>16] || err.Off <= blind), !err.Extents && got[err.Off]:
					t.Errorf("%s: told of %v", name, err)
				case err.Extents:
					blind = err.Off
				default:
					got[err.Off] = true
				}
			}})
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if !maps.Equal(got, src.sick) {
				t.Errorf("%s: told of %d sectors, %d are bad", name, len(got), len(src.sick))
			}
			disk, err := to.after()
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if !bytes.Equal(bytesOf(t, disk), want) {
				t.Errorf("%s: other bytes", name)
			}
		}
	}
}

// An error of the source ends the copy, wherever it is.
func TestCopyReadErrors(t *testing.T) {
	for name, target := range modelTargets {
		for seed := range uint64(6) {
			r := rand.New(rand.NewPCG(seed, 7))
			src := sickDisk{newModelDisk(r, 5<<20, 4096), make(map[int64]bool), make(map[int64]bool)}
			extents := seed%2 == 0
			at := src.Size() - 512 - 512*r.Int64N(4000)
			if extents {
				src.blind[at>>16] = true
			} else {
				src.extents = []blockdev.Extent{{Len: src.Size(), Kind: blockdev.Data}}
				src.sick[at&^511] = true
			}
			to := target(t, r, make([]byte, src.Size()))
			if extents && to.unit > 64<<10 {
				continue // the data of a unit is read without a look at the rest of its extents
			}
			err := transfer.Copy(t.Context(), to.Target, src, &transfer.Options{Workers: 1 + r.IntN(16), InOrder: seed%3 == 0})
			var read *transfer.ReadError
			if !errors.As(err, &read) || !errors.Is(err, errBad) || read.Extents != extents || read.Off > at || read.Off+2<<20 < at {
				t.Errorf("%s: %v, expected one of reading at %d", name, err, at)
			}
			if _, writer := to.Target.(*qcow2.Writer); writer {
				if _, err := to.after(); !errors.Is(err, os.ErrClosed) {
					t.Errorf("%s: what was not copied was finished: %v", name, err)
				}
			}
		}
	}
}

// lyingDisk is data whose extents cannot be told once: it is said to be zeroes
// beside the error.
type lyingDisk struct {
	*blockdev.Memory
	calls *atomic.Int32
	bad   int32
}

func (d lyingDisk) NextExtent(off int64) (blockdev.Extent, error) {
	e := blockdev.Extent{Off: off, Len: d.Size() - off, Kind: blockdev.Zero}
	if d.calls.Add(1) == d.bad {
		return e, errBad
	}
	e.Len, e.Kind = min(e.Len, 512), blockdev.Data
	return e, nil
}

// What comes with an error is not taken for an extent, by no worker.
func TestCopyExtentErrors(t *testing.T) {
	data, old := bytes.Repeat([]byte{1}, 1<<20), bytes.Repeat([]byte{2}, 1<<20)
	for i := range 500 {
		src := lyingDisk{blockdev.NewMemory(1 << 20), new(atomic.Int32), int32(1 + i%3)}
		if _, err := src.WriteAt(data, 0); err != nil {
			t.Fatal(err)
		}
		dst := blockdev.NewMemory(1 << 20)
		if _, err := dst.WriteAt(old, 0); err != nil {
			t.Fatal(err)
		}
		if err := transfer.Copy(t.Context(), dst, src, &transfer.Options{Workers: 16}); !errors.Is(err, errBad) {
			t.Fatal(err)
		}
		if at := bytes.IndexByte(bytesOf(t, dst), 0); at >= 0 {
			t.Fatalf("run %d: zeroes at %d, which the source has not", i, at)
		}
	}
}

// An error of the target ends the copy, at whatever call; nobody waits for ever.
func TestCopyWriteErrors(t *testing.T) {
	src := newModelDisk(rand.New(rand.NewPCG(1, 8)), 8<<20, 4096)
	for _, opts := range []*qcow2.WriterOptions{
		nil, // no image
		{InOrder: true},
		{InOrder: true, Compress: true},
		{InOrder: true, Compress: true, FormatOptions: qcow2.FormatOptions{ClusterSize: 2 << 20}},
	} {
		for call := 1; ; call++ {
			dev := blockdev.NewMemory(0)
			if opts == nil {
				dev = blockdev.NewMemory(src.Size())
			}
			fault := blocktest.NewFaulty(dev, blocktest.Fault{Call: call, Err: errBad, Sticky: call%2 == 0})
			target, w := transfer.Target(fault), (*qcow2.Writer)(nil)
			var err error
			if opts != nil {
				w, err = qcow2.NewWriter(t.Context(), fault, src.Size(), opts)
				target = w
			}
			if err == nil {
				err = transfer.Copy(t.Context(), target, src, &transfer.Options{Workers: 1 + call%5, InOrder: call%3 == 0})
				var write *transfer.WriteError
				if err != nil && !errors.As(err, &write) {
					t.Errorf("%+v, call %d: %v, expected a WriteError", opts, call, err)
				}
			}
			if w != nil && err == nil {
				err = w.Finish()
			}
			if fault.Fired() != errors.Is(err, errBad) {
				t.Fatalf("%+v, call %d: %v", opts, call, err)
			}
			if !fault.Fired() {
				break
			}
		}
	}
}

// A target that is shorter than the source is refused.
func TestCopyShort(t *testing.T) {
	if err := transfer.Copy(t.Context(), blockdev.NewMemory(511), blockdev.NewMemory(512), &transfer.Options{TargetIsZero: true}); err == nil {
		t.Error("no error")
	}
}

// A copy that is cancelled ends, whoever waits for whom.
func TestCopyCancel(t *testing.T) {
	for name, target := range modelTargets {
		for _, rate := range []int64{0, 1} {
			r := rand.New(rand.NewPCG(1, 9))
			src := newModelDisk(r, 4<<20, 4096)
			to := target(t, r, make([]byte, src.Size()))
			ctx, cancel := context.WithCancel(t.Context())
			start := time.Now()
			err := transfer.Copy(ctx, to.Target, src, &transfer.Options{Workers: 4, InOrder: rate > 0, Rate: rate, Progress: func(int64, int64) { cancel() }})
			if !errors.Is(err, context.Canceled) || time.Since(start) > 5*time.Second {
				t.Errorf("%s, rate %d: %v after %v", name, rate, err, time.Since(start))
			}
		}
	}
}

// A rate bounds what is written.
func TestCopyRate(t *testing.T) {
	b := make([]byte, 4<<20)
	noise(rand.New(rand.NewPCG(1, 10)), b)
	start := time.Now()
	if err := transfer.Copy(t.Context(), blockdev.NewMemory(4<<20), filled(t, b), &transfer.Options{Rate: 20 << 20}); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(start); d < 150*time.Millisecond || d > 5*time.Second {
		t.Errorf("4 MiB at 20 MiB a second took %v", d)
	}
}

// rangeTarget takes from a file some of what it is asked to.
type rangeTarget struct {
	*blockdev.Memory
	mu    sync.Mutex
	r     *rand.Rand
	taken int64
	err   error
}

func (c *rangeTarget) CopyRange(off int64, src *os.File, srcOff, n int64) (int64, error) {
	c.mu.Lock()
	part := []int64{0, n / 2, n}[c.r.IntN(3)]
	c.taken += part
	c.mu.Unlock()
	if c.err != nil {
		return 0, c.err
	}
	b := make([]byte, part)
	if _, err := src.ReadAt(b, srcOff); err != nil {
		return 0, err
	}
	if _, err := c.WriteAt(b, off); err != nil || part == n {
		return part, err
	}
	return part, errors.ErrUnsupported
}

// swappedDisk is a file whose blocks of 64 KiB are swapped, in pairs.
type swappedDisk struct{ *blockdev.File }

func (s swappedDisk) ReadAt(p []byte, off int64) (n int, err error) {
	for n < len(p) && err == nil {
		at := off + int64(n)
		var m int
		m, err = s.File.ReadAt(p[n:min(len(p), n+64<<10-int(at%(64<<10)))], at^64<<10)
		n += m
	}
	return n, err
}

func (s swappedDisk) NextExtent(off int64) (blockdev.Extent, error) {
	return blockdev.Extent{Off: off, Len: 64<<10 - off%(64<<10), Kind: blockdev.Data, Host: s.File, HostOff: off ^ 64<<10}, nil
}

// What the target does not take from the file of the source is copied.
func TestCopyKernel(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 11))
	b := make([]byte, 9<<20+100)
	noise(r, b[:3<<20])
	noise(r, b[5<<20:])
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, b, 0o666); err != nil {
		t.Fatal(err)
	}
	src, err := blockdev.OpenFile(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	to := &rangeTarget{Memory: blockdev.NewMemory(src.Size()), r: r}
	if err := transfer.Copy(t.Context(), to, src, &transfer.Options{KernelCopy: true}); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(bytesOf(t, to.Memory), b) {
		t.Error("other bytes")
	}
	if to.taken < 1<<20 || to.taken > 8<<20 {
		t.Errorf("%d bytes were taken", to.taken)
	}
	to.taken = 0
	if err := transfer.Copy(t.Context(), to, src, nil); err != nil || to.taken > 0 {
		t.Errorf("%d bytes were taken that were not to be, %v", to.taken, err)
	}
	to.err = errBad
	var write *transfer.WriteError
	if err := transfer.Copy(t.Context(), to, src, &transfer.Options{KernelCopy: true}); !errors.As(err, &write) || !errors.Is(err, errBad) {
		t.Errorf("a target that fails: %v", err)
	}
	if err := os.Truncate(path, 8<<20); err != nil {
		t.Fatal(err)
	}
	whole, err := blockdev.OpenFile(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer whole.Close()
	swapped := swappedDisk{whole}
	to = &rangeTarget{Memory: blockdev.NewMemory(swapped.Size()), r: r}
	if err := transfer.Copy(t.Context(), to, swapped, &transfer.Options{KernelCopy: true}); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(bytesOf(t, to.Memory), bytesOf(t, swapped)) {
		t.Error("other bytes of a disk that lies in no order")
	}
}

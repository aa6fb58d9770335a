package qcow2_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/blocktest"
	"qimg/qcow2/blockdev/oracle"
)

// extent is a planned guest range.
type extent struct{ off, n int64 }

func planOf(extents []extent) iter.Seq2[int64, int64] {
	return func(yield func(int64, int64) bool) {
		for _, e := range extents {
			if !yield(e.off, e.n) {
				return
			}
		}
	}
}

// model is a disk and the plan it is written by.
type model struct {
	bytes   []byte
	extents []extent
}

// randomModel makes a disk of ranges of random, repetitive and zero bytes.
func randomModel(rnd *rand.Rand, size, clusterSize int64) model {
	m := model{bytes: make([]byte, size)}
	for off := rnd.Int64N(3 * clusterSize); off < size; {
		n := min(1+rnd.Int64N(9*clusterSize), size-off)
		if rnd.IntN(4) == 0 { // up to the end, which need not be that of a cluster
			n = min(n, clusterSize/2+1)
		}
		m.extents = append(m.extents, extent{off, n})
		fill(rnd, m.bytes[off:off+n], clusterSize)
		off += n
		if rnd.IntN(3) > 0 {
			off += rnd.Int64N(6 * clusterSize)
		}
	}
	return m
}

func fill(rnd *rand.Rand, p []byte, clusterSize int64) {
	for len(p) > 0 {
		part := p[:min(int64(len(p)), 1+rnd.Int64N(2*clusterSize))]
		switch rnd.IntN(4) {
		case 0: // zeroes
		case 1:
			for b := part; len(b) > 0; b = b[min(8, len(b)):] {
				var v [8]byte
				binary.LittleEndian.PutUint64(v[:], rnd.Uint64())
				copy(b, v[:])
			}
		default:
			word := fmt.Sprintf("line %d of a text that repeats\n", rnd.IntN(100))
			for b := part; len(b) > 0; b = b[min(len(word), len(b)):] {
				copy(b, word)
				b[0] = byte(rnd.Uint32())
			}
		}
		p = p[len(part):]
	}
}

// writeModel writes a model with w from so many goroutines. Without
// compression the pieces have any alignment.
func writeModel(t testing.TB, w *qcow2.Writer, m model, clusterSize int64, workers int, rnd *rand.Rand) {
	t.Helper()
	var pieces []extent
	align := w.Granularity()
	next := int64(0)
	for _, e := range m.extents {
		first := max(e.off/align*align, next)
		end := min((e.off+e.n+align-1)/align*align, int64(len(m.bytes)))
		for first < end {
			n := min(1+rnd.Int64N(5*clusterSize), end-first)
			n = min((n+align-1)/align*align, end-first)
			pieces = append(pieces, extent{first, n})
			first += n
		}
		next = max(next, end)
	}
	if align == 1 {
		rnd.Shuffle(len(pieces), func(i, j int) { pieces[i], pieces[j] = pieces[j], pieces[i] })
	}
	queue := make(chan extent)
	var group sync.WaitGroup
	for range workers {
		group.Go(func() {
			var p []byte // used again, as a caller may
			for e := range queue {
				p = append(p[:0], m.bytes[e.off:e.off+e.n]...)
				if n, err := w.WriteAt(p, e.off); err != nil || int64(n) != e.n {
					t.Errorf("write %d at %#x: %d, %v", e.n, e.off, n, err)
				}
			}
		})
	}
	for _, e := range pieces {
		queue <- e
	}
	close(queue)
	group.Wait()
}

// buildImage makes an image file of a model.
func buildImage(t testing.TB, path string, m model, opts qcow2.WriterOptions, workers int, seed uint64) {
	t.Helper()
	out, err := blockdev.CreateFile(path, &blockdev.CreateOptions{NoSync: true})
	if err != nil {
		t.Fatal(err)
	}
	defer out.Abort()
	opts.Extents = planOf(m.extents)
	w, err := qcow2.NewWriter(t.Context(), out.File(), int64(len(m.bytes)), &opts)
	if err != nil {
		t.Fatal(err)
	}
	writeModel(t, w, m, opts.ClusterSize, workers, rand.New(rand.NewPCG(seed, 1)))
	if err := w.Finish(); err != nil {
		t.Fatal(err)
	}
	if err := out.Commit(); err != nil {
		t.Fatal(err)
	}
}

func writeFile(t testing.TB, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o666); err != nil {
		t.Fatal(err)
	}
}

func readFile(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// judge has qemu-img check an image and compare it with a raw one.
func judge(t testing.TB, image, raw string) {
	t.Helper()
	if r := oracle.Run(t, "qemu-img", "check", "-f", "qcow2", image); r.Code != 0 {
		t.Fatalf("qemu-img check: exit %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	if r := oracle.Run(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, image); r.Code != 0 {
		t.Fatalf("qemu-img compare: exit %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
}

func TestWriter(t *testing.T) {
	oracle.Require(t, "qemu-img")
	sizes := map[int64]int64{512: 3<<20 + 512, 4096: 3<<20 + 1536, 65536: 6<<20 + 512, 2 << 20: 19<<20 + 512}
	for clusterSize, size := range sizes {
		for _, format := range []qcow2.FormatOptions{
			{Version: 2}, {RefcountBits: 1}, {RefcountBits: 2, LazyRefcounts: true}, {RefcountBits: 4},
			{RefcountBits: 16}, {RefcountBits: 64}, {ExtendedL2: true},
		} {
			for _, mode := range []string{"plain", "zlib", "zstd"} {
				format, opts := format, qcow2.WriterOptions{}
				opts.FormatOptions = format
				opts.ClusterSize = clusterSize
				if opts.Compress = mode != "plain"; opts.Compress {
					opts.CompressionLevel = format.RefcountBits % 10 // 0 to 6
					if format.Version == 2 {
						opts.CompressionLevel = 9
					}
				}
				if mode == "zstd" {
					opts.Compression = qcow2.CompressionZstd
				}
				if oracle.SlowBuild && (clusterSize > 4096 && format.RefcountBits != 16 && !format.ExtendedL2 || mode == "zstd" && clusterSize > 512) {
					continue
				}
				if clusterSize > 512 && (format.RefcountBits == 2 || format.RefcountBits == 4) {
					continue // one size is enough
				}
				if format.Version == 2 && mode == "zstd" || format.ExtendedL2 && clusterSize < 16<<10 {
					continue
				}
				name := fmt.Sprintf("%d/v%d-rb%d-x%v/%s", clusterSize, format.Version, format.RefcountBits, format.ExtendedL2, mode)
				t.Run(name, func(t *testing.T) {
					dir := t.TempDir()
					seed := uint64(clusterSize) + uint64(format.RefcountBits)<<32
					m := randomModel(rand.New(rand.NewPCG(seed, 0)), size, clusterSize)
					raw, one, four := filepath.Join(dir, "raw"), filepath.Join(dir, "one"), filepath.Join(dir, "four")
					writeFile(t, raw, m.bytes)
					buildImage(t, one, m, opts, 1, seed)
					judge(t, one, raw)
					buildImage(t, four, m, opts, 4, seed+1)
					b := readFile(t, one)
					if !bytes.Equal(b, readFile(t, four)) {
						t.Error("the image depends on the number of goroutines")
					}
					checkEnd(t, b)
					if format.Version == 2 {
						checkV2(t, b)
					}
				})
			}
		}
	}
}

// checkEnd finds what lies behind the end of the file: part of a cluster, or
// refcounts.
func checkEnd(t *testing.T, b []byte) {
	t.Helper()
	be := binary.BigEndian
	clusterSize := 1 << be.Uint32(b[20:])
	if len(b)%clusterSize != 0 {
		t.Errorf("file of %d bytes is not a number of clusters", len(b))
	}
	bits := 16
	if be.Uint32(b[4:]) == 3 {
		bits = 1 << be.Uint32(b[96:])
	}
	table := b[be.Uint64(b[48:]):][:int(be.Uint32(b[56:]))*clusterSize]
	first := len(b) / clusterSize * bits // bit of the first entry behind the end
	for ; len(table) > 0; table = table[8:] {
		off := be.Uint64(table)
		if off == 0 {
			continue
		}
		for i := max(first, 0); i < clusterSize*8; i++ {
			if bits < 8 && b[off:][i/8]>>(i%8)&1 != 0 || bits >= 8 && b[off:][i/8] != 0 {
				t.Fatalf("refcount block at %#x counts what is behind the end of the file", off)
			}
		}
		first -= clusterSize * 8
	}
}

// checkV2 finds what a version 2 image must not have.
func checkV2(t *testing.T, b []byte) {
	t.Helper()
	be := binary.BigEndian
	if be.Uint32(b[4:]) != 2 {
		t.Fatalf("version %d", be.Uint32(b[4:]))
	}
	if typ := be.Uint32(b[72:]); typ != 0 && typ != 0xe2792aca {
		t.Errorf("header extension %#x behind 72 bytes", typ)
	}
	bits := be.Uint32(b[20:])
	for i := range uint64(be.Uint32(b[36:])) {
		l2 := be.Uint64(b[be.Uint64(b[40:])+8*i:]) << 1 >> 1
		if l2 == 0 {
			continue
		}
		for j := uint64(0); j < 1<<bits; j += 8 {
			if e := be.Uint64(b[l2+j:]); e>>62&1 == 0 && e&1 != 0 {
				t.Fatalf("l2 entry at %#x has the zero flag: %#x", l2+j, e)
			}
		}
	}
}

// A planned cluster of zeroes has to hide the backing file.
func TestWriterZeroesOverBacking(t *testing.T) {
	oracle.Require(t, "qemu-img")
	dir := t.TempDir()
	base := bytes.Repeat([]byte("base"), 1<<20/4)
	writeFile(t, filepath.Join(dir, "base.raw"), base)
	for _, format := range []qcow2.FormatOptions{{Version: 2}, {Version: 3}, {ExtendedL2: true}} {
		for _, compress := range []bool{false, true} {
			t.Run(fmt.Sprintf("v%d-x%v-c%v", format.Version, format.ExtendedL2, compress), func(t *testing.T) {
				opts := qcow2.WriterOptions{FormatOptions: format, Compress: compress}
				opts.ClusterSize = 64 << 10
				opts.BackingFile, opts.BackingFormat = "base.raw", "raw"
				m := model{bytes.Clone(base), []extent{{128 << 10, 192 << 10}}}
				clear(m.bytes[128<<10 : 256<<10])
				copy(m.bytes[256<<10:320<<10], bytes.Repeat([]byte("data"), 16<<10))
				image, raw := filepath.Join(dir, "image"), filepath.Join(dir, "raw")
				writeFile(t, raw, m.bytes)
				buildImage(t, image, m, opts, 2, 1)
				judge(t, image, raw)
				if format.Version == 2 {
					checkV2(t, readFile(t, image))
				}
			})
		}
	}
}

// sparseFile is a new file as a device, unlinked at the end of the test.
func sparseFile(t testing.TB) (*blockdev.File, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o666)
	if err != nil {
		t.Fatal(err)
	}
	d, err := blockdev.NewFile(f, &blockdev.FileOptions{Write: true, NoLock: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d, path
}

func TestWriterMemory(t *testing.T) {
	oracle.PlainBuild(t)
	const size, step = 1 << 40, 256 << 20
	p := bytes.Repeat([]byte("some text"), 64<<10/9+1)[:64<<10]
	for _, compress := range []bool{false, true} {
		t.Run(fmt.Sprintf("compress-%v", compress), func(t *testing.T) {
			d, path := sparseFile(t)
			opts := qcow2.WriterOptions{Compress: compress, Extents: planOf([]extent{{0, size}})}
			if compress {
				opts.Extents = func(yield func(int64, int64) bool) {
					for off := int64(0); off < size && yield(off, 4096); off += step {
					}
				}
			}
			heap := func() int64 {
				var m runtime.MemStats
				runtime.GC()
				runtime.ReadMemStats(&m)
				return int64(m.HeapAlloc)
			}
			before := heap()
			w, err := qcow2.NewWriter(t.Context(), d, size, &opts)
			if err != nil {
				t.Fatal(err)
			}
			for off := int64(0); off < size; off += step {
				if _, err := w.WriteAt(p, off); err != nil {
					t.Fatal(err)
				}
				if off%(64<<30) == 0 {
					if n := heap() - before; n > 8<<20 {
						t.Fatalf("%d bytes are held at %#x", n, off)
					}
				}
			}
			if err := w.Finish(); err != nil {
				t.Fatal(err)
			}
			if r := oracle.Run(t, "qemu-img", "check", path); r.Code != 0 {
				t.Errorf("qemu-img check: exit %d\n%s%s", r.Code, r.Stdout, r.Stderr)
			}
		})
	}
}

func TestWriterCopyRange(t *testing.T) {
	dir := t.TempDir()
	m := randomModel(rand.New(rand.NewPCG(1, 2)), 8<<20+512, 4096)
	raw := filepath.Join(dir, "raw")
	writeFile(t, raw, m.bytes)
	src, err := os.Open(raw)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	opts := qcow2.WriterOptions{Extents: planOf(m.extents)}
	opts.ClusterSize = 4096
	d, path := sparseFile(t)
	w, err := qcow2.NewWriter(t.Context(), copier{d}, int64(len(m.bytes)), &opts)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range m.extents {
		n, err := w.CopyRange(e.off, src, e.off, e.n)
		if err != nil || n != e.n {
			t.Fatalf("copy %d at %#x: %d, %v", e.n, e.off, n, err)
		}
	}
	if err := w.Finish(); err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(dir, "other")
	buildImage(t, other, m, opts, 1, 1)
	if !bytes.Equal(readFile(t, path), readFile(t, other)) {
		t.Error("CopyRange and WriteAt make different images")
	}
	// The source ends before the range does.
	w, _ = qcow2.NewWriter(t.Context(), copier{blockdevFile(t)}, 1<<20, &qcow2.WriterOptions{Extents: planOf([]extent{{0, 1 << 20}})})
	short := filepath.Join(dir, "short")
	writeFile(t, short, make([]byte, 100<<10))
	s, err := os.Open(short)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if n, err := w.CopyRange(0, s, 0, 1<<20); n != 100<<10 || !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("copy from a short file: %d, %v", n, err)
	}
}

// copier is a device that copies from files wherever the test runs.
type copier struct{ *blockdev.File }

func (c copier) CopyRange(off int64, src *os.File, srcOff, n int64) (int64, error) {
	p := make([]byte, n)
	m, err := src.ReadAt(p, srcOff)
	if err == io.EOF {
		err = errors.ErrUnsupported
	}
	if _, werr := c.WriteAt(p[:m], off); werr != nil {
		return 0, werr
	}
	return int64(m), err
}

func blockdevFile(t testing.TB) *blockdev.File {
	d, _ := sparseFile(t)
	return d
}

// What a Writer was not able to take is missing: Finish does not make an image
// without it.
func TestWriterErrors(t *testing.T) {
	const size = 64 << 10
	p := bytes.Repeat([]byte{1}, 2*size)
	all := []bool{false, true} // without and with compression
	for _, c := range []struct {
		name     string
		compress []bool
		want     error // nil: any
		call     func(w *qcow2.Writer) error
	}{
		{"write before the plan", all, qcow2.ErrNotPlanned, func(w *qcow2.Writer) error { _, err := w.WriteAt(p[:size], 0); return err }},
		{"write between", all, qcow2.ErrNotPlanned, func(w *qcow2.Writer) error { _, err := w.WriteAt(p[:size], 2*size); return err }},
		{"write at a negative offset", all, qcow2.ErrNotPlanned, func(w *qcow2.Writer) error { _, err := w.WriteAt(p[:size], -size); return err }},
		{"write at the end", all, qcow2.ErrNotPlanned, func(w *qcow2.Writer) error { _, err := w.WriteAt(p[:size], 16*size); return err }},
		{"write over the end of a planned range", all, qcow2.ErrNotPlanned, func(w *qcow2.Writer) error {
			n, err := w.WriteAt(p, size)
			if n != size {
				t.Errorf("%d bytes written, expected %d", n, size)
			}
			return err
		}},
		{"zeroes between", all, qcow2.ErrNotPlanned, func(w *qcow2.Writer) error { return w.WriteZeroes(2*size, size) }},
		{"zeroes over the end of a planned range", all, qcow2.ErrNotPlanned, func(w *qcow2.Writer) error { return w.WriteZeroes(size, 2*size) }},
		{"copy between", all[:1], qcow2.ErrNotPlanned, func(w *qcow2.Writer) error { _, err := w.CopyRange(2*size, nil, 0, size); return err }},
		{"part of a cluster", all[1:], nil, func(w *qcow2.Writer) error { _, err := w.WriteAt(p[:512], 4*size); return err }},
		{"a cluster twice", all[1:], nil, func(w *qcow2.Writer) error {
			if _, err := w.WriteAt(p[:size], size); err != nil {
				t.Error(err)
			}
			_, err := w.WriteAt(p[:size], size)
			return err
		}},
		{"abort", all, os.ErrClosed, func(w *qcow2.Writer) error { w.Abort(); return os.ErrClosed }},
	} {
		for _, compress := range c.compress {
			m := blockdev.NewMemory(0)
			w, err := qcow2.NewWriter(t.Context(), copyMemory{m}, 16*size, &qcow2.WriterOptions{
				Compress: compress, Extents: planOf([]extent{{size, size}, {4 * size, 1}})})
			if err != nil {
				t.Fatal(err)
			}
			err = c.call(w)
			if err == nil || c.want != nil && !errors.Is(err, c.want) {
				t.Errorf("%s: %v", c.name, err)
				continue
			}
			if again := w.Finish(); !errors.Is(again, err) {
				t.Errorf("%s, compress %v: Finish: %v, expected %v", c.name, compress, again, err)
			}
			if _, again := w.WriteAt(p[:size], size); !errors.Is(again, err) {
				t.Errorf("%s, compress %v: the next write: %v, expected %v", c.name, compress, again, err)
			}
			if _, err := qcow2.New(m, nil); !errors.Is(err, qcow2.ErrFormat) {
				t.Errorf("%s, compress %v: there is an image: %v", c.name, compress, err)
			}
		}
	}
	for _, compress := range all {
		w, err := qcow2.NewWriter(t.Context(), blockdev.NewMemory(0), 16*size, &qcow2.WriterOptions{
			Compress: compress, Extents: planOf([]extent{{size, size}})})
		if err != nil {
			t.Fatal(err)
		}
		// What cannot be copied can be written.
		if n, err := w.CopyRange(size, os.Stdin, 0, size); n != 0 || !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("copy to a device that cannot: %d, %v", n, err)
		}
		if _, err := w.WriteAt(p[:size], size); err != nil {
			t.Error(err)
		}
		if err := w.Finish(); err != nil {
			t.Error(err)
		}
		if _, err := w.WriteAt(p, size); !errors.Is(err, os.ErrClosed) {
			t.Errorf("write after Finish: %v", err)
		}
		if err := w.Finish(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("second Finish: %v", err)
		}
	}
}

// copyMemory is a RangeCopier that is not called.
type copyMemory struct{ *blockdev.Memory }

func (copyMemory) CopyRange(int64, *os.File, int64, int64) (int64, error) {
	panic("CopyRange of the device was called")
}

func TestNewWriterRefuses(t *testing.T) {
	refused := func(what string, dst blockdev.Device, size int64, opts *qcow2.WriterOptions) error {
		w, err := qcow2.NewWriter(t.Context(), dst, size, opts)
		if err == nil || w != nil {
			t.Errorf("%s: %v, %v", what, w, err)
		}
		return err
	}
	for _, bad := range [][]extent{{{-1, 5}}, {{0, 10}, {5, 10}}, {{0, 1<<20 + 1}}, {{1 << 20, 1}}, {{0, -1}}, {{1 << 62, 1 << 62}}} {
		refused(fmt.Sprintf("plan %v", bad), blockdev.NewMemory(0), 1<<20, &qcow2.WriterOptions{Extents: planOf(bad)})
	}
	whole := qcow2.WriterOptions{Extents: planOf([]extent{{0, 1 << 20}})}
	refused("a device that is too small", blockdev.NewMemory(1<<20), 1<<20, &whole)
	many := qcow2.WriterOptions{Extents: planOf([]extent{{0, 100 << 30}})}
	many.ClusterSize, many.RefcountBits = 512, 64
	if err := refused("too large a refcount table", blockdev.NewMemory(0), 100<<30, &many); !errors.Is(err, qcow2.ErrLimit) {
		t.Error(err)
	}
	d := blocktest.NewFaulty(blockdev.NewMemory(0), blocktest.Fault{Call: 1, Kind: blocktest.Write, Err: errFault})
	if err := refused("a device that fails", d, 1<<20, &whole); !errors.Is(err, errFault) {
		t.Error(err)
	}
}

// Where the plan has a part of a cluster, zeroes would hide what the backing
// file has of the rest.
func TestNewWriterBackingParts(t *testing.T) {
	const cluster = 64 << 10
	for _, c := range []struct {
		extents []extent
		whole   bool
	}{
		{nil, true},
		{[]extent{{0, cluster}, {2 * cluster, 3 * cluster}}, true},
		{[]extent{{0, 100}, {100, cluster - 100}}, true},
		{[]extent{{8 * cluster, cluster / 2}}, true}, // the end of the image
		{[]extent{{8 * cluster, cluster/2 - 511}}, true},
		{[]extent{{1, cluster - 1}}, false},
		{[]extent{{0, cluster - 1}}, false},
		{[]extent{{0, 100}, {101, cluster - 101}}, false},
		{[]extent{{0, cluster}, {2*cluster + 2048, cluster - 2048}}, false},
		{[]extent{{0, cluster + 2048}, {2 * cluster, cluster}}, false},
		{[]extent{{8 * cluster, cluster/2 - 512}}, false},
	} {
		for _, opts := range []qcow2.WriterOptions{{}, {Compress: true}, {FormatOptions: qcow2.FormatOptions{ExtendedL2: true}}} {
			opts.Extents = planOf(c.extents)
			if _, err := qcow2.NewWriter(t.Context(), blockdev.NewMemory(0), 8*cluster+cluster/2, &opts); err != nil {
				t.Errorf("%v without a backing file: %v", c.extents, err)
			}
			opts.BackingFile = "base"
			_, err := qcow2.NewWriter(t.Context(), blockdev.NewMemory(0), 8*cluster+cluster/2, &opts)
			if (err == nil) != c.whole || err != nil && !strings.Contains(err.Error(), "backing file") {
				t.Errorf("%v: %v", c.extents, err)
			}
		}
	}
}

// cancelling is a device that cancels a context at a write, and counts those
// that come later.
type cancelling struct {
	*blockdev.Memory
	cancel context.CancelFunc
	after  int
	later  int
}

func (c *cancelling) WriteAt(p []byte, off int64) (int, error) {
	if c.after--; c.after == 0 {
		c.cancel()
	} else if c.after < 0 {
		c.later++
	}
	return c.Memory.WriteAt(p, off)
}

// Tables of a large disk are written no further once the context has ended.
func TestTablesCancelled(t *testing.T) {
	for _, after := range []int{0, 1, 3} {
		for name, call := range map[string]func(ctx context.Context, d blockdev.Device) error{
			"NewWriter": func(ctx context.Context, d blockdev.Device) error {
				_, err := qcow2.NewWriter(ctx, d, 1<<40, &qcow2.WriterOptions{Extents: planOf([]extent{{0, 1 << 40}})})
				return err
			},
			"Create": func(ctx context.Context, d blockdev.Device) error {
				return qcow2.Create(ctx, d, 1<<40, &qcow2.CreateOptions{Preallocation: qcow2.PreallocationMetadata})
			},
		} {
			ctx, cancel := context.WithCancel(t.Context())
			if after == 0 {
				cancel()
			}
			d := &cancelling{blockdev.NewMemory(0), cancel, after, 0}
			if err := call(ctx, d); !errors.Is(err, context.Canceled) || d.later != 0 {
				t.Errorf("%s cancelled at write %d: %v, %d more writes", name, after, err, d.later)
			}
			cancel()
		}
	}
}

// With Sync no crash can leave the header without what it names.
func TestWriterSync(t *testing.T) {
	for _, compress := range []bool{false, true} {
		for _, sync := range []bool{false, true} {
			d, err := blocktest.NewRecorder(blockdev.NewMemory(0))
			if err != nil {
				t.Fatal(err)
			}
			w, err := qcow2.NewWriter(t.Context(), d, 1<<20, &qcow2.WriterOptions{
				Compress: compress, Sync: sync, Extents: planOf([]extent{{0, 128 << 10}})})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := w.WriteAt(bytes.Repeat([]byte("text"), 16<<10), 0); err != nil {
				t.Fatal(err)
			}
			if err := w.Finish(); err != nil {
				t.Fatal(err)
			}
			ops := d.Ops()
			for i, op := range ops {
				if header := op.Kind == blocktest.Write && op.Off == 0 && op.Data[0] != 0; header != (i == len(ops)-1) {
					t.Errorf("operation %d of %d: %v", i, len(ops), op)
				}
				if op.Kind == blocktest.Sync != (sync && i == len(ops)-2) {
					t.Errorf("operation %d of %d: %v", i, len(ops), op)
				}
			}
		}
	}
}

// What never came stays zero, also where what was behind it has come.
func TestWriterMissingClusters(t *testing.T) {
	oracle.Require(t, "qemu-img")
	for _, compress := range []bool{false, true} {
		d, path := sparseFile(t)
		m := model{make([]byte, 1<<20), nil}
		w, err := qcow2.NewWriter(t.Context(), d, 1<<20, &qcow2.WriterOptions{Compress: compress, Extents: planOf([]extent{{0, 1 << 20}})})
		if err != nil {
			t.Fatal(err)
		}
		for _, off := range []int64{192 << 10, 512 << 10, 64 << 10} {
			p := m.bytes[off : off+64<<10]
			copy(p, bytes.Repeat([]byte{byte(off >> 16)}, len(p)))
			if _, err := w.WriteAt(p, off); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Finish(); err != nil {
			t.Fatal(err)
		}
		raw := filepath.Join(t.TempDir(), "raw")
		writeFile(t, raw, m.bytes)
		judge(t, path, raw)
	}
}

// A goroutine that is far ahead waits; Abort and the failure of another wake it.
func TestWriterWaits(t *testing.T) {
	p := bytes.Repeat([]byte{1}, 64<<10)
	for _, c := range []struct {
		name string
		want error
		stop func(w *qcow2.Writer)
	}{
		{"abort", os.ErrClosed, func(w *qcow2.Writer) { w.Abort() }},
		{"a write that is not planned", qcow2.ErrNotPlanned, func(w *qcow2.Writer) { w.WriteAt(p, 1<<30) }},
		{"zeroes that are not planned", qcow2.ErrNotPlanned, func(w *qcow2.Writer) { w.WriteZeroes(1<<30, 64<<10) }},
		{"a device that fails", errFault, func(w *qcow2.Writer) { w.WriteAt(p, 0) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := blocktest.NewFaulty(blockdev.NewMemory(0), blocktest.Fault{Call: 1, Err: errFault})
			w, err := qcow2.NewWriter(t.Context(), d, 1<<31, &qcow2.WriterOptions{
				FormatOptions: qcow2.FormatOptions{ClusterSize: 64 << 10}, Compress: true, Extents: planOf([]extent{{0, 1 << 30}})})
			if err != nil {
				t.Fatal(err)
			}
			rnd := rand.NewChaCha8([32]byte{}) // what is not compressed is put out at once
			var taken atomic.Int64
			ahead := make(chan error, 1)
			go func() {
				p := make([]byte, 64<<10)
				var err error
				for off := int64(64 << 10); off < 1<<30 && err == nil; off += 64 << 10 {
					rnd.Read(p)
					_, err = w.WriteAt(p, off)
					taken.Add(1)
				}
				ahead <- err
			}()
			for last := int64(-1); last != taken.Load(); time.Sleep(50 * time.Millisecond) {
				last = taken.Load()
			}
			if n := taken.Load() * (64 << 10); n > 12<<20 || n < 10<<20 {
				t.Errorf("%d bytes were kept, expected 10 to 12 MiB", n)
			}
			c.stop(w)
			select {
			case err := <-ahead:
				if !errors.Is(err, c.want) {
					t.Errorf("the one that waited: %v", err)
				}
			case <-time.After(10 * time.Second):
				t.Fatal("the one that waited still does")
			}
			if err := w.Finish(); !errors.Is(err, c.want) {
				t.Errorf("Finish: %v", err)
			}
		})
	}
}

var errFault = errors.New("fault")

// Whatever write fails, there is no image: not even for a caller that goes on
// and calls Finish.
func TestWriterFaults(t *testing.T) {
	oracle.Require(t, "qemu-img")
	m := randomModel(rand.New(rand.NewPCG(7, 7)), 2<<20, 4096)
	for _, compress := range []bool{false, true} {
		for n := 0; ; n++ {
			d := blockdev.NewMemory(0)
			f := blocktest.NewFaulty(d, blocktest.Fault{Call: n + 1, Err: errFault})
			opts := qcow2.WriterOptions{Compress: compress, Extents: planOf(m.extents)}
			opts.ClusterSize = 4096
			w, err := qcow2.NewWriter(t.Context(), f, int64(len(m.bytes)), &opts)
			if err == nil {
				end := int64(0)
				for _, e := range m.extents {
					first := max(end, e.off/4096*4096)
					if end = min(int64(len(m.bytes)), (e.off+e.n+4095)/4096*4096); first < end {
						w.WriteAt(m.bytes[first:end], first)
					}
				}
				err = w.Finish()
			}
			if err == nil {
				if n < 4 {
					t.Errorf("only %d writes", n)
				}
				break
			}
			if !errors.Is(err, errFault) {
				t.Fatalf("fault at %d: %v", n, err)
			}
			b := make([]byte, d.Size())
			if _, err := d.ReadAt(b, 0); err != nil && err != io.EOF {
				t.Fatal(err)
			}
			if len(b) > 0 && strings.Trim(string(b[:4096]), "\x00") != "" {
				t.Fatalf("fault at %d: the header is there", n)
			}
			if n < 3 {
				path := filepath.Join(t.TempDir(), "image")
				writeFile(t, path, b)
				if r := oracle.Run(t, "qemu-img", "info", "-f", "qcow2", path); r.Code == 0 {
					t.Errorf("fault at %d: qemu-img opens it", n)
				}
			}
		}
	}
}

// Fixed writes cost nothing beyond the device's.
func TestWriterAllocs(t *testing.T) {
	d := blockdev.NewMemory(0)
	w, err := qcow2.NewWriter(t.Context(), d, 1<<20, &qcow2.WriterOptions{Extents: planOf([]extent{{0, 1 << 20}})})
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 256<<10)
	w.WriteAt(p, 4096)
	if n := testing.AllocsPerRun(100, func() { w.WriteAt(p, 4096) }); n != 0 {
		t.Errorf("%v allocations a write", n)
	}
}

func BenchmarkWriterCompress(b *testing.B) {
	for _, typ := range []qcow2.CompressionType{qcow2.CompressionZlib, qcow2.CompressionZstd} {
		b.Run(typ.String(), func(b *testing.B) {
			m := model{make([]byte, 16<<20), []extent{{0, 16 << 20}}}
			fill(rand.New(rand.NewPCG(1, 1)), m.bytes, 64<<10)
			b.SetBytes(int64(len(m.bytes)))
			for b.Loop() {
				opts := qcow2.WriterOptions{Compress: true, Extents: planOf(m.extents)}
				opts.ClusterSize, opts.Compression = 64<<10, typ
				w, err := qcow2.NewWriter(b.Context(), blockdev.NewMemory(0), int64(len(m.bytes)), &opts)
				if err != nil {
					b.Fatal(err)
				}
				writeModel(b, w, m, 256<<10, 2, rand.New(rand.NewPCG(1, 1)))
				if err := w.Finish(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// Package blocktest tests what is built on package blockdev: a conformance
// suite for devices, a recorder whose log can be replayed up to any operation,
// and a device that fails at a chosen call.
package blocktest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"qimg/qcow2/blockdev"
)

// The sizes of devices that TestDevice takes.
const (
	MinSize = 200_000
	MaxSize = 64 << 20
)

// TestDevice runs the conformance suite. newDevice returns a fresh device of
// MinSize to MaxSize bytes each time; what it holds does not matter. The
// optional methods are tested where the device has them; a test of one that it
// has not passes.
func TestDevice(t *testing.T, newDevice func(t *testing.T) blockdev.Device) {
	run := func(name string, test func(t *testing.T, m *model)) {
		t.Run(name, func(t *testing.T) {
			d := newDevice(t)
			if d.Size() < MinSize || d.Size() > MaxSize {
				t.Fatalf("size %d is not %d to %d", d.Size(), MinSize, MaxSize)
			}
			m := &model{d: d, want: make([]byte, d.Size()), rand: rand.NewChaCha8([32]byte{1})}
			if n, err := d.ReadAt(m.want, 0); n != len(m.want) || err != nil && err != io.EOF {
				t.Fatalf("reading all: %d, %v", n, err)
			}
			test(t, m)
		})
	}
	run("ReadWrite", testReadWrite)
	run("End", testEnd)
	run("Concurrent", testConcurrent)
	run("Sync", testSync)
	run("WriteZeroes", testWriteZeroes)
	run("Discard", testDiscard)
	run("Allocate", testAllocate)
	run("Truncate", testTruncate)
	run("NextExtent", testNextExtent)
	run("CopyRange", testCopyRange)
}

// TestReader runs the part of the suite that does not write. newReader returns a
// reader of MinSize to MaxSize bytes.
func TestReader(t *testing.T, newReader func(t *testing.T) blockdev.Reader) {
	TestDevice(t, func(t *testing.T) blockdev.Device { return readOnly{newReader(t)} })
}

// readOnly is a reader as a device that takes no writes.
type readOnly struct{ blockdev.Reader }

func (readOnly) WriteAt([]byte, int64) (int, error) { return 0, blockdev.ErrReadOnly }

func (r readOnly) NextExtent(off int64) (blockdev.Extent, error) {
	return blockdev.NextExtent(r.Reader, off)
}

// model is a device and what it has to read as.
type model struct {
	d    blockdev.Device
	want []byte
	rand *rand.ChaCha8
}

func (m *model) write(t *testing.T, off, n int64) {
	t.Helper()
	if _, ok := m.d.(readOnly); ok {
		return
	}
	p := m.want[off : off+n]
	m.rand.Read(p)
	orig := slices.Clone(p)
	if w, err := m.d.WriteAt(p, off); int64(w) != n || err != nil {
		t.Fatalf("WriteAt(%d bytes, %d) = %d, %v", n, off, w, err)
	}
	if !bytes.Equal(p, orig) {
		t.Fatalf("WriteAt(%d bytes, %d) changed its argument", n, off)
	}
}

// check reads n bytes at off, clipped to the device.
func (m *model) check(t *testing.T, off, n int64) {
	t.Helper()
	off = max(off, 0)
	n = min(n, int64(len(m.want))-off)
	got := bytes.Repeat([]byte{0xa5}, int(n))
	if r, err := m.d.ReadAt(got, off); int64(r) != n || err != nil && err != io.EOF {
		t.Fatalf("ReadAt(%d bytes, %d) = %d, %v", n, off, r, err)
	}
	for i, b := range got {
		if want := m.want[off+int64(i)]; b != want {
			t.Fatalf("ReadAt(%d bytes, %d): byte %d is %#x, want %#x", n, off, off+int64(i), b, want)
		}
	}
}

func (m *model) checkAll(t *testing.T) {
	t.Helper()
	if m.d.Size() != int64(len(m.want)) {
		t.Fatalf("Size() = %d, want %d", m.d.Size(), len(m.want))
	}
	m.check(t, 0, int64(len(m.want)))
}

// ranges are places and lengths around every usual unit, inside the device.
func (m *model) ranges(yield func(off, n int64) bool) {
	size := int64(len(m.want))
	edges := []int64{0, 1, 511, 512, 513, 4095, 4096, 4097, 65535, 65536, 65537, 131072, size - 65536, size - 513, size - 1, size}
	for _, off := range edges {
		for _, n := range []int64{0, 1, 2, 511, 512, 513, 4096, 4097, 65536, 65537, 140000} {
			if off+n <= size && !yield(off, n) {
				return
			}
		}
	}
}

func testReadWrite(t *testing.T, m *model) {
	for off, n := range m.ranges {
		m.write(t, off, n)
		m.check(t, off, n)
		m.check(t, off-7, n+14)
	}
	m.checkAll(t)
}

func testEnd(t *testing.T, m *model) {
	size := int64(len(m.want))
	for _, c := range []struct {
		off  int64
		n    int
		want int
		eof  bool
	}{
		{size - 10, 11, 10, true},
		{size - 1, 4096, 1, true},
		{size, 1, 0, true},
		{size + 1, 1, 0, true},
		{size + 1<<40, 512, 0, true},
		{size - 10, 9, 9, false},
		{0, 0, 0, false},
	} {
		p := bytes.Repeat([]byte{0xa5}, c.n)
		n, err := m.d.ReadAt(p, c.off)
		if n != c.want || (err == io.EOF) != c.eof || !c.eof && err != nil {
			t.Errorf("ReadAt(%d bytes, %d) = %d, %v, want %d, io.EOF %v", c.n, c.off, n, err, c.want, c.eof)
		}
		if c.want > 0 && !bytes.Equal(p[:n], m.want[c.off:c.off+int64(n)]) {
			t.Errorf("ReadAt(%d bytes, %d): wrong bytes", c.n, c.off)
		}
	}
	if n, err := m.d.ReadAt(make([]byte, 10), size-10); n != 10 || err != nil && err != io.EOF {
		t.Errorf("reading up to the end: %d, %v", n, err)
	}
	for _, off := range []int64{-1, -1 << 63} {
		if n, err := m.d.ReadAt(make([]byte, 1), off); n != 0 || err == nil || err == io.EOF {
			t.Errorf("ReadAt(1 byte, %d) = %d, %v, want an error", off, n, err)
		}
	}
	m.refuses(t, "WriteAt", func(off, n int64) error {
		_, err := m.d.WriteAt(bytes.Repeat([]byte{0x5a}, int(n)), off)
		return err
	})
}

// refuses checks that do, called with ranges that are not wholly inside the
// device, is an error and changes nothing.
func (m *model) refuses(t *testing.T, name string, do func(off, n int64) error) {
	t.Helper()
	size := int64(len(m.want))
	for _, c := range [][2]int64{{size, 1}, {size - 1, 2}, {size + 1, 1}, {-1, 1}, {-1, 2}, {1<<63 - 1, 2}, {size - 4096, 8192}} {
		if err := do(c[0], c[1]); err == nil {
			t.Errorf("%s of %d bytes at %d of a device of %d bytes: no error", name, c[1], c[0], size)
		}
	}
	m.checkAll(t)
}

func testConcurrent(t *testing.T, m *model) {
	m.write(t, 0, int64(len(m.want)))
	var wg sync.WaitGroup
	for g := range uint64(8) {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(g, 0))
			for range 50 {
				off := r.Int64N(int64(len(m.want)))
				p := make([]byte, r.Int64N(min(100_000, int64(len(m.want))-off)))
				if n, err := m.d.ReadAt(p, off); n != len(p) || err != nil && err != io.EOF {
					t.Errorf("ReadAt(%d bytes, %d) = %d, %v", len(p), off, n, err)
				} else if !bytes.Equal(p, m.want[off:off+int64(n)]) {
					t.Errorf("ReadAt(%d bytes, %d): wrong bytes", len(p), off)
				}
			}
		})
	}
	wg.Wait()
}

func testSync(t *testing.T, m *model) {
	s, ok := m.d.(blockdev.Syncer)
	if !ok {
		return
	}
	for range 2 {
		m.write(t, 1000, 1000)
		if err := s.Sync(); err != nil {
			t.Fatal(err)
		}
	}
	m.checkAll(t)
}

func testWriteZeroes(t *testing.T, m *model) {
	z, ok := m.d.(blockdev.ZeroWriter)
	if !ok {
		return
	}
	for off, n := range m.ranges {
		m.write(t, max(off-1000, 0), min(n+2000, int64(len(m.want))-max(off-1000, 0)))
		if err := z.WriteZeroes(off, n); err != nil {
			t.Fatalf("WriteZeroes(%d, %d): %v", off, n, err)
		}
		clear(m.want[off : off+n])
		m.check(t, off-1000, n+2000)
	}
	m.checkAll(t)
	m.refuses(t, "WriteZeroes", z.WriteZeroes)
}

func testDiscard(t *testing.T, m *model) {
	d, ok := m.d.(blockdev.Discarder)
	if !ok {
		return
	}
	for off, n := range m.ranges {
		m.write(t, max(off-1000, 0), min(n+2000, int64(len(m.want))-max(off-1000, 0)))
		if err := d.Discard(off, n); err != nil {
			t.Fatalf("Discard(%d, %d): %v", off, n, err)
		}
		// What the range reads as is the device's to say.
		if r, err := m.d.ReadAt(m.want[off:off+n], off); int64(r) != n || err != nil && err != io.EOF {
			t.Fatalf("reading what was discarded: %d, %v", r, err)
		}
		m.check(t, off-1000, n+2000)
	}
	m.checkAll(t)
	m.refuses(t, "Discard", d.Discard)
}

func testAllocate(t *testing.T, m *model) {
	d, ok := m.d.(blockdev.Allocator)
	if !ok {
		return
	}
	m.write(t, 5000, 100_000)
	for off, n := range m.ranges {
		if err := d.Allocate(off, n); err != nil && !errors.Is(err, errors.ErrUnsupported) {
			t.Fatalf("Allocate(%d, %d): %v", off, n, err)
		}
	}
	m.checkAll(t)
	m.refuses(t, "Allocate", d.Allocate)
}

func testTruncate(t *testing.T, m *model) {
	d, ok := m.d.(blockdev.Truncater)
	if !ok {
		return
	}
	m.write(t, 0, int64(len(m.want)))
	size := int64(len(m.want))
	for _, n := range []int64{size, size - 1, size + 1, 70_001, size + 100_000, 65536, 65535, 0, 1, 512, 0, size} {
		if err := d.Truncate(n); errors.Is(err, errors.ErrUnsupported) {
			return
		} else if err != nil {
			t.Fatalf("Truncate(%d): %v", n, err)
		}
		if n <= int64(len(m.want)) {
			m.want = m.want[:n:n]
		} else {
			m.want = append(m.want, make([]byte, n-int64(len(m.want)))...)
		}
		m.checkAll(t)
		m.refuses(t, "WriteAt", func(off, n int64) error {
			_, err := m.d.WriteAt(make([]byte, n), off)
			return err
		})
		if n > 0 {
			m.write(t, n-1, 1)
			m.checkAll(t)
		}
	}
	if err := d.Truncate(-1); err == nil {
		t.Error("Truncate(-1): no error")
	}
	m.checkAll(t)
}

func testNextExtent(t *testing.T, m *model) {
	d, ok := m.d.(blockdev.ExtentReader)
	if !ok {
		return
	}
	m.checkExtents(t, d)
	if z, ok := m.d.(blockdev.ZeroWriter); ok {
		if err := z.WriteZeroes(0, int64(len(m.want))); err != nil {
			t.Fatal(err)
		}
		clear(m.want)
		m.checkExtents(t, d)
	}
	for _, off := range []int64{0, 5000, 131072, int64(len(m.want)) - 100} {
		m.write(t, off, 100)
		m.checkExtents(t, d)
	}
	for _, off := range []int64{-1, int64(len(m.want)), 1<<63 - 1} {
		if e, err := d.NextExtent(off); err == nil {
			t.Errorf("NextExtent(%d) of a device of %d bytes = %+v, want an error", off, len(m.want), e)
		}
	}
}

func (m *model) checkExtents(t *testing.T, d blockdev.ExtentReader) {
	t.Helper()
	for off := int64(0); off < int64(len(m.want)); {
		e, err := m.extent(d, off)
		if err != nil {
			t.Fatalf("NextExtent(%d) = %+v: %v", off, e, err)
		}
		// From the middle of a run on it is of the same kind.
		if mid, err := m.extent(d, off+e.Len/2); err != nil || mid.Kind != e.Kind || mid.Depth != e.Depth {
			t.Fatalf("NextExtent(%d) = %+v, %v inside of %+v", off+e.Len/2, mid, err, e)
		}
		off += e.Len
	}
}

// extent asks for an extent and checks it by itself.
func (m *model) extent(d blockdev.ExtentReader, off int64) (blockdev.Extent, error) {
	e, err := d.NextExtent(off)
	if err != nil {
		return e, err
	}
	if e.Off != off || e.Len < 1 || e.Len > int64(len(m.want))-off {
		return e, fmt.Errorf("wrong place in a device of %d bytes", len(m.want))
	}
	want := m.want[off : off+e.Len]
	if e.Kind.ReadsZero() {
		if i := slices.IndexFunc(want, func(b byte) bool { return b != 0 }); i >= 0 {
			return e, fmt.Errorf("byte %d is %#x", off+int64(i), want[i])
		}
		return e, nil
	}
	if e.Kind == blockdev.Data && e.Host != nil {
		got := make([]byte, e.Len)
		if n, err := e.Host.ReadAt(got, e.HostOff); n != len(got) || err != nil && err != io.EOF {
			return e, fmt.Errorf("reading its host: %d, %v", n, err)
		}
		if !bytes.Equal(got, want) {
			return e, errors.New("its host has other bytes")
		}
	}
	return e, nil
}

func testCopyRange(t *testing.T, m *model) {
	d, ok := m.d.(blockdev.RangeCopier)
	if !ok {
		return
	}
	from := make([]byte, 150_000)
	m.rand.Read(from)
	src, err := os.Create(filepath.Join(t.TempDir(), "src"))
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	if _, err := src.Write(from); err != nil {
		t.Fatal(err)
	}
	m.write(t, 0, int64(len(m.want)))
	for _, c := range []struct{ off, srcOff, n, want int64 }{
		{0, 0, 150_000, 150_000},
		{1, 3, 1, 1},
		{4096, 8192, 4096, 4096},
		{513, 4097, 70_000, 70_000},
		{int64(len(m.want)) - 10, 10, 10, 10},
		{100, 149_000, 2000, 1000}, // src ends
		{100, 150_000, 10, 0},
		{100, 200_000, 10, 0},
		{100, 0, 0, 0},
	} {
		n, err := d.CopyRange(c.off, src, c.srcOff, c.n)
		if err != nil && !errors.Is(err, errors.ErrUnsupported) || n > c.want || err == nil && n != c.want {
			t.Fatalf("CopyRange(%d, src, %d, %d) = %d, %v, want %d", c.off, c.srcOff, c.n, n, err, c.want)
		}
		if n > 0 {
			copy(m.want[c.off:c.off+n], from[c.srcOff:])
		}
		m.checkAll(t)
	}
	m.refuses(t, "CopyRange", func(off, n int64) error {
		_, err := d.CopyRange(off, src, 0, n)
		return err
	})
}

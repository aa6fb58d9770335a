package formats_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"os"
	"runtime/metrics"
	"testing"
	"time"

	"qimg/cloudimg/decomp"
	"qimg/cloudimg/formats"
	"qimg/qcow2"
	"qimg/qcow2/blockdev"
)

// memory is a file in memory.
type memory struct{ *bytes.Reader }

func newMemory(b []byte) memory { return memory{bytes.NewReader(b)} }

// bounded runs f, which may take a second and allocate 64 MiB and four times the
// n bytes of its input. On a busy machine it has more than one try to be fast.
func bounded(t *testing.T, n int, f func()) {
	t.Helper()
	before, start := allocated(), time.Now()
	f()
	for try := 0; time.Since(start) > time.Second; try++ {
		if try == 3 {
			t.Fatalf("more than a second for an image of %d bytes", n)
		}
		before, start = allocated(), time.Now()
		f()
	}
	if a := allocated() - before; a > uint64(64<<20+4*n) {
		t.Fatalf("%d bytes allocated for an image of %d", a, n)
	}
}

func allocated() uint64 {
	s := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}

// expected reports whether an error is one that a file can give rise to.
func expected(err error) bool {
	for _, e := range []error{formats.ErrFormat, formats.ErrCorrupt, formats.ErrUnsupported, formats.ErrReference, formats.ErrDirty,
		decomp.ErrCorrupt, decomp.ErrFormat, decomp.ErrLimit, decomp.ErrUnsupported, qcow2.ErrCorrupt, qcow2.ErrLimit,
		qcow2.ErrUnsupported, qcow2.ErrFormat, qcow2.ErrBacking} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// use opens an image and reads of it what can be read in bounded time: some
// extents, and data at their ends. Extents and data have to agree.
func use(t *testing.T, b []byte, format string) {
	t.Helper()
	file := newMemory(b)
	im, err := formats.New(t.Context(), file, &formats.Options{Format: format, TempDir: os.TempDir(), MaxSize: 1 << 20})
	if err != nil {
		if !expected(err) {
			t.Fatalf("error of no kind: %v", err)
		}
		return
	}
	defer im.Close()
	if im.Size() < 0 {
		t.Fatalf("size %d", im.Size())
	}
	buf := make([]byte, 4096)
	off := int64(0)
	for range 200 {
		if off >= im.Size() {
			return
		}
		e, err := im.NextExtent(off)
		if err != nil {
			if !expected(err) {
				t.Fatalf("error of no kind: %v", err)
			}
			e.Len = min(512, im.Size()-off)
		} else if e.Off != off || e.Len < 1 || e.Len > im.Size()-off {
			t.Fatalf("extent %+v at %d of %d", e, off, im.Size())
		}
		for _, at := range []int64{off, off + e.Len - min(e.Len, int64(len(buf)))} {
			p := buf[:min(e.Len, int64(len(buf)))]
			n, err := im.ReadAt(p, at)
			if err != nil && err != io.EOF && !expected(err) {
				t.Fatalf("error of no kind: %v", err)
			}
			if e.Kind.ReadsZero() && (n < len(p) || len(bytes.Trim(p, "\x00")) > 0) {
				t.Fatalf("%+v reads as other bytes at %d: %d, %v", e, at, n, err)
			}
			if e.Kind == blockdev.Data && e.Host != nil {
				host := make([]byte, len(p))
				if _, err := e.Host.ReadAt(host, e.HostOff+at-e.Off); err != nil && err != io.EOF || !bytes.Equal(host, p) {
					t.Fatalf("%+v reads as other bytes than its host at %d: %v", e, at, err)
				}
			}
		}
		off += e.Len
	}
}

// fix makes the checksums of an image right, so that what they cover is looked at.
func fix(b []byte, format string) {
	le, be := binary.LittleEndian, binary.BigEndian
	sumVHD := func(at, n, field int) {
		if at < 0 || at+n > len(b) {
			return
		}
		be.PutUint32(b[at+field:], 0)
		sum := uint32(0)
		for _, c := range b[at : at+n] {
			sum += uint32(c)
		}
		be.PutUint32(b[at+field:], ^sum)
	}
	sumVHDX := func(at, n int) {
		if at+n > len(b) {
			return
		}
		le.PutUint32(b[at+4:], 0)
		le.PutUint32(b[at+4:], crc32.Checksum(b[at:at+n], crc32.MakeTable(crc32.Castagnoli)))
	}
	switch format {
	case formats.VPC:
		sumVHD(0, 512, 64)
		sumVHD(len(b)-512, 512, 64)
		sumVHD(512, 1024, 36)
	case formats.VHDX:
		sumVHDX(64<<10, 4<<10)
		sumVHDX(128<<10, 4<<10)
		sumVHDX(192<<10, 64<<10)
	}
}

// edit changes a field of an image; undo changes it back.
func edit(b []byte, at uint32, value uint64, width uint8) (undo func()) {
	n := 1 << (width % 4)
	i := int(at)
	if i+n > len(b) {
		return func() {}
	}
	var old, v [8]byte
	copy(old[:], b[i:i+n])
	binary.LittleEndian.PutUint64(v[:], value)
	copy(b[i:], v[:n])
	return func() { copy(b[i:], old[:n]) }
}

// fuzz fuzzes a format: two fields of a small valid image are changed.
func fuzz(f *testing.F, format string, images ...[]byte) {
	for i := range images {
		f.Add(uint8(i), uint32(0), uint64(0), uint8(0), uint32(60), ^uint64(0), uint8(2))
		f.Add(uint8(i), uint32(0x158), uint64(1)<<63, uint8(3), uint32(24), uint64(1)<<40, uint8(3))
	}
	f.Fuzz(func(t *testing.T, i uint8, at1 uint32, value1 uint64, width1 uint8, at2 uint32, value2 uint64, width2 uint8) {
		b := images[int(i)%len(images)]
		defer edit(b, at1, value1, width1)()
		defer edit(b, at2, value2, width2)()
		fix(b, format)
		bounded(t, len(b), func() { use(t, b, format) })
	})
}

func FuzzVMDK(f *testing.F) { fuzz(f, formats.VMDK, tinyVMDK(false), tinyVMDK(true)) }
func FuzzVDI(f *testing.F)  { fuzz(f, formats.VDI, tinyVDI()) }
func FuzzVPC(f *testing.F)  { fuzz(f, formats.VPC, tinyVPC(false), tinyVPC(true)) }
func FuzzVHDX(f *testing.F) { fuzz(f, formats.VHDX, tinyVHDX()) }

// FuzzDetect opens whatever there is.
func FuzzDetect(f *testing.F) {
	for _, b := range [][]byte{tinyVMDK(false), tinyVMDK(true), tinyVPC(true), []byte("# Disk DescriptorFile\nCID=1\ncreateType=\"vmfs\"\n"), nil} {
		if len(b) < 64<<10 {
			f.Add(b)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		bounded(t, len(b), func() { use(t, b, "") })
	})
}

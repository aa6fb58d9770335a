package blockdev_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/blocktest"
	"qimg/qcow2/blockdev/oracle"
)

// bare hides every optional method.
type bare struct{ blockdev.Device }

// tempFile makes a file of size bytes and opens it.
func tempFile(t *testing.T, size int64, opts *blockdev.FileOptions) *blockdev.File {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.raw")
	if err := os.WriteFile(path, nil, 0o666); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return openFile(t, path, opts)
}

func openFile(t *testing.T, path string, opts *blockdev.FileOptions) *blockdev.File {
	t.Helper()
	f, err := blockdev.OpenFile(path, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// rw opens for writing also where there are no locks.
var rw = &blockdev.FileOptions{Write: true, NoLock: runtime.GOOS != "linux"}

func TestFile(t *testing.T) {
	blocktest.TestDevice(t, func(t *testing.T) blockdev.Device { return tempFile(t, 1_000_001, rw) })
}

func TestMemory(t *testing.T) {
	for _, size := range []int64{blocktest.MinSize, 1 << 20} {
		blocktest.TestDevice(t, func(t *testing.T) blockdev.Device { return blockdev.NewMemory(size) })
	}
}

// A clone and its origin pass the suite side by side, and neither sees what the
// other does.
func TestMemoryClone(t *testing.T) {
	for name, pick := range map[string]func(m, clone *blockdev.Memory) (tested, other *blockdev.Memory){
		"Clone":  func(m, clone *blockdev.Memory) (*blockdev.Memory, *blockdev.Memory) { return clone, m },
		"Origin": func(m, clone *blockdev.Memory) (*blockdev.Memory, *blockdev.Memory) { return m, clone },
	} {
		t.Run(name, func(t *testing.T) {
			blocktest.TestDevice(t, func(t *testing.T) blockdev.Device {
				m := blockdev.NewMemory(300_000)
				fill := bytes.Repeat([]byte{0xee}, 250_000)
				if _, err := m.WriteAt(fill, 0); err != nil {
					t.Fatal(err)
				}
				tested, other := pick(m, m.Clone())
				t.Cleanup(func() {
					got := make([]byte, 300_000)
					if n, err := other.ReadAt(got, 0); n != len(got) || other.Size() != 300_000 {
						t.Fatalf("%d bytes of %d: %v", n, other.Size(), err)
					}
					if !bytes.Equal(got, append(fill, make([]byte, 50_000)...)) {
						t.Error("the other device has changed")
					}
				})
				return tested
			})
		})
	}
}

func TestSection(t *testing.T) {
	for name, parent := range map[string]func(t *testing.T) blockdev.Device{
		"Memory":  func(t *testing.T) blockdev.Device { return blockdev.NewMemory(1 << 20) },
		"File":    func(t *testing.T) blockdev.Device { return tempFile(t, 1<<20, rw) },
		"Bare":    func(t *testing.T) blockdev.Device { return bare{blockdev.NewMemory(1 << 20)} },
		"Section": func(t *testing.T) blockdev.Device { return section(t, blockdev.NewMemory(2<<20), 777, 1<<20) },
	} {
		t.Run(name, func(t *testing.T) {
			for _, off := range []int64{12345, 1<<20 - 300_000} {
				blocktest.TestDevice(t, func(t *testing.T) blockdev.Device {
					p := parent(t)
					fill := bytes.Repeat([]byte{0xee}, 1<<20)
					if _, err := p.WriteAt(fill, 0); err != nil {
						t.Fatal(err)
					}
					t.Cleanup(func() {
						got := make([]byte, len(fill))
						if _, err := p.ReadAt(got, 0); err != nil && err != io.EOF {
							t.Fatal(err)
						}
						if !bytes.Equal(got[:off], fill[:off]) || !bytes.Equal(got[off+300_000:], fill[off+300_000:]) {
							t.Error("the parent has changed outside the section")
						}
					})
					return section(t, p, off, 300_000)
				})
			}
		})
	}
}

func section(t *testing.T, d blockdev.Device, off, n int64) *blockdev.Section {
	t.Helper()
	s, err := blockdev.NewSection(d, off, n)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestSectionOutside(t *testing.T) {
	m := blockdev.NewMemory(1000)
	for _, c := range [][2]int64{{0, 1001}, {1000, 1}, {1001, 0}, {-1, 2}, {1, -1}, {1, 1<<63 - 1}, {1<<63 - 1, 1}} {
		if _, err := blockdev.NewSection(m, c[0], c[1]); !errors.Is(err, blockdev.ErrRange) {
			t.Errorf("section %d+%d of 1000 bytes: %v", c[0], c[1], err)
		}
	}
	if _, err := blockdev.NewReaderSection(m, 1000, 0); err != nil {
		t.Error(err)
	}
}

func TestMemorySparse(t *testing.T) {
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	const size = 1 << 40
	m := blockdev.NewMemory(size)
	for i := range int64(100) {
		if _, err := m.WriteAt([]byte{1}, i*size/100); err != nil {
			t.Fatal(err)
		}
	}
	data, extents := int64(0), 0
	for off := int64(0); off < size; extents++ {
		e, err := m.NextExtent(off)
		if err != nil {
			t.Fatal(err)
		}
		if e.Kind == blockdev.Data {
			data += e.Len
		}
		off += e.Len
	}
	if data != 100<<16 || extents != 200 {
		t.Errorf("%d bytes of data in %d extents, want %d in 200", data, extents, 100<<16)
	}
	runtime.ReadMemStats(&after)
	if used := after.TotalAlloc - before.TotalAlloc; used > 8<<20 {
		t.Errorf("1 TiB with 100 writes took %d bytes", used)
	}
	if err := m.WriteZeroes(0, size); err != nil {
		t.Fatal(err)
	}
	if e, err := m.NextExtent(0); err != nil || e.Kind != blockdev.Unallocated || e.Len != size {
		t.Errorf("after WriteZeroes of all: %+v, %v", e, err)
	}
}

// A File clips to the size that it had when it was opened, and says when the
// file has become shorter.
func TestFileSizeChanges(t *testing.T) {
	f := tempFile(t, 10_000, nil)
	if err := os.Truncate(f.Name(), 20_000); err != nil {
		t.Fatal(err)
	}
	if n, err := f.ReadAt(make([]byte, 100), 9_950); n != 50 || err != io.EOF {
		t.Errorf("reading at the old end: %d, %v", n, err)
	}
	if e, err := f.NextExtent(0); err != nil || e.Len != 10_000 {
		t.Errorf("extent of a file that grew: %+v, %v", e, err)
	}
	if err := os.Truncate(f.Name(), 5_000); err != nil {
		t.Fatal(err)
	}
	if n, err := f.ReadAt(make([]byte, 100), 4_950); n != 50 || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("reading where the file was cut: %d, %v", n, err)
	}
	if runtime.GOOS != "linux" {
		return
	}
	if e, err := f.NextExtent(6_000); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("extent beyond the cut: %+v, %v", e, err)
	}
}

func TestFileReadOnly(t *testing.T) {
	f := tempFile(t, 1000, nil)
	_, werr := f.WriteAt([]byte{1}, 0)
	_, cerr := f.CopyRange(0, f.OS(), 10, 1)
	for op, err := range map[string]error{"write": werr, "copy": cerr, "truncate": f.Truncate(5),
		"zero": f.WriteZeroes(0, 1), "discard": f.Discard(0, 1), "allocate": f.Allocate(0, 1)} {
		if !errors.Is(err, blockdev.ErrReadOnly) {
			t.Errorf("%s: %v", op, err)
		}
	}
	if err := f.Sync(); err != nil {
		t.Errorf("sync: %v", err)
	}
}

func TestFileClosed(t *testing.T) {
	f := tempFile(t, 1000, rw)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	_, rerr := f.ReadAt(make([]byte, 1), 0)
	_, werr := f.WriteAt([]byte{1}, 0)
	_, cerr := f.CopyRange(0, os.Stdin, 0, 1)
	_, eerr := f.NextExtent(0)
	for op, err := range map[string]error{"read": rerr, "write": werr, "copy": cerr, "extent": eerr, "sync": f.Sync(),
		"truncate": f.Truncate(5), "zero": f.WriteZeroes(0, 1), "discard": f.Discard(0, 1), "allocate": f.Allocate(0, 1), "close": f.Close()} {
		if !errors.Is(err, os.ErrClosed) {
			t.Errorf("%s: %v", op, err)
		}
	}
}

func TestOpenFileRefuses(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o666); err != nil {
		t.Fatal(err)
	}
	if _, err := blockdev.OpenFile(filepath.Join(dir, "none"), nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	if _, err := blockdev.OpenFile(dir, nil); err == nil || !strings.Contains(err.Error(), "directory") {
		t.Errorf("a directory: %v", err)
	}
	if _, err := blockdev.OpenFile(os.DevNull, nil); err == nil {
		t.Errorf("a character device: %v", err)
	}
	if _, err := blockdev.OpenFile(file, &blockdev.FileOptions{Write: true, ForceShare: true}); err == nil {
		t.Error("write with force-share: no error")
	}
}

func TestOpenFileFollowsSymlink(t *testing.T) {
	f := tempFile(t, 1000, nil)
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(f.Name(), link); err != nil {
		oracle.Missing(t, "a system that lets open files be renamed and links be made: "+err.Error())
	}
	if l := openFile(t, link, nil); l.Size() != 1000 || l.Name() != link {
		t.Errorf("through a symlink: %d bytes, name %s", l.Size(), l.Name())
	}
}

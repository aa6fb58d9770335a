package ext4img_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"qimg/ext4img"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/oracle"
)

// buildDir makes a raw image of a directory, large files copied by the kernel.
func buildDir(t testing.TB, dir string, so *ext4img.ScanOptions, lo *ext4img.LayoutOptions, wo *ext4img.WriteOptions) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	buildTo(t, dir, path, so, lo, wo)
	return path
}

func buildTo(t testing.TB, dir, path string, so *ext4img.ScanOptions, lo *ext4img.LayoutOptions, wo *ext4img.WriteOptions) {
	t.Helper()
	tree, err := ext4img.Scan(t.Context(), dir, so)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	layout, err := ext4img.NewLayout(t.Context(), tree, lo)
	if err != nil {
		t.Fatal(err)
	}
	out, err := blockdev.CreateFile(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Abort()
	if err := out.File().Truncate(layout.Size()); err != nil {
		t.Fatal(err)
	}
	if err := layout.Write(t.Context(), out.File(), wo); err != nil {
		t.Fatal(err)
	}
	if err := out.Commit(); err != nil {
		t.Fatal(err)
	}
}

// TestFidelity builds real trees; e2fsck and the kernel find no difference.
func TestFidelity(t *testing.T) {
	for _, name := range []string{"rootfs", "manysmall", "bigfiles"} {
		t.Run(name, func(t *testing.T) {
			if testing.Short() && name != "rootfs" {
				t.Skip("short")
			}
			tool := oracle.Tool(t, "ext4-fidelity")
			oracle.RequireRoot(t)
			var dir string
			if name == "bigfiles" {
				dir = bigFiles(t)
			} else {
				dir = oracle.Input(t, name)
			}
			warn := func(text string) { t.Error("warning:", text) }
			image := buildDir(t, dir, &ext4img.ScanOptions{Warn: warn}, nil, nil)
			oracle.MustRun(t, "e2fsck", "-fn", image)
			if r := oracle.Run(t, tool, dir, image); r.Code != 0 {
				t.Errorf("%s%s", r.Stdout, r.Stderr)
			}
			compareContents(t, dir, image)
		})
	}
}

// compareContents reads every regular file of a source in the image, mounted by
// the kernel.
func compareContents(t *testing.T, dir, image string) {
	t.Helper()
	mnt := t.TempDir()
	oracle.MustRun(t, "mount", "-t", "ext4", "-o", "loop,ro,noload", image, mnt)
	defer func() {
		if r := oracle.Run(t, "umount", mnt); r.Code != 0 {
			t.Error(r.Stderr)
		}
	}()
	files := 0
	a, b := make([]byte, 1<<20), make([]byte, 1<<20)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		if fi, err := d.Info(); err != nil || fi.Size() > 8<<30 {
			return err // a hole; ext4-fidelity looks at that
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		want, err := os.Open(path)
		if err != nil {
			return err
		}
		defer want.Close()
		got, err := os.Open(filepath.Join(mnt, rel))
		if err != nil {
			return err
		}
		defer got.Close()
		files++
		for {
			n, err := io.ReadFull(want, a)
			m, err2 := io.ReadFull(got, b)
			if n != m || !bytes.Equal(a[:n], b[:m]) {
				t.Errorf("%s: content differs", rel)
				return nil
			}
			if err != nil || err2 != nil {
				return nil // both at their end
			}
		}
	})
	if err != nil {
		t.Error(err)
	}
	if files == 0 {
		t.Error("no file was compared")
	}
}

// bigFiles makes files that need many extents: dense, and sparse with islands.
func bigFiles(t *testing.T) string {
	dir := t.TempDir()
	noise := make([]byte, 1<<20)
	for i := range noise {
		noise[i] = byte(i*i>>3 + i>>11)
	}
	write := func(name string, size int64, at func(i int64) int64) {
		f, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for i := int64(0); at(i) < size; i++ {
			if _, err := f.WriteAt(noise, at(i)); err != nil {
				t.Fatal(err)
			}
		}
		if err := f.Truncate(size); err != nil {
			t.Fatal(err)
		}
	}
	write("dense", 300<<20+12345, func(i int64) int64 { return i << 20 })
	write("islands", 4<<30, func(i int64) int64 { return i * 211 << 20 })
	write("hole", 1<<40, func(int64) int64 { return 1 << 40 })
	return dir
}

// TestCopyOfTree builds two copies of a tree, made in different order.
func TestCopyOfTree(t *testing.T) {
	names := []string{"b", "a", "sub/z", "sub/y", "c", "large"}
	var sums [][32]byte
	for i := range 2 {
		dir := t.TempDir()
		if err := os.Mkdir(filepath.Join(dir, "sub"), 0o755); err != nil {
			t.Fatal(err)
		}
		for k := range names {
			name := names[k]
			if i == 1 {
				name = names[len(names)-1-k]
			}
			size := 10
			if name == "large" {
				size = 3 << 20
			}
			if err := os.WriteFile(filepath.Join(dir, name), bytes.Repeat([]byte(name), size), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		epoch := int64(1e9)
		image := buildDir(t, dir, &ext4img.ScanOptions{MaxTime: &epoch}, nil, &ext4img.WriteOptions{Workers: 1 + 2*i})
		f, err := os.Open(image)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		h := sha256.New()
		if _, err := io.Copy(h, f); err != nil {
			t.Fatal(err)
		}
		sums = append(sums, [32]byte(h.Sum(nil)))
	}
	if sums[0] != sums[1] {
		t.Error("copies of one tree give different images")
	}
}

func TestScanFails(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	fifo := filepath.Join(dir, "fifo")
	oracle.MustRun(t, "mkfifo", fifo)
	for path, want := range map[string]error{filepath.Join(dir, "none"): fs.ErrNotExist, file: nil, fifo: nil} {
		_, err := ext4img.Scan(t.Context(), path, nil)
		if err == nil || want != nil && !errors.Is(err, want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

// TestSymlinksAreNotFollowed swaps a directory and a file for symlinks between
// scan and write.
func TestSymlinksAreNotFollowed(t *testing.T) {
	secret := t.TempDir()
	if err := os.WriteFile(filepath.Join(secret, "f"), []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, swap := range []string{"d", "d/f"} {
		dir := t.TempDir()
		if err := os.Mkdir(filepath.Join(dir, "d"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "d/f"), []byte("public"), 0o600); err != nil {
			t.Fatal(err)
		}
		tree, err := ext4img.Scan(t.Context(), dir, nil)
		if err != nil {
			t.Fatal(err)
		}
		layout, err := ext4img.NewLayout(t.Context(), tree, nil)
		if err != nil {
			t.Fatal(err)
		}
		// The scan may hold the directory itself open: what it holds is not
		// what the name leads to, so swapping the directory goes unseen.
		if err := os.Rename(filepath.Join(dir, swap), filepath.Join(dir, "moved")); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(filepath.Join(secret, strings.TrimPrefix(swap, "d")), filepath.Join(dir, swap)); err != nil {
			t.Fatal(err)
		}
		mem := blockdev.NewMemory(layout.Size())
		err = layout.Write(t.Context(), mem, nil)
		tree.Close()
		if err != nil {
			continue
		}
		for off, n := range layout.Extents() {
			b := make([]byte, n)
			if _, err := mem.ReadAt(b, off); err != nil {
				t.Fatal(err)
			}
			if bytes.Contains(b, []byte("secret")) {
				t.Errorf("%s: a symlink was followed out of the source", swap)
			}
		}
	}
}

// TestGrowingFile appends to a file while it is packed.
func TestGrowingFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "log")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	tree, err := ext4img.Scan(t.Context(), dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	layout, err := ext4img.NewLayout(t.Context(), tree, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range []int64{1<<20 + 1, 1<<20 - 1, 0} {
		if err := os.Truncate(path, size); err != nil {
			t.Fatal(err)
		}
		// A memory device takes no kernel copy, a file does.
		f, err := os.Create(filepath.Join(t.TempDir(), "image"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := f.Truncate(layout.Size()); err != nil {
			t.Fatal(err)
		}
		file, err := blockdev.NewFile(f, &blockdev.FileOptions{Write: true})
		if err != nil {
			t.Fatal(err)
		}
		for _, sink := range []ext4img.Sink{file, blockdev.NewMemory(layout.Size())} {
			err := layout.Write(t.Context(), sink, nil)
			if !errors.Is(err, ext4img.ErrChanged) || !strings.Contains(err.Error(), "log") {
				t.Errorf("size %d: %v", size, err)
			}
		}
	}
}

// TestSinkWithGranularity gets whole units, of the same bytes.
func TestSinkWithGranularity(t *testing.T) {
	dir := t.TempDir()
	for name, size := range map[string]int{"a": 10, "b": 100000, "c": 1 << 20, "d/e": 5000} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, bytes.Repeat([]byte{byte(size)}, size), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	tree, err := ext4img.Scan(t.Context(), dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	layout, err := ext4img.NewLayout(t.Context(), tree, &ext4img.LayoutOptions{Size: 100<<20 + 512})
	if err != nil {
		t.Fatal(err)
	}
	plain := blockdev.NewMemory(layout.Size())
	if err := layout.Write(t.Context(), plain, nil); err != nil {
		t.Fatal(err)
	}
	want := make([]byte, layout.Size())
	if _, err := plain.ReadAt(want, 0); err != nil {
		t.Fatal(err)
	}
	for _, unit := range []int64{512, 4096, 1 << 16, 1 << 21} {
		sink := &unitSink{Memory: blockdev.NewMemory(layout.Size()), t: t, unit: unit}
		var last int64
		progress := func(done, total int64) {
			if done < last || done > total {
				t.Errorf("progress %d of %d after %d", done, total, last)
			}
			last = done
		}
		if err := layout.Write(t.Context(), sink, &ext4img.WriteOptions{Progress: progress}); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, layout.Size())
		if _, err := sink.ReadAt(got, 0); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("unit %d: other bytes", unit)
		}
	}
}

type unitSink struct {
	*blockdev.Memory
	t    *testing.T
	unit int64
}

func (s *unitSink) Granularity() int64 { return s.unit }

func (s *unitSink) WriteAt(p []byte, off int64) (int, error) {
	if end := off + int64(len(p)); off%s.unit != 0 || end%s.unit != 0 && end != s.Size() {
		s.t.Errorf("unit %d: write of %d bytes at %d", s.unit, len(p), off)
	}
	return s.Memory.WriteAt(p, off)
}

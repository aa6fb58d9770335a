package fat_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/google/go-cmp/cmp"

	"qimg/cloudimg/fat"
	"qimg/qcow2/blockdev/oracle"
)

// when is a time that FAT keeps.
func when() time.Time { return time.Date(2024, 2, 29, 12, 34, 56, 0, time.UTC) }

func file(size int, seed byte) *fstest.MapFile {
	b := make([]byte, size)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	return &fstest.MapFile{Data: b, ModTime: when(), Mode: 0o644}
}

// zoo is a tree with all kinds of names and sizes.
func zoo() fstest.MapFS {
	m := fstest.MapFS{
		"EFI/BOOT/BOOTX64.EFI":            file(300_001, 1),
		"EFI/debian/grub.cfg":             file(117, 2),
		"empty":                           file(0, 3),
		"EMPTY.TXT":                       file(0, 4),
		"a.b.c":                           file(1, 5),
		"a_b.c":                           file(2, 6),
		".profile":                        file(3, 7),
		"...x":                            file(33, 8),
		"lower.txt":                       file(511, 9),
		"Mixed Case Name.Text":            file(512, 10),
		"größe äöü.txt":                   file(513, 11),
		"日本語 𝄞":                           file(2048, 12),
		"thirteen-char":                   file(2049, 13),
		"plus+comma,=[x];.e+t":            file(4096, 14),
		strings.Repeat("n", 255):          file(10, 15),
		strings.Repeat("𝄞", 60):           file(11, 16),
		"A b.txt":                         file(40, 23),
		"ab~1.txt":                        file(41, 24),
		"~1.TXT":                          file(12, 17),
		"LONGNA~1.TXT":                    file(13, 18),
		"longname number one.txt":         file(14, 19),
		"longname number two.txt":         file(15, 20),
		"loader/entries/with.dots.a.conf": file(16, 21),
		"empty.d":                         {Mode: fs.ModeDir | 0o755, ModTime: when()},
	}
	deep := "deep"
	for i := range 30 {
		deep += fmt.Sprintf("/directory %d", i)
	}
	m[deep+"/file"] = file(100, 22)
	for i := range 300 {
		m[fmt.Sprintf("many/file number %d.data", i)] = file(i%7, byte(i))
	}
	return m
}

// write makes a file of a volume, in pieces of odd sizes.
func write(t testing.TB, v *fat.Volume) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "fat")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(v.Size()); err != nil {
		t.Fatal(err)
	}
	for off := int64(0); off < v.Size(); {
		e, err := v.NextExtent(off)
		if err != nil || e.Off != off || e.Len <= 0 {
			t.Fatal(e, err)
		}
		if !e.Kind.ReadsZero() {
			if _, err := io.CopyBuffer(struct{ io.Writer }{io.NewOffsetWriter(f, off)}, struct{ io.Reader }{io.NewSectionReader(v, off, e.Len)},
				make([]byte, 100_003)); err != nil {
				t.Fatal(err)
			}
		}
		off += e.Len
	}
	return path
}

// fsck has fsck.fat judge.
func fsck(t testing.TB, path string) {
	t.Helper()
	if r := oracle.Run(t, "fsck.fat", "-n", "-v", path); r.Code != 0 || strings.Contains(r.Stdout, "Auto-") {
		t.Errorf("fsck.fat: exit %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
}

// TestFAT makes file systems of all widths, has fsck.fat judge, and mtools read.
func TestFAT(t *testing.T) {
	oracle.Require(t, "fsck.fat", "mcopy", "mdir")
	tree := zoo()
	for _, c := range []struct {
		opts fat.Options
		bits int
	}{
		{fat.Options{}, 12},
		{fat.Options{Bits: 12, Size: 16 << 20, Label: "Label x"}, 12},
		{fat.Options{Bits: 16, Hidden: 2048}, 16},
		{fat.Options{Size: 64 << 20, Label: "ESP", Serial: 0x1234abcd}, 16},
		{fat.Options{Bits: 32, Label: "elevenchars"}, 32},
		{fat.Options{Size: 600<<20 + 300}, 32},
		{fat.Options{Bits: 32, Size: 100 << 20}, 32},
	} {
		t.Run(fmt.Sprintf("%+v", c.opts), func(t *testing.T) {
			v, err := fat.New(t.Context(), tree, &c.opts)
			if err != nil {
				t.Fatal(err)
			}
			if v.Bits() != c.bits || c.opts.Size != 0 && v.Size() != c.opts.Size&^511 {
				t.Errorf("FAT%d of %d bytes", v.Bits(), v.Size())
			}
			path := write(t, v)
			fsck(t, path)
			compare(t, path, tree)
			out := oracle.MustRun(t, "mdir", "-i", path, "::")
			if !strings.Contains(out, strings.ToUpper(c.opts.Label)) {
				t.Errorf("no label in\n%s", out)
			}
			if c.opts.Serial != 0 && !strings.Contains(out, "1234-ABCD") {
				t.Errorf("no serial in\n%s", out)
			}
		})
	}
}

// compare has mtools copy everything out.
func compare(t *testing.T, path string, tree fstest.MapFS) {
	t.Helper()
	names := fstest.MapFS{}
	for p, f := range tree {
		names[strings.ReplaceAll(p, "𝄞", "__")] = f // mtools knows UTF-16 units only
	}
	tree = names
	dir := t.TempDir()
	cmd := exec.CommandContext(t.Context(), oracle.Path(t, "mcopy"), "-s", "-m", "-n", "-i", path, "::*", dir)
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8", "TZ=UTC")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("mcopy: %v\n%s", err, out)
	}
	got := map[string]int{}
	err := fs.WalkDir(os.DirFS(dir), ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		got[p]++
		want, ok := tree[p]
		b, err := os.ReadFile(filepath.Join(dir, p))
		if err != nil || !ok || !bytes.Equal(b, want.Data) {
			t.Errorf("%s: %d bytes, %v", p, len(b), err)
		}
		if info, err := d.Info(); err != nil || !info.ModTime().Equal(when()) {
			t.Errorf("%s: %v, %v", p, info.ModTime(), err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for p, f := range tree {
		if f.Mode.IsRegular() && got[p] == 0 {
			t.Errorf("%s is missing", p)
		}
	}
	if info, err := os.Stat(filepath.Join(dir, "empty.d")); err != nil || !info.IsDir() {
		t.Errorf("an empty directory: %v", err)
	}
}

// TestSizes: what is as small as it can be has no free cluster, and fsck.fat finds
// nothing at the sizes where widths and clusters change.
func TestSizes(t *testing.T) {
	oracle.Require(t, "fsck.fat")
	tree := fstest.MapFS{"a": file(5000, 1), "dir/b": file(70_000, 2)}
	for _, bits := range []int{12, 16, 32} {
		empty, err := fat.New(t.Context(), fstest.MapFS{}, &fat.Options{Bits: bits})
		if err != nil {
			t.Fatal(err)
		}
		fsck(t, write(t, empty))
		v, err := fat.New(t.Context(), tree, &fat.Options{Bits: bits})
		if err != nil {
			t.Fatal(err)
		}
		fsck(t, write(t, v))
		free := v.FreeBytes()
		v, err = fat.New(t.Context(), tree, &fat.Options{Bits: bits, Free: free + 1})
		if err != nil || v.FreeBytes() <= free || v.FreeBytes() > free+40_000 {
			t.Errorf("FAT%d with %d bytes free: %v", bits, v.FreeBytes(), err)
		}
	}
	for _, size := range []int64{120 << 10, 1 << 20, 8<<20 - 512, 8 << 20, 8<<20 + 512, 16 << 20, 17 << 20, 33 << 20, 256<<20 - 512, 511 << 20, 512 << 20, 8<<30 + 512, 100 << 30} {
		v, err := fat.New(t.Context(), tree, &fat.Options{Size: size})
		if err != nil {
			t.Errorf("%d bytes: %v", size, err)
			continue
		}
		fsck(t, write(t, v))
	}
	for _, o := range []fat.Options{{Size: 1 << 10}, {Size: 32 << 20, Bits: 32}, {Size: 3 << 40}, {Bits: 13}, {Size: 1 << 20, Bits: 16}, {Size: 1 << 30, Bits: 12}, {Free: -1}} {
		if v, err := fat.New(t.Context(), tree, &o); err == nil {
			t.Errorf("%+v: FAT%d of %d bytes", o, v.Bits(), v.Size())
		}
	}
	var small *fat.SizeError
	if _, err := fat.New(t.Context(), tree, &fat.Options{Size: 90 << 10}); !errors.As(err, &small) || small.Need != 5000/2048*2048+2048+71680+2048 {
		t.Errorf("a volume that is too small: %v", err)
	}
}

// TestSameBytes: the same tree makes the same bytes, another one another serial.
func TestSameBytes(t *testing.T) {
	serial := func(tree fs.FS) (string, []byte) {
		v, err := fat.New(t.Context(), tree, nil)
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(write(t, v))
		if err != nil {
			t.Fatal(err)
		}
		return string(b[39:43]), b
	}
	s1, b1 := serial(zoo())
	s2, b2 := serial(zoo())
	if s1 != s2 || !bytes.Equal(b1, b2) {
		t.Error("two builds differ")
	}
	other := zoo()
	other["one more"] = file(1, 1)
	if s, _ := serial(other); s == s1 {
		t.Error("another tree has the same serial")
	}
}

// TestRefused: trees that FAT cannot hold are errors that name the file.
func TestRefused(t *testing.T) {
	for path, f := range map[string]*fstest.MapFile{
		"dir/sym":                {Mode: fs.ModeSymlink | 0o777, Data: []byte("x")},
		"dir/fifo":               {Mode: fs.ModeNamedPipe | 0o644},
		"dir/a:b":                file(1, 1),
		"dir/a\\b":               file(1, 1),
		"dir/tab\t":              file(1, 1),
		"dir/dot.":               file(1, 1),
		"dir/blank ":             file(1, 1),
		"dir/OTHER":              file(1, 1),
		"dir/" + long(256):       file(1, 1),
		"dir/" + long(128) + "𝄞": file(1, 1),
	} {
		tree := fstest.MapFS{"dir/Other": file(1, 1), path: f}
		v, err := fat.New(t.Context(), tree, nil)
		var pe *fs.PathError
		if path == "dir/"+long(128)+"𝄞" {
			if err != nil {
				t.Error(err)
			}
			continue
		}
		if !errors.As(err, &pe) || pe.Path != path && path != "dir/OTHER" {
			t.Errorf("%q: %v, %v", path, v, err)
		}
	}
	for _, l := range []string{"twelve chars", "a*b", "ä", " x"} {
		if _, err := fat.New(t.Context(), fstest.MapFS{}, &fat.Options{Label: l}); err == nil {
			t.Errorf("label %q is taken", l)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := fat.New(ctx, zoo(), nil); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func long(n int) string { return strings.Repeat("x", n) }

// TestTimes: what FAT cannot tell is brought into its range.
func TestTimes(t *testing.T) {
	oracle.Require(t, "mcopy")
	epoch := when().Unix()
	for _, c := range []struct {
		mod, want time.Time
		max       *int64
	}{
		{time.Date(1970, 1, 1, 0, 0, 0, 0, time.UTC), time.Date(1980, 1, 1, 0, 0, 0, 0, time.UTC), nil},
		{time.Date(2030, 12, 31, 23, 59, 59, 999, time.UTC), time.Date(2030, 12, 31, 23, 59, 58, 0, time.UTC), nil},
		{time.Date(2024, 6, 1, 1, 0, 0, 0, time.FixedZone("x", 7200)), time.Date(2024, 5, 31, 23, 0, 0, 0, time.UTC), nil},
		{time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC), when(), &epoch},
	} {
		v, err := fat.New(t.Context(), fstest.MapFS{"F": {ModTime: c.mod, Mode: 0o644}}, &fat.Options{MaxTime: c.max})
		if err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		oracle.MustRun(t, "mcopy", "-m", "-i", write(t, v), "::F", dir)
		info, err := os.Stat(filepath.Join(dir, "F"))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(c.want, info.ModTime().UTC()); diff != "" {
			t.Error(diff)
		}
	}
}

// TestChanged: a file that changes after New is an error that names it.
func TestChanged(t *testing.T) {
	for name, change := range map[string]func(path string) error{
		"shorter": func(p string) error { return os.Truncate(p, 10) },
		"gone":    os.Remove,
		"longer": func(p string) error {
			f, err := os.OpenFile(p, os.O_APPEND|os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = f.WriteString("more")
			return err
		},
		"later": func(p string) error { return os.Chtimes(p, when(), when().Add(time.Second)) },
	} {
		dir := t.TempDir()
		path := filepath.Join(dir, "file")
		if err := os.WriteFile(path, make([]byte, 5000), 0o600); err != nil {
			t.Fatal(err)
		}
		v, err := fat.New(t.Context(), os.DirFS(dir), nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := change(path); err != nil {
			t.Fatal(err)
		}
		for off := int64(0); off < v.Size() && err == nil; off += 512 {
			var n int
			if n, err = v.ReadAt(make([]byte, 512), off); err != nil && n > 0 {
				t.Errorf("%s: %d bytes are read", name, n)
			}
		}
		var pe *fs.PathError
		if !errors.As(err, &pe) || name != "gone" && !errors.Is(err, fat.ErrChanged) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

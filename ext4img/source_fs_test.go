package ext4img

import (
	"archive/zip"
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/google/go-cmp/cmp"

	"qimg/qcow2/blockdev"
)

func TestFromFS(t *testing.T) {
	m := fstest.MapFS{
		"a/f":    {Data: []byte("file"), Mode: 0o640, ModTime: time.Unix(7, 8)},
		"a/link": {Data: []byte("../x"), Mode: fs.ModeSymlink | 0o777, ModTime: time.Unix(5, 0)},
		"a/s":    {Data: []byte("s"), Mode: fs.ModeSetuid | 0o755, ModTime: time.Unix(5, 0)},
	}
	want := []string{". 40555 0:0 t=0.000000000", "a 40555 0:0 t=0.000000000", `a/f 100640 0:0 t=7.000000008 4 @0:"file"`, "a/link 120777 0:0 -> ../x", `a/s 104755 0:0 1 @0:"s"`}
	if diff := cmp.Diff(want, dump(t, merge(t, nil, FromFS(m)))); diff != "" {
		t.Error(diff)
	}
	m["irregular"] = &fstest.MapFile{Mode: fs.ModeIrregular}
	if _, err := Merge(t.Context(), []Source{FromFS(m)}, nil); err == nil || !strings.Contains(err.Error(), "irregular: it is of no type") {
		t.Errorf("an irregular file: %v", err)
	}
}

// TestFromDirFS reads a directory by os and by the fs.FS of os.
func TestFromDirFS(t *testing.T) {
	dir := t.TempDir()
	for i := range 50 {
		path := filepath.Join(dir, fmt.Sprintf("d%d/f%d", i%5, i))
		if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, bytes.Repeat([]byte{byte(i)}, i*371), 0o600|os.FileMode(i%64)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Link(filepath.Join(dir, "d1/f1"), filepath.Join(dir, "hard")); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(dump(t, merge(t, nil, Dir(dir))), dump(t, merge(t, nil, FromFS(os.DirFS(dir))))); diff != "" {
		t.Error(diff)
	}
}

// TestFromZip reads files that have neither ReadAt nor Seek, by many workers.
func TestFromZip(t *testing.T) {
	var b bytes.Buffer
	w := zip.NewWriter(&b)
	want := map[string][]byte{}
	for i := range 5 {
		data := bytes.Repeat([]byte(fmt.Sprintf("%09d:%d", i*7919, i)), 500000)
		f, err := w.Create(fmt.Sprintf("dir/%d", i))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.Write(data); err != nil {
			t.Fatal(err)
		}
		want[fmt.Sprintf("dir/%d", i)] = data
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	r, err := zip.NewReader(bytes.NewReader(b.Bytes()), int64(b.Len()))
	if err != nil {
		t.Fatal(err)
	}
	tree := merge(t, nil, FromFS(r))
	o, err := tree.openFile(tree.entries.at(tree.dirs.at(1).first).inode)
	if err != nil {
		t.Fatal(err)
	}
	defer o.close()
	for _, off := range []int64{4000000, 1000, 5000, 0} { // not in order
		got := make([]byte, 100)
		if err := o.read(got, off); err != nil || !bytes.Equal(got, want["dir/0"][off:off+100]) {
			t.Errorf("offset %d: %q, %v", off, got, err)
		}
	}
	l, err := NewLayout(t.Context(), tree, nil)
	if err != nil {
		t.Fatal(err)
	}
	mem := blockdev.NewMemory(l.Size())
	if err := l.Write(t.Context(), mem, &WriteOptions{Workers: 7}); err != nil {
		t.Fatal(err)
	}
	image, err := Open(mem, nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range want {
		if got, err := image.ReadFile(name); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%s: %d bytes that differ, %v", name, len(got), err)
		}
	}
}

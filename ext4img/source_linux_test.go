package ext4img

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"qimg/qcow2/blockdev"
)

// TestPortableSource reads a tree both ways, by descriptors and by os.Root.
func TestPortableSource(t *testing.T) {
	dir := t.TempDir()
	for i := range 300 {
		path := filepath.Join(dir, fmt.Sprintf("d%d/e/f%d", i%5, i))
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, bytes.Repeat([]byte{byte(i)}, i*37), 0o600|os.FileMode(i%64)); err != nil {
			t.Fatal(err)
		}
	}
	for _, err := range []error{
		os.Symlink("../nowhere", filepath.Join(dir, "link")),
		os.Link(filepath.Join(dir, "d1/e/f1"), filepath.Join(dir, "hard")),
		syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o640),
		os.Chmod(filepath.Join(dir, "d2"), 0o750|os.ModeSetgid|os.ModeSticky),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	var images [2][]byte
	for i, open := range []func(string) (sourceDir, error){openSourceDir, openRootDir} {
		root, err := open(dir)
		if err != nil {
			t.Fatal(err)
		}
		tree, err := scan(t.Context(), root, &ScanOptions{})
		if err != nil {
			t.Fatal(err)
		}
		defer tree.Close()
		l, err := NewLayout(t.Context(), tree, nil)
		if err != nil {
			t.Fatal(err)
		}
		mem := blockdev.NewMemory(l.Size())
		if err := l.Write(t.Context(), mem, nil); err != nil {
			t.Fatal(err)
		}
		images[i] = make([]byte, l.Size())
		if _, err := mem.ReadAt(images[i], 0); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(images[0], images[1]) {
		t.Error("os.Root gives another image")
	}
}

// TestUnreadable runs as a user who must not read everything. Root may read
// all, so there the test gives itself another user id.
func TestUnreadable(t *testing.T) {
	dir := t.TempDir()
	for name, mode := range map[string]os.FileMode{"secret": 0, "open": 0o644, "closed/file": 0o644, "closed": 0} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if name != "closed" {
			if err := os.WriteFile(path, []byte("x"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		defer os.Chmod(path, mode)
	}
	asUser(t, dir, func() {
		for _, name := range []string{"secret", "closed"} {
			if err := os.Chmod(filepath.Join(dir, name), 0); err != nil {
				t.Fatal(err)
			}
		}
		_, err := Scan(t.Context(), dir, nil)
		if !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "closed") {
			t.Errorf("scan: %v", err)
		}
		var warnings []string
		tree, err := Scan(t.Context(), dir, &ScanOptions{SkipUnreadable: true, Warn: func(s string) { warnings = append(warnings, s) }})
		if err != nil {
			t.Fatal(err)
		}
		defer tree.Close()
		if tree.Entries() != 2 || len(warnings) != 2 {
			t.Errorf("%d entries, warnings %q", tree.Entries(), warnings)
		}
		for _, name := range []string{"secret", "closed"} {
			if err := os.Chmod(filepath.Join(dir, name), 0o755); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// asUser runs fn with the effective user id of nobody, if that is not so
// already. dir is given to that user.
func asUser(t *testing.T, dir string, fn func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		fn()
		return
	}
	const nobody = 65534
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, nobody, nobody)
	})
	if err != nil {
		t.Fatal(err)
	}
	for p := filepath.Dir(dir); p != "/" && p != os.TempDir(); p = filepath.Dir(p) {
		if err := os.Chmod(p, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Seteuid(nobody); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := syscall.Seteuid(0); err != nil {
			panic(err) // nothing after this could be trusted
		}
	}()
	fn()
}

package guest

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"qimg/ext4img"
	"qimg/qcow2/blockdev"
)

// TestImportChanged has a source change between the plan and the copy.
func TestImportChanged(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("as it was"), 0o666); err != nil {
		t.Fatal(err)
	}
	tree, err := ext4img.Scan(t.Context(), dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	l, err := ext4img.NewLayout(t.Context(), tree, &ext4img.LayoutOptions{Size: 16 << 20})
	if err != nil {
		t.Fatal(err)
	}
	dev := blockdev.NewMemory(l.Size())
	if err := l.Write(t.Context(), dev, nil); err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	for name, change := range map[string]func() error{
		"longer":   func() error { return os.WriteFile(file, []byte("as it has become"), 0o666) },
		"other":    func() error { return os.WriteFile(file, []byte("different"), 0o666) },
		"replaced": func() error { return os.Rename(file+"2", file) },
	} {
		if err := os.WriteFile(file+"2", []byte("as it was"), 0o666); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(file, time.Unix(1, 0), time.Unix(2, 0)); err != nil {
			t.Fatal(err)
		}
		ed, err := ext4img.OpenEditor(t.Context(), dev, nil)
		if err != nil {
			t.Fatal(err)
		}
		host := Host(root)
		from, err := host.Lookup("file", false)
		if err != nil {
			t.Fatal(err)
		}
		n, err := Edit(context.Background(), ed, nil, func(c *Edits) error {
			if !c.Planned() {
				if err := change(); err != nil {
					t.Fatal(err)
				}
			}
			return NewImporter(c, nil).Copy(ext4img.RootIno, "new", host, from)
		})
		if n != 0 || !errors.Is(err, ext4img.ErrChanged) && !errors.Is(err, errReplaced) {
			t.Errorf("%s: %d transactions, %v", name, n, err)
		}
	}
}

package cli

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"qimg/qcow2/blockdev"
)

// If one of several files cannot get its name, none is there.
func TestCommitAll(t *testing.T) {
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	begin := func() (outs []*blockdev.Output) {
		for _, path := range []string{a, b} {
			out, err := blockdev.CreateFile(path, nil)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { out.Abort() })
			outs = append(outs, out)
		}
		return outs
	}
	outs := begin()
	if err := os.WriteFile(b, []byte("somebody else's"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := commitAll(outs); !errors.Is(err, fs.ErrExist) {
		t.Error(err)
	}
	if _, err := os.Stat(a); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the first is there: %v", err)
	}
	os.Remove(b)
	if err := commitAll(begin()); err != nil {
		t.Error(err)
	}
	for _, path := range []string{a, b} {
		if _, err := os.Stat(path); err != nil {
			t.Error(err)
		}
	}
}

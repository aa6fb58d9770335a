package ext4img

import (
	"os"
	"path/filepath"
	"testing"

	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/oracle"
)

// TestCheckOrphans checks what a crash of the kernel leaves of files and
// directories that were removed while they were open: notes alone, and an Editor
// frees them.
func TestCheckOrphans(t *testing.T) {
	for _, args := range []string{"-t ext4 -b 1024", "-t ext4 -b 1024 -O orphan_file"} {
		t.Run(args, func(t *testing.T) {
			image := makeImage(t, args, "20M")
			dir := mountAt(t, image, "noatime")
			if err := os.MkdirAll(filepath.Join(dir, "parent", "empty"), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, "file"), make([]byte, 20000), 0o644); err != nil {
				t.Fatal(err)
			}
			for _, name := range []string{"file", "parent/empty"} {
				f, err := os.Open(filepath.Join(dir, name))
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				if err := os.Remove(f.Name()); err != nil {
					t.Fatal(err)
				}
			}
			root, err := os.Open(dir)
			if err != nil {
				t.Fatal(err)
			}
			err = root.Sync()
			root.Close()
			if err != nil {
				t.Fatal(err)
			}
			crashed := filepath.Join(t.TempDir(), "crashed")
			oracle.MustRun(t, "cp", image, crashed)
			dev, err := blockdev.OpenFile(crashed, &blockdev.FileOptions{NoLock: true})
			if err != nil {
				t.Fatal(err)
			}
			defer dev.Close()
			seen := map[Kind]bool{}
			for f, err := range Check(t.Context(), dev, nil) {
				if err != nil || f.Severity == Error {
					t.Fatal(f, err)
				}
				seen[f.Kind] = true
			}
			if !seen[OrphansLeft] || !seen[JournalDirty] {
				t.Errorf("found %v", seen)
			}
			editAt(t, crashed)
			fsck(t, crashed)
		})
	}
}

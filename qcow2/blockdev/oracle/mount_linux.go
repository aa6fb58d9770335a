package oracle

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// MountNew makes a file system of 1 GiB with the given program, mounts it and
// returns where. It needs root, and a kernel that knows the file system.
func MountNew(t testing.TB, mkfs string) string {
	t.Helper()
	RequireRoot(t)
	Require(t, mkfs)
	image := filepath.Join(t.TempDir(), "fs")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 1<<30); err != nil {
		t.Fatal(err)
	}
	MustRun(t, mkfs, "-q", image)
	dir := t.TempDir()
	if r := Run(t, "mount", "-o", "loop", image, dir); r.Code != 0 {
		Missing(t, "a kernel that mounts what "+mkfs+" makes")
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

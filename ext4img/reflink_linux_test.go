package ext4img_test

import (
	"crypto/rand"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"qimg/qcow2/blockdev/oracle"
)

// TestReflink builds where source and image lie on one file system that shares
// blocks: the image holds the blocks of the source's large files themselves.
func TestReflink(t *testing.T) {
	oracle.Require(t, "filefrag")
	mnt := oracle.MountNew(t, "mkfs.btrfs")
	src := filepath.Join(mnt, "src")
	if err := os.Mkdir(src, 0o755); err != nil {
		t.Fatal(err)
	}
	noise := make([]byte, 20<<20+4321)
	rand.Read(noise)
	if err := os.WriteFile(filepath.Join(src, "large"), noise, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(src, "small"), noise[:5000], 0o644); err != nil {
		t.Fatal(err)
	}
	image := filepath.Join(mnt, "image")
	buildTo(t, src, image, nil, nil, nil)
	oracle.MustRun(t, "e2fsck", "-fn", image)
	if r := oracle.Run(t, oracle.Tool(t, "ext4-fidelity"), src, image); r.Code != 0 {
		t.Errorf("%s%s", r.Stdout, r.Stderr)
	}
	if out := oracle.MustRun(t, "filefrag", "-v", image); !strings.Contains(out, "shared") {
		t.Errorf("the image shares no blocks:\n%s", out)
	}
}

package ext4img

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/oracle"
)

// TestEmptyLeaf looks for names in a leaf of which the kernel has removed all:
// without checksums that is one entry as long as the block, as index blocks
// begin with.
func TestEmptyLeaf(t *testing.T) {
	oracle.Require(t, "mke2fs", "e2fsck")
	tree := t.TempDir()
	for i := range 100 {
		if err := os.WriteFile(filepath.Join(tree, strings.Repeat("n", 60)+fmt.Sprint(i)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	image := filepath.Join(t.TempDir(), "image")
	oracle.MustRun(t, "mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", "-O", "^metadata_csum", "-d", tree, image, "4M")
	if r := oracle.Run(t, "e2fsck", "-fyD", image); r.Code > 1 {
		t.Fatal(r.Stdout)
	}
	f := openImage(t, image, nil)
	root, err := f.Inode(RootIno)
	if err != nil || root.Flags&indexFl == 0 {
		t.Fatalf("%v, i_flags %#x", err, root.Flags)
	}
	_, block, err := f.dirBlockAt(root, 1)
	if err != nil {
		t.Fatal(err)
	}
	dev, err := blockdev.OpenFile(image, &blockdev.FileOptions{Write: true, NoLock: true})
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	b := make([]byte, 1024)
	binary.LittleEndian.PutUint16(b[4:], 1024)
	if _, err := dev.WriteAt(b, block*1024); err != nil {
		t.Fatal(err)
	}
	f = openImage(t, image, nil)
	gone := 0
	for i := range 100 {
		_, err := f.LookupIn(RootIno, strings.Repeat("n", 60)+fmt.Sprint(i))
		if errors.Is(err, fs.ErrNotExist) {
			gone++
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if gone == 0 || gone == 100 {
		t.Errorf("%d of 100 names are gone", gone)
	}
}

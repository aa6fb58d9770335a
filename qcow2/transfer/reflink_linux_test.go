package transfer_test

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/oracle"
	"qimg/qcow2/transfer"
)

// TestReflink copies where source and target lie on one file system that shares
// blocks: whole clusters are shared, in a raw copy and in a new image. Clusters
// smaller than a block are copied, where they do not happen to lie on one.
func TestReflink(t *testing.T) {
	oracle.Require(t, "filefrag", "qemu-img")
	dir := oracle.MountNew(t, "mkfs.btrfs")
	const size = 9<<20 + 512
	b := make([]byte, size)
	rand.NewChaCha8([32]byte{1}).Read(b[3<<20 : 7<<20])
	rand.NewChaCha8([32]byte{2}).Read(b[size-700:])
	raw := filepath.Join(dir, "raw")
	if err := os.WriteFile(raw, b, 0o600); err != nil {
		t.Fatal(err)
	}
	src, err := blockdev.OpenFile(raw, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	for _, clusterSize := range []int64{0, 4096, 64 << 10, 512} {
		name := filepath.Join(dir, "copy")
		out, err := blockdev.CreateFile(name, nil)
		if err != nil {
			t.Fatal(err)
		}
		var dst transfer.Target = out.File()
		var w *qcow2.Writer
		format := "raw"
		if clusterSize > 0 {
			w, err = qcow2.NewWriter(t.Context(), out.File(), size, &qcow2.WriterOptions{InOrder: true, FormatOptions: qcow2.FormatOptions{ClusterSize: clusterSize}})
			dst, format = w, "qcow2"
		} else {
			err = out.File().Truncate(size)
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := transfer.Copy(t.Context(), dst, src, &transfer.Options{KernelCopy: true, TargetIsZero: true}); err != nil {
			t.Fatal(err)
		}
		if w != nil {
			if err := w.Finish(); err != nil {
				t.Fatal(err)
			}
		}
		if err := out.Commit(); err != nil {
			t.Fatal(err)
		}
		if r := oracle.Run(t, "qemu-img", "compare", "-f", "raw", "-F", format, raw, name); r.Code != 0 {
			t.Errorf("clusters of %d: %s%s", clusterSize, r.Stdout, r.Stderr)
		}
		if clusterSize > 0 {
			oracle.MustRun(t, "qemu-img", "check", "-f", "qcow2", name)
		}
		if clusterSize != 512 && !strings.Contains(oracle.MustRun(t, "filefrag", "-v", name), "shared") {
			t.Errorf("clusters of %d: no blocks are shared", clusterSize)
		}
	}
}

package cli_test

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"qimg/qcow2/blockdev/oracle"
)

// loopDevice attaches a file of noise to a loop device.
func loopDevice(t *testing.T, size int) string {
	t.Helper()
	oracle.RequireRoot(t)
	path := filepath.Join(t.TempDir(), "loop")
	noise := make([]byte, size)
	rand.Read(noise)
	writeFile(t, path, string(noise))
	r := oracle.Run(t, "losetup", "--find", "--show", "--partscan", path)
	if r.Code != 0 {
		oracle.Missing(t, "a loop device")
	}
	dev := strings.TrimSpace(r.Stdout)
	t.Cleanup(func() { exec.Command(oracle.Path(t, "losetup"), "--detach", dev).Run() })
	return dev
}

// partitionNode makes a node for the first partition of a loop device, which
// only some systems do by themselves.
func partitionNode(t *testing.T, dev string) string {
	t.Helper()
	b, err := os.ReadFile("/sys/class/block/" + filepath.Base(dev) + "p1/dev")
	if err != nil {
		t.Fatal(err)
	}
	var major, minor uint32
	if _, err := fmt.Sscanf(string(b), "%d:%d", &major, &minor); err != nil {
		t.Fatal(err)
	}
	node := filepath.Join(t.TempDir(), "p1")
	if err := unix.Mknod(node, unix.S_IFBLK|0o600, int(unix.Mkdev(major, minor))); err != nil {
		t.Fatal(err)
	}
	return node
}

// TestBlockDeviceOutput writes to block devices, and has the kernel mount what is there.
func TestBlockDeviceOutput(t *testing.T) {
	oracle.Require(t, "losetup", "e2fsck", "sfdisk", "partx", "mount")
	dev := loopDevice(t, 32<<20)
	t.Chdir(t.TempDir())
	buildTree(t, "tree")
	before, err := os.ReadFile(dev)
	if err != nil {
		t.Fatal(err)
	}
	refused := func(want string, args ...string) {
		t.Helper()
		r := run(t, append([]string{"build"}, args...)...)
		if r.Code != 1 || !strings.Contains(r.Stderr, want) || r.Stdout != "" {
			t.Errorf("%q: %+v", args, r)
		}
		if after, err := os.ReadFile(dev); err != nil || !bytes.Equal(after, before) {
			t.Fatalf("%q: the device was written to, %v", args, err)
		}
	}
	refused("is a block device\nUse -n", "-f", "raw", "tree", dev)
	refused("takes -f raw only", "-n", "-f", "qcow2", "tree", dev)
	refused("-n goes with a block device only", "-n", "tree", "x.raw")
	refused("has 33554432 bytes, ", "-n", "--free", "1G", "tree", dev)
	refused("is too small", "-n", "--size", "1M", "tree", dev)
	refused("has 33554432 bytes, ", "-n", "--free", "1G", "--partition", "gpt", "tree", dev)

	// The whole device, by itself or with a table.
	for _, opts := range [][]string{nil, {"--partition", "gpt"}, {"--partition", "mbr"}} {
		mustRun(t, append(append([]string{"build", "-n"}, opts...), "tree", dev)...)
		mustRun(t, append(append([]string{"build", "--size", "32M"}, opts...), "tree", "disk.raw")...)
		sameContent(t, "disk.raw", dev)
		part := dev
		if opts != nil {
			oracle.MustRun(t, "partx", "-u", dev)
			part = partitionNode(t, dev)
		}
		oracle.MustRun(t, "e2fsck", "-fn", part)
		mountpoint := t.TempDir()
		if err := unix.Mount(part, mountpoint, "ext4", 0, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(mountpoint, unix.MNT_DETACH) }) // if it fails before
		sameContent(t, "tree/sub/zeroes and more", mountpoint+"/sub/zeroes and more")
		if before, err = os.ReadFile(dev); err != nil {
			t.Fatal(err)
		}
		refused("is in use\nIs it, or a partition of it, mounted?", "-n", "tree", dev)
		if err := unix.Unmount(mountpoint, 0); err != nil {
			t.Fatal(err)
		}
	}

	// A part of it, and several partitions.
	mustRun(t, "build", "-n", "--free", "1M", "--partition", "gpt", "tree", dev)
	if out := oracle.MustRun(t, "sfdisk", "-V", dev); !strings.Contains(out, "No errors detected") {
		t.Error(out)
	}
	writeFile(t, "disk.json", `{"partitions": [{"fs": "fat", "source": "tree", "size": "10M"}, {"source": "tree", "size": "rest"}]}`)
	mustRun(t, "build", "-n", "--disk", "disk.json", dev)
	writeFile(t, "disk.json", `{"size": "32M", "partitions": [{"fs": "fat", "source": "tree", "size": "10M"}, {"source": "tree", "size": "rest"}]}`)
	mustRun(t, "build", "--disk", "disk.json", "disk.raw")
	sameContent(t, "disk.raw", dev)
	writeFile(t, "disk.json", `{"size": "31M", "partitions": [{"source": "tree", "size": "rest"}]}`)
	if before, err = os.ReadFile(dev); err != nil {
		t.Fatal(err)
	}
	refused("has 33554432 bytes, the disk is to have 32505856", "-n", "--disk", "disk.json", dev)
}

// TestBuildFIFO writes to a pipe with a name.
func TestBuildFIFO(t *testing.T) {
	t.Chdir(t.TempDir())
	buildTree(t, "tree")
	if err := unix.Mkfifo("pipe", 0o600); err != nil {
		t.Fatal(err)
	}
	read := make(chan []byte)
	go func() {
		b, _ := os.ReadFile("pipe")
		read <- b
	}()
	mustRun(t, "build", "--minimize", "tree", "pipe")
	writeFile(t, "piped", string(<-read))
	mustRun(t, "build", "--minimize", "tree", "disk.raw")
	sameContent(t, "disk.raw", "piped")
}

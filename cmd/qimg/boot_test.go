//go:build linux && amd64

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"qimg/cmd/internal/cli"
	"qimg/qcow2/blockdev/oracle"
)

// TestBoot is the main job from end to end: a kernel boots in QEMU with a disk
// that build made as its second one, mounts it read-write, finds every file as
// it was, writes one, and has the file system grow with its disk. Afterwards
// qemu-img and e2fsck find nothing wrong.
func TestBoot(t *testing.T) {
	oracle.Require(t, "qemu-system-x86_64", "qemu-img", "busybox", "e2fsck", "debugfs", "resize2fs")
	kernel, version := findKernel(t)
	tree := bootTree(t)
	initrd := bootInitrd(t, version, tree)
	for _, flags := range []string{"", "--compat 0.10", "-c", "-c --compression zstd --block-size 1k --no-journal"} {
		name := strings.ReplaceAll(strings.Trim(flags, "-"), " ", "")
		t.Run("build"+name, func(t *testing.T) {
			dir := t.TempDir()
			system, data := filepath.Join(dir, "system.qcow2"), filepath.Join(dir, "data.qcow2")
			qimg(t, "create", "-q", "-f", "qcow2", system, "64M")
			qimg(t, append([]string{"build", tree, data}, strings.Fields(flags)...)...)
			oracle.MustRun(t, "qemu-img", "resize", "-q", data, "+3G")
			console := boot(t, kernel, initrd, system, data)
			for _, want := range []string{"qimg-test: mounted rw", "qimg-test: sums good", "qimg-test: attributes good", "qimg-test: grown", "qimg-test: done"} {
				if !strings.Contains(console, want) {
					t.Fatalf("the guest did not say %q:\n%s", want, console)
				}
			}
			if strings.Contains(console, "EXT4-fs error") || strings.Contains(console, "EXT4-fs warning") {
				t.Errorf("the kernel complains:\n%s", console)
			}
			oracle.MustRun(t, "qemu-img", "check", data)
			raw := filepath.Join(dir, "data.raw")
			oracle.MustRun(t, "qemu-img", "convert", "-O", "raw", data, raw)
			oracle.MustRun(t, "e2fsck", "-fn", raw)
			if got := oracle.MustRun(t, "debugfs", "-R", "cat /from-guest", raw); got != "written by the guest\n" {
				t.Errorf("what the guest wrote: %q", got)
			}
		})
	}
}

// qimg runs a command in-process; it has to succeed.
func qimg(t *testing.T, args ...string) {
	t.Helper()
	var out bytes.Buffer
	host := cli.Host{Out: &out, Err: &out, Getenv: func(string) string { return "" }}
	if code := cli.Run(t.Context(), append([]string{"qimg"}, args...), host); code != 0 {
		t.Fatalf("qimg %q: exit %d\n%s", args, code, out.String())
	}
}

// findKernel finds the newest cloud kernel of Debian that is installed.
func findKernel(t *testing.T) (path, version string) {
	t.Helper()
	kernels, _ := filepath.Glob("/boot/vmlinuz-*-cloud-amd64")
	if len(kernels) == 0 {
		oracle.Missing(t, "a kernel /boot/vmlinuz-*-cloud-amd64")
	}
	path = slices.Max(kernels)
	return path, strings.TrimPrefix(filepath.Base(path), "vmlinuz-")
}

// bootTree makes a tree with most kinds of files.
func bootTree(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.CopyFS(dir, os.DirFS("../../testdata/workload")))
	must(os.Mkdir(filepath.Join(dir, "many"), 0o755))
	for i := range 1500 {
		must(os.WriteFile(filepath.Join(dir, "many", fmt.Sprintf("file number %d", i)), []byte(strings.Repeat("x", i)), 0o644))
	}
	big := make([]byte, 5<<20)
	rng := rand.NewChaCha8([32]byte{})
	rng.Read(big)
	must(os.WriteFile(filepath.Join(dir, "big"), big, 0o600))
	must(os.Link(filepath.Join(dir, "big"), filepath.Join(dir, "big too")))
	must(os.WriteFile(filepath.Join(dir, "empty"), nil, 0o444))
	must(os.WriteFile(filepath.Join(dir, "setuid"), []byte("#!/bin/sh\n"), 0o755))
	must(os.Chmod(filepath.Join(dir, "setuid"), 0o755|os.ModeSetuid))
	sparse, err := os.Create(filepath.Join(dir, "sparse"))
	must(err)
	for i := range int64(8) {
		_, err := sparse.WriteAt(big[:10000], i*9<<20)
		must(err)
	}
	must(sparse.Close())
	must(os.Symlink(strings.Repeat("long/", 30)+"target", filepath.Join(dir, "long link")))
	old := time.Date(1983, 1, 2, 3, 4, 5, 0, time.UTC)
	must(os.Chtimes(filepath.Join(dir, "big"), old, old))
	return dir
}

// guest is what runs in the guest.
const guest = `#!/bin/busybox sh
export PATH=/bin
/bin/busybox mkdir -p /proc /sys /dev /mnt
/bin/busybox --install -s /bin
say() { echo "qimg-test: $*"; }
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r m; do insmod "/modules/$m" || say "insmod $m failed"; done </modules/order
n=0
# The second disk of the first bus; whether it is sda or sdb is a race.
while ! disk=/dev/$(ls /sys/bus/scsi/devices/0:0:1:0/block 2>/dev/null) || [ ! -b $disk ] && [ $n -lt 100 ]; do sleep 0.1; n=$((n+1)); done
mount -t ext4 $disk /mnt || { say "mount failed"; dmesg | tail -n 5; reboot -f; }
grep -q "^$disk /mnt ext4 rw" /proc/mounts && say "mounted rw"
cd /mnt
sha256sum -c /sums >/tmp-sums 2>&1 && say "sums good" || grep -v ': OK$' /tmp-sums
find . -path ./lost+found -prune -o -type d -exec stat -c '%a %u:%g - - %Y %n' {} + >/got
find . ! -type d -exec stat -c '%a %u:%g %h %s %Y %n' {} + >>/got
sort -o /got /got
cmp /want /got && say "attributes good" || diff /want /got
echo "written by the guest" >from-guest
before=$(stat -f -c %b /mnt)
resize2fs $disk && [ $(stat -f -c %b /mnt) -gt $((before * 2)) ] && say "grown"
cd /
sync
umount /mnt && say "done"
reboot -f
`

// bootInitrd makes the initial file system of the guest: busybox, the modules
// of the disks, and what the tree is to be found like.
func bootInitrd(t *testing.T, version, tree string) string {
	t.Helper()
	var archive cpio
	archive.add("init", 0o100755, []byte(guest))
	archive.add("bin", 0o040755, nil)
	archive.add("modules", 0o040755, nil)
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatal(err)
	}
	archive.addFile(t, "bin/busybox", busybox)
	resize2fs := oracle.Path(t, "resize2fs")
	archive.addProgram(t, resize2fs)
	lib := filepath.Join("/lib/modules", version)
	var order strings.Builder
	for _, m := range moduleOrder(t, lib, "ata_piix", "sd_mod") {
		archive.addFile(t, "modules/"+filepath.Base(m), filepath.Join(lib, m))
		fmt.Fprintln(&order, filepath.Base(m))
	}
	archive.add("modules/order", 0o100644, []byte(order.String()))
	sums, attrs := manifest(t, tree)
	archive.add("sums", 0o100644, []byte(sums))
	archive.add("want", 0o100644, []byte(attrs))
	archive.add("TRAILER!!!", 0, nil)
	path := filepath.Join(t.TempDir(), "initrd")
	if err := os.WriteFile(path, archive.buf.Bytes(), 0o666); err != nil {
		t.Fatal(err)
	}
	return path
}

// moduleOrder lists modules with those that they need, in the order of loading.
// What is built into the kernel is not listed.
func moduleOrder(t *testing.T, lib string, names ...string) (order []string) {
	t.Helper()
	dep, err := os.ReadFile(filepath.Join(lib, "modules.dep"))
	if err != nil {
		oracle.Missing(t, "the modules of the kernel, "+lib)
	}
	for _, name := range names {
		for line := range strings.Lines(string(dep)) {
			module, needs, _ := strings.Cut(line, ":")
			if !strings.HasPrefix(filepath.Base(module), name+".ko") {
				continue
			}
			if !strings.HasSuffix(module, ".ko") {
				oracle.Missing(t, "kernel modules that are not compressed")
			}
			list := strings.Fields(needs) // the one that needs nothing is the last
			slices.Reverse(list)
			for _, m := range append(list, module) {
				if !slices.Contains(order, m) {
					order = append(order, m)
				}
			}
		}
	}
	return order
}

// manifest is what sha256sum and stat have to print in the guest.
func manifest(t *testing.T, tree string) (sums, attrs string) {
	t.Helper()
	var sumLines, attrLines []string
	err := filepath.WalkDir(tree, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(tree, path)
		if err != nil {
			return err
		}
		name := "./" + rel
		if rel == "." {
			name = rel
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		if info.Mode().IsRegular() {
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			sumLines = append(sumLines, fmt.Sprintf("%x  %s\n", sha256.Sum256(b), name))
		}
		links, size := fmt.Sprint(st.Nlink), fmt.Sprint(st.Size)
		if info.IsDir() { // which only the file system that they lie in knows
			links, size = "-", "-"
		}
		attrLines = append(attrLines, fmt.Sprintf("%o %d:%d %s %s %d %s\n",
			st.Mode&0o7777, st.Uid, st.Gid, links, size, info.ModTime().Unix(), name))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(attrLines)
	return strings.Join(sumLines, ""), strings.Join(attrLines, "")
}

// boot boots a kernel with two disks and returns what the console said.
func boot(t *testing.T, kernel, initrd, hda, hdb string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", "-accel", "tcg", "-m", "256", "-nodefaults",
		"-display", "none", "-serial", "stdio", "-monitor", "none", "-no-reboot",
		"-kernel", kernel, "-initrd", initrd, "-append", "console=ttyS0 quiet panic=-1",
		"-drive", "file="+hda+",format=qcow2,if=ide,index=0", "-drive", "file="+hdb+",format=qcow2,if=ide,index=1")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) || ctx.Err() != nil {
		t.Fatalf("qemu: %v, %v\n%s", err, ctx.Err(), out.String())
	}
	return strings.ReplaceAll(out.String(), "\r\n", "\n")
}

// cpio is an archive as the kernel takes it (newc: Documentation/driver-api/
// early-userspace/buffer-format.rst).
type cpio struct {
	buf bytes.Buffer
	ino int
}

func (c *cpio) add(name string, mode int, data []byte) {
	c.ino++
	fmt.Fprintf(&c.buf, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
		c.ino, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0, name)
	c.pad()
	c.buf.Write(data)
	c.pad()
}

func (c *cpio) pad() { c.buf.Write(make([]byte, -c.buf.Len()&3)) }

// addProgram adds a program to /bin, and the libraries that it needs to where
// it looks for them.
func (c *cpio) addProgram(t *testing.T, path string) {
	t.Helper()
	c.addFile(t, "bin/"+filepath.Base(path), path)
	made := map[string]bool{}
	for _, word := range strings.Fields(oracle.MustRun(t, "ldd", path)) {
		if !strings.HasPrefix(word, "/") {
			continue
		}
		elements := strings.Split(filepath.Dir(word)[1:], "/")
		for i := range elements {
			if dir := strings.Join(elements[:i+1], "/"); !made[dir] {
				made[dir] = true
				c.add(dir, 0o040755, nil)
			}
		}
		c.addFile(t, word[1:], word)
	}
}

func (c *cpio) addFile(t *testing.T, name, path string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	c.add(name, 0o100755, b)
}

//go:build linux && amd64

package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"qimg/cloudimg/parttable"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/oracle"
)

// bootDisk is a disk for the kernel to judge.
const bootDisk = `{"partitions": [
  {"fs": "fat12", "source": "tree", "size": "10M"},
  {"fs": "fat16", "source": "tree", "free": "1M"},
  {"fs": "fat32", "source": "tree", "minimize": true},
  {"fs": "swap", "size": "1M"}
]}`

// bootDiskGuest is what runs in the guest.
const bootDiskGuest = `#!/bin/busybox sh
export PATH=/bin
/bin/busybox mkdir -p /proc /sys /dev /mnt
/bin/busybox --install -s /bin
say() { echo "qimg-test: $*"; }
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r m; do insmod "/modules/$m" || say "insmod $m failed"; done </modules/order
n=0
while ! disk=/dev/$(ls /sys/bus/scsi/devices/0:0:1:0/block 2>/dev/null) || [ ! -b ${disk}4 ] && [ $n -lt 100 ]; do sleep 0.1; n=$((n+1)); done
for n in 1 2 3; do
  mount -t vfat -o utf8,tz=UTC $disk$n /mnt || { say "mount $n failed"; dmesg | tail -n 5; continue; }
  cd /mnt
  sha256sum -c /sums >/tmp-sums 2>&1 && say "sums $n good" || grep -v ': OK$' /tmp-sums
  [ "$(find . -type f | wc -l)" = "$(wc -l </sums)" ] && say "number $n good"
  find . -type f -exec stat -c '%Y' {} + | sort -u >/times
  [ "$(cat /times)" = 1700000000 ] && say "times $n good" || cat /times
  mkdir "written by the guest" && cp /sums "written by the guest/sums" && rm -r many
  cd /
  umount /mnt
done
swapon ${disk}4 && say "swap good"
swapoff ${disk}4
sync
say "done"
reboot -f
`

// TestBootDisk has the kernel mount the partitions of a disk that build --disk
// makes, read everything in them, and change it.
func TestBootDisk(t *testing.T) {
	oracle.Require(t, "qemu-system-x86_64", "qemu-img", "busybox", "fsck.fat")
	kernel, version := findKernel(t)
	dir := t.TempDir()
	tree := filepath.Join(dir, "tree")
	fatTree(t, tree)
	var archive cpio
	archive.add("init", 0o100755, []byte(bootDiskGuest))
	archive.add("bin", 0o040755, nil)
	archive.add("modules", 0o040755, nil)
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatal(err)
	}
	archive.addFile(t, "bin/busybox", busybox)
	lib := filepath.Join("/lib/modules", version)
	var order strings.Builder
	for _, m := range moduleOrder(t, lib, "ata_piix", "sd_mod", "nls_cp437", "nls_ascii", "vfat") {
		archive.addFile(t, "modules/"+filepath.Base(m), filepath.Join(lib, m))
		fmt.Fprintln(&order, filepath.Base(m))
	}
	archive.add("modules/order", 0o100644, []byte(order.String()))
	sums, _ := manifest(t, tree)
	archive.add("sums", 0o100644, []byte(sums))
	archive.add("TRAILER!!!", 0, nil)
	initrd, system, disk := filepath.Join(dir, "initrd"), filepath.Join(dir, "system.qcow2"), filepath.Join(dir, "disk.qcow2")
	for name, b := range map[string][]byte{initrd: archive.buf.Bytes(), filepath.Join(dir, "disk.json"): []byte(bootDisk)} {
		if err := os.WriteFile(name, b, 0o666); err != nil {
			t.Fatal(err)
		}
	}
	qimg(t, "create", "-q", "-f", "qcow2", system, "64M")
	qimg(t, "build", "--disk", filepath.Join(dir, "disk.json"), disk)
	console := boot(t, kernel, initrd, system, disk)
	for n := range 3 {
		for _, what := range []string{"sums", "number", "times"} {
			if want := fmt.Sprintf("qimg-test: %s %d good", what, n+1); !strings.Contains(console, want) {
				t.Errorf("the guest did not say %q", want)
			}
		}
	}
	if !strings.Contains(console, "qimg-test: swap good") || !strings.Contains(console, "qimg-test: done") || strings.Contains(console, "error") {
		t.Errorf("not all is good")
	}
	if t.Failed() {
		t.Fatal(console)
	}
	raw := filepath.Join(dir, "disk.raw")
	oracle.MustRun(t, "qemu-img", "convert", "-O", "raw", disk, raw)
	for n := range 3 {
		oracle.MustRun(t, "fsck.fat", "-n", partOf(t, raw, n+1))
	}
}

// fatTree makes a tree that FAT can hold, with all kinds of names.
func fatTree(t *testing.T, dir string) {
	t.Helper()
	files := map[string]int{
		"EFI/BOOT/BOOTX64.EFI": 100_001, "lower.txt": 1, "UPPER.TXT": 512, "Größe der Datei.text": 2047, "a.b.c": 2048, "a b.c": 2049,
		"日本語 𝄞": 4096, ".hidden": 5, strings.Repeat("long", 60): 6, "empty": 0, "A b.txt": 7, "ab~1.txt": 8,
	}
	for i := range 150 {
		files[fmt.Sprintf("many/file number %d", i)] = i
	}
	when := time.Unix(1_700_000_000, 0)
	for name, size := range files {
		name = filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, bytes.Repeat([]byte(filepath.Base(name)), size/len(filepath.Base(name))), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(name, when, when); err != nil {
			t.Fatal(err)
		}
	}
}

// partOf writes a partition of a disk into a file.
func partOf(t *testing.T, disk string, number int) string {
	t.Helper()
	f, err := blockdev.OpenFile(disk, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	table, err := parttable.Read(f)
	if err != nil {
		t.Fatal(err)
	}
	s, err := table.ReaderSection(f, number)
	if err != nil {
		t.Fatal(err)
	}
	out, err := os.Create(fmt.Sprintf("%s.%d", disk, number))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if _, err := io.Copy(out, io.NewSectionReader(s, 0, s.Size())); err != nil {
		t.Fatal(err)
	}
	return out.Name()
}

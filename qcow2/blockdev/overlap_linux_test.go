package blockdev_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/oracle"
)

// Loop devices, and partitions of them, overlap with their file and with each other
// where they have bytes in common.
func TestOverlap(t *testing.T) {
	oracle.RequireRoot(t)
	dir := t.TempDir()
	for _, name := range []string{"disk", "other"} {
		if err := os.WriteFile(filepath.Join(dir, name), make([]byte, 8<<20), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Link(filepath.Join(dir, "disk"), filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	// Two partitions of 1 MiB each, at 1 MiB and 4 MiB.
	mbr := make([]byte, 512)
	for i, start := range []byte{0x08, 0x20} {
		copy(mbr[446+16*i:], []byte{0, 0, 0, 0, 0x83, 0, 0, 0, 0, start, 0, 0, 0, 0x08, 0, 0})
	}
	mbr[510], mbr[511] = 0x55, 0xaa
	f, err := os.OpenFile(filepath.Join(dir, "disk"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(mbr, 0); err != nil {
		t.Fatal(err)
	}
	f.Close()
	loop := func(args ...string) string {
		r := oracle.Run(t, "losetup", append([]string{"--find", "--show"}, args...)...)
		if r.Code != 0 {
			oracle.Missing(t, "a loop device")
		}
		dev := strings.TrimSpace(r.Stdout)
		t.Cleanup(func() { exec.Command(oracle.Path(t, "losetup"), "--detach", dev).Run() })
		return dev
	}
	disk := filepath.Join(dir, "disk")
	paths := map[string]string{
		"disk": disk, "link": filepath.Join(dir, "link"), "other": filepath.Join(dir, "other"),
		"loop": loop("--partscan", disk), "again": loop(disk),
		"begin": loop("--sizelimit", "1M", disk), "end": loop("--offset", "6M", disk),
	}
	paths["on loop"] = loop(paths["loop"])
	// The nodes of partitions, which nobody may have made here.
	for i := range 2 {
		sys := fmt.Sprintf("/sys/class/block/%sp%d/dev", filepath.Base(paths["loop"]), i+1)
		b, err := os.ReadFile(sys)
		if err != nil {
			t.Log("no partitions of loop devices:", err)
			break
		}
		var major, minor uint32
		if _, err := fmt.Sscanf(string(b), "%d:%d", &major, &minor); err != nil {
			t.Fatal(err)
		}
		name := fmt.Sprintf("p%d", i+1)
		paths[name] = filepath.Join(dir, name)
		if err := unix.Mknod(paths[name], unix.S_IFBLK|0o600, int(unix.Mkdev(major, minor))); err != nil {
			oracle.Missing(t, "leave to make a device node")
		}
	}
	apart := map[string]bool{
		"begin end": true, "end begin": true, "p1 p2": true, "p2 p1": true, "begin p1": true, "p1 begin": true, "begin p2": true, "p2 begin": true,
		"end p1": true, "p1 end": true, "end p2": true, "p2 end": true,
	}
	for a, x := range paths {
		for b, y := range paths {
			ai, err := os.Stat(x)
			if err != nil {
				t.Fatal(err)
			}
			bi, err := os.Stat(y)
			if err != nil {
				t.Fatal(err)
			}
			want := a == b || a != "other" && b != "other" && !apart[a+" "+b]
			if got := blockdev.Overlap(ai, bi); got != want {
				t.Errorf("%s and %s: %v, want %v", a, b, got, want)
			}
		}
	}
}

package cli_test

import (
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"qimg/qcow2/blockdev/oracle"
)

// fsDisk makes a raw disk of 64 MiB: a table of sfdisk, "" for none, whose
// partitions of number last begins at offset start and holds a file system.
func fsDisk(t *testing.T, script string, start int64, mkfs ...string) string {
	t.Helper()
	oracle.Require(t, "mke2fs", "e2fsck", "sfdisk", "sgdisk", "qemu-img")
	dir := t.TempDir()
	tree, disk := filepath.Join(dir, "tree"), filepath.Join(dir, "disk")
	for i := range 50 {
		name := filepath.Join(tree, fmt.Sprintf("d%d", i%5), fmt.Sprint(i))
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		writeFile(t, name, strings.Repeat(fmt.Sprint(i), i*i*9))
	}
	writeFile(t, disk, "")
	if err := os.Truncate(disk, 64<<20); err != nil {
		t.Fatal(err)
	}
	if script != "" {
		sfdisk(t, disk, script)
	}
	args := append([]string{"-q", "-F", "-t", "ext4", "-b", "1024", "-g", "2048", "-E", fmt.Sprintf("offset=%d,lazy_itable_init=0", start), "-d", tree}, mkfs...)
	oracle.MustRun(t, "mke2fs", append(args, disk, "40M")...)
	return disk
}

func sfdisk(t *testing.T, disk, script string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), oracle.Path(t, "sfdisk"), "-q", "--no-tell-kernel", disk) // nor sync all of the system
	cmd.Stdin = strings.NewReader(script)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("sfdisk: %v\n%s", err, out)
	}
}

// checkFSDisk checks table and file system of a disk, and returns the number of
// bytes of the file system.
func checkFSDisk(t *testing.T, disk string, start int64, kind string) int64 {
	t.Helper()
	raw := disk
	if strings.HasSuffix(disk, ".qcow2") {
		oracle.MustRun(t, "qemu-img", "check", "-q", disk)
		raw = filepath.Join(t.TempDir(), "raw")
		oracle.MustRun(t, "qemu-img", "convert", "-O", "raw", disk, raw)
	}
	if kind == "gpt" {
		if out := oracle.MustRun(t, "sgdisk", "-v", raw); !strings.Contains(out, "No problems found") {
			t.Errorf("sgdisk -v: %s", out)
		}
	}
	if kind != "" {
		if out := oracle.MustRun(t, "sfdisk", "-V", raw); !strings.Contains(out, "No errors detected") {
			t.Errorf("sfdisk -V: %s", out)
		}
	}
	b, err := os.ReadFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	fs := filepath.Join(t.TempDir(), "fs")
	if err := os.WriteFile(fs, b[start:], 0o600); err != nil {
		t.Fatal(err)
	}
	if r := oracle.Run(t, "e2fsck", "-fn", fs); r.Code != 0 {
		t.Fatalf("e2fsck: %d\n%s", r.Code, r.Stdout)
	}
	for line := range strings.Lines(oracle.MustRun(t, "dumpe2fs", "-h", fs)) {
		var n int64
		if _, err := fmt.Sscanf(line, "Block count: %d", &n); err == nil {
			return n << 10
		}
	}
	t.Fatal("no block count")
	return 0
}

// TestResizeFS resizes file systems in disks without a table, with a GPT and
// with an MBR.
func TestResizeFS(t *testing.T) {
	for _, c := range []struct {
		name, script string
		start        int64
		qcow2        bool
	}{
		{"", "", 0, false},
		{"gpt", "label: gpt\n2:size=2048,type=U,name=\"a b\"\n1:size=100000,type=L,attrs=GUID:60\n", 2 << 20, true},
		{"dos", "label: dos\n2:size=2048,type=c,bootable\n4:size=82000,type=83\n", 2 << 20, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			disk := fsDisk(t, c.script, c.start)
			if c.qcow2 {
				oracle.MustRun(t, "qemu-img", "convert", "-O", "qcow2", disk, disk+".qcow2")
				disk += ".qcow2"
			}
			format := "raw"
			if c.qcow2 {
				format = "qcow2"
			}
			sums := mustRun(t, "diff", disk, disk) + treeSums(t, disk)
			for _, step := range []struct {
				args  []string
				least int64 // of the file system
			}{
				{[]string{"max"}, 42 << 20},
				{[]string{"100M"}, 97 << 20},
				{[]string{"+30M"}, 127 << 20},
				{[]string{"--shrink", "50M"}, 47 << 20},
				{[]string{"--shrink", "--", "-9M"}, 38 << 20},
				{[]string{"min"}, 1 << 20},
				{[]string{"64M"}, 61 << 20},
			} {
				args := append([]string{"resize", "-f", format, "--fs"}, step.args[:len(step.args)-1]...)
				out := mustRun(t, append(args, disk, step.args[len(step.args)-1])...)
				if !strings.Contains(out, "File system: ") || strings.Contains(out, "Partition ") != (c.name != "") {
					t.Errorf("%v: %s", step.args, out)
				}
				n := checkFSDisk(t, disk, c.start, c.name)
				if n < step.least || n > step.least+step.least/8+20<<20 {
					t.Errorf("%v: %d bytes, want %d or a bit more", step.args, n, step.least)
				}
				if step.args[0] == "min" && n > 8<<20 {
					t.Errorf("the smallest file system has %d bytes", n)
				}
				if got := mustRun(t, "diff", disk, disk) + treeSums(t, disk); got != sums {
					t.Fatalf("%v: files have changed", step.args)
				}
			}
		})
	}
}

// treeSums describes all files of an image.
func treeSums(t *testing.T, disk string) string {
	t.Helper()
	return fmt.Sprintf("%x", sha256.Sum256([]byte(mustRun(t, "tar", disk+":/"))))
}

// TestResizeFSRefused tries what cannot be done. The disks stay as they are.
func TestResizeFSRefused(t *testing.T) {
	gpt := "label: gpt\n1:size=98304,type=L\n2:size=4096,type=L\n"
	for _, c := range []struct {
		name, script string
		start        int64
		prepare      func(disk string) string
		args         []string
		want         string
	}{
		{"not last", gpt, 1 << 20, nil, []string{"DISK:1", "+10M"}, "partition 1 is not the last one of the disk: partition 2 is behind it"},
		{"nothing", gpt, 1 << 20, nil, []string{"DISK:2", "+10M"}, "partition 2 holds nothing known: only ext2, ext3 and ext4"},
		{"no partition", gpt, 1 << 20, nil, []string{"DISK:7", "+10M"}, "there is no partition '7'"},
		{"too small", "", 0, nil, []string{"--shrink", "DISK", "1M"}, "smaller than what the file system holds"},
		{"no --shrink", "", 0, nil, []string{"DISK", "10M"}, "Use the --shrink option"},
		{"file", "", 0, nil, []string{"DISK:/d1", "+10M"}, "not a file in it"},
		{"logical", "label: dos\nsize=100000,type=5\n5:size=90000,type=83\n", 2 << 20, nil, []string{"DISK:5", "+10M"}, "extended and logical partitions"},
		{"2 TiB", "label: dos\n1:size=90000,type=83\n", 1 << 20, nil, []string{"DISK", "3T"}, "which needs a GPT"},
		{"negative", "", 0, nil, []string{"DISK", "--", "-70M"}, "New image size must be positive"},
		{"odd", "", 0, nil, []string{"DISK", "70000001"}, "multiple of 512"},
		{"limit", "", 0, nil, []string{"DISK", "7E"}, "there are at most"},
		{"snapshots of version 2", "", 0, func(disk string) string {
			oracle.MustRun(t, "qemu-img", "convert", "-O", "qcow2", "-o", "compat=0.10", disk, disk+".qcow2")
			oracle.MustRun(t, "qemu-img", "snapshot", "-c", "a", disk+".qcow2")
			return disk + ".qcow2"
		}, []string{"--shrink", "DISK", "-10M"}, "v2 image which has snapshots"},
		{"dirty", "", 0, func(disk string) string {
			oracle.MustRun(t, "debugfs", "-w", "-R", "ssv state 2", disk)
			return disk
		}, []string{"DISK", "+10M"}, "run e2fsck"},
	} {
		t.Run(c.name, func(t *testing.T) {
			disk := fsDisk(t, c.script, c.start)
			if c.prepare != nil {
				disk = c.prepare(disk)
			}
			before := fileSum(t, disk)
			args := []string{"resize", "--fs"}
			if !strings.HasSuffix(disk, ".qcow2") {
				args = append(args, "-f", "raw")
			}
			for _, a := range c.args {
				args = append(args, strings.Replace(a, "DISK", disk, 1))
			}
			r := run(t, args...)
			if r.Code == 0 || !strings.Contains(r.Stderr, c.want) {
				t.Errorf("exit %d: %s", r.Code, r.Stderr)
			}
			if fileSum(t, disk) != before {
				t.Error("the disk has changed")
			}
		})
	}
}

func fileSum(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%d %x", len(b), sha256.Sum256(b))
}

package cli_test

import (
	"encoding/json"
	"os"
	"strings"
	"testing"

	"qimg/qcow2/blockdev/oracle"
)

// TestCheckFS checks file systems before and after debugfs damages them, in a raw
// disk, in an image and in a partition, and compares the verdicts with e2fsck's.
func TestCheckFS(t *testing.T) {
	oracle.Require(t, "mke2fs", "e2fsck", "debugfs", "qemu-img")
	t.Chdir(t.TempDir())
	oracle.MustRun(t, "mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", "sound", "16M")
	for _, c := range []struct {
		damage, kind string // for debugfs, and of the finding
		code         int
	}{
		{"", "", 0},
		{"ssv free_blocks_count 5", "superblock-counts", 0},
		{"freeb 700", "block-not-marked", 2},
		{"seti <20>", "inode-leaked", 2},
		{"clri <11>", "entry-unused", 2},
		{"sif lost+found links_count 5", "link-count-wrong", 2},
		{"sif lost+found blocks 5000", "inode-blocks-wrong", 2},
		{"sif lost+found size 5000", "inode-size-wrong", 2},
		{"sif <8> mode 0", "journal-damaged", 2},
		{"clri <7>", "resize-inode-damaged", 2},
		{"set_bg 1 free_inodes_count 5\nset_bg 1 checksum calc", "group-counts", 2},
		{"unlink lost+found", "directory-unconnected", 2},
		{"ln lost+found second", "directory-linked-twice", 2},
	} {
		t.Run(c.kind, func(t *testing.T) {
			oracle.MustRun(t, "cp", "sound", "disk.raw")
			if c.damage != "" {
				if err := os.WriteFile("commands", []byte(c.damage+"\n"), 0o600); err != nil {
					t.Fatal(err)
				}
				oracle.MustRun(t, "debugfs", "-w", "-f", "commands", "disk.raw")
			}
			if r := oracle.Run(t, "e2fsck", "-fn", "disk.raw"); (r.Code != 0) != (c.code != 0) {
				t.Fatalf("e2fsck: exit %d\n%s", r.Code, r.Stdout)
			}
			oracle.MustRun(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", "disk.raw", "disk.qcow2")
			for _, image := range []string{"disk.raw", "disk.qcow2"} {
				r := run(t, "check", "--fs", image)
				if r.Code != c.code || !strings.Contains(r.Stdout, c.kind) || r.Stderr != "" {
					t.Errorf("%s: exit %d, expected %d and %s\n%s%s", image, r.Code, c.code, c.kind, r.Stdout, r.Stderr)
				}
			}
			r := run(t, "check", "--fs", "--output=json", "disk.qcow2")
			var list struct {
				FS []struct {
					Errors   int
					Findings []struct{ Kind, Severity string }
				} `json:"file-systems"`
			}
			if err := json.Unmarshal([]byte(r.Stdout), &list); err != nil || len(list.FS) != 1 {
				t.Fatalf("%v: %s", err, r.Stdout)
			}
			found := c.kind == ""
			for _, f := range list.FS[0].Findings {
				found = found || f.Kind == c.kind
			}
			if !found || (list.FS[0].Errors > 0) != (c.code != 0) || r.Code != c.code {
				t.Errorf("exit %d\n%s", r.Code, r.Stdout)
			}
		})
	}
	oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "empty", "1M")
	if r := run(t, "check", "--fs", "empty"); r.Code != 63 {
		t.Errorf("an empty disk: exit %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	if r := run(t, "check", "--fs", "-r", "all", "disk.qcow2"); r.Code != 1 {
		t.Errorf("-r: exit %d", r.Code)
	}
	if r := run(t, "check", "--fs", oracle.Input(t, "cloud")+":1"); r.Code != 0 || !strings.Contains(r.Stdout, "partition 1: no errors") {
		t.Errorf("a partition: exit %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
}

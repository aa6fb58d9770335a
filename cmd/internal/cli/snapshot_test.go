package cli_test

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"qimg/qcow2/blockdev/oracle"
)

func TestSnapshotListZoo(t *testing.T) {
	for _, file := range zoo(t) {
		if file == "chain-loop.qcow2" {
			continue // where qemu-img runs until it is out of memory
		}
		want, got := oracle.Run(t, "qemu-img", "snapshot", "-l", file), run(t, "snapshot", "-l", file)
		if strings.Contains(want.Stderr, "encrypt.key-secret") {
			continue // qimg needs no passphrase to read the table
		}
		if want.Code != 0 {
			want.Stderr, got.Stderr = firstPart(want.Stderr), firstPart(got.Stderr)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: -qemu-img +qimg\n%s", file, diff)
		}
	}
}

func TestSnapshotListSeveral(t *testing.T) {
	zoo(t)
	got := run(t, "snapshot", "-l", "snap-vmstate.qcow2", "v3-default.qcow2", "snap-1.qcow2", "snap-applied.qcow2")
	want := oracle.Result{Stdout: `image: snap-vmstate.qcow2
Snapshot list:
ID        TAG               VM SIZE                DATE     VM CLOCK     ICOUNT
1         running           324 KiB 2023-11-14 22:13:20 00:00:00.000           
2         disk-only             0 B 2023-11-14 22:13:21 00:00:00.000          0

image: v3-default.qcow2

image: snap-1.qcow2
Snapshot list:
ID        TAG               VM SIZE                DATE     VM CLOCK     ICOUNT
1         one                   0 B 2023-11-14 22:13:20 00:00:00.000          0

image: snap-applied.qcow2
Snapshot list:
ID        TAG               VM SIZE                DATE     VM CLOCK     ICOUNT
1         one                   0 B 2023-11-14 22:13:20 00:00:00.000          0
2         two                   0 B 2023-11-14 22:13:21 00:00:00.000          0

Snapshot ids by tag and image:
TAG        snap-vmstate.qcow2  v3-default.qcow2  snap-1.qcow2  snap-applied.qcow2
running    1                   -                 -             -
disk-only  2                   -                 -             -
one        -                   -                 1             1
two        -                   -                 -             2
`}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
}

// What -l --output=json has in common with qemu-img info --output=json is the
// same; the rest is compared with the table in the file by the tests of qcow2.
func TestSnapshotListJSON(t *testing.T) {
	for _, file := range zoo(t) {
		r := oracle.Run(t, "qemu-img", "info", "--output=json", file)
		if r.Code != 0 || file == "chain-loop.qcow2" || oracle.Run(t, "qemu-img", "snapshot", "-l", file).Code != 0 {
			continue
		}
		var info struct{ Snapshots []map[string]any }
		var list []struct {
			Filename  string
			Snapshots []map[string]any
		}
		if err := json.Unmarshal([]byte(r.Stdout), &info); err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal([]byte(mustRun(t, "snapshot", "-l", "--output=json", file)), &list); err != nil {
			t.Fatal(file, err)
		}
		if len(list) != 1 || list[0].Filename != file || len(list[0].Snapshots) != len(info.Snapshots) {
			t.Errorf("%s: %v", file, list)
			continue
		}
		for i, s := range list[0].Snapshots {
			for _, key := range []string{"disk-size", "l1-offset", "l1-size", "extra-data-size", "unknown-extra-data"} {
				if _, ok := s[key]; !ok {
					t.Errorf("%s: snapshot %d has no %s", file, i, key)
				}
				delete(s, key)
			}
			if diff := cmp.Diff(info.Snapshots[i], s); diff != "" {
				t.Errorf("%s: snapshot %d: -qemu-img +qimg\n%s", file, i, diff)
			}
		}
	}
}

// The disk and the vm state that --export writes are those of the snapshot, and
// QEMU resumes the one on the other.
func TestSnapshotExport(t *testing.T) {
	zoo(t)
	dir := t.TempDir()
	for _, file := range []string{"snap-vmstate.qcow2", "snap-vmstate-v2.qcow2", "snap-vmstate-icount.qcow2"} {
		disk, mem := filepath.Join(dir, "disk.qcow2"), filepath.Join(dir, "mem")
		mustRun(t, "snapshot", "-U", "--export", "1", "--disk", disk, "--vmstate", mem, file)
		oracle.MustRun(t, "qemu-img", "check", disk)
		raw := filepath.Join(dir, "raw")
		oracle.MustRun(t, "qemu-img", "convert", "-l", "snapshot.id=1", "-O", "raw", file, raw)
		oracle.MustRun(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", disk, raw)
		got, err := os.ReadFile(mem)
		if err != nil {
			t.Fatal(err)
		}
		if want := vmStateOf(t, file, len(got)); !bytes.Equal(got, want) {
			t.Errorf("%s: the vm state is something else than what QEMU saved", file)
		}
		if file == "snap-vmstate.qcow2" {
			t.Chdir(dir)
			incoming(t, mem, disk)
			zoo(t)
		}
		if stdout := mustRun(t, "snapshot", "--export", "1", "--vmstate", "-", file); stdout != string(got) {
			t.Errorf("%s: standard output is something else than a file", file)
		}
	}
	for _, c := range []struct{ tag, file, want string }{
		{"disk-only", "snap-vmstate.qcow2", "Could not export snapshot 'disk-only': it has no vm state, it is one of the disk alone\n"},
		{"nope", "snap-vmstate.qcow2", "Could not export snapshot 'nope': snapshot not found\n"},
	} {
		disk, mem := filepath.Join(dir, "new disk"), filepath.Join(dir, "new mem")
		r := run(t, "snapshot", "--export", c.tag, "--disk", disk, "--vmstate", mem, c.file)
		if diff := cmp.Diff(oracle.Result{Stderr: "qemu-img: " + c.want, Code: 1}, r); diff != "" {
			t.Errorf("-want +got\n%s", diff)
		}
		if left, _ := filepath.Glob(filepath.Join(dir, "*new*")); left != nil {
			t.Errorf("left behind: %q", left)
		}
	}
}

// vmStateOf returns n bytes of vm state of the snapshot 1 as QEMU reads them
// once it has applied the snapshot and made the disk reach over the state.
func vmStateOf(t *testing.T, file string, n int) []byte {
	t.Helper()
	image, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	copied, out := filepath.Join(dir, "image"), filepath.Join(dir, "state")
	writeFile(t, copied, string(image))
	oracle.MustRun(t, "qemu-img", "snapshot", "-a", "1", copied)
	oracle.Run(t, "qemu-img", "snapshot", "-d", "running", copied) // version 2 is not resized with snapshots
	const mapped = 512 << 20                                       // by an L2 table
	oracle.MustRun(t, "qemu-img", "resize", "-q", copied, strconv.Itoa(mapped+(n+511)&^511))
	oracle.MustRun(t, "qemu-img", "dd", "-f", "qcow2", "-O", "raw", "bs=1M", "skip=512", "if="+copied, "of="+out)
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return b[:min(n, len(b))]
}

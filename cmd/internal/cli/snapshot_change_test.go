package cli_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"qimg/qcow2"
	"qimg/qcow2/blockdev/oracle"
)

func TestSnapshotMessages(t *testing.T) {
	oracle.Require(t, "qemu-img")
	t.Chdir(t.TempDir())
	for _, line := range []string{
		"create -q -f qcow2 image 1M",
		"create -q -f qcow2 bitmap 1M",
		"bitmap --add bitmap b",
		"snapshot -c s bitmap",
		"create -q -f qcow2 -o refcount_bits=1 rb1 1M",
		"create -q -f qcow2 -o data_file=data,data_file_raw=on external 1M",
		"create -q -f raw raw 1M",
	} {
		oracle.MustRun(t, "qemu-img", strings.Fields(line)...)
	}
	oracle.MustRun(t, "qemu-io", "-c", "write 0 64k", "rb1")
	for _, line := range []string{
		"snapshot",
		"snapshot -l",
		"snapshot -l nope",
		"snapshot -c",
		"snapshot -c x nope",
		"snapshot -l -c x image",
		"snapshot -c x -l image",
		"snapshot -d x -a x image",
		"snapshot -l -l image",
		"snapshot -Z image",
		"snapshot image",
		"snapshot -q image",
		"snapshot -q -l image",
		"snapshot -lq image",
		"snapshot -lU image",
		"snapshot -U -c x image",
		"snapshot -U -d x image",
		"snapshot -d x image",
		"snapshot -a x image",
		"snapshot -l raw",
		"snapshot -c x raw",
		"snapshot -d x raw",
		"snapshot -l external",
		"snapshot -c x external",
		"snapshot -a x external",
		"snapshot -d x external",
		"snapshot -l bitmap",
		"snapshot -a x bitmap",
		"snapshot -a s bitmap",
		"snapshot -d 1 bitmap",
		"snapshot -c x rb1",
		"snapshot --image-opts -l driver=qcow2,file.filename=image",
		"snapshot --image-opts -d x driver=qcow2,file.filename=image",
		"snapshot --object secret,id=a,data=b -l image",
	} {
		same(t, strings.Fields(line)...)
	}
	// An empty name is one, and a long one is cut.
	for _, name := range []string{"", strings.Repeat("x", 300)} {
		same(t, "snapshot", "-c", name, "image")
		list := oracle.Run(t, "qemu-img", "snapshot", "-l", "image").Stdout
		if strings.Count(list, "\n") != 4 {
			t.Errorf("qimg and qemu-img have not made one each:\n%s", list)
		}
		lines := strings.Split(list, "\n")
		if a, b := snapshotDate.ReplaceAllString(lines[2][1:], ""), snapshotDate.ReplaceAllString(lines[3][1:], ""); a != b {
			t.Errorf("made by qemu-img and by qimg:\n%s\n%s", a, b)
		}
		same(t, "snapshot", "-d", name, "image") // one each, but for the long name
		for range strings.Count(tags(t, "image"), "x") / 255 {
			mustRun(t, "snapshot", "-d", name[:255], "image")
		}
		if left := tags(t, "image"); left != "" {
			t.Errorf("left: %s", left)
		}
	}
}

// The date of a snapshot is now.
func TestSnapshotDate(t *testing.T) {
	t.Chdir(t.TempDir())
	mustRun(t, "create", "-q", "-f", "qcow2", "image", "1M")
	before := time.Now().Truncate(time.Microsecond)
	mustRun(t, "snapshot", "-c", "x", "image")
	im, err := qcow2.Open("image", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	s := im.Snapshots()[0]
	if at := time.Unix(int64(s.DateSec), int64(s.DateNsec)); at.Before(before) || at.After(time.Now()) {
		t.Errorf("date %v, expected %v", at, before)
	}
}

// tags lists the snapshots of images.
func tags(t *testing.T, files ...string) string {
	t.Helper()
	var list []string
	for _, f := range files {
		im, err := qcow2.Open(f, nil)
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, s := range im.Snapshots() {
			names = append(names, s.ID+"="+s.Name)
		}
		im.Close()
		list = append(list, strings.Join(names, ","))
	}
	return strings.Join(list, " | ")
}

// What one of several images refuses is done to none.
func TestSnapshotSeveral(t *testing.T) {
	oracle.Require(t, "qemu-img")
	t.Chdir(t.TempDir())
	files := []string{"a", "b", "c"}
	for _, f := range files {
		mustRun(t, "create", "-q", "-f", "qcow2", f, "1M")
	}
	all := func(args ...string) oracle.Result {
		t.Helper()
		return run(t, append(append([]string{"snapshot"}, args...), files...)...)
	}
	want := func(r oracle.Result, stderr, list string) {
		t.Helper()
		code := 0
		if stderr != "" {
			code = 1
		}
		if diff := cmp.Diff(oracle.Result{Stderr: stderr, Code: code}, r); diff != "" {
			t.Errorf("-want +got\n%s", diff)
		}
		if got := tags(t, files...); got != list {
			t.Errorf("snapshots %q, expected %q", got, list)
		}
		for _, f := range files {
			oracle.MustRun(t, "qemu-img", "check", f)
		}
	}
	want(all("-c", "x"), "", "1=x | 1=x | 1=x")
	mustRun(t, "snapshot", "-d", "x", "c")
	want(all("-d", "x"), "qemu-img: c: Could not delete snapshot 'x': snapshot not found\n", "1=x | 1=x | ")
	want(all("-a", "x"), "qemu-img: c: Could not apply snapshot 'x': Failed to load snapshot: No such file or directory\n", "1=x | 1=x | ")
	want(run(t, "snapshot", "-c", "y", "a", "b", "nope"),
		"qemu-img: Could not open 'nope': Could not open 'nope': No such file or directory\n", "1=x | 1=x | ")
	want(run(t, "snapshot", "-c", "y", "a", "b", "a"),
		"qemu-img: Could not open 'a': Failed to get \"write\" lock\nIs another process using the image [a]?\n", "1=x | 1=x | ")
	mustRun(t, "snapshot", "-c", "x", "c")
	want(all("-d", "x"), "", " |  | ")

	writeFile(t, "ops", "create one\r\ncreate with blanks  in it\n\napply one\ncreate 4\ndelete-id 1\ndelete with blanks  in it\ncreate last\n")
	want(all("--from", "ops"), "", "3=4,4=last | 3=4,4=last | 3=4,4=last")
	writeFile(t, "ops", "create one\ndelete one\ndelete two\n")
	want(all("--from", "ops"), "qemu-img: a: ops:3: Could not delete snapshot 'two': snapshot not found\n", "3=4,4=last | 3=4,4=last | 3=4,4=last")
	for _, bad := range []string{"create", "list x", "creat x", "-c x"} {
		writeFile(t, "ops", "create one\n"+bad+"\n")
		want(all("--from", "ops"), fmt.Sprintf("qemu-img: ops:2: expected create, apply, delete or delete-id, a blank and a snapshot, not '%s'\n", bad),
			"3=4,4=last | 3=4,4=last | 3=4,4=last")
	}
	want(all("--from", "nope"), "qemu-img: Could not open 'nope': No such file or directory\n", "3=4,4=last | 3=4,4=last | 3=4,4=last")
}

// A thousand operations of --from leave what a thousand calls do.
func TestSnapshotThousand(t *testing.T) {
	oracle.Require(t, "qemu-img")
	t.Chdir(t.TempDir())
	mustRun(t, "create", "-q", "-f", "qcow2", "image", "64M")
	oracle.MustRun(t, "qemu-io", "-c", "write -P 1 0 4M", "image")
	var ops strings.Builder
	for i := range 1200 {
		fmt.Fprintf(&ops, "create s%d\n", i)
	}
	writeFile(t, "ops", ops.String())
	mustRun(t, "snapshot", "--from", "ops", "image")
	oracle.MustRun(t, "qemu-img", "check", "image")
	same(t, "snapshot", "-l", "image")
	oracle.MustRun(t, "qemu-io", "-c", "write -P 2 0 1M", "image")
	same(t, "snapshot", "-d", "nope", "image")
	mustRun(t, "snapshot", "-d", "s600", "image")
	mustRun(t, "snapshot", "-a", "s601", "image")
	oracle.MustRun(t, "qemu-img", "check", "image")
	oracle.MustRun(t, "qemu-io", "-c", "read -P 1 0 4M", "image")
	ops.Reset()
	for i := range 1200 {
		if i != 600 {
			fmt.Fprintf(&ops, "delete s%d\n", i)
		}
	}
	writeFile(t, "ops", ops.String())
	mustRun(t, "snapshot", "--from", "ops", "image")
	if got := tags(t, "image"); got != "" {
		t.Errorf("left: %s", got)
	}
	oracle.MustRun(t, "qemu-img", "check", "image")
	oracle.MustRun(t, "qemu-io", "-c", "read -P 1 0 4M", "image")
}

// The space of what is deleted goes back to the file system.
func TestSnapshotSpace(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	t.Chdir(t.TempDir())
	mustRun(t, "create", "-q", "-f", "qcow2", "ours", "64M")
	oracle.MustRun(t, "qemu-io", "-c", "write -P 1 0 16M", "ours")
	mustRun(t, "snapshot", "-c", "x", "ours")
	oracle.MustRun(t, "qemu-io", "-c", "write -P 2 0 16M", "ours")
	b, err := os.ReadFile("ours")
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, "theirs", string(b))
	mustRun(t, "snapshot", "-d", "x", "ours")
	oracle.MustRun(t, "qemu-img", "snapshot", "-d", "x", "theirs")
	space := func(file string) (n int64) {
		out := oracle.MustRun(t, "stat", "-c", "%b", filepath.Clean(file))
		fmt.Sscan(out, &n)
		return n * 512
	}
	if ours, theirs := space("ours"), space("theirs"); ours > theirs+1<<20 {
		t.Errorf("%d bytes on disk, with qemu-img %d", ours, theirs)
	}
}

// An image has 65,536 snapshots at most.
func TestSnapshotLimit(t *testing.T) {
	oracle.Require(t, "qemu-img")
	t.Chdir(t.TempDir())
	mustRun(t, "create", "-q", "-f", "qcow2", "-o", "cluster_size=512,refcount_bits=32", "image", "1M")
	oracle.MustRun(t, "qemu-io", "-c", "write -P 1 0 4k", "image")
	var ops strings.Builder
	for i := range 65535 {
		fmt.Fprintf(&ops, "create s%d\n", i)
	}
	writeFile(t, "ops", ops.String())
	mustRun(t, "snapshot", "--from", "ops", "image")
	writeFile(t, "two", "create last\ncreate one too many\n")
	if r := run(t, "snapshot", "--from", "two", "image"); r.Stderr != "qemu-img: two:2: Could not create snapshot 'one too many': -27 (File too large)\n" {
		t.Errorf("%+v", r)
	}
	mustRun(t, "snapshot", "-c", "last", "image")
	if !testing.Short() { // qemu-img takes ten seconds to open it
		same(t, "snapshot", "-c", "one too many", "image")
		same(t, "snapshot", "-l", "image")
	}
	mustRun(t, "check", "image")
	mustRun(t, "snapshot", "-d", "s5000", "image")
	mustRun(t, "snapshot", "-a", "last", "image")
	mustRun(t, "check", "image")

	// A refcount counts 65,535 references: those of the disk and of one less.
	mustRun(t, "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "image", "1M")
	oracle.MustRun(t, "qemu-io", "-c", "write -P 1 0 4k", "image")
	if r := run(t, "snapshot", "--from", "ops", "image"); r.Code != 1 || !strings.Contains(r.Stderr, "refcounts of 16 bits cannot count 65536 references") {
		t.Errorf("%+v", r)
	}
	if got := tags(t, "image"); got != "" {
		t.Error("there are snapshots")
	}
	oracle.MustRun(t, "qemu-img", "check", "image")
}

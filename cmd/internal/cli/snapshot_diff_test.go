package cli_test

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"qimg/qcow2"
	"qimg/qcow2/blockdev/oracle"
)

// twins are two copies of an image, ours changed by qimg and theirs in the same
// way by qemu-img.
type twins struct {
	t            *testing.T
	ours, theirs string
}

// do runs a command on both and compares what it does.
func (w twins) do(args ...string) {
	w.t.Helper()
	got := run(w.t, append(args, w.ours)...)
	want := oracle.Run(w.t, "qemu-img", append(args, w.theirs)...)
	want.Stderr = strings.ReplaceAll(want.Stderr, w.theirs, w.ours)
	if diff := cmp.Diff(want, got); diff != "" {
		w.t.Fatalf("%q: -qemu-img +qimg\n%s", args, diff)
	}
}

// io lets qemu-io do the same to both.
func (w twins) io(commands ...string) {
	w.t.Helper()
	for _, file := range []string{w.ours, w.theirs} {
		var args []string
		for _, c := range commands {
			args = append(args, "-c", c)
		}
		oracle.MustRun(w.t, "qemu-io", append(args, file)...)
	}
}

// apply applies a snapshot. qemu-img counts what is new before it gives up what
// is old, which narrow refcounts do not allow: ok is false where it fails so.
func (w twins) apply(tag string) (ok bool) {
	w.t.Helper()
	got := run(w.t, "snapshot", "-a", tag, w.ours)
	want := oracle.Run(w.t, "qemu-img", "snapshot", "-a", tag, w.theirs)
	if got.Code == 0 && strings.HasSuffix(want.Stderr, "Failed to load snapshot: Invalid argument\n") {
		return false
	}
	want.Stderr = strings.ReplaceAll(want.Stderr, w.theirs, w.ours)
	if diff := cmp.Diff(want, got); diff != "" {
		w.t.Fatalf("apply: -qemu-img +qimg\n%s", diff)
	}
	return true
}

var snapshotDate = regexp.MustCompile(` \d{4}-\d\d-\d\d \d\d:\d\d:\d\d`)

// same checks ours, and compares it with theirs: the list of snapshots but for
// the date, the disk, and the disk and vm state of every snapshot.
func (w twins) same() {
	w.t.Helper()
	if r := oracle.Run(w.t, "qemu-img", "check", w.ours); r.Code != 0 {
		w.t.Fatalf("check: exit %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	if r := run(w.t, "check", w.ours); r.Code != 0 {
		w.t.Fatalf("qimg check: exit %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	if out := oracle.MustRun(w.t, "qemu-img", "compare", w.ours, w.theirs); out != "Images are identical.\n" {
		w.t.Fatalf("compare: %s", out) // their sizes differ
	}
	list := func(file string) string {
		return snapshotDate.ReplaceAllString(oracle.MustRun(w.t, "qemu-img", "snapshot", "-l", file), " DATE")
	}
	if diff := cmp.Diff(list(w.theirs), list(w.ours)); diff != "" {
		w.t.Fatalf("-qemu-img +qimg\n%s", diff)
	}
	if diff := cmp.Diff(snapshotSums(w.t, w.theirs), snapshotSums(w.t, w.ours)); diff != "" {
		w.t.Fatalf("snapshots: -qemu-img +qimg\n%s", diff)
	}
}

// snapshotSums returns what tells the content of the snapshots of an image.
func snapshotSums(t *testing.T, file string) (sums []string) {
	t.Helper()
	im, err := qcow2.Open(file, &qcow2.OpenOptions{Backing: qcow2.BackingFollow})
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	for _, s := range im.Snapshots() {
		sn, err := qcow2.Open(file, &qcow2.OpenOptions{Backing: qcow2.BackingFollow, Snapshot: s.ID})
		if err != nil {
			t.Fatal(err)
		}
		h := sha256.New()
		end := int64(0) // of the data before
		for off := int64(0); off < sn.Size(); {
			e, err := sn.NextExtent(off)
			if err == nil && !e.Kind.ReadsZero() {
				if off > end || off == 0 {
					fmt.Fprintln(h, off)
				}
				end = off + e.Len
				_, err = io.Copy(h, io.NewSectionReader(sn, off, e.Len))
			}
			if err != nil {
				t.Fatalf("%s: snapshot %s: %v", file, s.ID, err)
			}
			off += e.Len
		}
		state, err := sn.VMState()
		if err == nil {
			_, err = io.Copy(h, io.NewSectionReader(state, 0, state.Size()))
		}
		if err != nil {
			t.Fatalf("%s: snapshot %s: %v", file, s.ID, err)
		}
		sums = append(sums, fmt.Sprintf("%s %s: %d bytes, %s", s.ID, s.Name, sn.Size(), hex.EncodeToString(h.Sum(nil))))
		sn.Close()
	}
	return sums
}

// TestSnapshotZoo changes copies of all images of the zoo that qemu-img can
// change.
func TestSnapshotZoo(t *testing.T) {
	files := zoo(t)
	dir := t.TempDir()
	others, err := filepath.Glob("*") // with what the images name
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range others {
		if err := os.Symlink(filepath.Join(oracle.Input(t, "zoo"), f), filepath.Join(dir, f)); err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(dir)
	changed := 0
	for i, file := range files {
		if testing.Short() && !strings.HasPrefix(file, "snap-") && i%8 != 0 {
			continue
		}
		b, err := os.ReadFile(strings.TrimSuffix(file, ".qcow2") + ".expected.json")
		if os.IsNotExist(err) {
			continue // a part of another
		} else if err != nil {
			t.Fatal(err)
		}
		var want struct {
			OpenOK  bool   `json:"open_ok"`
			CheckRC int    `json:"check_rc"`
			Secret  string `json:"secret"`
		}
		if err := json.Unmarshal(b, &want); err != nil {
			t.Fatal(err)
		}
		if !want.OpenOK || want.CheckRC != 0 || want.Secret != "" || strings.HasPrefix(file, "huge") {
			continue
		}
		t.Run(file, func(t *testing.T) {
			w := twins{t, "ours.qcow2", "theirs.qcow2"}
			for _, name := range []string{w.ours, w.theirs} {
				os.Remove(name)
				image, err := os.ReadFile(file)
				if err != nil {
					t.Fatal(err)
				}
				writeFile(t, name, string(image))
			}
			w.do("snapshot", "-c", "new one")
			if oracle.Run(t, "qemu-img", "snapshot", "-c", "x", w.theirs).Code != 0 {
				w.do("snapshot", "-d", "x")
				return // it refuses snapshots
			}
			w.do("snapshot", "-d", "nope")
			mustRun(t, "snapshot", "-c", "x", w.ours)
			w.same()
			if oracle.Run(t, "qemu-io", "-c", "write -P 9 0 1k", w.theirs).Code == 0 {
				oracle.MustRun(t, "qemu-io", "-c", "write -P 9 0 1k", w.ours)
			}
			w.do("snapshot", "-a", "new one")
			w.same()
			w.do("snapshot", "-a", "1")
			w.do("snapshot", "-d", "x")
			w.do("snapshot", "-c", "2")
			if !w.apply("2") {
				oracle.MustRun(t, "qemu-img", "check", w.ours)
				return
			}
			w.same()
			w.do("snapshot", "-d", "new one")
			w.do("snapshot", "-d", "2")
			w.same()
			changed++
		})
	}
	t.Logf("%d images changed", changed)
}

// TestSnapshotRandom changes random images at random.
func TestSnapshotRandom(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	t.Chdir(t.TempDir())
	images := 40
	if testing.Short() {
		images = 10
	}
	for seed := range images {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { randomSnapshots(t, rand.New(rand.NewPCG(uint64(seed), 77))) })
	}
}

func randomSnapshots(t *testing.T, r *rand.Rand) {
	pick := func(list ...string) string { return list[r.IntN(len(list))] }
	format := pick("compat=0.10", "compat=1.1", "compat=1.1,extended_l2=on,cluster_size=16k", "compat=1.1,refcount_bits="+pick("1", "2", "4", "8", "32", "64"))
	if !strings.Contains(format, "cluster_size") {
		format += ",cluster_size=" + pick("512", "4k", "64k", "2M")
	}
	const size = 4 << 20
	at := func() string { return fmt.Sprintf("%d %d", r.IntN(size/512)*512/2, 512*(1+r.IntN(300))) }
	w := twins{t, "ours.qcow2", "theirs.qcow2"}
	os.Remove("base")
	create := []string{"create", "-q", "-f", "qcow2", "-o", format}
	if r.IntN(3) == 0 {
		oracle.MustRun(t, "qemu-img", append(create, "base", fmt.Sprint(size/2))...)
		oracle.MustRun(t, "qemu-io", "-c", "write -P 200 0 "+fmt.Sprint(512*(1+r.IntN(size/1024))), "base")
		create = append(create, "-b", "base", "-F", "qcow2")
	}
	for _, name := range []string{w.ours, w.theirs} {
		oracle.MustRun(t, "qemu-img", append(create, name, fmt.Sprint(size))...)
	}
	t.Log(create)
	compress := []string{}
	if !strings.Contains(format, "2M") && !strings.Contains(format, "extended") {
		compress = append(compress, "write -c -P 77 1M 64k", "write -c -P 78 1088k 64k")
	}
	w.io(append(compress, "write -P 1 "+at())...)
	tags := []string{"a", "b", "c", "1", "2", "3"}
	for range 14 {
		switch r.IntN(6) {
		case 0, 1:
			tag := pick(tags...)
			got := run(t, "snapshot", "-c", tag, w.ours)
			want := oracle.Run(t, "qemu-img", "snapshot", "-c", tag, w.theirs)
			if got.Code != want.Code {
				t.Fatalf("create: %v, qemu-img %v", got, want)
			}
			if got.Code != 0 {
				oracle.Run(t, "qemu-img", "check", "-r", "all", w.theirs) // which leaks
			}
		case 2:
			if !w.apply(pick(tags...)) {
				oracle.MustRun(t, "qemu-img", "check", w.ours)
				return
			}
		case 3:
			w.do("snapshot", "-d", pick(tags...))
		case 4:
			w.io("write -P "+fmt.Sprint(2+r.IntN(100))+" "+at(), "write -P "+fmt.Sprint(2+r.IntN(100))+" "+at())
		case 5:
			w.io("write -z "+at(), "discard "+at())
		}
	}
	w.same()
}

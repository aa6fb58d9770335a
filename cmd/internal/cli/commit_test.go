package cli_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/oracle"
)

func TestCommitRandom(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	for seed := range uint64(10) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 1))
			dir := t.TempDir()
			t.Chdir(dir)
			chain := randomChain(t, r)
			top := chain[len(chain)-1]
			args := []string{"commit"}
			if r.IntN(3) == 0 {
				args = append(args, "-d")
			}
			if r.IntN(3) == 0 {
				args = append(args, "-b", chain[r.IntN(len(chain)-1)].name)
			}
			theirs, ours := both(t, dir, append(args, top.name)...)
			sameImages(t, theirs, ours, chain)
			for _, l := range chain {
				// QEMU writes in pieces of its own size, which may take more.
				want, got := dataOf(mapOf(t, theirs, l)), dataOf(mapOf(t, ours, l))
				if got > want || l == top && got != want {
					t.Errorf("%s: %d bytes of data, qemu-img has %d", l.name, got, want)
				}
			}
			sameGuest(t, filepath.Join(dir, top.name), filepath.Join(ours, top.name), "qcow2")
		})
	}
}

// commit prints what qemu-img prints and leaves images that read the same; what
// it empties takes no more space.
func TestCommit(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	dir := t.TempDir()
	t.Chdir(dir)
	threeLayers(t)
	create := func(name, below, format, options string, size string) {
		t.Helper()
		args := []string{"create", "-q", "-f", "qcow2", "-b", below, "-F", format}
		if options != "" {
			args = append(args, "-o", options)
		}
		oracle.MustRun(t, "qemu-img", append(args, name, size)...)
		oracle.MustRun(t, "qemu-io", "-c", "write -P 7 100k 300k", "-c", "write -z 500k 100k", name)
	}
	create("snapshot.qcow2", "base.qcow2", "qcow2", "", "8M")
	oracle.MustRun(t, "qemu-img", "snapshot", "-c", "first", "snapshot.qcow2")
	oracle.MustRun(t, "qemu-io", "-c", "write -P 8 120k 1M", "snapshot.qcow2")
	create("bitmap.qcow2", "base.qcow2", "qcow2", "", "8M")
	oracle.MustRun(t, "qemu-img", "bitmap", "--add", "bitmap.qcow2", "recorded")
	oracle.MustRun(t, "qemu-io", "-c", "write -P 8 120k 1M", "bitmap.qcow2")
	create("data.qcow2", "base.qcow2", "qcow2", "data_file=data.raw", "8M")
	create("old.qcow2", "base.qcow2", "qcow2", "compat=0.10", "8M")
	create("long.qcow2", "base.qcow2", "qcow2", "", "10M")
	create("onraw.qcow2", "raw.img", "raw", "", "1M")
	create("longraw.qcow2", "raw.img", "raw", "cluster_size=4k", "3M")
	create("longmid.qcow2", "mid.qcow2", "qcow2", "", "9M")
	oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10", "-b", "base.qcow2", "-F", "qcow2", "oldmid.qcow2", "1M")
	create("fails.qcow2", "oldmid.qcow2", "qcow2", "", "2M")
	oracle.MustRun(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", "raw.img", "packed.qcow2")
	oracle.MustRun(t, "qemu-img", "rebase", "-u", "-b", "base.qcow2", "-F", "qcow2", "packed.qcow2")
	var images []*layer
	files, err := filepath.Glob("*.qcow2")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		images = append(images, &layer{name: name, format: "qcow2"})
	}
	images = append(images, &layer{name: "raw.img", format: "raw"})
	for _, line := range []string{
		"",
		"top.qcow2 top.qcow2",
		"-t foo top.qcow2",
		"-r foo top.qcow2",
		"-r -1 top.qcow2",
		"nope",
		"base.qcow2",
		"raw.img",
		"-f raw raw.img",
		"-b x -f raw raw.img",
		"-b x top.qcow2",
		"-b top.qcow2 top.qcow2",
		"top.qcow2",
		"-q top.qcow2",
		"-d top.qcow2",
		"-r 1G top.qcow2",
		"-b mid.qcow2 top.qcow2",
		"-b ./base.qcow2 top.qcow2",
		"-b file:base.qcow2 top.qcow2",
		"snapshot.qcow2",
		"bitmap.qcow2",
		"data.qcow2",
		"old.qcow2",
		"long.qcow2",
		"onraw.qcow2",
		"longraw.qcow2",
		"longmid.qcow2",
		"-b base.qcow2 longmid.qcow2",
		"fails.qcow2",
		"packed.qcow2",
		"--image-opts driver=qcow2,file.filename=top.qcow2",
	} {
		t.Run(line, func(t *testing.T) {
			args := strings.Fields("commit " + line)
			theirs, ours := both(t, dir, args...)
			if len(args) == 1 {
				return
			}
			sameImages(t, theirs, ours, images)
			name := args[len(args)-1]
			i := slices.IndexFunc(images, func(l *layer) bool { return l.name == name })
			if i < 0 {
				return
			}
			if name != "data.qcow2" { // its data file is the one in the working directory
				sameGuest(t, filepath.Join(dir, name), filepath.Join(ours, name), images[i].format)
			}
			for _, file := range []string{name, "data.raw"} {
				if a, b := spaceOf(t, theirs, file), spaceOf(t, ours, file); b > a {
					t.Errorf("%s takes %d bytes of the disk, %d after qemu-img", file, b, a)
				}
			}
			if a, b := dataOf(mapOf(t, theirs, images[i])), dataOf(mapOf(t, ours, images[i])); a != b {
				t.Errorf("%s: %d bytes of data, %d after qemu-img", name, b, a)
			}
		})
	}
}

// spaceOf is what a file takes of the disk.
func spaceOf(t *testing.T, dir, name string) int64 {
	t.Helper()
	f, err := blockdev.OpenFile(filepath.Join(dir, name), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	n, err := f.Allocated()
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// An image that is in use, by one who reads or who writes it, is refused as
// qemu-img does, and so is one whose base is.
func TestCommitLocks(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	t.Chdir(t.TempDir())
	threeLayers(t)
	for _, c := range []struct{ hold, args string }{
		{"top.qcow2", "top.qcow2"},
		{"-r top.qcow2", "top.qcow2"},
		{"base.qcow2", "mid.qcow2"},
		{"-r base.qcow2", "mid.qcow2"},
		{"base.qcow2", "top.qcow2"},
		{"base.qcow2", "-b base.qcow2 top.qcow2"},
		{"-r base.qcow2", "-b base.qcow2 top.qcow2"},
		{"-r base.qcow2", "-d top.qcow2"}, // it is not the base here
		{"-r mid.qcow2", "-d top.qcow2"},
	} {
		release := holdImage(t, strings.Fields(c.hold)...)
		same(t, append([]string{"commit"}, strings.Fields(c.args)...)...)
		release()
	}
}

// While it commits nobody else gets at the image or its base.
func TestCommitHoldsLocks(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	t.Chdir(t.TempDir())
	threeLayers(t)
	oracle.MustRun(t, "qemu-io", "-c", "write -P 9 0 4M", "top.qcow2")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan oracle.Result)
	go func() { done <- runAs(t, ctx, nil, "qemu-img", "commit", "-r", "100k", "top.qcow2") }()
	for _, name := range []string{"top.qcow2", "mid.qcow2"} {
		for oracle.Run(t, "qemu-io", "-r", "-c", "length", name).Code == 0 {
			time.Sleep(10 * time.Millisecond)
		}
	}
	cancel()
	want := oracle.Result{Stderr: "qemu-img: interrupted\n", Code: 130}
	if diff := cmp.Diff(want, <-done); diff != "" {
		t.Error(diff)
	}
	for _, name := range []string{"top.qcow2", "mid.qcow2", "base.qcow2"} {
		oracle.MustRun(t, "qemu-img", "check", name)
	}
}

// A guest may have written what makes a raw base look like an image.
func TestCommitProbed(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	dir := t.TempDir()
	t.Chdir(dir)
	writeFile(t, "base.raw", strings.Repeat("\x00", 1<<20))
	writeFile(t, "sector", "QFI\xfb\x00\x00\x00\x03"+strings.Repeat("\x00", 504))
	for _, name := range []string{"good.qcow2", "bad.qcow2"} {
		oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", name)
		oracle.MustRun(t, "qemu-io", "-c", "write -P 1 0 64k", name)
		if name == "bad.qcow2" {
			oracle.MustRun(t, "qemu-io", "-c", "write -s sector 0 512", name)
		}
		f, err := blockdev.OpenFile(name, &blockdev.FileOptions{Write: true})
		if err != nil {
			t.Fatal(err)
		}
		im, err := qcow2.New(f, &qcow2.OpenOptions{Write: true, Backing: qcow2.BackingIgnore})
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(im.SetBacking(t.Context(), "base.raw", ""), im.Close(), f.Close()); err != nil {
			t.Fatal(err)
		}
		theirs, ours := both(t, dir, "commit", name)
		sameGuest(t, filepath.Join(theirs, "base.raw"), filepath.Join(ours, "base.raw"), "raw")
		t.Chdir(dir)
	}
}

func TestCommitProgress(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	t.Chdir(t.TempDir())
	threeLayers(t)
	got := run(t, "commit", "-p", "top.qcow2")
	want := regexp.MustCompile(`^    \(0\.00/100%\)\r(    \(\d+\.\d\d/100%\)\r)*    \(100\.00/100%\)\r\nImage committed\.\n$`)
	if got.Code != 0 || got.Stderr != "" || !want.MatchString(got.Stdout) {
		t.Errorf("%+v", got)
	}
	if r := run(t, "commit", "-p", "base.qcow2"); r.Stdout != "    (0.00/100%)\r\n" || r.Code != 1 {
		t.Errorf("%+v", r)
	}
}

// TestCommitGrowsV2: a base of version 2 grows inside of its last cluster, where
// its own backing file has more.
func TestCommitGrowsV2(t *testing.T) {
	oracle.Require(t, "qemu-img")
	oracle.Require(t, "qemu-io")
	t.Chdir(t.TempDir())
	oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "a", "192k")
	oracle.MustRun(t, "qemu-io", "-c", "write -P 0x6e 0 192k", "a")
	for _, dir := range []string{"ours", "theirs"} {
		if err := os.Mkdir(dir, 0o777); err != nil {
			t.Fatal(err)
		}
		t.Chdir(dir)
		oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10,cluster_size=4096", "-b", "../a", "-F", "qcow2", "b", "512")
		oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10", "-b", "b", "-F", "qcow2", "c", "2048")
		t.Chdir("..")
	}
	mustRun(t, "commit", "ours/c")
	oracle.MustRun(t, "qemu-img", "commit", "theirs/c")
	oracle.MustRun(t, "qemu-img", "compare", "ours/b", "theirs/b")
	oracle.MustRun(t, "qemu-img", "check", "-q", "ours/b")
	same(t, "resize", "theirs/b", "4608")
}

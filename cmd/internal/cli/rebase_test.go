package cli_test

import (
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"qimg/qcow2/blockdev/oracle"
)

func TestRebaseRandom(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	for seed := range uint64(10) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 2))
			dir := t.TempDir()
			t.Chdir(dir)
			chain := randomChain(t, r)
			top := chain[len(chain)-1]
			backing := chain[r.IntN(len(chain)-1)]
			args := []string{"rebase"}
			switch r.IntN(4) {
			case 0:
				args = append(args, "-b", "")
			case 1:
				args = append(args, "-b", backing.name, "-F", backing.format)
			case 2:
				other := randomLayer(t, r, "other.img", nil, 1+r.Int64N(4096))
				args = append(args, "-b", other.name, "-F", other.format)
			case 3:
				other := randomLayer(t, r, "other.img", chain[0], 1+r.Int64N(4096))
				args = append(args, "-b", other.name, "-F", other.format)
			}
			theirs, ours := both(t, dir, append(args, top.name)...)
			sameImages(t, theirs, ours, chain)
			for _, l := range chain {
				if diff := cmp.Diff(mapOf(t, theirs, l), mapOf(t, ours, l)); diff != "" {
					t.Errorf("%s: map -qemu-img +qimg\n%s", l.name, diff)
				}
			}
			sameGuest(t, filepath.Join(dir, top.name), filepath.Join(ours, top.name), "qcow2")
		})
	}
}

// rebase prints what qemu-img prints and leaves the same images.
func TestRebase(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	dir := t.TempDir()
	t.Chdir(dir)
	threeLayers(t)
	oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "tiny.qcow2", "1M")
	oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=data.raw,data_file_raw=on", "data.qcow2", "1M")
	long := strings.Repeat("n", 1023)
	images := []*layer{}
	for _, name := range []string{"base", "mid", "top", "tiny"} {
		images = append(images, &layer{name: name + ".qcow2", format: "qcow2"})
	}
	top := images[2]
	for _, line := range []string{
		"top.qcow2",
		"-b base.qcow2",
		"-b base.qcow2 -F qcow2 top.qcow2 top.qcow2",
		"-t foo -b base.qcow2 -F qcow2 top.qcow2",
		"-T foo -b base.qcow2 -F qcow2 top.qcow2",
		"-b base.qcow2 -F qcow2 nope",
		"-b base.qcow2 -F qcow2 top.qcow2",
		"-b base.qcow2 -F qcow2 -f raw top.qcow2",
		"-q -b mid.qcow2 -F qcow2 top.qcow2",
		"-b raw.img -F raw top.qcow2",
		"-b raw.img -F qcow2 top.qcow2",
		"-b raw.img top.qcow2",
		"-b file:raw.img -F raw top.qcow2",
		"-b top.qcow2 -F qcow2 top.qcow2",
		"-b nope -F qcow2 top.qcow2",
		"-b nope/x -F qcow2 top.qcow2",
		"-b base.qcow2 -F foo top.qcow2",
		"-b '' -F qcow2 top.qcow2",
		"-b base.qcow2 -F qcow2 base.qcow2",
		"-b raw.img -F raw base.qcow2",
		"-b base.qcow2 -F qcow2 raw.img",
		"-f raw -b base.qcow2 -F qcow2 raw.img",
		"-f raw -u raw.img",
		"-u top.qcow2",
		"-u -F raw top.qcow2",
		"-u -b nope -F vmdk top.qcow2",
		"-u -b nbd:host:1 -F raw top.qcow2",
		"-u -b base.qcow2 top.qcow2",
		"-u -b base.qcow2 -F foo top.qcow2",
		"-u -F raw -b " + long + " top.qcow2",
		"-u -F raw -b " + long + "n top.qcow2",
		"-u -F raw -b " + long[:400] + " tiny.qcow2",
		"-u -F raw -b " + long[:300] + " tiny.qcow2",
		"-u -F raw -b raw.img data.qcow2",
		"--image-opts -b base.qcow2 -F qcow2 driver=qcow2,file.filename=top.qcow2",
	} {
		t.Run(line, func(t *testing.T) {
			args := strings.Fields("rebase " + line)
			for i := range args {
				args[i] = strings.ReplaceAll(args[i], "''", "")
			}
			theirs, ours := both(t, dir, args...)
			for _, l := range images {
				if diff := cmp.Diff(headerText(t, theirs, l.name), headerText(t, ours, l.name)); diff != "" {
					t.Errorf("%s: -qemu-img +qimg\n%s", l.name, diff)
				}
			}
			// Without -F qemu-img finds out after it has copied the data.
			if strings.Contains(line, "-u") || !strings.Contains(line, "-F") {
				return
			}
			sameGuest(t, filepath.Join(dir, top.name), filepath.Join(ours, top.name), top.format)
			if diff := cmp.Diff(mapOf(t, theirs, top), mapOf(t, ours, top)); diff != "" {
				t.Errorf("map -qemu-img +qimg\n%s", diff)
			}
		})
	}
}

// headerText is what qemu-img info tells of the header of an image.
func headerText(t *testing.T, dir, name string) string {
	t.Helper()
	t.Chdir(dir)
	return withoutDiskSize(oracle.Run(t, "qemu-img", "info", "-f", "qcow2", name)).Stdout
}

// An image that is in use, or one below it, or the new backing file, is refused
// as qemu-img does.
func TestRebaseLocks(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	t.Chdir(t.TempDir())
	threeLayers(t)
	oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "other.qcow2", "8M")
	for _, c := range []struct{ hold, args string }{
		{"top.qcow2", "-b raw.img -F raw top.qcow2"},
		{"top.qcow2", "-u -b nope -F raw top.qcow2"},
		{"base.qcow2", "-b raw.img -F raw top.qcow2"},
		{"base.qcow2", "-b base.qcow2 -F qcow2 mid.qcow2"},
		{"other.qcow2", "-b other.qcow2 -F qcow2 top.qcow2"},
		{"base.qcow2", "-u -b base.qcow2 -F qcow2 mid.qcow2"},
	} {
		release := holdImage(t, c.hold)
		same(t, append([]string{"rebase"}, strings.Fields(c.args)...)...)
		release()
	}
	holdImage(t, "other.qcow2")
	mustRun(t, "rebase", "-U", "-b", "other.qcow2", "-F", "qcow2", "top.qcow2")
}

func TestRebaseProgress(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	t.Chdir(t.TempDir())
	threeLayers(t)
	got := run(t, "rebase", "-p", "-b", "", "top.qcow2")
	want := regexp.MustCompile(`^    \(0\.00/100%\)\r(    \(\d+\.\d\d/100%\)\r)*    \(100\.00/100%\)\r\n$`)
	if got.Code != 0 || got.Stderr != "" || !want.MatchString(got.Stdout) {
		t.Errorf("%+v", got)
	}
}

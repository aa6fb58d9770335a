package cli_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"qimg/qcow2/blockdev/oracle"
)

// layer is an image of a random chain.
type layer struct {
	name, format string
	size         int64
	cluster      int64
	block        int64 // what it allocates at once
}

// randomLayer makes an image over below with random content, by QEMU.
func randomLayer(t *testing.T, r *rand.Rand, name string, below *layer, sectors int64) *layer {
	t.Helper()
	l := &layer{name: name, format: "qcow2", size: 512 * (1 + r.Int64N(sectors))}
	if r.IntN(3) == 0 {
		l.size = 512 * sectors
	}
	args := []string{"create", "-q", "-f"}
	switch {
	case below == nil && r.IntN(3) == 0:
		l.format, l.cluster, l.block = "raw", 65536, 65536
		args = append(args, "raw")
	case r.IntN(4) == 0:
		l.cluster = 16384 << r.IntN(4)
		l.block = l.cluster / 32
		args = append(args, "qcow2", "-o", fmt.Sprintf("extended_l2=on,cluster_size=%d", l.cluster))
	default:
		l.cluster = 4096 << r.IntN(6)
		l.block = l.cluster
		compat := "1.1"
		if r.IntN(3) == 0 {
			compat = "0.10"
		}
		args = append(args, "qcow2", "-o", fmt.Sprintf("compat=%s,cluster_size=%d", compat, l.cluster))
	}
	if below != nil {
		args = append(args, "-b", below.name, "-F", below.format)
	}
	oracle.MustRun(t, "qemu-img", append(args, name, fmt.Sprint(l.size))...)
	io := []string{"-f", l.format}
	for range r.IntN(12) {
		off := 512 * r.Int64N(l.size/512)
		n := min(512*(1+r.Int64N(400)), l.size-off)
		if r.IntN(2) == 0 {
			off = off &^ (l.cluster - 1)
			n = min((n+l.cluster-1)&^(l.cluster-1), l.size-off)
		}
		op := "write -P " + fmt.Sprint(1+r.IntN(3))
		switch r.IntN(8) {
		case 0:
			op = "write -z"
		case 1:
			op = "write -P 0"
		case 2:
			op = "discard"
		}
		io = append(io, "-c", fmt.Sprintf("%s %d %d", op, off, n))
	}
	oracle.MustRun(t, "qemu-io", append(io, name)...)
	return l
}

// randomChain makes a chain of 2 or 3 images in the working directory, the base
// first.
func randomChain(t *testing.T, r *rand.Rand) []*layer {
	t.Helper()
	sectors := 1 + r.Int64N(4096)
	var chain []*layer
	var below *layer
	for i := range 2 + r.IntN(2) {
		below = randomLayer(t, r, fmt.Sprintf("%d.img", i), below, sectors)
		chain = append(chain, below)
	}
	return chain
}

// copyDir copies the images of a chain.
func copyDir(t *testing.T, from, to string) {
	t.Helper()
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
}

// both runs a command on copies of a chain, by QEMU and by qimg, and returns the
// two folders.
func both(t *testing.T, dir string, args ...string) (theirs, ours string) {
	t.Helper()
	theirs, ours = t.TempDir(), t.TempDir()
	copyDir(t, dir, theirs)
	copyDir(t, dir, ours)
	t.Chdir(theirs)
	want := oracle.Run(t, "qemu-img", args...)
	t.Chdir(ours)
	if diff := cmp.Diff(want, run(t, args...)); diff != "" {
		t.Fatalf("%q: -qemu-img +qimg\n%s", args, diff)
	}
	return theirs, ours
}

// sameImages compares the images of two folders: what they are, and what their
// guests read. Those that are the same files need no look.
func sameImages(t *testing.T, theirs, ours string, layers []*layer) {
	t.Helper()
	for _, l := range layers {
		a, err := os.ReadFile(filepath.Join(theirs, l.name))
		if err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(filepath.Join(ours, l.name)); err == nil && bytes.Equal(a, b) {
			continue
		}
		t.Chdir(theirs)
		info := withoutDiskSize(oracle.Run(t, "qemu-img", "info", "-f", l.format, l.name))
		t.Chdir(ours)
		if diff := cmp.Diff(info, withoutDiskSize(oracle.Run(t, "qemu-img", "info", "-f", l.format, l.name))); diff != "" {
			t.Errorf("%s: -qemu-img +qimg\n%s", l.name, diff)
		}
		if l.format == "qcow2" {
			if r := oracle.Run(t, "qemu-img", "check", l.name); r.Code != 0 {
				t.Errorf("%s: check: %v", l.name, r)
			}
		}
		sameGuest(t, filepath.Join(theirs, l.name), filepath.Join(ours, l.name), l.format)
	}
}

func sameGuest(t *testing.T, a, b, format string) {
	t.Helper()
	if r := oracle.Run(t, "qemu-img", "compare", "-f", format, "-F", format, a, b); r.Code != 0 {
		t.Errorf("compare %s %s: %v", a, b, r)
	}
}

// run of an image, as qemu-img map tells it.
type mapRun struct {
	Start, Length, Depth int64
	Zero, Data           bool
}

// mapOf is what qemu-img map tells of an image in a folder. Neighbours of one
// kind are one run.
func mapOf(t *testing.T, dir string, l *layer) []mapRun {
	t.Helper()
	t.Chdir(dir)
	var runs, joined []mapRun
	out := oracle.MustRun(t, "qemu-img", "map", "-f", l.format, "--output=json", l.name)
	if err := json.Unmarshal([]byte(out), &runs); err != nil {
		t.Fatal(err)
	}
	for _, r := range runs {
		if n := len(joined) - 1; n >= 0 && joined[n].Depth == r.Depth && joined[n].Zero == r.Zero && joined[n].Data == r.Data {
			joined[n].Length += r.Length
			continue
		}
		joined = append(joined, r)
	}
	return joined
}

// dataOf is how much of an image is data of its own.
func dataOf(runs []mapRun) (n int64) {
	for _, r := range runs {
		if r.Depth == 0 && r.Data {
			n += r.Length
		}
	}
	return n
}

// threeLayers makes base.qcow2, mid.qcow2 and top.qcow2 in the working
// directory, in which each has some data, and a raw image raw.img.
func threeLayers(t *testing.T) {
	t.Helper()
	writeFile(t, "raw.img", strings.Repeat("raw data", 1<<17))
	oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", "8M")
	oracle.MustRun(t, "qemu-io", "-c", "write -P 1 0 4M", "base.qcow2")
	oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "mid.qcow2")
	oracle.MustRun(t, "qemu-io", "-c", "write -P 2 1M 1M", "mid.qcow2")
	oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2")
	oracle.MustRun(t, "qemu-io", "-c", "write -P 3 2M 64k", "-c", "write -z 3M 128k", "top.qcow2")
}

// holdImage has qemu-io keep an image open until the test ends, or release is
// called.
func holdImage(t *testing.T, args ...string) (release func()) {
	t.Helper()
	holder := exec.Command(oracle.Path(t, "qemu-io"), args...)
	stdin, err := holder.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := holder.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	release = sync.OnceFunc(func() {
		stdin.Close()
		io.Copy(io.Discard, stdout)
		holder.Wait()
	})
	t.Cleanup(release)
	// It answers when the image is open.
	fmt.Fprintln(stdin, "length")
	for lines := bufio.NewScanner(stdout); lines.Scan(); {
		if strings.HasSuffix(lines.Text(), "MiB") {
			return release
		}
	}
	t.Fatalf("qemu-io %q ended", args)
	return nil
}

package qcow2_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"qimg/qcow2"
	"qimg/qcow2/blockdev/oracle"
)

// dirtyRange is a range of a disk: offset and length.
type dirtyRange struct{ Off, Len int64 }

// qemuDirty reads a bitmap as QEMU exports it over NBD.
func qemuDirty(t testing.TB, path, name string) []dirtyRange {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "s")
	var stderr strings.Builder
	server := exec.CommandContext(t.Context(), oracle.Path(t, "qemu-nbd"), "-r", "-k", socket, "-f", "qcow2", "-B", name, path)
	server.Stderr = &stderr
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	for wait := time.Millisecond; ; wait *= 2 {
		if _, err := os.Stat(socket); err == nil {
			break
		}
		if wait > 20*time.Second {
			server.Process.Kill()
			server.Wait()
			t.Fatalf("qemu-nbd does not listen: %s", stderr.String())
		}
		time.Sleep(wait)
	}
	out := oracle.MustRun(t, "qemu-img", "map", "--output=json", "--image-opts",
		"driver=nbd,server.type=unix,server.path="+socket+",x-dirty-bitmap=qemu:dirty-bitmap:"+name)
	if err := server.Wait(); err != nil { // it ends with its client
		t.Fatalf("qemu-nbd: %v: %s", err, stderr.String())
	}
	var extents []struct {
		Start, Length int64
		Data          bool // not dirty
	}
	if err := json.Unmarshal([]byte(out), &extents); err != nil {
		t.Fatal(err)
	}
	var list []dirtyRange
	for _, e := range extents {
		if !e.Data {
			list = append(list, dirtyRange{e.Start, e.Length})
		}
	}
	return list
}

// bitmapState is what a bitmap says, without where it lies.
type bitmapState struct {
	Name        string
	Flags       string
	Granularity uint64
	Dirty       []dirtyRange
}

// bitmapStates reads all bitmaps of an image.
func bitmapStates(t testing.TB, im *qcow2.Image) []bitmapState {
	t.Helper()
	list, err := im.Bitmaps()
	if err != nil {
		t.Fatal(err)
	}
	var states []bitmapState
	for _, b := range list {
		s := bitmapState{Name: b.Name, Flags: strings.Join(b.Flags.Names(), " "), Granularity: b.Granularity()}
		err := im.DirtyRanges(t.Context(), b.Name, func(off, n int64) error {
			s.Dirty = append(s.Dirty, dirtyRange{off, n})
			return nil
		})
		if e := (*qcow2.BitmapError)(nil); errors.As(err, &e) && e.Reason == qcow2.BitmapInconsistent {
			s.Dirty = []dirtyRange{{-1, -1}}
		} else if err != nil {
			t.Fatal(err)
		}
		states = append(states, s)
	}
	return states
}

// fileBitmaps is bitmapStates of a file, which has to be clean.
func fileBitmaps(t *testing.T, path string) []bitmapState {
	t.Helper()
	im, err := qcow2.Open(path, &qcow2.OpenOptions{Backing: qcow2.BackingIgnore})
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	qcow2.MustHaveLeaks(t, im, 0)
	return bitmapStates(t, im)
}

// qemuStep does a step of a test by QEMU: "add NAME [GRANULARITY]", "remove",
// "clear", "enable" or "disable NAME", "merge NAME SOURCE [FILE]", "write",
// "zero" or "discard OFF LEN".
func qemuStep(t testing.TB, path, step string) {
	t.Helper()
	w := strings.Fields(step)
	switch w[0] {
	case "write", "zero", "discard":
		c := map[string]string{"write": "write -P 7", "zero": "write -z", "discard": "discard"}[w[0]]
		oracle.MustRun(t, "qemu-io", "-f", "qcow2", "-d", "unmap", "-c", c+" "+w[1]+" "+w[2], path)
		return
	}
	args := []string{"bitmap", "-f", "qcow2", "--" + w[0]}
	if w[0] == "merge" {
		args = append(args, w[2])
		if len(w) > 3 {
			args = append(args, "-b", w[3], "-F", "qcow2")
		}
	} else if len(w) > 2 {
		args = append(args, "-g", w[2])
	}
	oracle.MustRun(t, "qemu-img", append(args, path, w[1])...)
}

// ownStep does a step by this package.
func ownStep(t testing.TB, im *qcow2.Image, step string) error {
	w := strings.Fields(step)
	number := func(i int) int64 {
		if len(w) <= i {
			return 0
		}
		n, err := strconv.ParseInt(w[i], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	switch w[0] {
	case "write":
		p := make([]byte, number(2))
		for i := range p {
			p[i] = 7
		}
		_, err := im.WriteAt(p, number(1))
		return err
	case "zero":
		return im.WriteZeroes(number(1), number(2))
	case "discard":
		return im.Discard(number(1), number(2))
	case "add":
		return im.AddBitmap(t.Context(), w[1], &qcow2.BitmapOptions{Granularity: number(2)})
	case "remove":
		return im.RemoveBitmap(t.Context(), w[1])
	case "clear":
		return im.ClearBitmap(t.Context(), w[1])
	case "enable":
		return im.EnableBitmap(t.Context(), w[1])
	case "disable":
		return im.DisableBitmap(t.Context(), w[1])
	case "sync":
		return im.Sync()
	case "merge":
		src := im
		if len(w) > 3 {
			var err error
			if src, err = qcow2.Open(w[3], nil); err != nil {
				t.Fatal(err)
			}
			defer src.Close()
		}
		return im.MergeBitmap(t.Context(), w[1], src, w[2])
	}
	t.Fatalf("no step %q", step)
	return nil
}

func openWrite(t testing.TB, path string) *qcow2.Image {
	t.Helper()
	im, err := qcow2.Open(path, &qcow2.OpenOptions{Write: true, Backing: qcow2.BackingFollow})
	if err != nil {
		t.Fatal(err)
	}
	return im
}

// randomSteps are writes over a disk of a size.
func randomSteps(r *rand.Rand, n int, size int64) []string {
	var steps []string
	for range n {
		off := r.Int64N(size)
		length := 1 + r.Int64N(min(size-off, []int64{1, 5000, 100000, size}[r.IntN(4)]))
		op := []string{"write", "write", "zero", "discard"}[r.IntN(4)]
		if length > 100000 {
			op = "zero"
		}
		steps = append(steps, fmt.Sprintf("%s %d %d", op, off, length))
	}
	return steps
}

// TestDirtyRanges reads bitmaps that QEMU wrote as QEMU does.
func TestDirtyRanges(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io", "qemu-nbd")
	r := rand.New(rand.NewPCG(5, 6))
	for _, c := range []struct{ clusterSize, granularity, size int64 }{
		{512, 512, 40 << 20}, {512, 512, 1536}, {4096, 512, 300<<20 + 512}, {65536, 65536, 1 << 20}, {65536, 512, 700<<20 + 1536}, {2 << 20, 2 << 30, 5 << 30},
	} {
		t.Run(fmt.Sprint(c), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "i.qcow2")
			oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", fmt.Sprint("cluster_size=", c.clusterSize), path, fmt.Sprint(c.size))
			qemuStep(t, path, fmt.Sprint("add b ", c.granularity))
			for _, s := range randomSteps(r, 8, c.size) {
				qemuStep(t, path, s)
			}
			got := fileBitmaps(t, path)
			want := []bitmapState{{"b", "auto", uint64(c.granularity), qemuDirty(t, path, "b")}}
			if d := cmp.Diff(want, got); d != "" || len(want[0].Dirty) == 0 {
				t.Errorf("-qemu +got:\n%s", d)
			}
		})
	}
}

// TestBitmapSteps does the same steps by QEMU and by this package, once with
// the image opened for each and once for all, and compares the bitmaps.
func TestBitmapSteps(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io", "qemu-nbd")
	dir := t.TempDir()
	other := filepath.Join(dir, "other.qcow2")
	const size = 9<<20 + 1536
	create := func(t *testing.T, path, opts string) {
		oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", opts, path, strconv.Itoa(size))
	}
	create(t, other, "cluster_size=1024")
	for _, s := range []string{"add x 1024", "add y 65536", "write 70000 5000", "write 800000 20000", fmt.Sprint("write ", size-1, " 1")} {
		qemuStep(t, other, s)
	}
	steps := slices.Concat([]string{"add a 512", "add b", "add c 1048576", "write 0 1", "disable b", "write 1000000 10000",
		"zero 2096640 1024"},
		randomSteps(rand.New(rand.NewPCG(7, 8)), 5, size),
		[]string{"sync", "add d 2097152", "merge d a", "merge a c", "merge b b", "enable b", "write 500000 5", "remove c"},
		[]string{"merge a x " + other, "merge b x " + other, "merge a y " + other, "merge d y " + other, "zero 3000000 3000000"},
		[]string{"disable a", "discard 8000000 1000", "clear d", "write 333333 3333", "merge b a", "remove a", "write 2222222 2222"})
	for name, opts := range map[string]string{
		"small": "cluster_size=512,refcount_bits=1", "default": "cluster_size=65536", "data file": "extended_l2=on,data_file=RAW",
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			paths := map[string]string{}
			for _, who := range []string{"qemu", "each", "once"} {
				paths[who] = filepath.Join(dir, who+".qcow2")
				create(t, paths[who], strings.ReplaceAll(opts, "RAW", paths[who]+".raw"))
			}
			once := openWrite(t, paths["once"])
			for _, s := range steps {
				if s != "sync" {
					qemuStep(t, paths["qemu"], s)
				}
				each := openWrite(t, paths["each"])
				if err := ownStep(t, each, s); err != nil {
					t.Fatalf("%s: %v", s, err)
				}
				if err := each.Close(); err != nil {
					t.Fatalf("%s: close: %v", s, err)
				}
				if d := cmp.Diff(fileBitmaps(t, paths["qemu"]), fileBitmaps(t, paths["each"])); d != "" {
					t.Fatalf("%s: -qemu +each\n%s", s, d)
				}
				if err := ownStep(t, once, s); err != nil {
					t.Fatalf("%s: %v", s, err)
				}
			}
			if err := once.Close(); err != nil {
				t.Fatal(err)
			}
			want := fileBitmaps(t, paths["qemu"])
			if d := cmp.Diff(want, fileBitmaps(t, paths["once"])); d != "" {
				t.Errorf("-qemu +once\n%s", d)
			}
			for _, b := range want {
				for _, who := range []string{"each", "once"} {
					if d := cmp.Diff(b.Dirty, qemuDirty(t, paths[who], b.Name)); d != "" {
						t.Errorf("%s as QEMU reads it: -want +%s\n%s", b.Name, who, d)
					}
				}
			}
			for _, who := range []string{"each", "once"} {
				oracle.MustRun(t, "qemu-img", "check", "-f", "qcow2", paths[who])
				oracle.MustRun(t, "qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", paths["qemu"], paths[who])
				// QEMU goes on with it.
				for _, s := range []string{"write 0 100", "remove b", "remove d", "add e"} {
					qemuStep(t, paths[who], s)
				}
				if got := fileBitmaps(t, paths[who]); len(got) != 1 {
					t.Errorf("%d bitmaps are left", len(got))
				}
			}
		})
	}
}

// TestBitmapResize: bitmaps follow the size of the disk as QEMU's do.
func TestBitmapResize(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	for _, clusterSize := range []int{2048, 65536} {
		t.Run(fmt.Sprint(clusterSize), func(t *testing.T) {
			dir := t.TempDir()
			qemu, own := filepath.Join(dir, "qemu.qcow2"), filepath.Join(dir, "own.qcow2")
			for _, path := range []string{qemu, own} {
				oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", fmt.Sprint("cluster_size=", clusterSize), path, "9438720")
			}
			size := int64(9438720)
			for _, step := range []string{
				"add a 512", "add b 4096", "add c 2097152", "add d 2097152", "disable d", "discard 9437184 1536", "9438208", "write 100000 3000",
				"41943040", "discard 41942999 41", "discard 0 900000", "20971520", "8388608", "5243392", "write 5243000 392", "30000128", "discard 2000000 800000",
				"2097664", "3145728", "clear a", "discard 1024 1", "1536", "104857600", "discard 50000000 1000", "65536",
			} {
				if n, err := strconv.ParseInt(step, 10, 64); err == nil {
					size = n
					oracle.MustRun(t, "qemu-img", "resize", "-q", "--shrink", "-f", "qcow2", qemu, step)
				} else {
					qemuStep(t, qemu, step)
				}
				im := openWrite(t, own)
				var err error
				if strings.Contains(step, " ") {
					err = ownStep(t, im, step)
				} else {
					err = im.Resize(t.Context(), size, &qcow2.ResizeOptions{Shrink: true})
				}
				if err := errors.Join(err, im.Close()); err != nil {
					t.Fatalf("%s: %v", step, err)
				}
				if d := cmp.Diff(fileBitmaps(t, qemu), fileBitmaps(t, own)); d != "" {
					t.Fatalf("%s: -qemu +own\n%s", step, d)
				}
			}
			oracle.MustRun(t, "qemu-img", "check", "-f", "qcow2", own)
		})
	}
}

// TestBitmapInUse: while the guest writes, and after a crash, bitmaps that
// record writes are in use, as QEMU leaves them. QEMU marks those that are
// disabled too, though nothing changes them.
func TestBitmapInUse(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	dir := t.TempDir()
	path, qemu := filepath.Join(dir, "i.qcow2"), filepath.Join(dir, "qemu.qcow2")
	for _, p := range []string{path, qemu} {
		oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", p, "1M")
		for _, s := range []string{"add a", "add off", "write 100000 1", "disable off"} {
			qemuStep(t, p, s)
		}
	}
	oracle.Run(t, "qemu-io", "-f", "qcow2", "-c", "write 0 1", "-c", "abort", qemu)
	im := openWrite(t, path)
	defer im.Close()
	crashed := func() []bitmapState {
		copied := filepath.Join(dir, "copy.qcow2")
		b, err := os.ReadFile(path)
		if err == nil {
			err = os.WriteFile(copied, b, 0o666)
		}
		if err != nil {
			t.Fatal(err)
		}
		return fileBitmaps(t, copied)
	}
	before := crashed()
	if err := ownStep(t, im, "write 0 1"); err != nil {
		t.Fatal(err)
	}
	want := fileBitmaps(t, qemu)
	want[1] = before[1]
	if d := cmp.Diff(want, crashed()); d != "" || want[0].Flags != "in-use auto" {
		t.Errorf("-qemu +got\n%s", d)
	}
	if err := ownStep(t, im, "sync"); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, crashed()); d != "" {
		t.Errorf("synced: -qemu +got\n%s", d)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	want[0] = bitmapState{"a", "auto", 65536, []dirtyRange{{0, 131072}}}
	if d := cmp.Diff(want, crashed()); d != "" {
		t.Errorf("closed: -want +got\n%s", d)
	}
}

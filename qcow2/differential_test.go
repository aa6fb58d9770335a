package qcow2_test

import (
	"bytes"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"qimg/qcow2"
	"qimg/qcow2/blockdev/oracle"
)

var randomImages = flag.Int("random.images", 12, "how many random images TestRandomImages makes")

// guestOp is a change of guest data that both qimg and qemu-io can do.
type guestOp struct {
	kind   string // write, zero or discard
	off, n int64
	fill   byte // of a write
}

func randomOps(r *rand.Rand, count int, size, cluster int64, discard bool) []guestOp {
	var list []guestOp
	for len(list) < count {
		op := guestOp{kind: []string{"write", "write", "write", "zero", "discard"}[r.IntN(5)], fill: byte(1 + r.IntN(255))}
		if op.kind == "discard" && !discard {
			continue
		}
		op.n = min(size, 1+r.Int64N([]int64{512, 4096, cluster, 5 * cluster}[r.IntN(4)]))
		op.off = r.Int64N(size - op.n + 1)
		switch r.IntN(3) {
		case 0:
			op.off = op.off / cluster * cluster
			op.n = min((op.n+cluster-1)/cluster*cluster, size-op.off)
		case 1:
			op.off = op.off / 512 * 512
			op.n = min((op.n+511)/512*512, size-op.off)
		}
		list = append(list, op)
	}
	return list
}

// apply does what the operation does to the bytes of a guest. A discard makes
// zeroes of whole clusters.
func (op guestOp) apply(b []byte, cluster int64) {
	p := b[op.off : op.off+op.n]
	switch {
	case op.kind == "write":
		copy(p, bytes.Repeat([]byte{op.fill}, int(op.n)))
	case op.kind == "zero":
		clear(p)
	default:
		lo, hi := (op.off+cluster-1)/cluster*cluster, (op.off+op.n)/cluster*cluster
		if op.off+op.n == int64(len(b)) {
			hi = int64(len(b))
		}
		if lo < hi {
			clear(b[lo:hi])
		}
	}
}

func (op guestOp) do(im *qcow2.Image) error {
	switch op.kind {
	case "write":
		_, err := im.WriteAt(bytes.Repeat([]byte{op.fill}, int(op.n)), op.off)
		return err
	case "zero":
		return im.WriteZeroes(op.off, op.n)
	}
	return im.Discard(op.off, op.n)
}

// qemuIO returns the command of qemu-io.
func (op guestOp) qemuIO() string {
	switch op.kind {
	case "write":
		return fmt.Sprintf("write -P %d %d %d", op.fill, op.off, op.n)
	case "zero":
		return fmt.Sprintf("write -z %d %d", op.off, op.n)
	}
	return fmt.Sprintf("discard %d %d", op.off, op.n)
}

// byQimg does the operations with this package.
func byQimg(t *testing.T, path string, ops []guestOp) {
	t.Helper()
	im, err := qcow2.Open(path, &qcow2.OpenOptions{Write: true, Backing: qcow2.BackingFollow})
	if err != nil {
		t.Fatal(err)
	}
	for _, op := range ops {
		if err := op.do(im); err != nil {
			t.Fatalf("%+v: %v", op, err)
		}
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
}

// byQEMU does the operations with qemu-io.
func byQEMU(t *testing.T, path string, ops []guestOp) {
	t.Helper()
	args := []string{"-f", "qcow2", "-d", "unmap"}
	for _, op := range ops {
		args = append(args, "-c", op.qemuIO())
	}
	r := oracle.Run(t, "qemu-io", append(args, path)...)
	if r.Code != 0 || strings.Contains(strings.ToLower(r.Stdout+r.Stderr), "failed") {
		t.Fatalf("qemu-io: exit %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
}

// copyImage copies an image of the zoo with the files that belong to it.
func copyImage(t *testing.T, dir, name string) {
	t.Helper()
	files, err := filepath.Glob(name + ".*")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if strings.HasSuffix(f, ".json") {
			continue
		}
		// With the holes that it has.
		oracle.MustRun(t, "cp", "--sparse=always", f, dir)
	}
}

// TestZooWrite lets qimg change every image of the zoo at random, and qemu-io
// change a copy in the same way.
func TestZooWrite(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io", "cp")
	seen, written := 0, 0
	zoo(t, func(t *testing.T, path string, want expected) {
		if seen++; oracle.SlowBuild && seen%4 != 0 {
			return
		}
		if !want.OpenOK || want.Secret != "" || *want.Size == 0 || *want.CheckRC == 2 {
			return
		}
		if want.Name == "bit-corrupt" {
			if im, err := qcow2.Open(path, &qcow2.OpenOptions{Write: true}); err == nil {
				im.Close()
				t.Error("an image that is marked corrupt is opened for writing")
			}
			return
		}
		zooDir, err := os.Getwd()
		if err != nil {
			t.Fatal(err)
		}
		ours, theirs := t.TempDir(), t.TempDir()
		copyImage(t, ours, want.Name)
		copyImage(t, theirs, want.Name)
		t.Chdir(ours)
		im, err := qcow2.Open(path, follow())
		if err != nil {
			t.Fatal(err)
		}
		h := im.Header()
		im.Close()
		seed := uint64(len(want.Name))<<32 + uint64(*want.Size)
		ops := randomOps(rand.New(rand.NewPCG(seed, 5)), 25, *want.Size, h.ClusterSize(), true)
		byQimg(t, path, ops)
		t.Chdir(theirs)
		byQEMU(t, path, ops)
		t.Chdir(ours)
		written++
		if r := oracle.Run(t, "qemu-img", "check", "-f", "qcow2", path); r.Code != *want.CheckRC && r.Code != 0 {
			t.Errorf("seed %d: qemu-img check: exit %d, it was %d\n%s%s", seed, r.Code, *want.CheckRC, r.Stdout, r.Stderr)
		}
		if *want.Size > 64<<40 {
			return // qemu-img compare asks for one GiB after the other
		}
		if r := oracle.Run(t, "qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", path, filepath.Join(theirs, path)); r.Code != 0 {
			t.Errorf("seed %d: qemu-img compare: exit %d\n%s%s\n%v", seed, r.Code, r.Stdout, r.Stderr, ops)
		}
		for i, sn := range want.Snapshots {
			im, err := qcow2.Open(path, &qcow2.OpenOptions{Backing: qcow2.BackingFollow, Snapshot: sn.ID})
			if err != nil {
				t.Fatal(err)
			}
			if _, sparse := digests(t, im, *want.Size); sparse != sn.SparseSHA256 {
				t.Errorf("seed %d: snapshot %s has changed", seed, sn.ID)
			}
			im.Close()
			if i < 1 && *want.Size <= 64<<20 {
				sameSnapshot(t, path, filepath.Join(zooDir, path), sn.ID)
			}
		}
	})
	if written < 90 && !oracle.SlowBuild && !t.Failed() {
		t.Errorf("%d images were written to, expected 90 at least", written)
	}
}

// sameSnapshot lets qemu-img compare a snapshot of two images.
func sameSnapshot(t *testing.T, a, b, id string) {
	t.Helper()
	dir := t.TempDir()
	var raw []string
	for i, image := range []string{a, b} {
		out := filepath.Join(dir, fmt.Sprint(i))
		oracle.MustRun(t, "qemu-img", "convert", "-f", "qcow2", "-l", "snapshot.id="+id, "-O", "raw", image, out)
		raw = append(raw, out)
	}
	oracle.MustRun(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", raw[0], raw[1])
}

// randomImage is an image that qimg and QEMU change in turn.
type randomImage struct {
	t    *testing.T
	rand *rand.Rand
	path string
	o    qcow2.FormatOptions
	want []byte
	// snapshots are what they hold, by name.
	snapshots map[string][]byte
}

// TestRandomImages makes images of random options, by qimg and by qemu-img,
// which both change in turn. After each turn both check it, and read what a
// model has.
func TestRandomImages(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	for i := range *randomImages {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			r := &randomImage{t: t, rand: rand.New(rand.NewPCG(uint64(i), 6)), path: filepath.Join(t.TempDir(), "image.qcow2"), snapshots: map[string][]byte{}}
			r.create()
			turns := 2 + r.rand.IntN(3)
			first := r.rand.IntN(2)
			for turn := range turns {
				ours := (turn+first)%2 == 0
				r.changeSnapshots(ours)
				r.resize(ours)
				r.write(ours)
				r.check()
			}
		})
	}
}

func (r *randomImage) create() {
	rnd := r.rand
	o := qcow2.FormatOptions{ClusterSize: 512 << rnd.IntN(13), RefcountBits: 1 << rnd.IntN(7)}
	switch rnd.IntN(4) {
	case 0:
		o.Version, o.RefcountBits = 2, 16
	case 1:
		o.ExtendedL2 = o.ClusterSize >= 16<<10
	case 2:
		o.LazyRefcounts = true
	}
	if o.Version == 0 && rnd.IntN(2) == 0 {
		o.Compression = qcow2.CompressionZstd
	}
	size := 512 * (1 + rnd.Int64N(min(100*o.ClusterSize, 8<<20)/512))
	r.want = make([]byte, size)
	if rnd.IntN(3) == 0 {
		base := filepath.Join(filepath.Dir(r.path), "base.raw")
		below := noise(byte(size), int(512*rnd.Int64N(1+2*size/512)))
		copy(r.want, below)
		if err := os.WriteFile(base, below, 0o600); err != nil {
			r.t.Fatal(err)
		}
		o.BackingFile, o.BackingFormat = "base.raw", "raw"
	}
	prealloc := qcow2.PreallocationOff
	if o.BackingFile == "" && rnd.IntN(3) == 0 {
		prealloc = qcow2.Preallocation(rnd.IntN(4))
	}
	r.o = o
	r.t.Logf("%d bytes, %+v, preallocation %v", size, o, prealloc)
	if rnd.IntN(2) == 0 {
		compat := "1.1"
		if o.Version == 2 {
			compat = "0.10"
		}
		on := map[bool]string{true: "on", false: "off"}
		opts := fmt.Sprintf("compat=%s,cluster_size=%d,refcount_bits=%d,extended_l2=%s,lazy_refcounts=%s,preallocation=%v",
			compat, o.ClusterSize, o.RefcountBits, on[o.ExtendedL2], on[o.LazyRefcounts], prealloc)
		if o.Version == 0 {
			opts += ",compression_type=" + o.Compression.String()
		}
		args := []string{"create", "-q", "-f", "qcow2", "-o", opts}
		if o.BackingFile != "" {
			args = append(args, "-b", o.BackingFile, "-F", "raw")
		}
		oracle.MustRun(r.t, "qemu-img", append(args, r.path, fmt.Sprint(size))...)
		return
	}
	f, err := os.OpenFile(r.path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		r.t.Fatal(err)
	}
	f.Close()
	dev := loadFile(r.t, r.path)
	if err := qcow2.Create(r.t.Context(), dev, size, &qcow2.CreateOptions{FormatOptions: o, Preallocation: prealloc}); err != nil {
		r.t.Fatal(err)
	}
	saveFile(r.t, dev, r.path)
}

// changeSnapshots lets one of both make, apply or delete a snapshot.
func (r *randomImage) changeSnapshots(ours bool) {
	if r.o.RefcountBits == 1 {
		return // counts one reference
	}
	for range r.rand.IntN(3) {
		name := fmt.Sprintf("s%d", r.rand.IntN(4))
		content, exists := r.snapshots[name]
		var flag string
		switch {
		case !exists && 1<<r.o.RefcountBits > 2+len(r.snapshots):
			flag = "-c"
			r.snapshots[name] = bytes.Clone(r.want)
		case exists && 1<<r.o.RefcountBits > 2+len(r.snapshots) && r.rand.IntN(2) == 0: // takes one reference more for a while
			flag = "-a"
			r.want = bytes.Clone(content) // of the size that it had
		case exists:
			flag = "-d"
			delete(r.snapshots, name)
		default:
			continue
		}
		if !ours {
			oracle.MustRun(r.t, "qemu-img", "snapshot", flag, name, r.path)
			continue
		}
		im, err := qcow2.Open(r.path, &qcow2.OpenOptions{Write: true, Backing: qcow2.BackingFollow})
		if err != nil {
			r.t.Fatal(err)
		}
		switch flag {
		case "-c":
			_, err = im.CreateSnapshot(r.t.Context(), name, nil)
		case "-a":
			err = im.ApplySnapshot(r.t.Context(), name)
		case "-d":
			err = im.DeleteSnapshot(r.t.Context(), name)
		}
		if err != nil {
			r.t.Fatal(err)
		}
		if err := im.Close(); err != nil {
			r.t.Fatal(err)
		}
	}
}

// resize lets one of both change the size of the disk.
func (r *randomImage) resize(ours bool) {
	if r.rand.IntN(3) > 0 || r.o.Version == 2 && len(r.snapshots) > 0 {
		return
	}
	// Whole clusters: what QEMU adds to a part of one, it does not clear.
	size := (1 + r.rand.Int64N(int64(len(r.want))*3/2) + r.o.ClusterSize) / r.o.ClusterSize * r.o.ClusterSize
	if r.o.Version == 2 && r.o.BackingFile != "" && size > int64(len(r.want)) {
		return // the backing file cannot be hidden
	}
	if size < int64(len(r.want)) {
		r.want = r.want[:size:size]
	} else {
		r.want = append(r.want, make([]byte, size-int64(len(r.want)))...)
	}
	if !ours {
		oracle.MustRun(r.t, "qemu-img", "resize", "-q", "-f", "qcow2", "--shrink", r.path, fmt.Sprint(size))
		return
	}
	im, err := qcow2.Open(r.path, &qcow2.OpenOptions{Write: true, Backing: qcow2.BackingFollow})
	if err != nil {
		r.t.Fatal(err)
	}
	if err := im.Resize(r.t.Context(), size, &qcow2.ResizeOptions{Shrink: true}); err != nil {
		r.t.Fatalf("resize to %d: %v", size, err)
	}
	if err := im.Close(); err != nil {
		r.t.Fatal(err)
	}
}

func (r *randomImage) write(ours bool) {
	// In version 2 over a backing file QEMU discards nothing, and qimg what lies
	// beyond its end.
	discards := r.o.Version != 2 || r.o.BackingFile == ""
	ops := randomOps(r.rand, 1+r.rand.IntN(20), int64(len(r.want)), r.o.ClusterSize, discards)
	if ours {
		byQimg(r.t, r.path, ops)
	} else {
		byQEMU(r.t, r.path, ops)
	}
	for _, op := range ops {
		op.apply(r.want, r.o.ClusterSize)
	}
}

// check lets both check and read the image and its snapshots.
func (r *randomImage) check() {
	t := r.t
	t.Helper()
	if c := oracle.Run(t, "qemu-img", "check", "-f", "qcow2", r.path); c.Code != 0 {
		t.Fatalf("qemu-img check: exit %d\n%s%s", c.Code, c.Stdout, c.Stderr)
	}
	raw := filepath.Join(filepath.Dir(r.path), "want.raw")
	if err := os.WriteFile(raw, r.want, 0o600); err != nil {
		t.Fatal(err)
	}
	oracle.MustRun(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", r.path, raw)
	read := func(snapshot string, want []byte) {
		im, err := qcow2.Open(r.path, &qcow2.OpenOptions{Backing: qcow2.BackingFollow, Snapshot: snapshot})
		if err != nil {
			t.Fatal(err)
		}
		defer im.Close()
		if snapshot == "" {
			qcow2.MustHaveLeaks(t, im, 0)
		}
		got := make([]byte, im.Size())
		if _, err := im.ReadAt(got, 0); err != nil && err != io.EOF {
			t.Fatal(err)
		}
		if i := firstDifference(got, want); i >= 0 {
			t.Fatalf("snapshot %q: guest byte %d differs", snapshot, i)
		}
	}
	read("", r.want)
	for name, content := range r.snapshots {
		read(name, content)
	}
}

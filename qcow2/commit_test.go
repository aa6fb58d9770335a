package qcow2_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"syscall"
	"testing"
	"time"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/blocktest"
)

// committing is an image over another, or over a raw one.
type committing struct {
	top, base *blockdev.Memory
	raw       bool
	want      []byte // what the guest of the image reads
}

func newCommitting(t *testing.T, top qcow2.FormatOptions, base *qcow2.FormatOptions) *committing {
	t.Helper()
	r := rand.New(rand.NewPCG(2, 2))
	c := &committing{raw: base == nil}
	if c.raw {
		c.base = blockdev.NewMemory(30 << 10)
		writeAll(t, c.base, bytes.Repeat([]byte("base"), 1000), 5000)
	} else {
		c.base = memoryImage(t, r, 30<<10, *base, nil)
	}
	below := c.below(t, c.base)
	c.top = memoryImage(t, r, 40<<10, top, below)
	im := openOver(t, c.top.Clone(), below)
	c.want = bytesOf(t, im)
	im.Close()
	return c
}

// below opens the base for reading.
func (c *committing) below(t *testing.T, dev blockdev.Device) blockdev.Reader {
	t.Helper()
	if c.raw {
		return dev
	}
	im, err := qcow2.New(dev, nil)
	if err != nil {
		t.Fatal(err)
	}
	return im
}

func (c *committing) run(t *testing.T, top, base blockdev.Device) (err error) {
	below := blockdev.Reader(base)
	if !c.raw {
		im, err := qcow2.New(base, &qcow2.OpenOptions{Write: true})
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, im.Close()) }()
		below = im
	}
	im, err := qcow2.New(top, &qcow2.OpenOptions{Write: true, BackingDevice: below})
	if err != nil {
		return err
	}
	return errors.Join(im.Commit(t.Context(), nil), im.Close())
}

// check looks at what is left and tells whether the image is empty.
func (c *committing) check(t *testing.T, top, base *blockdev.Memory, clean bool) (empty bool, err error) {
	below := blockdev.Reader(base)
	if !c.raw {
		im, err := qcow2.New(base, nil)
		if err != nil {
			return false, err
		}
		if err := sound(t, im, clean); err != nil {
			return false, fmt.Errorf("base: %w", err)
		}
		below = im
	}
	if err := intact(t, top, below, c.want, clean); err != nil {
		return false, err
	}
	im, err := qcow2.New(top, &qcow2.OpenOptions{BackingDevice: below})
	if err != nil {
		return false, err
	}
	return isEmpty(im)
}

// isEmpty reports whether an image holds nothing of its own.
func isEmpty(im *qcow2.Image) (bool, error) {
	e, err := im.NextExtent(0)
	for err == nil && (e.Depth > 0 || e.Kind == blockdev.Unallocated) {
		if e.Off+e.Len == im.Size() {
			return true, nil
		}
		e, err = im.NextExtent(e.Off + e.Len)
	}
	return false, err
}

func commitKinds() map[string][2]*qcow2.FormatOptions {
	f := small()
	p := func(name string) *qcow2.FormatOptions { o := f[name]; return &o }
	return map[string][2]*qcow2.FormatOptions{
		"512 on raw":      {p("512"), nil},
		"4096 on 512":     {p("4096"), p("512")},
		"512-v2 on 4096":  {p("512-v2"), p("4096")},
		"512 on 512-v2":   {p("512"), p("512-v2")},
		"extl2 on extl2":  {p("extl2"), p("extl2")},
		"512-v2 on extl2": {p("512-v2"), p("extl2")},
	}
}

// After a crash at any write of a commit the guest of the image reads the same,
// and both images are good.
func TestCrashCommit(t *testing.T) {
	for name, kind := range commitKinds() {
		t.Run(name, func(t *testing.T) {
			c := newCommitting(t, *kind[0], kind[1])
			top, err := blocktest.NewRecorder(c.top)
			if err != nil {
				t.Fatal(err)
			}
			base, err := top.Beside(c.base)
			if err != nil {
				t.Fatal(err)
			}
			if err := c.run(t, top, base); err != nil {
				t.Fatal(err)
			}
			states, done := 0, 0
			for s, err := range top.CrashStates(chainCrashes) {
				if err != nil {
					t.Fatal(err)
				}
				empty, err := c.check(t, s.Devs[0], s.Devs[1], false)
				if err != nil {
					t.Fatalf("%v: %v", s, err)
				}
				states++
				if empty {
					done++
				}
			}
			if done == 0 || done == states {
				t.Errorf("%d of %d states are after the commit", done, states)
			}
			if empty, err := c.check(t, c.top, c.base, true); !empty || err != nil {
				t.Error(empty, err)
			}
			if n := c.top.Size(); n > 16*kind[0].ClusterSize {
				t.Errorf("the empty image has %d bytes", n)
			}
			// The base reads as the image does.
			if got := bytesOf(t, c.below(t, c.base)); !bytes.Equal(got, c.want) {
				t.Error("the base reads something else")
			}
		})
	}
}

// When a call of either file fails nothing is lost.
func TestFaultsCommit(t *testing.T) {
	for name, kind := range commitKinds() {
		for _, inBase := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s-%v", name, inBase), func(t *testing.T) {
				c := newCommitting(t, *kind[0], kind[1])
				for call := 1; ; call++ {
					top, base := c.top.Clone(), c.base.Clone()
					devs := []blockdev.Device{top, base}
					i := 0
					if inBase {
						i = 1
					}
					f := blocktest.NewFaulty(devs[i], blocktest.Fault{Call: call, Err: syscall.ENOSPC, Sticky: call%2 == 0})
					devs[i] = f
					err := c.run(t, devs[0], devs[1])
					empty, bad := c.check(t, top, base, false)
					if bad != nil {
						t.Fatalf("call %d: %v", call, bad)
					}
					if err == nil && !empty {
						t.Fatalf("call %d: no error, and no commit", call)
					}
					if !f.Fired() {
						break
					}
				}
			})
		}
	}
}

// A commit past an image that is shorter than both, which hides the base.
func TestCommitPastShort(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 3))
	format := qcow2.FormatOptions{ClusterSize: 512}
	baseDev := blockdev.NewMemory(20 << 10)
	writeAll(t, baseDev, bytes.Repeat([]byte("base"), 5<<10), 0)
	mid := openOver(t, memoryImage(t, r, 10<<10, format, baseDev), baseDev)
	top := openOver(t, memoryImage(t, r, 20<<10, format, mid), mid)
	want := bytesOf(t, top)
	if err := top.Commit(t.Context(), &qcow2.CommitOptions{Base: baseDev}); !errors.Is(err, qcow2.ErrBacking) {
		t.Errorf("the image would be emptied: %v", err)
	}
	if err := top.Commit(t.Context(), &qcow2.CommitOptions{Base: baseDev, Keep: true}); err != nil {
		t.Fatal(err)
	}
	if got := bytesOf(t, baseDev); !bytes.Equal(got, want) {
		t.Error("the base reads something else than the image")
	}
	if got := bytesOf(t, top); !bytes.Equal(got, want) {
		t.Error("the image reads something else than before")
	}
}

func TestCommitErrors(t *testing.T) {
	r := rand.New(rand.NewPCG(4, 4))
	format := qcow2.FormatOptions{ClusterSize: 512}
	raw := blockdev.NewMemory(8192)
	base := memoryImage(t, r, 8192, format, nil)
	dev := memoryImage(t, r, 8192, format, raw)
	closed := func(im *qcow2.Image) *qcow2.Image { im.Close(); return im }
	open := func(o qcow2.OpenOptions) *qcow2.Image {
		im, err := qcow2.New(dev, &o)
		if err != nil {
			t.Fatal(err)
		}
		return im
	}
	readOnly, err := qcow2.New(base, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		im   *qcow2.Image
		opts *qcow2.CommitOptions
		want error
	}{
		{"read-only image", open(qcow2.OpenOptions{BackingDevice: raw}), nil, blockdev.ErrReadOnly},
		{"read-only base", open(qcow2.OpenOptions{Write: true, BackingDevice: readOnly}), nil, blockdev.ErrReadOnly},
		{"base that is a reader", open(qcow2.OpenOptions{Write: true, BackingDevice: onlyReader{raw}}), nil, blockdev.ErrReadOnly},
		{"no backing file", openOver(t, base, nil), nil, qcow2.ErrBacking},
		{"not opened", open(qcow2.OpenOptions{Write: true, Backing: qcow2.BackingIgnore}), nil, qcow2.ErrBacking},
		{"base elsewhere", open(qcow2.OpenOptions{Write: true, BackingDevice: raw}), &qcow2.CommitOptions{Base: base}, qcow2.ErrBacking},
		{"closed", closed(open(qcow2.OpenOptions{Write: true, BackingDevice: raw})), nil, nil},
	} {
		before := [][]byte{bytesOf(t, dev), bytesOf(t, raw), bytesOf(t, base)}
		err := c.im.Commit(t.Context(), c.opts)
		if err == nil || c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
		c.im.Close()
		for i, m := range []*blockdev.Memory{dev, raw, base} {
			if !bytes.Equal(before[i], bytesOf(t, m)) {
				t.Errorf("%s: something was written", c.name)
			}
		}
	}
}

// onlyReader is a device that cannot be written.
type onlyReader struct{ blockdev.Reader }

// A rate bounds what is written, and a commit that is cancelled loses nothing.
func TestCommitRate(t *testing.T) {
	const size = 8 << 20
	raw := blockdev.NewMemory(size)
	dev := blockdev.NewMemory(0)
	if err := qcow2.Create(t.Context(), dev, size, &qcow2.CreateOptions{FormatOptions: qcow2.FormatOptions{BackingFile: "raw"}}); err != nil {
		t.Fatal(err)
	}
	im := openOver(t, dev, raw)
	defer im.Close()
	if _, err := im.WriteAt(noise(1, size), 0); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	var steps []int64
	start := time.Now()
	err := im.Commit(ctx, &qcow2.CommitOptions{Rate: 1 << 20, Progress: func(done, _ int64) { steps = append(steps, done) }})
	if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 2*time.Second {
		t.Errorf("after %v: %v", time.Since(start), err)
	}
	if got := bytesOf(t, im); !bytes.Equal(got, noise(1, size)) {
		t.Error("the image reads something else")
	}
	start = time.Now()
	if err := im.Commit(t.Context(), &qcow2.CommitOptions{Rate: 40 << 20, Progress: func(done, _ int64) { steps = append(steps, done) }}); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(start); d < 150*time.Millisecond {
		t.Errorf("8 MiB at 40 MiB a second were written in %v", d)
	}
	if !slices.Contains(steps, size) {
		t.Errorf("progress: %d", steps)
	}
	if !bytes.Equal(bytesOf(t, raw), noise(1, size)) {
		t.Error("the base reads something else")
	}
}

// An image that is emptied keeps its snapshots, and the space of the rest is
// given back.
func TestCommitSnapshot(t *testing.T) {
	for _, v := range variants() {
		t.Run(v.name, func(t *testing.T) {
			f := newFixture(t, v)
			base := blockdev.NewMemory(f.c * fixtureClusters)
			open := f.open
			if !v.backing {
				open.BackingDevice = base
			}
			open.Write = true
			open.WriteBacking = func(b qcow2.BackingFile) bool { return b.Depth == 1 }
			if f.data != nil {
				open.DataDevice = f.data
			}
			im, err := qcow2.New(f.dev, &open)
			if err != nil {
				t.Fatal(err)
			}
			want := bytesOf(t, im)
			var before []byte
			if v.snapshot {
				before = snapshotBytes(t, f, open)
			}
			if err := im.Commit(t.Context(), nil); err != nil {
				t.Fatal(err)
			}
			if got := bytesOf(t, im); !bytes.Equal(got, want) {
				t.Error("the open image reads something else")
			}
			if err := sound(t, im, true); err != nil {
				t.Error(err)
			}
			if empty, err := isEmpty(im); !empty || err != nil {
				t.Error("the image is not empty", err)
			}
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			if v.snapshot {
				if got := snapshotBytes(t, f, open); !bytes.Equal(got, before) {
					t.Error("the snapshot reads something else")
				}
			}
		})
	}
}

// snapshotBytes is what the snapshot of a fixture holds.
func snapshotBytes(t *testing.T, f *fixture, open qcow2.OpenOptions) []byte {
	t.Helper()
	open.Write, open.WriteBacking, open.NoLock, open.Snapshot = false, nil, true, "first"
	// What lies in the backing file may change: it is left out.
	open.Backing, open.BackingDevice = qcow2.BackingIgnore, blockdev.NewMemory(0)
	im, err := qcow2.New(f.dev, &open)
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	return bytesOf(t, im)
}

// What is freed between clusters that a snapshot keeps becomes holes.
func TestCommitHoles(t *testing.T) {
	const c, n = 4096, 64 << 10
	dev, base := blockdev.NewMemory(0), blockdev.NewMemory(256<<10)
	err := qcow2.Create(t.Context(), dev, base.Size(), &qcow2.CreateOptions{FormatOptions: qcow2.FormatOptions{
		ClusterSize: c, BackingFile: "base", BackingFormat: "raw"}})
	if err != nil {
		t.Fatal(err)
	}
	rec, err := blocktest.NewRecorder(dev)
	if err != nil {
		t.Fatal(err)
	}
	im := openOver(t, rec, base)
	step := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	writeAll(t, im, noise(1, n), 0)
	writeAll(t, im, noise(2, n), n)
	step(im.Sync())
	step(im.Discard(0, n))
	_, err = im.CreateSnapshot(t.Context(), "kept", nil)
	step(err)
	writeAll(t, im, noise(3, 8*c), 2*n) // where the first lay
	step(im.Sync())
	before := len(rec.Ops())
	step(im.Commit(t.Context(), nil))
	hole := func(op blocktest.Op) bool { return op.Kind == blocktest.Discard && op.N >= 3*c }
	if !slices.ContainsFunc(rec.Ops()[before:], hole) {
		t.Errorf("no holes: %v", rec.Ops()[before:])
	}
	step(sound(t, im, true))
	step(im.Close())
	kept, err := qcow2.New(dev, &qcow2.OpenOptions{Snapshot: "kept", BackingDevice: blockdev.NewMemory(0)})
	step(err)
	if got := bytesOf(t, kept)[n : 2*n]; !bytes.Equal(got, noise(2, n)) {
		t.Error("the snapshot reads something else")
	}
	if got := bytesOf(t, base)[2*n : 2*n+8*c]; !bytes.Equal(got, noise(3, 8*c)) {
		t.Error("the base reads something else")
	}
}

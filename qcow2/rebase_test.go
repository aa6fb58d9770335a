package qcow2_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"syscall"
	"testing"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/blocktest"
)

// rebasing is an image over a raw one, which gets another backing file.
type rebasing struct {
	dev        *blockdev.Memory
	below      map[string]blockdev.Reader // by the name that the image has
	to, format string
	want       []byte
}

// newRebasing makes one; flat means that the new backing file is none.
func newRebasing(t *testing.T, format qcow2.FormatOptions, flat bool) *rebasing {
	t.Helper()
	r := rand.New(rand.NewPCG(1, 1))
	old, other := blockdev.NewMemory(30<<10), blockdev.NewMemory(36<<10)
	for _, m := range []*blockdev.Memory{old, other} {
		for range 20 {
			writeAll(t, m, bytes.Repeat([]byte{byte(1 + r.IntN(3))}, 512), 512*r.Int64N(60))
		}
	}
	writeAll(t, other, []byte("beyond the end of the old one"), 33<<10)
	x := &rebasing{below: map[string]blockdev.Reader{"below": old, "other": other, "": blockdev.NewMemory(0)}}
	if !flat {
		x.to, x.format = "other", "raw"
	}
	x.dev = memoryImage(t, r, 40<<10, format, old)
	im := openOver(t, x.dev.Clone(), old)
	x.want = bytesOf(t, im)
	im.Close()
	return x
}

func (x *rebasing) run(t *testing.T, dev blockdev.Device) error {
	im, err := qcow2.New(dev, &qcow2.OpenOptions{Write: true, BackingDevice: x.below["below"]})
	if err != nil {
		return err
	}
	var below blockdev.Reader
	if x.to != "" {
		below = x.below[x.to]
	}
	err = im.Rebase(t.Context(), below, x.to, x.format, nil)
	if err == nil {
		got := make([]byte, im.Size())
		if _, err = im.ReadAt(got, 0); err == nil && !bytes.Equal(got, x.want) {
			t.Error("the open image reads something else")
		}
	}
	return errors.Join(err, im.Close())
}

// check looks at what is left and tells whether the backing file is the new one.
func (x *rebasing) check(t *testing.T, dev *blockdev.Memory, clean bool) (after bool, err error) {
	im, err := qcow2.New(dev, &qcow2.OpenOptions{Backing: qcow2.BackingIgnore})
	if err != nil {
		return false, err
	}
	name := im.Header().BackingFile
	im.Close()
	return name == x.to, intact(t, dev, x.below[name], x.want, clean)
}

// After a crash at any write of a rebase the guest reads the same, over the old
// backing file or over the new one.
func TestCrashRebase(t *testing.T) {
	for name, format := range small() {
		for _, flat := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s-%v", name, flat), func(t *testing.T) {
				x := newRebasing(t, format, flat)
				rec, err := blocktest.NewRecorder(x.dev)
				if err != nil {
					t.Fatal(err)
				}
				if err := x.run(t, rec); err != nil {
					t.Fatal(err)
				}
				states, done := 0, 0
				for s, err := range rec.CrashStates(chainCrashes) {
					if err != nil {
						t.Fatal(err)
					}
					after, err := x.check(t, s.Dev(), false)
					if err != nil {
						t.Fatalf("%v: %v", s, err)
					}
					states++
					if after {
						done++
					}
				}
				if done == 0 || done == states {
					t.Errorf("%d of %d states are after the rebase", done, states)
				}
				if after, err := x.check(t, x.dev, true); !after || err != nil {
					t.Error(after, err)
				}
			})
		}
	}
}

// When a call fails the image has the old backing file or the new one, and
// reads the same over it.
func TestFaultsRebase(t *testing.T) {
	for name, format := range small() {
		for _, sticky := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s-%v", name, sticky), func(t *testing.T) {
				x := newRebasing(t, format, false)
				for call := 1; ; call++ {
					dev := x.dev.Clone()
					f := blocktest.NewFaulty(dev, blocktest.Fault{Call: call, Err: syscall.EIO, Sticky: sticky})
					err := x.run(t, f)
					after, bad := x.check(t, dev, false)
					if bad != nil {
						t.Fatalf("call %d: %v", call, bad)
					}
					if err == nil && !after {
						t.Fatalf("call %d: no error, and no rebase", call)
					}
					if !f.Fired() {
						break
					}
				}
			})
		}
	}
}

func TestRebaseErrors(t *testing.T) {
	old := blockdev.NewMemory(4096)
	dev := memoryImage(t, rand.New(rand.NewPCG(1, 1)), 4096, qcow2.FormatOptions{ClusterSize: 512}, old)
	before := bytesOf(t, dev)
	long := string(bytes.Repeat([]byte("n"), 1024))
	option := func(err error) bool { var e qcow2.OptionError; return errors.As(err, &e) }
	is := func(target error) func(error) bool { return func(err error) bool { return errors.Is(err, target) } }
	for _, c := range []struct {
		name string
		open qcow2.OpenOptions
		run  func(im *qcow2.Image) error
		ok   func(error) bool
	}{
		{"read-only", qcow2.OpenOptions{BackingDevice: old}, func(im *qcow2.Image) error {
			return im.SetBacking(t.Context(), "x", "raw")
		}, is(blockdev.ErrReadOnly)},
		{"backing not open", qcow2.OpenOptions{Write: true, Backing: qcow2.BackingIgnore}, func(im *qcow2.Image) error {
			return im.Rebase(t.Context(), old, "x", "raw", nil)
		}, is(qcow2.ErrBacking)},
		{"a name and no file", qcow2.OpenOptions{Write: true, BackingDevice: old}, func(im *qcow2.Image) error {
			return im.Rebase(t.Context(), nil, "x", "raw", nil)
		}, is(qcow2.ErrBacking)},
		{"long name", qcow2.OpenOptions{Write: true, BackingDevice: old}, func(im *qcow2.Image) error {
			return im.Rebase(t.Context(), old, long, "raw", nil)
		}, option},
		{"a format alone", qcow2.OpenOptions{Write: true, BackingDevice: old}, func(im *qcow2.Image) error {
			return im.SetBacking(t.Context(), "", "raw")
		}, option},
		{"no room", qcow2.OpenOptions{Write: true, BackingDevice: old}, func(im *qcow2.Image) error {
			return im.SetBacking(t.Context(), long[:500], "raw")
		}, is(qcow2.ErrLimit)},
	} {
		t.Run(c.name, func(t *testing.T) {
			im, err := qcow2.New(dev, &c.open)
			if err != nil {
				t.Fatal(err)
			}
			defer im.Close()
			if err := c.run(im); !c.ok(err) {
				t.Errorf("%v", err)
			}
			if !bytes.Equal(bytesOf(t, dev), before) {
				t.Error("the image has changed")
			}
		})
	}
}

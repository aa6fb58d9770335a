package qcow2_test

import (
	"encoding/binary"
	"fmt"
	"syscall"
	"testing"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/blocktest"
	"qimg/qcow2/blockdev/oracle"
)

// damaged is an image and the places of its tables.
type damaged struct {
	t testing.TB
	d *blockdev.Memory
	h qcow2.Header
}

func (x *damaged) get(off uint64) uint64 {
	b := make([]byte, 8)
	if _, err := x.d.ReadAt(b, int64(off)); err != nil {
		x.t.Fatal(err)
	}
	return binary.BigEndian.Uint64(b)
}

func (x *damaged) put(off, v uint64) {
	if _, err := x.d.WriteAt(binary.BigEndian.AppendUint64(nil, v), int64(off)); err != nil {
		x.t.Fatal(err)
	}
}

const damagedOffset = 0x00fffffffffffe00

// l2 returns where the entry of a guest cluster lies.
func (x *damaged) l2(cluster uint64) uint64 {
	size := uint64(x.h.ClusterSize())
	entry := uint64(8)
	if x.h.IncompatibleFeatures&qcow2.IncompatExtendedL2 != 0 {
		entry = 16
	}
	n := size / entry
	return x.get(x.h.L1TableOffset+cluster/n*8)&damagedOffset + cluster%n*entry
}

func damages() map[string]func(x *damaged) {
	return map[string]func(x *damaged){
		"leak": func(x *damaged) {
			x.put(x.l2(plainAt), 0)
			if x.h.IncompatibleFeatures&qcow2.IncompatExtendedL2 != 0 {
				x.put(x.l2(plainAt)+8, 0)
			}
		},
		"no refcounts":      func(x *damaged) { x.put(x.get(x.h.RefcountTableOffset), 0) },
		"other refcounts":   func(x *damaged) { x.put(x.get(x.h.RefcountTableOffset), 0x0102030405060708) },
		"no refcount block": func(x *damaged) { x.put(x.h.RefcountTableOffset, 0) },
		"copied flags": func(x *damaged) {
			x.put(x.h.L1TableOffset, x.get(x.h.L1TableOffset)^1<<63)
			x.put(x.l2(plainAt), x.get(x.l2(plainAt))^1<<63)
		},
		"dirty": func(x *damaged) {
			x.put(x.get(x.h.RefcountTableOffset), 0)
			if x.h.Version > 2 {
				x.put(72, uint64(x.h.IncompatibleFeatures|qcow2.IncompatDirty))
			}
		},
	}
}

// TestCrashRepair looks at what a crash leaves of a repair: the image as it was
// or a repaired one; and at what a failing device leaves.
func TestCrashRepair(t *testing.T) {
	opts := &blocktest.CrashOptions{Subsets: 32, Tears: 3}
	if *crashLong {
		opts = nil
	}
	states, faults := 0, 0
	for vi, v := range variants() {
		if v.data || vi%5 != 0 && !*crashLong || oracle.SlowBuild && vi > 0 {
			continue
		}
		f := newFixture(t, v)
		for name, damage := range damages() {
			t.Run(v.name+", "+name, func(t *testing.T) {
				im, err := qcow2.New(f.dev, &f.open)
				if err != nil {
					t.Fatal(err)
				}
				x := &damaged{t, f.dev.Clone(), im.Header()}
				im.Close()
				damage(x)
				before := describe(t, x.d, &f.open)
				rec, err := blocktest.NewRecorder(x.d.Clone())
				if err != nil {
					t.Fatal(err)
				}
				res, err := qcow2.Repair(t.Context(), rec, nil)
				if err != nil || !res.Clean() {
					t.Fatalf("repair: %+v, %v", res, err)
				}
				after := describe(t, rec, &f.open)
				if before == after {
					t.Fatalf("nothing was to be repaired: %s", before)
				}
				check := func(d *blockdev.Memory) {
					t.Helper()
					if now := describe(t, d, &f.open); now != before && now != after {
						t.Errorf("the image is\n%s, neither\n%s nor\n%s", now, before, after)
					}
					if res, err := qcow2.Repair(t.Context(), d, nil); err != nil || !res.Clean() {
						t.Errorf("another repair: %+v, %v", res, err)
					}
					if now := describe(t, d, &f.open); now != after {
						t.Errorf("another repair leaves\n%s, not\n%s", now, after)
					}
				}
				for s, err := range rec.CrashStates(opts) {
					if err != nil {
						t.Fatal(err)
					}
					states++
					if check(s.Dev()); t.Failed() {
						t.Fatal(s)
					}
				}
				for call := 1; ; call++ {
					d := x.d.Clone()
					bad := blocktest.NewFaulty(d, blocktest.Fault{Call: call, Err: syscall.EIO, Sticky: call%2 == 0})
					_, err := qcow2.Repair(t.Context(), bad, nil)
					if !bad.Fired() {
						break
					}
					faults++
					if now := describe(t, d, &f.open); err == nil && (bad.FiredKind() != blocktest.Read || now != after) {
						t.Fatalf("call %d of the device fails, a %v: no error, and the image is %s", call, bad.FiredKind(), now)
					}
					if check(d); t.Failed() {
						t.Fatalf("call %d of the device has failed, a %v", call, bad.FiredKind())
					}
				}
			})
		}
	}
	t.Logf("%d states, %d faults", states, faults)
}

// describe tells what a check finds in an image, and what its guest and
// its snapshots read.
func describe(t testing.TB, d blockdev.Reader, opts *qcow2.OpenOptions) string {
	t.Helper()
	im, err := qcow2.New(d, opts)
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	res, err := im.Check(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	h := im.Header()
	s := fmt.Sprintf("%d corruptions, %d leaks, %d errors, incompatible %v", res.Corruptions, res.Leaks, res.CheckErrors, h.IncompatibleFeatures)
	full, _ := digests(t, im, im.Size())
	s += ", guest " + full[:16]
	for _, sn := range im.Snapshots() {
		o := *opts
		o.Snapshot = sn.ID
		of, err := qcow2.New(d, &o)
		if err != nil {
			t.Fatal(err)
		}
		full, _ := digests(t, of, of.Size())
		s += ", snapshot " + full[:16]
		of.Close()
	}
	return s
}

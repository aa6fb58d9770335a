package qcow2_test

import (
	"bytes"
	"errors"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/blocktest"
)

// repairs calls f for each kind of finding that can be repaired wholly.
func repairs(t *testing.T, f func(t *testing.T, image, guest []byte, done qcow2.RepairResult)) {
	for _, c := range findingCases() {
		b := c.image()
		dev := disk(t, b)
		if done := repair(t, dev, nil); done.Clean() && !done.Plan.Empty() {
			t.Run(c.name, func(t *testing.T) { f(t, b, guestOf(disk(t, b)), done) })
		}
	}
}

// beforeOrRepaired checks that an image is as it was, or repaired, and returns
// which of them.
func beforeOrRepaired(t *testing.T, dev blockdev.Reader, image, guest []byte, done qcow2.RepairResult) (repaired bool) {
	t.Helper()
	now := bytesOf(t, dev)
	im, err := qcow2.New(dev, &qcow2.OpenOptions{Backing: qcow2.BackingIgnore})
	if err != nil {
		t.Fatal(err)
	}
	res, err := im.Check(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	sameGuest(t, guest, guestOf(dev))
	if bytes.Equal(now[:512], image[:512]) {
		if !bytes.Equal(now[:len(image)], image) {
			t.Error("the old state changes")
		}
		want := done.Check
		res.ImageEndOffset, want.ImageEndOffset = 0, 0
		if d := cmp.Diff(want.Corruptions+want.Leaks+want.CheckErrors > 0, res.Corruptions+res.Leaks+res.CheckErrors > 0); d != "" {
			t.Errorf("%+v, expected %+v", res, want)
		}
		return false
	}
	if checkExit(res) != 0 {
		t.Errorf("neither as it was nor repaired: %+v", res)
	}
	return true
}

// TestCrashRepairFindings: a crash leaves an image as it was, or repaired.
func TestCrashRepairFindings(t *testing.T) {
	states := 0
	repairs(t, func(t *testing.T, image, guest []byte, done qcow2.RepairResult) {
		dev, err := blocktest.NewRecorder(disk(t, image))
		if err != nil {
			t.Fatal(err)
		}
		repair(t, dev, nil)
		var old, repaired int
		for s, err := range dev.CrashStates(&blocktest.CrashOptions{Subsets: 256, Tears: 8}) {
			if err != nil {
				t.Fatal(err)
			}
			states++
			if beforeOrRepaired(t, s.Dev(), image, guest, done) {
				repaired++
			} else {
				old++
			}
			if t.Failed() {
				t.Fatal(s)
			}
		}
		if old == 0 || repaired == 0 {
			t.Errorf("%d states as it was, %d repaired", old, repaired)
		}
	})
	t.Logf("%d states", states)
	if states < 500 {
		t.Errorf("%d states only", states)
	}
}

// TestFaultsRepairFindings: whatever call of the device fails, the image is as it was,
// or repaired.
func TestFaultsRepairFindings(t *testing.T) {
	repairs(t, func(t *testing.T, image, guest []byte, done qcow2.RepairResult) {
		for n := 1; ; n++ {
			mem := disk(t, image)
			dev := blocktest.NewFaulty(mem, blocktest.Fault{Call: n, Err: syscall.EIO, Short: n%2 == 0, Sticky: n%3 == 0})
			_, err := qcow2.Repair(t.Context(), dev, nil)
			if !dev.Fired() {
				if err != nil {
					t.Fatal(err)
				}
				break
			}
			if !errors.Is(err, syscall.EIO) && dev.FiredKind() != blocktest.Read {
				t.Errorf("call %d, %v: %v", n, dev.FiredKind(), err)
			}
			beforeOrRepaired(t, mem, image, guest, done)
		}
	})
}

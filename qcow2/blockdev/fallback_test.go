package blockdev_test

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"testing"

	"qimg/qcow2/blockdev"
)

// allocating is a device that says how Allocate went.
type allocating struct {
	*blockdev.Memory
	err   error
	calls [][2]int64
}

func (a *allocating) Allocate(off, n int64) error {
	a.calls = append(a.calls, [2]int64{off, n})
	return a.err
}

func TestFillZeroes(t *testing.T) {
	const size = 3<<20 + 5
	m := blockdev.NewMemory(size + 20)
	want := bytes.Repeat([]byte{7}, size+20)
	if _, err := m.WriteAt(want, 0); err != nil {
		t.Fatal(err)
	}
	var told []int64
	progress := func(done, total int64) {
		if total != size {
			t.Errorf("of %d bytes", total)
		}
		told = append(told, done)
	}
	if err := blockdev.FillZeroes(t.Context(), m, 10, size, progress); err != nil {
		t.Fatal(err)
	}
	clear(want[10 : size+10])
	got := make([]byte, len(want))
	if _, err := m.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the range is not zero, or something else is: %v", err)
	}
	if !slices.Equal(told, []int64{1 << 20, 2 << 20, 3 << 20, size}) {
		t.Errorf("progress %v", told)
	}
	// It stops where the context ends, and outside of the device does nothing.
	ctx, cancel := context.WithCancel(t.Context())
	told = nil
	err := blockdev.FillZeroes(ctx, m, 0, size, func(done, _ int64) { told = append(told, done); cancel() })
	if !errors.Is(err, context.Canceled) || len(told) != 1 {
		t.Errorf("cancelled: %v after %v", err, told)
	}
	if err := blockdev.FillZeroes(t.Context(), m, size+19, 2, nil); !errors.Is(err, blockdev.ErrRange) {
		t.Errorf("over the end: %v", err)
	}
	if _, err := m.ReadAt(got[:1], size+19); err != nil || got[0] != 7 {
		t.Errorf("over the end: the last byte is %d, %v", got[0], err)
	}
}

// Zeroes are written only where space cannot be reserved.
func TestAllocateZeroes(t *testing.T) {
	full := errors.New("full")
	for _, c := range []struct {
		err, want error
		filled    bool
	}{{nil, nil, false}, {errors.ErrUnsupported, nil, true}, {full, full, false}} {
		a := &allocating{Memory: blockdev.NewMemory(1 << 20), err: c.err}
		section, err := blockdev.NewSection(a, 4096, 1<<19)
		if err != nil {
			t.Fatal(err)
		}
		if err := blockdev.AllocateZeroes(t.Context(), section, 512, 1024, nil); err != c.want {
			t.Errorf("allocate says %v: %v", c.err, err)
		}
		if !slices.Equal(a.calls, [][2]int64{{4608, 1024}}) {
			t.Errorf("calls of the parent: %v", a.calls)
		}
		e, err := a.NextExtent(0)
		if filled := e.Kind == blockdev.Data; err != nil || filled != c.filled {
			t.Errorf("allocate says %v: %+v, %v", c.err, e, err)
		}
	}
	m := blockdev.NewMemory(1 << 20)
	if err := blockdev.AllocateZeroes(t.Context(), m, 0, 1024, nil); err != nil {
		t.Error(err)
	}
	if e, err := m.NextExtent(0); err != nil || e.Kind != blockdev.Data {
		t.Errorf("a device without Allocate: %+v, %v", e, err)
	}
}

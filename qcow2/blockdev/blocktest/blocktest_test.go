package blocktest_test

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"syscall"
	"testing"

	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/blocktest"
)

// bare hides every optional method.
type bare struct{ blockdev.Device }

func TestRecorderConforms(t *testing.T) {
	blocktest.TestDevice(t, func(t *testing.T) blockdev.Device {
		r, err := blocktest.NewRecorder(blockdev.NewMemory(300_000))
		if err != nil {
			t.Fatal(err)
		}
		return r
	})
}

func TestFaultyConforms(t *testing.T) {
	blocktest.TestDevice(t, func(t *testing.T) blockdev.Device {
		return blocktest.NewFaulty(blockdev.NewMemory(300_000), blocktest.Fault{})
	})
}

func read(t *testing.T, r blockdev.Reader) []byte {
	t.Helper()
	p := make([]byte, r.Size())
	if _, err := r.ReadAt(p, 0); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	return p
}

func TestRecorderStates(t *testing.T) {
	m := blockdev.NewMemory(200_000)
	if _, err := m.WriteAt([]byte("before"), 100_000); err != nil {
		t.Fatal(err)
	}
	r, err := blocktest.NewRecorder(m)
	if err != nil {
		t.Fatal(err)
	}
	states := [][]byte{read(t, r)}
	step := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		states = append(states, read(t, r))
	}
	buf := []byte("hello")
	_, err = r.WriteAt(buf, 99_998)
	buf[0] = 'X' // the recorder has to have its own copy
	step(err)
	step(r.Sync())
	step(r.Truncate(100_001))
	step(r.Truncate(300_000))
	_, err = r.WriteAt(bytes.Repeat([]byte{7}, 70_000), 200_000)
	step(err)
	step(r.WriteZeroes(200_001, 3))
	step(r.Discard(210_000, 50_000))

	var kinds []blocktest.OpKind
	for _, op := range r.Ops() {
		kinds = append(kinds, op.Kind)
	}
	if want := []blocktest.OpKind{blocktest.Write, blocktest.Sync, blocktest.Truncate, blocktest.Truncate,
		blocktest.Write, blocktest.WriteZeroes, blocktest.Discard}; !slices.Equal(kinds, want) {
		t.Errorf("recorded %v, want %v", kinds, want)
	}
	n := 0
	for got, err := range r.States() {
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(read(t, got), states[n]) {
			t.Errorf("the state after %d operations differs", n)
		}
		n++
	}
	if n != len(states) {
		t.Errorf("%d states, expected %d", n, len(states))
	}
}

func TestRecorderRecordsOnlyWhatWasDone(t *testing.T) {
	r, err := blocktest.NewRecorder(blocktest.NewFaulty(bare{blockdev.NewMemory(1500)},
		blocktest.Fault{Call: 1, Kind: blocktest.Write, Err: syscall.ENOSPC, Short: true}))
	if err != nil {
		t.Fatal(err)
	}
	if n, err := r.WriteAt(make([]byte, 1200), 10); n != 502 || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("short write: %d, %v", n, err)
	}
	if err := r.Truncate(5); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("truncate of a device that cannot: %v", err)
	}
	if err := r.Discard(5, 5); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("discard of a device that cannot: %v", err)
	}
	if ops := r.Ops(); len(ops) != 1 || ops[0].Kind != blocktest.Write || ops[0].Off != 10 || ops[0].N != 502 {
		t.Errorf("recorded %v, want the first sector of one write", ops)
	}
}

func TestFaulty(t *testing.T) {
	calls := func(f *blocktest.Faulty) []error {
		_, rerr := f.ReadAt(make([]byte, 10), 0)
		_, werr := f.WriteAt(make([]byte, 10), 0)
		_, eerr := f.NextExtent(0)
		return []error{rerr, werr, eerr, f.Sync(), f.Truncate(1000), f.Discard(0, 1), f.WriteZeroes(0, 1)}
	}
	const n = 7
	for call := 1; call <= n+1; call++ {
		for _, sticky := range []bool{false, true} {
			f := blocktest.NewFaulty(blockdev.NewMemory(1000), blocktest.Fault{Call: call, Err: syscall.EIO, Sticky: sticky})
			for i, err := range calls(f) {
				want := i+1 == call || sticky && i+1 > call
				if got := errors.Is(err, syscall.EIO); got != want || err != nil && !want {
					t.Errorf("fault at call %d, sticky %v: call %d gives %v", call, sticky, i+1, err)
				}
			}
			if f.Fired() != (call <= n) || f.Calls() != n {
				t.Errorf("fault at call %d: fired %v after %d calls", call, f.Fired(), f.Calls())
			}
		}
	}
	f := blocktest.NewFaulty(blockdev.NewMemory(1000), blocktest.Fault{Call: 1, Kind: blocktest.Sync, Err: syscall.EIO})
	for i, err := range calls(f) {
		if want := i == 3; want != (err != nil) {
			t.Errorf("fault of the first sync: call %d gives %v", i+1, err)
		}
	}
	f = blocktest.NewFaulty(blockdev.NewMemory(1000), blocktest.Fault{Call: 4, Err: syscall.EIO, Sticky: true})
	calls(f)
	if f.FiredKind() != blocktest.Sync {
		t.Errorf("the first failure is one of %v, expected a sync", f.FiredKind())
	}
}

func TestFaultyShort(t *testing.T) {
	m := blockdev.NewMemory(1000)
	f := blocktest.NewFaulty(m, blocktest.Fault{Call: 1, Err: syscall.ENOSPC, Short: true})
	if n, err := f.WriteAt(bytes.Repeat([]byte{1}, 900), 90); n != 422 || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("short write: %d, %v", n, err)
	}
	want := append(append(make([]byte, 90), bytes.Repeat([]byte{1}, 422)...), make([]byte, 488)...)
	if got := read(t, m); !bytes.Equal(got, want) {
		t.Errorf("after a short write: %v, want %v", got, want)
	}
	f = blocktest.NewFaulty(m, blocktest.Fault{Call: 1, Err: syscall.EIO, Short: true})
	if n, err := f.WriteAt(bytes.Repeat([]byte{2}, 200), 100); n != 0 || !errors.Is(err, syscall.EIO) || !bytes.Equal(read(t, m), want) {
		t.Errorf("short write of a part of a sector: %d, %v", n, err)
	}
	f = blocktest.NewFaulty(m, blocktest.Fault{Call: 1, Err: syscall.EIO, Short: true})
	p := make([]byte, 4)
	if n, err := f.ReadAt(p, 90); n != 2 || !errors.Is(err, syscall.EIO) || !bytes.Equal(p, []byte{1, 1, 0, 0}) {
		t.Errorf("short read: %d, %v, %v", n, err, p)
	}
}

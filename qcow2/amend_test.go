package qcow2_test

import (
	"errors"
	"os"
	"testing"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
)

// A dry run on an image that is open for reading tells what Amend does, in
// every variant, and writes nothing.
func TestAmendDryRun(t *testing.T) {
	for _, v := range variants() {
		for _, op := range []qcow2.AmendOptions{{Version: 2, RefcountBits: 16}, {Version: 3, RefcountBits: 32}, {Size: fixtureClusters * 3 / 2}} {
			f := newFixture(t, v)
			op.Size *= f.c
			open := func(write bool) *qcow2.Image {
				t.Helper()
				o := f.open
				if o.Write = write; f.data != nil {
					o.Backing = qcow2.BackingIgnore
				}
				im, err := qcow2.New(f.dev, &o)
				if err != nil {
					t.Fatal(err)
				}
				return im
			}
			if f.data != nil && op.Size != 0 {
				continue // the data file has to be there
			}
			before := f.dev.Clone()
			im := open(false)
			dry := op
			dry.DryRun = true
			want, dryErr := im.Amend(t.Context(), &dry)
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			if string(wholeMemory(t, before)) != string(wholeMemory(t, f.dev)) {
				t.Fatalf("%s: a dry run of %+v changes the image", v.name, op)
			}
			im = open(true)
			got, err := im.Amend(t.Context(), &op)
			if (err == nil) != (dryErr == nil) || err != nil && err.Error() != dryErr.Error() {
				t.Errorf("%s: %+v: %v, dry run %v", v.name, op, err, dryErr)
			}
			if got.Allocated != want.Allocated || got.FileSize != want.FileSize || got.Filled != want.Filled || got.Unallocated != want.Unallocated || len(got.Changes) != len(want.Changes) {
				t.Errorf("%s: %+v: %+v, dry run %+v", v.name, op, got, want)
			}
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func wholeMemory(t *testing.T, m *blockdev.Memory) []byte {
	t.Helper()
	b := make([]byte, m.Size())
	if n, err := m.ReadAt(b, 0); n != len(b) {
		t.Fatal(err)
	}
	return b
}

// What is not open for writing is not changed.
func TestAmendReadOnly(t *testing.T) {
	f := newFixture(t, variants()[0])
	im, err := qcow2.New(f.dev, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := im.Amend(t.Context(), &qcow2.AmendOptions{Version: 2}); !errors.Is(err, blockdev.ErrReadOnly) {
		t.Error(err)
	}
	if err := im.Resize(t.Context(), 1<<20, nil); !errors.Is(err, blockdev.ErrReadOnly) {
		t.Error(err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := im.Amend(t.Context(), &qcow2.AmendOptions{DryRun: true}); !errors.Is(err, os.ErrClosed) {
		t.Error(err)
	}
	snapshot := newFixture(t, variants()[2])
	if _, err := qcow2.New(snapshot.dev, &qcow2.OpenOptions{Write: true, Snapshot: "first"}); !errors.Is(err, blockdev.ErrReadOnly) {
		t.Errorf("a snapshot is opened for writing: %v", err)
	}
}

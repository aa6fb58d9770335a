package qcow2_test

import (
	"testing"

	"qimg/qcow2"
)

// TestFlushInTheMiddle changes so many L2 tables in one call that some are
// written before it ends: the rest has to be written too.
func TestFlushInTheMiddle(t *testing.T) {
	if testing.Short() {
		t.Skip("seconds")
	}
	const size = 560 << 20 // more than 8 MiB of L2 tables
	m := newImage(t, size, qcow2.FormatOptions{ClusterSize: 512})
	open := func() *qcow2.Image {
		t.Helper()
		im, err := qcow2.New(m, &qcow2.OpenOptions{Write: true})
		if err != nil {
			t.Fatal(err)
		}
		return im
	}
	im := open()
	for off := int64(0); off < size; off += 32 << 10 {
		if _, err := im.WriteAt([]byte{1}, off); err != nil {
			t.Fatal(err)
		}
	}
	for _, discard := range []bool{false, true} {
		change := im.WriteZeroes
		if discard {
			change = im.Discard
		}
		if err := change(0, size); err != nil {
			t.Fatal(err)
		}
		if err := im.Close(); err != nil {
			t.Fatal(err)
		}
		im = open()
		qcow2.MustHaveLeaks(t, im, 0)
		for off := int64(0); off < size; {
			e, err := im.NextExtent(off)
			if err != nil {
				t.Fatal(err)
			}
			if !e.Kind.ReadsZero() {
				t.Fatalf("%+v is left", e)
			}
			off += e.Len
		}
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
}

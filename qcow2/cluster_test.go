package qcow2

import (
	"testing"

	"qimg/qcow2/blockdev"
)

// TestHoleEnd: a read looks at no more of the L1 table than it needs.
func TestHoleEnd(t *testing.T) {
	const coverage = 32 << 10 // of an L1 entry
	x := NewTiny()
	x.Header.L1TableOffset, x.Header.L1Size, x.Header.Size = 64<<10, 65536, 65536*coverage-512
	x.Image = append(x.Image, make([]byte, 64<<10+8*65536-len(x.Image))...)
	x.Put(64<<10+8*40000, TinyL2)
	dev := blockdev.NewMemory(int64(len(x.Image)))
	if _, err := dev.WriteAt(x.Bytes(), 0); err != nil {
		t.Fatal(err)
	}
	im, err := New(dev, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ off, limit, start, end int64 }{
		{0, 512, 0, coverage},
		{coverage - 512, 1024, 0, 2 * coverage},
		{512, 512, 0, 2 * coverage},
		{9 * coverage, 2 * coverage, 9 * coverage, 11 * coverage},
		{10*coverage + 512, im.size - 10*coverage - 512, 9 * coverage, 40000 * coverage},
		{11 * coverage, im.size - 11*coverage, 9 * coverage, 40000 * coverage},
		{im.size - 512, 512, 65535 * coverage, 65536 * coverage},
		{50000 * coverage, im.size - 50000*coverage, 50000 * coverage, 65536 * coverage},
	} {
		r, err := im.lookup(c.off, c.limit)
		if want := min(c.limit, c.end-c.off); err != nil || r.kind != runUnallocated || r.n != want {
			t.Errorf("%d bytes at %#x: %+v %v, expected %d", c.limit, c.off, r, err, want)
		}
		if h := im.hole.Load(); h.start != c.start || h.end != c.end {
			t.Errorf("%d bytes at %#x: looked from %#x to %#x, expected %#x to %#x", c.limit, c.off, h.start, h.end, c.start, c.end)
		}
	}
	if e, err := im.NextExtent(0); err != nil || e.Len != 40000*coverage {
		t.Errorf("%+v %v", e, err)
	}
}

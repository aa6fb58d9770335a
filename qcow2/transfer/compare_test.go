package transfer_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"qimg/qcow2/blockdev"
	"qimg/qcow2/transfer"
)

// mosaic is a disk of extents of any kind. What reads as zeroes by its extents
// must not be read.
type mosaic struct {
	t       *testing.T
	data    []byte
	extents []blockdev.Extent
	bad     int64 // the byte that cannot be read; -1: none
	lost    int64 // the byte whose extent cannot be told; -1: none
}

func (m *mosaic) Size() int64 { return int64(len(m.data)) }

func (m *mosaic) NextExtent(off int64) (blockdev.Extent, error) {
	for _, e := range m.extents {
		if off >= e.Off && off < e.Off+e.Len {
			if m.lost >= e.Off && m.lost < e.Off+e.Len {
				return e, errBroken
			}
			e.Len -= off - e.Off
			e.Off = off
			return e, nil
		}
	}
	return blockdev.Extent{}, io.EOF
}

var errBroken = errors.New("broken")

func (m *mosaic) ReadAt(p []byte, off int64) (int, error) {
	for _, e := range m.extents {
		if e.Kind.ReadsZero() && e.Off < off+int64(len(p)) && off < e.Off+e.Len {
			m.t.Errorf("%d bytes at %d are read, which hold zeroes at %d by the extents", len(p), off, e.Off)
		}
	}
	if m.bad >= off && m.bad < off+int64(len(p)) {
		return 0, errBroken
	}
	return copy(p, m.data[off:]), nil
}

// newMosaic makes a disk that reads as data does.
func newMosaic(t *testing.T, r *rand.Rand, data []byte) *mosaic {
	m := &mosaic{t: t, data: data, bad: -1, lost: -1}
	for off := int64(0); off < m.Size(); {
		n := min(512*(1+r.Int64N(1<<r.IntN(12))), m.Size()-off)
		e := blockdev.Extent{Off: off, Len: n, Kind: blockdev.Data}
		if transfer.IsZero(data[off:][:n]) {
			e.Kind += blockdev.ExtentKind(r.IntN(4))
		}
		m.extents = append(m.extents, e)
		off += n
	}
	return m
}

// content is random, with runs of zeroes.
func content(r *rand.Rand, size int64) []byte {
	b := make([]byte, size)
	for off := int64(0); off < size; {
		n := min(1+r.Int64N(1<<r.IntN(21)), size-off)
		if r.IntN(2) == 0 {
			for i := range b[off:][:n] {
				b[off+int64(i)] = byte(i)
			}
		}
		off += n
	}
	return b
}

// TestCompareRandom finds the first of differences and errors, with any number
// of workers.
func TestCompareRandom(t *testing.T) {
	for seed := range uint64(60) {
		r := rand.New(rand.NewPCG(seed, 4))
		data := content(r, 512*(1+r.Int64N(12000)))
		a, b := newMosaic(t, r, data), newMosaic(t, r, data)
		size := int64(len(data))
		if r.IntN(3) == 0 { // one is longer
			b = newMosaic(t, r, append(append([]byte{}, data...), make([]byte, 512*r.Int64N(4000))...))
		}
		long := b.Size()
		differ := long
		for range r.IntN(4) {
			b = &mosaic{t, append([]byte{}, b.data...), b.extents, -1, -1}
			at := r.Int64N(long)
			e, err := b.NextExtent(at)
			if err != nil {
				t.Fatal(err)
			}
			if e.Kind != blockdev.Data && e.Kind != blockdev.Compressed {
				continue
			}
			b.data[at] ^= 0x55
			differ = min(differ, at)
		}
		var want any = (*transfer.Difference)(nil)
		if differ < long {
			want = &transfer.Difference{Kind: transfer.DifferentContent, Off: differ}
		}
		switch r.IntN(4) {
		case 0:
			a.lost = r.Int64N(size)
			e := a.extents[0]
			for i := 0; a.lost >= e.Off+e.Len; i++ {
				e = a.extents[i+1]
			}
			if e.Off <= differ {
				want = &transfer.CompareError{Disk: 0, Off: e.Off, Extents: true}
			}
		case 1:
			b.bad = r.Int64N(long)
			e, err := b.NextExtent(b.bad)
			if sector := b.bad &^ 511; err == nil && !e.Kind.ReadsZero() && sector <= differ {
				want = &transfer.CompareError{Disk: 1, Off: sector}
			}
		}
		for _, workers := range []int{1, 3, 0} {
			var done, calls int64
			d, err := transfer.Compare(t.Context(), a, b, &transfer.CompareOptions{Workers: workers, Progress: func(n, total int64) {
				if n <= done || n > total || total != long {
					t.Errorf("seed %d: progress %d after %d of %d", seed, n, done, total)
				}
				done = n
				calls++
			}})
			var got any = d
			if err != nil {
				bad := (*transfer.CompareError)(nil)
				if !errors.As(err, &bad) || !errors.Is(err, errBroken) {
					t.Fatal(err)
				}
				got = bad
			} else if d == nil && done != long {
				t.Errorf("seed %d: progress ended at %d of %d", seed, done, long)
			}
			if diff := cmp.Diff(want, got, cmpopts.IgnoreFields(transfer.CompareError{}, "Err")); diff != "" {
				t.Errorf("seed %d, %d workers: -want +got\n%s", seed, workers, diff)
			}
		}
	}
}

// counted counts what is read of a file.
type counted struct {
	*blockdev.File
	n atomic.Int64
}

func (c *counted) ReadAt(p []byte, off int64) (int, error) {
	c.n.Add(int64(len(p)))
	return c.File.ReadAt(p, off)
}

// TestCompareSameFile: what lies at one place of one file is not read.
func TestCompareSameFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, content(rand.New(rand.NewPCG(1, 1)), 3<<20), 0o666); err != nil {
		t.Fatal(err)
	}
	var disks [2]*counted
	for i := range disks {
		f, err := blockdev.OpenFile(path, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		disks[i] = &counted{File: f}
	}
	if d, err := transfer.Compare(t.Context(), disks[0], disks[1], nil); d != nil || err != nil {
		t.Error(d, err)
	}
	if n := disks[0].n.Load() + disks[1].n.Load(); n != 0 {
		t.Errorf("%d bytes were read", n)
	}
	a, err := blockdev.NewReaderSection(disks[0], 0, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	b, err := blockdev.NewReaderSection(disks[1], 4096, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	if d, err := transfer.Compare(t.Context(), a, b, nil); d == nil || err != nil {
		t.Error(d, err)
	}
}

// TestCompareAlike finds the first extents that are not alike.
func TestCompareAlike(t *testing.T) {
	disk := func(edge int64) *mosaic {
		return &mosaic{t: t, data: make([]byte, 4<<20), bad: -1, lost: -1, extents: []blockdev.Extent{
			{Off: 0, Len: edge, Kind: blockdev.Data}, {Off: edge, Len: 4<<20 - edge, Kind: blockdev.Zero}}}
	}
	for _, edges := range [][2]int64{{1 << 20, 1 << 20}, {3 << 20, 2 << 20}, {512, 3 << 20}} {
		d, err := transfer.Compare(t.Context(), disk(edges[0]), disk(edges[1]), &transfer.CompareOptions{
			Alike: func(a, b *blockdev.Extent) bool { return a.Kind == b.Kind }})
		want := &transfer.Difference{Kind: transfer.DifferentAllocation, Off: min(edges[0], edges[1])}
		if edges[0] == edges[1] {
			want = nil
		}
		if diff := cmp.Diff(want, d); diff != "" || err != nil {
			t.Errorf("%d: -want +got\n%s%v", edges, diff, err)
		}
	}
}

func TestCompareInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	r := rand.New(rand.NewPCG(2, 2))
	data := content(r, 8<<20)
	d, err := transfer.Compare(ctx, newMosaic(t, r, data), newMosaic(t, r, data), &transfer.CompareOptions{Progress: func(int64, int64) { cancel() }})
	if d != nil || !errors.Is(err, context.Canceled) {
		t.Error(d, err)
	}
}

func ExampleCompare() {
	a, b := blockdev.NewMemory(1<<20), blockdev.NewMemory(1<<20)
	b.WriteAt([]byte("data"), 5000)
	d, err := transfer.Compare(context.Background(), a, b, nil)
	if err != nil {
		fmt.Println(err)
	}
	fmt.Println(d.Kind, d.Off)
	// Output: content 5000
}

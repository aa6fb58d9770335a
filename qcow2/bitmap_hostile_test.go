package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"slices"
	"testing"

	"qimg/qcow2/blockdev"
)

// tinyBitmap returns a change of a Tiny that adds a directory of bitmaps, which
// share a table, behind its end, and a cluster for data behind that.
func tinyBitmap(entry uint64, list ...Bitmap) func(x *Tiny) {
	return func(x *Tiny) {
		var dir []byte
		for _, b := range list {
			if b.TableOffset == 0 {
				b.TableOffset = TinyEnd + 512
			}
			b.TableSize = max(b.TableSize, 1)
			b.Type, b.GranularityBits = 1, max(b.GranularityBits, 9)
			dir = b.appendTo(dir)
		}
		x.Image = append(x.Image, make([]byte, 3*512)...)
		copy(x.Image[TinyEnd:], dir)
		for i := range 2 {
			x.Image[TinyRefblock+2*(7+i)+1] = 1
		}
		if entry > 2 {
			x.Image[TinyRefblock+2*9+1] = 1
		}
		x.Put(TinyEnd+512, entry)
		for i := range 512 {
			x.Image[tinyBits+i] = 0xff
		}
		x.Header.AutoclearFeatures = AutoclearBitmaps
		x.Header.Extensions = []Extension{{extBitmaps, BitmapsExtension{uint32(len(list)), uint64(len(dir)), TinyEnd}.appendTo(nil)}}
	}
}

const tinyBits = TinyEnd + 1024 // the cluster for data

func dirtyRanges(t *testing.T, im *Image, name string) (string, error) {
	t.Helper()
	s := ""
	err := im.DirtyRanges(t.Context(), name, func(off, n int64) error {
		s += fmt.Sprintf("%d+%d ", off, n)
		return nil
	})
	return s, err
}

// What no program writes, but the specification has or allows.
func TestBitmapForms(t *testing.T) {
	for _, c := range []struct {
		name  string
		entry uint64
		bits  uint8
		want  string
	}{
		{"nothing", 0, 9, ""},
		{"all ones", 1, 9, "0+32768 "},
		{"bits behind the disk", tinyBits, 9, "0+32768 "},
		{"one bit", tinyBits, 31, "0+32768 "},
	} {
		t.Run(c.name, func(t *testing.T) {
			open := func() *Image {
				im, err := hostile(t, &OpenOptions{Write: true}, tinyBitmap(c.entry, Bitmap{Name: "b", Flags: BitmapAuto, GranularityBits: c.bits}))
				if err != nil {
					t.Fatal(err)
				}
				return im
			}
			im := open()
			if got, err := dirtyRanges(t, im, "b"); err != nil || got != c.want {
				t.Errorf("%s %v, want %s", got, err, c.want)
			}
			want := c.want
			if want == "" {
				want = "1024+1024 4096+512 "
			}
			if err := errors.Join(im.WriteZeroes(1025, 1000), im.WriteZeroes(4096, 1), im.Close()); err != nil {
				t.Fatal(err)
			}
			again, err := New(im.dev, &OpenOptions{Write: true})
			if err != nil {
				t.Fatal(err)
			}
			defer again.Close()
			if got, err := dirtyRanges(t, again, "b"); err != nil || got != want {
				t.Errorf("after writes %s %v, want %s", got, err, want)
			}
			if err := again.ClearBitmap(t.Context(), "b"); err != nil {
				t.Fatal(err)
			}
			if got, err := dirtyRanges(t, again, "b"); err != nil || got != "" {
				t.Errorf("cleared, it says %s %v", got, err)
			}
			MustHaveLeaks(t, again, 0)
		})
	}
}

// Tables that cannot be are refused, and what has them can still be removed.
func TestHostileBitmapTables(t *testing.T) {
	b := Bitmap{Name: "b", Flags: BitmapAuto}
	large := Bitmap{Name: "b", Flags: BitmapAuto, GranularityBits: 31, TableSize: 1 << 20}
	long := Bitmap{Name: "b", Flags: BitmapAuto, TableSize: 2}
	for _, c := range []struct {
		name         string
		change       func(x *Tiny)
		text         string
		late, remove bool // found when the bitmap is stored; it can be removed
		leaks        int64
	}{
		{"reserved bits", tinyBitmap(2, b), "bitmap table entry at 0x1000: 0x2 with reserved", true, true, 0},
		{"high bits", tinyBitmap(tinyBits|1<<60, b), "bitmap table entry at 0x1000: 0x1000000000001200 with reserved", true, true, 1},
		{"ones and an offset", tinyBitmap(tinyBits|1, b), "bitmap table entry at 0x1000", true, true, 1},
		{"longer than the disk asks for", tinyBitmap(tinyBits, long), "bitmap_table_size 2, expected 1 for a disk of 32768", false, true, 0},
		{"larger than the file", tinyBitmap(0, large), "makes the tables of the bitmaps larger than the file", false, false, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			im, err := hostile(t, &OpenOptions{Write: true}, c.change)
			if err != nil {
				t.Fatal(err)
			}
			dev := im.dev
			_, err = dirtyRanges(t, im, "b")
			refusedWith(t, err, ErrCorrupt, c.text)
			refusedWith(t, im.ClearBitmap(t.Context(), "b"), ErrCorrupt, c.text)
			err = im.WriteZeroes(0, 512)
			if c.late {
				if err != nil {
					t.Fatal(err)
				}
				err = im.Close()
			} else {
				im.Close()
			}
			refusedWith(t, err, ErrCorrupt, c.text)
			if im, err = New(dev, &OpenOptions{Write: true}); err != nil {
				t.Fatal(err)
			}
			defer im.Close()
			list, err := im.Bitmaps()
			if inUse := len(list) == 1 && list[0].Flags&BitmapInUse != 0; err != nil || inUse != c.late {
				t.Errorf("%+v %v", list, err)
			}
			if err := im.RemoveBitmap(t.Context(), "b"); (err == nil) != c.remove {
				t.Errorf("remove: %v", err)
			}
			if c.remove {
				MustHaveLeaks(t, im, c.leaks)
			}
		})
	}
}

// A bitmap that shares clusters with something else is not changed.
func TestHostileBitmapShares(t *testing.T) {
	a, b := Bitmap{Name: "a", Flags: BitmapAuto}, Bitmap{Name: "b", Flags: BitmapAuto}
	for name, change := range map[string]func(x *Tiny){
		"two have one table":  tinyBitmap(tinyBits, a, b),
		"refcount 0":          func(x *Tiny) { tinyBitmap(tinyBits, a)(x); x.Image[TinyRefblock+2*9+1] = 0 },
		"table of refcount 0": func(x *Tiny) { tinyBitmap(tinyBits, a)(x); x.Image[TinyRefblock+2*8+1] = 0 },
	} {
		t.Run(name, func(t *testing.T) {
			im, err := hostile(t, &OpenOptions{Write: true}, change)
			if err != nil {
				t.Fatal(err)
			}
			// In one transaction, whatever it removes first.
			if err = im.Resize(t.Context(), 2*TinySize, nil); err == nil && name != "two have one table" {
				err = im.RemoveBitmap(t.Context(), "a")
			}
			if name == "two have one table" && err == nil {
				err = errors.Join(im.RemoveBitmap(t.Context(), "a"), im.RemoveBitmap(t.Context(), "b"))
			}
			if !errors.Is(err, ErrCorrupt) {
				t.Errorf("%v", err)
			}
			im.Close()
		})
	}
	// The directory lies in the L1 table.
	_, err := hostile(t, &OpenOptions{Write: true}, func(x *Tiny) {
		tinyBitmap(0, a)(x)
		x.Header.Extensions[0].Data = BitmapsExtension{1, 32, TinyL1}.appendTo(nil)
	})
	if !errors.Is(err, ErrCorrupt) {
		t.Errorf("directory in the L1 table: %v", err)
	}
}

// TestBitmapRelieve: what is recorded takes bounded memory, and none is lost.
func TestBitmapRelieve(t *testing.T) {
	path := filepath.Join(t.TempDir(), "i.qcow2")
	out, err := blockdev.CreateFile(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	const step, n = dirtyPageBits * 512, maxDirtyPages*5/2 + 3
	if err := errors.Join(Create(t.Context(), out.File(), n*step, nil), out.Commit()); err != nil {
		t.Fatal(err)
	}
	im, err := Open(path, &OpenOptions{Write: true})
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	for _, g := range []int64{512, 4096} {
		if err := im.AddBitmap(t.Context(), fmt.Sprint(g), &BitmapOptions{Granularity: g}); err != nil {
			t.Fatal(err)
		}
	}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	most := uint64(0)
	for i := range int64(n) {
		if err := im.Discard(i*step, 512); err != nil {
			t.Fatal(err)
		}
		if i%10000 == 0 {
			runtime.ReadMemStats(&after)
			most = max(most, after.HeapAlloc)
		}
	}
	list, err := im.Bitmaps()
	if err != nil || len(list) != 2 || list[0].Flags != BitmapAuto|BitmapInUse {
		t.Errorf("%+v %v", list, err)
	}
	for _, g := range []int64{512, 4096} {
		got := int64(0)
		err := im.DirtyRanges(t.Context(), fmt.Sprint(g), func(off, n int64) error {
			if off != got*step || n != g {
				return fmt.Errorf("range %d is %d+%d", got, off, n)
			}
			got++
			return nil
		})
		if err != nil || got != n {
			t.Errorf("granularity %d: %d ranges, want %d; %v", g, got, n, err)
		}
	}
	MustHaveLeaks(t, im, 0)
	if most > before.HeapAlloc+64<<20 {
		t.Errorf("%d MiB of memory", (most-before.HeapAlloc)>>20)
	}
}

// A change that fails leaves the file as it was.
func TestBitmapRefusals(t *testing.T) {
	im, err := hostile(t, &OpenOptions{Write: true}, tinyBitmap(0, Bitmap{Name: "b", Flags: BitmapAuto}, Bitmap{Name: "lost", Flags: BitmapInUse}))
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	other, err := hostile(t, nil, func(x *Tiny) {
		tinyBitmap(0, Bitmap{Name: "b"}, Bitmap{Name: "lost", Flags: BitmapInUse})(x)
		x.Header.Size = 512
	})
	if err != nil {
		t.Fatal(err)
	}
	old, err := hostile(t, &OpenOptions{Write: true}, func(x *Tiny) { x.Header.Version, x.Header.HeaderLength = 2, 0 })
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	was := make([]byte, im.dev.Size())
	if err := readFull(im.dev, was, 0); err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	long := string(bytes.Repeat([]byte{'n'}, 1024))
	reasons := map[BitmapReason]bool{}
	for _, c := range []struct {
		want BitmapReason
		err  error
	}{
		{BitmapExists, im.AddBitmap(ctx, "b", nil)},
		{BitmapExists, im.AddBitmap(ctx, "lost", nil)},
		{BitmapNameEmpty, im.AddBitmap(ctx, "", nil)},
		{BitmapNameLong, im.AddBitmap(ctx, long, nil)},
		{BitmapBadGranularity, im.AddBitmap(ctx, "n", &BitmapOptions{Granularity: 1000})},
		{BitmapBadGranularity, im.AddBitmap(ctx, "n", &BitmapOptions{Granularity: -512})},
		{BitmapBadGranularity, im.AddBitmap(ctx, "n", &BitmapOptions{Granularity: 4 << 30})},
		{BitmapNotFound, im.RemoveBitmap(ctx, "n")},
		{BitmapNotFound, im.MergeBitmap(ctx, "n", im, "b")},
		{BitmapNotFound, im.MergeBitmap(ctx, "b", other, "n")},
		{BitmapInconsistent, im.ClearBitmap(ctx, "lost")},
		{BitmapInconsistent, im.EnableBitmap(ctx, "lost")},
		{BitmapInconsistent, im.DisableBitmap(ctx, "lost")},
		{BitmapInconsistent, im.MergeBitmap(ctx, "lost", im, "b")},
		{BitmapInconsistent, im.MergeBitmap(ctx, "b", other, "lost")},
		{BitmapSizesDiffer, im.MergeBitmap(ctx, "b", other, "b")},
		{BitmapVersion2, old.AddBitmap(ctx, "n", nil)},
		{BitmapInconsistent, im.Resize(t.Context(), 2*TinySize, nil)},
	} {
		var e *BitmapError
		if !errors.As(c.err, &e) || e.Reason != c.want {
			t.Errorf("%v, want %v", c.err, c.want)
		}
		reasons[c.want] = true
	}
	for _, c := range []struct {
		size        uint64
		granularity int64
		want        BitmapReason
	}{{1 << 48, 512, BitmapTooLarge}, {512, 512, 0}, {0, 512, BitmapNoDisk}, {511, 512, BitmapNoDisk}, {1 << 41, 512, 0}, {1<<41 + 512, 512, BitmapTooLarge}} {
		fake := &Image{header: Header{Version: 3, Size: c.size}}
		b := &Bitmap{Name: "n", GranularityBits: 9}
		if got := fake.refuseBitmap(b, nil, c.granularity); got != c.want {
			t.Errorf("disk of %d bytes: %v, want %v", c.size, got, c.want)
		}
		reasons[c.want] = true
	}
	fake := &Image{header: Header{Version: 3, Size: 512}}
	b := &Bitmap{Name: "n", GranularityBits: 9}
	if got := fake.refuseBitmap(b, slices.Repeat([]Bitmap{{Name: "x"}}, maxBitmaps), 512); got != BitmapTooMany {
		t.Error(got)
	}
	if got := fake.refuseBitmap(b, slices.Repeat([]Bitmap{{Name: long[1:]}}, maxBitmaps-1), 512); got != BitmapDirectoryFull {
		t.Error(got)
	}
	for r := BitmapExists; r <= BitmapDirectoryFull; r++ {
		if s := r.String(); s == "" || s == (BitmapDirectoryFull+1).String() {
			t.Errorf("reason %d is %q", r, s)
		}
	}
	now := make([]byte, im.dev.Size())
	if err := readFull(im.dev, now, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(now, was) {
		t.Error("the image has changed")
	}
}

package qcow2_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/blocktest"
)

// bitmapDigest tells what the bitmaps of an image say.
func bitmapDigest(im *qcow2.Image) (string, error) {
	list, err := im.Bitmaps()
	if err != nil {
		return "", err
	}
	var b strings.Builder
	for _, x := range list {
		fmt.Fprintf(&b, "%q:", x.Name)
		err := im.DirtyRanges(context.Background(), x.Name, func(off, n int64) error {
			fmt.Fprintf(&b, " %d+%d", off, n)
			return nil
		})
		if e := (*qcow2.BitmapError)(nil); errors.As(err, &e) && e.Reason == qcow2.BitmapInconsistent {
			b.WriteString(" inconsistent")
		} else if err != nil {
			return "", err
		}
		b.WriteString("\n")
	}
	return b.String(), nil
}

// bitmapVariants are the kinds of images that bitmaps are tried on.
func bitmapVariants() []variant {
	return slices.DeleteFunc(variants(), func(v variant) bool {
		few := []string{"512-rb1", "512-backing", "4096-zstd", "data"}
		return v.Version != 3 || !*crashLong && !slices.Contains(few, v.name)
	})
}

// bitmapFixture is an image with bitmaps: a records writes, b does not, c was
// not saved, d is a fine one that records writes.
func bitmapFixture(t *testing.T, v variant) *fixture {
	t.Helper()
	f := newFixture(t, v)
	open := f.open
	open.Write = true
	if v.data {
		open.Backing = qcow2.BackingIgnore
	}
	im, err := qcow2.New(f.dev, &open)
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	ctx := t.Context()
	for _, err := range []error{
		im.AddBitmap(ctx, "c", nil), im.AddBitmap(ctx, "a", &qcow2.BitmapOptions{Granularity: 4096}),
		im.AddBitmap(ctx, "b", &qcow2.BitmapOptions{Disabled: true}), im.AddBitmap(ctx, "d", &qcow2.BitmapOptions{Granularity: 512}),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if v.data {
		return f // its guest is written by trials only
	}
	if _, err := im.WriteAt(noise(77, 3000), 20000); err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{im.EnableBitmap(ctx, "a"), im.ClearBitmap(ctx, "c"), im.MergeBitmap(ctx, "b", im, "d")} {
		if err != nil {
			t.Fatal(err)
		}
	}
	return f
}

// spoil marks a bitmap of an image as not saved.
func spoil(t *testing.T, dev *blockdev.Memory, name string) {
	t.Helper()
	im, err := qcow2.New(dev, &qcow2.OpenOptions{Backing: qcow2.BackingIgnore})
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	h := im.Header()
	ext, _ := h.Bitmaps()
	list, err := im.Bitmaps()
	if err != nil {
		t.Fatal(err)
	}
	at := int64(ext.DirectoryOffset)
	for _, b := range list {
		if b.Name == name {
			if _, err := dev.WriteAt([]byte{byte(b.Flags | qcow2.BitmapInUse)}, at+15); err != nil {
				t.Fatal(err)
			}
		}
		at += int64(24+len(b.Name)+7) &^ 7
	}
}

// bitmapOps are all changes of bitmaps.
func bitmapOps(ctx context.Context) map[string]func(im *qcow2.Image) error {
	return map[string]func(im *qcow2.Image) error{
		"add":         func(im *qcow2.Image) error { return im.AddBitmap(ctx, "new", nil) },
		"remove":      func(im *qcow2.Image) error { return im.RemoveBitmap(ctx, "d") },
		"remove lost": func(im *qcow2.Image) error { return im.RemoveBitmap(ctx, "c") },
		"clear":       func(im *qcow2.Image) error { return im.ClearBitmap(ctx, "d") },
		"enable":      func(im *qcow2.Image) error { return im.EnableBitmap(ctx, "b") },
		"disable":     func(im *qcow2.Image) error { return im.DisableBitmap(ctx, "d") },
		"merge":       func(im *qcow2.Image) error { return im.MergeBitmap(ctx, "a", im, "b") },
	}
}

// TestCrashBitmaps looks at every state that a crash can leave of changes of
// bitmaps: the bitmaps are as before or as afterwards. While the guest writes
// they are inconsistent, or say what is true.
func TestCrashBitmaps(t *testing.T) {
	crash := &blocktest.CrashOptions{Subsets: 16, Tears: 2}
	if *crashLong {
		crash = nil
	}
	states := 0
	for _, v := range bitmapVariants() {
		t.Run(v.name, func(t *testing.T) {
			f := bitmapFixture(t, v)
			spoil(t, f.dev, "c")
			trial := func(t *testing.T) *qcow2.Trial {
				opts := &qcow2.TrialOptions{Open: f.open, Digest: bitmapDigest}
				if f.data != nil {
					opts.Data = f.data.Clone()
				}
				return qcow2.NewTrial(t, f.dev.Clone(), opts)
			}
			for name, op := range bitmapOps(t.Context()) {
				t.Run(name, func(t *testing.T) {
					tr := trial(t)
					tr.Do(name, func() error { return op(tr.Image) })
					states += tr.Verify(crash)
				})
			}
			t.Run("writes", func(t *testing.T) {
				tr := trial(t)
				// Enabling what is enabled changes nothing but that it stores
				// what was written.
				store := func() { tr.Do("store", func() error { return tr.Image.EnableBitmap(t.Context(), "a") }) }
				tr.Write(emptyAt*f.c+10, noise(40, int(f.c)*5/2))
				tr.Zero(mixedAt*f.c, 3*f.c)
				tr.Sync()
				tr.Discard((plainAt+1)*f.c, 2*f.c)
				store()
				tr.Write(emptyTableAt*f.c+10, noise(42, int(f.c)))
				store()
				states += tr.Verify(crash)
			})
			t.Run("last", func(t *testing.T) {
				tr := trial(t)
				for _, name := range []string{"a", "b", "c", "d"} {
					tr.Do("remove "+name, func() error { return tr.Image.RemoveBitmap(t.Context(), name) })
				}
				h := tr.Image.Header()
				if x, ok := h.Bitmaps(); ok || h.AutoclearFeatures&qcow2.AutoclearBitmaps != 0 {
					t.Errorf("extension %+v is left, or its bit", x)
				}
				tr.Do("first", func() error { return tr.Image.AddBitmap(t.Context(), "x", nil) })
				states += tr.Verify(crash)
			})
		})
	}
	t.Logf("%d states", states)
}

// TestFaultsBitmaps does all that while one call of the device after the other
// fails.
func TestFaultsBitmaps(t *testing.T) {
	step := 17
	if *crashLong {
		step = 1
	}
	runs := 0
	for _, v := range bitmapVariants() {
		t.Run(v.name, func(t *testing.T) {
			f := bitmapFixture(t, v)
			spoil(t, f.dev, "c")
			runs += qcow2.TrialFaults(t, f.dev, &qcow2.TrialOptions{Open: f.open, Data: f.data, Digest: bitmapDigest}, step, func(tr *qcow2.Trial) {
				ops := bitmapOps(t.Context())
				for _, name := range []string{"add", "merge", "remove lost", "clear", "disable", "enable", "remove"} {
					tr.Do(name, func() error { return ops[name](tr.Image) })
				}
				tr.Write(emptyAt*f.c+10, noise(40, int(f.c)*5/2))
				tr.Do("store", func() error { return tr.Image.EnableBitmap(t.Context(), "a") })
			})
		})
	}
	t.Logf("%d runs", runs)
}

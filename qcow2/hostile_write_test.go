package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"slices"
	"testing"

	"qimg/qcow2/blockdev"
)

// TestHostileWrite: what a guest writes never goes upon a table of a damaged
// image.
func TestHostileWrite(t *testing.T) {
	const second = TinyEnd // a second L2 table, for guest offset TinySize
	// Two L1 entries, the second with a table of its own.
	two := func(x *Tiny) {
		x.Header.Size, x.Header.L1Size = 2*TinySize, 2
		x.Image = append(x.Image, make([]byte, 1024)...)
		x.Put(TinyL1+8, second|oflagCopied)
		binary.BigEndian.PutUint16(x.Image[TinyRefblock+2*second/512:], 1)
	}
	refcount := func(x *Tiny, off int, n uint16) { binary.BigEndian.PutUint16(x.Image[TinyRefblock+2*off/512:], n) }
	entry := func(e uint64) func(x *Tiny) { return func(x *Tiny) { two(x); x.Put(TinyL2, e) } }
	for _, c := range []struct {
		name   string
		change func(x *Tiny)
		good   bool
	}{
		{"good", two, true},
		{"data in the refcount table", entry(TinyReftable | oflagCopied), false},
		{"data in a refcount block", entry(TinyRefblock | oflagCopied), false},
		{"data in the l1 table", entry(TinyL1 | oflagCopied), false},
		{"data in its own l2 table", entry(TinyL2 | oflagCopied), false},
		{"data in another l2 table", entry(second | oflagCopied), false},
		{"data far beyond the end", entry(1<<50 | oflagCopied), false},
		{"reserved bits", entry(TinyData | oflagCopied | 4), true},
		{"kept zeroes in the l1 table", entry(TinyL1 | oflagCopied | oflagZero), false},
		{"kept zeroes in a refcount block", entry(TinyRefblock | oflagCopied | oflagZero), false},
		{"l2 table in the header", func(x *Tiny) { two(x); x.Put(TinyL1, oflagCopied) }, true}, // none
		{"l2 table in the refcount table", func(x *Tiny) { two(x); x.Put(TinyL1, TinyReftable|oflagCopied) }, false},
		{"l2 table in a refcount block", func(x *Tiny) { two(x); x.Put(TinyL1, TinyRefblock|oflagCopied) }, false},
		{"l2 table in the l1 table", func(x *Tiny) { two(x); x.Put(TinyL1, TinyL1|oflagCopied) }, false},
		{"one l2 table for two l1 entries", func(x *Tiny) { two(x); x.Put(TinyL1+8, TinyL2|oflagCopied) }, false},
		{"one l2 table for two l1 entries, not copied", func(x *Tiny) { two(x); x.Put(TinyL1, TinyL2); x.Put(TinyL1+8, TinyL2) }, false},
		{"l2 table far beyond the end", func(x *Tiny) { two(x); x.Put(TinyL1, 1<<50|oflagCopied) }, false},
		{"l1 table in the header", func(x *Tiny) { two(x); x.Header.L1TableOffset = 0 }, false},
		{"l1 table in the refcount table", func(x *Tiny) { two(x); x.Header.L1TableOffset = TinyReftable }, false},
		{"refcount table in the header", func(x *Tiny) { two(x); x.Header.RefcountTableOffset = 0 }, false},
		{"refcount block in the header", func(x *Tiny) { two(x); x.Put(TinyReftable+8, 0); x.Put(TinyReftable, 1<<8) }, false},
		{"refcount block in the l1 table", func(x *Tiny) { two(x); x.Put(TinyReftable, TinyL1) }, false},
		{"refcount block in the refcount table", func(x *Tiny) { two(x); x.Put(TinyReftable, TinyReftable) }, false},
		{"refcount block twice", func(x *Tiny) { two(x); x.Put(TinyReftable+8, TinyRefblock) }, false},
		{"refcount block far beyond the end", func(x *Tiny) { two(x); x.Put(TinyReftable, 1<<50) }, false},
		{"no refcount block", func(x *Tiny) { two(x); x.Put(TinyReftable, 0) }, false},
		{"no refcounts", func(x *Tiny) { two(x); clear(x.Image[TinyRefblock : TinyRefblock+512]) }, false},
		{"l1 table with refcount 0", func(x *Tiny) { two(x); refcount(x, TinyL1, 0) }, false},
		{"l2 table with refcount 0", func(x *Tiny) { two(x); refcount(x, TinyL2, 0) }, false},
		{"other l2 table with refcount 0", func(x *Tiny) { two(x); refcount(x, second, 0) }, false},
		{"refcount block with refcount 0", func(x *Tiny) { two(x); refcount(x, TinyRefblock, 0) }, false},
		{"header with refcount 0", func(x *Tiny) { two(x); refcount(x, 0, 0) }, false},
		{"snapshot table in the l1 table", func(x *Tiny) {
			two(x)
			x.Header.NbSnapshots, x.Header.SnapshotsOffset = 1, TinyL1
		}, false},
		{"corrupt bit", func(x *Tiny) { two(x); x.Header.IncompatibleFeatures = IncompatCorrupt }, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			x := NewTiny()
			c.change(x)
			dev := blockdev.NewMemory(int64(len(x.Image)))
			if _, err := dev.WriteAt(x.Bytes(), 0); err != nil {
				t.Fatal(err)
			}
			before := memoryBytes(dev)
			// What is overwritten, a new cluster of the first table and one of
			// the second, zeroes and a discard.
			fill := bytes.Repeat([]byte{0xa7}, 512)
			write := func() error {
				im, err := New(dev, &OpenOptions{Write: true})
				if err != nil {
					return err
				}
				var errs []error
				for _, off := range []int64{0, 5 * 512, TinySize + 512} {
					_, err := im.WriteAt(fill, off)
					errs = append(errs, err)
				}
				errs = append(errs, im.WriteZeroes(6*512, 512), im.Discard(512, 512), im.Close())
				return errors.Join(errs...)
			}
			err := write()
			if err != nil && !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrLimit) && !errors.Is(err, ErrFormat) || c.good != (err == nil) {
				t.Errorf("%v, good %v", err, c.good)
			}
			if dev.Size() > 1<<20 {
				t.Fatalf("the file has grown to %d bytes", dev.Size())
			}
			after := memoryBytes(dev)
			for off := 0; off < TinyData; off += 512 {
				if slices.Equal(after[off:off+512], fill) {
					t.Errorf("guest data lies upon the table at %#x", off)
				}
			}
			if slices.Equal(after[second:min(second+512, len(after))], fill) {
				t.Error("guest data lies upon the second l2 table")
			}
			if !c.good && !bytes.Equal(after[:112], before[:112]) {
				t.Error("the header has changed")
			}
		})
	}
}

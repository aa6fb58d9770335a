package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"math/bits"
	"slices"
)

// BitmapOptions says what a new bitmap is like. The zero value, and nil, mean
// one that records writes, with the default granularity.
type BitmapOptions struct {
	// Granularity is the bytes that a bit stands for, a power of two from 512
	// to 2 GiB. 0 means the cluster size, but 4 KiB at least and 64 KiB at most.
	Granularity int64
	// Disabled: the bitmap records no writes.
	Disabled bool
}

// AddBitmap adds a bitmap without a bit set. Like all changes of bitmaps it is
// there wholly or not at all after a crash. An error of what is asked for is a
// *BitmapError.
//
// Order of all changes of bitmaps: new tables and directory, sync; the header,
// sync.
func (im *Image) AddBitmap(ctx context.Context, name string, opts *BitmapOptions) error {
	var o BitmapOptions
	if opts != nil {
		o = *opts
	}
	if o.Granularity == 0 {
		o.Granularity = max(4<<10, min(64<<10, im.geo.clusterSize))
	}
	return im.changeBitmaps(ctx, "add bitmap", func(t *txn, list []Bitmap) ([]Bitmap, error) {
		b := Bitmap{Flags: BitmapAuto, Type: 1, GranularityBits: uint8(bits.TrailingZeros64(uint64(o.Granularity))), Name: name}
		if o.Disabled {
			b.Flags = 0
		}
		size := im.header.bitmapSize()
		if reason := im.refuseBitmap(&b, list, o.Granularity); reason != 0 {
			return nil, &BitmapError{Name: name, Reason: reason}
		}
		w, err := t.newBitmapTable(b.tableEntries(&im.geo, size))
		if err == nil {
			err = w.finish(&b)
		}
		return append(list, b), err
	})
}

// refuseBitmap tells why a bitmap cannot be added, in the order of QEMU
// (block/qcow2-bitmap.c, qcow2_co_can_store_new_dirty_bitmap).
func (im *Image) refuseBitmap(b *Bitmap, list []Bitmap, granularity int64) BitmapReason {
	dir := int64(len(b.appendTo(nil)))
	for i := range list {
		dir += list[i].entrySize()
	}
	switch {
	case b.Name == "":
		return BitmapNameEmpty
	case granularity < 1<<minBitmapGranularity || granularity > 1<<maxBitmapGranularity || granularity&(granularity-1) != 0:
		return BitmapBadGranularity
	case indexBitmap(list, b.Name) >= 0:
		return BitmapExists
	case im.header.Version < 3:
		return BitmapVersion2
	case b.bits(im.header.bitmapSize()) > maxBitmapSize*8:
		return BitmapTooLarge
	case len(b.Name) > maxBitmapNameSize:
		return BitmapNameLong
	case len(list) >= maxBitmaps:
		return BitmapTooMany
	case dir > maxBitmapDirectorySize:
		return BitmapDirectoryFull
	case im.header.bitmapSize() == 0:
		return BitmapNoDisk
	}
	return 0
}

// RemoveBitmap removes a bitmap, also an inconsistent one.
func (im *Image) RemoveBitmap(ctx context.Context, name string) error {
	return im.changeBitmaps(ctx, "remove bitmap", func(t *txn, list []Bitmap) ([]Bitmap, error) {
		i := indexBitmap(list, name)
		if i < 0 {
			return nil, &BitmapError{Name: name, Reason: BitmapNotFound}
		}
		if err := t.freeBitmap(&list[i]); err != nil {
			return nil, err
		}
		return slices.Delete(list, i, i+1), nil
	})
}

// ClearBitmap clears all bits of a bitmap.
func (im *Image) ClearBitmap(ctx context.Context, name string) error {
	return im.changeBitmap(ctx, "clear bitmap", name, func(t *txn, b *Bitmap) error {
		w, err := t.newBitmapTable(int64(b.TableSize))
		if err != nil {
			return err
		}
		if err := t.freeBitmapTable(b); err != nil {
			return err
		}
		return w.finish(b)
	})
}

// EnableBitmap makes a bitmap record writes.
func (im *Image) EnableBitmap(ctx context.Context, name string) error {
	return im.changeBitmap(ctx, "enable bitmap", name, func(_ *txn, b *Bitmap) error {
		b.Flags |= BitmapAuto
		return nil
	})
}

// DisableBitmap makes a bitmap record writes no longer.
func (im *Image) DisableBitmap(ctx context.Context, name string) error {
	return im.changeBitmap(ctx, "disable bitmap", name, func(_ *txn, b *Bitmap) error {
		b.Flags &^= BitmapAuto
		return nil
	})
}

// MergeBitmap sets the bits of a bitmap that stand for what the bitmap source of
// src says is dirty. src can be im; nothing else may be done with it meanwhile.
// The two disks have to be of one size, the granularities can differ.
func (im *Image) MergeBitmap(ctx context.Context, name string, src *Image, source string) error {
	return im.changeBitmaps(ctx, "merge bitmap", func(t *txn, list []Bitmap) ([]Bitmap, error) {
		b, err := findBitmap(list, name)
		if err != nil {
			return nil, err
		}
		fromList := list
		if src != im {
			unlock, err := src.lockBitmaps(ctx)
			if err != nil {
				return nil, err
			}
			defer unlock()
			if fromList, err = src.readBitmaps(); err != nil {
				return nil, err
			}
		}
		from, err := findBitmap(fromList, source)
		if err == nil {
			err = im.usable(b)
		}
		if err == nil {
			err = src.usable(from)
		}
		if err != nil {
			return nil, err
		}
		size, fromSize := im.header.bitmapSize(), src.header.bitmapSize()
		if size != fromSize {
			return nil, &BitmapError{Name: name, Reason: BitmapSizesDiffer, Sizes: [2]int64{size, fromSize}}
		}
		return list, t.setBits(ctx, b, func(f func(first, end int64) error) error {
			return src.dirtyBits(ctx, from, rescale(f, from.GranularityBits, b.GranularityBits))
		})
	})
}

// DirtyRanges calls f for the ranges of the disk that a bitmap says are dirty, in
// ascending order. They are made of whole bits, but for the last one, which ends
// with the disk. Two ranges do not touch. f must not use the image.
func (im *Image) DirtyRanges(ctx context.Context, name string, f func(off, n int64) error) error {
	unlock, err := im.lockBitmaps(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	list, err := im.readBitmaps()
	if err != nil {
		return err
	}
	b, err := findBitmap(list, name)
	if err == nil {
		err = im.usable(b)
	}
	if err != nil {
		return err
	}
	size := im.header.bitmapSize()
	return im.dirtyBits(ctx, b, func(first, end int64) error {
		off := first << b.GranularityBits
		return f(off, min(end<<b.GranularityBits, size)-off)
	})
}

// lockBitmaps makes the bitmaps of an image readable until unlock is called.
// Writes that were recorded are stored.
func (im *Image) lockBitmaps(ctx context.Context) (unlock func(), err error) {
	im.mu.Lock()
	if err := im.bitmapsEnd(ctx); err != nil {
		im.mu.Unlock()
		return nil, err
	}
	return im.mu.Unlock, nil
}

// indexBitmap finds a bitmap by its name; -1 if there is none.
func indexBitmap(list []Bitmap, name string) int {
	return slices.IndexFunc(list, func(b Bitmap) bool { return b.Name == name })
}

func findBitmap(list []Bitmap, name string) (*Bitmap, error) {
	i := indexBitmap(list, name)
	if i < 0 {
		return nil, &BitmapError{Name: name, Reason: BitmapNotFound}
	}
	return &list[i], nil
}

// usable refuses a bitmap that says what is not true.
func (im *Image) usable(b *Bitmap) error {
	if b.Flags&BitmapInUse != 0 {
		return &BitmapError{Name: b.Name, Reason: BitmapInconsistent}
	}
	return im.checkTableSize(b, im.header.bitmapSize())
}

// rescale passes runs of bits of one granularity on as those of another.
func rescale(f func(first, end int64) error, from, to uint8) func(first, end int64) error {
	return func(first, end int64) error { return f(first<<from>>to, (end<<from-1)>>to+1) }
}

// changeBitmaps runs a change of the list of bitmaps as a transaction.
func (im *Image) changeBitmaps(ctx context.Context, op string, do func(t *txn, list []Bitmap) ([]Bitmap, error)) error {
	im.mu.Lock()
	defer im.mu.Unlock()
	if err := im.mayChange(op); err != nil {
		return err
	}
	if err := im.bitmapsEnd(ctx); err != nil {
		return err
	}
	list, err := im.readBitmaps()
	if err != nil {
		return err
	}
	t, err := im.begin(ctx)
	if err != nil {
		return err
	}
	defer t.abort()
	if list, err = do(t, list); err != nil {
		return err
	}
	if err := t.writeBitmaps(list); err != nil {
		return err
	}
	return t.commit()
}

// changeBitmap runs a change of a bitmap that is consistent.
func (im *Image) changeBitmap(ctx context.Context, op, name string, do func(t *txn, b *Bitmap) error) error {
	return im.changeBitmaps(ctx, op, func(t *txn, list []Bitmap) ([]Bitmap, error) {
		b, err := findBitmap(list, name)
		if err == nil {
			err = im.usable(b)
		}
		if err == nil {
			err = do(t, b)
		}
		return list, err
	})
}

// writeBitmaps writes a new bitmap directory and gives up the old one.
func (t *txn) writeBitmaps(list []Bitmap) error {
	if x, ok := t.header.Bitmaps(); ok {
		if err := t.count(int64(x.DirectoryOffset), int64(x.DirectorySize), -1); err != nil {
			return err
		}
	}
	h := &t.header
	h.Extensions = slices.DeleteFunc(slices.Clone(h.Extensions), func(e Extension) bool { return e.Type == extBitmaps })
	h.AutoclearFeatures &^= AutoclearBitmaps
	if len(list) == 0 {
		return nil
	}
	var dir []byte // at most maxBitmapDirectorySize
	for _, b := range list {
		dir = b.appendTo(dir)
	}
	off, err := t.alloc(int64(len(dir)))
	if err != nil {
		return err
	}
	if err := t.write(dir, off); err != nil {
		return err
	}
	x := BitmapsExtension{uint32(len(list)), uint64(len(dir)), uint64(off)}
	// First, where it lies in the first sector of the file, so that it can change
	// without anything else.
	h.Extensions = slices.Insert(h.Extensions, 0, Extension{extBitmaps, x.appendTo(nil)})
	h.AutoclearFeatures |= AutoclearBitmaps
	return nil
}

// freeBitmaps removes all bitmaps.
func (t *txn) freeBitmaps() error {
	list, err := t.im.bitmapsOf(&t.header, t.header.bitmapSize())
	if err != nil {
		return err
	}
	for i := range list {
		if err := t.freeBitmap(&list[i]); err != nil {
			return err
		}
	}
	return t.writeBitmaps(nil)
}

// freeBitmap gives up the table of a bitmap and what it refers to. A table
// with an entry that cannot be is not to be believed: what it refers to leaks.
func (t *txn) freeBitmap(b *Bitmap) error {
	err := t.im.bitmapTable(t.ctx, b, func(int64, uint64) error { return nil })
	if errors.Is(err, ErrCorrupt) {
		return t.count(int64(b.TableOffset), int64(b.TableSize)*8, -1)
	}
	if err != nil {
		return err
	}
	return t.freeBitmapTable(b)
}

// freeBitmapTable is freeBitmap for a bitmap that stays: its table has to be good.
func (t *txn) freeBitmapTable(b *Bitmap) error {
	err := t.im.bitmapTable(t.ctx, b, func(_ int64, entry uint64) error { return t.freeBitmapCluster(entry) })
	if err != nil {
		return err
	}
	return t.count(int64(b.TableOffset), int64(b.TableSize)*8, -1)
}

// freeBitmapCluster gives up what an entry of a bitmap table refers to.
func (t *txn) freeBitmapCluster(entry uint64) error {
	if off := int64(entry & bitmapTableOffsetMask); off != 0 {
		return t.count(off, t.im.geo.clusterSize, -1)
	}
	return nil
}

// setBits sets bits of a bitmap: those of runs, which come in ascending order
// and may overlap by a bit. Memory is bounded by a cluster and a part of a table.
func (t *txn) setBits(ctx context.Context, b *Bitmap, runs func(f func(first, end int64) error) error) error {
	next, stop := iter.Pull2(pushed(runs))
	defer stop()
	run, err, more := next()
	if !more || err != nil {
		return err
	}
	n := b.bits(t.im.header.bitmapSize())
	perCluster := t.im.geo.clusterSize * 8
	var cluster []byte
	return t.rewriteBitmapTable(ctx, b, int64(b.TableSize), func(i int64, entry uint64) (uint64, error) {
		at := i * perCluster
		end := min(at+perCluster, n)
		if !more || run.first >= end {
			return entry, nil
		}
		if cluster == nil {
			cluster = make([]byte, t.im.geo.clusterSize)
		}
		if err := t.im.readBitmapCluster(b, entry, end-at, cluster); err != nil {
			return 0, err
		}
		changed := false
		for more && run.first < end {
			if setBits(cluster, max(run.first, at)-at, min(run.end, end)-at) {
				changed = true
			}
			if run.end > end {
				run.first = end
				break
			}
			if run, err, more = next(); err != nil {
				return 0, err
			}
		}
		if !changed {
			return entry, nil
		}
		return t.replaceBitmapCluster(entry, cluster)
	})
}

// pushed turns a function that calls back into a sequence.
func pushed(runs func(f func(first, end int64) error) error) iter.Seq2[bitRange, error] {
	return func(yield func(bitRange, error) bool) {
		stopped := errors.New("stopped")
		err := runs(func(first, end int64) error {
			if !yield(bitRange{first, end}, nil) {
				return stopped
			}
			return nil
		})
		if err != nil && err != stopped {
			yield(bitRange{}, err)
		}
	}
}

// readBitmapCluster fills p with the bits of a table entry, of which the first
// n are the bitmap's; the rest is zero.
func (im *Image) readBitmapCluster(b *Bitmap, entry uint64, n int64, p []byte) error {
	switch off := int64(entry & bitmapTableOffsetMask); {
	case off != 0:
		if err := readFull(im.dev, p, off); err != nil {
			return fmt.Errorf("qcow2: bitmap %q: cluster at %#x: %w", b.Name, off, err)
		}
	case entry&bitmapTableAllOnes != 0:
		for i := range p {
			p[i] = 0xff
		}
	default:
		clear(p)
	}
	clearBits(p, n)
	return nil
}

// replaceBitmapCluster writes the bits of a table entry to a new cluster.
func (t *txn) replaceBitmapCluster(entry uint64, p []byte) (uint64, error) {
	off, err := t.alloc(int64(len(p)))
	if err != nil {
		return 0, err
	}
	if err := t.write(p, off); err != nil {
		return 0, err
	}
	return uint64(off), t.freeBitmapCluster(entry)
}

// resizeBitmaps makes the bitmaps those of a disk of size bytes, as QEMU does:
// the bits of what a disk gains are clear. An inconsistent bitmap is an error.
func (t *txn) resizeBitmaps(ctx context.Context, size int64) error {
	list, err := t.im.bitmapsOf(&t.header, t.im.header.bitmapSize())
	if err != nil || len(list) == 0 {
		return err
	}
	size &^= 511
	for i := range list {
		b := &list[i]
		reason := BitmapReason(0)
		switch {
		case b.Flags&BitmapInUse != 0:
			reason = BitmapInconsistent
		case b.bits(size) > maxBitmapSize*8:
			reason = BitmapTooLarge
		case size == 0:
			reason = BitmapNoDisk
		}
		if reason != 0 {
			return &BitmapError{Name: b.Name, Reason: reason}
		}
	}
	for i := range list {
		if err := t.resizeBitmap(ctx, &list[i], size); err != nil {
			return err
		}
	}
	return t.writeBitmaps(list)
}

func (t *txn) resizeBitmap(ctx context.Context, b *Bitmap, size int64) error {
	old := t.im.header.bitmapSize()
	if err := t.im.checkTableSize(b, old); err != nil {
		return err
	}
	if b.bits(old) == b.bits(size) {
		return nil
	}
	n := min(b.bits(old), b.bits(size)) // bits that stay
	perCluster := t.im.geo.clusterSize * 8
	return t.rewriteBitmapTable(ctx, b, b.tableEntries(&t.im.geo, size), func(i int64, entry uint64) (uint64, error) {
		at := i * perCluster
		if at >= n {
			return 0, t.freeBitmapCluster(entry)
		}
		if at+perCluster <= n || entry == 0 {
			return entry, nil
		}
		cluster := make([]byte, t.im.geo.clusterSize)
		if err := t.im.readBitmapCluster(b, entry, n-at, cluster); err != nil {
			return 0, err
		}
		return t.replaceBitmapCluster(entry, cluster)
	})
}

// rewriteBitmapTable gives b a new table of the given number of entries, which
// are what change makes of the old ones. Those beyond are dropped.
func (t *txn) rewriteBitmapTable(ctx context.Context, b *Bitmap, entries int64, change func(i int64, entry uint64) (uint64, error)) error {
	w, err := t.newBitmapTable(entries)
	if err != nil {
		return err
	}
	err = t.im.bitmapTable(ctx, b, func(i int64, entry uint64) error {
		entry, err := change(i, entry)
		if err != nil || i >= entries {
			return err
		}
		return w.put(entry)
	})
	if err != nil {
		return err
	}
	if err := t.count(int64(b.TableOffset), int64(b.TableSize)*8, -1); err != nil {
		return err
	}
	return w.finish(b)
}

// bitmapTableWriter writes a new bitmap table in ascending order.
type bitmapTableWriter struct {
	t       *txn
	off     int64 // of the table
	entries int64
	n       int64  // entries that were put
	buf     []byte // those of them that are not yet written
}

// newBitmapTable reserves the space of a table.
func (t *txn) newBitmapTable(entries int64) (*bitmapTableWriter, error) {
	off, err := t.alloc(entries * 8)
	return &bitmapTableWriter{t: t, off: off, entries: entries}, err
}

func (w *bitmapTableWriter) put(entry uint64) error {
	w.buf = binary.BigEndian.AppendUint64(w.buf, entry)
	w.n++
	if len(w.buf) < bitmapChunk {
		return nil
	}
	return w.flush()
}

func (w *bitmapTableWriter) flush() error {
	err := w.t.write(w.buf, w.off+w.n*8-int64(len(w.buf)))
	w.buf = w.buf[:0]
	return err
}

// finish fills the table up with zeroes and makes it the table of b.
func (w *bitmapTableWriter) finish(b *Bitmap) error {
	for w.n < w.entries {
		if err := w.put(0); err != nil {
			return err
		}
	}
	b.TableOffset, b.TableSize = uint64(w.off), uint32(w.entries)
	return w.flush()
}

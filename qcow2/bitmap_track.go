package qcow2

import (
	"context"
	"fmt"

	"qimg/qcow2/blockdev"
)

// bitmapTracker is what an image that is being written keeps of its bitmaps.
type bitmapTracker struct {
	inUse       []int // places in the directory of the bitmaps that record writes
	granularity uint8 // log2 of the finest of them
	set         dirtySet
}

// bitmapsBegin marks the bitmaps that record writes as in use, on disk, before
// a change of the guest's data. Order: flags, sync. Bitmaps that are disabled are
// not touched, as nothing will change them. Later calls, until bitmapsEnd, only
// store what is recorded when it takes much memory.
func (im *Image) bitmapsBegin(ctx context.Context) error {
	if im.w.bitmaps != nil {
		return im.bitmapsRelieve(ctx)
	}
	list, err := im.readBitmaps()
	if err != nil {
		return err
	}
	tr := &bitmapTracker{granularity: maxBitmapGranularity}
	ext, _ := im.header.Bitmaps()
	var dir []byte
	first, end := int64(-1), int64(0) // of what changes in it
	for i := range list {
		b := &list[i]
		if b.Flags == BitmapAuto {
			if err := im.checkTableSize(b, im.header.bitmapSize()); err != nil {
				return err
			}
			b.Flags |= BitmapInUse
			tr.inUse = append(tr.inUse, i)
			tr.granularity = min(tr.granularity, b.GranularityBits)
			if first < 0 {
				first = int64(len(dir))
			}
			end = int64(len(dir)) + b.entrySize()
		}
		dir = b.appendTo(dir)
	}
	if first >= 0 {
		// Nothing else in an entry changes: torn, the write has marked some.
		at := int64(ext.DirectoryOffset) + first
		if _, err := im.w.dev.WriteAt(dir[first:end], at); err != nil {
			return fmt.Errorf("qcow2: bitmap directory: mark bitmaps in use at %#x: %w", at, err)
		}
		if err := blockdev.Sync(im.w.dev); err != nil {
			return err
		}
	}
	im.w.bitmaps = tr
	return nil
}

// bitmapsDirty records that n bytes of the guest at off change. What lies behind
// the end of the disk is not recorded.
func (im *Image) bitmapsDirty(off, n int64) {
	tr := im.w.bitmaps
	if end := min(off+n, im.header.bitmapSize()); tr != nil && len(tr.inUse) > 0 && off < end {
		tr.set.add(off>>tr.granularity, (end-1)>>tr.granularity+1)
	}
}

// bitmapsRelieve stores what is recorded when it takes much memory. The bitmaps
// stay in use.
func (im *Image) bitmapsRelieve(ctx context.Context) error {
	tr := im.w.bitmaps
	if !tr.set.full() {
		return nil
	}
	if err := im.storeBitmaps(ctx, BitmapAuto|BitmapInUse); err != nil {
		return err
	}
	tr.set = dirtySet{}
	return nil
}

// bitmapsEnd stores what is recorded in the bitmaps that bitmapsBegin marked,
// which are then in use no longer. If it is not called they are inconsistent.
func (im *Image) bitmapsEnd(ctx context.Context) error {
	if im.w == nil || im.w.bitmaps == nil {
		return nil
	}
	if len(im.w.bitmaps.inUse) > 0 {
		if err := im.storeBitmaps(ctx, BitmapAuto); err != nil {
			return err
		}
	}
	im.w.bitmaps = nil
	return nil
}

// storeBitmaps stores what is recorded, as one transaction.
func (im *Image) storeBitmaps(ctx context.Context, flags BitmapFlags) error {
	tr := im.w.bitmaps
	t, err := im.start(ctx)
	if err != nil {
		return err
	}
	defer t.abort()
	list, err := im.readBitmaps()
	if err != nil {
		return err
	}
	for _, i := range tr.inUse {
		b := &list[i]
		err := t.setBits(ctx, b, func(f func(first, end int64) error) error {
			return tr.set.each(rescale(f, tr.granularity, b.GranularityBits))
		})
		if err != nil {
			return err
		}
		b.Flags = flags
	}
	if err := t.writeBitmaps(list); err != nil {
		return err
	}
	return t.commit()
}

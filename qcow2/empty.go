package qcow2

import (
	"context"
	"math/bits"

	"qimg/qcow2/blockdev"
)

// empty drops all that the guest of the image has written, and gives back the
// space. Snapshots keep theirs. im.mu is held for writing.
//
// Order: a transaction drops the tables and the data; another one moves the
// remaining tables to the front of the file, which is cut off behind them; holes
// are made of what else became free.
func (im *Image) empty(ctx context.Context) error {
	t, err := im.begin(ctx)
	if err != nil {
		return err
	}
	defer t.abort()
	t.shrink = true
	t.placed = make(map[int64]bool)
	freed := make(clusterSet, im.geo.clusters(t.fileSize)/64+1)
	im.w.alloc.freed = freed
	err = t.cut(0)
	im.w.alloc.freed = nil
	if err != nil {
		return err
	}
	if err := t.commitResize(); err != nil {
		return err
	}
	return im.fail(im.discardFreed(freed))
}

// clusterSet is a set of clusters of the image file, by their numbers, up to a
// largest one.
type clusterSet []uint64

func (s clusterSet) add(cluster int64) {
	if i := cluster >> 6; i < int64(len(s)) {
		s[i] |= 1 << (cluster & 63)
	}
}

// discardFreed gives the space of those clusters that are free back to the file
// system. An external data file has nothing left that is used.
func (im *Image) discardFreed(freed clusterSet) error {
	g := &im.geo
	if g.dataFile {
		if d, ok := im.w.data.(blockdev.Discarder); ok {
			return d.Discard(0, im.w.data.Size())
		}
		return nil
	}
	d, ok := im.w.dev.(blockdev.Discarder)
	if !ok {
		return nil
	}
	var off, n int64 // the run so far
	flush := func() error {
		if n = min(n, im.w.dev.Size()-off); n <= 0 {
			return nil
		}
		return d.Discard(off, n)
	}
	for i, word := range freed {
		for ; word != 0; word &= word - 1 {
			c := int64(i)<<6 + int64(bits.TrailingZeros64(word))
			count, err := im.w.alloc.get(c)
			if err != nil {
				return err
			}
			at := c << g.clusterBits
			switch {
			case count != 0:
			case off+n == at:
				n += g.clusterSize
			default:
				if err := flush(); err != nil {
					return err
				}
				off, n = at, g.clusterSize
			}
		}
	}
	return flush()
}

package qcow2

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/bits"
)

// bitmapChunk is how much of a bitmap table is in memory at a time, in bytes.
const bitmapChunk = 64 << 10

// bitmapSize returns the bytes of the disk that bitmaps are about.
func (h *Header) bitmapSize() int64 { return int64(h.Size) &^ 511 }

// bits returns the number of bits for a disk of size bytes.
func (b *Bitmap) bits(size int64) int64 {
	return size>>b.GranularityBits + min(1, size&(1<<b.GranularityBits-1))
}

// tableEntries returns the entries that the table needs for a disk of size
// bytes.
func (b *Bitmap) tableEntries(g *geometry, size int64) int64 {
	perCluster := g.clusterSize * 8
	n := b.bits(size)
	return n/perCluster + min(1, n%perCluster)
}

// dirtyBits calls f for the runs of set bits, in ascending order; two runs do
// not touch. Work is in proportion to the table and what it refers to, memory
// to a cluster. An error of f ends it.
func (im *Image) dirtyBits(ctx context.Context, b *Bitmap, f func(first, end int64) error) error {
	n := b.bits(im.header.bitmapSize())
	if err := im.checkTableSize(b, im.header.bitmapSize()); err != nil {
		return err
	}
	run := bitRun{f: f}
	perCluster := im.geo.clusterSize * 8
	var cluster []byte
	err := im.bitmapTable(ctx, b, func(i int64, entry uint64) error {
		at := i * perCluster
		end := min(at+perCluster, n)
		switch off := int64(entry & bitmapTableOffsetMask); {
		case off != 0:
			if cluster == nil {
				cluster = make([]byte, im.geo.clusterSize)
			}
			if err := readFull(im.dev, cluster, off); err != nil {
				return fmt.Errorf("qcow2: bitmap %q: cluster at %#x: %w", b.Name, off, err)
			}
			return eachRun(cluster, end-at, func(first, last int64) error { return run.add(at+first, at+last) })
		case entry&bitmapTableAllOnes != 0:
			return run.add(at, end)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return run.flush()
}

// checkTableSize refuses a table that has not the size that the disk asks for
// (block/qcow2-bitmap.c, load_bitmap_data).
func (im *Image) checkTableSize(b *Bitmap, size int64) error {
	if want := b.tableEntries(&im.geo, size); int64(b.TableSize) != want {
		return &FormatError{"bitmap " + b.Name, int64(b.TableOffset), "bitmap_table_size", fmt.Sprintf("%d, expected %d for a disk of %d bytes", b.TableSize, want, size), ErrCorrupt}
	}
	return nil
}

// bitmapTable calls f for the entries of a table, each checked.
func (im *Image) bitmapTable(ctx context.Context, b *Bitmap, f func(i int64, entry uint64) error) error {
	buf := make([]byte, min(bitmapChunk, int64(b.TableSize)*8))
	for at := int64(0); at < int64(b.TableSize)*8; at += bitmapChunk {
		p := buf[:min(bitmapChunk, int64(b.TableSize)*8-at)]
		if err := im.readBitmapTable(ctx, b, p, at); err != nil {
			return err
		}
		for i := int64(0); i < int64(len(p)); i += 8 {
			if err := f((at+i)/8, binary.BigEndian.Uint64(p[i:])); err != nil {
				return err
			}
		}
	}
	return nil
}

// readBitmapTable fills p with the part of a table that starts at byte at, and
// checks its entries.
func (im *Image) readBitmapTable(ctx context.Context, b *Bitmap, p []byte, at int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	at += int64(b.TableOffset) // check has bounded both
	if err := readFull(im.dev, p, at); err != nil {
		return fmt.Errorf("qcow2: bitmap %q: table at %#x: %w", b.Name, b.TableOffset, err)
	}
	for i := 0; i < len(p); i += 8 {
		entry := binary.BigEndian.Uint64(p[i:])
		off := entry & bitmapTableOffsetMask
		if entry&bitmapTableReservedMask != 0 || im.geo.inCluster(off) != 0 || off != 0 && entry&bitmapTableAllOnes != 0 {
			return &FormatError{"bitmap table entry", at + int64(i), "", fmt.Sprintf("%#x with reserved bits or not aligned to %#x", entry, im.geo.clusterSize), ErrCorrupt}
		}
	}
	return nil
}

// bitRun joins runs that touch.
type bitRun struct {
	first, end int64
	f          func(first, end int64) error
}

func (r *bitRun) add(first, end int64) error {
	if first == r.end {
		r.end = end
		return nil
	}
	err := r.flush()
	r.first, r.end = first, end
	return err
}

func (r *bitRun) flush() error {
	if r.first == r.end {
		return nil
	}
	return r.f(r.first, r.end)
}

// eachRun calls f for the runs of ones in the first n bits of p, whose length
// is a multiple of 8.
func eachRun(p []byte, n int64, f func(first, end int64) error) error {
	for i := int64(0); i < n; {
		first := nextBit(p, i, n, 0)
		if first == n {
			return nil
		}
		i = nextBit(p, first, n, ^uint64(0))
		if err := f(first, i); err != nil {
			return err
		}
	}
	return nil
}

// nextBit returns the first bit at i or after it that is one, or zero if flip
// is all ones; n if there is none below n.
func nextBit(p []byte, i, n int64, flip uint64) int64 {
	for i < n {
		word := (binary.LittleEndian.Uint64(p[i/64*8:]) ^ flip) >> (i % 64)
		if word != 0 {
			return min(n, i+int64(bits.TrailingZeros64(word)))
		}
		i = (i/64 + 1) * 64
	}
	return n
}

// setBits sets the bits of p from first to end and reports whether one of them
// was clear.
func setBits(p []byte, first, end int64) (changed bool) {
	for first < end {
		n := min(64-first%64, end-first)
		at := p[first/64*8:]
		word := binary.LittleEndian.Uint64(at)
		set := word | ^uint64(0)>>(64-n)<<(first%64)
		binary.LittleEndian.PutUint64(at, set)
		changed = changed || set != word
		first += n
	}
	return changed
}

// clearBits clears the bits of p from first on and reports whether one of them
// was set.
func clearBits(p []byte, first int64) (changed bool) {
	for first < int64(len(p))*8 {
		at := p[first/64*8:]
		word := binary.LittleEndian.Uint64(at)
		kept := word &^ (^uint64(0) << (first % 64))
		binary.LittleEndian.PutUint64(at, kept)
		changed = changed || kept != word
		first = (first/64 + 1) * 64
	}
	return changed
}

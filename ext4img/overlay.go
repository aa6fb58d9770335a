package ext4img

import (
	"cmp"
	"encoding/binary"
	"io"
	"slices"
)

// overlay tells which blocks of a file system have newer copies in its
// journal, and where they lie. It holds no contents, so that its size depends
// on the number of such blocks alone. It is safe for concurrent use once it is
// made; a nil overlay is empty.
type overlay struct {
	blocks []movedBlock // ascending, no block twice
}

// movedBlock is a block of the file system and the block of the device that
// holds its newest copy.
type movedBlock struct {
	block, copy int64
	// escaped: the block begins with the magic number of the journal, which is
	// zero in the copy.
	escaped bool
}

// normalize sorts the blocks, and keeps the last copy of each.
func (o *overlay) normalize() {
	slices.SortStableFunc(o.blocks, func(a, b movedBlock) int { return cmp.Compare(a.block, b.block) })
	out := o.blocks[:0]
	for i, b := range o.blocks {
		if i+1 < len(o.blocks) && o.blocks[i+1].block == b.block {
			continue
		}
		out = append(out, b)
	}
	o.blocks = out
}

// next returns the first block from n on that has a copy.
func (o *overlay) next(n int64) (movedBlock, bool) {
	if o == nil {
		return movedBlock{}, false
	}
	i, _ := slices.BinarySearchFunc(o.blocks, n, func(b movedBlock, n int64) int { return cmp.Compare(b.block, n) })
	if i == len(o.blocks) {
		return movedBlock{}, false
	}
	return o.blocks[i], true
}

// patch puts copies in the place of the blocks that p, bytes from off on, was
// filled with.
func (o *overlay) patch(dev io.ReaderAt, p []byte, off, blockSize int64) error {
	if o == nil || len(o.blocks) == 0 {
		return nil
	}
	end := off + int64(len(p))
	for n := off / blockSize; ; {
		b, ok := o.next(n)
		start := b.block * blockSize
		if !ok || start >= end {
			return nil
		}
		from, to := max(start, off), min(start+blockSize, end)
		part := p[from-off : to-off]
		if err := readFull(dev, part, b.copy*blockSize+from-start); err != nil {
			return err
		}
		if b.escaped {
			var magic [4]byte
			binary.BigEndian.PutUint32(magic[:], jbd2Magic)
			if from-start < 4 {
				copy(part, magic[from-start:])
			}
		}
		n = b.block + 1
	}
}

package ext4img

import "encoding/binary"

// Extent trees (kernel: Documentation/filesystems/ext4/ifork.rst, "Extent
// Tree").
const (
	extentMagic     = 0xf30a
	extentHeaderLen = 12
	extentLen       = 12
	extentTailLen   = 4     // checksum, in blocks only
	extentMaxLen    = 32768 // blocks of one initialised extent
	extentRootMax   = 4     // entries in i_block
)

// extent is a run of logical blocks and where it lies.
type extent struct {
	logical, physical, len int64
}

// object is what has blocks: data of n positions from pos on, and behind them
// the blocks of its extent tree, if that does not fit the inode.
type object struct {
	pos  int64
	runs []run // logical blocks of the data, ascending; their lengths add up to n
}

// extents calls yield with every extent of an object.
func (g *geometry) extents(o object, yield func(extent) bool) {
	pos := o.pos
	for _, r := range o.runs {
		logical := r.start
		ok := true
		g.physical(pos, r.len(), func(p run) bool {
			for p.start < p.end && ok {
				n := min(p.len(), extentMaxLen)
				ok = yield(extent{logical, p.start, n})
				logical += n
				p.start += n
			}
			return ok
		})
		if !ok {
			return
		}
		pos += r.len()
	}
}

// extentsPerBlock is eh_max of a block of a tree.
func (g *geometry) extentsPerBlock() int64 {
	return (g.blockSize - extentHeaderLen) / extentLen
}

// treeLevels returns the number of blocks of each level of a tree of that many
// extents, leaves first; none where the inode holds them all.
func (g *geometry) treeLevels(extents int64) []int64 {
	var levels []int64
	for n := extents; n > extentRootMax; {
		n = ceilDiv(n, g.extentsPerBlock())
		levels = append(levels, n)
	}
	return levels
}

// treeBlocks is the number of blocks of such a tree.
func (g *geometry) treeBlocks(extents int64) int64 {
	var sum int64
	for _, n := range g.treeLevels(extents) {
		sum += n
	}
	return sum
}

// putExtentRoot writes i_block of an object whose data take n positions.
func (g *geometry) putExtentRoot(b []byte, o object, n int64) {
	var list []extent
	count := int64(0)
	g.extents(o, func(e extent) bool {
		if count++; count <= extentRootMax {
			list = append(list, e)
		}
		return true
	})
	levels := g.treeLevels(count)
	if len(levels) == 0 {
		putExtentHeader(b, len(list), extentRootMax, 0)
		for i, e := range list {
			putExtent(b[extentHeaderLen+i*extentLen:], e)
		}
		return
	}
	// The root leads to the last level.
	top := levels[len(levels)-1]
	first := o.pos + n + g.treeBlocks(count) - top
	putExtentHeader(b, int(top), extentRootMax, len(levels))
	covers := int64(1) // extents that a block of the top level covers
	for range levels {
		covers *= g.extentsPerBlock()
	}
	index := int64(0)
	g.extents(o, func(e extent) bool {
		if index%covers == 0 {
			child := index / covers
			putIndex(b[extentHeaderLen+child*extentLen:], e.logical, g.block(first+child))
		}
		index++
		return true
	})
}

// putExtentBlock writes one block of the extent tree of an object whose data
// take n positions: number index, counted over all levels, leaves first.
func (l *Layout) putExtentBlock(b []byte, ino uint32, o object, n, index int64) {
	g := l.geo
	count := int64(0)
	g.extents(o, func(extent) bool { count++; return true })
	perBlock := g.extentsPerBlock()
	covers, below := perBlock, int64(0) // extents that the block covers; first position of the level below
	depth, at := 0, o.pos+n
	for _, blocks := range g.treeLevels(count) {
		if index < blocks {
			break
		}
		index -= blocks
		below = at
		at += blocks
		covers *= perBlock
		depth++
	}
	from := index * covers
	to := min(from+covers, count)
	perEntry := covers / perBlock
	putExtentHeader(b, int(ceilDiv(to-from, perEntry)), int(perBlock), depth)
	i := int64(0)
	g.extents(o, func(e extent) bool {
		if i >= from && (i-from)%perEntry == 0 {
			entry := b[extentHeaderLen+(i-from)/perEntry*extentLen:]
			if depth == 0 {
				putExtent(entry, e)
			} else {
				putIndex(entry, e.logical, g.block(below+i/perEntry))
			}
		}
		i++
		return i < to
	})
	tail := extentHeaderLen + perBlock*extentLen
	binary.LittleEndian.PutUint32(b[tail:], crc32c(l.inodeSeed(ino), b[:tail]))
}

func putExtentHeader(b []byte, entries, limit, depth int) {
	binary.LittleEndian.PutUint16(b, extentMagic)
	binary.LittleEndian.PutUint16(b[2:], uint16(entries))
	binary.LittleEndian.PutUint16(b[4:], uint16(limit))
	binary.LittleEndian.PutUint16(b[6:], uint16(depth))
}

func putExtent(b []byte, e extent) {
	binary.LittleEndian.PutUint32(b, uint32(e.logical))
	binary.LittleEndian.PutUint16(b[4:], uint16(e.len)) // 32768 is initialised, more is not
	binary.LittleEndian.PutUint16(b[6:], uint16(e.physical>>32))
	binary.LittleEndian.PutUint32(b[8:], uint32(e.physical))
}

func putIndex(b []byte, logical, block int64) {
	binary.LittleEndian.PutUint32(b, uint32(logical))
	binary.LittleEndian.PutUint32(b[4:], uint32(block))
	binary.LittleEndian.PutUint16(b[8:], uint16(block>>32))
}

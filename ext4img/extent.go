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

// object is what has blocks: data at positions from pos on, and behind them the
// blocks of its extent tree, if that does not fit the inode.
type object struct {
	pos  int64
	runs []run // logical blocks of the data, ascending
}

// single is an object of n blocks without holes.
func single(pos, n int64) object { return object{pos, []run{{0, n}}} }

// blocks is the number of data blocks.
func (o object) blocks() int64 {
	var n int64
	for _, r := range o.runs {
		n += r.len()
	}
	return n
}

// eachExtent calls fn with every extent of an object.
func (g *geometry) eachExtent(o object, fn func(extent)) {
	pos := o.pos
	for _, r := range o.runs {
		logical := r.start
		g.physical(pos, r.len(), func(p run) bool {
			for p.start < p.end {
				n := min(p.len(), extentMaxLen)
				fn(extent{logical, p.start, n})
				logical += n
				p.start += n
			}
			return true
		})
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

// putExtentRoot writes i_block for a list of extents. The blocks of the tree,
// if there are any, lie at positions from treePos on, leaves first.
func (g *geometry) putExtentRoot(b []byte, list []extent, treePos int64) {
	levels := g.treeLevels(int64(len(list)))
	if len(levels) == 0 {
		putExtentHeader(b, len(list), extentRootMax, 0)
		for i, e := range list {
			putExtent(b[extentHeaderLen+i*extentLen:], e)
		}
		return
	}
	// The root leads to the last level.
	top := levels[len(levels)-1]
	putExtentHeader(b, int(top), extentRootMax, len(levels))
	covers := int64(1) // extents that a block of the top level covers
	for _, n := range levels {
		covers *= g.extentsPerBlock()
		treePos += n
	}
	for i := range top {
		putIndex(b[extentHeaderLen+i*extentLen:], list[i*covers].logical, g.block(treePos-top+i))
	}
}

// putExtentBlock writes block number index of the tree of a list of extents,
// and its checksum. The tree lies as in putExtentRoot.
func (l *Layout) putExtentBlock(b []byte, ino uint32, list []extent, treePos, index int64) {
	g := l.geo
	perBlock := g.extentsPerBlock()
	covers, below := perBlock, int64(0) // extents that the block covers; first position of the level below
	depth := 0
	for _, blocks := range g.treeLevels(int64(len(list))) {
		if index < blocks {
			break
		}
		index -= blocks
		below = treePos
		treePos += blocks
		covers *= perBlock
		depth++
	}
	perEntry := covers / perBlock
	from := index * covers
	to := min(from+covers, int64(len(list)))
	putExtentHeader(b, int(ceilDiv(to-from, perEntry)), int(perBlock), depth)
	entry := b[extentHeaderLen:]
	for i := from; i < to; i += perEntry {
		if depth == 0 {
			putExtent(entry, list[i])
		} else {
			putIndex(entry, list[i].logical, g.block(below+i/perEntry))
		}
		entry = entry[extentLen:]
	}
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

package ext4img

import "encoding/binary"

// Extent trees (kernel: Documentation/filesystems/ext4/ifork.rst, "Extent
// Tree").
const (
	extentMagic     = 0xf30a
	extentHeaderLen = 12
	extentLen       = 12
	extentTailLen   = 4       // checksum, in blocks only
	extentMaxLen    = 32768   // blocks of one initialised extent
	extentRootMax   = 4       // entries in i_block
	extentMaxDepth  = 5       // EXT4_MAX_EXTENT_DEPTH
	maxLogical      = 1 << 32 // logical blocks have 32 bits
)

// extent is a run of logical blocks and where it lies.
type extent struct {
	logical, physical, len int64
	unwritten              bool // allocated, and reads as zeroes
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
				fn(extent{logical: logical, physical: p.start, len: n})
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

// mapping is what a part of a file is made of: the logical blocks from one
// number to another. Those that no extent covers are a hole.
type mapping struct {
	from, to int64
	extents  []extent // ascending, not overlapping, inside of the part
}

// at returns the extent at a logical block of the part, from that block on;
// physical is 0 for a hole.
func (m *mapping) at(logical int64) extent {
	// The first extent that ends behind the block.
	lo, hi := 0, len(m.extents)
	for lo < hi {
		mid := int(uint(lo+hi) >> 1)
		if e := &m.extents[mid]; e.logical+e.len > logical {
			hi = mid
		} else {
			lo = mid + 1
		}
	}
	if lo == len(m.extents) {
		return extent{logical: logical, len: m.to - logical}
	}
	e := m.extents[lo]
	if e.logical > logical {
		return extent{logical: logical, len: e.logical - logical}
	}
	skip := logical - e.logical
	return extent{logical, e.physical + skip, e.len - skip, e.unwritten}
}

// mapping returns the part of an inode's map that a logical block, below
// maxLogical, belongs to.
func (f *FS) mapping(n *Inode, logical int64) (*mapping, error) {
	if f.fc != nil {
		if list, ok := f.fc.extents[n.Ino]; ok {
			return &mapping{0, maxLogical, list}, nil
		}
	}
	if n.Flags&extentsFl == 0 {
		return f.blockMap(n, logical)
	}
	p := place{"extent tree", n.Ino, -1}
	b := n.block()
	m := &mapping{0, maxLogical, nil}
	depth := -1 // not known yet
	for {
		h, err := parseExtentHeader(p, b)
		if err != nil {
			return nil, err
		}
		switch {
		case depth < 0 && h.depth > extentMaxDepth:
			return nil, p.corrupt("eh_depth", "%d, expected at most %d", h.depth, extentMaxDepth)
		case depth >= 0 && h.depth != depth:
			return nil, p.corrupt("eh_depth", "%d, expected %d", h.depth, depth)
		}
		if depth = h.depth; depth == 0 {
			m.extents, err = parseExtents(p, b, h, m.from, m.to, f.sb)
			return m, err
		}
		child, err := findIndex(p, b, h, m, logical, f.sb)
		if err != nil {
			return nil, err
		}
		if child == 0 {
			return m, nil // before the first entry
		}
		p = place{"extent block", n.Ino, child}
		if b, err = f.block(child); err != nil {
			return nil, err
		}
		if f.sb.hasCsum() && !f.ignoreChecksums {
			if err := verifyExtentBlock(p, f.sb, n, b); err != nil {
				return nil, err
			}
		}
		depth--
	}
}

// extentHeader is the header of a node of an extent tree.
type extentHeader struct {
	entries int // 0x2: eh_entries
	max     int // 0x4: eh_max
	depth   int // 0x6: eh_depth; 0: the entries are extents
}

// parseExtentHeader reads the header of a node. The entries lie inside of it.
func parseExtentHeader(p place, b []byte) (extentHeader, error) {
	le := binary.LittleEndian
	h := extentHeader{int(le.Uint16(b[2:])), int(le.Uint16(b[4:])), int(le.Uint16(b[6:]))}
	if m := le.Uint16(b); m != extentMagic {
		return h, p.corrupt("eh_magic", "%s", hexNot(uint32(m), extentMagic))
	}
	if fit := (len(b) - extentHeaderLen) / extentLen; h.max > fit {
		return h, p.corrupt("eh_max", "%d, expected at most %d", h.max, fit)
	}
	if h.entries > h.max {
		return h, p.corrupt("eh_entries", "%d, expected at most %d", h.entries, h.max)
	}
	if h.entries == 0 && h.depth > 0 {
		return h, p.corrupt("eh_entries", "0 of an index node")
	}
	return h, nil
}

func parseExtent(b []byte) extent {
	le := binary.LittleEndian
	e := extent{
		logical:  int64(le.Uint32(b)),
		len:      int64(le.Uint16(b[4:])),
		physical: int64(le.Uint16(b[6:]))<<32 | int64(le.Uint32(b[8:])),
	}
	if e.len > extentMaxLen {
		e.len -= extentMaxLen
		e.unwritten = true
	}
	return e
}

// parseIndex reads an index entry: the first logical block that its child
// covers, and the child.
func parseIndex(b []byte) (logical, child int64) {
	le := binary.LittleEndian
	return int64(le.Uint32(b)), int64(le.Uint16(b[8:]))<<32 | int64(le.Uint32(b[4:]))
}

// parseExtents reads the extents of a leaf that covers the logical blocks from
// from to to: ascending, not overlapping, inside the file system.
func parseExtents(p place, b []byte, h extentHeader, from, to int64, s *Superblock) ([]extent, error) {
	list := make([]extent, h.entries)
	end := from
	for i := range list {
		e := parseExtent(b[extentHeaderLen+i*extentLen:])
		switch {
		case e.len == 0:
			return nil, p.corrupt("ee_len", "0 of entry %d", i)
		case e.logical < end || e.logical+e.len > to:
			return nil, p.corrupt("ee_block", "%d of entry %d, expected %d blocks between %d and %d", e.logical, i, e.len, end, to)
		case e.physical <= s.FirstDataBlock || e.physical > s.BlocksCount-e.len:
			return nil, p.corrupt("ee_start", "%d of entry %d, expected %d blocks inside of %d", e.physical, i, e.len, s.BlocksCount)
		}
		end = e.logical + e.len
		list[i] = e
	}
	return list, nil
}

// findIndex returns the child of an index node that covers a logical block,
// and narrows the range of m to what the child covers. Before the first entry
// there is no child: 0.
func findIndex(p place, b []byte, h extentHeader, m *mapping, logical int64, s *Superblock) (child int64, err error) {
	last := m.from - 1
	from, to := m.from, m.to
	for i := range h.entries {
		l, c := parseIndex(b[extentHeaderLen+i*extentLen:])
		switch {
		case l <= last || l >= m.to:
			return 0, p.corrupt("ei_block", "%d of entry %d, expected more than %d and less than %d", l, i, last, m.to)
		case c <= s.FirstDataBlock || c >= s.BlocksCount:
			return 0, p.corrupt("ei_leaf", "%d of entry %d, and the file system has %d blocks", c, i, s.BlocksCount)
		}
		last = l
		if l <= logical {
			child, from = c, l
		} else if to == m.to {
			to = l
		}
	}
	m.from, m.to = from, to
	return child, nil
}

// extentTailOff is where the checksum of a block of an extent tree lies.
func extentTailOff(h extentHeader) int { return extentHeaderLen + h.max*extentLen }

// verifyExtentBlock compares a block of an extent tree with its checksum.
func verifyExtentBlock(p place, s *Superblock, n *Inode, b []byte) error {
	h, err := parseExtentHeader(p, b)
	if err != nil {
		return err
	}
	tail := extentTailOff(h)
	if tail+extentTailLen > len(b) {
		return p.corrupt("eh_max", "%d leaves no room for a checksum", h.max)
	}
	want := crc32c(s.inodeSeed(n.Ino, n.Generation), b[:tail])
	if found := binary.LittleEndian.Uint32(b[tail:]); found != want {
		return p.checksum(found, want)
	}
	return nil
}

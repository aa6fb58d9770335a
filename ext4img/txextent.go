package ext4img

import (
	"encoding/binary"
	"slices"
)

// extentNode is a node of an extent tree that is edited. Entries of an index
// are extents of which only logical and physical count.
type extentNode struct {
	block int64 // 0: the root, in the inode
	depth int
	max   int // eh_max
	list  []extent
	at    int // the entry that leads to the next node of a path
}

// extentUnwrittenMax is the longest extent that was not written: EXT_UNWRITTEN_MAX_LEN.
const extentUnwrittenMax = extentMaxLen - 1

// loadExtentNode reads a node whose entries cover the logical blocks from from
// to to. depth is -1 for the root.
func (t *Tx) loadExtentNode(n *Inode, block int64, depth int, from, to int64) (*extentNode, error) {
	p, b := place{"extent tree", n.Ino, -1}, n.block()
	if block != 0 {
		p = place{"extent block", n.Ino, block}
		var err error
		if b, err = t.block(block); err != nil {
			return nil, err
		}
		if t.sb().hasCsum() {
			if err := verifyExtentBlock(p, t.sb(), n, b); err != nil {
				return nil, err
			}
		}
	}
	h, err := parseExtentHeader(p, b)
	switch {
	case err != nil:
		return nil, err
	case depth < 0 && h.depth > extentMaxDepth:
		return nil, p.corrupt("eh_depth", "%d, expected at most %d", h.depth, extentMaxDepth)
	case depth >= 0 && h.depth != depth:
		return nil, p.corrupt("eh_depth", "%d, expected %d", h.depth, depth)
	case h.max < extentRootMax:
		return nil, p.corrupt("eh_max", "%d, expected at least %d", h.max, extentRootMax)
	}
	x := &extentNode{block: block, depth: h.depth, max: h.max}
	if h.depth == 0 {
		x.list, err = parseExtents(p, b, h, from, to, t.sb())
		return x, err
	}
	m := &mapping{from: from, to: to}
	if _, err := findIndex(p, b, h, m, to, t.sb()); err != nil { // looks at all entries
		return nil, err
	}
	for i := range h.entries {
		logical, child := parseIndex(b[extentHeaderLen+i*extentLen:])
		x.list = append(x.list, extent{logical: logical, physical: child})
	}
	return x, nil
}

// extentPath returns the nodes from the root to the leaf that covers a logical
// block, or that would, and the block from which on another leaf does.
func (t *Tx) extentPath(n *Inode, logical int64) (path []*extentNode, end int64, err error) {
	from, end := int64(0), int64(maxLogical)
	x, err := t.loadExtentNode(n, 0, -1, from, end)
	for {
		if err != nil {
			return nil, 0, err
		}
		path = append(path, x)
		if x.depth == 0 {
			return path, end, nil
		}
		for x.at+1 < len(x.list) && x.list[x.at+1].logical <= logical {
			x.at++
		}
		if x.at > 0 {
			from = x.list[x.at].logical
		}
		if x.at+1 < len(x.list) {
			end = x.list[x.at+1].logical
		}
		x, err = t.loadExtentNode(n, x.list[x.at].physical, x.depth-1, from, end)
	}
}

// storeExtents writes a node of a path. Where there is no journal a block that
// is in use is left as it is, and another takes its place, so that a crash
// leaves one tree or the other.
func (t *Tx) storeExtents(n *Inode, path []*extentNode, level int) error {
	x := path[level]
	b := n.block()
	if x.block != 0 {
		var err error
		if s := t.staged[x.block]; t.e.journal == nil && (s == nil || !s.fresh) {
			old := x.block
			if x.block, err = t.allocMeta(n, old); err != nil {
				return err
			}
			if err := t.freeMeta(n, old); err != nil {
				return err
			}
			up := path[level-1]
			up.list[up.at].physical = x.block
			if err := t.storeExtents(n, path, level-1); err != nil {
				return err
			}
		}
		if b, err = t.edit(x.block); err != nil {
			return err
		}
	}
	putExtentHeader(b, len(x.list), x.max, x.depth)
	for i, e := range x.list {
		at := b[extentHeaderLen+i*extentLen:]
		if x.depth > 0 {
			putIndex(at, e.logical, e.physical)
			binary.LittleEndian.PutUint16(at[10:], 0)
			continue
		}
		putExtent(at, e)
		if e.unwritten {
			binary.LittleEndian.PutUint16(at[4:], uint16(e.len+extentMaxLen))
		}
	}
	tail := extentHeaderLen + x.max*extentLen
	clear(b[extentHeaderLen+len(x.list)*extentLen : tail])
	if x.block != 0 && t.sb().hasCsum() {
		s := t.sb()
		binary.LittleEndian.PutUint32(b[tail:], crc32c(s.inodeSeed(n.Ino, n.Generation), b[:tail]))
	}
	t.dirty(n)
	return nil
}

// fixKeys makes the entries that lead to a node begin where it begins.
func (t *Tx) fixKeys(n *Inode, path []*extentNode, level int) error {
	for ; level > 0; level-- {
		up, first := path[level-1], path[level].list[0].logical
		if up.list[up.at].logical == first {
			return nil
		}
		up.list[up.at].logical = first
		if err := t.storeExtents(n, path, level-1); err != nil {
			return err
		}
	}
	return nil
}

// joins reports whether b goes on where a ends, so that one extent can be both.
func (a extent) joins(b extent) bool {
	limit := int64(extentMaxLen)
	if a.unwritten {
		limit = extentUnwrittenMax
	}
	return a.logical+a.len == b.logical && a.physical+a.len == b.physical && a.unwritten == b.unwritten && a.len+b.len <= limit
}

// insertExtent adds an extent to a tree, where there is a hole.
func (t *Tx) insertExtent(n *Inode, e extent) error {
	for {
		path, _, err := t.extentPath(n, e.logical)
		if err != nil {
			return err
		}
		leaf, last := path[len(path)-1], len(path)-1
		i, _ := slices.BinarySearchFunc(leaf.list, e.logical, func(x extent, logical int64) int { return int(min(max(x.logical-logical, -1), 1)) })
		if i > 0 && leaf.list[i-1].logical+leaf.list[i-1].len > e.logical || i < len(leaf.list) && leaf.list[i].logical < e.logical+e.len {
			return place{"extent tree", n.Ino, -1}.corrupt("", "logical blocks from %d on are mapped twice", e.logical)
		}
		switch {
		case i > 0 && leaf.list[i-1].joins(e):
			leaf.list[i-1].len += e.len
			if i < len(leaf.list) && leaf.list[i-1].joins(leaf.list[i]) {
				leaf.list[i-1].len += leaf.list[i].len
				leaf.list = slices.Delete(leaf.list, i, i+1)
			}
		case i < len(leaf.list) && e.joins(leaf.list[i]):
			e.len += leaf.list[i].len
			leaf.list[i] = e
		case len(leaf.list) < leaf.max:
			leaf.list = slices.Insert(leaf.list, i, e)
		default:
			if err := t.splitExtents(n, path, i == len(leaf.list)); err != nil {
				return err
			}
			continue
		}
		if err := t.storeExtents(n, path, last); err != nil {
			return err
		}
		return t.fixKeys(n, path, last)
	}
}

// splitExtents makes room on the way to a leaf that is full: it divides the
// topmost of the nodes that are full down to the leaf, or makes the tree deeper
// where all are. atEnd says that what comes is the last of the leaf.
func (t *Tx) splitExtents(n *Inode, path []*extentNode, atEnd bool) error {
	k := len(path) - 2 // the deepest node with room
	for k >= 0 && len(path[k].list) >= path[k].max {
		k--
	}
	if k < 0 {
		return t.deepenExtents(n, path[0])
	}
	up, x := path[k], path[k+1]
	cut := len(x.list) / 2
	if k+1 < len(path)-1 {
		atEnd = x.at == len(x.list)-1
	}
	if atEnd { // files grow at their ends
		cut = len(x.list) - 1
	}
	block, err := t.allocMeta(n, x.block)
	if err != nil {
		return err
	}
	right := &extentNode{block: block, depth: x.depth, max: t.extentsPerBlock(), list: slices.Clone(x.list[cut:])}
	if err := t.storeExtents(n, []*extentNode{right}, 0); err != nil {
		return err
	}
	x.list = x.list[:cut]
	up.list = slices.Insert(up.list, up.at+1, extent{logical: right.list[0].logical, physical: block})
	if err := t.storeExtents(n, path, k+1); err != nil {
		return err
	}
	return t.storeExtents(n, path, k)
}

func (t *Tx) extentsPerBlock() int { return (t.sb().BlockSize - extentHeaderLen) / extentLen }

// deepenExtents moves the root's entries to a block.
func (t *Tx) deepenExtents(n *Inode, root *extentNode) error {
	if root.depth >= extentMaxDepth {
		return place{"extent tree", n.Ino, -1}.unsupported("eh_depth", "more than %d", extentMaxDepth)
	}
	block, err := t.allocMeta(n, 0)
	if err != nil {
		return err
	}
	child := &extentNode{block: block, depth: root.depth, max: t.extentsPerBlock(), list: root.list}
	if err := t.storeExtents(n, []*extentNode{child}, 0); err != nil {
		return err
	}
	root.depth++
	root.list = []extent{{logical: root.list[0].logical, physical: block}}
	return t.storeExtents(n, []*extentNode{root}, 0)
}

// removeExtents makes a hole of the logical blocks from from to to, and calls
// fn with what was there, ascending.
func (t *Tx) removeExtents(n *Inode, from, to int64, fn func(extent) error) error {
	for from < to {
		path, end, err := t.extentPath(n, from)
		if err != nil {
			return err
		}
		end = min(end, to)
		last := len(path) - 1
		leaf := path[last]
		removed := false
		for _, e := range leaf.list {
			lo, hi := max(e.logical, from), min(e.logical+e.len, end)
			if lo < hi {
				if err := fn(extent{lo, e.physical + lo - e.logical, hi - lo, e.unwritten}); err != nil {
					return err
				}
				removed = true
			}
		}
		if !removed {
			from = end
			continue
		}
		list := cutExtents(leaf.list, from, end)
		var rest *extent // the end of an extent whose midst goes, if there is no room for it
		if len(list) > leaf.max {
			i := slices.IndexFunc(list, func(e extent) bool { return e.logical >= end })
			rest = &extent{list[i].logical, list[i].physical, list[i].len, list[i].unwritten}
			list = slices.Delete(list, i, i+1)
		}
		leaf.list = list
		if len(list) == 0 && last > 0 {
			err = t.removeExtentNode(n, path, last)
		} else if err = t.storeExtents(n, path, last); err == nil && len(list) > 0 {
			err = t.fixKeys(n, path, last)
		}
		if err == nil && rest != nil {
			err = t.insertExtent(n, *rest)
		}
		if err != nil {
			return err
		}
		from = end
	}
	return t.flattenExtents(n)
}

// removeExtentNode frees a node that is empty.
func (t *Tx) removeExtentNode(n *Inode, path []*extentNode, level int) error {
	if err := t.freeMeta(n, path[level].block); err != nil {
		return err
	}
	up := path[level-1]
	up.list = slices.Delete(up.list, up.at, up.at+1)
	if len(up.list) == 0 {
		if level > 1 {
			return t.removeExtentNode(n, path, level-1)
		}
		up.depth = 0
	}
	if err := t.storeExtents(n, path, level-1); err != nil || len(up.list) == 0 {
		return err
	}
	// What is at the place now may begin elsewhere, which the nodes above say
	// only of the first.
	return t.fixKeys(n, path, level-1)
}

// flattenExtents takes levels away from a tree whose root has one entry, as
// long as what that leads to fits the root.
func (t *Tx) flattenExtents(n *Inode) error {
	for {
		root, err := t.loadExtentNode(n, 0, -1, 0, maxLogical)
		if err != nil || root.depth == 0 || len(root.list) > 1 {
			return err
		}
		child, err := t.loadExtentNode(n, root.list[0].physical, root.depth-1, root.list[0].logical, maxLogical)
		if err != nil || len(child.list) > root.max {
			return err
		}
		if err := t.freeMeta(n, child.block); err != nil {
			return err
		}
		root.depth, root.list = child.depth, child.list
		if err := t.storeExtents(n, []*extentNode{root}, 0); err != nil {
			return err
		}
	}
}

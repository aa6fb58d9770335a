package ext4img

import (
	"cmp"
	"encoding/binary"
	"slices"
	"sort"
)

// An indexed directory is an htree: block 0 is the root, then come the other
// index blocks level by level, then the leaves, which are ordinary directory
// blocks of entries in the order of their hashes (kernel:
// Documentation/filesystems/ext4/directory.rst, "Hash Tree Directories").
const (
	dxRootInfoOff = 24 // behind "." and ".."
	dxRootEntries = 32 // behind dx_root_info
	dxNodeEntries = 8  // behind the empty entry that hides the block
	dxEntryLen    = 8
	dxTailLen     = 8
)

// htreeLevels is how many levels of index blocks there may be below the root:
// one, and two with the large_dir feature.
const htreeLevels = 2

// htree is the plan of one indexed directory.
type htree struct {
	dir    uint32
	order  []hashed // entries by hash
	leaves []uint32 // index into order of the first entry of each leaf
	nodes  []int    // index blocks of each level below the root, top first
}

type hashed struct {
	hash  uint32
	entry uint32 // in Tree.entries; ownLostFoundEntry for the one that is not there
}

// ownLostFoundEntry stands for the entry of a lost+found that the tree lacks.
const ownLostFoundEntry = ^uint32(0)

func (l *Layout) entryName(entry uint32) []byte {
	if entry == ownLostFoundEntry {
		return []byte(lostFoundName)
	}
	return l.tree.name(l.tree.entries.at(entry))
}

// linearLen is the number of bytes that the entries of a directory need in a
// linear one.
func (l *Layout) linearLen(d uint32) int64 {
	n := int64(direntLen(1) + direntLen(2))
	dr := l.tree.dirs.at(d)
	for i := range dr.count {
		n += int64(direntLen(int(l.tree.entries.at(dr.first + i).len)))
	}
	if d == 0 && l.ownLostFound {
		n += int64(direntLen(len(lostFoundName)))
	}
	return n
}

// planHtree orders a directory that does not fit one block and packs it into
// leaves. An eighth of each leaf stays free for entries to come.
func (l *Layout) planHtree(d uint32) *htree {
	dr := l.tree.dirs.at(d)
	h := &htree{dir: d, order: make([]hashed, 0, dr.count+1)}
	for i := range dr.count {
		e := dr.first + i
		h.order = append(h.order, hashed{dirhash(l.entryName(e), &l.hashSeed), e})
	}
	if d == 0 && l.ownLostFound {
		h.order = append(h.order, hashed{dirhash([]byte(lostFoundName), &l.hashSeed), ownLostFoundEntry})
	}
	slices.SortFunc(h.order, func(a, b hashed) int {
		return cmp.Or(cmp.Compare(a.hash, b.hash), cmp.Compare(a.entry, b.entry))
	})

	capacity := int(l.geo.blockSize) - direntTailLen
	capacity -= capacity / 8
	used := capacity
	for i := range h.order {
		n := direntLen(len(l.entryName(h.order[i].entry)))
		if used+n > capacity {
			h.leaves = append(h.leaves, uint32(i))
			used = 0
		}
		used += n
	}

	limit := l.dxNodeLimit()
	for n := len(h.leaves); n > l.dxRootLimit(); {
		n = (n + limit - 1) / limit
		h.nodes = slices.Insert(h.nodes, 0, n)
	}
	return h
}

func (l *Layout) dxRootLimit() int {
	return (int(l.geo.blockSize) - dxRootEntries - dxTailLen) / dxEntryLen
}

func (l *Layout) dxNodeLimit() int {
	return (int(l.geo.blockSize) - dxNodeEntries - dxTailLen) / dxEntryLen
}

// blocks is the size of the directory.
func (h *htree) blocks() int64 {
	n := int64(1 + len(h.leaves))
	for _, level := range h.nodes {
		n += int64(level)
	}
	return n
}

// leafHash is the hash from which the index leads to a leaf. Its lowest bit
// tells that entries of the same hash begin in the leaf before.
func (h *htree) leafHash(leaf int) uint32 {
	first := h.leaves[leaf]
	hash := h.order[first].hash
	if first > 0 && h.order[first-1].hash == hash {
		hash |= 1
	}
	return hash
}

// putBlock writes one block of the directory.
func (h *htree) putBlock(l *Layout, block []byte, index int64) {
	ino := l.ino(l.tree.dirs.at(h.dir).inode)
	if index == 0 {
		h.putRoot(l, block, ino)
		return
	}
	at := int64(1) // first block of the level
	for level, n := range h.nodes {
		if index < at+int64(n) {
			putDirent(block, 0, len(block), nil, 0)
			h.putIndex(l, block, ino, dxNodeEntries, l.dxNodeLimit(), level+1, int(index-at))
			return
		}
		at += int64(n)
	}
	leaf := int(index - at)
	end := len(h.order)
	if leaf+1 < len(h.leaves) {
		end = int(h.leaves[leaf+1])
	}
	w := direntWriter{block: block}
	for _, e := range h.order[h.leaves[leaf]:end] {
		if e.entry == ownLostFoundEntry {
			w.add(lostFoundIno, []byte(lostFoundName), fileType(modeDir))
			continue
		}
		l.putEntry(&w, e.entry)
	}
	w.finish(l, ino)
}

func (h *htree) putRoot(l *Layout, block []byte, ino uint32) {
	parent := l.ino(l.tree.dirs.at(l.tree.dirs.at(h.dir).parent).inode)
	putDirent(block, ino, 12, []byte("."), fileType(modeDir))
	putDirent(block[12:], parent, len(block)-12, []byte(".."), fileType(modeDir))
	info := block[dxRootInfoOff:]
	info[4] = hashVersionHalfMD4
	info[5] = 8 // info_length
	info[6] = uint8(len(h.nodes))
	h.putIndex(l, block, ino, dxRootEntries, l.dxRootLimit(), 0, 0)
}

// putIndex writes the entries of the index block that is number index of its
// level (0: the root), and its checksum.
func (h *htree) putIndex(l *Layout, block []byte, ino uint32, off, limit, level, index int) {
	// What the entries lead to: the blocks of the next level, or the leaves.
	below, first := len(h.leaves), int64(1)
	for i, n := range h.nodes {
		if i == level {
			below = n
			break
		}
		first += int64(n)
	}
	// How many leaves one of them covers.
	perChild := 1
	for range len(h.nodes) - level {
		perChild *= l.dxNodeLimit()
	}
	from := index * l.dxNodeLimit() // the root has index 0
	count := min(limit, below-from)
	for i := range count {
		e := block[off+i*dxEntryLen:]
		if i > 0 {
			binary.LittleEndian.PutUint32(e, h.leafHash((from+i)*perChild))
		}
		binary.LittleEndian.PutUint32(e[4:], uint32(first+int64(from+i)))
	}
	binary.LittleEndian.PutUint16(block[off:], uint16(limit))
	binary.LittleEndian.PutUint16(block[off+2:], uint16(count))

	// The checksum covers the entries in use, and a tail whose checksum is 0
	// (kernel: fs/ext4/namei.c, ext4_dx_csum).
	crc := crc32c(l.inodeSeed(ino), block[:off+count*dxEntryLen])
	crc = crc32c(crc, make([]byte, dxTailLen))
	binary.LittleEndian.PutUint32(block[off+limit*dxEntryLen+4:], crc)
}

// maxHtreeLevels is the most index blocks on the way to a leaf: the root, one
// below it, and one more with the large_dir feature.
func (s *Superblock) maxHtreeLevels() int {
	if s.Incompat&IncompatLargedir != 0 {
		return 3
	}
	return 2
}

// dxNode is an index block: what its entries lead to. The first entry has no
// hash; it covers what is below the second's.
type dxNode struct {
	off   int // of the entries
	limit int
	count int
	b     []byte
}

func (d dxNode) entry(i int) (hash uint32, block int64) {
	e := d.b[d.off+i*dxEntryLen:]
	if i > 0 {
		hash = binary.LittleEndian.Uint32(e)
	}
	return hash, int64(binary.LittleEndian.Uint32(e[4:]) & 0x0fffffff)
}

// dxEntriesOff is where the entries of an index block begin; 0 for a block
// that has none. Where they begin also tells the root, whose "." has a rec_len
// of 12, from other index blocks.
func dxEntriesOff(b []byte) int {
	switch parseRecLen(b[4:], len(b)) {
	case 12:
		if parseRecLen(b[12+4:], len(b)) == len(b)-12 && b[dxRootInfoOff+5] == 8 {
			return dxRootEntries
		}
	case len(b):
		return dxNodeEntries
	}
	return 0
}

// parseDxNode reads an index block. Its entries lie inside of it.
func parseDxNode(p place, s *Superblock, b []byte) (dxNode, error) {
	d := dxNode{off: dxEntriesOff(b), b: b}
	if d.off == 0 {
		return d, p.corrupt("", "is no index block")
	}
	d.limit = int(binary.LittleEndian.Uint16(b[d.off:]))
	d.count = int(binary.LittleEndian.Uint16(b[d.off+2:]))
	fit := len(b) - d.off
	if s.hasCsum() {
		fit -= dxTailLen
	}
	if d.limit > fit/dxEntryLen {
		return d, p.corrupt("limit", "%d, expected at most %d", d.limit, fit/dxEntryLen)
	}
	if d.count < 1 || d.count > d.limit {
		return d, p.corrupt("count", "%d, expected 1 to %d", d.count, d.limit)
	}
	return d, nil
}

// dxChecksum is what the checksum of an index block has to be: of the entries
// in use, and of a tail whose checksum is 0 (kernel: fs/ext4/namei.c,
// ext4_dx_csum).
func dxChecksum(s *Superblock, n *Inode, d dxNode) uint32 {
	crc := crc32c(s.inodeSeed(n.Ino, n.Generation), d.b[:d.off+d.count*dxEntryLen])
	tail := d.off + d.limit*dxEntryLen
	crc = crc32c(crc, d.b[tail:tail+4])
	return crc32c(crc, make([]byte, 4))
}

// verifyDxBlock compares an index block with its checksum.
func verifyDxBlock(p place, s *Superblock, n *Inode, b []byte) error {
	d, err := parseDxNode(p, s, b)
	if err != nil {
		return err
	}
	want := dxChecksum(s, n, d)
	if found := binary.LittleEndian.Uint32(b[d.off+d.limit*dxEntryLen+4:]); found != want {
		return p.checksum(found, want)
	}
	return nil
}

// dxRoot is the root of an index.
type dxRoot struct {
	dxNode
	version int // of the hash, hashUnsigned added where the superblock says so
	levels  int // of index blocks below the root
}

// parseDxRoot reads block 0 of an indexed directory.
func parseDxRoot(p place, s *Superblock, b []byte) (dxRoot, error) {
	node, err := parseDxNode(p, s, b)
	if err != nil {
		return dxRoot{}, err
	}
	if node.off != dxRootEntries {
		return dxRoot{}, p.corrupt("", "is no root of an index")
	}
	info := b[dxRootInfoOff:]
	r := dxRoot{node, int(info[4]), int(info[6])}
	switch {
	case info[7]&1 != 0:
		return r, p.corrupt("unused_flags", "%#x", info[7])
	case r.levels >= s.maxHtreeLevels():
		return r, p.corrupt("indirect_levels", "%d, expected less than %d", r.levels, s.maxHtreeLevels())
	}
	if r.version <= hashVersionTEA && s.Flags&unsignedHash != 0 {
		r.version += hashUnsigned
	}
	return r, nil
}

// dxStep is an index block on the way to a leaf: where it lies in the
// directory, and which of its entries leads on.
type dxStep struct {
	dxNode
	logical int64
	at      int
}

// dxPath returns the index blocks from the root of a directory to the leaf in
// which a hash begins, and the root.
func (f *FS) dxPath(n *Inode, name string) (root dxRoot, hash uint32, path []dxStep, err error) {
	b, block, err := f.dirBlockAt(n, 0)
	if err != nil {
		return root, 0, nil, err
	}
	p := place{"htree root", n.Ino, block}
	if root, err = parseDxRoot(p, f.sb, b); err != nil {
		return root, 0, nil, err
	}
	hash, ok := dirhashVersion(root.version, []byte(name), &f.sb.HashSeed)
	if !ok {
		return root, 0, nil, p.unsupported("hash_version", "%d", root.version)
	}
	path = []dxStep{{root.dxNode, 0, 0}}
	for i := 0; ; i++ {
		s := &path[i]
		s.at = sort.Search(s.count-1, func(k int) bool { h, _ := s.entry(k + 1); return h > hash })
		if i == root.levels {
			return root, hash, path, nil
		}
		child, err := f.dxChild(n, s.dxNode, s.at)
		if err != nil {
			return root, 0, nil, err
		}
		_, logical := s.entry(s.at)
		path = append(path, dxStep{child, logical, 0})
	}
}

// dxFind looks a name up by the index of a directory, and returns the block of
// the directory that it is in, too. It returns nil where there is no such entry.
func (f *FS) dxFind(n *Inode, name string) (*dirEntry, int64, error) {
	root, hash, path, err := f.dxPath(n, name)
	if err != nil {
		return nil, 0, err
	}
	// Leaves of the hash follow each other as long as the lowest bit of the
	// next one's hash says so; the way to the next one can lead up.
	for range n.Size / int64(f.sb.BlockSize) { // each leaf once
		_, logical := path[root.levels].entry(path[root.levels].at)
		b, block, err := f.leafAt(n, path, logical)
		if err != nil {
			return nil, 0, err
		}
		d, err := findDirent(place{"directory block", n.Ino, block}, f.sb, b, name)
		if d != nil || err != nil {
			return d, logical, err
		}
		i := root.levels
		for i >= 0 && path[i].at+1 == path[i].count {
			i--
		}
		if i < 0 {
			return nil, 0, nil
		}
		path[i].at++
		if h, _ := path[i].entry(path[i].at); h != hash|1 {
			return nil, 0, nil
		}
		for ; i < root.levels; i++ {
			child, err := f.dxChild(n, path[i].dxNode, path[i].at)
			if err != nil {
				return nil, 0, err
			}
			_, logical := path[i].entry(path[i].at)
			path[i+1] = dxStep{child, logical, 0}
		}
	}
	return nil, 0, place{"htree root", n.Ino, -1}.corrupt("", "has more leaves of one hash than the directory has blocks")
}

// leafAt reads the leaf that the index blocks of a path lead to, or a block of a
// directory without index, whose path is empty. Without
// checksums a leaf whose entries were all removed looks like an index block.
func (f *FS) leafAt(n *Inode, path []dxStep, logical int64) (b []byte, block int64, err error) {
	b, block, err = f.dirBlockAt(n, logical)
	if err != nil {
		return nil, 0, err
	}
	index := len(path) > 0 && f.sb.hasCsum() && isDxBlock(b, logical)
	for i := range path {
		index = index || path[i].logical == logical
	}
	if index {
		return nil, 0, place{"htree", n.Ino, block}.corrupt("block", "%d of a leaf is part of the index", logical)
	}
	return b, block, nil
}

// dxChild reads the index block that an entry leads to.
func (f *FS) dxChild(n *Inode, d dxNode, i int) (dxNode, error) {
	_, logical := d.entry(i)
	b, block, err := f.dirBlockAt(n, logical)
	if err != nil {
		return dxNode{}, err
	}
	p := place{"htree node", n.Ino, block}
	child, err := parseDxNode(p, f.sb, b)
	if err == nil && child.off != dxNodeEntries {
		err = p.corrupt("", "is no node of an index")
	}
	return child, err
}

// dirBlockAt reads the block of a directory that has that logical number.
func (f *FS) dirBlockAt(n *Inode, logical int64) (b []byte, block int64, err error) {
	p := place{"directory", n.Ino, -1}
	if end := n.Size / int64(f.sb.BlockSize); logical >= end {
		return nil, 0, p.corrupt("", "has %d blocks, and its index leads to block %d", end, logical)
	}
	m, err := f.mapping(n, logical)
	if err != nil {
		return nil, 0, err
	}
	e := m.at(logical)
	if e.physical == 0 || e.unwritten {
		return nil, 0, p.corrupt("", "has a hole at its block %d", logical)
	}
	b, err = f.dirBlock(n, logical, e.physical)
	return b, e.physical, err
}

// findDirent returns the entry of a block that has a name, or nil.
func findDirent(p place, s *Superblock, b []byte, name string) (*dirEntry, error) {
	var found *dirEntry
	err := eachDirent(p, s, b, func(d dirEntry) bool {
		if string(d.name) == name {
			e := d // what does not match needs no memory
			found = &e
		}
		return found == nil
	})
	return found, err
}

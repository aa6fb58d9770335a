package ext4img

import (
	"cmp"
	"encoding/binary"
	"slices"
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

package ext4img

import "encoding/binary"

const maxNameLen = 255 // EXT4_NAME_LEN

// direntTailLen is the entry at the end of a directory block that holds its
// checksum (kernel: fs/ext4/ext4.h, struct ext4_dir_entry_tail).
const direntTailLen = 12

// direntLen is the least rec_len of an entry.
func direntLen(nameLen int) int { return 8 + pad4(nameLen) }

// putDirent writes an entry that takes recLen bytes.
func putDirent(b []byte, ino uint32, recLen int, name []byte, ftype uint8) {
	binary.LittleEndian.PutUint32(b, ino)
	putRecLen(b[4:], recLen)
	b[6] = uint8(len(name))
	b[7] = ftype
	copy(b[8:], name)
}

// putRecLen writes a rec_len, which is at most 4096 here.
func putRecLen(b []byte, n int) { binary.LittleEndian.PutUint16(b, uint16(n)) }

// direntWriter packs entries into one directory block.
type direntWriter struct {
	block []byte
	at    int // where the next entry goes
	last  int // where the last entry began
}

func (w *direntWriter) add(ino uint32, name []byte, ftype uint8) {
	n := direntLen(len(name))
	putDirent(w.block[w.at:], ino, n, name, ftype)
	w.last = w.at
	w.at += n
}

// finish stretches the last entry to the tail and writes the tail, whose
// checksum covers the block and the directory's inode number.
func (w *direntWriter) finish(l *Layout, ino uint32) {
	end := len(w.block) - direntTailLen
	putRecLen(w.block[w.last+4:], end-w.last)
	tail := w.block[end:]
	clear(tail)
	putRecLen(tail[4:], direntTailLen)
	tail[7] = 0xde // EXT4_FT_DIR_CSUM
	binary.LittleEndian.PutUint32(tail[8:], crc32c(l.inodeSeed(ino), w.block[:end]))
}

// putLinearDir writes a directory of one block, entries by name.
func (l *Layout) putLinearDir(block []byte, d uint32) {
	dr := l.tree.dirs.at(d)
	ino := l.ino(dr.inode)
	w := direntWriter{block: block}
	w.add(ino, []byte("."), fileType(modeDir))
	w.add(l.ino(l.tree.dirs.at(dr.parent).inode), []byte(".."), fileType(modeDir))
	for i := range dr.count {
		l.putEntry(&w, dr.first+i)
	}
	if d == 0 && l.ownLostFound {
		w.add(lostFoundIno, []byte(lostFoundName), fileType(modeDir))
	}
	w.finish(l, ino)
}

// putEntry writes an entry of the tree.
func (l *Layout) putEntry(w *direntWriter, entry uint32) {
	e := l.tree.entries.at(entry)
	w.add(l.ino(e.inode), l.tree.name(e), fileType(l.tree.inodes.at(e.inode).mode))
}

const lostFoundName = "lost+found"

// putLostFound writes a block of the lost+found directory of a tree that has
// none of its own: empty, with room for e2fsck to work in without allocating.
func (l *Layout) putLostFound(block []byte, index int64) {
	w := direntWriter{block: block}
	if index == 0 {
		w.add(lostFoundIno, []byte("."), fileType(modeDir))
		w.add(rootIno, []byte(".."), fileType(modeDir))
	} else {
		w.add(0, nil, 0)
	}
	w.finish(l, lostFoundIno)
}

// fileType is the file_type of a directory entry for a mode.
func fileType(mode uint16) uint8 {
	switch mode & modeType {
	case modeReg:
		return 1
	case modeDir:
		return 2
	case modeChar:
		return 3
	case modeBlock:
		return 4
	case modeFifo:
		return 5
	case modeSocket:
		return 6
	case modeLink:
		return 7
	}
	return 0
}

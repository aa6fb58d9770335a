package ext4img

import (
	"encoding/binary"
	"iter"
)

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

// putRecLen writes a rec_len, which is at most 4096 here; see putRecLenIn.
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

// FileType is the file_type of a directory entry.
type FileType uint8

// Types of files as directory entries have them. A file system without the
// filetype feature has TypeUnknown alone.
const (
	TypeUnknown FileType = iota
	TypeRegular
	TypeDir
	TypeChar
	TypeBlock
	TypeFifo
	TypeSocket
	TypeSymlink
)

// Dirent is an entry of a directory.
type Dirent struct {
	Ino  Ino
	Type FileType // as the entry says, which the inode need not agree with
	Name string   // any bytes but NUL and slash, at most 255
}

// dirEntry is an entry as it lies in a block.
type dirEntry struct {
	ino    Ino
	recLen int
	name   []byte // in the block
	ftype  uint8
	off    int // in the block
}

// parseDirent reads the entry at off of a directory block, whose end its
// rec_len does not exceed.
func parseDirent(p place, s *Superblock, b []byte, off int) (dirEntry, error) {
	if len(b)-off < 8 {
		return dirEntry{}, p.corrupt("rec_len", "leaves %d bytes at the end of the block", len(b)-off)
	}
	e := b[off:]
	d := dirEntry{ino: Ino(binary.LittleEndian.Uint32(e)), recLen: parseRecLen(e[4:], len(b)), off: off}
	nameLen := int(e[6])
	if s.Incompat&IncompatFiletype != 0 {
		d.ftype = e[7]
	} else {
		nameLen |= int(e[7]) << 8
	}
	switch {
	case d.recLen < 8 || d.recLen%4 != 0 || d.recLen > len(e):
		return d, p.corrupt("rec_len", "%d at offset %d, expected a multiple of 4 up to %d", d.recLen, off, len(e))
	case d.ino == 0:
		return d, nil
	case direntLen(nameLen) > d.recLen || nameLen == 0 || nameLen > maxNameLen:
		return d, p.corrupt("name_len", "%d at offset %d, and rec_len is %d", nameLen, off, d.recLen)
	case uint32(d.ino) > s.InodesCount:
		return d, p.corrupt("inode", "%d at offset %d, and there are %d", d.ino, off, s.InodesCount)
	}
	d.name = e[8 : 8+nameLen]
	for _, c := range d.name {
		if c == 0 || c == '/' {
			return d, p.corrupt("name", "%q at offset %d", d.name, off)
		}
	}
	return d, nil
}

// parseRecLen reads a rec_len, which in blocks of 64 KiB and more has two more
// bits in its low end (kernel: fs/ext4/ext4.h, ext4_rec_len_from_disk).
func parseRecLen(b []byte, blockSize int) int {
	n := int(binary.LittleEndian.Uint16(b))
	if blockSize < 64<<10 {
		return n
	}
	if n == 0xffff || n == 0 {
		return blockSize
	}
	return n&^3 | n&3<<16
}

// putRecLenIn writes a rec_len of a block of any size (kernel: fs/ext4/ext4.h,
// ext4_rec_len_to_disk).
func putRecLenIn(b []byte, n, blockSize int) {
	switch {
	case n < 64<<10:
		putRecLen(b, n)
	default: // the whole of a block of 64 KiB
		putRecLen(b, 0xffff)
	}
}

// eachDirent calls fn with the entries of a directory block that are in use.
// fn returns false to stop.
func eachDirent(p place, s *Superblock, b []byte, fn func(dirEntry) bool) error {
	for off := 0; off < len(b); {
		d, err := parseDirent(p, s, b, off)
		if err != nil {
			return err
		}
		if d.ino != 0 && !fn(d) {
			return nil
		}
		off += d.recLen
	}
	return nil
}

// direntTail returns the checksum of a directory block; ok is false for a
// block that has none.
func direntTail(b []byte) (sum uint32, ok bool) {
	le := binary.LittleEndian
	t := b[len(b)-direntTailLen:]
	if le.Uint32(t) != 0 || le.Uint16(t[4:]) != direntTailLen || le.Uint16(t[6:]) != 0xde00 {
		return 0, false
	}
	return le.Uint32(t[8:]), true
}

// isDxBlock reports whether a block of an indexed directory is part of the
// index.
func isDxBlock(b []byte, logical int64) bool {
	return logical == 0 || binary.LittleEndian.Uint32(b) == 0 && parseRecLen(b[4:], len(b)) == len(b)
}

// dirBlock reads a block of a directory and verifies its checksum.
func (f *FS) dirBlock(n *Inode, logical, block int64) ([]byte, error) {
	b, err := f.block(block)
	if err != nil || !f.sb.hasCsum() || f.ignoreChecksums {
		return b, err
	}
	if n.Flags&indexFl != 0 && isDxBlock(b, logical) {
		return b, verifyDxBlock(place{"htree block", n.Ino, block}, f.sb, n, b)
	}
	return b, verifyDirBlock(place{"directory block", n.Ino, block}, f.sb, n, b)
}

// verifyDirBlock compares a block of entries with its checksum.
func verifyDirBlock(p place, s *Superblock, n *Inode, b []byte) error {
	found, ok := direntTail(b)
	if !ok {
		return &FormatError{p.name, p.ino, p.block, "", "has no entry with a checksum at its end", ErrChecksum}
	}
	if want := crc32c(s.inodeSeed(n.Ino, n.Generation), b[:len(b)-direntTailLen]); found != want {
		return p.checksum(found, want)
	}
	return nil
}

// Entries returns the entries of a directory in the order in which they lie
// there, without "." and "..". What cannot be read is an error in their midst,
// and the entries of the other blocks follow; only where there can be none is
// the error the last. Names are those of the directory: two entries can have
// the same one in a damaged directory.
func (f *FS) Entries(dir Ino) iter.Seq2[Dirent, error] {
	return func(yield func(Dirent, error) bool) {
		n, err := f.dir(dir)
		if err != nil {
			yield(Dirent{}, err)
			return
		}
		f.eachEntry(n, yield)
	}
}

// dir reads the inode of a directory whose names can be read.
func (f *FS) dir(ino Ino) (*Inode, error) {
	n, err := f.Inode(ino)
	switch {
	case err != nil:
		return nil, err
	case !n.IsDir():
		return nil, ErrNotDir
	case n.Flags&encryptFl != 0:
		return nil, &FormatError{"names", n.Ino, -1, "", "are encrypted", ErrEncrypted}
	}
	return n, nil
}

// eachEntry yields the entries of a directory.
func (f *FS) eachEntry(n *Inode, yield func(Dirent, error) bool) {
	if d := f.fc.dir(n.Ino); d != nil {
		f.eachFCEntry(n, d, yield)
		return
	}
	f.eachStoredEntry(n, yield)
}

// eachFCEntry yields the entries of a directory that fast commits change.
func (f *FS) eachFCEntry(n *Inode, d *fcDir, yield func(Dirent, error) bool) {
	more := true
	if !d.created {
		f.eachStoredEntry(n, func(e Dirent, err error) bool {
			if _, changed := d.names[e.Name]; !changed || err != nil {
				more = yield(e, err)
			}
			return more
		})
	}
	for _, name := range d.order {
		if e := d.names[name]; more && e.Ino != 0 {
			more = yield(e, nil)
		}
	}
}

// eachStoredEntry yields the entries of a directory as its blocks have them.
func (f *FS) eachStoredEntry(n *Inode, yield func(Dirent, error) bool) {
	more := true
	entries := func(p place, b []byte) {
		err := eachDirent(p, f.sb, b, func(d dirEntry) bool {
			if name := string(d.name); name != "." && name != ".." {
				more = yield(Dirent{d.ino, FileType(d.ftype), name}, nil)
			}
			return more
		})
		if err != nil && more {
			more = yield(Dirent{}, err)
		}
	}
	if n.Flags&inlineDataFl != 0 {
		f.eachInlineDirPart(n, entries, func(err error) { more = yield(Dirent{}, err) })
		return
	}
	f.eachDirBlock(n, func(logical, block int64, b []byte, err error) bool {
		if err != nil {
			more = yield(Dirent{}, err)
		} else {
			entries(place{"directory block", n.Ino, block}, b)
		}
		return more
	})
}

// eachDirBlock calls fn with every block of a directory that is not inline,
// or with an error in its place: one for all blocks of a hole, or of a part of
// the map that cannot be read. fn returns false to stop.
func (f *FS) eachDirBlock(n *Inode, fn func(logical, block int64, b []byte, err error) bool) {
	bs := int64(f.sb.BlockSize)
	end := min(n.Size/bs, maxLogical) // at most the blocks of the file system: parseInode
	for logical := int64(0); logical < end; {
		m, err := f.mapping(n, logical)
		if err != nil {
			fn(logical, 0, nil, err)
			return
		}
		for ; logical < min(m.to, end); logical++ {
			e := m.at(logical)
			if e.physical == 0 || e.unwritten {
				err := place{"directory", n.Ino, -1}.corrupt("", "has a hole of %d blocks at its block %d", e.len, logical)
				logical += e.len - 1
				if !fn(logical, 0, nil, err) {
					return
				}
				continue
			}
			b, err := f.dirBlock(n, logical, e.physical)
			if !fn(logical, e.physical, b, err) {
				return
			}
		}
	}
}

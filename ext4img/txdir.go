package ext4img

import (
	"encoding/binary"
	"fmt"
	"io/fs"
)

// dirRoom is what a transaction knows of the room in a linear directory: no
// block below from has room for an entry of need bytes.
type dirRoom struct {
	from int64
	need int
}

// addEntry adds an entry to a directory that has none of that name: where the
// index leads to, or in the first block that has room. A directory that gets
// its second block gets an index, as the kernel has it (kernel: fs/ext4/namei.c,
// ext4_add_entry).
func (t *Tx) addEntry(dir *Inode, name string, ino Ino, ft uint8) error {
	switch {
	case dir.Flags&inlineDataFl != 0:
		return t.addInlineEntry(dir, name, ino, ft)
	case dir.Flags&indexFl == 0:
		return t.addLinearEntry(dir, name, ino, ft)
	case t.sb().Compat&CompatDirIndex == 0:
		return place{"directory", dir.Ino, -1}.corrupt("i_flags", "%#x: has an index, and the file system no dir_index", dir.Flags)
	}
	return t.addIndexedEntry(dir, name, ino, ft)
}

func (t *Tx) addLinearEntry(dir *Inode, name string, ino Ino, ft uint8) error {
	bs := int64(t.sb().BlockSize)
	need := direntLen(len(name))
	known := t.dirRooms[dir.Ino]
	at := int64(0)
	if known.need > 0 && need >= known.need {
		at = known.from
	}
	blocks := dir.Size / bs
	for ; at < blocks; at++ {
		done, err := t.addToBlock(dir, at, nil, name, ino, ft)
		if err != nil {
			return err
		}
		if done {
			break
		}
	}
	if at == blocks {
		if blocks == 1 && t.canIndex() {
			if err := t.makeIndex(dir); err != nil {
				return err
			}
			return t.addIndexedEntry(dir, name, ino, ft)
		}
		_, block, err := t.appendBlock(dir)
		if err != nil {
			return err
		}
		b, err := t.edit(block)
		if err != nil {
			return err
		}
		t.packEntries(dir, b, nil)
		t.insert(b[:t.entriesEnd()], name, ino, ft)
		t.sumDirBlock(dir, b)
	}
	if t.dirRooms == nil {
		t.dirRooms = map[Ino]dirRoom{}
	}
	t.dirRooms[dir.Ino] = dirRoom{at, need}
	return nil
}

// addToBlock adds an entry to a block of a directory, if that has room. path is
// that of the index to it.
func (t *Tx) addToBlock(dir *Inode, logical int64, path []dxStep, name string, ino Ino, ft uint8) (bool, error) {
	b, _, err := t.entriesAt(dir, logical, path)
	if err != nil {
		return false, err
	}
	if t.room(b[:t.entriesEnd()], direntLen(len(name))) < 0 {
		return false, nil
	}
	if b, _, err = t.dirBlock(dir, logical); err != nil {
		return false, err
	}
	t.insert(b[:t.entriesEnd()], name, ino, ft)
	t.sumDirBlock(dir, b)
	return true, nil
}

// entriesAt reads a block of entries, which are sound. It is not to be changed.
func (t *Tx) entriesAt(dir *Inode, logical int64, path []dxStep) (b []byte, block int64, err error) {
	if b, block, err = t.fs.leafAt(dir, path, logical); err == nil {
		err = eachDirent(place{"directory block", dir.Ino, block}, t.sb(), b, func(dirEntry) bool { return true })
	}
	return b, block, err
}

// entriesEnd is where the entries of a block end, and the checksum begins.
func (t *Tx) entriesEnd() int {
	if s := t.sb(); s.hasCsum() {
		return s.BlockSize - direntTailLen
	}
	return t.sb().BlockSize
}

// room returns where in an area of sound entries there is room for one of need
// bytes, -1 for nowhere: the offset of an entry that has it.
func (t *Tx) room(area []byte, need int) int {
	for off := 0; off < len(area); {
		rec := parseRecLen(area[off+4:], t.sb().BlockSize)
		if rec-direntUsed(area[off:]) >= need {
			return off
		}
		off += rec
	}
	return -1
}

// direntUsed is how many bytes of its rec_len an entry needs.
func direntUsed(e []byte) int {
	if binary.LittleEndian.Uint32(e) == 0 {
		return 0
	}
	return direntLen(int(e[6]))
}

// insert adds an entry to an area of sound entries, and reports whether there
// was room.
func (t *Tx) insert(area []byte, name string, ino Ino, ft uint8) bool {
	bs := t.sb().BlockSize
	off := t.room(area, direntLen(len(name)))
	if off < 0 {
		return false
	}
	rec := parseRecLen(area[off+4:], bs)
	if used := direntUsed(area[off:]); used > 0 {
		putRecLenIn(area[off+4:], used, bs)
		off, rec = off+used, rec-used
	}
	t.put(area[off:], ino, rec, name, ft)
	return true
}

// put writes an entry that takes rec bytes.
func (t *Tx) put(b []byte, ino Ino, rec int, name string, ft uint8) {
	putDirent(b, uint32(ino), 0, []byte(name), ft)
	putRecLenIn(b[4:], rec, t.sb().BlockSize)
}

// packEntries fills a block with entries one behind the other, of which the
// last one takes what is left, and its checksum.
func (t *Tx) packEntries(dir *Inode, b []byte, list []leafEntry) {
	s := t.sb()
	end := t.entriesEnd()
	clear(b)
	at, last := 0, 0
	for _, e := range list {
		last = at
		copy(b[at:], e.raw)
		putRecLenIn(b[at+4:], len(e.raw), s.BlockSize)
		at += len(e.raw)
	}
	putRecLenIn(b[last+4:], end-last, s.BlockSize)
	if s.hasCsum() {
		tail := b[end:]
		putRecLen(tail[4:], direntTailLen)
		tail[7] = 0xde // EXT4_FT_DIR_CSUM
	}
	t.sumDirBlock(dir, b)
}

// sumDirBlock makes the checksum of a block of entries right.
func (t *Tx) sumDirBlock(dir *Inode, b []byte) {
	if s := t.sb(); s.hasCsum() {
		end := len(b) - direntTailLen
		binary.LittleEndian.PutUint32(b[end+8:], crc32c(s.inodeSeed(dir.Ino, dir.Generation), b[:end]))
	}
}

// changeEntry calls fn with the area that holds an entry, and with the offsets
// of that and of the one before it in the same area; -1 if it is the first.
func (t *Tx) changeEntry(dir *Inode, name string, fn func(area []byte, before, off int)) error {
	if dir.Flags&inlineDataFl != 0 {
		return t.changeInlineEntry(dir, name, fn)
	}
	logical, err := t.findEntry(dir, name)
	if err != nil {
		return err
	}
	b, block, err := t.dirBlock(dir, logical)
	if err != nil {
		return err
	}
	before, off, err := entryIn(place{"directory block", dir.Ino, block}, t.sb(), b, name)
	if err != nil {
		return err
	}
	fn(b, before, off)
	t.sumDirBlock(dir, b)
	return nil
}

// findEntry returns the block of a directory that has an entry of that name.
func (t *Tx) findEntry(dir *Inode, name string) (logical int64, err error) {
	if dir.Flags&indexFl != 0 && t.sb().Compat&CompatDirIndex != 0 {
		d, logical, err := t.fs.dxFind(dir, name)
		if d == nil && err == nil {
			err = fs.ErrNotExist
		}
		return logical, err
	}
	found := false
	t.fs.eachDirBlock(dir, func(l, block int64, b []byte, e error) bool {
		if err = e; err != nil {
			return false
		}
		var d *dirEntry
		if d, err = findDirent(place{"directory block", dir.Ino, block}, t.sb(), b, name); d != nil {
			logical, found = l, true
		}
		return err == nil && !found
	})
	if err == nil && !found {
		err = fs.ErrNotExist
	}
	return logical, err
}

// entryIn finds an entry in an area, and the one before it, in use or not.
func entryIn(p place, s *Superblock, area []byte, name string) (before, off int, err error) {
	before = -1
	for off < len(area) {
		d, err := parseDirent(p, s, area, off)
		if err != nil {
			return 0, 0, err
		}
		if d.ino != 0 && string(d.name) == name {
			return before, off, nil
		}
		before = off
		off += d.recLen
	}
	return 0, 0, fs.ErrNotExist
}

// removeEntry takes an entry out of a directory: the one before it takes its
// room (kernel: fs/ext4/namei.c, ext4_generic_delete_entry).
func (t *Tx) removeEntry(dir *Inode, name string) error {
	delete(t.dirRooms, dir.Ino)
	bs := t.sb().BlockSize
	return t.changeEntry(dir, name, func(area []byte, before, off int) {
		if before < 0 {
			binary.LittleEndian.PutUint32(area[off:], 0)
			return
		}
		rec := parseRecLen(area[off+4:], bs)
		clear(area[off : off+direntUsed(area[off:])])
		putRecLenIn(area[before+4:], parseRecLen(area[before+4:], bs)+rec, bs)
	})
}

// setEntry makes an entry lead to another inode.
func (t *Tx) setEntry(dir *Inode, name string, ino Ino, ft uint8) error {
	return t.changeEntry(dir, name, func(area []byte, _, off int) {
		binary.LittleEndian.PutUint32(area[off:], uint32(ino))
		area[off+7] = ft
	})
}

// initDir makes a new directory an empty one: in the inode with the inline_data
// feature, else in its first block.
func (t *Tx) initDir(n *Inode, parent Ino) error {
	if room := xattrEntryLen + pad4(len("data")); t.sb().Incompat&IncompatInlineData != 0 && n.xattrRoom() >= room {
		return t.initInlineDir(n, parent)
	}
	return t.initDirBlock(n, parent)
}

// initInlineDir makes a new directory one that lies in its inode (kernel:
// fs/ext4/inline.c, ext4_try_create_inline_dir).
func (t *Tx) initInlineDir(n *Inode, parent Ino) error {
	n.Flags = n.Flags&^extentsFl | inlineDataFl
	n.Size = inodeBlockLen
	b := n.block()
	clear(b)
	binary.LittleEndian.PutUint32(b, uint32(parent))
	putRecLen(b[inlineDirParentLen+4:], len(b)-inlineDirParentLen)
	return t.setXattr(n, xattrSystem, "data", "")
}

func (t *Tx) initDirBlock(n *Inode, parent Ino) error {
	_, block, err := t.appendBlock(n)
	if err != nil {
		return err
	}
	b, err := t.edit(block)
	if err != nil {
		return err
	}
	t.packEntries(n, b, nil)
	end, ft := t.entriesEnd(), t.entryType(n)
	t.put(b, n.Ino, direntLen(1), ".", ft)
	t.put(b[direntLen(1):], parent, end-direntLen(1), "..", ft)
	t.sumDirBlock(n, b)
	return nil
}

// setParent makes ".." of a directory lead to another one.
func (t *Tx) setParent(dir *Inode, parent Ino) error {
	if dir.Flags&inlineDataFl != 0 {
		binary.LittleEndian.PutUint32(dir.block(), uint32(parent))
		t.dirty(dir)
		return nil
	}
	stored, block, err := t.fs.dirBlockAt(dir, 0)
	if err != nil {
		return err
	}
	p := place{"directory block", dir.Ino, block}
	d, err := parseDirent(p, t.sb(), stored, 0)
	if err == nil {
		d, err = parseDirent(p, t.sb(), stored, d.recLen)
	}
	if err == nil && string(d.name) != ".." {
		err = p.corrupt("name", `%q of the second entry, expected ".."`, d.name)
	}
	if err != nil {
		return err
	}
	b, _, err := t.dirBlock(dir, 0)
	if err != nil {
		return err
	}
	binary.LittleEndian.PutUint32(b[d.off:], uint32(parent))
	if dir.Flags&indexFl != 0 {
		return t.sumDxBlock(dir, b)
	}
	t.sumDirBlock(dir, b)
	return nil
}

// dirEmpty reports whether a directory has no entries but "." and "..".
func (t *Tx) dirEmpty(n *Inode) (bool, error) {
	for _, err := range t.fs.Entries(n.Ino) {
		return false, err
	}
	return true, nil
}

// inlineParts returns the two parts of a directory that lies in its inode, as
// they are in it: entries that are sound.
func (t *Tx) inlineParts(dir *Inode) ([][]byte, error) {
	rest, err := t.fs.inlineRest(dir)
	if err != nil {
		return nil, err
	}
	parts := [][]byte{dir.block()[inlineDirParentLen:]}
	if len(rest) > 0 {
		parts = append(parts, rest)
	}
	for _, b := range parts {
		if err := eachDirent(place{"inline directory", dir.Ino, -1}, t.sb(), b, func(dirEntry) bool { return true }); err != nil {
			return nil, err
		}
	}
	return parts, nil
}

func (t *Tx) addInlineEntry(dir *Inode, name string, ino Ino, ft uint8) error {
	parts, err := t.inlineParts(dir)
	if err != nil {
		return err
	}
	for _, b := range parts {
		if t.insert(b, name, ino, ft) {
			t.dirty(dir)
			return nil
		}
	}
	// It becomes a directory of one block.
	var list []Dirent
	for _, b := range parts {
		err := eachDirent(place{}, t.sb(), b, func(d dirEntry) bool {
			list = append(list, Dirent{d.ino, FileType(d.ftype), string(d.name)})
			return true
		})
		if err != nil {
			return err
		}
	}
	parent := inlineDirParent(dir)
	if err := t.leaveInline(dir); err != nil {
		return err
	}
	dir.Size = 0
	if err := t.initDirBlock(dir, parent); err != nil {
		return err
	}
	for _, e := range append(list, Dirent{ino, FileType(ft), name}) {
		if err := t.addEntry(dir, e.Name, e.Ino, uint8(e.Type)); err != nil {
			return err
		}
	}
	return nil
}

func (t *Tx) changeInlineEntry(dir *Inode, name string, fn func(area []byte, before, off int)) error {
	parts, err := t.inlineParts(dir)
	if err != nil {
		return err
	}
	for _, b := range parts {
		before, off, err := entryIn(place{"inline directory", dir.Ino, -1}, t.sb(), b, name)
		if err == fs.ErrNotExist {
			continue
		}
		if err == nil {
			fn(b, before, off)
			t.dirty(dir)
		}
		return err
	}
	return fs.ErrNotExist
}

// errDirFull says that the index of a directory cannot grow.
func errDirFull(dir *Inode) error {
	return fmt.Errorf("ext4: inode %d: the index of the directory is full: %w", dir.Ino, ErrNoSpace)
}

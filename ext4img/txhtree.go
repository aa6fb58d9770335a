package ext4img

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"slices"
)

// leafEntry is an entry of a leaf: as many bytes as it needs.
type leafEntry struct {
	hash uint32
	raw  []byte
}

// canIndex reports whether a directory that grows gets an index.
func (t *Tx) canIndex() bool {
	s := t.sb()
	return s.Compat&CompatDirIndex != 0 && s.DefHashVersion <= hashVersionTEA
}

// dxLimit is how many entries an index block has room for whose entries begin
// at off.
func (s *Superblock) dxLimit(off int) int {
	room := s.BlockSize - off
	if s.hasCsum() {
		room -= dxTailLen
	}
	return room / dxEntryLen
}

// sumDxBlock makes the checksum of an index block right.
func (t *Tx) sumDxBlock(dir *Inode, b []byte) error {
	s := t.sb()
	if !s.hasCsum() {
		return nil
	}
	d, err := parseDxNode(place{"htree block", dir.Ino, -1}, s, b)
	if err != nil {
		return err
	}
	binary.LittleEndian.PutUint32(b[d.off+d.limit*dxEntryLen+4:], dxChecksum(s, dir, d))
	return nil
}

// makeIndex gives a directory of one block an index: the block becomes the
// root, and its entries move to the only leaf (kernel: fs/ext4/namei.c,
// make_indexed_dir).
func (t *Tx) makeIndex(dir *Inode) error {
	s, le := t.sb(), binary.LittleEndian
	stored, block, err := t.entriesAt(dir, 0, nil)
	if err != nil {
		return err
	}
	p := place{"directory block", dir.Ino, block}
	dot, err := parseDirent(p, s, stored, 0)
	if err != nil {
		return err
	}
	dotdot, err := parseDirent(p, s, stored, dot.recLen)
	if err != nil {
		return err
	}
	if string(dot.name) != "." || dot.recLen != direntLen(1) || string(dotdot.name) != ".." {
		return p.corrupt("", `does not begin with "." and ".."`)
	}
	list, err := t.leafEntries(p, stored[dotdot.off+dotdot.recLen:t.entriesEnd()], 0)
	if err != nil {
		return err
	}
	ft := dotdot.ftype
	parent := dotdot.ino
	logical, leaf, err := t.appendBlock(dir)
	if err != nil {
		return err
	}
	b, err := t.edit(leaf)
	if err != nil {
		return err
	}
	t.packEntries(dir, b, list)
	if b, _, err = t.dirBlock(dir, 0); err != nil {
		return err
	}
	clear(b[dot.recLen:])
	t.put(b[dot.recLen:], parent, s.BlockSize-dot.recLen, "..", ft)
	info := b[dxRootInfoOff:]
	info[4] = s.DefHashVersion
	info[5] = 8 // info_length
	le.PutUint16(b[dxRootEntries:], uint16(s.dxLimit(dxRootEntries)))
	le.PutUint16(b[dxRootEntries+2:], 1)
	le.PutUint32(b[dxRootEntries+4:], uint32(logical))
	dir.Flags |= indexFl
	t.dirty(dir)
	return t.sumDxBlock(dir, b)
}

// leafEntries returns the entries in use of an area of sound ones, with their
// hashes, in the order in which they lie there.
func (t *Tx) leafEntries(p place, area []byte, version int) (list []leafEntry, err error) {
	s := t.sb()
	for off := 0; off < len(area); {
		rec := parseRecLen(area[off+4:], s.BlockSize)
		if used := direntUsed(area[off:]); used > 0 {
			e := leafEntry{raw: bytes.Clone(area[off : off+used])}
			var ok bool
			if e.hash, ok = dirhashVersion(version, e.raw[8:8+int(e.raw[6])], &s.HashSeed); !ok {
				return nil, p.unsupported("hash_version", "%d", version)
			}
			list = append(list, e)
		}
		off += rec
	}
	return list, nil
}

// addIndexedEntry adds an entry to the leaf in which its hash begins. As long
// as there is no room, the index is changed in one place, and the way to the
// leaf looked up again.
func (t *Tx) addIndexedEntry(dir *Inode, name string, ino Ino, ft uint8) error {
	const most = 32 // more than the levels, each split once
	for range most {
		root, _, path, err := t.fs.dxPath(dir, name)
		if err != nil {
			return err
		}
		last := &path[len(path)-1]
		_, leaf := last.entry(last.at)
		if done, err := t.addToBlock(dir, leaf, path, name, ino, ft); done || err != nil {
			return err
		}
		// The first block on the way up that has room for one more entry.
		i := len(path) - 1
		for i >= 0 && path[i].count == path[i].limit {
			i--
		}
		switch {
		case i == len(path)-1:
			err = t.splitLeaf(dir, root, path, leaf)
		case i >= 0:
			err = t.splitNode(dir, path[i], path[i+1])
		default:
			err = t.growIndex(dir, root)
		}
		if err != nil {
			return err
		}
	}
	return place{"htree", dir.Ino, -1}.corrupt("", "has no room for %q after %d splits", name, most)
}

// dxInsert adds an entry behind entry at of an index block that has room.
func (t *Tx) dxInsert(dir *Inode, step dxStep, hash uint32, logical int64) error {
	le := binary.LittleEndian
	b, _, err := t.dirBlock(dir, step.logical)
	if err != nil {
		return err
	}
	at := step.off + (step.at+1)*dxEntryLen
	end := step.off + step.count*dxEntryLen
	copy(b[at+dxEntryLen:], b[at:end])
	le.PutUint32(b[at:], hash)
	le.PutUint32(b[at+4:], uint32(logical))
	le.PutUint16(b[step.off+2:], uint16(step.count+1))
	return t.sumDxBlock(dir, b)
}

// splitLeaf moves the entries of the upper hashes of a leaf to a new one
// (kernel: fs/ext4/namei.c, do_split).
func (t *Tx) splitLeaf(dir *Inode, root dxRoot, path []dxStep, leaf int64) error {
	stored, block, err := t.entriesAt(dir, leaf, path)
	if err != nil {
		return err
	}
	p := place{"directory block", dir.Ino, block}
	list, err := t.leafEntries(p, stored[:t.entriesEnd()], root.version)
	if err != nil {
		return err
	}
	if len(list) < 2 {
		return p.corrupt("", "has no room, and %d entries", len(list))
	}
	slices.SortStableFunc(list, func(a, b leafEntry) int { return cmp.Compare(a.hash, b.hash) })
	// Half of the bytes; half of the entries where the block is fragmented.
	at, size := len(list), 0
	for at > 0 && size+len(list[at-1].raw)/2 <= t.sb().BlockSize/2 {
		at--
		size += len(list[at].raw)
	}
	if at == 0 || at == len(list) {
		at = len(list) / 2
	}
	hash := list[at].hash
	if list[at-1].hash == hash {
		hash |= 1 // the hash begins in the leaf before
	}
	logical, added, err := t.appendBlock(dir)
	if err != nil {
		return err
	}
	b, err := t.edit(added)
	if err != nil {
		return err
	}
	t.packEntries(dir, b, list[at:])
	if b, _, err = t.dirBlock(dir, leaf); err != nil {
		return err
	}
	t.packEntries(dir, b, list[:at])
	return t.dxInsert(dir, path[len(path)-1], hash, logical)
}

// splitNode moves the upper half of the entries of an index block to a new one,
// which gets an entry in the block above.
func (t *Tx) splitNode(dir *Inode, above, node dxStep) error {
	le := binary.LittleEndian
	at := node.count / 2
	hash, _ := node.entry(at)
	logical, block, err := t.appendBlock(dir)
	if err != nil {
		return err
	}
	b, err := t.edit(block)
	if err != nil {
		return err
	}
	if err := t.putNode(dir, b, node.b[node.off+at*dxEntryLen:node.off+node.count*dxEntryLen]); err != nil {
		return err
	}
	if b, _, err = t.dirBlock(dir, node.logical); err != nil {
		return err
	}
	le.PutUint16(b[node.off+2:], uint16(at))
	if err := t.sumDxBlock(dir, b); err != nil {
		return err
	}
	return t.dxInsert(dir, above, hash, logical)
}

// putNode writes an index block below the root.
func (t *Tx) putNode(dir *Inode, b, entries []byte) error {
	le := binary.LittleEndian
	s := t.sb()
	clear(b)
	putRecLenIn(b[4:], s.BlockSize, s.BlockSize)
	copy(b[dxNodeEntries:], entries)
	le.PutUint16(b[dxNodeEntries:], uint16(s.dxLimit(dxNodeEntries)))
	le.PutUint16(b[dxNodeEntries+2:], uint16(len(entries)/dxEntryLen))
	return t.sumDxBlock(dir, b)
}

// growIndex puts one more level between the root of an index and what it leads
// to.
func (t *Tx) growIndex(dir *Inode, root dxRoot) error {
	le := binary.LittleEndian
	if root.levels+1 >= t.sb().maxHtreeLevels() {
		return errDirFull(dir)
	}
	logical, block, err := t.appendBlock(dir)
	if err != nil {
		return err
	}
	b, err := t.edit(block)
	if err != nil {
		return err
	}
	if err := t.putNode(dir, b, root.b[root.off:root.off+root.count*dxEntryLen]); err != nil {
		return err
	}
	if b, _, err = t.dirBlock(dir, 0); err != nil {
		return err
	}
	b[dxRootInfoOff+6] = byte(root.levels + 1)
	le.PutUint16(b[root.off+2:], 1)
	le.PutUint32(b[root.off+4:], uint32(logical))
	return t.sumDxBlock(dir, b)
}

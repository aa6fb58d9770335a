package ext4img

import "encoding/binary"

// insertPointers makes logical blocks that are a hole of a block map lead to a
// run of blocks.
func (t *Tx) insertPointers(n *Inode, e extent) error {
	if e.physical+e.len > 1<<32 {
		return place{"block map", n.Ino, -1}.unsupported("", "block %d, expected less than 2^32", e.physical)
	}
	le := binary.LittleEndian
	for e.len > 0 {
		slots, i, err := t.pointers(n, e.logical)
		if err != nil {
			return err
		}
		for ; e.len > 0 && i < int64(len(slots)/4); i++ {
			le.PutUint32(slots[4*i:], uint32(e.physical))
			e.logical++
			e.physical++
			e.len--
		}
	}
	t.dirty(n)
	return nil
}

// pointers returns the pointers to blocks of data among which that of a
// logical block is number i, to be changed. Blocks on the way that are missing
// are allocated.
func (t *Tx) pointers(n *Inode, logical int64) (slots []byte, i int64, err error) {
	if logical < directBlocks {
		return n.block()[:4*directBlocks], logical, nil
	}
	perBlock := int64(t.sb().BlockSize / 4)
	rest, covers := logical-directBlocks, perBlock
	level := 1
	for ; rest >= covers; level++ {
		if level == indirectLevels {
			return nil, 0, ErrTooLarge
		}
		rest -= covers
		covers *= perBlock
	}
	slot := n.block()[4*(directBlocks+level-1):]
	for {
		b, err := t.ownPointers(n, slot)
		if err != nil {
			return nil, 0, err
		}
		covers /= perBlock
		if covers == 1 {
			return b, rest, nil
		}
		slot = b[4*(rest/covers):]
		rest %= covers
	}
}

// ownPointers returns the block of pointers that a slot leads to, to be
// changed. Where there is no journal a block that is in use is left as it is,
// and another takes its place.
func (t *Tx) ownPointers(n *Inode, slot []byte) ([]byte, error) {
	le := binary.LittleEndian
	old := int64(le.Uint32(slot))
	if old != 0 {
		if err := t.checkPointer(n, old); err != nil {
			return nil, err
		}
		if s := t.staged[old]; t.e.journal != nil || s != nil && s.fresh {
			return t.edit(old)
		}
	}
	block, err := t.allocMeta(n, old)
	if err != nil {
		return nil, err
	}
	if block >= 1<<32 {
		return nil, ErrNoSpace
	}
	b, err := t.edit(block)
	if err == nil && old != 0 {
		var from []byte
		if from, err = t.block(old); err == nil {
			copy(b, from)
			err = t.freeMeta(n, old)
		}
	}
	le.PutUint32(slot, uint32(block))
	return b, err
}

func (t *Tx) checkPointer(n *Inode, block int64) error {
	if s := t.sb(); block <= s.FirstDataBlock || block >= s.BlocksCount {
		return place{"block map", n.Ino, -1}.corrupt("", "pointer %d, and the file system has %d blocks", block, s.BlocksCount)
	}
	return nil
}

// removePointers makes a hole of the logical blocks from from to to, and calls
// fn with what was there, ascending.
func (t *Tx) removePointers(n *Inode, from, to int64, fn func(extent) error) error {
	perBlock := int64(t.sb().BlockSize / 4)
	base, covers := int64(0), int64(1)
	for i := range int64(directBlocks + indirectLevels) {
		level := 0
		if i >= directBlocks {
			level = int(i - directBlocks + 1)
			covers *= perBlock
		}
		if err := t.removeBelow(n, n.block()[4*i:], level, base, covers, from, to, fn); err != nil {
			return err
		}
		base += covers
	}
	t.dirty(n)
	return nil
}

// removeBelow does that for what a slot leads to through so many levels.
func (t *Tx) removeBelow(n *Inode, slot []byte, level int, base, covers, from, to int64, fn func(extent) error) error {
	le := binary.LittleEndian
	block := int64(le.Uint32(slot))
	if block == 0 || base >= to || base+covers <= from {
		return nil
	}
	if err := t.checkPointer(n, block); err != nil {
		return err
	}
	if level == 0 {
		le.PutUint32(slot, 0)
		return fn(extent{logical: base, physical: block, len: 1})
	}
	whole := from <= base && base+covers <= to
	var b []byte
	var err error
	if whole { // it goes with all that it leads to
		stored, berr := t.block(block)
		b, err = append([]byte(nil), stored...), berr
	} else {
		b, err = t.ownPointers(n, slot)
	}
	if err != nil {
		return err
	}
	covers /= int64(len(b) / 4)
	for i := range int64(len(b) / 4) {
		if err := t.removeBelow(n, b[4*i:], level-1, base+i*covers, covers, from, to, fn); err != nil {
			return err
		}
	}
	if whole || isZero(b) {
		block = int64(le.Uint32(slot))
		le.PutUint32(slot, 0)
		return t.freeMeta(n, block)
	}
	return nil
}

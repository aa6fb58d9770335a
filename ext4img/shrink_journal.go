package ext4img

import (
	"context"
	"encoding/binary"
	"fmt"
	"slices"

	"qimg/qcow2/blockdev"
)

// journalParts is what a journal is made of.
type journalParts struct {
	data []extent
	tree []int64 // blocks of its map
}

// behind reports whether any of it lies behind a limit.
func (p *journalParts) behind(limit int64) bool {
	return slices.ContainsFunc(p.data, func(e extent) bool { return e.physical+e.len > limit }) ||
		slices.ContainsFunc(p.tree, func(b int64) bool { return b >= limit })
}

// journalParts reads the map of the journal.
func (f *FS) journalParts(n *Inode) (*journalParts, error) {
	p := &journalParts{}
	t := &Tx{e: &Editor{fs: f}, fs: f}
	err := t.eachMapped(n, 0, maxLogical-1, func(e extent) error {
		if k := len(p.data); k > 0 && p.data[k-1].logical+p.data[k-1].len == e.logical && p.data[k-1].physical+p.data[k-1].len == e.physical {
			p.data[k-1].len += e.len
		} else {
			p.data = append(p.data, extent{logical: e.logical, physical: e.physical, len: e.len})
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if n.Flags&extentsFl != 0 {
		err = f.extentNodes(n, n.block(), extentMaxDepth, &p.tree)
	} else {
		for level := 1; level <= indirectLevels && err == nil; level++ {
			err = f.pointerNodes(n, n.block()[4*(directBlocks+level-1):][:4], level, &p.tree)
		}
	}
	return p, err
}

// extentNodes adds the nodes below one of an extent tree, of at most so many
// levels.
func (f *FS) extentNodes(n *Inode, node []byte, levels int, list *[]int64) error {
	h, err := parseExtentHeader(place{"extent tree", n.Ino, -1}, node)
	if err != nil || h.depth == 0 || levels == 0 {
		return err
	}
	for i := range h.entries {
		_, child := parseIndex(node[extentHeaderLen+i*extentLen:])
		*list = append(*list, child)
		b, err := f.block(child)
		if err != nil {
			return err
		}
		if err := f.extentNodes(n, b, levels-1, list); err != nil {
			return err
		}
	}
	return nil
}

// pointerNodes adds the blocks of pointers below some pointers.
func (f *FS) pointerNodes(n *Inode, pointers []byte, level int, list *[]int64) error {
	for i := 0; i < len(pointers) && level > 0; i += 4 {
		block := int64(binary.LittleEndian.Uint32(pointers[i:]))
		if block == 0 {
			continue
		}
		*list = append(*list, block)
		b, err := f.block(block)
		if err != nil {
			return err
		}
		if err := f.pointerNodes(n, b, level-1, list); err != nil {
			return err
		}
	}
	return nil
}

// moveJournal moves the journal, which is empty, to blocks before the limit as
// far as it is behind it. The new map must not become the journal's by a replay
// of the old one: who replays has read the inode before. So there are three
// steps.
//
// Order: a transaction that allocates the blocks, and says that the file system
// is not clean, since nothing leads to them; zeroes there, and the journal's
// superblock; sync; the inode, in one sector: the journal is another one; sync;
// a transaction, in that, which frees the blocks of the old one and says that
// the file system is clean.
func (m *mover) moveJournal(ctx context.Context) error {
	e := m.e
	ino := e.fs.sb.JournalInum
	if e.journal == nil || ino == 0 {
		return nil
	}
	n, err := e.fs.inode(ino)
	if err != nil {
		return err
	}
	parts, err := e.fs.journalParts(n)
	if err != nil {
		return err
	}
	if !parts.behind(m.limit) {
		return nil
	}
	clean := e.fs.sb.State & StateClean
	t, err := e.Begin()
	if err != nil {
		return err
	}
	defer t.Discard()
	moved, inode, err := m.newJournal(t, ino, parts)
	if err != nil {
		return err
	}
	t.sb().State &^= StateClean
	if err := t.Commit(ctx); err != nil {
		return err
	}
	if err := e.switchJournal(ino, moved, inode); err != nil {
		return e.fail(err)
	}
	if t, err = e.Begin(); err != nil {
		return err
	}
	defer t.Discard()
	for _, d := range parts.data {
		if cut := max(m.limit-d.physical, 0); cut < d.len {
			if err := t.freeBlocks(d.physical+cut, d.len-cut); err != nil {
				return err
			}
		}
	}
	for _, b := range parts.tree {
		if err := t.freeBlocks(b, 1); err != nil {
			return err
		}
	}
	if n, err = e.fs.inode(ino); err != nil {
		return err
	}
	if err := t.backupJournal(n); err != nil {
		return err
	}
	t.sb().State |= clean
	return t.Commit(ctx)
}

// newJournal allocates what the journal lacks before the limit, and makes the
// inode that it is to have, which does not become part of the transaction.
func (m *mover) newJournal(t *Tx, ino Ino, parts *journalParts) (moved []extent, inode []byte, err error) {
	n, err := t.inode(ino)
	if err != nil {
		return nil, nil, err
	}
	clear(n.block())
	if n.Flags&extentsFl != 0 {
		putExtentHeader(n.block(), 0, extentRootMax, 0)
	}
	n.Blocks = 0
	for _, d := range parts.data {
		n.Blocks += d.len * t.sb().sectorsPerCluster()
		if keep := min(max(m.limit-d.physical, 0), d.len); keep > 0 {
			if err := t.mapRun(n, extent{logical: d.logical, physical: d.physical, len: keep}); err != nil {
				return nil, nil, err
			}
			d.logical, d.physical, d.len = d.logical+keep, d.physical+keep, d.len-keep
		}
		for d.len > 0 {
			start, got, err := t.allocBlocks(t.goal(n, 0), d.len)
			if err != nil {
				return nil, nil, fmt.Errorf("ext4: the journal, %d blocks: %w", d.len, err)
			}
			x := extent{logical: d.logical, physical: start, len: got}
			if err := t.mapRun(n, x); err != nil {
				return nil, nil, err
			}
			moved = append(moved, x)
			d.logical, d.len = d.logical+got, d.len-got
			m.result.MovedBlocks += got
		}
	}
	t.fixBlocks(n)
	inode = make([]byte, t.sb().InodeSize)
	n.put(t.sb(), inode)
	delete(t.inodes, ino)
	return moved, inode, nil
}

// switchJournal makes the new journal the file system's.
func (e *Editor) switchJournal(ino Ino, moved []extent, inode []byte) error {
	bs := int64(e.fs.sb.BlockSize)
	for _, x := range moved {
		// What a file had there could look like a part of the log.
		if err := blockdev.WriteZeroes(e.dev, x.physical*bs, x.len*bs); err != nil {
			return fmt.Errorf("ext4: write of zeroes from block %d on: %w", x.physical, err)
		}
		if x.logical == 0 {
			if _, err := e.dev.WriteAt(e.journal.super, x.physical*bs); err != nil {
				return fmt.Errorf("ext4: write of the journal: %w", err)
			}
		}
	}
	if err := e.sync(); err != nil {
		return err
	}
	block, off, err := e.fs.inodePlace(ino)
	if err != nil {
		return err
	}
	// i_block and the checksum lie in the first sector.
	if _, err := e.dev.WriteAt(inode[:min(len(inode), 512)], block*bs+int64(off)); err != nil {
		return fmt.Errorf("ext4: write of inode %d: %w", ino, err)
	}
	if err := e.sync(); err != nil {
		return err
	}
	return e.reopen()
}

// backupJournal makes the copy of the journal's inode in the superblock right.
func (t *Tx) backupJournal(n *Inode) error {
	s := t.sb()
	b, err := t.edit(superblockOff / int64(s.BlockSize))
	if err != nil {
		return err
	}
	b = b[superblockOff%s.BlockSize:]
	if b[0xfd] != 1 { // s_jnl_backup_type
		return nil
	}
	le := binary.LittleEndian
	copy(b[0x10c:], n.block()) // s_jnl_blocks
	le.PutUint32(b[0x10c+60:], uint32(n.Size>>32))
	le.PutUint32(b[0x10c+64:], uint32(n.Size))
	return nil
}

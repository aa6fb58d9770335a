package ext4img

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math"

	"qimg/qcow2/blockdev"
)

// lentMark lies in the superblock of a journal that was made for one change of
// the size, where other journals have zeroes, so that it is taken away again
// after a crash, too.
var lentMark = []byte("qimg resize")

const lentMarkOff = 0x80 // s_padding

// Blocks of a journal that is made for one change of the size.
const (
	lentBlocksMin = 1024 // JBD2_MIN_JOURNAL_BLOCKS
	lentBlocksMax = 8192
)

// lentRoom is how many free blocks a journal of so many needs, those of its map
// included.
func lentRoom(blocks int64) int64 { return blocks + blocks/64 + 8 }

// lendJournal gives a file system without a journal one, and reports whether it
// did: where there is no room for one, it does not. Until it is taken away the
// superblock says that the file system is not clean, so that e2fsck looks at
// all of it after a crash.
//
// Order: an inode that is the journal's as soon as the superblock says so, and
// its blocks; sync; the superblock; sync.
func (e *Editor) lendJournal(ctx context.Context, grow bool) (bool, error) {
	s := e.fs.sb
	blocks := min(max(s.BlocksCount/64, lentBlocksMin), lentBlocksMax)
	if s.FreeBlocksCount < 2*blocks || !grow {
		blocks = lentBlocksMin
	}
	bs := int64(s.BlockSize)
	old, err := e.fs.inode(journalIno)
	if err != nil {
		return false, err
	}
	if old.Links != 0 || old.Blocks != 0 || s.clusterRatio() > 1 || s.FreeBlocksCount < lentRoom(blocks) || s.FirstIno <= journalIno {
		return false, nil
	}
	t, err := e.Begin()
	if err != nil {
		return false, err
	}
	defer t.Discard()
	n, err := t.inode(journalIno)
	if err != nil {
		return false, err
	}
	raw := make([]byte, s.InodeSize)
	*n = Inode{Ino: journalIno, Mode: modeReg | 0o600, Links: 1, Size: blocks * bs, Atime: t.now, Ctime: t.now, Mtime: t.now, Crtime: t.now, raw: raw}
	if s.InodeSize > oldInodeSize {
		n.extraIsize = min(extraIsize, s.InodeSize-oldInodeSize)
		binary.LittleEndian.PutUint16(raw[0x80:], uint16(n.extraIsize))
	}
	if s.Incompat&IncompatExtents != 0 {
		n.Flags = extentsFl
		putExtentHeader(n.block(), 0, extentRootMax, 0)
	}
	var first int64
	for at := int64(0); at < blocks; {
		start, got, err := t.allocBlocks(t.goal(n, 0), blocks-at)
		if err != nil {
			return false, err
		}
		if err := t.mapRun(n, extent{logical: at, physical: start, len: got}); err != nil {
			return false, err
		}
		if err := blockdev.WriteZeroes(e.dev, start*bs, got*bs); err != nil {
			return false, fmt.Errorf("ext4: write of zeroes from block %d on: %w", start, err)
		}
		t.wrote = append(t.wrote, run{start, start + got})
		if at == 0 {
			first = start
		}
		n.Blocks += got * s.sectorsPerCluster()
		at += got
	}
	t.dirty(n)
	b := make([]byte, bs)
	be := binary.BigEndian
	be.PutUint32(b, jbd2Magic)
	be.PutUint32(b[4:], jbd2SuperblockV2)
	be.PutUint32(b[0xc:], uint32(bs))
	be.PutUint32(b[0x10:], uint32(blocks)) // s_maxlen
	be.PutUint32(b[0x14:], 1)              // s_first
	be.PutUint32(b[0x18:], 1)              // s_sequence
	copy(b[0x30:0x40], s.UUID[:])
	be.PutUint32(b[0x40:], 1) // s_nr_users
	copy(b[lentMarkOff:], lentMark)
	if err := t.writeData(b, first); err != nil {
		return false, err
	}
	t.sb().State &^= StateClean
	if err := t.Commit(ctx); err != nil {
		return false, err
	}
	s = e.fs.sb
	s.Compat |= CompatHasJournal
	s.JournalInum = journalIno
	if err := e.putSuper(s, false); err != nil {
		return false, e.fail(err)
	}
	if err := e.sync(); err != nil {
		return false, e.fail(err)
	}
	return true, e.openJournal(ctx)
}

// isLent reports whether the journal is one of lendJournal.
func (e *Editor) isLent() bool {
	return e.journal != nil && bytes.HasPrefix(e.journal.super[lentMarkOff:], lentMark)
}

// returnJournal takes away the journal that lendJournal has made.
//
// Order: the superblock; sync; the inode and its blocks; sync; the superblock,
// clean.
func (e *Editor) returnJournal(ctx context.Context) error {
	s := e.fs.sb
	s.Compat &^= CompatHasJournal
	s.JournalInum = 0
	e.journal = nil
	if err := e.putSuper(s, false); err != nil {
		return e.fail(err)
	}
	if err := e.sync(); err != nil {
		return e.fail(err)
	}
	t, err := e.Begin()
	if err != nil {
		return err
	}
	defer t.Discard()
	n, err := t.inode(journalIno)
	if err != nil {
		return err
	}
	end := int64(maxLogical)
	if n.Flags&extentsFl == 0 {
		end = math.MaxInt64 // of all that pointers reach, so that none of them moves
	}
	if err := t.unmap(n, 0, end); err != nil {
		return err
	}
	block, off, err := t.fs.inodePlace(journalIno)
	if err != nil {
		return err
	}
	delete(t.inodes, journalIno)
	b, err := t.edit(block)
	if err != nil {
		return err
	}
	clear(b[off : off+s.InodeSize])
	t.sb().State |= StateClean
	return t.Commit(ctx)
}

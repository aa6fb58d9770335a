package ext4img

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"slices"
)

// inodeRef is a place that names an inode.
type inodeRef struct {
	holder Ino   // a directory, or what has an xattr, by its old number
	block  int64 // of the directory, logical; or refInode, refXattrs
}

const (
	refInode  = -1 // in the holder's inode: inline data, xattrs
	refXattrs = -2 // in the holder's xattr block
)

// inodeMover gives inodes of groups that go other numbers.
type inodeMover struct {
	*mover
	last Ino // of the groups that stay
	refs map[Ino][]inodeRef
	to   map[Ino]Ino
}

// moveInodes moves the inodes of groups that go, each with all that names it
// and with all whose checksum its number is part of, in one transaction.
func (m *mover) moveInodes(ctx context.Context) error {
	s := m.e.fs.sb
	x := &inodeMover{m, Ino(m.groups * int64(s.InodesPerGroup)), map[Ino][]inodeRef{}, map[Ino]Ino{}}
	var list []Ino
	if err := m.eachUsed(ctx, m.groups, s.groups, func(ino Ino) error { list = append(list, ino); return nil }); err != nil || len(list) == 0 {
		return err
	}
	if err := m.eachUsed(ctx, 0, s.groups, x.findRefs); err != nil {
		return err
	}
	for _, ino := range list {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := x.moveInode(ctx, ino); err != nil {
			return fmt.Errorf("ext4: inode %d: %w", ino, err)
		}
	}
	return nil
}

// findRefs notes what an inode names.
func (x *inodeMover) findRefs(ino Ino) error {
	f := x.e.fs
	n, err := f.inode(ino)
	if err != nil {
		return err
	}
	note := func(to Ino, block int64) {
		if to > x.last {
			list := x.refs[to]
			if r := (inodeRef{ino, block}); len(list) == 0 || list[len(list)-1] != r {
				x.refs[to] = append(list, r)
			}
		}
	}
	if n.IsDir() {
		if n.Flags&inlineDataFl != 0 {
			note(inlineDirParent(n), refInode)
		}
		fail := func(err2 error) { err = err2 }
		entries := func(p place, b []byte, block int64) {
			if err2 := eachDirentIno(p, b, func(at int) { note(Ino(binary.LittleEndian.Uint32(b[at:])), block) }); err == nil {
				err = err2
			}
		}
		if n.Flags&inlineDataFl != 0 {
			f.eachInlineDirPart(n, func(p place, b []byte) { entries(p, b, refInode) }, fail)
		} else {
			f.eachDirBlock(n, func(logical, block int64, b []byte, err2 error) bool {
				if err2 != nil {
					err = err2
					return false
				}
				entries(place{"directory block", ino, block}, b, logical)
				return err == nil
			})
		}
		if err != nil {
			return err
		}
	}
	if f.sb.Incompat&IncompatEAInode == 0 {
		return nil
	}
	values := func(p place, area []byte, first, base int, block int64) error {
		return parseXattrs(p, area, first, base, func(e xattrEntry) bool { note(e.inum, block); return true })
	}
	if area := n.xattrArea(); area != nil {
		if err := values(place{"xattrs", ino, -1}, area, 4, 4, refInode); err != nil {
			return err
		}
	}
	if n.FileACL == 0 {
		return nil
	}
	p := place{"xattr block", ino, n.FileACL}
	b, err := f.xattrBlock(p)
	if err != nil {
		return err
	}
	return values(p, b, xattrHeaderLen, 0, refXattrs)
}

// eachDirentIno calls fn with the offsets of the entries of a directory block,
// whose names, which may be encrypted, are not looked at.
func eachDirentIno(p place, b []byte, fn func(at int)) error {
	for at := 0; at < len(b); {
		if len(b)-at < 8 {
			return p.corrupt("rec_len", "leaves %d bytes at the end of the block", len(b)-at)
		}
		n := parseRecLen(b[at+4:], len(b))
		if n < 8 || n%4 != 0 || n > len(b)-at {
			return p.corrupt("rec_len", "%d at offset %d, expected a multiple of 4 up to %d", n, at, len(b)-at)
		}
		fn(at)
		at += n
	}
	return nil
}

// now returns the number that an inode has now.
func (x *inodeMover) now(ino Ino) Ino {
	if to, ok := x.to[ino]; ok {
		return to
	}
	return ino
}

// moveInode gives an inode another number.
func (x *inodeMover) moveInode(ctx context.Context, ino Ino) error {
	t, err := x.tx(ctx)
	if err != nil {
		return err
	}
	n, err := t.inode(ino)
	if err != nil {
		return err
	}
	hint := Ino(rootIno)
	if refs := x.refs[ino]; len(refs) > 0 {
		hint = x.now(refs[0].holder)
	}
	to, err := t.takeInode(hint, n.IsDir())
	if err != nil {
		return err
	}
	c := *n
	c.Ino, c.raw = to, bytes.Clone(n.raw)
	moved := &txInode{n: &c, created: true}
	t.inodes[to] = moved
	t.markDirty(moved)
	if err := t.freeInode(n); err != nil {
		return err
	}
	x.to[ino] = to
	x.result.MovedInodes++
	if err := t.reseed(&c); err != nil {
		return err
	}
	for _, r := range x.refs[ino] {
		if err := t.renameInode(x.now(r.holder), r.block, ino, to); err != nil {
			return err
		}
	}
	delete(x.refs, ino)
	return t.flush()
}

// reseed makes the checksums of the blocks of an inode right, of which its
// number is a part.
func (t *Tx) reseed(n *Inode) error {
	if !t.sb().hasCsum() || !n.mapsBlocks() {
		return nil
	}
	if n.Flags&extentsFl != 0 {
		if err := t.reseedExtents(n, n.block()); err != nil {
			return err
		}
	}
	if !n.IsDir() {
		return nil
	}
	return t.eachMapped(n, 0, n.Size/int64(t.sb().BlockSize), func(e extent) error {
		for i := range e.len {
			b, err := t.edit(e.physical + i)
			if err != nil {
				return err
			}
			if err := t.sealDirBlock(n, b, e.logical+i, e.physical+i); err != nil {
				return err
			}
		}
		return nil
	})
}

// reseedExtents does that for the nodes below one of the extent tree.
func (t *Tx) reseedExtents(n *Inode, node []byte) error {
	p := place{"extent tree", n.Ino, -1}
	h, err := parseExtentHeader(p, node)
	if err != nil || h.depth == 0 {
		return err
	}
	if h.depth > extentMaxDepth {
		return p.corrupt("eh_depth", "%d, expected at most %d", h.depth, extentMaxDepth)
	}
	for i := range h.entries {
		_, child := parseIndex(node[extentHeaderLen+i*extentLen:])
		b, err := t.edit(child)
		if err != nil {
			return err
		}
		c, err := parseExtentHeader(place{"extent block", n.Ino, child}, b)
		if err != nil {
			return err
		}
		if c.depth != h.depth-1 {
			return place{"extent block", n.Ino, child}.corrupt("eh_depth", "%d, expected %d", c.depth, h.depth-1)
		}
		if err := t.reseedExtents(n, b); err != nil {
			return err
		}
		tail := extentTailOff(c)
		binary.LittleEndian.PutUint32(b[tail:], crc32c(t.sb().inodeSeed(n.Ino, n.Generation), b[:tail]))
	}
	return nil
}

// sealDirBlock makes the checksum of a directory block right.
func (t *Tx) sealDirBlock(n *Inode, b []byte, logical, block int64) error {
	s, le := t.sb(), binary.LittleEndian
	if !s.hasCsum() {
		return nil
	}
	if n.Flags&indexFl != 0 && isDxBlock(b, logical) {
		d, err := parseDxNode(place{"htree block", n.Ino, block}, s, b)
		if err != nil {
			return err
		}
		le.PutUint32(b[d.off+d.limit*dxEntryLen+4:], dxChecksum(s, n, d))
		return nil
	}
	if _, ok := direntTail(b); !ok {
		return place{"directory block", n.Ino, block}.corrupt("", "has no entry with a checksum at its end")
	}
	end := len(b) - direntTailLen
	le.PutUint32(b[end+8:], crc32c(s.inodeSeed(n.Ino, n.Generation), b[:end]))
	return nil
}

// renameInode puts another number in the place of an inode's where a directory
// or an xattr names it.
func (t *Tx) renameInode(holder Ino, block int64, old, to Ino) error {
	n, err := t.inode(holder)
	if err != nil {
		return err
	}
	switch block {
	case refInode:
		defer t.dirty(n)
		if n.IsDir() && n.Flags&inlineDataFl != 0 {
			if err := t.renameInline(n, old, to); err != nil {
				return err
			}
		}
		if area := n.xattrArea(); area != nil {
			return renameValues(place{"xattrs", n.Ino, -1}, area, 4, 4, old, to)
		}
		return nil
	case refXattrs:
		b, err := t.edit(n.FileACL)
		if err != nil {
			return err
		}
		err = renameValues(place{"xattr block", n.Ino, n.FileACL}, b, xattrHeaderLen, 0, old, to)
		if err == nil && t.sb().hasCsum() {
			binary.LittleEndian.PutUint32(b[16:], xattrBlockChecksum(t.sb(), b, n.FileACL))
		}
		return err
	}
	m, err := t.fs.mapping(n, block)
	if err != nil {
		return err
	}
	physical := m.at(block).physical
	b, err := t.edit(physical)
	if err != nil {
		return err
	}
	if err := renameDirents(place{"directory block", n.Ino, physical}, b, old, to); err != nil {
		return err
	}
	return t.sealDirBlock(n, b, block, physical)
}

func renameDirents(p place, b []byte, old, to Ino) error {
	le := binary.LittleEndian
	return eachDirentIno(p, b, func(at int) {
		if Ino(le.Uint32(b[at:])) == old {
			le.PutUint32(b[at:], uint32(to))
		}
	})
}

// renameInline does that in a directory with inline data.
func (t *Tx) renameInline(n *Inode, old, to Ino) error {
	if inlineDirParent(n) == old {
		binary.LittleEndian.PutUint32(n.block(), uint32(to))
	}
	var err error
	t.fs.eachInlineDirPart(n, func(p place, b []byte) {
		if err == nil {
			err = renameDirents(p, b, old, to)
		}
	}, func(err2 error) { err = err2 })
	return err
}

// renameValues does that in a list of xattrs, which was parsed before.
func renameValues(p place, area []byte, first, base int, old, to Ino) error {
	le := binary.LittleEndian
	if err := parseXattrs(p, area, first, base, func(xattrEntry) bool { return true }); err != nil {
		return err
	}
	for at := first; le.Uint32(area[at:]) != 0; at += xattrEntryLen + pad4(int(area[at])) {
		if Ino(le.Uint32(area[at+4:])) == old {
			le.PutUint32(area[at+4:], uint32(to))
		}
	}
	return nil
}

// namedInodes are inodes that the superblock names.
func (s *Superblock) namedInodes() []Ino {
	return slices.DeleteFunc([]Ino{s.JournalInum, s.OrphanFileInum, s.LpfIno, s.UsrQuotaInum, s.GrpQuotaInum, s.PrjQuotaInum}, func(i Ino) bool { return i == 0 })
}

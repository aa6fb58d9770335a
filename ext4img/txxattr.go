package ext4img

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"time"
)

// txXattrs are the xattrs of an inode: those in the inode and those in its
// block.
type txXattrs struct{ body, block []xattrEntry }

// need is the room that an entry takes.
func (x *xattrEntry) need() int {
	if x.inum != 0 {
		return x.entryLen()
	}
	return x.entryLen() + pad4(int(x.size))
}

func xattrsNeed(list []xattrEntry) (sum int) {
	for i := range list {
		sum += list[i].need()
	}
	return sum
}

// is reports whether an entry has that name.
func (x *xattrEntry) is(index uint8, name string) bool { return x.index == index && x.name == name }

// xattrs reads all xattrs of an inode. The values are copies.
func (t *Tx) xattrs(n *Inode) (x txXattrs, err error) {
	read := func(p place, list *[]xattrEntry, area []byte, first, base int) error {
		return parseXattrs(p, area, first, base, func(e xattrEntry) bool {
			e.value = bytes.Clone(e.value)
			*list = append(*list, e)
			return true
		})
	}
	if area := n.xattrArea(); area != nil {
		if err := read(place{"xattrs", n.Ino, -1}, &x.body, area, 4, 4); err != nil {
			return x, err
		}
	}
	if n.FileACL == 0 {
		return x, nil
	}
	p := place{"xattr block", n.Ino, n.FileACL}
	b, err := t.fs.xattrBlock(p)
	if err == nil {
		err = read(p, &x.block, b, xattrHeaderLen, 0)
	}
	return x, err
}

// all returns the entries of both places.
func (x *txXattrs) all() []xattrEntry { return slices.Concat(x.body, x.block) }

// take removes the entry of a name, and reports whether there was one.
func (x *txXattrs) take(index uint8, name string) bool {
	for _, list := range [...]*[]xattrEntry{&x.body, &x.block} {
		for i := range *list {
			if (*list)[i].is(index, name) {
				*list = slices.Delete(slices.Clone(*list), i, i+1)
				return true
			}
		}
	}
	return false
}

// xattrRoom is how many bytes of entries and values an inode has room for.
func (n *Inode) xattrRoom() int {
	if n.extraIsize == 0 {
		return 0
	}
	return max(len(n.raw)-oldInodeSize-n.extraIsize-8, 0) // h_magic, and the end of the list
}

// setXattr gives an inode an xattr, or another value for one: in the inode if
// there is room, else in its block, else, with the ea_inode feature, in an inode
// of its own. No room is an error that matches ErrNoSpace. Inline data lies in
// the inode alone, whatever has to make room for it.
func (t *Tx) setXattr(n *Inode, index uint8, name, value string) error {
	old, err := t.xattrs(n)
	if err != nil {
		return err
	}
	now := old
	now.take(index, name)
	e := xattrEntry{index: index, name: name, size: int64(len(value)), value: []byte(value)}
	inline := index == xattrSystem
	if inline || xattrsNeed(now.body)+e.need() <= n.xattrRoom() {
		now.body = append(slices.Clip(now.body), e)
	} else {
		now.block = append(slices.Clip(now.block), e)
	}
	for xattrsNeed(now.body) > n.xattrRoom() {
		i := largest(now.body, func(e *xattrEntry) bool { return e.index != xattrSystem })
		if i < 0 {
			return fmt.Errorf("ext4: inode %d: %d bytes of inline data, and there is room for %d: %w", n.Ino, e.size, n.xattrRoom(), ErrNoSpace)
		}
		now.block = append(slices.Clip(now.block), now.body[i])
		now.body = slices.Delete(slices.Clone(now.body), i, i+1)
	}
	bs := t.sb().BlockSize
	for need := xattrHeaderLen + 4 + xattrsNeed(now.block); len(now.block) > 0 && need > bs; need = xattrHeaderLen + 4 + xattrsNeed(now.block) {
		i := largest(now.block, func(e *xattrEntry) bool { return e.inum == 0 && e.size > 0 })
		if i < 0 || t.sb().Incompat&IncompatEAInode == 0 {
			return fmt.Errorf("ext4: inode %d: its xattrs need %d bytes beside the inode, and a block has %d: %w", n.Ino, need, bs, ErrNoSpace)
		}
		now.block = slices.Clone(now.block)
		if err := t.moveValue(n, &now.block[i]); err != nil {
			return err
		}
	}
	return t.putXattrs(n, old, now)
}

// largest returns the index of the entry that takes the most room of those
// that may go; -1 if none may.
func largest(list []xattrEntry, may func(*xattrEntry) bool) int {
	best := -1
	for i := range list {
		if may(&list[i]) && (best < 0 || list[i].need() > list[best].need()) {
			best = i
		}
	}
	return best
}

// removeXattr takes an xattr away from an inode. One that is not there is
// fs.ErrNotExist.
func (t *Tx) removeXattr(n *Inode, index uint8, name string) error {
	old, err := t.xattrs(n)
	if err != nil {
		return err
	}
	now := old
	if !now.take(index, name) {
		return fs.ErrNotExist
	}
	return t.putXattrs(n, old, now)
}

// dropXattrs takes all xattrs away from an inode, which is freed next.
func (t *Tx) dropXattrs(n *Inode) error {
	old, err := t.xattrs(n)
	if err != nil {
		return err
	}
	return t.putXattrs(n, old, txXattrs{})
}

// putXattrs writes the xattrs of an inode. Inodes that hold values count the
// places that lead to them: an inode's own area and blocks, however many inodes
// share one (kernel: fs/ext4/xattr.c, ext4_xattr_block_set).
func (t *Tx) putXattrs(n *Inode, old, now txXattrs) error {
	refs := map[Ino]int{}
	count := func(list []xattrEntry, by int) {
		for i := range list {
			if list[i].inum != 0 {
				refs[list[i].inum] += by
			}
		}
	}
	count(old.body, -1)
	count(now.body, 1)
	if n.extraIsize > 0 {
		area := n.raw[oldInodeSize+n.extraIsize:]
		if len(now.body) > 0 || n.xattrArea() != nil {
			clear(area)
		}
		if len(now.body) > 0 {
			binary.LittleEndian.PutUint32(area, xattrMagic)
			encodeXattrs(area, 4, 4, now.body, false)
		}
	}
	if err := t.putXattrBlock(n, old.block, now.block, count); err != nil {
		return err
	}
	// Values in inodes of their own count as blocks of all that use them.
	s := t.sb()
	space := func(list []xattrEntry) (sum int64) {
		for i := range list {
			if list[i].inum != 0 {
				sum += ceilDiv(list[i].size, int64(s.ClusterSize)) * s.sectorsPerCluster()
			}
		}
		return sum
	}
	n.Blocks += space(now.all()) - space(old.all())
	t.dirty(n)
	for _, ino := range slices.Sorted(maps.Keys(refs)) {
		if refs[ino] != 0 {
			if err := t.countValue(ino, refs[ino]); err != nil {
				return err
			}
		}
	}
	return t.checkBlocks(n)
}

// putXattrBlock makes the block of an inode hold a list, or takes it away if
// the list is empty. A block that other inodes share is left to them; one of
// the transaction that holds the same already is shared.
func (t *Tx) putXattrBlock(n *Inode, old, now []xattrEntry, count func([]xattrEntry, int)) error {
	le := binary.LittleEndian
	was := n.FileACL
	var refs uint32
	var before []byte
	if was != 0 {
		b, err := t.block(was)
		if err != nil {
			return err
		}
		before = b
		if refs = le.Uint32(b[4:]); refs == 0 || refs > xattrRefcountMax {
			return place{"xattr block", n.Ino, was}.corrupt("h_refcount", "%d, expected 1 to %d", refs, xattrRefcountMax)
		}
	}
	var b []byte
	if len(now) > 0 {
		now = slices.SortedFunc(slices.Values(now), func(a, b xattrEntry) int {
			return cmp.Or(cmp.Compare(a.index, b.index), cmp.Compare(len(a.name), len(b.name)), cmp.Compare(a.name, b.name))
		})
		b = make([]byte, t.sb().BlockSize)
		putXattrBlock(b, now, 1)
		if was != 0 && sameXattrBlock(before, b) {
			return nil
		}
	}
	if was != 0 && refs == 1 {
		count(old, -1)
	}
	if b == nil {
		n.FileACL = 0
		return t.leaveXattrBlock(n, was, refs)
	}
	if shared := t.sharedXattrBlock(b); shared != 0 {
		e, err := t.edit(shared)
		if err != nil {
			return err
		}
		le.PutUint32(e[4:], le.Uint32(e[4:])+1)
		t.sumXattrBlock(e, shared)
		n.Blocks += t.sb().sectorsPerCluster()
		n.FileACL = shared
		t.dirty(n)
		return t.leaveXattrBlock(n, was, refs)
	}
	count(now, 1)
	place := was
	if fresh := was != 0 && t.staged[was] != nil && t.staged[was].fresh; was == 0 || refs > 1 || !fresh && t.e.journal == nil {
		// Without a journal what is in use is not overwritten.
		var err error
		if place, err = t.allocMeta(n, 0); err != nil {
			return err
		}
		n.FileACL = place
		t.sb().Compat |= CompatExtAttr
		if err := t.leaveXattrBlock(n, was, refs); err != nil {
			return err
		}
	}
	e, err := t.edit(place)
	if err != nil {
		return err
	}
	copy(e, b)
	t.sumXattrBlock(e, place)
	if t.xattrBlocks == nil {
		t.xattrBlocks = map[uint32]int64{}
	}
	t.xattrBlocks[le.Uint32(e[12:])] = place
	return nil
}

// leaveXattrBlock gives up the block that an inode had, if it had one, of which
// so many inodes made use.
func (t *Tx) leaveXattrBlock(n *Inode, block int64, refs uint32) error {
	switch {
	case block == 0:
		return nil
	case refs == 1:
		return t.freeMeta(n, block)
	}
	n.Blocks -= t.sb().sectorsPerCluster()
	t.dirty(n)
	b, err := t.edit(block)
	if err != nil {
		return err
	}
	binary.LittleEndian.PutUint32(b[4:], refs-1)
	t.sumXattrBlock(b, block)
	return nil
}

// sameXattrBlock reports whether two blocks hold the same xattrs.
func sameXattrBlock(a, b []byte) bool {
	return bytes.Equal(a[12:16], b[12:16]) && bytes.Equal(a[xattrHeaderLen:], b[xattrHeaderLen:])
}

// sharedXattrBlock returns a block, new in this transaction, that holds the
// same as b and that one more inode may share; 0 if there is none.
func (t *Tx) sharedXattrBlock(b []byte) int64 {
	le := binary.LittleEndian
	hash := le.Uint32(b[12:])
	block := t.xattrBlocks[hash]
	s := t.staged[block]
	if block == 0 || hash == 0 || s == nil || !s.fresh || le.Uint32(s.data) != xattrMagic ||
		le.Uint32(s.data[4:]) >= xattrRefcountMax || !sameXattrBlock(s.data, b) {
		return 0
	}
	return block
}

// sumXattrBlock makes the checksum of a block of xattrs right.
func (t *Tx) sumXattrBlock(b []byte, block int64) {
	if s := t.sb(); s.hasCsum() {
		binary.LittleEndian.PutUint32(b[16:], xattrBlockChecksum(s, b, block))
	}
}

// moveValue moves the value of an entry to an inode of its own, which no place
// counts yet (kernel: fs/ext4/xattr.c, ext4_xattr_inode_create, _set_hash and
// _set_ref).
func (t *Tx) moveValue(n *Inode, e *xattrEntry) error {
	v, err := t.allocInode(n.Ino, modeReg|0o600)
	if err != nil {
		return err
	}
	v.UID, v.GID = n.UID, n.GID
	v.Flags = v.Flags&extentsFl | eaInodeFl
	if err := t.write(v, e.value, 0); err != nil {
		return err
	}
	hash := crc32c(t.sb().ChecksumSeed, e.value)
	v.Atime = time.Unix(int64(int32(hash)), 0)
	t.setValueRefs(v, 0)
	e.inum, e.value = v.Ino, nil
	e.hash = xattrHashValue(xattrHashName(e.name), hash)
	return nil
}

// setValueRefs sets how many places lead to an inode that holds a value: the
// upper half lies where other inodes have their ctime, the lower in i_version.
func (t *Tx) setValueRefs(v *Inode, refs uint64) {
	v.Ctime = time.Unix(int64(int32(refs>>32)), 0)
	v.Version = v.Version&^0xffffffff | refs&0xffffffff
	t.dirty(v)
}

// countValue adds to the number of places that lead to an inode that holds a
// value, and frees the inode with the last.
func (t *Tx) countValue(ino Ino, by int) error {
	v, err := t.used(ino)
	if err != nil {
		return err
	}
	p := place{"xattr inode", ino, -1}
	if v.Flags&eaInodeFl == 0 || !v.IsRegular() {
		return p.corrupt("i_flags", "%#x, i_mode %#o: is no value of an xattr", v.Flags, v.Mode)
	}
	refs := int64(uint32(v.Ctime.Unix()))<<32 | int64(uint32(v.Version))
	switch refs += int64(by); {
	case refs < 0:
		return p.corrupt("i_version", "%d references are fewer than there are", refs-int64(by))
	case refs > 0:
		t.setValueRefs(v, uint64(refs))
		return nil
	}
	if err := t.dropContent(v); err != nil {
		return err
	}
	return t.freeInode(v)
}

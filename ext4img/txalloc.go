package ext4img

import (
	"bytes"
	"encoding/binary"
	"math/bits"
)

// txGroup is what the transaction knows of the clusters of a group.
type txGroup struct {
	base []byte // the bitmap as committed
	busy []byte // base, and what the transaction has allocated
}

// group returns the clusters of a group.
func (t *Tx) group(g int64) (*txGroup, error) {
	if x, ok := t.groups[g]; ok {
		t.saveGroup(g)
		return x, nil
	}
	d, err := t.fs.groupDesc(g)
	if err != nil {
		return nil, err
	}
	now, err := t.fs.blockBitmap(g, d)
	if err != nil {
		return nil, err
	}
	base := now
	if s, ok := t.staged[d.blockBitmap]; ok && !s.fresh {
		if base, err = t.committedBitmap(g); err != nil {
			return nil, err
		}
	}
	x := &txGroup{base: base, busy: bytes.Clone(base)}
	for i := range x.busy {
		x.busy[i] |= now[i]
	}
	t.saveGroup(g)
	t.groups[g] = x
	return x, nil
}

// saveGroup has a failure of the operation make the group again.
func (t *Tx) saveGroup(g int64) {
	if t.save != nil {
		t.save.groups[g] = true
	}
}

// committedBitmap returns the bitmap of the clusters of a group as it was
// before the transaction.
func (t *Tx) committedBitmap(g int64) ([]byte, error) {
	f := &FS{dev: t.fs.dev, sb: &t.before, cache: blockCache{limit: 16}}
	d, err := f.groupDesc(g)
	if err != nil {
		return nil, err
	}
	return f.blockBitmap(g, d)
}

// isNew reports whether a block was free before the transaction, so that it
// can be written in place.
func (t *Tx) isNew(block int64) (bool, error) {
	s := t.sb()
	g := (block - s.FirstDataBlock) / s.BlocksPerGroup
	x, err := t.group(g)
	if err != nil {
		return false, err
	}
	return !testBit(x.base, (block-s.groupStart(g))/s.clusterRatio()), nil
}

// allocBlocks allocates a run of blocks, near goal if it can be: n of them, at
// most want. With bigalloc whole clusters are taken, the first of which begins
// the run. What was freed in this transaction is not given out: until the
// commit it is in use; what was free before, until the end of the operation. No free block is an error that matches ErrNoSpace.
func (t *Tx) allocBlocks(goal, want int64) (start, n int64, err error) {
	s := t.sb()
	ratio := s.clusterRatio()
	clusters := ceilDiv(want, ratio)
	groups, stop := t.e.allocEnd()
	if goal < s.FirstDataBlock || goal >= stop {
		goal = s.FirstDataBlock
	}
	first := (goal - s.FirstDataBlock) / s.BlocksPerGroup
	enough := min(clusters, max(s.ClustersPerGroup/2, 1))
	var best clusterRun
	for i := range groups {
		g := (first + i) % groups
		d, err := t.fs.groupDesc(g)
		if err != nil {
			return 0, 0, err
		}
		if int64(d.freeBlocks) <= best.n {
			continue
		}
		x, err := t.group(g)
		if err != nil {
			return 0, 0, err
		}
		from := int64(0)
		if i == 0 {
			from = (goal - s.groupStart(g)) / ratio
		}
		end := (min(s.groupEnd(g), stop) - s.groupStart(g)) / ratio
		if r := findClusters(x.busy, from, end, clusters); r.n > best.n {
			r.group = g
			best = r
		}
		if best.n >= enough {
			break
		}
	}
	if best.n == 0 {
		return 0, 0, ErrNoSpace
	}
	best.n = min(best.n, clusters)
	if err := t.takeClusters(best); err != nil {
		return 0, 0, err
	}
	start = s.groupStart(best.group) + best.start*ratio
	return start, min(best.n*ratio, want, s.BlocksCount-start), nil
}

// allocEnd is the number of groups in which, and the block before which,
// something is allocated: the end of the file system, or the one it is to get.
func (e *Editor) allocEnd() (groups, stop int64) {
	s := e.fs.sb
	if e.shrinkTo == 0 {
		return s.groups, s.BlocksCount
	}
	return ceilDiv(e.shrinkTo-s.FirstDataBlock, s.BlocksPerGroup), e.shrinkTo
}

// clusterRun is a run of clusters of a group.
type clusterRun struct{ group, start, n int64 }

// findClusters returns a run of want clear bits below end: one that begins at
// from, else the first behind it, else the first of all, else the longest.
func findClusters(b []byte, from, end, want int64) (best clusterRun) {
	for _, part := range [...]run{{from, end}, {0, from}} {
		for at := part.start; at < part.end; {
			at = nextClear(b, at, part.end)
			to := nextSet(b, at, end)
			if n := to - at; n > best.n {
				if best.start, best.n = at, n; n >= want {
					return best
				}
			}
			at = to
		}
	}
	return best
}

// takeClusters marks free clusters as in use.
func (t *Tx) takeClusters(r clusterRun) error {
	b, err := t.editBlockBitmap(r.group)
	if err != nil {
		return err
	}
	setBits(b, r.start, r.start+r.n)
	x, err := t.group(r.group)
	if err != nil {
		return err
	}
	setBits(x.busy, r.start, r.start+r.n)
	return t.countClusters(r.group, b, -r.n)
}

// editBlockBitmap returns the staged bitmap of the clusters of a group, which
// is made if there is none yet.
func (t *Tx) editBlockBitmap(g int64) ([]byte, error) {
	d, err := t.desc(g)
	if err != nil {
		return nil, err
	}
	if _, err := t.group(g); err != nil { // the state before
		return nil, err
	}
	b, err := t.edit(d.blockBitmap)
	if err != nil {
		return nil, err
	}
	if d.flags&bgBlockUninit != 0 {
		copy(b, t.sb().initialBlockBitmap(g, *d))
		d.flags &^= bgBlockUninit
	}
	return b, nil
}

// countClusters adds to what is free in a group, whose bitmap has changed.
func (t *Tx) countClusters(g int64, bitmap []byte, n int64) error {
	d, err := t.desc(g)
	if err != nil {
		return err
	}
	s := t.sb()
	free := int64(d.freeBlocks) + n
	if free < 0 || free > s.ClustersPerGroup {
		return descPlace(g, -1).corrupt("bg_free_blocks_count", "%d does not match the bitmap", d.freeBlocks)
	}
	d.freeBlocks = uint32(free)
	s.FreeBlocksCount += n * s.clusterRatio()
	if s.hasCsum() {
		d.blockCsum = bitmapChecksum(s, bitmap, s.ClustersPerGroup)
	}
	return nil
}

// freeBlocks frees the clusters that a run of blocks lies in.
func (t *Tx) freeBlocks(start, n int64) error {
	s := t.sb()
	ratio := s.clusterRatio()
	p := place{"block bitmap", 0, -1}
	if start < s.FirstDataBlock || n < 1 || start > s.BlocksCount-n {
		return p.corrupt("", "%d blocks from %d on are to be freed, and the file system has %d", n, start, s.BlocksCount)
	}
	for end := start + n; start < end; {
		g := (start - s.FirstDataBlock) / s.BlocksPerGroup
		stop := min(end, s.groupEnd(g))
		from, to := (start-s.groupStart(g))/ratio, ceilDiv(stop-s.groupStart(g), ratio)
		b, err := t.editBlockBitmap(g)
		if err != nil {
			return err
		}
		x, err := t.group(g)
		if err != nil {
			return err
		}
		for i := from; i < to; i++ {
			if !testBit(b, i) {
				return p.corrupt("", "block %d is to be freed, and is free", s.groupStart(g)+i*ratio)
			}
			clearBit(b, i)
			if testBit(x.base, i) {
				continue
			}
			// What the transaction itself has written there, and what leads to
			// it, is back if the operation fails.
			if t.save != nil {
				t.save.release(g, i)
			} else {
				clearBit(x.busy, i)
			}
		}
		if err := t.countClusters(g, b, to-from); err != nil {
			return err
		}
		for block := s.groupStart(g) + from*ratio; block < min(s.groupStart(g)+to*ratio, s.groupEnd(g)); block++ {
			t.drop(block)
		}
		start = stop
	}
	return nil
}

// release notes a cluster that is given out again once the operation is over.
func (s *savepoint) release(g, i int64) {
	if k := len(s.released); k > 0 {
		if last := &s.released[k-1]; last.group == g && last.start+last.n == i {
			last.n++
			return
		}
	}
	s.released = append(s.released, clusterRun{g, i, 1})
}

// release has clusters that an operation has freed given out again.
func (t *Tx) release(list []clusterRun) error {
	for _, r := range list {
		x, err := t.group(r.group)
		if err != nil {
			return err
		}
		for i := r.start; i < r.start+r.n; i++ {
			clearBit(x.busy, i)
		}
	}
	return nil
}

// Flags that a new inode has from its directory (kernel: fs/ext4/ext4.h,
// EXT4_FL_INHERITED, EXT4_REG_FLMASK, EXT4_OTHER_FLMASK).
const (
	nodumpFl      = 0x40
	noatimeFl     = 0x80
	dirsyncFl     = 0x10000
	topdirFl      = 0x20000
	projInheritFl = 0x20000000
	inheritedFl   = 0x1 | 0x2 | comprFl | 0x8 | nodumpFl | noatimeFl | 0x400 | 0x4000 | 0x8000 | dirsyncFl | projInheritFl | casefoldFl | 0x2000000
)

// allocInode allocates an inode near its directory, with times, flags and
// project id as a new file has them, and one link. It has no content, xattrs
// or owner yet.
func (t *Tx) allocInode(parent Ino, mode uint16) (*Inode, error) {
	dir, err := t.inode(parent)
	if err != nil {
		return nil, err
	}
	ino, err := t.takeInode(parent, mode&modeType == modeDir)
	if err != nil {
		return nil, err
	}
	s := t.sb()
	raw := make([]byte, s.InodeSize)
	n := &Inode{Ino: ino, Mode: mode, Links: 1, Atime: t.now, Ctime: t.now, Mtime: t.now, Crtime: t.now, raw: raw}
	if s.InodeSize > oldInodeSize {
		n.extraIsize = min(max(extraIsize, int(s.WantExtraIsize), int(s.MinExtraIsize))&^3, s.InodeSize-oldInodeSize)
		binary.LittleEndian.PutUint16(raw[0x80:], uint16(n.extraIsize))
	}
	n.Flags = dir.Flags & inheritedFl
	switch mode & modeType {
	case modeDir:
	case modeReg:
		n.Flags &^= dirsyncFl | topdirFl | casefoldFl | projInheritFl
	default:
		n.Flags &= nodumpFl | noatimeFl
	}
	if dir.Flags&projInheritFl != 0 && s.ROCompat&ROCompatProject != 0 {
		n.ProjID = dir.ProjID
	}
	if ty := mode & modeType; s.Incompat&IncompatExtents != 0 && (ty == modeReg || ty == modeDir || ty == modeLink) {
		n.Flags |= extentsFl
		putExtentHeader(n.block(), 0, extentRootMax, 0)
	}
	if old, err := t.fs.inode(ino); err == nil && old.Generation != 0 {
		n.Generation = old.Generation + 1
	}
	if x := t.inodes[ino]; x != nil {
		t.saveInode(ino, x)
	} else if t.save != nil {
		t.save.inodes[ino] = nil
	}
	x := &txInode{n: n, created: true}
	t.inodes[ino] = x
	t.markDirty(x)
	return n, nil
}

// takeInode finds a free inode, in the group of the directory or behind it,
// and marks it as in use.
func (t *Tx) takeInode(parent Ino, isDir bool) (Ino, error) {
	s := t.sb()
	per := int64(s.InodesPerGroup)
	first := int64(parent-1) / per
	groups, _ := t.e.allocEnd()
	for i := range groups {
		g := (first + i) % groups
		stored, err := t.fs.groupDesc(g)
		if err != nil {
			return 0, err
		}
		if stored.freeInodes == 0 {
			continue
		}
		bitmap, err := t.fs.inodeBitmap(g, stored)
		if err != nil {
			return 0, err
		}
		at := int64(0)
		if g == 0 {
			at = int64(s.FirstIno) - 1
		}
		for at = nextClear(bitmap, at, per); at < per && t.freed[Ino(g*per+at+1)]; {
			at = nextClear(bitmap, at+1, per)
		}
		if at < per {
			return Ino(g*per + at + 1), t.setInode(g, at, true, isDir)
		}
	}
	return 0, ErrNoInodes
}

// setInode marks an inode of a group as in use, or as free.
func (t *Tx) setInode(g, at int64, use, isDir bool) error {
	s := t.sb()
	d, err := t.desc(g)
	if err != nil {
		return err
	}
	b, err := t.edit(d.inodeBitmap)
	if err != nil {
		return err
	}
	if d.flags&bgInodeUninit != 0 {
		clear(b)
		setBits(b, int64(s.InodesPerGroup), 8*int64(len(b)))
		d.flags &^= bgInodeUninit
		// The kernel takes the two bitmaps of a group into use together.
		if d.flags&bgBlockUninit != 0 {
			bitmap, err := t.editBlockBitmap(g)
			if err != nil {
				return err
			}
			if err := t.countClusters(g, bitmap, 0); err != nil {
				return err
			}
		}
	}
	p := place{"inode bitmap of group " + itoa(g), 0, d.inodeBitmap}
	switch {
	case testBit(b, at) == use:
		return p.corrupt("", "inode %d is in the wrong state", g*int64(s.InodesPerGroup)+at+1)
	case use:
		setBits(b, at, at+1)
		d.freeInodes--
		s.FreeInodesCount--
	default:
		clearBit(b, at)
		d.freeInodes++
		s.FreeInodesCount++
	}
	if isDir && use {
		d.usedDirs++
	} else if isDir && d.usedDirs > 0 {
		d.usedDirs--
	}
	if left := uint32(int64(s.InodesPerGroup) - at - 1); use && d.itableUnused > left {
		d.itableUnused = left
	}
	if s.hasCsum() {
		d.inodeCsum = bitmapChecksum(s, b, int64(s.InodesPerGroup))
	}
	return nil
}

// freeInode frees an inode that nothing leads to, and that has no blocks any
// more.
func (t *Tx) freeInode(n *Inode) error {
	per := int64(t.sb().InodesPerGroup)
	if err := t.setInode(int64(n.Ino-1)/per, int64(n.Ino-1)%per, false, n.IsDir()); err != nil {
		return err
	}
	n.Links, n.Size, n.Blocks = 0, 0, 0
	n.Dtime = uint32(t.now.Unix())
	n.Ctime = t.now
	clear(n.block())
	if n.Flags&extentsFl != 0 {
		putExtentHeader(n.block(), 0, extentRootMax, 0)
	}
	n.Flags &^= inlineDataFl | indexFl
	t.dirty(n)
	t.freed[n.Ino] = true
	if t.save != nil {
		t.save.freed[n.Ino] = true
	}
	return nil
}

func testBit(b []byte, i int64) bool { return b[i/8]>>(i%8)&1 != 0 }
func clearBit(b []byte, i int64)     { b[i/8] &^= 1 << (i % 8) }

// nextClear returns the first clear bit from from on; end if there is none
// before.
func nextClear(b []byte, from, end int64) int64 { return nextBit(b, from, end, ^uint64(0)) }

// nextSet returns the first set bit from from on; end if there is none before.
func nextSet(b []byte, from, end int64) int64 { return nextBit(b, from, end, 0) }

// nextBit finds a bit that differs from those of skip, by words of 64 bits:
// bitmaps are whole blocks.
func nextBit(b []byte, from, end int64, skip uint64) int64 {
	for at := from; at < end; at = at&^63 + 64 {
		word := (binary.LittleEndian.Uint64(b[at/64*8:]) ^ skip) >> (at % 64)
		if word != 0 {
			return min(at+int64(bits.TrailingZeros64(word)), end)
		}
	}
	return end
}

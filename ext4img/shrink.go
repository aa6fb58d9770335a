package ext4img

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	"qimg/qcow2/blockdev"
)

// checkShrinkable refuses file systems that cannot be made smaller: they use
// something that depends on where things lie, in a way that is not known here.
func (f *FS) checkShrinkable() error {
	s := f.sb
	p := place{"superblock", 0, -1}
	switch {
	case s.ROCompat&ROCompatBigalloc != 0:
		return p.unsupported("s_feature_ro_compat", "bigalloc: cannot be shrunk")
	case s.Compat&CompatStableInodes != 0:
		return p.unsupported("s_feature_compat", "stable_inodes: cannot be shrunk")
	case f.fc != nil:
		return p.unsupported("s_feature_compat", "fast commits have to be replayed by a mount first")
	}
	bad, err := f.inode(badBlocksIno)
	if err == nil && bad.Blocks != 0 {
		err = place{"bad blocks", badBlocksIno, -1}.unsupported("i_blocks", "%d: cannot be shrunk", bad.Blocks)
	}
	return err
}

const badBlocksIno = 1

// shrinkRoom is what can be known of a shrink without changing anything.
type shrinkRoom struct {
	free, need             int64 // blocks: free before the new end, in use behind it
	freeInodes, needInodes int64
}

// fits reports whether all that has to move has a place.
func (r shrinkRoom) fits() bool { return r.need <= r.free && r.needInodes <= r.freeInodes }

// groupUse is what is in use in the groups of a file system.
type groupUse struct {
	s       *Superblock
	descs   []groupDesc
	bitmaps [][]byte // without what the groups' own structures take
	inodes  []int64  // that are in use
	journal *journalParts
}

// use reads the bitmaps of all groups.
func (f *FS) use(ctx context.Context) (*groupUse, error) {
	s := f.sb
	u := &groupUse{s: s}
	own := make([][]byte, s.groups)
	for g := range own {
		own[g] = make([]byte, s.BlockSize)
		setBits(own[g], 0, s.baseBlocks(int64(g)))
	}
	mark := func(start, n int64) {
		for end := start + n; start < end; {
			g := (start - s.FirstDataBlock) / s.BlocksPerGroup
			stop := min(end, s.groupStart(g+1))
			setBits(own[g], start-s.groupStart(g), stop-s.groupStart(g))
			start = stop
		}
	}
	for g := range s.groups {
		d, err := f.groupDesc(g)
		if err != nil {
			return nil, err
		}
		u.descs = append(u.descs, d)
		mark(d.blockBitmap, 1)
		mark(d.inodeBitmap, 1)
		mark(d.inodeTable, s.inodeTableBlocks())
	}
	for g := range s.groups {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		d := u.descs[g]
		b, err := f.blockBitmap(g, d)
		if err != nil {
			return nil, err
		}
		for i := range b {
			b[i] &^= own[g][i]
		}
		for i := s.groupEnd(g) - s.groupStart(g); i < 8*int64(len(b)); i++ {
			clearBit(b, i)
		}
		u.bitmaps = append(u.bitmaps, b)
		inodes, err := f.inodeBitmap(g, d)
		if err != nil {
			return nil, err
		}
		u.inodes = append(u.inodes, countBits(inodes)-(8*int64(len(inodes))-int64(s.InodesPerGroup)))
	}
	u.journal = &journalParts{}
	if s.Compat&CompatHasJournal != 0 && s.JournalInum != 0 {
		n, err := f.inode(s.JournalInum)
		if err != nil {
			return nil, err
		}
		if u.journal, err = f.journalParts(n); err != nil {
			return nil, err
		}
	}
	return u, nil
}

// room tells what a shrink to so many blocks takes.
func (u *groupUse) room(blocks int64) shrinkRoom {
	s := u.s
	next := s.withBlocks(blocks)
	next.layDescriptors(s)
	var r shrinkRoom
	for g := range s.groups {
		b := u.bitmaps[g]
		start := s.groupStart(g)
		if g >= next.groups {
			r.need += countBits(b)
			r.needInodes += u.inodes[g]
			continue
		}
		r.freeInodes += int64(s.InodesPerGroup) - u.inodes[g]
		n := min(s.groupEnd(g), blocks) - start
		before := countRange(b, 0, n)
		r.need += countBits(b) - before
		r.free += n - before
		// Structures that lie behind the new end need a place, too.
		d := u.descs[g]
		for _, at := range [...]run{{d.blockBitmap, 1}, {d.inodeBitmap, 1}, {d.inodeTable, s.inodeTableBlocks()}} {
			if at.start+at.end > blocks {
				r.need += at.end
			}
		}
	}
	// The groups' own structures, of removed groups too, until the end.
	for g, d := range u.descs {
		if int64(g) < next.groups {
			r.free -= min(s.baseBlocks(int64(g)), blocks-s.groupStart(int64(g)))
		}
		for _, at := range [...]run{{d.blockBitmap, 1}, {d.inodeBitmap, 1}, {d.inodeTable, s.inodeTableBlocks()}} {
			r.free -= max(0, min(at.start+at.end, blocks)-at.start)
		}
	}
	return r
}

// countRange counts the bits that are set from from to to.
func countRange(b []byte, from, to int64) int64 {
	n := int64(0)
	for from < to && from%64 != 0 {
		if testBit(b, from) {
			n++
		}
		from++
	}
	for ; from+64 <= to; from += 64 {
		n += int64(onesCount(b[from/8:]))
	}
	for ; from < to; from++ {
		if testBit(b, from) {
			n++
		}
	}
	return n
}

// freeRuns counts the runs of free blocks before a block: as many extents at
// most are cut in two by a move there.
func (u *groupUse) freeRuns(blocks int64) int64 {
	n := int64(0)
	for g := int64(0); g < u.s.groups && u.s.groupStart(g) < blocks; g++ {
		b, end := u.bitmaps[g], min(u.s.groupEnd(g), blocks)-u.s.groupStart(g)
		for at := nextClear(b, 0, end); at < end; n++ {
			at = nextClear(b, nextSet(b, at, end), end)
		}
	}
	return n
}

// margin is how many blocks more than are counted a shrink to so many can take:
// for nodes of extent trees that have more entries then, and for another map of
// the journal.
func (u *groupUse) margin(blocks int64) int64 {
	s := u.s
	journal := int64(0)
	if u.journal.behind(blocks) {
		journal = int64(len(u.journal.tree))
	}
	if s.Incompat&IncompatExtents == 0 {
		return journal
	}
	inodes := int64(0)
	for _, n := range u.inodes {
		inodes += n
	}
	runs := u.freeRuns(blocks)
	perNode := int64((s.BlockSize - extentHeaderLen) / extentLen / 2)
	return journal + min(runs, inodes) + runs/perNode
}

// minimum is the smallest number of blocks that a file system can have, for
// sure or, if not careful, where nothing takes more blocks in another place. lent
// adds the room for a journal where there is none.
func (u *groupUse) minimum(careful, lent bool) int64 {
	s := u.s
	data, inodes := int64(0), int64(0)
	for g := range s.groups {
		data += countBits(u.bitmaps[g])
		inodes += u.inodes[g]
	}
	if lent && s.Compat&CompatHasJournal == 0 {
		data += lentRoom(lentBlocksMin)
	}
	fits := func(blocks int64) bool {
		next := s.withBlocks(blocks)
		next.layDescriptors(s)
		room := blocks - s.FirstDataBlock
		for g := range next.groups {
			room -= next.groupOverhead(g)
		}
		if careful {
			room -= u.margin(blocks)
		}
		return inodes <= next.groups*int64(s.InodesPerGroup) && data <= room && s.roundBlocks(blocks) == blocks
	}
	groups := max(ceilDiv(inodes, int64(s.InodesPerGroup)), 1)
	for ; groups < s.groups; groups++ {
		if fits(s.groupStart(groups)) {
			break
		}
	}
	// Within the last group.
	lo, hi := s.groupStart(groups-1), min(s.groupStart(groups), s.BlocksCount)
	for lo+1 < hi {
		if mid := lo + (hi-lo)/2; fits(mid) {
			hi = mid
		} else {
			lo = mid
		}
	}
	return min(hi, s.BlocksCount)
}

// MinimumSize returns the smallest size in bytes that Resize is sure to reach:
// what the file system holds, and the structures of as many groups as that needs.
// With Minimum it can get a few blocks less.
func MinimumSize(ctx context.Context, dev blockdev.Reader) (int64, error) {
	f, err := Open(dev, nil)
	if err != nil {
		return 0, err
	}
	u, err := f.use(ctx)
	if err != nil {
		return 0, err
	}
	return u.minimum(true, true) * int64(f.sb.BlockSize), nil
}

// shrink makes the file system one of so many blocks. The structures of groups
// that go lie in the way until they have gone, so that it takes several steps
// where there is little room. A step that turns out to be too large has moved
// something, and a smaller one is tried.
//
// slack is how many blocks more than are needed for sure are to be left at first.
func (e *Editor) shrink(ctx context.Context, blocks, slack int64, r *ResizeResult) error {
	defer func() { e.shrinkTo = 0 }()
	for e.fs.sb.BlocksCount > blocks {
		u, err := e.fs.use(ctx)
		if err != nil {
			return err
		}
		step := u.step(blocks, slack)
		if step >= e.fs.sb.BlocksCount {
			return fmt.Errorf("ext4: %d blocks: %w", blocks, ErrMinimum)
		}
		err = e.shrinkStep(ctx, step, r)
		switch {
		case err == nil:
			slack = 0
		case errors.Is(err, ErrNoSpace) && e.err == nil:
			slack = max(2*slack, 16)
		default:
			return err
		}
	}
	return nil
}

// shrinkMore makes a file system that is about as small as it can be smaller by
// what was kept for the case that extents are cut in two.
func (e *Editor) shrinkMore(ctx context.Context, r *ResizeResult) error {
	u, err := e.fs.use(ctx)
	if err == nil {
		err = e.shrink(ctx, u.minimum(false, true), math.MinInt32, r)
	}
	if errors.Is(err, ErrMinimum) && e.err == nil {
		return nil // it is as small as it gets
	}
	return err
}

// shrinkLast makes a file system without a journal smaller by the room that the
// one had that was lent to it, as far as it can be done in an order that e2fsck -p
// repairs: no group goes, and no inode moves.
func (e *Editor) shrinkLast(ctx context.Context, r *ResizeResult) error {
	u, err := e.fs.use(ctx)
	if err != nil {
		return err
	}
	s := e.fs.sb
	blocks := max(u.minimum(false, false), s.groupStart(s.groups-1)+s.groupOverhead(s.groups-1)+minLastBlocks)
	if blocks >= s.BlocksCount {
		return nil
	}
	err = e.shrink(ctx, blocks, math.MinInt32, r)
	if errors.Is(err, ErrMinimum) && e.err == nil {
		return nil
	}
	return err
}

// step is the smallest number of blocks, but not less than that one, to which
// the file system can be shrunk at once, if so many blocks are to be left.
func (u *groupUse) step(blocks, slack int64) int64 {
	s := u.s
	fits := func(n int64) bool {
		r := u.room(n)
		r.need += max(u.margin(n)+slack, 0)
		return r.fits()
	}
	if fits(blocks) {
		return blocks
	}
	lo, hi := blocks, s.BlocksCount
	for lo+1 < hi {
		mid := s.roundBlocks(lo + (hi-lo)/2)
		if mid > lo && fits(mid) {
			hi = mid
		} else {
			lo += (hi - lo) / 2
		}
	}
	return hi
}

// mover moves what lies behind the new end, in transactions.
type mover struct {
	e      *Editor
	t      *Tx // nil: none has begun
	limit  int64
	groups int64
	budget int // blocks that a transaction stages before it is committed
	result *ResizeResult
}

// moveChunk is how many blocks are moved in one operation, at most.
const moveChunk = 4096

// tx returns the transaction, after a commit of one that is large enough.
func (m *mover) tx(ctx context.Context) (*Tx, error) {
	if m.t != nil && len(m.t.staged)+len(m.t.descs) >= m.budget {
		if err := m.commit(ctx); err != nil {
			return nil, err
		}
	}
	if m.t == nil {
		t, err := m.e.Begin()
		if err != nil {
			return nil, err
		}
		m.t = t
	}
	return m.t, nil
}

func (m *mover) commit(ctx context.Context) error {
	if m.t == nil {
		return nil
	}
	t := m.t
	m.t = nil
	return t.Commit(ctx)
}

// shrinkStep shrinks the file system at once. Order: bitmaps and inode tables
// of groups that stay; inodes of groups that go; blocks of files; the journal;
// each with what leads there, in transactions of their own; then the one that
// makes the file system smaller.
func (e *Editor) shrinkStep(ctx context.Context, blocks int64, r *ResizeResult) error {
	s := e.fs.sb
	e.shrinkTo = blocks
	m := &mover{e: e, limit: blocks, result: r}
	m.groups = ceilDiv(blocks-s.FirstDataBlock, s.BlocksPerGroup)
	m.budget = 2048
	if e.journal != nil {
		m.budget = int(min((e.journal.last-e.journal.first)/3, 4096))
	}
	defer func() {
		if m.t != nil {
			m.t.Discard()
		}
	}()
	for _, step := range []func(context.Context) error{
		m.moveGroups, m.commit,
		m.moveInodes, m.commit,
		m.moveFiles, m.commit,
		m.moveJournal,
		m.cut,
	} {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := step(ctx); err != nil {
			return err
		}
	}
	return e.writeBackups(ctx)
}

// moveGroups moves bitmaps and inode tables of groups that stay.
func (m *mover) moveGroups(ctx context.Context) error {
	s := m.e.fs.sb
	table := s.inodeTableBlocks()
	for g := range m.groups {
		d, err := m.e.fs.groupDesc(g)
		if err != nil {
			return err
		}
		if d.blockBitmap < m.limit && d.inodeBitmap < m.limit && d.inodeTable+table <= m.limit {
			continue
		}
		t, err := m.tx(ctx)
		if err != nil {
			return err
		}
		if d.inodeTable+table > m.limit {
			if err := m.commit(ctx); err != nil { // what it holds is copied as it is
				return err
			}
			if t, err = m.tx(ctx); err != nil {
				return err
			}
			if err := m.moveTable(t, g, table); err != nil {
				return err
			}
		}
		for _, bitmap := range [...]func(*groupDesc) *int64{
			func(d *groupDesc) *int64 { return &d.blockBitmap },
			func(d *groupDesc) *int64 { return &d.inodeBitmap },
		} {
			if *bitmap(&d) < m.limit {
				continue
			}
			if err := m.moveBitmap(t, g, bitmap); err != nil {
				return err
			}
		}
	}
	return nil
}

// moveTable moves the inode table of a group.
func (m *mover) moveTable(t *Tx, g, n int64) error {
	start, got, err := t.allocBlocks(t.sb().groupStart(g), n)
	if err == nil && got < n {
		err = ErrNoSpace
	}
	if err != nil {
		return fmt.Errorf("ext4: the inode table of group %d, %d blocks in one piece: %w", g, n, err)
	}
	d, err := t.desc(g)
	if err != nil {
		return err
	}
	old := d.inodeTable
	if err := t.copyBlocks(old, start, n); err != nil {
		return err
	}
	d.inodeTable = start
	m.result.MovedBlocks += n
	return t.freeBlocks(old, n)
}

// moveBitmap moves a bitmap of a group.
func (m *mover) moveBitmap(t *Tx, g int64, bitmap func(*groupDesc) *int64) error {
	block, _, err := t.allocBlocks(t.sb().groupStart(g), 1)
	if err != nil {
		return err
	}
	d, err := t.desc(g)
	if err != nil {
		return err
	}
	old := *bitmap(d)
	b, err := t.block(old)
	if err != nil {
		return err
	}
	copy(t.fresh(block), b)
	*bitmap(d) = block
	m.result.MovedBlocks++
	return t.freeBlocks(old, 1)
}

// eachUsed calls fn with the inodes that are in use in groups.
func (m *mover) eachUsed(ctx context.Context, from, to int64, fn func(Ino) error) error {
	s := m.e.fs.sb
	per := int64(s.InodesPerGroup)
	for g := from; g < to; g++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		d, err := m.e.fs.groupDesc(g)
		if err != nil {
			return err
		}
		if int64(d.freeInodes) == per {
			continue
		}
		b, err := m.e.fs.inodeBitmap(g, d)
		if err != nil {
			return err
		}
		for at := nextSet(b, 0, per); at < per; at = nextSet(b, at+1, per) {
			if err := fn(Ino(g*per + at + 1)); err != nil {
				return err
			}
		}
	}
	return nil
}

// moveFiles moves the blocks of all files.
func (m *mover) moveFiles(ctx context.Context) error {
	shared := map[int64]int64{} // xattr blocks that are shared, and where they have moved to
	return m.eachUsed(ctx, 0, m.groups, func(ino Ino) error {
		n, err := m.e.fs.inode(ino)
		if err != nil {
			return err
		}
		if n.FileACL >= m.limit {
			if err := m.moveXattrBlock(ctx, ino, shared); err != nil {
				return err
			}
		}
		switch {
		case ino == m.e.fs.sb.JournalInum:
			return nil
		case ino == resizeIno && m.e.fs.sb.Compat&CompatResizeInode != 0:
			return m.moveResizeInode(ctx)
		case !n.mapsBlocks():
			return nil
		}
		for at := int64(0); at < maxLogical; {
			if n.Flags&extentsFl != 0 {
				at, err = m.moveExtent(ctx, ino, at)
			} else {
				at, err = m.movePointers(ctx, ino, at)
			}
			if err != nil {
				return fmt.Errorf("ext4: inode %d: %w", ino, err)
			}
		}
		return nil
	})
}

// mapsBlocks reports whether i_block leads to blocks.
func (n *Inode) mapsBlocks() bool {
	switch n.Type() {
	case modeChar, modeBlock, modeFifo, modeSocket:
		return false
	case modeLink:
		if n.Flags&extentsFl == 0 && n.Size < inodeBlockLen { // in i_block
			return false
		}
	}
	return n.Flags&inlineDataFl == 0
}

// moveXattrBlock moves the xattr block of an inode. One that others share, too,
// is shared in its new place by those that have moved, at every moment.
func (m *mover) moveXattrBlock(ctx context.Context, ino Ino, shared map[int64]int64) error {
	t, err := m.tx(ctx)
	if err != nil {
		return err
	}
	n, err := t.inode(ino)
	if err != nil {
		return err
	}
	le := binary.LittleEndian
	s := t.sb()
	old := n.FileACL
	seal := func(b []byte, block int64) {
		if s.hasCsum() {
			le.PutUint32(b[16:], xattrBlockChecksum(s, b, block))
		}
	}
	b, err := t.fs.xattrBlock(place{"xattr block", ino, old})
	if err != nil {
		return err
	}
	refs := le.Uint32(b[4:])
	to, moved := shared[old]
	if moved {
		c, err := t.edit(to)
		if err != nil {
			return err
		}
		le.PutUint32(c[4:], le.Uint32(c[4:])+1)
		seal(c, to)
	} else {
		if to, _, err = t.allocBlocks(t.goal(n, 0), 1); err != nil {
			return err
		}
		c := t.fresh(to)
		copy(c, b)
		le.PutUint32(c[4:], 1)
		seal(c, to)
		m.result.MovedBlocks++
	}
	if refs > 1 {
		shared[old] = to
		c, err := t.edit(old)
		if err != nil {
			return err
		}
		le.PutUint32(c[4:], refs-1)
		seal(c, old)
	} else if err := t.freeBlocks(old, 1); err != nil {
		return err
	}
	n.FileACL = to
	t.dirty(n)
	return t.flush()
}

// moveResizeInode moves the block of the resize inode that can lie anywhere.
func (m *mover) moveResizeInode(ctx context.Context) error {
	n, err := m.e.fs.inode(resizeIno)
	if err != nil {
		return err
	}
	old := int64(binary.LittleEndian.Uint32(n.block()[13*4:]))
	if old < m.limit {
		return nil
	}
	t, err := m.tx(ctx)
	if err != nil {
		return err
	}
	if n, err = t.inode(resizeIno); err != nil {
		return err
	}
	to, err := m.moveMeta(t, old, 0)
	if err != nil {
		return err
	}
	binary.LittleEndian.PutUint32(n.block()[13*4:], uint32(to))
	t.dirty(n)
	return t.flush()
}

// moveMeta moves a block that the caller then makes something else lead to.
func (m *mover) moveMeta(t *Tx, old, goal int64) (int64, error) {
	to, _, err := t.allocBlocks(goal, 1)
	if err != nil {
		return 0, err
	}
	b, err := t.block(old)
	if err != nil {
		return 0, err
	}
	copy(t.fresh(to), b)
	m.result.MovedBlocks++
	return to, t.freeBlocks(old, 1)
}

// moveExtent moves the first of the extents from a logical block on, in the leaf
// that covers that, which lies behind the limit, or part of it, and the nodes
// that lead there. It returns where to go on.
func (m *mover) moveExtent(ctx context.Context, ino Ino, at int64) (int64, error) {
	n, err := m.e.fs.inode(ino)
	if err != nil {
		return 0, err
	}
	if t := m.t; t != nil {
		if n, err = t.inode(ino); err != nil {
			return 0, err
		}
	}
	reader := m.t
	if reader == nil { // nothing is staged
		reader = &Tx{e: m.e, fs: m.e.fs}
	}
	path, end, err := reader.extentPath(n, at)
	if err != nil {
		return 0, err
	}
	leaf := path[len(path)-1]
	i := 0
	for i < len(leaf.list) && (leaf.list[i].logical+leaf.list[i].len <= at || leaf.list[i].physical+leaf.list[i].len <= m.limit) {
		i++
	}
	behind := i < len(leaf.list)
	for _, x := range path {
		behind = behind || x.block >= m.limit
	}
	if !behind {
		return end, nil
	}
	t, err := m.tx(ctx)
	if err != nil {
		return 0, err
	}
	if n, err = t.inode(ino); err != nil {
		return 0, err
	}
	for k := 1; k < len(path); k++ {
		x, up := path[k], path[k-1]
		if x.block < m.limit {
			continue
		}
		if x.block, err = m.moveMeta(t, x.block, up.block); err != nil {
			return 0, err
		}
		up.list[up.at].physical = x.block
		if err := t.storeExtents(n, path, k-1); err != nil {
			return 0, err
		}
	}
	if i == len(leaf.list) {
		return end, t.flush()
	}
	e := leaf.list[i]
	part := e
	if cut := max(m.limit-e.physical, at-e.logical, 0); cut > 0 {
		part.logical, part.physical, part.len = e.logical+cut, e.physical+cut, e.len-cut
	}
	if part.len, err = m.relocate(t, n, path, i, part); err != nil {
		return 0, err
	}
	return part.logical + part.len, t.flush()
}

// relocate moves a part of the extent that entry i of the leaf at the end of
// path is, and returns how much of it has moved.
func (m *mover) relocate(t *Tx, n *Inode, path []*extentNode, i int, part extent) (int64, error) {
	last := len(path) - 1
	leaf := path[last]
	e := &leaf.list[i]
	behind := int64(0)
	if i > 0 && leaf.list[i-1].physical+leaf.list[i-1].len < m.limit {
		behind = leaf.list[i-1].physical + leaf.list[i-1].len - 1
	}
	start, got, err := t.allocBlocks(t.goal(n, behind), min(part.len, moveChunk))
	if err != nil {
		return 0, err
	}
	part.len = got
	if !part.unwritten {
		if err := t.copyContent(n, part.physical, start, got); err != nil {
			return 0, err
		}
	}
	m.result.MovedBlocks += got
	old := part.physical
	part.physical = start
	if e.logical == part.logical && e.len == part.len {
		e.physical = start
		if i > 0 && leaf.list[i-1].joins(*e) {
			leaf.list[i-1].len += e.len
			leaf.list = append(leaf.list[:i], leaf.list[i+1:]...)
		}
		err = t.storeExtents(n, path, last)
	} else if i > 0 && e.logical == part.logical && leaf.list[i-1].joins(part) {
		leaf.list[i-1].len += part.len
		e.logical, e.physical, e.len = e.logical+part.len, e.physical+part.len, e.len-part.len
		err = t.storeExtents(n, path, last)
	} else {
		if err = t.removeExtents(n, part.logical, part.logical+part.len, func(extent) error { return nil }); err == nil {
			err = t.insertExtent(n, part)
		}
	}
	if err != nil {
		return 0, err
	}
	return got, t.freeBlocks(old, got)
}

// copyContent copies blocks of an inode to places that are free in the
// committed state.
func (t *Tx) copyContent(n *Inode, from, to, blocks int64) error {
	s := t.sb()
	if s.Compat&CompatOrphanFile == 0 || n.Ino != s.OrphanFileInum || !s.hasCsum() {
		return t.copyBlocks(from, to, blocks)
	}
	// The checksums of this file's blocks cover their places.
	for i := range blocks {
		old, err := t.block(from + i)
		if err != nil {
			return err
		}
		b := t.fresh(to + i)
		copy(b, old)
		binary.LittleEndian.PutUint32(b[len(b)-orphanTailLen+4:], orphanChecksum(s, n, to+i, b))
	}
	return nil
}

// movePointers moves the blocks behind the limit that one block of pointers, or
// i_block, leads to, which a logical block belongs to, and the blocks of
// pointers that lead there. It returns where to go on.
func (m *mover) movePointers(ctx context.Context, ino Ino, at int64) (next int64, err error) {
	n, err := m.e.fs.inode(ino)
	if m.t != nil {
		n, err = m.t.inode(ino)
	}
	if err != nil {
		return 0, err
	}
	le := binary.LittleEndian
	perBlock := int64(m.e.fs.sb.BlockSize / 4)
	if at < directBlocks {
		if !m.anyBehind(n.block()[:4*directBlocks]) {
			return directBlocks, nil
		}
		t, err := m.tx(ctx)
		if err != nil {
			return 0, err
		}
		if n, err = t.inode(ino); err != nil {
			return 0, err
		}
		if err := m.movePointed(t, n, n.block()[:4*directBlocks]); err != nil {
			return 0, err
		}
		t.dirty(n)
		return directBlocks, t.flush()
	}
	from, covers, level := int64(directBlocks), perBlock, 1
	for ; level <= indirectLevels && at >= from+covers; level++ {
		from += covers
		covers *= perBlock
	}
	if level > indirectLevels {
		return maxLogical, nil
	}
	// The blocks of pointers on the way, and whether anything has to move.
	type step struct {
		block int64
		slot  int64 // in the one before, or in i_block
	}
	var way []step
	behind := false
	slot, b := int64(directBlocks+level-1), n.block()
	for {
		block := int64(le.Uint32(b[4*slot:]))
		if block == 0 {
			return from + covers, nil
		}
		if block >= m.e.fs.sb.BlocksCount {
			return 0, place{"block map", ino, -1}.corrupt("", "pointer %d, and the file system has %d blocks", block, m.e.fs.sb.BlocksCount)
		}
		behind = behind || block >= m.limit
		way = append(way, step{block, slot})
		if b, err = m.e.fs.block(block); err != nil {
			return 0, err
		}
		covers /= perBlock
		if covers == 1 {
			break
		}
		slot = (at - from) / covers
		from += slot * covers
	}
	next = from + perBlock
	if !behind && !m.anyBehind(b) {
		return next, nil
	}
	t, err := m.tx(ctx)
	if err != nil {
		return 0, err
	}
	if n, err = t.inode(ino); err != nil {
		return 0, err
	}
	up := n.block()
	for _, w := range way {
		if w.block >= m.limit {
			if w.block, err = m.moveMeta(t, w.block, 0); err != nil {
				return 0, err
			}
			le.PutUint32(up[4*w.slot:], uint32(w.block))
		}
		if up, err = t.edit(w.block); err != nil {
			return 0, err
		}
	}
	if err := m.movePointed(t, n, up); err != nil {
		return 0, err
	}
	t.dirty(n)
	return next, t.flush()
}

// anyBehind reports whether any of the pointers leads behind the limit.
func (m *mover) anyBehind(b []byte) bool {
	for i := 0; i < len(b); i += 4 {
		if int64(binary.LittleEndian.Uint32(b[i:])) >= m.limit {
			return true
		}
	}
	return false
}

// movePointed moves the blocks behind the limit that pointers lead to.
func (m *mover) movePointed(t *Tx, n *Inode, b []byte) error {
	le := binary.LittleEndian
	at := func(i int) int64 { return int64(le.Uint32(b[4*i:])) }
	behind := int64(0)
	for i := 0; i < len(b)/4; {
		old := at(i)
		if old < m.limit {
			if i++; old != 0 {
				behind = old
			}
			continue
		}
		k := 1
		for i+k < len(b)/4 && at(i+k) == old+int64(k) {
			k++
		}
		start, got, err := t.allocBlocks(t.goal(n, behind), int64(k))
		if err != nil {
			return err
		}
		if err := t.copyContent(n, old, start, got); err != nil {
			return err
		}
		for j := range got {
			le.PutUint32(b[4*(int64(i)+j):], uint32(start+j))
		}
		if err := t.freeBlocks(old, got); err != nil {
			return err
		}
		m.result.MovedBlocks += got
		behind = start + got - 1
		i += int(got)
	}
	return nil
}

// cut is the transaction that makes the file system smaller. Nothing is behind
// the new end any more but the structures of groups that go.
func (m *mover) cut(ctx context.Context) error {
	e := m.e
	old := *e.fs.sb
	next := old.withBlocks(m.limit)
	next.layDescriptors(&old)
	u, err := e.fs.use(ctx)
	if err != nil {
		return err
	}
	if r := u.room(m.limit); r.need > 0 || r.needInodes > 0 {
		return fmt.Errorf("ext4: internal error: %d blocks and %d inodes have not moved", r.need, r.needInodes)
	}
	t, err := e.Begin()
	if err != nil {
		return err
	}
	defer t.Discard()
	e.shrinkTo = 0 // nothing is allocated
	// What the groups that go have before the new end, and what the table of
	// descriptors gives back.
	for g := next.groups; g < old.groups; g++ {
		d := u.descs[g]
		for _, r := range [...]run{{d.blockBitmap, 1}, {d.inodeBitmap, 1}, {d.inodeTable, old.inodeTableBlocks()}} {
			if n := min(r.start+r.end, m.limit) - r.start; n > 0 {
				if err := t.freeBlocks(r.start, n); err != nil {
					return err
				}
			}
		}
	}
	for g := range next.groups {
		if was, now := old.baseBlocks(g), next.baseBlocks(g); was > now {
			if err := t.freeBlocks(old.groupStart(g)+now, was-now); err != nil {
				return err
			}
		}
	}
	if err := t.cutLastGroup(&old, &next); err != nil {
		return err
	}
	if err := t.clearDescs(&next); err != nil {
		return err
	}
	if next.Compat&CompatResizeInode != 0 {
		if err := t.putResizeInode(&next); err != nil {
			return err
		}
	}
	next.FreeBlocksCount, next.FreeInodesCount = 0, 0
	overhead := int64(old.OverheadClusters)
	for g := range old.groups {
		overhead -= old.groupOverhead(g)
		if g >= next.groups {
			continue
		}
		overhead += next.groupOverhead(g)
		d, err := t.fs.groupDesc(g)
		if err != nil {
			return err
		}
		next.FreeBlocksCount += int64(d.freeBlocks)
		next.FreeInodesCount += d.freeInodes
	}
	next.State |= old.State
	if err := t.flush(); err != nil {
		return err
	}
	*t.sb() = next
	if err := t.Commit(ctx); err != nil {
		return err
	}
	if err := e.reopen(); err != nil || old.OverheadClusters == 0 {
		return err
	}
	return e.setOverhead(overhead)
}

// cutLastGroup marks what is behind the new end as not there in the bitmap of
// the last group.
func (t *Tx) cutLastGroup(old, next *Superblock) error {
	g := next.groups - 1
	b, err := t.editBlockBitmap(g)
	if err != nil {
		return err
	}
	from, to := next.BlocksCount-next.groupStart(g), old.groupEnd(g)-old.groupStart(g)
	free := to - from - countRange(b, from, to)
	setBits(b, from, 8*int64(len(b)))
	return t.countClusters(g, b, -free)
}

// clearDescs makes zeroes of the descriptors of groups that go, as far as they
// lie in blocks that others are in.
func (t *Tx) clearDescs(next *Superblock) error {
	perBlock := int64(next.BlockSize / next.DescSize)
	if next.groups%perBlock == 0 {
		return nil
	}
	block, off := next.groupDescPlace(next.groups)
	b, err := t.edit(block)
	if err == nil {
		clear(b[off:])
	}
	return err
}

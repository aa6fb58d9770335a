package ext4img

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"
)

// Tx is one transaction of an Editor: what is to change, held in memory until
// Commit. Only metadata is; the content of files goes to free blocks of the
// device at once, where nothing leads to it before the commit. Of an operation
// that fails nothing is left in the transaction. A Tx is used by one goroutine.
type Tx struct {
	e   *Editor
	fs  *FS // of the Editor; reads what is staged
	now time.Time
	err error // of the device; the transaction is over
	// plan: the content of files is not written, and nothing is committed.
	plan bool

	before    Superblock // as committed
	staged    map[int64]*stagedBlock
	descs     map[int64]*groupDesc
	inodes    map[Ino]*txInode
	groups    map[int64]*txGroup
	freed     map[Ino]bool // inodes that are not given out again
	unflushed map[Ino]bool // inodes that are newer than their table
	wrote     []run        // blocks of content that were written
	// Directories that have gained and lost names: see stageOf.
	gained, lost map[Ino]bool
	save         *savepoint // of the operation that runs; nil: none
	// xattrBlocks are new blocks of xattrs by h_hash, which more inodes can share.
	xattrBlocks map[uint32]int64
	dirRooms    map[Ino]dirRoom // of linear directories
}

// stagedBlock is a block as it will be.
type stagedBlock struct {
	data []byte
	// fresh: the block is free in the committed state, so that it is written
	// to its place before the commit, and not through the journal.
	fresh bool
}

// txInode is an inode that the transaction has given out.
type txInode struct {
	n       *Inode
	created bool // by this transaction
	dirty   bool // newer than the inode table
}

// savepoint is what was there before an operation, of all that it has touched.
type savepoint struct {
	sb     Superblock
	blocks map[int64]*stagedBlock // nil: not staged
	descs  map[int64]*groupDesc   // nil: not staged
	inodes map[Ino]*txInode       // nil: not there; else a copy
	groups map[int64]bool
	freed  map[Ino]bool
	// released are clusters that the transaction has allocated and the
	// operation has freed.
	released []clusterRun
}

// FS returns the file system as it will be: every method finds what is staged.
// A File that was opened before a change of its inode does not. It is used by
// the goroutine of the transaction alone, and shows the committed state once
// that is over.
func (t *Tx) FS() *FS { return t.fs }

// sb returns the superblock as it will be, which may be changed.
func (t *Tx) sb() *Superblock { return t.fs.sb }

// stagedBlock returns a block that the transaction has changed. There are none
// without a transaction.
func (t *Tx) stagedBlock(n int64) ([]byte, bool) {
	if t == nil {
		return nil, false
	}
	s, ok := t.staged[n]
	if !ok {
		return nil, false
	}
	return s.data, true
}

func (t *Tx) stagedDesc(group int64) *groupDesc {
	if t == nil {
		return nil
	}
	return t.descs[group]
}

// patch puts blocks that the transaction has changed in the place of those
// that p, bytes from off on, was filled with.
func (t *Tx) patch(p []byte, off int64) {
	if t == nil || len(t.staged) == 0 {
		return
	}
	bs := int64(t.sb().BlockSize)
	end := off + int64(len(p))
	for n := off / bs; n*bs < end; n++ {
		if s, ok := t.staged[n]; ok {
			from, to := max(n*bs, off), min((n+1)*bs, end)
			copy(p[from-off:to-off], s.data[from-n*bs:])
		}
	}
}

// block returns a block of metadata as it will be, which must not be changed.
func (t *Tx) block(n int64) ([]byte, error) { return t.fs.block(n) }

// edit returns the staged copy of a block, which is changed in place until the
// next call of the transaction. A block that is in use in the committed state
// goes through the journal.
func (t *Tx) edit(n int64) ([]byte, error) {
	s, ok := t.staged[n]
	if !ok {
		b, err := t.fs.block(n)
		if err != nil {
			return nil, err
		}
		s = &stagedBlock{data: bytes.Clone(b)}
	}
	t.saveBlock(n)
	t.staged[n] = s
	return s.data, nil
}

// fresh returns the staged copy, all zeroes, of a block that was just
// allocated.
func (t *Tx) fresh(n int64) []byte {
	t.saveBlock(n)
	s := &stagedBlock{data: make([]byte, t.sb().BlockSize), fresh: true}
	t.staged[n] = s
	return s.data
}

// drop forgets what was staged of a block that is free now.
func (t *Tx) drop(n int64) {
	if _, ok := t.staged[n]; ok {
		t.saveBlock(n)
		delete(t.staged, n)
	}
}

// saveBlock notes a block for the case that the operation fails.
func (t *Tx) saveBlock(n int64) {
	if t.save == nil {
		return
	}
	if _, ok := t.save.blocks[n]; ok {
		return
	}
	s, ok := t.staged[n]
	if !ok {
		t.save.blocks[n] = nil
		return
	}
	t.save.blocks[n] = &stagedBlock{bytes.Clone(s.data), s.fresh}
}

// desc returns the staged descriptor of a group, which may be changed.
func (t *Tx) desc(group int64) (*groupDesc, error) {
	d, ok := t.descs[group]
	if !ok {
		stored, err := t.fs.groupDesc(group)
		if err != nil {
			return nil, err
		}
		d = &stored
	}
	if t.save != nil {
		if _, ok := t.save.descs[group]; !ok {
			t.save.descs[group] = nil
			if t.descs[group] != nil {
				old := *d
				t.save.descs[group] = &old
			}
		}
	}
	t.descs[group] = d
	return d, nil
}

// inode returns an inode, in use or not, that may be changed, its raw bytes,
// too: the same one for the whole transaction. It becomes part of that by
// dirty.
func (t *Tx) inode(ino Ino) (*Inode, error) {
	x, ok := t.inodes[ino]
	if !ok {
		n, err := t.fs.inode(ino)
		if err != nil {
			return nil, err
		}
		x = &txInode{n: n}
		t.inodes[ino] = x
	}
	t.saveInode(ino, x)
	return x.n, nil
}

// saveInode notes an inode for the case that the operation fails. All inodes
// were in their table when it began.
func (t *Tx) saveInode(ino Ino, x *txInode) {
	if t.save == nil {
		return
	}
	if _, ok := t.save.inodes[ino]; ok {
		return
	}
	n := *x.n
	n.raw = bytes.Clone(n.raw)
	t.save.inodes[ino] = &txInode{&n, x.created, x.dirty}
}

// used returns an inode that is in use and may be changed.
func (t *Tx) used(ino Ino) (*Inode, error) {
	n, err := t.inode(ino)
	if err == nil && (n.Mode == 0 || n.Links == 0) {
		return nil, place{"inode", ino, -1}.corrupt("", "is not in use")
	}
	return n, err
}

// dirty makes the inode as it is now part of the transaction.
func (t *Tx) dirty(n *Inode) {
	x := t.inodes[n.Ino]
	if x == nil || x.n != n {
		panic(fmt.Sprintf("ext4img: internal error: inode %d is not of this transaction", n.Ino))
	}
	t.markDirty(x)
}

func (t *Tx) markDirty(x *txInode) {
	x.dirty = true
	t.unflushed[x.n.Ino] = true
}

// flushInode puts a dirty inode into its table.
func (t *Tx) flushInode(ino Ino) error {
	if t == nil {
		return nil
	}
	x := t.inodes[ino]
	if x == nil || !x.dirty {
		return nil
	}
	t.saveInode(ino, x)
	block, off, err := t.fs.inodePlace(ino)
	if err != nil {
		return err
	}
	b, err := t.edit(block)
	if err != nil {
		return err
	}
	t.fixBlocks(x.n)
	x.n.put(t.sb(), b[off:off+t.sb().InodeSize])
	copy(x.n.raw, b[off:])
	x.dirty = false
	delete(t.unflushed, ino)
	return nil
}

// fixBlocks chooses the unit of i_blocks (kernel: fs/ext4/inode.c,
// ext4_inode_blocks_set).
func (t *Tx) fixBlocks(n *Inode) {
	n.Flags &^= hugeFileFl
	if n.Blocks >= 1<<48 {
		n.Flags |= hugeFileFl
	}
}

// flush puts all dirty inodes into their tables.
func (t *Tx) flush() error {
	for _, ino := range slices.Sorted(maps.Keys(t.unflushed)) {
		if err := t.flushInode(ino); err != nil {
			return err
		}
	}
	return nil
}

// do runs an operation, of which nothing is left in the transaction if it
// fails.
func (t *Tx) do(op func() error) error {
	switch {
	case t.e == nil || t.e.tx != t:
		return errTxOver
	case t.err != nil:
		return t.err
	case t.save != nil:
		return op() // part of another
	}
	if err := t.flush(); err != nil {
		return err
	}
	t.save = &savepoint{
		sb:     *t.sb(),
		blocks: map[int64]*stagedBlock{},
		descs:  map[int64]*groupDesc{},
		inodes: map[Ino]*txInode{},
		groups: map[int64]bool{},
		freed:  map[Ino]bool{},
	}
	err := op()
	if err == nil {
		err = t.flush()
	}
	if err == nil {
		err = t.release(t.save.released)
	}
	if err != nil {
		t.rollback()
	}
	t.save = nil
	return err
}

var (
	errTxOver = errors.New("ext4: the transaction is over")
	errPlan   = errors.New("ext4: the transaction was a plan")
)

// rollback takes back what the operation has done.
func (t *Tx) rollback() {
	s := t.save
	*t.sb() = s.sb
	for n, b := range s.blocks {
		if b == nil {
			delete(t.staged, n)
		} else {
			t.staged[n] = b
		}
	}
	for g, d := range s.descs {
		if d == nil {
			delete(t.descs, g)
		} else {
			t.descs[g] = d
		}
	}
	for ino, x := range s.inodes {
		if x == nil {
			delete(t.inodes, ino)
			continue
		}
		*t.inodes[ino].n = *x.n // others keep the pointer
		t.inodes[ino].created, t.inodes[ino].dirty = x.created, x.dirty
	}
	for g := range s.groups {
		delete(t.groups, g)
	}
	for ino := range s.freed {
		delete(t.freed, ino)
	}
	clear(t.unflushed) // there were none
}

// writeData writes content to blocks that are free in the committed state.
func (t *Tx) writeData(p []byte, block int64) error {
	if t.plan {
		return nil
	}
	bs := int64(t.sb().BlockSize)
	n := ceilDiv(int64(len(p)), bs)
	if k := len(t.wrote); k > 0 && t.wrote[k-1].end == block {
		t.wrote[k-1].end += n
	} else {
		t.wrote = append(t.wrote, run{block, block + n})
	}
	if _, err := t.e.dev.WriteAt(p, block*bs); err != nil {
		t.err = t.e.fail(fmt.Errorf("ext4: write of blocks from %d on: %w", block, err))
		return t.err
	}
	return nil
}

// Discard ends the transaction without a change of the file system. After
// Commit it does nothing.
func (t *Tx) Discard() {
	if t.e == nil || t.e.tx != t {
		return
	}
	*t.fs.sb = t.before
	t.end()
}

func (t *Tx) end() {
	for _, r := range t.wrote {
		t.fs.dropBlocks(r.start, r.end)
	}
	t.fs.tx = nil
	t.e.tx = nil
}

// Commit makes the transaction part of the file system, wholly or not at all,
// and syncs the device. The transaction is over then, whatever Commit returns.
// ctx is looked at until the point of no return.
//
// A transaction that does not fit the journal is an error that matches
// ErrTooLarge; nothing has changed then. After an error of the device the
// Editor takes no further transactions; what the device holds is the state
// before or after the transaction, once the journal is replayed.
func (t *Tx) Commit(ctx context.Context) error {
	switch {
	case t.e == nil || t.e.tx != t:
		return errTxOver
	case t.err != nil:
		t.Discard()
		return t.err
	case t.plan:
		t.Discard()
		return errPlan
	}
	err := t.seal()
	if err == nil && len(t.staged) > 0 {
		err = t.e.commit(ctx, t)
	}
	if err != nil {
		t.Discard()
		return err
	}
	for n := range t.staged {
		t.fs.dropBlocks(n, n+1)
	}
	t.end()
	return nil
}

// seal puts descriptors and superblock into their blocks. Without any change
// nothing is staged.
func (t *Tx) seal() error {
	if err := t.flush(); err != nil {
		return err
	}
	if len(t.staged) == 0 && len(t.descs) == 0 && *t.sb() == t.before {
		return nil
	}
	s := t.sb()
	for g, d := range t.descs {
		block, off := s.groupDescPlace(g)
		b, err := t.edit(block)
		if err != nil {
			return err
		}
		d.put(s, b[off:off+s.DescSize], g)
	}
	s.Wtime = time.Unix(t.now.Unix(), 0)
	b, err := t.edit(superblockOff / int64(s.BlockSize))
	if err != nil {
		return err
	}
	t.putSuper(b[superblockOff%s.BlockSize:][:superblockSize])
	return nil
}

// putSuper puts the superblock over b, the bytes that are on the device. With
// a journal it says that this has to be replayed, as it does while the copy
// of it that the log holds is worth anything.
func (t *Tx) putSuper(b []byte) {
	s := *t.sb()
	if t.e.journal != nil {
		s.Incompat |= IncompatRecover
	} else {
		s.State &^= StateClean
	}
	putSuperSector(&s, b)
}

// superPadOff is where four bytes of the superblock lie that no program reads:
// s_snapshot_id, of a feature that was never part of the kernel.
const superPadOff = 0x184

// putSuperSector puts a superblock over b so that no more than the first of its
// two sectors changes, if none of the fields of the second do. A crash in the
// midst of a write can leave one sector old and the other new, and e2fsck -p
// does not go on with a superblock that does not match its checksum, which lies
// in the second. So the checksum stays what it is, and four bytes that mean
// nothing make it right. The change of a CRC is a linear function of the change
// of the bytes, so that the four bytes are the solution of 32 equations.
func putSuperSector(s *Superblock, b []byte) {
	old := bytes.Clone(b)
	s.put(b)
	if !s.hasCsum() || !bytes.Equal(old[512:superblockSize-4], b[512:superblockSize-4]) {
		return
	}
	le := binary.LittleEndian
	sum := func() uint32 { return crc32c(^uint32(0), b[:superblockSize-4]) }
	want := le.Uint32(old[superblockSize-4:])
	diff := sum() ^ want
	// Columns: what each bit of the four bytes does to the checksum.
	base := le.Uint32(b[superPadOff:])
	zero := sum()
	var column, bit [32]uint32
	for i := range column {
		le.PutUint32(b[superPadOff:], base^1<<i)
		column[i], bit[i] = sum()^zero, 1<<i
	}
	var flip uint32
	for i := range column { // Gauss
		pivot := -1
		for k := i; k < 32; k++ {
			if column[k]>>i&1 != 0 {
				pivot = k
				break
			}
		}
		column[i], column[pivot] = column[pivot], column[i]
		bit[i], bit[pivot] = bit[pivot], bit[i]
		for k := range column {
			if k != i && column[k]>>i&1 != 0 {
				column[k] ^= column[i]
				bit[k] ^= bit[i]
			}
		}
	}
	for i := range column {
		if diff>>i&1 != 0 {
			flip ^= bit[i]
		}
	}
	le.PutUint32(b[superPadOff:], base^flip)
	le.PutUint32(b[superblockSize-4:], want)
}

// writeSize bounds the bytes that are written at once.
const writeSize = 1 << 20

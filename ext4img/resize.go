package ext4img

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"time"

	"qimg/qcow2/blockdev"
)

// ResizeOptions say how Resize changes the size of a file system.
type ResizeOptions struct {
	// Size is the new size in bytes. 0: all of the device.
	Size int64
	// Shrink allows a size that is less than what the file system has. It is
	// an error otherwise.
	Shrink bool
	// Minimum makes the file system as small as it can be; Size and Shrink are
	// not looked at.
	Minimum bool
	// Now, if not nil, is the clock.
	Now func() time.Time
}

// ResizeResult tells what Resize has done.
type ResizeResult struct {
	OldSize, NewSize     int64 // in bytes
	OldGroups, NewGroups int64
	MovedBlocks          int64 // of files and of the file system, that lay behind the new end
	MovedInodes          int64 // that have got other numbers
}

// Errors of Resize that tell what the matter is; errors.Is finds them.
var (
	// ErrShrink: the new size is less than the old one, and that was not
	// allowed.
	ErrShrink = errors.New("the file system would get smaller")
	// ErrMinimum: what the file system holds does not fit the new size.
	ErrMinimum = errors.New("smaller than what the file system holds")
)

// Resize changes the size of an ext2, ext3 or ext4 file system, which nobody has
// mounted, in place. A new size is rounded down to what a file system can have:
// whole blocks, and no last group that is too small for its own structures.
//
// The file system is valid at every moment, with all its files, if its journal
// is replayed: the work is done in transactions (Editor), and the one that makes
// the size another is the last. What was interrupted can be begun again. Where
// there is no journal, one is made for as long as the work lasts.
//
// All that can be known to stand in the way is an error before any change: a
// feature that is not supported, one that matches ErrUnsupported; files that do
// not fit, one that matches ErrMinimum.
func Resize(ctx context.Context, dev blockdev.Device, opts *ResizeOptions) (*ResizeResult, error) {
	if opts == nil {
		opts = &ResizeOptions{}
	}
	e, err := OpenEditor(ctx, dev, &EditOptions{Now: opts.Now})
	if err != nil {
		return nil, err
	}
	return e.resize(ctx, opts)
}

// resize decides what is to be done, which changes nothing, and does it.
func (e *Editor) resize(ctx context.Context, opts *ResizeOptions) (*ResizeResult, error) {
	s := *e.fs.sb
	bs := int64(s.BlockSize)
	r := &ResizeResult{OldSize: s.BlocksCount * bs, OldGroups: s.groups}
	blocks, err := e.fs.resizeTarget(ctx, opts, e.dev.Size())
	if err != nil {
		return nil, err
	}
	switch lent := e.isLent(); { // a crash has left it
	case blocks > s.BlocksCount:
		err = e.growWithJournal(ctx, blocks)
	case blocks == s.BlocksCount && !opts.Minimum:
		if lent {
			err = e.returnJournal(ctx)
		}
	default:
		err = e.shrinkWithJournal(ctx, blocks, opts.Minimum, r)
	}
	r.NewSize, r.NewGroups = e.fs.sb.BlocksCount*bs, e.fs.sb.groups
	return r, err
}

// growWithJournal is grow with a journal that is lent where there is none. What
// the last group gets makes room for one, if there is too little.
func (e *Editor) growWithJournal(ctx context.Context, blocks int64) error {
	lent := e.isLent()
	if e.journal == nil {
		var err error
		if lent, err = e.lendJournal(ctx, true); err != nil {
			return err
		}
		if s := e.fs.sb; !lent {
			if err := e.grow(ctx, min(blocks, s.groupStart(s.groups))); err != nil || e.fs.sb.BlocksCount == blocks {
				return err
			}
			if lent, err = e.lendJournal(ctx, true); err != nil {
				return err
			}
			if !lent {
				return errNoJournal
			}
		}
	}
	err := e.grow(ctx, blocks)
	if lent {
		err = e.returnAfter(ctx, err)
	}
	return err
}

// shrinkWithJournal is shrink with a journal that is lent where there is none.
func (e *Editor) shrinkWithJournal(ctx context.Context, blocks int64, minimum bool, r *ResizeResult) error {
	lent := e.isLent()
	none := e.journal == nil
	if none {
		var err error
		if lent, err = e.lendJournal(ctx, false); err != nil {
			return err
		}
		if !lent && !minimum {
			if ceilDiv(blocks-e.fs.sb.FirstDataBlock, e.fs.sb.BlocksPerGroup) < e.fs.sb.groups {
				return errNoJournal
			}
			return e.shrink(ctx, blocks, 0, r)
		}
	}
	var err error
	if e.journal != nil {
		err = e.shrink(ctx, blocks, 0, r)
		if minimum && (err == nil || errors.Is(err, ErrMinimum) && e.err == nil) {
			err = e.shrinkMore(ctx, r)
		}
	}
	if lent {
		err = e.returnAfter(ctx, err)
	}
	if (none || lent) && minimum && err == nil {
		err = e.shrinkLast(ctx, r)
	}
	return err
}

// errNoJournal is the error of a file system without a journal that is too full
// to be lent one.
var errNoJournal = fmt.Errorf("ext4: no room for a journal of %d blocks, which is needed meanwhile: %w", lentBlocksMin, ErrNoSpace)

// returnAfter takes the lent journal away after work that ended with an error,
// unless that is one of the device or the end of the context.
func (e *Editor) returnAfter(ctx context.Context, err error) error {
	if e.err != nil || ctx.Err() != nil {
		return err
	}
	return errors.Join(err, e.returnJournal(ctx))
}

// PlanResize tells what Resize would do on a device of deviceSize bytes that
// begins as this one does, and has the errors that Resize has before it changes
// something. It changes nothing. What moves is not told.
func PlanResize(ctx context.Context, dev blockdev.Reader, deviceSize int64, opts *ResizeOptions) (*ResizeResult, error) {
	if opts == nil {
		opts = &ResizeOptions{}
	}
	f, err := Open(dev, nil)
	if err != nil {
		return nil, err
	}
	if err := f.checkEditable(ctx, dev); err != nil {
		return nil, err
	}
	blocks, err := f.resizeTarget(ctx, opts, deviceSize)
	if err != nil {
		return nil, err
	}
	s := f.sb
	bs := int64(s.BlockSize)
	next := s.withBlocks(blocks)
	return &ResizeResult{OldSize: s.BlocksCount * bs, OldGroups: s.groups, NewSize: blocks * bs, NewGroups: next.groups}, nil
}

// checkEditable has the errors of OpenEditor.
func (f *FS) checkEditable(ctx context.Context, dev blockdev.Reader) error {
	if err := f.sb.checkWritable(); err != nil {
		return err
	}
	if err := f.checkMMP(); err != nil {
		return err
	}
	return checkEditable(ctx, dev)
}

// resizeTarget is the number of blocks that the file system is to have.
func (f *FS) resizeTarget(ctx context.Context, opts *ResizeOptions, deviceSize int64) (int64, error) {
	s := f.sb
	bs := int64(s.BlockSize)
	if err := s.checkResizable(); err != nil {
		return 0, err
	}
	size := opts.Size
	if size == 0 {
		size = deviceSize
	}
	blocks := size / bs
	switch {
	case opts.Minimum:
	case size < 0 || size > deviceSize:
		return 0, fmt.Errorf("ext4: a file system of %d bytes on a device of %d", size, deviceSize)
	case blocks >= s.BlocksCount:
		return s.growTarget(blocks)
	case !opts.Shrink:
		return 0, fmt.Errorf("ext4: %d bytes, and there are %d: %w", size, s.BlocksCount*bs, ErrShrink)
	}
	if err := f.checkShrinkable(); err != nil {
		return 0, err
	}
	u, err := f.use(ctx)
	if err != nil {
		return 0, err
	}
	least := u.minimum(true, true)
	if opts.Minimum {
		blocks = least
	} else {
		blocks = s.roundBlocks(blocks)
	}
	if blocks < least {
		return 0, fmt.Errorf("ext4: %d bytes, and what it holds needs %d: %w", size, least*bs, ErrMinimum)
	}
	if s.Incompat&IncompatMMP != 0 && s.MMPBlock >= blocks {
		return 0, place{"mmp block", 0, s.MMPBlock}.unsupported("", "it lies behind the new end, and cannot be moved")
	}
	last := Ino(ceilDiv(blocks-s.FirstDataBlock, s.BlocksPerGroup) * int64(s.InodesPerGroup))
	for _, ino := range s.namedInodes() {
		if ino > last {
			return 0, place{"inode", ino, -1}.unsupported("", "the superblock names it, and it lies behind the new end")
		}
	}
	return blocks, nil
}

// checkResizable refuses file systems whose structures are not known well
// enough to make them anew for another size.
func (s *Superblock) checkResizable() error {
	p := place{"superblock", 0, -1}
	switch {
	case s.Compat&CompatResizeInode != 0 && s.Incompat&IncompatMetaBG != 0:
		return p.unsupported("s_feature_compat", "resize_inode with meta_bg")
	case s.Compat&CompatResizeInode == 0 && s.ReservedGDT != 0:
		return p.unsupported("s_reserved_gdt_blocks", "%d without resize_inode", s.ReservedGDT)
	case s.ReservedGDT > int64(s.BlockSize/4):
		return p.corrupt("s_reserved_gdt_blocks", "%d, expected at most %d", s.ReservedGDT, s.BlockSize/4)
	}
	return nil
}

// withBlocks is the superblock with another number of blocks: what follows from
// that, but for counts of what is free.
func (s *Superblock) withBlocks(blocks int64) Superblock {
	next := *s
	next.BlocksCount = blocks
	next.groups = ceilDiv(blocks-s.FirstDataBlock, s.BlocksPerGroup)
	next.InodesCount = uint32(next.groups) * s.InodesPerGroup
	// The same part of all blocks (e2fsprogs: resize/resize2fs.c,
	// adjust_fs_info).
	hi, lo := bits.Mul64(uint64(s.RBlocksCount), uint64(blocks))
	if hi < uint64(s.BlocksCount) {
		q, _ := bits.Div64(hi, lo, uint64(s.BlocksCount))
		next.RBlocksCount = min(int64(q), blocks)
	}
	return next
}

// groupOverhead is the number of blocks that a group's own structures take,
// wherever they lie.
func (s *Superblock) groupOverhead(group int64) int64 {
	return s.baseBlocks(group) + 2 + s.inodeTableBlocks()
}

// minLastBlocks is how many blocks more than its own structures need a last
// group has to have, unless it is the only one (e2fsprogs:
// resize/resize2fs.c, adjust_fs_info).
const minLastBlocks = 50

// roundBlocks is the largest number of blocks up to that one which a file
// system can have: no part of a cluster, and no last group that is too small.
// 0: there is none.
func (s *Superblock) roundBlocks(blocks int64) int64 {
	blocks -= blocks % s.clusterRatio()
	for blocks > s.FirstDataBlock {
		next := s.withBlocks(blocks)
		next.layDescriptors(s)
		last := next.groups - 1
		n := blocks - next.groupStart(last)
		need := next.groupOverhead(last)
		if last > 0 {
			need += minLastBlocks
		}
		if n == s.BlocksPerGroup || n >= need {
			return blocks
		}
		blocks = next.groupStart(last)
	}
	return 0
}

// layDescriptors decides where the descriptors of s, which old has got another
// number of groups, lie: in the table, which grows into blocks that were kept
// for it and gives them back, or with meta_bg behind it.
func (s *Superblock) layDescriptors(old *Superblock) {
	was, now := old.descBlocks(), s.descBlocks()
	switch {
	case s.Incompat&IncompatMetaBG != 0:
		if int64(s.FirstMetaBG) > now {
			s.FirstMetaBG = uint32(now)
		}
	case now-was > s.ReservedGDT:
		// Kernel: fs/ext4/resize.c, ext4_convert_meta_bg.
		s.Incompat |= IncompatMetaBG
		s.Compat &^= CompatResizeInode
		s.FirstMetaBG = uint32(was + s.ReservedGDT)
		s.ReservedGDT = 0
	case s.Compat&CompatResizeInode != 0:
		s.ReservedGDT = min(s.ReservedGDT+was-now, int64(s.BlockSize/4))
	}
}

// tableBlocks is the number of blocks of the table of descriptors behind each
// superblock, without those that are kept for it.
func (s *Superblock) tableBlocks() int64 {
	if s.Incompat&IncompatMetaBG != 0 {
		return min(int64(s.FirstMetaBG), s.descBlocks())
	}
	return s.descBlocks()
}

// superBlock is the block of the primary superblock.
func (s *Superblock) superBlock() int64 {
	return max(s.FirstDataBlock, int64(superblockOff/s.BlockSize))
}

// backups returns the groups but the first that have a copy of the superblock.
func (s *Superblock) backups() []int64 {
	var list []int64
	for g := int64(1); g < s.groups; g++ {
		if s.hasSuper(g) {
			list = append(list, g)
		}
	}
	return list
}

// putResizeInode makes the resize inode (resizeinode.go) that of a file system
// of s.groups groups: e2fsck compares the pointers one by one.
func (t *Tx) putResizeInode(s *Superblock) error {
	n, err := t.used(resizeIno)
	if err != nil {
		return err
	}
	le := binary.LittleEndian
	dind := int64(le.Uint32(n.block()[13*4:]))
	if dind <= s.FirstDataBlock || dind >= s.BlocksCount {
		return place{"resize inode", resizeIno, -1}.corrupt("i_block", "%d, and the file system has %d blocks", dind, s.BlocksCount)
	}
	bs := s.BlockSize
	perBlock := int64(bs / 4)
	first := s.superBlock() + 1 + s.descBlocks()
	want := make([]byte, bs)
	for i := range s.ReservedGDT {
		le.PutUint32(want[(s.descBlocks()+i)%perBlock*4:], uint32(first+i))
	}
	if err := t.replace(dind, want); err != nil {
		return err
	}
	backups := s.backups()
	if int64(len(backups)) > perBlock {
		return place{"resize inode", resizeIno, -1}.unsupported("", "%d copies of the descriptors, and a block has %d pointers", len(backups), perBlock)
	}
	for i := range s.ReservedGDT {
		clear(want)
		for k, g := range backups {
			le.PutUint32(want[4*k:], uint32(first+i+g*s.BlocksPerGroup))
		}
		if err := t.replace(first+i, want); err != nil {
			return err
		}
	}
	n.Blocks = (1 + s.ReservedGDT*int64(1+len(backups))) * int64(s.ClusterSize/512)
	t.dirty(n)
	return nil
}

// replace makes the content of a block another.
func (t *Tx) replace(n int64, b []byte) error {
	now, err := t.block(n)
	if err != nil || string(now) == string(b) {
		return err
	}
	e, err := t.edit(n)
	if err == nil {
		copy(e, b)
	}
	return err
}

// dropResizeInode frees the resize inode, which a file system with meta_bg does
// not have. What it keeps of the table was used up.
func (t *Tx) dropResizeInode() error {
	n, err := t.used(resizeIno)
	if err != nil {
		return err
	}
	dind := int64(binary.LittleEndian.Uint32(n.block()[13*4:]))
	if err := t.freeBlocks(dind, 1); err != nil {
		return err
	}
	block, off, err := t.fs.inodePlace(resizeIno)
	if err != nil {
		return err
	}
	b, err := t.edit(block)
	if err != nil {
		return err
	}
	clear(b[off : off+t.sb().InodeSize])
	delete(t.inodes, resizeIno)
	return nil
}

// reopen reads the file system anew, whose size has changed.
func (e *Editor) reopen() error {
	f := &FS{dev: e.dev}
	if err := f.readSuperblock(); err != nil {
		return err
	}
	f.cache.limit = e.fs.cache.limit
	e.fs = f
	if e.journal == nil {
		return nil
	}
	r, err := f.openJournal(f.sb.JournalInum)
	if err != nil {
		return err
	}
	e.journal.log = r.log
	return nil
}

// writeBackups writes the copies of the superblock and of the descriptors. They
// are for repair alone: a crash in their midst leaves old ones, and e2fsck
// makes them new.
func (e *Editor) writeBackups(ctx context.Context) error {
	s := e.fs.sb
	bs := int64(s.BlockSize)
	super := make([]byte, bs)
	if err := readFull(e.dev, super[:superblockSize], superblockOff); err != nil {
		return err
	}
	le := binary.LittleEndian
	incompat := s.Incompat &^ IncompatRecover
	le.PutUint32(super[0x60:], uint32(incompat))
	table := make([]byte, s.tableBlocks()*bs)
	if err := readFull(e.dev, table, (s.superBlock()+1)*bs); err != nil {
		return err
	}
	perBlock := bs / int64(s.DescSize)
	for g := int64(1); g < s.groups; g++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		at := s.groupStart(g)
		meta := s.Incompat&IncompatMetaBG != 0 && g >= int64(s.FirstMetaBG)*perBlock
		if s.hasSuper(g) {
			le.PutUint16(super[0x5a:], uint16(g)) // s_block_group_nr
			if s.hasCsum() {
				le.PutUint32(super[0x3fc:], crc32c(^uint32(0), super[:superblockSize-4]))
			}
			if err := e.writeBlock(super, at); err != nil {
				return err
			}
			at++
			if !meta {
				if err := e.writeBlock(table, at); err != nil {
					return err
				}
			}
		}
		if n := g % perBlock; meta && (n == 1 || n == perBlock-1) {
			b := make([]byte, bs)
			block, _ := s.groupDescPlace(g)
			if err := readFull(e.dev, b, block*bs); err != nil {
				return err
			}
			if err := e.writeBlock(b, at); err != nil {
				return err
			}
		}
	}
	return e.sync()
}

// writeBlock writes blocks in their place.
func (e *Editor) writeBlock(p []byte, block int64) error {
	if _, err := e.dev.WriteAt(p, block*int64(e.fs.sb.BlockSize)); err != nil {
		return fmt.Errorf("ext4: write of block %d: %w", block, err)
	}
	return nil
}

// superHalf is where the second sector of the superblock begins.
const superHalf = 512

// writeSuperHalf changes fields of the second sector of the superblock on the
// device, and its checksum, which lies there too: a crash leaves either all of
// it old or all of it new.
func (e *Editor) writeSuperHalf(change func(b []byte)) error {
	b := make([]byte, superblockSize)
	if err := readFull(e.dev, b, superblockOff); err != nil {
		return err
	}
	change(b)
	if e.fs.sb.hasCsum() {
		binary.LittleEndian.PutUint32(b[0x3fc:], crc32c(^uint32(0), b[:superblockSize-4]))
	}
	if _, err := e.dev.WriteAt(b[superHalf:], superblockOff+superHalf); err != nil {
		return fmt.Errorf("ext4: write of the superblock: %w", err)
	}
	return e.sync()
}

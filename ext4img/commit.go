package ext4img

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"

	"qimg/qcow2/blockdev"
)

// commit writes a transaction that was sealed.
//
// Order with a journal: blocks that were free, the log, and the superblock
// with needs_recovery; sync; the journal's superblock, which from then on leads
// to the log: the transaction is there; sync; all blocks in their places; sync;
// the journal's superblock, empty again; sync; the superblock without
// needs_recovery; sync.
func (e *Editor) commit(ctx context.Context, t *Tx) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if e.journal == nil {
		return e.commitInOrder(ctx, t)
	}
	fresh, rest := map[int64][]byte{}, map[int64][]byte{}
	for n, s := range t.staged {
		if s.fresh {
			fresh[n] = s.data
		} else {
			rest[n] = s.data
		}
	}
	bs := int64(t.sb().BlockSize)
	j := e.journal
	if err := j.fits(int64(len(rest))); err != nil {
		return err
	}
	steps := []func() error{
		func() error { return writeAll(e.dev, fresh, bs) },
		func() error { return j.writeLog(t, slices.Sorted(maps.Keys(rest))) },
		func() error { return e.writeSuper(t, true) },
		e.sync,
		ctx.Err, // the last chance
		func() error { return j.writeSuper(j.first) },
		e.sync,
		func() error { return writeAll(e.dev, rest, bs) },
		e.sync,
		func() error { j.sequence++; return j.writeSuper(0) },
		e.sync,
		func() error { return e.writeSuper(t, false) },
		e.sync,
	}
	for _, step := range steps {
		if err := step(); err != nil {
			if ctx.Err() == nil || err != ctx.Err() {
				e.fail(err)
				return err
			}
			// needs_recovery without anything to recover is no harm, but
			// neither is it needed.
			if werr := e.restoreSuper(); werr != nil {
				e.fail(werr)
			}
			return err
		}
	}
	return nil
}

// writeSuper writes the superblock of the transaction with needs_recovery, or
// without.
func (e *Editor) writeSuper(t *Tx, recover bool) error {
	s := t.sb()
	if recover { // until the log is replayed all else is as it was
		s = &t.before
	}
	return e.putSuper(s, recover)
}

// putSuper writes a superblock over the one that is on the device.
func (e *Editor) putSuper(s *Superblock, recover bool) error {
	b := make([]byte, superblockSize)
	if err := readFull(e.dev, b, superblockOff); err != nil {
		return err
	}
	now := *s
	now.Incompat &^= IncompatRecover
	if recover {
		now.Incompat |= IncompatRecover
	}
	putSuperSector(&now, b)
	if _, err := e.dev.WriteAt(b, superblockOff); err != nil {
		return fmt.Errorf("ext4: write of the superblock: %w", err)
	}
	return nil
}

func (e *Editor) restoreSuper() error {
	if err := e.putSuper(&e.tx.before, false); err != nil {
		return err
	}
	return e.sync()
}

// journalWriter writes to the journal of a file system, which is empty between
// two transactions.
type journalWriter struct {
	*journalSuper
	e     *Editor
	log   *File
	super []byte // the journal's superblock, as it is on the device
	v1    bool   // commit blocks have checksums v1
}

// openJournal opens the journal for writing, replayed.
func (e *Editor) openJournal(ctx context.Context) error {
	s := e.fs.sb
	if s.Compat&CompatHasJournal == 0 {
		if s.State&StateClean == 0 {
			return &FormatError{"superblock", 0, -1, "s_state", "the file system was not unmounted in order: run e2fsck", ErrNotClean}
		}
		return nil
	}
	if e.fs.fc != nil {
		return place{"journal", s.JournalInum, -1}.unsupported("", "holds fast commits, and has to be replayed by a mount or by e2fsck first")
	}
	r, err := e.fs.openJournal(s.JournalInum)
	if err != nil {
		return err
	}
	if r.start != 0 && s.Incompat&IncompatRecover == 0 {
		return &FormatError{"journal", s.JournalInum, -1, "s_start", fmt.Sprintf("%d, and the superblock says that nothing has to be replayed: run e2fsck", r.start), ErrNotClean}
	}
	j := &journalWriter{journalSuper: r.journalSuper, e: e, log: r.log, super: make([]byte, superblockSize)}
	if err := readFull(j.log, j.super, 0); err != nil {
		return err
	}
	if err := j.checkSuper(); err != nil {
		return err
	}
	for at := int64(0); at < j.maxLen*j.blockSize; {
		n, phys, _, err := j.log.run(at)
		if err != nil {
			return err
		}
		if phys < 0 {
			return place{"journal", s.JournalInum, -1}.corrupt("", "has a hole at its block %d", at/j.blockSize)
		}
		at += n
	}
	e.journal = j
	if s.Incompat&IncompatRecover != 0 {
		if err := e.replay(ctx, r); err != nil {
			return err
		}
	}
	j.upgrade(s)
	return nil
}

// checkSuper refuses what e2fsck does not take for the superblock of a journal
// of one file system.
func (j *journalWriter) checkSuper() error {
	be := binary.BigEndian
	var field string
	if v1 := be.Uint32(j.super[4:]) == jbd2SuperblockV1; v1 && !isZero(j.super[0x24:0x100]) {
		field = "s_feature_compat"
	} else if !v1 && be.Uint32(j.super[0x40:]) > 1 {
		field = "s_nr_users"
	} else {
		return nil
	}
	return &FormatError{"journal", j.log.in.Ino, -1, field, "is not that of a journal inside of a file system: run e2fsck", ErrNotClean}
}

// replay does on the device what Open did in memory. Order: all blocks; sync;
// the journal, empty; sync; the superblock without needs_recovery; sync.
func (e *Editor) replay(ctx context.Context, r *recovery) error {
	j := e.journal
	if j.start != 0 {
		end, err := r.lastSequence()
		if err != nil {
			return err
		}
		bs := int64(e.fs.sb.BlockSize)
		b := make([]byte, bs)
		if e.fs.journal != nil {
			for _, m := range e.fs.journal.blocks {
				if err := ctx.Err(); err != nil {
					return err
				}
				if err := e.fs.readStored(b, m.block*bs); err != nil {
					return err
				}
				if m.block == superblockOff/bs {
					if err := e.sealReplayed(b[superblockOff%bs:][:superblockSize]); err != nil {
						return err
					}
				}
				if _, err := e.dev.WriteAt(b, m.block*bs); err != nil {
					return fmt.Errorf("ext4: replay of block %d: %w", m.block, err)
				}
			}
		}
		if err := e.sync(); err != nil {
			return err
		}
		j.sequence = end + 1
		if err := j.writeSuper(0); err != nil {
			return err
		}
		if err := e.sync(); err != nil {
			return err
		}
	}
	// The file system as it is now, without an overlay.
	f := &FS{dev: e.dev}
	if err := f.readSuperblock(); err != nil {
		return err
	}
	f.cache.limit = e.fs.cache.limit
	e.fs = f
	f.sb.Incompat &^= IncompatRecover
	if err := e.putSuper(f.sb, false); err != nil {
		return err
	}
	if err := e.sync(); err != nil {
		return err
	}
	// The log is read through the new file system.
	r, err := f.openJournal(f.sb.JournalInum)
	if err != nil {
		return err
	}
	j.log = r.log
	return e.fs.countFree()
}

// countFree makes the superblock's counts of what is free the sums of those of
// the groups. While a file system is mounted the kernel lets them be.
func (f *FS) countFree() error {
	s := f.sb
	s.FreeBlocksCount, s.FreeInodesCount = 0, 0
	for g := range s.groups {
		d, err := f.groupDesc(g)
		if err != nil {
			return err
		}
		s.FreeBlocksCount += int64(d.freeBlocks) * s.clusterRatio()
		s.FreeInodesCount += d.freeInodes
	}
	return nil
}

// sealReplayed makes the superblock of the log one that differs from that on
// the device in its first sector alone, and that says that the journal has to
// be replayed.
func (e *Editor) sealReplayed(b []byte) error {
	now := make([]byte, superblockSize)
	if err := readFull(e.dev, now, superblockOff); err != nil {
		return err
	}
	if !bytes.Equal(now[512:superblockSize-4], b[512:superblockSize-4]) {
		copy(now[512:], b[512:])
	}
	s := *e.fs.sb
	s.Incompat |= IncompatRecover
	copy(now[:512], b[:512])
	putSuperSector(&s, now)
	copy(b, now)
	return nil
}

// lastSequence returns the number of the transaction behind the last of the
// log.
func (r *recovery) lastSequence() (uint32, error) {
	err := r.run(passScan)
	return r.end, err
}

// upgrade makes the journal one as the kernel makes it at a mount: with
// checksums v3 where all metadata has checksums, and numbers of 64 bits where
// the file system has such. The next writeSuper writes that.
func (j *journalWriter) upgrade(s *Superblock) {
	be := binary.BigEndian
	if be.Uint32(j.super[4:]) != jbd2SuperblockV2 {
		return
	}
	if s.hasCsum() && !j.hasCsum() {
		j.incompat |= jbd2IncompatCsumV3
		j.compat &^= jbd2CompatChecksum
		j.super[0x50] = 4 // s_checksum_type: crc32c
		j.csumSeed = crc32c(^uint32(0), j.uuid[:])
	}
	if s.Incompat&Incompat64bit != 0 {
		j.incompat |= jbd2Incompat64bit
	}
	be.PutUint32(j.super[0x24:], j.compat)
	be.PutUint32(j.super[0x28:], j.incompat)
	j.v1 = j.compat&jbd2CompatChecksum != 0
}

// writeSuper writes the journal's superblock: where the log begins, 0 for an
// empty one. All that changes lies in one sector.
func (j *journalWriter) writeSuper(start int64) error {
	be := binary.BigEndian
	j.start = start
	be.PutUint32(j.super[0x18:], j.sequence)
	be.PutUint32(j.super[0x1c:], uint32(start))
	if j.hasCsum() {
		be.PutUint32(j.super[0xfc:], 0)
		be.PutUint32(j.super[0xfc:], crc32c(^uint32(0), j.super))
	}
	return j.write(j.super, 0)
}

// write writes bytes at a place of the journal.
func (j *journalWriter) write(p []byte, off int64) error {
	for len(p) > 0 {
		n, phys, _, err := j.log.run(off)
		if err != nil {
			return err
		}
		n = min(n, int64(len(p)))
		if _, err := j.e.dev.WriteAt(p[:n], phys); err != nil {
			return fmt.Errorf("ext4: write of the journal: %w", err)
		}
		p, off = p[n:], off+n
	}
	return nil
}

// tagsPerBlock is how many tags a descriptor block has room for, of which the
// first has a UUID.
func (j *journalWriter) tagsPerBlock() int64 {
	room := j.blockSize - jbd2HeaderLen - jbd2UUIDLen
	if j.hasCsum() {
		room -= jbd2TailLen
	}
	return room / int64(j.tagLen())
}

// fits returns an error unless the log has room for that many blocks.
func (j *journalWriter) fits(blocks int64) error {
	need := blocks + ceilDiv(blocks, j.tagsPerBlock()) + 1
	if room := j.last - j.first - 1; need > room {
		return fmt.Errorf("ext4: the transaction changes %d blocks and needs %d of the journal, which has %d: %w", blocks, need, room, ErrTooLarge)
	}
	return nil
}

// writeLog writes blocks as one transaction into the log, from its beginning
// on. Nothing leads there yet.
func (j *journalWriter) writeLog(t *Tx, blocks []int64) error {
	be := binary.BigEndian
	bs := int(j.blockSize)
	at := j.first
	var buf []byte
	sum := newCRC32BE()
	flush := func(least int) error {
		if len(buf) < least {
			return nil
		}
		err := j.write(buf, at*j.blockSize)
		at += int64(len(buf) / bs)
		buf = buf[:0]
		return err
	}
	header := func(kind uint32) []byte {
		buf = append(buf, make([]byte, bs)...)
		b := buf[len(buf)-bs:]
		be.PutUint32(b, jbd2Magic)
		be.PutUint32(b[4:], kind)
		be.PutUint32(b[8:], j.sequence)
		return b
	}
	for per := int(j.tagsPerBlock()); len(blocks) > 0; {
		part := blocks[:min(per, len(blocks))]
		blocks = blocks[len(part):]
		desc := len(buf)
		header(jbd2Descriptor)
		tag := desc + jbd2HeaderLen
		for i, n := range part {
			data := t.staged[n].data
			flags := uint16(0)
			if i > 0 {
				flags |= jbd2SameUUID
			}
			if i == len(part)-1 {
				flags |= jbd2LastTag
			}
			copyAt := len(buf)
			buf = append(buf, data...)
			if be.Uint32(data) == jbd2Magic {
				flags |= jbd2Escape
				clear(buf[copyAt : copyAt+4])
			}
			tag += j.putTag(buf[tag:], n, flags, buf[copyAt:])
			if i == 0 {
				copy(buf[tag:], j.uuid[:])
				tag += jbd2UUIDLen
			}
		}
		if j.hasCsum() {
			b := buf[desc : desc+bs]
			be.PutUint32(b[bs-jbd2TailLen:], crc32c(j.csumSeed, b))
		}
		if j.v1 {
			sum.update(buf[desc:])
		}
		if err := flush(writeSize); err != nil {
			return err
		}
	}
	b := header(jbd2Commit)
	be.PutUint64(b[0x30:], uint64(t.now.Unix())) // h_commit_sec
	be.PutUint32(b[0x38:], uint32(t.now.Nanosecond()))
	if j.v1 {
		b[0xc], b[0xd] = 1, 4 // h_chksum_type: crc32, h_chksum_size
		be.PutUint32(b[0x10:], sum.crc)
	}
	if j.hasCsum() {
		be.PutUint32(b[0x10:], crc32c(j.csumSeed, b))
	}
	return flush(0)
}

// putTag writes the tag of a block of which the log holds copy, and returns its
// length.
func (j *journalWriter) putTag(b []byte, block int64, flags uint16, copy []byte) int {
	be := binary.BigEndian
	var sum uint32
	if j.hasCsum() {
		var seq [4]byte
		be.PutUint32(seq[:], j.sequence)
		sum = crc32c(crc32c(j.csumSeed, seq[:]), copy)
	}
	be.PutUint32(b, uint32(block))
	if j.incompat&jbd2Incompat64bit != 0 {
		be.PutUint32(b[8:], uint32(block>>32))
	}
	be.PutUint16(b[6:], flags)
	switch {
	case j.incompat&jbd2IncompatCsumV3 != 0:
		be.PutUint32(b[12:], sum)
	case j.hasCsum():
		be.PutUint16(b[4:], uint16(sum))
	}
	return j.tagLen()
}

// commitInOrder writes a transaction where there is no journal. What e2fsck
// repairs then loses nothing: new structures are there before anything leads to
// them, and nothing is freed that something leads to.
//
// Order: the superblock, not clean; sync; blocks that were free, new inodes;
// sync; inodes that were in use and stay so, each at once, and with it the
// blocks that have moved; sync; of these the directories that only lose names;
// sync; inodes that go, bitmaps, descriptors, counts; sync; the superblock,
// clean; sync.
func (e *Editor) commitInOrder(ctx context.Context, t *Tx) error {
	stages, err := t.stages()
	if err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	dirty := t.before
	dirty.State &^= StateClean
	err = e.putSuper(&dirty, false)
	for _, blocks := range stages {
		if err == nil {
			err = e.sync()
		}
		if err == nil {
			err = writeAll(e.dev, blocks, int64(t.sb().BlockSize))
		}
	}
	if err == nil {
		err = e.sync()
	}
	if err == nil {
		err = e.putSuper(t.sb(), false)
	}
	if err == nil {
		err = e.sync()
	}
	if err != nil {
		e.fail(err)
	}
	return err
}

// stages divides what a transaction changes for commitInOrder.
func (t *Tx) stages() (stages [4]map[int64][]byte, err error) {
	for i := range stages {
		stages[i] = map[int64][]byte{}
	}
	tables := map[int64][]byte{} // blocks of inode tables, as far as they are
	for _, ino := range slices.Sorted(maps.Keys(t.inodes)) {
		block, _, err := t.fs.inodePlace(ino)
		if err != nil {
			return stages, err
		}
		if s := t.staged[block]; s == nil || s.fresh || tables[block] != nil {
			continue
		}
		stored, err := t.fs.storedBlock(block)
		if err != nil {
			return stages, err
		}
		tables[block] = bytes.Clone(stored)
	}
	for i := range stages {
		for ino, x := range t.inodes {
			block, off, err := t.fs.inodePlace(ino)
			if err != nil {
				return stages, err
			}
			if b := tables[block]; b != nil && t.stageOf(x) == i {
				copy(b[off:], t.staged[block].data[off:off+t.sb().InodeSize])
				stages[i][block] = nil // which it is after all inodes
			}
		}
		for block := range stages[i] {
			stages[i][block] = bytes.Clone(tables[block])
		}
	}
	last := map[int64]bool{superblockOff / int64(t.sb().BlockSize): true}
	for g, d := range t.descs {
		block, _ := t.sb().groupDescPlace(g)
		last[block], last[d.blockBitmap], last[d.inodeBitmap] = true, true, true
	}
	for n, s := range t.staged {
		switch {
		case s.fresh:
			stages[0][n] = s.data
		case tables[n] != nil:
		case last[n]:
			stages[3][n] = s.data
		default:
			stages[1][n] = s.data
		}
	}
	return stages, nil
}

// stageOf returns the stage in which an inode is written.
func (t *Tx) stageOf(x *txInode) int {
	switch {
	case t.freed[x.n.Ino]:
		return 3
	case x.created:
		return 0
	case x.n.IsDir() && t.lost[x.n.Ino] && !t.gained[x.n.Ino]:
		return 2
	}
	return 1
}

// writeAll writes blocks to their places, ascending, those that lie behind
// each other at once.
func writeAll(dev blockdev.Device, blocks map[int64][]byte, bs int64) error {
	order := slices.Sorted(maps.Keys(blocks))
	var buf []byte
	for i := 0; i < len(order); {
		first := order[i]
		buf = buf[:0]
		for i < len(order) && order[i] == first+int64(len(buf))/bs && len(buf) < writeSize {
			buf = append(buf, blocks[order[i]]...)
			i++
		}
		if _, err := dev.WriteAt(buf, first*bs); err != nil {
			return fmt.Errorf("ext4: write of blocks from %d on: %w", first, err)
		}
	}
	return nil
}

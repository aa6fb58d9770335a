package ext4img

import (
	"encoding/binary"
	"fmt"
)

// Limits on what a journal may hold, so that memory does not grow with it.
const (
	maxReplayed = 1 << 19 // different blocks that have copies in the log
	maxRevoked  = 1 << 19 // different blocks that are revoked
)

// recovery is the replay of a journal, in three passes over the log: scan
// finds its end, revoke collects the blocks whose older copies count for
// nothing, replay the newest copies of the others (kernel: fs/jbd2/recovery.c).
type recovery struct {
	*journalSuper
	fs      *FS
	log     *File
	end     uint32           // the transaction behind the last, once scanned
	revoked map[int64]uint32 // the last transaction that revokes a block
	overlay overlay
}

type recoveryPass uint8

const (
	passScan recoveryPass = iota
	passRevoke
	passReplay
)

// replay finds the newest copies of blocks in the journal, which are read in
// their place from then on.
func (f *FS) replay() error {
	if f.sb.Compat&CompatHasJournal == 0 {
		return place{"superblock", 0, -1}.corrupt("s_feature_incompat", "%v, and the file system has no journal", IncompatRecover)
	}
	ino := f.sb.JournalInum
	if ino == 0 {
		return place{"journal", 0, -1}.unsupported("s_journal_dev", "%#x: it lies on another device, and has to be replayed by a mount first", f.sb.JournalDev)
	}
	r, err := f.openJournal(ino)
	if err != nil || r.start == 0 {
		return err
	}
	for _, pass := range [...]recoveryPass{passScan, passRevoke, passReplay} {
		if err := r.run(pass); err != nil {
			return err
		}
	}
	r.overlay.normalize()
	f.journal = &r.overlay
	f.cache = blockCache{limit: f.cache.limit}
	if err := f.readSuperblock(); err != nil {
		return err
	}
	if r.incompat&jbd2IncompatFastCommit != 0 {
		return f.replayFastCommits(r)
	}
	return nil
}

// openJournal reads the superblock of the journal in an inode.
func (f *FS) openJournal(ino Ino) (*recovery, error) {
	n, err := f.Inode(ino)
	if err != nil {
		return nil, err
	}
	p := place{"journal", ino, -1}
	if !n.IsRegular() || n.Flags&inlineDataFl != 0 {
		return nil, p.corrupt("i_mode", "%#o, i_flags %#x, expected a regular file", n.Mode, n.Flags)
	}
	log, err := f.content(n)
	if err != nil {
		return nil, err
	}
	bs := int64(f.sb.BlockSize)
	b := make([]byte, superblockSize)
	if err := readFull(log, b, 0); err != nil {
		return nil, err
	}
	j, err := parseJournalSuper(p, b, n.Size/bs, bs)
	if err != nil {
		return nil, err
	}
	return &recovery{journalSuper: j, fs: f, log: log, revoked: map[int64]uint32{}}, nil
}

// logWalk is the way of one pass through the log, which is a ring.
type logWalk struct {
	r    *recovery
	p    place
	at   int64  // the next block
	left int64  // blocks that can come; one more than there are
	b    []byte // the last one that was read
}

// skip goes on by one block, and returns which one that was.
func (w *logWalk) skip() (int64, error) {
	if w.left--; w.left < 0 {
		return 0, w.p.corrupt("", "the log of %d blocks has no end", w.r.last-w.r.first)
	}
	n := w.at
	if w.at++; w.at >= w.r.last {
		w.at = w.r.first
	}
	return n, nil
}

// read reads the next block into b.
func (w *logWalk) read(b []byte) (int64, error) {
	n, err := w.skip()
	if err == nil {
		err = readFull(w.r.log, b, n*w.r.blockSize)
	}
	return n, err
}

// run makes one pass.
func (r *recovery) run(pass recoveryPass) error {
	be := binary.BigEndian
	w := &logWalk{r, place{"journal", r.log.in.Ino, -1}, r.start, r.last - r.first + 1, make([]byte, r.blockSize)}
	sequence := r.sequence
	data := make([]byte, r.blockSize)
	v1 := pass == passScan && r.compat&jbd2CompatChecksum != 0
	sum := newCRC32BE() // of the transaction, with checksums v1
	suspect := false    // a block of the transaction does not match its checksum
	lastTime := uint64(0)
scan:
	for pass == passScan || int32(sequence-r.end) < 0 {
		if _, err := w.read(w.b); err != nil {
			return err
		}
		if be.Uint32(w.b) != jbd2Magic || be.Uint32(w.b[8:]) != sequence {
			break
		}
		switch be.Uint32(w.b[4:]) {
		case jbd2Descriptor:
			if !r.tailMatches(w.b) {
				if pass != passScan {
					return r.mismatch("a descriptor block", sequence)
				}
				suspect = true
			}
			if v1 {
				sum.update(w.b)
			}
			err := r.eachTag(w.b, func(t journalTag) error {
				switch {
				case pass == passReplay:
					return r.replayTag(w, t, sequence, data)
				case v1 && !suspect:
					_, err := w.read(data)
					sum.update(data)
					return err
				}
				_, err := w.skip()
				return err
			})
			if suspect && w.left < 0 {
				break scan // its tags are no tags
			}
			if err != nil {
				return err
			}
		case jbd2Commit:
			// What does not match is damage if it is newer than what came
			// before, and else left from an older log.
			time := be.Uint64(w.b[0x30:])
			if suspect && time >= lastTime {
				return r.mismatch("a descriptor or revoke block", sequence)
			}
			if suspect || pass == passScan && !(r.commitMatches(w.b) && (!v1 || sum.matches(w.b))) {
				break scan
			}
			sum.crc = ^uint32(0)
			lastTime = time
			sequence++
		case jbd2Revoke:
			if pass == passScan && !r.tailMatches(w.b) {
				suspect = true
			}
			if pass == passRevoke {
				if err := r.eachRevoked(w.p, w.b, func(block int64) error { return r.revoke(block, sequence) }); err != nil {
					return err
				}
			}
		default:
			break scan
		}
	}
	if pass == passScan {
		r.end = sequence
	} else if sequence != r.end {
		return w.p.corrupt("", "the log ends at transaction %d and at %d", r.end, sequence)
	}
	return nil
}

// mismatch is the error of a part of a transaction that does not match its
// checksum.
func (r *recovery) mismatch(what string, sequence uint32) error {
	return &FormatError{"journal", r.log.in.Ino, -1, "", fmt.Sprintf("%s of transaction %d does not match its checksum", what, sequence), ErrChecksum}
}

// replayTag notes the copy of a block, which is next in the log.
func (r *recovery) replayTag(w *logWalk, t journalTag, sequence uint32, data []byte) error {
	if last, ok := r.revoked[t.block]; ok && int32(sequence-last) <= 0 {
		_, err := w.skip()
		return err
	}
	n, err := w.read(data)
	if err != nil {
		return err
	}
	if !r.tagMatches(t, sequence, data) {
		return r.mismatch(fmt.Sprintf("the copy of block %d", t.block), sequence)
	}
	if t.block >= r.fs.sb.BlocksCount {
		return w.p.corrupt("t_blocknr", "%d, and the file system has %d blocks", t.block, r.fs.sb.BlocksCount)
	}
	_, phys, _, err := r.log.run(n * r.blockSize)
	if err != nil {
		return err
	}
	if phys < 0 {
		return w.p.corrupt("", "has a hole at its block %d", n)
	}
	o := &r.overlay
	o.blocks = append(o.blocks, movedBlock{t.block, phys / r.blockSize, t.flags&jbd2Escape != 0})
	if len(o.blocks) >= 2*maxReplayed {
		if o.normalize(); len(o.blocks) > maxReplayed {
			return w.p.unsupported("", "holds copies of more than %d blocks, and has to be replayed by a mount first", maxReplayed)
		}
	}
	return nil
}

// revoke notes that copies of a block up to that transaction count for
// nothing.
func (r *recovery) revoke(block int64, sequence uint32) error {
	if len(r.revoked) >= maxRevoked {
		return place{"journal", r.log.in.Ino, -1}.unsupported("", "revokes more than %d blocks, and has to be replayed by a mount first", maxRevoked)
	}
	if last, ok := r.revoked[block]; !ok || int32(sequence-last) > 0 {
		r.revoked[block] = sequence
	}
	return nil
}

// matches reports whether a commit block has the checksum v1 of its
// transaction, or none.
func (c *crc32BE) matches(b []byte) bool {
	kind, size, found := b[0xc], b[0xd], binary.BigEndian.Uint32(b[0x10:])
	return kind == 1 && size == 4 && found == c.crc || kind == 0 && size == 0 && found == 0
}

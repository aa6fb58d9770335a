package ext4img

import (
	"context"
	"encoding/binary"
)

// Orphans are inodes that have no names any more, or are to become shorter, and
// that a crash has left so (kernel: Documentation/filesystems/ext4/orphan.rst
// and fs/ext4/orphan.c). They are a list, from s_last_orphan on through i_dtime
// or, with the orphan_file feature, the numbers in the blocks of a file.

const (
	orphanMagic   = 0x0b10ca04 // ob_magic
	orphanTailLen = 8          // ob_magic, ob_checksum
	maxOrphans    = 1 << 16    // that are looked after at once
)

// dropOrphans finishes what a crash has left undone, as a mount would.
func (e *Editor) dropOrphans(ctx context.Context) error {
	s := e.fs.sb
	inFile := s.Compat&CompatOrphanFile != 0 && s.ROCompat&ROCompatOrphanPresent != 0
	if s.LastOrphan == 0 && !inFile {
		return nil
	}
	t, err := e.Begin()
	if err != nil {
		return err
	}
	defer t.Discard()
	if err := t.dropOrphanList(); err != nil {
		return err
	}
	if inFile {
		if err := t.dropOrphanFile(); err != nil {
			return err
		}
	}
	return t.Commit(ctx)
}

func (t *Tx) dropOrphanList() error {
	s := t.sb()
	p := place{"orphan list", 0, -1}
	for range maxOrphans {
		ino := s.LastOrphan
		if ino == 0 {
			return nil
		}
		n, err := t.inode(ino)
		if err != nil {
			return err
		}
		next := Ino(n.Dtime)
		if err := t.dropOrphan(p, n); err != nil {
			return err
		}
		s.LastOrphan = next
	}
	return p.unsupported("", "has more than %d inodes: run e2fsck", maxOrphans)
}

// dropOrphan frees an inode without names, or what one holds behind its end.
func (t *Tx) dropOrphan(p place, n *Inode) error {
	if n.Ino < t.sb().FirstIno || n.Mode == 0 || t.freed[n.Ino] {
		return p.corrupt("", "leads to inode %d, of mode %#o", n.Ino, n.Mode)
	}
	t.dirty(n)
	if n.Links == 0 {
		if err := t.dropXattrs(n); err != nil {
			return err
		}
		if err := t.dropContent(n); err != nil {
			return err
		}
		return t.freeInode(n)
	}
	n.Dtime = 0
	if n.IsRegular() {
		return t.truncate(n, n.Size)
	}
	return nil
}

func (t *Tx) dropOrphanFile() error {
	s := t.sb()
	le := binary.LittleEndian
	n, err := t.used(s.OrphanFileInum)
	if err != nil {
		return err
	}
	bs := int64(s.BlockSize)
	if n.Size > s.BlocksCount*bs {
		return place{"orphan file", n.Ino, -1}.corrupt("i_size", "%d, and the file system has %d bytes", n.Size, s.BlocksCount*bs)
	}
	left := maxOrphans
	err = t.eachMapped(n, 0, ceilDiv(n.Size, bs), func(e extent) error {
		for block := e.physical; block < e.physical+e.len; block++ {
			p := place{"orphan file", n.Ino, block}
			b, err := t.edit(block)
			if err != nil {
				return err
			}
			end := len(b) - orphanTailLen
			if m := le.Uint32(b[end:]); m != orphanMagic {
				return p.corrupt("ob_magic", "%s", hexNot(m, orphanMagic))
			}
			if found, want := le.Uint32(b[end+4:]), orphanChecksum(s, n, block, b); s.hasCsum() && found != want {
				return p.checksum(found, want)
			}
			for at := 0; at < end; at += 4 {
				ino := Ino(le.Uint32(b[at:]))
				if ino == 0 {
					continue
				}
				if left--; left < 0 {
					return p.unsupported("", "has more than %d inodes: run e2fsck", maxOrphans)
				}
				x, err := t.inode(ino)
				if err != nil {
					return err
				}
				if err := t.dropOrphan(p, x); err != nil {
					return err
				}
				if b, err = t.edit(block); err != nil {
					return err
				}
				le.PutUint32(b[at:], 0)
			}
			if s.hasCsum() {
				le.PutUint32(b[end+4:], orphanChecksum(s, n, block, b))
			}
		}
		return nil
	})
	s.ROCompat &^= ROCompatOrphanPresent
	return err
}

// orphanChecksum is what the checksum of a block of the orphan file has to be.
func orphanChecksum(s *Superblock, n *Inode, block int64, b []byte) uint32 {
	var at [8]byte
	binary.LittleEndian.PutUint64(at[:], uint64(block))
	return crc32c(crc32c(s.inodeSeed(n.Ino, n.Generation), at[:]), b[:len(b)-orphanTailLen])
}

const (
	mmpMagic    = 0x004d4d50 // mmp_magic
	mmpSeqClean = 0xff4d4d50 // EXT4_MMP_SEQ_CLEAN

)

// checkMMP refuses a file system whose multiple mount protection says that
// somebody uses it.
func (f *FS) checkMMP() error {
	if f.sb.Incompat&IncompatMMP == 0 {
		return nil
	}
	b, err := f.block(f.sb.MMPBlock)
	if err != nil {
		return err
	}
	p := place{"mmp block", 0, f.sb.MMPBlock}
	le := binary.LittleEndian
	if m := le.Uint32(b); m != mmpMagic {
		return p.corrupt("mmp_magic", "%s", hexNot(m, mmpMagic))
	}
	if found, want := le.Uint32(b[0x3fc:]), crc32c(f.sb.ChecksumSeed, b[:0x3fc]); f.sb.hasCsum() && found != want {
		return p.checksum(found, want)
	}
	if seq := le.Uint32(b[4:]); seq != mmpSeqClean {
		return &FormatError{p.name, 0, p.block, "mmp_seq", hexNot(seq, mmpSeqClean) + ": somebody uses the file system, or has crashed: run e2fsck", ErrNotClean}
	}
	return nil
}

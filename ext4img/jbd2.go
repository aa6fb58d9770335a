package ext4img

import "encoding/binary"

// journalSizes tells the size of a journal, in blocks, in a file system of less
// than that many blocks: mke2fs's default (lib/ext2fs/mkjournal.c,
// ext2fs_default_journal_size).
var journalSizes = [...]struct{ below, size int64 }{
	{2048, 0}, {32768, 1024}, {256 << 10, 4096}, {512 << 10, 8192}, {4096 << 10, 16384},
	{8192 << 10, 32768}, {16384 << 10, 65536}, {32768 << 10, 131072},
}

// journalBlocks is the size of the journal of a file system of that many
// blocks; 0: it is too small for one.
func journalBlocks(blocks int64) int64 {
	for _, s := range journalSizes {
		if blocks < s.below {
			return s.size
		}
	}
	return 262144
}

// journalDiskInode is inode 8. Its blocks are allocated and, but for the
// first, zero.
func (l *Layout) journalDiskInode() *diskInode {
	n := &diskInode{mode: modeReg | 0o600, links: 1, size: l.journalBlocks * l.geo.blockSize, sec: l.time}
	o := single(l.journalPos, l.journalBlocks)
	var list []extent
	l.geo.eachExtent(o, func(e extent) { list = append(list, e) })
	n.setObject(l.geo, o, list)
	return n
}

// putJournalSuperblock writes the first block of an empty journal, which is
// big-endian (kernel: Documentation/filesystems/ext4/journal.rst).
func (l *Layout) putJournalSuperblock(b []byte) {
	be := binary.BigEndian
	be.PutUint32(b, jbd2Magic)                      // h_magic
	be.PutUint32(b[4:], 4)                          // h_blocktype: superblock v2
	be.PutUint32(b[0xc:], uint32(l.geo.blockSize))  // s_blocksize
	be.PutUint32(b[0x10:], uint32(l.journalBlocks)) // s_maxlen
	be.PutUint32(b[0x14:], 1)                       // s_first
	be.PutUint32(b[0x18:], 1)                       // s_sequence
	copy(b[0x30:0x40], l.uuid[:])                   // s_uuid
	be.PutUint32(b[0x40:], 1)                       // s_nr_users
}

const jbd2Magic = 0xc03b3998

// replay finds the newest copies of blocks in the journal.
func (f *FS) replay() error {
	return place{"journal", f.sb.JournalInum, -1}.unsupported("", "has to be replayed by a mount first")
}

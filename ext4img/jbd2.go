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

const (
	jbd2Magic      = 0xc03b3998 // h_magic of every block of the log that is no copy
	jbd2HeaderLen  = 12
	jbd2TailLen    = 4  // checksum at the end of descriptor and revoke blocks
	jbd2RevokeHead = 16 // header, r_count
	jbd2UUIDLen    = 16

	jbd2DefaultFCBlocks = 256  // JBD2_DEFAULT_FAST_COMMIT_BLOCKS
	jbd2MinBlocks       = 1024 // JBD2_MIN_JOURNAL_BLOCKS
)

// h_blocktype.
const (
	jbd2Descriptor   = 1
	jbd2Commit       = 2
	jbd2SuperblockV1 = 3
	jbd2SuperblockV2 = 4
	jbd2Revoke       = 5
)

// Flags of a tag.
const (
	jbd2Escape   = 1 // the block begins with jbd2Magic, which is zero in the copy
	jbd2SameUUID = 2 // no UUID follows
	jbd2Deleted  = 4
	jbd2LastTag  = 8
)

// s_feature_compat and s_feature_incompat of a journal.
const (
	jbd2CompatChecksum = 0x1

	jbd2IncompatRevoke      = 0x1
	jbd2Incompat64bit       = 0x2
	jbd2IncompatAsyncCommit = 0x4
	jbd2IncompatCsumV2      = 0x8
	jbd2IncompatCsumV3      = 0x10
	jbd2IncompatFastCommit  = 0x20
	jbd2IncompatKnown       = 0x3f
)

// journalSuper is the superblock of a journal, in its first block.
type journalSuper struct {
	blockSize int64  // 0xc: s_blocksize
	maxLen    int64  // 0x10: s_maxlen: blocks of the journal
	first     int64  // 0x14: s_first: first block of the log
	sequence  uint32 // 0x18: s_sequence: of the first transaction
	start     int64  // 0x1c: s_start: where that lies; 0: there is none
	compat    uint32 // 0x24: s_feature_compat
	incompat  uint32 // 0x28: s_feature_incompat
	uuid      UUID   // 0x30: s_uuid
	fcBlocks  int64  // 0x54: s_num_fc_blks

	last     int64  // the block behind the log
	csumSeed uint32 // of checksums v2 and v3
}

// parseJournalSuper reads the superblock of a journal of that many blocks of
// blockSize bytes. The log lies inside of it.
func parseJournalSuper(p place, b []byte, blocks, blockSize int64) (*journalSuper, error) {
	be := binary.BigEndian
	if m := be.Uint32(b); m != jbd2Magic {
		return nil, p.corrupt("h_magic", "%s", hexNot(m, jbd2Magic))
	}
	j := &journalSuper{
		blockSize: int64(be.Uint32(b[0xc:])),
		maxLen:    int64(be.Uint32(b[0x10:])),
		first:     int64(be.Uint32(b[0x14:])),
		sequence:  be.Uint32(b[0x18:]),
		start:     int64(be.Uint32(b[0x1c:])),
	}
	switch t := be.Uint32(b[4:]); t {
	case jbd2SuperblockV1:
	case jbd2SuperblockV2:
		j.compat, j.incompat = be.Uint32(b[0x24:]), be.Uint32(b[0x28:])
		copy(j.uuid[:], b[0x30:])
		j.fcBlocks = int64(be.Uint32(b[0x54:]))
		if ro := be.Uint32(b[0x2c:]); ro != 0 {
			return nil, p.unsupported("s_feature_ro_compat", "%#x", ro)
		}
	default:
		return nil, p.corrupt("h_blocktype", "%d, expected 3 or 4", t)
	}
	if unknown := j.incompat &^ jbd2IncompatKnown; unknown != 0 {
		return nil, p.unsupported("s_feature_incompat", "%#x is not known", unknown)
	}
	if j.incompat&jbd2IncompatCsumV2 != 0 && j.incompat&jbd2IncompatCsumV3 != 0 || j.compat&jbd2CompatChecksum != 0 && j.hasCsum() {
		return nil, p.corrupt("s_feature_incompat", "%#x with s_feature_compat %#x: checksums of several kinds", j.incompat, j.compat)
	}
	if j.hasCsum() {
		if t := b[0x50]; t != 4 {
			return nil, p.unsupported("s_checksum_type", "%d, expected 4", t)
		}
		want := crc32c(crc32c(crc32c(^uint32(0), b[:0xfc]), make([]byte, 4)), b[0x100:superblockSize])
		if found := be.Uint32(b[0xfc:]); found != want {
			return nil, p.checksum(found, want)
		}
		j.csumSeed = crc32c(^uint32(0), j.uuid[:])
	}
	switch {
	case j.blockSize != blockSize:
		return nil, p.corrupt("s_blocksize", "%d, expected %d", j.blockSize, blockSize)
	case j.maxLen > blocks:
		return nil, p.corrupt("s_maxlen", "%d, and the journal has %d blocks", j.maxLen, blocks)
	}
	j.last = j.maxLen
	if j.incompat&jbd2IncompatFastCommit != 0 {
		if j.fcBlocks == 0 {
			j.fcBlocks = jbd2DefaultFCBlocks
		}
		if j.last-j.fcBlocks >= jbd2MinBlocks {
			j.last -= j.fcBlocks
		}
	}
	if j.first < 1 || j.first >= j.last {
		return nil, p.corrupt("s_first", "%d, expected 1 to %d", j.first, j.last-1)
	}
	if j.start != 0 && (j.start < j.first || j.start >= j.last) {
		return nil, p.corrupt("s_start", "%d, expected %d to %d", j.start, j.first, j.last-1)
	}
	return j, nil
}

// hasCsum reports whether every block of the log has a checksum of its own.
func (j *journalSuper) hasCsum() bool {
	return j.incompat&(jbd2IncompatCsumV2|jbd2IncompatCsumV3) != 0
}

// tagLen is the length of a tag without its UUID.
func (j *journalSuper) tagLen() int {
	if j.incompat&jbd2IncompatCsumV3 != 0 {
		return 16
	}
	n := 8
	if j.incompat&jbd2Incompat64bit != 0 {
		n += 4
	}
	if j.incompat&jbd2IncompatCsumV2 != 0 {
		n += 2
	}
	return n
}

// journalTag says of which block the log holds a copy.
type journalTag struct {
	block    int64
	flags    uint16
	checksum uint32 // of the copy; 16 bits of it with checksums v2
}

// eachTag calls fn with the tags of a descriptor block, whose copies follow it
// in the log.
func (j *journalSuper) eachTag(b []byte, fn func(journalTag) error) error {
	be := binary.BigEndian
	end := len(b)
	if j.hasCsum() {
		end -= jbd2TailLen
	}
	n := j.tagLen()
	for at := jbd2HeaderLen; at+n <= end; {
		t := journalTag{block: int64(be.Uint32(b[at:])), flags: be.Uint16(b[at+6:])}
		if j.incompat&jbd2Incompat64bit != 0 {
			t.block |= int64(be.Uint32(b[at+8:])) << 32
		}
		if j.incompat&jbd2IncompatCsumV3 != 0 {
			t.checksum = be.Uint32(b[at+12:])
		} else {
			t.checksum = uint32(be.Uint16(b[at+4:]))
		}
		if err := fn(t); err != nil {
			return err
		}
		at += n
		if t.flags&jbd2SameUUID == 0 {
			at += jbd2UUIDLen
		}
		if t.flags&jbd2LastTag != 0 {
			break
		}
	}
	return nil
}

// eachRevoked calls fn with the blocks that a revoke block names.
func (j *journalSuper) eachRevoked(p place, b []byte, fn func(block int64) error) error {
	be := binary.BigEndian
	end := int(min(be.Uint32(b[jbd2HeaderLen:]), 1<<20)) // r_count: bytes in use
	room := len(b)
	if j.hasCsum() {
		room -= jbd2TailLen
	}
	if end > room {
		return p.corrupt("r_count", "%d, expected at most %d", end, room)
	}
	n := 4
	if j.incompat&jbd2Incompat64bit != 0 {
		n = 8
	}
	for at := jbd2RevokeHead; at+n <= end; at += n {
		var block int64
		if n == 4 {
			block = int64(be.Uint32(b[at:]))
		} else {
			block = int64(be.Uint64(b[at:]))
		}
		if err := fn(block); err != nil {
			return err
		}
	}
	return nil
}

// tailMatches reports whether a descriptor or revoke block matches its
// checksum.
func (j *journalSuper) tailMatches(b []byte) bool {
	end := len(b) - jbd2TailLen
	return !j.hasCsum() || binary.BigEndian.Uint32(b[end:]) == crc32c(crc32c(j.csumSeed, b[:end]), make([]byte, jbd2TailLen))
}

// commitMatches reports whether a commit block matches its checksum v2 or v3.
func (j *journalSuper) commitMatches(b []byte) bool {
	const off = 0x10 // h_chksum
	return !j.hasCsum() ||
		binary.BigEndian.Uint32(b[off:]) == crc32c(crc32c(crc32c(j.csumSeed, b[:off]), make([]byte, 4)), b[off+4:])
}

// tagMatches reports whether a copy matches the checksum in its tag.
func (j *journalSuper) tagMatches(t journalTag, sequence uint32, b []byte) bool {
	if !j.hasCsum() {
		return true
	}
	var seq [4]byte
	binary.BigEndian.PutUint32(seq[:], sequence)
	want := crc32c(crc32c(j.csumSeed, seq[:]), b)
	if j.incompat&jbd2IncompatCsumV3 == 0 {
		want &= 0xffff
	}
	return t.checksum == want
}

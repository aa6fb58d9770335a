package ext4img

import (
	"bytes"
	"encoding/binary"
	"time"
)

// i_flags.
const (
	comprFl      = 0x4        // compressed, by patches that the kernel never had
	encryptFl    = 0x800      // names or contents are encrypted
	indexFl      = 0x1000     // the directory has an htree
	hugeFileFl   = 0x40000    // i_blocks counts file system blocks
	extentsFl    = 0x80000    // i_block holds an extent tree
	eaInodeFl    = 0x200000   // the inode holds the value of an xattr
	inlineDataFl = 0x10000000 // i_block and an xattr hold the content
	casefoldFl   = 0x40000000 // names of the directory are the same in upper and lower case
)

// i_mode: the type of a file.
const (
	modeType   = 0xf000
	modeFifo   = 0x1000
	modeChar   = 0x2000
	modeDir    = 0x4000
	modeBlock  = 0x6000
	modeReg    = 0x8000
	modeLink   = 0xa000
	modeSocket = 0xc000
)

const (
	inodeSize  = 256
	extraIsize = 32 // i_extra_isize: the inode ends with i_projid
	inodeBody  = 128 + extraIsize
	maxLinks   = 65000 // EXT4_LINK_MAX
)

// diskInode is an inode as it is written (kernel:
// Documentation/filesystems/ext4/inodes.rst).
type diskInode struct {
	mode     uint16
	uid, gid uint32
	links    uint32
	size     int64
	sec      int64 // of all four times
	nsec     uint32
	flags    uint32
	blocks   int64 // file system blocks that the inode holds
	block    [60]byte
	fileACL  int64
	// An inode that holds an xattr's value keeps the value's hash as its atime
	// and its reference count as i_version (kernel: fs/ext4/xattr.c,
	// ext4_xattr_inode_set_hash and _set_ref).
	eaHash, eaRefs uint32
}

// put writes the inode and its checksum over b, which is zero but for the
// xattrs behind the body.
func (n *diskInode) put(l *Layout, b []byte, ino uint32) {
	le := binary.LittleEndian
	le.PutUint16(b, n.mode)
	le.PutUint16(b[2:], uint16(n.uid))
	le.PutUint32(b[4:], uint32(n.size))
	sec, extra := uint32(n.sec), encodeExtraTime(n.sec, n.nsec)
	le.PutUint32(b[8:], sec)    // i_atime
	le.PutUint32(b[0xc:], sec)  // i_ctime
	le.PutUint32(b[0x10:], sec) // i_mtime
	le.PutUint16(b[0x18:], uint16(n.gid))
	links := n.links
	if n.mode&modeType == modeDir && links > maxLinks {
		links = 1 // dir_nlink: not counted
	}
	le.PutUint16(b[0x1a:], uint16(links))
	// i_blocks counts 512 bytes in 48 bits, or blocks with hugeFileFl.
	flags, blocks := n.flags, n.blocks*(l.geo.blockSize/512)
	if blocks >= 1<<48 {
		flags |= hugeFileFl
		blocks = n.blocks
	}
	le.PutUint32(b[0x1c:], uint32(blocks))
	le.PutUint32(b[0x20:], flags)
	copy(b[0x28:], n.block[:])
	le.PutUint32(b[0x68:], uint32(n.fileACL))
	le.PutUint32(b[0x6c:], uint32(n.size>>32))
	le.PutUint16(b[0x74:], uint16(blocks>>32))
	le.PutUint16(b[0x76:], uint16(n.fileACL>>32))
	le.PutUint16(b[0x78:], uint16(n.uid>>16))
	le.PutUint16(b[0x7a:], uint16(n.gid>>16))
	le.PutUint16(b[0x80:], extraIsize)
	le.PutUint32(b[0x84:], extra) // i_ctime_extra
	le.PutUint32(b[0x88:], extra) // i_mtime_extra
	le.PutUint32(b[0x8c:], extra) // i_atime_extra
	le.PutUint32(b[0x90:], sec)   // i_crtime
	le.PutUint32(b[0x94:], extra) // i_crtime_extra
	if flags&eaInodeFl != 0 {
		le.PutUint32(b[8:], n.eaHash)
		le.PutUint32(b[0xc:], 0)
		le.PutUint32(b[0x24:], n.eaRefs)
	}
	crc := crc32c(l.inodeSeed(ino), b)
	le.PutUint16(b[0x7c:], uint16(crc))
	le.PutUint16(b[0x82:], uint16(crc>>16))
}

// inodeSeed is where the checksums of an inode and of its blocks start: file
// system, inode number, generation (always 0).
func (l *Layout) inodeSeed(ino uint32) uint32 {
	var b [8]byte
	binary.LittleEndian.PutUint32(b[:], ino)
	return crc32c(l.csumSeed, b[:])
}

// encodeExtraTime is the *_extra field of a time: nanoseconds and the two bits
// of the epoch.
func encodeExtraTime(sec int64, nsec uint32) uint32 {
	return nsec<<2 | uint32((sec-int64(int32(sec)))>>32)&3
}

// setObject makes the inode hold an object.
func (n *diskInode) setObject(g *geometry, o object, list []extent) {
	data := o.blocks()
	n.flags |= extentsFl
	n.blocks += data + g.treeBlocks(int64(len(list)))
	g.putExtentRoot(n.block[:], list, o.pos+data)
}

func (f *filler) setObject(n *diskInode, o object) { n.setObject(f.l.geo, o, f.extents(o)) }

// putInode writes the inode with that number; b is zero.
func (f *filler) putInode(b []byte, ino uint32) {
	l := f.l
	switch {
	case ino == resizeIno && l.geo.resizeInode:
		l.resizeDiskInode().put(l, b, ino)
		return
	case ino == journalIno && l.journalBlocks > 0:
		l.journalDiskInode().put(l, b, ino)
		return
	case ino == lostFoundIno && l.ownLostFound:
		n := diskInode{mode: modeDir | 0o700, links: 2, size: l.lostFound.n * l.geo.blockSize, sec: l.time}
		f.setObject(&n, single(l.lostFound.pos, l.lostFound.n))
		n.put(l, b, ino)
		return
	case ino < firstIno && ino != rootIno:
		return // reserved and unused
	case ino > l.lastTreeIno():
		f.putEAInode(b, ino)
		return
	}
	i := l.index(ino)
	t := l.tree.inodes.at(i)
	n := diskInode{mode: t.mode, uid: t.uid, gid: t.gid, links: t.links, size: t.size}
	n.sec, n.nsec = l.tree.mtime(t)
	if i == 0 && l.ownLostFound {
		n.links++
	}
	switch t.mode & modeType {
	case modeReg, modeDir:
		o := f.objectOf(i)
		f.setObject(&n, o)
		if t.isDir() {
			blocks := o.blocks()
			n.size = blocks * l.geo.blockSize
			if blocks > 1 {
				n.flags |= indexFl
			}
		}
	case modeLink:
		if t.size < int64(len(n.block)) {
			copy(n.block[:], l.tree.target(t))
			break
		}
		f.setObject(&n, f.objectOf(i))
	case modeChar, modeBlock:
		// Numbers of 8:8 bits lie in the first word in their old form.
		major, minor := t.rdev>>8&0xfff, t.rdev&0xff|t.rdev>>12&0xfff00
		if major < 256 && minor < 256 {
			binary.LittleEndian.PutUint32(n.block[:], major<<8|minor)
		} else {
			binary.LittleEndian.PutUint32(n.block[4:], t.rdev)
		}
	}
	if t.xattr != 0 {
		plan := &l.xattrs[t.xattr-1]
		body, block, err := l.tree.xattrs[t.xattr-1].place(int(l.geo.blockSize))
		if err != nil {
			panic("ext4img: internal error: xattrs that fitted when planned: " + err.Error())
		}
		if len(body) > 0 {
			area := b[inodeBody:]
			binary.LittleEndian.PutUint32(area, xattrMagic)
			encodeXattrs(area, 4, 4, l.entries(body), false)
		}
		if len(block) > 0 {
			n.fileACL = l.geo.block(plan.blockFor(i))
			n.blocks++
		}
		for _, x := range block {
			if x.eaInode { // counted where it is used
				n.blocks += ceilDiv(int64(len(x.value)), l.geo.blockSize)
			}
		}
	}
	n.put(l, b, ino)
}

// Inode is what an inode says (kernel:
// Documentation/filesystems/ext4/inodes.rst). It is not changed once it was
// read.
type Inode struct {
	Ino        Ino
	Mode       uint16    // 0x0: i_mode: type and permissions, in the numbers of Linux
	UID, GID   uint32    // 0x2, 0x18, 0x78
	Size       int64     // 0x4, 0x6c: i_size in bytes
	Links      uint16    // 0x1a: i_links_count
	Blocks     int64     // 0x1c, 0x74: i_blocks in units of 512 bytes, metadata of the file included
	Flags      uint32    // 0x20: i_flags
	Generation uint32    // 0x64: i_generation
	FileACL    int64     // 0x68, 0x76: i_file_acl: the block that holds xattrs, or 0
	Atime      time.Time // 0x8, 0x8c
	Ctime      time.Time // 0xc, 0x84
	Mtime      time.Time // 0x10, 0x88
	Crtime     time.Time // 0x90: zero in inodes that are too short for it
	Dtime      uint32    // 0x14: i_dtime: time of deletion, or the next orphan
	Version    uint64    // 0x24, 0x98: i_version
	ProjID     uint32    // 0x9c: i_projid

	extraIsize int    // 0x80: i_extra_isize; 0 in short inodes
	raw        []byte // all of it, as on the device
}

// Offsets of fields in an inode.
const (
	inodeBlockOff = 0x28 // i_block
	inodeBlockLen = 60
)

// block returns i_block.
func (n *Inode) block() []byte { return n.raw[inodeBlockOff : inodeBlockOff+inodeBlockLen] }

// Type returns the type of the file as its mode has it, without permissions.
func (n *Inode) Type() uint16 { return n.Mode & modeType }

// IsDir reports whether the inode is a directory.
func (n *Inode) IsDir() bool { return n.Type() == modeDir }

// IsRegular reports whether the inode is a regular file.
func (n *Inode) IsRegular() bool { return n.Type() == modeReg }

// IsSymlink reports whether the inode is a symlink.
func (n *Inode) IsSymlink() bool { return n.Type() == modeLink }

// Rdev returns the numbers of a device node; 0, 0 for other inodes.
func (n *Inode) Rdev() (major, minor uint32) {
	if t := n.Type(); t != modeChar && t != modeBlock {
		return 0, 0
	}
	le := binary.LittleEndian
	if old := le.Uint32(n.block()); old != 0 {
		return old >> 8 & 0xff, old & 0xff
	}
	dev := le.Uint32(n.block()[4:])
	return dev >> 8 & 0xfff, dev&0xff | dev>>12&0xfff00
}

// parseInode reads an inode of s.InodeSize bytes, which it keeps. Its checksum
// was verified.
func parseInode(s *Superblock, ino Ino, b []byte, block int64) (*Inode, error) {
	le := binary.LittleEndian
	p := place{"inode", ino, block}
	n := &Inode{
		Ino:        ino,
		Mode:       le.Uint16(b),
		UID:        uint32(le.Uint16(b[2:])) | uint32(le.Uint16(b[0x78:]))<<16,
		GID:        uint32(le.Uint16(b[0x18:])) | uint32(le.Uint16(b[0x7a:]))<<16,
		Links:      le.Uint16(b[0x1a:]),
		Blocks:     int64(le.Uint32(b[0x1c:])),
		Flags:      le.Uint32(b[0x20:]),
		Generation: le.Uint32(b[0x64:]),
		FileACL:    int64(le.Uint32(b[0x68:])),
		Dtime:      le.Uint32(b[0x14:]),
		Version:    uint64(le.Uint32(b[0x24:])),
		raw:        b,
	}
	if len(b) > oldInodeSize {
		n.extraIsize = int(le.Uint16(b[0x80:]))
		if n.extraIsize > len(b)-oldInodeSize || n.extraIsize%4 != 0 {
			return nil, p.corrupt("i_extra_isize", "%d, expected a multiple of 4 up to %d", n.extraIsize, len(b)-oldInodeSize)
		}
	}
	// Fields that not all inodes are long enough for.
	extra := func(off int) uint32 {
		if off+4 > oldInodeSize+n.extraIsize {
			return 0
		}
		return le.Uint32(b[off:])
	}
	n.Atime = decodeTime(le.Uint32(b[0x8:]), extra(0x8c))
	n.Ctime = decodeTime(le.Uint32(b[0xc:]), extra(0x84))
	n.Mtime = decodeTime(le.Uint32(b[0x10:]), extra(0x88))
	if 0x94 <= oldInodeSize+n.extraIsize { // i_crtime_extra can lie behind the end
		n.Crtime = decodeTime(extra(0x90), extra(0x94))
	}
	n.Version |= uint64(extra(0x98)) << 32
	if s.ROCompat&ROCompatProject != 0 {
		n.ProjID = extra(0x9c)
	}

	n.Size = int64(le.Uint32(b[4:]))
	if n.IsRegular() || n.IsDir() && s.Incompat&IncompatLargedir != 0 {
		size := uint64(n.Size) | uint64(le.Uint32(b[0x6c:]))<<32
		if limit := uint64(s.BlockSize) << 32; size > limit {
			return nil, p.corrupt("i_size", "%d, expected at most %d", size, limit)
		}
		n.Size = int64(size)
	}
	if s.ROCompat&ROCompatHugeFile != 0 {
		n.Blocks |= int64(le.Uint16(b[0x74:])) << 32
		if n.Flags&hugeFileFl != 0 {
			n.Blocks *= int64(s.BlockSize / 512)
		}
	}
	if s.Incompat&Incompat64bit != 0 {
		n.FileACL |= int64(le.Uint16(b[0x76:])) << 32
	}
	if n.IsDir() && n.Size > s.BlocksCount*int64(s.BlockSize) {
		return nil, p.corrupt("i_size", "%d of a directory, and the file system has %d bytes", n.Size, s.BlocksCount*int64(s.BlockSize))
	}
	return n, nil
}

// put writes the inode over b, which has s.InodeSize bytes: what it was read
// from, with the fields as they are now, and a new checksum. i_block and
// xattrs are those of raw.
func (n *Inode) put(s *Superblock, b []byte) {
	le := binary.LittleEndian
	copy(b, n.raw)
	extra := func(off int, v uint32) {
		if off+4 <= oldInodeSize+n.extraIsize {
			le.PutUint32(b[off:], v)
		}
	}
	putTime := func(off, extraOff int, t time.Time) {
		le.PutUint32(b[off:], uint32(t.Unix()))
		extra(extraOff, encodeExtraTime(t.Unix(), uint32(t.Nanosecond())))
	}
	le.PutUint16(b, n.Mode)
	le.PutUint16(b[2:], uint16(n.UID))
	le.PutUint16(b[0x78:], uint16(n.UID>>16))
	le.PutUint16(b[0x18:], uint16(n.GID))
	le.PutUint16(b[0x7a:], uint16(n.GID>>16))
	le.PutUint16(b[0x1a:], n.Links)
	le.PutUint32(b[0x20:], n.Flags)
	le.PutUint32(b[0x64:], n.Generation)
	le.PutUint32(b[0x68:], uint32(n.FileACL))
	if s.Incompat&Incompat64bit != 0 {
		le.PutUint16(b[0x76:], uint16(n.FileACL>>32))
	}
	le.PutUint32(b[0x14:], n.Dtime)
	le.PutUint32(b[0x24:], uint32(n.Version))
	extra(0x98, uint32(n.Version>>32))
	if s.ROCompat&ROCompatProject != 0 {
		extra(0x9c, n.ProjID)
	}
	putTime(0x8, 0x8c, n.Atime)
	putTime(0xc, 0x84, n.Ctime)
	putTime(0x10, 0x88, n.Mtime)
	if 0x94 <= oldInodeSize+n.extraIsize {
		putTime(0x90, 0x94, n.Crtime)
	}
	le.PutUint32(b[4:], uint32(n.Size))
	if n.IsRegular() || n.IsDir() && s.Incompat&IncompatLargedir != 0 {
		le.PutUint32(b[0x6c:], uint32(n.Size>>32))
	}
	blocks := n.Blocks
	if n.Flags&hugeFileFl != 0 && s.ROCompat&ROCompatHugeFile != 0 {
		blocks /= int64(s.BlockSize / 512)
	}
	le.PutUint32(b[0x1c:], uint32(blocks))
	if s.ROCompat&ROCompatHugeFile != 0 {
		le.PutUint16(b[0x74:], uint16(blocks>>32))
	}
	if s.hasCsum() {
		putInodeChecksum(s, n.Ino, b)
	}
}

// decodeTime is the time of a field and its *_extra field.
func decodeTime(sec, extra uint32) time.Time {
	return time.Unix(int64(int32(sec))+int64(extra&3)<<32, int64(extra>>2))
}

// inodeChecksum is what the checksum of an inode has to be: all 32 bits of
// it, of which a short inode has the low half.
func inodeChecksum(s *Superblock, ino Ino, b []byte) uint32 {
	zero := []byte{0, 0}
	crc := crc32c(s.inodeSeed(ino, binary.LittleEndian.Uint32(b[0x64:])), b[:0x7c])
	crc = crc32c(crc, zero)
	if !hasChecksumHi(b) {
		return crc32c(crc, b[0x7e:])
	}
	crc = crc32c(crc, b[0x7e:0x82])
	crc = crc32c(crc, zero)
	return crc32c(crc, b[0x84:])
}

// hasChecksumHi reports whether an inode is long enough for i_checksum_hi.
func hasChecksumHi(b []byte) bool {
	return len(b) > oldInodeSize && binary.LittleEndian.Uint16(b[0x80:]) >= 4
}

// putInodeChecksum makes the checksum of an inode right.
func putInodeChecksum(s *Superblock, ino Ino, b []byte) {
	crc := inodeChecksum(s, ino, b)
	binary.LittleEndian.PutUint16(b[0x7c:], uint16(crc))
	if hasChecksumHi(b) {
		binary.LittleEndian.PutUint16(b[0x82:], uint16(crc>>16))
	}
}

// verifyInode compares an inode with its checksum. An inode of zeroes, which
// was never in use, has none.
func verifyInode(s *Superblock, ino Ino, b []byte, block int64) error {
	want := inodeChecksum(s, ino, b)
	found := uint32(binary.LittleEndian.Uint16(b[0x7c:]))
	if hasChecksumHi(b) {
		found |= uint32(binary.LittleEndian.Uint16(b[0x82:])) << 16
	} else {
		want &= 0xffff
	}
	if found == want || isZero(b) {
		return nil
	}
	return place{"inode", ino, block}.checksum(found, want)
}

func isZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// inodePlace returns the block that holds an inode, and where in it.
func (f *FS) inodePlace(ino Ino) (block int64, off int, err error) {
	s := f.sb
	if ino < 1 || uint32(ino) > s.InodesCount {
		return 0, 0, place{"inode", ino, -1}.corrupt("", "the file system has inodes 1 to %d", s.InodesCount)
	}
	group, index := int64(ino-1)/int64(s.InodesPerGroup), int64(ino-1)%int64(s.InodesPerGroup)
	d, err := f.groupDesc(group)
	if err != nil {
		return 0, 0, err
	}
	byteOff := index * int64(s.InodeSize)
	return d.inodeTable + byteOff/int64(s.BlockSize), int(byteOff % int64(s.BlockSize)), nil
}

// rawInode returns an inode as it is on the device, its checksum verified. It
// must not be changed.
func (f *FS) rawInode(ino Ino) (b []byte, block int64, err error) {
	if f.fc != nil && f.fc.inodes[ino] != nil {
		return f.fc.inodes[ino], -1, nil
	}
	if err := f.tx.flushInode(ino); err != nil {
		return nil, 0, err
	}
	block, off, err := f.inodePlace(ino)
	if err != nil {
		return nil, 0, err
	}
	b, err = f.block(block)
	if err != nil {
		return nil, 0, err
	}
	b = b[off : off+f.sb.InodeSize]
	if f.sb.hasCsum() && !f.ignoreChecksums {
		err = verifyInode(f.sb, ino, b, block)
	}
	return b, block, err
}

// inode reads an inode, in use or not.
func (f *FS) inode(ino Ino) (*Inode, error) {
	b, block, err := f.rawInode(ino)
	if err != nil {
		return nil, err
	}
	return parseInode(f.sb, ino, bytes.Clone(b), block)
}

// Inode reads an inode. One that is not in use is an error that matches
// ErrCorrupt: nothing sound leads to it.
func (f *FS) Inode(ino Ino) (*Inode, error) {
	n, err := f.inode(ino)
	if err == nil && (n.Mode == 0 || n.Links == 0) {
		return nil, place{"inode", ino, -1}.corrupt("", "is not in use")
	}
	return n, err
}

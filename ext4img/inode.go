package ext4img

import "encoding/binary"

// i_flags.
const (
	indexFl    = 0x1000   // the directory has an htree
	hugeFileFl = 0x40000  // i_blocks counts file system blocks
	extentsFl  = 0x80000  // i_block holds an extent tree
	eaInodeFl  = 0x200000 // the inode holds the value of an xattr
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
			encodeXattrs(area, 4, 4, body, false, l.eaInode)
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

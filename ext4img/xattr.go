package ext4img

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"iter"
	"slices"
	"strings"
)

// xattr is one extended attribute as ext4 stores it.
type xattr struct {
	index uint8 // e_name_index: the namespace
	name  string
	value string
}

// xattrSet is what one file has, in the order in which a block keeps it: by
// index, length of the name, name (kernel: fs/ext4/xattr.c, ext4_xattr_cmp).
type xattrSet []xattr

// The namespaces that have an e_name_index.
const (
	xattrUser       = 1
	xattrACLAccess  = 2
	xattrACLDefault = 3
	xattrTrusted    = 4
	xattrSecurity   = 6
	xattrSystem     = 7 // inline data, as "data"; else nothing that programs see
)

// xattrFullName is the reverse of splitXattr; ok is false for what programs
// do not see.
func xattrFullName(index uint8, name string) (full string, ok bool) {
	switch index {
	case xattrUser:
		return "user." + name, true
	case xattrACLAccess:
		return "system.posix_acl_access", name == ""
	case xattrACLDefault:
		return "system.posix_acl_default", name == ""
	case xattrTrusted:
		return "trusted." + name, true
	case xattrSecurity:
		return "security." + name, true
	case 8:
		return "system.richacl" + name, true
	case 10:
		return "gnu." + name, true
	}
	return "", false
}

// splitXattr separates a full name into namespace and rest; ok is false for a
// namespace that ext4 does not keep.
func splitXattr(full string) (index uint8, name string, ok bool) {
	switch full {
	case "system.posix_acl_access":
		return xattrACLAccess, "", true
	case "system.posix_acl_default":
		return xattrACLDefault, "", true
	}
	for _, p := range [...]struct {
		prefix string
		index  uint8
	}{{"user.", xattrUser}, {"trusted.", xattrTrusted}, {"security.", xattrSecurity}} {
		if name, ok := strings.CutPrefix(full, p.prefix); ok {
			return p.index, name, true
		}
	}
	return 0, "", false
}

// Bounds of the kernel: XATTR_NAME_MAX of the whole name, XATTR_SIZE_MAX.
const (
	maxXattrName  = 255
	maxXattrValue = 64 << 10
)

// with adds an xattr to a set, or replaces the one of that name.
func (s xattrSet) with(index uint8, name, value string) (xattrSet, error) {
	switch {
	case len(name) > maxXattrName, name == "" && index != xattrACLAccess && index != xattrACLDefault, strings.IndexByte(name, 0) >= 0:
		return s, fmt.Errorf("the name of an xattr has %d bytes: expected 1 to %d, and no zero byte", len(name), maxXattrName)
	case len(value) > maxXattrValue:
		return s, fmt.Errorf("the xattr %s has %d bytes: expected %d at most", name, len(value), maxXattrValue)
	}
	for i := range s {
		if s[i].index == index && s[i].name == name {
			s[i].value = value
			return s, nil
		}
	}
	return append(s, xattr{index, name, value}), nil
}

func (s xattrSet) sort() {
	slices.SortFunc(s, func(a, b xattr) int {
		return cmp.Or(cmp.Compare(a.index, b.index), cmp.Compare(len(a.name), len(b.name)), cmp.Compare(a.name, b.name))
	})
}

// key is the same for equal sets and for no others.
func (s xattrSet) key() string {
	var b []byte
	for _, x := range s {
		b = append(b, x.index)
		b = binary.LittleEndian.AppendUint32(b, uint32(len(x.name)))
		b = append(b, x.name...)
		b = binary.LittleEndian.AppendUint32(b, uint32(len(x.value)))
		b = append(b, x.value...)
	}
	return string(b)
}

const (
	xattrMagic       = 0xea020000
	xattrHeaderLen   = 32
	xattrEntryLen    = 16
	xattrRefcountMax = 1024     // EXT4_XATTR_REFCOUNT_MAX
	xattrSizeMax     = 64 << 10 // bytes of a value (kernel: include/uapi/linux/limits.h)
	xattrBodyLen     = inodeSize - inodeBody - 4
)

func pad4(n int) int { return (n + 3) &^ 3 }

func (x *xattr) entryLen() int { return xattrEntryLen + pad4(len(x.name)) }

// placedXattr is an xattr and where its value goes.
type placedXattr struct {
	xattr
	eaInode bool // the value lies in an inode of its own
}

// place decides which xattrs of a set lie in the inode and which in the block
// beside it, and which values of the block move to inodes of their own because
// they are too large for it.
func (s xattrSet) place(blockSize int) (body, block []placedXattr, err error) {
	bodyFree := xattrBodyLen - 4 // the list ends with four zero bytes
	blockUsed := xattrHeaderLen + 4
	for _, x := range s {
		need := x.entryLen() + pad4(len(x.value))
		if need <= bodyFree {
			bodyFree -= need
			body = append(body, placedXattr{xattr: x})
			continue
		}
		blockUsed += need
		block = append(block, placedXattr{xattr: x})
	}
	for blockUsed > blockSize {
		// The largest value leaves first; of equal ones the first.
		big := -1
		for i := range block {
			if !block[i].eaInode && len(block[i].value) > 0 && (big < 0 || len(block[i].value) > len(block[big].value)) {
				big = i
			}
		}
		if big < 0 {
			return nil, nil, fmt.Errorf("the names of its %d xattrs need %d bytes, and a block has %d", len(s), blockUsed, blockSize)
		}
		block[big].eaInode = true
		blockUsed -= pad4(len(block[big].value))
	}
	return body, block, nil
}

// encodeXattrs writes entries from area[first:] on and their values, those that
// no inode holds, from the end of area downwards. Offsets of values count from
// base. Entries get their hash only if hashed, as in a block; those whose value
// an inode holds have it already.
func encodeXattrs(area []byte, first, base int, list []xattrEntry, hashed bool) {
	le := binary.LittleEndian
	at, end := first, len(area)
	for _, x := range list {
		e := area[at:]
		e[0] = uint8(len(x.name)) // e_name_len
		e[1] = x.index            // e_name_index
		le.PutUint32(e[4:], uint32(x.inum))
		le.PutUint32(e[8:], uint32(x.size))
		copy(e[xattrEntryLen:], x.name)
		switch {
		case x.inum != 0:
			le.PutUint32(e[12:], x.hash)
		default:
			end -= pad4(len(x.value))
			copy(area[end:], x.value)
			if len(x.value) > 0 {
				le.PutUint16(e[2:], uint16(end-base)) // e_value_offs
			}
			if hashed {
				le.PutUint32(e[12:], x.valueHash())
			}
		}
		at += x.entryLen()
	}
}

// valueHash is e_hash of an entry whose value no inode holds.
func (x *xattrEntry) valueHash() uint32 {
	hash := xattrHashName(x.name)
	for at := 0; at < len(x.value); at += 4 {
		var word [4]byte
		copy(word[:], x.value[at:])
		hash = xattrHashValue(hash, binary.LittleEndian.Uint32(word[:]))
	}
	return hash
}

// entries returns xattrs as they are written.
func (l *Layout) entries(list []placedXattr) []xattrEntry {
	out := make([]xattrEntry, len(list))
	for i, x := range list {
		e := xattrEntry{index: x.index, name: x.name, size: int64(len(x.value))}
		if x.eaInode {
			ino, hash := l.eaInode(x.value)
			e.inum, e.hash = Ino(ino), xattrHashValue(xattrHashName(x.name), hash)
		} else {
			e.value = []byte(x.value)
		}
		out[i] = e
	}
	return out
}

// xattrHashName is the part of e_hash that the name decides. Bytes are
// unsigned (kernel: fs/ext4/xattr.c, ext4_xattr_hash_entry).
func xattrHashName(name string) uint32 {
	var h uint32
	for i := range len(name) {
		h = h<<5 ^ h>>27 ^ uint32(name[i])
	}
	return h
}

func xattrHashValue(h, word uint32) uint32 { return h<<16 ^ h>>16 ^ word }

// encodeXattrBlock makes the block of a set that refs inodes share, at a place
// that its checksum covers.
func (l *Layout) encodeXattrBlock(buf []byte, list []placedXattr, refs uint32, block int64) {
	putXattrBlock(buf, l.entries(list), refs)
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], uint64(block))
	binary.LittleEndian.PutUint32(buf[16:], crc32c(crc32c(l.csumSeed, b[:]), buf))
}

// putXattrBlock writes a block of xattrs, without its checksum, over zeroes.
func putXattrBlock(buf []byte, list []xattrEntry, refs uint32) {
	le := binary.LittleEndian
	le.PutUint32(buf, xattrMagic)
	le.PutUint32(buf[4:], refs)
	le.PutUint32(buf[8:], 1) // h_blocks
	encodeXattrs(buf, xattrHeaderLen, 0, list, true)
	var hash uint32
	at := xattrHeaderLen
	for i := range list {
		e := le.Uint32(buf[at+12:])
		if e == 0 { // such a block is not shared by the kernel
			hash = 0
			break
		}
		hash = hash<<16 ^ hash>>16 ^ e
		at += list[i].entryLen()
	}
	le.PutUint32(buf[12:], hash)
}

// Xattr is an extended attribute as programs see it.
type Xattr struct {
	Name  string // with its namespace, as "user.mime_type"
	Value string
}

// Xattrs returns the extended attributes of an inode, those in the inode
// first. POSIX ACLs have the form that programs use. What only the file system
// itself reads (inline data, encryption contexts) is left out. What cannot be
// read is an error in their midst, and the others follow.
func (f *FS) Xattrs(ino Ino) iter.Seq2[Xattr, error] {
	return func(yield func(Xattr, error) bool) {
		n, err := f.Inode(ino)
		if err != nil {
			yield(Xattr{}, err)
			return
		}
		f.eachXattr(n, func(e xattrEntry, err error) bool {
			if err != nil {
				return yield(Xattr{}, err)
			}
			name, ok := xattrFullName(e.index, e.name)
			if !ok {
				return true
			}
			value, err := f.xattrValue(n, e)
			if err == nil && (e.index == xattrACLAccess || e.index == xattrACLDefault) {
				value, err = aclFromExt4(value)
			}
			if err != nil {
				return yield(Xattr{}, fmt.Errorf("ext4: inode %d: xattr %q: %w", ino, name, err))
			}
			return yield(Xattr{name, value}, nil)
		})
	}
}

// xattrEntry is an xattr as it lies in an inode or a block.
type xattrEntry struct {
	index uint8  // 0x1: e_name_index
	name  string // 0x10, and 0x0: e_name_len
	size  int64  // 0x8: e_value_size
	inum  Ino    // 0x4: e_value_inum: the inode that holds the value, or 0
	hash  uint32 // 0xc: e_hash
	value []byte // at e_value_offs, if inum is 0
}

func (x *xattrEntry) entryLen() int { return xattrEntryLen + pad4(len(x.name)) }

// eachXattr calls fn with the xattrs of an inode. fn returns false to stop.
func (f *FS) eachXattr(n *Inode, fn func(xattrEntry, error) bool) {
	more := true
	list := func(p place, area []byte, first, base int) {
		err := parseXattrs(p, area, first, base, func(e xattrEntry) bool { more = fn(e, nil); return more })
		if err != nil && more {
			more = fn(xattrEntry{}, err)
		}
	}
	if area := n.xattrArea(); area != nil {
		list(place{"xattrs", n.Ino, -1}, area, 4, 4)
	}
	if n.FileACL == 0 || !more {
		return
	}
	p := place{"xattr block", n.Ino, n.FileACL}
	b, err := f.xattrBlock(p)
	if err != nil {
		fn(xattrEntry{}, err)
		return
	}
	list(p, b, xattrHeaderLen, 0)
}

// xattrArea returns the part of an inode that holds xattrs, from h_magic on;
// nil if there are none.
func (n *Inode) xattrArea() []byte {
	if n.extraIsize == 0 {
		return nil
	}
	area := n.raw[oldInodeSize+n.extraIsize:]
	if len(area) < 4 || binary.LittleEndian.Uint32(area) != xattrMagic {
		return nil
	}
	return area
}

// xattrBlock reads a block of xattrs and verifies its checksum.
func (f *FS) xattrBlock(p place) ([]byte, error) {
	b, err := f.block(p.block)
	if err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	if m := le.Uint32(b); m != xattrMagic {
		return nil, p.corrupt("h_magic", "%s", hexNot(m, xattrMagic))
	}
	if n := le.Uint32(b[8:]); n != 1 {
		return nil, p.corrupt("h_blocks", "%d, expected 1", n)
	}
	if f.sb.hasCsum() && !f.ignoreChecksums {
		if found, want := le.Uint32(b[16:]), xattrBlockChecksum(f.sb, b, p.block); found != want {
			return nil, p.checksum(found, want)
		}
	}
	return b, nil
}

// xattrBlockChecksum is what h_checksum has to be.
func xattrBlockChecksum(s *Superblock, b []byte, block int64) uint32 {
	var n [8]byte
	binary.LittleEndian.PutUint64(n[:], uint64(block))
	crc := crc32c(crc32c(s.ChecksumSeed, n[:]), b[:16])
	crc = crc32c(crc, make([]byte, 4))
	return crc32c(crc, b[20:])
}

// parseXattrs calls fn with the entries of area from first on, whose values
// lie behind the entries and inside of area. Offsets of values count from base.
func parseXattrs(p place, area []byte, first, base int, fn func(xattrEntry) bool) error {
	le := binary.LittleEndian
	// The list ends with four zero bytes. Values may not reach into it.
	end := first
	for {
		if end+4 > len(area) {
			return p.corrupt("", "the list of xattrs has no end")
		}
		if le.Uint32(area[end:]) == 0 {
			end += 4
			break
		}
		end += xattrEntryLen + pad4(int(area[end]))
	}
	for at := first; le.Uint32(area[at:]) != 0; {
		b := area[at:]
		nameLen := int(b[0])
		e := xattrEntry{
			index: b[1],
			name:  string(b[xattrEntryLen : xattrEntryLen+nameLen]),
			size:  int64(le.Uint32(b[8:])),
			inum:  Ino(le.Uint32(b[4:])),
			hash:  le.Uint32(b[12:]),
		}
		at += xattrEntryLen + pad4(nameLen)
		limit := int64(xattrSizeMax)
		if e.index == xattrSystem {
			limit = int64(len(area))
		}
		if e.size > limit {
			return p.corrupt("e_value_size", "%d of %q, expected at most %d", e.size, e.name, limit)
		}
		if e.inum == 0 && e.size > 0 {
			off := base + int(le.Uint16(b[2:]))
			if off < end || int64(off)+e.size > int64(len(area)) {
				return p.corrupt("e_value_offs", "%d of %q, expected %d bytes between %d and %d", off-base, e.name, e.size, end-base, len(area)-base)
			}
			e.value = area[off : off+int(e.size)]
		}
		if !fn(e) {
			return nil
		}
	}
	return nil
}

// xattrValue returns the value of an xattr of an inode.
func (f *FS) xattrValue(n *Inode, e xattrEntry) (string, error) {
	if e.inum == 0 {
		return string(e.value), nil
	}
	p := place{"xattr inode", e.inum, -1}
	if f.sb.Incompat&IncompatEAInode == 0 {
		return "", p.corrupt("e_value_inum", "%d without the ea_inode feature", e.inum)
	}
	v, err := f.Inode(e.inum)
	if err != nil {
		return "", err
	}
	if v.Flags&eaInodeFl == 0 || !v.IsRegular() || v.Size != e.size {
		return "", p.corrupt("i_size", "%d, i_flags %#x, i_mode %#o, expected %d bytes of an xattr", v.Size, v.Flags, v.Mode, e.size)
	}
	c, err := f.content(v)
	if err != nil {
		return "", err
	}
	b := make([]byte, e.size) // at most xattrSizeMax
	if err := readFull(c, b, 0); err != nil {
		return "", err
	}
	if f.ignoreChecksums {
		return string(b), nil
	}
	// The hash of the value lies where other inodes have their atime.
	hash, found := crc32c(f.sb.ChecksumSeed, b), binary.LittleEndian.Uint32(v.raw[8:])
	if found != hash && !(v.Version == 0 && f.isLustreValue(v, n)) {
		return "", p.checksum(found, hash)
	}
	return string(b), nil
}

// isLustreValue reports whether the inode of a value names the inode that has
// the xattr, as Lustre's do: in the mtime, with the same generation (kernel:
// fs/ext4/xattr.c, ext4_xattr_inode_get_ref and around).
func (f *FS) isLustreValue(v, n *Inode) bool {
	return binary.LittleEndian.Uint32(v.raw[0x10:]) == uint32(n.Ino) && v.Generation == n.Generation
}

package ext4img

import (
	"cmp"
	"encoding/binary"
	"fmt"
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
)

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
	xattrRefcountMax = 1024 // EXT4_XATTR_REFCOUNT_MAX
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

// encodeXattrs writes entries from area[first:] on and values from the end of
// area downwards. Offsets of values count from base. eaInode gives the inode
// of a value that has one, and the hash of the value. Entries get their hash
// only if hashed, as in a block.
func encodeXattrs(area []byte, first, base int, list []placedXattr, hashed bool, eaInode func(value string) (ino, hash uint32)) {
	at, end := first, len(area)
	for i := range list {
		x := &list[i]
		e := area[at:]
		e[0] = uint8(len(x.name)) // e_name_len
		e[1] = x.index            // e_name_index
		binary.LittleEndian.PutUint32(e[8:], uint32(len(x.value)))
		copy(e[xattrEntryLen:], x.name)
		var hash uint32
		if x.eaInode {
			ino, valueHash := eaInode(x.value)
			binary.LittleEndian.PutUint32(e[4:], ino) // e_value_inum
			hash = xattrHashValue(xattrHashName(x.name), valueHash)
		} else {
			end -= pad4(len(x.value))
			copy(area[end:], x.value)
			if len(x.value) > 0 {
				binary.LittleEndian.PutUint16(e[2:], uint16(end-base)) // e_value_offs
			}
			hash = xattrHashName(x.name)
			for v := area[end : end+pad4(len(x.value))]; len(v) > 0; v = v[4:] {
				hash = xattrHashValue(hash, binary.LittleEndian.Uint32(v))
			}
		}
		if hashed || x.eaInode {
			binary.LittleEndian.PutUint32(e[12:], hash) // e_hash
		}
		at += x.entryLen()
	}
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
	binary.LittleEndian.PutUint32(buf, xattrMagic)
	binary.LittleEndian.PutUint32(buf[4:], refs)
	binary.LittleEndian.PutUint32(buf[8:], 1) // h_blocks
	encodeXattrs(buf, xattrHeaderLen, 0, list, true, l.eaInode)
	var hash uint32
	at := xattrHeaderLen
	for i := range list {
		e := binary.LittleEndian.Uint32(buf[at+12:])
		if e == 0 { // such a block is not shared by the kernel
			hash = 0
			break
		}
		hash = hash<<16 ^ hash>>16 ^ e
		at += list[i].entryLen()
	}
	binary.LittleEndian.PutUint32(buf[12:], hash)
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], uint64(block))
	binary.LittleEndian.PutUint32(buf[16:], crc32c(crc32c(l.csumSeed, b[:]), buf))
}

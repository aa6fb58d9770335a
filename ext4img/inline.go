package ext4img

import "encoding/binary"

// With the inline_data feature a small file or directory lies in its inode:
// the first 60 bytes in i_block, the rest as the value of the xattr
// system.data (kernel: Documentation/filesystems/ext4/inlinedata.rst).

const inlineDirParentLen = 4 // the number of the parent, in the place of "." and ".."

// inlineData returns i_block and the value of system.data behind it: what
// there is room for, which can be more than the file has.
func (f *FS) inlineData(n *Inode) ([]byte, error) {
	value, err := f.inlineRest(n)
	if err != nil {
		return nil, err
	}
	return append(append([]byte(nil), n.block()...), value...), nil
}

// inlineRest returns the value of the xattr system.data, which every inode
// with inline data has.
func (f *FS) inlineRest(n *Inode) ([]byte, error) {
	p := place{"inline data", n.Ino, -1}
	area := n.xattrArea()
	if area == nil {
		return nil, p.corrupt("", "the inode has no xattr system.data")
	}
	var value []byte
	found := false
	err := parseXattrs(p, area, 4, 4, func(e xattrEntry) bool {
		found = e.index == xattrSystem && e.name == "data" && e.inum == 0
		value = e.value
		return !found
	})
	if err == nil && !found {
		err = p.corrupt("", "the inode has no xattr system.data")
	}
	return value, err
}

// inlineDirParent is what ".." is in a directory with inline data.
func inlineDirParent(n *Inode) Ino { return Ino(binary.LittleEndian.Uint32(n.block())) }

// eachInlineDirPart calls fn with the two parts of a directory with inline
// data, each of which is filled with entries as a block is, but has neither "."
// nor "..".
func (f *FS) eachInlineDirPart(n *Inode, fn func(p place, b []byte), fail func(error)) {
	p := place{"inline directory", n.Ino, -1}
	fn(p, n.block()[inlineDirParentLen:])
	rest, err := f.inlineRest(n)
	if err != nil {
		fail(err)
		return
	}
	if len(rest) > 0 {
		fn(p, rest)
	}
}

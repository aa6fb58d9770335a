package ext4img

import (
	"bytes"
	"encoding/binary"
	"errors"
)

// checkTableSize is how many bytes of an inode table are read at once.
const checkTableSize = 1 << 20

// checkInodes checks the inodes of a group, and what they lead to.
func (c *checker) checkInodes(g int64) {
	s, grp := c.sb, &c.groups[g]
	if !grp.ok {
		return
	}
	d := &grp.desc
	n := int64(s.InodesPerGroup)
	if d.flags&bgInodeUninit != 0 {
		n = 0
	} else if s.ROCompat&(ROCompatGDTCsum|ROCompatMetadataCsum) != 0 {
		n -= int64(d.itableUnused)
	}
	size := int64(s.InodeSize)
	step := max(checkTableSize/size, 1)
	buf := make([]byte, min(step, max(n, 1))*size)
	for at := int64(0); at < n; at += step {
		if c.failed() != nil {
			return
		}
		part := buf[:min(step, n-at)*size]
		if err := c.fs.readBytes(part, d.inodeTable*int64(s.BlockSize)+at*size); err != nil {
			c.fail(err)
			return
		}
		for i := int64(0); i*size < int64(len(part)); i++ {
			off := (at + i) * size
			c.checkInode(Ino(g*int64(s.InodesPerGroup)+at+i+1), part[i*size:(i+1)*size], d.inodeTable+off/int64(s.BlockSize))
		}
	}
}

// checkInode checks one inode, whose bytes are used again.
func (c *checker) checkInode(ino Ino, raw []byte, block int64) {
	s, le := c.sb, binary.LittleEndian
	group := int64(ino-1) / int64(s.InodesPerGroup)
	if isZero(raw) {
		return
	}
	if s.hasCsum() {
		if err := verifyInode(s, ino, raw, block); err != nil {
			c.damage(InodeDamaged, group, err)
			return
		}
	}
	mode, links := le.Uint16(raw), le.Uint16(raw[0x1a:])
	orphan := c.orphans[ino]
	reserved := ino < s.FirstIno && ino != RootIno
	switch {
	case ino == resizeIno:
	case links == 0 && !orphan && !(reserved && ino == 1):
		if mode != 0 && le.Uint32(raw[0x14:]) == 0 && !reserved {
			c.find(InodeDamaged, group, ino, block, "has mode %#o, and neither links nor a time of deletion", mode)
		}
		return
	}
	if links != 0 && le.Uint32(raw[0x14:]) != 0 && !orphan && !reserved {
		c.find(InodeDamaged, group, ino, block, "is in use, and i_dtime is %d", le.Uint32(raw[0x14:]))
	}
	n, err := parseInode(s, ino, bytes.Clone(raw), block)
	if err != nil {
		c.damage(InodeDamaged, group, err)
		return
	}
	if ino == resizeIno {
		c.checkResizeInode(n)
		return
	}
	x := c.inode(ino)
	x.mode, x.links = mode, uint32(links)
	switch {
	case orphan && links == 0:
		x.flags |= inodeOrphan
	case reserved, ino == s.OrphanFileInum && s.Compat&CompatOrphanFile != 0, ino == s.PrjQuotaInum && s.ROCompat&ROCompatQuota != 0:
		x.flags |= inodeHidden
	case n.Flags&eaInodeFl != 0:
		x.flags |= inodeValue
	}
	c.checkInodeFields(n, reserved)
	m := &checkMap{c: c, n: n}
	m.check()
	m.blocks += c.checkXattrs(n, m)
	if want := m.blocks * int64(s.BlockSize/512); n.Blocks != want && !m.damaged && !(reserved && ino == 1) {
		c.find(InodeBlocksWrong, group, ino, -1, "i_blocks is %d, expected %d", n.Blocks, want)
	}
	if n.IsDir() && !m.damaged && x.flags&inodeOrphan == 0 { // the entries of one without names count for nothing
		c.checkDir(n, m.dir)
	}
}

// checkInodeFields checks what an inode says of itself.
func (c *checker) checkInodeFields(n *Inode, reserved bool) {
	s := c.sb
	bad := func(format string, args ...any) { c.find(InodeDamaged, -1, n.Ino, -1, format, args...) }
	switch t := n.Type(); {
	case n.Ino == RootIno && t != modeDir:
		bad("the root directory has mode %#o", n.Mode)
	case t == modeReg || t == modeDir || t == modeLink || t == modeChar || t == modeBlock || t == modeFifo || t == modeSocket:
	case reserved:
	default:
		bad("has mode %#o", n.Mode)
	}
	if n.Flags&extentsFl != 0 && s.Incompat&IncompatExtents == 0 {
		bad("has an extent tree without the feature")
	}
	if n.Flags&inlineDataFl != 0 && s.Incompat&IncompatInlineData == 0 {
		bad("has inline data without the feature")
	}
	if n.Flags&eaInodeFl != 0 && s.Incompat&IncompatEAInode == 0 {
		bad("holds the value of an xattr without the feature")
	}
	if n.Flags&encryptFl != 0 && s.Incompat&IncompatEncrypt == 0 {
		bad("is encrypted without the feature")
	}
	if n.Flags&casefoldFl != 0 && (s.Incompat&IncompatCasefold == 0 || !n.IsDir()) {
		bad("has the flag casefold without the feature, or is no directory")
	}
	if n.Flags&indexFl != 0 && (s.Compat&CompatDirIndex == 0 || !n.IsDir()) {
		bad("has an index without the feature, or is no directory")
	}
	if n.Flags&inlineDataFl != 0 && n.Flags&extentsFl != 0 {
		bad("has inline data and an extent tree")
	}
	if len(n.raw) > oldInodeSize && n.extraIsize != 0 && n.extraIsize < 4 {
		bad("i_extra_isize is %d", n.extraIsize)
	}
	if s.Incompat&Incompat64bit == 0 && s.CreatorOS == 0 && (n.raw[0x76] != 0 || n.raw[0x77] != 0) {
		bad("i_file_acl_high is not 0, and the file system has no 64bit")
	}
	if n.FileACL != 0 && s.Compat&CompatExtAttr == 0 {
		bad("has a block of xattrs, and the file system not the feature")
	}
	if n.FileACL != 0 && (n.FileACL <= s.FirstDataBlock || n.FileACL >= s.BlocksCount) {
		bad("i_file_acl is %d, and the file system has %d blocks", n.FileACL, s.BlocksCount)
	}
}

// checkMap is the check of what maps the content of an inode.
type checkMap struct {
	c       *checker
	n       *Inode
	blocks  int64 // that belong to the inode
	last    int64 // the logical block behind the last that is mapped
	lastOK  int64 // likewise, of those that were written
	cluster int64 // the cluster, counted from block 0, of the last block
	dir     []extent
	damaged bool
}

func (m *checkMap) bad(format string, args ...any) {
	m.damaged = true
	m.c.find(MapDamaged, -1, m.n.Ino, -1, format, args...)
}

func (m *checkMap) fail(err error) {
	m.damaged = true
	m.c.damage(MapDamaged, -1, err)
}

// check checks the map, claims the blocks, and compares them with the size.
func (m *checkMap) check() {
	n := m.n
	m.cluster = -1
	switch n.Type() {
	case modeChar, modeBlock, modeFifo, modeSocket:
		if n.Size != 0 {
			m.c.find(InodeSizeWrong, -1, n.Ino, -1, "i_size of %s is %d", typeName(n.Mode), n.Size)
		}
		if n.Flags&(extentsFl|inlineDataFl) != 0 {
			m.bad("%s has flags %#x", typeName(n.Mode), n.Flags)
		}
		return
	case modeLink:
		if m.c.fs.isFastSymlink(n) {
			if i := bytes.IndexByte(n.block(), 0); n.Size == 0 || int64(i) != n.Size {
				m.c.find(InodeDamaged, -1, n.Ino, -1, "the target of the symlink has not %d bytes", n.Size)
			}
			return
		}
	}
	if n.Flags&inlineDataFl != 0 {
		m.checkInline()
		return
	}
	if n.Flags&extentsFl != 0 {
		m.checkExtents(n.block(), place{"extent tree", n.Ino, -1}, -1, 0, maxLogical)
	} else {
		m.checkPointers()
	}
	if !m.damaged {
		m.checkSize()
	}
}

// checkSize compares the size with what is mapped (e2fsprogs: e2fsck/pass1.c,
// check_blocks).
func (m *checkMap) checkSize() {
	n, bs := m.n, int64(m.c.sb.BlockSize)
	wrong := func(format string, args ...any) { m.c.find(InodeSizeWrong, -1, n.Ino, -1, format, args...) }
	switch {
	case n.IsDir():
		if n.Size%bs != 0 || n.Size/bs != m.lastOK {
			wrong("i_size of the directory is %d, and it has %d blocks", n.Size, m.lastOK)
			m.damaged = true
		}
	case n.IsSymlink():
		if n.Flags&encryptFl != 0 {
			return
		}
		if n.Size == 0 || n.Size >= bs || m.lastOK != 1 {
			wrong("i_size of the symlink is %d, and it has %d blocks", n.Size, m.lastOK)
			return
		}
		if _, err := m.c.fs.readlink(n); err != nil {
			m.c.damage(InodeDamaged, -1, err)
		}
	default:
		if n.Size < (m.lastOK-1)*bs && n.Flags&verityFl == 0 {
			wrong("i_size is %d, and block %d has content", n.Size, m.lastOK-1)
		}
	}
}

// own claims blocks of the inode, and counts their clusters. Blocks of one
// cluster follow each other. What lies in blocks that others have, too, is not
// looked into, so that the work is bounded by the blocks that there are.
func (m *checkMap) own(logical, start, n int64) {
	ratio := m.c.sb.clusterRatio()
	if ratio == 1 {
		m.blocks += n
		if m.c.claim(BlockShared, m.n.Ino, start, n) && (logical < 0 || m.n.IsDir()) {
			m.damaged = true
		}
		return
	}
	if logical >= 0 && (start-m.c.sb.FirstDataBlock)%ratio != logical%ratio {
		m.bad("logical block %d and block %d lie in different places of their clusters", logical, start)
		return
	}
	base := m.c.sb.FirstDataBlock
	first := base + (start-base)/ratio*ratio
	end := base + ceilDiv(start+n-base, ratio)*ratio
	if logical >= 0 && first == m.cluster {
		first += ratio
	}
	if first < end {
		m.blocks += end - first
		if m.c.claim(BlockShared, m.n.Ino, first, min(end, m.c.sb.BlocksCount)-first) && (logical < 0 || m.n.IsDir()) {
			m.damaged = true
		}
	}
	if logical >= 0 {
		m.cluster = end - ratio
	}
}

// mapped notes that logical blocks are mapped.
func (m *checkMap) mapped(e extent) {
	m.last = e.logical + e.len
	if !e.unwritten {
		m.lastOK = m.last
	}
	if m.n.IsDir() {
		if e.unwritten {
			m.bad("blocks of a directory were never written")
			return
		}
		m.dir = append(m.dir, e)
	}
	m.own(e.logical, e.physical, e.len)
}

// checkExtents checks a node of an extent tree, which is to cover the logical
// blocks from from to to, and what is below.
func (m *checkMap) checkExtents(b []byte, p place, depth int, from, to int64) {
	s := m.c.sb
	h, err := parseExtentHeader(p, b)
	if err != nil {
		m.fail(err)
		return
	}
	switch {
	case depth < 0 && h.depth > extentMaxDepth, depth >= 0 && h.depth != depth:
		m.fail(p.corrupt("eh_depth", "%d", h.depth))
		return
	}
	if h.depth == 0 {
		list, err := parseExtents(p, b, h, from, to, s)
		if err != nil {
			m.fail(err)
			return
		}
		for _, e := range list {
			m.mapped(e)
		}
		return
	}
	at := from
	for i := range h.entries {
		logical, child := parseIndex(b[extentHeaderLen+i*extentLen:])
		next := to
		if i+1 < h.entries {
			next, _ = parseIndex(b[extentHeaderLen+(i+1)*extentLen:])
		}
		if logical < at || next <= logical || next > to {
			m.fail(p.corrupt("ei_block", "%d of entry %d", logical, i))
			return
		}
		if child <= s.FirstDataBlock || child >= s.BlocksCount {
			m.fail(p.corrupt("ei_leaf", "%d of entry %d, and the file system has %d blocks", child, i, s.BlocksCount))
			return
		}
		at = next
		if m.own(-1, child, 1); m.damaged {
			return
		}
		cp := place{"extent block", m.n.Ino, child}
		cb, err := m.c.fs.block(child)
		if err == nil && s.hasCsum() {
			err = verifyExtentBlock(cp, s, m.n, cb)
		}
		if err != nil {
			m.fail(err)
			return
		}
		if m.c.failed() != nil {
			return
		}
		// The child begins where the entry says.
		if ch, err := parseExtentHeader(cp, cb); err == nil {
			if ch.entries == 0 {
				m.fail(cp.corrupt("eh_entries", "0"))
				return
			}
			if first, _ := parseIndex(cb[extentHeaderLen:]); first != logical {
				m.fail(cp.corrupt("ee_block", "%d of entry 0, expected %d", first, logical))
				return
			}
		}
		m.checkExtents(cb, cp, h.depth-1, logical, next)
		if m.damaged {
			return
		}
	}
}

// checkPointers checks a block map.
func (m *checkMap) checkPointers() {
	s, le := m.c.sb, binary.LittleEndian
	per := int64(s.BlockSize / 4)
	i := m.n.block()
	at := int64(0)
	for k := range directBlocks {
		m.pointer(int64(le.Uint32(i[4*k:])), 0, at)
		at++
	}
	covers := int64(1)
	for level := 1; level <= indirectLevels; level++ {
		covers *= per
		m.pointer(int64(le.Uint32(i[4*(directBlocks+level-1):])), level, at)
		at += covers
	}
}

// pointer checks a pointer to a block that leads to content through so many
// levels, from a logical block on.
func (m *checkMap) pointer(block int64, level int, logical int64) {
	s := m.c.sb
	if block == 0 || m.damaged || m.c.failed() != nil {
		return
	}
	if block <= s.FirstDataBlock || block >= s.BlocksCount {
		m.bad("pointer %d for logical block %d, and the file system has %d blocks", block, logical, s.BlocksCount)
		return
	}
	if level == 0 {
		if logical >= maxLogical {
			m.bad("maps logical block %d", logical)
			return
		}
		m.mapped(extent{logical: logical, physical: block, len: 1})
		return
	}
	if m.own(-1, block, 1); m.damaged {
		return
	}
	b, err := m.c.fs.block(block)
	if err != nil {
		m.fail(err)
		return
	}
	per := int64(s.BlockSize / 4)
	covers := int64(1)
	for range level - 1 {
		covers *= per
	}
	for i := range per {
		m.pointer(int64(binary.LittleEndian.Uint32(b[4*i:])), level-1, logical+i*covers)
	}
}

// checkInline checks an inode that holds its content.
func (m *checkMap) checkInline() {
	n := m.n
	b, err := m.c.fs.inlineData(n)
	if err != nil {
		m.fail(err)
		return
	}
	switch {
	case n.IsDir() && n.Size != int64(len(b)):
		m.c.find(InodeSizeWrong, -1, n.Ino, -1, "i_size of the inline directory is %d, expected %d", n.Size, len(b))
	case n.Size > int64(len(b)):
		m.c.find(InodeSizeWrong, -1, n.Ino, -1, "i_size is %d, and the inode holds %d bytes", n.Size, len(b))
	}
}

// checkXattrs checks the xattrs of an inode, and returns how many blocks they
// take.
func (c *checker) checkXattrs(n *Inode, m *checkMap) (blocks int64) {
	s := c.sb
	ratio := s.clusterRatio()
	bad := func(block int64, format string, args ...any) { c.find(XattrDamaged, -1, n.Ino, block, format, args...) }
	entries := func(p place, area []byte, first, base int, shared bool) {
		type span struct{ from, to int }
		var spans []span
		err := parseXattrs(p, area, first, base, func(e xattrEntry) bool {
			if e.inum != 0 {
				blocks += ceilDiv(ceilDiv(e.size, int64(s.BlockSize)), ratio) * ratio
				if shared {
					c.countValue(n, e)
				}
				return true
			}
			if shared && base == 0 && e.hash != 0 && e.hash != e.valueHash() && e.hash != e.signedHash() {
				bad(p.block, "e_hash of %q is %#x, expected %#x", e.name, e.hash, e.valueHash())
			}
			if e.size > 0 {
				from := cap(area) - cap(e.value)
				for _, x := range spans {
					if from < x.to && x.from < from+len(e.value) {
						bad(p.block, "values overlap")
						break
					}
				}
				if len(spans) < 64 {
					spans = append(spans, span{from, from + len(e.value)})
				}
			}
			if e.index == xattrACLAccess || e.index == xattrACLDefault {
				if _, err := aclFromExt4(string(e.value)); err != nil {
					bad(p.block, "a POSIX ACL is malformed")
				}
			}
			return true
		})
		c.damage(XattrDamaged, -1, err)
	}
	if area := n.xattrArea(); area != nil {
		entries(place{"xattrs", n.Ino, -1}, area, 4, 4, true)
	}
	if n.FileACL == 0 || n.FileACL <= s.FirstDataBlock || n.FileACL >= s.BlocksCount {
		return blocks
	}
	blocks += ratio
	p := place{"xattr block", n.Ino, n.FileACL}
	b, err := c.fs.xattrBlock(p)
	if err != nil {
		c.damage(XattrDamaged, -1, err)
		return blocks
	}
	c.xattrMu.Lock()
	x := c.blocks[n.FileACL]
	first := x == nil
	if first {
		x = &sharedXattrs{refs: binary.LittleEndian.Uint32(b[4:])}
		c.blocks[n.FileACL] = x
	}
	x.found++
	c.xattrMu.Unlock()
	if first {
		c.claim(BlockShared, n.Ino, n.FileACL, 1)
	}
	entries(p, b, xattrHeaderLen, 0, first)
	return blocks
}

// signedHash is e_hash by kernels that took bytes of names as signed.
func (x *xattrEntry) signedHash() uint32 {
	var h uint32
	for i := range len(x.name) {
		h = h<<5 ^ h>>27 ^ signedChar(x.name[i])
	}
	for at := 0; at < len(x.value); at += 4 {
		var word [4]byte
		copy(word[:], x.value[at:])
		h = xattrHashValue(h, binary.LittleEndian.Uint32(word[:]))
	}
	return h
}

// countValue notes that a place leads to the inode that holds a value.
func (c *checker) countValue(n *Inode, e xattrEntry) {
	if uint32(e.inum) > c.sb.InodesCount || e.inum < c.sb.FirstIno {
		c.find(XattrDamaged, -1, n.Ino, -1, "the value of %q is in inode %d", e.name, e.inum)
		return
	}
	if _, err := c.fs.xattrValue(n, e); err != nil {
		c.damage(XattrDamaged, -1, err)
		if !errors.Is(err, ErrCorrupt) {
			return
		}
	}
	c.xattrMu.Lock()
	c.values[e.inum]++
	c.xattrMu.Unlock()
}

// checkXattrCounts compares reference counts with references.
func (c *checker) checkXattrCounts() {
	for block, x := range c.blocks {
		if x.refs != x.found {
			c.find(XattrCountWrong, -1, 0, block, "h_refcount is %d, expected %d", x.refs, x.found)
		}
	}
	for ino, found := range c.values {
		n, err := c.fs.inode(ino)
		if err != nil {
			continue // found before
		}
		if refs := uint64(uint32(n.Ctime.Unix()))<<32 | uint64(uint32(n.Version)); refs != found && refs != 0 {
			c.find(XattrCountWrong, -1, ino, -1, "is counted as in use %d times, expected %d", refs, found)
		}
	}
}

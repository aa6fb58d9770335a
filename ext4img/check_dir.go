package ext4img

import (
	"hash/maphash"
	"slices"
)

// dirCheck is the check of one directory.
type dirCheck struct {
	c       *checker
	n       *Inode
	seed    maphash.Seed
	names   []uint64 // hashes of names
	version int      // of the index
	hashed  bool     // leaves have their entries by hash
	lo, hi  uint32   // hashes of the entries of a block
	any     bool
	dotdot  Ino
}

// checkDir checks a directory, whose blocks are a list of extents.
func (c *checker) checkDir(n *Inode, blocks []extent) {
	d := &dirCheck{c: c, n: n, seed: maphash.MakeSeed()}
	if n.Flags&encryptFl != 0 {
		// Names are ciphertext, which are no names as others are.
		d.bad(DirDamaged, -1, "the names are encrypted, and cannot be checked")
		return
	}
	switch {
	case n.Flags&inlineDataFl != 0:
		d.dotdot = inlineDirParent(n)
		c.fs.eachInlineDirPart(n, func(p place, b []byte) { d.entries(p, b, false) }, func(err error) { c.damage(DirDamaged, -1, err) })
	case n.Flags&indexFl != 0 && c.sb.Compat&CompatDirIndex != 0:
		d.indexed(blocks)
	default:
		d.linear(blocks)
	}
	slices.Sort(d.names)
	for i := 1; i < len(d.names); i++ {
		if d.names[i] == d.names[i-1] && d.twice(d.names[i]) {
			break
		}
	}
	if d.dotdot == 0 {
		d.bad(DirDamaged, -1, `has no ".."`)
	}
	c.dirMu.Lock()
	c.dirs = append(c.dirs, checkDir{n.Ino, d.dotdot})
	c.dirMu.Unlock()
	// "." and "..", of which the latter counts where it leads to.
	c.inode(n.Ino).found.Add(1)
	if d.dotdot != 0 && uint32(d.dotdot) <= c.sb.InodesCount {
		c.inode(d.dotdot).found.Add(1)
	}
}

func (d *dirCheck) bad(k Kind, block int64, format string, args ...any) {
	d.c.find(k, -1, d.n.Ino, block, format, args...)
}

// twice reports whether two names have the same hash because they are the same.
func (d *dirCheck) twice(hash uint64) bool {
	seen := map[string]bool{}
	found := false
	d.c.fs.eachStoredEntry(d.n, func(e Dirent, err error) bool {
		if err == nil && maphash.String(d.seed, e.Name) == hash {
			if seen[e.Name] {
				d.bad(DirNameTwice, -1, "has two entries %q", e.Name)
				found = true
			}
			seen[e.Name] = true
		}
		return !found
	})
	return found
}

// linear checks blocks of entries.
func (d *dirCheck) linear(blocks []extent) {
	end := int64(0)
	for _, e := range blocks {
		if e.logical != end {
			d.bad(DirDamaged, -1, "has a hole at its block %d", end)
		}
		end = e.logical + e.len
		for i := range e.len {
			if d.c.failed() != nil {
				return
			}
			d.leaf(e.physical+i, e.logical+i)
		}
	}
}

// leaf checks a block of entries.
func (d *dirCheck) leaf(block, logical int64) {
	p := place{"directory block", d.n.Ino, block}
	b, err := d.c.fs.block(block)
	if err == nil && d.c.sb.hasCsum() {
		err = verifyDirBlock(p, d.c.sb, d.n, b)
	}
	if err != nil {
		d.c.damage(DirDamaged, -1, err)
		return
	}
	d.entries(p, b, logical == 0)
}

// entries checks the entries of an area, of which the first two can be "." and
// "..".
func (d *dirCheck) entries(p place, b []byte, first bool) {
	s := d.c.sb
	d.any = false
	for off, i := 0, 0; off < len(b); i++ {
		e, err := parseDirent(p, s, b, off)
		if err != nil {
			d.c.damage(DirDamaged, -1, err)
			return
		}
		off += e.recLen
		name := string(e.name)
		switch {
		case first && i == 0:
			if name != "." || e.ino != d.n.Ino || e.recLen < 12 {
				d.bad(DirDamaged, p.block, `the first entry is %q, of inode %d, expected "."`, name, e.ino)
			}
			d.entryType(e)
			continue
		case first && i == 1:
			if name != ".." || e.ino == 0 {
				d.bad(DirDamaged, p.block, `the second entry is %q, of inode %d, expected ".."`, name, e.ino)
				return
			}
			d.dotdot = e.ino
			d.entryType(e)
			continue
		case e.ino == 0:
			if e.recLen < 12 && !(e.recLen == 8 && off == len(b)) {
				d.bad(DirDamaged, p.block, "rec_len is %d at offset %d", e.recLen, e.off)
			}
			continue
		case name == "." || name == "..":
			d.bad(DirDamaged, p.block, "%q is no other entry's name", name)
			continue
		}
		if e.ino < s.FirstIno {
			d.bad(DirEntryUnused, p.block, "%q leads to inode %d", name, e.ino)
			continue
		}
		if d.hashed {
			h, _ := dirhashVersion(d.version, e.name, &s.HashSeed)
			if !d.any {
				d.lo, d.hi, d.any = h, h, true
			}
			d.lo, d.hi = min(d.lo, h), max(d.hi, h)
		}
		d.names = append(d.names, maphash.Bytes(d.seed, e.name))
		d.c.inode(e.ino).found.Add(1)
		d.entryType(e)
	}
}

// entryType notes the type that an entry tells of its inode.
func (d *dirCheck) entryType(e dirEntry) {
	if e.ino == 0 || e.ftype == 0 || d.c.sb.Incompat&IncompatFiletype == 0 || uint32(e.ino) > d.c.sb.InodesCount {
		return
	}
	x := d.c.inode(e.ino)
	if t := uint32(e.ftype) + 1; !x.ftype.CompareAndSwap(0, t) && x.ftype.Load() != t {
		x.ftype.Store(mixedTypes)
	}
}

// indexed checks a directory with an index: that every block is part of it
// once, and that entries lie where their hashes lead.
func (d *dirCheck) indexed(blocks []extent) {
	s, c := d.c.sb, d.c
	at := make(map[int64]int64) // blocks by their logical numbers: those of the directory
	end := int64(0)
	for _, e := range blocks {
		if e.logical != end {
			d.bad(DirDamaged, -1, "has a hole at its block %d", end)
			return
		}
		for i := range e.len {
			at[e.logical+i] = e.physical + i
		}
		end = e.logical + e.len
	}
	if end == 0 {
		d.bad(IndexDamaged, -1, "has no block")
		return
	}
	b, err := c.fs.block(at[0])
	p := place{"htree root", d.n.Ino, at[0]}
	if err == nil && s.hasCsum() {
		err = verifyDxBlock(p, s, d.n, b)
	}
	var root dxRoot
	if err == nil {
		root, err = parseDxRoot(p, s, b)
	}
	if err == nil {
		if _, ok := dirhashVersion(root.version, nil, &s.HashSeed); !ok && root.version != 6 {
			err = p.corrupt("hash_version", "%d", root.version)
		}
	}
	if err == nil && root.limit != s.dxLimit(dxRootEntries) {
		err = p.corrupt("limit", "%d, expected %d", root.limit, s.dxLimit(dxRootEntries))
	}
	if err != nil {
		c.damage(IndexDamaged, -1, err)
		// The names count all the same.
		d.linear(blocks)
		return
	}
	// "." and "..".
	d.entries(p, b, true)
	d.version = root.version
	d.hashed = root.version < 2*hashUnsigned && d.n.Flags&casefoldFl == 0
	seen := map[int64]bool{0: true}
	d.node(at, seen, root.dxNode, root.levels, 0, htreeEOF|1)
	for logical := range end {
		if !seen[logical] {
			d.bad(IndexDamaged, at[logical], "the index does not lead to block %d of the directory", logical)
			return
		}
	}
}

// node checks what the entries of an index block lead to: more index blocks
// through so many levels, or leaves, with hashes from lo to hi.
func (d *dirCheck) node(at map[int64]int64, seen map[int64]bool, node dxNode, levels int, lo, hi uint32) bool {
	s, c := d.c.sb, d.c
	last := uint32(0)
	for i := range node.count {
		if c.failed() != nil {
			return false
		}
		hash, logical := node.entry(i)
		from, to := hash, hi
		if i == 0 {
			from = lo
		}
		if i+1 < node.count {
			to, _ = node.entry(i + 1)
		}
		block, ok := at[logical]
		switch {
		case i > 0 && (hash < last || hash&^1 < lo&^1 || hash > hi):
			d.bad(IndexDamaged, -1, "hash %#x of an entry of the index is out of order", hash)
			return false
		case !ok || seen[logical]:
			d.bad(IndexDamaged, -1, "the index leads to block %d of the directory, which is not there or was led to before", logical)
			return false
		}
		last = hash
		seen[logical] = true
		if levels > 0 {
			p := place{"htree node", d.n.Ino, block}
			b, err := c.fs.block(block)
			if err == nil && s.hasCsum() {
				err = verifyDxBlock(p, s, d.n, b)
			}
			var child dxNode
			if err == nil {
				child, err = parseDxNode(p, s, b)
			}
			if err == nil && (child.off != dxNodeEntries || child.limit != s.dxLimit(dxNodeEntries)) {
				err = p.corrupt("limit", "%d, expected %d", child.limit, s.dxLimit(dxNodeEntries))
			}
			if err != nil {
				c.damage(IndexDamaged, -1, err)
				return false
			}
			if !d.node(at, seen, child, levels-1, from, to) {
				return false
			}
			continue
		}
		d.leaf(block, logical)
		if d.hashed && d.any && (d.lo < from&^1 || d.hi > to) {
			d.bad(IndexDamaged, block, "has hashes from %#x to %#x, and the index says %#x to %#x", d.lo, d.hi, from, to)
			return false
		}
	}
	return true
}

// checkLinks compares what leads to inodes with what they say.
func (c *checker) checkLinks() {
	s := c.sb
	for g := range c.groups {
		inodes := c.groups[g].inodes
		if c.failed() != nil {
			return
		}
		for i := range inodes {
			x := &inodes[i]
			ino := Ino(int64(g)*int64(s.InodesPerGroup) + int64(i) + 1)
			found := x.found.Load()
			switch {
			case x.mode == 0:
				if found > 0 {
					c.find(DirEntryUnused, int64(g), ino, -1, "%d entries lead to it, and it is not in use", found)
				}
				continue
			case x.flags&inodeHidden != 0:
				continue
			case x.flags&inodeOrphan != 0:
				if found > 0 && x.mode&modeType != modeDir {
					c.find(LinkCountWrong, int64(g), ino, -1, "%d entries lead to it, and it is an orphan", found)
				}
				continue
			case x.flags&inodeValue != 0:
				if c.values[ino] == 0 {
					c.find(InodeUnconnected, int64(g), ino, -1, "holds the value of an xattr, and nothing leads to it")
				}
				continue
			}
			if t := x.ftype.Load(); t != 0 && t != uint32(fileType(x.mode))+1 {
				c.find(DirEntryType, int64(g), ino, -1, "entries say that it is of type %d, and its mode is %#o", int(t)-1, x.mode)
			}
			isDir := x.mode&modeType == modeDir
			switch {
			case found == 0:
				c.find(InodeUnconnected, int64(g), ino, -1, "is in use, and no name leads to it")
			case isDir && x.links == 1 && s.ROCompat&ROCompatDirNlink != 0 && found > 2: // not counted
			case x.links != found:
				c.find(LinkCountWrong, int64(g), ino, -1, "i_links_count is %d, expected %d", x.links, found)
			}
		}
	}
}

// checkConnected checks that the root leads to every directory, once.
func (c *checker) checkConnected() {
	if len(c.dirs) == 0 {
		c.find(DirUnconnected, -1, RootIno, -1, "there is no root directory")
		return
	}
	slices.SortFunc(c.dirs, func(a, b checkDir) int { return int(int64(a.ino) - int64(b.ino)) })
	find := func(ino Ino) int {
		i, ok := slices.BinarySearchFunc(c.dirs, ino, func(d checkDir, ino Ino) int { return int(int64(d.ino) - int64(ino)) })
		if !ok {
			return -1
		}
		return i
	}
	// Who has an entry that leads to each.
	parents := make([]Ino, len(c.dirs))
	for _, d := range c.dirs {
		if c.failed() != nil {
			return
		}
		n, err := c.fs.inode(d.ino)
		if err != nil {
			continue
		}
		c.fs.eachStoredEntry(n, func(e Dirent, err error) bool {
			if err != nil || e.Type != TypeUnknown && e.Type != TypeDir {
				return true
			}
			if i := find(e.Ino); i >= 0 {
				if parents[i] != 0 {
					c.find(DirLinkedTwice, -1, e.Ino, -1, "is in directory %d and in directory %d", parents[i], d.ino)
				}
				parents[i] = d.ino
			}
			return true
		})
	}
	// Of every directory that the root leads to the parent is known first.
	state := make([]uint8, len(c.dirs)) // 1: on the way, 2: led to by the root, 3: not
	for i := range c.dirs {
		var way []int
		at, verdict := i, uint8(0)
		for verdict == 0 {
			switch {
			case c.dirs[at].ino == RootIno:
				verdict = 2
				state[at] = 2
			case state[at] == 1 || parents[at] == 0:
				verdict = 3
				way = append(way, at)
			case state[at] > 1:
				verdict = state[at]
			default:
				state[at] = 1
				way = append(way, at)
				if at = find(parents[at]); at < 0 {
					verdict = 3
				}
			}
		}
		for _, k := range way {
			if state[k] != 3 && verdict == 3 {
				c.find(DirUnconnected, -1, c.dirs[k].ino, -1, "the root does not lead to the directory")
			}
			state[k] = verdict
		}
	}
	for i, d := range c.dirs {
		want := parents[i]
		if d.ino == RootIno {
			want = RootIno
		}
		if want != 0 && d.dotdot != want {
			c.find(DirParentWrong, -1, d.ino, -1, `".." leads to inode %d, expected %d`, d.dotdot, want)
		}
	}
}

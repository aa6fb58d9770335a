package ext4img

import (
	"cmp"
	"slices"
	"sort"
)

// A region is a run of blocks of one kind that is written.
type region struct {
	run
	kind regionKind
	arg  int64 // see regionKind
}

type regionKind uint8

const (
	regionSuper       regionKind = iota // the copy in group arg
	regionGDT                           // the descriptor table from block arg on
	regionReservedGDT                   // reserved descriptors of group 0
	regionBlockBitmap                   // of groups from arg on
	regionInodeBitmap                   // of groups from arg on
	regionInodeTable                    // of group arg
	regionAlloc                         // positions from arg on
)

// makeRegions lists everything that is written, ascending.
func (l *Layout) makeRegions() []region {
	g := l.geo
	var out []region
	add := func(start, n int64, kind regionKind, arg int64) {
		if n > 0 {
			out = append(out, region{run{start, start + n}, kind, arg})
		}
	}
	per := g.blockSize / inodeSize
	for i := range g.groups {
		if g.hasSuper(i) {
			start := g.groupStart(i)
			add(start, 1, regionSuper, i)
			add(start+1, g.descBlocks, regionGDT, 0)
			if i == 0 && g.resizeInode {
				add(g.firstReservedGDT(), g.reservedGDT, regionReservedGDT, 0)
			}
		}
		s := l.groupState(i)
		if !s.blockUninit {
			add(g.blockBitmapOf(i), 1, regionBlockBitmap, i)
		}
		if s.usedInodes > 0 {
			add(g.inodeBitmapOf(i), 1, regionInodeBitmap, i)
			add(g.inodeTable[i], ceilDiv(s.usedInodes, per), regionInodeTable, i)
		}
	}
	alloc := func(pos, n int64) {
		g.physical(pos, n, func(r run) bool {
			add(r.start, r.len(), regionAlloc, pos)
			pos += r.len()
			return true
		})
	}
	if l.journalBlocks == 0 {
		alloc(0, l.usedPositions)
	} else {
		alloc(0, l.journalPos+1) // of the journal's own blocks only the first is not zero
		rest := l.journalPos + l.journalBlocks
		alloc(rest, l.usedPositions-rest)
	}
	slices.SortFunc(out, func(a, b region) int { return cmp.Compare(a.start, b.start) })
	return out
}

// filler writes blocks of the image into memory. Each worker has its own,
// which remembers what the blocks before were made from.
type filler struct {
	l    *Layout
	tree *htree // a directory

	file uint32 // a regular file; 0: none, as that is the root directory
	runs []run
	offs []int64 // positions of runs from the file's first

	list    []extent // of the object at listPos
	listPos int64
}

func newFiller(l *Layout) *filler { return &filler{l: l, listPos: -1} }

// extents returns the extents of an object.
func (f *filler) extents(o object) []extent {
	if len(o.runs) == 0 {
		return nil
	}
	if f.listPos != o.pos {
		f.list = f.list[:0]
		f.l.geo.eachExtent(o, func(e extent) { f.list = append(f.list, e) })
		f.listPos = o.pos
	}
	return f.list
}

// use makes a regular file the one that f.runs and f.offs are of.
func (f *filler) use(inode uint32) {
	if f.file == inode {
		return
	}
	f.file = inode
	f.runs = f.l.appendRuns(f.runs[:0], inode)
	f.offs = f.offs[:0]
	at := int64(0)
	for _, r := range f.runs {
		f.offs = append(f.offs, at)
		at += r.len()
	}
}

// objectOf returns the object of a regular file, directory or long symlink of
// the tree.
func (f *filler) objectOf(i uint32) object {
	l := f.l
	n := l.tree.inodes.at(i)
	switch {
	case n.isDir():
		p := l.dirs.at(n.ref)
		return single(p.pos, p.n)
	case n.isSymlink():
		k := sort.Search(len(l.links), func(k int) bool { return l.links[k].inode >= i })
		return single(l.links[k].pos, 1)
	}
	k := sort.Search(l.files.len(), func(k int) bool { return l.files.at(uint32(k)).inode >= i })
	if k == l.files.len() || l.files.at(uint32(k)).inode != i {
		return object{} // empty, or one hole
	}
	f.use(i)
	return object{l.files.at(uint32(k)).pos, f.runs}
}

// putTreeBlock writes the block at a position of an object's extent tree.
func (f *filler) putTreeBlock(b []byte, ino uint32, o object, pos int64) {
	treePos := o.pos + o.blocks()
	f.l.putExtentBlock(b, ino, f.extents(o), treePos, pos-treePos)
}

// fill writes what the blocks from start on hold into buf, whose length is a
// whole number of blocks.
func (f *filler) fill(buf []byte, start int64) error {
	l := f.l
	bs := l.geo.blockSize
	end := start + int64(len(buf))/bs
	at := start
	i := sort.Search(len(l.regions), func(i int) bool { return l.regions[i].end > start })
	for ; i < len(l.regions) && l.regions[i].start < end; i++ {
		r := &l.regions[i]
		from, to := max(r.start, start), min(r.end, end)
		clear(buf[(at-start)*bs : (from-start)*bs])
		if err := f.fillRegion(buf[(from-start)*bs:(to-start)*bs], r, from-r.start); err != nil {
			return err
		}
		at = to
	}
	clear(buf[(at-start)*bs:])
	return nil
}

// fillRegion writes blocks of one region, the first being number index.
func (f *filler) fillRegion(buf []byte, r *region, index int64) error {
	l := f.l
	bs := l.geo.blockSize
	if r.kind == regionAlloc {
		return f.fillAlloc(buf, r.arg+index)
	}
	clear(buf)
	for ; len(buf) > 0; buf, index = buf[bs:], index+1 {
		b := buf[:bs]
		switch r.kind {
		case regionSuper:
			if r.start == 0 {
				b = b[superblockOff:] // the boot sectors come first
			}
			l.putSuperblock(b, r.arg)
		case regionGDT:
			copy(b, l.gdt[(r.arg+index)*bs:])
		case regionReservedGDT:
			l.putReservedGDT(b, r.start+index)
		case regionBlockBitmap:
			l.putBlockBitmap(b, r.arg+index)
		case regionInodeBitmap:
			l.putInodeBitmap(b, r.arg+index)
		case regionInodeTable:
			ino := uint32(r.arg*l.geo.inodesPerGroup+index*(bs/inodeSize)) + 1
			for ; len(b) > 0 && ino <= l.lastIno(); b, ino = b[inodeSize:], ino+1 {
				f.putInode(b[:inodeSize], ino)
			}
		}
	}
	return nil
}

// fillAlloc writes the blocks at positions from pos on.
func (f *filler) fillAlloc(buf []byte, pos int64) error {
	l := f.l
	bs := l.geo.blockSize
	for len(buf) > 0 {
		n := int64(1) // blocks written in this step
		b := buf[:bs]
		switch z := &l.zones; {
		case pos < z.resize:
			clear(b)
			l.putResizeDind(b)
		case pos < z.dirs:
			d := uint32(lastAtOrBefore(l.dirs.len(), pos, func(i int) int64 { return l.dirs.at(uint32(i)).pos }))
			f.putDirBlock(b, d, pos-l.dirs.at(d).pos)
		case pos < z.lostFound:
			clear(b)
			l.putLostFound(b, pos-l.lostFound.pos)
		case pos < z.links:
			k := lastAtOrBefore(len(l.links), pos, func(i int) int64 { return l.links[i].pos })
			clear(b[copy(b, l.tree.target(l.tree.inodes.at(l.links[k].inode))):])
		case pos < z.xattrs:
			k := lastAtOrBefore(len(l.xattrs), pos, func(i int) int64 { return l.xattrs[i].pos })
			f.putXattrBlock(b, k, pos)
		case pos < z.eaValues:
			k := lastAtOrBefore(len(l.eaValues), pos, func(i int) int64 { return l.eaValues[i].pos })
			v := &l.eaValues[k]
			clear(b)
			if off := (pos - v.pos) * bs; off < int64(len(v.value)) {
				copy(b, v.value[off:])
			} else {
				f.putTreeBlock(b, l.lastTreeIno()+1+uint32(k), v.object(bs), pos)
			}
		case pos < z.files:
			k := lastAtOrBefore(l.files.len(), pos, func(i int) int64 { return l.files.at(uint32(i)).pos })
			var err error
			if n, err = f.fillFile(buf, l.files.at(uint32(k)), pos); err != nil {
				return err
			}
		case pos == l.journalPos:
			clear(b)
			l.putJournalSuperblock(b)
		default:
			clear(b)
			f.putTreeBlock(b, journalIno, single(l.journalPos, l.journalBlocks), pos)
		}
		buf = buf[n*bs:]
		pos += n
	}
	return nil
}

// lastAtOrBefore returns the last of n ascending positions that is at most pos.
func lastAtOrBefore(n int, pos int64, at func(i int) int64) int {
	return sort.Search(n, func(i int) bool { return at(i) > pos }) - 1
}

// putDirBlock writes block number index of a directory, or of its extent tree.
func (f *filler) putDirBlock(b []byte, d uint32, index int64) {
	l := f.l
	clear(b)
	p := l.dirs.at(d)
	switch {
	case index >= p.n:
		f.putTreeBlock(b, l.ino(l.tree.dirs.at(d).inode), single(p.pos, p.n), p.pos+index)
	case p.n == 1:
		l.putLinearDir(b, d)
	default:
		if f.tree == nil || f.tree.dir != d {
			f.tree = l.planHtree(d)
		}
		f.tree.putBlock(l, b, index)
	}
}

func (f *filler) putXattrBlock(b []byte, set int, pos int64) {
	l := f.l
	clear(b)
	_, list, err := l.tree.xattrs[set].place(len(b))
	if err != nil {
		panic("ext4img: internal error: xattrs that fitted when planned: " + err.Error())
	}
	p := &l.xattrs[set]
	refs := min(int64(p.users)-(pos-p.pos)*xattrRefcountMax, xattrRefcountMax)
	l.encodeXattrBlock(b, list, uint32(refs), l.geo.block(pos))
}

// putEAInode writes an inode that holds an xattr's value.
func (f *filler) putEAInode(b []byte, ino uint32) {
	v := &f.l.eaValues[ino-f.l.lastTreeIno()-1]
	n := diskInode{mode: modeReg | 0o600, links: 1, size: int64(len(v.value)), flags: eaInodeFl, eaHash: v.hash, eaRefs: v.refs}
	f.setObject(&n, v.object(f.l.geo.blockSize))
	n.put(f.l, b, ino)
}

// object returns where a value lies.
func (v *eaValue) object(blockSize int64) object {
	return single(v.pos, ceilDiv(int64(len(v.value)), blockSize))
}

// fillFile writes blocks of one file from pos on, as many as the file and buf
// have, and returns their number.
func (f *filler) fillFile(buf []byte, file *ref, pos int64) (int64, error) {
	l := f.l
	bs := l.geo.blockSize
	f.use(file.inode)
	o := object{file.pos, f.runs}
	k := lastAtOrBefore(len(f.offs), pos-file.pos, func(i int) int64 { return f.offs[i] })
	skip := pos - file.pos - f.offs[k]
	if skip >= f.runs[k].len() { // behind the last run
		clear(buf[:bs])
		f.putTreeBlock(buf[:bs], l.ino(file.inode), o, pos)
		return 1, nil
	}
	src, err := l.tree.openFile(file.inode)
	if err != nil {
		return 0, err
	}
	defer src.close()
	done := int64(0)
	for ; k < len(f.runs) && done < int64(len(buf))/bs; k++ {
		n := min(f.runs[k].len()-skip, int64(len(buf))/bs-done)
		if err := src.read(buf[done*bs:(done+n)*bs], (f.runs[k].start+skip)*bs); err != nil {
			return 0, err
		}
		done += n
		skip = 0
	}
	return done, src.check()
}

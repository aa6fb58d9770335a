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

// filler writes blocks of the image into memory. Each worker has its own.
type filler struct {
	l    *Layout
	tree *htree // the directory used last
	runs []run
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
				l.putInode(b[:inodeSize], ino)
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
				blocks := ceilDiv(int64(len(v.value)), bs)
				l.putExtentBlock(b, l.lastTreeIno()+1+uint32(k), object{v.pos, []run{{0, blocks}}}, blocks, pos-v.pos-blocks)
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
			o := object{l.journalPos, []run{{0, l.journalBlocks}}}
			l.putExtentBlock(b, journalIno, o, l.journalBlocks, pos-l.journalPos-l.journalBlocks)
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
		ino := l.ino(l.tree.dirs.at(d).inode)
		l.putExtentBlock(b, ino, object{p.pos, []run{{0, p.n}}}, p.n, index-p.n)
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

// fillFile writes blocks of one file from pos on, as many as the file and buf
// have, and returns their number.
func (f *filler) fillFile(buf []byte, file *ref, pos int64) (int64, error) {
	l := f.l
	bs := l.geo.blockSize
	f.runs = l.appendRuns(f.runs[:0], file.inode)
	skip := pos - file.pos
	total := int64(0)
	done := int64(0)
	var src openFile
	for _, r := range f.runs {
		total += r.len()
		if skip >= r.len() {
			skip -= r.len()
			continue
		}
		n := min(r.len()-skip, int64(len(buf))/bs-done)
		if n == 0 {
			break
		}
		if src.f == nil {
			var err error
			if src, err = l.tree.openFile(file.inode); err != nil {
				return 0, err
			}
			defer src.close()
		}
		if err := src.read(buf[done*bs:(done+n)*bs], (r.start+skip)*bs); err != nil {
			return 0, err
		}
		done += n
		skip = 0
	}
	if src.f != nil {
		return done, src.check()
	}
	// Behind the data: the extent tree.
	b := buf[:bs]
	clear(b)
	l.putExtentBlock(b, l.ino(file.inode), object{file.pos, f.runs}, total, pos-file.pos-total)
	return 1, nil
}

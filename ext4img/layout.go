package ext4img

import (
	"cmp"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"math"
	"slices"
	"sort"
	"strings"
)

// LayoutOptions say what file system a tree is to become. The zero value is
// the default: 4 KiB blocks, a journal, and as much free space as 20 % of what
// the tree needs, at least 64 MiB.
type LayoutOptions struct {
	// Size is the size of the disk in bytes; 0: what is needed plus Free.
	// A part at the end that no block group fits in stays unused.
	Size int64
	// Free is the number of bytes that anybody can still write, when Size is
	// 0; 0: 20 % of what is needed, at least 64 MiB.
	Free int64
	// Minimize makes the smallest file system that holds the tree, without
	// free blocks, and with few free inodes.
	Minimize bool
	// Label is the volume name: at most 16 bytes.
	Label string
	// UUID and HashSeed of the file system; zero: derived from these options
	// and from the tree, that is from everything but the content of files.
	UUID     UUID
	HashSeed UUID
	// BlockSize is 1024, 2048 or 4096; 0: 4096.
	BlockSize int
	// NoJournal leaves the journal out.
	NoJournal bool
	// ReservedPercent of the blocks are for the superuser alone.
	ReservedPercent float64
	// Time is written, in seconds since 1970, where the file system's own
	// structures tell a time (made, checked, lost+found). It is 0 or the
	// SOURCE_DATE_EPOCH; the clock would make every build different.
	Time int64
}

const (
	maxSize          = 1 << 55 // no ext4 is larger with the blocks that there are
	defaultFreeBytes = 64 << 20
	inodeRatio       = 16384 // bytes of free space for each free inode
	inodeRatioMax    = 65536 // bytes of disk for each inode, at most
	minJournalBlocks = 2048  // smallest file system that has a journal
)

// UUID identifies a file system.
type UUID [16]byte

// ParseUUID reads the usual form, with or without hyphens.
func ParseUUID(s string) (UUID, error) {
	var u UUID
	b, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
	if err != nil || len(b) != len(u) {
		return u, fmt.Errorf("uuid %q: expected 32 hexadecimal digits, as in 01234567-89ab-cdef-0123-456789abcdef", s)
	}
	copy(u[:], b)
	return u, nil
}

func (u UUID) String() string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}

// Layout is a file system decided to the last bit, but for the content of its
// files. It is immutable and safe for concurrent use.
type Layout struct {
	tree     *Tree
	geo      *geometry
	size     int64
	label    string
	uuid     UUID
	hashSeed [4]uint32
	csumSeed uint32
	time     int64

	ownLostFound bool // the tree has none, so the layout makes one
	largeDir     bool

	// Positions, zone by zone in this order.
	resizePos     int64          // the resize inode's block
	dirs          chunks[placed] // all directories, as in Tree.dirs
	lostFound     placed         // if ownLostFound
	links         []ref          // symlinks that do not fit the inode
	xattrs        []xattrPlan    // of each of Tree.xattrs
	eaValues      []eaValue      // values in inodes of their own
	eaByValue     map[string]int // index into eaValues
	files         chunks[ref]    // regular files that have data
	journalPos    int64
	journalBlocks int64

	zones          zones
	reservedBlocks int64 // s_r_blocks_count
	usedPositions  int64
	denseEnd       int64 // every block before it is in use
	gdt            []byte
	regions        []region
}

// zones are the positions behind the last of each kind of object.
type zones struct{ resize, dirs, lostFound, links, xattrs, eaValues, files int64 }

// placed is a run of data blocks; the blocks of its extent tree lie behind it.
type placed struct{ pos, n int64 }

// ref is an inode of the tree and the position of its data.
type ref struct {
	pos   int64
	inode uint32
}

// xattrPlan is where the block of a set of xattrs lies: one for every 1,024
// inodes that have the set.
type xattrPlan struct {
	pos    int64
	blocks int64 // 0: the inodes hold everything
	users  uint32
	// of tells the block of each inode where there are several.
	of map[uint32]uint32
}

// blockFor returns the position of the block that an inode uses.
func (p *xattrPlan) blockFor(inode uint32) int64 { return p.pos + int64(p.of[inode]) }

// eaValue is an xattr's value that lies in an inode of its own.
type eaValue struct {
	value string
	pos   int64
	refs  uint32
	hash  uint32
}

// SizeError says that a tree does not fit a disk.
type SizeError struct {
	Size    int64 // of the disk asked for, bytes
	Bytes   int64 // what the tree's files, directories and journal take, bytes
	Inodes  int64 // what the tree needs
	MinSize int64 // the smallest Size that works with the same options
	Largest []DirSize
}

// DirSize is a directory and what the files directly in it take.
type DirSize struct {
	Path  string
	Bytes int64
}

func (e *SizeError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "a disk of %d bytes is too small: the tree needs %d bytes and %d inodes; the smallest size that works is %d",
		e.Size, e.Bytes, e.Inodes, e.MinSize)
	for i, d := range e.Largest {
		fmt.Fprintf(&b, "%s%s (%d bytes)", [...]string{"; largest directories: ", ", "}[min(i, 1)], d.Path, d.Bytes)
	}
	return b.String()
}

// NewLayout decides the whole file system. It reads nothing but the tree.
// A disk that is too small gives a *SizeError.
func NewLayout(ctx context.Context, t *Tree, opts *LayoutOptions) (*Layout, error) {
	if opts == nil {
		opts = &LayoutOptions{}
	}
	l := &Layout{tree: t, label: opts.Label, time: min(max(opts.Time, 0), math.MaxUint32), ownLostFound: t.lostFound == 0}
	blockSize := int64(cmp.Or(opts.BlockSize, 4096))
	switch {
	case blockSize != 1024 && blockSize != 2048 && blockSize != 4096:
		return nil, fmt.Errorf("block size %d: expected 1024, 2048 or 4096", blockSize)
	case len(opts.Label) > 16:
		return nil, fmt.Errorf("label %q has %d bytes: expected 16 at most", opts.Label, len(opts.Label))
	case strings.ContainsRune(opts.Label, 0):
		return nil, errors.New("label: a zero byte")
	case opts.Size < 0 || opts.Free < 0 || opts.Size > maxSize || opts.Free > maxSize:
		return nil, fmt.Errorf("size %d, free space %d: expected 0 to %d", opts.Size, opts.Free, int64(maxSize))
	case !(opts.ReservedPercent >= 0 && opts.ReservedPercent <= 50):
		return nil, fmt.Errorf("reserved percentage %g: expected 0 to 50", opts.ReservedPercent)
	case opts.Size > 0 && (opts.Free > 0 || opts.Minimize), opts.Free > 0 && opts.Minimize:
		return nil, errors.New("size, free and minimize exclude each other")
	}
	l.identify(opts)
	l.geo = &geometry{blockSize: blockSize} // enough for planning; solve replaces it
	if err := l.plan(ctx); err != nil {
		return nil, err
	}
	if err := l.solve(ctx, opts); err != nil {
		return nil, err
	}
	l.finish()
	return l, nil
}

// identify fixes UUID and hash seed.
func (l *Layout) identify(opts *LayoutOptions) {
	l.uuid = opts.UUID
	seed := opts.HashSeed
	if l.uuid == (UUID{}) || seed == (UUID{}) {
		digest := l.tree.digest(fmt.Sprintf("qimg ext4 %+v", *opts))
		if l.uuid == (UUID{}) {
			copy(l.uuid[:], digest[:16])
			l.uuid[6] = l.uuid[6]&0xf | 0x80 // version 8, RFC 9562 section 5.8
			l.uuid[8] = l.uuid[8]&0x3f | 0x80
		}
		if seed == (UUID{}) {
			copy(seed[:], digest[16:])
		}
	}
	for i := range l.hashSeed {
		l.hashSeed[i] = binary.LittleEndian.Uint32(seed[4*i:])
	}
	l.csumSeed = crc32c(^uint32(0), l.uuid[:])
}

// plan finds what has blocks and how many, which depends on the block size but
// not on the size of the disk.
func (l *Layout) plan(ctx context.Context) error {
	t, bs := l.tree, l.geo.blockSize
	if int64(t.inodes.len())+firstIno > math.MaxUint32 {
		return errTreeTooLarge
	}
	for d := range t.dirs.len() {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := int64(1)
		if l.linearLen(uint32(d)) > bs-direntTailLen {
			h := l.planHtree(uint32(d))
			if len(h.nodes) > htreeLevels {
				return tooLarge(t.dirPath(uint32(d)), "a directory of %d entries does not fit %d-byte blocks; choose larger ones", len(h.order), bs)
			}
			l.largeDir = l.largeDir || len(h.nodes) == htreeLevels
			n = h.blocks()
		}
		l.dirs.add(placed{n: n})
	}
	if l.ownLostFound {
		l.lostFound.n = max(16<<10/bs, 1)
	}

	l.xattrs = make([]xattrPlan, len(t.xattrs))
	for i := range t.inodes.len() {
		i := uint32(i)
		n := t.inodes.at(i)
		switch {
		case n.isSymlink() && n.size >= bs:
			return tooLarge(l.tree.path(i), "a symlink of %d bytes does not fit a block of %d; choose larger blocks", n.size, bs)
		case n.isSymlink() && n.size >= 60:
			l.links = append(l.links, ref{inode: i})
		case n.isRegular():
			if n.size > bs<<32-bs {
				return tooLarge(l.tree.path(i), "a file of %d bytes is larger than ext4 can hold with %d-byte blocks (%d)", n.size, bs, bs<<32-bs)
			}
			if len(t.dataSpans(i)) > 0 {
				l.files.add(ref{inode: i})
			}
		}
		if n.xattr != 0 {
			p := &l.xattrs[n.xattr-1]
			if p.users++; p.users > xattrRefcountMax {
				if p.of == nil {
					p.of = make(map[uint32]uint32)
				}
				p.of[i] = (p.users - 1) / xattrRefcountMax
			}
		}
	}
	return l.planXattrs()
}

// tooLarge is an error about something that the file system cannot hold.
func tooLarge(path, format string, args ...any) error {
	return &fs.PathError{Op: "store", Path: path, Err: fmt.Errorf(format, args...)}
}

// planXattrs decides which sets have blocks and which values have inodes.
func (l *Layout) planXattrs() error {
	l.eaByValue = make(map[string]int)
	for i, set := range l.tree.xattrs {
		_, block, err := set.place(int(l.geo.blockSize))
		if err != nil {
			return tooLarge(l.tree.pathOfXattrs(uint32(i+1)), "%w", err)
		}
		if len(block) == 0 {
			continue
		}
		p := &l.xattrs[i]
		p.blocks = ceilDiv(int64(p.users), xattrRefcountMax)
		for _, x := range block {
			if !x.eaInode {
				continue
			}
			k, ok := l.eaByValue[x.value]
			if !ok {
				k = len(l.eaValues)
				l.eaByValue[x.value] = k
				l.eaValues = append(l.eaValues, eaValue{value: x.value, hash: crc32c(l.csumSeed, []byte(x.value))})
			}
			l.eaValues[k].refs += uint32(p.blocks)
		}
	}
	return nil
}

// solve finds the size: the one asked for, or the smallest that leaves enough
// free.
func (l *Layout) solve(ctx context.Context, opts *LayoutOptions) error {
	bs := l.geo.blockSize
	need := l.demand() * bs
	if opts.Size > 0 {
		spare, err := l.spare(opts, opts.Size/bs, 0)
		if err != nil {
			return err
		}
		if spare < 0 {
			return l.tooSmall(ctx, opts)
		}
		l.size = opts.Size
		return nil
	}
	free := opts.Free
	if free == 0 && !opts.Minimize {
		free = max(need/5, defaultFreeBytes)
	}
	blocks, err := l.smallest(ctx, opts, free)
	if err != nil {
		return err
	}
	if !opts.Minimize {
		// A round size, unless that is worse, as it is where a last group would
		// be too small to be of use.
		round := ceilDiv(blocks*bs, 1<<20) << 20 / bs
		if spare, err := l.spare(opts, round, free); err != nil || spare >= 0 {
			l.size = round * bs
			return err
		}
	}
	l.size = blocks * bs
	_, err = l.spare(opts, blocks, free)
	return err
}

// smallest finds a number of blocks that leaves that many bytes free, where one
// block less does not. Where that is so in several places, which the size of
// the journal can make, it is the first of them.
func (l *Layout) smallest(ctx context.Context, opts *LayoutOptions, free int64) (int64, error) {
	low := l.demand() - 1 // too few
	var high, spare int64 // enough, once above 0, and how many too many
	test := func(blocks int64) error {
		n, err := l.spare(opts, blocks, free)
		if n >= 0 {
			high, spare = blocks, n
		} else {
			low = max(low, blocks)
		}
		return cmp.Or(ctx.Err(), err)
	}
	// The most that each size of journal allows comes first, then steps that
	// double.
	for _, s := range journalSizes {
		if high == 0 && !opts.NoJournal && s.below-1 > low {
			if err := test(s.below - 1); err != nil {
				return 0, err
			}
		}
	}
	for step := ceilDiv(free, l.geo.blockSize) + 1024; high == 0; step *= 2 {
		if err := test(low + step); err != nil {
			return 0, err
		}
	}
	// What is to spare is not needed; where that is a bad guess, halves get
	// there.
	for guess := true; low+1 < high; guess = !guess {
		next := low + (high-low)/2
		if guess {
			next = max(high-max(spare, 1), low+1)
		}
		if err := test(next); err != nil {
			return 0, err
		}
	}
	return high, nil
}

// tooSmall makes the error that says what would be large enough.
func (l *Layout) tooSmall(ctx context.Context, opts *LayoutOptions) error {
	e := &SizeError{Size: opts.Size, Inodes: int64(l.lastIno()), Largest: l.largestDirs(5)}
	blocks, err := l.smallest(ctx, opts, 0)
	if err != nil {
		return err
	}
	if _, err := l.spare(opts, blocks, 0); err != nil {
		return err
	}
	e.MinSize = blocks * l.geo.blockSize
	e.Bytes = l.usedPositions * l.geo.blockSize
	return e
}

// spare lays the tree out on that many blocks, and returns how many are left
// when that many bytes are free for anybody; below 0 there are too few.
func (l *Layout) spare(opts *LayoutOptions, blocks, free int64) (int64, error) {
	if !opts.NoJournal && blocks < minJournalBlocks {
		return -1, nil
	}
	bs := l.geo.blockSize
	need := int64(l.lastIno())
	wish := need
	if !opts.Minimize {
		wish = max(need+(blocks-l.demand())*bs/inodeRatio, blocks*bs/inodeRatioMax)
	}
	g, err := newGeometry(bs, blocks, need, wish)
	if errors.Is(err, errTooFewBlocks) {
		return -1, nil
	}
	if err != nil {
		return -1, err
	}
	l.geo = g
	l.journalBlocks = 0
	if !opts.NoJournal {
		l.journalBlocks = journalBlocks(g.blocks)
	}
	l.reservedBlocks = int64(float64(g.blocks) * opts.ReservedPercent / 100)
	l.allocate()
	if free == 0 {
		return l.freeBlocks(), nil
	}
	return l.availBlocks() - ceilDiv(free, bs), nil
}

// freeBlocks is s_free_blocks_count; below 0 the tree does not fit.
func (l *Layout) freeBlocks() int64 { return l.geo.freeBlocks() - l.usedPositions }

// availBlocks is what anybody can still allocate: not those that are reserved,
// nor those that the kernel keeps for extents that have to be split
// (fs/ext4/super.c, ext4_calculate_resv_clusters).
func (l *Layout) availBlocks() int64 {
	return l.freeBlocks() - l.reservedBlocks - min(l.geo.blocks/50, 4096)
}

// demand is a lower bound of the blocks that the tree takes.
func (l *Layout) demand() int64 {
	bs := l.geo.blockSize
	n := l.lostFound.n + int64(len(l.links))
	for d := range l.dirs.len() {
		n += l.dirs.at(uint32(d)).n
	}
	for i := range l.xattrs {
		n += l.xattrs[i].blocks
	}
	for i := range l.eaValues {
		n += ceilDiv(int64(len(l.eaValues[i].value)), bs)
	}
	for k := range l.files.len() {
		n += l.fileBlocks(l.files.at(uint32(k)).inode)
	}
	return n
}

// allocate gives every object its positions. It goes on beyond the end of the
// disk, so that usedPositions tells what is needed.
func (l *Layout) allocate() {
	pos := int64(0)
	take := func(runs []run) int64 {
		o := object{pos, runs}
		pos += o.blocks() + l.treeBlocksOf(o)
		return o.pos
	}
	var one [1]run
	dense := func(n int64) []run { one[0] = run{0, n}; return one[:] }

	if l.geo.resizeInode {
		l.resizePos = take(dense(1))
	}
	l.zones.resize = pos
	for d := range l.dirs.len() {
		p := l.dirs.at(uint32(d))
		p.pos = take(dense(p.n))
	}
	l.zones.dirs = pos
	if l.ownLostFound {
		l.lostFound.pos = take(dense(l.lostFound.n))
	}
	l.zones.lostFound = pos
	for i := range l.links {
		l.links[i].pos = take(dense(1))
	}
	l.zones.links = pos
	for i := range l.xattrs {
		l.xattrs[i].pos = pos
		pos += l.xattrs[i].blocks
	}
	l.zones.xattrs = pos
	for i := range l.eaValues {
		v := &l.eaValues[i]
		v.pos = take(dense(ceilDiv(int64(len(v.value)), l.geo.blockSize)))
	}
	l.zones.eaValues = pos
	var buf []run
	for k := range l.files.len() {
		f := l.files.at(uint32(k))
		buf = l.appendRuns(buf[:0], f.inode)
		f.pos = take(buf)
	}
	l.zones.files = pos
	if l.journalBlocks > 0 {
		l.journalPos = take(dense(l.journalBlocks))
	}
	l.usedPositions = pos
}

// treeBlocksOf returns the number of blocks of an object's extent tree, or 0
// for an object beyond the end of the disk, which is then too small anyway.
func (l *Layout) treeBlocksOf(o object) int64 {
	g := l.geo
	n := o.blocks()
	if o.pos+n > g.freeBlocks() {
		return 0
	}
	if len(o.runs) <= extentRootMax && n <= extentMaxLen {
		// The usual case without counting: all in one free run.
		i := sort.Search(len(g.free), func(i int) bool { return g.free[i].pos > o.pos }) - 1
		if i >= 0 && o.pos+n <= g.free[i].pos+g.free[i].len() {
			return 0
		}
	}
	count := int64(0)
	g.eachExtent(o, func(extent) { count++ })
	return g.treeBlocks(count)
}

// appendRuns appends the runs of logical blocks that hold a file's data.
func (l *Layout) appendRuns(runs []run, inode uint32) []run {
	bs := l.geo.blockSize
	for _, s := range l.tree.dataSpans(inode) {
		r := run{s.off / bs, ceilDiv(s.end, bs)}
		if n := len(runs); n > 0 && r.start <= runs[n-1].end {
			runs[n-1].end = r.end
			continue
		}
		runs = append(runs, r)
	}
	return runs
}

// fileBlocks is the number of data blocks of a file.
func (l *Layout) fileBlocks(inode uint32) int64 {
	var n, end int64
	bs := l.geo.blockSize
	for _, s := range l.tree.dataSpans(inode) {
		start := max(s.off/bs, end)
		end = ceilDiv(s.end, bs)
		n += end - start
	}
	return n
}

// finish derives what the rest needs from the final positions.
func (l *Layout) finish() {
	l.denseEnd = 0
	if l.usedPositions > 0 {
		l.denseEnd = l.geo.block(l.usedPositions-1) + 1
	}
	l.gdt = l.encodeGDT()
	l.regions = l.makeRegions()
}

// ino returns the inode number of an inode of the tree.
func (l *Layout) ino(i uint32) uint32 {
	lf := l.tree.lostFound
	switch {
	case i == 0:
		return rootIno
	case lf != 0 && i == lf:
		return lostFoundIno
	case lf != 0 && i > lf:
		return firstIno + i - 1
	}
	return firstIno + i
}

// index is the reverse of ino, for the root and numbers up to lastTreeIno.
func (l *Layout) index(ino uint32) uint32 {
	lf := l.tree.lostFound
	switch {
	case ino == rootIno:
		return 0
	case ino == lostFoundIno:
		return lf
	case lf != 0 && ino-firstIno >= lf:
		return ino - firstIno + 1
	}
	return ino - firstIno
}

// lastTreeIno is the highest number of an inode of the tree, or firstIno.
func (l *Layout) lastTreeIno() uint32 {
	n := uint32(l.tree.inodes.len()) - 1
	if !l.ownLostFound {
		n--
	}
	return firstIno + n
}

// lastIno is the highest inode number in use; all below are in use, too.
func (l *Layout) lastIno() uint32 { return l.lastTreeIno() + uint32(len(l.eaValues)) }

// eaInode returns the inode that holds a value, and the value's hash.
func (l *Layout) eaInode(value string) (ino, hash uint32) {
	k := l.eaByValue[value]
	return l.lastTreeIno() + 1 + uint32(k), l.eaValues[k].hash
}

// largestDirs returns the directories whose own files take the most.
func (l *Layout) largestDirs(most int) []DirSize {
	t := l.tree
	sum := make([]int64, t.dirs.len())
	seen := make(map[uint32]bool) // of files that have several names
	for d := range sum {
		dr := t.dirs.at(uint32(d))
		for e := dr.first; e < dr.first+dr.count; e++ {
			i := t.entries.at(e).inode
			if n := t.inodes.at(i); !n.isRegular() || seen[i] {
				continue
			} else if n.links > 1 {
				seen[i] = true
			}
			sum[d] += l.fileBlocks(i) * l.geo.blockSize
		}
	}
	order := make([]uint32, 0, len(sum))
	for d := range sum {
		if sum[d] > 0 {
			order = append(order, uint32(d))
		}
	}
	slices.SortFunc(order, func(a, b uint32) int { return cmp.Or(cmp.Compare(sum[b], sum[a]), cmp.Compare(a, b)) })
	var out []DirSize
	for _, d := range order[:min(most, len(order))] {
		out = append(out, DirSize{t.dirPath(d), sum[d]})
	}
	return out
}

// Size returns the size of the disk in bytes.
func (l *Layout) Size() int64 { return l.size }

// FreeBytes returns what anybody can still write, in bytes: what statfs calls
// available on a mounted disk.
func (l *Layout) FreeBytes() int64 { return max(l.availBlocks(), 0) * l.geo.blockSize }

// FreeInodes returns how many more files fit.
func (l *Layout) FreeInodes() int64 {
	return l.geo.groups*l.geo.inodesPerGroup - int64(l.lastIno())
}

// UUID returns the file system's UUID.
func (l *Layout) UUID() UUID { return l.uuid }

// Extents returns the ranges of the disk that Write writes: offset and length
// in bytes, ascending, not touching each other. Everything else has to read as
// zeroes before.
func (l *Layout) Extents() iter.Seq2[int64, int64] {
	return func(yield func(off, n int64) bool) {
		bs := l.geo.blockSize
		for i := 0; i < len(l.regions); {
			r := l.regions[i].run
			for i++; i < len(l.regions) && l.regions[i].start == r.end; i++ {
				r.end = l.regions[i].end
			}
			if !yield(r.start*bs, r.len()*bs) {
				return
			}
		}
	}
}

package ext4img

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"io/fs"
	"math"
	"path"
	"slices"
	"strings"
)

// none is no inode, no slot and no place.
const none = math.MaxUint32

// builder is a tree while sources are laid into it, one over another. Inodes
// are numbered as they come; finish puts them into the order of a walk, and
// drops those that have no name any more.
//
// Until then a directory's ref is its first slot, or none, and its rdev is the
// inode of its parent.
type builder struct {
	ctx     context.Context
	opts    *ScanOptions
	tree    *Tree
	slots   chunks[slot]
	table   []uint32 // open hash table of slots by directory and name; plus 1
	seed    maphash.Seed
	sets    map[string]uint32 // xattrSet.key -> inode.xattr
	exclude []exclusion
	src     uint16 // the source that is being laid
	hasRoot bool   // a source told of the root directory
	buf     []byte // for findData

	used, most int64 // of what archives may make of entries
	steps      int64 // what archives have walked
}

// slot is a name in a directory. It stays when the name goes.
type slot struct {
	name  uint32 // place in the arena
	dir   uint32 // inode of the directory
	inode uint32 // none: the name is gone
	next  uint32 // next slot of the directory
	src   uint16 // the last source that had the name
	len   uint8
}

// defaultMaxEntries is ScanOptions.MaxEntries where that is 0.
const defaultMaxEntries = 4 << 20

func newBuilder(ctx context.Context, opts *ScanOptions) (*builder, error) {
	t := &Tree{spans: make(map[uint32][]span), maxTime: maxTime}
	if m := opts.MaxTime; m != nil {
		t.maxTime = min(max(*m, minTime), maxTime)
	}
	b := &builder{
		ctx: ctx, opts: opts, tree: t, table: make([]uint32, 1<<10), seed: maphash.MakeSeed(),
		sets: make(map[string]uint32), most: opts.MaxEntries,
	}
	if b.most <= 0 {
		b.most = defaultMaxEntries
	}
	for _, maps := range [][]IDMap{opts.UIDMap, opts.GIDMap} {
		if err := checkIDMaps(maps); err != nil {
			return nil, err
		}
	}
	var err error
	if b.exclude, err = parseExclude(opts.Exclude); err != nil {
		return nil, err
	}
	t.inodes.add(inode{mode: modeDir | 0o755, ref: none})
	return b, nil
}

// addContent makes c the place that the files of the current source are read
// from.
func (b *builder) addContent(c content) { b.tree.sources = append(b.tree.sources, c) }

// hash is the first place of a name in a table of a power of two.
func (b *builder) hash(dir uint32, name []byte) int {
	h := maphash.Bytes(b.seed, name) + uint64(dir)*0x9e3779b97f4a7c15
	return int(h >> 33)
}

func (b *builder) slotName(s *slot) []byte { return b.tree.names.get(s.name, int(s.len)) }

// find returns the slot of a name, whether something has the name or not.
func (b *builder) find(dir uint32, name string) (*slot, bool) {
	mask := len(b.table) - 1
	for i := b.hash(dir, []byte(name)) & mask; b.table[i] != 0; i = (i + 1) & mask {
		if s := b.slots.at(b.table[i] - 1); s.dir == dir && string(b.slotName(s)) == name {
			return s, true
		}
	}
	return nil, false
}

// lookup returns the inode of a name, or none.
func (b *builder) lookup(dir uint32, name string) uint32 {
	if s, ok := b.find(dir, name); ok {
		return s.inode
	}
	return none
}

// slot returns the slot of a name, a new one if it has none.
func (b *builder) slot(dir uint32, name string) (*slot, error) {
	if s, ok := b.find(dir, name); ok {
		return s, nil
	}
	if len(name) > maxNameLen {
		return nil, fmt.Errorf("the name has %d bytes, and ext4 takes %d", len(name), maxNameLen)
	}
	place, ok := b.tree.names.add(name)
	if !ok || b.slots.len() == math.MaxInt32 {
		return nil, errTreeTooLarge
	}
	return b.newSlot(dir, place, uint8(len(name))), nil
}

// newSlot adds a slot for a name in the arena that has none.
func (b *builder) newSlot(dir, place uint32, n uint8) *slot {
	if b.slots.len() >= len(b.table)/4*3 {
		b.table = make([]uint32, 2*len(b.table))
		for i := range b.slots.len() {
			b.index(uint32(i))
		}
	}
	d := b.tree.inodes.at(dir)
	i := b.slots.add(slot{name: place, dir: dir, inode: none, next: d.ref, len: n})
	d.ref = i
	b.index(i)
	return b.slots.at(i)
}

func (b *builder) index(slot uint32) {
	s := b.slots.at(slot)
	mask := len(b.table) - 1
	i := b.hash(s.dir, b.slotName(s)) & mask
	for b.table[i] != 0 {
		i = (i + 1) & mask
	}
	b.table[i] = slot + 1
}

// put gives an inode a name and returns its number. A directory that takes the
// place of a directory has what was in that; all else that had the name goes.
func (b *builder) put(s *slot, n inode) uint32 {
	if s.inode != none && n.isDir() {
		if old := b.tree.inodes.at(s.inode); old.isDir() {
			b.replaceDir(s.inode, n)
			s.src = b.src
			return s.inode
		}
	}
	if n.isDir() {
		n.ref, n.rdev = none, s.dir
	}
	n.src = b.src
	s.inode, s.src = b.tree.inodes.add(n), b.src
	return s.inode
}

// replaceDir gives a directory the metadata of another.
func (b *builder) replaceDir(i uint32, n inode) {
	old := b.tree.inodes.at(i)
	n.ref, n.rdev, n.src = old.ref, old.rdev, b.src
	*old = n
}

// link gives a name to an inode that has one already.
func (b *builder) link(s *slot, inode uint32) { s.inode, s.src = inode, b.src }

// charge counts what an archive makes of entries and what goes with them, which
// its size may not be a measure of: it can be compressed.
func (b *builder) charge(n int64) error {
	if b.used += n; b.used > b.most {
		return fmt.Errorf("the archives make over %d entries: %w", b.most, ErrTooManyEntries)
	}
	return nil
}

// walk returns the directory that a clean path is in, and the last element;
// for the root "" in itself. Symlinks on the way lead on inside of the tree, as
// if its root were that of the system. Directories that are missing are made
// by mkdir; without it they are fs.ErrNotExist.
func (b *builder) walk(name string, mkdir func() (inode, error)) (dir uint32, last string, err error) {
	rest, links := name, 0
	for {
		first, after, more := strings.Cut(rest, "/")
		if b.steps++; b.steps/16 > b.most {
			return 0, "", fmt.Errorf("paths have over %d elements in all: %w", b.most*16, ErrTooManyEntries)
		}
		switch {
		case !more:
			return dir, first, nil
		case first == "" || first == ".":
			rest = after
			continue
		case first == "..": // of a symlink
			dir = b.tree.inodes.at(dir).rdev
			rest = after
			continue
		}
		s, ok := b.find(dir, first)
		if !ok || s.inode == none {
			if mkdir == nil {
				return 0, "", fs.ErrNotExist
			}
			n, err := mkdir()
			if err != nil {
				return 0, "", err
			}
			if s, err = b.slot(dir, first); err != nil {
				return 0, "", err
			}
			b.put(s, n)
		}
		n := b.tree.inodes.at(s.inode)
		switch {
		case n.isDir():
			if mkdir != nil {
				s.src = b.src
			}
			dir, rest = s.inode, after
		case n.isSymlink():
			if links++; links > maxSymlinks {
				return 0, "", fmt.Errorf("over %d symlinks on the way", maxSymlinks)
			}
			target := b.tree.target(n)
			if target[0] == '/' {
				dir = 0
			}
			rest = string(target) + "/" + after
		default:
			return 0, "", fmt.Errorf("%q on the way is not a directory", first)
		}
	}
}

// cleanPath removes from a path what does not matter: slashes at its ends,
// several in a row, and elements ".". The root is "". A path never leads out
// of the tree: an element ".." is an error.
func cleanPath(name string) (string, error) {
	if strings.IndexByte(name, 0) >= 0 {
		return "", errors.New("a zero byte in the name")
	}
	if len(name) > maxArchivePath {
		return "", fmt.Errorf("a path of %d bytes: expected %d at most", len(name), maxArchivePath)
	}
	clean := true
	for e := range strings.SplitSeq(name, "/") {
		if e == ".." {
			return "", errors.New("an element of the path is \"..\"")
		}
		if len(e) > maxNameLen {
			return "", fmt.Errorf("a name of %d bytes, and ext4 takes %d", len(e), maxNameLen)
		}
		clean = clean && e != "" && e != "."
	}
	if clean {
		return name, nil
	}
	var out []string
	for e := range strings.SplitSeq(name, "/") {
		if e != "" && e != "." {
			out = append(out, e)
		}
	}
	return strings.Join(out, "/"), nil
}

// maxArchivePath bounds paths in archives; the kernel takes 4,095 bytes at a time.
const maxArchivePath = 64 << 10

// setTarget makes a symlink lead somewhere.
func (b *builder) setTarget(n *inode, target string) error {
	switch {
	case target == "":
		return errors.New("a symlink to nothing")
	case len(target) > maxPathLen:
		return fmt.Errorf("a symlink of %d bytes, and ext4 takes %d", len(target), maxPathLen)
	case strings.IndexByte(target, 0) >= 0:
		return errors.New("a zero byte in the target of a symlink")
	}
	place, ok := b.tree.names.add(target)
	if !ok {
		return errTreeTooLarge
	}
	n.ref, n.size = place, int64(len(target))
	return nil
}

// inode makes the inode of an entry of a source, with its xattrs, in the way
// that the options ask for.
func (b *builder) inode(full string, st *stat, xattrs func(fn func(name, value string) error) error) (inode, error) {
	n := inode{sec: st.sec, nsec: st.nsec, id: st.id(), uid: st.uid, gid: st.gid, rdev: st.rdev, mode: st.mode}
	if n.isRegular() {
		n.size = st.size
	}
	if o := b.opts.Owner; o != nil {
		n.uid, n.gid = o.UID, o.GID
	} else {
		var ok bool
		if n.uid, ok = mapID(b.opts.UIDMap, n.uid); !ok {
			return n, fmt.Errorf("the uid %d %w", st.uid, errUnmapped)
		}
		if n.gid, ok = mapID(b.opts.GIDMap, n.gid); !ok {
			return n, fmt.Errorf("the gid %d %w", st.gid, errUnmapped)
		}
	}
	mask := uint16(0o7777)
	if b.opts.ModeMask != 0 {
		mask = b.opts.ModeMask
	}
	if !n.isSymlink() {
		n.mode &= modeType | mask
	}
	b.checkTime(full, &n)
	var set xattrSet
	err := xattrs(func(x, value string) error {
		index, short, ok := splitXattr(x)
		if !ok {
			b.warn("%s: xattr %s is left out: ext4 has no such namespace", full, x)
			return nil
		}
		if index == xattrACLAccess || index == xattrACLDefault {
			var err error
			if value, err = aclToExt4(value, mask, b.opts); err != nil {
				return fmt.Errorf("xattr %s: %w", x, err)
			}
		}
		var err error
		set, err = set.with(index, short, value)
		return err
	})
	if err == nil {
		b.setXattrs(&n, set)
	}
	return n, err
}

func (b *builder) checkTime(full string, n *inode) {
	if n.sec < minTime || n.sec > maxTime && b.opts.MaxTime == nil {
		b.warn("%s: mtime %d s after 1970 is outside what ext4 holds (1901 to 2446); the nearest is taken", full, n.sec)
	}
}

// setXattrs gives an inode its xattrs, of which it has none.
func (b *builder) setXattrs(n *inode, set xattrSet) {
	if len(set) == 0 {
		return
	}
	set.sort()
	key := set.key()
	if n.xattr = b.sets[key]; n.xattr == 0 {
		b.tree.xattrs = append(b.tree.xattrs, set)
		n.xattr = uint32(len(b.tree.xattrs))
		b.sets[key] = n.xattr
	}
}

// holeGrain is what a hole is a multiple of: the smallest block there is.
const holeGrain = minBlockSize

// findData returns the runs of data of a regular file of which data are the
// parts that may not be zero, ascending: not the blocks without data, and not
// those that are zero; nil if there is nothing but data. Where a file system
// keeps blocks that were never written, it takes them for data or not as the
// page cache has it (Linux: SEEK_DATA), which must not make another disk.
func (b *builder) findData(f io.ReaderAt, size int64, data []span) ([]span, error) {
	if b.buf == nil {
		b.buf = make([]byte, unitSize)
	}
	found := []span{}
	for _, d := range data {
		off := d.off &^ (holeGrain - 1)
		if n := len(found); n > 0 {
			off = max(off, found[n-1].end)
		}
		for off < d.end {
			if err := b.ctx.Err(); err != nil {
				return nil, err
			}
			n, err := f.ReadAt(b.buf[:min(int64(len(b.buf)), size-off)], off)
			if err != nil && err != io.EOF {
				return nil, err
			}
			if n == 0 {
				break // the file shrinks, as Write will say
			}
			for p := b.buf[:n]; len(p) > 0; {
				grain := p[:min(holeGrain, len(p))]
				if !allZero(grain) {
					if k := len(found); k > 0 && found[k-1].end == off {
						found[k-1].end += int64(len(grain))
					} else {
						found = append(found, span{off, off + int64(len(grain))})
					}
				}
				off += int64(len(grain))
				p = p[len(grain):]
			}
		}
	}
	if len(found) == 1 && found[0] == (span{0, size}) {
		return nil, nil
	}
	return found, nil
}

var zeroes [holeGrain]byte

func allZero(b []byte) bool { return bytes.Equal(b, zeroes[:len(b)]) }

// finish makes the tree of what was laid: entries sorted, inodes in the order
// of a walk, so that what is near in the tree is near on the disk.
func (b *builder) finish() error {
	t := b.tree
	b.table = nil
	number := make([]uint32, t.inodes.len())
	for i := range number {
		number[i] = none
	}
	sets := make([]uint32, len(t.xattrs)+1) // new numbers
	var xattrs []xattrSet
	count := uint32(0)
	take := func(old uint32, n *inode) {
		number[old] = count
		count++
		if n.links = 0; n.isDir() {
			n.links = 2
		}
		if n.xattr != 0 {
			if sets[n.xattr] == 0 {
				xattrs = append(xattrs, t.xattrs[n.xattr-1])
				sets[n.xattr] = uint32(len(xattrs))
			}
			n.xattr = sets[n.xattr]
		}
	}
	take(0, t.inodes.at(0))
	var kids []slot
	for pending := []dir{{}}; len(pending) > 0; {
		if err := b.ctx.Err(); err != nil {
			return err
		}
		dr := pending[len(pending)-1] // dr.inode is the old number
		pending = pending[:len(pending)-1]
		waiting := len(pending)
		self := t.inodes.at(dr.inode)
		kids = kids[:0]
		for i := self.ref; i != none; {
			s := b.slots.at(i)
			if s.inode != none {
				kids = append(kids, *s)
			}
			i = s.next
		}
		slices.SortFunc(kids, func(x, y slot) int { return bytes.Compare(b.slotName(&x), b.slotName(&y)) })
		old := dr.inode
		dr.inode, dr.first, dr.count = number[old], uint32(t.entries.len()), uint32(len(kids))
		d := t.dirs.add(dr)
		self.ref, self.rdev = d, 0
		for i := range kids {
			s := &kids[i]
			n := t.inodes.at(s.inode)
			if old == 0 && string(b.slotName(s)) == lostFoundName {
				if !n.isDir() {
					return pathError("scan", lostFoundName, errors.New("ext4 needs this name for a directory; leave it out with an exclude pattern"))
				}
				t.lostFound = count
			}
			if number[s.inode] == none {
				take(s.inode, n)
			}
			e := t.entries.add(dirent{name: s.name, inode: number[s.inode], len: s.len})
			if n.isDir() {
				self.links++
				pending = append(pending, dir{inode: s.inode, parent: d, entry: e})
			} else if n.links++; n.links > maxLinks {
				return pathError("scan", join(t.dirPath(d), string(b.slotName(s))), fmt.Errorf("the file has over %d names, the most that ext4 takes", maxLinks))
			}
		}
		slices.Reverse(pending[waiting:])
	}
	t.xattrs = xattrs
	b.slots = chunks[slot]{}

	spans := make(map[uint32][]span, len(t.spans))
	for old, s := range t.spans {
		if number[old] != none {
			spans[number[old]] = s
		}
	}
	t.spans = spans
	live := int(count)
	for i := range number {
		if number[i] == none { // behind all others, to be cut off
			number[i] = count
			count++
		}
	}
	for i := range uint32(len(number)) {
		for to := number[i]; to != i; to = number[i] {
			x, y := t.inodes.at(i), t.inodes.at(to)
			*x, *y = *y, *x
			number[i], number[to] = number[to], to
		}
	}
	t.inodes.truncate(live)
	return nil
}

// exclusion is an exclude pattern.
type exclusion struct {
	given, pattern string
	anchored       bool // matched with the whole path
	matched        bool
}

func parseExclude(patterns []string) ([]exclusion, error) {
	var out []exclusion
	for _, given := range patterns {
		p := exclusion{given: given, pattern: strings.TrimRight(strings.TrimPrefix(given, "./"), "/")}
		p.anchored = strings.Contains(p.pattern, "/") || strings.HasPrefix(given, "./")
		p.pattern = strings.TrimLeft(p.pattern, "/")
		if p.pattern == "" || p.pattern == "." {
			return nil, fmt.Errorf("exclude pattern %q names nothing that could be left out", given)
		}
		if _, err := path.Match(p.pattern, ""); err != nil {
			return nil, fmt.Errorf("exclude pattern %q: %w", given, err)
		}
		out = append(out, p)
	}
	return out, nil
}

// excluded says whether a pattern is that of a name in the directory rel.
func excluded(patterns []exclusion, rel, name string) bool {
	out := false
	for i := range patterns {
		p := &patterns[i]
		subject := name
		if p.anchored {
			subject = join(rel, name)
		}
		if ok, _ := path.Match(p.pattern, subject); ok { // the pattern is a good one
			p.matched = true
			out = true
		}
	}
	return out
}

// excludedPath says whether a clean path, or a directory on the way, is left
// out.
func (b *builder) excludedPath(name string) bool {
	if len(b.exclude) == 0 || name == "" {
		return false
	}
	for i := 0; i <= len(name); i++ {
		if i == len(name) || name[i] == '/' {
			dir, base := path.Split(name[:i])
			if excluded(b.exclude, cmp.Or(strings.TrimSuffix(dir, "/"), "."), base) {
				return true
			}
		}
	}
	return false
}

func (b *builder) warnUnmatched(patterns []exclusion) {
	for _, p := range patterns {
		if !p.matched {
			b.warn("exclude pattern %q matches nothing", p.given)
		}
	}
}

func (b *builder) warn(format string, args ...any) {
	if b.opts.Warn != nil {
		b.opts.Warn(fmt.Sprintf(format, args...))
	}
}

// pathError names the entry that an error is about, unless it is named
// already.
func pathError(op, full string, err error) error {
	if pe := (*fs.PathError)(nil); errors.As(err, &pe) {
		if pe.Path == full {
			return err
		}
		err = pe.Err
	}
	return &fs.PathError{Op: op, Path: full, Err: err}
}

func join(dir, name string) string {
	if dir == "." {
		return name
	}
	return dir + "/" + name
}

package ext4img

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"sort"
	"strconv"
	"strings"
)

// Tar is what a tar archive of that many bytes holds, not compressed: v7, ustar,
// pax and those of GNU tar and star, with xattrs, ACLs and sparse files. It is
// read once for its headers, and where Write needs content, so that r has to stay
// until the tree is closed. Where r has a method Stat as that of os.File, an
// archive that changes meanwhile is an error.
//
// A later entry replaces an earlier one of the same name, but a directory only the
// metadata of a directory. Names begin at the root of the tree, with or without a
// slash; one with an element ".." is an error. A symlink on the way to a name
// leads on inside of the tree; directories that are missing on the way, or the
// root, belong to root, have mode 755 and the time of the entry. A hard link may come before what
// it is a link to. Uids and gids count, not names. What is unknown is an error, a
// *TarError.
func Tar(r io.ReaderAt, size int64) Source { return &tarSource{r: r, size: size} }

// Layer is Tar for a layer of a container image: an entry ".wh.NAME" takes NAME
// of the sources before away, ".wh..wh..opq" all that they have in its directory
// (OCI image specification, layer.md, "Whiteouts").
func Layer(r io.ReaderAt, size int64) Source { return &tarSource{r: r, size: size, layer: true} }

type tarSource struct {
	r     io.ReaderAt
	size  int64
	layer bool
}

// tarContent reads files out of an archive. A file's id is where what is stored
// of it begins, its rdev 0, or the index of its pieces plus 1.
type tarContent struct {
	r      io.ReaderAt
	pieces [][]tarPiece
	before fs.FileInfo // nil: r cannot tell
}

func (c *tarContent) open(n *inode) (sourceFile, error) {
	f := &tarFile{c, int64(n.id), n.size, nil}
	if n.rdev == 0 {
		f.pieces = []tarPiece{{span{0, n.size}, 0}}
	} else {
		f.pieces = c.pieces[n.rdev-1]
	}
	return f, nil
}

// check returns an error if the archive is not what it was.
func (c *tarContent) check() error {
	if c.before == nil {
		return nil
	}
	now, err := c.r.(statter).Stat()
	if err != nil {
		return err
	}
	if now.Size() != c.before.Size() || !now.ModTime().Equal(c.before.ModTime()) {
		return fmt.Errorf("the archive %w", ErrChanged)
	}
	return nil
}

func (c *tarContent) close() error { return nil }

type statter interface{ Stat() (fs.FileInfo, error) }

// tarFile is a regular file in an archive.
type tarFile struct {
	c      *tarContent
	data   int64
	size   int64
	pieces []tarPiece
}

func (f *tarFile) ReadAt(p []byte, off int64) (int, error) {
	n := int(min(int64(len(p)), max(f.size-off, 0)))
	at := 0 // in p
	for i := sort.Search(len(f.pieces), func(i int) bool { return f.pieces[i].end > off }); at < n && i < len(f.pieces); i++ {
		d := &f.pieces[i]
		if hole := d.off - off - int64(at); hole > 0 {
			hole = min(hole, int64(n-at))
			clear(p[at : at+int(hole)])
			at += int(hole)
		}
		part := p[at:min(int64(n), max(d.end-off, 0))]
		if len(part) == 0 {
			continue
		}
		got, err := f.c.r.ReadAt(part, f.data+d.at+off+int64(at)-d.off)
		if at += got; got < len(part) {
			return at, err
		}
	}
	clear(p[at:n])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (f *tarFile) stat() (stat, error)         { return stat{}, cmp.Or(f.c.check(), errNoStat) }
func (f *tarFile) spans(int64) ([]span, error) { return nil, errNoStat }
func (f *tarFile) kernelFile() *os.File        { return nil }
func (f *tarFile) close() error                { return nil }

// tarScan lays an archive into a tree.
type tarScan struct {
	*builder
	c       *tarContent
	layer   bool
	links   []tarPending      // hard links to what is not there yet
	acls    map[uint32]tarACL // of inodes
	left    map[string]uint32 // regular files that are left out, for hard links to them
	cleared map[uint32]bool   // directories without what other sources had in them

	lastPath string // where the last entry was; "": that says nothing
	lastDir  uint32 // the directory there
}

// tarACL is the ACLs of an entry as text: access and default.
type tarACL struct {
	path string
	text [2]string
}

// tarPending is a hard link that waits for its target.
type tarPending struct {
	number, off int64
	dir         uint32
	name        string
	path        string
	target      string
}

func (p *tarPending) fail(err error) error {
	return &TarError{Entry: p.number, Offset: p.off, Name: p.path, Err: err}
}

func (s *tarSource) lay(b *builder) error {
	c := &tarContent{r: s.r}
	b.addContent(c)
	if st, ok := s.r.(statter); ok {
		var err error
		if c.before, err = st.Stat(); err != nil {
			return err
		}
	}
	t := &tarReader{r: s.r, size: s.size, charge: b.charge}
	scan := &tarScan{builder: b, c: c, layer: s.layer, acls: make(map[uint32]tarACL), left: make(map[string]uint32), cleared: make(map[uint32]bool)}
	for i := 0; ; i++ {
		if err := b.ctx.Err(); err != nil && i%1024 == 0 {
			return err
		}
		e, err := t.next()
		if err == io.EOF {
			break
		}
		if err == nil {
			err = scan.entry(e)
		}
		if te := (*TarError)(nil); err != nil && !errors.As(err, &te) && b.ctx.Err() == nil {
			err = t.fail(e, err)
		}
		if err != nil {
			return err
		}
	}
	if !t.ended {
		return fmt.Errorf("the archive ends at offset %d, behind entry %d, without a block of zeroes: it is cut off", s.size, t.number)
	}
	if err := scan.link(); err != nil {
		return err
	}
	return scan.setACLs()
}

// entry adds an entry to the tree.
func (s *tarScan) entry(e *tarEntry) error {
	full, err := cleanPath(e.name)
	if err != nil {
		return err
	}
	if err := s.charge(1 + int64(len(e.link))/256); err != nil {
		return err
	}
	if !s.hasRoot {
		n, err := s.implicit(e)
		if err != nil {
			return err
		}
		s.replaceDir(0, n)
		s.hasRoot = true
	}
	if s.excludedPath(full) {
		return s.leaveOut(e, full)
	}
	for _, w := range e.warnings {
		s.warn("%s: %s", full, w)
	}
	if full == "" {
		if e.typ != tarDir {
			return errors.New("the root of the tree is a directory")
		}
		n, err := s.inodeOf(e, ".")
		if err == nil {
			s.replaceDir(0, n)
			err = s.keepACL(0, e, ".")
		}
		return err
	}
	if s.layer && strings.Contains("/"+full[:max(strings.LastIndexByte(full, '/'), 0)], "/"+whiteout) {
		return errors.New("a directory with the name of a whiteout")
	}
	dir, name, err := s.parent(full, e)
	if err != nil {
		return err
	}
	if s.layer && strings.HasPrefix(name, whiteout) {
		return s.whiteout(dir, name)
	}
	if e.typ == tarLink {
		return s.linkEntry(e, dir, name, full)
	}
	n, err := s.inodeOf(e, full)
	if err != nil {
		return err
	}
	place, err := s.slot(dir, name)
	if err != nil {
		return err
	}
	if place.inode != none && !(n.isDir() && s.tree.inodes.at(place.inode).isDir()) {
		s.lastPath = "" // the way there may have led by what is replaced
	}
	i := s.put(place, n)
	if err := s.keepACL(i, e, full); err != nil {
		return err
	}
	return s.setContent(e, i)
}

// inodeOf makes the inode of an entry.
func (s *tarScan) inodeOf(e *tarEntry, full string) (inode, error) {
	st := stat{mode: e.mode, uid: e.uid, gid: e.gid, size: e.size, sec: e.sec, nsec: e.nsec}
	switch e.typ {
	case tarReg:
		st.mode |= modeReg
	case tarDir:
		st.mode |= modeDir
	case tarSymlink:
		st.mode |= modeLink
	case tarFifo:
		st.mode |= modeFifo
	case tarChar, tarBlock:
		st.mode |= modeChar
		if e.typ == tarBlock {
			st.mode = st.mode&^modeType | modeBlock
		}
		var ok bool
		if st.rdev, ok = newEncodeDev(e.major, e.minor); !ok {
			return inode{}, errDevice
		}
	}
	n, err := s.inode(full, &st, func(fn func(name, value string) error) error {
		for _, x := range e.xattrs {
			if err := s.charge(int64(len(x.value)) / 256); err != nil {
				return err
			}
			if err := fn(x.name, x.value); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil && n.isSymlink() {
		n.mode = modeLink | 0o777
		err = s.setTarget(&n, e.link)
	}
	return n, err
}

// setContent says where the content of a regular file is.
func (s *tarScan) setContent(e *tarEntry, i uint32) error {
	n := s.tree.inodes.at(i)
	if !n.isRegular() {
		return nil
	}
	n.id = uint64(e.data)
	if !e.sparse {
		return nil
	}
	s.c.pieces = append(s.c.pieces, e.pieces)
	n.rdev = uint32(len(s.c.pieces))
	f, err := s.c.open(n)
	if err != nil {
		return err
	}
	var data []span
	for _, p := range e.pieces {
		data = append(data, p.span)
	}
	spans, err := s.findData(f, n.size, data)
	if spans != nil {
		s.tree.spans[i] = spans
	}
	return err
}

// leaveOut drops an entry. A regular file can have other names.
func (s *tarScan) leaveOut(e *tarEntry, full string) error {
	if e.typ != tarReg {
		return nil
	}
	n, err := s.inodeOf(e, full)
	if err != nil {
		return err
	}
	n.src = s.src
	i := s.tree.inodes.add(n)
	s.left[full] = i
	if err := s.keepACL(i, e, full); err != nil {
		return err
	}
	return s.setContent(e, i)
}

// parent returns the directory that a clean path is in, and its last element.
func (s *tarScan) parent(full string, e *tarEntry) (dir uint32, name string, err error) {
	end := strings.LastIndexByte(full, '/')
	if end > 0 && full[:end] == s.lastPath {
		return s.lastDir, full[end+1:], nil
	}
	dir, name, err = s.walk(full, func() (inode, error) { return s.implicit(e) })
	if err == nil {
		s.lastPath, s.lastDir = full[:max(end, 0)], dir
	}
	return dir, name, err
}

// implicit is a directory that is only on the way to something.
func (s *tarScan) implicit(e *tarEntry) (inode, error) {
	if err := s.charge(1); err != nil {
		return inode{}, err
	}
	n := inode{mode: modeDir | 0o755, sec: e.sec, nsec: e.nsec}
	if o := s.opts.Owner; o != nil {
		n.uid, n.gid = o.UID, o.GID
	} else {
		n.uid, _ = mapID(s.opts.UIDMap, 0)
		n.gid, _ = mapID(s.opts.GIDMap, 0)
	}
	if m := s.opts.ModeMask; m != 0 {
		n.mode &= modeType | m
	}
	return n, nil
}

// linkEntry gives a file another name, now or at the end.
func (s *tarScan) linkEntry(e *tarEntry, dir uint32, name, full string) error {
	target, err := cleanPath(e.link)
	if err == nil && target == "" {
		err = errors.New("it is the root")
	}
	if err != nil {
		return fmt.Errorf("hard link to %q: %w", e.link, err)
	}
	i, err := s.target(target)
	if err != nil {
		return fmt.Errorf("hard link to %q: %w", e.link, err)
	}
	place, err := s.slot(dir, name)
	if err != nil {
		return err
	}
	if place.inode != none {
		s.lastPath = ""
	}
	if i != none {
		s.builder.link(place, i)
		return nil
	}
	// What had the name is gone in any case; what gets it from now on stays.
	place.inode, place.src = none, s.src
	s.links = append(s.links, tarPending{e.number, e.off, dir, name, full, target})
	return nil
}

// target returns the inode that a hard link is to, or none.
func (s *tarScan) target(clean string) (uint32, error) {
	if i, ok := s.left[clean]; ok {
		return i, nil
	}
	dir, name, err := s.walk(clean, nil)
	if err == fs.ErrNotExist {
		return none, nil
	}
	if err != nil {
		return none, err
	}
	i := s.lookup(dir, name)
	if i != none && s.tree.inodes.at(i).isDir() {
		return none, errors.New("it is a directory")
	}
	return i, nil
}

// maxLinkChain bounds hard links to hard links that come later.
const maxLinkChain = 40

// link makes the hard links that came before their targets.
func (s *tarScan) link() error {
	for range maxLinkChain {
		waiting := s.links[:0]
		for _, p := range s.links {
			i, err := s.target(p.target)
			if err != nil {
				return p.fail(fmt.Errorf("hard link to %q: %w", p.target, err))
			}
			if i == none {
				waiting = append(waiting, p)
				continue
			}
			place, err := s.slot(p.dir, p.name)
			if err != nil {
				return p.fail(err)
			}
			if place.inode == none {
				s.builder.link(place, i)
			}
		}
		s.links = waiting
		if len(waiting) == 0 {
			return nil
		}
	}
	p := &s.links[0]
	return p.fail(fmt.Errorf("hard link to %q: there is no such file", p.target))
}

const (
	whiteout       = ".wh."
	whiteoutMeta   = ".wh..wh." // of AUFS, which began with this
	whiteoutOpaque = ".wh..wh..opq"
)

// whiteout takes away what the sources before had.
func (s *tarScan) whiteout(dir uint32, name string) error {
	switch {
	case name == whiteoutOpaque:
		s.clear(dir)
		return nil
	case strings.HasPrefix(name, whiteoutMeta):
		return nil
	}
	name = name[len(whiteout):]
	if name == "" || name == "." || name == ".." {
		return errors.New("a whiteout of nothing")
	}
	place, ok := s.find(dir, name)
	switch {
	case !ok || place.inode == none:
	case place.src < s.src:
		place.inode = none
	case s.tree.inodes.at(place.inode).isDir():
		s.clear(place.inode)
	}
	s.lastPath = ""
	return nil
}

// clear takes away what the sources before had below a directory, which may
// have been made or touched by this one.
func (s *tarScan) clear(dir uint32) {
	s.lastPath = ""
	for todo := []uint32{dir}; len(todo) > 0; {
		d := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if s.cleared[d] {
			continue // which also has nothing of them below
		}
		s.cleared[d] = true
		for i := s.tree.inodes.at(d).ref; i != none; {
			p := s.slots.at(i)
			if p.inode != none && p.src < s.src {
				p.inode = none
			} else if p.inode != none && s.tree.inodes.at(p.inode).isDir() {
				todo = append(todo, p.inode)
			}
			i = p.next
		}
	}
}

// keepACL remembers the ACLs of an inode, which may name users that only the
// whole tree tells the numbers of.
func (s *tarScan) keepACL(i uint32, e *tarEntry, full string) error {
	delete(s.acls, i)
	acl := tarACL{full, e.acl}
	for _, x := range e.xattrs {
		for k, name := range aclXattrs {
			if x.name == name {
				acl.text[k] = "" // it is there as it is
			}
		}
	}
	n := len(acl.text[0]) + len(acl.text[1])
	if n == 0 {
		return nil
	}
	s.acls[i] = acl
	return s.charge(1 + int64(n+len(full))/256)
}

var aclXattrs = [2]string{"system.posix_acl_access", "system.posix_acl_default"}

// setACLs makes xattrs of the ACLs.
func (s *tarScan) setACLs() error {
	if len(s.acls) == 0 {
		return nil
	}
	order := make([]uint32, 0, len(s.acls))
	for i := range s.acls {
		order = append(order, i)
	}
	slices.Sort(order)
	users := make(map[uint16]map[string]uint32) // by tag
	names := func(tag uint16, name string) (uint32, bool) {
		if users[tag] == nil {
			users[tag] = s.readIDs(map[uint16]string{aclUser: "etc/passwd", aclGroup: "etc/group"}[tag])
		}
		id, ok := users[tag][name]
		return id, ok
	}
	for _, i := range order {
		n := s.tree.inodes.at(i)
		var set xattrSet
		if n.xattr != 0 {
			set = slices.Clone(s.tree.xattrs[n.xattr-1])
		}
		acl := s.acls[i]
		for k, text := range acl.text {
			if text == "" {
				continue
			}
			list, err := parseACL(text, names)
			if err == nil && len(list) > 0 {
				err = checkACL(list)
			}
			if err != nil {
				s.warn("%s: the ACL is left out: %v", acl.path, err)
				continue
			}
			if len(list) == 0 || k == 0 && len(list) == 3 { // the mode says it all
				continue
			}
			mask := uint16(0o7777)
			if s.opts.ModeMask != 0 {
				mask = s.opts.ModeMask
			}
			value, err := aclToExt4(encodeACL(list), mask, s.opts)
			if err == nil {
				index := [2]uint8{xattrACLAccess, xattrACLDefault}[k]
				set, err = set.with(index, "", value)
			}
			if err != nil {
				return pathError("read", acl.path, err)
			}
		}
		n.xattr = 0
		s.setXattrs(n, set)
	}
	return nil
}

// readIDs reads the names and numbers of a file like /etc/passwd in the tree.
func (s *tarScan) readIDs(name string) map[string]uint32 {
	ids := make(map[string]uint32)
	i, err := s.target(name)
	if err != nil || i == none || !s.tree.inodes.at(i).isRegular() {
		return ids
	}
	n := s.tree.inodes.at(i)
	f, err := s.tree.sources[n.src].open(n)
	if err != nil {
		return ids
	}
	defer f.close()
	lines := bufio.NewScanner(io.NewSectionReader(f, 0, min(n.size, 1<<20)))
	for lines.Scan() {
		if p := strings.Split(lines.Text(), ":"); len(p) > 2 {
			if id, err := strconv.ParseUint(p[2], 10, 32); err == nil {
				ids[p[0]] = uint32(id)
			}
		}
	}
	return ids
}

// IsTar says whether something begins as a tar archive of one entry or more
// does.
func IsTar(r io.ReaderAt) (bool, error) {
	h := make([]byte, tarBlockLen)
	if n, err := r.ReadAt(h, 0); n < len(h) {
		if err == io.EOF {
			err = nil
		}
		return false, err
	}
	return !allZero(h) && checkTarSum(h) == nil, nil
}

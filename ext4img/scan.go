package ext4img

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
)

// ScanOptions change what a tree says of its source. The zero value changes
// nothing.
type ScanOptions struct {
	// Owner, if not nil, owns everything.
	Owner *Owner
	// ModeMask, if not 0, is what remains of the twelve mode bits of
	// everything but symlinks: 0o755 takes write from group and others.
	// ACLs lose the same permissions.
	ModeMask uint16
	// MaxTime, if not nil, replaces every later mtime (in seconds since 1970;
	// SOURCE_DATE_EPOCH).
	MaxTime *int64
	// Exclude lists patterns in the form of path.Match: * and ? do not match
	// a slash, and ** means no more than *. A pattern with a slash at its
	// beginning or within is matched with the path from the root of the
	// source, another with the last element. A slash at the end means
	// nothing. What matches is left out with all that is below it. Warn is
	// told of a pattern that matches nothing.
	Exclude []string
	// SkipUnreadable leaves out what cannot be read, and calls Warn for it,
	// where otherwise the scan would fail.
	SkipUnreadable bool
	// Warn, if not nil, is told of what could not be kept: text about one
	// path, without a newline.
	Warn func(text string)
}

// Owner is the owner of a file.
type Owner struct{ UID, GID uint32 }

// Times that an inode can hold.
const (
	minTime = -1 << 31
	maxTime = 1<<34 - 1<<31 - 1
)

// Scan reads the tree below the directory at path, without the content of its
// files. The path itself may be a symlink to a directory; symlinks below are
// kept and never followed. Close the tree when it is no longer needed.
//
// Errors name the path of the entry, below path, in a *fs.PathError.
func Scan(ctx context.Context, path string, opts *ScanOptions) (*Tree, error) {
	if opts == nil {
		opts = &ScanOptions{}
	}
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !fi.IsDir() { // which opening might wait for, as it does for a fifo
		return nil, &fs.PathError{Op: "open", Path: path, Err: errors.New("not a directory")}
	}
	root, err := openSourceDir(path)
	if err != nil {
		return nil, err
	}
	return scan(ctx, root, opts)
}

func scan(ctx context.Context, root sourceDir, opts *ScanOptions) (*Tree, error) {
	t := &Tree{spans: make(map[uint32][]span), maxTime: maxTime}
	if m := opts.MaxTime; m != nil {
		t.maxTime = min(max(*m, minTime), maxTime)
	}
	t.src = &source{tree: t, root: root, open: make(map[uint32]*openDir)}
	s := &scanner{ctx: ctx, opts: opts, tree: t, links: make(map[fileID]uint32), sets: make(map[string]uint32)}
	err := s.parseExclude()
	if err == nil {
		err = s.run()
	}
	if err != nil {
		t.Close()
		return nil, err
	}
	for _, p := range s.exclude {
		if !p.matched {
			s.warn("exclude pattern %q matches nothing", p.given)
		}
	}
	return t, nil
}

// exclusion is one of ScanOptions.Exclude.
type exclusion struct {
	given, pattern string
	anchored       bool // matched with the whole path
	matched        bool
}

func (s *scanner) parseExclude() error {
	for _, given := range s.opts.Exclude {
		p := exclusion{given: given, pattern: strings.TrimRight(strings.TrimPrefix(given, "./"), "/")}
		p.anchored = strings.Contains(p.pattern, "/") || strings.HasPrefix(given, "./")
		p.pattern = strings.TrimLeft(p.pattern, "/")
		if p.pattern == "" || p.pattern == "." {
			return fmt.Errorf("exclude pattern %q names nothing that could be left out", given)
		}
		if _, err := path.Match(p.pattern, ""); err != nil {
			return fmt.Errorf("exclude pattern %q: %w", given, err)
		}
		s.exclude = append(s.exclude, p)
	}
	return nil
}

type fileID struct{ dev, ino uint64 }

type scanner struct {
	ctx     context.Context
	opts    *ScanOptions
	tree    *Tree
	links   map[fileID]uint32 // inodes that have more than one name
	sets    map[string]uint32 // xattrSet.key -> inode.xattr
	exclude []exclusion
	pending []dir    // directories to be read, the next one last
	names   []dirent // names of the directory being read, reused
	buf     []byte   // for holes
}

func (s *scanner) run() error {
	t := s.tree
	st, err := t.src.root.lstat(".")
	if err != nil {
		return pathError("stat", ".", err)
	}
	n, err := s.inode(t.src.root, ".", "", &st)
	if err != nil {
		return err
	}
	n.links = 2
	// Directories are read in the order of a walk: what is near in the tree is
	// near on the disk.
	for s.pending = []dir{{inode: t.inodes.add(n)}}; len(s.pending) > 0; {
		d := s.pending[len(s.pending)-1]
		s.pending = s.pending[:len(s.pending)-1]
		first := len(s.pending)
		if err := s.readDir(d); err != nil {
			return err
		}
		slices.Reverse(s.pending[first:])
	}
	return nil
}

// readDir reads one directory: its names, then in their order what they name.
func (s *scanner) readDir(dr dir) error {
	t := s.tree
	if err := s.ctx.Err(); err != nil {
		return err
	}
	dr.first = uint32(t.entries.len())
	d := t.dirs.add(dr)
	t.inodes.at(dr.inode).ref = d
	rel := t.dirPath(d)
	src, err := t.src.acquire(d)
	if err != nil {
		return s.unreadable("open", rel, err)
	}
	defer t.src.release(d)

	// Names go to the arena as they come, and are sorted by their places.
	names := s.names[:0]
	err = src.readNames(func(name string) error {
		if len(name) > maxNameLen {
			return pathError("read", join(rel, name), fmt.Errorf("the name has %d bytes, and ext4 takes %d", len(name), maxNameLen))
		}
		if s.excluded(rel, name) {
			return nil
		}
		place, ok := t.names.add(name)
		if !ok {
			return pathError("read", rel, errTreeTooLarge)
		}
		names = append(names, dirent{name: place, len: uint8(len(name))})
		return nil
	})
	s.names = names
	if err != nil {
		return s.unreadable("read", rel, err)
	}
	slices.SortFunc(names, func(a, b dirent) int { return bytes.Compare(t.name(&a), t.name(&b)) })

	for i, e := range names {
		if err := s.ctx.Err(); err != nil && i%1024 == 0 {
			return err
		}
		if err := s.entry(src, d, rel, string(t.name(&e)), e); err != nil {
			return err
		}
	}
	t.dirs.at(d).count = uint32(t.entries.len()) - dr.first
	return nil
}

var errTreeTooLarge = errors.New("the tree has too many entries for ext4's 32-bit inode numbers")

// entry adds one name to the directory being read.
func (s *scanner) entry(src sourceDir, d uint32, rel, name string, e dirent) error {
	t := s.tree
	full := join(rel, name)
	st, err := src.lstat(name)
	if err != nil {
		return s.unreadable("stat", full, err)
	}
	if d == 0 && name == "lost+found" && st.mode&modeType != modeDir {
		return pathError("scan", full, errors.New("ext4 needs this name for a directory; leave it out with an exclude pattern"))
	}
	id := fileID{st.dev, st.ino}
	isDir := st.mode&modeType == modeDir
	if st.links > 1 && !isDir && st.ino != 0 {
		if i, ok := s.links[id]; ok {
			n := t.inodes.at(i)
			if n.links == maxLinks {
				return pathError("scan", full, fmt.Errorf("the file has over %d names, the most that ext4 takes", maxLinks))
			}
			n.links++
			e.inode = i
			t.entries.add(e)
			return nil
		}
	}
	if (isDir || st.mode&modeType == modeReg) && (s.opts.SkipUnreadable || st.mode&0o444 != 0o444) {
		// What anybody may read is not asked for; should it be unreadable all
		// the same, reading will tell.
		if err := src.readable(name, isDir); err != nil {
			return s.unreadable("open", full, err)
		}
	}
	n, err := s.inode(src, full, name, &st)
	if err != nil {
		return s.unreadable("read", full, err)
	}

	e.inode = uint32(t.inodes.len())
	switch {
	case isDir:
		n.links = 2
		s.pending = append(s.pending, dir{inode: e.inode, parent: d, entry: uint32(t.entries.len())})
		t.inodes.at(t.dirs.at(d).inode).links++
		if d == 0 && name == "lost+found" {
			t.lostFound = e.inode
		}
	case n.isSymlink():
		target, err := src.readlink(name)
		if err != nil {
			return s.unreadable("read", full, err)
		}
		place, ok := t.names.add(target)
		if !ok {
			return pathError("read", full, errTreeTooLarge)
		}
		n.ref, n.size = place, int64(len(target))
	case n.isRegular():
		n.ref = uint32(t.entries.len())
		if err := s.holes(src, name, &st, e.inode); err != nil {
			return s.unreadable("read", full, err)
		}
	}
	t.inodes.add(n)
	t.entries.add(e)
	if st.links > 1 && !isDir && st.ino != 0 {
		s.links[id] = e.inode
	}
	return nil
}

// holeGrain is what a hole is a multiple of: the smallest block there is.
const holeGrain = minBlockSize

// holes finds the holes of a regular file: the blocks without data, and in a
// file that has such blocks also those that are zero. Where the file system
// keeps blocks that were never written, it takes them for data or not as the
// page cache has it (Linux: SEEK_DATA), which must not make another disk.
func (s *scanner) holes(src sourceDir, name string, st *stat, i uint32) error {
	if !st.sparse || st.size == 0 {
		return nil
	}
	f, err := src.open(name)
	if err != nil {
		return err
	}
	defer f.close()
	spans, err := f.spans(st.size)
	if err != nil {
		return err
	}
	if s.buf == nil {
		s.buf = make([]byte, unitSize)
	}
	found := []span{}
	for _, data := range spans {
		off := data.off &^ (holeGrain - 1)
		if n := len(found); n > 0 {
			off = max(off, found[n-1].end)
		}
		for off < data.end {
			if err := s.ctx.Err(); err != nil {
				return err
			}
			n, err := f.ReadAt(s.buf[:min(int64(len(s.buf)), st.size-off)], off)
			if err != nil && err != io.EOF {
				return err
			}
			if n == 0 {
				break // the file shrinks, as Write will say
			}
			for b := s.buf[:n]; len(b) > 0; {
				grain := b[:min(holeGrain, len(b))]
				if !allZero(grain) {
					if k := len(found); k > 0 && found[k-1].end == off {
						found[k-1].end += int64(len(grain))
					} else {
						found = append(found, span{off, off + int64(len(grain))})
					}
				}
				off += int64(len(grain))
				b = b[len(grain):]
			}
		}
	}
	if len(found) != 1 || found[0] != (span{0, st.size}) {
		s.tree.spans[i] = found
	}
	return nil
}

var zeroes [holeGrain]byte

func allZero(b []byte) bool { return bytes.Equal(b, zeroes[:len(b)]) }

// inode makes the inode of an entry, with its xattrs.
func (s *scanner) inode(src sourceDir, full, name string, st *stat) (inode, error) {
	n := inode{
		sec: st.sec, nsec: st.nsec, id: st.id(), uid: st.uid, gid: st.gid, rdev: st.rdev, mode: st.mode, links: 1,
	}
	if n.isRegular() {
		n.size = st.size
	}
	if o := s.opts.Owner; o != nil {
		n.uid, n.gid = o.UID, o.GID
	}
	mask := uint16(0o7777)
	if s.opts.ModeMask != 0 {
		mask = s.opts.ModeMask
	}
	if !n.isSymlink() {
		n.mode &= modeType | mask
	}
	if n.sec < minTime || n.sec > maxTime && s.opts.MaxTime == nil {
		s.warn("%s: mtime %d s after 1970 is outside what ext4 holds (1901 to 2446); the nearest is taken", full, n.sec)
	}

	var set xattrSet
	if name == "" {
		name = "."
	}
	err := src.xattrs(name, func(x, value string) error {
		index, short, ok := splitXattr(x)
		if !ok {
			s.warn("%s: xattr %s is left out: ext4 has no such namespace", full, x)
			return nil
		}
		if index == xattrACLAccess || index == xattrACLDefault {
			var err error
			if value, err = aclToExt4(value, mask); err != nil {
				return fmt.Errorf("xattr %s: %w", x, err)
			}
		}
		set = append(set, xattr{index, short, value})
		return nil
	})
	if err != nil || len(set) == 0 {
		return n, err
	}
	set.sort()
	key := set.key()
	if n.xattr = s.sets[key]; n.xattr == 0 {
		s.tree.xattrs = append(s.tree.xattrs, set)
		n.xattr = uint32(len(s.tree.xattrs))
		s.sets[key] = n.xattr
	}
	return n, nil
}

func (s *scanner) excluded(rel, name string) bool {
	out := false
	for i := range s.exclude {
		p := &s.exclude[i]
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

// unreadable turns a failure at one entry into a warning if that is wanted.
func (s *scanner) unreadable(op, full string, err error) error {
	if ctxErr := s.ctx.Err(); ctxErr != nil {
		return ctxErr
	}
	if !s.opts.SkipUnreadable {
		return pathError(op, full, err)
	}
	s.warn("%s: left out: %v", full, err)
	return nil
}

func (s *scanner) warn(format string, args ...any) {
	if s.opts.Warn != nil {
		s.opts.Warn(fmt.Sprintf(format, args...))
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

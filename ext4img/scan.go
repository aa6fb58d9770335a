package ext4img

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"slices"
)

// ScanOptions change what a tree says of its sources. The zero value changes
// nothing.
type ScanOptions struct {
	// Owner, if not nil, owns everything.
	Owner *Owner
	// UIDMap and GIDMap, if not empty, give everything, ACLs included, other
	// owners. An id that is in no map is an error. Owner comes before them.
	UIDMap, GIDMap []IDMap
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
	// SkipUnreadable leaves out what cannot be read of a directory, and calls
	// Warn for it, where otherwise the scan would fail.
	SkipUnreadable bool
	// MaxEntries bounds what the archives among the sources may make: names,
	// directories on the way to them, parts of files with holes, and each 256
	// bytes of xattrs and symlinks. 0: 4,194,304, which take about 800 MiB of
	// memory. More is an error that matches ErrTooManyEntries.
	MaxEntries int64
	// Warn, if not nil, is told of what could not be kept: text about one
	// path, without a newline.
	Warn func(text string)
}

// Owner is the owner of a file.
type Owner struct{ UID, GID uint32 }

// IDMap maps Count ids from From on to as many from To on, as a line of the
// uid_map of a user namespace does.
type IDMap struct{ From, To, Count uint32 }

var errUnmapped = errors.New("is in no id map")

func checkIDMaps(maps []IDMap) error {
	for i, m := range maps {
		if m.Count == 0 || m.From > math.MaxUint32-m.Count || m.To > math.MaxUint32-m.Count {
			return fmt.Errorf("id map %d:%d:%d: expected a count above 0, and ids below 4294967295", m.From, m.To, m.Count)
		}
		for _, o := range maps[:i] {
			if m.From < o.From+o.Count && o.From < m.From+m.Count {
				return fmt.Errorf("id maps %d:%d:%d and %d:%d:%d map the same ids", o.From, o.To, o.Count, m.From, m.To, m.Count)
			}
		}
	}
	return nil
}

// mapID returns what an id is mapped to; ok is false for one that is in no map.
func mapID(maps []IDMap, id uint32) (to uint32, ok bool) {
	for _, m := range maps {
		if id >= m.From && id-m.From < m.Count {
			return m.To + (id - m.From), true
		}
	}
	return id, len(maps) == 0
}

// Times that an inode can hold.
const (
	minTime = -1 << 31
	maxTime = 1<<34 - 1<<31 - 1
)

// Source is a part of what a tree is made of: what Dir and its like return.
type Source interface {
	// lay adds what the source has to a tree.
	lay(b *builder) error
}

// SourceError is an error about one of the sources of a tree.
type SourceError struct {
	Index int // of the source, in what Merge was given
	Err   error
}

func (e *SourceError) Error() string { return e.Err.Error() }
func (e *SourceError) Unwrap() error { return e.Err }

// ErrTooManyEntries says that an archive makes more than ScanOptions.MaxEntries.
var ErrTooManyEntries = errors.New("too many entries")

var errTreeTooLarge = errors.New("the tree has too many entries for ext4's 32-bit inode numbers")

// Scan reads the tree below the directory at path, without the content of its
// files. The path itself may be a symlink to a directory; symlinks below are
// kept and never followed. Close the tree when it is no longer needed.
//
// Errors name the path of the entry, below path, in a *fs.PathError.
func Scan(ctx context.Context, path string, opts *ScanOptions) (*Tree, error) {
	return Merge(ctx, []Source{Dir(path)}, opts)
}

// maxSources is what inode.src can tell apart.
const maxSources = 1 << 16

// Merge makes one tree of several sources, laid one over another in their
// order, without the content of files. A directory over a directory merges
// with it, and has its own owner, mode, times and xattrs then, the root
// included; anything else replaces what had its name. Close the tree when it
// is no longer needed; sources that are read from what the caller has opened
// (Tar, FS) have to stay until then.
//
// Errors are *SourceError, and name the path of the entry, below its source, in
// a *fs.PathError.
func Merge(ctx context.Context, sources []Source, opts *ScanOptions) (*Tree, error) {
	if opts == nil {
		opts = &ScanOptions{}
	}
	if len(sources) == 0 || len(sources) > maxSources {
		return nil, fmt.Errorf("%d sources: expected 1 to %d", len(sources), maxSources)
	}
	b, err := newBuilder(ctx, opts)
	if err != nil {
		return nil, err
	}
	for i, s := range sources {
		b.src = uint16(i)
		if err := s.lay(b); err != nil {
			b.tree.Close()
			return nil, &SourceError{i, err}
		}
	}
	if err := b.finish(); err != nil {
		b.tree.Close()
		return nil, err
	}
	b.warnUnmatched(b.exclude)
	return b.tree, nil
}

// Dir is the tree below the directory at path, which may be a symlink to a
// directory; symlinks below are kept and never followed. exclude are patterns
// as those of ScanOptions, for this source alone.
func Dir(path string, exclude ...string) Source { return &dirSource{path: path, exclude: exclude} }

type dirSource struct {
	path    string
	exclude []string
}

func (s *dirSource) lay(b *builder) error {
	fi, err := os.Stat(s.path)
	if err != nil {
		return err
	}
	if !fi.IsDir() { // which opening might wait for, as it does for a fifo
		return &fs.PathError{Op: "open", Path: s.path, Err: errors.New("not a directory")}
	}
	exclude, err := parseExclude(s.exclude)
	if err != nil {
		return err
	}
	root, err := openSourceDir(s.path)
	if err != nil {
		return err
	}
	return layDir(b, root, exclude)
}

type fileID struct{ dev, ino uint64 }

// scanner lays a directory into a tree.
type scanner struct {
	*builder
	c       *dirContent
	exclude []exclusion       // of this source alone
	links   map[fileID]uint32 // inodes that have more than one name
	names   []foundDir        // in the directory being read, reused
}

// layDir lays the tree below root, which it closes with the tree.
func layDir(b *builder, root sourceDir, exclude []exclusion) error {
	s := &scanner{builder: b, c: newDirContent(root, &b.tree.names), exclude: exclude, links: make(map[fileID]uint32)}
	b.addContent(s.c)
	st, err := root.lstat(".")
	if err != nil {
		return pathError("stat", ".", err)
	}
	n, err := s.inodeOf(root, ".", ".", &st)
	if err != nil {
		return pathError("read", ".", err)
	}
	b.replaceDir(0, n)
	b.hasRoot = true
	// Directories are read in the order of a walk: what is near in the tree is
	// near on the disk.
	for pending := []foundInode{{}}; len(pending) > 0; {
		d := pending[len(pending)-1]
		pending = pending[:len(pending)-1]
		waiting := len(pending)
		if pending, err = s.readDir(d, pending); err != nil {
			return err
		}
		slices.Reverse(pending[waiting:])
	}
	b.warnUnmatched(exclude)
	return nil
}

// foundInode is a directory of the source and what it is in the tree.
type foundInode struct{ dir, inode uint32 }

// readDir reads one directory: its names, then in their order what they name.
// It adds the directories among that to pending.
func (s *scanner) readDir(d foundInode, pending []foundInode) ([]foundInode, error) {
	t := s.tree
	if err := s.ctx.Err(); err != nil {
		return nil, err
	}
	rel := s.c.path(d.dir)
	src, err := s.c.acquire(d.dir)
	if err != nil {
		return pending, s.unreadable("open", rel, err)
	}
	defer s.c.release(d.dir)

	// Names go to the arena as they come, and are sorted by their places.
	names := s.names[:0]
	err = src.readNames(func(name string) error {
		if len(name) > maxNameLen {
			return pathError("read", join(rel, name), fmt.Errorf("the name has %d bytes, and ext4 takes %d", len(name), maxNameLen))
		}
		if out := excluded(s.builder.exclude, rel, name); excluded(s.exclude, rel, name) || out {
			return nil
		}
		place, ok := t.names.add(name)
		if !ok {
			return pathError("read", rel, errTreeTooLarge)
		}
		names = append(names, foundDir{d.dir, place, uint8(len(name))})
		return nil
	})
	s.names = names
	if err != nil {
		return pending, s.unreadable("read", rel, err)
	}
	get := func(n *foundDir) []byte { return t.names.get(n.name, int(n.len)) }
	slices.SortFunc(names, func(a, b foundDir) int { return bytes.Compare(get(&a), get(&b)) })

	for i := range names {
		if err := s.ctx.Err(); err != nil && i%1024 == 0 {
			return nil, err
		}
		name := string(get(&names[i]))
		isDir, inode, err := s.entry(src, d.inode, rel, name, &names[i])
		if err != nil {
			return nil, err
		}
		if isDir {
			pending = append(pending, foundInode{s.c.dirs.add(names[i]), inode})
		}
	}
	return pending, nil
}

// entry adds one name to the directory of the tree that is being read.
func (s *scanner) entry(src sourceDir, dir uint32, rel, name string, found *foundDir) (isDir bool, i uint32, err error) {
	full := join(rel, name)
	st, err := src.lstat(name)
	if err != nil {
		return false, 0, s.unreadable("stat", full, err)
	}
	id := fileID{st.dev, st.ino}
	isDir = st.mode&modeType == modeDir
	place, ok := s.find(dir, name)
	if !ok {
		if s.slots.len() == math.MaxInt32 {
			return false, 0, pathError("read", full, errTreeTooLarge)
		}
		place = s.newSlot(dir, found.name, found.len)
	}
	if st.links > 1 && !isDir && st.ino != 0 {
		if i, ok := s.links[id]; ok {
			s.link(place, i)
			return false, i, nil
		}
	}
	if (isDir || st.mode&modeType == modeReg) && (s.opts.SkipUnreadable || st.mode&0o444 != 0o444) {
		// What anybody may read is not asked for; should it be unreadable all
		// the same, reading will tell.
		if err := src.readable(name, isDir); err != nil {
			return false, 0, s.unreadable("open", full, err)
		}
	}
	n, err := s.inodeOf(src, full, name, &st)
	if err != nil {
		return false, 0, s.unreadable("read", full, err)
	}
	var spans []span
	switch {
	case n.isSymlink():
		target, err := src.readlink(name)
		if err == nil {
			err = s.setTarget(&n, target)
		}
		if err != nil {
			return false, 0, s.unreadable("read", full, err)
		}
	case n.isRegular():
		n.rdev, n.ref, n.len = found.parent, found.name, found.len
		if st.sparse && st.size > 0 {
			if spans, err = s.holesOf(src, name, st.size); err != nil {
				return false, 0, s.unreadable("read", full, err)
			}
		}
	}
	i = s.put(place, n)
	if spans != nil {
		s.tree.spans[i] = spans
	}
	if st.links > 1 && !isDir && st.ino != 0 {
		s.links[id] = i
	}
	return isDir, i, nil
}

// holesOf finds the holes of a regular file that has such.
func (s *scanner) holesOf(src sourceDir, name string, size int64) ([]span, error) {
	f, err := src.open(name)
	if err != nil {
		return nil, err
	}
	defer f.close()
	data, err := f.spans(size)
	if err != nil {
		return nil, err
	}
	return s.findData(f, size, data)
}

func (s *scanner) inodeOf(src sourceDir, full, name string, st *stat) (inode, error) {
	return s.inode(full, st, func(fn func(name, value string) error) error { return src.xattrs(name, fn) })
}

// unreadable turns a failure at one entry into a warning if that is wanted.
func (s *scanner) unreadable(op, full string, err error) error {
	if ctxErr := s.ctx.Err(); ctxErr != nil {
		return ctxErr
	}
	if !s.opts.SkipUnreadable || errors.Is(err, errUnmapped) {
		return pathError(op, full, err)
	}
	s.warn("%s: left out: %v", full, err)
	return nil
}

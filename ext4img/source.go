package ext4img

import (
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
)

// sourceDir is an open directory of a source. Names are single path elements;
// symlinks are never followed. Its methods are safe for concurrent use.
type sourceDir interface {
	// readNames calls fn with every name but "." and "..", in any order.
	readNames(fn func(name string) error) error
	lstat(name string) (stat, error)
	readlink(name string) (string, error)
	// xattrs calls fn with every xattr of an entry.
	xattrs(name string, fn func(name, value string) error) error
	// readable says whether a regular file or directory could be read.
	readable(name string, isDir bool) error
	openDir(name string) (sourceDir, error)
	open(name string) (sourceFile, error)
	close() error
}

// sourceFile is an open regular file of a source.
type sourceFile interface {
	io.ReaderAt
	// stat returns errNoStat if the file is part of something that has not
	// changed.
	stat() (stat, error)
	// spans returns the runs of data of a file of that size, ascending.
	spans(size int64) ([]span, error)
	// kernelFile returns the file for a copy inside the kernel, or nil. It is
	// closed with the sourceFile.
	kernelFile() *os.File
	close() error
}

var errNoStat = errors.New("no stat")

// stat is what a source knows of an entry.
type stat struct {
	mode     uint16
	uid, gid uint32
	links    uint32
	rdev     uint32
	size     int64
	sec      int64
	nsec     uint32
	dev, ino uint64 // identity; ino is 0 where there is none
	csec     int64  // ctime; 0 where there is none
	cnsec    uint32
	sparse   bool // the file has holes
}

// id is another number for another file, and for the same file once anything
// of it has changed, as far as the system tells.
func (s *stat) id() uint64 {
	h := uint64(14695981039346656037)
	for _, v := range [...]uint64{s.dev, s.ino, uint64(s.csec), uint64(s.cnsec), uint64(s.sec), uint64(s.nsec)} {
		h = (h ^ v) * 1099511628211
		h ^= h >> 32
	}
	return h
}

// content is where the files of a source are read from. It is safe for
// concurrent use.
type content interface {
	// open opens a regular file of the source.
	open(n *inode) (sourceFile, error)
	close() error
}

// dirContent opens files below a directory. A file's rdev is its directory,
// ref and len its name, id its stat.id. The directories used last stay open,
// so that files are opened by one path element.
type dirContent struct {
	root  sourceDir
	names *arena
	dirs  chunks[foundDir] // 0 is the root

	mu   sync.Mutex
	used map[uint32]*openDir
	use  uint64 // clock for openDir.used
}

// foundDir is a directory of a source.
type foundDir struct {
	parent uint32 // index into dirContent.dirs
	name   uint32 // place in the arena
	len    uint8
}

type openDir struct {
	dir   sourceDir
	users int
	used  uint64
}

// maxOpenDirs bounds the descriptors that a source keeps.
const maxOpenDirs = 64

func newDirContent(root sourceDir, names *arena) *dirContent {
	c := &dirContent{root: root, names: names, used: make(map[uint32]*openDir)}
	c.dirs.add(foundDir{})
	return c
}

func (c *dirContent) open(n *inode) (sourceFile, error) {
	dir, err := c.acquire(n.rdev)
	if err != nil {
		return nil, err
	}
	f, err := dir.open(string(c.names.get(n.ref, int(n.len))))
	if err != nil {
		c.release(n.rdev)
		return nil, err
	}
	return &dirFile{f, c, n.rdev}, nil
}

// dirFile is a file and holds the directory that it was opened in.
type dirFile struct {
	sourceFile
	c   *dirContent
	dir uint32
}

func (f *dirFile) close() error {
	defer f.c.release(f.dir)
	return f.sourceFile.close()
}

// path returns the path of a directory, slash-separated, relative to the root,
// which is ".".
func (c *dirContent) path(d uint32) string {
	if d == 0 {
		return "."
	}
	var parts []string
	for ; d != 0; d = c.dirs.at(d).parent {
		parts = append(parts, c.name(d))
	}
	slices.Reverse(parts)
	return strings.Join(parts, "/")
}

func (c *dirContent) name(d uint32) string {
	f := c.dirs.at(d)
	return string(c.names.get(f.name, int(f.len)))
}

// acquire returns the directory with that index. The caller releases it.
func (c *dirContent) acquire(d uint32) (sourceDir, error) {
	if d == 0 {
		return c.root, nil
	}
	c.mu.Lock()
	if o := c.used[d]; o != nil {
		o.users++
		c.use++
		o.used = c.use
		c.mu.Unlock()
		return o.dir, nil
	}
	c.mu.Unlock()

	parent := c.dirs.at(d).parent
	pd, err := c.acquire(parent)
	if err != nil {
		return nil, err
	}
	defer c.release(parent)
	opened, err := pd.openDir(c.name(d))
	if err != nil {
		return nil, err
	}

	c.mu.Lock()
	defer c.mu.Unlock()
	c.use++
	if o := c.used[d]; o != nil { // opened by another goroutine meanwhile
		opened.close()
		o.users++
		o.used = c.use
		return o.dir, nil
	}
	if len(c.used) >= maxOpenDirs {
		c.evict()
	}
	c.used[d] = &openDir{dir: opened, users: 1, used: c.use}
	return opened, nil
}

// evict closes the directory that has been idle the longest.
func (c *dirContent) evict() {
	var oldest *openDir
	var key uint32
	for d, o := range c.used {
		if o.users == 0 && (oldest == nil || o.used < oldest.used) {
			oldest, key = o, d
		}
	}
	if oldest != nil {
		oldest.dir.close()
		delete(c.used, key)
	}
}

func (c *dirContent) release(d uint32) {
	if d == 0 {
		return
	}
	c.mu.Lock()
	c.used[d].users--
	c.mu.Unlock()
}

func (c *dirContent) close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for d, o := range c.used {
		o.dir.close()
		delete(c.used, d)
	}
	return c.root.close()
}

package ext4img

import (
	"io"
	"os"
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
	stat() (stat, error)
	// spans returns the runs of data of a file of that size, ascending.
	spans(size int64) ([]span, error)
	// kernelFile returns the file for a copy inside the kernel, or nil. It is
	// closed with the sourceFile.
	kernelFile() *os.File
	close() error
}

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
	for _, v := range [...]uint64{s.dev, s.ino, uint64(s.csec), uint64(s.cnsec)} {
		h = (h ^ v) * 1099511628211
		h ^= h >> 32
	}
	return h
}

// source opens directories of the tree by index and keeps the last used ones
// open, so that files are opened by one path element.
type source struct {
	tree *Tree
	root sourceDir

	mu   sync.Mutex
	open map[uint32]*openDir
	use  uint64 // clock for openDir.used
}

type openDir struct {
	dir   sourceDir
	users int
	used  uint64
}

// maxOpenDirs bounds the descriptors that a source keeps.
const maxOpenDirs = 64

// acquire returns the directory with that index. The caller releases it.
func (s *source) acquire(d uint32) (sourceDir, error) {
	if d == 0 {
		return s.root, nil
	}
	s.mu.Lock()
	if o := s.open[d]; o != nil {
		o.users++
		s.use++
		o.used = s.use
		s.mu.Unlock()
		return o.dir, nil
	}
	s.mu.Unlock()

	parent := s.tree.dirs.at(d).parent
	pd, err := s.acquire(parent)
	if err != nil {
		return nil, err
	}
	defer s.release(parent)
	opened, err := pd.openDir(string(s.tree.name(s.tree.entries.at(s.tree.dirs.at(d).entry))))
	if err != nil {
		return nil, err
	}

	s.mu.Lock()
	defer s.mu.Unlock()
	s.use++
	if o := s.open[d]; o != nil { // opened by another goroutine meanwhile
		opened.close()
		o.users++
		o.used = s.use
		return o.dir, nil
	}
	if len(s.open) >= maxOpenDirs {
		s.evict()
	}
	s.open[d] = &openDir{dir: opened, users: 1, used: s.use}
	return opened, nil
}

// evict closes the directory that has been idle the longest.
func (s *source) evict() {
	var oldest *openDir
	var key uint32
	for d, o := range s.open {
		if o.users == 0 && (oldest == nil || o.used < oldest.used) {
			oldest, key = o, d
		}
	}
	if oldest != nil {
		oldest.dir.close()
		delete(s.open, key)
	}
}

func (s *source) release(d uint32) {
	if d == 0 {
		return
	}
	s.mu.Lock()
	s.open[d].users--
	s.mu.Unlock()
}

func (s *source) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for d, o := range s.open {
		o.dir.close()
		delete(s.open, d)
	}
	return s.root.close()
}

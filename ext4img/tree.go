package ext4img

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"slices"
	"strings"
)

// Tree is what sources hold, without content: the result of Scan or Merge. It
// is immutable and safe for concurrent use, except for Close.
//
// It takes about 100 bytes an entry besides the names.
type Tree struct {
	sources []content      // inode.src is an index
	inodes  chunks[inode]  // in the order of their numbers; 0 is the root directory
	entries chunks[dirent] // directory by directory, each sorted by name
	dirs    chunks[dir]    // parents before children; 0 is the root directory
	names   arena          // names and symlink targets
	spans   map[uint32][]span
	xattrs  []xattrSet // the distinct sets; inode.xattr-1 is an index

	maxTime   int64  // ScanOptions.MaxTime, or the latest time there is
	lostFound uint32 // inode of the source's own top-level lost+found, 0 if it has none
}

// inode is one file of the tree, whatever the number of its names.
type inode struct {
	size  int64 // regular file: bytes; symlink: length of the target
	sec   int64 // mtime of the source, seconds since 1970; Tree.mtime tells what is stored
	nsec  uint32
	id    uint64 // regular file: what its source knows it by
	uid   uint32
	gid   uint32
	rdev  uint32 // device numbers, as new_encode_dev packs them; regular file: its source's
	links uint32
	xattr uint32 // index into Tree.xattrs, plus 1
	// ref is the place of the target in the arena (symlink), the index into
	// Tree.dirs (directory), or what the source makes of it (regular file).
	ref  uint32
	mode uint16 // i_mode: type and permissions
	src  uint16 // regular file: index into Tree.sources
	len  uint8  // regular file: its source's
}

func (n *inode) isDir() bool     { return n.mode&modeType == modeDir }
func (n *inode) isRegular() bool { return n.mode&modeType == modeReg }
func (n *inode) isSymlink() bool { return n.mode&modeType == modeLink }

// dirent is one name.
type dirent struct {
	name  uint32 // place in the arena
	inode uint32
	len   uint8
}

// dir is a directory: count entries from first on.
type dir struct {
	inode  uint32
	parent uint32 // index into Tree.dirs; the root is its own parent
	first  uint32
	count  uint32
	entry  uint32 // the entry that names the directory; unused for the root
}

// span is a run of data in a file with holes, in bytes.
type span struct{ off, end int64 }

// Close releases what Scan and Merge opened. The tree cannot be written after
// it.
func (t *Tree) Close() error {
	var errs []error
	for _, c := range t.sources {
		errs = append(errs, c.close())
	}
	t.sources = nil
	return errors.Join(errs...)
}

// Entries returns the number of files, directories and other things in the
// tree, hard links counted once.
func (t *Tree) Entries() int64 { return int64(t.inodes.len()) }

// Bytes returns the sum of the sizes of the regular files, holes not counted.
func (t *Tree) Bytes() int64 {
	var sum int64
	for i := range t.inodes.len() {
		for _, s := range t.dataSpans(uint32(i)) {
			sum += s.end - s.off
		}
	}
	return sum
}

// dataSpans returns the runs of data of a regular file, ascending; nil for
// anything else.
func (t *Tree) dataSpans(i uint32) []span {
	n := t.inodes.at(i)
	if !n.isRegular() || n.size == 0 {
		return nil
	}
	if s, ok := t.spans[i]; ok {
		return s
	}
	return []span{{0, n.size}}
}

func (t *Tree) name(e *dirent) []byte { return t.names.get(e.name, int(e.len)) }

func (t *Tree) target(n *inode) []byte { return t.names.get(n.ref, int(n.size)) }

// mtime returns the time that is stored for an inode: ext4 holds 34 bits of
// seconds, from 1901-12-13 to 2446-05-10 (kernel:
// Documentation/filesystems/ext4/inodes.rst, "Inode Timestamps").
func (t *Tree) mtime(n *inode) (sec int64, nsec uint32) {
	switch {
	case n.sec < minTime:
		return minTime, 0
	case n.sec > t.maxTime:
		return t.maxTime, 0
	}
	return n.sec, n.nsec
}

// dirPath returns the path of a directory, slash-separated, relative to the
// root, which is ".".
func (t *Tree) dirPath(d uint32) string {
	if d == 0 {
		return "."
	}
	var parts []string
	for ; d != 0; d = t.dirs.at(d).parent {
		parts = append(parts, string(t.name(t.entries.at(t.dirs.at(d).entry))))
	}
	slices.Reverse(parts)
	return strings.Join(parts, "/")
}

// path returns the path of anything in the tree, by its first name. It looks
// at all entries; it is for messages.
func (t *Tree) path(i uint32) string {
	if n := t.inodes.at(i); n.isDir() {
		return t.dirPath(n.ref)
	}
	for d := range t.dirs.len() {
		dr := t.dirs.at(uint32(d))
		for e := dr.first; e < dr.first+dr.count; e++ {
			if t.entries.at(e).inode == i {
				return join(t.dirPath(uint32(d)), string(t.name(t.entries.at(e))))
			}
		}
	}
	return "."
}

// pathOfXattrs returns the path of the first file that has a set of xattrs.
func (t *Tree) pathOfXattrs(xattr uint32) string {
	for i := range t.inodes.len() {
		if t.inodes.at(uint32(i)).xattr == xattr {
			return t.path(uint32(i))
		}
	}
	return "."
}

// digest returns a hash of everything that the tree says: two trees with the
// same names, metadata, sizes and holes have the same digest.
func (t *Tree) digest(salt string) [32]byte {
	h := sha256.New()
	w := bufio.NewWriterSize(h, 1<<16) // a hash never fails to take what it is given
	var b []byte
	w.WriteString(salt)
	for i := range t.inodes.len() {
		n := t.inodes.at(uint32(i))
		b = binary.LittleEndian.AppendUint64(b[:0], uint64(n.size))
		sec, nsec := t.mtime(n)
		b = binary.LittleEndian.AppendUint64(b, uint64(sec))
		rdev := n.rdev
		if n.isRegular() {
			rdev = 0
		}
		for _, v := range [...]uint32{nsec, n.uid, n.gid, rdev, n.links, n.xattr, uint32(n.mode)} {
			b = binary.LittleEndian.AppendUint32(b, v)
		}
		w.Write(b)
		if n.isSymlink() {
			w.Write(t.target(n))
		}
		for _, s := range t.spans[uint32(i)] {
			b = binary.LittleEndian.AppendUint64(b[:0], uint64(s.off))
			b = binary.LittleEndian.AppendUint64(b, uint64(s.end))
			w.Write(b)
		}
	}
	for i := range t.entries.len() {
		e := t.entries.at(uint32(i))
		b = binary.LittleEndian.AppendUint32(b[:0], e.inode)
		w.Write(append(b, e.len))
		w.Write(t.name(e))
	}
	for i := range t.dirs.len() {
		d := t.dirs.at(uint32(i))
		b = binary.LittleEndian.AppendUint32(b[:0], d.inode)
		b = binary.LittleEndian.AppendUint32(b, d.count)
		w.Write(b)
	}
	for _, set := range t.xattrs {
		for _, x := range set {
			b = append(b[:0], x.index)
			b = binary.LittleEndian.AppendUint32(b, uint32(len(x.name)))
			b = append(b, x.name...)
			b = binary.LittleEndian.AppendUint32(b, uint32(len(x.value)))
			w.Write(b)
			w.WriteString(x.value)
		}
		w.WriteByte(0xff)
	}
	w.Flush()
	return [32]byte(h.Sum(nil))
}

// chunks is a slice that grows without being copied, so that a large tree is
// never in memory twice.
type chunks[T any] struct {
	c [][]T
	n int
}

const chunkLen = 1 << 12

func (s *chunks[T]) len() int { return s.n }

func (s *chunks[T]) at(i uint32) *T { return &s.c[i/chunkLen][i%chunkLen] }

// truncate forgets all but the first n.
func (s *chunks[T]) truncate(n int) {
	s.c = s.c[:(n+chunkLen-1)/chunkLen]
	if rest := n % chunkLen; rest > 0 {
		s.c[len(s.c)-1] = s.c[len(s.c)-1][:rest]
	}
	s.n = n
}

func (s *chunks[T]) add(v T) uint32 {
	if s.n%chunkLen == 0 {
		s.c = append(s.c, make([]T, 0, chunkLen))
	}
	last := len(s.c) - 1
	s.c[last] = append(s.c[last], v)
	s.n++
	return uint32(s.n - 1)
}

// arena holds byte strings of up to arenaChunk bytes each, one behind another.
type arena struct {
	c [][]byte
}

const arenaChunk = 1 << 16

// arenaChunks is how many chunks an arena's 32-bit places can tell apart.
const arenaChunks = 1 << 16

// add stores b and returns its place; ok is false when the arena is full.
func (a *arena) add(b string) (place uint32, ok bool) {
	last := len(a.c) - 1
	if last < 0 || len(a.c[last])+len(b) > arenaChunk {
		if len(a.c) == arenaChunks {
			return 0, false
		}
		a.c = append(a.c, make([]byte, 0, arenaChunk))
		last++
	}
	off := len(a.c[last])
	a.c[last] = append(a.c[last], b...)
	return uint32(last*arenaChunk + off), true
}

func (a *arena) get(place uint32, n int) []byte {
	c, off := a.c[place/arenaChunk], place%arenaChunk
	return c[off : int(off)+n]
}

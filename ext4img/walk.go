package ext4img

import (
	"fmt"
	"iter"
)

// maxWalkPath is the longest path that Walk goes on below: far more than
// programs can name, so that a damaged tree does not fill memory.
const maxWalkPath = 64 << 10

// WalkEntry is a file that Walk found.
type WalkEntry struct {
	Dirent
	Path   string // from the directory that the walk began with, names joined by slashes
	Parent Ino    // the directory that has the entry
}

// Walk returns everything below a directory, each directory before what is in
// it, otherwise in the order in which the entries lie. Symlinks are not
// followed. What cannot be read is an error in their midst, with the path of
// the directory, and the rest follows. A directory that has two names is an
// error at the second, so that the walk has an end whatever the image holds.
// Memory grows with the subdirectories of the directories on one path, and by
// a bit for each inode.
func (f *FS) Walk(dir Ino) iter.Seq2[WalkEntry, error] {
	return func(yield func(WalkEntry, error) bool) {
		w := &walker{f, inodeSet{}, nil, yield}
		w.seen.add(dir)
		w.dir(dir)
	}
}

type walker struct {
	fs    *FS
	seen  inodeSet // directories
	path  []byte   // of the directory, with a slash at its end
	yield func(WalkEntry, error) bool
}

// fail yields an error about a directory, or one of its entries.
func (w *walker) fail(dir Ino, name string, err error) bool {
	path := string(w.path) + name
	return w.yield(WalkEntry{Path: path, Parent: dir}, fmt.Errorf("%q: %w", "/"+path, err))
}

// dir walks a directory; it returns false to stop.
func (w *walker) dir(ino Ino) bool {
	n, err := w.fs.dir(ino)
	if err != nil {
		return w.fail(ino, "", err)
	}
	// Directories come behind the other entries, so that no entries are held
	// but theirs.
	more := true
	var dirs []Dirent
	w.fs.eachEntry(n, func(d Dirent, err error) bool {
		switch {
		case err != nil:
			more = w.fail(ino, "", err)
		case w.isDir(d):
			dirs = append(dirs, d)
		default:
			more = w.yield(WalkEntry{d, string(w.path) + d.Name, ino}, nil)
		}
		return more
	})
	for _, d := range dirs {
		if !more {
			return false
		}
		more = w.subdir(ino, d)
	}
	return more
}

// isDir reports whether an entry is a directory, which an entry without a type
// leaves to the inode.
func (w *walker) isDir(d Dirent) bool {
	if d.Type != TypeUnknown {
		return d.Type == TypeDir
	}
	n, err := w.fs.Inode(d.Ino)
	return err == nil && n.IsDir()
}

func (w *walker) subdir(parent Ino, d Dirent) bool {
	if !w.seen.add(d.Ino) {
		return w.fail(parent, d.Name, place{"directory", d.Ino, -1}.corrupt("", "has two names"))
	}
	if !w.yield(WalkEntry{d, string(w.path) + d.Name, parent}, nil) {
		return false
	}
	length := len(w.path)
	if length+len(d.Name)+1 > maxWalkPath {
		return w.fail(parent, d.Name, place{"directory", d.Ino, -1}.corrupt("", "its path has more than %d bytes", maxWalkPath))
	}
	w.path = append(append(w.path, d.Name...), '/')
	more := w.dir(d.Ino)
	w.path = w.path[:length]
	return more
}

// inodeSet is a set of inode numbers: a bitmap of the parts that have any.
type inodeSet map[Ino]*[inodeSetPart / 64]uint64

const inodeSetPart = 4096

// add adds a number, and reports whether it was not there.
func (s inodeSet) add(ino Ino) bool {
	part := s[ino/inodeSetPart]
	if part == nil {
		part = new([inodeSetPart / 64]uint64)
		s[ino/inodeSetPart] = part
	}
	word, bit := &part[ino%inodeSetPart/64], uint64(1)<<(ino%64)
	was := *word&bit != 0
	*word |= bit
	return !was
}

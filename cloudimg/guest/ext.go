package guest

import (
	"iter"

	"qimg/ext4img"
	"qimg/qcow2/blockdev"
)

// extFS is ext2, ext3 and ext4.
type extFS struct{ fs *ext4img.FS }

// Ext returns a file system that was opened by package ext4img.
func Ext(fsys *ext4img.FS) FS { return extFS{fsys} }

func extFile(n *ext4img.Inode) *File {
	f := &File{
		Ino: uint64(n.Ino), Mode: n.Mode, UID: n.UID, GID: n.GID, Size: n.Size, Links: uint32(n.Links), Blocks: n.Blocks,
		Atime: n.Atime, Ctime: n.Ctime, Mtime: n.Mtime, Crtime: n.Crtime, own: n,
	}
	f.Major, f.Minor = n.Rdev()
	return f
}

// Inode returns the inode of a file of an ext file system, nil for others.
func (f *File) Inode() *ext4img.Inode {
	n, _ := f.own.(*ext4img.Inode)
	return n
}

func (e extFS) Lookup(path string, follow bool) (*File, error) {
	ino, err := e.fs.Resolve(path, follow)
	if err != nil {
		return nil, err
	}
	return e.file(ino)
}

func (e extFS) file(ino ext4img.Ino) (*File, error) {
	n, err := e.fs.Inode(ino)
	if err != nil {
		return nil, err
	}
	return extFile(n), nil
}

// extTypes are the types of files by ext4img.FileType.
var extTypes = [...]uint16{0, ModeRegular, ModeDir, ModeChar, ModeBlock, ModeFifo, ModeSocket, ModeSymlink}

func (e extFS) Entries(dir *File) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		for d, err := range e.fs.Entries(dir.Inode().Ino) {
			entry := Entry{Name: d.Name, own: d.Ino}
			if int(d.Type) < len(extTypes) {
				entry.Type = extTypes[d.Type]
			}
			if !yield(entry, err) {
				return
			}
		}
	}
}

func (e extFS) Child(_ *File, entry *Entry) (*File, error) { return e.file(entry.own.(ext4img.Ino)) }

func (e extFS) Readlink(f *File) (string, error) { return e.fs.Readlink(f.Inode().Ino) }

func (e extFS) Content(f *File) (Content, error) {
	c, err := e.fs.File(f.Inode().Ino)
	if err != nil {
		return nil, err
	}
	return extContent{c}, nil
}

type extContent struct{ *ext4img.File }

func (extContent) Close() error { return nil }

var _ blockdev.ExtentReader = extContent{}

func (e extFS) Xattrs(f *File) iter.Seq2[Xattr, error] {
	return func(yield func(Xattr, error) bool) {
		for x, err := range e.fs.Xattrs(f.Inode().Ino) {
			if !yield(Xattr(x), err) {
				return
			}
		}
	}
}

package guest

import (
	"errors"
	"iter"
	"time"

	"qimg/qcow2/blockdev"
)

// The type of a file in its mode, in the numbers of Linux.
const (
	ModeType    = 0xf000
	ModeFifo    = 0x1000
	ModeChar    = 0x2000
	ModeDir     = 0x4000
	ModeBlock   = 0x6000
	ModeRegular = 0x8000
	ModeSymlink = 0xa000
	ModeSocket  = 0xc000
)

var (
	// ErrUnsupported: the files of this kind of file system are not read.
	ErrUnsupported = errors.New("its files cannot be read")
	// ErrNoFileSystem: nothing was found that is known.
	ErrNoFileSystem = errors.New("no file system was found")
	// ErrAmbiguous: there are several file systems, and which one is meant was
	// not said.
	ErrAmbiguous = errors.New("there are several file systems")
)

// FS is a file system of a guest whose files are read. Errors about paths are
// those of io/fs where it has some.
type FS interface {
	// Lookup returns the file that a path leads to, from the root directory on,
	// with or without a slash at its beginning. Symlinks on the way are followed
	// inside the file system, 40 at most; follow says whether one at the end is.
	Lookup(path string, follow bool) (*File, error)
	// Entries returns the entries of a directory in the order in which they lie
	// there, without "." and "..". What cannot be read is an error in their
	// midst, and the others follow.
	Entries(dir *File) iter.Seq2[Entry, error]
	// Child returns the file of an entry of a directory.
	Child(dir *File, e *Entry) (*File, error)
	// Readlink returns where a symlink leads.
	Readlink(f *File) (string, error)
	// Content returns the bytes of a regular file. It is an
	// blockdev.ExtentReader where holes are known.
	Content(f *File) (Content, error)
	// Xattrs returns the extended attributes of a file as programs see them.
	Xattrs(f *File) iter.Seq2[Xattr, error]
}

// Content is the content of a file. Close does nothing for files of a guest.
type Content interface {
	blockdev.Reader
	Close() error
}

// Xattr is an extended attribute.
type Xattr struct {
	Name  string // with its namespace, as "user.mime_type"
	Value string
}

// File is what a file system tells of a file.
type File struct {
	// Ino tells files apart. A file system without such numbers has the place of
	// the content, or 0.
	Ino uint64
	// Dev tells file systems of the host apart; it is 0 in a guest.
	Dev      uint64
	Mode     uint16 // type and permissions, in the numbers of Linux
	UID, GID uint32
	Size     int64
	Links    uint32
	Blocks   int64 // in units of 512 bytes
	// Major and Minor are the numbers of a device.
	Major, Minor uint32
	// Times that the file system does not have are zero.
	Atime, Ctime, Mtime, Crtime time.Time

	own any // of the file system
}

// fileKey tells files apart that have a number.
type fileKey struct{ dev, ino uint64 }

func (f *File) key() fileKey { return fileKey{f.Dev, f.Ino} }

// Type returns the type in the mode.
func (f *File) Type() uint16 { return f.Mode & ModeType }

// IsDir reports whether the file is a directory.
func (f *File) IsDir() bool { return f.Type() == ModeDir }

// Entry is an entry of a directory.
type Entry struct {
	Name string // any bytes but NUL and slash; neither "." nor ".."
	Type uint16 // as the entry says, in the numbers of ModeType; 0: it does not

	own any // of the file system
}

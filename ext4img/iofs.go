package ext4img

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"
)

var (
	_ fs.ReadDirFS  = (*FS)(nil)
	_ fs.ReadFileFS = (*FS)(nil)
	_ fs.StatFS     = (*FS)(nil)
	_ fs.ReadLinkFS = (*FS)(nil)
)

// Open implements fs.FS. Symlinks are followed inside the file system. A
// regular file is an io.ReaderAt and an io.Seeker, too.
func (f *FS) Open(name string) (fs.File, error) {
	n, err := f.stat("open", name, true)
	if err != nil {
		return nil, err
	}
	info := newFileInfo(path.Base(name), n)
	switch {
	case n.IsDir():
		return &fsDir{fs: f, info: info, name: name}, nil
	case n.IsRegular():
		c, err := f.file(n)
		if err != nil {
			return nil, &fs.PathError{Op: "open", Path: name, Err: err}
		}
		return &fsFile{io.NewSectionReader(c, 0, c.Size()), c, info, name, false}, nil
	}
	return &fsSpecial{info, name}, nil
}

// stat returns the inode of a path of io/fs.
func (f *FS) stat(op, name string, follow bool) (*Inode, error) {
	if !validPath(name) {
		return nil, &fs.PathError{Op: op, Path: name, Err: fs.ErrInvalid}
	}
	n, err := f.resolve(name, follow)
	if err != nil {
		return nil, &fs.PathError{Op: op, Path: name, Err: err}
	}
	return n, nil
}

// validPath is fs.ValidPath for names of any bytes.
func validPath(name string) bool {
	return fs.ValidPath(strings.ToValidUTF8(name, "?"))
}

// Stat implements fs.StatFS. Sys of what it returns is an *Inode.
func (f *FS) Stat(name string) (fs.FileInfo, error) { return f.info("stat", name, true) }

// Lstat implements fs.ReadLinkFS: it is Stat, but a symlink at the end is not
// followed.
func (f *FS) Lstat(name string) (fs.FileInfo, error) { return f.info("lstat", name, false) }

func (f *FS) info(op, name string, follow bool) (fs.FileInfo, error) {
	n, err := f.stat(op, name, follow)
	if err != nil {
		return nil, err
	}
	return newFileInfo(path.Base(name), n), nil
}

// ReadLink implements fs.ReadLinkFS.
func (f *FS) ReadLink(name string) (string, error) {
	n, err := f.stat("readlink", name, false)
	if err != nil {
		return "", err
	}
	if !n.IsSymlink() {
		return "", &fs.PathError{Op: "readlink", Path: name, Err: fs.ErrInvalid}
	}
	target, err := f.readlink(n)
	if err != nil {
		return "", &fs.PathError{Op: "readlink", Path: name, Err: err}
	}
	return target, nil
}

// ReadFile implements fs.ReadFileFS. The whole content is held in memory.
func (f *FS) ReadFile(name string) ([]byte, error) {
	n, err := f.stat("read", name, true)
	if err != nil {
		return nil, err
	}
	c, err := f.file(n)
	if err == nil {
		var b []byte
		if b, err = readContent(c); err == nil {
			return b, nil
		}
	}
	return nil, &fs.PathError{Op: "read", Path: name, Err: err}
}

// readContent reads all of a file into memory. The size that an inode claims
// is not believed: memory grows with what was read.
func readContent(c *File) ([]byte, error) {
	const step = 1 << 20
	var b []byte
	for int64(len(b)) < c.Size() {
		at := len(b)
		b = slices.Grow(b, int(min(c.Size()-int64(at), int64(max(step, at)))))
		b = b[:min(int64(cap(b)), c.Size())]
		if err := readFull(c, b[at:], int64(at)); err != nil {
			return nil, err
		}
	}
	return b, nil
}

// ReadDir implements fs.ReadDirFS: the entries of a directory by name, all in
// memory. Where parts of it cannot be read, the entries of the others come
// with the first error.
func (f *FS) ReadDir(name string) ([]fs.DirEntry, error) {
	n, err := f.stat("readdir", name, true)
	if err != nil {
		return nil, err
	}
	list, err := f.readDir(n)
	if err != nil {
		return list, &fs.PathError{Op: "readdir", Path: name, Err: err}
	}
	return list, nil
}

func (f *FS) readDir(n *Inode) ([]fs.DirEntry, error) {
	if !n.IsDir() {
		return nil, ErrNotDir
	}
	var list []fs.DirEntry
	var first error
	if n.Flags&encryptFl != 0 {
		return nil, &FormatError{"names", n.Ino, -1, "", "are encrypted", ErrEncrypted}
	}
	f.eachEntry(n, func(d Dirent, err error) bool {
		if err == nil {
			list = append(list, &dirItem{f, d})
		} else if first == nil {
			first = err
		}
		return true
	})
	slices.SortFunc(list, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	return list, first
}

// dirItem is an entry of a directory as io/fs has it.
type dirItem struct {
	fs *FS
	d  Dirent
}

func (e *dirItem) Name() string { return e.d.Name }
func (e *dirItem) IsDir() bool  { return e.Type().IsDir() }

// Type is what the entry says; a file system that keeps no types in entries is
// asked for the inode.
func (e *dirItem) Type() fs.FileMode {
	mode, ok := e.d.Type.mode()
	if !ok {
		if n, err := e.fs.Inode(e.d.Ino); err == nil {
			return fileMode(n.Mode).Type()
		}
	}
	return mode
}

func (e *dirItem) Info() (fs.FileInfo, error) {
	n, err := e.fs.Inode(e.d.Ino)
	if err != nil {
		return nil, &fs.PathError{Op: "stat", Path: e.d.Name, Err: err}
	}
	return newFileInfo(e.d.Name, n), nil
}

func (e *dirItem) String() string { return fs.FormatDirEntry(e) }

// mode is the type as io/fs has it; ok is false for none.
func (t FileType) mode() (mode fs.FileMode, ok bool) {
	switch t {
	case TypeRegular:
		return 0, true
	case TypeDir:
		return fs.ModeDir, true
	case TypeChar:
		return fs.ModeDevice | fs.ModeCharDevice, true
	case TypeBlock:
		return fs.ModeDevice, true
	case TypeFifo:
		return fs.ModeNamedPipe, true
	case TypeSocket:
		return fs.ModeSocket, true
	case TypeSymlink:
		return fs.ModeSymlink, true
	}
	return fs.ModeIrregular, false
}

// fileMode is an i_mode as io/fs has it.
func fileMode(mode uint16) fs.FileMode {
	m, _ := FileType(fileType(mode)).mode()
	m |= fs.FileMode(mode & 0o777)
	if mode&0o4000 != 0 {
		m |= fs.ModeSetuid
	}
	if mode&0o2000 != 0 {
		m |= fs.ModeSetgid
	}
	if mode&0o1000 != 0 {
		m |= fs.ModeSticky
	}
	return m
}

// fileInfo is an inode under a name.
type fileInfo struct {
	name string
	n    *Inode
}

func newFileInfo(name string, n *Inode) *fileInfo { return &fileInfo{name, n} }

func (i *fileInfo) Name() string       { return i.name }
func (i *fileInfo) Size() int64        { return i.n.Size }
func (i *fileInfo) Mode() fs.FileMode  { return fileMode(i.n.Mode) }
func (i *fileInfo) ModTime() time.Time { return i.n.Mtime }
func (i *fileInfo) IsDir() bool        { return i.n.IsDir() }
func (i *fileInfo) Sys() any           { return i.n }
func (i *fileInfo) String() string     { return fs.FormatFileInfo(i) }

// fsFile is a regular file.
type fsFile struct {
	r      *io.SectionReader
	c      *File
	info   *fileInfo
	name   string
	closed bool
}

func (o *fsFile) Stat() (fs.FileInfo, error) { return o.info, nil }

func (o *fsFile) Read(p []byte) (int, error) {
	if o.closed {
		return 0, &fs.PathError{Op: "read", Path: o.name, Err: fs.ErrClosed}
	}
	return o.wrap(o.r.Read(p))
}

func (o *fsFile) ReadAt(p []byte, off int64) (int, error) {
	if o.closed || off < 0 {
		return 0, &fs.PathError{Op: "read", Path: o.name, Err: fs.ErrInvalid}
	}
	return o.wrap(o.c.ReadAt(p, off))
}

func (o *fsFile) wrap(n int, err error) (int, error) {
	if err != nil && err != io.EOF {
		err = &fs.PathError{Op: "read", Path: o.name, Err: err}
	}
	return n, err
}

func (o *fsFile) Seek(offset int64, whence int) (int64, error) {
	n, err := o.r.Seek(offset, whence)
	if err != nil {
		err = &fs.PathError{Op: "seek", Path: o.name, Err: err}
	}
	return n, err
}

func (o *fsFile) Close() error {
	if o.closed {
		return &fs.PathError{Op: "close", Path: o.name, Err: fs.ErrClosed}
	}
	o.closed = true
	return nil
}

// fsDir is a directory; it reads all entries with the first ReadDir.
type fsDir struct {
	fs   *FS
	info *fileInfo
	name string
	list []fs.DirEntry
	err  error
	read bool
}

func (o *fsDir) Stat() (fs.FileInfo, error) { return o.info, nil }

func (o *fsDir) Read([]byte) (int, error) {
	return 0, &fs.PathError{Op: "read", Path: o.name, Err: ErrIsDir}
}

func (o *fsDir) Close() error { return nil }

func (o *fsDir) ReadDir(n int) ([]fs.DirEntry, error) {
	if !o.read {
		o.list, o.err = o.fs.readDir(o.info.n)
		o.read = true
	}
	err := o.err
	if err != nil {
		err = &fs.PathError{Op: "readdir", Path: o.name, Err: err}
	}
	if n <= 0 {
		list := o.list
		o.list, o.err = nil, nil
		return list, err
	}
	if len(o.list) == 0 {
		o.err = nil
		if err == nil {
			err = io.EOF
		}
		return nil, err
	}
	n = min(n, len(o.list))
	list := o.list[:n:n]
	o.list = o.list[n:]
	return list, nil
}

// fsSpecial is a file that has no content: a device, fifo or socket.
type fsSpecial struct {
	info *fileInfo
	name string
}

var errNoContent = errors.New("has no content")

func (o *fsSpecial) Stat() (fs.FileInfo, error) { return o.info, nil }

func (o *fsSpecial) Read([]byte) (int, error) {
	return 0, &fs.PathError{Op: "read", Path: o.name, Err: fmt.Errorf("%s %w", typeName(o.info.n.Mode), errNoContent)}
}

func (o *fsSpecial) Close() error { return nil }

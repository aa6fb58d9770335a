package ext4img

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"sync"
)

// FromFS is what an fs.FS holds, which has to stay until the tree is closed.
// Symlinks are kept if it is an fs.ReadLinkFS. Owners, device numbers and hard
// links are those that Sys of its files tells, as it does of an os.DirFS on
// Unix; of an *FS, which is another ext4 file system, xattrs and holes are kept
// too. Without that everything belongs to root. A time of zero is taken for 1970.
//
// Files that have no method ReadAt are read from the beginning, and again where
// several workers ask for parts of them out of order.
func FromFS(fsys fs.FS) Source { return ioSource{fsys} }

type ioSource struct{ fsys fs.FS }

func (s ioSource) lay(b *builder) error {
	return layDir(b, &ioDir{fsys: s.fsys, path: ".", shelf: &ioShelf{}}, nil)
}

// ioDir is a sourceDir of an fs.FS.
type ioDir struct {
	fsys    fs.FS
	path    string
	shelf   *ioShelf
	entries map[string]fs.DirEntry // once the names were read
}

func (d *ioDir) readNames(fn func(name string) error) error {
	list, err := fs.ReadDir(d.fsys, d.path)
	if err != nil {
		return err
	}
	d.entries = make(map[string]fs.DirEntry, len(list))
	for _, e := range list {
		name := e.Name()
		if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
			return fmt.Errorf("%q is not a name", name)
		}
		if d.entries[name] != nil {
			return fmt.Errorf("the name %q is there twice", name)
		}
		d.entries[name] = e
		if err := fn(name); err != nil {
			return err
		}
	}
	return nil
}

func (d *ioDir) info(name string) (fs.FileInfo, error) {
	if e := d.entries[name]; e != nil {
		return e.Info()
	}
	return fs.Lstat(d.fsys, path.Join(d.path, name))
}

func (d *ioDir) lstat(name string) (stat, error) {
	fi, err := d.info(name)
	if err != nil {
		return stat{}, err
	}
	return ioStat(fi)
}

func ioStat(fi fs.FileInfo) (stat, error) {
	n, ok := fi.Sys().(*Inode)
	if !ok {
		st, err := fileInfoStat(fi)
		if fi.ModTime().IsZero() {
			st.sec, st.nsec = 0, 0
		}
		if err == nil && st.mode&modeType == 0 {
			err = errors.New("it is of no type that ext4 has")
		}
		return st, err
	}
	st := stat{
		mode: n.Mode, uid: n.UID, gid: n.GID, links: uint32(n.Links), size: n.Size, ino: uint64(n.Ino),
		sec: n.Mtime.Unix(), nsec: uint32(n.Mtime.Nanosecond()), csec: n.Ctime.Unix(), cnsec: uint32(n.Ctime.Nanosecond()),
		sparse: n.Blocks*512 < n.Size,
	}
	if st.rdev, ok = newEncodeDev(n.Rdev()); !ok {
		return st, errDevice
	}
	return st, nil
}

func (d *ioDir) readlink(name string) (string, error) {
	return fs.ReadLink(d.fsys, path.Join(d.path, name))
}

func (d *ioDir) xattrs(name string, fn func(name, value string) error) error {
	f, ok := d.fsys.(*FS)
	if !ok {
		return nil
	}
	fi, err := d.info(name)
	if err != nil {
		return err
	}
	n, ok := fi.Sys().(*Inode)
	if !ok {
		return nil
	}
	for x, err := range f.Xattrs(n.Ino) {
		if err != nil {
			return err
		}
		if err := fn(x.Name, x.Value); err != nil {
			return err
		}
	}
	return nil
}

func (d *ioDir) readable(name string, isDir bool) error {
	p := path.Join(d.path, name)
	if isDir {
		_, err := fs.ReadDir(d.fsys, p)
		return err
	}
	f, err := d.fsys.Open(p)
	if err != nil {
		return err
	}
	return f.Close()
}

func (d *ioDir) openDir(name string) (sourceDir, error) {
	return &ioDir{fsys: d.fsys, path: path.Join(d.path, name), shelf: d.shelf}, nil
}

func (d *ioDir) open(name string) (sourceFile, error) {
	p := path.Join(d.path, name)
	f, err := d.fsys.Open(p)
	if err != nil {
		return nil, err
	}
	return &ioFile{d, p, f}, nil
}

func (d *ioDir) close() error {
	if d.path == "." {
		d.shelf.close()
	}
	return nil
}

// ioFile is a file of an fs.FS.
type ioFile struct {
	dir  *ioDir
	path string
	f    fs.File
}

func (f *ioFile) ReadAt(p []byte, off int64) (int, error) {
	if r, ok := f.f.(io.ReaderAt); ok {
		return r.ReadAt(p, off)
	}
	r, err := f.dir.shelf.take(f.dir.fsys, f.path, off)
	if err != nil {
		return 0, err
	}
	n, err := io.ReadFull(r.f, p)
	if r.pos += int64(n); err == nil {
		f.dir.shelf.put(r)
		return n, nil
	}
	r.f.Close()
	if err == io.ErrUnexpectedEOF {
		err = io.EOF
	}
	return n, err
}

func (f *ioFile) stat() (stat, error) {
	fi, err := f.f.Stat()
	if err != nil {
		return stat{}, err
	}
	return ioStat(fi)
}

func (f *ioFile) spans(size int64) ([]span, error) {
	o, ok := f.f.(*fsFile)
	if !ok {
		return []span{{0, size}}, nil
	}
	var list []span
	for off := int64(0); off < o.c.Size(); {
		e, err := o.c.NextExtent(off)
		if err != nil {
			return nil, err
		}
		if !e.Kind.ReadsZero() {
			list = append(list, span{off, off + e.Len})
		}
		off += e.Len
	}
	return list, nil
}

func (f *ioFile) kernelFile() *os.File { return nil }
func (f *ioFile) close() error         { return f.f.Close() }

// ioShelf keeps files that can only be read forwards, open where they were read
// to.
type ioShelf struct {
	mu    sync.Mutex
	files []forwardFile // the last used one last
}

type forwardFile struct {
	path string
	f    fs.File
	pos  int64
}

// maxShelved bounds the files that are kept open.
const maxShelved = 8

// take returns a file that is at off.
func (s *ioShelf) take(fsys fs.FS, path string, off int64) (forwardFile, error) {
	best := -1
	s.mu.Lock()
	for i, f := range s.files {
		if f.path == path && f.pos <= off && (best < 0 || f.pos > s.files[best].pos) {
			best = i
		}
	}
	var f forwardFile
	if best >= 0 {
		f = s.files[best]
		s.files = append(s.files[:best], s.files[best+1:]...)
	}
	s.mu.Unlock()
	if best < 0 {
		opened, err := fsys.Open(path)
		if err != nil {
			return f, err
		}
		f = forwardFile{path, opened, 0}
	}
	if _, err := io.CopyN(io.Discard, f.f, off-f.pos); err != nil {
		f.f.Close()
		return f, err
	}
	f.pos = off
	return f, nil
}

func (s *ioShelf) put(f forwardFile) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.files) == maxShelved {
		s.files[0].f.Close()
		s.files = s.files[1:]
	}
	s.files = append(s.files, f)
}

func (s *ioShelf) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.files {
		f.f.Close()
	}
	s.files = nil
}

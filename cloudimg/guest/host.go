package guest

import (
	"errors"
	"io"
	"io/fs"
	"iter"
	"os"
	"strings"

	"qimg/ext4img"
	"qimg/qcow2/blockdev"
)

// hostFS is a directory of the host read as a file system. Nothing outside of
// it is reached, whatever symlinks it holds.
type hostFS struct{ root *os.Root }

// Host returns a directory of the host as a file system. It does not follow
// symlinks out of it. What the user may not see of extended attributes is not
// told.
func Host(root *os.Root) FS { return hostFS{root} }

// hostNode is what a File of the host stands for.
type hostNode struct {
	path string // from the root on; "." is the root
	info fs.FileInfo
}

// Lookup never follows a symlink at the end.
func (h hostFS) Lookup(path string, _ bool) (*File, error) {
	path = strings.Trim(path, "/")
	if path == "" {
		path = "."
	}
	info, err := h.root.Lstat(path)
	if err != nil {
		return nil, err
	}
	return hostFile(path, info), nil
}

// hostFile is what the host tells of a file.
func hostFile(path string, info fs.FileInfo) *File {
	f := &File{Mode: linuxMode(info.Mode()), Size: info.Size(), Links: 1, Mtime: info.ModTime(), own: hostNode{path, info}}
	hostStat(f, info)
	return f
}

// linuxMode is a mode in the numbers of Linux.
func linuxMode(m fs.FileMode) uint16 {
	mode := uint16(m.Perm())
	for _, bit := range []struct {
		of fs.FileMode
		as uint16
	}{{fs.ModeSetuid, 0o4000}, {fs.ModeSetgid, 0o2000}, {fs.ModeSticky, 0o1000}} {
		if m&bit.of != 0 {
			mode |= bit.as
		}
	}
	switch {
	case m.IsRegular():
		mode |= ModeRegular
	case m.IsDir():
		mode |= ModeDir
	case m&fs.ModeSymlink != 0:
		mode |= ModeSymlink
	case m&fs.ModeNamedPipe != 0:
		mode |= ModeFifo
	case m&fs.ModeSocket != 0:
		mode |= ModeSocket
	case m&fs.ModeCharDevice != 0:
		mode |= ModeChar
	case m&fs.ModeDevice != 0:
		mode |= ModeBlock
	}
	return mode
}

// hostEntries is how many entries of a directory are read at once.
const hostEntries = 1024

func (h hostFS) Entries(dir *File) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		f, err := h.open(dir)
		if err != nil {
			yield(Entry{}, err)
			return
		}
		defer f.Close()
		for {
			list, err := f.ReadDir(hostEntries)
			for _, d := range list {
				e := Entry{Name: d.Name()}
				if t := d.Type(); t&fs.ModeIrregular == 0 {
					e.Type = linuxMode(t) & ModeType
				}
				if !yield(e, nil) {
					return
				}
			}
			if len(list) == 0 {
				if err != nil && !errors.Is(err, io.EOF) {
					yield(Entry{}, err)
				}
				return
			}
		}
	}
}

// open opens a file that is still the one that was looked at.
func (h hostFS) open(f *File) (*os.File, error) {
	n := f.own.(hostNode)
	file, err := openHost(h.root, n.path)
	if err != nil {
		return nil, err
	}
	if now, err := file.Stat(); err != nil || !os.SameFile(now, n.info) {
		file.Close()
		return nil, errors.Join(&fs.PathError{Op: "open", Path: n.path, Err: errReplaced}, err)
	}
	return file, nil
}

var errReplaced = errors.New("it was replaced meanwhile")

// unchanged returns an error that matches ext4img.ErrChanged unless a file is
// as it was when it was looked at.
func (h hostFS) unchanged(f *File) error {
	now, err := h.root.Lstat(f.own.(hostNode).path)
	if err != nil {
		return err
	}
	is := hostFile("", now)
	if is.key() != f.key() || is.Size != f.Size || !is.Mtime.Equal(f.Mtime) || !is.Ctime.Equal(f.Ctime) {
		return ext4img.ErrChanged
	}
	return nil
}

func (h hostFS) Child(dir *File, e *Entry) (*File, error) {
	path := e.Name
	if up := dir.own.(hostNode).path; up != "." {
		path = up + "/" + path
	}
	info, err := h.root.Lstat(path)
	if err != nil {
		return nil, err
	}
	return hostFile(path, info), nil
}

func (h hostFS) Readlink(f *File) (string, error) { return h.root.Readlink(f.own.(hostNode).path) }

func (h hostFS) Content(f *File) (Content, error) {
	if f.Type() != ModeRegular {
		return nil, errors.New("not a regular file")
	}
	file, err := h.open(f)
	if err != nil {
		return nil, err
	}
	c, err := blockdev.NewFile(file, &blockdev.FileOptions{NoLock: true})
	if err != nil {
		file.Close()
		return nil, err
	}
	return c, nil
}

func (h hostFS) Xattrs(f *File) iter.Seq2[Xattr, error] {
	return func(yield func(Xattr, error) bool) { h.xattrs(f, yield) }
}

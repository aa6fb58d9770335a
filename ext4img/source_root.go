package ext4img

import (
	"errors"
	"io"
	"io/fs"
	"os"
)

// rootDir is a sourceDir on os.Root: it works everywhere, and knows of no
// xattrs and no holes.
type rootDir struct{ root *os.Root }

func openRootDir(path string) (sourceDir, error) {
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, err
	}
	return rootDir{root}, nil
}

func (d rootDir) close() error { return d.root.Close() }

func (d rootDir) readNames(fn func(name string) error) error {
	f, err := d.root.Open(".")
	if err != nil {
		return err
	}
	defer f.Close()
	return readNames(f, fn)
}

// readNames reads the names of a directory, a bounded number at a time.
func readNames(f *os.File, fn func(name string) error) error {
	for {
		names, err := f.Readdirnames(1024)
		for _, name := range names {
			if err := fn(name); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (d rootDir) lstat(name string) (stat, error) {
	fi, err := d.root.Lstat(name)
	if err != nil {
		return stat{}, err
	}
	return fileInfoStat(fi)
}

func (d rootDir) readlink(name string) (string, error) { return d.root.Readlink(name) }

func (d rootDir) xattrs(string, func(name, value string) error) error { return nil }

func (d rootDir) readable(name string, _ bool) error {
	f, err := d.root.Open(name)
	if err != nil {
		return err
	}
	return f.Close()
}

func (d rootDir) openDir(name string) (sourceDir, error) {
	// OpenRoot follows a symlink that stays inside; a directory that has
	// become one since it was scanned is refused.
	before, err := d.root.Lstat(name)
	if err != nil {
		return nil, err
	}
	sub, err := d.root.OpenRoot(name)
	if err != nil {
		return nil, err
	}
	after, err := sub.Stat(".")
	if err == nil && !os.SameFile(before, after) {
		err = &fs.PathError{Op: "open", Path: name, Err: errors.New("not a directory")}
	}
	if err != nil {
		sub.Close()
		return nil, err
	}
	return rootDir{sub}, nil
}

func (d rootDir) open(name string) (sourceFile, error) {
	before, err := d.root.Lstat(name)
	if err != nil {
		return nil, err
	}
	if !before.Mode().IsRegular() {
		return nil, &fs.PathError{Op: "open", Path: name, Err: errors.New("not a regular file")}
	}
	f, err := d.root.Open(name)
	if err != nil {
		return nil, err
	}
	after, err := f.Stat()
	if err == nil && !os.SameFile(before, after) {
		err = &fs.PathError{Op: "open", Path: name, Err: ErrChanged}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return rootFile{f}, nil
}

type rootFile struct{ f *os.File }

func (f rootFile) ReadAt(p []byte, off int64) (int, error) { return f.f.ReadAt(p, off) }

func (f rootFile) stat() (stat, error) {
	fi, err := f.f.Stat()
	if err != nil {
		return stat{}, err
	}
	return fileInfoStat(fi)
}

func (f rootFile) spans(size int64) ([]span, error) { return []span{{0, size}}, nil }

func (f rootFile) kernelFile() *os.File { return f.f }

func (f rootFile) close() error { return f.f.Close() }

// fileInfoStat turns what os knows into what ext4 stores.
func fileInfoStat(fi os.FileInfo) (stat, error) {
	m := fi.Mode()
	mode := uint16(m.Perm())
	for _, b := range [...]struct {
		os  fs.FileMode
		ext uint16
	}{{fs.ModeSetuid, 0o4000}, {fs.ModeSetgid, 0o2000}, {fs.ModeSticky, 0o1000}} {
		if m&b.os != 0 {
			mode |= b.ext
		}
	}
	switch m.Type() {
	case 0:
		mode |= modeReg
	case fs.ModeDir:
		mode |= modeDir
	case fs.ModeSymlink:
		mode |= modeLink
	case fs.ModeNamedPipe:
		mode |= modeFifo
	case fs.ModeSocket:
		mode |= modeSocket
	case fs.ModeDevice:
		mode |= modeBlock
	case fs.ModeDevice | fs.ModeCharDevice:
		mode |= modeChar
	}
	st := stat{mode: mode, links: 1, size: fi.Size(), sec: fi.ModTime().Unix(), nsec: uint32(fi.ModTime().Nanosecond())}
	return st, addSysStat(&st, fi)
}

var errDevice = errors.New("the device number does not fit 12 bits of major, 20 bits of minor")

// newEncodeDev packs device numbers as ext4 stores them: 12 bits of major, 20
// bits of minor (kernel: include/linux/kdev_t.h, new_encode_dev). ok is false
// for numbers that do not fit.
func newEncodeDev(major, minor uint32) (dev uint32, ok bool) {
	return minor&0xff | major<<8 | minor&^0xff<<12, major < 1<<12 && minor < 1<<20
}

package cli

import (
	"errors"
	"path/filepath"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
)

// layers looks for an image in a backing chain, by its name, while the chain is
// opened.
type layers struct {
	base  string // the name
	named bool   // there is one; otherwise the first backing file is meant
	write bool   // open it for writing
	depth int    // of the image in the chain; 0: it was not found
	path  string // of the image
}

// add looks at a file of the chain and tells whether to open it for writing.
func (l *layers) add(b qcow2.BackingFile) bool {
	if l.depth > 0 || l.named && !names(l.base, b) {
		return false
	}
	l.depth, l.path = b.Depth, b.Path
	return l.write
}

// reader returns the image; nil if it was not found.
func (l *layers) reader(img *image) blockdev.Reader {
	if l.depth == 0 {
		return nil
	}
	var r blockdev.Reader = img.qcow2
	for range l.depth {
		r = r.(*qcow2.Image).Backing()
	}
	return r
}

// names reports whether a name is that of a backing file, as QEMU compares them
// (block.c, bdrv_find_backing_image).
func names(name string, b qcow2.BackingFile) bool {
	_, remote := protocol(name)
	if _, ok := protocol(b.Name); ok || remote {
		return name == b.Name || name == b.Path
	}
	x, err := realPath(combinePath(b.Overlay, name))
	if err != nil {
		return false
	}
	y, err := realPath(b.Path)
	return err == nil && x == y
}

// realPath returns the absolute path of a file, without symlinks.
func realPath(path string) (string, error) {
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", err
	}
	return filepath.Abs(path)
}

// openError puts an error of opening the image and its chain in qemu-img's
// words. QEMU opens all images for reading, and the one that is written anew
// then: a lock tells which of the two it prevents.
func (l *layers) openError(name string, err error) error {
	var lock *blockdev.LockError
	if !l.write || l.depth == 0 || !errors.As(err, &lock) || lock.Path != l.path {
		return couldNotOpen(name, err)
	}
	f, readErr := blockdev.OpenFile(l.path, nil)
	if readErr == nil {
		f.Close()
		return openError(l.path, lock)
	}
	err = openError(l.path, readErr)
	for range l.depth {
		err = prefixError("Could not open backing file", err)
	}
	return couldNotOpen(name, err)
}

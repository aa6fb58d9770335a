package blockdev

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// CreateOptions says how a new file is made. The zero value and nil mean with
// locks and with syncs.
type CreateOptions struct {
	// NoLock takes no locks and looks at none.
	NoLock bool
	// NoSync leaves out the syncs: after a crash of the system the file can be
	// missing, empty or incomplete.
	NoSync bool
	// Stream says that the file is written once, about in order, and not read
	// back: what is written goes to the disk at once and leaves the page
	// cache (Linux).
	Stream bool
}

// Output is a new file in the making. Until Commit nothing is seen of it under
// its name, and an older file of that name stays as it was.
//
// An Output is not safe for concurrent use; its File is.
type Output struct {
	file *File
	path string      // as the caller gave it
	root *os.Root    // the directory
	name string      // in root
	temp string      // in root; empty while the file has no name at all
	old  *os.File    // the file that is replaced, locked; nil when there is none
	info fs.FileInfo // of old
	sync bool
	done bool
}

// CreateFile begins a new, empty file that will be at path once Commit has
// returned.
//
// A symlink at path stays, and the file that it leads to is replaced. An older
// file is locked as a writer would until Commit or Abort, so that an image in
// use is refused with ErrLocked before anything is written; its mode, and its
// owner where that is allowed, go over to the new file. Its other names (hard
// links), access lists and extended attributes do not. What is neither a
// regular file nor absent is refused.
//
// The new file lies in the same directory: without a name where the system can
// do that (Linux, most file systems), so that it is gone if the process is
// killed, else under the name .NAME.XXXXXX.tmp.
//
// Where there are no locks (see OpenFile), replacing a file is an error that
// matches errors.ErrUnsupported unless NoLock is set.
func CreateFile(path string, opts *CreateOptions) (*Output, error) {
	if opts == nil {
		opts = &CreateOptions{}
	}
	dir, name, err := resolve(path)
	if err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	o := &Output{path: path, root: root, name: name, sync: !opts.NoSync}
	if err := o.open(opts.NoLock); err != nil {
		o.Abort()
		return nil, err
	}
	if opts.Stream {
		o.file.behind = &writeBehind{}
	}
	return o, nil
}

// maxSymlinks is how many symlinks are followed to the place of a new file.
const maxSymlinks = 40

// resolve follows the symlinks at path to the directory, which exists, and the
// name in it, which need not exist and is no symlink.
func resolve(path string) (dir, name string, err error) {
	at := path
	for range maxSymlinks {
		dir, name = filepath.Split(at)
		if name == "" || name == "." || name == ".." {
			return "", "", fmt.Errorf("%s: is a directory", path)
		}
		if dir == "" {
			dir = "."
		}
		dir, err = filepath.EvalSymlinks(dir)
		if err != nil {
			return "", "", err
		}
		st, err := os.Lstat(filepath.Join(dir, name))
		if errors.Is(err, fs.ErrNotExist) || err == nil && st.Mode()&fs.ModeSymlink == 0 {
			return dir, name, nil
		}
		if err != nil {
			return "", "", err
		}
		link, err := os.Readlink(filepath.Join(dir, name))
		if err != nil {
			return "", "", err
		}
		if filepath.IsAbs(link) {
			at = link
		} else {
			at = dir + string(filepath.Separator) + link // not cleaned: ".." is after a symlink
		}
	}
	return "", "", fmt.Errorf("%s: more than %d symlinks", path, maxSymlinks)
}

// open locks the file that is replaced and makes the new one.
func (o *Output) open(noLock bool) error {
	perm := fs.FileMode(0o666)
	if err := o.openOld(noLock); err != nil {
		return err
	}
	if o.old != nil {
		perm = o.info.Mode().Perm()
	}
	f, err := o.openTemp(perm)
	if err != nil {
		return fmt.Errorf("create %s: %w", o.path, err)
	}
	o.file = &File{f: f, name: o.path, writable: true, regular: true}
	if o.old != nil {
		if err := copyOwner(f, o.info); err != nil {
			return err
		}
		if err := f.Chmod(perm); err != nil && !errors.Is(err, errors.ErrUnsupported) {
			return err
		}
	}
	if noLock {
		return nil
	}
	// Where there are no locks nobody but us knows of the new file anyway.
	err = lock(f, o.path, lockWriter)
	if err != nil && !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	o.file.locked = err == nil
	return nil
}

// openOld opens and locks what is at the place of the new file.
func (o *Output) openOld(noLock bool) error {
	st, err := o.root.Lstat(o.name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := checkRegular(o.path, st.Mode()); err != nil {
		return err
	}
	o.old, err = o.root.OpenFile(o.name, os.O_RDWR|openFlags, 0)
	if err != nil {
		return err
	}
	o.info, err = o.old.Stat()
	if err != nil {
		return err
	}
	if err := checkRegular(o.path, o.info.Mode()); err != nil {
		return err
	}
	if noLock {
		return nil
	}
	return lock(o.old, o.path, lockWriter)
}

func checkRegular(path string, mode fs.FileMode) error {
	switch {
	case mode.IsRegular():
		return nil
	case mode.IsDir():
		return fmt.Errorf("%s: is a directory", path)
	}
	return fmt.Errorf("%s: is of type %v, and only a regular file can be replaced", path, mode.Type())
}

// openTemp makes the new file, without a name if that can be had.
func (o *Output) openTemp(perm fs.FileMode) (*os.File, error) {
	if f, err := openUnnamed(o.root, perm); err == nil {
		return f, nil
	}
	return o.openNamed(perm)
}

// openNamed makes the new file under a temporary name.
func (o *Output) openNamed(perm fs.FileMode) (*os.File, error) {
	for {
		name := o.tempName()
		f, err := o.root.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, perm)
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		if err == nil {
			o.temp = name
		}
		return f, err
	}
}

func (o *Output) tempName() string {
	return "." + o.name[:min(len(o.name), 200)] + "." + rand.Text()[:6] + ".tmp"
}

// File returns the file to write to. It is closed by Commit and Abort.
func (o *Output) File() *File { return o.file }

// SamePlace reports whether two outputs are to be at the same place, whatever
// their paths.
func (o *Output) SamePlace(other *Output) bool {
	a, err := o.root.Stat(".")
	b, err2 := other.root.Stat(".")
	return err == nil && err2 == nil && o.name == other.name && os.SameFile(a, b)
}

// Commit makes the file complete and gives it its name. Order: sync the file,
// rename, sync the directory. The file is closed then.
//
// An error means that there is no new file and that an older one is as it was;
// only when what follows the rename fails, which the error says, the new
// file has its name already: a crash of the system may take it back, or its
// temporary name is left. A file that has
// appeared at the place since CreateFile, or been exchanged there, is not
// replaced: the error matches fs.ErrExist.
func (o *Output) Commit() error {
	if o.done {
		return fmt.Errorf("%s: commit: %w", o.path, os.ErrClosed)
	}
	err := o.file.mayWrite("commit")
	if err == nil && o.sync {
		err = o.file.Sync()
	}
	if err == nil {
		err = o.place()
	}
	if err == nil && o.sync {
		if err = syncDir(o.root); err != nil {
			err = fmt.Errorf("%s is made, but its directory could not be synced: %w", o.path, err)
		}
	}
	return errors.Join(err, o.Abort())
}

// place gives the new file its name.
func (o *Output) place() error {
	if o.temp == "" && o.old == nil {
		return linkUnnamed(o.root, o.file.f, o.name) // refuses to replace
	}
	if o.temp == "" {
		name := o.tempName()
		if err := linkUnnamed(o.root, o.file.f, name); err != nil {
			return err
		}
		o.temp = name
	}
	isNew := o.old == nil
	if renameClosed {
		if err := o.closeFiles(); err != nil {
			return err
		}
	}
	if isNew {
		err := o.root.Link(o.temp, o.name) // refuses to replace
		if err == nil {
			if err := o.root.Remove(o.temp); err != nil {
				return fmt.Errorf("%s is made, but its temporary name could not be removed: %w", o.path, err)
			}
			o.temp = ""
			return nil
		}
		if !linkUnsupported(err) {
			return err
		}
	}
	st, err := o.root.Lstat(o.name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	case isNew || !os.SameFile(st, o.info):
		return fmt.Errorf("%s: a file was put there meanwhile, it is not replaced: %w", o.path, fs.ErrExist)
	}
	if err := o.root.Rename(o.temp, o.name); err != nil {
		return err
	}
	o.temp = ""
	return nil
}

// Abort removes the new file and gives back the locks; an older file is as it
// was. After Commit, and when called again, it does nothing.
func (o *Output) Abort() error {
	if o.done {
		return nil
	}
	o.done = true
	err := o.closeFiles()
	if o.temp != "" {
		err = errors.Join(err, o.root.Remove(o.temp))
	}
	return errors.Join(err, o.root.Close())
}

// closeFiles closes the new file and the one that it replaces.
func (o *Output) closeFiles() error {
	var err error
	if o.file != nil && !o.file.closed.Load() {
		err = o.file.Close()
	}
	if o.old != nil {
		err = errors.Join(err, o.old.Close())
		o.old = nil
	}
	return err
}

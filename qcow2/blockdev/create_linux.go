package blockdev

import (
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// renameClosed tells that a file must be closed before it can be renamed.
const renameClosed = false

// openUnnamed makes a file without a name in root's directory. It fails where
// the file system cannot do that, or where it could not be given a name later.
func openUnnamed(root *os.Root, perm fs.FileMode) (*os.File, error) {
	dir, err := root.Open(".")
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	var f *os.File
	err = control(dir, func(dfd int) error {
		return ignoringEINTR(func() error {
			fd, err := unix.Openat(dfd, ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, uint32(perm.Perm()))
			if err == nil {
				f = os.NewFile(uintptr(fd), dir.Name())
			}
			return err
		})
	})
	if err != nil {
		return nil, err
	}
	if err := control(f, func(fd int) error { return unix.Access(fdPath(fd), unix.F_OK) }); err != nil {
		f.Close() // no /proc
		return nil, err
	}
	return f, nil
}

// linkUnnamed gives a file of openUnnamed a name, which must be free.
func linkUnnamed(root *os.Root, f *os.File, name string) error {
	dir, err := root.Open(".")
	if err != nil {
		return err
	}
	defer dir.Close()
	err = control(dir, func(dfd int) error {
		return control(f, func(fd int) error {
			return unix.Linkat(unix.AT_FDCWD, fdPath(fd), dfd, name, unix.AT_SYMLINK_FOLLOW)
		})
	})
	if err != nil {
		return &fs.PathError{Op: "linkat", Path: name, Err: err}
	}
	return nil
}

func fdPath(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

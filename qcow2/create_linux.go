package qcow2

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"qimg/qcow2/blockdev"
)

// allocate sets space aside for n bytes at off of a file. errors.ErrUnsupported
// means that the device or its file system cannot.
func allocate(d blockdev.Device, off, n int64) error {
	f, ok := d.(interface{ OS() *os.File })
	if !ok {
		return errors.ErrUnsupported
	}
	conn, err := f.OS().SyscallConn()
	if err != nil {
		return err
	}
	var callErr error
	err = conn.Control(func(fd uintptr) {
		for callErr = unix.EINTR; callErr == unix.EINTR; {
			callErr = unix.Fallocate(int(fd), unix.FALLOC_FL_KEEP_SIZE, off, n)
		}
	})
	if err == nil && callErr != nil {
		err = &os.PathError{Op: "fallocate", Path: f.OS().Name(), Err: callErr}
	}
	return err
}

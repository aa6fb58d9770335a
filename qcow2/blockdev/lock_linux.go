package blockdev

import (
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// setLock takes a shared open file description lock on one byte. The error is
// ErrLocked when another holds it exclusively.
func setLock(f *os.File, at int64) error {
	err := ofdLock(f, unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_RDLCK, Whence: io.SeekStart, Start: at, Len: 1})
	if err == unix.EAGAIN || err == unix.EACCES {
		return ErrLocked
	}
	return err
}

// testLock returns ErrLocked when another holds any lock on the byte.
func testLock(f *os.File, at int64) error {
	lk := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: at, Len: 1}
	if err := ofdLock(f, unix.F_OFD_GETLK, &lk); err != nil {
		return err
	}
	if lk.Type != unix.F_UNLCK {
		return ErrLocked
	}
	return nil
}

// unlockAll gives back every lock of this file description.
func unlockAll(f *os.File) {
	// Nothing can be done about an error; closing the file unlocks too.
	_ = ofdLock(f, unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_UNLCK, Whence: io.SeekStart})
}

func ofdLock(f *os.File, cmd int, lk *unix.Flock_t) error {
	err := control(f, func(fd int) error {
		return ignoringEINTR(func() error { return unix.FcntlFlock(uintptr(fd), cmd, lk) })
	})
	switch err {
	case unix.EINVAL, unix.ENOSYS, unix.EOPNOTSUPP, unix.ENOLCK:
		// A kernel before 3.15, or a file system without locks.
		return errNoLocks
	}
	return err
}

package blockdev

import (
	"os"

	"golang.org/x/sys/unix"
)

// startWriting has the kernel begin to write a window. ok is false where it
// cannot be asked to.
func startWriting(f *os.File, w window) (ok bool, err error) {
	return syncRange(f, w, unix.SYNC_FILE_RANGE_WRITE)
}

// finishWriting waits until a window is on the disk and drops its pages.
func finishWriting(f *os.File, w window) (ok bool, err error) {
	ok, err = syncRange(f, w, unix.SYNC_FILE_RANGE_WAIT_BEFORE|unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER)
	if !ok || err != nil {
		return ok, err
	}
	// Advice: where it is not taken, nothing is lost.
	_ = control(f, func(fd int) error { return unix.Fadvise(fd, w.start, w.end-w.start, unix.FADV_DONTNEED) })
	return true, nil
}

func syncRange(f *os.File, w window, flags int) (ok bool, err error) {
	err = control(f, func(fd int) error {
		return ignoringEINTR(func() error { return unix.SyncFileRange(fd, w.start, w.end-w.start, flags) })
	})
	switch err {
	case unix.ENOSYS, unix.EINVAL, unix.ESPIPE, unix.EOPNOTSUPP, unix.EPERM:
		return false, nil
	}
	return true, err
}

package blockdev

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// openFlags keeps an open from waiting for the other end of a fifo.
const openFlags = unix.O_NONBLOCK

// control calls fn with the descriptor of f.
func control(f *os.File, fn func(fd int) error) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	if err := c.Control(func(fd uintptr) { ferr = fn(int(fd)) }); err != nil {
		return err
	}
	return ferr
}

func ignoringEINTR(fn func() error) error {
	for {
		if err := fn(); err != unix.EINTR {
			return err
		}
	}
}

// punch makes a range of f read as zeroes without writing them. The error
// matches errors.ErrUnsupported where neither a hole can be made nor the range
// be zeroed by the file system.
func punch(f *os.File, off, n int64) error {
	return control(f, func(fd int) error {
		for _, mode := range []uint32{
			unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE,
			unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE,
		} {
			err := ignoringEINTR(func() error { return unix.Fallocate(fd, mode, off, n) })
			switch err {
			case unix.EOPNOTSUPP, unix.ENOSYS, unix.EINVAL, unix.EPERM, unix.ENODEV:
				continue // the next way
			}
			return err
		}
		return errors.ErrUnsupported
	})
}

// seekData returns the start of the first data at or after off, or size if
// there is none; seekHole the same of the first hole.
func seekData(f *os.File, off, size int64) (int64, error) { return seek(f, off, size, unix.SEEK_DATA) }
func seekHole(f *os.File, off, size int64) (int64, error) { return seek(f, off, size, unix.SEEK_HOLE) }

func seek(f *os.File, off, size int64, whence int) (at int64, err error) {
	err = control(f, func(fd int) error {
		at, err = unix.Seek(fd, off, whence)
		return err
	})
	switch err {
	case unix.ENXIO:
		if st, err := f.Stat(); err == nil && st.Mode().IsRegular() && st.Size() < size {
			return 0, fmt.Errorf("the file has become shorter than %d bytes: %w", size, io.ErrUnexpectedEOF)
		}
		return size, nil
	case unix.EINVAL, unix.EOPNOTSUPP, unix.ENOSYS:
		return 0, errors.ErrUnsupported
	}
	return min(at, size), err
}

// copyChunk is how much one copy_file_range is asked for.
const copyChunk = 1 << 30

func copyRange(dst *os.File, off int64, src *os.File, srcOff, n int64) (done int64, err error) {
	err = control(dst, func(dfd int) error {
		return control(src, func(sfd int) error {
			for done < n {
				var m int
				r, w := srcOff+done, off+done
				err := ignoringEINTR(func() (err error) {
					m, err = unix.CopyFileRange(sfd, &r, dfd, &w, int(min(n-done, copyChunk)), 0)
					return err
				})
				switch err {
				case nil:
				case unix.ENOSPC, unix.EDQUOT, unix.EFBIG:
					return err
				default:
					// EXDEV, EINVAL, EOPNOTSUPP, ENOSYS, EPERM (a seccomp
					// filter), EIO (some network file systems, or a bad
					// disk: the caller's own read or write tells which).
					return fmt.Errorf("copy_file_range: %w: %w", err, errors.ErrUnsupported)
				}
				if m == 0 {
					break
				}
				done += int64(m)
			}
			return nil
		})
	})
	if err != nil || done == n {
		return done, err
	}
	// Nothing more came. Files that the kernel makes up (/proc, with a size of
	// 0) can give nothing too, which is no end.
	if st, err := src.Stat(); err != nil || st.Size() == 0 || st.Size() > srcOff+done {
		return done, fmt.Errorf("copy_file_range: %w", errors.ErrUnsupported)
	}
	return done, nil
}

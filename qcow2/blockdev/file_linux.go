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

// readOnlyDevice reports whether a block device takes no writes, although it
// can be opened for them.
func readOnlyDevice(f *os.File) bool {
	ro := 0
	err := control(f, func(fd int) (err error) {
		ro, err = unix.IoctlGetInt(fd, unix.BLKROGET)
		return err
	})
	return err == nil && ro != 0
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
			if err := fallocate(fd, mode, off, n); err != errors.ErrUnsupported {
				return err
			}
		}
		return errors.ErrUnsupported
	})
}

// syncData puts the bytes of f on stable storage, with its size.
func syncData(f *os.File) error {
	err := control(f, func(fd int) error {
		return ignoringEINTR(func() error { return unix.Fdatasync(fd) })
	})
	if errno, ok := err.(unix.Errno); ok {
		return &os.PathError{Op: "sync", Path: f.Name(), Err: errno}
	}
	return err
}

// allocate reserves space for a range of f that is inside it.
func allocate(f *os.File, off, n int64) error {
	return control(f, func(fd int) error { return fallocate(fd, unix.FALLOC_FL_KEEP_SIZE, off, n) })
}

// fallocate returns errors.ErrUnsupported where the file system, or a filter
// of system calls, does not do what is asked for.
func fallocate(fd int, mode uint32, off, n int64) error {
	err := ignoringEINTR(func() error { return unix.Fallocate(fd, mode, off, n) })
	switch err {
	case unix.EOPNOTSUPP, unix.ENOSYS, unix.EINVAL, unix.EPERM, unix.ENODEV:
		return errors.ErrUnsupported
	}
	return err
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

// copyRange shares the blocks of two files where the file system can
// (FICLONERANGE), and has them copied where that happens somewhere else
// (copy_file_range on network file systems). Copying on this machine is left
// to the caller: the kernel does it page by page through a pipe, which takes
// nearly twice the time of reading and writing a MiB at once (Linux 6.18,
// ext4).
func copyRange(dst *os.File, off int64, src *os.File, srcOff, n int64) (done int64, err error) {
	err = control(dst, func(dfd int) error {
		return control(src, func(sfd int) error {
			if done, err = cloneRange(dfd, off, sfd, srcOff, n); !errors.Is(err, errors.ErrUnsupported) || !copiesElsewhere(dfd) {
				return err
			}
			var m int64
			m, err = copyFileRange(dfd, off+done, sfd, srcOff+done, n-done)
			done += m
			return err
		})
	})
	return done, err
}

// shares reports whether two files lie on one file system of a kind that knows
// reflinks.
func shares(a, b *os.File) bool {
	const bcachefsMagic, zfsMagic = 0xca451a4e, 0x2fc12fc1
	var st [2]unix.Stat_t
	var fs unix.Statfs_t
	for i, f := range []*os.File{a, b} {
		err := control(f, func(fd int) error {
			if err := unix.Fstat(fd, &st[i]); err != nil {
				return err
			}
			return unix.Fstatfs(fd, &fs)
		})
		if err != nil {
			return false
		}
	}
	switch uint32(fs.Type) {
	case unix.BTRFS_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.OCFS2_SUPER_MAGIC, bcachefsMagic, zfsMagic:
		return st[0].Dev == st[1].Dev
	}
	return false
}

// cloneRange clones the whole blocks of a range.
func cloneRange(dfd int, off int64, sfd int, srcOff, n int64) (int64, error) {
	whole := n
	var st unix.Stat_t
	if err := unix.Fstat(dfd, &st); err != nil {
		return 0, err
	}
	if bs := int64(st.Blksize); bs > 0 {
		whole -= whole % bs
	}
	if whole == 0 {
		return 0, errors.ErrUnsupported
	}
	err := ignoringEINTR(func() error {
		return unix.IoctlFileCloneRange(dfd, &unix.FileCloneRange{
			Src_fd: int64(sfd), Src_offset: uint64(srcOff), Src_length: uint64(whole), Dest_offset: uint64(off),
		})
	})
	switch err {
	case nil:
	case unix.ENOSPC, unix.EDQUOT, unix.EFBIG:
		return 0, err
	default:
		// EOPNOTSUPP, ENOTTY, EXDEV, EINVAL (not aligned, or beyond the end of
		// src), EPERM, ETXTBSY: the caller's own read or write tells which.
		return 0, fmt.Errorf("clone: %w: %w", err, errors.ErrUnsupported)
	}
	if whole < n {
		return whole, errors.ErrUnsupported
	}
	return n, nil
}

// copiesElsewhere reports whether a file lies on a file system whose server
// copies ranges by itself.
func copiesElsewhere(fd int) bool {
	const cephMagic = 0x00c36400
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return false
	}
	switch uint32(st.Type) {
	case unix.NFS_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC, unix.FUSE_SUPER_MAGIC, cephMagic:
		return true
	}
	return false
}

// copyFileRange copies by copy_file_range.
func copyFileRange(dfd int, off int64, sfd int, srcOff, n int64) (done int64, err error) {
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
			return done, err
		default:
			// EXDEV, EINVAL, EOPNOTSUPP, ENOSYS, EPERM (a seccomp filter), EIO
			// (some servers, or a bad disk).
			return done, fmt.Errorf("copy_file_range: %w: %w", err, errors.ErrUnsupported)
		}
		if m == 0 {
			// The end of src, or a server that gives nothing.
			return done, fmt.Errorf("copy_file_range: %w", errors.ErrUnsupported)
		}
		done += int64(m)
	}
	return done, nil
}

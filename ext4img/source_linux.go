package ext4img

import (
	"errors"
	"io"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// openSourceDir opens the root directory of a source. The path itself may be a
// symlink; everything below is opened element by element and never through
// one.
func openSourceDir(path string) (sourceDir, error) {
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	f, err := root.Open(".")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return newFdDir(fd), nil
}

// fdDir is a sourceDir on a directory descriptor: the same safety as os.Root
// (O_NOFOLLOW, one element at a time) with fewer system calls, and what os
// does not offer: xattrs, holes.
type fdDir struct {
	fd int
	// proc is the directory's path in /proc, with a slash: the way to the
	// xattrs of things that cannot be opened (symlinks, devices).
	proc string
}

func newFdDir(fd int) *fdDir {
	return &fdDir{fd: fd, proc: "/proc/self/fd/" + strconv.Itoa(fd) + "/"}
}

func (d *fdDir) close() error { return unix.Close(d.fd) }

func (d *fdDir) readNames(fn func(name string) error) error {
	// A directory that stays open is read from its beginning.
	if _, err := unix.Seek(d.fd, 0, io.SeekStart); err != nil {
		return err
	}
	buf := make([]byte, 32<<10)
	var names []string
	for {
		var n int
		err := retry(func() (err error) { n, err = unix.ReadDirent(d.fd, buf); return err })
		if err != nil || n <= 0 {
			return err
		}
		for rest := buf[:n]; len(rest) > 0; {
			var used int
			used, _, names = unix.ParseDirent(rest, -1, names[:0])
			rest = rest[used:]
			for _, name := range names {
				if err := fn(name); err != nil {
					return err
				}
			}
		}
	}
}

func (d *fdDir) lstat(name string) (stat, error) {
	return statx(d.fd, name, unix.AT_SYMLINK_NOFOLLOW)
}

// statx is used rather than stat, which has 32 bits for a time on machines of
// 32 bits.
func statx(fd int, name string, flags int) (stat, error) {
	var st unix.Statx_t
	if err := retry(func() error { return unix.Statx(fd, name, flags, unix.STATX_BASIC_STATS, &st) }); err != nil {
		return stat{}, err
	}
	s := stat{
		mode: st.Mode, uid: st.Uid, gid: st.Gid, links: st.Nlink, size: int64(st.Size),
		sec: st.Mtime.Sec, nsec: st.Mtime.Nsec, dev: unix.Mkdev(st.Dev_major, st.Dev_minor), ino: st.Ino,
		csec: st.Ctime.Sec, cnsec: st.Ctime.Nsec,
		sparse: st.Blocks*512 < st.Size,
	}
	if t := s.mode & modeType; t == modeChar || t == modeBlock {
		var ok bool
		if s.rdev, ok = newEncodeDev(st.Rdev_major, st.Rdev_minor); !ok {
			return s, errDevice
		}
	}
	return s, nil
}

func (d *fdDir) readlink(name string) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(d.fd, name, buf)
	if err != nil {
		return "", err
	}
	return string(buf[:n]), nil
}

func (d *fdDir) readable(name string, isDir bool) error {
	mode := uint32(unix.R_OK)
	if isDir {
		mode |= unix.X_OK
	}
	return unix.Faccessat(d.fd, name, mode, unix.AT_EACCESS)
}

func (d *fdDir) openAt(name string, flags int) (int, error) {
	var fd int
	err := retry(func() (err error) {
		fd, err = unix.Openat(d.fd, name, flags|unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_LARGEFILE, 0)
		return err
	})
	return fd, err
}

func (d *fdDir) openDir(name string) (sourceDir, error) {
	fd, err := d.openAt(name, unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	return newFdDir(fd), nil
}

func (d *fdDir) open(name string) (sourceFile, error) {
	fd, err := d.openAt(name, unix.O_NONBLOCK) // a fifo in its place does not block
	if err != nil {
		return nil, err
	}
	return &fdFile{fd: fd, name: name}, nil
}

// xattrs reads all xattrs of one entry.
func (d *fdDir) xattrs(name string, fn func(name, value string) error) error {
	path := d.proc + name
	var small [1024]byte
	list, err := readWhole(small[:], func(b []byte) (int, error) { return unix.Llistxattr(path, b) })
	if err != nil {
		if errors.Is(err, unix.ENOTSUP) {
			return nil // the file system has none
		}
		if errors.Is(err, unix.ENOENT) {
			if _, err := os.Stat("/proc/self/fd"); err != nil {
				return errors.New("cannot read xattrs: /proc is not mounted")
			}
		}
		return err
	}
	for len(list) > 0 {
		end := 0
		for end < len(list) && list[end] != 0 {
			end++
		}
		x := string(list[:end])
		list = list[min(end+1, len(list)):]
		var value [1024]byte
		v, err := readWhole(value[:], func(b []byte) (int, error) { return unix.Lgetxattr(path, x, b) })
		if errors.Is(err, unix.ENODATA) {
			continue // removed meanwhile, or listed but not to be had
		}
		if err != nil {
			return err
		}
		if err := fn(x, string(v)); err != nil {
			return err
		}
	}
	return nil
}

// readWhole calls read with the buffer, and where that is too small with one
// of the size that read asks for (at most XATTR_SIZE_MAX and XATTR_LIST_MAX,
// 64 KiB each).
func readWhole(buf []byte, read func([]byte) (int, error)) ([]byte, error) {
	for {
		n, err := read(buf)
		if err == nil {
			return buf[:n], nil
		}
		if !errors.Is(err, unix.ERANGE) || len(buf) >= 1<<16 {
			return nil, err
		}
		buf = make([]byte, 1<<16)
	}
}

type fdFile struct {
	fd   int
	name string
	file *os.File // owns fd once kernelFile has been called
}

func (f *fdFile) ReadAt(p []byte, off int64) (int, error) {
	done := 0
	for done < len(p) {
		n, err := unix.Pread(f.fd, p[done:], off+int64(done))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return done, err
		}
		if n == 0 {
			return done, io.EOF
		}
		done += n
	}
	return done, nil
}

func (f *fdFile) stat() (stat, error) { return statx(f.fd, "", unix.AT_EMPTY_PATH) }

func (f *fdFile) spans(size int64) ([]span, error) {
	var spans []span
	for off := int64(0); off < size; {
		data, err := unix.Seek(f.fd, off, unix.SEEK_DATA)
		if err == unix.ENXIO {
			break // no data up to the end
		}
		if err == unix.EINVAL {
			return []span{{0, size}}, nil // the file system cannot tell
		}
		if err != nil {
			return nil, err
		}
		hole, err := unix.Seek(f.fd, data, unix.SEEK_HOLE)
		if err != nil {
			return nil, err
		}
		if hole = min(hole, size); data < hole {
			spans = append(spans, span{data, hole})
		}
		if hole <= off {
			break // the file shrinks; Write will say so
		}
		off = hole
	}
	return spans, nil
}

func (f *fdFile) kernelFile() *os.File {
	if f.file == nil {
		f.file = os.NewFile(uintptr(f.fd), f.name)
	}
	return f.file
}

func (f *fdFile) close() error {
	if f.file != nil {
		return f.file.Close()
	}
	return unix.Close(f.fd)
}

// retry repeats a system call that a signal interrupted.
func retry(call func() error) error {
	for {
		if err := call(); err != unix.EINTR {
			return err
		}
	}
}

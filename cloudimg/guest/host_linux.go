package guest

import (
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// hostStat adds what Linux tells of a file.
func hostStat(f *File, info fs.FileInfo) {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return
	}
	f.Dev = uint64(st.Dev)
	f.Ino, f.UID, f.GID, f.Links, f.Blocks = st.Ino, st.Uid, st.Gid, uint32(st.Nlink), st.Blocks
	if t := f.Type(); t == ModeChar || t == ModeBlock {
		f.Major, f.Minor = unix.Major(uint64(st.Rdev)), unix.Minor(uint64(st.Rdev))
	}
	f.Atime = time.Unix(int64(st.Atim.Sec), int64(st.Atim.Nsec))
	f.Ctime = time.Unix(int64(st.Ctim.Sec), int64(st.Ctim.Nsec))
}

// openHost opens a file for reading, and does not wait for a fifo.
func openHost(root *os.Root, path string) (*os.File, error) {
	return root.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
}

// xattrs yields the extended attributes of a file, through the directory that
// holds it.
func (h hostFS) xattrs(f *File, yield func(Xattr, error) bool) {
	n := f.own.(hostNode)
	dir, err := h.root.Open(path.Dir(n.path))
	if err != nil {
		yield(Xattr{}, err)
		return
	}
	defer dir.Close()
	at := fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), path.Base(n.path))
	names, err := hostXattr(func(b []byte) (int, error) { return unix.Llistxattr(at, b) })
	if err == unix.ENOTSUP {
		return
	}
	if err != nil {
		yield(Xattr{}, &fs.PathError{Op: "listxattr", Path: n.path, Err: err})
		return
	}
	for name := range strings.SplitSeq(strings.TrimRight(string(names), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		value, err := hostXattr(func(b []byte) (int, error) { return unix.Lgetxattr(at, name, b) })
		if err == unix.ENODATA {
			continue
		}
		if err != nil {
			err = &fs.PathError{Op: "getxattr", Path: n.path, Err: err}
		}
		if !yield(Xattr{name, string(value)}, err) {
			return
		}
	}
}

// hostXattr reads a list or a value, which Linux bounds to 64 KiB.
func hostXattr(get func([]byte) (int, error)) ([]byte, error) {
	n, err := get(nil)
	if err != nil || n == 0 {
		return nil, err
	}
	b := make([]byte, 64<<10)
	n, err = get(b)
	if err != nil {
		return nil, err
	}
	return b[:n], nil
}

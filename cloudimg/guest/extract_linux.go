package guest

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// attributes gives a file in a directory its owner, extended attributes,
// permissions and times, in this order: a new owner takes capabilities and setuid
// away, and everything changes times. f is the file itself, nil for what cannot
// be opened.
func (x *Extractor) attributes(f, dir *os.File, name string, n *Node) error {
	fd := int(dir.Fd())
	owned := true
	if x.opts.Archive {
		err := unix.Fchownat(fd, name, int(n.UID), int(n.GID), unix.AT_SYMLINK_NOFOLLOW)
		switch {
		case err == unix.EPERM && os.Geteuid() != 0:
			x.lost[lostOwner] = true
			owned = int(n.UID) == os.Geteuid() && int(n.GID) == os.Getegid()
		case err != nil:
			return fmt.Errorf("owner: %w", err)
		}
		if err := x.setXattrs(f, fd, name, n); err != nil {
			return err
		}
	}
	if n.Type() != ModeSymlink {
		mode := x.permissions(n, owned)
		var err error
		if f != nil {
			err = unix.Fchmod(int(f.Fd()), mode)
		} else {
			err = unix.Fchmodat(fd, name, mode, 0)
		}
		if err != nil {
			return fmt.Errorf("mode: %w", err)
		}
	}
	atime := n.Atime
	if atime.IsZero() {
		atime = n.Mtime
	}
	if n.Mtime.IsZero() {
		return nil
	}
	times := []unix.Timespec{timespec(atime), timespec(n.Mtime)}
	if err := unix.UtimesNanoAt(fd, name, times, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("times: %w", err)
	}
	return nil
}

func timespec(t time.Time) unix.Timespec {
	ts, err := unix.TimeToTimespec(t)
	if err != nil { // 32-bit systems end in 2038
		ts, _ = unix.TimeToTimespec(time.Unix(1<<31-1, 0))
	}
	return ts
}

// setXattrs sets the extended attributes. Those that the file system or the user
// cannot have get lost.
func (x *Extractor) setXattrs(f *os.File, dir int, name string, n *Node) error {
	for a, err := range x.fs.Xattrs(n.File) {
		if err != nil {
			return err
		}
		if f != nil {
			err = unix.Fsetxattr(int(f.Fd()), a.Name, []byte(a.Value), 0)
		} else {
			err = unix.Lsetxattr(fmt.Sprintf("/proc/self/fd/%d/%s", dir, name), a.Name, []byte(a.Value), 0)
		}
		switch {
		case errors.Is(err, unix.EPERM), errors.Is(err, unix.ENOTSUP), errors.Is(err, unix.EACCES):
			x.lost[lostXattrs] = true
		case err != nil:
			return fmt.Errorf("xattr %s: %w", a.Name, err)
		}
	}
	return nil
}

// special makes a fifo or a device.
func (x *Extractor) special(d *extractDir, name string, n *Node) error {
	if err := unix.Mknodat(int(d.fd.Fd()), name, uint32(n.Type())|0o600, int(unix.Mkdev(n.Major, n.Minor))); err != nil {
		return &os.PathError{Op: "mknod", Path: name, Err: err}
	}
	return x.attributes(nil, d.fd, name, n)
}

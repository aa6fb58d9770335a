//go:build unix

package cli

import (
	"os"

	"golang.org/x/sys/unix"

	"qimg/qcow2/blockdev"
)

// wasClosed reports whether a standard output seems to have been closed when the
// program began. Go puts the null device in its place, open for reading and
// writing, where an image would be lost without a word. A shell opens it for
// writing alone. Others do not, to have text dropped: for that it is no error.
func wasClosed(f *os.File) bool {
	info, err := f.Stat()
	if err != nil {
		return false
	}
	null, err := os.Stat(os.DevNull)
	if err != nil || !blockdev.SameFile(info, null) {
		return false
	}
	c, err := f.SyscallConn()
	if err != nil {
		return false
	}
	flags := 0
	err2 := c.Control(func(fd uintptr) { flags, err = unix.FcntlInt(fd, unix.F_GETFL, 0) })
	return err == nil && err2 == nil && flags&unix.O_ACCMODE == unix.O_RDWR
}

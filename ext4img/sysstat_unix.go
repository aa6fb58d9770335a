//go:build unix

package ext4img

import (
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// addSysStat adds what only Unix knows of a file.
func addSysStat(st *stat, fi os.FileInfo) error {
	sys, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return nil
	}
	st.uid, st.gid = sys.Uid, sys.Gid
	st.links = uint32(sys.Nlink)
	st.dev, st.ino = uint64(sys.Dev), sys.Ino
	st.csec, st.cnsec = ctime(sys)
	if t := st.mode & modeType; t == modeChar || t == modeBlock {
		rdev := uint64(sys.Rdev)
		if st.rdev, ok = newEncodeDev(unix.Major(rdev), unix.Minor(rdev)); !ok {
			return errDevice
		}
	}
	return nil
}

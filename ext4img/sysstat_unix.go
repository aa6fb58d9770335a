//go:build unix

package ext4img

import (
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// addSysStat adds what only Unix knows of a file.
func addSysStat(st *stat, fi os.FileInfo) {
	sys, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return
	}
	st.uid, st.gid = sys.Uid, sys.Gid
	st.links = uint32(sys.Nlink)
	st.dev, st.ino = uint64(sys.Dev), sys.Ino
	rdev := uint64(sys.Rdev)
	st.rdev, _ = newEncodeDev(unix.Major(rdev), unix.Minor(rdev))
}

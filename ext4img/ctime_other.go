//go:build unix && !linux

package ext4img

import "syscall"

func ctime(st *syscall.Stat_t) (sec int64, nsec uint32) {
	return int64(st.Ctimespec.Sec), uint32(st.Ctimespec.Nsec)
}

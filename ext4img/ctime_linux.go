package ext4img

import "syscall"

func ctime(st *syscall.Stat_t) (sec int64, nsec uint32) {
	return int64(st.Ctim.Sec), uint32(st.Ctim.Nsec)
}

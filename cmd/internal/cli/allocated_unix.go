//go:build unix

package cli

import (
	"os"
	"syscall"
)

// allocated returns how many bytes of the disk a file takes.
func allocated(f *os.File) (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return st.Blocks * 512, nil
	}
	return info.Size(), nil
}

//go:build !unix

package cli

import "os"

// allocated returns how many bytes of the disk a file takes; holes count here.
func allocated(f *os.File) (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

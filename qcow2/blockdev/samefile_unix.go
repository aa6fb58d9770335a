//go:build unix

package blockdev

import (
	"io/fs"
	"os"
	"syscall"
)

// SameFile reports whether two files are the same: one file, as of os.SameFile,
// or two nodes of one device.
func SameFile(a, b fs.FileInfo) bool {
	if os.SameFile(a, b) {
		return true
	}
	const kind = fs.ModeDevice | fs.ModeCharDevice
	x, ok := a.Sys().(*syscall.Stat_t)
	y, ok2 := b.Sys().(*syscall.Stat_t)
	return ok && ok2 && a.Mode()&kind == fs.ModeDevice && b.Mode()&kind == fs.ModeDevice && x.Rdev == y.Rdev
}

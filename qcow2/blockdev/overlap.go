package blockdev

import "io/fs"

// Overlap reports whether two files can have bytes in common: they are the same, as
// of SameFile, or one of them, or what it lies on, lies on the other. On Linux a
// partition lies on its disk, and a loop device on its file.
func Overlap(a, b fs.FileInfo) bool {
	if SameFile(a, b) {
		return true
	}
	for _, x := range stack(a) {
		for _, y := range stack(b) {
			if x.off < y.end && y.off < x.end && SameFile(x.info, y.info) {
				return true
			}
		}
	}
	return false
}

// place is a range of a file or device, in bytes.
type place struct {
	info     fs.FileInfo
	off, end int64
}

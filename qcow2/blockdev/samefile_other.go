//go:build !unix

package blockdev

import (
	"io/fs"
	"os"
)

// SameFile reports whether two files are the same, as of os.SameFile.
func SameFile(a, b fs.FileInfo) bool { return os.SameFile(a, b) }

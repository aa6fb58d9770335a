//go:build !linux

package blockdev

import (
	"io/fs"
	"math"
)

// stack returns the places of a file: itself.
func stack(info fs.FileInfo) []place { return []place{{info, 0, math.MaxInt64}} }

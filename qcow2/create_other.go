//go:build !linux

package qcow2

import (
	"errors"

	"qimg/qcow2/blockdev"
)

// allocate sets space aside for n bytes at off of a file: not on this system.
func allocate(blockdev.Device, int64, int64) error { return errors.ErrUnsupported }

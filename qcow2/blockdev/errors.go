package blockdev

import (
	"errors"
	"fmt"
)

var (
	// ErrLocked means that another process uses the image. The error that
	// matches it is a *LockError.
	ErrLocked = errors.New("image is in use by another process")
	// ErrReadOnly means that a device takes no writes: it was opened for
	// reading, or an earlier write or sync failed.
	ErrReadOnly = errors.New("read-only")
	// ErrNotWritable means that a block device takes no writes, although it may
	// be opened for them.
	ErrNotWritable = errors.New("the device is not writable")
	// ErrRange means that an offset is negative, or that a request reaches
	// beyond the end of the device.
	ErrRange = errors.New("outside the device")
)

// checkRange returns an error that matches ErrRange unless
// 0 <= off <= off+n <= size.
func checkRange(off, n, size int64) error {
	if off < 0 || n < 0 || off > size || n > size-off {
		return fmt.Errorf("%d bytes at offset %d of a device of %d bytes: %w", n, off, size, ErrRange)
	}
	return nil
}

package blockdev

import (
	"errors"
	"io/fs"
	"os"
	"syscall"
)

func copyOwner(*os.File, fs.FileInfo) error { return nil }

// linkUnsupported reports whether err says that the file system has no links:
// ERROR_INVALID_FUNCTION, or ERROR_NOT_SUPPORTED.
func linkUnsupported(err error) bool {
	return errors.Is(err, errors.ErrUnsupported) || errors.Is(err, syscall.Errno(1))
}

// syncDir does nothing: a directory cannot be synced here.
func syncDir(*os.Root) error { return nil }

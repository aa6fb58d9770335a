//go:build !linux

package blockdev

import (
	"errors"
	"io/fs"
	"os"
	"runtime"
)

// renameClosed tells that a file must be closed before it can be renamed.
const renameClosed = runtime.GOOS == "windows"

func openUnnamed(*os.Root, fs.FileMode) (*os.File, error) { return nil, errors.ErrUnsupported }
func linkUnnamed(*os.Root, *os.File, string) error        { return errors.ErrUnsupported }

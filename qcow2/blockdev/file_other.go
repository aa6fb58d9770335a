//go:build !linux

package blockdev

import (
	"errors"
	"os"
)

const openFlags = 0

func readOnlyDevice(*os.File) bool                   { return false }
func syncData(f *os.File) error                      { return f.Sync() }
func punch(*os.File, int64, int64) error             { return errors.ErrUnsupported }
func allocate(*os.File, int64, int64) error          { return errors.ErrUnsupported }
func seekData(*os.File, int64, int64) (int64, error) { return 0, errors.ErrUnsupported }
func seekHole(*os.File, int64, int64) (int64, error) { return 0, errors.ErrUnsupported }
func copyRange(*os.File, int64, *os.File, int64, int64) (int64, error) {
	return 0, errors.ErrUnsupported
}

func shares(_, _ *os.File) bool { return false }

//go:build !linux

package blockdev

import "os"

func setLock(*os.File, int64) error  { return errNoLocks }
func testLock(*os.File, int64) error { return errNoLocks }
func unlockAll(*os.File)             {}

package blockdev

import (
	"errors"
	"fmt"
	"os"
)

// The bytes of a file that QEMU's programs lock to tell each other what they
// do with it: byte 100+i for "I use permission i", 200+i for "I do not let
// others use permission i". All locks are shared ones; what another holds is
// found by asking whether an exclusive lock could be had.
// block/file-posix.c:130, include/block/block-common.h:284.
const (
	lockUse      = 100
	lockUnshared = 200

	permRead   = 0
	permWrite  = 1
	permResize = 3
)

func permName(perm int) string {
	switch perm {
	case permRead:
		return "consistent read"
	case permWrite:
		return "write"
	default:
		return "resize"
	}
}

// lockMode is what a lock says: the permissions that its holder uses, and
// those that others may not use.
type lockMode struct {
	use, unshared []int
}

// The three modes, those of QEMU's qcow2 driver whatever the format.
var (
	lockReader = lockMode{use: []int{permRead}, unshared: []int{permWrite, permResize}}
	lockWriter = lockMode{use: []int{permRead, permWrite, permResize}, unshared: []int{permWrite, permResize}}
	lockShared = lockMode{use: []int{permRead}}
)

var errNoLocks = fmt.Errorf("no locks here that QEMU can see (open file description locks): %w", errors.ErrUnsupported)

// LockError is a lock that another process holds. It matches ErrLocked.
type LockError struct {
	Path string
	Perm string // "consistent read", "write" or "resize"
	// Shared tells the two conflicts apart: false when the other does not
	// allow us Perm, true when the other has Perm and we do not allow it.
	Shared bool
}

// Error says which lock was not got, in QEMU's words, and why that may be.
func (e *LockError) Error() string {
	return fmt.Sprintf("%s: %s: another process (a running virtual machine?) uses the image", e.Path, e.Reason())
}

// Reason is QEMU's sentence: Failed to get "write" lock, or Failed to get
// shared "write" lock.
func (e *LockError) Reason() string {
	if e.Shared {
		return fmt.Sprintf("Failed to get shared %q lock", e.Perm)
	}
	return fmt.Sprintf("Failed to get %q lock", e.Perm)
}

// Is makes a LockError match ErrLocked.
func (e *LockError) Is(target error) bool { return target == ErrLocked }

// lock takes the bytes of mode on f, then looks whether another holds what
// contradicts them, and gives them back if so. Of two that try at the same
// time both can fail, never both succeed.
//
// The error matches ErrLocked for a conflict, and errors.ErrUnsupported where
// the system or the file system has no such locks.
func lock(f *os.File, path string, mode lockMode) error {
	err := takeLock(f, path, mode)
	if err != nil && !errors.Is(err, errors.ErrUnsupported) {
		unlockAll(f)
	}
	return err
}

func takeLock(f *os.File, path string, mode lockMode) error {
	for _, p := range mode.use {
		if err := setLock(f, lockUse+int64(p)); err != nil {
			return lockFailed(err, path, p, false)
		}
	}
	for _, p := range mode.unshared {
		if err := setLock(f, lockUnshared+int64(p)); err != nil {
			return lockFailed(err, path, p, true)
		}
	}
	for _, p := range mode.use {
		if err := testLock(f, lockUnshared+int64(p)); err != nil {
			return lockFailed(err, path, p, false)
		}
	}
	for _, p := range mode.unshared {
		if err := testLock(f, lockUse+int64(p)); err != nil {
			return lockFailed(err, path, p, true)
		}
	}
	return nil
}

func lockFailed(err error, path string, perm int, shared bool) error {
	if errors.Is(err, ErrLocked) {
		return &LockError{Path: path, Perm: permName(perm), Shared: shared}
	}
	return fmt.Errorf("%s: lock: %w", path, err)
}

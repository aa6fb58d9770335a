package qcow2

import (
	"errors"
	"fmt"
)

// Errors that are about an image match one of these by errors.Is. What else
// there is: an OptionError of options that the image cannot have, a BitmapError,
// ErrRebuild, ErrBitmaps, ErrNotPlanned, those of package blockdev (ErrRange,
// ErrReadOnly, LockError), os.ErrClosed, and the error of a context. An error
// of the device below matches none of them.
var (
	// ErrFormat: the file is not a qcow2 image.
	ErrFormat = errors.New("not a qcow2 image")
	// ErrCorrupt: a field of the image says what cannot be true.
	ErrCorrupt = errors.New("image is corrupt")
	// ErrMarkedCorrupt: the image has its corrupt bit set and was to be opened
	// for writing. It matches ErrCorrupt too.
	ErrMarkedCorrupt = fmt.Errorf("the corrupt bit is set: it can only be read until check -r all has repaired it: %w", ErrCorrupt)
	// ErrUnsupported: the image uses something that this package does not know.
	ErrUnsupported = errors.New("unsupported feature")
	// ErrEncrypted: guest data of an encrypted image was asked for, and
	// OpenOptions.Secret gave no passphrase. It matches ErrUnsupported too.
	ErrEncrypted = fmt.Errorf("image is encrypted: %w", ErrUnsupported)
	// ErrPassphrase: the passphrase fits none of the key slots of a LUKS
	// header.
	ErrPassphrase = errors.New("wrong passphrase")
	// ErrLimit: a size in the image is larger than the limit that QEMU and
	// this package set.
	ErrLimit = errors.New("limit exceeded")
	// ErrBacking: the image names another file (backing or data file) that
	// the options do not allow to be opened, or that cannot be opened.
	ErrBacking = errors.New("reference to another file")
	// ErrNotFound: the image has no snapshot of that id or name.
	ErrNotFound = errors.New("snapshot not found")
)

// FormatError tells which field of which structure is wrong.
type FormatError struct {
	Struct string // name of the structure, in the words of the specification
	Off    int64  // where it lies in the image file, in bytes; -1: nowhere
	Field  string // name of the field, may be empty
	Detail string // the value found and what was expected
	Err    error  // one of the sentinels of this package
}

func (e *FormatError) Error() string {
	s := "qcow2: " + e.Struct
	if e.Off >= 0 {
		s += fmt.Sprintf(" at %#x", e.Off)
	}
	s += ": "
	if e.Field != "" {
		s += e.Field + " "
	}
	return s + e.Detail
}

// Unwrap returns the sentinel.
func (e *FormatError) Unwrap() error { return e.Err }

// headerError is a FormatError of the header.
func headerError(err error, field, format string, args ...any) error {
	return &FormatError{"header", -1, field, fmt.Sprintf(format, args...), err}
}

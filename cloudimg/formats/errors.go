package formats

import (
	"errors"
	"fmt"
)

// Errors that are about an image match one of these by errors.Is. What else there
// is: those of package blockdev (ErrRange, ErrLocked), those of packages qcow2 and
// decomp for their formats, and the error of a context. An error of the file
// below matches none of them.
var (
	// ErrFormat: the file is not in the format that was named.
	ErrFormat = errors.New("not in this format")
	// ErrCorrupt: a field of the image says what cannot be true, or the file is
	// too short for it.
	ErrCorrupt = errors.New("image is corrupt")
	// ErrUnsupported: the image uses something that this package does not read.
	ErrUnsupported = errors.New("unsupported feature")
	// ErrReference: the image is completed by another file, which is never
	// opened.
	ErrReference = errors.New("reference to another file")
	// ErrDirty: the image was not closed properly. It has to be opened once
	// with the program that wrote it.
	ErrDirty = errors.New("image was not closed properly")
)

// FormatError tells what is wrong with an image.
type FormatError struct {
	Format string // in QEMU's word
	Struct string // name of the structure, in the words of the specification
	Off    int64  // where it lies in the file, in bytes; -1: nowhere
	Field  string // name of the field, may be empty
	Detail string // the value found and what was expected
	Err    error  // one of the sentinels of this package
}

func (e *FormatError) Error() string {
	s := e.Format + ": " + e.Struct
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

// at is a place in an image, for errors about it.
type at struct {
	format, structure string
	off               int64
}

func (a at) err(err error, field, format string, args ...any) error {
	return &FormatError{a.format, a.structure, a.off, field, fmt.Sprintf(format, args...), err}
}

func (a at) corrupt(field, format string, args ...any) error {
	return a.err(ErrCorrupt, field, format, args...)
}

func (a at) unsupported(field, format string, args ...any) error {
	return a.err(ErrUnsupported, field, format, args...)
}

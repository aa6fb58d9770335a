package ext4img

import (
	"errors"
	"fmt"
)

// Errors about what an existing file system says match one of these by
// errors.Is. Errors of the device below match none of them.
var (
	// ErrFormat: the device holds no ext2, ext3 or ext4 file system.
	ErrFormat = errors.New("not an ext2, ext3 or ext4 file system")
	// ErrCorrupt: a field says what cannot be true.
	ErrCorrupt = errors.New("file system is corrupt")
	// ErrChecksum: a structure does not match its checksum. It matches
	// ErrCorrupt too.
	ErrChecksum = fmt.Errorf("checksum mismatch: %w", ErrCorrupt)
	// ErrUnsupported: the file system, or one file, uses something that this
	// package does not know.
	ErrUnsupported = errors.New("unsupported feature")
	// ErrEncrypted: names or contents of an encrypted file were asked for. It
	// matches ErrUnsupported too.
	ErrEncrypted = fmt.Errorf("encrypted: %w", ErrUnsupported)
	// ErrNotDir: a directory was expected.
	ErrNotDir = errors.New("not a directory")
	// ErrIsDir: something else than a directory was expected.
	ErrIsDir = errors.New("is a directory")
	// ErrLoop: a path leads through more than 40 symlinks.
	ErrLoop = errors.New("too many levels of symbolic links")
)

// FormatError tells which field of which structure is wrong.
type FormatError struct {
	Struct string // name of the structure, in the words of the kernel's documentation
	Ino    Ino    // the inode that it belongs to; 0: none
	Block  int64  // the block of the file system where it lies; -1: not known
	Field  string // name of the field, may be empty
	Detail string // the value found and what was expected
	Err    error  // one of the sentinels of this package
}

func (e *FormatError) Error() string {
	s := "ext4: " + e.Struct
	switch {
	case e.Ino == 0:
	case e.Struct == "inode":
		s += fmt.Sprintf(" %d", e.Ino)
	default:
		s += fmt.Sprintf(" of inode %d", e.Ino)
	}
	if e.Block >= 0 {
		s += fmt.Sprintf(" at block %d", e.Block)
	}
	s += ": "
	if e.Field != "" {
		s += e.Field + " "
	}
	return s + e.Detail
}

// Unwrap returns the sentinel.
func (e *FormatError) Unwrap() error { return e.Err }

// place is the structure that an error is about.
type place struct {
	name  string
	ino   Ino
	block int64
}

func (p place) corrupt(field, format string, args ...any) error {
	return &FormatError{p.name, p.ino, p.block, field, fmt.Sprintf(format, args...), ErrCorrupt}
}

func (p place) checksum(found, expected uint32) error {
	return &FormatError{p.name, p.ino, p.block, "", fmt.Sprintf("checksum %#x, expected %#x", found, expected), ErrChecksum}
}

func (p place) unsupported(field, format string, args ...any) error {
	return &FormatError{p.name, p.ino, p.block, field, fmt.Sprintf(format, args...), ErrUnsupported}
}

package qcow2

import "fmt"

// BitmapReason says why something cannot be done with a bitmap.
type BitmapReason uint8

// Reasons of a BitmapError.
const (
	BitmapExists         BitmapReason = 1 + iota // there is one of that name
	BitmapNotFound                               // there is none of that name
	BitmapInconsistent                           // it was not saved: all it is good for is to be removed
	BitmapSizesDiffer                            // the two bitmaps are about disks of different sizes
	BitmapVersion2                               // images of version 2 have no bitmaps
	BitmapNameEmpty                              //
	BitmapNameLong                               // above 1023 bytes
	BitmapBadGranularity                         // not a power of two from 512 to 2 GiB
	BitmapTooLarge                               // above 512 MiB of bits
	BitmapNoDisk                                 // a disk of 0 bytes
	BitmapTooMany                                // above 65535 in an image
	BitmapDirectoryFull                          // above 64 MiB of directory
)

func (r BitmapReason) String() string {
	names := []string{
		"", "exists already", "not found", "is inconsistent: it can only be removed", "sizes of the disks differ",
		"images of version 2 have no bitmaps", "a name is needed", "name of more than 1023 bytes",
		"granularity is not a power of two from 512 to 2147483648", "takes more than 512 MiB: a larger granularity is needed",
		"a disk of 0 bytes has no bitmaps", "image has 65535 bitmaps already", "bitmap directory is full",
	}
	if r > 0 && int(r) < len(names) {
		return names[r]
	}
	return fmt.Sprintf("BitmapReason(%d)", uint8(r))
}

// BitmapError tells why something cannot be done with a bitmap of an image. The
// image has not changed.
type BitmapError struct {
	Name   string
	Reason BitmapReason
	// Sizes are those of the disks that a bitmap is merged into and from, where
	// they differ.
	Sizes [2]int64
}

func (e *BitmapError) Error() string {
	s := fmt.Sprintf("qcow2: bitmap %q: %v", e.Name, e.Reason)
	if e.Reason == BitmapSizesDiffer {
		s += fmt.Sprintf(": %d and %d bytes", e.Sizes[0], e.Sizes[1])
	}
	return s
}

// Unwrap returns ErrUnsupported or ErrLimit where one of them is the reason.
func (e *BitmapError) Unwrap() error {
	switch e.Reason {
	case BitmapVersion2:
		return ErrUnsupported
	case BitmapNameLong, BitmapTooLarge, BitmapTooMany, BitmapDirectoryFull:
		return ErrLimit
	}
	return nil
}

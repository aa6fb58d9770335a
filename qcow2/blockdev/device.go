// Package blockdev is the leaf of qimg: what a random-access disk is, and the
// devices that carry no format of their own (raw file, section, memory), with
// QEMU's image locks and the safe way to make a new file.
//
// A device has a size in bytes and is read and written at any offset. What
// else a device can do (sync, discard, write zeroes, truncate, reserve space,
// tell its extents, take bytes from another file inside the kernel) it says by
// implementing one of the small interfaces below; callers ask by type
// assertion and have a fallback.
//
// Nothing in this package knows an image format.
package blockdev

import (
	"fmt"
	"io"
	"os"
)

// Reader is a disk that can be read. ReadAt is safe for concurrent use.
//
// ReadAt follows io.ReaderAt: at the end of the device it returns the bytes
// that are there and io.EOF.
type Reader interface {
	io.ReaderAt
	// Size returns the size of the disk in bytes.
	Size() int64
}

// Device is a disk that can be read and written. A write beyond Size is an
// error, except on a device that says otherwise.
type Device interface {
	Reader
	io.WriterAt
}

// Syncer is a device whose completed writes survive a crash once Sync has
// returned nil.
type Syncer interface {
	Sync() error
}

// Discarder is a device that can forget a range. What a discarded range reads
// as is the device's to say.
type Discarder interface {
	Discard(off, n int64) error
}

// ZeroWriter is a device that can make a range read as zeroes without being
// sent them.
type ZeroWriter interface {
	WriteZeroes(off, n int64) error
}

// Truncater is a device whose size can be changed. What it gains reads as
// zeroes.
type Truncater interface {
	Truncate(size int64) error
}

// Allocator is a device that can reserve the space of a range, so that a later
// write there does not fail for want of it.
type Allocator interface {
	// Allocate reserves space for n bytes at off, inside the device. The range
	// reads as before. A device that finds out that it cannot returns an error
	// that matches errors.ErrUnsupported.
	Allocate(off, n int64) error
}

// RangeCopier is a device that can take bytes from a file faster than the
// program can read and write them: by sharing blocks, or on a server.
type RangeCopier interface {
	// CopyRange copies n bytes at srcOff of src to off, and returns how many
	// of them it copied, from the first on. Where it copied fewer than n, and
	// nothing is wrong, the error matches errors.ErrUnsupported: the caller
	// reads and writes the rest.
	CopyRange(off int64, src *os.File, srcOff, n int64) (int64, error)
}

// Range is a part of a device, in bytes.
type Range struct{ Off, Len int64 }

// SparseWriter is a device that is written in large pieces of which parts are
// zeroes.
type SparseWriter interface {
	// WriteSparse writes p at off. data are the parts of the device that are
	// to be written, ascending, inside of the piece, and not touching; the rest
	// of p is zeroes.
	WriteSparse(p []byte, off int64, data []Range) error
}

// ExtentReader is a device that knows which of its ranges hold data.
type ExtentReader interface {
	// NextExtent describes a run of one kind that starts at off; it may end
	// before the run does, so that the next extent can be of the same kind.
	// 0 <= off < Size; Off of the result is off, Len is at least 1 and does
	// not reach beyond Size.
	NextExtent(off int64) (Extent, error)
}

// ExtentKind tells what a range of a device is made of.
type ExtentKind uint8

const (
	// Data: bytes that have to be read.
	Data ExtentKind = 1 + iota
	// Zero: an entry of the format says that the range reads as zeroes.
	Zero
	// Compressed: bytes that have to be read and decompressed.
	Compressed
	// Unallocated: no layer holds anything; the range reads as zeroes.
	Unallocated
)

func (k ExtentKind) String() string {
	switch k {
	case Data:
		return "data"
	case Zero:
		return "zero"
	case Compressed:
		return "compressed"
	case Unallocated:
		return "unallocated"
	}
	return fmt.Sprintf("ExtentKind(%d)", uint8(k))
}

// ReadsZero reports whether a range of this kind reads as zeroes.
func (k ExtentKind) ReadsZero() bool { return k == Zero || k == Unallocated }

// Extent is a run of one kind.
type Extent struct {
	Off, Len int64 // place in the device that was asked
	Kind     ExtentKind
	// Depth is the layer that decides: 0 the device itself, 1 its backing
	// file, and so on. For Unallocated it is the depth of the last layer.
	Depth int
	// Host is the file whose bytes at HostOff are those of the range,
	// unchanged and in order; nil where there is none (compressed, encrypted,
	// nothing stored). A Zero extent can have a Host: space is kept for it,
	// its bytes are not those that are read.
	Host    Reader
	HostOff int64
}

package blockdev

import (
	"errors"
	"fmt"
	"io"
	"os"
)

// ReaderSection is a window on a Reader. Nothing outside the window can be
// reached through it. It is as safe for concurrent use as its parent.
type ReaderSection struct {
	r      Reader
	off, n int64
}

// NewReaderSection returns the window of n bytes at off of r. A window that is
// not wholly inside r is an error that matches ErrRange.
func NewReaderSection(r Reader, off, n int64) (*ReaderSection, error) {
	if err := checkRange(off, n, r.Size()); err != nil {
		return nil, fmt.Errorf("section: %w", err)
	}
	return &ReaderSection{r, off, n}, nil
}

// Size returns the size of the window in bytes.
func (s *ReaderSection) Size() int64 { return s.n }

// ReadAt reads from the window. At its end it returns the bytes that are there
// and io.EOF.
func (s *ReaderSection) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, checkRange(off, int64(len(p)), s.n)
	}
	if off >= s.n {
		return 0, eofUnlessEmpty(p)
	}
	if int64(len(p)) <= s.n-off {
		return s.r.ReadAt(p, s.off+off)
	}
	n, err := s.r.ReadAt(p[:s.n-off], s.off+off)
	if err == nil {
		err = io.EOF
	}
	return n, err
}

// eofUnlessEmpty is the result of reading p at or beyond the end.
func eofUnlessEmpty(p []byte) error {
	if len(p) == 0 {
		return nil
	}
	return io.EOF
}

// NextExtent is the parent's answer, clipped to the window. A parent that is
// no ExtentReader is one extent of data.
func (s *ReaderSection) NextExtent(off int64) (Extent, error) {
	if err := checkRange(off, 1, s.n); err != nil {
		return Extent{}, err
	}
	e, err := NextExtent(s.r, s.off+off)
	if err != nil {
		return Extent{}, err
	}
	e.Off = off
	e.Len = min(e.Len, s.n-off)
	return e, nil
}

// Section is a window on a Device. Nothing outside the window can be reached
// through it. It is as safe for concurrent use as its parent.
//
// A Section has every optional method but Truncate. Where its parent lacks
// one, the method does what a caller would do without it; see each.
type Section struct {
	ReaderSection
	d Device
}

// NewSection returns the window of n bytes at off of d. A window that is not
// wholly inside d is an error that matches ErrRange.
func NewSection(d Device, off, n int64) (*Section, error) {
	r, err := NewReaderSection(d, off, n)
	if err != nil {
		return nil, err
	}
	return &Section{*r, d}, nil
}

// WriteAt writes to the window. A write that reaches beyond its end writes
// nothing and is an error that matches ErrRange.
func (s *Section) WriteAt(p []byte, off int64) (int, error) {
	if err := checkRange(off, int64(len(p)), s.n); err != nil {
		return 0, err
	}
	return s.d.WriteAt(p, s.off+off)
}

// Sync syncs the parent. On a parent that is no Syncer it does nothing.
func (s *Section) Sync() error { return Sync(s.d) }

// Discard discards a range of the parent, which then reads as the parent says.
// On a parent that is no Discarder the bytes stay as they are.
func (s *Section) Discard(off, n int64) error {
	if err := checkRange(off, n, s.n); err != nil {
		return err
	}
	if d, ok := s.d.(Discarder); ok {
		return d.Discard(s.off+off, n)
	}
	return nil
}

// WriteZeroes makes a range read as zeroes. On a parent that is no ZeroWriter
// zeroes are written.
func (s *Section) WriteZeroes(off, n int64) error {
	if err := checkRange(off, n, s.n); err != nil {
		return err
	}
	return WriteZeroes(s.d, s.off+off, n)
}

// Allocate is the parent's Allocate. On a parent that is no Allocator the error
// matches errors.ErrUnsupported.
func (s *Section) Allocate(off, n int64) error {
	if err := checkRange(off, n, s.n); err != nil {
		return err
	}
	if a, ok := s.d.(Allocator); ok {
		return a.Allocate(s.off+off, n)
	}
	return fmt.Errorf("section: allocate: %w", errors.ErrUnsupported)
}

// CopyRange is the parent's CopyRange. On a parent that is no RangeCopier the
// error matches errors.ErrUnsupported.
func (s *Section) CopyRange(off int64, src *os.File, srcOff, n int64) (int64, error) {
	if err := checkRange(off, n, s.n); err != nil {
		return 0, err
	}
	if c, ok := s.d.(RangeCopier); ok {
		return c.CopyRange(s.off+off, src, srcOff, n)
	}
	return 0, fmt.Errorf("section: kernel copy: %w", errors.ErrUnsupported)
}

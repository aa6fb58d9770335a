package qcow2

import (
	"fmt"

	"qimg/qcow2/blockdev"
)

// shadow is a device that reads as another one and keeps in memory what is
// written to it. It is not safe for concurrent use.
type shadow struct {
	base  blockdev.Reader
	size  int64
	pages map[int64]*[shadowPage]byte
}

const shadowPage = 4096

func newShadow(base blockdev.Reader) *shadow {
	return &shadow{base, base.Size(), make(map[int64]*[shadowPage]byte)}
}

func (s *shadow) Size() int64 { return s.size }

func (s *shadow) Sync() error { return nil }

// Truncate sets the size.
func (s *shadow) Truncate(size int64) error {
	s.size = size
	return nil
}

// WriteZeroes does nothing: what is written so is guest data, which nobody reads
// in a dry run.
func (s *shadow) WriteZeroes(off, n int64) error { return nil }

func (s *shadow) ReadAt(p []byte, off int64) (int, error) {
	n := len(p)
	for len(p) > 0 {
		page, err := s.page(off/shadowPage, false)
		if err != nil {
			return 0, err
		}
		c := min(len(p), int(shadowPage-off%shadowPage))
		if page != nil {
			copy(p[:c], page[off%shadowPage:])
		} else if err := readFull(s.base, p[:c], off); err != nil {
			return 0, err
		}
		p, off = p[c:], off+int64(c)
	}
	return n, nil
}

func (s *shadow) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || int64(len(p)) > s.size-off {
		return 0, fmt.Errorf("qcow2: write of %d bytes at %#x: %w", len(p), off, blockdev.ErrRange)
	}
	n := len(p)
	for len(p) > 0 {
		page, err := s.page(off/shadowPage, true)
		if err != nil {
			return 0, err
		}
		c := copy(page[off%shadowPage:], p)
		p, off = p[c:], off+int64(c)
	}
	return n, nil
}

// page returns a page that was written, or one to be written.
func (s *shadow) page(i int64, write bool) (*[shadowPage]byte, error) {
	page := s.pages[i]
	if page == nil && write {
		page = new([shadowPage]byte)
		if err := readFull(s.base, page[:], i*shadowPage); err != nil {
			return nil, err
		}
		s.pages[i] = page
	}
	return page, nil
}

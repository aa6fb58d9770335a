package decomp

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"qimg/qcow2/blockdev"
)

// Disk is decompressed content, to be read at any place. It is safe for
// concurrent use.
type Disk struct {
	f      *blockdev.File
	path   string // to be removed; "": it has no name
	format string
}

// Open decompresses src into a temporary file in the folder dir. The file is as
// large as what is not zero in the content, and has no name while it is used, where
// the system can do that: it goes away with the process.
//
// ctx ends it early. opts may be nil.
func Open(ctx context.Context, src blockdev.Reader, dir string, opts *Options) (*Disk, error) {
	if opts == nil {
		opts = &Options{}
	}
	if dir == "" {
		return nil, errors.New("decomp: no folder for the temporary file")
	}
	format, err := Detect(src)
	if err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(dir, "qimg-*")
	if err != nil {
		return nil, err
	}
	d := &Disk{format: format}
	if os.Remove(f.Name()) != nil { // Windows: only when it is closed
		d.path = f.Name()
	}
	out := &sparseFile{f: f}
	err = content(ctx, out, src, opts)
	if err == nil {
		err = f.Truncate(out.size)
	}
	if err == nil {
		d.f, err = blockdev.NewFile(f, &blockdev.FileOptions{NoLock: true})
	}
	if err != nil {
		f.Close()
		return nil, errors.Join(fmt.Errorf("decomp: %w", err), d.remove())
	}
	return d, nil
}

// Format returns the name of the format of the input.
func (d *Disk) Format() string { return d.format }

// Size returns the size of the content in bytes.
func (d *Disk) Size() int64 { return d.f.Size() }

// ReadAt implements io.ReaderAt.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) { return d.f.ReadAt(p, off) }

// NextExtent implements blockdev.ExtentReader: zeroes of 4 KiB and more are Zero,
// where the file system has holes. No extent has a Host: the file is not that of the
// input.
func (d *Disk) NextExtent(off int64) (blockdev.Extent, error) {
	e, err := d.f.NextExtent(off)
	e.Host, e.HostOff = nil, 0
	return e, err
}

// Close removes the temporary file.
func (d *Disk) Close() error { return errors.Join(d.f.Close(), d.remove()) }

func (d *Disk) remove() error {
	if d.path == "" {
		return nil
	}
	return os.Remove(d.path)
}

// holeSize is the unit of holes.
const holeSize = 4 << 10

// sparseFile is an empty file that is written without the zeroes.
type sparseFile struct {
	f    *os.File
	size int64 // of the content; Truncate is to set it
}

// write writes p at off. Writes of ranges that do not overlap can be made at the
// same time.
func (s *sparseFile) write(p []byte, off int64) error {
	zeroes := make([]byte, holeSize)
	start := 0 // of what is not yet written
	flush := func(end int) error {
		if start == end {
			return nil
		}
		_, err := s.f.WriteAt(p[start:end], off+int64(start))
		return err
	}
	for at := 0; at < len(p); {
		// Up to the next multiple of holeSize in the file.
		n := min(holeSize-int((off+int64(at))%holeSize), len(p)-at)
		if bytes.Equal(p[at:at+n], zeroes[:n]) {
			if err := flush(at); err != nil {
				return &ioError{err}
			}
			start = at + n
		}
		at += n
	}
	if err := flush(len(p)); err != nil {
		return &ioError{err}
	}
	return nil
}

// copy writes all of r, which may not be more than limit bytes.
func (s *sparseFile) copy(r io.Reader, limit int64) error {
	buf := make([]byte, 1<<20)
	for {
		n, err := io.ReadFull(r, buf)
		if int64(n) > limit-s.size {
			return &SizeError{limit}
		}
		if e := s.write(buf[:n], s.size); e != nil {
			return e
		}
		s.size += int64(n)
		switch err {
		case nil:
		case io.EOF:
			return nil
		case io.ErrUnexpectedEOF:
			// Of ReadFull, or of r: r says it again.
			if _, err = r.Read(buf[:1]); err == io.EOF {
				return nil
			}
			return io.ErrUnexpectedEOF
		default:
			return err
		}
	}
}

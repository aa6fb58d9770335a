package decomp

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
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
	if d.f, err = blockdev.NewFile(f, &blockdev.FileOptions{Write: true, NoLock: true}); err == nil {
		err = content(ctx, spool{d.f}, src, opts)
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

// spool is the temporary file while it is written. Its errors are told from those of
// a decompressor.
type spool struct{ *blockdev.File }

func (s spool) WriteAt(p []byte, off int64) (int, error) {
	n, err := s.File.WriteAt(p, off)
	return n, fileError(err)
}

func (s spool) Truncate(size int64) error { return fileError(s.File.Truncate(size)) }

func fileError(err error) error {
	if err == nil {
		return nil
	}
	return &ioError{err}
}

// copy writes all of r, which may not be more than limit bytes.
func (s spool) copy(r io.Reader, limit int64) error {
	if limit < math.MaxInt64 {
		r = io.LimitReader(r, limit+1)
	}
	n, err := blockdev.Spool(s, r)
	if n > limit {
		return &SizeError{limit}
	}
	return err
}

package blockdev

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync/atomic"
)

// FileOptions says how a file is opened. The zero value, and nil, mean for
// reading, with the lock of a reader.
type FileOptions struct {
	// Write opens for reading and writing, with the lock of a writer.
	Write bool
	// ForceShare lets others write the file meanwhile, so that what is read
	// may be stale or torn. It is for looking at an image that a running
	// machine uses; it cannot be had together with Write.
	ForceShare bool
	// NoLock takes no lock and looks at none.
	NoLock bool
}

// File is a raw file or a block device, as a Device.
//
// Its size is that at the time of opening, changed by Truncate only: a write
// beyond it is an error that matches ErrRange. After a failed write or sync it
// is read-only and says why: whatever is then on the disk, nothing more is put
// upon it. After Close every method returns an error that matches
// os.ErrClosed.
//
// All methods are safe for concurrent use. Writes of overlapping ranges at the
// same time leave either's bytes.
type File struct {
	f        *os.File
	name     string
	writable bool
	regular  bool
	locked   bool
	size     atomic.Int64
	closed   atomic.Bool
	failed   atomic.Pointer[error] // the first failed write or sync
	behind   *writeBehind          // nil: the page cache does as it likes
}

// OpenFile opens a regular file or a block device; anything else is refused.
// Symlinks are followed.
//
// It takes QEMU's byte-range locks before anything is read, on the descriptor
// that is used from then on. A conflict is a *LockError, which matches
// ErrLocked. Where the system or the file system has no such locks (they are
// Linux's open file description locks), opening for writing is an error that
// matches errors.ErrUnsupported, unless NoLock is set, and opening for reading
// goes on without a lock; Locked tells.
func OpenFile(path string, opts *FileOptions) (*File, error) {
	flag := os.O_RDONLY
	if opts != nil && opts.Write {
		flag = os.O_RDWR
	}
	f, err := os.OpenFile(path, flag|openFlags, 0)
	if err != nil {
		return nil, err
	}
	d, err := NewFile(f, opts)
	if err != nil {
		f.Close()
		return nil, err
	}
	return d, nil
}

// NewFile makes a device of an open file, locked as OpenFile says. With
// opts.Write f has to be open for reading and writing. Close closes f; if
// NewFile fails f stays open.
func NewFile(f *os.File, opts *FileOptions) (*File, error) {
	if opts == nil {
		opts = &FileOptions{}
	}
	if opts.Write && opts.ForceShare {
		return nil, fmt.Errorf("%s: a file cannot be opened both for writing and with force-share", f.Name())
	}
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if err := checkKind(f.Name(), st.Mode()); err != nil {
		return nil, err
	}
	if opts.Write && !st.Mode().IsRegular() && readOnlyDevice(f) {
		return nil, fmt.Errorf("%s: %w", f.Name(), ErrNotWritable)
	}
	d := &File{f: f, name: f.Name(), writable: opts.Write, regular: st.Mode().IsRegular()}
	if !opts.NoLock {
		mode := lockReader
		switch {
		case opts.Write:
			mode = lockWriter
		case opts.ForceShare:
			mode = lockShared
		}
		err := lock(f, f.Name(), mode)
		if err != nil && (opts.Write || !errors.Is(err, errors.ErrUnsupported)) {
			return nil, err
		}
		d.locked = err == nil
	}
	// Only now, under the lock, is the size one that stays.
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		if d.locked {
			unlockAll(f)
		}
		return nil, err
	}
	d.size.Store(size)
	return d, nil
}

// checkKind refuses what is neither a regular file nor a block device.
func checkKind(name string, mode fs.FileMode) error {
	switch {
	case mode.IsRegular(), mode&fs.ModeDevice != 0 && mode&fs.ModeCharDevice == 0:
		return nil
	case mode.IsDir():
		return fmt.Errorf("%s: is a directory, not a regular file or block device", name)
	}
	return fmt.Errorf("%s: is of type %v, not a regular file or block device", name, mode.Type())
}

// Name returns the name that the file was opened or will be made by.
func (f *File) Name() string { return f.name }

// OS returns the file itself, for kernel copies from it. Its bytes are not to
// be written through it, nor is it to be closed.
func (f *File) OS() *os.File { return f.f }

// Locked reports whether QEMU's locks are held.
func (f *File) Locked() bool { return f.locked }

// Size returns the size in bytes.
func (f *File) Size() int64 { return f.size.Load() }

// Allocated returns how many bytes of the disk the file takes, without its
// holes where the system tells.
func (f *File) Allocated() (int64, error) {
	if f.closed.Load() {
		return 0, f.errClosed("stat")
	}
	info, err := f.f.Stat()
	if err != nil {
		return 0, err
	}
	return allocated(info), nil
}

// Close closes the file, which gives back its locks. It does not sync.
func (f *File) Close() error {
	if f.closed.Swap(true) {
		return f.errClosed("close")
	}
	return f.f.Close()
}

func (f *File) errClosed(op string) error {
	return &fs.PathError{Op: op, Path: f.name, Err: os.ErrClosed}
}

// ReadAt implements io.ReaderAt. At the end of the file it returns the bytes
// that are there and io.EOF; a file that has become shorter than Size is
// io.ErrUnexpectedEOF.
func (f *File) ReadAt(p []byte, off int64) (int, error) {
	if f.closed.Load() {
		return 0, f.errClosed("read")
	}
	size := f.Size()
	if off < 0 {
		return 0, fmt.Errorf("%s: read: %w", f.name, checkRange(off, int64(len(p)), size))
	}
	if off >= size {
		return 0, eofUnlessEmpty(p)
	}
	var atEnd error
	if int64(len(p)) > size-off {
		p, atEnd = p[:size-off], io.EOF
	}
	n, err := f.f.ReadAt(p, off)
	if err == io.EOF {
		return n, fmt.Errorf("%s: read at offset %d: the file has become shorter than %d bytes: %w",
			f.name, off+int64(n), size, io.ErrUnexpectedEOF)
	}
	if err != nil {
		return n, err
	}
	return n, atEnd
}

// change checks that n bytes at off may be changed.
func (f *File) change(op string, off, n int64) error {
	if err := f.mayWrite(op); err != nil {
		return err
	}
	if err := checkRange(off, n, f.Size()); err != nil {
		return fmt.Errorf("%s: %s: %w", f.name, op, err)
	}
	return nil
}

func (f *File) mayWrite(op string) error {
	if f.closed.Load() {
		return f.errClosed(op)
	}
	if !f.writable {
		return fmt.Errorf("%s: %s: opened for reading: %w", f.name, op, ErrReadOnly)
	}
	if err := f.failed.Load(); err != nil {
		return fmt.Errorf("%s: %s: %w after an earlier failure: %w", f.name, op, ErrReadOnly, *err)
	}
	return nil
}

// fail makes the file read-only and keeps err, if it is the first one.
func (f *File) fail(err error) error {
	if err != nil && !errors.Is(err, os.ErrClosed) {
		f.failed.CompareAndSwap(nil, &err)
	}
	return err
}

// WriteAt implements io.WriterAt. A write that reaches beyond Size writes
// nothing.
func (f *File) WriteAt(p []byte, off int64) (int, error) {
	if err := f.change("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	touch(p)
	n, err := f.f.WriteAt(p, off)
	if err == nil && f.behind != nil {
		err = f.behind.wrote(f.f, off, int64(n))
	}
	return n, f.fail(err)
}

// touch reads a byte of each page of p. A process that is killed while the kernel
// copies p ends its write where a page of p is not in memory yet, as those of new
// zeroes are not; in the file that can be inside a sector, when p does not
// begin on one.
//
//go:noinline
func touch(p []byte) (sum int) {
	const page = 4096 // at least
	for i := 0; i < len(p); i += page {
		sum += int(p[i])
	}
	if len(p) > 0 {
		sum += int(p[len(p)-1])
	}
	return sum
}

// Sync makes the completed writes survive a crash (fdatasync). It is not tried
// again after a failure: the kernel may have dropped what it could not write.
// On a file that was opened for reading it does nothing.
func (f *File) Sync() error {
	if f.closed.Load() {
		return f.errClosed("sync")
	}
	if !f.writable {
		return nil
	}
	if err := f.mayWrite("sync"); err != nil {
		return err
	}
	return f.fail(syncData(f.f))
}

// WriteZeroes makes a range read as zeroes: a hole is punched, or the file
// system zeroes the range, or else zeroes are written. No space is kept.
func (f *File) WriteZeroes(off, n int64) error {
	if err := f.change("write zeroes", off, n); err != nil || n == 0 {
		return err
	}
	err := punch(f.f, off, n)
	if errors.Is(err, errors.ErrUnsupported) {
		return FillZeroes(context.Background(), f, off, n, nil)
	}
	if err != nil {
		return f.fail(fmt.Errorf("%s: write %d zeroes at offset %d: %w", f.name, n, off, err))
	}
	return nil
}

// Allocate reserves space for a range (fallocate), on Linux, where the file
// system can do that; elsewhere the error matches errors.ErrUnsupported.
func (f *File) Allocate(off, n int64) error {
	if err := f.change("allocate", off, n); err != nil || n == 0 {
		return err
	}
	err := allocate(f.f, off, n)
	if err == nil {
		return nil
	}
	err = fmt.Errorf("%s: allocate %d bytes at offset %d: %w", f.name, n, off, err)
	if !errors.Is(err, errors.ErrUnsupported) {
		f.fail(err)
	}
	return err
}

// Discard is WriteZeroes: a discarded range reads as zeroes, also where no
// hole can be punched.
func (f *File) Discard(off, n int64) error { return f.WriteZeroes(off, n) }

// Truncate sets the size. What the file gains reads as zeroes. The size of a
// block device cannot be set: the error matches errors.ErrUnsupported.
func (f *File) Truncate(size int64) error {
	if err := f.mayWrite("truncate"); err != nil {
		return err
	}
	if size < 0 {
		return fmt.Errorf("%s: truncate to %d bytes: %w", f.name, size, ErrRange)
	}
	if !f.regular {
		return fmt.Errorf("%s: truncate a device: %w", f.name, errors.ErrUnsupported)
	}
	if err := f.f.Truncate(size); err != nil {
		return f.fail(err)
	}
	f.size.Store(size)
	return nil
}

// CutBack makes the file shorter, also after a failed write, unlike Truncate: a
// file system that is full gets back what the file has gained in vain. After a
// failure the file stays closed to all other changes.
func (f *File) CutBack(size int64) error {
	if f.closed.Load() {
		return f.errClosed("cut back")
	}
	if !f.writable {
		return fmt.Errorf("%s: cut back: opened for reading: %w", f.name, ErrReadOnly)
	}
	if size < 0 || size > f.size.Load() {
		return fmt.Errorf("%s: cut back to %d bytes: %w", f.name, size, ErrRange)
	}
	if !f.regular {
		return fmt.Errorf("%s: cut back a device: %w", f.name, errors.ErrUnsupported)
	}
	if err := f.f.Truncate(size); err != nil {
		return f.fail(err)
	}
	f.size.Store(size)
	return nil
}

// Shares reports whether the file lies on a file system that can share blocks
// with src, so that CopyRange of whole blocks is likely to do something.
func (f *File) Shares(src *os.File) bool { return shares(f.f, src) }

// CopyRange implements RangeCopier by reflinks, and on network file systems by
// copy_file_range, on Linux. src and the file may be the same when the ranges do
// not overlap.
func (f *File) CopyRange(off int64, src *os.File, srcOff, n int64) (int64, error) {
	if err := f.change("copy", off, n); err != nil {
		return 0, err
	}
	if srcOff < 0 {
		return 0, fmt.Errorf("%s: copy from offset %d: %w", f.name, srcOff, ErrRange)
	}
	done, err := copyRange(f.f, off, src, srcOff, n)
	if err == nil {
		return done, nil
	}
	err = fmt.Errorf("%s: copy %d bytes to offset %d: %w", f.name, n, off, err)
	if !errors.Is(err, errors.ErrUnsupported) {
		f.fail(err)
	}
	return done, err
}

// NextExtent tells data from holes, which are Zero, where the file system can
// (SEEK_DATA, Linux); elsewhere all is Data.
func (f *File) NextExtent(off int64) (Extent, error) {
	if f.closed.Load() {
		return Extent{}, f.errClosed("next extent")
	}
	size := f.Size()
	if err := checkRange(off, 1, size); err != nil {
		return Extent{}, fmt.Errorf("%s: next extent: %w", f.name, err)
	}
	e := Extent{Off: off, Len: size - off, Kind: Data, Host: f, HostOff: off}
	at, err := seekData(f.f, off, size)
	if err == nil {
		if at > off {
			e.Kind = Zero
		} else {
			at, err = seekHole(f.f, off, size)
		}
	}
	switch {
	case errors.Is(err, errors.ErrUnsupported):
		return e, nil
	case err != nil:
		return Extent{}, fmt.Errorf("%s: next extent at offset %d: %w", f.name, off, err)
	}
	e.Len = at - off
	return e, nil
}

package blockdev

import (
	"context"
	"errors"
)

// zeroBuffer is the size of the largest buffer of zeroes that is written where
// a device cannot make zeroes itself.
const zeroBuffer = 1 << 20

// Sync calls the device's Sync. A device that is no Syncer has nothing to do.
func Sync(r Reader) error {
	if s, ok := r.(Syncer); ok {
		return s.Sync()
	}
	return nil
}

// WriteZeroes makes n bytes at off read as zeroes: by the device's own
// WriteZeroes, or by writing zeroes where it is no ZeroWriter.
func WriteZeroes(d Device, off, n int64) error {
	if z, ok := d.(ZeroWriter); ok {
		return z.WriteZeroes(off, n)
	}
	return FillZeroes(context.Background(), d, off, n, nil)
}

// FillZeroes writes n zeroes at off, so that space is taken for them, also
// where WriteZeroes would leave a hole. ctx is looked at before each piece of
// at most 1 MiB, and progress, unless it is nil, is told after each how many of
// the n bytes have been written. A range that is not wholly inside d is an
// error that matches ErrRange; nothing is written then.
func FillZeroes(ctx context.Context, d Device, off, n int64, progress func(done, total int64)) error {
	if err := checkRange(off, n, d.Size()); err != nil {
		return err
	}
	buf := make([]byte, min(n, zeroBuffer))
	for done := int64(0); done < n; {
		if err := ctx.Err(); err != nil {
			return err
		}
		m, err := d.WriteAt(buf[:min(n-done, zeroBuffer)], off+done)
		if err != nil {
			return err
		}
		done += int64(m)
		if progress != nil {
			progress(done, n)
		}
	}
	return nil
}

// AllocateZeroes reserves space for n bytes at off that read as zeroes: by the
// device's Allocate, or by FillZeroes where it has none or cannot.
func AllocateZeroes(ctx context.Context, d Device, off, n int64, progress func(done, total int64)) error {
	if a, ok := d.(Allocator); ok {
		if err := a.Allocate(off, n); !errors.Is(err, errors.ErrUnsupported) {
			return err
		}
	}
	return FillZeroes(ctx, d, off, n, progress)
}

// NextExtent is the device's NextExtent. A device that is no ExtentReader is
// one extent of data, found in the device itself.
func NextExtent(r Reader, off int64) (Extent, error) {
	if e, ok := r.(ExtentReader); ok {
		return e.NextExtent(off)
	}
	if err := checkRange(off, 1, r.Size()); err != nil {
		return Extent{}, err
	}
	return Extent{Off: off, Len: r.Size() - off, Kind: Data, Host: r, HostOff: off}, nil
}

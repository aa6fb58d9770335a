package blockdev

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
	if err := checkRange(off, n, d.Size()); err != nil {
		return err
	}
	return writeZeroes(d.WriteAt, off, n)
}

// writeZeroes writes n zeroes at off in pieces of at most zeroBuffer bytes.
func writeZeroes(writeAt func([]byte, int64) (int, error), off, n int64) error {
	buf := make([]byte, min(n, zeroBuffer))
	for n > 0 {
		m, err := writeAt(buf[:min(n, zeroBuffer)], off)
		if err != nil {
			return err
		}
		off += int64(m)
		n -= int64(m)
	}
	return nil
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

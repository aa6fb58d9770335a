package blockdev

import (
	"bytes"
	"io"
)

// spoolBlock is the unit of the holes that WriteData leaves.
const spoolBlock = 4 << 10

// WriteData writes p at off, but for blocks of 4 KiB, counted from the beginning of
// dst, that are zeroes: for a range that reads as zeroes. It can be called for
// several ranges at the same time if dst can.
func WriteData(dst io.WriterAt, p []byte, off int64) error {
	zeroes := make([]byte, spoolBlock)
	start := 0 // of what is not yet written
	flush := func(end int) error {
		if start == end {
			return nil
		}
		_, err := dst.WriteAt(p[start:end], off+int64(start))
		return err
	}
	for at := 0; at < len(p); {
		n := min(spoolBlock-int((off+int64(at))%spoolBlock), len(p)-at)
		if bytes.Equal(p[at:at+n], zeroes[:n]) {
			if err := flush(at); err != nil {
				return err
			}
			start = at + n
		}
		at += n
	}
	return flush(len(p))
}

// Spool writes what r gives into an empty file, by WriteData, and returns how many
// bytes the file has then. The error is that of r, but for io.EOF, or of dst.
func Spool(dst interface {
	io.WriterAt
	Truncater
}, r io.Reader) (size int64, err error) {
	buf := make([]byte, 1<<20)
	for err == nil {
		n := 0
		for n < len(buf) && err == nil {
			var m int
			m, err = r.Read(buf[n:])
			n += m
		}
		if n == 0 {
			break
		}
		if err := dst.Truncate(size + int64(n)); err != nil {
			return size, err
		}
		if err := WriteData(dst, buf[:n], size); err != nil {
			return size, err
		}
		size += int64(n)
	}
	if err == io.EOF {
		err = nil
	}
	return size, err
}

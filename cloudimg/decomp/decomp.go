// Package decomp gives random access to disk images that are compressed as a
// whole: gzip, xz, zstd and bzip2, by content.
//
// Open decompresses into a temporary file without a name, in which zeroes are
// holes, and returns that as a blockdev.Reader. What is wrong anywhere in the
// input is an error of Open: a checksum, an end that is missing, or something
// behind the end. Several members, frames or streams one after another are one
// content, as for the programs gzip, xz, zstd and bzip2.
//
// The size of the content is bounded, see Options.MaxSize, and so is memory, by the
// window:
//
//	gzip   32 KiB
//	bzip2  a block of 900 kB, four times
//	xz     dictionaries of up to 64 MiB, of all blocks that are decoded at a time
//	zstd   windows of up to 64 MiB, for inputs of 16 MiB and more 128 MiB
//
// A dictionary of 64 MiB can be followed by that of the next block before the first
// is collected.
//
// Of xz the filters besides LZMA2 are not known, of zstd dictionaries.
package decomp

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"context"
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"qimg/qcow2/blockdev"
)

// Names of formats.
const (
	Gzip  = "gzip"
	XZ    = "xz"
	Zstd  = "zstd"
	Bzip2 = "bzip2"
)

// Errors that are about the input match one of these by errors.Is. An error of
// reading the input, or of writing the temporary file, matches none of them.
var (
	// ErrFormat: the input is in none of the formats, or not in the one that
	// was named.
	ErrFormat = errors.New("not compressed in a known format")
	// ErrCorrupt: the input is damaged, ends too early, or is followed by
	// something else.
	ErrCorrupt = errors.New("compressed data is corrupt")
	// ErrLimit: the content is larger than Options.MaxSize, or needs more memory
	// than is allowed.
	ErrLimit = errors.New("limit exceeded")
	// ErrUnsupported: the input uses something that this package does not know.
	ErrUnsupported = errors.New("unsupported feature")
)

const (
	// DefaultMaxSize is the bound of the content where neither Options.MaxSize nor
	// the input names one, 256 GiB.
	DefaultMaxSize = 256 << 30
	// maxGzipRatio is the most that deflate can do.
	maxGzipRatio = 1032
	// maxWindow bounds windows and dictionaries; maxWindowLarge those of zstd of
	// inputs of at least largeInput. It is the bound of the program zstd.
	maxWindow      = 64 << 20
	maxWindowLarge = 128 << 20
	largeInput     = 16 << 20
	inputBuffer    = 256 << 10
)

// Detect names the format by its magic number; "" where there is none that is
// known.
func Detect(r io.ReaderAt) (string, error) {
	b := make([]byte, 10)
	n, err := r.ReadAt(b, 0)
	if n < len(b) && err != io.EOF {
		return "", err
	}
	b = b[:n]
	switch {
	case bytes.HasPrefix(b, []byte("\x1f\x8b\x08")):
		return Gzip, nil
	case bytes.HasPrefix(b, []byte(xzMagic)):
		return XZ, nil
	case bytes.HasPrefix(b, []byte("\x28\xb5\x2f\xfd")):
		return Zstd, nil
	case n == 10 && string(b[:3]) == "BZh" && '1' <= b[3] && b[3] <= '9' &&
		(string(b[4:]) == "1AY&SY" || string(b[4:]) == "\x17\x72\x45\x38\x50\x90"):
		return Bzip2, nil
	}
	return "", nil
}

// Options says how an input is decompressed.
type Options struct {
	// Format is the name of the format; "" means that of Detect.
	Format string
	// MaxSize bounds the size of the content in bytes: more is a *SizeError. 0
	// means what the input declares, where it does: xz in its index, zstd in
	// its first frame if that is more than DefaultMaxSize; and DefaultMaxSize
	// elsewhere. Whatever it says, content that is not what the input declares
	// is ErrCorrupt, and gzip is held to the most that deflate can do.
	MaxSize int64
}

// SizeError is an error of content that is larger than allowed. It matches ErrLimit.
type SizeError struct {
	Max int64 // what is allowed, in bytes
}

func (e *SizeError) Error() string {
	return fmt.Sprintf("the content has more than %d bytes: %v", e.Max, ErrLimit)
}

// Unwrap returns ErrLimit.
func (e *SizeError) Unwrap() error { return ErrLimit }

// content writes what src decompresses to.
func content(ctx context.Context, dst spool, src blockdev.Reader, opts *Options) error {
	found, err := Detect(src)
	switch {
	case err != nil:
		return err
	case found == "", opts.Format != "" && opts.Format != found:
		return ErrFormat
	}
	limit := opts.MaxSize
	if limit == 0 {
		if limit, err = declared(src, found); err != nil {
			return err
		}
	}
	in := bufio.NewReaderSize(&contextReader{ctx, io.NewSectionReader(src, 0, src.Size()), nil}, inputBuffer)
	switch found {
	case XZ:
		err = decodeXZ(ctx, dst, src, limit)
	case Gzip:
		limit = min(limit, (src.Size()+1)*maxGzipRatio)
		var z *gzip.Reader
		if z, err = gzip.NewReader(in); err == nil {
			err = dst.copy(z, limit)
		}
	case Bzip2:
		err = dst.copy(bzip2.NewReader(in), limit)
	case Zstd:
		window := uint64(maxWindow)
		if src.Size() >= largeInput {
			window = maxWindowLarge
		}
		var z *zstd.Decoder
		if z, err = zstd.NewReader(in, zstd.WithDecoderMaxWindow(window), zstd.WithDecoderMaxMemory(window), zstd.WithDecoderLowmem(true)); err == nil {
			defer z.Close()
			err = dst.copy(z, limit)
		}
	}
	return inputError(found, err)
}

// declared bounds the content of an input by what it says itself, where it does.
func declared(src blockdev.Reader, format string) (int64, error) {
	switch format {
	case XZ:
		return math.MaxInt64, nil // each block is held to the index
	case Zstd:
		var h zstd.Header
		b := make([]byte, zstd.HeaderMaxSize)
		n, err := src.ReadAt(b, 0)
		if n < len(b) && err != io.EOF {
			return 0, err
		}
		if h.Decode(b[:n]) == nil && h.HasFCS && h.FrameContentSize < math.MaxInt64 {
			return max(int64(h.FrameContentSize), DefaultMaxSize), nil
		}
	}
	return DefaultMaxSize, nil
}

// inputError makes an error of a decompressor one that matches ErrCorrupt, or
// what it is otherwise.
func inputError(format string, err error) error {
	var own *ioError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &own): // of the files, not of what is in them
		return own.err
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case errors.Is(err, ErrCorrupt), errors.Is(err, ErrLimit), errors.Is(err, ErrUnsupported):
		return fmt.Errorf("%s: %w", format, err)
	case errors.Is(err, zstd.ErrWindowSizeExceeded), errors.Is(err, zstd.ErrDecoderSizeExceeded):
		return fmt.Errorf("%s: the window is larger than %d MiB: %w", format, maxWindow>>20, ErrLimit)
	case errors.Is(err, zstd.ErrUnknownDictionary):
		return fmt.Errorf("%s: needs a dictionary: %w", format, ErrUnsupported)
	case errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("%s: the end is missing: %w", format, ErrCorrupt)
	}
	return fmt.Errorf("%s: %w: %w", format, ErrCorrupt, err)
}

// ioError is an error of one of the files.
type ioError struct{ err error }

func (e *ioError) Error() string { return e.err.Error() }

// contextReader reads until ctx ends. Its own errors are told from those of a
// decompressor.
type contextReader struct {
	ctx context.Context
	r   io.Reader
	err error
}

func (r *contextReader) Read(p []byte) (int, error) {
	if r.err == nil {
		r.err = r.ctx.Err()
	}
	if r.err != nil {
		return 0, &ioError{r.err}
	}
	n, err := r.r.Read(p)
	if err != nil && err != io.EOF {
		r.err = err
		err = &ioError{err}
	}
	return n, err
}

package qcow2

import (
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"

	"qimg/qcow2/internal/inflate"
)

// codec is what decompressing one cluster at a time needs; it is used again
// and again.
type codec struct {
	in   []byte // compressed bytes, at most two clusters
	zlib inflate.Decoder
	zstd *zstd.Decoder
}

// readCompressed fills p with the bytes of a compressed cluster from in on.
func (im *Image) readCompressed(p []byte, in int64, entry uint64) error {
	if int64(len(p)) == im.geo.clusterSize {
		return im.decompress(p, entry)
	}
	key := clusterKey{im.id, entry}
	for {
		c := im.shared.clusters.get(key, im.geo.clusterSize)
		c.mu.Lock()
		if c.key != key { // given to another meanwhile
			c.mu.Unlock()
			continue
		}
		err := im.extend(c, int(in)+len(p))
		if err == nil {
			copy(p, c.b[in:])
		}
		c.mu.Unlock()
		return err
	}
}

// extend decompresses a cluster up to n bytes at least.
func (im *Image) extend(c *partCluster, n int) error {
	if c.err != nil || n <= c.n {
		return c.err
	}
	if im.header.CompressionType == CompressionZstd {
		n = len(c.b) // whole frames
	}
	off, size := im.geo.compressed(c.key.entry)
	if c.n == 0 {
		if err := im.readCodec(c.codec, off, size); err != nil {
			return err // another time it may do
		}
		c.codec.zlib.Reset(c.codec.in, c.b)
	}
	var err error
	if im.header.CompressionType == CompressionZstd {
		err = c.codec.unzstd(c.b)
	} else {
		err = c.codec.zlib.Fill(n)
	}
	if err != nil {
		c.err = im.compressedError(off, size, err)
		return c.err
	}
	c.n = n
	return nil
}

func (im *Image) compressedError(off, n int64, err error) error {
	return &FormatError{"compressed cluster", off, "", fmt.Sprintf("%s of %d bytes: %v", im.header.CompressionType, n, err), ErrCorrupt}
}

// readCodec reads the n bytes at off, at most two clusters, to be decompressed.
func (im *Image) readCodec(c *codec, off, n int64) error {
	if int64(cap(c.in)) < n {
		c.in = make([]byte, n)
	}
	c.in = c.in[:n]
	if err := readFull(im.dev, c.in, off); err != nil {
		return fmt.Errorf("qcow2: compressed cluster at %#x: %w", off, err)
	}
	return nil
}

// decompress fills p, which is a cluster long.
func (im *Image) decompress(p []byte, entry uint64) error {
	off, n := im.geo.compressed(entry) // n is at most two clusters
	c := im.shared.codecs.Get().(*codec)
	defer im.shared.codecs.Put(c)
	if err := im.readCodec(c, off, n); err != nil {
		return err
	}
	var err error
	if im.header.CompressionType == CompressionZstd {
		err = c.unzstd(p)
	} else {
		c.zlib.Reset(c.in, p)
		err = c.zlib.Fill(len(p))
		c.zlib.Reset(nil, nil) // p is the caller's
	}
	if err != nil {
		return im.compressedError(off, n, err)
	}
	return nil
}

// unzstd fills p from the zstd frames at the start of c.in. The frame that p
// ends with is followed by bytes of others, so each frame is measured first.
// The output, which is the window too, is p: no frame makes it use more.
func (c *codec) unzstd(p []byte) (err error) {
	if c.zstd == nil {
		c.zstd, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecodeAllCapLimit(true))
		if err != nil {
			return err
		}
	}
	out := p[:0:len(p)]
	for in := c.in; len(out) < len(p); {
		n, err := zstdFrameSize(in)
		if err != nil {
			return err
		}
		if out, err = c.zstd.DecodeAll(in[:n], out); err != nil {
			return err
		}
		in = in[n:]
	}
	return nil
}

// zstdFrameSize returns the size of the frame at the start of b, from its
// header and those of its blocks. RFC 8878 section 3.1.1.
func zstdFrameSize(b []byte) (int, error) {
	var h zstd.Header
	if err := h.Decode(b); err != nil {
		return 0, err
	}
	n := h.HeaderSize
	if h.Skippable {
		if uint64(h.SkippableSize) > uint64(len(b)-n) {
			return 0, io.ErrUnexpectedEOF
		}
		return n + int(h.SkippableSize), nil
	}
	for last := false; !last; {
		if len(b)-n < 3 {
			return 0, io.ErrUnexpectedEOF
		}
		head := int(b[n]) | int(b[n+1])<<8 | int(b[n+2])<<16
		last = head&1 != 0
		size := head >> 3
		switch head >> 1 & 3 {
		case 1: // RLE
			size = 1
		case 3:
			return 0, errors.New("reserved block type")
		}
		if n += 3; size > len(b)-n {
			return 0, io.ErrUnexpectedEOF
		}
		n += size
	}
	if h.HasCheckSum {
		n += 4
	}
	if n > len(b) {
		return 0, io.ErrUnexpectedEOF
	}
	return n, nil
}

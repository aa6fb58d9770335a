package qcow2

import (
	"errors"
	"sync"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"

	"qimg/qcow2/internal/deflate"
)

// deflateWindow is the largest distance of a match: QEMU inflates with a
// window of 12 bits.
const deflateWindow = 1 << 12

// errIncompressible: a cluster does not get smaller by compression.
var errIncompressible = errors.New("qcow2: incompressible")

// MaxCompressionLevel is the level that makes the smallest clusters.
const MaxCompressionLevel = 9

// deflateEfforts are those of the levels from 6 on. Below them a faster encoder is
// used, which makes about 6 % more; those of level 8 are as small as QEMU's.
var deflateEfforts = [...]deflate.Effort{
	6: {Chain: 16, Lazy: 8, Nice: 32},
	7: {Chain: 32, Lazy: 32, Nice: 128},
	8: {Chain: 128, Lazy: 32, Nice: 128},
	9: {Chain: 4096, Lazy: 258, Nice: 258},
}

// zstdLevels are the encoders of the levels; 0 is the default.
var zstdLevels = [...]zstd.EncoderLevel{
	0: zstd.SpeedDefault, 1: zstd.SpeedFastest,
	2: zstd.SpeedDefault, 3: zstd.SpeedDefault, 4: zstd.SpeedDefault, 5: zstd.SpeedDefault,
	6: zstd.SpeedBetterCompression, 7: zstd.SpeedBetterCompression, 8: zstd.SpeedBetterCompression,
	9: zstd.SpeedBestCompression,
}

// compressor compresses clusters. It is safe for concurrent use.
type compressor struct {
	zstd    *zstd.Encoder // nil: deflate
	deflate sync.Pool     // of *flate.Writer
	effort  deflate.Effort
	small   sync.Pool // of *deflate.Encoder, used if there is an effort
	buffers sync.Pool // of *[]byte of bufferSize
	// bufferSize is a cluster and a little more.
	bufferSize int64
}

func newCompressor(typ CompressionType, level int, clusterSize int64) (*compressor, error) {
	if level < 0 || level > MaxCompressionLevel {
		return nil, optionError("Compression level must be between 1 and %d", MaxCompressionLevel)
	}
	c := &compressor{effort: deflateEfforts[level], bufferSize: clusterSize + clusterSize/8 + 64}
	c.small.New = func() any { return &deflate.Encoder{} }
	c.buffers.New = func() any {
		b := make([]byte, 0, c.bufferSize)
		return &b
	}
	if typ == CompressionZstd {
		// One frame without a checksum, as QEMU writes it.
		opts := []zstd.EOption{zstd.WithEncoderLevel(zstdLevels[level]), zstd.WithEncoderCRC(false), zstd.WithLowerEncoderMem(true),
			zstd.WithWindowSize(max(zstd.MinWindowSize, int(clusterSize)))}
		if zstdLevels[level] == zstd.SpeedBestCompression {
			opts = append(opts, zstd.WithEncoderConcurrency(1)) // its tables take 34 MiB
		}
		var err error
		c.zstd, err = zstd.NewWriter(nil, opts...)
		return c, err
	}
	return c, nil
}

// compress returns p, a whole cluster, compressed, in a buffer of the pool; or
// nil if it does not get smaller.
func (c *compressor) compress(p []byte) (*[]byte, error) {
	buf := c.buffers.Get().(*[]byte)
	if c.zstd != nil {
		*buf = c.zstd.EncodeAll(p, (*buf)[:0])
		if len(*buf) >= len(p) {
			c.buffers.Put(buf)
			return nil, nil
		}
		return buf, nil
	}
	if c.effort.Chain > 0 {
		e := c.small.Get().(*deflate.Encoder)
		defer c.small.Put(e)
		var ok bool
		if *buf, ok = e.Append((*buf)[:0], p, len(p)-1, c.effort); !ok {
			c.buffers.Put(buf)
			return nil, nil
		}
		return buf, nil
	}
	dst := limitedBuffer{(*buf)[:0], len(p) - 1}
	w, _ := c.deflate.Get().(*flate.Writer)
	if w == nil {
		var err error
		if w, err = flate.NewWriterWindow(&dst, deflateWindow); err != nil {
			return nil, err
		}
	} else {
		w.Reset(&dst)
	}
	_, err := w.Write(p)
	if err == nil {
		err = w.Close()
	}
	c.deflate.Put(w)
	if err != nil {
		c.buffers.Put(buf)
		if errors.Is(err, errIncompressible) {
			return nil, nil
		}
		return nil, err
	}
	*buf = dst.b
	return buf, nil
}

// limitedBuffer takes at most max bytes.
type limitedBuffer struct {
	b   []byte
	max int
}

func (l *limitedBuffer) Write(p []byte) (int, error) {
	if len(p) > l.max-len(l.b) {
		return 0, errIncompressible
	}
	l.b = append(l.b, p...)
	return len(p), nil
}

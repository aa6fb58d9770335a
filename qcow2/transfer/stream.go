package transfer

import (
	"context"
	"io"
	"sync"

	"qimg/qcow2/blockdev"
)

// Stream writes the content of src to w, from its beginning to its end, as a
// pipe needs it. Parts are read ahead by several workers. Of the options
// Workers, Salvage, Rate and Progress count; what reads as zeroes by the extents
// is not read.
//
// An error is a *ReadError, a *WriteError or that of ctx, which is looked at
// between writes. Memory is that of the buffers: Workers x BufferSize.
func Stream(ctx context.Context, w io.Writer, src blockdev.Reader, opts *Options) error {
	c, err := newCopier(streamTarget(src.Size()), src, opts)
	if err != nil {
		return err
	}
	c.opts.Sparse, c.opts.Keep = DefaultSparse, nil
	ctx, cancel := context.WithCancel(ctx)
	parts := make(chan *streamPart, c.opts.Workers)
	free := make(chan []byte, c.opts.Workers)
	for range c.opts.Workers {
		free <- nil
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		defer close(parts)
		for ctx.Err() == nil {
			select {
			case buf := <-free:
				p, ok := c.take(ctx)
				if !ok {
					return
				}
				part := &streamPart{piece: p, buf: buf, read: make(chan error, 1)}
				wg.Go(func() { part.read <- part.fill(c) })
				parts <- part // there are no more of them than it takes
			case <-ctx.Done():
			}
		}
	})
	err = c.writeParts(ctx, w, parts, free)
	cancel()
	wg.Wait()
	if err == nil {
		err = c.err
	}
	return err
}

// streamTarget is what the copier of a Stream takes for its target.
type streamTarget int64

func (t streamTarget) Size() int64                        { return int64(t) }
func (t streamTarget) WriteAt([]byte, int64) (int, error) { return 0, io.ErrClosedPipe }

// streamPart is a piece that is read ahead.
type streamPart struct {
	piece
	buf  []byte
	read chan error
}

// fill reads the piece.
func (p *streamPart) fill(c *copier) error {
	if p.kind != pieceData {
		return nil
	}
	if p.buf == nil {
		p.buf = make([]byte, c.buffer)
	}
	w := worker{copier: c}
	return w.read(p.buf[:p.n], p.off)
}

// writeParts writes the parts as they come.
func (c *copier) writeParts(ctx context.Context, w io.Writer, parts <-chan *streamPart, free chan<- []byte) error {
	zeroes := make([]byte, 64<<10)
	for p := range parts {
		if err := <-p.read; err != nil {
			return err
		}
		for n := int64(0); n < p.n; {
			if err := ctx.Err(); err != nil {
				return err
			}
			b := zeroes
			if p.kind == pieceData {
				b = p.buf
			}
			b = b[:min(p.n-n, int64(len(b)))]
			if _, err := w.Write(b); err != nil {
				return &WriteError{p.off + n, err}
			}
			if err := c.finished(ctx, piece{off: p.off + n, n: int64(len(b)), kind: pieceData}); err != nil {
				return err
			}
			n += int64(len(b))
		}
		free <- p.buf
	}
	return ctx.Err()
}

package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"
)

// output is standard output, or the messages. It keeps the first error, so that a
// full disk is not taken for success.
type output struct {
	ctx context.Context
	w   io.Writer
	// waits: a write can wait for another process to read. It is left to itself
	// when the command is interrupted.
	waits bool
	left  bool
	err   error
}

func newOutput(ctx context.Context, w io.Writer) *output {
	o := &output{ctx: ctx, w: w}
	if f, ok := w.(*os.File); ok {
		info, err := f.Stat()
		o.waits = err != nil || !info.Mode().IsRegular()
	}
	return o
}

// Unwrap returns what is written to, for a look at what it is.
func (o *output) Unwrap() io.Writer { return o.w }

func (o *output) Write(p []byte) (int, error) {
	if o.waits { // p is the caller's again when Write returns
		p = bytes.Clone(p)
	}
	return o.writeKeeping(p)
}

// writeKeeping is Write of bytes that nobody changes if it returns an error.
func (o *output) writeKeeping(p []byte) (n int, err error) {
	switch {
	case o.left:
		return 0, o.err
	case o.waits:
		n, err = unlessDone(o.ctx, patience, func() (int, error) { return o.w.Write(p) })
		o.left = err != nil && err == o.ctx.Err()
	default:
		n, err = o.w.Write(p)
	}
	if err != nil && o.err == nil {
		o.err = err
	}
	return n, err
}

// imageWriter returns what an image is written to. A standard output that is closed
// is refused.
func imageWriter(w io.Writer) (io.Writer, error) {
	o, ok := w.(*output)
	if !ok {
		return w, nil
	}
	if f, ok := o.w.(*os.File); ok && wasClosed(f) {
		return nil, errors.New("standard output is closed")
	}
	return writerFunc(o.writeKeeping), nil
}

type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// input is a pipe that is read. A read is left to itself when the command is
// interrupted; it can change p then.
type input struct {
	ctx context.Context
	r   io.Reader
	off int64
}

func (i *input) Read(p []byte) (int, error) {
	n, err := unlessDone(i.ctx, 0, func() (int, error) { return i.r.Read(p) })
	i.off += int64(n)
	if err != nil && err != io.EOF {
		err = fmt.Errorf("read at offset %d: %w", i.off, err)
	}
	return n, err
}

// patience is how long a write may take after the command was interrupted: what is
// read gets its last words.
const patience = 100 * time.Millisecond

// unlessDone runs do, which can wait for another process for good. When ctx has been
// done for some time do is left to itself; the error is that of ctx then.
func unlessDone[T any](ctx context.Context, after time.Duration, do func() (T, error)) (T, error) {
	type result struct {
		v   T
		err error
	}
	c := make(chan result, 1)
	go func() {
		v, err := do()
		c <- result{v, err}
	}()
	select {
	case r := <-c:
		return r.v, r.err
	case <-ctx.Done():
	}
	select {
	case r := <-c:
		return r.v, r.err
	case <-time.After(after):
	}
	var none T
	return none, ctx.Err()
}

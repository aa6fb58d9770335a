package guest

import (
	"errors"
	"io"
	"sync"
)

const (
	aheadBuffers = 4
	aheadSize    = 512 << 10
)

// ahead writes what is put into its buffers in order, while the next ones are
// filled. It is used by one goroutine.
type ahead struct {
	buf   []byte // being filled: its length is what is in it
	full  chan []byte
	empty chan []byte
	done  sync.WaitGroup
	err   error // of the writer, once done
}

// errAhead is the error of filling buffers that are not written any more.
var errAhead = errors.New("the output has failed")

func newAhead(w io.Writer) *ahead {
	a := &ahead{full: make(chan []byte, aheadBuffers), empty: make(chan []byte, aheadBuffers)}
	for range aheadBuffers {
		a.empty <- nil
	}
	a.done.Go(func() {
		defer close(a.empty)
		for b := range a.full {
			if _, err := w.Write(b); err != nil {
				a.err = err
				return
			}
			a.empty <- b[:0]
		}
	})
	return a
}

// space returns the rest of the buffer, which is not empty.
func (a *ahead) space() ([]byte, error) {
	if a.buf == nil {
		b, ok := <-a.empty
		if !ok {
			return nil, errAhead
		}
		if b == nil {
			b = make([]byte, 0, aheadSize)
		}
		a.buf = b
	}
	return a.buf[len(a.buf):cap(a.buf)], nil
}

// advance takes the first n bytes of the space as filled.
func (a *ahead) advance(n int) {
	a.buf = a.buf[:len(a.buf)+n]
	if len(a.buf) < cap(a.buf) {
		return
	}
	a.full <- a.buf // there is room: all buffers fit
	a.buf = nil
}

// write copies b.
func (a *ahead) write(b []byte) error {
	for len(b) > 0 {
		space, err := a.space()
		if err != nil {
			return err
		}
		n := copy(space, b)
		b = b[n:]
		a.advance(n)
	}
	return nil
}

// zeroes writes n zeroes.
func (a *ahead) zeroes(n int64) error {
	for n > 0 {
		space, err := a.space()
		if err != nil {
			return err
		}
		space = space[:min(int64(len(space)), n)]
		clear(space)
		n -= int64(len(space))
		a.advance(len(space))
	}
	return nil
}

// close waits for the writer, and writes the rest if that is asked for.
func (a *ahead) close(flush bool) error {
	if flush && len(a.buf) > 0 {
		a.full <- a.buf
	}
	close(a.full)
	a.done.Wait()
	return a.err
}

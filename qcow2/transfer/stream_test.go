package transfer_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"testing"

	"qimg/qcow2/blockdev"
	"qimg/qcow2/transfer"
)

// sparseMemory is a disk of random data with holes, which are not to be read.
type sparseMemory struct {
	*blockdev.Memory
	content []byte
}

const hole = 300 << 10

func newSparseMemory(t *testing.T, seed uint64, size int) *sparseMemory {
	t.Helper()
	r := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, size)
	for i := range b {
		if i/hole%2 == 0 {
			b[i] = byte(r.Uint32())
		}
	}
	m := blockdev.NewMemory(int64(size))
	if _, err := m.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return &sparseMemory{m, b}
}

func (m *sparseMemory) NextExtent(off int64) (blockdev.Extent, error) {
	e := blockdev.Extent{Off: off, Len: min(hole-off%hole, m.Size()-off), Kind: blockdev.Data}
	if off/hole%2 == 1 {
		e.Kind = blockdev.Zero
	}
	return e, nil
}

func TestStream(t *testing.T) {
	for seed, size := range []int{0, 1, 5000, 1 << 20, 5<<20 + 77} {
		src := newSparseMemory(t, uint64(seed), size)
		var out bytes.Buffer
		var last int64
		err := transfer.Stream(t.Context(), &out, src, &transfer.Options{Workers: 1 + seed, Progress: func(done, total int64) {
			if done <= last || total != int64(size) {
				t.Errorf("%d of %d bytes after %d", done, total, last)
			}
			last = done
		}})
		if err != nil || last != int64(size) || !bytes.Equal(out.Bytes(), src.content) {
			t.Errorf("%d bytes: %v, %d bytes written", size, err, out.Len())
		}
	}
}

// limitedWriter fails, or cancels, after so many bytes.
type limitedWriter struct {
	left int
	fail func() error
}

func (w *limitedWriter) Write(p []byte) (int, error) {
	if w.left -= len(p); w.left < 0 {
		return 0, w.fail()
	}
	return len(p), nil
}

// badReader cannot be read from off on.
type badReader struct {
	blockdev.Reader
	off int64
	err error
}

func (r badReader) ReadAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > r.off {
		return 0, r.err
	}
	return r.Reader.ReadAt(p, off)
}

func TestStreamErrors(t *testing.T) {
	src := newSparseMemory(t, 1, 5<<20)
	errPipe := errors.New("broken pipe")
	err := transfer.Stream(t.Context(), &limitedWriter{1 << 20, func() error { return errPipe }}, src, nil)
	var write *transfer.WriteError
	if !errors.As(err, &write) || write.Off > 1<<20 || !errors.Is(err, errPipe) {
		t.Errorf("a pipe that breaks: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	err = transfer.Stream(ctx, &limitedWriter{1 << 20, func() error { cancel(); return nil }}, src, nil)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
	errRead := errors.New("bad sector")
	bad := badReader{src.Memory, 2<<20 + 5000, errRead}
	err = transfer.Stream(t.Context(), io.Discard, bad, &transfer.Options{Workers: 3})
	var read *transfer.ReadError
	if !errors.As(err, &read) || read.Off != 2<<20 || !errors.Is(err, errRead) {
		t.Errorf("a source that fails: %v", err)
	}
}

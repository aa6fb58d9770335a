package blockdev_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"

	"qimg/qcow2/blockdev"
)

// Spool copies content of all kinds to the byte, with its error, and leaves holes.
func TestSpool(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	for _, size := range []int{0, 1, 4095, 4096, 1 << 20, 3<<20 + 700} {
		want := make([]byte, size)
		for i := range want {
			if i>>14%3 == 0 {
				want[i] = byte(r.Uint32())
			}
		}
		for name, in := range map[string]io.Reader{
			"whole": bytes.NewReader(want), "data and error": iotest.DataErrReader(bytes.NewReader(want)), "half": iotest.HalfReader(bytes.NewReader(want)),
			"broken": io.MultiReader(bytes.NewReader(want), iotest.ErrReader(io.ErrUnexpectedEOF)),
		} {
			out, err := blockdev.CreateFile(filepath.Join(t.TempDir(), "f"), nil)
			if err != nil {
				t.Fatal(err)
			}
			n, err := blockdev.Spool(out.File(), in)
			if n != int64(size) || (err != nil) != (name == "broken") || err != nil && err != io.ErrUnexpectedEOF {
				t.Errorf("%s: %d of %d, %v", name, n, size, err)
			}
			got, err := io.ReadAll(io.NewSectionReader(out.File(), 0, out.File().Size()))
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s: %d bytes: other content, %v", name, size, err)
			}
			out.Abort()
		}
	}
}

// WriteData writes no block of zeroes.
func TestWriteData(t *testing.T) {
	var log writeLog
	p := []byte(strings.Repeat("x", 5000) + strings.Repeat("\x00", 10000) + "x")
	if err := blockdev.WriteData(&log, p, 100); err != nil {
		t.Fatal(err)
	}
	want := writeLog{{100, 8092}, {12288, 2813}}
	if len(log) != 2 || log[0] != want[0] || log[1] != want[1] {
		t.Errorf("%v, want %v", log, want)
	}
	bad := errors.New("bad")
	if err := blockdev.WriteData(failingWriter{bad}, p, 0); err != bad {
		t.Errorf("%v, want %v", err, bad)
	}
}

type writeLog []blockdev.Range

func (l *writeLog) WriteAt(p []byte, off int64) (int, error) {
	*l = append(*l, blockdev.Range{Off: off, Len: int64(len(p))})
	return len(p), nil
}

type failingWriter struct{ err error }

func (f failingWriter) WriteAt([]byte, int64) (int, error) { return 0, f.err }

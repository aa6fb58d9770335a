package qcow2_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"sync"
	"testing"
	"time"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
)

// inOrderKinds are the ways in which a Writer places what comes in order.
func inOrderKinds() map[string]*qcow2.WriterOptions {
	return map[string]*qcow2.WriterOptions{
		"plain":    {InOrder: true},
		"compress": {InOrder: true, Compress: true},
		"encrypt":  {InOrder: true, FormatOptions: qcow2.FormatOptions{Encrypt: qcow2.EncryptOptions{Method: qcow2.CryptAES, Passphrase: []byte("abc")}}},
	}
}

// A disk that is written in order, by several at a time, reads as it was
// written; what was skipped shows the backing file.
func TestWriterInOrder(t *testing.T) {
	const cluster, size = 64 << 10, 40<<16 + 512
	for name, opts := range inOrderKinds() {
		t.Run(name, func(t *testing.T) {
			r := rand.New(rand.NewPCG(1, 12))
			below := blockdev.NewMemory(size)
			writeAll(t, below, noise(3, size), 0)
			want := noise(4, size)
			opts.BackingFile, opts.BackingFormat = "below", "raw"
			dev := blockdev.NewMemory(0)
			w, err := qcow2.NewWriter(t.Context(), dev, size, opts)
			if err != nil {
				t.Fatal(err)
			}
			var wg sync.WaitGroup
			for next := int64(0); next < size; {
				off, n := next, min(cluster*(1+r.Int64N(3)), size-next)
				next += n
				p := want[off : off+n]
				var do func() error
				switch r.IntN(4) {
				case 0:
					if _, err := below.ReadAt(p, off); err != nil {
						t.Fatal(err)
					}
					do = func() error { return w.Skip(off, n) }
				case 1:
					clear(p)
					do = func() error { return w.WriteZeroes(off, n) }
				case 2:
					clear(p[:min(cluster, n)])
					do = func() error {
						if n <= cluster {
							return w.WriteSparse(p, off, nil)
						}
						return w.WriteSparse(p, off, []blockdev.Range{{Off: off + cluster, Len: n - cluster}})
					}
				default:
					do = func() error { _, err := w.WriteAt(p, off); return err }
				}
				wg.Go(func() {
					if err := do(); err != nil {
						t.Error(err)
					}
				})
			}
			wg.Wait()
			if err := w.Finish(); err != nil {
				t.Fatal(err)
			}
			im, err := qcow2.New(dev, &qcow2.OpenOptions{BackingDevice: below, Secret: func(qcow2.SecretRequest) ([]byte, error) {
				return []byte("abc"), nil
			}})
			if err != nil {
				t.Fatal(err)
			}
			if err := sound(t, im, true); err != nil {
				t.Error(err)
			}
			if !bytes.Equal(bytesOf(t, im)[:size], want) {
				t.Error("other bytes")
			}
		})
	}
}

// Misuse is refused, and leaves no image.
func TestWriterInOrderRefuses(t *testing.T) {
	const cluster, size = 64 << 10, 8<<16 + 512
	p := bytes.Repeat([]byte{1}, 8<<16)
	write := func(off, n int64) func(w *qcow2.Writer) error {
		return func(w *qcow2.Writer) error { _, err := w.WriteAt(p[:n], off); return err }
	}
	zero := func(off, n int64) func(w *qcow2.Writer) error {
		return func(w *qcow2.Writer) error { return w.WriteZeroes(off, n) }
	}
	skip := func(off, n int64) func(w *qcow2.Writer) error {
		return func(w *qcow2.Writer) error { return w.Skip(off, n) }
	}
	sparse := func(off, n int64, data ...blockdev.Range) func(w *qcow2.Writer) error {
		return func(w *qcow2.Writer) error { return w.WriteSparse(p[:n], off, data) }
	}
	finish := func(w *qcow2.Writer) error { return w.Finish() }
	type calls []func(w *qcow2.Writer) error
	for _, c := range []struct {
		name  string
		calls calls // all but the last succeed
	}{
		{"data twice", calls{write(0, cluster), write(0, cluster)}},
		{"data over zeroes", calls{zero(0, 2*cluster), write(cluster, cluster)}},
		{"zeroes over data", calls{write(0, 2*cluster), zero(0, cluster)}},
		{"a skip over data", calls{write(0, 2*cluster), skip(cluster, cluster)}},
		{"pieces that overlap", calls{write(0, 2*cluster), sparse(cluster, 2*cluster)}},
		{"an end that overlaps", calls{skip(0, size), zero(8*cluster, 512)}},
		{"part of a cluster", calls{write(0, 512)}},
		{"from the middle of a cluster", calls{write(512, cluster)}},
		{"zeroes in a part of a cluster", calls{zero(0, cluster+512)}},
		{"a skip of a part of a cluster", calls{skip(0, cluster-512)}},
		{"a piece that is part of a cluster", calls{sparse(0, 512)}},
		{"data in the middle of a cluster", calls{sparse(0, 2*cluster, blockdev.Range{Off: 512, Len: cluster})}},
		{"data of part of a cluster", calls{sparse(0, 2*cluster, blockdev.Range{Off: 0, Len: 512})}},
		{"data out of order", calls{sparse(0, 4*cluster, blockdev.Range{Off: 2 * cluster, Len: cluster}, blockdev.Range{Off: 0, Len: cluster})}},
		{"data that overlaps", calls{sparse(0, 4*cluster, blockdev.Range{Off: 0, Len: 2 * cluster}, blockdev.Range{Off: cluster, Len: cluster})}},
		{"data before the piece", calls{sparse(cluster, cluster, blockdev.Range{Off: 0, Len: cluster})}},
		{"data behind the piece", calls{sparse(0, cluster, blockdev.Range{Off: cluster, Len: cluster})}},
		{"data that is longer than the piece", calls{sparse(0, cluster, blockdev.Range{Off: 0, Len: 2 * cluster})}},
		{"no data", calls{sparse(0, cluster, blockdev.Range{Off: 0, Len: 0})}},
		{"data of a negative length", calls{sparse(0, cluster, blockdev.Range{Off: 0, Len: -cluster})}},
		{"data behind the end", calls{write(8*cluster, cluster)}},
		{"zeroes at a negative offset", calls{zero(-cluster, cluster)}},
		{"a skip of a negative length", calls{skip(cluster, -cluster)}},
		{"a skip that overflows", calls{skip(cluster, 1<<63-cluster)}},
		{"nothing", calls{finish}},
		{"an end that is missing", calls{write(0, 8*cluster), finish}},
	} {
		for kind, opts := range inOrderKinds() {
			dev := blockdev.NewMemory(0)
			w, err := qcow2.NewWriter(t.Context(), dev, size, opts)
			if err != nil {
				t.Fatal(err)
			}
			last := len(c.calls) - 1
			for _, call := range c.calls[:last] {
				if err := call(w); err != nil {
					t.Fatalf("%s, %s: %v", c.name, kind, err)
				}
			}
			err = c.calls[last](w)
			if err == nil {
				t.Errorf("%s, %s: no error", c.name, kind)
				continue
			}
			if again := w.Finish(); !errors.Is(again, err) && !errors.Is(again, os.ErrClosed) {
				t.Errorf("%s, %s: Finish: %v, expected %v", c.name, kind, again, err)
			}
			if _, err := qcow2.New(dev, nil); !errors.Is(err, qcow2.ErrFormat) {
				t.Errorf("%s, %s: there is an image: %v", c.name, kind, err)
			}
		}
	}
}

// What comes before its turn is kept, and refused if its place is taken
// meanwhile.
func TestWriterInOrderKept(t *testing.T) {
	const cluster, size = 64 << 10, 8 << 16
	p := noise(5, cluster)
	for name, first := range map[string]func(w *qcow2.Writer) error{
		"data":   func(w *qcow2.Writer) error { _, err := w.WriteAt(p, 0); return err },
		"zeroes": func(w *qcow2.Writer) error { return w.WriteZeroes(0, size) },
		"zeroes up to the end": func(w *qcow2.Writer) error {
			return errors.Join(w.WriteZeroes(2*cluster, size-2*cluster), w.WriteZeroes(0, 2*cluster))
		},
		"nothing": func(w *qcow2.Writer) error { return w.Skip(0, size) },
	} {
		w, err := qcow2.NewWriter(t.Context(), blockdev.NewMemory(0), size, &qcow2.WriterOptions{InOrder: true, Compress: true})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.WriteAt(p, 3*cluster); err != nil {
			t.Fatal(err)
		}
		if err := first(w); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if err := w.Finish(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// Where something is missing the others wait, until that is told.
func TestWriterInOrderGap(t *testing.T) {
	const cluster = 64 << 10
	for name, stop := range map[string]struct {
		want error
		do   func(w *qcow2.Writer)
	}{
		"abort":  {os.ErrClosed, func(w *qcow2.Writer) { w.Abort() }},
		"misuse": {qcow2.ErrNotPlanned, func(w *qcow2.Writer) { w.Skip(1<<30, cluster) }},
		"comes":  {nil, func(w *qcow2.Writer) { w.Skip(0, cluster) }},
	} {
		t.Run(name, func(t *testing.T) {
			w, err := qcow2.NewWriter(t.Context(), blockdev.NewMemory(0), 2*cluster, &qcow2.WriterOptions{InOrder: true})
			if err != nil {
				t.Fatal(err)
			}
			ahead := make(chan error, 1)
			go func() {
				_, err := w.WriteAt(noise(6, cluster), cluster)
				ahead <- err
			}()
			select {
			case err := <-ahead:
				t.Fatalf("it was not waited for what comes before: %v", err)
			case <-time.After(20 * time.Millisecond):
			}
			stop.do(w)
			select {
			case err := <-ahead:
				if !errors.Is(err, stop.want) {
					t.Errorf("the one that waited: %v", err)
				}
			case <-time.After(10 * time.Second):
				t.Fatal("the one that waited still does")
			}
			if err := w.Finish(); !errors.Is(err, stop.want) {
				t.Errorf("Finish: %v", err)
			}
		})
	}
}

// A plan and writing in order exclude each other.
func TestWriterPlanOrOrder(t *testing.T) {
	var option qcow2.OptionError
	plan := planOf([]extent{{0, 64 << 10}})
	if _, err := qcow2.NewWriter(t.Context(), blockdev.NewMemory(0), 1<<20, &qcow2.WriterOptions{InOrder: true, Extents: plan}); !errors.As(err, &option) {
		t.Error(err)
	}
	for _, compress := range []bool{false, true} {
		w, err := qcow2.NewWriter(t.Context(), blockdev.NewMemory(0), 1<<20, &qcow2.WriterOptions{Compress: compress, Extents: plan})
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Skip(0, 64<<10); err == nil {
			t.Error("a planned cluster was skipped")
		}
	}
}

package inflate_test

import (
	"bytes"
	"compress/flate"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"qimg/qcow2/internal/inflate"
)

// deflate compresses with the standard library, the oracle of these tests.
func deflate(t testing.TB, level int, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := flate.NewWriter(&b, level)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// samples are data that lead to all kinds of blocks, codes and distances.
func samples(t testing.TB) map[string][]byte {
	t.Helper()
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(program)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	code := make([]byte, 1<<18)
	if _, err := io.ReadFull(f, code); err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 2))
	noise, few, skewed := make([]byte, 70000), make([]byte, 70000), make([]byte, 200000)
	for i := range noise {
		noise[i] = byte(r.Uint32())
		few[i] = "ab"[r.IntN(2)]
	}
	for i := range skewed { // long codes
		skewed[i] = byte(min(r.ExpFloat64()*12, 255))
	}
	var near []byte // distances from 1 on
	for i := range 300 {
		near = append(near, noise[:i]...)
		for range 5 {
			near = append(near, noise[:i]...)
		}
	}
	return map[string][]byte{
		"empty":   nil,
		"byte":    {7},
		"text":    []byte(strings.Repeat("Standard terms of the field in every name. ", 3000)),
		"code":    code,
		"zeroes":  make([]byte, 1<<17),
		"noise":   noise,
		"few":     few,
		"skewed":  skewed,
		"near":    near,
		"mixed":   append(append(append([]byte(nil), code[:50000]...), noise...), make([]byte, 30000)...),
		"cluster": code[1<<16 : 2<<16],
	}
}

// TestDecoder: at once and in pieces, other bytes behind the stream.
func TestDecoder(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	var d inflate.Decoder
	for name, want := range samples(t) {
		for level := flate.HuffmanOnly; level <= flate.BestCompression; level++ {
			in := deflate(t, level, want)
			for _, rest := range []string{"", "behind"} {
				in := append(bytes.Clone(in), rest...)
				for _, step := range []int{len(want), 1 + r.IntN(300), 1 + r.IntN(9000)} {
					out := make([]byte, len(want))
					d.Reset(in, out)
					for n := 0; n < len(want); {
						n = min(n+step, len(want))
						if err := d.Fill(n); err != nil {
							t.Fatalf("%s, level %d, %d of %d bytes: %v", name, level, n, len(want), err)
						}
						if !bytes.Equal(out[:n], want[:n]) {
							t.Fatalf("%s, level %d, %d bytes: they are others", name, level, n)
						}
					}
				}
				// More output than the stream has.
				out := make([]byte, len(want)+1)
				d.Reset(in[:len(in)-len(rest)], out)
				if err := d.Fill(len(out)); !errors.Is(err, io.ErrUnexpectedEOF) {
					t.Errorf("%s, level %d, a byte more: %v", name, level, err)
				}
			}
		}
	}
}

// TestTruncated: each shorter input is an error, but gives what it has.
func TestTruncated(t *testing.T) {
	want := samples(t)["cluster"][:20000]
	var d inflate.Decoder
	for _, level := range []int{flate.HuffmanOnly, 0, 1, 9} {
		in := deflate(t, level, want)
		for n := 0; n < len(in)-1; n += 1 + n/50 {
			out := make([]byte, len(want)+1)
			d.Reset(in[:n:n], out)
			if err := d.Fill(len(out)); !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("level %d, %d of %d bytes: %v", level, n, len(in), err)
			}
		}
	}
}

// TestCorrupt: what section 3.2 of the RFC, or zlib, does not allow.
func TestCorrupt(t *testing.T) {
	// The bits of a stream, the first on the left; spaces count for nothing.
	for _, c := range []struct{ name, bits, want string }{
		{"type", "1 11", "block type"},
		{"stored", "1 00 00000 1000000000000000 1000000000000000", "stored block lengths"},
		{"distance before the start", "1 10 0000001 00000", "too far back"},
		{"distance of 30", "1 10 00110000 0000001 11110", "invalid"},
		{"length of 286", "1 10 11000110", "invalid"},
		{"287 lengths", "1 01 01111 00000 0000", "too many"},
		{"31 distances", "1 01 00000 01111 0000", "too many"},
		{"no code lengths", "1 01 00000 00000 0000 000000000000", "invalid"},
		{"one code length", "1 01 00000 00000 0000 000000000100", "incomplete"},
		{"too many code lengths", "1 01 00000 00000 0000 100100100000", "over-subscribed"},
		{"repeat of nothing", "1 01 00000 00000 0000 100000000100 1 00", "repeat"},
		{"repeat beyond the end", "1 01 00000 00000 0000 000100100000 1 1111111 1 1111111", "repeat"},
		{"no end of block", "1 01 00000 00000 0000 000100100000 1 1111111 1 1011011", "end-of-block"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var in []byte
			n := 0
			for _, b := range strings.ReplaceAll(c.bits, " ", "") {
				if n%8 == 0 {
					in = append(in, 0)
				}
				in[n/8] |= byte(b-'0') << (n % 8)
				n++
			}
			for _, behind := range []int{8, 1000} { // slow and fast
				var d inflate.Decoder
				d.Reset(append(bytes.Clone(in), make([]byte, behind)...), make([]byte, 2*behind))
				err := d.Fill(2 * behind)
				if !errors.Is(err, inflate.ErrCorrupt) || !strings.Contains(err.Error(), c.want) {
					t.Errorf("%v, want %s", err, c.want)
				}
				if again := d.Fill(2 * behind); again != err {
					t.Errorf("again: %v", again)
				}
			}
		})
	}
}

// FuzzDecoder compares with the standard library: the same bytes, whether at once
// or in pieces, and an error where it has one.
func FuzzDecoder(f *testing.F) {
	for _, data := range samples(f) {
		data = data[:min(len(data), 2000)]
		for _, level := range []int{flate.HuffmanOnly, 0, 1, 9} {
			f.Add(deflate(f, level, data), uint16(len(data)), uint16(100))
		}
	}
	f.Fuzz(func(t *testing.T, in []byte, size, step uint16) {
		var d inflate.Decoder
		out := make([]byte, size)
		d.Reset(in, out)
		err := d.Fill(len(out))
		// The standard library wants more bits at the end than it needs, so it
		// gets some. Behind a stream that is cut they may be taken for its end.
		want := make([]byte, size)
		_, wantErr := io.ReadFull(flate.NewReader(io.MultiReader(bytes.NewReader(in), bytes.NewReader(make([]byte, 8)))), want)
		switch {
		case err == nil && wantErr != nil:
			t.Fatalf("no error, want %v", wantErr)
		case err == nil && !bytes.Equal(out, want):
			t.Fatal("other bytes")
		case errors.Is(err, inflate.ErrCorrupt) && wantErr == nil && !strings.Contains(err.Error(), "end-of-block"): // which zlib refuses too
			t.Fatal(err)
		case errors.Is(err, io.ErrUnexpectedEOF):
			if _, err := io.ReadFull(flate.NewReader(bytes.NewReader(in)), want); err == nil {
				t.Fatal("input ends, but not for the standard library")
			}
		}
		pieces := make([]byte, size)
		d.Reset(in, pieces)
		for n := 0; n < len(pieces); {
			from := n
			n = min(n+1+int(step), len(pieces))
			if pieceErr := d.Fill(n); pieceErr != nil {
				if err == nil || pieceErr.Error() != err.Error() {
					t.Fatalf("in pieces, %d bytes: %v, at once %v", n, pieceErr, err)
				}
				return
			}
			if err == nil && !bytes.Equal(pieces[from:n], out[from:n]) {
				t.Fatalf("in pieces, %d bytes: other bytes", n)
			}
		}
		if err != nil {
			t.Fatalf("in pieces no error, at once %v", err)
		}
	})
}

func BenchmarkDecoder(b *testing.B) {
	data := samples(b)["cluster"]
	in := deflate(b, 6, data)
	b.Run("here", func(b *testing.B) {
		b.SetBytes(int64(len(data)))
		var d inflate.Decoder
		out := make([]byte, len(data))
		for b.Loop() {
			d.Reset(in, out)
			if err := d.Fill(len(out)); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("standard library", func(b *testing.B) {
		b.SetBytes(int64(len(data)))
		src := bytes.NewReader(nil)
		r := flate.NewReader(src)
		out := make([]byte, len(data))
		for b.Loop() {
			src.Reset(in)
			if err := r.(flate.Resetter).Reset(src, nil); err != nil {
				b.Fatal(err)
			}
			if _, err := io.ReadFull(r, out); err != nil {
				b.Fatal(err)
			}
		}
	})
}

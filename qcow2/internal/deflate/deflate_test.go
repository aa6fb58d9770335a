package deflate_test

import (
	"bytes"
	"compress/flate"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"qimg/qcow2/blockdev/oracle"
	"qimg/qcow2/internal/deflate"
)

var efforts = []deflate.Effort{{Chain: 8, Lazy: 4, Nice: 16}, {Chain: 128, Lazy: 32, Nice: 128}, {Chain: 4096, Lazy: 258, Nice: 258}}

// samples are data that lead to all kinds of blocks, codes and distances.
func samples(t testing.TB) map[string][]byte {
	t.Helper()
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	code, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 2))
	noise, few, skewed, lengths := make([]byte, 150000), make([]byte, 70000), make([]byte, 200000), []byte(nil)
	for i := range noise {
		noise[i] = byte(r.Uint32())
	}
	for i := range few {
		few[i] = "ab"[r.IntN(2)]
	}
	for i := range skewed { // codes of up to 15 bits, and more without a limit
		skewed[i] = byte(min(r.ExpFloat64()*12, 255))
	}
	for i := range 24 { // Fibonacci's numbers make the longest codes
		a, b := 1, 1
		for range i {
			a, b = b, a+b
		}
		lengths = append(lengths, bytes.Repeat([]byte{byte(i)}, a)...)
	}
	r.Shuffle(len(lengths), func(i, j int) { lengths[i], lengths[j] = lengths[j], lengths[i] })
	far := append(bytes.Clone(noise[:4096]), noise[:4096]...) // matches at exactly the window
	far = append(far, noise[:5000]...)
	far = append(far, noise[:5000]...)
	return map[string][]byte{
		"empty":   {},
		"byte":    {7},
		"three":   []byte("aaa"),
		"text":    []byte(strings.Repeat("Standard terms of the field in every name. ", 3000)),
		"code":    code[1<<16 : 1<<16+1<<19],
		"zeroes":  make([]byte, 1<<17),
		"noise":   noise,
		"few":     few,
		"skewed":  skewed,
		"lengths": lengths,
		"far":     far,
		"mixed":   append(append(append([]byte(nil), code[:50000]...), noise...), make([]byte, 30000)...),
	}
}

// TestAppend: the standard library, and zlib with a window of 12 bits that it has
// to use, get back what was compressed.
func TestAppend(t *testing.T) {
	oracle.Require(t, "python3")
	dir := t.TempDir()
	var e deflate.Encoder
	for name, want := range samples(t) {
		for i, effort := range efforts {
			prefix := []byte("before")
			out, ok := e.Append(prefix, want, 2*len(want)+100, effort)
			if !ok || !bytes.HasPrefix(out, prefix) {
				t.Fatalf("%s: %v", name, ok)
			}
			out = out[len(prefix):]
			got, err := io.ReadAll(flate.NewReader(bytes.NewReader(out)))
			if err != nil || !bytes.Equal(got, want) {
				t.Fatalf("%s, %+v: %d bytes in place of %d, %v", name, effort, len(got), len(want), err)
			}
			t.Logf("%s, %+v: %d of %d", name, effort, len(out), len(want))
			path := filepath.Join(dir, name+strconv.Itoa(i))
			if err := os.WriteFile(path, out, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path+".want", want, 0o600); err != nil {
				t.Fatal(err)
			}
			if again, ok := e.Append(nil, want, len(out), effort); !ok || !bytes.Equal(again, out) {
				t.Errorf("%s: a limit of exactly %d bytes: %v", name, len(out), ok)
			}
			if _, ok := e.Append(nil, want, len(out)-1, effort); ok {
				t.Errorf("%s: a limit of one byte less is kept", name)
			}
		}
	}
	const script = `
import os, sys, zlib
for name in sorted(os.listdir(sys.argv[1])):
    if name.endswith('.want'): continue
    path = os.path.join(sys.argv[1], name)
    d = zlib.decompressobj(-12)
    rest, out = open(path, 'rb').read(), b''
    parts = []
    while not d.eof:
        part = d.decompress(rest, 1000)
        parts.append(part)
        rest = d.unconsumed_tail
        if not part and not rest and not d.eof: raise SystemExit(name + ': ends early')
    if b''.join(parts) != open(path + '.want', 'rb').read(): raise SystemExit(name + ': other bytes')
`
	if r := oracle.Run(t, "python3", "-c", script, dir); r.Code != 0 {
		t.Errorf("zlib: %s%s", r.Stdout, r.Stderr)
	}
}

// FuzzAppend: whatever it is, it comes back.
func FuzzAppend(f *testing.F) {
	for _, data := range samples(f) {
		f.Add(data[:min(len(data), 3000)], uint8(1), uint16(7))
	}
	var e deflate.Encoder
	f.Fuzz(func(t *testing.T, p []byte, effort uint8, times uint16) {
		for range times % 8 { // more matches
			p = append(p, p[:min(len(p), int(times))]...)
		}
		out, ok := e.Append(nil, p, len(p)+100, efforts[int(effort)%len(efforts)])
		if !ok {
			t.Fatalf("%d bytes do not fit", len(p))
		}
		got, err := io.ReadAll(flate.NewReader(bytes.NewReader(out)))
		if err != nil || !bytes.Equal(got, p) {
			t.Fatal(err)
		}
	})
}

package decomp_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"runtime/metrics"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"qimg/cloudimg/decomp"
)

// seeds are small inputs of all formats.
func seeds(t testing.TB) [][]byte {
	text := bytes.Repeat([]byte("some text, again. "), 30)
	var g, z, x bytes.Buffer
	gw := gzip.NewWriter(&g)
	zw, err := zstd.NewWriter(&z)
	if err != nil {
		t.Fatal(err)
	}
	xw, err := xz.WriterConfig{BlockSize: 200}.NewWriter(&x)
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range []interface {
		Write([]byte) (int, error)
		Close() error
	}{gw, zw, xw} {
		if _, err := w.Write(text); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	b := []byte("BZh91AY&SY\x19\x93\x9b\x6b\x00\x00\x00\x01\x00\x20\x00\x20\x00\x21\x18\x46\x82\xee\x48\xa7\x0a\x12\x03\x32\x73\x6d\x60")
	return [][]byte{g.Bytes(), z.Bytes(), x.Bytes(), b, bytes.Repeat(x.Bytes(), 2), bytes.Repeat(z.Bytes(), 2)}
}

// FuzzOpen decompresses anything in bounded time and memory: 64 MiB, four times the
// input, and what each frame of zstd and stream of bzip2 may take.
func FuzzOpen(f *testing.F) {
	for _, b := range seeds(f) {
		f.Add(b)
	}
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, b []byte) { bounded(t, dir, b) })
}

// FuzzXZ changes two bytes of an xz file, and makes its checksums right.
func FuzzXZ(f *testing.F) {
	good := seeds(f)[2]
	f.Add(uint16(12), byte(2), uint16(len(good)-8), byte(3))
	f.Add(uint16(17), byte(40), uint16(7), byte(0))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, at1 uint16, v1 byte, at2 uint16, v2 byte) {
		b := bytes.Clone(good)
		b[int(at1)%len(b)] = v1
		b[int(at2)%len(b)] = v2
		n := len(b)
		sum := func(at, from, to int) {
			if from >= 12 && to <= n-12 || at == 8 || at == n-12 {
				binary.LittleEndian.PutUint32(b[at:], crc32.ChecksumIEEE(b[from:to]))
			}
		}
		sum(8, 6, 8)
		if end := 12 + int(b[12])*4; end+4 <= n-12 {
			sum(end, 12, end)
		}
		if size := (int(binary.LittleEndian.Uint32(b[n-8:])&0xff) + 1) * 4; size < n-24 {
			sum(n-12-4, n-12-size, n-12-4)
		}
		sum(n-12, n-8, n-2)
		bounded(t, dir, b)
	})
}

// bounded opens an input.
func bounded(t *testing.T, dir string, b []byte) {
	open := func() {
		d, err := decomp.Open(t.Context(), memory(b), dir, &decomp.Options{MaxSize: 4 << 20})
		if err == nil {
			if d.Size() > 4<<20 {
				t.Fatalf("%d bytes", d.Size())
			}
			err = d.Close()
		}
		for _, e := range []error{nil, decomp.ErrFormat, decomp.ErrCorrupt, decomp.ErrLimit, decomp.ErrUnsupported} {
			if errors.Is(err, e) {
				return
			}
		}
		t.Fatalf("error of no kind: %v", err)
	}
	before, start := allocated(), time.Now()
	open()
	for try := 0; time.Since(start) > time.Second; try++ { // the machine may be busy
		if try == 3 {
			t.Fatalf("more than a second for %d bytes", len(b))
		}
		before, start = allocated(), time.Now()
		open()
	}
	frames := bytes.Count(b, []byte("\x28\xb5\x2f\xfd"))
	streams := bytes.Count(b, []byte("BZh"))
	if a := allocated() - before; a > uint64(64<<20+4*len(b)+frames*(66<<20)+streams*(4<<20)) {
		t.Fatalf("%d bytes allocated for an input of %d", a, len(b))
	}
}

func allocated() uint64 {
	s := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}

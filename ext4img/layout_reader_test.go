package ext4img_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"qimg/ext4img"
	"qimg/qcow2/blockdev"
)

// TestLayoutReader reads, in pieces of any size, what Write writes.
func TestLayoutReader(t *testing.T) {
	dir := t.TempDir()
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range 200 {
		b := make([]byte, rng.IntN(20000))
		for k := range b {
			b[k] = byte(rng.Uint32())
		}
		if err := os.WriteFile(filepath.Join(dir, string(rune('a'+i%26))+string(rune('A'+i/26))), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	tree, err := ext4img.Scan(t.Context(), dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	for _, opts := range []*ext4img.LayoutOptions{{}, {BlockSize: 1024, Size: 24<<20 + 512}} {
		l, err := ext4img.NewLayout(t.Context(), tree, opts)
		if err != nil {
			t.Fatal(err)
		}
		m := blockdev.NewMemory(l.Size())
		if err := l.Write(t.Context(), m, nil); err != nil {
			t.Fatal(err)
		}
		want := make([]byte, l.Size())
		if _, err := m.ReadAt(want, 0); err != nil {
			t.Fatal(err)
		}
		r := l.Reader()
		got := make([]byte, l.Size())
		for off := 0; off < len(got); {
			n := min(len(got)-off, 1+rng.IntN(1<<rng.IntN(21)))
			if m, err := r.ReadAt(got[off:off+n], int64(off)); m != n || err != nil {
				t.Fatal(m, err)
			}
			off += n
		}
		if !bytes.Equal(want, got) {
			t.Error("the reader has other bytes than were written")
		}
		data := int64(0)
		for off := int64(0); off < r.Size(); {
			e, err := r.NextExtent(off)
			if err != nil || e.Off != off || e.Len <= 0 || off+e.Len > r.Size() {
				t.Fatal(e, err)
			}
			if e.Kind.ReadsZero() {
				if len(bytes.Trim(want[off:off+e.Len], "\x00")) > 0 {
					t.Errorf("%+v is not zeroes", e)
				}
			} else {
				data += e.Len
			}
			off += e.Len
		}
		sum := int64(0)
		for _, n := range l.Extents() {
			sum += n
		}
		if data != sum {
			t.Errorf("%d bytes of data, %d are written", data, sum)
		}
		for _, off := range []int64{-1, r.Size()} {
			if e, err := r.NextExtent(off); !errors.Is(err, blockdev.ErrRange) {
				t.Errorf("extent at %d: %+v, %v", off, e, err)
			}
		}
		if n, err := r.ReadAt(make([]byte, 10), r.Size()-4); n != 4 || err != io.EOF {
			t.Errorf("at the end: %d, %v", n, err)
		}
	}
}

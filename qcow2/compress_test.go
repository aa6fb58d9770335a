package qcow2

import (
	"bytes"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// TestUnzstd: a cluster of two frames with checksums, and others' bytes behind.
func TestUnzstd(t *testing.T) {
	w, err := zstd.NewWriter(nil, zstd.WithEncoderCRC(true))
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte("some text. "), 400)[:4096]
	in := w.EncodeAll(want[:1000], nil)
	in = w.EncodeAll(want[1000:], in)
	for _, rest := range [][]byte{nil, []byte("garbage"), w.EncodeAll(want, nil)} {
		c := &codec{in: append(bytes.Clone(in), rest...)}
		for range 2 { // the decoder is used again
			got := make([]byte, len(want))
			if err := c.unzstd(got); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d bytes behind: %v", len(rest), err)
			}
		}
	}
	got := make([]byte, len(want))
	for n := range in {
		c := &codec{in: in[:n]}
		if err := c.unzstd(got); err == nil {
			t.Errorf("%d of %d bytes: no error", n, len(in))
		}
	}
	c := &codec{in: in}
	if err := c.unzstd(make([]byte, 3000)); err == nil {
		t.Error("frames of more than a cluster: no error")
	}
}

// TestTableCache: the bound holds and the last used stays.
func TestTableCache(t *testing.T) {
	var c tableCache
	c.init(cacheShards * 1000)
	for i := range int64(1000) {
		c.put(tableKey{0, i * 512}, make([]byte, 100))
		c.put(tableKey{0, i * 512}, make([]byte, 100)) // the same again
		if c.get(tableKey{0, i * 512}) == nil {
			t.Fatalf("%d is not there", i)
		}
	}
	for i := range c.shards {
		s := &c.shards[i]
		if s.size > 1000 || s.size != int64(len(s.items))*100 || s.lru.Len() != len(s.items) {
			t.Errorf("shard %d: %d bytes, %d items, %d in the list", i, s.size, len(s.items), s.lru.Len())
		}
	}
}

package transfer

import (
	"bytes"

	"qimg/qcow2/blockdev"
)

// differing sets w.data to the blocks of b, which lies at off, that the base
// has otherwise.
func (w *worker) differing(b []byte, off int64) error {
	if w.base == nil {
		w.base = make([]byte, w.buffer)
	}
	base := w.base[:len(b)]
	if err := readFull(w.opts.Base, base, off); err != nil {
		return &ReadError{Off: off, Err: err}
	}
	block := w.grain
	if w.skipper == nil {
		block = DefaultSparse
	}
	w.data = w.data[:0]
	for at, end := off, off+int64(len(b)); at < end; {
		next := min(at&^(block-1)+block, end)
		switch n := len(w.data); {
		case bytes.Equal(b[at-off:next-off], base[at-off:next-off]):
		case n > 0 && w.data[n-1].Off+w.data[n-1].Len == at:
			w.data[n-1].Len += next - at
		default:
			w.data = append(w.data, blockdev.Range{Off: at, Len: next - at})
		}
		at = next
	}
	return nil
}

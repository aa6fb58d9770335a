package transfer

import (
	"bytes"

	"qimg/qcow2/blockdev"
)

// IsZero reports whether p is all zeroes.
func IsZero(p []byte) bool {
	return len(p) == 0 || p[0] == 0 && bytes.Equal(p[1:], p[:len(p)-1])
}

// dataRanges appends the parts of b, which lies at off, that are to be written:
// blocks of the given size, a power of two, that are not zero, and zeroes in
// between of less than sparse bytes.
func dataRanges(list []blockdev.Range, b []byte, off, block, sparse int64) []blockdev.Range {
	end := off + int64(len(b))
	for at := off; at < end; {
		next := min(at&^(block-1)+block, end)
		if IsZero(b[at-off : next-off]) {
			at = next
			continue
		}
		if n := len(list); n > 0 && at-(list[n-1].Off+list[n-1].Len) < sparse {
			list[n-1].Len = next - list[n-1].Off
		} else {
			list = append(list, blockdev.Range{Off: at, Len: next - at})
		}
		at = next
	}
	return list
}

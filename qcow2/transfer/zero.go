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

// wholeBlocks makes ranges reach to the ends of the blocks that they lie in, up to
// end, and joins those that touch.
func wholeBlocks(list []blockdev.Range, block, end int64) []blockdev.Range {
	whole := list[:0]
	for _, r := range list {
		lo, hi := r.Off&^(block-1), min((r.Off+r.Len+block-1)&^(block-1), end)
		if n := len(whole) - 1; n >= 0 && lo <= whole[n].Off+whole[n].Len {
			whole[n].Len = hi - whole[n].Off
		} else {
			whole = append(whole, blockdev.Range{Off: lo, Len: hi - lo})
		}
	}
	return whole
}

package cli

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math"

	"qimg/ext4img"
	"qimg/qcow2/blockdev"
)

// swapPage is the size of a page of a swap area, that of most machines.
const swapPage = 4096

// newSwap returns an empty swap area of version 1 (include/linux/swap.h). Its UUID
// is derived from seed unless it is given.
func newSwap(size int64, label, uuid string, seed []byte) (*blockdev.Memory, error) {
	pages := size / swapPage
	switch {
	case pages < 10:
		return nil, fmt.Errorf("a swap area has at least %d bytes, not %d", 10*swapPage, size)
	case pages > math.MaxUint32:
		return nil, fmt.Errorf("a swap area of %d bytes is too large", size)
	case len(label) > 15:
		return nil, fmt.Errorf("the label of a swap area has at most 15 bytes, not %d", len(label))
	}
	var id ext4img.UUID
	if uuid != "" {
		var err error
		if id, err = ext4img.ParseUUID(uuid); err != nil {
			return nil, err
		}
	} else {
		sum := sha256.Sum256(fmt.Appendf(seed, " %d %q", size, label))
		copy(id[:], sum[:])
		id[6], id[8] = id[6]&0x0f|0x80, id[8]&0x3f|0x80
	}
	b := make([]byte, swapPage)
	le := binary.LittleEndian
	le.PutUint32(b[1024:], 1)               // version
	le.PutUint32(b[1028:], uint32(pages-1)) // last page
	copy(b[1036:], id[:])
	copy(b[1052:], label)
	copy(b[swapPage-10:], "SWAPSPACE2")
	area := blockdev.NewMemory(size)
	_, err := area.WriteAt(b, 0)
	return area, err
}

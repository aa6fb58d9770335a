package qcow2

import "qimg/qcow2/blockdev"

// copyBuffer is how much guest data or vm state is copied at once, in bytes.
const copyBuffer = 1 << 20

// copyWorkers is how many pieces of a copy are read and written at once: one
// writes, in order, the others read.
const copyWorkers = 4

// overlayOf returns the image whose backing file base is, and the depth of
// base; nil if base is not below im. If base is nil that is im itself.
func (im *Image) overlayOf(base blockdev.Reader) (overlay *Image, depth int) {
	for over, ok := im, true; ok && over.backing != nil; over, ok = over.backing.(*Image) {
		depth++
		if base == nil || over.backing == base {
			return over, depth
		}
	}
	return nil, 0
}

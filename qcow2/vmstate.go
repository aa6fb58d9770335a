package qcow2

import (
	"fmt"
	"io"
	"os"

	"qimg/qcow2/blockdev"
)

// vmStateOffset returns the guest offset at which vm state begins in an image
// of a size: that which the first L2 table behind the disk maps
// (block/qcow2.h, qcow2_vm_state_offset).
func (g *geometry) vmStateOffset(size uint64) int64 {
	return int64(g.l1Entries(size)) << g.l2Coverage()
}

// vmStateOffset returns the guest offset of the vm state of a snapshot in its
// own L1 table. QEMU looks for it where the image has it once the snapshot is
// applied: behind the disk of the snapshot, which can have another size. An
// image of the same size keeps its own, of which the snapshot has but the whole
// sectors.
func (h *Header) vmStateOffset(sn *Snapshot) int64 {
	g, size := h.geometry(), sn.DiskSize
	if size == h.Size&^511 {
		size = h.Size
	}
	return g.vmStateOffset(size)
}

// VMState is the state of a machine that a snapshot holds beside the disk, a
// migration stream if QEMU made it. It is a blockdev.Reader and
// blockdev.ExtentReader.
//
// All methods are safe for concurrent use, as long as the image is open.
type VMState struct {
	im   *Image
	off  int64 // guest offset
	size int64
}

// VMState returns the state of the machine in the snapshot that the image was
// opened with (OpenOptions.Snapshot). One of a disk alone has a state of size
// 0. A state of more bytes than the L1 table of the snapshot maps is an error
// that matches ErrCorrupt.
func (im *Image) VMState() (*VMState, error) {
	sn := im.snapshot
	if sn == nil {
		return nil, fmt.Errorf("qcow2: vm state: the image was opened without a snapshot: %w", ErrNotFound)
	}
	s := &VMState{im: im, off: im.header.vmStateOffset(sn)}
	if sn.VMStateSize == 0 {
		return s, nil
	}
	mapped := int64(sn.L1Size) << im.geo.l2Coverage() // below 2^62: l1_size is bounded by maxL1Size
	if room := max(0, mapped-s.off); sn.VMStateSize > uint64(room) {
		return nil, &FormatError{"snapshot " + sn.ID, -1, "vm_state_size",
			fmt.Sprintf("%d, but its L1 table maps %d bytes behind the disk", sn.VMStateSize, room), ErrCorrupt}
	}
	s.size = int64(sn.VMStateSize)
	return s, nil
}

// Size returns the size of the state in bytes.
func (s *VMState) Size() int64 { return s.size }

// ReadAt implements io.ReaderAt.
func (s *VMState) ReadAt(p []byte, off int64) (int, error) {
	if err := s.im.readable(); err != nil {
		return 0, err
	}
	if off < 0 {
		return 0, fmt.Errorf("qcow2: read of vm state at offset %d: %w", off, blockdev.ErrRange)
	}
	if off >= s.size && len(p) > 0 {
		return 0, io.EOF
	}
	var atEnd error
	if int64(len(p)) > s.size-off {
		p, atEnd = p[:max(0, s.size-off)], io.EOF
	}
	if err := s.im.readGuest(p, s.off+off); err != nil {
		return 0, err
	}
	return len(p), atEnd
}

// NextExtent implements blockdev.ExtentReader.
func (s *VMState) NextExtent(off int64) (blockdev.Extent, error) {
	if s.im.closed.Load() {
		return blockdev.Extent{}, fmt.Errorf("qcow2: next extent of vm state: %w", os.ErrClosed)
	}
	if off < 0 || off >= s.size {
		return blockdev.Extent{}, fmt.Errorf("qcow2: next extent of vm state at offset %d of %d: %w", off, s.size, blockdev.ErrRange)
	}
	e, _, err := s.im.piece(s.off+off, s.size-off)
	e.Off = off
	return e, err
}

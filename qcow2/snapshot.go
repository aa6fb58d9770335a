package qcow2

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
)

// Sizes of the parts of a snapshot table entry.
const (
	snapshotHeaderSize    = 40
	snapshotExtraDataSize = 24 // that is known: VM state size, disk size, icount
	snapshotExtraDataV3   = 16 // that version 3 asks for: without icount
)

// Snapshot is an entry of the snapshot table. The numbers are the offsets of the
// fields in the entry as it is stored.
type Snapshot struct {
	L1TableOffset uint64 // 0: in bytes
	L1Size        uint32 // 8: entries
	DateSec       uint32 // 16: seconds since the epoch
	DateNsec      uint32 // 20
	VMClockNsec   uint64 // 24: run time of the guest
	VMStateSize   uint64 // 32, or 40 if that is present: bytes
	DiskSize      uint64 // 48: bytes; the image's if it is not present
	ICount        uint64 // 56: NoICount if it is not present
	ID            string
	Name          string

	// ExtraDataSize is the size of the extra data as stored, which tells
	// which of the fields from 40 on are present.
	ExtraDataSize uint32 // 36
	// UnknownExtraData is the extra data from byte 64 of the entry on.
	UnknownExtraData []byte
}

// NoICount is the ICount of a snapshot without an instruction count.
const NoICount = ^uint64(0)

// snapshotSize returns the size of the entry that starts with the header b,
// without padding.
func snapshotSize(b []byte) (int, error) {
	extra := binary.BigEndian.Uint32(b[36:])
	if extra > maxSnapshotExtraData {
		return 0, fmt.Errorf("extra_data_size %d, expected at most %d", extra, maxSnapshotExtraData)
	}
	return snapshotHeaderSize + int(extra) + int(binary.BigEndian.Uint16(b[12:])) + int(binary.BigEndian.Uint16(b[14:])), nil
}

// parseSnapshot parses a snapshot table entry; b is as long as snapshotSize
// says. diskSize is the virtual size of the image.
func parseSnapshot(b []byte, diskSize uint64) Snapshot {
	s := Snapshot{
		L1TableOffset: binary.BigEndian.Uint64(b[0:]),
		L1Size:        binary.BigEndian.Uint32(b[8:]),
		DateSec:       binary.BigEndian.Uint32(b[16:]),
		DateNsec:      binary.BigEndian.Uint32(b[20:]),
		VMClockNsec:   binary.BigEndian.Uint64(b[24:]),
		VMStateSize:   uint64(binary.BigEndian.Uint32(b[32:])),
		DiskSize:      diskSize,
		ICount:        NoICount,
		ExtraDataSize: binary.BigEndian.Uint32(b[36:]),
	}
	idSize := int(binary.BigEndian.Uint16(b[12:]))
	extra := b[snapshotHeaderSize : snapshotHeaderSize+int(s.ExtraDataSize)]
	text := b[snapshotHeaderSize+len(extra):]
	if len(extra) >= 8 {
		s.VMStateSize = binary.BigEndian.Uint64(extra[0:])
	}
	if len(extra) >= 16 {
		s.DiskSize = binary.BigEndian.Uint64(extra[8:])
	}
	if len(extra) >= 24 {
		s.ICount = binary.BigEndian.Uint64(extra[16:])
		s.UnknownExtraData = append([]byte(nil), extra[24:]...)
	}
	s.ID, s.Name = cString(text[:idSize]), cString(text[idSize:]) // as QEMU reads them
	return s
}

// appendTo appends the entry with its padding. All known extra data is
// written, as far as ExtraDataSize says at least.
func (s Snapshot) appendTo(b []byte) []byte {
	start := len(b)
	extra := max(s.ExtraDataSize, snapshotExtraDataSize)
	b = binary.BigEndian.AppendUint64(b, s.L1TableOffset)
	b = binary.BigEndian.AppendUint32(b, s.L1Size)
	b = binary.BigEndian.AppendUint16(b, uint16(len(s.ID)))
	b = binary.BigEndian.AppendUint16(b, uint16(len(s.Name)))
	b = binary.BigEndian.AppendUint32(b, s.DateSec)
	b = binary.BigEndian.AppendUint32(b, s.DateNsec)
	b = binary.BigEndian.AppendUint64(b, s.VMClockNsec)
	// A program that knows no extra data must not see a part of the state.
	small := uint32(s.VMStateSize)
	if s.VMStateSize > 1<<32-1 {
		small = 0
	}
	b = binary.BigEndian.AppendUint32(b, small)
	b = binary.BigEndian.AppendUint32(b, extra)
	b = binary.BigEndian.AppendUint64(b, s.VMStateSize)
	b = binary.BigEndian.AppendUint64(b, s.DiskSize)
	b = binary.BigEndian.AppendUint64(b, s.ICount)
	b = append(b, s.UnknownExtraData...)
	b = append(b, s.ID...)
	b = append(b, s.Name...)
	return append(b, make([]byte, -(len(b)-start)&7)...)
}

// readSnapshots reads the snapshot table and returns where it ends. Unlike
// QEMU it does not take what lies beyond the end of the file for zeroes.
func readSnapshots(dev io.ReaderAt, h *Header) (list []Snapshot, end int64, err error) {
	if h.NbSnapshots == 0 {
		return nil, 0, nil
	}
	start := int64(h.SnapshotsOffset)
	r := bufio.NewReaderSize(io.NewSectionReader(dev, start, maxSnapshotTableSize), 64<<10)
	pos := int64(0)
	bad := func(i uint32, sentinel error, detail string) ([]Snapshot, int64, error) {
		return nil, 0, &FormatError{"snapshot table", start + pos, "", fmt.Sprintf("entry %d of %d: %s", i, h.NbSnapshots, detail), sentinel}
	}
	for i := range h.NbSnapshots { // at most maxSnapshots
		if _, err := r.Discard(int(-pos & 7)); err != nil {
			return bad(i, ErrCorrupt, err.Error())
		}
		pos += -pos & 7
		head, err := r.Peek(snapshotHeaderSize)
		if err != nil {
			return nil, 0, snapshotReadError(err, start+pos, i, h.NbSnapshots)
		}
		n, err := snapshotSize(head)
		if err != nil {
			return bad(i, ErrLimit, err.Error())
		}
		if pos+int64(n) > maxSnapshotTableSize {
			return bad(i, ErrLimit, fmt.Sprintf("table of more than %d bytes", maxSnapshotTableSize))
		}
		b := make([]byte, n) // at most 40 + 1024 + 2*65535
		if _, err := io.ReadFull(r, b); err != nil {
			return nil, 0, snapshotReadError(err, start+pos, i, h.NbSnapshots)
		}
		list = append(list, parseSnapshot(b, h.Size&^511))
		pos += int64(n)
	}
	return list, start + pos, nil
}

func snapshotReadError(err error, off int64, i, n uint32) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return &FormatError{"snapshot table", off, "", fmt.Sprintf("entry %d of %d is beyond the end of the file or the limit of %d bytes", i, n, maxSnapshotTableSize), ErrCorrupt}
	}
	return fmt.Errorf("qcow2: snapshot table at %#x: %w", off, err)
}

// findSnapshot finds a snapshot by id, else by name.
func findSnapshot(list []Snapshot, want string) (*Snapshot, error) {
	for i := range list {
		if list[i].ID == want {
			return &list[i], nil
		}
	}
	for i := range list {
		if list[i].Name == want {
			return &list[i], nil
		}
	}
	return nil, fmt.Errorf("qcow2: %q: %w", want, ErrNotFound)
}

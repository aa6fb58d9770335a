package parttable

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"unicode/utf16"

	"qimg/qcow2/blockdev"
)

const (
	gptMagic      = "EFI PART"
	gptHeaderSize = 92
	gptEntrySize  = 128
	gptEntries    = 128 // of a table that is written, the least that is allowed
	// maxEntries bounds the array of entries to 1 MiB. 128 is what there is; the
	// programs that can make more stop long before.
	maxEntries = 8192
)

// gptHeader is the header of a GPT, of either copy.
type gptHeader struct {
	alternate   uint64 // LBA of the other header
	firstUsable uint64 // LBA
	lastUsable  uint64 // LBA, inclusive
	disk        GUID
	arrayLBA    uint64
	entries     uint32 // at most maxEntries
	arrayCRC    uint32
}

// readGPT reads a GPT: the primary one or, if it is damaged and backup is set, the
// one at the end of the disk. ErrNoTable means that there is no trace of one.
func readGPT(dev blockdev.Reader, backup bool) (*Table, error) {
	result := ErrNoTable
	for _, ss := range []int64{512, 4096} {
		if dev.Size() < 3*ss {
			continue
		}
		t, h, err := readGPTAt(dev, 1, ss)
		switch {
		case err == nil:
			t.checkBackup(dev, h)
			return t, nil
		case !errors.Is(err, ErrNoTable) && !errors.Is(err, ErrCorrupt):
			return nil, err
		case errors.Is(result, ErrNoTable):
			result = err
		}
	}
	if !backup {
		return nil, result
	}
	for _, ss := range []int64{512, 4096} {
		last := dev.Size()/ss - 1
		if last < 2 {
			continue
		}
		t, _, err := readGPTAt(dev, last, ss)
		if err == nil {
			t.FromBackup = true
			t.find(0, "the primary table is damaged, the backup was read")
			return t, nil
		}
		if !errors.Is(err, ErrNoTable) && !errors.Is(err, ErrCorrupt) {
			return nil, err
		}
	}
	if errors.Is(result, ErrNoTable) {
		result = corrupt(0, "the disk is marked as one with a GPT, but neither its beginning nor its end holds one")
	}
	return nil, result
}

// checkBackup adds findings about the copy of a primary table.
func (t *Table) checkBackup(dev blockdev.Reader, h *gptHeader) {
	ss := int64(t.SectorSize)
	last := dev.Size()/ss - 1
	if h.alternate > uint64(last) {
		t.find(0, "the backup table is outside the disk")
		return
	}
	if h.alternate != uint64(last) {
		t.find(0, "the backup table is not at the end of the disk")
	}
	if _, _, err := readGPTAt(dev, int64(h.alternate), ss); err != nil {
		t.find(0, "the backup table is damaged")
	}
}

// readGPTAt reads the copy of a GPT whose header is at an LBA inside the disk.
func readGPTAt(dev blockdev.Reader, lba, ss int64) (*Table, *gptHeader, error) {
	h, err := readGPTHeader(dev, lba, ss)
	if err != nil {
		return nil, nil, err
	}
	array := make([]byte, int(h.entries)*gptEntrySize)
	off := int64(h.arrayLBA) * ss
	if err := readFull(dev, array, off); err != nil {
		return nil, nil, err
	}
	if sum := crc32.ChecksumIEEE(array); sum != h.arrayCRC {
		return nil, nil, corrupt(off, "checksum of the entries is %08x, the header says %08x", sum, h.arrayCRC)
	}
	t := &Table{Kind: GPT, ID: h.disk.String(), SectorSize: int(ss), array: (int64(len(array)) + ss - 1) / ss * ss}
	for i := range int(h.entries) {
		t.addEntry(i+1, array[i*gptEntrySize:][:gptEntrySize], h, dev.Size())
	}
	t.finish()
	return t, h, nil
}

// readGPTHeader reads and checks a header. After it the array of entries lies
// inside the disk.
func readGPTHeader(dev blockdev.Reader, lba, ss int64) (*gptHeader, error) {
	off := lba * ss
	b := make([]byte, ss)
	if err := readFull(dev, b, off); err != nil {
		return nil, err
	}
	if string(b[:8]) != gptMagic {
		return nil, ErrNoTable
	}
	le := binary.LittleEndian
	size := le.Uint32(b[12:])
	if size < gptHeaderSize || int64(size) > ss {
		return nil, corrupt(off, "header of %d bytes, from %d to %d are expected", size, gptHeaderSize, ss)
	}
	want := le.Uint32(b[16:])
	clear(b[16:20])
	if sum := crc32.ChecksumIEEE(b[:size]); sum != want {
		return nil, corrupt(off, "checksum of the header is %08x, it says %08x", sum, want)
	}
	h := &gptHeader{
		alternate:   le.Uint64(b[32:]),
		firstUsable: le.Uint64(b[40:]),
		lastUsable:  le.Uint64(b[48:]),
		disk:        guidFromDisk(b[56:72]),
		arrayLBA:    le.Uint64(b[72:]),
		entries:     le.Uint32(b[80:]),
		arrayCRC:    le.Uint32(b[88:]),
	}
	sectors := uint64(dev.Size() / ss)
	switch my := le.Uint64(b[24:]); {
	case my != uint64(lba):
		return nil, corrupt(off, "the header says that it is at sector %d", my)
	case h.firstUsable > h.lastUsable || h.lastUsable >= sectors:
		return nil, corrupt(off, "usable sectors from %d to %d on a disk of %d", h.firstUsable, h.lastUsable, sectors)
	case le.Uint32(b[84:]) != gptEntrySize:
		return nil, corrupt(off, "entries of %d bytes, %d are expected", le.Uint32(b[84:]), gptEntrySize)
	case h.entries > maxEntries:
		return nil, corrupt(off, "%d entries, at most %d are expected", h.entries, maxEntries)
	case h.arrayLBA >= sectors || int64(h.entries)*gptEntrySize > int64(sectors-h.arrayLBA)*ss:
		return nil, corrupt(off, "entries from sector %d on, which is not inside the disk", h.arrayLBA)
	}
	return h, nil
}

// addEntry adds the partition of an entry, unless it is unused.
func (t *Table) addEntry(number int, b []byte, h *gptHeader, size int64) {
	le := binary.LittleEndian
	p := Partition{Number: number, Type: Type{GUID: guidFromDisk(b[:16])}, UUID: guidFromDisk(b[16:32]).String(), Flags: le.Uint64(b[48:])}
	if p.Type.GUID == (GUID{}) {
		return
	}
	p.Bootable = p.Flags&flagLegacyBoot != 0
	var name []uint16
	for n := b[56:]; len(n) > 0 && le.Uint16(n) != 0; n = n[2:] {
		name = append(name, le.Uint16(n))
	}
	p.Name = string(utf16.Decode(name))
	first, last := le.Uint64(b[32:]), le.Uint64(b[40:])
	switch {
	case last < first:
		t.find(number, "it ends at sector %d, before its beginning at %d", last, first)
	case first < h.firstUsable || last > h.lastUsable:
		t.find(number, "sectors %d to %d are not inside the usable ones, %d to %d", first, last, h.firstUsable, h.lastUsable)
	default:
		t.add(p, first, last-first+1, size)
	}
}

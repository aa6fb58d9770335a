package parttable

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/diskfs/go-diskfs/partition/mbr"

	"qimg/qcow2/blockdev"
)

const (
	mbrSize = 512
	// maxLogical bounds the chain of extended partitions, as the kernel does.
	maxLogical = 100
)

// bootRecord is a sector that has the form of an MBR.
type bootRecord struct {
	entries   []*mbr.Partition // four
	signature string
}

// parseMBR parses a sector. ok is false if it is none of an MBR: it has no
// signature, or a flag that no MBR has.
func parseMBR(b []byte) (r *bootRecord, ok bool) {
	t, err := mbr.Read(sector{bytes.NewReader(b)}, mbrSize, mbrSize)
	if err != nil {
		return nil, false
	}
	return &bootRecord{t.Partitions, t.UUID()}, true
}

// sector is a sector as go-diskfs reads it.
type sector struct{ *bytes.Reader }

func (sector) Close() error               { return nil }
func (sector) Stat() (fs.FileInfo, error) { return nil, errors.ErrUnsupported }

// protective reports whether the record says that the disk has a GPT.
func (r *bootRecord) protective() bool {
	for _, e := range r.entries {
		if e.Type == mbr.GPTProtective {
			return true
		}
	}
	return false
}

func isExtended(t mbr.Type) bool {
	return t == mbr.ExtendedCHS || t == mbr.ExtendedLBA || t == mbr.LinuxExtended
}

// isFileSystem reports whether a boot sector is that of a FAT or NTFS file
// system, which ends in the same signature.
func isFileSystem(b []byte) bool {
	if b[0] != 0xeb && b[0] != 0xe9 {
		return false
	}
	return bytes.HasPrefix(b[54:], []byte("FAT")) || bytes.HasPrefix(b[82:], []byte("FAT32")) ||
		bytes.HasPrefix(b[3:], []byte("NTFS    ")) || bytes.HasPrefix(b[3:], []byte("EXFAT   "))
}

// readMBR makes the table that a boot record begins.
func readMBR(dev blockdev.Reader, boot *bootRecord) (*Table, error) {
	t := &Table{Kind: MBR, ID: boot.signature, SectorSize: mbrSize}
	number := 5
	for i, e := range boot.entries {
		if e.Type == mbr.Empty {
			continue
		}
		p := t.mbrPartition(i+1, e)
		p.Extended = isExtended(e.Type)
		t.add(p, uint64(e.Start), uint64(e.Size), dev.Size())
		if p.Extended {
			var err error
			if number, err = t.readLogical(dev, i+1, uint64(e.Start), uint64(e.Size), number); err != nil {
				return nil, err
			}
		}
	}
	t.finish()
	return t, nil
}

func (t *Table) mbrPartition(number int, e *mbr.Partition) Partition {
	return Partition{
		Number: number, Type: Type{Byte: byte(e.Type)}, Bootable: e.Bootable,
		UUID: fmt.Sprintf("%s-%02x", strings.ToLower(t.ID), number),
	}
}

// readLogical follows the chain of extended boot records in an extended
// partition, of which next is the number of the first logical one, and returns
// the number behind the last.
func (t *Table) readLogical(dev blockdev.Reader, extended int, start, sectors uint64, next int) (int, error) {
	seen := map[uint64]bool{}
	b := make([]byte, mbrSize)
	disk := uint64(dev.Size()) / mbrSize
	for at := start; ; {
		switch {
		case seen[at]:
			t.find(extended, "the chain of logical partitions comes back to sector %d", at)
			return next, nil
		case len(seen) == maxLogical:
			t.find(extended, "there are more than %d logical partitions", maxLogical)
			return next, nil
		case at == 0 || at >= disk || at-start >= sectors:
			t.find(extended, "the chain of logical partitions leads to sector %d, which is not inside", at)
			return next, nil
		}
		seen[at] = true
		if err := readFull(dev, b, int64(at)*mbrSize); err != nil {
			return next, err
		}
		r, ok := parseMBR(b)
		if !ok {
			t.find(extended, "sector %d is no extended boot record", at)
			return next, nil
		}
		link := uint64(0)
		for i, e := range r.entries {
			switch {
			case e.Type == mbr.Empty || e.Size == 0:
			case isExtended(e.Type):
				if link == 0 {
					link = start + uint64(e.Start)
				}
			case i < 2: // the others have no meaning
				p := t.mbrPartition(next, e)
				if from := at - start + uint64(e.Start); from > sectors || uint64(e.Size) > sectors-from {
					t.find(next, "it is not inside the extended partition")
				} else {
					t.add(p, at+uint64(e.Start), uint64(e.Size), dev.Size())
				}
				next++
			}
		}
		if link == 0 {
			return next, nil
		}
		at = link
	}
}

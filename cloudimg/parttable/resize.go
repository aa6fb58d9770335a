package parttable

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math"

	"github.com/diskfs/go-diskfs/partition/mbr"

	"qimg/qcow2/blockdev"
)

// Tail is the number of bytes at the end of a disk that the table needs there.
func (t *Table) Tail() int64 {
	if t.Kind == MBR {
		return 0
	}
	return int64(t.SectorSize) + t.array
}

// sectorWrite is a write of whole sectors.
type sectorWrite struct {
	off  int64
	data []byte
}

// CheckResize returns the error that Resize has before it writes something. The
// device has the size that the disk has now.
func CheckResize(dev blockdev.Reader, size int64, number int, end int64) error {
	_, err := planResize(dev, size, number, end)
	return err
}

// Resize makes the partition table of a disk that of one of size bytes, in which
// a partition ends at another place. All else in the table stays as it is, and
// so does what is in the partitions. The partition has to be the last one of the
// disk, and a primary one. The device holds all of both disks, the old and the
// new one.
//
// Order: the backup of a GPT, in its new place; sync; the primary entries and
// header; sync; the protective MBR; sync; zeroes over the old backup; sync. So
// a crash leaves the old table or the new one.
func Resize(dev blockdev.Device, size int64, number int, end int64) error {
	plan, err := planResize(dev, size, number, end)
	if err != nil {
		return err
	}
	for _, step := range plan {
		for _, w := range step {
			if _, err := dev.WriteAt(w.data, w.off); err != nil {
				return fmt.Errorf("partition table at offset %d: %w", w.off, err)
			}
		}
		if err := blockdev.Sync(dev); err != nil {
			return err
		}
	}
	return nil
}

// planResize returns what is to be written, with a sync behind each part.
func planResize(dev blockdev.Reader, size int64, number int, end int64) ([][]sectorWrite, error) {
	t, err := Read(dev)
	if err != nil {
		return nil, err
	}
	p, err := t.Partition(number)
	if err != nil {
		return nil, err
	}
	ss := int64(t.SectorSize)
	size -= size % ss
	switch {
	case t.FromBackup:
		return nil, corrupt(ss, "the primary table is damaged, and has to be repaired first")
	case t.overlap[number]:
		return nil, corrupt(p.Start, "partition %d overlaps another one", number)
	case p.Extended || t.Kind == MBR && number > 4:
		return nil, fmt.Errorf("partition %d: the size of extended and logical partitions cannot be changed", number)
	case end%ss != 0 || end <= p.Start || end > size-t.Tail():
		return nil, fmt.Errorf("partition %d: it cannot end at %d on a disk of %d bytes", number, end, size)
	}
	for i := range t.Partitions {
		if q := &t.Partitions[i]; q.Number != number && q.End() > p.Start {
			return nil, fmt.Errorf("partition %d is not the last one of the disk: partition %d is behind it", number, q.Number)
		}
	}
	if t.Kind == MBR {
		return planMBR(dev, p, end)
	}
	return t.planGPT(dev, size, number, end)
}

// planMBR changes the entry of a primary partition.
func planMBR(dev blockdev.Reader, p *Partition, end int64) ([][]sectorWrite, error) {
	if (end-1)/mbrSize > math.MaxUint32 {
		return nil, fmt.Errorf("partition %d: it ends behind 2 TiB, which needs a GPT", p.Number)
	}
	b := make([]byte, mbrSize)
	if err := readFull(dev, b, 0); err != nil {
		return nil, err
	}
	e := b[mbrEntriesOff+16*(p.Number-1):]
	e[5], e[6], e[7] = chs(end/mbrSize - 1)
	binary.LittleEndian.PutUint32(e[12:], uint32((end-p.Start)/mbrSize))
	return [][]sectorWrite{{{0, b}}}, nil
}

const mbrEntriesOff = 446

// planGPT changes an entry and moves the backup to the end of the disk.
func (t *Table) planGPT(dev blockdev.Reader, size int64, number int, end int64) ([][]sectorWrite, error) {
	ss := int64(t.SectorSize)
	h, err := readGPTHeader(dev, 1, ss)
	if err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	header := make([]byte, ss)
	if err := readFull(dev, header, ss); err != nil {
		return nil, err
	}
	array := make([]byte, t.array)
	if err := readFull(dev, array, int64(h.arrayLBA)*ss); err != nil {
		return nil, err
	}
	le.PutUint64(array[(number-1)*gptEntrySize+40:], uint64(end/ss-1))
	last := size/ss - 1
	backupArray := last - t.array/ss
	seal := func(my, alternate, arrayLBA int64) []byte {
		b := append([]byte(nil), header...)
		le.PutUint64(b[24:], uint64(my))
		le.PutUint64(b[32:], uint64(alternate))
		le.PutUint64(b[48:], uint64(backupArray-1)) // last usable
		le.PutUint64(b[72:], uint64(arrayLBA))
		le.PutUint32(b[88:], crc32.ChecksumIEEE(array[:int(h.entries)*gptEntrySize]))
		clear(b[16:20])
		le.PutUint32(b[16:], crc32.ChecksumIEEE(b[:le.Uint32(b[12:])]))
		return b
	}
	plan := [][]sectorWrite{
		{{backupArray * ss, array}, {last * ss, seal(last, 1, backupArray)}},
		{{int64(h.arrayLBA) * ss, array}, {ss, seal(1, last, int64(h.arrayLBA))}},
	}
	boot := make([]byte, mbrSize)
	if err := readFull(dev, boot, 0); err != nil {
		return nil, err
	}
	for i := range 4 {
		if e := boot[mbrEntriesOff+16*i:]; mbr.Type(e[4]) == mbr.GPTProtective && le.Uint32(e[8:]) == 1 {
			le.PutUint32(e[12:], uint32(min(last, math.MaxUint32)))
			plan = append(plan, []sectorWrite{{0, boot}})
			break
		}
	}
	if old := int64(h.alternate); old != last && old > 1 && old < dev.Size()/ss {
		if _, err := readGPTHeader(dev, old, ss); err == nil {
			plan = append(plan, []sectorWrite{{old * ss, make([]byte, ss)}})
		}
	}
	return plan, nil
}

package parttable

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"qimg/qcow2/blockdev"
)

var (
	// ErrNoTable means that a disk has no partition table: it is empty, or a
	// file system fills it.
	ErrNoTable = errors.New("no partition table")
	// ErrCorrupt means that a disk has a table that cannot be used. The error
	// that matches it is a *FormatError.
	ErrCorrupt = errors.New("partition table is corrupt")
	// ErrNoPartition means that a table has no partition of a number.
	ErrNoPartition = errors.New("no such partition")
)

// FormatError says what is wrong with a table. It matches ErrCorrupt.
type FormatError struct {
	Off  int64 // of the structure, in bytes
	Text string
}

func (e *FormatError) Error() string {
	return fmt.Sprintf("partition table at offset %d: %s", e.Off, e.Text)
}

// Is makes a FormatError match ErrCorrupt.
func (e *FormatError) Is(target error) bool { return target == ErrCorrupt }

func corrupt(off int64, format string, args ...any) error {
	return &FormatError{off, fmt.Sprintf(format, args...)}
}

// Kind is a kind of partition table.
type Kind uint8

const (
	GPT Kind = 1 + iota
	MBR
)

func (k Kind) String() string {
	switch k {
	case GPT:
		return "gpt"
	case MBR:
		return "mbr"
	}
	return "unknown"
}

// Partition is one partition. Offsets and sizes are in bytes.
type Partition struct {
	// Number is that of the kernel, from 1: sda1. Logical partitions of an MBR
	// begin at 5.
	Number      int
	Start, Size int64
	Type        Type
	// Name is the label of a GPT partition, at most 36 UTF-16 units.
	Name string
	// UUID is what the kernel calls PARTUUID: the GUID of a GPT partition, or
	// the signature of the disk and the number.
	UUID string
	// Flags are the attributes of a GPT partition.
	Flags uint64
	// Bootable is the active flag of an MBR, or the attribute of a GPT for
	// legacy BIOSes.
	Bootable bool
	// Extended is a partition of an MBR that holds the logical ones.
	Extended bool
}

// End returns the first byte behind the partition.
func (p *Partition) End() int64 { return p.Start + p.Size }

// flagLegacyBoot is the attribute of a GPT partition that a legacy BIOS may boot.
const flagLegacyBoot = 1 << 2

// Finding is something wrong with a table that does not stop it from being read.
type Finding struct {
	// Number is that of the partition, 0 if it is about the table.
	Number int
	Text   string
}

func (f Finding) String() string {
	if f.Number == 0 {
		return f.Text
	}
	return fmt.Sprintf("partition %d: %s", f.Number, f.Text)
}

// Table is what a disk is divided into. It is not tied to the device.
type Table struct {
	Kind Kind
	// ID is the GUID of the disk, or its signature in 8 hexadecimal digits.
	ID         string
	SectorSize int
	// Partitions are sorted by number. All lie inside the disk and have a size.
	Partitions []Partition
	// Findings say what was left out, or is to be treated with care.
	Findings []Finding
	// FromBackup: the primary GPT is damaged, and the one at the end of the
	// disk was read.
	FromBackup bool

	overlap map[int]bool // numbers of partitions that share bytes
	array   int64        // bytes that the entries of a GPT take, in whole sectors
}

// Partition returns the partition of a number. Where there is none the error
// matches ErrNoPartition.
func (t *Table) Partition(number int) (*Partition, error) {
	i, ok := slices.BinarySearchFunc(t.Partitions, number, func(p Partition, n int) int { return cmp.Compare(p.Number, n) })
	if !ok {
		return nil, fmt.Errorf("partition %d: %w", number, ErrNoPartition)
	}
	return &t.Partitions[i], nil
}

// ReaderSection returns a partition as a disk that is read.
func (t *Table) ReaderSection(dev blockdev.Reader, number int) (*blockdev.ReaderSection, error) {
	p, err := t.Partition(number)
	if err != nil {
		return nil, err
	}
	return blockdev.NewReaderSection(dev, p.Start, p.Size)
}

// Section returns a partition as a disk that is written. A partition that
// shares bytes with another one is refused with ErrCorrupt, and so is an
// extended one.
func (t *Table) Section(dev blockdev.Device, number int) (*blockdev.Section, error) {
	p, err := t.Partition(number)
	switch {
	case err != nil:
		return nil, err
	case t.overlap[number]:
		return nil, corrupt(p.Start, "partition %d overlaps another one", number)
	case p.Extended:
		return nil, corrupt(p.Start, "partition %d is an extended one, which holds others", number)
	}
	return blockdev.NewSection(dev, p.Start, p.Size)
}

// find adds a finding.
func (t *Table) find(number int, format string, args ...any) {
	t.Findings = append(t.Findings, Finding{number, fmt.Sprintf(format, args...)})
}

// add adds a partition of sectors from start on, unless it is not inside a disk
// of size bytes.
func (t *Table) add(p Partition, start, sectors uint64, size int64) {
	whole := uint64(size) / uint64(t.SectorSize)
	switch {
	case sectors == 0:
		t.find(p.Number, "it is empty")
	case start == 0:
		t.find(p.Number, "it begins at sector 0, which holds the table")
	case start >= whole || sectors > whole-start:
		t.find(p.Number, "sectors %d to %d are not inside the disk, which has %d", start, start+sectors-1, whole)
	default:
		p.Start, p.Size = int64(start)*int64(t.SectorSize), int64(sectors)*int64(t.SectorSize)
		t.Partitions = append(t.Partitions, p)
	}
}

// finish sorts the partitions and looks for those that overlap.
func (t *Table) finish() {
	byStart := make([]*Partition, 0, len(t.Partitions))
	slices.SortFunc(t.Partitions, func(a, b Partition) int { return cmp.Compare(a.Number, b.Number) })
	for i := range t.Partitions {
		if !t.Partitions[i].Extended {
			byStart = append(byStart, &t.Partitions[i])
		}
	}
	slices.SortFunc(byStart, func(a, b *Partition) int {
		return cmp.Or(cmp.Compare(a.Start, b.Start), cmp.Compare(a.Number, b.Number))
	})
	t.overlap = map[int]bool{}
	var last *Partition // the one that reaches farthest
	for _, p := range byStart {
		if last != nil && p.Start < last.End() {
			t.find(p.Number, "it overlaps partition %d", last.Number)
			t.overlap[p.Number], t.overlap[last.Number] = true, true
		}
		if last == nil || p.End() > last.End() {
			last = p
		}
	}
}

// Read reads the partition table of a disk. A disk without one gives
// ErrNoTable, a table that is damaged as a whole gives ErrCorrupt; what is wrong
// with single partitions is among the findings.
//
// It reads 1 MiB at most for each copy of a GPT, and 100 extended partitions.
func Read(dev blockdev.Reader) (*Table, error) {
	if dev.Size() < mbrSize {
		return nil, ErrNoTable
	}
	b := make([]byte, mbrSize)
	if err := readFull(dev, b, 0); err != nil {
		return nil, err
	}
	boot, isMBR := parseMBR(b)
	protective := isMBR && boot.protective()
	if protective || b[510] == 0 && b[511] == 0 {
		t, err := readGPT(dev, protective)
		if !errors.Is(err, ErrNoTable) {
			return t, err
		}
	}
	if !isMBR || isFileSystem(b) {
		return nil, ErrNoTable
	}
	return readMBR(dev, boot)
}

// readFull reads all of b.
func readFull(dev blockdev.Reader, b []byte, off int64) error {
	section, err := blockdev.NewReaderSection(dev, off, int64(len(b)))
	if err != nil {
		return err
	}
	if n, err := section.ReadAt(b, 0); n < len(b) {
		return fmt.Errorf("partition table at offset %d: %w", off, err)
	}
	return nil
}

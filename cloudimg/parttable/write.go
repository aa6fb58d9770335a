package parttable

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"slices"
	"strconv"
	"strings"
	"unicode/utf16"

	"github.com/diskfs/go-diskfs/partition/gpt"
	"github.com/diskfs/go-diskfs/partition/mbr"

	"qimg/qcow2/blockdev"
)

// Spec says what table is to be written.
type Spec struct {
	Kind Kind
	// SectorSize is 512 or, for GPT, 4096; 0: 512.
	SectorSize int
	// ID is the GUID of the disk, or its signature in 8 hexadecimal digits; "":
	// derived from the rest of the spec.
	ID string
	// Seed is something that goes into what is derived.
	Seed []byte
	// Partitions are written under their numbers; 0: the one behind that of the
	// partition before. Start and Size are whole sectors. The UUID of a GPT
	// partition can be "": it is derived.
	Partitions []Partition
}

func (s *Spec) sectorSize() int64 {
	if s.SectorSize == 0 {
		return 512
	}
	return int64(s.SectorSize)
}

// reserved returns how many bytes the table takes at the beginning of the disk,
// and at its end.
func (s *Spec) reserved() (head, tail int64) {
	ss := s.sectorSize()
	if s.Kind == MBR {
		return ss, 0
	}
	array := (gptEntries*gptEntrySize + ss - 1) / ss * ss
	return 2*ss + array, ss + array
}

// Place gives places to the partitions that have no Start, in their order,
// each at a multiple of align bytes behind the one before, and rounds sizes up
// to sectors. The last partition may have no Size if diskSize is not 0: it gets
// the rest of the disk, down to a multiple of 4096. Place returns the size that
// the disk needs.
func (s *Spec) Place(align, diskSize int64) (int64, error) {
	ss := s.sectorSize()
	if align < ss || align%ss != 0 {
		return 0, fmt.Errorf("alignment of %d bytes is no multiple of the sector size, %d", align, ss)
	}
	head, tail := s.reserved()
	at := head
	for i := range s.Partitions {
		p := &s.Partitions[i]
		if p.Start == 0 {
			if at > math.MaxInt64-align {
				return 0, errors.New("the disk would be too large")
			}
			p.Start = (at + align - 1) / align * align
		}
		if p.Size == 0 && i == len(s.Partitions)-1 && diskSize > 0 {
			p.Size = max(0, (diskSize-tail)&^4095-p.Start)
		}
		if p.Size <= 0 || p.Size > math.MaxInt64/2-p.Start {
			if diskSize > 0 {
				return 0, fmt.Errorf("partition %d: nothing is left of a disk of %d bytes", i+1, diskSize)
			}
			return 0, fmt.Errorf("partition %d has no size", i+1)
		}
		p.Size = (p.Size + ss - 1) / ss * ss
		at = max(at, p.End())
	}
	need := (at + tail + ss - 1) / ss * ss
	if diskSize > 0 && need > diskSize {
		return 0, fmt.Errorf("a disk of %d bytes is too small for its partitions, which need %d", diskSize, need)
	}
	return max(need, diskSize), nil
}

// Write writes a table onto a disk, for GPT with its backup at the end. What
// lies between is left as it is, and so is the boot code in sector 0. Anything
// wrong with the spec is an error before something is written.
//
// Order: the entries and the header of the backup, those of the primary table,
// the protective MBR, with a sync behind each. So a disk that had a GPT before has
// the old or the new one after a crash.
func Write(dev blockdev.Device, spec *Spec) (*Table, error) {
	s, err := spec.complete(dev.Size())
	if err != nil {
		return nil, err
	}
	if s.Kind == MBR {
		err = s.writeMBR(dev)
	} else {
		err = s.writeGPT(dev)
	}
	if err != nil {
		return nil, err
	}
	return Read(dev)
}

// complete checks a spec for a disk of so many bytes, and returns it with all
// that can be left out.
func (s *Spec) complete(size int64) (*Spec, error) {
	c := *s
	c.Partitions = slices.Clone(s.Partitions)
	ss := c.sectorSize()
	c.SectorSize = int(ss)
	switch {
	case c.Kind != GPT && c.Kind != MBR:
		return nil, errors.New("a partition table is a GPT or an MBR")
	case ss != 512 && (ss != 4096 || c.Kind == MBR):
		return nil, fmt.Errorf("a %s with sectors of %d bytes cannot be written", c.Kind, ss)
	}
	most := gptEntries
	if c.Kind == MBR {
		most = 4
	}
	head, tail := c.reserved()
	size = size / ss * ss
	used := map[int]bool{}
	number := 0
	for i := range c.Partitions {
		p := &c.Partitions[i]
		if p.Number == 0 {
			p.Number = number + 1
		}
		number = p.Number
		bad := func(format string, args ...any) error {
			return fmt.Errorf("partition %d: %s", number, fmt.Sprintf(format, args...))
		}
		switch {
		case number < 1 || number > most:
			return nil, bad("numbers of a %s are from 1 to %d", c.Kind, most)
		case used[number]:
			return nil, bad("the number is used twice")
		case p.Start%ss != 0 || p.Size%ss != 0 || p.Size <= 0 || p.Start < head:
			return nil, bad("%d bytes at %d are not whole sectors behind the table", p.Size, p.Start)
		case p.Start > size-tail || p.Size > size-tail-p.Start:
			return nil, bad("%d bytes at %d do not fit a disk of %d bytes", p.Size, p.Start, size)
		}
		used[number] = true
		for _, q := range c.Partitions[:i] {
			if p.Start < q.End() && q.Start < p.End() {
				return nil, bad("it overlaps partition %d", q.Number)
			}
		}
		if err := c.checkPartition(p); err != nil {
			return nil, bad("%v", err)
		}
	}
	return &c, c.identify()
}

// checkPartition checks what the two kinds of tables want of a partition.
func (s *Spec) checkPartition(p *Partition) error {
	if s.Kind == MBR {
		switch {
		case p.Type.GUID != (GUID{}) || p.Type.Byte == 0 || isExtended(mbr.Type(p.Type.Byte)):
			return fmt.Errorf("type %v cannot be written to an MBR", p.Type)
		case p.Name != "" || p.UUID != "" || p.Flags != 0:
			return errors.New("an MBR has no labels, UUIDs and flags of partitions")
		case (p.End()-1)/mbrSize > math.MaxUint32:
			return errors.New("it ends behind 2 TiB, which needs a GPT")
		}
		return nil
	}
	switch units := utf16.Encode([]rune(p.Name)); {
	case p.Type.GUID == (GUID{}):
		return errors.New("it has no type")
	case len(units) > 36:
		return fmt.Errorf("label of %d characters, at most 36 are possible", len(units))
	case slices.Contains(units, 0):
		return errors.New("label with a zero byte")
	}
	if p.Bootable {
		p.Flags |= flagLegacyBoot
	}
	return nil
}

// identify derives the identifiers that are not given, and checks the others.
func (s *Spec) identify() error {
	h := sha256.New()
	fmt.Fprintf(h, "%v %d %x\n", s.Kind, s.SectorSize, s.Seed)
	for _, p := range s.Partitions {
		fmt.Fprintf(h, "%d %d %d %v %q %q %x %v\n", p.Number, p.Start, p.Size, p.Type, p.Name, p.UUID, p.Flags, p.Bootable)
	}
	sum := h.Sum(nil)
	if s.Kind == MBR {
		if s.ID == "" {
			s.ID = fmt.Sprintf("%08x", binary.LittleEndian.Uint32(sum))
		}
		_, err := s.signature()
		return err
	}
	if s.ID == "" {
		s.ID = derivedGUID(sum).String()
	}
	disk, err := ParseGUID(s.ID)
	if err != nil {
		return err
	}
	used := map[GUID]bool{}
	for i := range s.Partitions {
		p := &s.Partitions[i]
		if p.UUID == "" {
			sum := sha256.Sum256(fmt.Appendf(disk[:], "%x partition %d", sum, p.Number))
			p.UUID = derivedGUID(sum[:]).String()
		}
		g, err := ParseGUID(p.UUID)
		switch {
		case err != nil:
			return fmt.Errorf("partition %d: %w", p.Number, err)
		case g == (GUID{}) || used[g]:
			return fmt.Errorf("partition %d: GUID %v is that of another one, or zero", p.Number, g)
		}
		used[g] = true
	}
	return nil
}

// derivedGUID makes a GUID of a hash, with the version for what an application
// makes by itself (RFC 9562).
func derivedGUID(sum []byte) (g GUID) {
	copy(g[:], sum)
	g[6] = g[6]&0x0f | 0x80
	g[8] = g[8]&0x3f | 0x80
	return g
}

func (s *Spec) signature() (uint32, error) {
	n, err := strconv.ParseUint(strings.TrimPrefix(strings.ToLower(s.ID), "0x"), 16, 32)
	if err != nil {
		return 0, fmt.Errorf("the signature of a disk is up to 8 hexadecimal digits, not '%s'", s.ID)
	}
	return uint32(n), nil
}

func (s *Spec) writeGPT(dev blockdev.Device) error {
	ss := s.sectorSize()
	t := &gpt.Table{LogicalSectorSize: s.SectorSize, PhysicalSectorSize: s.SectorSize, GUID: s.ID}
	for i := range s.Partitions {
		p := &s.Partitions[i]
		t.Partitions = append(t.Partitions, &gpt.Partition{
			Index: p.Number, Start: uint64(p.Start / ss), End: uint64(p.End()/ss - 1), Type: gpt.Type(p.Type.String()),
			Name: p.Name, GUID: p.UUID, Attributes: p.Flags,
		})
	}
	if err := t.Write(newFile(dev), dev.Size()); err != nil {
		return err
	}
	protective := &mbr.Partition{
		Type: mbr.GPTProtective, Start: 1, Size: uint32(min(dev.Size()/ss-1, math.MaxUint32)),
		StartSector: 2, EndHead: 0xff, EndSector: 0xff, EndCylinder: 0xff,
	}
	return writeBootRecord(dev, protective)
}

func (s *Spec) writeMBR(dev blockdev.Device) error {
	signature, err := s.signature()
	if err != nil {
		return err
	}
	entries := []*mbr.Partition{{}, {}, {}, {}}
	for i := range s.Partitions {
		p := &s.Partitions[i]
		e := entries[p.Number-1]
		e.Bootable, e.Type = p.Bootable, mbr.Type(p.Type.Byte)
		e.Start, e.Size = uint32(p.Start/mbrSize), uint32(p.Size/mbrSize)
		e.StartHead, e.StartSector, e.StartCylinder = chs(p.Start / mbrSize)
		e.EndHead, e.EndSector, e.EndCylinder = chs(p.End()/mbrSize - 1)
	}
	b := binary.LittleEndian.AppendUint32(nil, signature)
	if _, err := dev.WriteAt(b, 440); err != nil {
		return err
	}
	return writeBootRecord(dev, entries...)
}

func writeBootRecord(dev blockdev.Device, entries ...*mbr.Partition) error {
	t := &mbr.Table{LogicalSectorSize: mbrSize, PhysicalSectorSize: mbrSize, Partitions: entries}
	if err := t.Write(newFile(dev), dev.Size()); err != nil {
		return err
	}
	return blockdev.Sync(dev)
}

// chs returns the address of a sector in the geometry that is assumed where
// there is none, of 255 heads and 63 sectors, or its last address.
func chs(lba int64) (head, sector, cylinder byte) {
	c := lba / (255 * 63)
	if c > 1023 {
		return 254, 0xff, 0xff
	}
	return byte(lba / 63 % 255), byte(lba%63+1) | byte(c>>8<<6), byte(c)
}

// file is a device as go-diskfs writes it.
type file struct {
	*io.SectionReader
	blockdev.Device
}

func newFile(dev blockdev.Device) *file {
	return &file{io.NewSectionReader(dev, 0, dev.Size()), dev}
}

func (f *file) ReadAt(p []byte, off int64) (int, error) { return f.Device.ReadAt(p, off) }
func (f *file) Size() int64                             { return f.Device.Size() }
func (f *file) Sync() error                             { return blockdev.Sync(f.Device) }
func (f *file) Close() error                            { return nil }
func (f *file) Stat() (fs.FileInfo, error)              { return nil, errors.ErrUnsupported }

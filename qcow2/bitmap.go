package qcow2

import (
	"encoding/binary"
	"fmt"
	"math"
)

const bitmapEntrySize = 24 // bytes of a directory entry before extra data and name

// BitmapFlags are the flags of a bitmap directory entry.
type BitmapFlags uint32

// Flags of a bitmap.
const (
	BitmapInUse               BitmapFlags = 1 << 0 // not saved: what it says is stale
	BitmapAuto                BitmapFlags = 1 << 1 // records writes
	BitmapExtraDataCompatible BitmapFlags = 1 << 2

	bitmapReservedFlags = ^(BitmapInUse | BitmapAuto) // QEMU knows no others
)

// Names returns the flags as qemu-img info names them.
func (f BitmapFlags) Names() []string {
	names := []string{}
	if f&BitmapInUse != 0 {
		names = append(names, "in-use")
	}
	if f&BitmapAuto != 0 {
		names = append(names, "auto")
	}
	return names
}

// Bits of a bitmap table entry.
const (
	bitmapTableOffsetMask   = 0x00fffffffffffe00
	bitmapTableReservedMask = 0xff000000000001fe
	bitmapTableAllOnes      = 1 << 0 // without an offset
)

// Bitmap is an entry of the bitmap directory.
type Bitmap struct {
	TableOffset     uint64      // 0: in bytes, cluster-aligned
	TableSize       uint32      // 8: entries
	Flags           BitmapFlags // 12
	Type            uint8       // 16: 1, dirty tracking
	GranularityBits uint8       // 17: log2 of the bytes of a bit, 9 to 31
	ExtraData       []byte
	Name            string
}

// Granularity returns the bytes that a bit stands for.
func (b *Bitmap) Granularity() uint64 { return 1 << b.GranularityBits }

// parseBitmap parses the directory entry at the start of p and returns its
// size with padding.
func parseBitmap(p []byte) (b Bitmap, n int, err error) {
	if len(p) < bitmapEntrySize {
		return b, 0, fmt.Errorf("entry of %d bytes, expected %d at least", len(p), bitmapEntrySize)
	}
	b = Bitmap{
		TableOffset:     binary.BigEndian.Uint64(p[0:]),
		TableSize:       binary.BigEndian.Uint32(p[8:]),
		Flags:           BitmapFlags(binary.BigEndian.Uint32(p[12:])),
		Type:            p[16],
		GranularityBits: p[17],
	}
	nameSize, extraSize := int64(binary.BigEndian.Uint16(p[18:])), int64(binary.BigEndian.Uint32(p[20:]))
	size := bitmapEntrySize + extraSize + nameSize
	padded := (size + 7) &^ 7
	if padded > int64(len(p)) {
		return b, 0, fmt.Errorf("entry of %d bytes, which the directory has not", padded)
	}
	if extraSize > 0 {
		b.ExtraData = append([]byte(nil), p[bitmapEntrySize:bitmapEntrySize+extraSize]...)
	}
	b.Name = string(p[bitmapEntrySize+extraSize : size])
	return b, int(padded), nil
}

// appendTo appends the entry with its padding.
func (b Bitmap) appendTo(p []byte) []byte {
	start := len(p)
	p = binary.BigEndian.AppendUint64(p, b.TableOffset)
	p = binary.BigEndian.AppendUint32(p, b.TableSize)
	p = binary.BigEndian.AppendUint32(p, uint32(b.Flags))
	p = append(p, b.Type, b.GranularityBits)
	p = binary.BigEndian.AppendUint16(p, uint16(len(b.Name)))
	p = binary.BigEndian.AppendUint32(p, uint32(len(b.ExtraData)))
	p = append(p, b.ExtraData...)
	p = append(p, b.Name...)
	return append(p, make([]byte, -(len(p)-start)&7)...)
}

// check checks an entry as QEMU does (block/qcow2-bitmap.c, check_dir_entry).
func (b *Bitmap) check(g *geometry, size int64) error {
	switch {
	case b.TableSize == 0 || b.TableSize > maxBitmapTableSize:
		return fmt.Errorf("bitmap_table_size %d, expected 1 to %d", b.TableSize, maxBitmapTableSize)
	case b.TableOffset == 0 || g.inCluster(b.TableOffset) != 0 || b.TableOffset > math.MaxInt64-maxBitmapTableSize*8:
		return fmt.Errorf("bitmap_table_offset %#x not aligned to %#x or out of range", b.TableOffset, g.clusterSize)
	case b.Flags&bitmapReservedFlags != 0:
		return fmt.Errorf("flags %#x with unknown bits", uint32(b.Flags))
	case b.Type != 1:
		return fmt.Errorf("type %d, expected 1", b.Type)
	case b.GranularityBits < minBitmapGranularity || b.GranularityBits > maxBitmapGranularity:
		return fmt.Errorf("granularity_bits %d, expected %d to %d", b.GranularityBits, minBitmapGranularity, maxBitmapGranularity)
	case len(b.Name) > maxBitmapNameSize:
		return fmt.Errorf("name_size %d, expected at most %d", len(b.Name), maxBitmapNameSize)
	case len(b.ExtraData) != 0:
		return fmt.Errorf("extra data of %d bytes, expected none", len(b.ExtraData))
	}
	bytes := int64(b.TableSize) << g.clusterBits // below 2^49
	// A bitmap in use may have been left behind by a resize.
	if bytes > maxBitmapSize || b.Flags&BitmapInUse == 0 && (size-1)>>b.GranularityBits >= bytes*8 {
		return fmt.Errorf("bitmap_table_size %d does not fit a disk of %d bytes or the limit of %d bytes", b.TableSize, size, maxBitmapSize)
	}
	return nil
}

// entrySize returns the bytes of the directory entry with its padding.
func (b *Bitmap) entrySize() int64 {
	return (bitmapEntrySize + int64(len(b.ExtraData)) + int64(len(b.Name)) + 7) &^ 7
}

// Bitmaps reads the bitmap directory. An image without bitmaps, or whose
// autoclear bit says that they are stale, has none. On an image that is being
// written, those that record writes are in use.
func (im *Image) Bitmaps() ([]Bitmap, error) {
	im.mu.RLock()
	defer im.mu.RUnlock()
	return im.parseBitmaps(&im.header, im.header.bitmapSize())
}

// readBitmaps is Bitmaps for a caller who will read and write the tables.
func (im *Image) readBitmaps() ([]Bitmap, error) {
	return im.bitmapsOf(&im.header, im.header.bitmapSize())
}

// bitmapsOf reads the directory that a header points at, for a disk of size
// bytes. The tables of all bitmaps fit into the file together, so that what a
// small file says about them takes no long time to write.
func (im *Image) bitmapsOf(h *Header, size int64) ([]Bitmap, error) {
	list, err := im.parseBitmaps(h, size)
	left := im.dev.Size()
	for i := range list {
		if left -= int64(list[i].TableSize) * 8; left < 0 {
			return nil, &FormatError{"bitmap " + list[i].Name, int64(list[i].TableOffset), "bitmap_table_size", "makes the tables of the bitmaps larger than the file", ErrCorrupt}
		}
	}
	return list, err
}

func (im *Image) parseBitmaps(h *Header, size int64) ([]Bitmap, error) {
	ext, ok := h.Bitmaps()
	if !ok {
		return nil, nil
	}
	off := int64(ext.DirectoryOffset)
	bad := func(at int, format string, args ...any) ([]Bitmap, error) {
		return nil, &FormatError{"bitmap directory", off + int64(at), "", fmt.Sprintf(format, args...), ErrCorrupt}
	}
	dir, err := readTable(im.dev, off, int64(ext.DirectorySize)) // at most maxBitmapDirectorySize
	if err != nil {
		return nil, fmt.Errorf("qcow2: bitmap directory at %#x: %w", off, err)
	}
	if uint64(len(dir)) != ext.DirectorySize || len(dir) == 0 {
		return bad(0, "%d of %d bytes are in the file", len(dir), ext.DirectorySize)
	}
	var list []Bitmap
	for at := 0; at < len(dir); {
		b, n, err := parseBitmap(dir[at:])
		if err == nil {
			err = b.check(&im.geo, size)
		}
		if err != nil {
			return bad(at, "bitmap %d %q: %v", len(list), b.Name, err)
		}
		if len(list) == int(ext.NbBitmaps) {
			return bad(at, "more than the %d bitmaps of the header extension", ext.NbBitmaps)
		}
		list = append(list, b)
		at += n
	}
	if len(list) != int(ext.NbBitmaps) {
		return bad(len(dir), "%d bitmaps, expected the %d of the header extension", len(list), ext.NbBitmaps)
	}
	return list, nil
}

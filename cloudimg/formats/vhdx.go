package formats

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"hash/crc32"
	"math/bits"
	"slices"
	"sort"

	"qimg/qcow2/blockdev"
)

// VHDX of Hyper-V: two headers, a log, a region table, which tells where the
// metadata and the block allocation table lie, and blocks of 1 to 256 MiB
// ([MS-VHDX]; block/vhdx.c of QEMU).
const (
	vhdxSignature       = "vhdxfile"
	vhdxHeaderSignature = "head"
	vhdxHeaderOff       = 64 << 10 // of the first header; the second one is as far behind it
	vhdxHeaderSize      = 4 << 10
	vhdxRegionSignature = "regi"
	vhdxRegionOff       = 192 << 10
	vhdxRegionSize      = 64 << 10
	vhdxMaxRegions      = 2047
	vhdxMetaSignature   = "metadata"
	vhdxMetaTableSize   = 64 << 10
	vhdxMaxMetaEntries  = 2047
	vhdxUnit            = 1 << 20 // all that the region table and the log name is aligned to it
	vhdxMaxBlock        = 256 << 20
	vhdxMaxDisk         = 64 << 40
	vhdxSectorSize      = 512 // the only one of a disk that is read, as in QEMU

	vhdxRegionRequired = 1 << 0
	vhdxMetaRequired   = 1 << 2
	vhdxLeaveAllocated = 1 << 0 // a fixed image
	vhdxHasParent      = 1 << 1

	vhdxStateMask      = 7
	vhdxOffsetMask     = ^uint64(vhdxUnit - 1)
	vhdxNotPresent     = 0
	vhdxUndefined      = 1
	vhdxZero           = 2
	vhdxUnmapped       = 3
	vhdxUnmappedOld    = 5 // version 0.95
	vhdxFullyPresent   = 6
	vhdxSectorsInChunk = 1 << 23
)

// GUIDs as they are stored.
const (
	vhdxGUIDBAT      = "\x66\x77\xc2\x2d\x23\xf6\x00\x42\x9d\x64\x11\x5e\x9b\xfd\x4a\x08"
	vhdxGUIDMetadata = "\x06\xa2\x7c\x8b\x90\x47\x9a\x4b\xb8\xfe\x57\x5f\x05\x0f\x88\x6e"

	vhdxGUIDFileParameters = "\x37\x67\xa1\xca\x36\xfa\x43\x4d\xb3\xb6\x33\xf0\xaa\x44\xe7\x6b"
	vhdxGUIDDiskSize       = "\x24\x42\xa5\x2f\x1b\xcd\x76\x48\xb2\x11\x5d\xbe\xd8\x3b\xf4\xb8"
	vhdxGUIDPage83         = "\xab\x12\xca\xbe\xe6\xb2\x23\x45\x93\xef\xc3\x09\xe0\x00\xc7\x46"
	vhdxGUIDLogicalSector  = "\x1d\xbf\x41\x81\x6f\xa9\x09\x47\xba\x47\xf2\x33\xa8\xfa\xab\x5f"
	vhdxGUIDPhysicalSector = "\xc7\x48\xa3\xcd\x5d\x44\x71\x44\x9c\xc9\xe9\x88\x52\x51\xc5\x56"
	vhdxGUIDParentLocator  = "\x2d\x5f\xd3\xa8\x0b\xb3\x4d\x45\xab\xf7\xd3\xd8\x48\x34\xab\x0c"
)

// region is a range of the file that no block lies in.
type region struct {
	off, n uint64
	what   string
}

func (r *region) overlaps(off, n uint64) bool { return r.n > 0 && off < r.off+r.n && r.off < off+n }

// vhdxFile is a VHDX file while it is opened.
type vhdxFile struct {
	file          blockdev.Reader
	regions       []region // header section, log, and those of the region table
	bat, metadata region
	fixed         bool
	blockSize     uint32
	diskSize      uint64
}

// openVHDX opens a VHDX image.
func openVHDX(file blockdev.Reader) (*Image, error) {
	where := at{VHDX, "file type identifier", 0}
	if file.Size() < int64(len(vhdxSignature)) {
		return nil, where.err(ErrFormat, "", "needs %d bytes, the file has %d", len(vhdxSignature), file.Size())
	}
	b, err := readStruct(file, 0, int64(len(vhdxSignature)), where)
	if err != nil {
		return nil, err
	}
	if string(b) != vhdxSignature {
		return nil, where.err(ErrFormat, "signature", "%q, expected %q", b, vhdxSignature)
	}
	v := &vhdxFile{file: file, regions: []region{{0, vhdxUnit, "header section"}}}
	for _, step := range []func() error{v.readHeaders, v.readRegions, v.readMetadata} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	disk, err := v.disk()
	if err != nil {
		return nil, err
	}
	return &Image{disk: disk, format: VHDX, blockSize: int64(v.blockSize)}, nil
}

// vhdxSumFits checks the CRC-32C of a structure, which is at 4 of it and counts as
// 0.
func vhdxSumFits(b []byte) bool {
	t := crc32.MakeTable(crc32.Castagnoli)
	sum := crc32.Update(0, t, b[:4])
	sum = crc32.Update(sum, t, make([]byte, 4))
	return crc32.Update(sum, t, b[8:]) == binary.LittleEndian.Uint32(b[4:])
}

// readHeaders finds the header that holds, the valid one with the higher sequence
// number, and refuses an image whose log is in use.
func (v *vhdxFile) readHeaders() error {
	le := binary.LittleEndian
	where := at{VHDX, "header", vhdxHeaderOff}
	var active []byte
	for i := range int64(2) {
		h, err := readStruct(v.file, uint64(vhdxHeaderOff*(i+1)), vhdxHeaderSize, where)
		if err != nil {
			return err
		}
		if !bytes.HasPrefix(h, []byte(vhdxHeaderSignature)) || !vhdxSumFits(h) || le.Uint16(h[66:]) != 1 {
			continue
		}
		switch {
		case active == nil, le.Uint64(h[8:]) > le.Uint64(active[8:]):
			active, where.off = h, vhdxHeaderOff*(i+1)
		case le.Uint64(h[8:]) == le.Uint64(active[8:]) && !bytes.Equal(h[:80], active[:80]):
			return where.corrupt("sequence_number", "%d of two headers that differ", le.Uint64(h[8:]))
		}
	}
	if active == nil {
		return where.corrupt("", "neither of the two has its signature, checksum and version 1")
	}
	logLength, logOffset := le.Uint32(active[68:]), le.Uint64(active[72:])
	switch {
	case le.Uint16(active[64:]) != 0:
		return where.unsupported("log_version", "%d, expected 0", le.Uint16(active[64:]))
	case logOffset%vhdxUnit != 0 || logOffset < vhdxUnit || logOffset > 1<<62:
		return where.corrupt("log_offset", "%#x, expected a multiple of 1 MiB", logOffset)
	case logLength%vhdxUnit != 0:
		return where.corrupt("log_length", "%#x, expected a multiple of 1 MiB", logLength)
	case logLength > 0 && !bytes.Equal(active[48:64], make([]byte, 16)):
		return where.err(ErrDirty, "log_guid", "is set, the log may hold changes that are not in the image: open it once with the program that wrote it, or run qemu-img check -r all")
	}
	return v.addRegion(region{logOffset, uint64(logLength), "log"}, where)
}

// addRegion keeps a range that may not overlap with others.
func (v *vhdxFile) addRegion(r region, where at) error {
	for i := range v.regions {
		if v.regions[i].overlaps(r.off, r.n) {
			return where.corrupt(r.what, "of %d bytes at %#x overlaps with the %s at %#x", r.n, r.off, v.regions[i].what, v.regions[i].off)
		}
	}
	v.regions = append(v.regions, r)
	return nil
}

// readRegions reads the region table.
func (v *vhdxFile) readRegions() error {
	le := binary.LittleEndian
	where := at{VHDX, "region table", vhdxRegionOff}
	b, err := readStruct(v.file, vhdxRegionOff, vhdxRegionSize, where)
	if err != nil {
		return err
	}
	count := le.Uint32(b[8:])
	switch {
	case !bytes.HasPrefix(b, []byte(vhdxRegionSignature)):
		return where.corrupt("signature", "%q, expected %q", b[:4], vhdxRegionSignature)
	case !vhdxSumFits(b):
		return where.corrupt("checksum", "does not fit")
	case count > vhdxMaxRegions:
		return where.corrupt("entry_count", "%d, expected at most %d", count, vhdxMaxRegions)
	}
	for i := range int(count) {
		e := b[16+32*i:][:32]
		r := region{off: le.Uint64(e[16:]), n: uint64(le.Uint32(e[24:])), what: "region"}
		if r.off > 1<<62 {
			return where.corrupt("file_offset", "%#x is not in the file", r.off)
		}
		known := map[string]*region{vhdxGUIDBAT: &v.bat, vhdxGUIDMetadata: &v.metadata}[string(e[:16])]
		switch {
		case known == nil && le.Uint32(e[28:])&vhdxRegionRequired != 0:
			return where.unsupported("guid", "%x of a region that is required", e[:16])
		case known == nil:
		case known.what != "":
			return where.corrupt("guid", "%x is there twice", e[:16])
		default:
			if r.what = "block allocation table"; known == &v.metadata {
				r.what = "metadata region"
			}
			*known = r
		}
		if err := v.addRegion(r, where); err != nil {
			return err
		}
	}
	if v.bat.what == "" || v.metadata.what == "" {
		return where.corrupt("", "does not name the block allocation table and the metadata region")
	}
	return nil
}

// readMetadata reads the items of the metadata region that an image needs.
func (v *vhdxFile) readMetadata() error {
	le := binary.LittleEndian
	where := at{VHDX, "metadata table", int64(v.metadata.off)}
	b, err := readStruct(v.file, v.metadata.off, vhdxMetaTableSize, where)
	if err != nil {
		return err
	}
	count := int(le.Uint16(b[10:]))
	switch {
	case !bytes.HasPrefix(b, []byte(vhdxMetaSignature)):
		return where.corrupt("signature", "%q, expected %q", b[:8], vhdxMetaSignature)
	case count > vhdxMaxMetaEntries:
		return where.corrupt("entry_count", "%d, expected at most %d", count, vhdxMaxMetaEntries)
	}
	type item struct {
		name  string
		size  int64
		value []byte
	}
	items := map[string]*item{
		vhdxGUIDFileParameters: {name: "file parameters", size: 8}, vhdxGUIDDiskSize: {name: "virtual disk size", size: 8},
		vhdxGUIDLogicalSector: {name: "logical sector size", size: 4}, vhdxGUIDPhysicalSector: {name: "physical sector size", size: 4},
		vhdxGUIDPage83: {name: "page 83 data", size: 16},
	}
	for i := range count {
		e := b[32+32*i:][:32]
		guid, off := string(e[:16]), le.Uint32(e[16:])
		it := items[guid]
		switch {
		case guid == vhdxGUIDParentLocator:
			return where.err(ErrReference, "parent locator", "a differencing image needs its parent, which is not opened")
		case it == nil && le.Uint32(e[24:])&vhdxMetaRequired != 0:
			return where.unsupported("item_id", "%x of an item that is required", e[:16])
		case it == nil:
			continue
		case it.value != nil:
			return where.corrupt(it.name, "is there twice")
		}
		if it.value, err = readStruct(v.file, v.metadata.off+uint64(off), it.size, at{VHDX, it.name, 0}); err != nil {
			return err
		}
	}
	for _, it := range items {
		if it.value == nil {
			return where.corrupt(it.name, "is missing")
		}
	}
	flags := le.Uint32(items[vhdxGUIDFileParameters].value[4:])
	v.blockSize = le.Uint32(items[vhdxGUIDFileParameters].value)
	v.diskSize = le.Uint64(items[vhdxGUIDDiskSize].value)
	v.fixed = flags&vhdxLeaveAllocated != 0
	where.structure = "metadata"
	switch logical := le.Uint32(items[vhdxGUIDLogicalSector].value); {
	case flags&vhdxHasParent != 0:
		return where.err(ErrReference, "has_parent", "is set: a differencing image needs its parent, which is not opened")
	case v.blockSize < vhdxUnit || v.blockSize > vhdxMaxBlock || v.blockSize&(v.blockSize-1) != 0:
		return where.corrupt("block_size", "%d, expected a power of two of 1 MiB to 256 MiB", v.blockSize)
	case logical != vhdxSectorSize:
		return where.unsupported("logical_sector_size", "%d, expected %d", logical, vhdxSectorSize)
	case v.diskSize > vhdxMaxDisk || v.diskSize%vhdxSectorSize != 0:
		return where.corrupt("virtual_disk_size", "%d, expected a multiple of %d up to 64 TiB", v.diskSize, vhdxSectorSize)
	}
	return nil
}

// disk returns the disk that the block allocation table describes. Behind the
// entries of each chunk it has one of a bitmap, which only differencing images use.
func (v *vhdxFile) disk() (blockdev.Reader, error) {
	where := at{VHDX, "block allocation table", int64(v.bat.off)}
	block := int64(v.blockSize)
	ratio := bits.TrailingZeros64(vhdxSectorsInChunk * vhdxSectorSize / uint64(block))
	blocks := (v.diskSize + uint64(block) - 1) / uint64(block)
	entries := blocks
	if blocks > 0 {
		entries += (blocks - 1) >> ratio
	}
	if entries*8 > v.bat.n {
		return nil, where.corrupt("length", "%d bytes, the disk has %d entries", v.bat.n, entries)
	}
	bat, err := newTable(v.file, v.bat.off, entries*8, where)
	if err != nil {
		return nil, err
	}
	regions := slices.SortedFunc(slices.Values(v.regions), func(a, b region) int { return cmp.Compare(a.off, b.off) })
	d := &mapped{format: VHDX, file: v.file, size: int64(v.diskSize), holes: v.fixed}
	d.find = func(off int64) (run, error) {
		index, in := off/block, off%block
		index += index >> ratio
		entry, err := bat.uint64(binary.LittleEndian, index*8)
		if err != nil {
			return run{}, err
		}
		r := run{n: block - in, kind: blockdev.Zero}
		switch state := entry & vhdxStateMask; state {
		case vhdxNotPresent, vhdxUndefined, vhdxZero, vhdxUnmapped, vhdxUnmappedOld:
			return r, nil
		case vhdxFullyPresent:
			host := entry & vhdxOffsetMask
			where := at{VHDX, "block allocation table", int64(v.bat.off) + index*8}
			if host > 1<<62 {
				return r, where.corrupt("entry", "%#x is not in the file", entry)
			}
			// The first region that ends behind the beginning of the block.
			i := sort.Search(len(regions), func(i int) bool { return regions[i].off+regions[i].n > host })
			if i < len(regions) && regions[i].overlaps(host, uint64(block)) {
				return r, where.corrupt("entry", "%#x: the block overlaps with the %s at %#x", entry, regions[i].what, regions[i].off)
			}
			r.kind, r.host = blockdev.Data, int64(host)+in
			return r, nil
		default:
			return r, at{VHDX, "block allocation table", int64(v.bat.off) + index*8}.corrupt("entry", "state %d of a block, expected one of an image without a parent", state)
		}
	}
	return d, nil
}

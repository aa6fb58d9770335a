package formats

import (
	"bytes"
	"encoding/binary"
	"strconv"
	"strings"

	"qimg/qcow2/blockdev"
)

// VMDK of VMware, in the form of one file with an embedded descriptor: a grain
// directory of grain tables of grains (block/vmdk.c of QEMU). Offsets are in
// sectors.
const (
	sector             = 512
	vmdkMagic          = "KDMV"
	vmdkCOWDMagic      = "COWD"
	vmdkHeaderSize     = 79
	vmdkDescriptorOff  = 512
	vmdkDescriptorSize = 20 * sector
	vmdkMaxDescriptor  = 1 << 20
	vmdkFlagZeroGrain  = 1 << 2
	vmdkFlagMarkers    = 1 << 17
	vmdkGDAtEnd        = 1<<64 - 1
	vmdkDeflate        = 1
	vmdkGTEZeroed      = 1
	vmdkMarkerFooter   = 3
	vmdkNoParent       = 1<<32 - 1
	// Bounds of QEMU.
	vmdkMaxGrain = 1 << 21 // sectors
	vmdkMaxGTEs  = 512
	vmdkMaxGD    = 32 << 20 // entries
	// The largest compressed grain that is read, in sectors: 1 MiB. All programs
	// write 128.
	vmdkMaxDeflated = 2048
)

// VMDKInfo is what a VMDK image says of itself.
type VMDKInfo struct {
	// CID changes when the content does.
	CID, ParentCID uint32
	CreateType     string // monolithicSparse or streamOptimized
	Compressed     bool   // the grains are
}

// VMDK returns what a VMDK image says of itself; ok is false for other formats.
func (im *Image) VMDK() (info VMDKInfo, ok bool) {
	if im.vmdk == nil {
		return VMDKInfo{}, false
	}
	return *im.vmdk, true
}

// vmdkHeader is a sparse extent header, and the footer that takes its place.
type vmdkHeader struct {
	version     uint32 // 4
	flags       uint32 // 8
	capacity    uint64 // 12, sectors
	grainSize   uint64 // 20, sectors
	descOffset  uint64 // 28
	descSize    uint64 // 36
	numGTEs     uint32 // 44, entries of a grain table
	rgdOffset   uint64 // 48
	gdOffset    uint64 // 56
	overHead    uint64 // 64, sectors before the first grain
	compression uint16 // 77
}

func parseVMDKHeader(b []byte) vmdkHeader {
	le := binary.LittleEndian
	return vmdkHeader{
		le.Uint32(b[4:]), le.Uint32(b[8:]), le.Uint64(b[12:]), le.Uint64(b[20:]), le.Uint64(b[28:]), le.Uint64(b[36:]),
		le.Uint32(b[44:]), le.Uint64(b[48:]), le.Uint64(b[56:]), le.Uint64(b[64:]), le.Uint16(b[77:]),
	}
}

// openVMDK opens a VMDK image.
func openVMDK(file blockdev.Reader) (*Image, error) {
	where := at{VMDK, "header", 0}
	start := make([]byte, min(vmdkHeaderSize, file.Size()))
	if n, err := file.ReadAt(start, 0); n < len(start) {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(start, []byte(vmdkCOWDMagic)):
		return nil, where.err(ErrReference, "", "belongs to a vmfsSparse image, whose descriptor is another file")
	case !bytes.HasPrefix(start, []byte(vmdkMagic)):
		return nil, openVMDKDescriptor(file)
	case len(start) < vmdkHeaderSize:
		return nil, where.corrupt("", "has %d bytes, the file ends at %#x", vmdkHeaderSize, file.Size())
	}
	h := parseVMDKHeader(start)
	if h.capacity == 0 && h.descOffset != 0 {
		return nil, where.err(ErrReference, "capacity", "is 0: the data lies in other files, which are not opened")
	}
	if h.gdOffset == vmdkGDAtEnd {
		var err error
		if h, where.off, err = readVMDKFooter(file); err != nil {
			return nil, err
		}
		where.structure = "footer"
	}
	if err := h.check(file, where); err != nil {
		return nil, err
	}
	info, err := readVMDKInfo(file)
	if err != nil {
		return nil, err
	}
	info.Compressed = h.compression == vmdkDeflate
	info.CreateType = "monolithicSparse"
	if info.Compressed {
		info.CreateType = "streamOptimized"
	}
	disk, err := newVMDKDisk(file, &h)
	if err != nil {
		return nil, err
	}
	return &Image{disk: disk, format: VMDK, blockSize: int64(h.grainSize) * sector, vmdk: &info}, nil
}

// openVMDKDescriptor tells why a file without a header is no image that can be
// read: a descriptor names the files that its data lies in.
func openVMDKDescriptor(file blockdev.Reader) error {
	where := at{VMDK, "descriptor", 0}
	b := make([]byte, min(vmdkMaxDescriptor, file.Size()))
	if n, err := file.ReadAt(b, 0); n < len(b) {
		return err
	}
	kind, ok := vmdkValue(b, "createType")
	if !ok {
		return where.err(ErrFormat, "", "there is none, and no header")
	}
	return where.err(ErrReference, "createType", "%q: its data lies in other files, which are not opened", kind)
}

// readVMDKFooter reads the footer, which lies before the last sector.
func readVMDKFooter(file blockdev.Reader) (vmdkHeader, int64, error) {
	off := (file.Size()+sector-1)&^(sector-1) - 3*sector
	where := at{VMDK, "footer", max(off+sector, 0)}
	if off < sector {
		return vmdkHeader{}, 0, where.corrupt("", "is not in a file of %d bytes", file.Size())
	}
	b := make([]byte, 3*sector)
	n := int(min(3*sector, file.Size()-off))
	if m, err := file.ReadAt(b[:n], off); m < n {
		return vmdkHeader{}, 0, err
	}
	le := binary.LittleEndian
	marker, footer, end := b[:sector], b[sector:2*sector], b[2*sector:]
	switch {
	case le.Uint32(marker[8:]) != 0 || le.Uint32(marker[12:]) != vmdkMarkerFooter:
		return vmdkHeader{}, 0, where.corrupt("", "has no marker before it: the end of the file is missing, or is followed by something")
	case !bytes.HasPrefix(footer, []byte(vmdkMagic)):
		return vmdkHeader{}, 0, where.corrupt("magicNumber", "%q, expected %q", footer[:4], vmdkMagic)
	case !bytes.Equal(end[:16], make([]byte, 16)):
		return vmdkHeader{}, 0, where.corrupt("", "is not followed by the marker of the end")
	}
	return parseVMDKHeader(footer), where.off, nil
}

func (h *vmdkHeader) check(file blockdev.Reader, where at) error {
	sectors := uint64(file.Size()+sector-1) / sector
	switch {
	case h.version > 3:
		return where.unsupported("version", "%d, expected at most 3", h.version)
	case h.compression > vmdkDeflate:
		return where.unsupported("compressAlgorithm", "%d, expected 0 (none) or 1 (deflate)", h.compression)
	case h.numGTEs == 0 || h.numGTEs > vmdkMaxGTEs:
		return where.corrupt("numGTEsPerGT", "%d, expected 1 to %d", h.numGTEs, vmdkMaxGTEs)
	case h.grainSize == 0 || h.grainSize > vmdkMaxGrain:
		return where.corrupt("grainSize", "%d sectors, expected 1 to %d", h.grainSize, vmdkMaxGrain)
	case h.compression == vmdkDeflate && h.grainSize > vmdkMaxDeflated:
		return where.unsupported("grainSize", "%d sectors, compressed grains are read up to %d", h.grainSize, vmdkMaxDeflated)
	case h.capacity > vmdkMaxGD*uint64(h.numGTEs)*h.grainSize || h.capacity > (1<<63-1)/sector:
		return where.corrupt("capacity", "%d sectors need more than %d grain tables", h.capacity, vmdkMaxGD)
	case h.overHead > sectors:
		return where.corrupt("overHead", "%d sectors, the file has %d", h.overHead, sectors)
	case h.gdOffset > 1<<54:
		return where.corrupt("gdOffset", "%#x is not in the file", h.gdOffset)
	}
	return nil
}

// readVMDKInfo reads the descriptor in the file. One that names a parent is an
// error.
func readVMDKInfo(file blockdev.Reader) (VMDKInfo, error) {
	where := at{VMDK, "descriptor", vmdkDescriptorOff}
	info := VMDKInfo{ParentCID: vmdkNoParent}
	b := make([]byte, max(0, min(vmdkDescriptorSize, file.Size()-vmdkDescriptorOff)))
	if n, err := file.ReadAt(b, vmdkDescriptorOff); n < len(b) {
		return info, err
	}
	for key, cid := range map[string]*uint32{"CID": &info.CID, "parentCID": &info.ParentCID} {
		s, ok := vmdkValue(b, key)
		n, err := strconv.ParseUint(s, 16, 32)
		if !ok || err != nil {
			return info, where.corrupt(key, "%q, expected a number in base 16", s)
		}
		*cid = uint32(n)
	}
	if name, ok := vmdkValue(b, "parentFileNameHint"); ok && name != "" || info.ParentCID != vmdkNoParent {
		return info, where.err(ErrReference, "parentCID", "%x: the image needs its parent %q, which is not opened", info.ParentCID, name)
	}
	return info, nil
}

// vmdkValue finds a value in the text of a descriptor: key=value or key="value".
func vmdkValue(text []byte, key string) (string, bool) {
	if i := bytes.IndexByte(text, 0); i >= 0 {
		text = text[:i]
	}
	for line := range bytes.Lines(text) {
		k, v, ok := strings.Cut(string(line), "=")
		if ok && strings.TrimSpace(k) == key {
			return strings.Trim(strings.TrimSpace(v), `"`), true
		}
	}
	return "", false
}

// vmdkDisk is the disk of a VMDK image.
type vmdkDisk struct {
	mapped
	grain     int64 // bytes
	gtes      int64 // grains of a grain table
	zeroGrain bool
	gd, gts   *table
	inflater  *inflater
}

func newVMDKDisk(file blockdev.Reader, h *vmdkHeader) (blockdev.Reader, error) {
	d := &vmdkDisk{grain: int64(h.grainSize) * sector, gtes: int64(h.numGTEs), zeroGrain: h.flags&vmdkFlagZeroGrain != 0}
	d.mapped = mapped{format: VMDK, file: file, size: int64(h.capacity) * sector, find: d.findGrain}
	perTable := uint64(h.numGTEs) * h.grainSize
	tables := (h.capacity + perTable - 1) / perTable
	var err error
	if d.gd, err = newTable(file, h.gdOffset*sector, tables*4, at{VMDK, "grain directory", 0}); err != nil {
		return nil, err
	}
	// Grain tables lie anywhere in the file: they are read as parts of it.
	if d.gts, err = newTable(file, 0, uint64(file.Size()), at{VMDK, "grain tables", 0}); err != nil {
		return nil, err
	}
	if h.compression == vmdkDeflate {
		d.inflater = &inflater{file: file, grain: d.grain, markers: h.flags&vmdkFlagMarkers != 0}
		d.mapped.inflate = d.inflater.read
	}
	return d, nil
}

// findGrain looks up the grain at off.
func (d *vmdkDisk) findGrain(off int64) (run, error) {
	le := binary.LittleEndian
	index := off / d.grain
	in := off % d.grain
	gt, err := d.gd.uint32(le, index/d.gtes*4)
	if err != nil {
		return run{}, err
	}
	if gt == 0 { // no grain of this table is there
		return run{n: (d.gtes-index%d.gtes)*d.grain - in, kind: blockdev.Unallocated}, nil
	}
	r := run{n: d.grain - in}
	gte, err := d.gts.uint32(le, int64(gt)*sector+index%d.gtes*4)
	switch {
	case err != nil:
		return run{}, err
	case gte == 0:
		r.kind = blockdev.Unallocated
	case gte == vmdkGTEZeroed && d.zeroGrain:
		r.kind = blockdev.Zero
	case d.inflater != nil:
		r.kind, r.host = blockdev.Compressed, int64(gte)*sector
	default:
		r.kind, r.host = blockdev.Data, int64(gte)*sector+in
	}
	return r, nil
}

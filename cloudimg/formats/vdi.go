package formats

import (
	"bytes"
	"encoding/binary"

	"qimg/qcow2/blockdev"
)

// VDI of VirtualBox: a header, a block map of 32 bits an entry, and blocks of
// 1 MiB (block/vdi.c of QEMU).
const (
	vdiHeaderSize  = 512
	vdiSignature   = 0xbeda107f
	vdiVersion     = 1<<16 | 1
	vdiBlockSize   = 1 << 20
	vdiDynamic     = 1
	vdiStatic      = 2
	vdiDiscarded   = 0xfffffffe // and 0xffffffff: a block that was never there
	vdiMaxBlocks   = (1<<31 - 512) / 4
	vdiMaxDiskSize = vdiMaxBlocks * vdiBlockSize
)

// openVDI opens a VDI image.
func openVDI(file blockdev.Reader) (*Image, error) {
	where := at{VDI, "header", 0}
	if file.Size() < vdiHeaderSize {
		return nil, where.err(ErrFormat, "", "needs %d bytes, the file has %d", vdiHeaderSize, file.Size())
	}
	h, err := readStruct(file, 0, vdiHeaderSize, where)
	if err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	if v := le.Uint32(h[0x40:]); v != vdiSignature {
		return nil, where.err(ErrFormat, "signature", "%#08x, expected %#x", v, uint32(vdiSignature))
	}
	var (
		version    = le.Uint32(h[0x44:])
		imageType  = le.Uint32(h[0x4c:])
		offsetBmap = le.Uint32(h[0x154:])
		offsetData = le.Uint32(h[0x158:])
		sectorSize = le.Uint32(h[0x168:])
		diskSize   = le.Uint64(h[0x170:])
		blockSize  = le.Uint32(h[0x178:])
		blockExtra = le.Uint32(h[0x17c:])
		blocks     = le.Uint32(h[0x180:])
		noUUID     = make([]byte, 16)
	)
	switch {
	case version != vdiVersion:
		return nil, where.unsupported("version", "%d.%d, expected 1.1", version>>16, version&0xffff)
	case !bytes.Equal(h[0x1a8:0x1b8], noUUID), !bytes.Equal(h[0x1b8:0x1c8], noUUID):
		return nil, where.err(ErrReference, "", "names a parent: a differencing image is not read")
	case imageType != vdiDynamic && imageType != vdiStatic:
		return nil, where.unsupported("image_type", "%d, expected 1 (dynamic) or 2 (static)", imageType)
	case offsetBmap%512 != 0:
		return nil, where.unsupported("offset_bmap", "%#x is no multiple of 512", offsetBmap)
	case offsetData%512 != 0:
		return nil, where.unsupported("offset_data", "%#x is no multiple of 512", offsetData)
	case sectorSize != 512:
		return nil, where.unsupported("sector_size", "%d, expected 512", sectorSize)
	case blockSize != vdiBlockSize:
		return nil, where.unsupported("block_size", "%d, expected %d", blockSize, vdiBlockSize)
	case blockExtra != 0:
		return nil, where.unsupported("block_extra", "%d, expected 0", blockExtra)
	case blocks > vdiMaxBlocks:
		return nil, where.corrupt("blocks_in_image", "%d, expected at most %d", blocks, vdiMaxBlocks)
	case diskSize > vdiMaxDiskSize, diskSize > uint64(blocks)*vdiBlockSize:
		return nil, where.corrupt("disk_size", "%d, the block map has %d blocks of %d bytes", diskSize, blocks, vdiBlockSize)
	}
	bmap, err := newTable(file, uint64(offsetBmap), uint64(blocks)*4, at{VDI, "block map", 0})
	if err != nil {
		return nil, err
	}
	d := &mapped{format: VDI, file: file, holes: imageType == vdiStatic}
	d.size = int64(diskSize+511) &^ 511 // VBoxManage makes odd sizes; QEMU rounds them up
	d.find = func(off int64) (run, error) {
		entry, err := bmap.uint32(le, off/vdiBlockSize*4)
		in := off % vdiBlockSize
		r := run{n: vdiBlockSize - in, kind: blockdev.Zero}
		if entry < vdiDiscarded {
			r.kind, r.host = blockdev.Data, int64(offsetData)+int64(entry)*vdiBlockSize+in
		}
		return r, err
	}
	return &Image{disk: d, format: VDI, blockSize: vdiBlockSize}, nil
}

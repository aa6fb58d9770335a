package formats

import (
	"bytes"
	"encoding/binary"

	"qimg/qcow2/blockdev"
)

// VHD of Virtual PC, "vpc" in QEMU: a footer of one sector at the end, which a
// dynamic image has at the beginning, too, and there a header, a block allocation
// table of 32 bits an entry, in sectors, and blocks behind their bitmaps
// (block/vpc.c of QEMU). All is big-endian.
const (
	vpcFooterSize = 512
	vpcHeaderSize = 1024
	vpcCookie     = "conectix"
	vpcHeadCookie = "cxsparse"
	vpcFixed      = 2
	vpcDynamic    = 3
	vpcDiffering  = 4
	vpcUnused     = 1<<32 - 1 // an entry of the table without a block
	// Bounds of QEMU.
	vpcMaxSectors  = 0xff000000 // 2040 GiB
	vpcMaxGeometry = 65535 * 16 * 255
	vpcMaxEntries  = (1<<31 - 1) / 4
)

// openVPC opens a VHD image.
func openVPC(file blockdev.Reader) (*Image, error) {
	where := at{VPC, "footer", 0}
	size := file.Size()
	if size < vpcFooterSize {
		return nil, where.err(ErrFormat, "", "needs %d bytes, the file has %d", vpcFooterSize, size)
	}
	footer, err := readStruct(file, 0, vpcFooterSize, where)
	if err != nil {
		return nil, err
	}
	fixed := !bytes.HasPrefix(footer, []byte(vpcCookie))
	if fixed {
		where.off = size - vpcFooterSize
		if footer, err = readStruct(file, uint64(where.off), vpcFooterSize, where); err != nil {
			return nil, err
		}
		if !bytes.HasPrefix(footer, []byte(vpcCookie)) {
			return nil, where.err(ErrFormat, "cookie", "%q, expected %q", footer[:8], vpcCookie)
		}
	}
	be := binary.BigEndian
	if sum, want := vpcChecksum(footer, 64), be.Uint32(footer[64:]); sum != want {
		return nil, where.corrupt("checksum", "%#08x, the sum is %#08x", want, sum)
	}
	switch kind := be.Uint32(footer[60:]); {
	case kind == vpcDiffering:
		return nil, where.err(ErrReference, "disk_type", "%d: a differencing image needs its parent, which is not opened", kind)
	case fixed && kind != vpcFixed:
		return nil, where.corrupt("disk_type", "%d, expected %d (fixed): the beginning of the file is missing", kind, vpcFixed)
	case !fixed && kind != vpcDynamic:
		return nil, where.corrupt("disk_type", "%d, expected %d (dynamic)", kind, vpcDynamic)
	}
	sectors := vpcSectors(footer)
	if sectors > vpcMaxSectors {
		return nil, where.corrupt("current_size", "%d sectors, expected at most %d", sectors, uint32(vpcMaxSectors))
	}
	d := &mapped{format: VPC, file: file, size: int64(sectors) * sector}
	if fixed {
		if data := size - vpcFooterSize; d.size > data {
			return nil, where.corrupt("current_size", "the disk has %d bytes, the file %d before the footer", d.size, data)
		}
		d.holes = true
		d.find = func(off int64) (run, error) { return run{d.size - off, blockdev.Data, off}, nil }
		return &Image{disk: d, format: VPC}, nil
	}
	return openDynamicVPC(d, be.Uint64(footer[16:]))
}

// vpcSectors returns the size of the disk. Virtual PC and old versions of QEMU go
// by the geometry, other programs by the size, and all do so where the geometry is
// the largest that there is.
func vpcSectors(footer []byte) uint64 {
	be := binary.BigEndian
	geometry := uint64(be.Uint16(footer[56:])) * uint64(footer[58]) * uint64(footer[59])
	app := string(footer[28:32])
	bySize := app == "win " || app == "qem2" || app == "d2v " || app == "CTXS" || app == "tap\x00"
	if bySize || geometry == vpcMaxGeometry {
		return be.Uint64(footer[48:]) / sector
	}
	return geometry
}

// vpcChecksum returns the complement of the sum of all bytes but those of the sum
// itself, at off.
func vpcChecksum(b []byte, off int) uint32 {
	sum := uint32(0)
	for i, c := range b {
		if i < off || i >= off+4 {
			sum += uint32(c)
		}
	}
	return ^sum
}

// openDynamicVPC completes d by the header at off.
func openDynamicVPC(d *mapped, off uint64) (*Image, error) {
	where := at{VPC, "dynamic disk header", 0}
	h, err := readStruct(d.file, off, vpcHeaderSize, where)
	if err != nil {
		return nil, err
	}
	where.off = int64(off)
	be := binary.BigEndian
	var (
		tableOffset = be.Uint64(h[16:])
		entries     = be.Uint32(h[28:])
		blockSize   = be.Uint32(h[32:])
	)
	switch {
	case !bytes.HasPrefix(h, []byte(vpcHeadCookie)):
		return nil, where.corrupt("cookie", "%q, expected %q", h[:8], vpcHeadCookie)
	case vpcChecksum(h, 36) != be.Uint32(h[36:]):
		return nil, where.corrupt("checksum", "%#08x, the sum is %#08x", be.Uint32(h[36:]), vpcChecksum(h, 36))
	case blockSize < sector || blockSize&(blockSize-1) != 0:
		return nil, where.corrupt("block_size", "%d, expected a power of two of at least %d", blockSize, sector)
	case entries > vpcMaxEntries:
		return nil, where.corrupt("max_table_entries", "%d, expected at most %d", entries, vpcMaxEntries)
	case uint64(entries)*uint64(blockSize) < uint64(d.size):
		return nil, where.corrupt("max_table_entries", "%d blocks of %d bytes, the disk has %d bytes", entries, blockSize, d.size)
	}
	bat, err := newTable(d.file, tableOffset, uint64(entries)*4, at{VPC, "block allocation table", 0})
	if err != nil {
		return nil, err
	}
	block := int64(blockSize)
	bitmap := (block/(8*sector) + sector - 1) &^ (sector - 1)
	d.find = func(off int64) (run, error) {
		entry, err := bat.uint32(be, off/block*4)
		in := off % block
		r := run{n: block - in, kind: blockdev.Zero}
		if entry != vpcUnused {
			// As in QEMU the bitmap does not matter: what is not in use is zero.
			r.kind, r.host = blockdev.Data, int64(entry)*sector+bitmap+in
		}
		return r, err
	}
	return &Image{disk: d, format: VPC, blockSize: block}, nil
}

package formats_test

import (
	"bytes"
	"compress/zlib"
	"encoding/binary"

	"qimg/cloudimg/formats"
)

// The images here are as small as they can be, with one block of data: they are
// changed by the tests of damaged images. TestTiny has QEMU read them.

// tinyData is what the block of data begins with.
const tinyData = "data of a tiny image"

// put puts little-endian or big-endian numbers into b.
func put(order binary.ByteOrder, b []byte, at int, values ...any) {
	for _, v := range values {
		switch v := v.(type) {
		case uint16:
			order.PutUint16(b[at:], v)
			at += 2
		case uint32:
			order.PutUint32(b[at:], v)
			at += 4
		case uint64:
			order.PutUint64(b[at:], v)
			at += 8
		case string:
			at += copy(b[at:], v)
		}
	}
}

// tinyVMDK is a disk of 4 grains of 8 sectors, in 2 grain tables of 2 grains; the
// third is there, the fourth is one of zeroes.
func tinyVMDK(compressed bool) []byte {
	b := make([]byte, 16*512)
	le := binary.LittleEndian
	flags, algorithm, kind := uint32(1|1<<2), uint16(0), "monolithicSparse"
	gd := uint64(3)
	if compressed {
		flags, algorithm, kind, gd = 1<<16|1<<17|1<<2|1, 1, "streamOptimized", 1<<64-1
	}
	header := func(at int, gd uint64) {
		put(le, b, at, "KDMV", uint32(1), flags, uint64(32), uint64(8), uint64(1), uint64(1), uint32(2), uint64(0), gd, uint64(6))
		put(le, b, at+77, algorithm)
	}
	header(0, gd)
	copy(b[512:], "# Disk DescriptorFile\nversion=1\nCID=1234abcd\nparentCID=ffffffff\ncreateType=\""+kind+"\"\nRW 32 SPARSE \"tiny\"\n")
	put(le, b, 3*512, uint32(0), uint32(5)) // the grain directory
	put(le, b, 5*512, uint32(6), uint32(1)) // the second grain table
	grain := make([]byte, 4096)
	copy(grain, tinyData)
	if !compressed {
		copy(b[6*512:], grain)
		return b[:14*512]
	}
	var z bytes.Buffer
	w := zlib.NewWriter(&z)
	w.Write(grain)
	w.Close()
	put(le, b, 6*512, uint64(16), uint32(z.Len()), z.String())
	put(le, b, 7*512, uint64(1), uint32(0), uint32(3)) // the marker of the footer
	header(8*512, 3)
	return b[:10*512]
}

// tinyVDI is a disk of nearly 3 MiB, of which the second MiB is there.
func tinyVDI() []byte {
	b := make([]byte, 1024+1<<20)
	le := binary.LittleEndian
	copy(b, "<<< a disk image >>>\n")
	put(le, b, 0x40, uint32(0xbeda107f), uint32(0x10001), uint32(0x180), uint32(1))
	put(le, b, 0x154, uint32(512), uint32(1024))
	put(le, b, 0x168, uint32(512), uint32(0), uint64(3<<20-100), uint32(1<<20), uint32(0), uint32(3), uint32(1))
	put(le, b, 512, ^uint32(0), uint32(0), ^uint32(1))
	copy(b[1024:], tinyData)
	return b
}

// tinyVPC is a disk of 4 blocks of 4 KiB, of which the third is there.
func tinyVPC(fixed bool) []byte {
	be := binary.BigEndian
	footer := make([]byte, 512)
	kind, next := uint32(3), uint64(512)
	if fixed {
		kind, next = 2, ^uint64(0)
	}
	put(be, footer, 0, "conectix", uint32(2), uint32(0x10000), next, uint32(0), "win ", uint32(0x10000), "Wi2k", uint64(16<<10), uint64(16<<10))
	put(be, footer, 60, kind)
	var b []byte
	if fixed {
		b = make([]byte, 16<<10)
		copy(b[8<<10:], tinyData)
	} else {
		b = make([]byte, 2048+512+4096)
		copy(b, footer)
		put(be, b, 512, "cxsparse", ^uint64(0), uint64(1536), uint32(0x10000), uint32(4), uint32(4096))
		put(be, b, 1536, ^uint32(0), ^uint32(0), uint32(4), ^uint32(0))
		b[2048] = 0xff
		copy(b[2048+512:], tinyData)
	}
	b = append(b, footer...)
	fix(b, formats.VPC)
	if fixed { // what fix takes for headers is data
		clear(b[:2048])
	}
	return b
}

// tinyVHDX is a disk of 3 MiB in blocks of 1 MiB, of which the second is there.
func tinyVHDX() []byte {
	b := make([]byte, 5<<20)
	le := binary.LittleEndian
	copy(b, "vhdxfile")
	for i := range 2 {
		at := 64 << 10 * (i + 1)
		put(le, b, at, "head", uint32(0), uint64(i))
		put(le, b, at+64, uint16(0), uint16(1), uint32(1<<20), uint64(1<<20))
	}
	region := 192 << 10
	put(le, b, region, "regi", uint32(0), uint32(2))
	put(le, b, region+16, "\x66\x77\xc2\x2d\x23\xf6\x00\x42\x9d\x64\x11\x5e\x9b\xfd\x4a\x08", uint64(3<<20), uint32(1<<20), uint32(1))
	put(le, b, region+48, "\x06\xa2\x7c\x8b\x90\x47\x9a\x4b\xb8\xfe\x57\x5f\x05\x0f\x88\x6e", uint64(2<<20), uint32(1<<20), uint32(1))
	meta := 2 << 20
	put(le, b, meta, "metadata", uint16(0), uint16(5))
	for i, item := range []string{
		"\x37\x67\xa1\xca\x36\xfa\x43\x4d\xb3\xb6\x33\xf0\xaa\x44\xe7\x6b", "\x24\x42\xa5\x2f\x1b\xcd\x76\x48\xb2\x11\x5d\xbe\xd8\x3b\xf4\xb8",
		"\x1d\xbf\x41\x81\x6f\xa9\x09\x47\xba\x47\xf2\x33\xa8\xfa\xab\x5f", "\xc7\x48\xa3\xcd\x5d\x44\x71\x44\x9c\xc9\xe9\x88\x52\x51\xc5\x56",
		"\xab\x12\xca\xbe\xe6\xb2\x23\x45\x93\xef\xc3\x09\xe0\x00\xc7\x46",
	} {
		size := []uint32{8, 8, 4, 4, 16}[i]
		put(le, b, meta+32+32*i, item, uint32(64<<10+16*i), size, uint32(4))
	}
	put(le, b, meta+64<<10, uint32(1<<20), uint32(0))
	put(le, b, meta+64<<10+16, uint64(3<<20))
	put(le, b, meta+64<<10+32, uint32(512))
	put(le, b, meta+64<<10+48, uint32(4096))
	put(le, b, 3<<20, uint64(0), uint64(4<<20|6), uint64(2))
	copy(b[4<<20:], tinyData)
	fix(b, formats.VHDX)
	return b
}

package fat

import (
	"encoding/binary"
	"fmt"
)

const (
	backupBoot = 6 // sector of the copy, of FAT32
	mediaFixed = 0xf8
)

// bootArea returns the reserved sectors.
func (v *Volume) bootArea() []byte {
	g := v.geo
	le := binary.LittleEndian
	area := make([]byte, g.reserved*sectorSize)
	b := area[:sectorSize]
	copy(b[3:], "MSDOS5.0") // what all programs accept
	le.PutUint16(b[11:], sectorSize)
	b[13] = byte(g.perCluster)
	le.PutUint16(b[14:], uint16(g.reserved))
	b[16] = 2 // FATs
	le.PutUint16(b[17:], uint16(g.rootSectors*sectorSize/32))
	b[21] = mediaFixed
	le.PutUint16(b[24:], 63) // sectors of a track
	le.PutUint16(b[26:], 255)
	le.PutUint32(b[28:], v.hidden)
	if g.bits != 32 && g.sectors <= 0xffff {
		le.PutUint16(b[19:], uint16(g.sectors))
	} else {
		le.PutUint32(b[32:], uint32(g.sectors))
	}
	ext := b[36:]
	if g.bits == 32 {
		le.PutUint32(b[36:], uint32(g.fatSectors))
		le.PutUint32(b[44:], 2) // the root directory
		le.PutUint16(b[48:], 1) // FSInfo
		le.PutUint16(b[50:], backupBoot)
		ext = b[64:]
	} else {
		le.PutUint16(b[22:], uint16(g.fatSectors))
	}
	ext[0] = 0x80 // drive
	ext[2] = 0x29 // what follows is there
	le.PutUint32(ext[3:], v.serial)
	copy(ext[7:18], "NO NAME    ")
	if v.hasLabel() {
		copy(ext[7:18], v.label[:])
	}
	copy(ext[18:26], fmt.Sprintf("FAT%d   ", g.bits))
	// A jump over it, and a program that waits for a key and asks the firmware
	// to go on: xor ax, ax; int 16h; int 19h.
	code := 62
	if g.bits == 32 {
		code = 90
	}
	b[0], b[1], b[2] = 0xeb, byte(code-2), 0x90
	copy(b[code:], []byte{0x31, 0xc0, 0xcd, 0x16, 0xcd, 0x19})
	b[510], b[511] = 0x55, 0xaa
	if g.bits == 32 {
		info := area[sectorSize : 2*sectorSize]
		copy(info, "RRaA")
		copy(info[484:], "rrAa")
		le.PutUint32(info[488:], uint32(g.clusters+2-v.next))
		// The last cluster that was given away.
		le.PutUint32(info[492:], uint32(v.next-1))
		info[510], info[511] = 0x55, 0xaa
		copy(area[backupBoot*sectorSize:], area[:3*sectorSize])
		for _, s := range []int{2, backupBoot + 2} {
			area[s*sectorSize+510], area[s*sectorSize+511] = 0x55, 0xaa
		}
	}
	return area
}

// link returns the entry of a cluster in the FAT. i is the index of an object at or
// before it; the index of the one that the cluster is in is returned.
func (v *Volume) link(c int64, i int) (uint32, int) {
	end := uint32(1)<<min(v.geo.bits, 28) - 1
	switch {
	case c == 0:
		return end&^0xff | mediaFixed, i
	case c == 1:
		return end, i
	case c >= v.next:
		return 0, i
	}
	for i+1 < len(v.objects) && v.objects[i+1].cluster <= c {
		i++
	}
	last := v.next - 1
	if i+1 < len(v.objects) {
		last = v.objects[i+1].cluster - 1
	}
	if c == last {
		return end, i
	}
	return uint32(c + 1), i
}

// putFAT writes a range of the FAT, which begins off bytes into it.
func (v *Volume) putFAT(b []byte, off int64) {
	clear(b)
	bits := int64(v.geo.bits)
	if bits == 12 {
		// 12-bit entries straddle bytes; such a FAT is short.
		whole := make([]byte, v.geo.fatSectors*sectorSize)
		i := 0
		for c := range v.next {
			var e uint32
			e, i = v.link(c, i)
			at := c * 3 / 2
			if c%2 == 0 {
				whole[at] = byte(e)
				whole[at+1] |= byte(e >> 8)
			} else {
				whole[at] |= byte(e << 4)
				whole[at+1] = byte(e >> 4)
			}
		}
		copy(b, whole[off:])
		return
	}
	width := bits / 8
	c := off / width
	i := v.objectAt(c)
	for at := c*width - off; at < int64(len(b)) && c < v.next; at, c = at+width, c+1 {
		var e uint32
		e, i = v.link(c, i)
		for k := range width {
			if p := at + k; p >= 0 && p < int64(len(b)) {
				b[p] = byte(e >> (8 * k))
			}
		}
	}
}

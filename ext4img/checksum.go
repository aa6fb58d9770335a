package ext4img

import "hash/crc32"

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// crc32c continues a CRC-32C the way ext4 does: no inversion before or after.
func crc32c(crc uint32, b []byte) uint32 {
	return ^crc32.Update(^crc, castagnoli, b)
}

// crc16 continues a CRC-16 with the polynomial 0x8005, low bit first (kernel:
// lib/crc16.c).
func crc16(crc uint16, b []byte) uint16 {
	for _, c := range b {
		crc ^= uint16(c)
		for range 8 {
			crc = crc>>1 ^ 0xa001*(crc&1)
		}
	}
	return crc
}

// crc32BE is the CRC-32 of Ethernet, high bit first, without inversion at the
// end: the checksums v1 of a journal (kernel: lib/crc32.c, crc32_be).
type crc32BE struct {
	crc   uint32
	table [256]uint32
}

func newCRC32BE() *crc32BE {
	c := &crc32BE{crc: ^uint32(0)}
	for i := range c.table {
		n := uint32(i) << 24
		for range 8 {
			n = n<<1 ^ 0x04c11db7*(n>>31)
		}
		c.table[i] = n
	}
	return c
}

func (c *crc32BE) update(b []byte) {
	for _, x := range b {
		c.crc = c.crc<<8 ^ c.table[byte(c.crc>>24)^x]
	}
}

package qcow2

import (
	"encoding/binary"
	"fmt"
	"strings"
)

const (
	luksHeaderSize = 592
	luksKeySlots   = 8
	luksSlotActive = 0x00ac71f3
	luksSector     = 512
)

// LUKSHeader is what a LUKS version 1 header tells without a passphrase.
type LUKSHeader struct {
	CipherName          string // 8: "aes"
	CipherMode          string // 40: "xts-plain64"
	HashSpec            string // 72: "sha256"
	PayloadOffset       int64  // 104: bytes; stored in sectors
	MasterKeyLen        uint32 // 108: bytes
	MasterKeyIterations uint32 // 164
	UUID                string // 168
	KeySlots            [luksKeySlots]LUKSKeySlot
}

// LUKSKeySlot is a key slot.
type LUKSKeySlot struct {
	Active     bool   // 0
	Iterations uint32 // 4
	KeyOffset  int64  // 40: bytes; stored in sectors
	Stripes    uint32 // 44
}

// parseLUKS parses a LUKS header.
func parseLUKS(b []byte) (LUKSHeader, error) {
	if len(b) < luksHeaderSize || !strings.HasPrefix(string(b), "LUKS\xba\xbe") {
		return LUKSHeader{}, fmt.Errorf("no magic number")
	}
	if v := binary.BigEndian.Uint16(b[6:]); v != 1 {
		return LUKSHeader{}, fmt.Errorf("version %d, expected 1", v)
	}
	h := LUKSHeader{
		CipherName:          cString(b[8:40]),
		CipherMode:          cString(b[40:72]),
		HashSpec:            cString(b[72:104]),
		PayloadOffset:       int64(binary.BigEndian.Uint32(b[104:])) * luksSector,
		MasterKeyLen:        binary.BigEndian.Uint32(b[108:]),
		MasterKeyIterations: binary.BigEndian.Uint32(b[164:]),
		UUID:                cString(b[168:208]),
	}
	for i := range h.KeySlots {
		s := b[208+48*i:]
		h.KeySlots[i] = LUKSKeySlot{
			Active:     binary.BigEndian.Uint32(s) == luksSlotActive,
			Iterations: binary.BigEndian.Uint32(s[4:]),
			KeyOffset:  int64(binary.BigEndian.Uint32(s[40:])) * luksSector,
			Stripes:    binary.BigEndian.Uint32(s[44:]),
		}
	}
	return h, nil
}

// LUKS reads the LUKS header of an encrypted image. ok is false for an image
// that is not encrypted so.
func (im *Image) LUKS() (h LUKSHeader, ok bool, err error) {
	if im.header.CryptMethod != CryptLUKS {
		return h, false, nil
	}
	x, ok := im.header.Crypto()
	if !ok || x.Length < luksHeaderSize || x.Offset > uint64(im.dev.Size()) {
		return h, true, headerError(ErrCorrupt, "encryption extension", "is missing or without a LUKS header of %d bytes", luksHeaderSize)
	}
	b := make([]byte, luksHeaderSize)
	if err := readFull(im.dev, b, int64(x.Offset)); err != nil {
		return h, true, fmt.Errorf("qcow2: luks header at %#x: %w", x.Offset, err)
	}
	if h, err = parseLUKS(b); err != nil {
		return h, true, &FormatError{"luks header", int64(x.Offset), "", err.Error(), ErrCorrupt}
	}
	return h, true, nil
}

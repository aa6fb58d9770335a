package qcow2

import (
	"encoding/binary"
	"fmt"
	"strings"
)

const (
	luksMagic        = "LUKS\xba\xbe"
	luksHeaderSize   = 592
	luksKeySlots     = 8
	luksSlotActive   = 0x00ac71f3
	luksSlotDisabled = 0x0000dead
	luksSector       = 512
	luksDigestSize   = 20
	luksSaltSize     = 32
	luksStripes      = 4000
	// luksAlignment is where the key material of slots begins, and what its
	// size is a multiple of (crypto/block-luks.c).
	luksAlignment = 4096
)

// LUKSHeader is a LUKS version 1 header: what is known without a passphrase.
type LUKSHeader struct {
	CipherName          string               // 8: "aes"
	CipherMode          string               // 40: "xts-plain64"
	HashSpec            string               // 72: "sha256"
	PayloadOffset       int64                // 104: bytes; stored in sectors
	MasterKeyLen        uint32               // 108: bytes, at most 64
	MasterKeyDigest     [luksDigestSize]byte // 112
	MasterKeySalt       [luksSaltSize]byte   // 132
	MasterKeyIterations uint32               // 164
	UUID                string               // 168
	KeySlots            [luksKeySlots]LUKSKeySlot
}

// LUKSKeySlot is a key slot: the master key encrypted with a passphrase.
type LUKSKeySlot struct {
	Active     bool               // 0
	Iterations uint32             // 4
	Salt       [luksSaltSize]byte // 8
	KeyOffset  int64              // 40: bytes from the header; stored in sectors
	Stripes    uint32             // 44: always 4000
}

// parseLUKS parses a LUKS header and refuses what QEMU refuses. The offset of
// the error is for the caller to set.
func parseLUKS(b []byte) (LUKSHeader, *FormatError) {
	var h LUKSHeader
	if len(b) < luksHeaderSize || !strings.HasPrefix(string(b), luksMagic) {
		return h, luksError(ErrCorrupt, "", "no magic number")
	}
	if v := binary.BigEndian.Uint16(b[6:]); v != 1 {
		return h, luksError(ErrUnsupported, "version", "%d, expected 1", v)
	}
	for _, f := range []struct {
		to   *string
		name string
		off  int
	}{{&h.CipherName, "cipher-name", 8}, {&h.CipherMode, "cipher-mode", 40}, {&h.HashSpec, "hash-spec", 72}} {
		if *f.to = cString(b[f.off : f.off+32]); len(*f.to) == 32 {
			return h, luksError(ErrCorrupt, f.name, "without a zero byte at its end")
		}
	}
	h.PayloadOffset = int64(binary.BigEndian.Uint32(b[104:])) * luksSector
	h.MasterKeyLen = binary.BigEndian.Uint32(b[108:])
	copy(h.MasterKeyDigest[:], b[112:])
	copy(h.MasterKeySalt[:], b[132:])
	h.MasterKeyIterations = binary.BigEndian.Uint32(b[164:])
	h.UUID = cString(b[168:208])
	switch {
	case h.MasterKeyLen == 0 || h.MasterKeyLen > maxLUKSKeySize:
		return h, luksError(ErrLimit, "key-bytes", "%d, expected 1 to %d", h.MasterKeyLen, maxLUKSKeySize)
	case h.MasterKeyIterations == 0:
		return h, luksError(ErrCorrupt, "mk-digest-iter", "0, expected 1 at least")
	}
	for i := range h.KeySlots {
		if err := h.parseKeySlot(i, b[luksSlot(i):]); err != nil {
			return h, err
		}
	}
	return h, nil
}

// parseKeySlot parses and checks a slot; those before it are parsed.
func (h *LUKSHeader) parseKeySlot(i int, b []byte) *FormatError {
	state := binary.BigEndian.Uint32(b)
	s := LUKSKeySlot{
		Active:     state == luksSlotActive,
		Iterations: binary.BigEndian.Uint32(b[4:]),
		KeyOffset:  int64(binary.BigEndian.Uint32(b[40:])) * luksSector,
		Stripes:    binary.BigEndian.Uint32(b[44:]),
	}
	copy(s.Salt[:], b[8:])
	h.KeySlots[i] = s
	field, size := fmt.Sprintf("key slot %d", i), h.keySlotSize()
	switch {
	case s.Stripes != luksStripes:
		return luksError(ErrCorrupt, field, "of %d stripes, expected %d", s.Stripes, luksStripes)
	case !s.Active && state != luksSlotDisabled:
		return luksError(ErrCorrupt, field, "is in state %#x, expected %#x or %#x", state, luksSlotActive, luksSlotDisabled)
	case s.Active && s.Iterations == 0:
		return luksError(ErrCorrupt, field, "of 0 iterations, expected 1 at least")
	case s.KeyOffset < luksAlignment || s.KeyOffset > h.PayloadOffset-size:
		return luksError(ErrCorrupt, field, "with %d bytes at %#x, expected them between %#x and the payload at %#x", size, s.KeyOffset, luksAlignment, h.PayloadOffset)
	}
	for j, other := range h.KeySlots[:i] {
		if s.KeyOffset < other.KeyOffset+size && other.KeyOffset < s.KeyOffset+size {
			return luksError(ErrCorrupt, field, "with %d bytes at %#x overlaps with key slot %d at %#x", size, s.KeyOffset, j, other.KeyOffset)
		}
	}
	return nil
}

// keySlotSize returns the bytes set aside for the key material of a slot.
func (h *LUKSHeader) keySlotSize() int64 {
	return (int64(h.MasterKeyLen)*luksStripes + luksAlignment - 1) &^ (luksAlignment - 1)
}

// appendTo appends the header.
func (h *LUKSHeader) appendTo(b []byte) []byte {
	text := func(s string, n int) { b = append(b, append([]byte(s), make([]byte, n-len(s))...)...) }
	b = append(b, luksMagic...)
	b = binary.BigEndian.AppendUint16(b, 1)
	text(h.CipherName, 32)
	text(h.CipherMode, 32)
	text(h.HashSpec, 32)
	b = binary.BigEndian.AppendUint32(b, uint32(h.PayloadOffset/luksSector))
	b = binary.BigEndian.AppendUint32(b, h.MasterKeyLen)
	b = append(b, h.MasterKeyDigest[:]...)
	b = append(b, h.MasterKeySalt[:]...)
	b = binary.BigEndian.AppendUint32(b, h.MasterKeyIterations)
	text(h.UUID, 40)
	for _, s := range h.KeySlots {
		state := uint32(luksSlotDisabled)
		if s.Active {
			state = luksSlotActive
		}
		b = binary.BigEndian.AppendUint32(b, state)
		b = binary.BigEndian.AppendUint32(b, s.Iterations)
		b = append(b, s.Salt[:]...)
		b = binary.BigEndian.AppendUint32(b, uint32(s.KeyOffset/luksSector))
		b = binary.BigEndian.AppendUint32(b, s.Stripes)
	}
	return b
}

func luksError(err error, field, format string, args ...any) *FormatError {
	return &FormatError{"luks header", -1, field, fmt.Sprintf(format, args...), err}
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
	h, bad := parseLUKS(b)
	if bad != nil {
		bad.Off = int64(x.Offset)
		return h, true, bad
	}
	return h, true, nil
}

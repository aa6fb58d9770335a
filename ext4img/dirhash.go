package ext4img

import "math/bits"

// dx_root_info.hash_version. The superblock's EXT2_FLAGS_SIGNED_HASH says that
// bytes of a name are taken as signed, which is what mke2fs chooses on x86; a
// build does so everywhere. EXT2_FLAGS_UNSIGNED_HASH adds hashUnsigned to the
// version that an index names.
const (
	hashVersionLegacy  = 0
	hashVersionHalfMD4 = 1
	hashVersionTEA     = 2
	hashUnsigned       = 3 // added to one of those above
)

// htreeEOF is a hash that the kernel keeps for the end of a directory.
const htreeEOF = 0x7fffffff << 1

// dirhash is the half MD4 of a name, with signed bytes: the order of an
// indexed directory (kernel: fs/ext4/hash.c). Its lowest bit is 0.
func dirhash(name []byte, seed *[4]uint32) uint32 {
	h, _ := dirhashVersion(hashVersionHalfMD4, name, seed)
	return h
}

// dirhashVersion is the hash of any version; ok is false for one that is not
// known.
func dirhashVersion(version int, name []byte, seed *[4]uint32) (hash uint32, ok bool) {
	buf := [4]uint32{0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476}
	if *seed != [4]uint32{} {
		buf = *seed
	}
	word := signedChar
	if version >= hashUnsigned {
		word = unsignedChar
	}
	var h uint32
	switch version % hashUnsigned {
	case hashVersionLegacy:
		h = legacyHash(name, word)
	case hashVersionHalfMD4:
		for rest := name; len(rest) > 0; rest = rest[min(32, len(rest)):] {
			var in [8]uint32
			hashInput(rest, in[:], word)
			halfMD4(&buf, &in)
		}
		h = buf[1]
	case hashVersionTEA:
		for rest := name; len(rest) > 0; rest = rest[min(16, len(rest)):] {
			var in [4]uint32
			hashInput(rest, in[:], word)
			tea(&buf, &in)
		}
		h = buf[0]
	}
	h &^= 1
	if h == htreeEOF {
		h = htreeEOF - 2
	}
	return h, version < 2*hashUnsigned
}

func signedChar(c byte) uint32   { return uint32(int32(int8(c))) }
func unsignedChar(c byte) uint32 { return uint32(c) }

// hashInput packs bytes of a name into words, big end first, padded with the
// length of what is left of the name.
func hashInput(rest []byte, in []uint32, word func(byte) uint32) {
	pad := uint32(len(rest)) | uint32(len(rest))<<8
	pad |= pad << 16
	rest = rest[:min(4*len(in), len(rest))]
	for i := range in {
		in[i] = pad
		for _, c := range rest[:min(4, len(rest))] {
			in[i] = in[i]<<8 + word(c)
		}
		rest = rest[min(4, len(rest)):]
	}
}

func legacyHash(name []byte, word func(byte) uint32) uint32 {
	h0, h1 := uint32(0x12a3fe2d), uint32(0x37abe8f9)
	for _, c := range name {
		h := h1 + (h0 ^ word(c)*7152373)
		if h&0x80000000 != 0 {
			h -= 0x7fffffff
		}
		h1, h0 = h0, h
	}
	return h0 << 1
}

func tea(buf *[4]uint32, in *[4]uint32) {
	const delta = 0x9e3779b9
	b0, b1, sum := buf[0], buf[1], uint32(0)
	for range 16 {
		sum += delta
		b0 += (b1<<4 + in[0]) ^ (b1 + sum) ^ (b1>>5 + in[1])
		b1 += (b0<<4 + in[2]) ^ (b0 + sum) ^ (b0>>5 + in[3])
	}
	buf[0] += b0
	buf[1] += b1
}

func halfMD4(buf *[4]uint32, in *[8]uint32) {
	const k2, k3 = 0x5a827999, 0x6ed9eba1
	a, b, c, d := buf[0], buf[1], buf[2], buf[3]

	f := func(w, x, y, z, v uint32, s int) uint32 { return bits.RotateLeft32(w+(z^(x&(y^z)))+v, s) }
	for i := 0; i < 8; i += 4 {
		a = f(a, b, c, d, in[i], 3)
		d = f(d, a, b, c, in[i+1], 7)
		c = f(c, d, a, b, in[i+2], 11)
		b = f(b, c, d, a, in[i+3], 19)
	}
	g := func(w, x, y, z, v uint32, s int) uint32 { return bits.RotateLeft32(w+((x&y)+((x^y)&z))+v+k2, s) }
	for i := 1; i >= 0; i-- {
		a = g(a, b, c, d, in[i], 3)
		d = g(d, a, b, c, in[i+2], 5)
		c = g(c, d, a, b, in[i+4], 9)
		b = g(b, c, d, a, in[i+6], 13)
	}
	h := func(w, x, y, z, v uint32, s int) uint32 { return bits.RotateLeft32(w+(x^y^z)+v+k3, s) }
	for i := 3; i >= 1; i -= 2 {
		a = h(a, b, c, d, in[i], 3)
		d = h(d, a, b, c, in[i+4], 9)
		c = h(c, d, a, b, in[i-1], 11)
		b = h(b, c, d, a, in[i+3], 15)
	}

	buf[0] += a
	buf[1] += b
	buf[2] += c
	buf[3] += d
}

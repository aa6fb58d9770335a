// Package deflate compresses memory to raw deflate streams (RFC 1951) whose
// matches reach back 4 KiB at most, as small as that allows.
//
// It is for compressed clusters of qcow2, which QEMU inflates with a window of
// 12 bits. A general encoder, whose window is 32 KiB, cannot be used there.
package deflate

import (
	"encoding/binary"
	"math/bits"
)

const (
	// Window is the largest distance of a match, in bytes.
	Window   = 1 << 12
	minMatch = 3
	maxMatch = 258

	hashBits  = 15
	blockSize = 1 << 15 // symbols of a block at most

	endOfBlock  = 256
	litLenCodes = 286
	distCodes   = 30
	preCodes    = 19

	fixedLitLenCodes = 288
	fixedDistCodes   = 32
)

// Effort says how long a match is looked for.
type Effort struct {
	Chain int // earlier places that are looked at, at most
	Lazy  int // a match of so many bytes is taken without looking at the next place
	Nice  int // one of so many is good enough to look no further
}

// Encoder compresses one piece after another. The zero value is ready.
type Encoder struct {
	head [1 << hashBits]int32 // last place of a hash, plus one
	prev [Window]int32        // the place before it, plus one

	tokens     []token
	litLenFreq [litLenCodes]uint32
	distFreq   [distCodes]uint32
	preFreq    [preCodes]uint32

	litLen, dist, pre tables
	huffman           huffman
	runs              []run

	out  []byte
	bits uint64
	n    uint
}

// tables hold a code.
type tables struct {
	lengths [fixedLitLenCodes]uint8
	codes   [fixedLitLenCodes]uint16
}

func (t *tables) code(n int) code { return code{t.lengths[:n], t.codes[:n]} }

// token is a literal, or a match: its length and, from bit 16 on, its distance.
type token uint32

// Append appends p, compressed, to dst. When that would become longer than limit
// bytes it gives up, and ok is false.
func (e *Encoder) Append(dst, p []byte, limit int, effort Effort) (out []byte, ok bool) {
	clear(e.head[:])
	e.out, e.bits, e.n = dst, 0, 0
	start := len(dst)
	at := 0
	for {
		from := at
		at = e.match(p, at, effort)
		e.block(p[from:at], at == len(p))
		if len(e.out)-start > limit {
			return dst, false
		}
		if at == len(p) {
			break
		}
	}
	e.align()
	out = e.out
	e.out = nil
	return out, len(out)-start <= limit
}

func hash(p []byte) uint32 {
	return (uint32(p[0]) | uint32(p[1])<<8 | uint32(p[2])<<16) * 0x9e3779b1 >> (32 - hashBits)
}

// insert notes the place at.
func (e *Encoder) insert(p []byte, at int) {
	if at+minMatch <= len(p) {
		h := hash(p[at:])
		e.prev[at&(Window-1)] = e.head[h]
		e.head[h] = int32(at + 1)
	}
}

// find returns the longest match at a place, if it is longer than length.
func (e *Encoder) find(p []byte, at, length int, effort Effort) (int, int) {
	if at+minMatch > len(p) {
		return 0, 0
	}
	most := min(maxMatch, len(p)-at)
	best, dist := length, 0
	here := p[at : at+most]
	if best >= most {
		return 0, 0
	}
	from := int(e.head[hash(here)]) - 1
	for range effort.Chain {
		if from < 0 || at-from > Window {
			break
		}
		there := p[from : from+most]
		if there[best] == here[best] {
			if n := matchLen(there, here); n > best {
				best, dist = n, at-from
				if n >= effort.Nice || n == most {
					break
				}
			}
		}
		from = int(e.prev[from&(Window-1)]) - 1
	}
	if dist == 0 {
		return 0, 0
	}
	return best, dist
}

func matchLen(a, b []byte) int {
	n := 0
	for len(a)-n >= 8 {
		if d := binary.LittleEndian.Uint64(a[n:]) ^ binary.LittleEndian.Uint64(b[n:]); d != 0 {
			return n + bits.TrailingZeros64(d)/8
		}
		n += 8
	}
	for n < len(a) && a[n] == b[n] {
		n++
	}
	return n
}

// match makes the tokens of a block from at on and returns where it ends. A match
// is put off by a byte when the next place has a longer one.
func (e *Encoder) match(p []byte, at int, effort Effort) int {
	e.tokens = e.tokens[:0]
	clear(e.litLenFreq[:])
	clear(e.distFreq[:])
	length, dist := 0, 0 // of the match at the place before
	for at < len(p) && len(e.tokens) < blockSize {
		n, d := 0, 0
		if length < effort.Lazy {
			n, d = e.find(p, at, max(length, minMatch-1), effort)
		}
		e.insert(p, at)
		switch {
		case n > length && length > 0:
			e.literal(p[at-1])
			length, dist = n, d
			at++
		case length > 0:
			e.copy(length, dist)
			end := at - 1 + length
			for at++; at < end; at++ {
				e.insert(p, at)
			}
			length = 0
		case n > 0:
			length, dist = n, d
			at++
		default:
			e.literal(p[at])
			at++
		}
	}
	if length > 0 {
		// The block is full, or p ends: the match is taken as it is.
		e.copy(length, dist)
		for end := at - 1 + length; at < end; at++ {
			e.insert(p, at)
		}
	}
	return at
}

func (e *Encoder) literal(b byte) {
	e.tokens = append(e.tokens, token(b))
	e.litLenFreq[b]++
}

func (e *Encoder) copy(length, dist int) {
	e.tokens = append(e.tokens, token(dist<<16|length))
	s, _, _ := lengthSymbol(length)
	e.litLenFreq[s]++
	s, _, _ = distSymbol(dist)
	e.distFreq[s]++
}

// lengthSymbol returns the symbol of a length, and its extra bits, section 3.2.5.
func lengthSymbol(length int) (symbol int, extra uint64, n uint) {
	if length == maxMatch {
		return 285, 0, 0
	}
	v := length - minMatch
	if v < 8 {
		return 257 + v, 0, 0
	}
	n = uint(bits.Len(uint(v))) - 3
	return 257 + int(4*n) + v>>n, uint64(v & (1<<n - 1)), n
}

// distSymbol returns the symbol of a distance, and its extra bits.
func distSymbol(dist int) (symbol int, extra uint64, n uint) {
	v := dist - 1
	if v < 4 {
		return v, 0, 0
	}
	n = uint(bits.Len(uint(v))) - 2
	return int(2*n) + v>>n, uint64(v & (1<<n - 1)), n
}

// put appends the low n bits of v, at most 32.
func (e *Encoder) put(v uint64, n uint) {
	e.bits |= v << e.n
	e.n += n
	if e.n >= 32 {
		e.out = binary.LittleEndian.AppendUint32(e.out, uint32(e.bits))
		e.bits >>= 32
		e.n -= 32
	}
}

// align fills up the last byte, and writes all.
func (e *Encoder) align() {
	for e.n > 0 {
		e.out = append(e.out, byte(e.bits))
		e.bits >>= 8
		e.n -= min(e.n, 8)
	}
	e.bits = 0
}

// run is a part of the lengths of codes: a symbol of the code of code lengths,
// and its extra bits.
type run struct {
	symbol, extra uint8
}

// extraBits of the symbols of the code of code lengths.
func (r run) extraBits() uint {
	switch r.symbol {
	case 16:
		return 2
	case 17:
		return 3
	case 18:
		return 7
	}
	return 0
}

// precodeOrder is the order of the code lengths' code lengths, section 3.2.7.
var precodeOrder = [preCodes]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}

// block writes the tokens, which stand for p, as what is shortest.
func (e *Encoder) block(p []byte, final bool) {
	e.litLenFreq[endOfBlock] = 1
	e.huffman.build(e.litLen.code(litLenCodes), e.litLenFreq[:], 15)
	e.huffman.build(e.dist.code(distCodes), e.distFreq[:], 15)
	nlit, ndist := litLenCodes, distCodes
	for nlit > 257 && e.litLen.lengths[nlit-1] == 0 {
		nlit--
	}
	for ndist > 1 && e.dist.lengths[ndist-1] == 0 {
		ndist--
	}
	e.findRuns(nlit, ndist)
	npre := preCodes
	for npre > 4 && e.pre.lengths[precodeOrder[npre-1]] == 0 {
		npre--
	}
	size := 14 + 3*npre
	for _, r := range e.runs {
		size += int(e.pre.lengths[r.symbol]) + int(r.extraBits())
	}
	extra := 0
	for s, n := range e.litLenFreq {
		size += int(n) * int(e.litLen.lengths[s])
		if s > 264 && s < 285 {
			extra += int(n) * ((s - 261) / 4)
		}
	}
	for s, n := range e.distFreq {
		size += int(n) * int(e.dist.lengths[s])
		if s > 3 {
			extra += int(n) * ((s - 2) / 2)
		}
	}
	fixed := 0
	for s, n := range e.litLenFreq {
		fixed += int(n) * int(fixedLength(s))
	}
	for _, n := range e.distFreq {
		fixed += int(n) * 5
	}
	stored := 8 * (len(p) + 5*(len(p)/65535+1))
	last := uint64(0)
	if final {
		last = 1
	}
	switch {
	case stored < min(size, fixed)+extra:
		e.stored(p, final)
		return
	case fixed <= size:
		e.put(last|1<<1, 3)
		// The codes have room for symbols that never occur.
		c := e.litLen.code(fixedLitLenCodes)
		for s := range c.lengths {
			c.lengths[s] = fixedLength(s)
		}
		c.assign()
		c = e.dist.code(fixedDistCodes)
		for s := range c.lengths {
			c.lengths[s] = 5
		}
		c.assign()
	default:
		e.put(last|2<<1, 3)
		e.put(uint64(nlit-257)|uint64(ndist-1)<<5|uint64(npre-4)<<10, 14)
		for _, s := range precodeOrder[:npre] {
			e.put(uint64(e.pre.lengths[s]), 3)
		}
		for _, r := range e.runs {
			e.put(uint64(e.pre.codes[r.symbol])|uint64(r.extra)<<e.pre.lengths[r.symbol], uint(e.pre.lengths[r.symbol])+r.extraBits())
		}
	}
	for _, t := range e.tokens {
		if t < 1<<16 {
			e.put(uint64(e.litLen.codes[t]), uint(e.litLen.lengths[t]))
			continue
		}
		s, extra, n := lengthSymbol(int(t & 0xffff))
		e.put(uint64(e.litLen.codes[s])|extra<<e.litLen.lengths[s], uint(e.litLen.lengths[s])+n)
		s, extra, n = distSymbol(int(t >> 16))
		e.put(uint64(e.dist.codes[s])|extra<<e.dist.lengths[s], uint(e.dist.lengths[s])+n)
	}
	e.put(uint64(e.litLen.codes[endOfBlock]), uint(e.litLen.lengths[endOfBlock]))
}

// fixedLength is the length of a code of section 3.2.6.
func fixedLength(symbol int) uint8 {
	switch {
	case symbol < 144:
		return 8
	case symbol < 256:
		return 9
	case symbol < 280:
		return 7
	}
	return 8
}

// stored writes p as it is, section 3.2.4.
func (e *Encoder) stored(p []byte, final bool) {
	for first := true; first || len(p) > 0; first = false {
		n := min(len(p), 65535)
		last := uint64(0)
		if final && n == len(p) {
			last = 1
		}
		e.put(last, 3)
		e.align()
		e.out = binary.LittleEndian.AppendUint16(e.out, uint16(n))
		e.out = binary.LittleEndian.AppendUint16(e.out, ^uint16(n))
		e.out = append(e.out, p[:n]...)
		p = p[n:]
	}
}

// findRuns makes the runs of the code lengths, and their code.
func (e *Encoder) findRuns(nlit, ndist int) {
	var all [litLenCodes + distCodes]uint8
	lengths := append(append(all[:0], e.litLen.lengths[:nlit]...), e.dist.lengths[:ndist]...)
	e.runs = e.runs[:0]
	clear(e.preFreq[:])
	add := func(symbol, extra int) {
		e.runs = append(e.runs, run{uint8(symbol), uint8(extra)})
		e.preFreq[symbol]++
	}
	for i := 0; i < len(lengths); {
		v, n := lengths[i], 1
		for i+n < len(lengths) && lengths[i+n] == v {
			n++
		}
		i += n
		if v != 0 {
			add(int(v), 0)
			n--
		}
		for n >= 3 {
			switch {
			case v != 0:
				m := min(n, 6)
				add(16, m-3)
				n -= m
			case n > 10:
				m := min(n, 138)
				add(18, m-11)
				n -= m
			default:
				add(17, n-3)
				n = 0
			}
		}
		for range n {
			add(int(v), 0)
		}
	}
	e.huffman.build(e.pre.code(preCodes), e.preFreq[:], 7)
}

// Package inflate decompresses raw deflate streams (RFC 1951) of a known size
// from memory to memory.
//
// It is for compressed clusters of qcow2, which come whole, are at most 2 MiB,
// and are often wanted in part: the output is the window, so that nothing is
// copied, and decompressing stops where the caller likes and goes on from there.
// A general decoder, which reads a stream and has a window of its own, can do
// neither.
package inflate

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
)

// ErrCorrupt is wrapped by the errors for input that is not a deflate stream.
// Input that ends before the output is full is io.ErrUnexpectedEOF.
var ErrCorrupt = errors.New("corrupt deflate stream")

func corrupt(what string) error { return fmt.Errorf("%w: %s", ErrCorrupt, what) }

// Sizes of RFC 1951 section 3.2.7.
const (
	maxLitLen   = 288 // 286 and 287 never occur, and the fixed code has room for them
	maxDist     = 32  // 30 and 31 likewise
	maxPrecode  = 19
	maxCodeLen  = 15
	endOfBlock  = 256
	maxMatch    = 258
	litLenBits  = 11 // bits looked up at once
	distBits    = 8
	precodeBits = 7
)

// An entry of a decoding table says what the next bits mean:
//
//	bits 0..7    the bits to drop: the code's and the extra ones behind it
//	bits 8..11   of these the code's; in a link, the bits that the second table takes
//	bits 12..15  the kind
//	bits 16..31  the literal, the base of the length or the distance, or where
//	             in the table the second table begins
type entry uint32

const (
	kindLiteral = entry(1) << 12
	kindBase    = entry(2) << 12
	kindEnd     = entry(3) << 12
	kindLink    = entry(4) << 12
	kindNone    = entry(0) // no code begins so
	kindMask    = entry(15) << 12
)

func (e entry) value() int { return int(e >> 16) }

// Sizes of tables: the first and as many second ones as there can be, which is
// one for two symbols.
const (
	litLenSize = 1<<litLenBits + maxLitLen/2<<(maxCodeLen-litLenBits)
	distSize   = 1<<distBits + maxDist/2<<(maxCodeLen-distBits)
)

type state uint8

const (
	stateHead   state = iota // before a block
	stateStored              // in a stored block
	stateCodes               // in a compressed one
	stateEnd                 // behind the last one
)

// Decoder decompresses one stream after another. The zero value is to be Reset.
type Decoder struct {
	in   []byte
	pos  int    // of the next byte of in that is not in bits
	bits uint64 // the next bits of the stream; those beyond n are unspecified or 0
	n    uint   // how many of them count

	out  []byte
	done int // bytes of out that are there

	state  state
	final  bool // the block is the last
	stored int  // bytes of a stored block still to come
	err    error

	fixed   bool // the tables are those of the fixed code
	litLen  [litLenSize]entry
	dist    [distSize]entry
	lengths [maxLitLen + maxDist]uint8
}

// Reset begins with the stream at the start of in, to be decompressed into out.
// Both are used until the next Reset.
func (d *Decoder) Reset(in, out []byte) {
	d.in, d.pos, d.bits, d.n = in, 0, 0, 0
	d.out, d.done = out, 0
	d.state, d.final, d.err = stateHead, false, nil
}

// Fill decompresses until the first n bytes of the output are there, at most all
// of it; it may write more. What follows in the input is not looked at. An
// error stays until Reset: io.ErrUnexpectedEOF for a stream that ends before, or
// one that wraps ErrCorrupt.
func (d *Decoder) Fill(n int) error {
	n = min(n, len(d.out))
	for d.done < n && d.err == nil {
		switch d.state {
		case stateHead:
			d.err = d.head()
		case stateStored:
			d.err = d.copyStored()
		case stateCodes:
			if d.err = d.fast(n); d.err == nil && d.state == stateCodes {
				d.err = d.slow(n)
			}
		case stateEnd:
			d.err = io.ErrUnexpectedEOF
		}
	}
	if d.done >= n {
		return nil
	}
	return d.err
}

// head reads the header of a block, section 3.2.3, and the tables.
func (d *Decoder) head() error {
	if d.final {
		d.state = stateEnd
		return nil
	}
	if err := d.need(3); err != nil {
		return err
	}
	d.final = d.take(1) == 1
	switch d.take(2) {
	case 0:
		// The rest of the byte is skipped; whole bytes go back to the input.
		d.take(d.n & 7)
		d.pos -= int(d.n / 8)
		d.bits, d.n = 0, 0
		if len(d.in)-d.pos < 4 {
			return io.ErrUnexpectedEOF
		}
		n := binary.LittleEndian.Uint16(d.in[d.pos:])
		if n != ^binary.LittleEndian.Uint16(d.in[d.pos+2:]) {
			return corrupt("invalid stored block lengths")
		}
		d.pos += 4
		d.stored = int(n)
		d.state = stateStored
	case 1:
		d.state = stateCodes
		return d.fixedTables()
	case 2:
		d.state = stateCodes
		return d.dynamicTables()
	default:
		return corrupt("invalid block type")
	}
	return nil
}

// copyStored copies a stored block, section 3.2.4, to its end or that of the
// output.
func (d *Decoder) copyStored() error {
	n := copy(d.out[d.done:], d.in[d.pos:][:min(d.stored, len(d.in)-d.pos)])
	d.pos += n
	d.done += n
	d.stored -= n
	if d.stored == 0 {
		d.state = stateHead
	} else if d.pos == len(d.in) {
		return io.ErrUnexpectedEOF
	}
	return nil
}

// fixedTables makes the tables of section 3.2.6.
func (d *Decoder) fixedTables() error {
	if d.fixed {
		return nil
	}
	l := d.lengths[:maxLitLen]
	for i := range l {
		switch {
		case i < 144:
			l[i] = 8
		case i < 256:
			l[i] = 9
		case i < 280:
			l[i] = 7
		default:
			l[i] = 8
		}
	}
	if err := makeTable(d.litLen[:], l, litLenBits, litLenEntry); err != nil {
		return err
	}
	l = d.lengths[:maxDist]
	for i := range l {
		l[i] = 5
	}
	d.fixed = true
	return makeTable(d.dist[:], l, distBits, distEntry)
}

// precodeOrder is the order of the code lengths' code lengths, section 3.2.7.
var precodeOrder = [maxPrecode]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}

// dynamicTables reads the codes at the start of a block, section 3.2.7. It
// refuses what zlib refuses.
func (d *Decoder) dynamicTables() error {
	d.fixed = false
	if err := d.need(14); err != nil {
		return err
	}
	nlit, ndist, npre := d.take(5)+257, d.take(5)+1, d.take(4)+4
	if nlit > 286 || ndist > 30 {
		return corrupt("too many length or distance symbols")
	}
	var pre [maxPrecode]uint8
	for _, i := range precodeOrder[:npre] {
		if err := d.need(3); err != nil {
			return err
		}
		pre[i] = uint8(d.take(3))
	}
	// The table of distances has room for this one, which is used up before.
	table := d.dist[:]
	if err := makeTable(table, pre[:], precodeBits, precodeEntry); err != nil {
		return fmt.Errorf("%w in the code lengths", err)
	}
	l := d.lengths[:nlit+ndist]
	for i := 0; i < len(l); {
		_, v, err := d.symbol(table, precodeBits)
		if err != nil {
			return err
		}
		if v < 16 {
			l[i] = uint8(v)
			i++
			continue
		}
		var again int
		var extra uint
		var length uint8
		switch v {
		case 16:
			if i == 0 {
				return corrupt("invalid bit length repeat")
			}
			again, extra, length = 3, 2, l[i-1]
		case 17:
			again, extra = 3, 3
		default:
			again, extra = 11, 7
		}
		if err := d.need(extra); err != nil {
			return err
		}
		again += d.take(extra)
		if again > len(l)-i {
			return corrupt("invalid bit length repeat")
		}
		for range again {
			l[i] = length
			i++
		}
	}
	if l[endOfBlock] == 0 {
		return corrupt("missing end-of-block")
	}
	if err := makeTable(d.litLen[:], l[:nlit], litLenBits, litLenEntry); err != nil {
		return fmt.Errorf("%w in the literals and lengths", err)
	}
	if err := makeTable(d.dist[:], l[nlit:], distBits, distEntry); err != nil {
		return fmt.Errorf("%w in the distances", err)
	}
	return nil
}

func precodeEntry(symbol int) entry { return entry(symbol)<<16 | kindLiteral }

// litLenEntry is the entry of a literal, length or the end, section 3.2.5, but
// for the bits of the code.
func litLenEntry(symbol int) entry {
	switch {
	case symbol < endOfBlock:
		return entry(symbol)<<16 | kindLiteral
	case symbol == endOfBlock:
		return kindEnd
	case symbol > 285:
		return kindNone
	case symbol == 285:
		return maxMatch<<16 | kindBase
	case symbol < 265:
		return entry(symbol-257+3)<<16 | kindBase
	}
	extra := entry(symbol-261) / 4
	return ((4+entry(symbol-265)%4)<<extra+3)<<16 | kindBase | extra
}

// distEntry is the entry of a distance, section 3.2.5.
func distEntry(symbol int) entry {
	switch {
	case symbol > 29:
		return kindNone
	case symbol < 4:
		return entry(symbol+1)<<16 | kindBase
	}
	extra := entry(symbol-2) / 2
	return ((2+entry(symbol)%2)<<extra+1)<<16 | kindBase | extra
}

// makeTable fills table, which is looked up by first bits, with a canonical code
// of the given lengths, section 3.2.2. Over-subscribed codes are refused, and
// incomplete ones but for those of no symbol or, unless it is that of the code
// lengths, one; zlib does the same.
func makeTable(table []entry, lengths []uint8, first int, symbolEntry func(int) entry) error {
	var count, next [maxCodeLen + 1]int
	for _, n := range lengths {
		count[n]++
	}
	count[0] = 0
	longest := 0
	for n := 1; n <= maxCodeLen; n++ {
		next[n] = (next[n-1] + count[n-1]) << 1
		if next[n]+count[n] > 1<<n {
			return corrupt("over-subscribed code")
		}
		if count[n] > 0 {
			longest = n
		}
	}
	if longest > 0 && next[longest]+count[longest] < 1<<longest && (longest > 1 || first == precodeBits) {
		return corrupt("incomplete code")
	}
	clear(table[:1<<first])
	second := max(longest-first, 0) // bits that second tables take
	end := 1 << first               // of the tables so far
	for symbol, length := range lengths {
		n := int(length)
		if n == 0 {
			continue
		}
		code := int(bits.Reverse16(uint16(next[n])) >> (16 - n))
		next[n]++
		e := symbolEntry(symbol)
		t, width := table[:1<<first], first
		if n > first {
			link := &table[code&(1<<first-1)]
			if *link == kindNone {
				*link = entry(end)<<16 | kindLink | entry(second)<<8 | entry(first)
				end += 1 << second
			}
			t, width = table[link.value():][:1<<second], second
			n -= first
			code >>= first
		}
		if e != kindNone {
			e += entry(n)<<8 | entry(n)
		}
		for i := code; i < 1<<width; i += 1 << n {
			t[i] = e
		}
	}
	return nil
}

// load fills up bits as far as there is input.
func (d *Decoder) load() {
	for d.n <= 56 && d.pos < len(d.in) {
		d.bits |= uint64(d.in[d.pos]) << (d.n & 63) // if it is there already, it is the same
		d.pos++
		d.n += 8
	}
}

// need makes sure of n bits, at most 32.
func (d *Decoder) need(n uint) error {
	if d.n < n {
		if d.load(); d.n < n {
			return io.ErrUnexpectedEOF
		}
	}
	return nil
}

// take returns the next n bits, which need has provided.
func (d *Decoder) take(n uint) int {
	v := int(d.bits & (1<<(n&63) - 1))
	d.bits >>= n & 63
	d.n -= n
	return v
}

// symbol reads a code by the table that is looked up by first bits, and the
// extra bits behind it.
func (d *Decoder) symbol(table []entry, first uint) (e entry, value int, err error) {
	d.load()
	e = table[d.bits&(1<<first-1)]
	if e&kindMask == kindLink && d.n >= first {
		d.take(first)
		e = table[e.value()+int(d.bits&(1<<(e>>8&15)-1))]
	}
	n := uint(e & 0xff)
	switch {
	case e&kindMask == kindLink, n > d.n, e == kindNone && d.n < maxCodeLen && d.pos == len(d.in):
		return 0, 0, io.ErrUnexpectedEOF
	case e == kindNone:
		return 0, 0, corrupt("invalid code")
	}
	code := uint(e >> 8 & 15)
	d.take(code)
	return e & kindMask, e.value() + d.take(n-code), nil
}

// slow decompresses a block up to n bytes of output or its end, symbol by
// symbol and with regard to the ends of input and output.
func (d *Decoder) slow(n int) error {
	for d.done < n {
		kind, value, err := d.symbol(d.litLen[:], litLenBits)
		if err != nil {
			return err
		}
		switch kind {
		case kindLiteral:
			d.out[d.done] = byte(value)
			d.done++
		case kindEnd:
			d.state = stateHead
			return nil
		case kindBase:
			_, dist, err := d.symbol(d.dist[:], distBits)
			if err != nil {
				return err
			}
			if dist > d.done {
				return errTooFar
			}
			to := d.out[d.done:min(d.done+value, len(d.out))]
			for i := range to {
				to[i] = d.out[d.done-dist+i]
			}
			d.done += len(to)
		}
	}
	return nil
}

var errTooFar = corrupt("invalid distance too far back")

// fast does as slow does, as long as it is far from the ends of input and output.
// A round takes at most 15 + 15 bytes of the one and adds at most two literals and
// a match, with up to 15 bytes of no meaning behind, to the other.
func (d *Decoder) fast(n int) error {
	in, out := d.in, d.out
	lastIn, lastOut := len(in)-16, min(n-1, len(out)-(2+maxMatch+16))
	b, nb, pos, o := d.bits, d.n, d.pos, d.done
	var err error
	for pos <= lastIn && o <= lastOut {
		// 56 bits or more: two codes in the first table and one of 15 bits with
		// 5 extra ones.
		b |= binary.LittleEndian.Uint64(in[pos:]) << (nb & 63)
		pos += int(63-nb&63) >> 3
		nb |= 56
		e := d.litLen[b&(1<<litLenBits-1)]
		if e&kindMask == kindLiteral {
			b >>= e & 63
			nb -= uint(e & 63)
			out[o] = byte(e >> 16)
			o++
			e = d.litLen[b&(1<<litLenBits-1)]
			if e&kindMask == kindLiteral {
				b >>= e & 63
				nb -= uint(e & 63)
				out[o] = byte(e >> 16)
				o++
				e = d.litLen[b&(1<<litLenBits-1)]
			}
		}
		if e&kindMask == kindLink {
			b >>= litLenBits
			nb -= litLenBits
			e = d.litLen[int(e>>16)+int(b&(1<<(e>>8&15)-1))]
		}
		extra := b & (1<<(e&63) - 1) >> (e >> 8 & 15)
		b >>= e & 63
		nb -= uint(e & 63)
		switch e & kindMask {
		case kindLiteral:
			out[o] = byte(e >> 16)
			o++
			continue
		case kindEnd:
			d.state = stateHead
			d.bits, d.n, d.pos, d.done = b, nb, pos, o
			return nil
		case kindNone:
			err = corrupt("invalid literal/length code")
		}
		if err != nil {
			break
		}
		length := int(e>>16) + int(extra)

		b |= binary.LittleEndian.Uint64(in[pos:]) << (nb & 63)
		pos += int(63-nb&63) >> 3
		nb |= 56
		e = d.dist[b&(1<<distBits-1)]
		if e&kindMask == kindLink {
			b >>= distBits
			nb -= distBits
			e = d.dist[int(e>>16)+int(b&(1<<(e>>8&15)-1))]
		}
		if e == kindNone {
			err = corrupt("invalid distance code")
			break
		}
		dist := int(e>>16) + int(b&(1<<(e&63)-1)>>(e>>8&15))
		b >>= e & 63
		nb -= uint(e & 63)
		if dist > o {
			err = errTooFar
			break
		}
		from, end := o-dist, o+length
		switch {
		case dist >= 16:
			for ; o < end; o += 16 {
				*(*[16]byte)(out[o:]) = *(*[16]byte)(out[from:])
				from += 16
			}
		case dist >= 8:
			for ; o < end; o += 8 {
				*(*[8]byte)(out[o:]) = *(*[8]byte)(out[from:])
				from += 8
			}
		default:
			for ; o < end; o++ {
				out[o] = out[from]
				from++
			}
		}
		o = end
	}
	d.bits, d.n, d.pos, d.done = b, nb, pos, o
	return err
}

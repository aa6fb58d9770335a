package deflate

import (
	"math/bits"
	"slices"
)

// code is a Huffman code: of each symbol the length in bits, 0 for one that does
// not occur, and the bits, the first in the lowest place.
type code struct {
	lengths []uint8
	codes   []uint16
}

// huffman makes codes; its memory is used again.
type huffman struct {
	symbols []uint32 // count<<9 | symbol, of those that occur
	parents []uint32 // see build
}

// build makes the shortest complete code for symbols that occur so often, with
// at most limit bits. A code of one symbol has one bit.
func (h *huffman) build(c code, freq []uint32, limit int) {
	clear(c.lengths)
	h.symbols = h.symbols[:0]
	for s, n := range freq {
		if n > 0 {
			h.symbols = append(h.symbols, n<<9|uint32(s))
		}
	}
	switch len(h.symbols) {
	case 0:
		return
	case 1:
		c.lengths[h.symbols[0]&511] = 1
	default:
		slices.Sort(h.symbols)
		h.setLengths(c.lengths, limit)
	}
	c.assign()
}

// setLengths makes Huffman's tree from the sorted symbols, and shortens what is
// longer than limit.
func (h *huffman) setLengths(lengths []uint8, limit int) {
	n := len(h.symbols)
	// Nodes: the n symbols, and behind them the inner ones in the order in
	// which they are made, which is that of their weights. First the array has
	// the weights of inner nodes, then their parents, then their depths.
	nodes := slices.Grow(h.parents[:0], n)[:n-1]
	h.parents = nodes
	leaf, inner := 0, 0
	least := func(made int) uint32 {
		if leaf < n && (inner >= made || h.symbols[leaf]>>9 <= nodes[inner]) {
			leaf++
			return h.symbols[leaf-1] >> 9
		}
		w := nodes[inner]
		nodes[inner] = uint32(made)
		inner++
		return w
	}
	for made := range nodes {
		w := least(made)
		nodes[made] = w + least(made)
	}
	// Depths from the root, which is the last, downwards, and how many leaves
	// there are in each.
	var count [32]int
	root := len(nodes) - 1
	nodes[root] = 0
	var atDepth [64]int // inner nodes
	atDepth[0] = 1
	for i := root - 1; i >= 0; i-- {
		nodes[i] = nodes[nodes[i]] + 1
		atDepth[min(nodes[i], 63)]++
	}
	left := n
	for depth := 1; left > 0; depth++ {
		leaves := 2*atDepth[depth-1] - atDepth[depth]
		count[min(depth, limit)] += leaves
		left -= leaves
	}
	// What is too deep was counted at the limit: shorter codes become longer
	// until there is room.
	room := 0
	for d := 1; d <= limit; d++ {
		room += count[d] << (limit - d)
	}
	for ; room > 1<<limit; room-- {
		d := limit - 1
		for count[d] == 0 {
			d--
		}
		count[d]--
		count[d+1] += 2
		count[limit]--
	}
	// The rarest symbols get the longest codes.
	i := 0
	for d := limit; d > 0; d-- {
		for range count[d] {
			lengths[h.symbols[i]&511] = uint8(d)
			i++
		}
	}
}

// assign makes the canonical codes of the lengths, RFC 1951 section 3.2.2.
func (c code) assign() {
	var count [16]uint16
	for _, n := range c.lengths {
		count[n]++
	}
	count[0] = 0
	var start [16]uint16
	for n := 1; n < 16; n++ {
		start[n] = (start[n-1] + count[n-1]) << 1
	}
	for s, n := range c.lengths {
		if n > 0 {
			c.codes[s] = bits.Reverse16(start[n]) >> (16 - n)
			start[n]++
		}
	}
}

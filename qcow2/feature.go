package qcow2

import (
	"fmt"
	"strings"
)

// Incompatible is the set of features that a program must know to open an
// image.
type Incompatible uint64

// Incompatible features.
const (
	IncompatDirty       Incompatible = 1 << 0 // refcounts may be stale
	IncompatCorrupt     Incompatible = 1 << 1 // nothing may be written
	IncompatDataFile    Incompatible = 1 << 2 // guest clusters lie in another file
	IncompatCompression Incompatible = 1 << 3 // compression_type is not zlib
	IncompatExtendedL2  Incompatible = 1 << 4 // L2 entries with subclusters

	incompatKnown = IncompatDirty | IncompatCorrupt | IncompatDataFile | IncompatCompression | IncompatExtendedL2
)

func (f Incompatible) String() string {
	return bitNames(uint64(f), []string{"dirty", "corrupt", "external data file", "compression type", "extended L2 entries"})
}

// Compatible is the set of features that a program may ignore.
type Compatible uint64

// CompatLazyRefcounts: the dirty bit is set instead of writing refcounts at once.
const CompatLazyRefcounts Compatible = 1 << 0

func (f Compatible) String() string { return bitNames(uint64(f), []string{"lazy refcounts"}) }

// Autoclear is the set of features that a program which does not know them
// must clear before it writes.
type Autoclear uint64

// Autoclear features.
const (
	AutoclearBitmaps     Autoclear = 1 << 0 // the bitmaps extension is consistent
	AutoclearDataFileRaw Autoclear = 1 << 1 // the external data file is a raw image by itself
)

func (f Autoclear) String() string {
	return bitNames(uint64(f), []string{"bitmaps", "raw external data"})
}

func bitNames(bits uint64, names []string) string {
	var s []string
	for i := range 64 {
		switch {
		case bits>>i&1 == 0:
		case i < len(names):
			s = append(s, names[i])
		default:
			s = append(s, fmt.Sprintf("bit %d", i))
		}
	}
	return strings.Join(s, ", ")
}

// FeatureType tells which of the three sets a feature name belongs to.
type FeatureType uint8

// The sets of a feature name table.
const (
	FeatureIncompatible FeatureType = 0
	FeatureCompatible   FeatureType = 1
	FeatureAutoclear    FeatureType = 2
)

const featureNameEntrySize = 48

// FeatureName is an entry of the feature name table.
type FeatureName struct {
	Type FeatureType // 0
	Bit  uint8       // 1: bit number, 0 to 63
	Name string      // 2-47: padded with zeroes
}

func parseFeatureName(b []byte) FeatureName {
	name, _, _ := strings.Cut(string(b[2:featureNameEntrySize]), "\x00")
	return FeatureName{FeatureType(b[0]), b[1], name}
}

func (n FeatureName) appendTo(b []byte) []byte {
	var e [featureNameEntrySize]byte
	e[0], e[1] = uint8(n.Type), n.Bit
	copy(e[2:], n.Name)
	return append(b, e[:]...)
}

func parseFeatureNames(b []byte) []FeatureName {
	var names []FeatureName
	for ; len(b) >= featureNameEntrySize; b = b[featureNameEntrySize:] {
		names = append(names, parseFeatureName(b))
	}
	return names
}

// unknownIncompatible names the bits of f that this package does not know.
func unknownIncompatible(f Incompatible, names []FeatureName) string {
	var s []string
	for i := range uint8(64) {
		if (f&^incompatKnown)>>i&1 == 0 {
			continue
		}
		name := fmt.Sprintf("bit %d", i)
		for _, n := range names {
			if n.Type == FeatureIncompatible && n.Bit == i && n.Name != "" {
				name = fmt.Sprintf("bit %d (%q)", i, n.Name)
			}
		}
		s = append(s, name)
	}
	return strings.Join(s, ", ")
}

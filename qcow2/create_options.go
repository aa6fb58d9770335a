package qcow2

import (
	"fmt"
	"math/bits"
)

// OptionError says which options of a new image do not go together, or which
// value is not allowed, in the words of qemu-img.
type OptionError string

func (e OptionError) Error() string { return string(e) }

func optionError(format string, args ...any) error { return OptionError(fmt.Sprintf(format, args...)) }

// FormatOptions are the properties of a new image. The zero value means what
// it means to qemu-img: version 3, clusters of 64 KiB, refcounts of 16 bits,
// zlib.
type FormatOptions struct {
	Version       int             // 2 or 3; 0: 3
	ClusterSize   int64           // bytes, a power of two from 512 to 2 MiB; 0: 64 KiB
	RefcountBits  int             // a power of two from 1 to 64; 0: 16. Version 2 has 16 only
	Compression   CompressionType // how compressed clusters are; version 2 has zlib only
	ExtendedL2    bool            // 32 subclusters a cluster; version 3, clusters of 16 KiB or more
	LazyRefcounts bool            // version 3 only
	BackingFile   string          // name as it is stored, at most 1023 bytes; "": none
	BackingFormat string          // format of the backing file; "": not stored
	Encrypt       EncryptOptions
}

// sectorSize is what virtual sizes are multiples of.
const sectorSize = 512

// header checks the options and returns the header of an empty image of size
// bytes, rounded up to sectors: without the places of its tables.
func (o *FormatOptions) header(size int64) (Header, error) {
	h := Header{Version: 3, ClusterBits: 16, RefcountOrder: 4, CompressionType: o.Compression}
	switch o.Version {
	case 0, 3:
	case 2:
		h.Version = 2
	default:
		return h, optionError("Parameter 'version' does not accept value '%d'", o.Version)
	}
	v2 := h.Version == 2
	if o.ExtendedL2 {
		if v2 {
			return h, needsV3("Extended L2 entries are only supported with")
		}
		h.IncompatibleFeatures |= IncompatExtendedL2
	}
	if o.ClusterSize != 0 {
		if o.ClusterSize < 1<<minClusterBits || o.ClusterSize > 1<<maxClusterBits || o.ClusterSize&(o.ClusterSize-1) != 0 {
			return h, optionError("Cluster size must be a power of two between %d and %dk", 1<<minClusterBits, 1<<maxClusterBits>>10)
		}
		h.ClusterBits = uint32(bits.TrailingZeros64(uint64(o.ClusterSize)))
	}
	if smallest := int64(subclustersPerCluster << minClusterBits); o.ExtendedL2 && h.ClusterSize() < smallest {
		return h, optionError("Extended L2 entries are only supported with cluster sizes of at least %d bytes", smallest)
	}
	if o.BackingFormat != "" && o.BackingFile == "" {
		return h, optionError("Backing format cannot be used without backing file")
	}
	if o.LazyRefcounts {
		if v2 {
			return h, needsV3("Lazy refcounts only supported with")
		}
		h.CompatibleFeatures |= CompatLazyRefcounts
	}
	if o.RefcountBits != 0 {
		if o.RefcountBits < 0 || o.RefcountBits > 64 || o.RefcountBits&(o.RefcountBits-1) != 0 {
			return h, optionError("Refcount width must be a power of two and may not exceed 64 bits")
		}
		if v2 && o.RefcountBits != 16 {
			return h, optionError("Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)")
		}
		h.RefcountOrder = uint32(bits.TrailingZeros(uint(o.RefcountBits)))
	}
	switch o.Compression {
	case CompressionZlib:
	case CompressionZstd:
		if v2 {
			return h, needsV3("Non-zlib compression type is only supported with")
		}
		h.IncompatibleFeatures |= IncompatCompression
	default:
		return h, optionError("Unknown compression type")
	}
	if err := h.setSize(size); err != nil {
		return h, err
	}
	h.BackingFile = o.BackingFile
	if o.BackingFormat != "" {
		h.Extensions = append(h.Extensions, Extension{extBackingFormat, []byte(o.BackingFormat)})
	}
	luks, err := o.Encrypt.check()
	if err != nil {
		return h, err
	}
	h.CryptMethod = o.Encrypt.Method
	if luks != nil { // in the second cluster, see Writer.host
		h.Extensions = append(h.Extensions, Extension{extCrypto, CryptoExtension{uint64(h.ClusterSize()), uint64(luks.PayloadOffset)}.appendTo(nil)})
	}
	if len(o.BackingFile) > maxBackingFileSize || len(o.BackingFormat) > maxBackingFormatSize {
		return h, optionError("Could not assign backing file '%s' with format '%s': Invalid argument", o.BackingFile, o.BackingFormat)
	}
	return h, nil
}

func needsV3(what string) error {
	return OptionError(what + " compatibility level 1.1 and above (use version=v3 or greater)")
}

// setSize rounds size up to sectors and checks that an L1 table can map it.
func (h *Header) setSize(size int64) error {
	if size < 0 {
		return OptionError("Invalid image size specified. Must be between 0 and 9223372036854775807.")
	}
	h.Size = (uint64(size) + sectorSize - 1) &^ (sectorSize - 1)
	g := h.geometry()
	n := g.l1Entries(h.Size)
	if n > maxL1Size/l1EntrySize {
		return OptionError("The image size is too large for file format 'qcow2' (try using a larger cluster size)")
	}
	h.L1Size = uint32(n)
	return nil
}

// addFeatureNames adds the feature name table where QEMU has one: it leaves no
// room for a backing file name in a small cluster.
func (h *Header) addFeatureNames() {
	if h.Version == 2 || h.ClusterSize() <= 4096 {
		return
	}
	var b []byte
	for _, n := range defaultFeatureNames() {
		b = n.appendTo(b)
	}
	h.Extensions = append(h.Extensions, Extension{extFeatureNames, b})
}

// firstCluster returns the first cluster of an image.
func (h *Header) firstCluster() ([]byte, error) {
	b := h.appendTo(nil)
	if int64(len(b)) > h.ClusterSize() {
		return nil, optionError("Header of %d bytes does not fit into a cluster of %d bytes: shorten the names in it or use a larger cluster size", len(b), h.ClusterSize())
	}
	return append(b, make([]byte, h.ClusterSize()-int64(len(b)))...), nil
}

package qcow2

import (
	"encoding/binary"
	"fmt"
	"math"
)

const (
	magic = 0x514649fb // "QFI\xfb"

	headerSizeV2  = 72  // bytes of a version 2 header
	headerSizeV3  = 104 // smallest version 3 header
	headerSizeNow = 112 // with compression_type and its padding

	extensionHeaderSize = 8 // type and length of a header extension
)

// Offsets of header fields that are changed by themselves.
const (
	headerBackingFileOffset     = 8
	headerBackingFileSize       = 16
	headerL1TableOffset         = 40
	headerRefcountTableOffset   = 48
	headerRefcountTableClusters = 56
	headerNbSnapshots           = 60
	headerSnapshotsOffset       = 64
	headerIncompatible          = 72
	headerAutoclear             = 88
)

// Types of header extensions.
const (
	extEnd           = 0x00000000
	extBackingFormat = 0xe2792aca
	extFeatureNames  = 0x6803f857
	extBitmaps       = 0x23852875
	extCrypto        = 0x0537be77
	extDataFile      = 0x44415441
)

// CryptMethod is how guest data is encrypted.
type CryptMethod uint32

// Encryption methods.
const (
	CryptNone CryptMethod = 0
	CryptAES  CryptMethod = 1 // legacy AES-CBC
	CryptLUKS CryptMethod = 2
)

func (m CryptMethod) String() string {
	switch m {
	case CryptNone:
		return "none"
	case CryptAES:
		return "aes"
	case CryptLUKS:
		return "luks"
	}
	return fmt.Sprintf("CryptMethod(%d)", uint32(m))
}

// CompressionType is how compressed clusters are compressed.
type CompressionType uint8

// Compression types. Zlib is raw deflate.
const (
	CompressionZlib CompressionType = 0
	CompressionZstd CompressionType = 1
)

func (c CompressionType) String() string {
	switch c {
	case CompressionZlib:
		return "zlib"
	case CompressionZstd:
		return "zstd"
	}
	return fmt.Sprintf("CompressionType(%d)", uint8(c))
}

// Header is the header of an image with its extensions and the name of its
// backing file. Offsets and sizes are in bytes.
type Header struct {
	Version               uint32          // 4: 2 or 3
	BackingFileOffset     uint64          // 8: of the name in the first cluster; 0: none
	BackingFileSize       uint32          // 16: bytes of the name, at most 1023
	ClusterBits           uint32          // 20: log2 of the cluster size, 9 to 21
	Size                  uint64          // 24: virtual size
	CryptMethod           CryptMethod     // 32
	L1Size                uint32          // 36: entries of the active L1 table
	L1TableOffset         uint64          // 40
	RefcountTableOffset   uint64          // 48
	RefcountTableClusters uint32          // 56
	NbSnapshots           uint32          // 60
	SnapshotsOffset       uint64          // 64
	IncompatibleFeatures  Incompatible    // 72: version 3 from here on
	CompatibleFeatures    Compatible      // 80
	AutoclearFeatures     Autoclear       // 88
	RefcountOrder         uint32          // 96: log2 of the refcount width; 4 in version 2
	HeaderLength          uint32          // 100: 72 in version 2
	CompressionType       CompressionType // 104: present if HeaderLength is above 104
	// UnknownFields are the bytes from 112 up to HeaderLength.
	UnknownFields []byte

	// Extensions are the header extensions in the order of the file, known
	// or not, without the end marker.
	Extensions []Extension
	// BackingFile is the backing file name as it is stored; "" means none.
	BackingFile string
}

// Extension is a header extension.
type Extension struct {
	Type uint32
	Data []byte // without padding
}

// BitmapsExtension points at the bitmap directory.
type BitmapsExtension struct {
	NbBitmaps       uint32 // 0: 1 to 65535
	DirectorySize   uint64 // 8: bytes
	DirectoryOffset uint64 // 16: cluster-aligned
}

const bitmapsExtensionSize = 24

// CryptoExtension points at the LUKS header.
type CryptoExtension struct {
	Offset uint64 // 0: cluster-aligned
	Length uint64 // 8: bytes
}

const cryptoExtensionSize = 16

// ClusterSize returns the cluster size in bytes.
func (h *Header) ClusterSize() int64 { return 1 << h.ClusterBits }

// extension returns the data of the last extension of a type, as QEMU lets
// the last one win.
func (h *Header) extension(typ uint32) ([]byte, bool) {
	for i := len(h.Extensions) - 1; i >= 0; i-- {
		if h.Extensions[i].Type == typ {
			return h.Extensions[i].Data, true
		}
	}
	return nil, false
}

// BackingFormat returns the format that the image names for its backing file,
// or "".
func (h *Header) BackingFormat() string {
	b, _ := h.extension(extBackingFormat)
	return cString(b)
}

// DataFile returns the name of the external data file, or "".
func (h *Header) DataFile() string {
	b, _ := h.extension(extDataFile)
	return cString(b)
}

// FeatureNames returns the feature name table.
func (h *Header) FeatureNames() []FeatureName {
	b, _ := h.extension(extFeatureNames)
	return parseFeatureNames(b)
}

// Bitmaps returns the bitmaps extension; ok is false if there is none or if
// the autoclear bit says that it is stale.
func (h *Header) Bitmaps() (ext BitmapsExtension, ok bool) {
	b, ok := h.extension(extBitmaps)
	if !ok || h.AutoclearFeatures&AutoclearBitmaps == 0 {
		return BitmapsExtension{}, false
	}
	return parseBitmapsExtension(b), true // checked by checkExtension
}

// Crypto returns the full disk encryption header pointer.
func (h *Header) Crypto() (ext CryptoExtension, ok bool) {
	b, ok := h.extension(extCrypto)
	if !ok {
		return CryptoExtension{}, false
	}
	return parseCryptoExtension(b), true // checked by checkExtension
}

func parseBitmapsExtension(b []byte) BitmapsExtension {
	return BitmapsExtension{
		NbBitmaps:       binary.BigEndian.Uint32(b[0:]),
		DirectorySize:   binary.BigEndian.Uint64(b[8:]),
		DirectoryOffset: binary.BigEndian.Uint64(b[16:]),
	}
}

func (e BitmapsExtension) appendTo(b []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, e.NbBitmaps)
	b = binary.BigEndian.AppendUint32(b, 0)
	b = binary.BigEndian.AppendUint64(b, e.DirectorySize)
	return binary.BigEndian.AppendUint64(b, e.DirectoryOffset)
}

func parseCryptoExtension(b []byte) CryptoExtension {
	return CryptoExtension{binary.BigEndian.Uint64(b[0:]), binary.BigEndian.Uint64(b[8:])}
}

func (e CryptoExtension) appendTo(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, e.Offset)
	return binary.BigEndian.AppendUint64(b, e.Length)
}

// parsePrefix reads magic, version and cluster_bits, which say how long the
// first cluster is.
func parsePrefix(b []byte) (Header, error) {
	if len(b) < headerSizeV2 || binary.BigEndian.Uint32(b) != magic {
		return Header{}, fmt.Errorf("qcow2: %w: no magic number", ErrFormat)
	}
	h := Header{
		Version:     binary.BigEndian.Uint32(b[4:]),
		ClusterBits: binary.BigEndian.Uint32(b[20:]),
	}
	if h.Version != 2 && h.Version != 3 {
		return h, headerError(ErrUnsupported, "version", "%d, expected 2 or 3", h.Version)
	}
	if h.ClusterBits < minClusterBits || h.ClusterBits > maxClusterBits {
		return h, headerError(ErrCorrupt, "cluster_bits", "%d, expected %d to %d", h.ClusterBits, minClusterBits, maxClusterBits)
	}
	return h, nil
}

// parseHeader parses and checks the header in the first cluster of an image,
// with the extensions and the backing file name behind it. A cluster that the
// file ends in is given without the part that is missing, which counts as
// zeroes.
//
// What it accepts: offsets of the L1 table, the refcount table and the
// snapshot table are aligned to clusters, those tables end below 2^63 and
// within their limits, and the L1 table covers Size.
func parseHeader(b []byte) (Header, error) {
	h, err := parsePrefix(b)
	if err != nil {
		return h, err
	}
	h.BackingFileOffset = binary.BigEndian.Uint64(b[8:])
	h.BackingFileSize = binary.BigEndian.Uint32(b[16:])
	h.Size = binary.BigEndian.Uint64(b[24:])
	h.CryptMethod = CryptMethod(binary.BigEndian.Uint32(b[32:]))
	h.L1Size = binary.BigEndian.Uint32(b[36:])
	h.L1TableOffset = binary.BigEndian.Uint64(b[40:])
	h.RefcountTableOffset = binary.BigEndian.Uint64(b[48:])
	h.RefcountTableClusters = binary.BigEndian.Uint32(b[56:])
	h.NbSnapshots = binary.BigEndian.Uint32(b[60:])
	h.SnapshotsOffset = binary.BigEndian.Uint64(b[64:])
	h.RefcountOrder, h.HeaderLength = 4, headerSizeV2

	clusterSize := uint64(h.ClusterSize())
	if h.Version == 3 {
		if len(b) < headerSizeV3 {
			return h, headerError(ErrCorrupt, "", "file ends at byte %d, expected %d bytes at least", len(b), headerSizeV3)
		}
		h.IncompatibleFeatures = Incompatible(binary.BigEndian.Uint64(b[72:]))
		h.CompatibleFeatures = Compatible(binary.BigEndian.Uint64(b[80:]))
		h.AutoclearFeatures = Autoclear(binary.BigEndian.Uint64(b[88:]))
		h.RefcountOrder = binary.BigEndian.Uint32(b[96:])
		h.HeaderLength = binary.BigEndian.Uint32(b[100:])
		if h.HeaderLength < headerSizeV3 || uint64(h.HeaderLength) > clusterSize || uint64(h.HeaderLength) > uint64(len(b)) {
			return h, headerError(ErrCorrupt, "header_length", "%d, expected %d up to the cluster size %d and the size of the file", h.HeaderLength, headerSizeV3, clusterSize)
		}
		if h.HeaderLength > headerSizeV3 {
			h.CompressionType = CompressionType(b[104])
		}
		if h.HeaderLength > headerSizeNow {
			h.UnknownFields = append([]byte(nil), b[headerSizeNow:h.HeaderLength]...)
		}
	}
	if h.BackingFileOffset > clusterSize {
		return h, headerError(ErrCorrupt, "backing_file_offset", "%#x is beyond the first cluster of %#x bytes", h.BackingFileOffset, clusterSize)
	}
	end := clusterSize // of the extensions
	if h.BackingFileOffset != 0 {
		end = h.BackingFileOffset
		if h.BackingFileSize > maxBackingFileSize || uint64(h.BackingFileSize) > clusterSize-h.BackingFileOffset {
			return h, headerError(ErrLimit, "backing_file_size", "%d, expected at most %d and the name inside the first cluster", h.BackingFileSize, maxBackingFileSize)
		}
	}
	extErr := h.parseExtensions(b, end)
	if h.IncompatibleFeatures&^incompatKnown != 0 {
		return h, headerError(ErrUnsupported, "incompatible_features", "has unknown %s", unknownIncompatible(h.IncompatibleFeatures, h.FeatureNames()))
	}
	if err := h.check(); err != nil {
		return h, err
	}
	if extErr != nil {
		return h, extErr
	}
	for _, e := range h.Extensions {
		if err := h.checkExtension(e); err != nil {
			return h, err
		}
	}
	if h.AutoclearFeatures&AutoclearDataFileRaw != 0 && h.IncompatibleFeatures&IncompatDataFile == 0 {
		return h, headerError(ErrCorrupt, "autoclear_features", "has raw external data without an external data file")
	}
	if h.BackingFileOffset != 0 {
		name := make([]byte, h.BackingFileSize) // at most maxBackingFileSize
		if h.BackingFileOffset < uint64(len(b)) {
			copy(name, b[h.BackingFileOffset:])
		}
		h.BackingFile = cString(name)
	}
	return h, nil
}

func (h *Header) check() error {
	compressionBit := h.IncompatibleFeatures&IncompatCompression != 0
	switch {
	case h.CompressionType > CompressionZstd:
		return headerError(ErrUnsupported, "compression_type", "%d, expected 0 (zlib) or 1 (zstd)", uint8(h.CompressionType))
	case compressionBit != (h.CompressionType != CompressionZlib):
		return headerError(ErrCorrupt, "compression_type", "%d does not agree with incompatible feature bit 3", uint8(h.CompressionType))
	case h.IncompatibleFeatures&IncompatExtendedL2 != 0 && h.ClusterBits < minClusterBits+5:
		return headerError(ErrCorrupt, "cluster_bits", "%d, expected %d at least with extended L2 entries", h.ClusterBits, minClusterBits+5)
	case h.RefcountOrder > maxRefcountOrder:
		return headerError(ErrCorrupt, "refcount_order", "%d, expected at most %d", h.RefcountOrder, maxRefcountOrder)
	case h.CryptMethod > CryptLUKS:
		return headerError(ErrUnsupported, "crypt_method", "%d, expected at most %d", uint32(h.CryptMethod), CryptLUKS)
	case h.RefcountTableClusters == 0:
		return headerError(ErrCorrupt, "refcount_table_clusters", "0, expected 1 at least")
	}
	if err := h.checkTable("refcount_table_offset", h.RefcountTableOffset, "refcount_table_clusters", h.RefcountTableClusters, uint64(h.ClusterSize()), maxReftableSize); err != nil {
		return err
	}
	if err := h.checkTable("snapshots_offset", h.SnapshotsOffset, "nb_snapshots", h.NbSnapshots, snapshotHeaderSize, maxSnapshots*snapshotHeaderSize); err != nil {
		return err
	}
	if err := h.checkTable("l1_table_offset", h.L1TableOffset, "l1_size", h.L1Size, l1EntrySize, maxL1Size); err != nil {
		return err
	}
	g := h.geometry()
	if n := g.l1Entries(h.Size); n > maxL1Size/l1EntrySize {
		return headerError(ErrLimit, "size", "%d needs %d L1 entries, expected at most %d", h.Size, n, maxL1Size/l1EntrySize)
	} else if uint64(h.L1Size) < n {
		return headerError(ErrCorrupt, "l1_size", "%d, expected %d at least for a size of %d", h.L1Size, n, h.Size)
	}
	return nil
}

// checkTable checks place and length of a table (block/qcow2.c:655).
func (h *Header) checkTable(offField string, off uint64, countField string, count uint32, entrySize, limit uint64) error {
	if uint64(count) > limit/entrySize {
		return headerError(ErrLimit, countField, "%d, expected at most %d", count, limit/entrySize)
	}
	if off&uint64(h.ClusterSize()-1) != 0 {
		return headerError(ErrCorrupt, offField, "%#x not aligned to %#x", off, h.ClusterSize())
	}
	if off > math.MaxInt64-limit {
		return headerError(ErrCorrupt, offField, "%#x too large", off)
	}
	return nil
}

// parseExtensions collects the extensions between the header and end, an
// offset in the first cluster.
func (h *Header) parseExtensions(b []byte, end uint64) error {
	for off := uint64(h.HeaderLength); off < end; {
		if off+extensionHeaderSize > end {
			return headerError(ErrCorrupt, "extension", "at %#x does not end before %#x", off, end)
		}
		if off+extensionHeaderSize > uint64(len(b)) {
			return nil // the file ends: zeroes, which are the end marker
		}
		typ, n := binary.BigEndian.Uint32(b[off:]), uint64(binary.BigEndian.Uint32(b[off+4:]))
		off += extensionHeaderSize
		if n > end-off || typ != extEnd && n > uint64(len(b))-off {
			return headerError(ErrCorrupt, "extension", "%#08x at %#x: length %d reaches beyond %#x", typ, off-extensionHeaderSize, n, end)
		}
		if typ == extEnd {
			return nil
		}
		h.Extensions = append(h.Extensions, Extension{typ, append([]byte(nil), b[off:off+n]...)})
		off += (n + 7) &^ 7
	}
	return nil
}

func (h *Header) checkExtension(e Extension) error {
	switch e.Type {
	case extBackingFormat:
		if len(e.Data) > maxBackingFormatSize {
			return headerError(ErrLimit, "backing format extension", "of %d bytes, expected at most %d", len(e.Data), maxBackingFormatSize)
		}
	case extDataFile:
		if len(e.Data) > maxDataFileSize {
			return headerError(ErrLimit, "external data file extension", "of %d bytes, expected at most %d", len(e.Data), maxDataFileSize)
		}
	case extCrypto:
		if h.CryptMethod != CryptLUKS {
			return headerError(ErrCorrupt, "encryption extension", "with crypt_method %s, expected luks", h.CryptMethod)
		}
		if len(e.Data) != cryptoExtensionSize {
			return headerError(ErrCorrupt, "encryption extension", "of %d bytes, expected %d", len(e.Data), cryptoExtensionSize)
		}
		switch c := parseCryptoExtension(e.Data); {
		case c.Offset&uint64(h.ClusterSize()-1) != 0 || c.Offset > math.MaxInt64-maxCryptoSize:
			return headerError(ErrCorrupt, "encryption extension", "offset %#x not aligned to %#x or too large", c.Offset, h.ClusterSize())
		case c.Length > maxCryptoSize:
			return headerError(ErrLimit, "encryption extension", "length %d, expected at most %d", c.Length, maxCryptoSize)
		}
	case extBitmaps:
		if len(e.Data) != bitmapsExtensionSize {
			return headerError(ErrCorrupt, "bitmaps extension", "of %d bytes, expected %d", len(e.Data), bitmapsExtensionSize)
		}
		if h.AutoclearFeatures&AutoclearBitmaps == 0 {
			return nil // stale, nobody looks at it
		}
		x := parseBitmapsExtension(e.Data)
		switch {
		case binary.BigEndian.Uint32(e.Data[4:]) != 0:
			return headerError(ErrCorrupt, "bitmaps extension", "reserved field is not zero")
		case x.NbBitmaps == 0 || x.NbBitmaps > maxBitmaps:
			return headerError(ErrLimit, "bitmaps extension", "nb_bitmaps %d, expected 1 to %d", x.NbBitmaps, maxBitmaps)
		case x.DirectoryOffset&uint64(h.ClusterSize()-1) != 0 || x.DirectoryOffset > math.MaxInt64-maxBitmapDirectorySize:
			return headerError(ErrCorrupt, "bitmaps extension", "bitmap_directory_offset %#x not aligned to %#x or too large", x.DirectoryOffset, h.ClusterSize())
		case x.DirectorySize > maxBitmapDirectorySize:
			return headerError(ErrLimit, "bitmaps extension", "bitmap_directory_size %d, expected at most %d", x.DirectorySize, maxBitmapDirectorySize)
		}
	}
	return nil
}

// appendTo appends the header, its extensions with the end marker, and the
// backing file name behind them. BackingFileOffset and BackingFileSize are
// taken from BackingFile; a HeaderLength of 0 means 72 in version 2 and 112
// in version 3. The caller sees to it that all fits in the first cluster.
func (h Header) appendTo(b []byte) []byte {
	start := len(b)
	if h.HeaderLength == 0 {
		h.HeaderLength = headerSizeNow
		if h.Version == 2 {
			h.HeaderLength = headerSizeV2
		}
	}
	b = binary.BigEndian.AppendUint32(b, magic)
	b = binary.BigEndian.AppendUint32(b, h.Version)
	b = binary.BigEndian.AppendUint64(b, 0)
	b = binary.BigEndian.AppendUint32(b, 0)
	b = binary.BigEndian.AppendUint32(b, h.ClusterBits)
	b = binary.BigEndian.AppendUint64(b, h.Size)
	b = binary.BigEndian.AppendUint32(b, uint32(h.CryptMethod))
	b = binary.BigEndian.AppendUint32(b, h.L1Size)
	b = binary.BigEndian.AppendUint64(b, h.L1TableOffset)
	b = binary.BigEndian.AppendUint64(b, h.RefcountTableOffset)
	b = binary.BigEndian.AppendUint32(b, h.RefcountTableClusters)
	b = binary.BigEndian.AppendUint32(b, h.NbSnapshots)
	b = binary.BigEndian.AppendUint64(b, h.SnapshotsOffset)
	if h.Version >= 3 {
		b = binary.BigEndian.AppendUint64(b, uint64(h.IncompatibleFeatures))
		b = binary.BigEndian.AppendUint64(b, uint64(h.CompatibleFeatures))
		b = binary.BigEndian.AppendUint64(b, uint64(h.AutoclearFeatures))
		b = binary.BigEndian.AppendUint32(b, h.RefcountOrder)
		b = binary.BigEndian.AppendUint32(b, h.HeaderLength)
		var tail [headerSizeNow - headerSizeV3]byte
		tail[0] = byte(h.CompressionType)
		b = append(b, tail[:min(len(tail), int(h.HeaderLength)-headerSizeV3)]...)
		b = append(b, h.UnknownFields...)
	}
	for _, e := range h.Extensions {
		b = binary.BigEndian.AppendUint32(b, e.Type)
		b = binary.BigEndian.AppendUint32(b, uint32(len(e.Data)))
		b = append(b, e.Data...)
		b = append(b, make([]byte, -len(e.Data)&7)...)
	}
	b = append(b, make([]byte, extensionHeaderSize)...) // extEnd
	if h.BackingFile != "" {
		binary.BigEndian.PutUint64(b[start+8:], uint64(len(b)-start))
		binary.BigEndian.PutUint32(b[start+16:], uint32(len(h.BackingFile)))
		b = append(b, h.BackingFile...)
	}
	return b
}

// defaultFeatureNames is the table that QEMU writes into version 3 images.
func defaultFeatureNames() []FeatureName {
	return []FeatureName{
		{FeatureIncompatible, 0, "dirty bit"},
		{FeatureIncompatible, 1, "corrupt bit"},
		{FeatureIncompatible, 2, "external data file"},
		{FeatureIncompatible, 3, "compression type"},
		{FeatureIncompatible, 4, "extended L2 entries"},
		{FeatureCompatible, 0, "lazy refcounts"},
		{FeatureAutoclear, 0, "bitmaps"},
		{FeatureAutoclear, 1, "raw external data"},
	}
}

// cString returns b up to its first zero byte.
func cString(b []byte) string {
	for i, c := range b {
		if c == 0 {
			return string(b[:i])
		}
	}
	return string(b)
}

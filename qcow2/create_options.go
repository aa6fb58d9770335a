package qcow2

import (
	"fmt"
	"math/bits"
	"strconv"
	"strings"
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

// Set sets an option by the name and value that qemu-img's -o takes. All but
// size are known; of data_file the caller has to open the file (Data), and
// encryption is ErrUnsupported. Values are checked one by one; what goes
// together is Create's to check.
func (o *CreateOptions) Set(name, value string) error {
	switch name {
	case "compat":
		return setEnum(&o.Version, "version", value, map[string]int{"0.10": 2, "v2": 2, "1.1": 3, "v3": 3})
	case "cluster_size":
		n, ok := parseSize(value)
		if !ok {
			return optionError("Parameter '%s' expects a non-negative number below 2^64\n"+
				"Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively.", name)
		}
		o.ClusterSize = n
		if n == 0 {
			o.ClusterSize = -1 // refused, where 0 is the default
		}
	case "refcount_bits":
		n, err := strconv.ParseInt(value, 0, 64)
		if err != nil {
			return optionError("Parameter '%s' expects a number", name)
		}
		o.RefcountBits = -1 // refused, as 0 is here
		if n > 0 && n <= 64 {
			o.RefcountBits = int(n)
		}
	case "compression_type":
		return setEnum(&o.Compression, "compression-type", value, map[string]CompressionType{"zlib": CompressionZlib, "zstd": CompressionZstd})
	case "preallocation":
		return setEnum(&o.Preallocation, name, value, map[string]Preallocation{
			"off": PreallocationOff, "metadata": PreallocationMetadata, "falloc": PreallocationFalloc, "full": PreallocationFull})
	case "extended_l2":
		return setBool(&o.ExtendedL2, name, value)
	case "lazy_refcounts":
		return setBool(&o.LazyRefcounts, name, value)
	case "data_file_raw":
		return setBool(&o.DataFileRaw, name, value)
	case "backing_file":
		if value == "" {
			return OptionError("Expected backing file name, got empty string")
		}
		o.BackingFile = value
	case "backing_fmt":
		o.BackingFormat = value
	case "data_file":
		o.DataFile = value
	case "encryption":
		var on bool
		if err := setBool(&on, name, value); err != nil || !on {
			return err
		}
		return fmt.Errorf("qcow2: option %s: %w", name, ErrUnsupported)
	case "encrypt.format", "encrypt.key-secret", "encrypt.cipher-alg", "encrypt.cipher-mode",
		"encrypt.ivgen-alg", "encrypt.ivgen-hash-alg", "encrypt.hash-alg", "encrypt.iter-time":
		return fmt.Errorf("qcow2: option %s: %w", name, ErrUnsupported)
	default:
		return optionError("Invalid parameter '%s'", name)
	}
	return nil
}

func setEnum[T any](to *T, name, value string, values map[string]T) error {
	v, ok := values[value]
	if !ok {
		return optionError("Parameter '%s' does not accept value '%s'", name, value)
	}
	*to = v
	return nil
}

func setBool(to *bool, name, value string) error {
	switch value {
	case "on", "yes", "true", "y":
		*to = true
	case "off", "no", "false", "n":
		*to = false
	default:
		return optionError("Parameter '%s' expects 'on' or 'off'", name)
	}
	return nil
}

// parseSize reads a number of bytes in qemu-img's notation, below 2^63.
func parseSize(s string) (int64, bool) {
	if hex, ok := strings.CutPrefix(strings.ToLower(s), "0x"); ok {
		n, err := strconv.ParseInt(hex, 16, 64)
		return n, err == nil && n >= 0
	}
	shift := 0
	if s != "" {
		if i := strings.IndexByte("bkmgtpe", s[len(s)-1]|0x20); i >= 0 {
			shift, s = 10*i, s[:len(s)-1]
		}
	}
	if strings.Trim(s, "0123456789.") != "" {
		return 0, false
	}
	if n, err := strconv.ParseInt(s, 10, 64); err == nil {
		return n << shift, n<<shift>>shift == n
	}
	f, err := strconv.ParseFloat(s, 64)
	f *= float64(int64(1) << shift)
	return int64(f), err == nil && f < 1<<63
}

package qcow2

import (
	"encoding/binary"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestHeaderRoundTrip(t *testing.T) {
	base := Header{
		Version: 3, ClusterBits: 16, Size: 1 << 40, CryptMethod: CryptLUKS,
		L1Size: 4096, L1TableOffset: 0x30000,
		RefcountTableOffset: 0x10000, RefcountTableClusters: 3,
		NbSnapshots: 7, SnapshotsOffset: 0x70000,
		IncompatibleFeatures: IncompatDirty | IncompatCorrupt | IncompatCompression | IncompatExtendedL2,
		CompatibleFeatures:   CompatLazyRefcounts | 1<<60,
		AutoclearFeatures:    AutoclearBitmaps | 1<<50,
		RefcountOrder:        6, HeaderLength: 128, CompressionType: CompressionZstd,
		UnknownFields: []byte("sixteen bytes ab"),
		Extensions: []Extension{
			{extBackingFormat, []byte("qcow2")},
			{extFeatureNames, FeatureName{FeatureAutoclear, 50, "fifty"}.appendTo(nil)},
			{extBitmaps, BitmapsExtension{3, 96, 0x50000}.appendTo(nil)},
			{extCrypto, CryptoExtension{0x80000, 4096}.appendTo(nil)},
			{0x12345678, []byte("kept")},
		},
		BackingFile: "a name.qcow2",
	}
	v2 := Header{
		Version: 2, ClusterBits: 9, Size: 512, L1Size: 1, L1TableOffset: 512,
		RefcountTableOffset: 1024, RefcountTableClusters: 1, RefcountOrder: 4, HeaderLength: 72,
	}
	short := v2
	short.Version, short.HeaderLength = 3, 104
	for _, want := range []Header{base, v2, short} {
		b := want.appendTo([]byte("before"))[6:]
		got, err := parseHeader(append(b, make([]byte, 300)...))
		if err != nil {
			t.Fatal(err)
		}
		if want.BackingFile != "" {
			want.BackingFileOffset, want.BackingFileSize = got.BackingFileOffset, uint32(len(want.BackingFile))
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("-want +got:\n%s", d)
		}
		// Without the bytes that the file has not got the header is the same,
		// or it is an error, never a panic.
		for n := range b {
			if _, err := parseHeader(b[:n]); n < int(want.HeaderLength) && err == nil {
				t.Errorf("%d bytes of %d: no error", n, len(b))
			}
		}
	}
	got, err := parseHeader(base.appendTo(nil))
	if err != nil {
		t.Fatal(err)
	}
	if x, ok := got.Bitmaps(); !ok || x != (BitmapsExtension{3, 96, 0x50000}) {
		t.Errorf("bitmaps extension %+v %v", x, ok)
	}
	if x, ok := got.Crypto(); !ok || x != (CryptoExtension{0x80000, 4096}) {
		t.Errorf("encryption extension %+v %v", x, ok)
	}
	if got.BackingFormat() != "qcow2" || got.DataFile() != "" {
		t.Errorf("backing format %q, data file %q", got.BackingFormat(), got.DataFile())
	}
	if d := cmp.Diff([]FeatureName{{FeatureAutoclear, 50, "fifty"}}, got.FeatureNames()); d != "" {
		t.Error(d)
	}
	if s := (got.IncompatibleFeatures | 1<<40).String(); s != "dirty, corrupt, compression type, extended L2 entries, bit 40" {
		t.Error(s)
	}
}

// TestSizes: the sizes of the specification.
func TestSizes(t *testing.T) {
	for _, c := range []struct {
		name      string
		got, want int
	}{
		{"version 2 header with end marker", len(Header{Version: 2}.appendTo(nil)), 72 + 8},
		{"version 3 header with end marker", len(Header{Version: 3}.appendTo(nil)), 112 + 8},
		{"feature name", len(FeatureName{Name: strings.Repeat("x", 99)}.appendTo(nil)), 48},
		{"bitmaps extension", len(BitmapsExtension{}.appendTo(nil)), 24},
		{"encryption extension", len(CryptoExtension{}.appendTo(nil)), 16},
		{"snapshot", len(Snapshot{}.appendTo(nil)), 64},
		{"snapshot with id and name", len(Snapshot{ID: "1", Name: "n"}.appendTo(nil)), 72},
		{"bitmap", len(Bitmap{}.appendTo(nil)), 24},
		{"bitmap with name", len(Bitmap{Name: "123456789"}.appendTo(nil)), 40},
	} {
		if c.got != c.want {
			t.Errorf("%s: %d bytes, expected %d", c.name, c.got, c.want)
		}
	}
}

func TestSnapshotRoundTrip(t *testing.T) {
	want := Snapshot{
		L1TableOffset: 0x10000, L1Size: 5, DateSec: 6, DateNsec: 7, VMClockNsec: 8,
		VMStateSize: 1 << 33, DiskSize: 1 << 40, ICount: 12, ID: "id", Name: "a name",
		ExtraDataSize: 30, UnknownExtraData: []byte("extra!"),
	}
	b := want.appendTo(nil)
	n, err := snapshotSize(b)
	if err != nil || (n+7)&^7 != len(b) {
		t.Fatal(n, err)
	}
	if d := cmp.Diff(want, parseSnapshot(b[:n], 0)); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	// An old entry, without extra data.
	old := append([]byte(nil), b[:snapshotHeaderSize]...)
	copy(old[12:16], "\x00\x00\x00\x00")
	binary.BigEndian.PutUint32(old[32:], 99)
	copy(old[36:40], "\x00\x00\x00\x00")
	if n, err := snapshotSize(old); err != nil || n != len(old) {
		t.Error(n, err)
	}
	if got := parseSnapshot(old, 4096); got.DiskSize != 4096 || got.VMStateSize != 99 || got.ICount != NoICount {
		t.Errorf("%+v", got)
	}
	copy(old[36:40], "\x00\x00\x04\x01")
	if _, err := snapshotSize(old); err == nil {
		t.Error("1025 bytes of extra data accepted")
	}
}

func TestBitmapRoundTrip(t *testing.T) {
	want := Bitmap{TableOffset: 0x20000, TableSize: 3, Flags: BitmapAuto | BitmapInUse, Type: 1, GranularityBits: 16, ExtraData: []byte("x"), Name: "b0"}
	b := want.appendTo(nil)
	got, n, err := parseBitmap(b)
	if err != nil || n != len(b) {
		t.Fatal(n, err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	for n := range b {
		if _, _, err := parseBitmap(b[:n]); err == nil {
			t.Errorf("%d bytes of %d accepted", n, len(b))
		}
	}
}

// TestRefcountEntry: widths below a byte start with the least significant bit.
func TestRefcountEntry(t *testing.T) {
	b := []byte{0xb1, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef}
	for _, c := range []struct {
		width, shift uint
		want         uint64
	}{
		{1, 0, 1}, {1, 1, 0}, {1, 7, 1}, {2, 4, 3}, {4, 0, 1}, {4, 4, 0xb},
		{8, 0, 0xb1}, {16, 0, 0xb123}, {32, 0, 0xb1234567}, {64, 0, 0xb123456789abcdef},
	} {
		if got := refcountEntry(b, c.shift, c.width); got != c.want {
			t.Errorf("width %d, bit %d: %#x, expected %#x", c.width, c.shift, got, c.want)
		}
	}
}

// TestCompressedDescriptor: block/qcow2-cluster.c, qcow2_parse_compressed_l2_entry.
func TestCompressedDescriptor(t *testing.T) {
	for _, c := range []struct {
		bits   uint32
		entry  uint64
		off, n int64
	}{
		{16, 1<<62 | 0x50123, 0x50123, 512 - 0x123},
		{16, 1<<62 | 5<<54 | 0x50000, 0x50000, 6 * 512},
		{9, 1<<62 | 1<<61 | 0x701, 0x701, 1024 - 0x101},
		{21, 1<<62 | 0x1fff<<49 | 1, 1, 0x2000*512 - 1},
	} {
		h := Header{ClusterBits: c.bits}
		g := h.geometry()
		if off, n := g.compressed(c.entry); off != c.off || n != c.n {
			t.Errorf("cluster_bits %d, entry %#x: %#x %d, expected %#x %d", c.bits, c.entry, off, n, c.off, c.n)
		}
	}
}

func TestParseReference(t *testing.T) {
	for name, want := range map[string]reference{
		"dir/base.qcow2": {path: "dir/base.qcow2"},
		"./a:b":          {path: "./a:b"},
		"file:base":      {path: "base", asIs: true},
		`json:{"driver":"qcow2","file":{"driver":"file","filename":"b"}}`:                          {path: "b", format: "qcow2", asIs: true},
		`json:{"driver":"raw","file.filename":"/b"}`:                                               {path: "/b", format: "raw", asIs: true},
		`json:{"driver":"qcow2","encrypt":{"key-secret":"s","format":"luks"},"file.filename":"b"}`: {path: "b", format: "qcow2", asIs: true, keySecret: "s"},
	} {
		if got, err := parseReference(name); err != nil || got != want {
			t.Errorf("%s: %+v %v", name, got, err)
		}
	}
	for name, want := range map[string]error{
		"nbd:localhost:1": ErrUnsupported,
		"ssh://host/x":    ErrUnsupported,
		`json:{"driver":"raw","offset":512,"file.filename":"b"}`: ErrUnsupported,
		`json:{"driver":"raw","x":"y","file.filename":"b"}`:      ErrUnsupported,
		`json:{"file.driver":"nbd","file.filename":"b"}`:         ErrUnsupported,
		`json:{"driver":"raw"}`:                                  ErrBacking,
		`json:{`:                                                 ErrBacking,
		`json:{"file.filename":"a","file":{"filename":"b"}}`:     ErrBacking,
		`json:{"filename":"a","file":{"filename":"b"}}`:          ErrBacking,
	} {
		if _, err := parseReference(name); !errors.Is(err, want) {
			t.Errorf("%s: %v, expected %v", name, err, want)
		}
	}
}

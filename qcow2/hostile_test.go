package qcow2

import (
	"errors"
	"math"
	"strings"
	"testing"

	"qimg/qcow2/blockdev"
)

// hostile opens a tiny image after change.
func hostile(t *testing.T, opts *OpenOptions, change func(x *Tiny)) (*Image, error) {
	t.Helper()
	x := NewTiny()
	change(x)
	dev := blockdev.NewMemory(int64(len(x.Image)))
	if _, err := dev.WriteAt(x.Bytes(), 0); err != nil {
		t.Fatal(err)
	}
	return New(dev, opts)
}

// refusedWith checks the error of a field that is refused.
func refusedWith(t *testing.T, err, want error, text string) {
	t.Helper()
	if want == nil {
		if err != nil {
			t.Errorf("%v for what is good", err)
		}
		return
	}
	var bad *FormatError
	if !errors.Is(err, want) || !errors.As(err, &bad) || !strings.Contains(err.Error(), text) {
		t.Errorf("%v, expected %v with %q", err, want, text)
	}
}

// TestHostileExtensions: a case for each way in which an extension is refused.
func TestHostileExtensions(t *testing.T) {
	crypto := func(off, n uint64) []byte { return CryptoExtension{off, n}.appendTo(nil) }
	bitmaps := func(n uint32, size, off uint64) []byte { return BitmapsExtension{n, size, off}.appendTo(nil) }
	reserved := bitmaps(1, 32, TinyEnd)
	reserved[7] = 1
	for _, c := range []struct {
		name  string
		typ   uint32
		data  []byte
		crypt CryptMethod
		want  error // nil: good
		text  string
	}{
		{"backing format", extBackingFormat, []byte("a format of fifteen"[:15]), 0, nil, ""},
		{"long backing format", extBackingFormat, []byte("a format of sixteen"[:16]), 0, ErrLimit, "backing format extension of 16 bytes"},
		{"data file", extDataFile, make([]byte, 200), 0, nil, ""},
		{"encryption", extCrypto, crypto(TinyEnd, 2<<20), CryptLUKS, nil, ""},
		{"encryption without method", extCrypto, crypto(TinyEnd, 512), CryptNone, ErrCorrupt, "crypt_method none"},
		{"encryption of AES", extCrypto, crypto(TinyEnd, 512), CryptAES, ErrCorrupt, "crypt_method aes"},
		{"short encryption", extCrypto, crypto(TinyEnd, 512)[:15], CryptLUKS, ErrCorrupt, "of 15 bytes, expected 16"},
		{"long encryption", extCrypto, append(crypto(TinyEnd, 512), 0), CryptLUKS, ErrCorrupt, "of 17 bytes, expected 16"},
		{"encryption unaligned", extCrypto, crypto(TinyEnd+8, 512), CryptLUKS, ErrCorrupt, "offset 0xe08 not aligned"},
		{"encryption far away", extCrypto, crypto(1<<63, 512), CryptLUKS, ErrCorrupt, "too large"},
		{"large encryption", extCrypto, crypto(0, maxCryptoSize+1), CryptLUKS, ErrLimit, "length 16777217"},
		{"huge encryption", extCrypto, crypto(0, math.MaxUint64), CryptLUKS, ErrLimit, "length 18446744073709551615"},
		{"bitmaps", extBitmaps, bitmaps(maxBitmaps, maxBitmapDirectorySize, TinyEnd), 0, nil, ""},
		{"short bitmaps", extBitmaps, bitmaps(1, 32, TinyEnd)[:23], 0, ErrCorrupt, "of 23 bytes, expected 24"},
		{"long bitmaps", extBitmaps, append(bitmaps(1, 32, TinyEnd), 0), 0, ErrCorrupt, "of 25 bytes, expected 24"},
		{"bitmaps reserved", extBitmaps, reserved, 0, ErrCorrupt, "reserved field"},
		{"no bitmap", extBitmaps, bitmaps(0, 32, TinyEnd), 0, ErrLimit, "nb_bitmaps 0"},
		{"many bitmaps", extBitmaps, bitmaps(maxBitmaps+1, 32, TinyEnd), 0, ErrLimit, "nb_bitmaps 65536"},
		{"bitmaps unaligned", extBitmaps, bitmaps(1, 32, TinyEnd+8), 0, ErrCorrupt, "bitmap_directory_offset 0xe08"},
		{"bitmaps far away", extBitmaps, bitmaps(1, 32, 1<<63-512), 0, ErrCorrupt, "bitmap_directory_offset"},
		{"large bitmap directory", extBitmaps, bitmaps(1, maxBitmapDirectorySize+1, TinyEnd), 0, ErrLimit, "bitmap_directory_size 67107841"},
		{"unknown", 0x12345678, make([]byte, 100), 0, nil, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			change := func(x *Tiny) {
				x.Header.CryptMethod = c.crypt
				x.Header.AutoclearFeatures = AutoclearBitmaps
				x.Header.Extensions = []Extension{{c.typ, c.data}}
			}
			_, err := hostile(t, nil, change)
			refusedWith(t, err, c.want, c.text)
			// A stale one is only measured.
			if c.typ == extBitmaps && len(c.data) == bitmapsExtensionSize {
				if _, err := hostile(t, nil, func(x *Tiny) { change(x); x.Header.AutoclearFeatures = 0 }); err != nil {
					t.Errorf("stale: %v", err)
				}
			}
		})
	}
	// The name of a data file does not fit in a cluster of 512 bytes.
	_, err := hostile(t, nil, func(x *Tiny) {
		x.Header.ClusterBits, x.Header.RefcountTableOffset, x.Header.L1TableOffset = 16, 0, 0
		x.Header.Extensions = []Extension{{extDataFile, make([]byte, maxDataFileSize+1)}}
		x.Image = make([]byte, 1<<16)
	})
	refusedWith(t, err, ErrLimit, "external data file extension of 4096 bytes")
}

// TestHostileBitmaps: a case for each way in which a bitmap is refused.
func TestHostileBitmaps(t *testing.T) {
	good := Bitmap{TableOffset: TinyEnd + 512, TableSize: 1, Flags: BitmapAuto, Type: 1, GranularityBits: 9, Name: "b"}
	for _, c := range []struct {
		name   string
		change func(b *Bitmap)
		text   string // "": good
	}{
		{"good", func(*Bitmap) {}, ""},
		{"largest", func(b *Bitmap) { b.TableSize, b.GranularityBits = maxBitmapSize/512, 31 }, ""},
		{"in use and too small", func(b *Bitmap) { b.TableSize, b.Flags = 1, BitmapInUse }, ""},
		{"no table", func(b *Bitmap) { b.TableSize = 0 }, "bitmap_table_size 0"},
		{"large table", func(b *Bitmap) { b.TableSize = maxBitmapTableSize + 1 }, "bitmap_table_size 134217729, expected 1 to"},
		{"table at 0", func(b *Bitmap) { b.TableOffset = 0 }, "bitmap_table_offset 0x0"},
		{"table unaligned", func(b *Bitmap) { b.TableOffset++ }, "bitmap_table_offset 0x1001"},
		{"table far away", func(b *Bitmap) { b.TableOffset = 1 << 63 }, "bitmap_table_offset"},
		{"flags", func(b *Bitmap) { b.Flags = 8 }, "flags 0x8"},
		{"extra data compatible", func(b *Bitmap) { b.Flags = BitmapExtraDataCompatible }, "flags 0x4"},
		{"type", func(b *Bitmap) { b.Type = 2 }, "type 2"},
		{"small granularity", func(b *Bitmap) { b.GranularityBits = 8 }, "granularity_bits 8"},
		{"large granularity", func(b *Bitmap) { b.GranularityBits = 32 }, "granularity_bits 32"},
		{"name", func(b *Bitmap) { b.Name = strings.Repeat("n", maxBitmapNameSize+1) }, "name_size 1024"},
		{"extra data", func(b *Bitmap) { b.ExtraData = []byte("12345678") }, "extra data of 8 bytes"},
		{"large", func(b *Bitmap) { b.TableSize = maxBitmapSize/512 + 1 }, "does not fit"},
		{"too small for the disk", func(b *Bitmap) { b.Flags, b.Name = 0, "small" }, "does not fit"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := good
			c.change(&b)
			im, err := hostile(t, nil, func(x *Tiny) {
				dir := b.appendTo(nil)
				x.Image = append(append(x.Image, dir...), make([]byte, 512)...)
				x.Header.AutoclearFeatures = AutoclearBitmaps
				x.Header.Extensions = []Extension{{extBitmaps, BitmapsExtension{1, uint64(len(dir)), TinyEnd}.appendTo(nil)}}
				if b.Name == "small" {
					x.Header.Size, x.Header.L1Size = 4<<20, 128
				}
			})
			if err != nil {
				t.Fatal(err)
			}
			list, err := im.Bitmaps()
			if c.text == "" {
				if err != nil || len(list) != 1 {
					t.Errorf("%+v %v", list, err)
				}
				return
			}
			refusedWith(t, err, ErrCorrupt, c.text)
			if !strings.Contains(err.Error(), "bitmap directory at 0xe00: ") {
				t.Error(err)
			}
		})
	}
	// Directories that do not agree with the header.
	entry := good.appendTo(nil)
	for _, c := range []struct {
		name string
		n    uint32
		size uint64
		dir  []byte
		text string
	}{
		{"empty", 1, 0, nil, "0 of 0 bytes"},
		{"beyond the file", 1, 1 << 20, entry, "of 1048576 bytes"},
		{"too many", 1, 64, append(entry, entry...), "more than the 1 bitmaps"},
		{"too few", 3, 64, append(entry, entry...), "2 bitmaps, expected the 3"},
		{"part of an entry", 1, 23, entry, "entry of 23 bytes"},
		{"name beyond the directory", 1, 24, entry, "entry of 32 bytes, which the directory has not"},
		{"extra data beyond the directory", 1, 32, append(append(append([]byte(nil), entry[:20]...), 255, 255, 255, 255), entry[24:]...), "which the directory has not"},
	} {
		t.Run(c.name, func(t *testing.T) {
			im, err := hostile(t, nil, func(x *Tiny) {
				x.Image = append(append(x.Image, c.dir...), make([]byte, 512)...)
				x.Header.AutoclearFeatures = AutoclearBitmaps
				x.Header.Extensions = []Extension{{extBitmaps, BitmapsExtension{c.n, c.size, TinyEnd}.appendTo(nil)}}
			})
			if err != nil {
				t.Fatal(err)
			}
			_, err = im.Bitmaps()
			refusedWith(t, err, ErrCorrupt, c.text)
		})
	}
}

// TestHostileSnapshots: a case for each way in which a snapshot is refused, by
// reading the table or by reading its content.
func TestHostileSnapshots(t *testing.T) {
	good := Snapshot{L1TableOffset: TinyL1, L1Size: 1, DiskSize: TinySize, ID: "1", Name: "n"}
	for _, c := range []struct {
		name   string
		change func(s *Snapshot)
		want   error // nil: good
		text   string
	}{
		{"good", func(*Snapshot) {}, nil, ""},
		{"smaller disk", func(s *Snapshot) { s.DiskSize = 512 }, nil, ""},
		{"l1 table too large", func(s *Snapshot) { s.L1Size = maxL1Size/8 + 1 }, ErrLimit, "snapshot 1: l1_size 4194305"},
		{"l1 table unaligned", func(s *Snapshot) { s.L1TableOffset++ }, ErrCorrupt, "snapshot 1: l1_table_offset 0x601"},
		{"l1 table far away", func(s *Snapshot) { s.L1TableOffset = 1<<63 - 512 }, ErrCorrupt, "snapshot 1: l1_table_offset"},
		{"l1 table too small", func(s *Snapshot) { s.DiskSize++ }, ErrCorrupt, "snapshot 1: l1_size 1, expected 2 at least"},
		{"huge disk", func(s *Snapshot) { s.DiskSize = math.MaxUint64 }, ErrCorrupt, "snapshot 1: l1_size 1"},
		{"extra data", func(s *Snapshot) { s.ExtraDataSize, s.UnknownExtraData = 1032, make([]byte, 1008) }, ErrLimit, "extra_data_size 1032"},
		{"name beyond the file", func(s *Snapshot) { s.Name = strings.Repeat("n", 1000) }, ErrCorrupt, "beyond the end of the file"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := good
			c.change(&s)
			im, err := hostile(t, &OpenOptions{Snapshot: "1"}, func(x *Tiny) {
				x.Header.NbSnapshots, x.Header.SnapshotsOffset = 1, TinyEnd
				b := s.appendTo(nil)
				if len(s.Name) > 1 {
					b = b[:512]
				}
				x.Image = append(x.Image, b...)
			})
			refusedWith(t, err, c.want, c.text)
			if err == nil && im.Size() != int64(s.DiskSize) {
				t.Errorf("size %d, expected %d", im.Size(), s.DiskSize)
			}
		})
	}
}

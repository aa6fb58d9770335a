package formats_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"qimg/cloudimg/formats"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/oracle"
)

type tiny struct {
	name, format string
	image        []byte
	data         int64 // where the data is in the disk
	tables       []int // ends of structures in the file
}

func tinyImages() []tiny {
	return []tiny{
		{"vmdk", formats.VMDK, tinyVMDK(false), 8192, []int{4, 79, 512, 1024, 3 * 512, 3*512 + 8, 5 * 512, 5*512 + 8, 6 * 512, 6*512 + 4095}},
		{"vmdk compressed", formats.VMDK, tinyVMDK(true), 8192, []int{4, 79, 512, 1024, 3 * 512, 5 * 512, 6 * 512, 6*512 + 12, 7 * 512, 8 * 512, 8*512 + 79, 9 * 512}},
		{"vdi", formats.VDI, tinyVDI(), 1 << 20, []int{0x44, 511, 512, 523, 1024, 1024 + 4095}},
		{"vpc", formats.VPC, tinyVPC(false), 8192, []int{8, 511, 512, 1024, 1535, 1536, 1551, 2048, 2560, 2560 + 4095}},
		{"vpc fixed", formats.VPC, tinyVPC(true), 8192, []int{8, 511, 8192, 16 << 10, 16<<10 + 511}},
		{"vhdx", formats.VHDX, tinyVHDX(), 1 << 20, []int{7, 64 << 10, 68 << 10, 128 << 10, 132 << 10, 192 << 10, 256<<10 - 1, 1 << 20, 2 << 20, 2<<20 + 64<<10, 2<<20 + 64<<10 + 8, 3 << 20, 3<<20 + 23, 4 << 20, 4<<20 + 4095}},
	}
}

// TestTiny has QEMU read the images that the other tests damage.
func TestTiny(t *testing.T) {
	oracle.Require(t, "qemu-img")
	for _, c := range tinyImages() {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "image")
			if err := os.WriteFile(path, c.image, 0o666); err != nil {
				t.Fatal(err)
			}
			readsAsQEMU(t, path, c.format)
			im := open(t, path, c.format)
			all := make([]byte, im.Size())
			if _, err := im.ReadAt(all, 0); err != nil && err != io.EOF || !bytes.HasPrefix(all[c.data:], []byte(tinyData)) {
				t.Errorf("%q, %v", all[c.data:][:100], err)
			}
			// From the middle of what is there or not to the end.
			for off := int64(0); off < im.Size(); off += im.Size() / 24 &^ 511 {
				p := make([]byte, im.Size()-off)
				if _, err := im.ReadAt(p, off); err != nil && err != io.EOF || !bytes.Equal(p, all[off:]) {
					t.Errorf("from %d on: other bytes, %v", off, err)
				}
			}
		})
	}
}

// TestVPCSize takes the size of a disk from the same field as QEMU.
func TestVPCSize(t *testing.T) {
	oracle.Require(t, "qemu-img")
	path := filepath.Join(t.TempDir(), "image")
	for _, app := range []string{"win ", "qem2", "d2v ", "CTXS", "tap\x00", "tapx", "vpc ", "qemu", "vbox"} {
		for _, geometry := range []uint32{3<<16 | 2<<8 | 4, 65535<<16 | 16<<8 | 255} {
			b := tinyVPC(false)
			put(binary.BigEndian, b, 28, app)
			put(binary.BigEndian, b, 56, geometry)
			fix(b, formats.VPC)
			if err := os.WriteFile(path, b, 0o666); err != nil {
				t.Fatal(err)
			}
			want := fmt.Sprintf(`"virtual-size": %d,`, open(t, path, formats.VPC).Size())
			if got := oracle.MustRun(t, "qemu-img", "info", "--output=json", "-f", "vpc", path); !strings.Contains(got, want) {
				t.Errorf("%q, geometry %#x: %s, qemu-img says\n%s", app, geometry, want, got)
			}
		}
	}
}

// TestVHDXChunks finds a block behind the first chunk.
func TestVHDXChunks(t *testing.T) {
	oracle.Require(t, "qemu-io")
	b := tinyVHDX()
	put(binary.LittleEndian, b, 2<<20+64<<10+16, uint64(4098<<20))
	put(binary.LittleEndian, b, 3<<20+8, uint64(0))
	put(binary.LittleEndian, b, 3<<20+8*4098, uint64(4<<20|6))
	want := bytes.Repeat([]byte{0x5a}, 4096)
	copy(b[4<<20:], want)
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, b, 0o666); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4096)
	if _, err := open(t, path, formats.VHDX).ReadAt(got, 4097<<20); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%#x..., %v", got[:4], err)
	}
	oracle.MustRun(t, "qemu-io", "-r", "-f", "vhdx", "-c", "read -P 0x5a 4097M 4k", path)
}

// readTiny opens an image, finds its data by the extents and reads it.
func readTiny(t *testing.T, b []byte, c *tiny) error {
	im, err := formats.New(t.Context(), newMemory(b), &formats.Options{Format: c.format})
	if err != nil {
		return err
	}
	defer im.Close()
	for off := int64(0); off < im.Size(); {
		e, err := im.NextExtent(off)
		if err != nil {
			return err
		}
		off += e.Len
	}
	p := make([]byte, 4096)
	if n, err := im.ReadAt(p, c.data); n < len(p) && err != io.EOF {
		return err
	}
	want := make([]byte, 4096)
	copy(want, tinyData)
	if !bytes.Equal(p, want) {
		return fmt.Errorf("other bytes: %q", p[:len(tinyData)])
	}
	return nil
}

// TestTruncated cuts images at the end of each structure, and within: an error has
// to tell, at the latest when the data is read.
func TestTruncated(t *testing.T) {
	for _, c := range tinyImages() {
		if err := readTiny(t, c.image, &c); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		for _, n := range append(c.tables, 0, 1) {
			if err := readTiny(t, c.image[:n:n], &c); !errors.Is(err, formats.ErrCorrupt) && !errors.Is(err, formats.ErrFormat) {
				t.Errorf("%s cut at %d: %v", c.name, n, err)
			}
		}
	}
}

// TestExtremes gives each field of all headers and tables extreme values.
func TestExtremes(t *testing.T) {
	values := []uint64{0, 1, 511, 1<<16 - 1, 1 << 31, 1<<32 - 1, 1 << 63, 1<<64 - 1}
	if testing.Short() {
		values = []uint64{1<<32 - 1, 1 << 63}
	}
	for _, c := range tinyImages() {
		var places []int
		for _, end := range append(c.tables, 0, 1536, 3<<20, 2<<20+64<<10) {
			for at := max(end&^511-8, 0); at < min(end+130, len(c.image)); at += 4 {
				places = append(places, at)
			}
		}
		for _, at := range places {
			for _, v := range values {
				for width := range uint8(4) {
					if width > 0 && v>>(4<<width) == 0 && v != 0 {
						continue // as with a smaller one
					}
					undo := edit(c.image, uint32(at), v, width)
					fix(c.image, c.format)
					use(t, c.image, c.format)
					undo()
				}
			}
		}
	}
}

// TestRefused names what is wrong.
func TestRefused(t *testing.T) {
	le, be := binary.LittleEndian, binary.BigEndian
	text := func(old, new string) func(b []byte) {
		return func(b []byte) { copy(b[bytes.Index(b, []byte(old)):], new) }
	}
	set := func(order binary.ByteOrder, at int, v any) func(b []byte) {
		return func(b []byte) { put(order, b, at, v) }
	}
	images := map[string][]byte{}
	format := map[string]string{}
	for _, c := range tinyImages() {
		images[c.name], format[c.name] = c.image, c.format
	}
	meta := 2<<20 + 64<<10
	for _, c := range []struct {
		image  string
		change func(b []byte)
		want   error
		text   string
	}{
		{"vmdk", text("KDMV", "COWD"), formats.ErrReference, "vmfsSparse"},
		{"vmdk", text("KDMV", "XXXX"), formats.ErrFormat, "descriptor"},
		{"vmdk", set(le, 4, uint32(4)), formats.ErrUnsupported, "version 4"},
		{"vmdk", set(le, 12, uint64(0)), formats.ErrReference, "other files"},
		{"vmdk", set(le, 12, uint64(1)<<60), formats.ErrCorrupt, "capacity"},
		{"vmdk", set(le, 20, uint64(0)), formats.ErrCorrupt, "grainSize 0"},
		{"vmdk", set(le, 20, uint64(1)<<22), formats.ErrCorrupt, "grainSize"},
		{"vmdk", set(le, 44, uint32(513)), formats.ErrCorrupt, "numGTEsPerGT 513"},
		{"vmdk", set(le, 56, uint64(1)<<40), formats.ErrCorrupt, "grain directory"},
		{"vmdk", set(le, 64, uint64(100)), formats.ErrCorrupt, "overHead 100"},
		{"vmdk", set(le, 77, uint16(2)), formats.ErrUnsupported, "compressAlgorithm 2"},
		{"vmdk", text("parentCID=ffffffff", "parentCID=12345678"), formats.ErrReference, "parentCID 12345678"},
		{"vmdk", text("RW 32 SPARSE \"tiny\"", "parentFileNameHint=\"x\"\n"), formats.ErrReference, `parent "x"`},
		{"vmdk", text("parentCID", "parentXID"), formats.ErrCorrupt, "parentCID"},
		{"vmdk", text("CID=1234abcd", "CID=qqqqqqqq"), formats.ErrCorrupt, "CID"},
		{"vmdk compressed", set(le, 7*512+12, uint32(2)), formats.ErrCorrupt, "marker"},
		{"vmdk compressed", set(le, 8*512, "KDMX"), formats.ErrCorrupt, "magicNumber"},
		{"vmdk compressed", set(le, 9*512, uint64(1)), formats.ErrCorrupt, "marker of the end"},
		{"vmdk compressed", set(le, 8*512+20, uint64(4096)), formats.ErrUnsupported, "compressed grains"},
		{"vdi", set(le, 0x40, uint32(0)), formats.ErrFormat, "signature"},
		{"vdi", set(le, 0x44, uint32(0x10000)), formats.ErrUnsupported, "version 1.0"},
		{"vdi", set(le, 0x4c, uint32(4)), formats.ErrUnsupported, "image_type 4"},
		{"vdi", set(le, 0x154, uint32(513)), formats.ErrUnsupported, "offset_bmap"},
		{"vdi", set(le, 0x158, uint32(513)), formats.ErrUnsupported, "offset_data"},
		{"vdi", set(le, 0x168, uint32(4096)), formats.ErrUnsupported, "sector_size 4096"},
		{"vdi", set(le, 0x170, uint64(3<<20+1)), formats.ErrCorrupt, "disk_size"},
		{"vdi", set(le, 0x178, uint32(1<<21)), formats.ErrUnsupported, "block_size"},
		{"vdi", set(le, 0x17c, uint32(1)), formats.ErrUnsupported, "block_extra"},
		{"vdi", set(le, 0x180, ^uint32(0)), formats.ErrCorrupt, "blocks_in_image"},
		{"vdi", set(le, 0x180, uint32(1<<28)), formats.ErrCorrupt, "block map"},
		{"vdi", set(le, 0x1a8, uint32(1)), formats.ErrReference, "parent"},
		{"vdi", set(le, 0x1c4, uint32(1)), formats.ErrReference, "parent"},
		{"vpc", set(be, 0, "x"), formats.ErrCorrupt, "beginning of the file is missing"},
		{"vpc", set(be, 60, uint32(4)), formats.ErrReference, "differencing"},
		{"vpc", set(be, 60, uint32(2)), formats.ErrCorrupt, "disk_type 2"},
		{"vpc", set(be, 16, uint64(1)<<63), formats.ErrCorrupt, "dynamic disk header"},
		{"vpc", set(be, 48, uint64(1)<<60), formats.ErrCorrupt, "current_size"},
		{"vpc", set(be, 512, "x"), formats.ErrCorrupt, "cookie"},
		{"vpc", set(be, 528, uint64(1)<<40), formats.ErrCorrupt, "block allocation table"},
		{"vpc", set(be, 540, uint32(3)), formats.ErrCorrupt, "max_table_entries 3"},
		{"vpc", set(be, 540, uint32(1<<30)), formats.ErrCorrupt, "max_table_entries"},
		{"vpc", set(be, 544, uint32(4095)), formats.ErrCorrupt, "block_size 4095"},
		{"vpc fixed", set(be, 16<<10+48, uint64(17<<10)), formats.ErrCorrupt, "current_size"},
		{"vpc fixed", set(be, 16<<10, "x"), formats.ErrFormat, "cookie"},
		{"vpc fixed", set(be, 16<<10+60, uint32(3)), formats.ErrCorrupt, "disk_type 3"},
		{"vhdx", set(le, 0, "x"), formats.ErrFormat, "signature"},
		{"vhdx", func(b []byte) { put(le, b, 64<<10, "x"); put(le, b, 128<<10, "x") }, formats.ErrCorrupt, "neither"},
		{"vhdx", set(le, 64<<10+8, uint64(1)), formats.ErrCorrupt, ""}, // two headers that are the same but for nothing
		{"vhdx", func(b []byte) { put(le, b, 64<<10+8, uint64(1), uint64(7)) }, formats.ErrCorrupt, "sequence_number 1"},
		{"vhdx", set(le, 128<<10+48, uint32(1)), formats.ErrDirty, "open it once with the program that wrote it"},
		{"vhdx", set(le, 128<<10+64, uint16(1)), formats.ErrUnsupported, "log_version 1"},
		{"vhdx", set(le, 128<<10+68, uint32(1)), formats.ErrCorrupt, "log_length"},
		{"vhdx", set(le, 128<<10+72, uint64(0)), formats.ErrCorrupt, "log_offset"},
		{"vhdx", set(le, 128<<10+72, uint64(2<<20)), formats.ErrCorrupt, "overlaps with the log"},
		{"vhdx", set(le, 192<<10, "x"), formats.ErrCorrupt, "region table"},
		{"vhdx", set(le, 192<<10+8, uint32(2048)), formats.ErrCorrupt, "entry_count 2048"},
		{"vhdx", set(le, 192<<10+8, uint32(1)), formats.ErrCorrupt, "does not name"},
		{"vhdx", set(le, 192<<10+16, uint32(1)), formats.ErrUnsupported, "region that is required"},
		{"vhdx", set(le, 192<<10+16+16, uint64(1)<<63), formats.ErrCorrupt, "file_offset"},
		{"vhdx", set(le, 192<<10+16+16, uint64(2<<20)), formats.ErrCorrupt, "overlaps"},
		{"vhdx", set(le, 192<<10+16+24, uint32(16)), formats.ErrCorrupt, "3 entries"},
		{"vhdx", func(b []byte) { copy(b[192<<10+48:], b[192<<10+16:][:16]) }, formats.ErrCorrupt, "twice"},
		{"vhdx", set(le, 2<<20, "x"), formats.ErrCorrupt, "metadata"},
		{"vhdx", set(le, 2<<20+10, uint16(2048)), formats.ErrCorrupt, "entry_count 2048"},
		{"vhdx", set(le, 2<<20+10, uint16(4)), formats.ErrCorrupt, "page 83 data is missing"},
		{"vhdx", set(le, 2<<20+32, uint32(1)), formats.ErrUnsupported, "item that is required"},
		{"vhdx", set(le, 2<<20+32+16, uint32(1<<31)), formats.ErrCorrupt, "file parameters"},
		{"vhdx", func(b []byte) { copy(b[2<<20+64:], b[2<<20+32:][:16]) }, formats.ErrCorrupt, "twice"},
		{"vhdx", set(le, 2<<20+32*5, "\x2d\x5f\xd3\xa8\x0b\xb3\x4d\x45\xab\xf7\xd3\xd8\x48\x34\xab\x0c"), formats.ErrReference, "parent locator"},
		{"vhdx", set(le, meta, uint32(3<<20)), formats.ErrCorrupt, "block_size"},
		{"vhdx", set(le, meta+4, uint32(2)), formats.ErrReference, "has_parent"},
		{"vhdx", set(le, meta+16, uint64(1)<<47), formats.ErrCorrupt, "virtual_disk_size"},
		{"vhdx", set(le, meta+16, uint64(3<<20+1)), formats.ErrCorrupt, "virtual_disk_size"},
		{"vhdx", set(le, meta+16, uint64(1)<<46), formats.ErrCorrupt, "entries"},
		{"vhdx", set(le, meta+32, uint32(4096)), formats.ErrUnsupported, "logical_sector_size 4096"},
	} {
		b := bytes.Clone(images[c.image])
		c.change(b)
		fix(b, format[c.image])
		_, err := formats.New(t.Context(), newMemory(b), &formats.Options{Format: format[c.image]})
		if c.text == "" {
			if err != nil {
				t.Errorf("%s: %v, want no error", c.image, err)
			}
			continue
		}
		if !errors.Is(err, c.want) || !strings.Contains(fmt.Sprint(err), c.text) {
			t.Errorf("%s: %v, want %v with %q", c.image, err, c.want, c.text)
		}
	}
}

// TestDamagedBlocks has entries of tables that lead nowhere, which are errors of
// reading.
func TestDamagedBlocks(t *testing.T) {
	le, be := binary.LittleEndian, binary.BigEndian
	images := map[string]tiny{}
	for _, c := range tinyImages() {
		images[c.name] = c
	}
	for _, c := range []struct {
		image string
		order binary.ByteOrder
		at    int
		value any
	}{
		{"vmdk", le, 3*512 + 4, uint32(1 << 31)}, // a grain table
		{"vmdk", le, 5 * 512, uint32(1 << 31)},   // a grain
		{"vmdk", le, 5 * 512, uint32(7)},         // reaches beyond the end
		{"vmdk compressed", le, 5 * 512, uint32(1 << 31)},
		{"vmdk compressed", le, 6*512 + 8, uint32(0)},
		{"vmdk compressed", le, 6*512 + 8, uint32(8193)},
		{"vmdk compressed", le, 6*512 + 8, uint32(20)},
		{"vmdk compressed", le, 6*512 + 12, uint16(0)},
		{"vmdk compressed", le, 6*512 + 20, uint32(0x12345)},
		{"vdi", le, 516, uint32(1)},
		{"vdi", le, 516, uint32(0xfffffffd)},
		{"vpc", be, 1536 + 8, uint32(6)},
		{"vpc", be, 1536 + 8, uint32(0xfffffffe)},
		{"vhdx", le, 3<<20 + 8, uint64(6)},         // the header
		{"vhdx", le, 3<<20 + 8, uint64(1<<20 | 6)}, // the log
		{"vhdx", le, 3<<20 + 8, uint64(2<<20 | 6)}, // the metadata
		{"vhdx", le, 3<<20 + 8, uint64(5<<20 | 6)}, // behind the end
		{"vhdx", le, 3<<20 + 8, ^uint64(1)},        // state 6
		{"vhdx", le, 3<<20 + 8, uint64(4<<20 | 7)},
		{"vhdx", le, 3<<20 + 8, uint64(4<<20 | 4)},
	} {
		tiny := images[c.image]
		b := bytes.Clone(tiny.image)
		put(c.order, b, c.at, c.value)
		if err := readTiny(t, b, &tiny); !errors.Is(err, formats.ErrCorrupt) {
			t.Errorf("%s at %#x: %#x: %v, want ErrCorrupt", c.image, c.at, c.value, err)
		}
		use(t, b, tiny.format)
	}
}

// TestReadErrors passes on what is wrong with the file.
func TestReadErrors(t *testing.T) {
	for _, c := range tinyImages() {
		for n := 0; ; n++ {
			file := &failing{Reader: newMemory(c.image), good: n}
			im, err := formats.New(t.Context(), file, &formats.Options{Format: c.format})
			if err == nil {
				_, err = im.ReadAt(make([]byte, 100), c.data)
			}
			if err == nil {
				break
			}
			if !errors.Is(err, errBroken) {
				t.Errorf("%s, read %d: %v, want %v", c.name, n, err, errBroken)
			}
			if n > 100 {
				t.Fatalf("%s: no end", c.name)
			}
		}
	}
}

var errBroken = errors.New("broken")

// failing is a file of which some reads go well.
type failing struct {
	blockdev.Reader
	good int
}

func (f *failing) ReadAt(p []byte, off int64) (int, error) {
	if f.good--; f.good < 0 {
		return 0, errBroken
	}
	return f.Reader.ReadAt(p, off)
}

package qcow2_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/oracle"
)

// device is a Reader of bytes in memory.
type device struct{ *bytes.Reader }

func memory(b []byte) device { return device{bytes.NewReader(b)} }

// follow returns the options that open other files too.
func follow() *qcow2.OpenOptions { return &qcow2.OpenOptions{Backing: qcow2.BackingFollow} }

// bytesOf reads a disk or a device.
func bytesOf(t testing.TB, dev blockdev.Reader) []byte {
	t.Helper()
	b := make([]byte, dev.Size())
	if _, err := dev.ReadAt(b, 0); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	return b
}

func open(t testing.TB, b []byte) *qcow2.Image {
	t.Helper()
	im, err := qcow2.New(memory(b), nil)
	if err != nil {
		t.Fatal(err)
	}
	return im
}

func TestTiny(t *testing.T) {
	im := open(t, qcow2.NewTiny().Bytes())
	got := make([]byte, qcow2.TinySize)
	if _, err := im.ReadAt(got, 0); err != nil || !bytes.Equal(got, qcow2.TinyGuest()) {
		t.Errorf("content differs or %v", err)
	}
	res, err := im.Check(t.Context(), nil)
	if err != nil || res.Corruptions+res.Leaks+res.CheckErrors != 0 || res.AllocatedClusters != 2 {
		t.Errorf("check: %+v %v", res, err)
	}
	// ReadAt at the end, as io.ReaderAt has it.
	if n, err := im.ReadAt(make([]byte, 1024), qcow2.TinySize-512); n != 512 || err != io.EOF {
		t.Errorf("read over the end: %d %v", n, err)
	}
	if n, err := im.ReadAt(make([]byte, 1), qcow2.TinySize); n != 0 || err != io.EOF {
		t.Errorf("read at the end: %d %v", n, err)
	}
	if _, err := im.ReadAt(make([]byte, 1), -1); !errors.Is(err, blockdev.ErrRange) {
		t.Errorf("read before the start: %v", err)
	}
	if _, err := im.NextExtent(qcow2.TinySize); !errors.Is(err, blockdev.ErrRange) {
		t.Errorf("extent at the end: %v", err)
	}
	if err := im.Close(); err != nil {
		t.Error(err)
	}
	if _, err := im.ReadAt(make([]byte, 1), 0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("read after close: %v", err)
	}
	if _, err := im.NextExtent(0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("extent after close: %v", err)
	}
	if err := im.Close(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("second close: %v", err)
	}
}

// TestRefused changes one field of a good image at a time.
func TestRefused(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(b []byte)
		want   error
		text   string // part of the message
	}{
		{"magic", func(b []byte) { b[0] = 'X' }, qcow2.ErrFormat, "magic"},
		{"version 1", func(b []byte) { b[7] = 1 }, qcow2.ErrUnsupported, "version 1"},
		{"cluster_bits", func(b []byte) { b[23] = 22 }, qcow2.ErrCorrupt, "cluster_bits 22"},
		{"crypt_method", func(b []byte) { b[35] = 3 }, qcow2.ErrUnsupported, "crypt_method 3"},
		{"l1_size", func(b []byte) { b[36] = 1 }, qcow2.ErrLimit, "l1_size"},
		{"l1_table_offset", func(b []byte) { b[40] = 0xff }, qcow2.ErrCorrupt, "l1_table_offset"},
		{"refcount_table_offset", func(b []byte) { b[55] = 1 }, qcow2.ErrCorrupt, "refcount_table_offset 0x201"},
		{"refcount_table_clusters 0", func(b []byte) { b[59] = 0 }, qcow2.ErrCorrupt, "refcount_table_clusters 0"},
		{"nb_snapshots", func(b []byte) { b[61] = 2 }, qcow2.ErrLimit, "nb_snapshots"},
		{"snapshot table beyond the file", func(b []byte) { b[63] = 1; b[70] = 0x80 }, qcow2.ErrCorrupt, "snapshot table"},
		{"incompatible bit", func(b []byte) { b[73] = 1 }, qcow2.ErrUnsupported, "bit 48"},
		{"extended L2 with small clusters", func(b []byte) { b[79] = 16 }, qcow2.ErrCorrupt, "cluster_bits 9"},
		{"compression type without bit", func(b []byte) { b[104] = 1 }, qcow2.ErrCorrupt, "compression_type 1"},
		{"compression bit without type", func(b []byte) { b[79] = 8 }, qcow2.ErrCorrupt, "compression_type 0"},
		{"compression type", func(b []byte) { b[79], b[104] = 8, 2 }, qcow2.ErrUnsupported, "compression_type 2"},
		{"raw data file without data file", func(b []byte) { b[95] = 2 }, qcow2.ErrCorrupt, "autoclear_features"},
		{"refcount_order", func(b []byte) { b[99] = 7 }, qcow2.ErrCorrupt, "refcount_order 7"},
		{"header_length", func(b []byte) { b[102] = 2; b[103] = 8 }, qcow2.ErrCorrupt, "header_length 520"},
		{"backing_file_offset", func(b []byte) { b[14] = 3 }, qcow2.ErrCorrupt, "backing_file_offset 0x300"},
		{"backing_file_size", func(b []byte) { b[14], b[15], b[18] = 1, 0xf0, 1 }, qcow2.ErrLimit, "backing_file_size 256"},
		{"data file without name", func(b []byte) { b[79] = 4 }, qcow2.ErrBacking, "external data file"},
		{"extension", func(b []byte) { b[112], b[116] = 1, 1 }, qcow2.ErrCorrupt, "extension"},
		{"backing file of a device", func(b []byte) { b[14], b[15], b[19] = 1, 0xf0, 1; b[0x1f0] = 'x' }, qcow2.ErrBacking, `"x" is relative`},
		{"protocol", func(b []byte) { b[14], b[15], b[19] = 1, 0xf0, 5; copy(b[0x1f0:], "nbd:x") }, qcow2.ErrUnsupported, `protocol "nbd"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := qcow2.NewTiny().Bytes()
			c.change(b)
			_, err := qcow2.New(memory(b), follow())
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("%v, expected %v with %q", err, c.want, c.text)
			}
		})
	}
}

// TestUnknownFeatureName: the feature name table of the image names the bit.
func TestUnknownFeatureName(t *testing.T) {
	x := qcow2.NewTiny()
	name := make([]byte, 48)
	name[1] = 9
	copy(name[2:], "time travel")
	x.Header.IncompatibleFeatures = 1 << 9
	x.Header.Extensions = []qcow2.Extension{{Type: 0x6803f857, Data: name}}
	_, err := qcow2.New(memory(x.Bytes()), nil)
	if !errors.Is(err, qcow2.ErrUnsupported) || !strings.Contains(err.Error(), `bit 9 ("time travel")`) {
		t.Error(err)
	}
}

// TestBadEntries: entries that only reading meets.
func TestBadEntries(t *testing.T) {
	for _, c := range []struct {
		name  string
		off   int
		entry uint64
		text  string
		at    int64
	}{
		{"l1 entry", qcow2.TinyL1, 0x8000000000000800 | 1<<56, "", 0}, // reserved bits do not matter
		{"zero flag in version 2", qcow2.TinyL2 + 8, 1, "l2 entry at 0x808: zero flag in a version 2 image", 0x808},
		{"garbage", qcow2.TinyL2 + 16, 1<<62 | 2560, "compressed cluster at 0xa00", 0xa00},
	} {
		t.Run(c.name, func(t *testing.T) {
			x := qcow2.NewTiny()
			x.Header.Version = 2
			x.Put(qcow2.TinyL2+8, 0)
			x.Put(c.off, c.entry)
			_, err := open(t, x.Bytes()).ReadAt(make([]byte, 2048), 0)
			if c.text == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			var bad *qcow2.FormatError
			if !errors.Is(err, qcow2.ErrCorrupt) || !errors.As(err, &bad) || bad.Off != c.at || !strings.Contains(err.Error(), c.text) {
				t.Errorf("%v, expected %q at %#x", err, c.text, c.at)
			}
		})
	}
}

// TestBadL1Entry: the error says where the entry lies, in the table of the
// snapshot too.
func TestBadL1Entry(t *testing.T) {
	const c = 1024
	x := qcow2.NewTiny() // header, two L1 tables, snapshot table
	x.Header.ClusterBits, x.Header.Size, x.Header.L1Size = 10, 4<<17, 4
	x.Header.RefcountTableOffset, x.Header.L1TableOffset = 4*c, c
	x.Header.NbSnapshots, x.Header.SnapshotsOffset = 1, 3*c
	x.Image = make([]byte, 5*c)
	x.Put(c+8*2, 4*c+512)
	x.Put(2*c+8*3, 4*c+512)
	x.Put(3*c, 2*c)
	x.Put(3*c+8, 4<<32|1<<16)
	x.Put(3*c+32, 16)
	x.Put(3*c+48, 4<<17)
	x.Image[3*c+56] = '1'
	for _, k := range []struct {
		snapshot string
		guest    int64
		off      int64
	}{{"", 2 << 17, c + 8*2}, {"1", 3 << 17, 2*c + 8*3}} {
		im, err := qcow2.New(memory(x.Bytes()), &qcow2.OpenOptions{Snapshot: k.snapshot})
		if err != nil {
			t.Fatal(err)
		}
		var bad *qcow2.FormatError
		if _, err := im.ReadAt(make([]byte, 512), k.guest); !errors.As(err, &bad) || bad.Off != k.off || bad.Struct != "l1 entry" {
			t.Errorf("snapshot %q: %v, expected it at %#x", k.snapshot, err, k.off)
		}
		if _, err := im.ReadAt(make([]byte, 512), 0); err != nil {
			t.Error(err)
		}
	}
}

// TestBackingPolicy: what is not followed is not opened, and not read as zeroes.
func TestBackingPolicy(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "top.qcow2")
	x := qcow2.NewTiny()
	x.Header.BackingFile = "base.raw"
	x.Header.Extensions = []qcow2.Extension{{Type: 0xe2792aca, Data: []byte("raw")}}
	write(t, path, x.Bytes())
	write(t, filepath.Join(dir, "base.raw"), bytes.Repeat([]byte{7}, 3000))

	for _, opts := range []*qcow2.OpenOptions{nil, {}, {Backing: qcow2.BackingRefuse}} {
		if _, err := qcow2.Open(path, opts); !errors.Is(err, qcow2.ErrBacking) {
			t.Errorf("refuse: %v", err)
		}
	}
	im, err := qcow2.Open(path, &qcow2.OpenOptions{Backing: qcow2.BackingIgnore})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := im.ReadAt(make([]byte, 512), 1536); !errors.Is(err, qcow2.ErrBacking) {
		t.Errorf("read of an ignored backing file: %v", err)
	}
	if _, err := im.NextExtent(1536); !errors.Is(err, qcow2.ErrBacking) {
		t.Errorf("extent of an ignored backing file: %v", err)
	}
	im.Close()

	im, err = qcow2.Open(path, follow())
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	got := make([]byte, 3*512)
	if _, err := im.ReadAt(got, 2048); err != nil {
		t.Fatal(err)
	}
	if want := append(bytes.Repeat([]byte{7}, 3000-2048), make([]byte, len(got)-(3000-2048))...); !bytes.Equal(got, want) {
		t.Error("the end of a short backing file is not read right")
	}
}

func TestBackingFormat(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "top.qcow2")
	x := qcow2.NewTiny()
	x.Header.BackingFile = "base"
	write(t, path, x.Bytes())
	read := func(opts *qcow2.OpenOptions) ([]byte, error) {
		im, err := qcow2.Open(path, opts)
		if err != nil {
			return nil, err
		}
		defer im.Close()
		b := make([]byte, 4)
		_, err = im.ReadAt(b, 2048)
		return b, err
	}
	base := make([]byte, 4096)
	copy(base, "KDMV")
	write(t, filepath.Join(dir, "base"), base)
	if _, err := read(follow()); !errors.Is(err, qcow2.ErrUnsupported) || !strings.Contains(err.Error(), "vmdk") {
		t.Errorf("vmdk without a format: %v", err)
	}
	opts := &qcow2.OpenOptions{Backing: qcow2.BackingFollow, OpenFormat: func(f *blockdev.File, format string) (blockdev.Reader, error) {
		return memory([]byte(strings.Repeat(format, 1024))), nil
	}}
	if b, err := read(opts); err != nil || string(b) != "vmdk" {
		t.Errorf("%q %v", b, err)
	}
	copy(base, "plain")
	copy(base[2048:], "raw!")
	write(t, filepath.Join(dir, "base"), base)
	if b, err := read(follow()); err != nil || string(b) != "raw!" {
		t.Errorf("%q %v", b, err)
	}
}

// chain writes an image for each of names, each with the next one below it, and
// calls change with the index and the image before that. It returns the folder.
func chain(t *testing.T, change func(i int, x *qcow2.Tiny), names ...string) string {
	t.Helper()
	dir := t.TempDir()
	for i, name := range names {
		x := qcow2.NewTiny()
		if i+1 < len(names) {
			x.Header.BackingFile = names[i+1]
			x.Header.Extensions = []qcow2.Extension{{Type: 0xe2792aca, Data: []byte("qcow2")}}
		}
		if change != nil {
			change(i, x)
		}
		write(t, filepath.Join(dir, name), x.Bytes())
	}
	return dir
}

// TestChainErrors: an error names the file that it is in, once.
func TestChainErrors(t *testing.T) {
	check := func(t *testing.T, err error, name, text string) {
		t.Helper()
		if want := "backing file " + name + ": qcow2: " + text; err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%v, expected %s", err, want)
		}
		if !errors.Is(err, qcow2.ErrCorrupt) {
			t.Errorf("%v does not match ErrCorrupt", err)
		}
	}
	for _, bad := range []int{1, 2} {
		names := []string{"top", "mid", "base"}
		dir := chain(t, func(i int, x *qcow2.Tiny) {
			if i == bad {
				x.Put(qcow2.TinyL2+8*5, 1<<62|qcow2.TinyData) // no deflate stream
				x.Put(qcow2.TinyL2+8*6, 1)
				x.Header.Version = 2
			}
		}, names...)
		im, err := qcow2.Open(filepath.Join(dir, "top"), follow())
		if err != nil {
			t.Fatal(err)
		}
		defer im.Close()
		name := filepath.Join(dir, names[bad])
		_, err = im.ReadAt(make([]byte, 512), 5*512)
		check(t, err, name, "compressed cluster at 0xa00: ")
		_, err = im.ReadAt(make([]byte, 512), 6*512)
		check(t, err, name, "l2 entry at 0x830: ")
		_, err = im.NextExtent(6 * 512)
		check(t, err, name, "l2 entry at 0x830: ")

		dir = chain(t, func(i int, x *qcow2.Tiny) {
			if i == bad {
				x.Header.L1TableOffset++
			}
		}, names...)
		_, err = qcow2.Open(filepath.Join(dir, "top"), follow())
		check(t, err, filepath.Join(dir, names[bad]), "header: l1_table_offset ")
	}
}

// TestProbed: a file below an image that does not name its format is read, but
// may not name further files.
func TestProbed(t *testing.T) {
	for _, c := range []struct {
		name string
		mid  func(x *qcow2.Tiny)
		want string // "": it is read
	}{
		{"backing file", func(*qcow2.Tiny) {}, `names the backing file "base", but its own format was only guessed`},
		{"data file", func(x *qcow2.Tiny) {
			x.Header.BackingFile, x.Header.IncompatibleFeatures = "", qcow2.IncompatDataFile
			x.Header.Extensions = []qcow2.Extension{{Type: 0x44415441, Data: []byte("base")}}
		}, `names the external data file "base", but its own format was only guessed`},
		{"none", func(x *qcow2.Tiny) { x.Header.BackingFile = "" }, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := chain(t, func(i int, x *qcow2.Tiny) {
				switch i {
				case 0:
					x.Header.Extensions = nil
				case 1:
					c.mid(x)
				}
			}, "top", "mid", "base")
			im, err := qcow2.Open(filepath.Join(dir, "top"), follow())
			if c.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				im.Close()
				return
			}
			if !errors.Is(err, qcow2.ErrBacking) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, expected %s", err, c.want)
			}
		})
	}
}

// closing is a reader that took over a file.
type closing struct{ *blockdev.File }

// TestOpenFormatCloses: a file that the callback took over is closed once, by
// its reader if that can be closed.
func TestOpenFormatCloses(t *testing.T) {
	for name, reader := range map[string]func(f *blockdev.File) (blockdev.Reader, error){
		"file":   func(f *blockdev.File) (blockdev.Reader, error) { return f, nil },
		"closer": func(f *blockdev.File) (blockdev.Reader, error) { return closing{f}, nil },
		"no closer": func(f *blockdev.File) (blockdev.Reader, error) {
			return blockdev.NewReaderSection(f, 512, 512)
		},
		"image": func(f *blockdev.File) (blockdev.Reader, error) { return qcow2.New(f, nil) },
		"error": func(*blockdev.File) (blockdev.Reader, error) { return nil, errors.New("no such format") },
	} {
		t.Run(name, func(t *testing.T) {
			dir := chain(t, func(i int, x *qcow2.Tiny) {
				if i == 0 {
					x.Header.Extensions[0].Data = []byte("vmdk")
				}
			}, "top", "base")
			var file *blockdev.File
			opts := follow()
			opts.OpenFormat = func(f *blockdev.File, _ string) (blockdev.Reader, error) {
				file = f
				return reader(f)
			}
			im, err := qcow2.Open(filepath.Join(dir, "top"), opts)
			if (err != nil) != (name == "error") {
				t.Fatal(err)
			}
			if err == nil {
				if _, err := file.ReadAt(make([]byte, 1), 0); err != nil {
					t.Error(err)
				}
				if err := im.Close(); err != nil {
					t.Error(err)
				}
			}
			if err := file.Close(); !errors.Is(err, os.ErrClosed) {
				t.Errorf("the file is open still: %v", err)
			}
		})
	}
}

// TestChainLimit: a chain of 201 images is refused, one of 200 is not.
func TestChainLimit(t *testing.T) {
	dir := t.TempDir()
	name := func(i int) string { return "i" + string(rune('a'+i/26)) + string(rune('a'+i%26)) }
	for i := range 201 {
		x := qcow2.NewTiny()
		if i < 200 {
			x.Header.BackingFile = name(i + 1)
			x.Header.Extensions = []qcow2.Extension{{Type: 0xe2792aca, Data: []byte("qcow2")}}
		}
		write(t, filepath.Join(dir, name(i)), x.Bytes())
	}
	if _, err := qcow2.Open(filepath.Join(dir, name(0)), follow()); !errors.Is(err, qcow2.ErrLimit) {
		t.Errorf("201 images: %v", err)
	}
	im, err := qcow2.Open(filepath.Join(dir, name(1)), follow())
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	e, err := im.NextExtent(2048)
	if err != nil || e.Kind != blockdev.Unallocated || e.Depth != 199 {
		t.Errorf("%+v %v", e, err)
	}
}

// TestConcurrent reads one image from many goroutines with a cache that is too
// small for it.
func TestConcurrent(t *testing.T) {
	dir := oracle.Input(t, "zoo")
	for _, name := range []string{"chain-4", "comp-zlib", "comp-zstd", "extl2-backing", "v3-cs512"} {
		path := filepath.Join(dir, name+".qcow2")
		im, err := qcow2.Open(path, &qcow2.OpenOptions{Backing: qcow2.BackingFollow, CacheSize: 1})
		if err != nil {
			t.Fatal(err)
		}
		defer im.Close()
		want := make([]byte, im.Size())
		if _, err := im.ReadAt(want, 0); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for seed := range uint64(16) {
			wg.Go(func() {
				r := rand.New(rand.NewPCG(seed, 0))
				buf := make([]byte, 200<<10)
				for range 60 {
					off := r.Int64N(im.Size())
					b := buf[:1+r.IntN(len(buf)-1)]
					n, err := im.ReadAt(b, off)
					if err != nil && err != io.EOF || !bytes.Equal(b[:n], want[off:off+int64(n)]) {
						t.Errorf("%s: read of %d at %d: %v", name, len(b), off, err)
						return
					}
					if _, err := im.NextExtent(off); err != nil {
						t.Errorf("%s: extent at %d: %v", name, off, err)
					}
				}
			})
		}
		wg.Wait()
	}
}

func write(t testing.TB, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
}

// FuzzOpen gives header bytes.
func FuzzOpen(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		dev := memory(b)
		var use qcow2.Use
		use.Of(func() {
			if im, err := qcow2.New(dev, &qcow2.OpenOptions{Backing: qcow2.BackingIgnore}); err == nil {
				im.Bitmaps()
				im.Close()
			}
		})
		use.Bounded(t, dev, len(b))
	})
}

// FuzzImage changes bytes of an image anywhere, reads and checks it.
func FuzzImage(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		dev := memory(b)
		var use qcow2.Use
		use.Of(func() { readAndCheck(t, dev) })
		use.Bounded(t, dev, len(b))
	})
}

// readAndCheck reads an image, up to 200 extents, and checks it.
func readAndCheck(t *testing.T, dev blockdev.Reader) {
	im, err := qcow2.New(dev, &qcow2.OpenOptions{Backing: qcow2.BackingIgnore})
	if err != nil {
		return
	}
	buf := make([]byte, 4096)
	for off, i := int64(0), 0; off < im.Size() && i < 200; i++ {
		e, err := im.NextExtent(off)
		if err != nil {
			break
		}
		if e.Off != off || e.Len < 1 || e.Len > im.Size()-off {
			t.Fatalf("bad extent %+v at %d of %d", e, off, im.Size())
		}
		n, err := im.ReadAt(buf[:min(e.Len, 4096)], off)
		if err == nil && e.Kind.ReadsZero() && len(bytes.Trim(buf[:n], "\x00")) > 0 {
			t.Fatalf("extent %+v does not read as zeroes", e)
		}
		off += e.Len
	}
	if _, err := im.Check(t.Context(), &qcow2.CheckOptions{Found: func(f qcow2.Finding) { _ = f.String() }}); err != nil && errors.Is(err, qcow2.ErrFormat) {
		t.Fatal(err)
	}
}

func seeds(f *testing.F) {
	x := qcow2.NewTiny()
	f.Add(x.Bytes())
	x.Header.AutoclearFeatures = qcow2.AutoclearBitmaps
	x.Header.Extensions = []qcow2.Extension{
		{Type: 0xe2792aca, Data: []byte("qcow2")},
		{Type: 0x23852875, Data: binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64([]byte{0, 0, 0, 1, 0, 0, 0, 0}, 32), qcow2.TinyEnd)},
		{Type: 0x12345678, Data: []byte("unknown")},
	}
	x.Header.NbSnapshots, x.Header.SnapshotsOffset = 1, qcow2.TinyL2
	f.Add(append(x.Bytes(), make([]byte, 512)...))
	x = qcow2.NewTiny()
	x.Header.Version = 2
	f.Add(x.Bytes())
	x = qcow2.NewTiny()
	x.Header.ClusterBits = 14
	x.Header.IncompatibleFeatures = qcow2.IncompatExtendedL2
	x.Header.L1TableOffset, x.Header.RefcountTableOffset = 0, 0
	f.Add(x.Bytes())
	x = qcow2.NewTiny()
	x.Header.IncompatibleFeatures = qcow2.IncompatCompression
	x.Header.CompressionType = qcow2.CompressionZstd
	copy(x.Image[qcow2.TinyPacked:], "\x28\xb5\x2f\xfd\x04\x00\x02\x10\x00x") // one RLE block of 512 bytes
	f.Add(x.Bytes())
}

// TestOwnBackingFile: an image that is its own raw backing file is a loop too.
func TestOwnBackingFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.qcow2")
	x := qcow2.NewTiny()
	x.Header.BackingFile = "x.qcow2"
	x.Header.Extensions = []qcow2.Extension{{Type: 0xe2792aca, Data: []byte("raw")}}
	write(t, path, x.Bytes())
	if _, err := qcow2.Open(path, follow()); !errors.Is(err, qcow2.ErrCorrupt) || !strings.Contains(err.Error(), "loop") {
		t.Error(err)
	}
}

// TestSubclusterContradiction: QEMU refuses to read such an entry.
func TestSubclusterContradiction(t *testing.T) {
	for _, bitmap := range []uint64{1<<33 | 2, 1 << 32} {
		const c = 16 << 10
		x := qcow2.NewTiny()
		x.Header.ClusterBits, x.Header.IncompatibleFeatures = 14, qcow2.IncompatExtendedL2
		x.Header.RefcountTableOffset, x.Header.L1TableOffset = c, 3*c
		x.Image = make([]byte, 6*c)
		x.Put(3*c, 4*c)
		x.Put(4*c, 5*c)
		x.Put(4*c+8, bitmap)
		_, err := open(t, x.Bytes()).ReadAt(make([]byte, 512), 0)
		if bad := bitmap&(bitmap>>32) != 0; bad != errors.Is(err, qcow2.ErrCorrupt) {
			t.Errorf("bitmap %#x: %v", bitmap, err)
		}
	}
}

package formats_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"qimg/cloudimg/formats"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/blocktest"
	"qimg/qcow2/blockdev/oracle"
)

// variant is a kind of image that qemu-img makes.
type variant struct{ format, options string }

func (v variant) String() string { return v.format + "," + v.options }

func variants() []variant {
	return []variant{
		{"vmdk", "subformat=monolithicSparse"}, {"vmdk", "subformat=streamOptimized"}, {"vmdk", "subformat=monolithicSparse,zeroed_grain=on"},
		{"vdi", "static=off"}, {"vdi", "static=on"},
		{"vpc", "subformat=dynamic"}, {"vpc", "subformat=fixed"}, {"vpc", "subformat=dynamic,force_size=on"}, {"vpc", "subformat=fixed,force_size=on"},
		{"vhdx", "subformat=dynamic"}, {"vhdx", "subformat=fixed"}, {"vhdx", "subformat=dynamic,block_size=1M,log_size=3M"},
		{"vhdx", "subformat=dynamic,block_size=16M,block_state_zero=off"}, {"raw", ""}, {"qcow2", ""},
	}
}

// newGuest makes a raw disk with data, zeroes that are stored, and holes.
func newGuest(t testing.TB, size int64) string {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "guest"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(uint64(size), 1))
	for range min(12, size>>12) {
		p := make([]byte, r.Int64N(min(300_000, size)))
		switch r.IntN(3) {
		case 0:
			for i := range p {
				p[i] = byte(r.Uint32())
			}
		case 1:
			for i := range p {
				p[i] = byte(i >> 7)
			}
		}
		if _, err := f.WriteAt(p, r.Int64N(size-int64(len(p)))); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.WriteAt([]byte("end"), size-3); size > 3 && err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

// convert makes an image of a guest.
func convert(t testing.TB, guest string, v variant) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	args := []string{"convert", "-f", "raw", "-O", v.format}
	if v.options != "" {
		args = append(args, "-o", v.options)
	}
	oracle.MustRun(t, "qemu-img", append(args, guest, path)...)
	return path
}

func open(t testing.TB, path, format string) *formats.Image {
	t.Helper()
	im, err := formats.Open(t.Context(), path, &formats.Options{Format: format})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { im.Close() })
	return im
}

func sizes() []int64 {
	if testing.Short() {
		return []int64{5<<20 + 1536}
	}
	return []int64{512, 5<<20 + 1536, 34<<20 - 512}
}

// TestRead reads images as QEMU does.
func TestRead(t *testing.T) {
	oracle.Require(t, "qemu-img")
	for _, size := range sizes() {
		guest := newGuest(t, size)
		for _, v := range variants() {
			t.Run(fmt.Sprint(size, v), func(t *testing.T) {
				t.Parallel()
				path := convert(t, guest, v)
				readsAsQEMU(t, path, v.format)
			})
		}
	}
}

// readsAsQEMU compares what an image reads as, and its extents, with QEMU.
func readsAsQEMU(t *testing.T, path, format string) {
	t.Helper()
	im := open(t, path, format)
	raw := filepath.Join(t.TempDir(), "raw")
	oracle.MustRun(t, "qemu-img", "convert", "-f", format, "-O", "raw", path, raw)
	want, err := os.ReadFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	if im.Size() != int64(len(want)) || im.Format() != format {
		t.Fatalf("%d bytes in format %s, want %d in %s", im.Size(), im.Format(), len(want), format)
	}
	got := make([]byte, len(want)+1)
	if n, err := im.ReadAt(got, 0); n != len(want) || err != io.EOF || !bytes.Equal(got[:n], want) {
		t.Fatalf("ReadAt: %d bytes, %v, equal %v", n, err, bytes.Equal(got[:n], want))
	}
	if len(want) >= blocktest.MinSize && len(want) <= blocktest.MaxSize {
		blocktest.TestReader(t, func(t *testing.T) blockdev.Reader { return im })
	}
	if format == "vhdx" { // of which QEMU tells no extents
		return
	}
	wantMap, gotMap := qemuMap(t, path, format), mapOf(t, im)
	if !slices.Equal(gotMap, wantMap) {
		t.Errorf("map\n%v\nwant\n%v", gotMap, wantMap)
	}
}

// extent is a line of qemu-img map.
type extent struct {
	Start, Length       int64
	Present, Zero, Data bool
	Offset              int64
}

// join joins extents that go on.
func join(list []extent) (joined []extent) {
	for _, e := range list {
		if n := len(joined); n > 0 {
			last := &joined[n-1]
			if last.Present == e.Present && last.Zero == e.Zero && (last.Offset+last.Length == e.Offset || last.Offset < 0 && e.Offset < 0) {
				last.Length += e.Length
				continue
			}
		}
		joined = append(joined, e)
	}
	return joined
}

func qemuMap(t *testing.T, path, format string) []extent {
	t.Helper()
	var lines []struct {
		extent
		Offset *int64
	}
	if err := json.Unmarshal([]byte(oracle.MustRun(t, "qemu-img", "map", "--output=json", "-f", format, path)), &lines); err != nil {
		t.Fatal(err)
	}
	var list []extent
	for _, l := range lines {
		e := l.extent
		e.Data, e.Offset = false, -1
		if l.Offset != nil {
			e.Offset = *l.Offset
		}
		list = append(list, e)
	}
	return join(list)
}

func mapOf(t *testing.T, im *formats.Image) []extent {
	t.Helper()
	var list []extent
	for off := int64(0); off < im.Size(); {
		x, err := im.NextExtent(off)
		if err != nil {
			t.Fatal(err)
		}
		e := extent{Start: off, Length: x.Len, Present: x.Kind != blockdev.Unallocated, Zero: x.Kind.ReadsZero(), Offset: -1}
		if x.Host != nil {
			e.Offset = x.HostOff
		}
		list = append(list, e)
		off += x.Len
	}
	return join(list)
}

// TestDetect finds the formats of images, and does not find that of a fixed VHD.
func TestDetect(t *testing.T) {
	oracle.Require(t, "qemu-img")
	guest := newGuest(t, 1<<20)
	for _, v := range variants() {
		want := v.format
		if v.options == "subformat=fixed" && v.format == "vpc" || v.options == "subformat=fixed,force_size=on" {
			want = "raw"
		}
		path := convert(t, guest, v)
		im := open(t, path, "")
		if im.Format() != want {
			t.Errorf("%v: %s, want %s", v, im.Format(), want)
		}
	}
}

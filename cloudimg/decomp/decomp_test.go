package decomp_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"testing"

	"qimg/cloudimg/decomp"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/blocktest"
	"qimg/qcow2/blockdev/oracle"
)

// compress runs a program on content.
func compress(t testing.TB, content []byte, program string, args ...string) []byte {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), oracle.Path(t, program), append(args, "-c")...)
	cmd.Stdin = bytes.NewReader(content)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v", program, err)
	}
	return out
}

// programs are ways to compress.
func programs() []string {
	return []string{
		"gzip -1", "gzip -9", "bzip2 -1", "bzip2 -9", "zstd -q -1", "zstd -q -19", "zstd -q --no-check", "zstd -q --long=26",
		"xz -0", "xz -6", "xz -1 --check=none", "xz -1 --check=crc32", "xz -1 --check=sha256", "xz -1 --block-size=64KiB -T2",
	}
}

func run(t testing.TB, content []byte, command string) []byte {
	words := strings.Fields(command)
	return compress(t, content, words[0], words[1:]...)
}

// disk is a disk with data and holes, of a size that is in no whole unit.
func disk() []byte {
	b := make([]byte, 300_001)
	r := rand.New(rand.NewPCG(1, 1))
	for range 12 {
		p := b[r.IntN(len(b)-20_000):][:r.IntN(20_000)]
		for i := range p {
			p[i] = byte(r.Uint32() >> (i & 7))
		}
	}
	b[len(b)-1] = 1
	return b
}

func memory(b []byte) *blockdev.Memory {
	m := blockdev.NewMemory(int64(len(b)))
	if _, err := m.WriteAt(b, 0); err != nil && len(b) > 0 {
		panic(err)
	}
	return m
}

func open(t testing.TB, b []byte, opts *decomp.Options) (*decomp.Disk, error) {
	dir := t.TempDir()
	d, err := decomp.Open(t.Context(), memory(b), dir, opts)
	list, e := os.ReadDir(dir)
	if e != nil || len(list) > 0 {
		t.Fatalf("left in the folder: %v, %v", list, e)
	}
	if err == nil {
		t.Cleanup(func() { d.Close() })
	}
	return d, err
}

func content(t testing.TB, b []byte) []byte {
	t.Helper()
	d, err := open(t, b, nil)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, d.Size())
	if n, err := d.ReadAt(got, 0); n != len(got) || err != nil && err != io.EOF {
		t.Fatalf("ReadAt: %d, %v", n, err)
	}
	return got
}

func TestPrograms(t *testing.T) {
	want := disk()
	for _, p := range programs() {
		t.Run(p, func(t *testing.T) {
			one := run(t, want, p)
			if !bytes.Equal(content(t, one), want) {
				t.Error("other content")
			}
			// Several are one after another, some of them empty.
			empty, other := run(t, nil, p), run(t, []byte("other content"), p)
			if got := content(t, slices.Concat(one, empty, other)); !bytes.Equal(got, append(slices.Clone(want), "other content"...)) {
				t.Errorf("three members: %d bytes, want %d", len(got), len(want)+13)
			}
			if got := content(t, empty); len(got) > 0 {
				t.Errorf("nothing: %d bytes", len(got))
			}
			if strings.HasPrefix(p, "xz") {
				padded := slices.Concat(one, make([]byte, 8), one, make([]byte, 4))
				if got := content(t, padded); !bytes.Equal(got, slices.Concat(want, want)) {
					t.Errorf("padded streams: %d bytes, want %d", len(got), 2*len(want))
				}
			}
		})
	}
}

func TestSuite(t *testing.T) {
	b := run(t, disk(), "xz -0")
	blocktest.TestReader(t, func(t *testing.T) blockdev.Reader {
		d, err := open(t, b, nil)
		if err != nil {
			t.Fatal(err)
		}
		return d
	})
}

// TestDamage cuts inputs, adds to them, and changes bytes.
func TestDamage(t *testing.T) {
	want := disk()[:30_000]
	for _, p := range programs() {
		t.Run(p, func(t *testing.T) {
			good := run(t, want, p)
			bad := func(b []byte, what string, at int) {
				t.Helper()
				d, err := open(t, b, nil)
				if err == nil {
					got := make([]byte, d.Size())
					d.ReadAt(got, 0)
					if !bytes.Equal(got, want) {
						t.Errorf("%s at %d: other content and no error", what, at)
					} else if what != "changed" { // of what does not matter
						t.Errorf("%s at %d: no error", what, at)
					}
				} else if !errors.Is(err, decomp.ErrCorrupt) && !errors.Is(err, decomp.ErrFormat) && !errors.Is(err, decomp.ErrUnsupported) && !errors.Is(err, decomp.ErrLimit) {
					t.Errorf("%s at %d: %v", what, at, err)
				}
			}
			n := len(good)
			for i := range 24 {
				cut := n * i / 24
				if i > 12 {
					cut = n - (24 - i) // each of the last bytes
				}
				bad(good[:cut], "cut", cut)
			}
			for _, tail := range []string{"x", "\x00", "\x00\x00\x00\x00\x00", "trailing garbage of some length", string(good[:5])} {
				bad(slices.Concat(good, []byte(tail)), "followed by something", len(tail))
			}
			if strings.Contains(p, "no-check") || strings.Contains(p, "check=none") {
				return
			}
			for i := range 30 {
				at := n * i / 30
				if i < 8 {
					at = i
				} else if i > 22 {
					at = n - (30 - i)
				}
				b := slices.Clone(good)
				b[at] ^= byte(1 << (i % 8))
				bad(b, "changed", at)
			}
		})
	}
}

// TestBombs has contents that are larger than allowed.
func TestBombs(t *testing.T) {
	zeroes := make([]byte, 8<<20)
	for _, p := range programs() {
		b := run(t, zeroes, p)
		if _, err := open(t, b, &decomp.Options{MaxSize: int64(len(zeroes)) - 1}); !errors.Is(err, decomp.ErrLimit) {
			t.Errorf("%s: %v, want ErrLimit", p, err)
		}
		d, err := open(t, b, &decomp.Options{MaxSize: int64(len(zeroes))})
		if err != nil {
			t.Errorf("%s: %v", p, err)
			continue
		}
		if e, err := d.NextExtent(0); err != nil || e.Kind != blockdev.Zero || e.Len != d.Size() || e.Host != nil {
			t.Errorf("%s: %+v, %v, want zeroes alone", p, e, err)
		}
	}
}

// TestWindows has windows and dictionaries that are larger than allowed.
func TestWindows(t *testing.T) {
	b := run(t, disk(), "zstd -q --long=27")
	if b[4]&0x20 != 0 {
		t.Fatal("a frame without a window")
	}
	b[5] = (30 - 10) << 3
	if _, err := open(t, b, nil); !errors.Is(err, decomp.ErrLimit) {
		t.Errorf("zstd: %v, want ErrLimit", err)
	}
	if _, err := open(t, declaring(1<<30, 40), nil); !errors.Is(err, decomp.ErrLimit) {
		t.Errorf("xz: %v, want ErrLimit", err)
	}
}

// declaring is an xz file with a block of 5 bytes that says it has so much content,
// and a dictionary of the size that has a number.
func declaring(size uint64, dict byte) []byte {
	header := []byte{2, 0, 0x21, 1, dict, 0, 0, 0}
	header = binary.LittleEndian.AppendUint32(header, crc32.ChecksumIEEE(header))
	const flags = "\x00\x00"
	var file []byte
	file = append(file, "\xfd7zXZ\x00"+flags...)
	file = binary.LittleEndian.AppendUint32(file, crc32.ChecksumIEEE([]byte(flags)))
	file = append(file, header...)
	file = append(file, 0, 0, 0, 0)
	index := []byte{0, 1, 13}
	index = binary.AppendUvarint(index, size)
	for len(index)%4 != 0 {
		index = append(index, 0)
	}
	file = append(file, index...)
	file = binary.LittleEndian.AppendUint32(file, crc32.ChecksumIEEE(index))
	footer := binary.LittleEndian.AppendUint32(nil, uint32(len(index)+4)/4-1)
	footer = append(footer, flags...)
	file = binary.LittleEndian.AppendUint32(file, crc32.ChecksumIEEE(footer))
	return append(append(file, footer...), "YZ"...)
}

// TestChecks has a check in xz files that does not fit.
func TestChecks(t *testing.T) {
	for _, check := range []string{"crc32", "crc64", "sha256"} {
		b := run(t, disk(), "xz -0 --check="+check)
		index := (int(binary.LittleEndian.Uint32(b[len(b)-8:])) + 1) * 4
		b[len(b)-12-index-1] ^= 1
		if _, err := open(t, b, nil); !errors.Is(err, decomp.ErrCorrupt) || !strings.Contains(err.Error(), "check of a block") {
			t.Errorf("%s: %v", check, err)
		}
	}
}

func TestFilters(t *testing.T) {
	for _, p := range []string{"xz --x86 --lzma2", "xz --delta --lzma2"} {
		if _, err := open(t, run(t, disk(), p), nil); !errors.Is(err, decomp.ErrUnsupported) {
			t.Errorf("%s: %v, want ErrUnsupported", p, err)
		}
	}
}

func TestOther(t *testing.T) {
	for _, b := range []string{"", "x", "BZh9 is the beginning of a text", "\x1f\x8b\x07", strings.Repeat("\x00", 1000)} {
		if _, err := open(t, []byte(b), nil); !errors.Is(err, decomp.ErrFormat) {
			t.Errorf("%q: %v, want ErrFormat", b, err)
		}
	}
	b := run(t, nil, "gzip")
	if _, err := open(t, b, &decomp.Options{Format: decomp.XZ}); !errors.Is(err, decomp.ErrFormat) {
		t.Errorf("gzip as xz: %v, want ErrFormat", err)
	}
	if _, err := decomp.Open(t.Context(), memory(b), "", nil); err == nil {
		t.Error("no folder: no error")
	}
}

func TestCanceled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, p := range programs() {
		if _, err := decomp.Open(ctx, memory(run(t, disk(), p)), t.TempDir(), nil); err != context.Canceled && !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v, want context.Canceled", p, err)
		}
	}
}

// TestReadError passes on what is wrong with the file of the input.
func TestReadError(t *testing.T) {
	for _, p := range programs() {
		b := run(t, disk(), p)
		_, err := decomp.Open(t.Context(), failing{memory(b)}, t.TempDir(), nil)
		if !errors.Is(err, errBroken) || errors.Is(err, decomp.ErrCorrupt) {
			t.Errorf("%s: %v, want %v", p, err, errBroken)
		}
	}
}

var errBroken = errors.New("broken")

// failing is a device with a bad second half.
type failing struct{ blockdev.Reader }

func (f failing) ReadAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > f.Size()/2 {
		return 0, errBroken
	}
	return f.Reader.ReadAt(p, off)
}

// TestSeeds has the inputs of the fuzz tests be valid.
func TestSeeds(t *testing.T) {
	for i, b := range seeds(t) {
		if len(content(t, b)) == 0 {
			t.Errorf("seed %d is empty", i)
		}
	}
}

// TestDeclared has inputs that say how much they hold: xz is held to that alone, zstd
// may have more than others by it.
func TestDeclared(t *testing.T) {
	xz := declaring(300<<30, 0)
	var size *decomp.SizeError
	if _, err := open(t, xz, nil); !errors.Is(err, decomp.ErrCorrupt) || errors.As(err, &size) {
		t.Errorf("xz: %v, want no limit, and ErrCorrupt", err)
	}
	if _, err := open(t, xz, &decomp.Options{MaxSize: 299 << 30}); !errors.As(err, &size) || size.Max != 299<<30 {
		t.Errorf("xz: %v, want a SizeError", err)
	}
	frame := func(content uint64) []byte { // of a frame with a window
		return binary.LittleEndian.AppendUint64([]byte("\x28\xb5\x2f\xfd\xc0\x50"), content)
	}
	for _, c := range []struct {
		format string
		input  []byte
		want   int64
	}{
		{decomp.Zstd, frame(300 << 30), 300 << 30},
		{decomp.Zstd, frame(1 << 20), decomp.DefaultMaxSize},
		{decomp.Zstd, frame(1 << 63), decomp.DefaultMaxSize},
		{decomp.Zstd, []byte("\x28\xb5\x2f\xfd\x00\x50"), decomp.DefaultMaxSize},
		{decomp.Zstd, []byte("\x28\xb5\x2f"), decomp.DefaultMaxSize},
		{decomp.Gzip, nil, decomp.DefaultMaxSize},
		{decomp.Bzip2, nil, decomp.DefaultMaxSize},
	} {
		if got, err := decomp.Declared(memory(c.input), c.format); got != c.want || err != nil {
			t.Errorf("%s %x: %d, %v, want %d", c.format, c.input, got, err, c.want)
		}
	}
}

// TestMemory has dictionaries and windows that are as large as can be: there is never
// a second one.
func TestMemory(t *testing.T) {
	oracle.PlainBuild(t)
	want := make([]byte, 260<<20)
	r := rand.New(rand.NewPCG(1, 1))
	for at := 0; at < len(want); at += 1 << 20 {
		for i := range 100 {
			want[at+i] = byte(r.Uint32())
		}
	}
	for _, p := range []string{"xz -0 --lzma2=preset=0,dict=64MiB --block-size=65MiB", "xz -0 --lzma2=preset=0,dict=8MiB --block-size=8MiB", "zstd -q -1 --long=26"} {
		b := run(t, want, p)
		debug.FreeOSMemory()
		before := heapTaken()
		d, err := open(t, b, nil)
		if err != nil {
			t.Fatal(err)
		}
		if taken := heapTaken() - before; taken > 90<<20 {
			t.Errorf("%s: %d MiB", p, taken>>20)
		} else {
			t.Logf("%s: %d MiB", p, taken>>20)
		}
		d.Close()
	}
}

// heapTaken is what the heap has taken from the system at most.
func heapTaken() int64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapSys - m.HeapReleased)
}

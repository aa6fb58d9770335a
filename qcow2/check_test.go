package qcow2_test

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/oracle"
)

// checkMap gives a result the form of qemu-img check --output=json.
func checkMap(r qcow2.CheckResult) map[string]any {
	m := map[string]any{
		"image-end-offset": float64(r.ImageEndOffset),
		"check-errors":     float64(r.CheckErrors),
	}
	for key, n := range map[string]int64{
		"total-clusters": r.TotalClusters, "allocated-clusters": r.AllocatedClusters, "fragmented-clusters": r.FragmentedClusters,
		"compressed-clusters": r.CompressedClusters, "corruptions": r.Corruptions, "leaks": r.Leaks,
	} {
		if n != 0 {
			m[key] = float64(n)
		}
	}
	return m
}

// checkExit is the exit status of qemu-img check.
func checkExit(r qcow2.CheckResult) int {
	switch {
	case r.Corruptions > 0:
		return 2
	case r.CheckErrors > 0:
		return 1
	case r.Leaks > 0:
		return 3
	}
	return 0
}

func TestZooCheck(t *testing.T) {
	zoo(t, func(t *testing.T, path string, want expected) {
		im, err := qcow2.Open(path, follow())
		if want.CheckRC == nil || *want.CheckRC == 1 {
			if err == nil {
				t.Fatal("opened")
			}
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		defer im.Close()
		var lines []string
		count := int64(0)
		got, err := im.Check(t.Context(), &qcow2.CheckOptions{Found: func(f qcow2.Finding) {
			lines = append(lines, f.String())
			count += f.Count
		}})
		if err != nil {
			t.Fatal(err)
		}
		delete(want.Check, "filename")
		delete(want.Check, "format")
		if d := cmp.Diff(want.Check, checkMap(got)); d != "" {
			t.Errorf("check: -qemu-img +got:\n%s", d)
		}
		if count != got.Corruptions+got.Leaks+got.CheckErrors {
			t.Errorf("%d findings, but totals %+v", count, got)
		}
		if rc := checkExit(got); rc != *want.CheckRC {
			t.Errorf("exit status %d, expected %d", rc, *want.CheckRC)
		}
		// The expectation holds the first 300 bytes of what qemu-img said.
		text := strings.Join(lines, "\n")
		if e := want.CheckError; e != nil && *e != text[:min(300, len(text))] && !strings.HasPrefix(*e, text) {
			t.Errorf("findings:\n%s\nexpected:\n%s", text, *e)
		}
	})
}

func TestCheckCancel(t *testing.T) {
	im := open(t, qcow2.NewTiny().Bytes())
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := im.Check(ctx, nil); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
}

// findingCase is an image with a finding of a kind.
type findingCase struct {
	name  string
	kind  qcow2.FindingKind
	image func() []byte
	// only tells why qemu-img does not find the same; "" if it does.
	only string
}

func findingCases() []findingCase {
	const copied, compressed = 1 << 63, 1 << 62
	tiny := func(change func(x *qcow2.Tiny)) func() []byte {
		return func() []byte {
			x := qcow2.NewTiny()
			change(x)
			return x.Bytes()
		}
	}
	put := func(off int, entry uint64) func() []byte {
		return tiny(func(x *qcow2.Tiny) { x.Put(off, entry) })
	}
	// large is an image of 16 KiB clusters with extended L2 entries: header,
	// refcount table, refcount block, L1 table, L2 table, data.
	large := func(entry, bitmap uint64) func() []byte {
		return func() []byte {
			const c = 16 << 10
			x := qcow2.NewTiny()
			x.Header.ClusterBits, x.Header.IncompatibleFeatures = 14, qcow2.IncompatExtendedL2
			x.Header.RefcountTableOffset, x.Header.L1TableOffset = c, 3*c
			x.Image = make([]byte, 6*c)
			x.Put(c, 2*c)
			for i := range 6 {
				x.Image[2*c+2*i+1] = 1
			}
			x.Put(3*c, 4*c|copied)
			x.Put(4*c, entry)
			x.Put(4*c+8, bitmap)
			return x.Bytes()
		}
	}
	// one snapshot, whose table lies in a cluster at the end.
	snapshot := func(l1 uint64, size uint32, more func(x *qcow2.Tiny)) func() []byte {
		return tiny(func(x *qcow2.Tiny) {
			x.Header.NbSnapshots, x.Header.SnapshotsOffset = 1, qcow2.TinyEnd
			x.Image = append(x.Image, make([]byte, 512)...)
			x.Put(qcow2.TinyEnd, l1)
			x.Put(qcow2.TinyEnd+8, uint64(size)<<32|1<<16|1)
			x.Put(qcow2.TinyEnd+32, 16)
			x.Put(qcow2.TinyEnd+48, qcow2.TinySize)
			copy(x.Image[qcow2.TinyEnd+56:], "1s")
			x.Image[qcow2.TinyRefblock+2*7+1] = 1
			if more != nil {
				more(x)
			}
		})
	}
	// good has a snapshot that is as it should be, with an L1 table behind the
	// snapshot table.
	good := func(change func(x *qcow2.Tiny)) func() []byte {
		return snapshot(qcow2.TinyEnd+512, 1, func(x *qcow2.Tiny) {
			x.Image = append(x.Image, make([]byte, 512)...)
			x.Put(qcow2.TinyEnd+512, qcow2.TinyL2)
			x.Image[qcow2.TinyRefblock+2*8+1] = 1
			for _, cluster := range []int{4, 5, 6} {
				x.Image[qcow2.TinyRefblock+2*cluster+1] = 2
			}
			x.Put(qcow2.TinyL1, qcow2.TinyL2)
			x.Put(qcow2.TinyL2, qcow2.TinyData)
			if change != nil {
				change(x)
			}
		})
	}
	return []findingCase{
		{"refcount too low", qcow2.RefcountTooLow, tiny(func(x *qcow2.Tiny) { x.Image[qcow2.TinyRefblock+11] = 0 }), ""},
		{"refcount too high", qcow2.RefcountTooHigh, tiny(func(x *qcow2.Tiny) { x.Image[qcow2.TinyRefblock+11] = 9 }), ""},
		{"leak", qcow2.RefcountTooHigh, put(qcow2.TinyL2, 0), ""},
		{"overflow", qcow2.RefcountOverflow, tiny(func(x *qcow2.Tiny) {
			x.Header.RefcountOrder = 0
			x.Put(qcow2.TinyRefblock, 0x7f<<56)
			x.Put(qcow2.TinyRefblock+8, 0)
			x.Put(qcow2.TinyL2+24, qcow2.TinyData|copied)
		}), ""},
		{"beyond the end", qcow2.BeyondEnd, put(qcow2.TinyL2, 1<<40|copied), ""},
		{"l1 reserved", qcow2.L1Reserved, put(qcow2.TinyL1, qcow2.TinyL2|copied|1), ""},
		{"l2 table unaligned", qcow2.L2TableUnaligned, func() []byte {
			b := large(5*16<<10|copied, 1)()
			b[3*16<<10+6] ^= 2 // the L2 table at 0x10200
			return b
		}, "qemu-img reads on at the wrong place"},
		{"l2 reserved", qcow2.L2Reserved, put(qcow2.TinyL2, qcow2.TinyData|copied|2), ""},
		{"zero flag in version 2", qcow2.ZeroFlagVersion2, tiny(func(x *qcow2.Tiny) { x.Header.Version = 2 }), "qemu-img does not look"},
		{"compressed with copied flag", qcow2.CompressedCopied, put(qcow2.TinyL2+16, qcow2.TinyPacked|compressed|copied), ""},
		{"compressed with subclusters", qcow2.CompressedSubclusters, large(5*16<<10|compressed, 1), ""},
		{"subclusters allocated and zero", qcow2.SubclustersContradict, large(5*16<<10|copied, 1<<32|1), ""},
		{"subclusters without a cluster", qcow2.SubclustersUnallocated, large(0, 1), ""},
		{"data unaligned", qcow2.DataUnaligned, large(5*16<<10|copied|0x200, 1), ""},
		{"preallocated unaligned", qcow2.PreallocatedUnaligned, large(5*16<<10|copied|0x200, 1<<32), ""},
		{"l1 copied", qcow2.L1Copied, put(qcow2.TinyL1, qcow2.TinyL2), ""},
		{"l2 copied", qcow2.L2Copied, put(qcow2.TinyL2, qcow2.TinyData), ""},
		{"snapshot l1 unaligned", qcow2.SnapshotL1Unaligned, snapshot(qcow2.TinyL1+8, 1, nil), ""},
		{"snapshot l1 too large", qcow2.SnapshotL1TooLarge, snapshot(qcow2.TinyL1, 1<<23, nil), ""},
		{"snapshot", qcow2.RefcountTooLow, snapshot(qcow2.TinyL1, 1, nil), ""},
		{"refcount table reserved", qcow2.RefcountTableReserved, put(qcow2.TinyReftable+8, 1), ""},
		{"refcount block unaligned", qcow2.RefcountBlockUnaligned, func() []byte {
			b := large(0, 0)()
			b[16<<10+6] ^= 2
			return b
		}, ""},
		{"refcount unreadable", qcow2.RefcountUnreadable, func() []byte {
			b := large(0, 0)()
			b[16<<10+6] ^= 2
			return b
		}, ""},
		{"refcount block beyond the end", qcow2.RefcountBlockBeyondEnd, put(qcow2.TinyReftable+8, 1<<40), ""},
		{"refcount block behind the end", qcow2.RefcountBlockBeyondEnd, tiny(func(x *qcow2.Tiny) {
			x.Header.Version = 2
			x.Put(qcow2.TinyReftable+8*18, 0x1000)
			x.Put(qcow2.TinyL2+8, qcow2.TinyData) // another fault, so that tables move
		}), ""},
		{"refcount block shared", qcow2.RefcountBlockShared, put(qcow2.TinyReftable+8, qcow2.TinyRefblock), ""},
		{"bitmap directory", qcow2.BitmapDirectoryBad, tiny(func(x *qcow2.Tiny) { bitmaps(x, 0) }), "qemu-img ends the check there"},
		{"bitmap table entry", qcow2.BitmapTableEntryBad, tiny(func(x *qcow2.Tiny) { bitmaps(x, 2) }), "qemu-img ends the check there"},
		{"bitmap table beyond the end", qcow2.BeyondEnd, tiny(func(x *qcow2.Tiny) {
			bitmaps(x, 1)
			x.Put(qcow2.TinyEnd+8, 1<<(32+16)|2)
		}), "qemu-img ends the check there"},
		{"bitmap tables overlap", qcow2.BitmapTableOverlap, tiny(func(x *qcow2.Tiny) {
			bitmaps(x, 1)
			x.Header.Extensions[0].Data[3], x.Header.Extensions[0].Data[15] = 4, 96
			for i := range uint64(4) {
				x.Put(qcow2.TinyEnd+24*int(i), 512*i+512)
				x.Put(qcow2.TinyEnd+24*int(i)+8, 256<<32|2)
				x.Put(qcow2.TinyEnd+24*int(i)+16, 1<<56|9<<48)
			}
		}), "qemu-img does not look"},
		{"good bitmap", 0, tiny(func(x *qcow2.Tiny) { bitmaps(x, 1) }), ""},
		{"snapshot incomplete", qcow2.SnapshotIncomplete, good(func(x *qcow2.Tiny) {
			copy(x.Image[qcow2.TinyEnd+36:], []byte{0, 0, 0, 8})
		}), ""},
		{"stale l1 copied flag", qcow2.InactiveL1Copied, good(func(x *qcow2.Tiny) {
			x.Put(qcow2.TinyEnd+512, qcow2.TinyL2|copied)
		}), ""},
		{"stale l2 copied flag", qcow2.InactiveL2Copied, good(func(x *qcow2.Tiny) {
			// The snapshot has an L2 table of its own.
			x.Put(qcow2.TinyL1, 0xe00+1024|copied)
			x.Put(qcow2.TinyEnd+512, qcow2.TinyL2)
			x.Image = append(x.Image, x.Image[qcow2.TinyL2:qcow2.TinyL2+512]...)
			x.Put(qcow2.TinyL2, qcow2.TinyData|copied)
			x.Image[qcow2.TinyRefblock+2*4+1], x.Image[qcow2.TinyRefblock+2*9+1] = 1, 1
		}), ""},
		{"overlap", qcow2.Overlap, tiny(func(x *qcow2.Tiny) {
			x.Put(qcow2.TinyL2+24, qcow2.TinyL1)
			x.Image[qcow2.TinyRefblock+2*3+1] = 2
		}), "qemu-img does not look"},
		{"overlap with wrong refcount", qcow2.Overlap, put(qcow2.TinyL2+24, qcow2.TinyL1|copied), ""},
		{"good with snapshot", 0, good(nil), ""},
		{"good", 0, tiny(func(*qcow2.Tiny) {}), ""},
		{"good with extended L2 entries", 0, large(5*16<<10|copied, 1), ""},
	}
}

// TestFindings: an image for each kind, and qemu-img's totals for it.
func TestFindings(t *testing.T) {
	for _, c := range findingCases() {
		t.Run(c.name, func(t *testing.T) {
			b := c.image()
			seen := c.kind == 0
			opts := &qcow2.CheckOptions{Stale: c.kind == qcow2.InactiveL1Copied || c.kind == qcow2.InactiveL2Copied, Found: func(f qcow2.Finding) {
				seen = seen || f.Kind == c.kind
				t.Log(f)
			}}
			res, err := open(t, b).Check(t.Context(), opts)
			if err != nil {
				t.Fatal(err)
			}
			if !seen {
				t.Errorf("not found; %+v", res)
			}
			if c.kind == 0 && checkExit(res) != 0 {
				t.Errorf("%+v for a good image", res)
			}
			if c.only == "" {
				compareCheck(t, b, res)
			}
		})
	}
}

// TestFindingKind: each kind has a name of its own, and a line without gaps.
func TestFindingKind(t *testing.T) {
	names := map[string]bool{}
	for k := qcow2.RefcountTooLow; k <= qcow2.InactiveL2Copied; k++ {
		line := qcow2.Finding{Kind: k, Text: "text"}.String()
		if s := k.String(); s == "" || strings.Contains(s, "(") || names[s] || strings.Contains(line, "%") {
			t.Errorf("kind %d: %q, %q", uint8(k), s, line)
		}
		names[k.String()] = true
	}
	for _, k := range []qcow2.FindingKind{0, qcow2.InactiveL2Copied + 1} {
		if s, line := k.String(), (qcow2.Finding{Kind: k}).String(); !strings.HasPrefix(s, "FindingKind(") || !strings.Contains(line, s) {
			t.Errorf("%q, %q", s, line)
		}
	}
}

// bitmaps adds a bitmap with a table of one entry.
func bitmaps(x *qcow2.Tiny, entry uint64) {
	x.Header.AutoclearFeatures = qcow2.AutoclearBitmaps
	ext := make([]byte, 24)
	ext[3], ext[15] = 1, 32
	binary.BigEndian.PutUint64(ext[16:], qcow2.TinyEnd)
	x.Header.Extensions = []qcow2.Extension{{Type: 0x23852875, Data: ext}}
	x.Image = append(x.Image, make([]byte, 1024)...)
	x.Image[qcow2.TinyRefblock+2*7+1], x.Image[qcow2.TinyRefblock+2*8+1] = 1, 1
	x.Put(qcow2.TinyEnd, qcow2.TinyEnd+512)
	x.Put(qcow2.TinyEnd+8, 1<<32|2)
	x.Put(qcow2.TinyEnd+16, 1<<56|9<<48|1<<32)
	x.Image[qcow2.TinyEnd+24] = 'b'
	x.Put(qcow2.TinyEnd+512, entry)
	if entry == 0 {
		x.Image[qcow2.TinyEnd+16] = 7 // type
	}
}

// compareCheck compares a result with that of qemu-img.
func compareCheck(t *testing.T, image []byte, got qcow2.CheckResult) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "i.qcow2")
	write(t, path, image)
	r := oracle.Run(t, "qemu-img", "check", "-U", "-f", "qcow2", "--output=json", path)
	want := map[string]any{}
	if err := json.Unmarshal([]byte(r.Stdout), &want); err != nil {
		t.Fatalf("qemu-img: %v\n%s", err, r.Stderr)
	}
	delete(want, "filename")
	delete(want, "format")
	if d := cmp.Diff(want, checkMap(got)); d != "" {
		t.Errorf("check: -qemu-img +got:\n%s\n%s", d, r.Stderr)
	}
}

// TestCheckLikeQEMU changes bytes of the tables at random.
func TestCheckLikeQEMU(t *testing.T) {
	oracle.Require(t, "qemu-img")
	r := rand.New(rand.NewPCG(1, 2))
	for i := range 150 {
		x := qcow2.NewTiny()
		for range 1 + r.IntN(2) {
			table := []int{qcow2.TinyRefblock, qcow2.TinyL1, qcow2.TinyL2, qcow2.TinyL2}[r.IntN(4)]
			at := table + r.IntN(8*4)
			if table == qcow2.TinyL1 {
				at = table + r.IntN(8)
			}
			x.Image[at] ^= 1 << r.IntN(8)
		}
		b := x.Bytes()
		res, err := open(t, b).Check(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		compareCheck(t, b, res)
		if t.Failed() {
			t.Fatalf("image %d", i)
		}
	}
}

// TestCheckHostile: snapshots whose L1 tables overlap, and one L2 table that
// all L1 entries name, do not make a check long.
func TestCheckHostile(t *testing.T) {
	const n = 3000
	x := qcow2.NewTiny()
	x.Header.NbSnapshots, x.Header.SnapshotsOffset = n, 1<<20
	x.Image = append(x.Image, make([]byte, 2<<20-len(x.Image))...)
	for i := range 4096 {
		x.Put(512<<10+8*i, qcow2.TinyL2)
	}
	for i := range n {
		at := 1<<20 + 56*i
		x.Put(at, uint64(512<<10+512*(i%64)))
		x.Put(at+8, uint64(64<<10-i)<<32)
		x.Put(at+32, 16)
	}
	start := time.Now()
	found := int64(0)
	_, err := open(t, x.Bytes()).Check(t.Context(), &qcow2.CheckOptions{Found: func(f qcow2.Finding) {
		if f.Kind == qcow2.SnapshotL1Overlap {
			found++
		}
	}})
	if err != nil || found != 1 {
		t.Errorf("%d findings, %v", found, err)
	}
	if d := time.Since(start); d > 20*time.Second {
		t.Errorf("took %v", d)
	}
}

// sparse is a tiny image in a device of size bytes, most of which is a hole.
func sparse(t *testing.T, size int64, change func(x *qcow2.Tiny)) *qcow2.Image {
	t.Helper()
	x := qcow2.NewTiny()
	change(x)
	dev := blockdev.NewMemory(size)
	if _, err := dev.WriteAt(x.Bytes(), 0); err != nil {
		t.Fatal(err)
	}
	im, err := qcow2.New(dev, nil)
	if err != nil {
		t.Fatal(err)
	}
	return im
}

// boundsCase is a tiny image in a large hole.
type boundsCase struct {
	name   string
	size   int64
	change func(x *qcow2.Tiny)
	want   qcow2.FindingKind
	count  int64
}

func boundsCases() []boundsCase {
	return []boundsCase{
		{"65535 bitmaps with one table", 16 << 20, func(x *qcow2.Tiny) {
			const n = 65535
			bitmaps(x, 0)
			x.Image = append(x.Image, make([]byte, 24*n)...)
			for i := range n {
				x.Put(qcow2.TinyEnd+24*i, 8<<20)
				x.Put(qcow2.TinyEnd+24*i+8, 1<<(32+20)|2)
				x.Put(qcow2.TinyEnd+24*i+16, 1<<56|9<<48)
			}
			ext := x.Header.Extensions[0].Data
			binary.BigEndian.PutUint32(ext, n)
			binary.BigEndian.PutUint64(ext[8:], 24*n)
		}, qcow2.RefcountTooLow, 3070 + 16384},
		{"2048 clusters of 64 GiB", 64 << 30, func(x *qcow2.Tiny) {
			x.Header.Size, x.Header.L1Size = 1<<20, 32
			x.Image = append(x.Image, make([]byte, 32<<10)...)
			for i := range 32 {
				x.Put(qcow2.TinyL1+8*i, uint64(8<<10+512*i))
			}
			for i := range 2048 {
				x.Put(8<<10+8*i, uint64(i+1)<<25-512)
			}
		}, qcow2.RefcountTooLow, 2048 + 32},
		{"L2 tables in a hole of 512 GiB", 512 << 30, func(x *qcow2.Tiny) {
			const c = 2 << 20
			x.Header.ClusterBits, x.Header.RefcountTableOffset = 21, c
			x.Header.L1TableOffset, x.Header.L1Size = 3*c, 256<<10
			x.Image = make([]byte, 4*c)
			for i := range 256 << 10 {
				x.Put(3*c+8*i, uint64(i)*c|1<<63)
			}
		}, qcow2.L1Copied, 256<<10 - 1},
		{"L2 tables beyond the end", 4 << 21, func(x *qcow2.Tiny) {
			const c = 2 << 20
			x.Header.ClusterBits, x.Header.RefcountTableOffset = 21, c
			x.Header.L1TableOffset, x.Header.L1Size = 3*c, 256<<10
			x.Image = make([]byte, 4*c)
			for i := range 256 << 10 {
				x.Put(3*c+8*i, uint64(i+4)*c)
			}
		}, qcow2.BeyondEnd, 256 << 10},
		{"clusters in no order", 8 << 40, func(x *qcow2.Tiny) {
			const c, tables = 64 << 10, 8
			x.Header.ClusterBits, x.Header.RefcountTableOffset = 16, c
			x.Header.L1TableOffset, x.Header.L1Size = 2*c, tables
			x.Image = make([]byte, (3+tables)*c)
			for i := range 4096 {
				x.Put(c+8*i, uint64(4096+i)*c)
			}
			for i := range tables {
				x.Put(2*c+8*i, uint64(3+i)*c)
			}
			for i := range tables * 8192 {
				x.Put(3*c+8*i, uint64(i%4096)<<31|uint64(i/4096+32)<<25)
			}
		}, qcow2.RefcountTooLow, 1 + 1 + 1 + 8 + 4096 + 8*8192},
	}
}

// TestCheckBounds: what a small file says of a large hole neither takes long
// nor much memory to check.
func TestCheckBounds(t *testing.T) {
	oracle.PlainBuild(t)
	for _, c := range boundsCases() {
		t.Run(c.name, func(t *testing.T) {
			im := sparse(t, c.size, c.change)
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			start, found := time.Now(), int64(0)
			_, err := im.Check(t.Context(), &qcow2.CheckOptions{Found: func(f qcow2.Finding) {
				if f.Kind == c.want {
					found += f.Count
				}
				if f.Kind == qcow2.BitmapTableOverlap {
					t.Error(f)
				}
			}})
			if err != nil || found != c.count {
				t.Errorf("%d findings of kind %v, expected %d; %v", found, c.want, c.count, err)
			}
			runtime.ReadMemStats(&after)
			t.Logf("%v, %d bytes", time.Since(start), after.TotalAlloc-before.TotalAlloc)
			if n := after.TotalAlloc - before.TotalAlloc; n > 64<<20 {
				t.Errorf("allocated %d bytes", n)
			}
			if d := time.Since(start); d > time.Minute {
				t.Errorf("took %v", d)
			}
		})
	}
}

// TestFindingsDataFile: the kinds that need an external data file.
func TestFindingsDataFile(t *testing.T) {
	x := qcow2.NewTiny()
	x.Header.IncompatibleFeatures = qcow2.IncompatDataFile
	x.Header.NbSnapshots, x.Header.SnapshotsOffset = 1, 1024
	im, err := qcow2.New(memory(x.Bytes()), &qcow2.OpenOptions{Backing: qcow2.BackingIgnore})
	if err != nil {
		t.Fatal(err)
	}
	seen := make(map[qcow2.FindingKind]bool)
	if _, err := im.Check(t.Context(), &qcow2.CheckOptions{Found: func(f qcow2.Finding) { seen[f.Kind] = true }}); err != nil {
		t.Fatal(err)
	}
	if !seen[qcow2.CompressedDataFile] || !seen[qcow2.SnapshotsDataFile] {
		t.Error(seen)
	}
	if _, err := im.ReadAt(make([]byte, 1), 0); !errors.Is(err, qcow2.ErrCorrupt) && !errors.Is(err, qcow2.ErrBacking) {
		t.Error(err)
	}
}

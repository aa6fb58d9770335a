package parttable_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"qimg/cloudimg/parttable"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/oracle"
)

const mib = 1 << 20

func typeOf(t testing.TB, kind parttable.Kind, name string) parttable.Type {
	t.Helper()
	typ, err := parttable.ParseType(kind, name)
	if err != nil {
		t.Fatal(err)
	}
	return typ
}

// gptSpec is a table with something of everything.
func gptSpec(t testing.TB) *parttable.Spec {
	s := &parttable.Spec{Kind: parttable.GPT, Seed: []byte("seed"), Partitions: []parttable.Partition{
		{Number: 14, Size: 3 * mib, Type: typeOf(t, parttable.GPT, "bios-boot"), Bootable: true},
		{Number: 15, Size: 5*mib + 1, Type: typeOf(t, parttable.GPT, "esp"), Name: "EFI System", Flags: 1},
		{Number: 1, Size: 16 * mib, Type: typeOf(t, parttable.GPT, "linux-root-x86-64"), Name: "größe " + strings.Repeat("𝄞", 15),
			UUID: "01234567-89ab-cdef-0123-456789abcdef"},
	}}
	if _, err := s.Place(mib, 64*mib); err != nil {
		t.Fatal(err)
	}
	return s
}

// fileDevice makes a raw file of a size and opens it.
func fileDevice(t testing.TB, size int64) *blockdev.File {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	f, err := blockdev.OpenFile(path, &blockdev.FileOptions{Write: true, NoLock: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// sfdiskTable is what sfdisk --json says.
type sfdiskTable struct {
	Label      string
	ID         string
	FirstLBA   int64
	LastLBA    int64
	Partitions []struct {
		Node, Type, UUID, Name, Attrs string
		Start, Size                   int64
		Bootable                      bool
	}
}

func sfdisk(t testing.TB, path string) *sfdiskTable {
	t.Helper()
	var out struct{ PartitionTable *sfdiskTable }
	if err := json.Unmarshal([]byte(oracle.MustRun(t, "sfdisk", "--json", path)), &out); err != nil {
		t.Fatal(err)
	}
	return out.PartitionTable
}

// checkSfdisk compares a table with what sfdisk says of the disk.
func checkSfdisk(t *testing.T, path string, table *parttable.Table) {
	t.Helper()
	want := sfdisk(t, path)
	label := map[parttable.Kind]string{parttable.GPT: "gpt", parttable.MBR: "dos"}[table.Kind]
	if label != want.Label || !strings.EqualFold(strings.TrimPrefix(want.ID, "0x"), table.ID) {
		t.Errorf("%s %s, sfdisk says %s %s", label, table.ID, want.Label, want.ID)
	}
	if len(table.Partitions) != len(want.Partitions) {
		t.Fatalf("%d partitions, sfdisk says %d", len(table.Partitions), len(want.Partitions))
	}
	for i, p := range table.Partitions {
		w := want.Partitions[i]
		typ := p.Type.String()
		if table.Kind == parttable.MBR {
			typ = fmt.Sprintf("%x", p.Type.Byte)
		} else {
			p.Bootable = false // an attribute
		}
		got := []any{fmt.Sprintf("%s%d", path, p.Number), p.Start / 512, p.Size / 512, strings.ToUpper(typ), p.Name, p.Bootable}
		say := []any{w.Node, w.Start, w.Size, strings.ToUpper(w.Type), w.Name, w.Bootable}
		if table.Kind == parttable.GPT {
			got, say = append(got, strings.ToUpper(p.UUID)), append(say, w.UUID)
		}
		if diff := cmp.Diff(say, got); diff != "" {
			t.Errorf("partition %d: (-sfdisk +parttable)\n%s", i+1, diff)
		}
	}
}

// verify has sfdisk and sgdisk look for problems.
func verify(t *testing.T, path string, gpt bool) {
	t.Helper()
	if out := oracle.MustRun(t, "sfdisk", "-V", path); !strings.Contains(out, "No errors detected") {
		t.Errorf("sfdisk -V: %s", out)
	}
	if gpt {
		if out := oracle.MustRun(t, "sgdisk", "-v", path); !strings.Contains(out, "No problems found") {
			t.Errorf("sgdisk -v: %s", out)
		}
	}
}

func TestWrite(t *testing.T) {
	oracle.Require(t, "sfdisk", "sgdisk")
	mbrSpec := &parttable.Spec{Kind: parttable.MBR, ID: "0xcafe1234", Partitions: []parttable.Partition{
		{Size: 20 * mib, Type: parttable.Type{Byte: 0x0c}, Bootable: true},
		{Number: 4, Size: mib, Type: typeOf(t, parttable.MBR, "swap")},
	}}
	if _, err := mbrSpec.Place(mib, 0); err != nil {
		t.Fatal(err)
	}
	for _, spec := range []*parttable.Spec{gptSpec(t), mbrSpec} {
		t.Run(spec.Kind.String(), func(t *testing.T) {
			dev := fileDevice(t, 64*mib)
			table, err := parttable.Write(dev, spec)
			if err != nil {
				t.Fatal(err)
			}
			checkSfdisk(t, dev.Name(), table)
			verify(t, dev.Name(), spec.Kind == parttable.GPT)
			if len(table.Findings) > 0 || table.FromBackup {
				t.Errorf("findings: %v", table.Findings)
			}
			again := blockdev.NewMemory(64 * mib)
			if _, err := parttable.Write(again, spec); err != nil {
				t.Fatal(err)
			}
			if !sameBytes(t, dev, again) {
				t.Error("the same spec made other bytes")
			}
			s := *spec
			s.Seed, s.ID = []byte("another seed"), ""
			other, err := parttable.Write(again, &s)
			if err != nil || other.ID == table.ID {
				t.Errorf("the seed does not matter: %v, %v", other, err)
			}
		})
	}
}

func sameBytes(t testing.TB, a, b blockdev.Reader) bool {
	t.Helper()
	x, err := io.ReadAll(io.NewSectionReader(a, 0, a.Size()))
	if err != nil {
		t.Fatal(err)
	}
	y, err := io.ReadAll(io.NewSectionReader(b, 0, b.Size()))
	if err != nil {
		t.Fatal(err)
	}
	return string(x) == string(y)
}

// TestReadSfdisk reads tables that sfdisk makes.
func TestReadSfdisk(t *testing.T) {
	oracle.Require(t, "sfdisk")
	for name, script := range map[string]string{
		"gpt": "label: gpt\n,10M,L\n,5M,U,*\n9:start=40960,size=2048,type=S,name=\"a b\",attrs=\"RequiredPartition GUID:60\"\n",
		"mbr": "label: dos\nlabel-id: 0x12345678\n,10M,L,*\n,40M,E\n,5M,S\n,6M,83\n,7M,8e\n,4M,L\n",
		// An extended partition in the middle, filled from the end.
		"order": "label: dos\n2:start=2048,size=65536,type=5\n5:start=40960,size=2048\n6:start=4096,size=2048\n1:start=80000,size=100,type=c\n",
		"empty": "label: dos\n",
		"none":  "label: gpt\n",
	} {
		t.Run(name, func(t *testing.T) {
			dev := fileDevice(t, 64*mib)
			cmd := exec.CommandContext(t.Context(), oracle.Path(t, "sfdisk"), "-q", "--no-tell-kernel", dev.Name()) // nor sync all of the system
			cmd.Stdin = strings.NewReader(script)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("sfdisk: %v\n%s", err, out)
			}
			table, err := parttable.Read(dev)
			if err != nil {
				t.Fatal(err)
			}
			checkSfdisk(t, dev.Name(), table)
			if len(table.Findings) > 0 {
				t.Errorf("findings: %v", table.Findings)
			}
			for _, p := range table.Partitions {
				if p.Extended {
					continue
				}
				s, err := table.Section(dev, p.Number)
				if err != nil || s.Size() != p.Size {
					t.Errorf("section of %d: %v, %v", p.Number, s, err)
				}
			}
			if _, err := table.Section(dev, 77); !errors.Is(err, parttable.ErrNoPartition) {
				t.Errorf("section of a partition that is not there: %v", err)
			}
		})
	}
}

// TestLibblkid has libblkid read tables, also with sectors of 4096 bytes.
func TestLibblkid(t *testing.T) {
	oracle.Require(t, "partx")
	for _, ss := range []int{512, 4096} {
		t.Run(fmt.Sprint(ss), func(t *testing.T) {
			spec := gptSpec(t)
			spec.SectorSize = ss
			for i := range spec.Partitions {
				spec.Partitions[i].Start, spec.Partitions[i].Size = 0, spec.Partitions[i].Size&^4095
			}
			if _, err := spec.Place(mib, 64*mib); err != nil {
				t.Fatal(err)
			}
			dev := fileDevice(t, 64*mib)
			table, err := parttable.Write(dev, spec)
			if err != nil || table.SectorSize != ss || len(table.Findings) > 0 {
				t.Fatal(table, err)
			}
			var want strings.Builder
			for _, p := range []int{1, 14, 15} {
				p, err := table.Partition(p)
				if err != nil {
					t.Fatal(err)
				}
				fmt.Fprintf(&want, "%d %d %d %s %v\n", p.Number, p.Start/512, p.Size/512, p.UUID, p.Type)
			}
			got := oracle.MustRun(t, "partx", "-S", fmt.Sprint(ss), "-g", "-r", "-o", "NR,START,SECTORS,UUID,TYPE", dev.Name())
			if diff := cmp.Diff(want.String(), got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestBackup damages each sector of the primary table, and then both.
func TestBackup(t *testing.T) {
	clean := blockdev.NewMemory(64 * mib)
	want, err := parttable.Write(clean, gptSpec(t))
	if err != nil {
		t.Fatal(err)
	}
	const untouched = 604 // behind the header
	for _, off := range []int64{512, 530, 603, untouched, 1024, 1024 + 13*128 + 40, 17*1024 - 1} {
		dev := clean.Clone()
		flip(t, dev, off)
		got, err := parttable.Read(dev)
		if err != nil || got.FromBackup != (off != untouched) || len(got.Findings) != 1 && off != untouched {
			t.Errorf("byte %d: %+v, %v", off, got, err)
			continue
		}
		if diff := cmp.Diff(want.Partitions, got.Partitions); diff != "" || got.ID != want.ID {
			t.Errorf("byte %d: %s", off, diff)
		}
		flip(t, dev, dev.Size()-512)
		if got, err := parttable.Read(dev); off != untouched && (!errors.Is(err, parttable.ErrCorrupt) || got != nil) {
			t.Errorf("byte %d and the backup: %+v, %v", off, got, err)
		}
	}
	// A disk that has grown, and one that was cut off.
	grown := clean.Clone()
	if err := grown.Truncate(100 * mib); err != nil {
		t.Fatal(err)
	}
	if got, err := parttable.Read(grown); err != nil || len(got.Findings) != 1 || !strings.Contains(got.Findings[0].Text, "not at the end") {
		t.Errorf("grown: %+v, %v", got, err)
	}
	if err := grown.Truncate(20 * mib); err != nil {
		t.Fatal(err)
	}
	if got, err := parttable.Read(grown); !errors.Is(err, parttable.ErrCorrupt) {
		t.Errorf("cut off: %+v, %v", got, err)
	}
}

func flip(t *testing.T, dev blockdev.Device, off int64) {
	t.Helper()
	b := make([]byte, 1)
	if _, err := dev.ReadAt(b, off); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 0x55
	if _, err := dev.WriteAt(b, off); err != nil {
		t.Fatal(err)
	}
}

// mbrDisk makes a disk whose boot record, and records of extended partitions by
// sector, have entries of type, start and size.
func mbrDisk(t testing.TB, records map[int64][][3]uint32) *blockdev.Memory {
	t.Helper()
	dev := blockdev.NewMemory(10000 * 512)
	for at, entries := range records {
		b := make([]byte, 512)
		for i, e := range entries {
			b[446+16*i+4] = byte(e[0])
			binary.LittleEndian.PutUint32(b[446+16*i+8:], e[1])
			binary.LittleEndian.PutUint32(b[446+16*i+12:], e[2])
		}
		b[510], b[511] = 0x55, 0xaa
		if _, err := dev.WriteAt(b, at*512); err != nil {
			t.Fatal(err)
		}
	}
	return dev
}

func TestHostileMBR(t *testing.T) {
	type entries = [][3]uint32
	for name, c := range map[string]struct {
		records  map[int64]entries
		numbers  []int
		findings []string
		refused  []int // by Section
	}{
		"overlap": {map[int64]entries{0: {{0x83, 100, 200}, {0x83, 250, 100}, {0x83, 400, 10}}}, []int{1, 2, 3},
			[]string{"partition 2: it overlaps partition 1"}, []int{1, 2}},
		"nested": {map[int64]entries{0: {{0x83, 100, 2000}, {0x83, 250, 100}, {0x83, 400, 10}}}, []int{1, 2, 3},
			[]string{"partition 2: it overlaps partition 1", "partition 3: it overlaps partition 1"}, []int{1, 2, 3}},
		"outside": {map[int64]entries{0: {{0x83, 100, 9901}, {0x83, 0xffffffff, 0xffffffff}, {0x83, 10000, 1}, {0x83, 9999, 1}}}, []int{4},
			[]string{"partition 1: sectors 100 to 10000 are not inside", "partition 2: ", "partition 3: "}, nil},
		"empty": {map[int64]entries{0: {{0x83, 100, 0}, {0x83, 0, 100}, {0, 100, 100}}}, nil,
			[]string{"partition 1: it is empty", "partition 2: it begins at sector 0"}, nil},
		"loop": {map[int64]entries{0: {{5, 100, 1000}}, 100: {{0x83, 1, 10}, {5, 50, 100}}, 150: {{0x83, 1, 10}, {5, 0, 100}}}, []int{1, 5, 6},
			[]string{"partition 1: the chain of logical partitions comes back to sector 100"}, []int{1}},
		"self": {map[int64]entries{0: {{0xf, 0, 1000}}}, nil,
			[]string{"partition 1: it begins at sector 0", "partition 1: the chain of logical partitions leads to sector 0"}, nil},
		"away": {map[int64]entries{0: {{0xf, 100, 1000}}, 100: {{0x83, 1, 1000}, {5, 1000, 10}}}, []int{1},
			[]string{"partition 5: it is not inside the extended", "partition 1: the chain of logical partitions leads to sector 1100"}, nil},
		"no record": {map[int64]entries{0: {{0xf, 100, 1000}}}, []int{1},
			[]string{"partition 1: sector 100 is no extended boot record"}, nil},
		"far": {map[int64]entries{0: {{0x85, 9000, 0xffffffff}}, 9000: {{0x83, 1, 1}, {5, 0xfffffff0, 1}}}, []int{5},
			[]string{"partition 1: sectors 9000", "partition 1: the chain of logical partitions leads to sector 4294976280"}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			dev := mbrDisk(t, c.records)
			table, err := parttable.Read(dev)
			if err != nil {
				t.Fatal(err)
			}
			var numbers []int
			for _, p := range table.Partitions {
				numbers = append(numbers, p.Number)
			}
			if diff := cmp.Diff(c.numbers, numbers); diff != "" {
				t.Error(diff)
			}
			if len(table.Findings) != len(c.findings) {
				t.Fatalf("findings: %v", table.Findings)
			}
			for i, f := range table.Findings {
				if !strings.HasPrefix(f.String(), c.findings[i]) {
					t.Errorf("finding %q, not %q", f, c.findings[i])
				}
			}
			for _, n := range c.refused {
				if _, err := table.Section(dev, n); !errors.Is(err, parttable.ErrCorrupt) {
					t.Errorf("section of %d: %v", n, err)
				}
				if _, err := table.ReaderSection(dev, n); err != nil {
					t.Errorf("reader section of %d: %v", n, err)
				}
			}
		})
	}
}

// TestLongChain: a chain of extended partitions ends after 100.
func TestLongChain(t *testing.T) {
	records := map[int64][][3]uint32{0: {{5, 100, 9000}}}
	for i := range int64(500) {
		records[100+10*i] = [][3]uint32{{0x83, 1, 1}, {5, uint32(10 * (i + 1)), 10}}
	}
	table, err := parttable.Read(mbrDisk(t, records))
	if err != nil || len(table.Partitions) != 101 || len(table.Findings) != 1 {
		t.Errorf("%d partitions, %v, %v", len(table.Partitions), table.Findings, err)
	}
}

// TestHostileGPT changes fields of a header, with right checksums.
func TestHostileGPT(t *testing.T) {
	le := binary.LittleEndian
	for name, change := range map[string]func(header, entries []byte){
		"entries":    func(h, _ []byte) { le.PutUint32(h[80:], 0xffffffff) },
		"entry size": func(h, _ []byte) { le.PutUint32(h[84:], 1<<31) },
		"array":      func(h, _ []byte) { le.PutUint64(h[72:], 1<<63) },
		"array end":  func(h, _ []byte) { le.PutUint64(h[72:], 64*mib/512-1) },
		"lba":        func(h, _ []byte) { le.PutUint64(h[24:], 2) },
		"usable":     func(h, _ []byte) { le.PutUint64(h[48:], 1<<62) },
		"size":       func(h, _ []byte) { le.PutUint32(h[12:], 4096) },
	} {
		t.Run(name, func(t *testing.T) {
			dev := changedGPT(t, change)
			flip(t, dev, dev.Size()-512)
			if table, err := parttable.Read(dev); !errors.Is(err, parttable.ErrCorrupt) {
				t.Errorf("%+v, %v", table, err)
			}
		})
	}
	// What is wrong with single entries is left out.
	dev := changedGPT(t, func(_, e []byte) {
		for i, r := range [][2]uint64{{50, 49}, {1, 100}, {100, 1 << 63}, {1 << 63, 1<<64 - 1}, {60000, 60001}, {60001, 60002}} {
			e[128*i] = 1
			le.PutUint64(e[128*i+32:], r[0])
			le.PutUint64(e[128*i+40:], r[1])
		}
	})
	table, err := parttable.Read(dev)
	if err != nil || len(table.Partitions) != 4 || len(table.Findings) != 5 {
		t.Errorf("%+v, %v", table, err)
	}
}

func changedGPT(t *testing.T, change func(header, entries []byte)) *blockdev.Memory {
	t.Helper()
	dev := blockdev.NewMemory(64 * mib)
	if _, err := parttable.Write(dev, gptSpec(t)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 33*512)
	if _, err := dev.ReadAt(b, 512); err != nil {
		t.Fatal(err)
	}
	h, e := b[:512], b[512:]
	change(h, e)
	binary.LittleEndian.PutUint32(h[88:], crc32.ChecksumIEEE(e))
	clear(h[16:20])
	binary.LittleEndian.PutUint32(h[16:], crc32.ChecksumIEEE(h[:92]))
	if _, err := dev.WriteAt(b, 512); err != nil {
		t.Fatal(err)
	}
	return dev
}

// TestNoTable: disks that have none.
func TestNoTable(t *testing.T) {
	fat := make([]byte, 1<<20)
	copy(fat, "\xeb\x3c\x90mkfs.fat")
	copy(fat[54:], "FAT16   ")
	fat[510], fat[511] = 0x55, 0xaa
	for name, b := range map[string][]byte{"empty": nil, "short": make([]byte, 511), "zeroes": make([]byte, 1<<20), "fat": fat} {
		dev := blockdev.NewMemory(int64(len(b)))
		if _, err := dev.WriteAt(b, 0); err != nil {
			t.Fatal(err)
		}
		if table, err := parttable.Read(dev); !errors.Is(err, parttable.ErrNoTable) {
			t.Errorf("%s: %+v, %v", name, table, err)
		}
	}
}

func TestWriteRefuses(t *testing.T) {
	for name, change := range map[string]func(s *parttable.Spec){
		"overlap":   func(s *parttable.Spec) { s.Partitions[1].Start -= 512 },
		"outside":   func(s *parttable.Spec) { s.Partitions[2].Size = 64 * mib },
		"backup":    func(s *parttable.Spec) { s.Partitions[2].Start = 64*mib - 32*512; s.Partitions[2].Size = 512 },
		"table":     func(s *parttable.Spec) { s.Partitions[0].Start = 33 * 512 },
		"empty":     func(s *parttable.Spec) { s.Partitions[0].Size = 0 },
		"sectors":   func(s *parttable.Spec) { s.Partitions[0].Size = 100 },
		"twice":     func(s *parttable.Spec) { s.Partitions[0].Number = 15 },
		"number":    func(s *parttable.Spec) { s.Partitions[0].Number = 129 },
		"type":      func(s *parttable.Spec) { s.Partitions[0].Type = parttable.Type{Byte: 0x83} },
		"label":     func(s *parttable.Spec) { s.Partitions[0].Name = strings.Repeat("𝄞", 19) },
		"guid":      func(s *parttable.Spec) { s.Partitions[0].UUID = s.Partitions[2].UUID },
		"id":        func(s *parttable.Spec) { s.ID = "1234" },
		"mbr":       func(s *parttable.Spec) { s.Kind = parttable.MBR },
		"kind":      func(s *parttable.Spec) { s.Kind = 0 },
		"4096":      func(s *parttable.Spec) { s.SectorSize = 4096 },
		"bad guid":  func(s *parttable.Spec) { s.Partitions[0].UUID = "x" },
		"zero byte": func(s *parttable.Spec) { s.Partitions[0].Name = "a\x00b" },
	} {
		spec := gptSpec(t)
		change(spec)
		dev := blockdev.NewMemory(64 * mib)
		if table, err := parttable.Write(dev, spec); err == nil {
			t.Errorf("%s: %+v", name, table)
		}
		if e, err := dev.NextExtent(0); err != nil || e.Len != dev.Size() || !e.Kind.ReadsZero() {
			t.Errorf("%s: something was written: %+v, %v", name, e, err)
		}
	}
}

// TestDisk reads a disk that is put together.
func TestDisk(t *testing.T) {
	spec := gptSpec(t)
	rng := rand.NewChaCha8([32]byte{1})
	want := make([]byte, 64*mib)
	content := make([]blockdev.Reader, 3)
	for i, n := range []int64{0, 3*mib + 700, 16 * mib} {
		if n == 0 {
			continue
		}
		m := blockdev.NewMemory(n)
		b := make([]byte, 100000)
		rng.Read(b)
		if _, err := m.WriteAt(b, n-int64(len(b))); err != nil {
			t.Fatal(err)
		}
		copy(want[spec.Partitions[i].Start+n-int64(len(b)):], b)
		content[i] = m
	}
	d, err := parttable.NewDisk(64*mib, spec, content)
	if err != nil {
		t.Fatal(err)
	}
	table, err := parttable.Read(d)
	if err != nil || len(table.Partitions) != 3 {
		t.Fatal(table, err)
	}
	got := make([]byte, 64*mib+1)
	if n, err := d.ReadAt(got, 0); n != 64*mib || err != io.EOF {
		t.Fatal(n, err)
	}
	copy(want, got[:mib])
	copy(want[len(want)-mib:], got[len(want)-mib:])
	if string(want) != string(got[:64*mib]) {
		t.Error("the disk reads otherwise")
	}
	for _, p := range spec.Partitions {
		for off := p.Start - 2; off < p.Start+2; off++ {
			b := make([]byte, 1)
			if _, err := d.ReadAt(b, off); err != nil || b[0] != want[off] {
				t.Errorf("byte %d: %v", off, err)
			}
		}
	}
	for off := int64(0); off < d.Size(); {
		e, err := d.NextExtent(off)
		if err != nil || e.Off != off || e.Len <= 0 || off+e.Len > d.Size() {
			t.Fatal(e, err)
		}
		if e.Kind.ReadsZero() && strings.Trim(string(want[off:off+e.Len]), "\x00") != "" {
			t.Errorf("%+v is not zeroes", e)
		}
		off += e.Len
	}
	if _, err := parttable.NewDisk(64*mib, spec, []blockdev.Reader{blockdev.NewMemory(4 * mib), nil, nil}); err == nil {
		t.Error("content that is too long is taken")
	}
}

// TestTypes: names, GUIDs and bytes.
func TestTypes(t *testing.T) {
	for _, kind := range []parttable.Kind{parttable.GPT, parttable.MBR} {
		for name := range parttable.TypeNames(kind) {
			typ, err := parttable.ParseType(kind, strings.ToUpper(name))
			if err != nil {
				t.Error(err)
			}
			again, err := parttable.ParseType(kind, typ.String())
			if err != nil || again != typ {
				t.Errorf("%s: %v, %v", name, again, err)
			}
			if n := typ.Name(); n != name && kind == parttable.GPT {
				t.Errorf("the name of %s is %s", name, n)
			}
		}
	}
	for kind, list := range map[parttable.Kind][]string{
		parttable.GPT: {"", "83", "fat32", "linux2", "00000000-0000-0000-0000-000000000000"},
		parttable.MBR: {"", "0", "100", "bios-boot", "0fc63daf-8483-4772-8e79-3d69d8477de4"},
	} {
		for _, s := range list {
			if typ, err := parttable.ParseType(kind, s); err == nil {
				t.Errorf("%v type %q: %v", kind, s, typ)
			}
		}
	}
}

func FuzzTable(f *testing.F) {
	const head, tail = 40 * 512, 33 * 512
	seed := func(dev blockdev.Reader) {
		b := make([]byte, head+tail)
		if _, err := dev.ReadAt(b[:head], 0); err != nil {
			f.Fatal(err)
		}
		if _, err := dev.ReadAt(b[head:], dev.Size()-tail); err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	dev := blockdev.NewMemory(64 * mib)
	if _, err := parttable.Write(dev, gptSpec(f)); err != nil {
		f.Fatal(err)
	}
	seed(dev)
	seed(mbrDisk(f, map[int64][][3]uint32{0: {{5, 10, 1000}, {0x83, 2000, 10}}, 10: {{0x83, 1, 1}, {5, 5, 100}}, 15: {{0x83, 1, 1}, {5, 10, 5}}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		dev := blockdev.NewMemory(64 * mib)
		if len(b) > 34*512 { // right checksums, so that what is behind them is looked at
			b = bytes.Clone(b)
			h, e := b[512:1024], b[1024:34*512]
			binary.LittleEndian.PutUint32(h[88:], crc32.ChecksumIEEE(e))
			clear(h[16:20])
			binary.LittleEndian.PutUint32(h[16:], crc32.ChecksumIEEE(h[:92]))
		}
		dev.WriteAt(b[:min(len(b), head)], 0)
		if len(b) > head {
			dev.WriteAt(b[head:min(len(b), head+tail)], dev.Size()-tail)
		}
		table, err := parttable.Read(dev)
		if err != nil {
			if !errors.Is(err, parttable.ErrNoTable) && !errors.Is(err, parttable.ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		last := 0
		for _, p := range table.Partitions {
			if p.Number <= last || p.Start <= 0 || p.Size <= 0 || p.End() > dev.Size() {
				t.Fatalf("%+v", p)
			}
			last = p.Number
			if _, err := table.Section(dev, p.Number); err != nil && !errors.Is(err, parttable.ErrCorrupt) {
				t.Fatal(err)
			}
		}
		again, err := parttable.Read(dev)
		if diff := cmp.Diff(table, again, cmpopts.IgnoreUnexported(parttable.Table{})); err != nil || diff != "" {
			t.Fatal(diff, err)
		}
	})
}

package parttable_test

import (
	"errors"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"qimg/cloudimg/parttable"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/blocktest"
	"qimg/qcow2/blockdev/oracle"
)

// resizeSpec is gptSpec, or an MBR, with sectors of a size.
func resizeSpec(t testing.TB, kind parttable.Kind, ss int) *parttable.Spec {
	if kind == parttable.GPT {
		s := gptSpec(t)
		s.SectorSize = ss
		for i := range s.Partitions {
			s.Partitions[i].Start, s.Partitions[i].Size = 0, s.Partitions[i].Size&^4095
		}
		if _, err := s.Place(mib, 64*mib); err != nil {
			t.Fatal(err)
		}
		return s
	}
	s := &parttable.Spec{Kind: parttable.MBR, ID: "0xcafe1234", Partitions: []parttable.Partition{
		{Number: 3, Size: 2 * mib, Type: parttable.Type{Byte: 0x0c}, Bootable: true},
		{Number: 1, Size: 20 * mib, Type: typeOf(t, parttable.MBR, "linux")},
	}}
	if _, err := s.Place(mib, 0); err != nil {
		t.Fatal(err)
	}
	return s
}

// TestResize gives the last partition another end, on disks that grow and
// shrink. A crash leaves the old table or the new one.
func TestResize(t *testing.T) {
	for _, c := range []struct {
		name string
		kind parttable.Kind
		ss   int
		size int64 // of the disk, then
		end  int64
	}{
		{"gpt-grow", parttable.GPT, 512, 100 * mib, 99 * mib},
		{"gpt-shrink", parttable.GPT, 512, 20 * mib, 19 * mib},
		{"gpt-4k", parttable.GPT, 4096, 100 * mib, 99 * mib},
		{"gpt-same", parttable.GPT, 512, 64 * mib, 60 * mib},
		{"mbr", parttable.MBR, 512, 100 * mib, 100 * mib},
	} {
		t.Run(c.name, func(t *testing.T) {
			disk := blockdev.NewMemory(64 * mib)
			if _, err := parttable.Write(disk, resizeSpec(t, c.kind, c.ss)); err != nil {
				t.Fatal(err)
			}
			if err := disk.Truncate(max(c.size, 64*mib)); err != nil {
				t.Fatal(err)
			}
			old, err := parttable.Read(disk)
			if err != nil {
				t.Fatal(err)
			}
			want := append([]parttable.Partition(nil), old.Partitions...)
			want[0].Size = c.end - want[0].Start // the last one of the disk is number 1
			rec, err := blocktest.NewRecorder(disk)
			if err != nil {
				t.Fatal(err)
			}
			if err := parttable.Resize(rec, c.size, 1, c.end); err != nil {
				t.Fatal(err)
			}
			states := [2]int{}
			for s, err := range rec.CrashStates(nil) {
				if err != nil {
					t.Fatal(err)
				}
				got, err := parttable.Read(s.Dev())
				if err != nil {
					t.Fatalf("%v\n%v", err, s)
				}
				switch {
				case cmp.Equal(got.Partitions, old.Partitions):
					states[0]++
				case cmp.Equal(got.Partitions, want):
					states[1]++
				default:
					t.Fatalf("%v\n%v", got.Partitions, s)
				}
			}
			if states[0] == 0 || states[1] == 0 {
				t.Errorf("%d states with the old table, %d with the new one", states[0], states[1])
			}
			if err := disk.Truncate(c.size); err != nil {
				t.Fatal(err)
			}
			got, err := parttable.Read(disk)
			if err != nil || len(got.Findings) > 0 || got.ID != old.ID || got.Kind != old.Kind {
				t.Fatalf("%+v, %v", got, err)
			}
			if diff := cmp.Diff(want, got.Partitions, cmpopts.EquateEmpty()); diff != "" {
				t.Error(diff)
			}
			if c.ss != 512 {
				return
			}
			oracle.Require(t, "sfdisk", "sgdisk")
			file := fileDevice(t, c.size)
			b := make([]byte, c.size)
			if _, err := disk.ReadAt(b, 0); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file.Name(), b, 0o600); err != nil {
				t.Fatal(err)
			}
			checkSfdisk(t, file.Name(), got)
			verify(t, file.Name(), c.kind == parttable.GPT)
		})
	}
}

// TestResizeRefused tries what cannot be done.
func TestResizeRefused(t *testing.T) {
	gpt, mbr := blockdev.NewMemory(64*mib), blockdev.NewMemory(64*mib)
	if _, err := parttable.Write(gpt, resizeSpec(t, parttable.GPT, 512)); err != nil {
		t.Fatal(err)
	}
	if _, err := parttable.Write(mbr, resizeSpec(t, parttable.MBR, 512)); err != nil {
		t.Fatal(err)
	}
	damaged := gpt.Clone()
	flip(t, damaged, 600)
	extended := mbrDisk(t, map[int64][][3]uint32{0: {{5, 100, 5000}}, 100: {{0x83, 1, 100}}})
	for name, c := range map[string]struct {
		dev       blockdev.Device
		size, end int64
		number    int
		is        error
	}{
		"no table":     {blockdev.NewMemory(mib), mib, mib, 1, parttable.ErrNoTable},
		"no partition": {gpt, 64 * mib, 60 * mib, 2, parttable.ErrNoPartition},
		"not last":     {gpt, 64 * mib, 5 * mib, 14, nil},
		"backup":       {gpt, 64 * mib, 64*mib - 32*512, 1, nil},
		"empty":        {gpt, 64 * mib, 5 * mib, 1, nil},
		"odd":          {gpt, 64 * mib, 60*mib + 1, 1, nil},
		"damaged":      {damaged, 64 * mib, 60 * mib, 1, parttable.ErrCorrupt},
		"2 TiB":        {mbr, 3 << 40, 3 << 40, 1, nil},
		"extended":     {extended, 5000 * 512, 4000 * 512, 1, nil},
		"logical":      {extended, 5000 * 512, 4000 * 512, 5, nil},
	} {
		err := parttable.CheckResize(c.dev, c.size, c.number, c.end)
		if err == nil || c.is != nil && !errors.Is(err, c.is) {
			t.Errorf("%s: %v", name, err)
		}
		if again := parttable.Resize(c.dev, c.size, c.number, c.end); again == nil || again.Error() != err.Error() {
			t.Errorf("%s: %v, and then %v", name, err, again)
		}
	}
}

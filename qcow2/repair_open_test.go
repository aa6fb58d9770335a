package qcow2_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/oracle"
)

// TestRepairDirty: an image with the dirty bit is repaired when it is opened
// for writing.
func TestRepairDirty(t *testing.T) {
	oracle.Require(t, "qemu-img")
	b, err := os.ReadFile(filepath.Join(oracle.Input(t, "zoo"), "lazy-dirty.qcow2"))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "x")
	write(t, path, b)
	guest := guestOf(disk(t, b))
	im, err := qcow2.Open(path, &qcow2.OpenOptions{Write: true})
	if err != nil {
		t.Fatal(err)
	}
	if res, err := im.Check(t.Context(), nil); err != nil || checkExit(res) != 0 {
		t.Errorf("%+v, %v", res, err)
	}
	p := bytes.Repeat([]byte("x"), 1000)
	if _, err := im.WriteAt(p, 1000); err != nil {
		t.Fatal(err)
	}
	copy(guest[1000:], p)
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	if after := runQEMUCheck(t, path); after.code != 0 {
		t.Errorf("%+v", after)
	}
	if b, err = os.ReadFile(path); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(guest, guestOf(disk(t, b))) {
		t.Error("the guest reads something else")
	}
	// What cannot be repaired is not written to.
	x := qcow2.NewTiny()
	x.Header.IncompatibleFeatures = qcow2.IncompatDirty
	x.Put(qcow2.TinyL2, 1<<40|1<<63)
	if _, err := qcow2.New(disk(t, x.Bytes()), &qcow2.OpenOptions{Write: true}); !errors.Is(err, qcow2.ErrCorrupt) || !strings.Contains(err.Error(), "dirty bit") {
		t.Error(err)
	}
}

// TestRepairCorruptBit: the corrupt bit goes away when nothing is wrong any
// more, and stays otherwise.
func TestRepairCorruptBit(t *testing.T) {
	for _, c := range []struct {
		name  string
		put   uint64
		leaks bool
		stays bool
	}{
		{"good", qcow2.TinyData | 1<<63, false, false},
		{"good, leaks", qcow2.TinyData | 1<<63, true, false},
		{"copied flag", qcow2.TinyData, false, false},
		{"leak", 0, true, false},
		{"beyond the end", 1 << 40, false, true},
	} {
		x := qcow2.NewTiny()
		x.Header.IncompatibleFeatures = qcow2.IncompatCorrupt | qcow2.IncompatDirty
		x.Header.AutoclearFeatures = 1 << 9
		x.Put(qcow2.TinyL2, c.put)
		dev := disk(t, x.Bytes())
		res := repair(t, dev, &qcow2.RepairOptions{Leaks: c.leaks})
		b := bytesOf(t, dev)
		if bits := binary.BigEndian.Uint64(b[72:]); (bits != 0) != c.stays || res.Plan.ClearCorrupt == c.stays {
			t.Errorf("%s: incompatible features %#x\n%v", c.name, bits, &res.Plan)
		}
		if bits := binary.BigEndian.Uint64(b[88:]); bits != 0 && !res.Plan.Empty() {
			t.Errorf("%s: unknown autoclear features %#x", c.name, bits)
		}
	}
}

// snapshotTable is a tiny image with the snapshot table b, which says that it
// has n entries.
func snapshotTable(n uint32, b []byte) []byte {
	x := qcow2.NewTiny()
	x.Header.SnapshotsOffset = qcow2.TinyEnd
	x.Image = append(x.Image, b...)
	x.Image = append(x.Image, make([]byte, -len(x.Image)&511)...)
	for c := qcow2.TinyEnd / 512; c < len(x.Image)/512; c++ {
		x.Image[qcow2.TinyRefblock+2*c+1] = 1
	}
	image := x.Bytes()
	binary.BigEndian.PutUint32(image[60:], n)
	return image
}

// TestRepairSnapshotTable: what is over the limits is dropped, as qemu-img does.
func TestRepairSnapshotTable(t *testing.T) {
	oracle.Require(t, "qemu-img")
	// An entry without an L1 table, with an id and extra data.
	entry := func(id string, extra int) []byte {
		b := make([]byte, 40+extra)
		b[13] = byte(len(id))
		binary.BigEndian.PutUint32(b[36:], uint32(extra))
		for i := 56; i < len(b); i++ {
			b[i] = byte(i)
		}
		b = append(b, id...)
		return append(b, make([]byte, -len(b)&7)...)
	}
	two := append(entry("1", 24), entry("2", 24)...)
	long := append(append(entry("1", 24), entry("2", 3000)...), entry("3", 32)...)
	huge := bytes.Clone(two)
	binary.BigEndian.PutUint32(huge[len(two)/2+36:], 0xfffffff0)
	many := bytes.Repeat(entry("s", 16), 65537)
	for _, c := range []struct {
		name  string
		image []byte
		kind  qcow2.FindingKind
		count int64
		ids   string
	}{
		{"extra data", snapshotTable(3, long), qcow2.SnapshotExtraData, 1, "123"},
		{"huge extra data", snapshotTable(2, huge), qcow2.SnapshotsTooMany, 1, "1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dev := disk(t, c.image)
			if _, err := qcow2.New(dev, nil); err == nil {
				t.Error("opened")
			}
			guest, count := qcow2.TinyGuest(), int64(0)
			if _, err := qcow2.Repair(t.Context(), dev, &qcow2.RepairOptions{Leaks: true}); err == nil {
				t.Error("leaks can be repaired")
			}
			res := repair(t, dev, &qcow2.RepairOptions{Found: func(f qcow2.Finding) {
				if f.Kind == c.kind && f.Repaired {
					count += f.Count
				}
			}})
			if count != c.count || !res.Clean() {
				t.Errorf("%d findings, %+v", count, res)
			}
			sameGuest(t, guest, guestOf(dev))
			im, err := qcow2.New(dev, nil)
			if err != nil {
				t.Fatal(err)
			}
			ids := ""
			for _, s := range im.Snapshots() {
				ids += s.ID
			}
			if ids != c.ids {
				t.Errorf("snapshots %q, expected %q", ids, c.ids)
			}
			ours, theirs := filepath.Join(t.TempDir(), "ours"), filepath.Join(t.TempDir(), "theirs")
			write(t, ours, bytesOf(t, dev))
			write(t, theirs, c.image)
			after, want := runQEMUCheck(t, ours), runQEMUCheck(t, theirs, "-r", "all")
			if after.code != 0 || want.code != 0 || want.CorruptionsFixed != res.CorruptionsFixed || want.LeaksFixed != res.LeaksFixed {
				t.Errorf("%+v, exit %d; qemu-img: %+v", res, after.code, want)
			}
			if a, b := oracle.MustRun(t, "qemu-img", "snapshot", "-l", ours), oracle.MustRun(t, "qemu-img", "snapshot", "-l", theirs); a != b {
				t.Errorf("snapshots\n%s, qemu-img:\n%s", a, b)
			}
		})
	}
	// One more than there may be: in clusters of 64 KiB.
	const cs = 64 << 10
	x := qcow2.NewTiny()
	x.Header.ClusterBits, x.Header.RefcountTableOffset, x.Header.L1TableOffset, x.Header.L1Size = 16, cs, 3*cs, 1
	x.Header.SnapshotsOffset = 4 * cs
	x.Image = append(make([]byte, 4*cs), many...)
	x.Put(cs, 2*cs)
	for c := range len(x.Image)/cs + 1 {
		x.Image[2*cs+2*c+1] = 1
	}
	b := x.Bytes()
	binary.BigEndian.PutUint32(b[60:], 65537)
	dev := disk(t, b)
	if res := repair(t, dev, nil); !res.Clean() || res.CorruptionsFixed != 1 || res.Plan.Snapshots != 65536 {
		t.Errorf("%+v", res)
	}
	if im, err := qcow2.New(dev, nil); err != nil || len(im.Snapshots()) != 65536 {
		t.Error(err)
	}
}

// TestRepairBounds: nor to repair.
func TestRepairBounds(t *testing.T) {
	oracle.PlainBuild(t)
	for _, c := range boundsCases() {
		t.Run(c.name, func(t *testing.T) {
			x := qcow2.NewTiny()
			c.change(x)
			dev := blockdev.NewMemory(c.size)
			if _, err := dev.WriteAt(x.Bytes(), 0); err != nil {
				t.Fatal(err)
			}
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			start := time.Now()
			res, err := qcow2.Repair(t.Context(), dev, nil)
			runtime.ReadMemStats(&after)
			n := after.TotalAlloc - before.TotalAlloc
			t.Logf("%v, %d bytes, %d clusters raised, %v", time.Since(start), n, res.Plan.Raised, err)
			if n > 512<<20 { // all that was allocated, what the device keeps too
				t.Errorf("allocated %d bytes", n)
			}
			if d := time.Since(start); d > time.Minute {
				t.Errorf("took %v", d)
			}
		})
	}
}

// TestRepairLeaks: with Leaks the same is repaired as by qemu-img.
func TestRepairLeaks(t *testing.T) {
	oracle.Require(t, "qemu-img")
	for _, c := range findingCases() {
		if c.only != "" || repairDiffers[c.name] != "" {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			b := c.image()
			dev := disk(t, b)
			guest := guestOf(dev)
			path := filepath.Join(t.TempDir(), "x")
			write(t, path, b)
			want := runQEMUCheck(t, path, "-r", "leaks")
			res, err := qcow2.Repair(t.Context(), dev, &qcow2.RepairOptions{Leaks: true})
			if errors.Is(err, qcow2.ErrRebuild) && want.code == 1 {
				return
			}
			sameGuest(t, guest, guestOf(dev))
			write(t, path, bytesOf(t, dev))
			after := runQEMUCheck(t, path)
			if err != nil || after.code != want.code || res.LeaksFixed != want.LeaksFixed || res.CorruptionsFixed != want.CorruptionsFixed {
				t.Errorf("%+v, %v, exit %d; qemu-img: %+v", res, err, after.code, want)
			}
		})
	}
}

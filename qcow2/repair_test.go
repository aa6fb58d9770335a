package qcow2_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/oracle"
)

// repair repairs an image in memory.
func repair(t *testing.T, dev blockdev.Device, opts *qcow2.RepairOptions) qcow2.RepairResult {
	t.Helper()
	res, err := qcow2.Repair(context.Background(), dev, opts)
	if err != nil {
		t.Fatalf("repair: %v", err)
	}
	return res
}

// disk is a device in memory that holds b.
func disk(t testing.TB, b []byte) *blockdev.Memory {
	t.Helper()
	dev := blockdev.NewMemory(int64(len(b)))
	if _, err := dev.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return dev
}

// guestOf reads an image, up to 1 MiB; nil if it cannot be opened.
func guestOf(dev blockdev.Reader) []byte {
	im, err := qcow2.New(dev, &qcow2.OpenOptions{Backing: qcow2.BackingIgnore})
	if err != nil {
		return nil
	}
	defer im.Close()
	b := make([]byte, min(im.Size(), 1<<20))
	for at := 0; at < len(b); at += 512 {
		if _, err := im.ReadAt(b[at:at+512], int64(at)); err != nil && err != io.EOF {
			copy(b[at:], "cannot be read")
		}
	}
	return b
}

// qemuCheck is what qemu-img check says.
type qemuCheck struct {
	Corruptions, Leaks int64
	CheckErrors        int64 `json:"check-errors"`
	CorruptionsFixed   int64 `json:"corruptions-fixed"`
	LeaksFixed         int64 `json:"leaks-fixed"`
	code               int
	stderr             string
}

func runQEMUCheck(t *testing.T, path string, args ...string) (q qemuCheck) {
	t.Helper()
	r := oracle.Run(t, "qemu-img", append(append([]string{"check", "-f", "qcow2", "--output=json"}, args...), path)...)
	q.code, q.stderr = r.Code, r.Stderr
	if r.Stdout != "" {
		if err := json.Unmarshal([]byte(r.Stdout), &q); err != nil {
			t.Fatalf("qemu-img: %v\n%s%s", err, r.Stdout, r.Stderr)
		}
	}
	return q
}

// repairDiffers has the cases of findingCases that qemu-img check -r all leaves
// in another state, and why.
var repairDiffers = map[string]string{
	"l1 reserved":                   "qemu-img does not clear reserved bits",
	"l2 reserved":                   "qemu-img does not clear reserved bits",
	"zero flag in version 2":        "qemu-img does not look",
	"compressed with copied flag":   "qemu-img does not clear the flag",
	"compressed with subclusters":   "the cluster that the entry may mean is not freed",
	"snapshot":                      "its L1 table is the active one: qemu-img fails, and sets the corrupt bit",
	"refcount block unaligned":      "qemu-img fails, and sets the corrupt bit",
	"refcount unreadable":           "qemu-img fails, and sets the corrupt bit",
	"refcount block beyond the end": "qemu-img makes the file that long, which takes it minutes",
	"refcount block behind the end": "qemu-img makes the block, and counts that too",
	"bitmap tables overlap":         "qemu-img does not open it",
	"snapshot with extra data":      "qemu-img finds this when it repairs only",
	"too many snapshots":            "qemu-img finds this when it repairs only",
	"overlap":                       "qemu-img leaves the structures where they are",
	"overlap with wrong refcount":   "qemu-img leaves the structures where they are",
}

// TestRepairFindings repairs an image of each kind of finding, and qemu-img
// does the same with a copy.
func TestRepairFindings(t *testing.T) {
	oracle.Require(t, "qemu-img")
	for _, c := range findingCases() {
		t.Run(c.name, func(t *testing.T) {
			b := c.image()
			dev := disk(t, b)
			guest := guestOf(dev)
			var found []qcow2.Finding
			dry := repair(t, dev, &qcow2.RepairOptions{DryRun: true})
			if !bytes.Equal(bytesOf(t, dev), b) {
				t.Fatal("a dry run changes the image")
			}
			res := repair(t, dev, &qcow2.RepairOptions{Found: func(f qcow2.Finding) { found = append(found, f) }})
			t.Logf("%v%+v\n%v", found, res, &res.Plan)
			if d := cmp.Diff(dry, res, cmp.AllowUnexported(qcow2.RepairPlan{}, qcow2.TableChange{})); d != "" {
				t.Errorf("-dry run +repair:\n%s", d)
			}
			if !slices.ContainsFunc(found, func(f qcow2.Finding) bool { return f.Kind == c.kind }) && c.kind != 0 && c.kind != qcow2.InactiveL1Copied && c.kind != qcow2.InactiveL2Copied {
				t.Error("not found")
			}
			sameGuest(t, guest, guestOf(dev))
			if again := repair(t, dev, nil); res.Clean() && !again.Plan.Empty() {
				t.Errorf("a second repair has something to do:\n%v", &again.Plan)
			}

			ours, theirs := filepath.Join(t.TempDir(), "ours"), filepath.Join(t.TempDir(), "theirs")
			write(t, ours, bytesOf(t, dev))
			after := runQEMUCheck(t, ours)
			if c.only == "" {
				check, err := open(t, bytesOf(t, dev)).Check(t.Context(), nil)
				if err != nil || checkExit(check) != after.code {
					t.Errorf("%+v, %v; qemu-img: %+v", check, err, after)
				}
			}
			if res.Clean() && after.code != 0 {
				t.Errorf("qemu-img is not content: %+v", after)
			}
			if repairDiffers[c.name] != "" {
				return
			}
			write(t, theirs, b)
			want := runQEMUCheck(t, theirs, "-r", "all")
			if after.code != want.code || res.CorruptionsFixed != want.CorruptionsFixed || res.LeaksFixed != want.LeaksFixed {
				t.Errorf("exit %d; qemu-img: %+v", after.code, want)
			}
		})
	}
}

// sameGuest compares what a guest reads before and after a repair. What could
// not be read before may be anything.
func sameGuest(t *testing.T, before, after []byte) {
	t.Helper()
	for i := 0; i < len(before); i += 512 {
		if b, a := before[i:i+512], after[i:i+512]; !bytes.Equal(a, b) && !bytes.HasPrefix(b, []byte("cannot be read")) {
			t.Errorf("the guest reads something else at %#x: %q, was %q", i, a[:20], b[:20])
		}
	}
}

// flipped changes bits of the tables of a tiny image at random.
func flipped(r *rand.Rand) []byte {
	x := qcow2.NewTiny()
	for range 1 + r.IntN(3) {
		switch r.IntN(4) {
		case 0:
			x.Image[qcow2.TinyRefblock+2*r.IntN(10)+1] ^= 1 << r.IntN(3)
		case 1:
			x.Image[qcow2.TinyL1] ^= 1 << r.IntN(8)
		default:
			// Flags, and bits of offsets that stay in the file.
			at := qcow2.TinyL2 + 8*r.IntN(4)
			bit := []int{7, 7, 7, 6, 56, 56, 48 + 1, 48 + 3}[r.IntN(8)]
			x.Image[at+bit/8] ^= 1 << (bit % 8)
		}
	}
	return x.Bytes()
}

// TestRepairLikeQEMU repairs images whose tables were changed at random, and so
// does qemu-img.
func TestRepairLikeQEMU(t *testing.T) {
	oracle.Require(t, "qemu-img")
	r := rand.New(rand.NewPCG(3, 4))
	path := filepath.Join(t.TempDir(), "x")
	compared := 0
	for i := range 300 {
		b := flipped(r)
		leaks, mode := i%3 == 0, "all"
		if leaks {
			mode = "leaks"
		}
		more := false // qemu-img does less; what lies beyond the end may be inside afterwards
		dev := disk(t, b)
		guest := guestOf(dev)
		res, err := qcow2.Repair(t.Context(), dev, &qcow2.RepairOptions{Leaks: leaks, Found: func(f qcow2.Finding) {
			switch f.Kind {
			case qcow2.BeyondEnd, qcow2.L1Reserved, qcow2.L2Reserved, qcow2.CompressedCopied, qcow2.Overlap, qcow2.L2TableUnaligned, qcow2.CompressedSubclusters:
				more = true
			}
		}})
		sameGuest(t, guest, guestOf(dev))
		write(t, path, bytesOf(t, dev))
		after := runQEMUCheck(t, path)
		if res.Clean() && err == nil && after.code != 0 {
			t.Errorf("image %d: qemu-img is not content: %+v", i, after)
		}
		if !more {
			compared++
			write(t, path, b)
			want := runQEMUCheck(t, path, "-r", mode)
			if errors.Is(err, qcow2.ErrRebuild) && want.code == 1 {
				continue
			}
			if err != nil || want.code != after.code || want.CorruptionsFixed != res.CorruptionsFixed || want.LeaksFixed != res.LeaksFixed {
				t.Errorf("image %d -r %s: %+v, %v, exit %d; qemu-img: %+v", i, mode, res, err, after.code, want)
			}
		}
		if t.Failed() {
			t.Fatalf("image %d", i)
		}
	}
	t.Logf("%d compared", compared)
	if compared < 100 {
		t.Errorf("%d images compared only", compared)
	}
}

// FuzzRepair changes bytes of an image anywhere, and repairs it until there is
// nothing left to do.
func FuzzRepair(f *testing.F) {
	seeds(f)
	for _, c := range findingCases() {
		if b := c.image(); len(b) < 1<<15 {
			f.Add(b)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		converges(t, b)
	})
}

// converges repairs an image until nothing changes.
func converges(t *testing.T, b []byte) {
	dev := disk(t, b)
	guest := guestOf(dev)
	for round := 0; ; round++ {
		var res qcow2.RepairResult
		var err error
		var use qcow2.Use
		use.Of(func() {
			res, err = qcow2.Repair(t.Context(), dev, &qcow2.RepairOptions{Found: func(f qcow2.Finding) { _ = f.String() }})
		})
		use.Bounded(t, dev, len(b))
		if err != nil {
			return
		}
		sameGuest(t, guest, guestOf(dev))
		if res.Clean() && !res.Plan.Empty() {
			im, err := qcow2.New(dev, &qcow2.OpenOptions{Backing: qcow2.BackingIgnore})
			if err != nil {
				t.Fatal(err)
			}
			if check, err := im.Check(t.Context(), nil); err != nil || checkExit(check) != 0 {
				t.Fatalf("%+v left, %v\n%v", check, err, &res.Plan)
			}
		}
		if res.Plan.Empty() {
			return
		}
		if round == 8 {
			t.Fatalf("still something to do:\n%v", &res.Plan)
		}
	}
}

package qcow2_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/oracle"
)

// expected is what qemu-img says of an image of the zoo.
type expected struct {
	Name         string
	OpenOK       bool    `json:"open_ok"`
	OpenError    *string `json:"open_error"`
	SHA256       *string
	SparseSHA256 *string `json:"sparse_sha256"`
	Secret       string
	Size         *int64 `json:"virtual_size"`
	Snapshots    []snapshotWant
	Map          []mapEntry
	Check        map[string]any
	CheckRC      *int    `json:"check_rc"`
	CheckError   *string `json:"check_error"`
	Info         json.RawMessage
}

type snapshotWant struct {
	ID           string
	Name         string
	SHA256       *string
	SparseSHA256 string  `json:"sparse_sha256"`
	DateSec      uint32  `json:"date_sec"`
	DateNsec     uint32  `json:"date_nsec"`
	VMClockNsec  uint64  `json:"vm_clock_nsec"`
	VMStateSize  uint64  `json:"vm_state_size"`
	DiskSize     int64   `json:"disk_size"`
	ICount       *uint64 `json:"icount"`
}

type mapEntry struct {
	Start, Length       int64
	Depth               int
	Present, Zero, Data bool
	Offset              *int64
}

// zoo runs f on every image of the zoo, in its folder.
func zoo(t *testing.T, f func(t *testing.T, path string, want expected)) {
	dir := oracle.Input(t, "zoo")
	t.Chdir(dir) // json: names are relative to the working directory
	names, err := filepath.Glob("*.expected.json")
	if err != nil || len(names) < 138 {
		t.Fatalf("%d images in %s: %v", len(names), dir, err)
	}
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		var want expected
		if err := json.Unmarshal(b, &want); err != nil {
			t.Fatal(name, err)
		}
		t.Run(want.Name, func(t *testing.T) { f(t, want.Name+".qcow2", want) })
	}
}

// digests returns the sha256 of the guest content, "" above 512 MiB, and that
// of its blocks that are not zero as make-qcow2-zoo defines it. Only extents
// that are not zero are read. size is what the content is cut or padded to.
func digests(t testing.TB, im *qcow2.Image, size int64) (full, sparse string) {
	t.Helper()
	h, f := sha256.New(), sha256.New()
	const block = 4096
	buf, zero := make([]byte, 1<<20), make([]byte, 1<<20)
	last := int64(-1)
	end := min(size, im.Size())
	for off := int64(0); off < end; {
		e, err := im.NextExtent(off)
		if err != nil {
			t.Fatal(err)
		}
		if e.Off != off || e.Len < 1 || off+e.Len > im.Size() {
			t.Fatalf("bad extent %+v at %d", e, off)
		}
		to := min(end, off+e.Len)
		if e.Kind.ReadsZero() {
			off = to
			continue
		}
		for at := off &^ (block - 1); at < to; at += int64(len(buf)) {
			n, err := im.ReadAt(buf, at)
			if err != nil && err != io.EOF {
				t.Fatal(err)
			}
			b := buf[:min(int64(n), end-at)]
			for i := 0; i < len(b); i += block {
				c := b[i:min(i+block, len(b))]
				index := (at + int64(i)) / block
				if index <= last || at+int64(i) >= to || bytes.Equal(c, zero[:len(c)]) {
					continue
				}
				last = index
				h.Write(binary.BigEndian.AppendUint64(nil, uint64(index)))
				h.Write(c)
				h.Write(zero[:block-len(c)])
			}
		}
		off = to
	}
	if size <= 512<<20 {
		r := io.NewSectionReader(im, 0, end)
		if _, err := io.CopyBuffer(struct{ io.Writer }{f}, struct{ io.Reader }{r}, buf); err != nil {
			t.Fatal(err)
		}
		for rest := size - end; rest > 0; rest -= int64(len(zero)) {
			f.Write(zero[:min(rest, int64(len(zero)))])
		}
		full = hex.EncodeToString(f.Sum(nil))
	}
	return full, hex.EncodeToString(h.Sum(nil))
}

// unlocked opens images with a passphrase.
func unlocked(passphrase string) *qcow2.OpenOptions {
	o := follow()
	o.Secret = func(qcow2.SecretRequest) ([]byte, error) { return []byte(passphrase), nil }
	return o
}

func TestZooRead(t *testing.T) {
	seen := 0
	zoo(t, func(t *testing.T, path string, want expected) {
		if seen++; oracle.SlowBuild && seen%4 != 0 {
			return
		}
		im, err := qcow2.Open(path, unlocked(want.Secret))
		if !want.OpenOK {
			if err == nil {
				_, err = io.Copy(io.Discard, io.NewSectionReader(im, 0, im.Size()))
				im.Close()
			}
			if err == nil {
				t.Fatalf("read, expected an error like %q", *want.OpenError)
			}
			t.Log(err)
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		defer im.Close()
		if im.Size() != *want.Size {
			t.Errorf("size %d, expected %d", im.Size(), *want.Size)
		}
		full, sparse := digests(t, im, im.Size())
		if want.SHA256 != nil && full != *want.SHA256 {
			t.Errorf("content has sha256 %s, expected %s", full, *want.SHA256)
		}
		if sparse != *want.SparseSHA256 {
			t.Errorf("content has sparse sha256 %s, expected %s", sparse, *want.SparseSHA256)
		}
	})
}

func TestZooSnapshots(t *testing.T) {
	zoo(t, func(t *testing.T, path string, want expected) {
		if len(want.Snapshots) == 0 {
			return
		}
		active, err := qcow2.Open(path, follow())
		if err != nil {
			t.Fatal(err)
		}
		defer active.Close()
		if len(active.Snapshots()) != len(want.Snapshots) {
			t.Fatalf("%d snapshots, expected %d", len(active.Snapshots()), len(want.Snapshots))
		}
		for i, sn := range want.Snapshots {
			got := active.Snapshots()[i]
			wantSn := got // offsets, extra data
			wantSn.ID, wantSn.Name = sn.ID, sn.Name
			wantSn.DateSec, wantSn.DateNsec, wantSn.VMClockNsec = sn.DateSec, sn.DateNsec, sn.VMClockNsec
			wantSn.VMStateSize, wantSn.DiskSize, wantSn.ICount = sn.VMStateSize, uint64(sn.DiskSize), qcow2.NoICount
			if sn.ICount != nil {
				wantSn.ICount = *sn.ICount
			}
			if d := cmp.Diff(wantSn, got); d != "" {
				t.Errorf("snapshot %d: %s", i, d)
			}
			for _, key := range []string{sn.ID, sn.Name} {
				if key == sn.Name && slices.ContainsFunc(want.Snapshots, func(s snapshotWant) bool { return s.ID == key && s.ID != sn.ID }) {
					continue // the name is the id of another, which goes first
				}
				opts := unlocked(want.Secret)
				opts.Snapshot = key
				im, err := qcow2.Open(path, opts)
				if err != nil {
					t.Fatal(err)
				}
				if im.Size() != sn.DiskSize {
					t.Errorf("snapshot %q: size %d, expected %d", key, im.Size(), sn.DiskSize)
				}
				if key == sn.Name && key != sn.ID && testing.Short() {
					im.Close()
					continue
				}
				// qemu-img convert -l writes a snapshot in the size that the
				// image has now (snap-resized).
				full, sparse := digests(t, im, *want.Size)
				if full != *sn.SHA256 || sparse != sn.SparseSHA256 {
					t.Errorf("snapshot %q: content has sha256 %s, expected %s", key, full, *sn.SHA256)
				}
				im.Close()
			}
		}
		if _, err := qcow2.Open(path, &qcow2.OpenOptions{Backing: qcow2.BackingFollow, Snapshot: "no such"}); !errors.Is(err, qcow2.ErrNotFound) {
			t.Errorf("snapshot that is not there: %v", err)
		}
	})
}

// mapOf is qemu-img map --output=json.
func mapOf(t *testing.T, im *qcow2.Image) []mapEntry {
	t.Helper()
	var list []mapEntry
	for off := int64(0); off < im.Size(); {
		x, err := im.NextExtent(off)
		if err != nil {
			t.Fatal(err)
		}
		e := mapEntry{
			Start: off, Length: x.Len, Depth: x.Depth,
			Present: x.Kind != blockdev.Unallocated,
			Zero:    x.Kind.ReadsZero(),
			Data:    !x.Kind.ReadsZero(),
		}
		if x.Host != nil {
			e.Offset = &x.HostOff
		}
		list = append(list, e)
		off += x.Len
	}
	return list
}

// join puts together the entries that qemu-img would.
func join(list []mapEntry) []mapEntry {
	var out []mapEntry
	for _, e := range list {
		if n := len(out); n > 0 {
			p := &out[n-1]
			if p.Depth == e.Depth && p.Present == e.Present && p.Zero == e.Zero && p.Data == e.Data &&
				(p.Offset == nil) == (e.Offset == nil) && (e.Offset == nil || *e.Offset == *p.Offset+p.Length) {
				p.Length += e.Length
				continue
			}
		}
		out = append(out, e)
	}
	return out
}

func TestZooMap(t *testing.T) {
	zoo(t, func(t *testing.T, path string, want expected) {
		if want.Map == nil {
			return
		}
		im, err := qcow2.Open(path, follow())
		if err != nil {
			t.Fatal(err)
		}
		defer im.Close()
		list := want.Map
		for i := range list {
			// Data that is zero is a hole of the host file, which qemu-img
			// looks for if metadata is preallocated, and NextExtent does not.
			list[i].Zero = list[i].Zero && !list[i].Data
		}
		if want.Name == "empty-0" {
			list = nil
		}
		if d := cmp.Diff(join(list), join(mapOf(t, im))); d != "" {
			t.Errorf("map: -qemu-img +got:\n%s", d)
		}
	})
}

// TestZooMemory opens and reads what qemu-img refuses, and bounds what that
// allocates.
func TestZooMemory(t *testing.T) {
	zoo(t, func(t *testing.T, path string, want expected) {
		if want.OpenOK && !strings.HasPrefix(want.Name, "huge") {
			return
		}
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		if im, err := qcow2.Open(path, follow()); err == nil {
			for off := int64(0); off < im.Size(); {
				e, err := im.NextExtent(off)
				if err != nil {
					break
				}
				off += e.Len
			}
			im.Close()
		}
		runtime.ReadMemStats(&after)
		if n := int64(after.TotalAlloc - before.TotalAlloc); n > 64<<20+4*st.Size() {
			t.Errorf("allocated %d bytes for a file of %d", n, st.Size())
		}
	})
}

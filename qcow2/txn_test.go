package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"
	"testing"

	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/blocktest"
)

// newWritable returns an image in memory that is open for writing, and its
// device.
func newWritable(t *testing.T, size int64, o FormatOptions) (*Image, *blockdev.Memory) {
	t.Helper()
	d := blockdev.NewMemory(0)
	if err := Create(t.Context(), d, size, &CreateOptions{FormatOptions: o}); err != nil {
		t.Fatal(err)
	}
	im, err := New(d, &OpenOptions{Write: true, Backing: BackingIgnore})
	if err != nil {
		t.Fatal(err)
	}
	return im, d
}

func mustBeClean(t *testing.T, d blockdev.Reader) {
	t.Helper()
	im, err := New(d, &OpenOptions{Backing: BackingIgnore})
	if err != nil {
		t.Fatal(err)
	}
	MustHaveLeaks(t, im, 0)
}

// A transaction that shares all tables with a snapshot, made of its parts.
func TestTxn(t *testing.T) {
	for _, o := range []FormatOptions{{ClusterSize: 512}, {ClusterSize: 4096, RefcountBits: 64}, {ClusterSize: 16384, ExtendedL2: true}, {}} {
		t.Run(fmt.Sprintf("%+v", o), func(t *testing.T) {
			im, d := newWritable(t, 1<<20, o)
			data := bytes.Repeat([]byte("abcdefgh"), 40000)
			if _, err := im.WriteAt(data, 1000); err != nil {
				t.Fatal(err)
			}
			share := func(commit bool) {
				t.Helper()
				tx, err := im.begin(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				defer tx.abort()
				snap := make([]uint64, len(tx.l1))
				for i, e := range tx.l1 {
					b, err := tx.l2(e)
					if b == nil {
						continue
					}
					for at := 0; at < len(b) && err == nil; at += int(im.geo.l2EntrySize) {
						entry, _ := im.entry(l2Place{0, b, int64(at)})
						err = tx.addEntryRef(entry, 1)
						im.w.dirty[0] = nil
						delete(im.w.dirty, 0)
					}
					if err != nil {
						t.Fatal(err)
					}
					// The copied flags of the shared table have to go.
					for at := 0; at < len(b); at += int(im.geo.l2EntrySize) {
						b[at] &^= 0x80
					}
					off, err := tx.writeL2(b)
					if err == nil {
						err = tx.addRef(off, im.geo.clusterSize, 1)
					}
					if err == nil {
						err = tx.addRef(int64(e&l1OffsetMask), im.geo.clusterSize, -1)
					}
					if err != nil {
						t.Fatal(err)
					}
					tx.l1[i], snap[i] = uint64(off), uint64(off)
				}
				off, err := tx.writeL1(snap)
				if err != nil {
					t.Fatal(err)
				}
				tx.snapshots = append(tx.snapshots, Snapshot{ID: "1", Name: "a", L1TableOffset: uint64(off), L1Size: uint32(len(snap)), DiskSize: 1 << 20, ICount: NoICount})
				tx.snapshotsChanged = true
				if !commit {
					return
				}
				if err := tx.commit(); err != nil {
					t.Fatal(err)
				}
			}
			before := d.Size()
			share(false)
			if d.Size() != before {
				t.Errorf("file of %d bytes after an aborted transaction, was %d", d.Size(), before)
			}
			mustBeClean(t, d)
			share(true)
			mustBeClean(t, d)
			// What is shared is not overwritten.
			if _, err := im.WriteAt(make([]byte, 100000), 5000); err != nil {
				t.Fatal(err)
			}
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			mustBeClean(t, d)
			sn, err := New(d, &OpenOptions{Snapshot: "a"})
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, len(data))
			if _, err := sn.ReadAt(got, 1000); err != nil || !bytes.Equal(got, data) {
				t.Errorf("snapshot reads something else (%v)", err)
			}
		})
	}
}

// A header is replaced by one write of the first sector, whatever its length.
func TestWriteHeader(t *testing.T) {
	im, d := newWritable(t, 1<<20, FormatOptions{BackingFile: "some/where/base.raw", BackingFormat: "raw"})
	for i, name := range []string{"base.raw", "", "a/much/longer/name/than/the/one/that/was/there/before.raw", "b"} {
		h := im.header
		h.BackingFile = name
		if err := im.writeHeader(&h); err != nil {
			t.Fatal(err)
		}
		im.header = h
		re, err := New(d, &OpenOptions{Backing: BackingIgnore})
		if err != nil {
			t.Fatal(err)
		}
		if got := re.Header(); got.BackingFile != name || len(got.FeatureNames()) == 0 {
			t.Errorf("%d: backing file %q, expected %q; %d feature names", i, got.BackingFile, name, len(got.FeatureNames()))
		}
	}
	h := im.header
	h.Extensions = append(h.Extensions, Extension{0x12345678, make([]byte, 600)})
	if err := im.writeHeader(&h); !errors.Is(err, ErrLimit) {
		t.Errorf("a header that cannot be replaced at once: %v", err)
	}
}

// After a write that fails, as on a full file system, the file is as long as
// before, unless the header may name what is behind its old end.
func TestTxnFailedWriteGivesBackRoom(t *testing.T) {
	for _, kind := range []blocktest.OpKind{blocktest.Write, blocktest.Sync} {
		for call := 1; ; call++ {
			im, d := newWritable(t, 1<<20, FormatOptions{ClusterSize: 512})
			if _, err := im.WriteAt(bytes.Repeat([]byte("abcdefgh"), 4000), 1000); err != nil {
				t.Fatal(err)
			}
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			size := d.Size()
			f := blocktest.NewFaulty(d, blocktest.Fault{Call: call, Kind: kind, Err: syscall.ENOSPC})
			im, err := New(f, &OpenOptions{Write: true, Backing: BackingIgnore})
			if err != nil {
				t.Fatal(err)
			}
			s, err := im.BeginSnapshots(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			tx := s.t
			_, err = s.Create("s", &SnapshotOptions{VMState: bytes.NewReader(make([]byte, 20000))})
			named := false
			if err == nil {
				err = s.Commit()
				named = tx.named
			}
			s.Abort()
			if !f.Fired() {
				if err != nil || call == 1 {
					t.Fatalf("%v: %d calls, %v", kind, call-1, err)
				}
				break
			}
			if !errors.Is(err, syscall.ENOSPC) {
				t.Fatalf("%v %d: %v, want %v", kind, call, err, syscall.ENOSPC)
			}
			if got := d.Size(); got != size && !named {
				t.Errorf("%v %d: the file has %d bytes, want %d", kind, call, got, size)
			}
			im.Close()
			mustBeClean(t, d)
		}
	}
}

// An image with the dirty bit in which a cluster of the guest lies right behind
// the end of the file takes more than one repair, and opens.
func TestDirtyOpensAfterRepairs(t *testing.T) {
	im, d := newWritable(t, 1<<20, FormatOptions{})
	want := bytes.Repeat([]byte("abcdefgh"), 3<<16/8)
	if _, err := im.WriteAt(want, 0); err != nil {
		t.Fatal(err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	poke := func(v uint64, off int64) {
		t.Helper()
		if _, err := d.WriteAt(binary.BigEndian.AppendUint64(nil, v), off); err != nil {
			t.Fatal(err)
		}
	}
	var l1 [8]byte
	if _, err := d.ReadAt(l1[:], int64(im.header.L1TableOffset)); err != nil {
		t.Fatal(err)
	}
	l2 := int64(binary.BigEndian.Uint64(l1[:]) & l1OffsetMask)
	poke(oflagCopied|uint64(d.Size()), l2+2*8)
	poke(uint64(IncompatDirty), 72)
	im, err := New(d, &OpenOptions{Write: true, Backing: BackingIgnore})
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 2<<16)
	if _, err := im.ReadAt(got, 0); err != nil || !bytes.Equal(got, want[:len(got)]) {
		t.Errorf("other clusters do not read as before: %v", err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	mustBeClean(t, d)
}

// A cluster in use that counts as free is not given to something else: the
// change is refused, and the guest reads what it did.
func TestTxnUncounted(t *testing.T) {
	im, d := newWritable(t, 1<<20, FormatOptions{ClusterSize: 4096})
	data := bytes.Repeat([]byte("data"), 1024)
	if _, err := im.WriteAt(data, 8192); err != nil {
		t.Fatal(err)
	}
	if err := im.Sync(); err != nil {
		t.Fatal(err)
	}
	r, err := im.lookup(8192, 4096)
	if err != nil {
		t.Fatal(err)
	}
	block := int64(im.w.alloc.table[0])
	if _, err := d.WriteAt([]byte{0, 0}, block+r.host>>12*2); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(im *Image) error{
		"snapshot create": func(im *Image) error { _, err := im.CreateSnapshot(t.Context(), "a", nil); return err },
		"refcount_bits":   func(im *Image) error { _, err := im.Amend(t.Context(), &AmendOptions{RefcountBits: 8}); return err },
		"compat=0.10":     func(im *Image) error { _, err := im.Amend(t.Context(), &AmendOptions{Version: 2}); return err },
	} {
		re, err := New(d, &OpenOptions{Write: true})
		if err != nil {
			t.Fatal(err)
		}
		if err := change(re); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
		got := make([]byte, len(data))
		if _, err := re.ReadAt(got, 8192); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%s: the guest reads something else (%v)", name, err)
		}
		re.Close()
	}
}

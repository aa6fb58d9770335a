package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"testing/iotest"

	"qimg/qcow2/blockdev"
)

// A snapshot shares all tables with the disk, none of which has a copied flag.
func TestSnapshotShares(t *testing.T) {
	for _, o := range []FormatOptions{{ClusterSize: 512}, {ClusterSize: 16 << 10, ExtendedL2: true}} {
		im, d := newWritable(t, 1<<20, o)
		if _, err := im.WriteAt(bytes.Repeat([]byte("data"), 30000), 7); err != nil {
			t.Fatal(err)
		}
		if _, err := im.CreateSnapshot(t.Context(), "a", nil); err != nil {
			t.Fatal(err)
		}
		sn := im.Snapshots()[0]
		l1 := make([]byte, len(im.l1))
		if _, err := d.ReadAt(l1, int64(sn.L1TableOffset)); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(l1, im.l1) {
			t.Errorf("L1 table %x, that of the disk is %x", l1, im.l1)
		}
		for i := range int64(len(l1) / l1EntrySize) {
			entry := im.l1Entry(i)
			b := make([]byte, im.geo.clusterSize)
			if entry == 0 {
				continue
			}
			if _, err := d.ReadAt(b, int64(entry)); err != nil {
				t.Fatal(err) // or a flag
			}
			for at := int64(0); at < int64(len(b)); at += im.geo.l2EntrySize {
				if binary.BigEndian.Uint64(b[at:])&oflagCopied != 0 {
					t.Fatalf("L2 table %d has a copied flag at %d", i, at)
				}
			}
		}
		mustBeClean(t, d)
	}
}

// A transaction that ends early leaves nothing, and after an error nothing but
// Abort is left.
func TestSnapshotTxnErrors(t *testing.T) {
	im, d := newWritable(t, 1<<20, FormatOptions{ClusterSize: 512})
	if _, err := im.WriteAt(bytes.Repeat([]byte("data"), 30000), 7); err != nil {
		t.Fatal(err)
	}
	if _, err := im.CreateSnapshot(t.Context(), "a", nil); err != nil {
		t.Fatal(err)
	}
	size := d.Size()
	broken := errors.New("broken pipe")
	for name, do := range map[string]func(tx *SnapshotTxn) error{
		"no error": func(tx *SnapshotTxn) error { _, err := tx.Create("b", nil); return errors.Join(err, tx.Prepare()) },
		"not found": func(tx *SnapshotTxn) error {
			if err := tx.Delete("nope"); !errors.Is(err, ErrNotFound) {
				return err
			}
			if _, err := tx.Create("b", nil); !errors.Is(err, ErrNotFound) {
				return fmt.Errorf("after an error: %v", err)
			}
			if err := tx.Commit(); !errors.Is(err, ErrNotFound) {
				return fmt.Errorf("commit after an error: %v", err)
			}
			return nil
		},
		"vm state that cannot be read": func(tx *SnapshotTxn) error {
			if _, err := tx.Create("b", &SnapshotOptions{VMState: iotest.ErrReader(broken)}); !errors.Is(err, broken) {
				return fmt.Errorf("%v", err)
			}
			return nil
		},
		"change after prepare": func(tx *SnapshotTxn) error {
			err := errors.Join(tx.Delete("a"), tx.Prepare())
			if tx.Apply("a") == nil {
				return errors.New("no error")
			}
			return err
		},
		"long name": func(tx *SnapshotTxn) error {
			if _, err := tx.Create(strings.Repeat("n", 256), nil); !errors.Is(err, ErrLimit) {
				return fmt.Errorf("%v", err)
			}
			return nil
		},
		"zero in a name": func(tx *SnapshotTxn) error {
			if _, err := tx.Create("a\x00b", nil); !errors.Is(err, ErrLimit) {
				return fmt.Errorf("%v", err)
			}
			return nil
		},
	} {
		tx, err := im.BeginSnapshots(t.Context())
		if err != nil {
			t.Fatal(name, err)
		}
		if err := do(tx); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		tx.Abort()
		tx.Abort()
		if tx.Commit() == nil {
			t.Errorf("%s: commit after the end", name)
		}
		if list := im.Snapshots(); len(list) != 1 || list[0].Name != "a" || d.Size() != size {
			t.Errorf("%s: snapshots %v, file of %d bytes, was %d", name, list, d.Size(), size)
		}
		mustBeClean(t, d)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := im.CreateSnapshot(ctx, "b", nil); !errors.Is(err, context.Canceled) {
		t.Errorf("with a context that is done: %v", err)
	}
	if err := im.ApplySnapshot(t.Context(), "1"); err != nil {
		t.Error(err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	if err := im.DeleteSnapshot(t.Context(), "a"); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	reader, err := New(d, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := reader.DeleteSnapshot(t.Context(), "a"); !errors.Is(err, blockdev.ErrReadOnly) {
		t.Errorf("of an image that is open for reading: %v", err)
	}
	if _, err := New(d, &OpenOptions{Write: true, Snapshot: "a"}); !errors.Is(err, blockdev.ErrReadOnly) {
		t.Errorf("a snapshot is opened for writing: %v", err)
	}
	mustBeClean(t, d)
}

// Tables that cannot be right are refused before anything changes.
func TestSnapshotDamaged(t *testing.T) {
	for name, damage := range map[string]func(im *Image, put func(off int64, value uint64)){
		"l1 table place": func(im *Image, put func(int64, uint64)) { put(int64(im.header.SnapshotsOffset), 0x201) },
		"l1 table size":  func(im *Image, put func(int64, uint64)) { put(int64(im.header.SnapshotsOffset)+8, 0xffffffff00010001) },
		"l1 entry":       func(im *Image, put func(int64, uint64)) { put(int64(im.snapshots[0].L1TableOffset), 0x12345678) },
		"l1 entry with a refcount of 0": func(im *Image, put func(int64, uint64)) {
			put(int64(im.snapshots[0].L1TableOffset), 0x12345600)
		},
		"l2 entry": func(im *Image, put func(int64, uint64)) { put(int64(im.l1Entry(0)&l1OffsetMask), 0x12345600) },
		"l2 entry beyond all files": func(im *Image, put func(int64, uint64)) {
			put(int64(im.l1Entry(0)&l1OffsetMask), 0x00fffffffffffe00)
		},
	} {
		t.Run(name, func(t *testing.T) {
			im, d := newWritable(t, 1<<20, FormatOptions{ClusterSize: 512})
			if _, err := im.WriteAt(bytes.Repeat([]byte("data"), 30000), 7); err != nil {
				t.Fatal(err)
			}
			if _, err := im.CreateSnapshot(t.Context(), "a", nil); err != nil {
				t.Fatal(err)
			}
			if _, err := im.WriteAt([]byte("x"), 100000); err != nil {
				t.Fatal(err)
			}
			damage(im, func(off int64, value uint64) {
				if _, err := d.WriteAt(binary.BigEndian.AppendUint64(nil, value), off); err != nil {
					t.Fatal(err)
				}
			})
			if err := im.Sync(); err != nil {
				t.Fatal(err)
			}
			before := d.Clone()
			re, err := New(d, &OpenOptions{Write: true})
			if errors.Is(err, ErrCorrupt) {
				return
			} else if err != nil {
				t.Fatal(err)
			}
			if err := re.DeleteSnapshot(t.Context(), "a"); !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrLimit) {
				t.Errorf("delete: %v", err)
			}
			if name == "l1 entry" || name == "l1 table place" || name == "l1 table size" {
				if err := re.ApplySnapshot(t.Context(), "a"); !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrLimit) {
					t.Errorf("apply: %v", err)
				}
			}
			if header := make([]byte, 512); true {
				was := make([]byte, 512)
				d.ReadAt(header, 0)
				before.ReadAt(was, 0)
				if !bytes.Equal(header, was) || d.Size() != before.Size() {
					t.Error("the image has changed")
				}
			}
		})
	}
}

// The size of vm state is bounded by what the L1 table maps, and it is read as a
// device is.
func TestVMState(t *testing.T) {
	im, d := newWritable(t, 100<<10, FormatOptions{ClusterSize: 512})
	state := bytes.Repeat([]byte("QEVM and more "), 5000)
	if _, err := im.CreateSnapshot(t.Context(), "a", &SnapshotOptions{VMState: bytes.NewReader(state)}); err != nil {
		t.Fatal(err)
	}
	sn, err := New(d, &OpenOptions{Snapshot: "a"})
	if err != nil {
		t.Fatal(err)
	}
	s, err := sn.VMState()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(io.NewSectionReader(s, 0, 1<<40)); err != nil || !bytes.Equal(got, state) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	for _, off := range []int64{-1, s.Size()} {
		if _, err := s.NextExtent(off); !errors.Is(err, blockdev.ErrRange) {
			t.Errorf("extent at %d: %v", off, err)
		}
	}
	if _, err := s.ReadAt(make([]byte, 1), -1); !errors.Is(err, blockdev.ErrRange) {
		t.Errorf("read at -1: %v", err)
	}
	for off := int64(0); off < s.Size(); {
		e, err := s.NextExtent(off)
		if err != nil || e.Off != off || e.Len < 1 || e.Kind != blockdev.Data {
			t.Fatalf("extent at %d: %+v, %v", off, e, err)
		}
		off += e.Len
	}
	if err := sn.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.ReadAt(make([]byte, 1), 0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	if _, err := im.VMState(); !errors.Is(err, ErrNotFound) {
		t.Errorf("of the disk: %v", err)
	}
	mapped := uint64(im.Snapshots()[0].L1Size)<<im.geo.l2Coverage() - 128<<10 // 4 L2 tables map the disk
	for size, want := range map[uint64]error{0: nil, mapped: nil, mapped + 1: ErrCorrupt, 1<<64 - 1: ErrCorrupt} {
		if _, err := d.WriteAt(binary.BigEndian.AppendUint64(nil, size), int64(im.header.SnapshotsOffset)+40); err != nil {
			t.Fatal(err)
		}
		sn, err := New(d, &OpenOptions{Snapshot: "a"})
		if err != nil {
			t.Fatal(err)
		}
		if s, err := sn.VMState(); !errors.Is(err, want) || err == nil && s.Size() != int64(size) {
			t.Errorf("vm state of %d bytes: %v", size, err)
		}
	}
}

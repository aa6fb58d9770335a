package ext4img

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/blocktest"
	"qimg/qcow2/blockdev/oracle"
)

// editAt opens an image for editing.
func editAt(t testing.TB, image string) *Editor {
	t.Helper()
	dev, err := blockdev.OpenFile(image, &blockdev.FileOptions{Write: true, NoLock: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dev.Close() })
	e, err := OpenEditor(t.Context(), dev, &EditOptions{Now: func() time.Time { return time.Unix(1700000000, 5000) }})
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// makeImage has mke2fs make an image.
func makeImage(t testing.TB, args, size string) string {
	t.Helper()
	oracle.Require(t, "mke2fs", "e2fsck")
	image := filepath.Join(t.TempDir(), "image")
	oracle.MustRun(t, "mke2fs", append(append([]string{"-q", "-F", "-E", "lazy_itable_init=0"}, strings.Fields(args)...), image, size)...)
	return image
}

// TestCommitKinds changes one mode in file systems with journals of all kinds.
func TestCommitKinds(t *testing.T) {
	for _, c := range []string{"-t ext4 -b 4096", "-t ext4 -b 1024", "-t ext3 -b 1024", "-t ext4 -O ^metadata_csum", "-t ext4 -O fast_commit,orphan_file"} {
		t.Run(c, func(t *testing.T) {
			image := makeImage(t, c, "20M")
			e := editAt(t, image)
			for i := range 2 {
				x, err := e.Begin()
				if err != nil {
					t.Fatal(err)
				}
				n, err := x.inode(RootIno)
				if err != nil {
					t.Fatal(err)
				}
				n.Mode = modeDir | 0o700 + uint16(i)
				x.dirty(n)
				if err := x.Commit(t.Context()); err != nil {
					t.Fatal(err)
				}
				fsck(t, image)
			}
			n, err := openImage(t, image, nil).Inode(RootIno)
			if err != nil || n.Mode != modeDir|0o701 {
				t.Errorf("%#o, %v", n.Mode, err)
			}
		})
	}
}

// TestOpenEditorDirty opens copies of file systems that are mounted, with
// journals that have to be replayed and files that are open but have no name.
func TestOpenEditorDirty(t *testing.T) {
	for _, c := range []string{"-t ext4 -b 4096", "-t ext4 -b 1024 -O orphan_file", "-t ext3 -b 1024"} {
		t.Run(c, func(t *testing.T) {
			image := makeImage(t, c, "40M")
			dir := mountAt(t, image, "noatime,commit=1000")
			var want manifest
			for i := range 20 {
				f, err := os.Create(filepath.Join(dir, fmt.Sprint(i)))
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				if _, err := f.Write(bytes.Repeat([]byte{byte(i + 1)}, i*10000)); err != nil {
					t.Fatal(err)
				}
			}
			for i := 10; i < 20; i++ {
				if err := os.Remove(filepath.Join(dir, fmt.Sprint(i))); err != nil {
					t.Fatal(err)
				}
			}
			oracle.MustRun(t, "sync", "-f", dir)
			snapshot := filepath.Join(t.TempDir(), "copy")
			oracle.MustRun(t, "cp", "--sparse=always", image, snapshot)
			want = dirManifest(t, dir)
			f := openImage(t, snapshot, nil)
			if f.journal == nil || f.sb.LastOrphan == 0 && f.sb.ROCompat&ROCompatOrphanPresent == 0 {
				t.Fatal("there is nothing to replay, or no orphan")
			}
			used := uint32(21)
			if f.sb.Compat&CompatOrphanFile != 0 {
				used++
			}
			e := editAt(t, snapshot)
			fsck(t, snapshot)
			if s := e.fs.sb; s.LastOrphan != 0 || s.ROCompat&ROCompatOrphanPresent != 0 || s.FreeInodesCount != s.InodesCount-used {
				t.Errorf("%d inodes of %d are free", s.FreeInodesCount, s.InodesCount)
			}
			compareManifests(t, readManifest(t, openImage(t, snapshot, nil)), want)
		})
	}
}

// TestEditFaults has every call of the device fail, one after the other: the
// transaction is whole or absent once the journal is replayed, and the editor
// takes no more.
func TestEditFaults(t *testing.T) {
	oracle.Require(t, "mke2fs", "e2fsck")
	for i, c := range crashCases {
		if !c.whole || c.clusters > 0 || i%2 != 0 {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			base := crashImage(t, c)
			before := treeOf(t, base)
			image := filepath.Join(t.TempDir(), "image")
			for call := 1; ; call++ {
				m := base.Clone()
				fault := blocktest.Fault{Call: call, Err: syscall.EIO, Short: call%2 == 0, Sticky: call%3 == 0}
				dev := blocktest.NewFaulty(m, fault)
				e, err := OpenEditor(t.Context(), dev, nil)
				if err != nil {
					if !errors.Is(err, syscall.EIO) {
						t.Fatalf("call %d: %v", call, err)
					}
					continue
				}
				err = faultWork(t, e)
				if !dev.Fired() {
					if err != nil {
						t.Fatal(err)
					}
					if call < 30 {
						t.Errorf("%d calls", call)
					}
					return
				}
				after := treeOf(t, m)
				switch {
				case err == nil && dev.FiredKind() != blocktest.Read:
					t.Fatalf("call %d: the transaction has not failed", call)
				case err != nil && !errors.Is(err, syscall.EIO):
					t.Fatalf("call %d: %v", call, err)
				}
				if dev.FiredKind() == blocktest.Write || dev.FiredKind() == blocktest.Sync {
					if _, err := e.Begin(); !errors.Is(err, blockdev.ErrReadOnly) || !errors.Is(err, syscall.EIO) {
						t.Fatalf("call %d: Begin: %v", call, err)
					}
				}
				if !maps.Equal(after, before) && len(after) != len(before)+2 {
					t.Fatalf("call %d: the tree is neither that before nor that after", call)
				}
				writeMemory(t, image, m)
				if r := oracle.Run(t, "e2fsck", "-p", image); r.Code > 1 {
					t.Fatalf("call %d: e2fsck -p: %d\n%s", call, r.Code, r.Stdout)
				}
				fsck(t, image)
			}
		})
	}
}

// faultWork is a transaction that makes two files.
func faultWork(t testing.TB, e *Editor) error {
	x, err := e.Begin()
	if err != nil {
		return err
	}
	defer x.Discard()
	if err := x.MkdirAll("/new", 0o700); err != nil {
		return err
	}
	if err := x.WriteFile("/new/file", make([]byte, 5000), 0o600); err != nil {
		return err
	}
	return x.Commit(t.Context())
}

// TestEditE2fsprogs edits the test images of e2fsprogs, whose sources
// E2FSPROGS_SRC names: what e2fsck finds nothing wrong with stays so, and the
// others are refused, and stay as they are.
func TestEditE2fsprogs(t *testing.T) {
	src := os.Getenv("E2FSPROGS_SRC")
	if src == "" {
		t.Skip("E2FSPROGS_SRC names no sources")
	}
	oracle.Require(t, "e2fsck")
	images, err := filepath.Glob(filepath.Join(src, "tests", "*", "image.gz"))
	if err != nil || len(images) < 100 {
		t.Fatalf("%d images: %v", len(images), err)
	}
	edited := 0
	for _, path := range images {
		name := filepath.Base(filepath.Dir(path))
		image := filepath.Join(t.TempDir(), "image")
		gunzip(t, path, image)
		r := oracle.Run(t, "timeout", "5", "e2fsck", "-fn", image)
		before, err := os.ReadFile(image)
		if err != nil {
			t.Fatal(err)
		}
		dev, err := blockdev.OpenFile(image, &blockdev.FileOptions{Write: true, NoLock: true})
		if err != nil {
			t.Fatal(err)
		}
		e, err := OpenEditor(t.Context(), dev, nil)
		if err == nil {
			err = faultWork(t, e)
		}
		dev.Close()
		after, readErr := os.ReadFile(image)
		if readErr != nil {
			t.Fatal(readErr)
		}
		switch {
		case err != nil && !bytes.Equal(before, after):
			if r.Code == 0 || !errors.Is(err, ErrNoSpace) {
				t.Errorf("%s: refused, and changed: %v", name, err)
			}
		case err == nil && r.Code != 0:
			// A journal was replayed, or orphans were freed.
			if again := oracle.Run(t, "e2fsck", "-fn", image); again.Code != 0 {
				t.Errorf("%s: edited, although e2fsck exits with %d\n%.1000s", name, r.Code, r.Stdout)
			}
		case err == nil:
			edited++
			if again := oracle.Run(t, "e2fsck", "-fn", image); again.Code != 0 {
				t.Errorf("%s: e2fsck exits with %d\n%.1000s", name, again.Code, again.Stdout)
			}
		}
	}
	t.Logf("%d of %d images were edited", edited, len(images))
}

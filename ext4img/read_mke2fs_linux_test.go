package ext4img

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"qimg/qcow2/blockdev/oracle"
)

// TestReadUnmountable reads file systems that mke2fs fills and not every
// kernel mounts.
func TestReadUnmountable(t *testing.T) {
	oracle.Require(t, "mke2fs", "e2fsck")
	tree := t.TempDir()
	const entries = 450
	for i := range entries {
		name := filepath.Join(tree, "big", fmt.Sprintf("%s-%d", strings.Repeat("n", 130+i%100), i))
		if i == 0 {
			if err := os.Mkdir(filepath.Dir(name), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		content := bytes.Repeat([]byte(fmt.Sprint(i)), i%3*(i%200)*20)
		if err := os.WriteFile(name, content, 0o640); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(tree, "CaseFold"), []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	for i, args := range []string{
		"-t ext4 -b 65536", "-t ext4 -b 65536 -O ^extents,^64bit,^metadata_csum", "-t ext2 -b 32768", "-t ext4 -b 16384 -O inline_data,project,quota",
		"-t ext4 -b 4096 -O casefold,encrypt", "-t ext4 -b 8192 -O bigalloc,meta_bg,^resize_inode -C 65536",
	} {
		if i > 1 && testing.Short() {
			break
		}
		for _, index := range []bool{true, false}[:1+b2i(args == "-t ext4 -b 65536")] {
			image := filepath.Join(t.TempDir(), "image")
			oracle.MustRun(t, "mke2fs", append(append([]string{"-q", "-F", "-d", tree}, strings.Fields(args)...), image, "128M")...)
			if index {
				if r := oracle.Run(t, "e2fsck", "-fyD", image); r.Code > 1 {
					t.Fatalf("e2fsck: %d\n%s", r.Code, r.Stdout)
				}
			}
			f := openImage(t, image, nil)
			err := filepath.WalkDir(tree, func(path string, d fs.DirEntry, err error) error {
				if err != nil {
					return err
				}
				name, err := filepath.Rel(tree, path)
				if err != nil {
					return err
				}
				name = filepath.ToSlash(name)
				info, err := f.Stat(name)
				if err != nil || d.IsDir() {
					return err
				}
				want, err := os.ReadFile(path)
				if err != nil {
					return err
				}
				got, err := f.ReadFile(name)
				if err != nil || !bytes.Equal(got, want) || info.Size() != int64(len(want)) {
					t.Errorf("%s: %s: %d bytes, want %d: %v", args, name, len(got), len(want), err)
				}
				return nil
			})
			if err != nil {
				t.Errorf("%s: %v", args, err)
			}
			list, err := f.ReadDir("big")
			if err != nil || len(list) != entries {
				t.Errorf("%s: %d entries, %v", args, len(list), err)
			}
			n, err := f.Inode(f.dirIno(t, "big"))
			if err != nil || n.Flags&indexFl != 0 != (index && f.sb.Compat&CompatDirIndex != 0) {
				t.Errorf("%s: i_flags %#x, %v", args, n.Flags, err)
			}
			if _, err := f.Stat("big/missing"); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s: %v", args, err)
			}
		}
	}
}

func (f *FS) dirIno(t *testing.T, path string) Ino {
	t.Helper()
	ino, err := f.Resolve(path, true)
	if err != nil {
		t.Fatal(err)
	}
	return ino
}

// TestReadCasefold finds names in a directory that e2fsck has indexed by
// folded names.
func TestReadCasefold(t *testing.T) {
	oracle.Require(t, "mke2fs", "debugfs", "e2fsck")
	dir := t.TempDir()
	tree, image, cmds := filepath.Join(dir, "tree"), filepath.Join(dir, "image"), filepath.Join(dir, "cmds")
	for i := range 300 {
		name := filepath.Join(tree, "d", fmt.Sprintf("MixedCase-ÄÖÜ-%d", i))
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	oracle.MustRun(t, "mke2fs", "-q", "-F", "-t", "ext4", "-O", "casefold", "-d", tree, image, "16M")
	if err := os.WriteFile(cmds, []byte("sif d flags 0x40080000\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	oracle.MustRun(t, "debugfs", "-w", "-f", cmds, image)
	if r := oracle.Run(t, "e2fsck", "-fyD", image); r.Code > 1 {
		t.Fatalf("e2fsck: %d\n%s", r.Code, r.Stdout)
	}
	f := openImage(t, image, nil)
	d := f.dirIno(t, "d")
	if n, err := f.Inode(d); err != nil || n.Flags&(indexFl|casefoldFl) != indexFl|casefoldFl {
		t.Fatalf("i_flags %#x, %v", n.Flags, err)
	}
	for _, name := range []string{"MixedCase-ÄÖÜ-7", "mixedcase-äöü-7", "MIXEDCASE-äÖÜ-299"} {
		if e, err := f.LookupIn(d, name); err != nil || !strings.EqualFold(e.Name, name) {
			t.Errorf("%s: %v, %v", name, e, err)
		}
	}
	if _, err := f.LookupIn(d, "mixedcase"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	// The root has no such flag.
	if _, err := f.LookupIn(RootIno, "D"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

// TestReadHuge opens a file system of terabytes at once.
func TestReadHuge(t *testing.T) {
	oracle.Require(t, "mke2fs")
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 15<<40); err != nil {
		t.Skip("the host cannot hold a file of 15 TiB: ", err)
	}
	oracle.MustRun(t, "mke2fs", "-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=1,lazy_journal_init=1,packed_meta_blocks=1", "-i", "1048576", image)
	start := time.Now()
	f := openImage(t, image, nil)
	if _, err := f.ReadDir("lost+found"); err != nil {
		t.Error(err)
	}
	if d := time.Since(start); d > time.Second {
		t.Errorf("took %v", d)
	}
	last := Ino(f.sb.InodesCount)
	if n, err := f.inode(last); err != nil || n.Mode != 0 {
		t.Errorf("inode %d: %+v, %v", last, n, err)
	}
	d, err := f.groupDesc(f.sb.Groups() - 1)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := f.blockBitmap(f.sb.Groups()-1, d); err != nil || countZeroes(b) != d.freeBlocks {
		t.Errorf("%d blocks are free, want %d: %v", countZeroes(b), d.freeBlocks, err)
	}
}

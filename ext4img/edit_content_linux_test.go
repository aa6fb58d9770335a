package ext4img

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"

	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/oracle"
)

// TestEditExtents makes a file of thousands of extents, takes them away again
// in pieces, and compares it with a model.
func TestEditExtents(t *testing.T) {
	oracle.Require(t, "mke2fs", "e2fsck")
	for i, args := range []string{
		"-t ext4 -b 1024", "-t ext3 -b 1024", "-t ext4 -b 1024 -O ^has_journal", "-t ext2 -b 2048", "-t ext4 -b 1024 -O bigalloc -C 4096",
	} {
		t.Run(args, func(t *testing.T) {
			image := makeImage(t, args, "60M")
			e := editAt(t, image)
			r := rand.New(rand.NewPCG(uint64(i), 1))
			model := blockdev.NewMemory(0)
			bs := int64(e.fs.sb.BlockSize)
			const blocks = 16000
			var ino Ino
			deepest := 0
			for step := range 14 {
				x, err := e.Begin()
				if err != nil {
					t.Fatal(err)
				}
				check := func(err error) {
					t.Helper()
					if err != nil {
						t.Fatal(err)
					}
				}
				if step == 0 {
					ino, err = x.Create(RootIno, "file", Attr{Mode: 0o600})
					check(err)
				}
				write := func(off int64, n int) {
					t.Helper()
					b := make([]byte, n)
					for i := range b {
						b[i] = byte(r.Uint32())
					}
					check(x.WriteAt(ino, b, off))
					if end := off + int64(n); end > model.Size() {
						check(model.Truncate(end))
					}
					_, err := model.WriteAt(b, off)
					check(err)
				}
				resize := func(size int64) {
					t.Helper()
					check(x.Truncate(ino, size))
					check(model.Truncate(size))
				}
				switch {
				case step < 4: // a comb, from some end
					for k := range int64(1000) {
						k = (k*4 + int64(step)*4000) * bs
						if step%2 == 1 {
							k = (2*int64(step)*4000+3996)*bs - k
						}
						write(k, int(bs))
					}
				case step < 8: // into it
					for range 300 {
						write(r.Int64N(blocks)*bs+r.Int64N(bs), 1+r.IntN(int(3*bs)))
					}
				case step < 10: // over it
					write(r.Int64N(blocks/2)*bs, int(bs)*3000)
				default: // away with it
					resize(model.Size() / 3)
					write(model.Size()+int64(r.IntN(20000)), 100)
				}
				n, err := x.inode(ino)
				check(err)
				if n.Flags&extentsFl != 0 {
					path, _, err := x.extentPath(n, 0)
					check(err)
					deepest = max(deepest, len(path)-1)
				}
				compareModel(t, x.FS(), ino, model)
				check(x.Commit(t.Context()))
				fsck(t, image)
				compareModel(t, openImage(t, image, nil), ino, model)
			}
			if e.fs.sb.Incompat&IncompatExtents != 0 && deepest < 2 {
				t.Errorf("the tree was %d levels deep", deepest)
			}
			// All of it.
			x, err := e.Begin()
			if err != nil {
				t.Fatal(err)
			}
			if err := x.Truncate(ino, 0); err != nil {
				t.Fatal(err)
			}
			if n, err := x.inode(ino); err != nil || n.Blocks != 0 {
				t.Errorf("an empty file has %d blocks, %v", n.Blocks, err)
			}
			if err := x.Commit(t.Context()); err != nil {
				t.Fatal(err)
			}
			fsck(t, image)
		})
	}
}

func compareModel(t *testing.T, f *FS, ino Ino, model *blockdev.Memory) {
	t.Helper()
	c, err := f.File(ino)
	if err != nil {
		t.Fatal(err)
	}
	if c.Size() != model.Size() {
		t.Fatalf("%d bytes, expected %d", c.Size(), model.Size())
	}
	got, want := make([]byte, 1<<20), make([]byte, 1<<20)
	for off := int64(0); off < c.Size(); off += 1 << 20 {
		n, err := c.ReadAt(got, off)
		if err != nil && err != io.EOF {
			t.Fatal(err)
		}
		m, _ := model.ReadAt(want, off)
		if !bytes.Equal(got[:n], want[:m]) {
			t.Fatalf("the bytes from %d on differ", off)
		}
	}
}

// TestEditFar writes as far out as maps reach, and further.
func TestEditFar(t *testing.T) {
	oracle.Require(t, "mke2fs", "e2fsck")
	for _, c := range []struct {
		args string
		far  int64
	}{
		{"-t ext4 -b 4096", 1<<44 - 4096}, {"-t ext4 -b 1024", 1<<42 - 1024}, {"-t ext2 -b 1024", (12 + 256 + 1<<16 + 1<<24) * 1024},
		{"-t ext3 -b 4096", 4 << 40}, {"-t ext4 -b 4096 -O ^large_file", 3 << 30},
	} {
		t.Run(c.args, func(t *testing.T) {
			image := makeImage(t, c.args, "20M")
			e := editAt(t, image)
			x, err := e.Begin()
			if err != nil {
				t.Fatal(err)
			}
			ino, err := x.Create(RootIno, "far", Attr{})
			if err != nil {
				t.Fatal(err)
			}
			for off := int64(1000); off < c.far; off *= 7 {
				if err := x.WriteAt(ino, []byte("here"), off); err != nil {
					t.Fatal(err)
				}
			}
			if err := x.WriteAt(ino, []byte("last"), c.far-4); err != nil {
				t.Fatal(err)
			}
			if limit := x.maxSize(&Inode{Flags: x.inodes[ino].n.Flags}); limit == c.far {
				if err := x.WriteAt(ino, []byte("x"), c.far); !errors.Is(err, ErrTooLarge) {
					t.Errorf("behind the end: %v", err)
				}
			}
			if err := x.Commit(t.Context()); err != nil {
				t.Fatal(err)
			}
			fsck(t, image)
			f := openImage(t, image, nil)
			file, err := f.File(ino)
			if err != nil {
				t.Fatal(err)
			}
			b := make([]byte, 4)
			if _, err := file.ReadAt(b, c.far-4); err != nil && err != io.EOF || string(b) != "last" || file.Size() != c.far {
				t.Errorf("%q, %v, %d bytes", b, err, file.Size())
			}
			if f.sb.ROCompat&ROCompatLargeFile == 0 {
				t.Error("large_file is not set")
			}
		})
	}
}

// TestEditNoSpace fills a file system: what does not fit leaves nothing behind.
func TestEditNoSpace(t *testing.T) {
	oracle.Require(t, "mke2fs", "e2fsck")
	for _, args := range []string{"-t ext4 -b 1024 -N 200", "-t ext2 -b 1024 -N 200"} {
		t.Run(args, func(t *testing.T) {
			image := makeImage(t, args, "6M")
			e := editAt(t, image)
			want := readManifest(t, e.fs)
			x, err := e.Begin()
			if err != nil {
				t.Fatal(err)
			}
			fails := func(err error) {
				t.Helper()
				if !errors.Is(err, ErrNoSpace) {
					t.Fatal(err)
				}
				if len(x.staged) != 0 || *x.sb() != x.before {
					t.Fatalf("%d blocks are staged", len(x.staged))
				}
			}
			fails(x.WriteFile("/large", make([]byte, 7<<20), 0o600))
			fails(x.do(func() error {
				for i := range 300 { // more than there are inodes
					if _, err := x.Create(RootIno, fmt.Sprint(i), Attr{}); err != nil {
						return err
					}
				}
				return nil
			}))
			if err := x.Commit(t.Context()); err != nil {
				t.Fatal(err)
			}
			fsck(t, image)
			compareManifests(t, readManifest(t, openImage(t, image, nil)), want)

			// To the last block, and again once there is room.
			if x, err = e.Begin(); err != nil {
				t.Fatal(err)
			}
			ino, err := x.Create(RootIno, "full", Attr{})
			if err != nil {
				t.Fatal(err)
			}
			n := int64(0)
			for err == nil {
				if err = x.Append(ino, make([]byte, 1024)); err == nil {
					n++
				}
			}
			if !errors.Is(err, ErrNoSpace) || x.sb().FreeBlocksCount > 1 {
				t.Errorf("%v, and %d blocks are free", err, x.sb().FreeBlocksCount)
			}
			if err := x.Commit(t.Context()); err != nil {
				t.Fatal(err)
			}
			fsck(t, image)
			if x, err = e.Begin(); err != nil {
				t.Fatal(err)
			}
			defer x.Discard()
			if err := x.Remove(RootIno, "full"); err != nil {
				t.Fatal(err)
			}
			// What was freed is in use until the commit.
			if err := x.WriteFile("/again", make([]byte, 100<<10), 0o600); !errors.Is(err, ErrNoSpace) {
				t.Fatal(err)
			}
			if err := x.Commit(t.Context()); err != nil {
				t.Fatal(err)
			}
			if x, err = e.Begin(); err != nil {
				t.Fatal(err)
			}
			if err := x.WriteFile("/again", make([]byte, (n-10)*1024), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := x.Commit(t.Context()); err != nil {
				t.Fatal(err)
			}
			fsck(t, image)
		})
	}
}

// TestEditTooLarge makes a transaction that the journal has no room for.
func TestEditTooLarge(t *testing.T) {
	oracle.Require(t, "mke2fs", "e2fsck")
	image := makeImage(t, "-t ext4 -b 1024 -J size=1 -N 8000", "30M")
	e := editAt(t, image)
	want := readManifest(t, e.fs)
	x, err := e.Begin()
	if err != nil {
		t.Fatal(err)
	}
	for i := range 6000 {
		if _, err := x.Create(RootIno, fmt.Sprint(i), Attr{}); err != nil {
			t.Fatal(err)
		}
	}
	if err := x.Commit(t.Context()); !errors.Is(err, ErrTooLarge) {
		t.Fatal(err)
	}
	fsck(t, image)
	compareManifests(t, readManifest(t, openImage(t, image, nil)), want)
	compareManifests(t, readManifest(t, e.fs), want)
	if x, err = e.Begin(); err != nil {
		t.Fatal(err)
	}
	if err := x.WriteFile("/small", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := x.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	fsck(t, image)
}

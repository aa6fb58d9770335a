package ext4img

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/oracle"
)

// Names of one hash, more of them than a leaf has room for, lie in leaves
// that follow each other, and are found there, whatever comes and goes first.
// (The legacy hash needs no seed.)
func TestTxCollisions(t *testing.T) {
	pad := strings.Repeat("n", 244) // a leaf of 1 KiB has room for three
	var same []string
	for _, s := range []string{"nJRyaa", "8Q20aa", "kNLFba", "5gP6ba"} {
		same = append(same, pad+s)
	}
	image := makeImage(t, "-t ext4 -b 1024 -N 1000", "16M")
	oracle.MustRun(t, "tune2fs", "-E", "hash_alg=legacy", image)
	r := rand.New(rand.NewPCG(5, 6))
	for round := range 12 {
		tx, err := editAt(t, image).Begin()
		if err != nil {
			t.Fatal(err)
		}
		path := fmt.Sprintf("/d%d", round)
		if err := tx.MkdirAll(path, 0o755); err != nil {
			t.Fatal(err)
		}
		dir, err := tx.FS().Resolve(path, true)
		if err != nil {
			t.Fatal(err)
		}
		ino, err := tx.Create(dir, "file", Attr{})
		if err != nil {
			t.Fatal(err)
		}
		names := append([]string(nil), same...)
		for i := range 40 {
			names = append(names, fmt.Sprintf("%s%06d", pad, i))
		}
		r.Shuffle(len(names), func(i, k int) { names[i], names[k] = names[k], names[i] })
		for _, name := range names {
			if err := tx.Link(dir, name, ino); err != nil {
				t.Fatal(err)
			}
		}
		// One of the hash goes and comes back.
		again := same[r.IntN(len(same))]
		if err := tx.Remove(dir, again); err != nil {
			t.Fatal(err)
		}
		if err := tx.Link(dir, again, ino); err != nil {
			t.Fatal(err)
		}
		if err := tx.Commit(t.Context()); err != nil {
			t.Fatal(err)
		}
		fsck(t, image)
		f := openImage(t, image, nil)
		root := mountAt(t, image, "ro")
		for _, name := range names {
			if _, err := f.LookupIn(dir, name); err != nil {
				t.Error(err)
			}
			if _, err := os.Lstat(root + path + "/" + name); err != nil {
				t.Error(err)
			}
		}
		umountAt(t, root)
	}
}

// Hashes of unsigned bytes, and blocks that the kernel here does not mount.
func TestTxDirectoriesUnmounted(t *testing.T) {
	for i, c := range []struct {
		args, size, alg string
		names           int
	}{
		{"-t ext4 -b 1024", "40M", "half_md4", 1500},
		{"-t ext4 -b 1024", "40M", "tea", 1500},
		{"-t ext4 -b 1024", "40M", "legacy", 1500},
		{"-t ext4 -b 65536 -O ^has_journal", "64M", "half_md4", 2500},
		{"-t ext4 -b 65536 -O ^has_journal,^metadata_csum", "64M", "half_md4", 2500},
		{"-t ext4 -b 32768 -O ^has_journal,bigalloc", "64M", "half_md4", 1500},
	} {
		t.Run(c.args+" "+c.alg, func(t *testing.T) {
			image := makeImage(t, c.args+" -N 20000", c.size)
			oracle.MustRun(t, "tune2fs", "-E", "hash_alg="+c.alg, image)
			oracle.MustRun(t, "debugfs", "-w", "-R", "ssv flags 2", image)
			m := &dirModel{t: t, r: rand.New(rand.NewPCG(uint64(i), 12)), names: c.names, want: map[string]bool{}}
			m.begin(image)
			if err := m.tx.MkdirAll("/d", 0o755); err != nil {
				t.Fatal(err)
			}
			m.dir, _ = m.tx.FS().Resolve("/d", true)
			for round := range 3 {
				for range c.names {
					m.step([]int{75, 40, 60}[round])
				}
				if err := m.tx.Commit(t.Context()); err != nil {
					t.Fatal(err)
				}
				fsck(t, image)
				m.compare(openImage(t, image, nil))
				m.begin(image)
			}
			n, err := m.tx.FS().Inode(m.dir)
			if err != nil || n.Flags&indexFl == 0 {
				t.Errorf("the directory has no index: %v", err)
			}
			m.tx.Discard()
		})
	}
}

// A directory that moves over an empty one leaves the links of its new parent,
// which has as many as there can be, as they are.
func TestTxRenameOverFull(t *testing.T) {
	image := makeImage(t, "-t ext4 -b 1024 -N 1000", "16M")
	tx, err := editAt(t, image).Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Discard()
	to := must(tx.Mkdir(RootIno, "to", Attr{}))
	must(tx.Mkdir(RootIno, "d", Attr{}))
	for i := range 200 {
		must(tx.Mkdir(to, fmt.Sprint(i), Attr{}))
	}
	n := must(tx.inode(to))
	if n.Flags&indexFl == 0 {
		t.Fatal("the directory has no index")
	}
	n.Links = maxLinks
	tx.dirty(n)
	if err := tx.Rename(RootIno, "d", to, "7"); err != nil {
		t.Fatal(err)
	}
	if n.Links != maxLinks {
		t.Errorf("%d links, expected %d", n.Links, maxLinks)
	}
}

// Of an operation that fails nothing is left, though the content that it frees
// and the content that it writes are both of this transaction.
func TestTxFailedContent(t *testing.T) {
	for _, args := range []string{"-t ext4 -b 4096", "-t ext4 -b 1024 -O bigalloc -C 8192", "-t ext2 -b 1024"} {
		t.Run(args, func(t *testing.T) {
			image := makeImage(t, args, "16M")
			tx, err := editAt(t, image).Begin()
			if err != nil {
				t.Fatal(err)
			}
			want := bytes.Repeat([]byte("old "), 500000)
			ino := must(tx.Create(RootIno, "file", Attr{}))
			if err := tx.WriteAt(ino, want, 0); err != nil {
				t.Fatal(err)
			}
			if err := tx.SetContent(t.Context(), ino, failingReader{2 << 20, 1 << 20}); !errors.Is(err, errFailing) {
				t.Fatal(err)
			}
			if got := must(fs.ReadFile(tx.FS(), "file")); !bytes.Equal(got, want) {
				t.Error("the content has changed")
			}
			// The blocks of one that succeeds are free again.
			free := tx.sb().FreeBlocksCount
			for range 20 {
				if err := tx.SetContent(t.Context(), ino, bytesReader{bytes.NewReader(want)}); err != nil {
					t.Fatal(err)
				}
			}
			if got := tx.sb().FreeBlocksCount; got != free {
				t.Errorf("%d blocks are free, expected %d", got, free)
			}
			if err := tx.Commit(t.Context()); err != nil {
				t.Fatal(err)
			}
			fsck(t, image)
			if got := must(fs.ReadFile(openImage(t, image, nil), "file")); !bytes.Equal(got, want) {
				t.Error("the content has changed")
			}
		})
	}
}

var errFailing = errors.New("failing")

// failingReader is a disk of size bytes that cannot be read from bad on.
type failingReader struct{ size, bad int64 }

func (r failingReader) Size() int64 { return r.size }

func (r failingReader) ReadAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > r.bad {
		return 0, errFailing
	}
	for i := range p {
		p[i] = 'N'
	}
	return len(p), nil
}

// Directories that lie in their inodes get and lose names and xattrs, move, and
// become such of blocks.
func TestTxInlineDirectories(t *testing.T) {
	for i, args := range []string{"-I 256", "-I 512", "-I 512 -O ^metadata_csum", "-I 256 -O ^extents,^64bit", "-I 1024 -O ^has_journal"} {
		t.Run(args, func(t *testing.T) {
			image := makeImage(t, "-t ext4 -b 1024 -N 1000 -O inline_data "+args, "16M")
			e := editAt(t, image)
			r := rand.New(rand.NewPCG(uint64(i), 13))
			want := map[string]bool{} // names in directories, as "3/name"
			dirs := map[string]Ino{}
			inline, moved := 0, 0
			for range 20 {
				tx := must(e.Begin())
				for range 30 {
					d := fmt.Sprint(r.IntN(12))
					if dirs[d] == 0 {
						dirs[d] = must(tx.Mkdir(RootIno, d, Attr{Mode: 0o755}))
						if n := must(tx.FS().Inode(dirs[d])); n.Flags&inlineDataFl != 0 {
							inline++
						}
					}
					name := strings.Repeat("n", 1+r.IntN(12)) + fmt.Sprint(r.IntN(4))
					var err error
					switch k := r.IntN(10); {
					case want[d+"/"+name]:
						err = tx.Remove(dirs[d], name)
						delete(want, d+"/"+name)
					case k < 3:
						err = tx.SetXattr(dirs[d], fmt.Sprint("user.", r.IntN(4)), strings.Repeat("v", r.IntN(150)))
					case k < 4: // a directory goes away and comes back
						other := fmt.Sprint(r.IntN(12))
						if o := dirs[other]; o != 0 && other != d && !want[other+"/moved"] {
							if err = tx.Rename(RootIno, d, o, "moved"); err == nil {
								if p := must(tx.FS().parent(must(tx.FS().dir(dirs[d])))); p.Ino != o {
									t.Errorf("the parent is %d, expected %d", p.Ino, o)
								}
								moved++
								err = tx.Rename(o, "moved", RootIno, d)
							}
						}
					case k < 6:
						_, err = tx.Mkdir(dirs[d], name, Attr{})
						want[d+"/"+name] = true
					default:
						_, err = tx.Create(dirs[d], name, Attr{})
						want[d+"/"+name] = true
					}
					if err != nil {
						t.Fatal(err)
					}
				}
				if err := tx.Commit(t.Context()); err != nil {
					t.Fatal(err)
				}
				fsck(t, image)
			}
			if inline == 0 || moved == 0 {
				t.Errorf("%d directories in their inodes, %d moved", inline, moved)
			}
			root := mountAt(t, image, "ro")
			defer umountAt(t, root)
			n := 0
			for d := range dirs {
				for _, entry := range must(os.ReadDir(filepath.Join(root, d))) {
					if n++; !want[d+"/"+entry.Name()] {
						t.Errorf("the kernel finds %s in %s", entry.Name(), d)
					}
				}
			}
			if n != len(want) {
				t.Errorf("the kernel finds %d names, expected %d", n, len(want))
			}
		})
	}
}

// A directory whose index is damaged, or of a kind that is not known, is left
// alone.
func TestTxDamagedIndex(t *testing.T) {
	image := makeImage(t, "-t ext4 -b 1024 -O ^metadata_csum -N 1000", "16M")
	tx, err := editAt(t, image).Begin()
	if err != nil {
		t.Fatal(err)
	}
	ino, err := tx.Create(RootIno, "file", Attr{})
	if err != nil {
		t.Fatal(err)
	}
	dir, err := tx.Mkdir(RootIno, "d", Attr{})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 300 {
		if err := tx.Link(dir, fmt.Sprintf("name%d", i), ino); err != nil {
			t.Fatal(err)
		}
	}
	_, block, err := tx.fs.dirBlockAt(must(tx.inode(dir)), 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		off   int
		value byte
	}{
		{28, 9},    // hash_version
		{28, 6},    // siphash
		{29, 7},    // info_length
		{30, 5},    // indirect_levels
		{31, 1},    // unused_flags
		{32, 0xff}, // limit
		{34, 0},    // count
		{36, 0},    // a leaf that is the root
		{36, 200},  // a leaf behind the end
	} {
		bad := append([]byte(nil), good...)
		bad[int(block)*1024+c.off] = c.value
		if err := os.WriteFile(image, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		tx, err := editUnchecked(t, image).Begin()
		if err != nil {
			t.Fatal(err)
		}
		failed := 0
		for i := range 300 {
			before := len(tx.staged)
			if err := tx.Link(dir, fmt.Sprintf("new%d", i), ino); err != nil {
				failed++
				var f *FormatError
				if !errors.As(err, &f) || len(tx.staged) != before {
					t.Fatalf("%+v: %v", c, err)
				}
			}
		}
		if failed == 0 {
			t.Errorf("%+v: no name is refused", c)
		}
		tx.Discard()
		after, err := os.ReadFile(image)
		if err != nil || string(after) != string(bad) {
			t.Errorf("%+v: the image has changed: %v", c, err)
		}
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// editUnchecked opens an image for editing, sound or not.
func editUnchecked(t *testing.T, image string) *Editor {
	t.Helper()
	dev, err := blockdev.OpenFile(image, &blockdev.FileOptions{Write: true, NoLock: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dev.Close() })
	return must(openEditor(t.Context(), dev, nil, false))
}

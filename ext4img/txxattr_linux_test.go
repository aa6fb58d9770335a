package ext4img

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestTxXattrs sets and removes random xattrs, and lets e2fsck and the kernel
// judge what is there.
func TestTxXattrs(t *testing.T) {
	for i, c := range []struct {
		args     string
		max      int // bytes of a value
		readOnly bool
	}{
		{"-t ext4 -b 4096", 3000, false},
		{"-t ext4 -b 1024 -I 128", 600, false},
		{"-t ext2 -b 1024 -O ^ext_attr", 600, false},
		{"-t ext3 -b 4096", 3000, false},
		{"-t ext4 -b 1024 -O ea_inode", 20000, false},
		{"-t ext4 -b 4096 -O ea_inode,^has_journal", 20000, false},
		{"-t ext4 -b 1024 -O ea_inode,bigalloc -C 4096", 20000, false},
		{"-t ext4 -b 4096 -I 512 -O inline_data,ea_inode", 20000, true},
	} {
		t.Run(c.args, func(t *testing.T) {
			image := makeImage(t, c.args, "24M")
			m := &xattrModel{t: t, r: rand.New(rand.NewPCG(uint64(i), 3)), max: c.max, want: map[string]map[string]string{}}
			rounds := 12
			if *editLong {
				rounds = 200
			}
			for range rounds {
				e := editAt(t, image)
				tx, err := e.Begin()
				if err != nil {
					t.Fatal(err)
				}
				for range 1 + m.r.IntN(40) {
					m.step(tx)
				}
				m.compare(tx.FS())
				if err := tx.Commit(t.Context()); err != nil {
					t.Fatal(err)
				}
				fsck(t, image)
				m.compare(openImage(t, image, nil))
			}
			m.compareKernel(image)
		})
	}
}

type xattrModel struct {
	t    *testing.T
	r    *rand.Rand
	max  int
	want map[string]map[string]string // by file
}

func (m *xattrModel) step(tx *Tx) {
	m.t.Helper()
	files := slices.Sorted(maps.Keys(m.want))
	if len(files) < 3 || m.r.IntN(8) == 0 {
		name := fmt.Sprintf("f%d", m.r.IntN(40))
		if m.want[name] != nil {
			return
		}
		var err error
		if m.r.IntN(4) == 0 {
			_, err = tx.Mkdir(RootIno, name, Attr{Mode: 0o755})
		} else {
			_, err = tx.Create(RootIno, name, Attr{Mode: 0o644})
		}
		if err != nil {
			m.t.Fatal(err)
		}
		m.want[name] = map[string]string{}
		return
	}
	file := files[m.r.IntN(len(files))]
	have := m.want[file]
	e, err := tx.FS().LookupIn(RootIno, file)
	if err != nil {
		m.t.Fatal(err)
	}
	switch k := m.r.IntN(12); {
	case k == 0:
		if err := tx.Remove(RootIno, file); err != nil {
			m.t.Fatal(err)
		}
		delete(m.want, file)
	case k < 4 && len(have) > 0:
		names := slices.Sorted(maps.Keys(have))
		name := names[m.r.IntN(len(names))]
		if err := tx.RemoveXattr(e.Ino, name); err != nil {
			m.t.Fatal(err)
		}
		delete(have, name)
		if err := tx.RemoveXattr(e.Ino, name); !errors.Is(err, fs.ErrNotExist) {
			m.t.Fatalf("an xattr that is not there is removed: %v", err)
		}
	case k == 4: // all that another file has
		for name, value := range m.want[files[m.r.IntN(len(files))]] {
			m.set(tx, e.Ino, have, name, value)
		}
	default:
		name := []string{"user.", "trusted.", "security."}[m.r.IntN(3)] + strings.Repeat(string(rune('a'+m.r.IntN(5))), 1+m.r.IntN(30))
		size := m.r.IntN([]int{4, 60, 200, m.max}[m.r.IntN(4)] + 1)
		m.set(tx, e.Ino, have, name, strings.Repeat(string(rune('A'+m.r.IntN(26))), size))
	}
}

func (m *xattrModel) set(tx *Tx, ino Ino, have map[string]string, name, value string) {
	m.t.Helper()
	switch err := tx.SetXattr(ino, name, value); {
	case err == nil:
		have[name] = value
	case !errors.Is(err, ErrNoSpace):
		m.t.Fatal(err)
	}
}

func (m *xattrModel) compare(f *FS) {
	m.t.Helper()
	for file, want := range m.want {
		e, err := f.LookupIn(RootIno, file)
		if err != nil {
			m.t.Fatal(err)
		}
		got := map[string]string{}
		for x, err := range f.Xattrs(e.Ino) {
			if err != nil {
				m.t.Fatal(err)
			}
			got[x.Name] = x.Value
		}
		if !maps.Equal(got, want) {
			m.t.Fatalf("%s: %d xattrs, expected %d, or other values", file, len(got), len(want))
		}
	}
}

// compareKernel reads the xattrs of a mount that is read only.
func (m *xattrModel) compareKernel(image string) {
	m.t.Helper()
	root := mountAt(m.t, image, "ro")
	defer umountAt(m.t, root)
	buf := make([]byte, 1<<16)
	for file, want := range m.want {
		path := filepath.Join(root, file)
		n, err := unix.Llistxattr(path, buf)
		if err != nil {
			m.t.Fatal(err)
		}
		got := map[string]string{}
		for name := range strings.SplitSeq(strings.TrimRight(string(buf[:n]), "\x00"), "\x00") {
			if name == "" {
				continue
			}
			value := make([]byte, 1<<16)
			k, err := unix.Lgetxattr(path, name, value)
			if err != nil {
				m.t.Fatalf("%s: %s: %v", file, name, err)
			}
			got[name] = string(value[:k])
		}
		if !maps.Equal(got, want) {
			m.t.Errorf("%s: the kernel finds %d xattrs, expected %d, or other values", file, len(got), len(want))
		}
	}
}

// Inodes with the same xattrs share a block, and one that changes leaves the
// block to the others.
func TestTxXattrsShared(t *testing.T) {
	image := makeImage(t, "-t ext4 -b 4096", "16M")
	e := editAt(t, image)
	begin := func() *Tx {
		t.Helper()
		tx, err := e.Begin()
		if err != nil {
			t.Fatal(err)
		}
		return tx
	}
	commit := func(tx *Tx) {
		t.Helper()
		if err := tx.Commit(t.Context()); err != nil {
			t.Fatal(err)
		}
		fsck(t, image)
	}
	tx := begin()
	blocks := map[int64]int{}
	var inos []Ino
	for i := range 1030 {
		ino, err := tx.Create(RootIno, fmt.Sprint(i), Attr{})
		if err == nil {
			err = tx.SetXattr(ino, "user.a", strings.Repeat("a", 1000))
		}
		if err != nil {
			t.Fatal(err)
		}
		n, err := tx.FS().Inode(ino)
		if err != nil {
			t.Fatal(err)
		}
		blocks[n.FileACL]++
		inos = append(inos, ino)
	}
	commit(tx)
	if len(blocks) != 2 {
		t.Errorf("%d blocks, expected 2", len(blocks))
	}
	tx = begin()
	if err := tx.SetXattr(inos[0], "user.a", strings.Repeat("b", 1000)); err != nil {
		t.Fatal(err)
	}
	for i := range 500 {
		if err := tx.Remove(RootIno, fmt.Sprint(2*i+1)); err != nil {
			t.Fatal(err)
		}
	}
	commit(tx)
	for x, err := range e.fs.Xattrs(inos[2]) {
		if err != nil || x.Value != strings.Repeat("a", 1000) {
			t.Errorf("%q has changed: %v", x.Name, err)
		}
	}
}

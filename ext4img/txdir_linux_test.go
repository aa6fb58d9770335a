package ext4img

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"qimg/qcow2/blockdev/oracle"
)

// TestTxDirectories adds, removes and renames random names in directories of
// all kinds, and lets e2fsck judge the indexes and the kernel the names.
func TestTxDirectories(t *testing.T) {
	for i, c := range []struct {
		args, tune string
		names      int
	}{
		{"-t ext4 -b 4096", "", 2000},
		{"-t ext4 -b 1024", "", 6000}, // two levels
		{"-t ext4 -b 1024 -O large_dir", "", 6000},
		{"-t ext4 -b 1024 -O ^metadata_csum", "", 3000},
		{"-t ext3 -b 1024", "-E hash_alg=tea", 1500},
		{"-t ext3 -b 2048", "-E hash_alg=legacy", 1500},
		{"-t ext4 -b 1024 -O ^dir_index", "", 400},
		{"-t ext4 -b 1024 -O ^filetype", "", 1500},
		{"-t ext2 -b 1024 -I 128", "", 1500},
		{"-t ext4 -b 4096 -I 512 -O inline_data", "", 1500},
		{"-t ext4 -b 1024 -O ^has_journal", "", 1500},
	} {
		t.Run(c.args, func(t *testing.T) {
			image := makeImage(t, c.args, "40M")
			if c.tune != "" {
				oracle.MustRun(t, "tune2fs", append(strings.Fields(c.tune), image)...)
			}
			m := &dirModel{t: t, r: rand.New(rand.NewPCG(uint64(i), 11)), names: c.names, want: map[string]bool{}}
			m.begin(image)
			if err := m.tx.MkdirAll("/d/e", 0o755); err != nil {
				t.Fatal(err)
			}
			m.dir, _ = m.tx.FS().Resolve("/d/e", true)
			m.target, _ = m.tx.FS().Resolve("/lost+found", true)
			for round := range 4 {
				grow := []int{70, 50, 5, 60}[round] // of a hundred changes
				for range c.names {
					m.step(grow)
				}
				m.compare(m.tx.FS())
				if err := m.tx.Commit(t.Context()); err != nil {
					t.Fatal(err)
				}
				fsck(t, image)
				m.compare(openImage(t, image, nil))
				m.begin(image)
			}
			m.tx.Discard()
			root := mountAt(t, image, "ro")
			defer umountAt(t, root)
			list, err := os.ReadDir(root + "/d/e")
			if err != nil || len(list) != len(m.want) {
				t.Errorf("the kernel finds %d names, expected %d: %v", len(list), len(m.want), err)
			}
			for _, name := range m.list {
				if _, err := os.Lstat(root + "/d/e/" + name); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// dirModel is what a directory is to hold.
type dirModel struct {
	t           *testing.T
	r           *rand.Rand
	tx          *Tx
	dir, target Ino
	names       int
	want        map[string]bool
	list        []string
}

func (m *dirModel) begin(image string) {
	m.t.Helper()
	tx, err := editAt(m.t, image).Begin()
	if err != nil {
		m.t.Fatal(err)
	}
	m.tx = tx
}

// step makes one change, of which so many of a hundred add a name: a hard link
// to one file, so that inodes do not run out.
func (m *dirModel) step(grow int) {
	m.t.Helper()
	switch k := m.r.IntN(100); {
	case k < grow || len(m.list) == 0:
		name := fmt.Sprintf("%x%s", m.r.IntN(1<<20), strings.Repeat("\xe9x", m.r.IntN(124)/(1+m.r.IntN(8))))
		_, err := m.tx.Mknod(m.dir, name, TypeFifo, 0, 0, Attr{})
		switch {
		case m.want[name] && errors.Is(err, fs.ErrExist):
		case !m.want[name] && err == nil:
			m.want[name] = true
			m.list = append(m.list, name)
		case errors.Is(err, ErrNoSpace):
		default:
			m.t.Fatalf("%q: %v, and it is there: %v", name, err, m.want[name])
		}
	case k%10 == 0:
		i := m.r.IntN(len(m.list))
		name := fmt.Sprintf("renamed%d", m.r.IntN(1<<30))
		if err := m.tx.Rename(m.dir, m.list[i], m.dir, name); err != nil {
			m.t.Fatal(err)
		}
		delete(m.want, m.list[i])
		m.want[name], m.list[i] = true, name
	default:
		i := m.r.IntN(len(m.list))
		if err := m.tx.Remove(m.dir, m.list[i]); err != nil {
			m.t.Fatal(err)
		}
		delete(m.want, m.list[i])
		m.list = slices.Delete(m.list, i, i+1)
	}
}

func (m *dirModel) compare(f *FS) {
	m.t.Helper()
	n := 0
	for e, err := range f.Entries(m.dir) {
		if err != nil || !m.want[e.Name] {
			m.t.Fatalf("%q: %v", e.Name, err)
		}
		n++
	}
	if n != len(m.want) {
		m.t.Fatalf("%d names, expected %d", n, len(m.want))
	}
	for _, name := range m.list {
		if _, err := f.LookupIn(m.dir, name); err != nil {
			m.t.Fatalf("%q: %v", name, err)
		}
	}
	if _, err := f.LookupIn(m.dir, "nobody"); !errors.Is(err, fs.ErrNotExist) {
		m.t.Fatalf("a name that is not there: %v", err)
	}
}

// A directory grows in time that is about proportional to its names, to three
// levels of index blocks with large_dir, and is full after two without.
func TestTxLargeDirectory(t *testing.T) {
	for _, c := range []struct {
		args string
		n    int
		pad  int // to the length of names
		full bool
	}{
		{args: "-t ext4 -b 4096", n: 40000},
		{args: "-t ext4 -b 4096 -O ^dir_index", n: 3000}, // every name is looked for in all blocks
		{args: "-t ext4 -b 1024 -O large_dir", n: 45000, pad: 240},
		{args: "-t ext4 -b 1024", n: 60000, pad: 240, full: true},
	} {
		t.Run(c.args, func(t *testing.T) {
			if c.pad > 0 && testing.Short() {
				t.Skip("short")
			}
			image := makeImage(t, c.args+" -N 1000", "200M")
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
			start, at := time.Now(), 0
			for ; at < c.n && err == nil; at++ {
				err = tx.Link(dir, fmt.Sprintf("%s%d", strings.Repeat("n", c.pad), at), ino)
			}
			t.Logf("%d names in %v", at, time.Since(start))
			if err != nil && !(c.full && errors.Is(err, ErrNoSpace)) || c.full && err == nil {
				t.Fatal(err)
			}
			if err := tx.Commit(t.Context()); err != nil {
				t.Fatal(err)
			}
			fsck(t, image)
			f := openImage(t, image, nil)
			if !c.full && at != c.n {
				t.Errorf("%d names", at)
			}
			for _, i := range []int{0, at / 2, at - 2} {
				if _, err := f.LookupIn(dir, fmt.Sprintf("%s%d", strings.Repeat("n", c.pad), i)); err != nil {
					t.Error(i, err)
				}
			}
		})
	}
}

package ext4img

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/blocktest"
	"qimg/qcow2/blockdev/oracle"
	"qimg/qcow2/transfer"
)

// crashCase is a file system whose commits are cut short.
type crashCase struct {
	name, args, size string
	// whole: after a crash the transaction is there, or it is not; else no
	// more than what it does not touch is as it was.
	whole bool
	debug string // commands of debugfs, before
	mount string // options of a mount, before
	// clusters are those of the qcow2 image that the file system lies in, over
	// a snapshot of itself; 0: it lies in a raw one.
	clusters int64
	// journal are features that the journal has to have, compat and incompat.
	compat, incompat uint32
}

var crashCases = []crashCase{
	{name: "v3", args: "-t ext4 -b 1024 -J size=1", size: "4M", whole: true, incompat: jbd2IncompatCsumV3 | jbd2Incompat64bit},
	{name: "v3-4k", args: "-t ext4 -b 4096 -J size=4", size: "20M", whole: true, incompat: jbd2IncompatCsumV3 | jbd2Incompat64bit},
	{name: "none", args: "-t ext4 -b 1024 -J size=1 -O ^metadata_csum,^64bit", size: "4M", whole: true},
	{name: "v2", args: "-t ext4 -b 1024 -J size=1", size: "4M", whole: true, debug: "jo -c -v 2\njc", incompat: jbd2IncompatCsumV2},
	{name: "v1", args: "-t ext4 -b 1024 -J size=1 -O ^metadata_csum,^64bit", size: "4M", whole: true, mount: "journal_checksum", compat: jbd2CompatChecksum},
	{name: "async", args: "-t ext4 -b 1024 -J size=1 -O ^metadata_csum", size: "4M", whole: true, mount: "journal_async_commit,data=writeback", compat: jbd2CompatChecksum, incompat: jbd2IncompatAsyncCommit},
	{name: "qcow2", args: "-t ext4 -b 1024 -J size=1", size: "4M", whole: true, clusters: 4096},
	{name: "ext3", args: "-t ext3 -b 1024 -J size=1", size: "4M", whole: true},
	{name: "fast-commit", args: "-t ext4 -b 1024 -J size=2 -O fast_commit", size: "6M", whole: true},
	{name: "no-journal", args: "-t ext4 -b 1024 -O ^has_journal", size: "3M"},
	{name: "ext2", args: "-t ext2 -b 1024", size: "3M"},
}

// crashWork makes three transactions, and calls done after each.
func crashWork(t testing.TB, dev blockdev.Device, done func(step int)) {
	t.Helper()
	e, err := OpenEditor(t.Context(), dev, &EditOptions{Now: func() time.Time { return time.Unix(1700000000, 0) }})
	if err != nil {
		t.Fatal(err)
	}
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for step := range 3 {
		x, err := e.Begin()
		check(err)
		switch step {
		case 0: // replace, make, grow a directory
			check(x.WriteFile("/touched/shadow", bytes.Repeat([]byte("new shadow\n"), 300), 0o600))
			dir, err := x.Mkdir(RootIno, "touched-dir", Attr{Mode: 0o755})
			check(err)
			for i := range 12 {
				_, err := x.Create(dir, strings.Repeat("n", 100)+fmt.Sprint(i), Attr{Mode: 0o600})
				check(err)
			}
			_, err = x.Symlink(RootIno, "touched-link", strings.Repeat("t/", 50), Attr{})
			check(err)
		case 1: // move, write into, change
			ino, err := x.FS().Resolve("touched/big", false)
			check(err)
			check(x.WriteAt(ino, []byte("in the midst"), 3000))
			check(x.Append(ino, []byte("at the end")))
			dir, err := x.FS().Resolve("touched", false)
			check(err)
			check(x.Rename(dir, "shadow", RootIno, "touched-moved"))
			mode := uint16(0o4711)
			check(x.SetAttr(ino, SetAttr{Mode: &mode}))
			// A block that begins as those of the journal do.
			ino, err = x.FS().Resolve("touched/escaped", false)
			check(err)
			n, err := x.inode(ino)
			check(err)
			m, err := x.FS().mapping(n, 0)
			check(err)
			b, err := x.edit(m.at(0).physical)
			check(err)
			copy(b, "\xc0\x3b\x39\x98 escaped")
		case 2: // remove
			dir, err := x.FS().Resolve("touched", false)
			check(err)
			check(x.Remove(dir, "big"))
			check(x.RemoveAll(t.Context(), RootIno, "touched-dir"))
			check(x.Remove(RootIno, "touched-link"))
			for i := range 5 { // where there is room, not where there will be
				check(x.WriteFile(fmt.Sprintf("/touched/again%d", i), bytes.Repeat([]byte("again "), 2000), 0o600))
			}
		}
		check(x.Commit(t.Context()))
		done(step)
	}
}

// crashImage makes the image of a case, with files that stay and files that
// are touched.
func crashImage(t testing.TB, c crashCase) *blockdev.Memory {
	t.Helper()
	image := makeImage(t, c.args, c.size)
	if c.debug != "" {
		debugfs(t, image, c.debug)
	}
	if c.mount != "" {
		dir := mountAt(t, image, c.mount)
		if err := os.WriteFile(filepath.Join(dir, "mounted"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		umountAt(t, dir)
	}
	e := editAt(t, image)
	x, err := e.Begin()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{"/touched", "/stays"} {
		if err := x.MkdirAll(p, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 10 {
		if err := x.WriteFile(fmt.Sprintf("/stays/%d", i), bytes.Repeat([]byte{byte(i + 1)}, i*700), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := x.WriteFile("/touched/shadow", []byte("old shadow"), 0o640); err != nil {
		t.Fatal(err)
	}
	if err := x.WriteFile("/touched/escaped", bytes.Repeat([]byte("not escaped "), 50), 0o640); err != nil {
		t.Fatal(err)
	}
	if err := x.WriteFile("/touched/big", bytes.Repeat([]byte("big file "), 2000), 0o640); err != nil {
		t.Fatal(err)
	}
	if err := x.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if j := e.journal; c.whole && (j.compat&c.compat != c.compat || j.incompat&c.incompat != c.incompat) {
		t.Fatalf("the journal has the features %#x and %#x, expected %#x and %#x", j.compat, j.incompat, c.compat, c.incompat)
	}
	m := openMemory(t, image)
	if c.clusters == 0 {
		return m
	}
	q := blockdev.NewMemory(0)
	if err := qcow2.Create(t.Context(), q, m.Size(), &qcow2.CreateOptions{FormatOptions: qcow2.FormatOptions{ClusterSize: c.clusters}}); err != nil {
		t.Fatal(err)
	}
	im, err := qcow2.New(q, &qcow2.OpenOptions{Write: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := transfer.Copy(t.Context(), im, m, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := im.CreateSnapshot(t.Context(), "before", nil); err != nil {
		t.Fatal(err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	return q
}

// inside returns what lies in a device: itself or, if that is a qcow2 image,
// the guest's disk.
func (c crashCase) inside(t testing.TB, dev blockdev.Device, write bool) blockdev.Device {
	t.Helper()
	if c.clusters == 0 {
		return dev
	}
	im, err := qcow2.New(dev, &qcow2.OpenOptions{Write: write})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { im.Close() })
	return im
}

// treeOf is what a device holds, once its journal is replayed.
func treeOf(t *testing.T, dev blockdev.Reader) manifest {
	t.Helper()
	f, err := Open(dev, nil)
	if err != nil {
		t.Fatal(err)
	}
	return readManifest(t, f)
}

// untouched is the part of a tree that the transactions leave alone.
func untouched(m manifest) manifest {
	out := maps.Clone(m)
	maps.DeleteFunc(out, func(p, _ string) bool {
		return p == "" || strings.HasPrefix(p, "touched") || strings.HasPrefix(p, "lost+found")
	})
	return out
}

// compareParts wants of a tree that e2fsck has repaired that what is in all of
// some others is in it, under whatever name, and that every name leads to what
// it does in one of them.
func compareParts(t *testing.T, got manifest, want []manifest, s blocktest.CrashState) {
	t.Helper()
	contents := func(m manifest) map[string]bool {
		list := map[string]bool{}
		for _, line := range m {
			if isRegularLine(line) {
				list[line[strings.LastIndexByte(line, ' '):]] = true
			}
		}
		return list
	}
	have := contents(got)
	for content := range contents(want[0]) {
		if contents(want[len(want)-1])[content] && !have[content] {
			t.Fatalf("a content is lost\n%v", s)
		}
	}
	for p, line := range got {
		if !isRegularLine(line) || strings.HasPrefix(p, "lost+found/") {
			continue
		}
		content, same := line[strings.LastIndexByte(line, ' '):], false
		for _, w := range want {
			same = same || strings.HasSuffix(w[p], content)
		}
		if !same {
			t.Fatalf("%s has another content\n%v", p, s)
		}
	}
}

// TestCrashCommits cuts commits short in every way that a disk can, and has
// e2fsck repair what is left.
func TestCrashCommits(t *testing.T) {
	oracle.Require(t, "mke2fs", "e2fsck", "debugfs")
	for i, c := range crashCases {
		t.Run(c.name, func(t *testing.T) {
			if testing.Short() && i%3 != 0 {
				t.Skip("short")
			}
			base := crashImage(t, c)
			rec, err := blocktest.NewRecorder(base.Clone())
			if err != nil {
				t.Fatal(err)
			}
			dev := c.inside(t, rec, true)
			trees := []manifest{treeOf(t, dev)}
			crashWork(t, dev, func(step int) {
				trees = append(trees, treeOf(t, dev))
				rec.Mark(step + 1)
			})
			opts := &blocktest.CrashOptions{Subsets: 6, Tears: 1, Seed: uint64(i)}
			every := 25 // states that e2fsck looks at
			if *editLong {
				opts, every = &blocktest.CrashOptions{}, 3
			}
			if !c.whole {
				every = (every + 1) / 2
			}
			image := filepath.Join(t.TempDir(), "image")
			r := rand.New(rand.NewPCG(1, 2))
			states, looked := 0, 0
			for s, err := range rec.CrashStates(opts) {
				if err != nil {
					t.Fatal(err)
				}
				states++
				mark, _ := s.Mark.(int)
				want := trees[mark : min(mark+1, len(trees)-1)+1]
				oneOf := func(got manifest) bool {
					for _, w := range want {
						if maps.Equal(got, w) {
							return true
						}
					}
					return false
				}
				if c.whole && !oneOf(treeOf(t, c.inside(t, s.Dev(), false))) {
					t.Fatalf("the tree is neither that before nor that after\n%v", s)
				}
				if r.IntN(every) != 0 {
					continue
				}
				looked++
				writeMemory(t, image, c.inside(t, s.Dev(), false))
				args := "-p"
				if !c.whole {
					args = "-fy"
				}
				if r := oracle.Run(t, "e2fsck", args, image); r.Code > 1 {
					t.Fatalf("e2fsck %s: %d\n%s%s\n%v", args, r.Code, r.Stdout, r.Stderr, s)
				}
				fsck(t, image)
				got := treeOf(t, openMemory(t, image))
				switch {
				case c.whole && !oneOf(got):
					t.Fatalf("the tree is neither that before nor that after\n%v", s)
				case !c.whole && !maps.Equal(untouched(got), untouched(trees[0])):
					t.Fatalf("other files have changed\n%v", s)
				case !c.whole:
					compareParts(t, got, want, s)
				}
				if !c.whole {
					continue
				}
				// The same by an Editor.
				dev := c.inside(t, s.Dev().Clone(), true)
				if _, err := OpenEditor(t.Context(), dev, nil); err != nil {
					t.Fatalf("%v\n%v", err, s)
				}
				writeMemory(t, image, dev)
				fsck(t, image)
				if !oneOf(treeOf(t, dev)) {
					t.Fatalf("the tree after OpenEditor is neither that before nor that after\n%v", s)
				}
			}
			t.Logf("%d states, e2fsck looked at %d", states, looked)
			if looked < 4 {
				t.Errorf("%d states, e2fsck looked at %d", states, looked)
			}
		})
	}
}

func writeMemory(t testing.TB, path string, m blockdev.Reader) {
	t.Helper()
	b := make([]byte, m.Size())
	if _, err := m.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func openMemory(t testing.TB, path string) *blockdev.Memory {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	m := blockdev.NewMemory(int64(len(b)))
	if _, err := m.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return m
}

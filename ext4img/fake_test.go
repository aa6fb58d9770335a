package ext4img

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"sort"
	"strings"
	"testing"
)

// fakeEntry is an entry of a source that exists only in the test, and so can
// have what no file system of the test machine can hold.
type fakeEntry struct {
	stat     stat
	target   string
	xattr    map[string]string
	children map[string]*fakeEntry
	content  func(p []byte, off int64) // nil: a pattern of the offset
	spans    []span                    // nil: all data
	err      error                     // from lstat
	openErr  error
	now      *stat // what an open file says of itself; nil: stat
}

// fakeDir is a sourceDir of fake entries. Its names come in an order that seed
// decides.
type fakeDir struct {
	e    *fakeEntry
	seed uint64
}

func (d fakeDir) readNames(fn func(string) error) error {
	names := make([]string, 0, len(d.e.children))
	for name := range d.e.children {
		names = append(names, name)
	}
	sort.Strings(names)
	r := rand.New(rand.NewPCG(d.seed, 1))
	r.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
	for _, name := range names {
		if err := fn(name); err != nil {
			return err
		}
	}
	return nil
}

func (d fakeDir) entry(name string) (*fakeEntry, error) {
	if name == "." {
		return d.e, nil
	}
	e := d.e.children[name]
	if e == nil {
		return nil, fs.ErrNotExist
	}
	return e, e.err
}

func (d fakeDir) lstat(name string) (stat, error) {
	e, err := d.entry(name)
	if err != nil {
		return stat{}, err
	}
	st := e.stat
	st.sparse = e.spans != nil
	return st, nil
}

func (d fakeDir) readlink(name string) (string, error) {
	e, err := d.entry(name)
	return e.target, err
}

func (d fakeDir) xattrs(name string, fn func(name, value string) error) error {
	e, err := d.entry(name)
	if err != nil {
		return err
	}
	keys := make([]string, 0, len(e.xattr))
	for k := range e.xattr {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	r := rand.New(rand.NewPCG(d.seed, 2))
	r.Shuffle(len(keys), func(i, j int) { keys[i], keys[j] = keys[j], keys[i] })
	for _, k := range keys {
		if err := fn(k, e.xattr[k]); err != nil {
			return err
		}
	}
	return nil
}

func (d fakeDir) readable(name string, _ bool) error {
	e, err := d.entry(name)
	return errors.Join(err, e.openErr)
}

func (d fakeDir) openDir(name string) (sourceDir, error) {
	e, err := d.entry(name)
	return fakeDir{e, d.seed}, err
}

func (d fakeDir) open(name string) (sourceFile, error) {
	e, err := d.entry(name)
	if err == nil {
		err = e.openErr
	}
	return fakeFile{e}, err
}

func (d fakeDir) close() error { return nil }

type fakeFile struct{ e *fakeEntry }

func (f fakeFile) ReadAt(p []byte, off int64) (int, error) {
	size := f.e.stat.size
	if f.e.now != nil {
		size = f.e.now.size
	}
	n := int(min(int64(len(p)), max(size-off, 0)))
	if f.e.content != nil {
		f.e.content(p[:n], off)
	} else {
		for i := range p[:n] {
			p[i] = pattern(off + int64(i))
		}
	}
	if f.e.spans != nil {
		f.clearHoles(p[:n], off)
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// clearHoles zeroes what no span covers of the bytes at off.
func (f fakeFile) clearHoles(p []byte, off int64) {
	at := off
	first := sort.Search(len(f.e.spans), func(i int) bool { return f.e.spans[i].end > off })
	for _, s := range f.e.spans[first:] {
		if s.off >= off+int64(len(p)) {
			break
		}
		clear(p[at-off : max(s.off, at)-off])
		at = min(s.end, off+int64(len(p)))
	}
	clear(p[at-off:])
}

// pattern is the content of fake files: it differs from block to block.
func pattern(off int64) byte { return byte(off ^ off>>9 ^ off>>18*7 + 1) }

func (f fakeFile) stat() (stat, error) {
	if f.e.now != nil {
		return *f.e.now, nil
	}
	return f.e.stat, nil
}

func (f fakeFile) spans(int64) ([]span, error) { return f.e.spans, nil }
func (f fakeFile) kernelFile() *os.File        { return nil }
func (f fakeFile) close() error                { return nil }

func fakeRoot() *fakeEntry {
	return &fakeEntry{stat: stat{mode: modeDir | 0o755, sec: 1700000000}, children: map[string]*fakeEntry{}}
}

// put adds an entry at a slash-separated path, with the directories on the way.
func (e *fakeEntry) put(path string, n *fakeEntry) *fakeEntry {
	dir, name := e, path
	for {
		first, rest, ok := strings.Cut(name, "/")
		if !ok {
			break
		}
		if dir.children[first] == nil {
			dir.children[first] = &fakeEntry{stat: stat{mode: modeDir | 0o755, sec: 1700000001}, children: map[string]*fakeEntry{}}
		}
		dir, name = dir.children[first], rest
	}
	dir.children[name] = n
	return n
}

func fakeReg(size int64) *fakeEntry {
	return &fakeEntry{stat: stat{mode: modeReg | 0o644, links: 1, size: size, sec: 1600000000, nsec: 123456789}}
}

// opened is a Source of a directory that is open already.
type opened struct{ root sourceDir }

func (s opened) lay(b *builder) error { return layDir(b, s.root, nil) }

func scan(ctx context.Context, root sourceDir, opts *ScanOptions) (*Tree, error) {
	return Merge(ctx, []Source{opened{root}}, opts)
}

func scanFake(t testing.TB, root *fakeEntry, seed uint64, opts *ScanOptions) *Tree {
	t.Helper()
	if opts == nil {
		opts = &ScanOptions{Warn: func(text string) { t.Error("warning:", text) }}
	}
	tree, err := scan(context.Background(), fakeDir{root, seed}, opts)
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

// writeImage lays a tree out and writes it to a sparse file.
func writeImage(t testing.TB, tree *Tree, lo *LayoutOptions, wo *WriteOptions) (path string, l *Layout) {
	t.Helper()
	l, err := NewLayout(t.Context(), tree, lo)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.CreateTemp(t.TempDir(), "*.img")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(l.Size()); err != nil {
		t.Fatal(err)
	}
	if err := l.Write(t.Context(), f, wo); err != nil {
		t.Fatal(err)
	}
	return f.Name(), l
}

// discard is a sink that keeps nothing.
type discard struct{}

func (discard) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }

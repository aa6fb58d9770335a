package ext4img

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/fstest"

	"qimg/qcow2/blockdev"
)

// openImage opens the file system in an image file.
func openImage(t testing.TB, image string, opts *OpenOptions) *FS {
	t.Helper()
	dev, err := blockdev.OpenFile(image, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dev.Close() })
	f, err := Open(dev, opts)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// TestReadTorture reads what the builder writes, at every block size, back to
// what it was built from.
func TestReadTorture(t *testing.T) {
	for _, bs := range []int{1024, 2048, 4096} {
		if testing.Short() && bs != 1024 {
			continue
		}
		root := tortureTree(int64(bs))
		image, l := writeImage(t, scanFake(t, root, 1, nil), &LayoutOptions{BlockSize: bs, Label: "torture"}, nil)
		f := openImage(t, image, nil)
		if s := f.Super(); s.Label != "torture" || s.UUID != l.UUID() || s.BlockSize != bs || s.FreeBlocksCount != l.freeBlocks() || s.State != StateClean {
			t.Errorf("superblock: %+v", s)
		}
		compareRead(t, f, root, "", RootIno)
	}
}

// compareRead compares a file, and what lies below it, with the source that it
// was built from.
func compareRead(t *testing.T, f *FS, e *fakeEntry, path string, ino Ino) {
	t.Helper()
	n, err := f.Inode(ino)
	if err != nil {
		t.Errorf("%s: %v", path, err)
		return
	}
	check := func(what string, got, want any) {
		t.Helper()
		if got != want {
			t.Errorf("%s: %s: got %v, want %v", path, what, got, want)
		}
	}
	check("mode", n.Mode, e.stat.mode)
	check("uid", n.UID, e.stat.uid)
	check("gid", n.GID, e.stat.gid)
	check("mtime", [2]int64{n.Mtime.Unix(), int64(n.Mtime.Nanosecond())}, [2]int64{e.stat.sec, int64(e.stat.nsec)})
	got := map[string]string{}
	for x, err := range f.Xattrs(ino) {
		if err != nil {
			t.Errorf("%s: %v", path, err)
		}
		got[x.Name] = x.Value
	}
	if !maps.Equal(got, e.xattr) {
		t.Errorf("%s: xattrs %.300q, want %.300q", path, got, e.xattr)
	}
	switch e.stat.mode & modeType {
	case modeDir:
		names := map[string]Ino{}
		for d, err := range f.Entries(ino) {
			if err != nil {
				t.Errorf("%s: %v", path, err)
				continue
			}
			names[d.Name] = d.Ino
		}
		for name, c := range e.children {
			d, err := f.LookupIn(ino, name)
			if err != nil || d.Ino != names[name] || d.Type != FileType(fileType(c.stat.mode)) {
				t.Errorf("%s: lookup of %q: %v, %v", path, name, d, err)
				continue
			}
			compareRead(t, f, c, path+"/"+name, d.Ino)
			delete(names, name)
		}
		delete(names, lostFoundName)
		if len(names) > 0 {
			t.Errorf("%s: entries %v that the source lacks", path, names)
		}
	case modeLink:
		target, err := f.Readlink(ino)
		if err != nil || target != e.target {
			t.Errorf("%s: readlink: %q, %v", path, target, err)
		}
	case modeChar, modeBlock:
		major, minor := n.Rdev()
		dev, _ := newEncodeDev(major, minor)
		check("rdev", dev, e.stat.rdev)
	case modeReg:
		check("size", n.Size, e.stat.size)
		check("links", uint32(n.Links), e.stat.links)
		compareReadContent(t, f, e, path, ino)
	}
}

func compareReadContent(t *testing.T, f *FS, e *fakeEntry, path string, ino Ino) {
	t.Helper()
	c, err := f.File(ino)
	if err != nil {
		t.Errorf("%s: %v", path, err)
		return
	}
	bs := int64(f.sb.BlockSize)
	fake := fakeFile{e}
	blocks := int64(0)
	for off := int64(0); off < c.Size(); {
		x, err := c.NextExtent(off)
		if err != nil {
			t.Errorf("%s: %v", path, err)
			return
		}
		if x.Off != off || x.Len < 1 || off+x.Len > c.Size() {
			t.Errorf("%s: extent %+v at %d of %d", path, x, off, c.Size())
			return
		}
		if !x.Kind.ReadsZero() {
			blocks += ceilDiv(x.Len, bs)
			got, want := make([]byte, x.Len), make([]byte, x.Len)
			if _, err := c.ReadAt(got, off); err != nil && err != io.EOF {
				t.Errorf("%s: %v", path, err)
				return
			}
			fake.ReadAt(want, off)
			if !bytes.Equal(got, want) {
				t.Errorf("%s: bytes %d to %d differ", path, off, off+x.Len)
			}
			if _, err := x.Host.ReadAt(got, x.HostOff); err != nil && err != io.EOF || !bytes.Equal(got, want) {
				t.Errorf("%s: bytes %d to %d of the image at %d differ: %v", path, off, off+x.Len, x.HostOff, err)
			}
		}
		off += x.Len
	}
	spans := e.spans
	if spans == nil {
		spans = []span{{0, e.stat.size}}
	}
	want, last := int64(0), int64(-1)
	for _, s := range spans {
		for b := max(s.off/bs, last+1); b*bs < s.end; b++ {
			want++
			last = b
		}
	}
	if blocks != want {
		t.Errorf("%s: %d blocks of data, want %d", path, blocks, want)
	}
}

// TestIOFS has the standard library judge the io/fs side.
func TestIOFS(t *testing.T) {
	root := fakeRoot()
	for _, name := range []string{"a", "dir/b", "dir/sub/c", "empty", "big/" + strings.Repeat("x", 200)} {
		root.put(name, fakeReg(int64(len(name))*1000))
	}
	for i := range 300 {
		root.put("big/"+strings.Repeat("y", i%50)+string(rune('A'+i%26))+string(rune('a'+i/26)), fakeReg(3))
	}
	link := func(name, target string) {
		root.put(name, &fakeEntry{stat: stat{mode: modeLink | 0o777, links: 1, size: int64(len(target))}, target: target})
	}
	link("dir/up", "../a")
	link("dir/abs", "/dir/sub")
	link("long", strings.Repeat("./", 40)+"a")
	image, _ := writeImage(t, scanFake(t, root, 1, nil), nil, nil)
	f := openImage(t, image, nil)
	if err := fstest.TestFS(f, "a", "dir/b", "dir/sub/c", "dir/up", "long", "lost+found"); err != nil {
		t.Error(err)
	}
	for name, want := range map[string]string{"dir/up": "a", "dir/abs/c": "dir/sub/c", "long": "a"} {
		got, err := fs.ReadFile(f, name)
		same, _ := fs.ReadFile(f, want)
		if err != nil || !bytes.Equal(got, same) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
}

// TestReadParallel reads one file system from many goroutines.
func TestReadParallel(t *testing.T) {
	image, _ := writeImage(t, scanFake(t, damageRoot(), 1, nil), &LayoutOptions{Size: 32 << 20}, nil)
	f := openImage(t, image, nil)
	want := readManifest(t, openImage(t, image, nil))
	got := make([]manifest, 8)
	var wg sync.WaitGroup
	for i := range got {
		wg.Go(func() { got[i] = readManifest(t, f) })
	}
	wg.Wait()
	for _, m := range got {
		if !maps.Equal(m, want) {
			t.Error("goroutines read different things")
		}
	}
}

// TestReadLargeDirectories looks names up in directories whose index has none,
// one and two levels below its root; also where every leaf but the first
// begins with a hash that could have begun in the leaf before.
func TestReadLargeDirectories(t *testing.T) {
	for _, c := range []struct{ blockSize, entries, nameLen int }{{4096, 3000, 20}, {1024, 8000, 100}, {1024, 60000, 255}} {
		if testing.Short() && c.entries > 10000 {
			continue
		}
		root := fakeRoot()
		dir := root.put("d", &fakeEntry{stat: stat{mode: modeDir | 0o755}, children: map[string]*fakeEntry{}})
		name := func(i int) string { return fmt.Sprintf("%0*d", c.nameLen, i) }
		for i := range c.entries {
			dir.children[name(i)] = fakeReg(0)
		}
		image, _ := writeImage(t, scanFake(t, root, 1, nil), &LayoutOptions{BlockSize: c.blockSize}, nil)
		f := openImage(t, image, nil)
		d, err := f.Resolve("d", true)
		if err != nil {
			t.Fatal(err)
		}
		n, err := f.Inode(d)
		if err != nil {
			t.Fatal(err)
		}
		lookup := func(f *FS) {
			t.Helper()
			for i := 0; i < c.entries; i += 7 {
				found, _, err := f.dxFind(n, name(i))
				if err != nil || found == nil {
					t.Fatalf("%s: %v, %v", name(i), found, err)
				}
			}
			if found, _, err := f.dxFind(n, name(c.entries)); found != nil || err != nil {
				t.Errorf("%v, %v", found, err)
			}
		}
		lookup(f)

		// The lowest bit of every hash in the index says so.
		out, err := os.OpenFile(image, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		f.eachDirBlock(n, func(logical, block int64, b []byte, err error) bool {
			if err != nil {
				t.Fatal(err)
			}
			if !isDxBlock(b, logical) {
				return true
			}
			x, err := parseDxNode(place{}, f.sb, bytes.Clone(b))
			if err != nil {
				t.Fatal(err)
			}
			for i := 1; i < x.count; i++ {
				x.b[x.off+i*dxEntryLen] |= 1
			}
			binary.LittleEndian.PutUint32(x.b[x.off+x.limit*dxEntryLen+4:], dxChecksum(f.sb, n, x))
			if _, err := out.WriteAt(x.b, block*int64(c.blockSize)); err != nil {
				t.Fatal(err)
			}
			return true
		})
		if err := out.Close(); err != nil {
			t.Fatal(err)
		}
		lookup(openImage(t, image, nil))
	}
}

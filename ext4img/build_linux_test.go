package ext4img

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/oracle"
)

// fsck fails the test unless neither e2fsck nor Check finds anything at all to
// say.
func fsck(t testing.TB, image string) {
	t.Helper()
	if r := oracle.Run(t, "e2fsck", "-fn", image); r.Code != 0 {
		t.Fatalf("e2fsck -fn: exit %d\n%.4000s%s", r.Code, r.Stdout, r.Stderr)
	}
	checkClean(t, image)
}

// checkClean fails the test if Check finds anything.
func checkClean(t testing.TB, image string) {
	t.Helper()
	dev, err := blockdev.OpenFile(image, &blockdev.FileOptions{NoLock: true})
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	n := 0
	for f, err := range Check(t.Context(), dev, nil) {
		if err != nil {
			t.Fatalf("check: %v", err)
		}
		if n++; n < 20 {
			t.Error(f)
		}
	}
	if n > 0 {
		t.Fatalf("check: %d findings", n)
	}
}

// mount mounts an image by the kernel until the test ends.
func mount(t testing.TB, image, options string) string {
	t.Helper()
	oracle.RequireRoot(t)
	dir := t.TempDir()
	oracle.MustRun(t, "mount", "-t", "ext4", "-o", "loop,noatime,"+options, image, dir)
	t.Cleanup(func() { umount(t, dir) })
	return dir
}

func umount(t testing.TB, dir string) {
	if r := oracle.Run(noContext{t}, "umount", dir); r.Code != 0 {
		t.Errorf("umount: %s", r.Stderr)
	}
}

// noContext lets a cleanup run programs: the test's own context has ended.
type noContext struct{ testing.TB }

func (noContext) Context() context.Context { return context.Background() }

// tortureTree has one of everything that tools of this kind get wrong.
func tortureTree(blockSize int64) *fakeEntry {
	root := fakeRoot()
	root.stat.mode = modeDir | 0o1775
	root.stat.uid, root.stat.gid = 100000, 70000
	root.stat.nsec = 987654321
	root.xattr = map[string]string{"user.root": "own metadata"}

	for _, n := range []int64{0, 1, 59, 60, 100, blockSize - 1, blockSize, blockSize + 1, 3*blockSize - 1, 1 << 20, 1<<20 + 1, 5<<20 + 77} {
		root.put(fmt.Sprintf("sizes/%d", n), fakeReg(n))
	}
	for i, m := range []uint16{0o4755, 0o2755, 0o6755, 0o1755, 0o7777, 0, 0o4000, 0o111} {
		root.put(fmt.Sprintf("modes/f%o", m), fakeReg(int64(i))).stat.mode = modeReg | m
	}
	for _, sec := range []int64{minTime, -86400, -1, 0, 1, 1<<31 - 1, 1 << 31, 1<<32 - 1, 1 << 32, 1<<33 + 5, maxTime} {
		for _, nsec := range []uint32{0, 1, 999999999} {
			e := root.put(fmt.Sprintf("times/%d.%d", sec, nsec), fakeReg(3))
			e.stat.sec, e.stat.nsec = sec, nsec
		}
	}
	for _, id := range []uint32{0, 1, 65535, 65536, 100000, 1<<31 + 1, 1<<32 - 2} {
		e := root.put(fmt.Sprintf("owners/%d", id), fakeReg(1))
		e.stat.uid, e.stat.gid = id, id/2+3
	}
	for _, n := range []int64{1, 10, 58, 59, 60, 61, 255, 1000, 1023, 1024, 2047, 2048, 4094, 4095} {
		if n < blockSize {
			target := strings.Repeat("target/", 600)[:n]
			root.put(fmt.Sprintf("links/%d", n), &fakeEntry{stat: stat{mode: modeLink | 0o777, links: 1, size: n, sec: 5, nsec: 6}, target: target})
		}
	}
	for i, dev := range [][2]uint32{{0, 0}, {1, 3}, {8, 17}, {255, 255}, {256, 0}, {0, 256}, {259, 65537}, {4095, 1<<20 - 1}} {
		for name, mode := range map[string]uint16{"c": modeChar, "b": modeBlock} {
			e := root.put(fmt.Sprintf("special/%s%d", name, i), &fakeEntry{stat: stat{mode: mode | 0o640, links: 1, sec: 9}})
			e.stat.rdev, _ = newEncodeDev(dev[0], dev[1])
		}
	}
	root.put("special/fifo", &fakeEntry{stat: stat{mode: modeFifo | 0o600, links: 1}})
	root.put("special/socket", &fakeEntry{stat: stat{mode: modeSocket | 0o755, links: 1}})
	for _, name := range []string{"\xe9\xff", "new\nline", "...", "-", " ", "\x01", strings.Repeat("n", 255), "lost+found"} {
		root.put("names/"+name, fakeReg(int64(len(name))))
	}
	for i := range 3 {
		e := fakeReg(100)
		e.stat.links, e.stat.dev, e.stat.ino = 3, 1, 77
		root.put(fmt.Sprintf("hard/%d/link", i), e)
	}
	x := func(name string, value map[string]string) { root.put("xattrs/"+name, fakeReg(2)).xattr = value }
	x("small", map[string]string{"user.a": "1", "user.bb": "22", "user.empty": ""})
	x("block", map[string]string{"user.big": strings.Repeat("v", int(blockSize)-200)})
	x("both", map[string]string{"user.s": "in the inode", "user.big": strings.Repeat("w", 500)})
	x("shared1", map[string]string{"user.shared": strings.Repeat("s", 300)})
	x("shared2", map[string]string{"user.shared": strings.Repeat("s", 300)})
	x("ea", map[string]string{"user.huge": strings.Repeat("0123456789", 6000), "user.small": "x"})
	x("ea-again", map[string]string{"user.huge": strings.Repeat("0123456789", 6000)})
	x("ea-many", map[string]string{"user.1": strings.Repeat("a", 3000), "user.2": strings.Repeat("b", 3001), "user.3": strings.Repeat("c", 3002)})
	x("namespaces", map[string]string{"trusted.t": "t", "security.s": "s", "user.nul": "a\x00b\xff", "user.\xff\xfe": "1", "user." + strings.Repeat("n", 240): "long"})
	acl := "\x02\x00\x00\x00\x01\x00\x06\x00\xff\xff\xff\xff\x02\x00\x04\x00\xa1\x86\x01\x00\x04\x00\x04\x00\xff\xff\xff\xff\x10\x00\x06\x00\xff\xff\xff\xff\x20\x00\x04\x00\xff\xff\xff\xff"
	x("acl", map[string]string{"system.posix_acl_access": acl})
	root.put("xattrs/acldir", &fakeEntry{stat: stat{mode: modeDir | 0o755}, children: map[string]*fakeEntry{}}).xattr =
		map[string]string{"system.posix_acl_access": acl, "system.posix_acl_default": acl}
	root.put("xattrs/link", &fakeEntry{stat: stat{mode: modeLink | 0o777, links: 1}, target: "x"}).xattr = map[string]string{"trusted.l": "on a symlink"}

	sparse := func(name string, size int64, spans ...span) {
		e := root.put("sparse/"+name, fakeReg(size))
		e.spans = spans
		if spans == nil {
			e.spans = []span{}
		}
	}
	sparse("hole", 10<<20)
	sparse("islands", 100<<20, span{0, 4096}, span{8 << 20, 8<<20 + 100}, span{50 << 20, 51 << 20}, span{99 << 20, 100 << 20})
	sparse("tail", 1<<20+5, span{1 << 20, 1<<20 + 5})
	sparse("unaligned", 1<<20, span{100, 5000}, span{5001, 5002}, span{20000, 20001})
	end := blockSize<<32 - blockSize // the largest file there can be
	sparse("largest", end, span{end - 4096, end})
	var many []span
	for i := range int64(5000) {
		many = append(many, span{i * 3 * blockSize, i*3*blockSize + blockSize})
	}
	sparse("comb", 5000*3*blockSize, many...)

	for i := range 3000 {
		root.put(fmt.Sprintf("big/%d-%s", i, strings.Repeat("x", i%200)), fakeReg(0))
	}
	d := root
	for i := range 100 {
		d = d.put(fmt.Sprintf("deep%d", i), &fakeEntry{stat: stat{mode: modeDir | 0o700, sec: int64(i)}, children: map[string]*fakeEntry{}})
	}
	return root
}

// TestTorture builds one of everything at every block size, and has e2fsck and
// the kernel read it back.
func TestTorture(t *testing.T) {
	for _, bs := range []int{1024, 2048, 4096} {
		for _, lo := range []LayoutOptions{{}, {Minimize: true}, {NoJournal: true, Free: 1 << 20}, {Size: 3 << 30, Label: "sixteen bytes ab", ReservedPercent: 5}} {
			lo.BlockSize = bs
			t.Run(fmt.Sprintf("%d/%d%v", bs, lo.Size, lo.Minimize), func(t *testing.T) {
				root := tortureTree(int64(bs))
				image, l := writeImage(t, scanFake(t, root, 1, nil), &lo, nil)
				fsck(t, image)
				if lo.Minimize && l.FreeBytes() > 64<<10 {
					t.Errorf("%d bytes are free in a minimized file system", l.FreeBytes())
				}
				if free := l.FreeBytes(); free < lo.Free {
					t.Errorf("%d bytes are free, %d were asked for", free, lo.Free)
				}
				dir := mount(t, image, "ro,noload")
				compareFake(t, root, dir)
				var st unix.Statfs_t
				if err := unix.Statfs(dir, &st); err != nil {
					t.Fatal(err)
				}
				if got := int64(st.Bavail) * int64(st.Bsize); got != l.FreeBytes() {
					t.Errorf("the kernel has %d bytes free, the layout says %d", got, l.FreeBytes())
				}
			})
		}
	}
}

// compareFake compares a mounted image with the source that it was built from.
func compareFake(t *testing.T, e *fakeEntry, path string) {
	t.Helper()
	var st unix.Statx_t // times of 64 bits on every machine
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BASIC_STATS, &st); err != nil {
		t.Error(err)
		return
	}
	check := func(what string, got, want any) {
		t.Helper()
		if got != want {
			t.Errorf("%s: %s: got %v, want %v", path, what, got, want)
		}
	}
	check("mode", st.Mode, e.stat.mode)
	check("uid", st.Uid, e.stat.uid)
	check("gid", st.Gid, e.stat.gid)
	check("mtime", [2]int64{st.Mtime.Sec, int64(st.Mtime.Nsec)}, [2]int64{e.stat.sec, int64(e.stat.nsec)})
	for name, value := range e.xattr {
		buf := make([]byte, 1<<16)
		n, err := unix.Lgetxattr(path, name, buf)
		if err != nil {
			t.Errorf("%s: xattr %q: %v", path, name, err)
			continue
		}
		if string(buf[:n]) != value {
			t.Errorf("%s: xattr %q: %d bytes that differ from the %d of the source", path, name, n, len(value))
		}
	}
	list := make([]byte, 1<<16)
	n, err := unix.Llistxattr(path, list)
	if err != nil {
		t.Errorf("%s: %v", path, err)
	} else {
		check("number of xattrs", bytes.Count(list[:n], []byte{0}), len(e.xattr))
	}
	switch e.stat.mode & modeType {
	case modeDir:
		names, err := os.ReadDir(path)
		if err != nil {
			t.Error(err)
		}
		for _, n := range names {
			if e.children[n.Name()] == nil && n.Name() != "lost+found" {
				t.Errorf("%s: an entry %q that the source lacks", path, n.Name())
			}
		}
		for name, c := range e.children {
			compareFake(t, c, path+"/"+name)
		}
	case modeLink:
		target, err := os.Readlink(path)
		if err != nil || target != e.target {
			t.Errorf("%s: readlink: %q, %v", path, target, err)
		}
	case modeChar, modeBlock:
		dev, _ := newEncodeDev(st.Rdev_major, st.Rdev_minor)
		check("rdev", dev, e.stat.rdev)
	case modeReg:
		check("size", int64(st.Size), e.stat.size)
		check("links", st.Nlink, e.stat.links)
		compareContent(t, e, path)
	}
}

func compareContent(t *testing.T, e *fakeEntry, path string) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Error(err)
		return
	}
	defer f.Close()
	spans := e.spans
	if spans == nil {
		spans = []span{{0, e.stat.size}}
	}
	fake := fakeFile{e}
	for i, s := range spans {
		if len(spans) > 1000 && i%100 != 0 {
			continue
		}
		got, want := make([]byte, s.end-s.off), make([]byte, s.end-s.off)
		if _, err := f.ReadAt(got, s.off); err != nil && err != io.EOF {
			t.Errorf("%s: %v", path, err)
			return
		}
		fake.ReadAt(want, s.off)
		if !bytes.Equal(got, want) {
			t.Errorf("%s: bytes %d to %d differ", path, s.off, s.end)
		}
	}
	if e.spans == nil {
		return
	}
	// The kernel sees data in no block that the source has none in.
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	bs := int64(st.Bsize)
	blocks, want := int64(0), int64(0)
	last := int64(-1)
	for _, s := range spans {
		for b := max(s.off/bs, last+1); b*bs < s.end; b++ {
			want++
			last = b
		}
	}
	for off := int64(0); off < e.stat.size; {
		data, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
		if err != nil {
			break
		}
		hole, err := unix.Seek(int(f.Fd()), data, unix.SEEK_HOLE)
		if err != nil {
			t.Fatal(err)
		}
		blocks += ceilDiv(hole-data, bs)
		off = hole
	}
	if blocks != want {
		t.Errorf("%s: %d blocks of data, want %d", path, blocks, want)
	}
}

// TestLargeDirectories has the kernel look up every name of directories whose
// index has none, one and two levels below its root.
func TestLargeDirectories(t *testing.T) {
	for _, c := range []struct{ blockSize, entries, nameLen, levels int }{
		{4096, 20000, 20, 0}, {1024, 20000, 12, 1}, {4096, 20000, 255, 1}, {1024, 60000, 255, 2},
	} {
		t.Run(fmt.Sprintf("%d-%d-%d", c.blockSize, c.entries, c.nameLen), func(t *testing.T) {
			root := fakeRoot()
			dir := root.put("d", &fakeEntry{stat: stat{mode: modeDir | 0o755}, children: map[string]*fakeEntry{}})
			for i := range c.entries {
				name := fmt.Sprintf("%08d", i)
				dir.children[name+strings.Repeat("\xe9", c.nameLen-len(name))] = fakeReg(0)
			}
			tree := scanFake(t, root, 1, nil)
			image, l := writeImage(t, tree, &LayoutOptions{BlockSize: c.blockSize}, nil)
			if h := l.planHtree(1); len(h.nodes) != c.levels {
				t.Fatalf("%d levels of index blocks, want %d", len(h.nodes), c.levels)
			}
			fsck(t, image)
			mnt := mount(t, image, "ro,noload")
			for name := range dir.children {
				var st unix.Stat_t
				if err := unix.Lstat(mnt+"/d/"+name, &st); err != nil {
					t.Fatal(err)
				}
			}
			names, err := os.ReadDir(mnt + "/d")
			if err != nil || len(names) != c.entries {
				t.Fatalf("readdir: %d entries, %v", len(names), err)
			}
		})
	}
}

// TestDirhash compares the hashes with debugfs's for names of every length and
// bytes of every value.
func TestDirhash(t *testing.T) {
	oracle.Require(t, "debugfs")
	r := rand.New(rand.NewPCG(1, 1))
	const seedText = "01234567-89ab-cdef-0123-456789abcdef"
	u, err := ParseUUID(seedText)
	if err != nil {
		t.Fatal(err)
	}
	l := &Layout{tree: &Tree{}, uuid: UUID{1}}
	l.identify(&LayoutOptions{UUID: UUID{1}, HashSeed: u})
	versions := []string{"legacy", "half_md4", "tea"} // those of unsigned bytes: TestReadFeatures
	var script strings.Builder
	var names []string
	for n := 1; n <= 255; n += 1 + n/40 {
		b := make([]byte, n)
		for i := range b {
			const set = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._\xe9\xff\x80"
			b[i] = set[r.IntN(len(set))]
		}
		names = append(names, string(b))
		for _, v := range versions {
			fmt.Fprintf(&script, "dx_hash -h %s -s %s %s\n", v, seedText, b)
		}
	}
	file := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(file, []byte(script.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	out := oracle.MustRun(t, "debugfs", "-f", file)
	i := 0
	for line := range strings.Lines(out) {
		// Hash of NAME is 0xMAJOR (minor 0xMINOR)
		_, hash, ok := strings.Cut(line, " is 0x")
		if !ok || !strings.HasPrefix(line, "Hash of ") {
			continue
		}
		hash, _, _ = strings.Cut(hash, " ")
		want, err := strconv.ParseUint(hash, 16, 32)
		if err != nil {
			t.Fatal(err)
		}
		name, version := []byte(names[i/len(versions)]), i%len(versions)
		if got, ok := dirhashVersion(version, name, &l.hashSeed); got != uint32(want) || !ok {
			t.Errorf("%q: %s hash %#x, %v, debugfs says %#x", name, versions[version], got, ok, want)
		}
		if got := dirhash(name, &l.hashSeed); version == hashVersionHalfMD4 && got != uint32(want) {
			t.Errorf("%q: hash %#x, debugfs says %#x", name, got, want)
		}
		i++
	}
	if i != len(names)*len(versions) {
		t.Fatalf("debugfs made %d hashes of %d names", i, len(names))
	}
	if _, ok := dirhashVersion(6, []byte("siphash"), &l.hashSeed); ok {
		t.Error("siphash is known")
	}
}

// TestDeterminism builds the same tree in every way that must not matter.
func TestDeterminism(t *testing.T) {
	sum := func(seed uint64, workers int) string {
		image, _ := writeImage(t, scanFake(t, tortureTree(4096), seed, nil), &LayoutOptions{}, &WriteOptions{Workers: workers})
		f, err := os.Open(image)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		h := sha256.New()
		if _, err := io.Copy(h, f); err != nil {
			t.Fatal(err)
		}
		return hex.EncodeToString(h.Sum(nil))
	}
	// The same on every machine: a change of this sum is a change of what
	// users get from the same tree.
	const want = "acca83ccdc80c1d254a4ed3ec7d31f00eb5faa8a78145fa16841f6cedf41ae5e"
	for seed := range uint64(3) {
		for _, workers := range []int{1, 2, 7} {
			if got := sum(seed, workers); got != want {
				t.Errorf("seed %d, %d workers: sha256 %s, want %s", seed, workers, got, want)
			}
		}
	}
}

// TestMountsReadWrite has the kernel change an image; cmd/qimg's boot test
// does so in a virtual machine, and grows it while it is mounted.
func TestMountsReadWrite(t *testing.T) {
	for _, bs := range []int{1024, 4096} {
		image, _ := writeImage(t, scanFake(t, tortureTree(int64(bs)), 1, nil), &LayoutOptions{BlockSize: bs}, nil)
		t.Run(strconv.Itoa(bs), func(t *testing.T) {
			dir := mount(t, image, "rw")
			for i := range 200 {
				if err := os.WriteFile(fmt.Sprintf("%s/big/new-%d", dir, i), []byte("new"), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			for _, name := range []string{"sparse", "xattrs", "hard/1"} {
				if err := os.RemoveAll(dir + "/" + name); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.WriteFile(dir+"/after", make([]byte, 30<<20), 0o600); err != nil {
				t.Fatal(err)
			}
		})
		fsck(t, image)
	}
}

// TestGeometries lays a small tree out on disks of many sizes; e2fsck reads
// them all.
func TestGeometries(t *testing.T) {
	root := fakeRoot()
	for i := range 50 {
		root.put(fmt.Sprintf("d%d/f", i), fakeReg(int64(i)*1000))
	}
	r := rand.New(rand.NewPCG(3, 4))
	for i := range 40 {
		bs := []int{1024, 2048, 4096}[i%3]
		group := int64(8 * bs * bs)
		size := r.Int64N(40)*group + r.Int64N(group) + 16<<20
		if i%10 == 9 {
			size = r.Int64N(20000) * group
		}
		lo := &LayoutOptions{BlockSize: bs, Size: size, NoJournal: i%7 == 0, ReservedPercent: float64(i % 5)}
		image, l := writeImage(t, scanFake(t, root, 1, nil), lo, nil)
		if l.Size() != size {
			t.Errorf("size %d, asked for %d", l.Size(), size)
		}
		fsck(t, image)
		os.Remove(image)
	}
}

// TestSizeError checks that the smallest size named works, and a smaller one
// does not.
func TestSizeError(t *testing.T) {
	root := fakeRoot()
	for i := range 500 {
		root.put(fmt.Sprintf("d%d/f%d", i%7, i), fakeReg(int64(i)*977))
	}
	root.put("huge/file", fakeReg(60<<20))
	for _, bs := range []int{1024, 2048, 4096} {
		for _, journal := range []bool{true, false} {
			lo := LayoutOptions{BlockSize: bs, Size: 10 << 20, NoJournal: !journal}
			tree := scanFake(t, root, 1, nil)
			_, err := NewLayout(t.Context(), tree, &lo)
			var se *SizeError
			if !errors.As(err, &se) {
				t.Fatalf("10 MiB: %v", err)
			}
			if se.Largest[0].Path != "huge" || se.Largest[0].Bytes != 60<<20 {
				t.Errorf("largest directory %+v", se.Largest[0])
			}
			if want := int64(11 + 500 + 8 + 1); se.Inodes != want {
				t.Errorf("inodes needed %d, want %d", se.Inodes, want)
			}
			for _, text := range []string{strconv.FormatInt(se.MinSize, 10), "520 inodes", "huge ("} {
				if !strings.Contains(err.Error(), text) {
					t.Errorf("%q lacks %q", err, text)
				}
			}
			lo.Size = se.MinSize
			image, _ := writeImage(t, tree, &lo, nil)
			fsck(t, image)
			lo.Size = se.MinSize - int64(bs)
			if _, err := NewLayout(t.Context(), tree, &lo); !errors.As(err, &se) {
				t.Errorf("%d bytes, one block less than the smallest size: %v", lo.Size, err)
			}
		}
	}
}

// TestSmallestSizes finds the smallest size of trees that are mostly inodes, and
// lays out trees whose size a rounded one would not be better than.
func TestSmallestSizes(t *testing.T) {
	files := func(n, dirs int) *Tree {
		root := fakeRoot()
		for i := range n {
			root.put(fmt.Sprintf("d%d/f%d", i%dirs, i), fakeReg(0))
		}
		return scanFake(t, root, 1, nil)
	}
	for _, c := range []struct {
		files int
		opts  LayoutOptions
	}{
		{10, LayoutOptions{NoJournal: true}}, {5000, LayoutOptions{NoJournal: true}}, {30000, LayoutOptions{}}, {30000, LayoutOptions{BlockSize: 1024}},
	} {
		tree := files(c.files, 20)
		c.opts.Size = 20 << 10
		_, err := NewLayout(t.Context(), tree, &c.opts)
		var se *SizeError
		if !errors.As(err, &se) {
			t.Fatalf("%d files: %v", c.files, err)
		}
		bs := int64(max(c.opts.BlockSize, 1024))
		for less := range int64(40) {
			c.opts.Size = se.MinSize - bs*less*less*less
			if c.opts.Size <= 0 {
				break
			}
			if _, err := NewLayout(t.Context(), tree, &c.opts); (err == nil) != (less == 0) {
				t.Errorf("%d files: smallest size %d; with %d: %v", c.files, se.MinSize, c.opts.Size, err)
				break
			}
		}
		c.opts.Size = se.MinSize
		image, _ := writeImage(t, tree, &c.opts, nil)
		fsck(t, image)
	}
	tree := files(20000, 20)
	for k := int64(30170); k < 30190; k++ {
		image, l := writeImage(t, tree, &LayoutOptions{BlockSize: 1024, Free: k << 10}, nil)
		if l.FreeBytes() < k<<10 {
			t.Errorf("%d KiB: %d bytes are free", k, l.FreeBytes())
		}
		fsck(t, image)
	}
	for _, opts := range []LayoutOptions{{Free: 1<<63 - 1}, {Size: 1<<63 - 1}, {Free: maxSize}, {Size: maxSize, BlockSize: 1024}} {
		if _, err := NewLayout(t.Context(), tree, &opts); err == nil {
			t.Errorf("%+v is accepted", opts)
		}
	}
}

// TestEpochAndChange notices a change that SOURCE_DATE_EPOCH would hide.
func TestEpochAndChange(t *testing.T) {
	root := fakeRoot()
	e := root.put("f", fakeReg(10))
	epoch := int64(5)
	tree := scanFake(t, root, 1, &ScanOptions{MaxTime: &epoch})
	now := e.stat
	now.sec++
	e.now = &now
	l, err := NewLayout(t.Context(), tree, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Write(t.Context(), discard{}, nil); !errors.Is(err, ErrChanged) {
		t.Errorf("a file that was written to: %v", err)
	}
}

// TestCancelledScan stops within one large directory.
func TestCancelledScan(t *testing.T) {
	root := fakeRoot()
	for i := range 5000 {
		root.put(fmt.Sprint(i), fakeReg(0))
	}
	ctx, cancel := context.WithCancel(t.Context())
	root.children["2500"].xattr = map[string]string{"bad.namespace": ""}
	_, err := scan(ctx, fakeDir{root, 1}, &ScanOptions{Warn: func(string) { cancel() }})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("scan: %v", err)
	}
	tree := scanFake(t, root, 1, &ScanOptions{})
	if _, err := NewLayout(ctx, tree, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("layout: %v", err)
	}
}

// TestFlatRoot has an index in the root directory, whose entry lost+found the
// layout adds.
func TestFlatRoot(t *testing.T) {
	for _, bs := range []int{1024, 4096} {
		root := fakeRoot()
		for i := range 3000 {
			root.put(fmt.Sprintf("some longer name %d", i), fakeReg(0))
		}
		image, _ := writeImage(t, scanFake(t, root, 1, nil), &LayoutOptions{BlockSize: bs}, nil)
		fsck(t, image)
		dir := mount(t, image, "ro,noload")
		compareFake(t, root, dir)
		if fi, err := os.Stat(dir + "/lost+found"); err != nil || !fi.IsDir() {
			t.Errorf("lost+found: %v", err)
		}
	}
}

// TestUnwritten has a file of blocks that were never written, read before and
// after they are in the page cache, which takes them for data.
func TestUnwritten(t *testing.T) {
	dir := t.TempDir()
	f, err := os.Create(dir + "/f")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Fallocate(int(f.Fd()), 0, 0, 4<<20); err != nil {
		oracle.Missing(t, "a file system with fallocate")
	}
	if _, err := f.WriteAt([]byte("hello"), 65536); err != nil {
		t.Fatal(err)
	}
	for i, size := range []int64{4 << 20, 8 << 20} { // the second has a hole, too
		if err := f.Truncate(size); err != nil {
			t.Fatal(err)
		}
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
		var digests [2][32]byte
		for k := range digests {
			tree, err := Scan(t.Context(), dir, nil)
			if err != nil {
				t.Fatal(err)
			}
			digests[k] = tree.digest("")
			if want := []int64{4 << 20, holeGrain}[i]; tree.Bytes() != want {
				t.Errorf("size %d: %d bytes of data, want %d", size, tree.Bytes(), want)
			}
			tree.Close()
			if _, err := io.Copy(io.Discard, io.NewSectionReader(f, 0, size)); err != nil {
				t.Fatal(err)
			}
		}
		if digests[0] != digests[1] {
			t.Errorf("size %d: the page cache makes another tree", size)
		}
	}
}

// TestChangedFiles checks that a file which changes between scan and write is
// named, whatever the change.
func TestChangedFiles(t *testing.T) {
	for what, change := range map[string]func(*stat){
		"grew from 5000 to 5001":   func(s *stat) { s.size++ },
		"ended at byte 4999":       func(s *stat) { s.size-- },
		"written to":               func(s *stat) { s.nsec++ },
		"no regular file any more": func(s *stat) { s.mode = modeFifo },
		"replaced":                 func(s *stat) { s.ino++ },
		"metadata changed":         func(s *stat) { s.cnsec++ },
	} {
		root := fakeRoot()
		e := root.put("a/b/file", fakeReg(5000))
		tree := scanFake(t, root, 1, nil)
		now := e.stat
		change(&now)
		e.now = &now
		l, err := NewLayout(t.Context(), tree, nil)
		if err != nil {
			t.Fatal(err)
		}
		err = l.Write(t.Context(), discard{}, nil)
		var pe *fs.PathError
		if !errors.Is(err, ErrChanged) || !errors.As(err, &pe) || pe.Path != "a/b/file" || !strings.Contains(err.Error(), what) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestWriteStops(t *testing.T) {
	tree := scanFake(t, tortureTree(4096), 1, nil)
	l, err := NewLayout(t.Context(), tree, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := l.Write(ctx, discard{}, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	full := errors.New("full")
	if err := l.Write(t.Context(), failing{full}, nil); !errors.Is(err, full) {
		t.Errorf("failing sink: %v", err)
	}
}

type failing struct{ err error }

func (f failing) WriteAt([]byte, int64) (int, error) { return 0, f.err }

func TestScanErrors(t *testing.T) {
	cause := errors.New("cause")
	for name, c := range map[string]struct {
		path  string
		spoil func(root *fakeEntry)
		text  string
	}{
		"lstat": {"d/f", func(r *fakeEntry) { r.children["d"].children["f"].err = cause }, "cause"},
		"unreadable": {"d/f", func(r *fakeEntry) {
			f := r.children["d"].children["f"]
			f.openErr, f.stat.mode = cause, modeReg|0o600
		}, "cause"},
		"acl": {"d/f", func(r *fakeEntry) {
			r.children["d"].children["f"].xattr = map[string]string{"system.posix_acl_access": "zz"}
		}, "malformed POSIX ACL"},
	} {
		root := fakeRoot()
		root.put("d/f", fakeReg(1))
		root.put("d/g", fakeReg(1))
		c.spoil(root)
		_, err := scan(t.Context(), fakeDir{root, 1}, &ScanOptions{})
		var pe *fs.PathError
		if !errors.As(err, &pe) || pe.Path != c.path || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v", name, err)
		}
		var warnings []string
		tree, err := scan(t.Context(), fakeDir{root, 1}, &ScanOptions{SkipUnreadable: true, Warn: func(s string) { warnings = append(warnings, s) }})
		if err != nil || tree.Entries() != 3 || len(warnings) != 1 || !strings.HasPrefix(warnings[0], c.path) {
			t.Errorf("%s: skipped: %v, warnings %q", name, err, warnings)
		}
	}
	root := fakeRoot()
	root.put("lost+found", fakeReg(1))
	if _, err := scan(t.Context(), fakeDir{root, 1}, &ScanOptions{}); err == nil || !strings.Contains(err.Error(), "lost+found") {
		t.Errorf("a file lost+found: %v", err)
	}
}

func TestScanOptions(t *testing.T) {
	root := fakeRoot()
	root.put("keep/a.o", fakeReg(1)).stat.mode = modeReg | 0o6777
	root.put("keep/b.c", fakeReg(1)).stat.sec = 2000000000
	root.put("drop/x", fakeReg(1))
	root.put("keep/sub/b.c", fakeReg(1))
	epoch := int64(1500000000)
	image, _ := writeImage(t, scanFake(t, root, 1, &ScanOptions{
		Owner: &Owner{7, 8}, ModeMask: 0o755, MaxTime: &epoch, Exclude: []string{"*.o", "/drop", "keep/b.*"},
	}), nil, nil)
	fsck(t, image)
	ls := oracle.MustRun(t, "debugfs", "-R", "ls -l keep", image)
	if strings.Contains(ls, "a.o") || strings.Contains(ls, "b.c") || !strings.Contains(ls, "sub") {
		t.Errorf("excluded: %s", ls)
	}
	if ls := oracle.MustRun(t, "debugfs", "-R", "ls -l /", image); strings.Contains(ls, "drop") {
		t.Errorf("excluded: %s", ls)
	}
	st := oracle.MustRun(t, "debugfs", "-R", "stat keep/sub/b.c", image)
	for _, want := range []string{"Mode:  0644", "User:     7", "Group:     8", "mtime: 0x59682f00:00000000"} {
		if !strings.Contains(st, want) {
			t.Errorf("stat lacks %q: %s", want, st)
		}
	}
	for _, p := range []string{"[a", "", "/", "./", "."} {
		if _, err := scan(t.Context(), fakeDir{root, 1}, &ScanOptions{Exclude: []string{p}}); err == nil || !strings.Contains(err.Error(), strconv.Quote(p)) {
			t.Errorf("pattern %q: %v", p, err)
		}
	}
	// Patterns as people write them, and those that match nothing.
	for p, want := range map[string]string{"drop/": "", "./drop": "", "drop": "", "b.c": "", "keep/sub/": "", "cmd/": "cmd/", "./b.c": "./b.c"} {
		var warnings []string
		scanFake(t, root, 1, &ScanOptions{Exclude: []string{p}, Warn: func(s string) { warnings = append(warnings, s) }})
		if (want == "") != (len(warnings) == 0) || want != "" && !strings.Contains(warnings[0], strconv.Quote(want)) {
			t.Errorf("pattern %q: warnings %q", p, warnings)
		}
	}
}

// TestOwnLostFound keeps the source's lost+found and its content.
func TestOwnLostFound(t *testing.T) {
	root := fakeRoot()
	e := root.put("lost+found", &fakeEntry{stat: stat{mode: modeDir | 0o711, uid: 5}, children: map[string]*fakeEntry{}})
	for i := range 2000 {
		e.children[fmt.Sprintf("#%d", i)] = fakeReg(int64(i))
	}
	root.put("z/f", fakeReg(10))
	image, _ := writeImage(t, scanFake(t, root, 1, nil), nil, nil)
	fsck(t, image)
	compareFake(t, root, mount(t, image, "ro,noload"))
}

// TestManyLinks has more users of one block of xattrs than such a block counts,
// more subdirectories than a link count holds, and as many names for one file
// as there can be.
func TestManyLinks(t *testing.T) {
	root := fakeRoot()
	value := map[string]string{"user.v": strings.Repeat("v", 200)}
	for i := range 2500 {
		root.put(fmt.Sprintf("x/%d", i), fakeReg(0)).xattr = value
	}
	for i := range maxLinks + 10 {
		root.put(fmt.Sprintf("dirs/%d", i), &fakeEntry{stat: stat{mode: modeDir | 0o755}, children: map[string]*fakeEntry{}})
	}
	for i := range maxLinks {
		e := fakeReg(9)
		e.stat.links, e.stat.ino = maxLinks, 99
		root.put(fmt.Sprintf("names/%d", i), e)
	}
	image, _ := writeImage(t, scanFake(t, root, 1, nil), nil, nil)
	fsck(t, image)
	mnt := mount(t, image, "ro,noload")
	compareFake(t, root.children["x"], mnt+"/x")
	compareFake(t, root.children["names"].children["1"], mnt+"/names/1")
	e := fakeReg(9)
	e.stat.links, e.stat.ino = maxLinks, 99
	root.put("names/one more", e)
	if _, err := scan(t.Context(), fakeDir{root, 1}, &ScanOptions{}); err == nil || !strings.Contains(err.Error(), "65000") {
		t.Errorf("%d names of a file: %v", maxLinks+1, err)
	}
}

func TestLayoutErrors(t *testing.T) {
	root := fakeRoot()
	root.put("d/link", &fakeEntry{stat: stat{mode: modeLink | 0o777, links: 1}, target: strings.Repeat("t", 1024)})
	tree := scanFake(t, root, 1, nil)
	big := fakeRoot()
	e := big.put("d/file", fakeReg(1<<44))
	e.spans = []span{}
	bigTree := scanFake(t, big, 1, nil)
	names := fakeRoot()
	x := map[string]string{}
	for i := range 80 {
		x[fmt.Sprintf("user.%s%d", strings.Repeat("n", 200), i)] = ""
	}
	names.put("d/x", fakeReg(0)).xattr = x
	for _, c := range []struct {
		tree *Tree
		opts LayoutOptions
		text string
	}{
		{tree, LayoutOptions{BlockSize: 1024}, "d/link: a symlink of 1024 bytes"},
		{bigTree, LayoutOptions{}, "d/file: a file of"},
		{scanFake(t, names, 1, nil), LayoutOptions{}, "d/x: the names of its 80 xattrs"},
		{tree, LayoutOptions{BlockSize: 8192}, "block size 8192"},
		{tree, LayoutOptions{Label: "seventeen bytes ab"}, "label"},
		{tree, LayoutOptions{Size: 1 << 30, Free: 1}, "exclude each other"},
		{tree, LayoutOptions{ReservedPercent: 51}, "reserved percentage"},
		{tree, LayoutOptions{BlockSize: 2048, Size: 1 << 46}, "12288 GiB at most"},
	} {
		if _, err := NewLayout(t.Context(), c.tree, &c.opts); err == nil || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%+v: %v, want %q", c.opts, err, c.text)
		}
	}
}

package ext4img

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/oracle"
)

// plainReader is a device that knows of no holes, so that those of the image
// file do not show.
type plainReader struct{ blockdev.Reader }

// manifest describes every file of a tree in one line, by path.
type manifest map[string]string

func describe(mode uint32, uid, gid, links uint32, size, blocks int64, mtime time.Time, major, minor uint32, xattrs map[string]string, content string) string {
	var x []string
	for k, v := range xattrs {
		x = append(x, fmt.Sprintf("%q=%d:%x", k, len(v), sha256.Sum256([]byte(v))))
	}
	slices.Sort(x)
	return fmt.Sprintf("%#o %d:%d links %d size %d blocks %d %d.%09d dev %d:%d %v %s",
		mode, uid, gid, links, size, blocks, mtime.Unix(), mtime.Nanosecond(), major, minor, x, content)
}

// readManifest describes the tree of a file system as this package reads it.
// Every file is found in several ways.
func readManifest(t *testing.T, f *FS) manifest {
	t.Helper()
	m := manifest{}
	one := func(path string, ino Ino) {
		n, err := f.Inode(ino)
		if err != nil {
			t.Errorf("%q: %v", path, err)
			return
		}
		xattrs := map[string]string{}
		for x, err := range f.Xattrs(ino) {
			if err != nil {
				t.Errorf("%q: %v", path, err)
				continue
			}
			xattrs[x.Name] = x.Value
		}
		content := ""
		switch n.Type() {
		case modeLink:
			if content, err = f.Readlink(ino); err != nil {
				t.Errorf("%q: %v", path, err)
			}
		case modeReg:
			c, err := f.File(ino)
			if err != nil {
				t.Errorf("%q: %v", path, err)
				return
			}
			h := sha256.New()
			if err := hashExtents(c, h); err != nil {
				t.Errorf("%q: %v", path, err)
			}
			content = fmt.Sprintf("%x", h.Sum(nil))
		}
		blocks := n.Blocks
		if n.Flags&inlineDataFl != 0 && n.IsRegular() {
			blocks += ceilDiv(n.Size, 512) // as the kernel counts them
		}
		major, minor := n.Rdev()
		m[path] = describe(uint32(n.Mode), n.UID, n.GID, uint32(n.Links), n.Size, blocks, n.Mtime, major, minor, xattrs, content)
	}
	one("", RootIno)
	for e, err := range f.Walk(RootIno) {
		if err != nil {
			t.Error(err)
			continue
		}
		one(e.Path, e.Ino)
		if ino, err := f.Resolve(e.Path, false); err != nil || ino != e.Ino {
			t.Errorf("%q: resolves to %d, %v, want %d", e.Path, ino, err, e.Ino)
		}
		name := e.Name[:len(e.Name)-1] + "\x02"
		if d, err := f.LookupIn(e.Parent, name); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%q: %v, %v", name, d, err)
		}
	}
	return m
}

// hashExtents hashes where a file has data, and what.
func hashExtents(c *File, h io.Writer) error {
	buf := make([]byte, 300<<10)
	for off := int64(0); off < c.Size(); {
		e, err := c.NextExtent(off)
		if err != nil {
			return err
		}
		end := off + e.Len
		if e.Kind.ReadsZero() && e.Len > 1<<20 {
			off = end - 1<<20 // its end will do
		}
		for off < end {
			part := buf[:min(int64(len(buf)), end-off)]
			if e.Kind.ReadsZero() {
				clear(part)
			}
			n, err := c.ReadAt(part, off)
			if err != nil && (err != io.EOF || n != len(part)) {
				return err
			}
			if e.Kind.ReadsZero() {
				if !isZero(part) {
					return fmt.Errorf("%v extent at %d does not read as zeroes", e.Kind, off)
				}
			} else {
				hashBlocks(h, part, off)
			}
			off += int64(len(part))
		}
	}
	return nil
}

// hashBlocks hashes pieces of 1 KiB with their places, so that it does not
// matter how data is cut.
func hashBlocks(h io.Writer, b []byte, off int64) {
	for ; len(b) > 0; b = b[min(1024, len(b)):] {
		fmt.Fprintf(h, "%d:", off)
		h.Write(b[:min(1024, len(b))])
		off += 1024
	}
}

// dirManifest describes a tree as the kernel reads it.
func dirManifest(t *testing.T, root string) manifest {
	t.Helper()
	m := manifest{}
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Statx_t
		if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BASIC_STATS, &st); err != nil {
			return err
		}
		xattrs := map[string]string{}
		buf, value := make([]byte, 1<<16), make([]byte, 1<<17)
		n, err := unix.Llistxattr(path, buf)
		if err != nil && err != unix.EOPNOTSUPP {
			return err
		}
		for name := range bytes.SplitSeq(buf[:max(n, 0)], []byte{0}) {
			if len(name) == 0 {
				continue
			}
			n, err := unix.Lgetxattr(path, string(name), value)
			if err != nil {
				return fmt.Errorf("%s: %s: %w", path, name, err)
			}
			xattrs[string(name)] = string(value[:n])
		}
		content := ""
		switch st.Mode & modeType {
		case modeLink:
			if content, err = os.Readlink(path); err != nil {
				return err
			}
		case modeReg:
			if content, err = hashHoles(path, int64(st.Size)); err != nil {
				return err
			}
		}
		mtime := time.Unix(st.Mtime.Sec, int64(st.Mtime.Nsec))
		m[strings.TrimPrefix(strings.TrimPrefix(path, root), "/")] = describe(uint32(st.Mode), st.Uid, st.Gid, st.Nlink, int64(st.Size), int64(st.Blocks), mtime, st.Rdev_major, st.Rdev_minor, xattrs, content)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func hashHoles(path string, size int64) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	for off := int64(0); off < size; {
		data, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
		if err == unix.ENXIO {
			break
		}
		if err != nil {
			return "", err
		}
		hole, err := unix.Seek(int(f.Fd()), data, unix.SEEK_HOLE)
		if err != nil {
			return "", err
		}
		b := make([]byte, hole-data)
		if _, err := f.ReadAt(b, data); err != nil && err != io.EOF {
			return "", err
		}
		hashBlocks(h, b, data)
		off = hole
	}
	return fmt.Sprintf("%x", h.Sum(nil)), nil
}

func compareManifests(t *testing.T, got, want manifest) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("what is read (+) differs from what the kernel reads (-):\n%.6000s", diff)
	}
	if len(want) < 2 {
		t.Errorf("the tree has %d files", len(want))
	}
}

// populate fills a mounted file system with files of all kinds.
func populate(t *testing.T, dir string, o populateOptions) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	r := rand.New(rand.NewPCG(1, 2))
	content := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(r.Uint32())
		}
		return b
	}
	in := func(name string) string { return filepath.Join(dir, name) }
	write := func(name string, b []byte) { t.Helper(); must(os.WriteFile(in(name), b, 0o644)) }

	for _, n := range []int{0, 1, 59, 60, 61, 100, 150, 160, 161, 1023, 1024, 4095, 4096, 4097, 70000, 1 << 20} {
		write(fmt.Sprintf("size-%d", n), content(n))
	}
	must(os.Mkdir(in("empty"), 0o700))
	must(os.Mkdir(in("tiny"), 0o755))
	write("tiny/a", content(10))
	must(os.Mkdir(in("small"), 0o755))
	for i := range 9 {
		write(fmt.Sprintf("small/%d-name", i), content(i))
	}
	must(os.Remove(in("small/3-name")))
	must(os.Mkdir(in("big"), 0o755))
	for i := range o.entries {
		write(fmt.Sprintf("big/%s%d", strings.Repeat("n\xe9", i%20), i), nil)
	}
	for i := 0; i < o.entries; i += 7 {
		must(os.Remove(in(fmt.Sprintf("big/%s%d", strings.Repeat("n\xe9", i%20), i))))
	}
	write("big/\xff\xe9 not UTF-8", nil)
	write(strings.Repeat("l", 255), nil)
	for _, n := range []int{1, 58, 59, 60, 61, 500, 1000} {
		must(os.Symlink(strings.Repeat("t/", 500)[:n], in(fmt.Sprintf("link-%d", n))))
	}
	must(os.Link(in("size-1024"), in("tiny/hard")))
	must(unix.Mknod(in("fifo"), unix.S_IFIFO|0o600, 0))
	must(unix.Mknod(in("char"), unix.S_IFCHR|0o600, int(unix.Mkdev(4, 65))))
	must(unix.Mknod(in("block"), unix.S_IFBLK|0o600, int(unix.Mkdev(259, 70000))))
	must(os.Chmod(in("size-60"), os.ModeSetuid|0o755))
	must(os.Chown(in("size-61"), 100000, 1<<30))
	for i, sec := range []int64{0, 1, -1, 1 << 31, 1 << 33} {
		if o.oldInodes && (sec < 0 || sec >= 1<<31) {
			continue
		}
		name := fmt.Sprintf("time-%d", i)
		write(name, nil)
		must(os.Chtimes(in(name), time.Unix(sec, 0), time.Unix(sec, int64(i))))
	}

	// Holes, also far out where the block map needs all its levels, blocks
	// that were never written, and many extents.
	sparse := func(name string, size int64, at ...int64) {
		f, err := os.Create(in(name))
		must(err)
		for _, off := range at {
			_, err := f.WriteAt(content(5000), off)
			must(err)
		}
		must(f.Truncate(size))
		must(f.Close())
	}
	sparse("hole", 1<<20)
	sparse("sparse", 80<<20+3, 0, 9000, 20000, 300<<10, 5<<20, 70<<20, 80<<20-4997)
	if o.far > 0 {
		sparse("far", o.far, 100, o.far-6000)
	}
	var comb []int64
	for i := range int64(o.comb) {
		comb = append(comb, i*24<<10)
	}
	sparse("comb", int64(o.comb)*24<<10, comb...)
	if !o.noFallocate {
		f, err := os.Create(in("unwritten"))
		must(err)
		must(unix.Fallocate(int(f.Fd()), 0, 0, 500<<10))
		_, err = f.WriteAt(content(20000), 100<<10)
		must(err)
		must(unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 500<<10, 100<<10))
		must(f.Close())
	}

	acl := "\x02\x00\x00\x00\x01\x00\x06\x00\xff\xff\xff\xff\x02\x00\x04\x00\xa1\x86\x01\x00\x04\x00\x04\x00\xff\xff\xff\xff\x10\x00\x06\x00\xff\xff\xff\xff\x20\x00\x04\x00\xff\xff\xff\xff"
	set := func(name string, xattrs ...string) {
		t.Helper()
		for i := 0; i < len(xattrs); i += 2 {
			must(unix.Lsetxattr(in(name), xattrs[i], []byte(xattrs[i+1]), 0))
		}
	}
	set("size-1", "user.a", "1", "user.empty", "", "trusted.t", "t\x00t", "security.s", "s")
	set("size-4096", "user.block", strings.Repeat("v", 600), "user.b", "2")
	set("size-4097", "user.block", strings.Repeat("v", 600), "user.b", "2")
	set("tiny", "user.dir", "d", "system.posix_acl_default", acl)
	set("size-70000", "system.posix_acl_access", acl)
	set("link-58", "trusted.link", "l")
	if o.eaInode {
		set("size-100", "user.huge", string(content(60000)), "user.two", string(content(20000)))
		set("size-150", "user.max", string(content(65536)))
	}
}

type populateOptions struct {
	entries     int   // of the large directory
	comb        int   // extents of one file
	far         int64 // size of a sparse file
	oldInodes   bool
	noFallocate bool
	eaInode     bool
}

// TestReadFeatures has mke2fs make file systems of all kinds, the kernel fill
// them, and both read them.
func TestReadFeatures(t *testing.T) {
	oracle.Require(t, "mke2fs")
	ext2 := populateOptions{entries: 300, comb: 300, far: 5 << 30, noFallocate: true}
	ext4 := populateOptions{entries: 500, comb: 500, far: 1 << 42}
	old := ext2
	old.oldInodes = true
	ea := ext4
	ea.eaInode = true
	small := ext4
	small.far = 1 << 40
	deep := small
	deep.entries = 5000
	for i, c := range []struct {
		name, args, mount string
		fill              populateOptions
		superblock        string // fields that debugfs sets
	}{
		{"ext2-rev0", "-r 0 -b 1024", "", old, ""},
		{"ext2-1k", "-t ext2 -b 1024 -I 128", "", old, ""},
		{"ext2-no-filetype", "-t ext2 -b 4096 -O ^filetype,^dir_index", "", ext2, ""},
		{"ext2-dir_index", "-t ext2 -b 2048 -O dir_index", "", ext2, ""},
		{"ext3", "-t ext3 -b 4096", "", ext2, ""},
		{"ext3-1k", "-t ext3 -b 1024", "", ext2, "def_hash_version tea"},
		{"ext4", "-t ext4 -b 4096", "", ext4, ""},
		{"ext4-1k", "-t ext4 -b 1024 -N 8000", "", deep, "def_hash_version legacy"},
		{"csum_seed", "-t ext4 -b 4096 -O metadata_csum_seed,large_dir,stable_inodes", "", ext4, ""},
		{"no-csum", "-t ext4 -b 2048 -O ^metadata_csum,^64bit,^uninit_bg,^flex_bg", "", small, ""},
		{"uninit_bg", "-t ext4 -b 1024 -O ^metadata_csum,uninit_bg,^64bit", "", small, ""},
		{"uninit_bg-64bit", "-t ext4 -b 1024 -O ^metadata_csum,uninit_bg,64bit,^flex_bg", "", small, ""},
		{"inline_data", "-t ext4 -b 4096 -O inline_data", "", ext4, ""},
		{"inline_data-1k", "-t ext4 -b 1024 -I 1024 -O inline_data", "", small, ""},
		{"ea_inode", "-t ext4 -b 4096 -O ea_inode", "", ea, ""},
		{"ea_inode-1k", "-t ext4 -b 1024 -O ea_inode,inline_data,metadata_csum_seed", "", func() populateOptions { o := ea; o.far = 1 << 40; return o }(), ""},
		{"bigalloc", "-t ext4 -b 4096 -O bigalloc -C 65536", "", ext4, ""},
		{"bigalloc-1k", "-t ext4 -b 1024 -O bigalloc -C 16384", "", small, ""},
		{"meta_bg", "-t ext4 -b 1024 -O meta_bg,^resize_inode", "", small, ""},
		{"meta_bg-32", "-t ext4 -b 1024 -O meta_bg,^resize_inode,^64bit,^metadata_csum,uninit_bg", "", small, ""},
		{"sparse_super2", "-t ext4 -b 1024 -O sparse_super2,^resize_inode", "", small, ""},
		{"orphan_file", "-t ext4 -b 4096 -O orphan_file,fast_commit,mmp", "", ext4, ""},
		{"unsigned", "-t ext4 -b 1024", "", small, "flags 2"},
		{"unsigned-tea", "-t ext4 -b 1024", "", small, "def_hash_version tea\nssv flags 2"},
		{"unsigned-legacy", "-t ext4 -b 1024", "", small, "def_hash_version legacy\nssv flags 2"},
		{"no-journal", "-t ext4 -b 4096 -O ^has_journal,verity", "", ext4, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			if i%4 != 0 && testing.Short() {
				t.Skip("short")
			}
			image := filepath.Join(t.TempDir(), "image")
			args := append([]string{"-q", "-F", "-N", "4000", "-E", "lazy_itable_init=0,root_owner=7:8"}, strings.Fields(c.args)...)
			oracle.MustRun(t, "mke2fs", append(args, image, "80M")...)
			if c.superblock != "" {
				debugfs(t, image, "ssv "+c.superblock)
			}
			dir := mountAt(t, image, "noatime,user_xattr,acl"+prefix(",", c.mount))
			populate(t, dir, c.fill)
			umountAt(t, dir)
			dir = mountAt(t, image, "ro")
			want := dirManifest(t, dir)
			umountAt(t, dir)

			dev, err := blockdev.OpenFile(image, nil)
			if err != nil {
				t.Fatal(err)
			}
			defer dev.Close()
			f, err := Open(plainReader{dev}, nil)
			if err != nil {
				t.Fatal(err)
			}
			if f.journal != nil {
				t.Error("the journal of a clean file system was replayed")
			}
			compareManifests(t, readManifest(t, f), want)
			compareBitmaps(t, f)
			compareRoundTrip(t, f)
			fsck(t, image)
		})
	}
}

// TestReadImage compares what is read of the root file system of a Debian cloud
// image with the kernel's mount; and of the image that QIMG_EXT4_IMAGE names,
// which is clean and has no partitions.
func TestReadImage(t *testing.T) {
	image, off, n := os.Getenv("QIMG_EXT4_IMAGE"), int64(0), int64(0)
	switch {
	case image != "":
	case testing.Short():
		t.Skip("reads half a GB twice")
	default:
		// The first partition, as make-cloud-image says.
		off, n = 262144*512, 3930112*512
		oracle.Require(t, "qemu-img")
		image = filepath.Join(t.TempDir(), "cloud")
		oracle.MustRun(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", oracle.Input(t, "cloud"), image)
	}
	dir := mountAt(t, image, fmt.Sprintf("ro,noload,offset=%d", off))
	want := dirManifest(t, dir)
	umountAt(t, dir)
	file, err := blockdev.OpenFile(image, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if n == 0 {
		n = file.Size()
	}
	dev, err := blockdev.NewReaderSection(file, off, n)
	if err != nil {
		t.Fatal(err)
	}
	f, err := Open(plainReader{dev}, nil)
	if err != nil {
		t.Fatal(err)
	}
	compareManifests(t, readManifest(t, f), want)
}

// debugfs has debugfs change an image.
func debugfs(t testing.TB, image, commands string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "commands")
	if err := os.WriteFile(file, []byte(commands+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	oracle.MustRun(t, "debugfs", "-w", "-f", file, image)
}

func prefix(p, s string) string {
	if s == "" {
		return ""
	}
	return p + s
}

// compareBitmaps counts bits of all bitmaps, which the descriptors count, too.
func compareBitmaps(t *testing.T, f *FS) {
	t.Helper()
	for g := range f.sb.Groups() {
		d, err := f.groupDesc(g)
		if err != nil {
			t.Fatal(err)
		}
		blocks, err := f.blockBitmap(g, d)
		if err != nil {
			t.Fatal(err)
		}
		inodes, err := f.inodeBitmap(g, d)
		if err != nil {
			t.Fatal(err)
		}
		if b, i := countZeroes(blocks), countZeroes(inodes); b != d.freeBlocks || i != d.freeInodes {
			t.Errorf("group %d: %d blocks and %d inodes are free, the descriptor says %d and %d", g, b, i, d.freeBlocks, d.freeInodes)
		}
	}
}

// compareRoundTrip writes what was parsed back, which makes no difference.
func compareRoundTrip(t *testing.T, f *FS) {
	t.Helper()
	sb := make([]byte, superblockSize)
	if err := readFull(f.dev, sb, superblockOff); err != nil {
		t.Fatal(err)
	}
	b := bytes.Clone(sb)
	f.sb.put(b)
	if !bytes.Equal(b, sb) {
		t.Errorf("superblock:\n%x\n%x", b, sb)
	}
	for g := range f.sb.Groups() {
		d, err := f.groupDesc(g)
		if err != nil {
			t.Fatal(err)
		}
		block, off := f.sb.groupDescPlace(g)
		desc, err := f.block(block)
		if err != nil {
			t.Fatal(err)
		}
		b := bytes.Clone(desc[off : off+f.sb.DescSize])
		if d.put(f.sb, b, g); !bytes.Equal(b, desc[off:off+f.sb.DescSize]) {
			t.Errorf("descriptor %d:\n%x\n%x", g, b, desc[off:off+f.sb.DescSize])
		}
	}
	inodes := 0
	for ino := Ino(1); uint32(ino) <= f.sb.InodesCount; ino++ {
		n, err := f.Inode(ino)
		if errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrChecksum) {
			continue // not in use
		}
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, f.sb.InodeSize)
		if n.put(f.sb, b); !bytes.Equal(b, n.raw) {
			t.Errorf("inode %d:\n%x\n%x", ino, b, n.raw)
		}
		inodes++
	}
	if inodes < 100 {
		t.Errorf("%d inodes are in use", inodes)
	}
}

func countZeroes(b []byte) uint32 {
	n := uint32(0)
	for _, c := range b {
		for ; c != 0xff; c |= c + 1 {
			n++
		}
	}
	return n
}

// mountAt mounts an image until umountAt or the end of the test.
func mountAt(t testing.TB, image, options string) string {
	t.Helper()
	oracle.RequireRoot(t)
	dir := t.TempDir()
	oracle.MustRun(t, "mount", "-o", "loop,nobarrier,"+options, image, dir) // the host need not sync
	t.Cleanup(func() {
		if mounted(dir) {
			umount(t, dir)
		}
	})
	return dir
}

func mounted(dir string) bool {
	b, _ := os.ReadFile("/proc/self/mounts")
	return bytes.Contains(b, []byte(" "+dir+" "))
}

func umountAt(t testing.TB, dir string) {
	t.Helper()
	if r := oracle.Run(t, "umount", dir); r.Code != 0 {
		t.Fatalf("umount: %s", r.Stderr)
	}
}

package ext4img

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/oracle"
)

// resizeTo resizes the file system of an image, which grows before if it has to.
func resizeTo(t testing.TB, image string, size int64, opts ResizeOptions) *ResizeResult {
	t.Helper()
	r, err := tryResize(t, image, size, opts)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func tryResize(t testing.TB, image string, size int64, opts ResizeOptions) (*ResizeResult, error) {
	t.Helper()
	if st, err := os.Stat(image); err != nil || st.Size() < size {
		if err := os.Truncate(image, size); err != nil {
			t.Fatal(err)
		}
	}
	dev, err := blockdev.OpenFile(image, &blockdev.FileOptions{Write: true, NoLock: true})
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	opts.Size = size
	return Resize(t.Context(), dev, &opts)
}

// fillImage has mke2fs make an image that holds some files.
func fillImage(t testing.TB, args, size string) string {
	t.Helper()
	oracle.Require(t, "mke2fs", "e2fsck", "resize2fs", "dumpe2fs")
	image := filepath.Join(t.TempDir(), "image")
	tree := t.TempDir()
	for i := range 200 {
		name := filepath.Join(tree, fmt.Sprintf("dir%d", i%7), fmt.Sprintf("file%d", i))
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(strings.Repeat(fmt.Sprint(i), 1+i*i%9000)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	oracle.MustRun(t, "mke2fs", append(append([]string{"-q", "-F", "-E", "lazy_itable_init=0", "-d", tree}, strings.Fields(args)...), image, size)...)
	return image
}

// growKinds are the kinds of file systems that grow, and the sizes before and
// after, in MiB.
var growKinds = []struct {
	args   string
	before string
	after  []int64
}{
	{"-t ext4 -b 4096", "40M", []int64{50, 129, 1000, 9000}},
	{"-t ext4 -b 1024", "20M", []int64{25, 40, 41, 300}},
	{"-t ext4 -b 1024 -g 256 -O ^resize_inode -I 128", "5M", []int64{6, 15, 40}}, // meta_bg
	{"-t ext4 -b 1024 -g 1024 -E resize=204800", "10M", []int64{11, 31, 100}},    // the table, and then meta_bg
	{"-t ext4 -b 1024 -O meta_bg,^resize_inode -g 512", "20M", []int64{30, 55}},
	{"-t ext4 -b 4096 -O ^64bit,^flex_bg,^metadata_csum,uninit_bg", "130M", []int64{131, 700}},
	{"-t ext3 -b 1024 -N 10000", "10M", []int64{16, 64}},
	{"-t ext3 -b 4096 -O ^sparse_super,^resize_inode", "100M", []int64{400}},
	{"-t ext4 -b 4096 -O sparse_super2", "300M", []int64{700}},
	{"-t ext4 -b 4096 -O bigalloc -C 65536", "100M", []int64{101, 4000}},
	{"-t ext4 -b 1024 -O bigalloc -C 4096", "40M", []int64{41, 300}},
	{"-t ext4 -b 4096 -O inline_data,ea_inode,large_dir,project,orphan_file,fast_commit", "64M", []int64{500}},
	{"-t ext4 -b 2048 -G 4 -m 7", "64M", []int64{500}},
	{"-t ext2 -b 1024", "20M", []int64{30, 70}},
	{"-t ext2 -b 4096 -O ^resize_inode", "20M", []int64{40, 200}},
	{"-t ext4 -b 4096 -O ^has_journal", "50M", []int64{400}},
}

// TestGrow grows file systems of many kinds, and compares what they are then
// with what resize2fs makes of them.
func TestGrow(t *testing.T) {
	for _, c := range growKinds {
		t.Run(c.args, func(t *testing.T) {
			t.Parallel()
			image := fillImage(t, c.args, c.before)
			before := readManifest(t, openImage(t, image, nil))
			for _, mib := range c.after {
				other := image + ".2"
				oracle.MustRun(t, "cp", "--sparse=always", image, other)
				r := resizeTo(t, image, mib<<20, ResizeOptions{})
				fsckCounts(t, image)
				compareManifests(t, readManifest(t, openImage(t, image, nil)), before)
				if err := os.Truncate(other, mib<<20); err != nil {
					t.Fatal(err)
				}
				oracle.MustRun(t, "resize2fs", "-f", other)
				compareSuper(t, image, other)
				// e2fsck -n does not look at all that the resize inode leads to.
				if a, b := openImage(t, image, nil).Super(), openImage(t, other, nil).Super(); a.ReservedGDT == b.ReservedGDT && a.BackupBgs == b.BackupBgs {
					const list = "blocks <7>"
					if diff := cmp.Diff(oracle.MustRun(t, "debugfs", "-R", list, other), oracle.MustRun(t, "debugfs", "-R", list, image)); diff != "" {
						t.Errorf("blocks of the resize inode: resize2fs (-):\n%s", diff)
					}
				} else if !strings.Contains(c.args, "sparse_super2") && !strings.Contains(c.args, "-g ") {
					t.Errorf("%d blocks are kept for descriptors, resize2fs keeps %d", a.ReservedGDT, b.ReservedGDT)
				}
				if b := openImage(t, image, nil).Super().BlocksCount * int64(openImage(t, image, nil).Super().BlockSize); r.NewSize != b {
					t.Errorf("%d bytes, the result says %d", b, r.NewSize)
				}
			}
		})
	}
}

// fsckCounts is fsck, and compares the counts of the superblock, which e2fsck
// does not take at their word, with those of the groups.
func fsckCounts(t testing.TB, image string) {
	t.Helper()
	fsck(t, image)
	f := openImage(t, image, nil)
	blocks, inodes := int64(0), uint32(0)
	for g := range f.sb.groups {
		d, err := f.groupDesc(g)
		if err != nil {
			t.Fatal(err)
		}
		blocks, inodes = blocks+int64(d.freeBlocks)*f.sb.clusterRatio(), inodes+d.freeInodes
	}
	if s := f.Super(); s.FreeBlocksCount != blocks || s.FreeInodesCount != inodes {
		t.Fatalf("%d free blocks and %d free inodes, the groups have %d and %d", s.FreeBlocksCount, s.FreeInodesCount, blocks, inodes)
	}
}

// compareSuper compares the sizes that dumpe2fs tells of two images.
func compareSuper(t testing.TB, image, want string) {
	t.Helper()
	read := func(image string) map[string]string {
		m := map[string]string{}
		for line := range strings.Lines(oracle.MustRun(t, "dumpe2fs", "-h", image)) {
			if k, v, ok := strings.Cut(line, ":"); ok && (k == "Inode count" || k == "Block count" || k == "Reserved block count" || k == "Free inodes") {
				m[k] = strings.TrimSpace(v)
			}
		}
		return m
	}
	if diff := cmp.Diff(read(want), read(image)); diff != "" {
		t.Errorf("resize2fs (-):\n%s", diff)
	}
}

// TestShrinkKinds shrinks file systems of many kinds in steps, the last of
// which is the smallest.
func TestShrinkKinds(t *testing.T) {
	for i, c := range growKinds {
		if strings.Contains(c.args, "bigalloc") || i%3 != 0 && !*resizeLong {
			continue
		}
		t.Run(c.args, func(t *testing.T) {
			t.Parallel()
			image := fillImage(t, c.args, fmt.Sprintf("%dM", min(c.after[len(c.after)-1], 700)))
			before := withoutBlocks(readManifest(t, openImage(t, image, nil)))
			size := openImage(t, image, nil).Super().BlocksCount * int64(openImage(t, image, nil).Super().BlockSize)
			for range 3 {
				size = size * 2 / 3
				r, err := tryResize(t, image, size, ResizeOptions{Shrink: true})
				if errors.Is(err, ErrMinimum) {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				if r.NewSize > size {
					t.Fatalf("%d bytes, want %d", r.NewSize, size)
				}
				fsckCounts(t, image)
				compareManifests(t, withoutBlocks(readManifest(t, openImage(t, image, nil))), before)
			}
			minimum := strings.Fields(oracle.MustRun(t, "resize2fs", "-P", "-f", image))
			r := resizeTo(t, image, 0, ResizeOptions{Minimum: true})
			fsckCounts(t, image)
			compareManifests(t, withoutBlocks(readManifest(t, openImage(t, image, nil))), before)
			least, err := strconv.ParseInt(minimum[len(minimum)-1], 10, 64)
			if blocks := r.NewSize / int64(openImage(t, image, nil).Super().BlockSize); err != nil || blocks > least {
				t.Errorf("%d blocks, resize2fs -P %d, %v", blocks, least, err)
			}
		})
	}
}

// farthest returns the directory in one that has the highest inode, and with that
// lies in the last group that has any.
func farthest(t testing.TB, dir string) string {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	far, last := dir, uint64(0)
	for _, e := range list {
		var st unix.Stat_t
		name := filepath.Join(dir, e.Name())
		if err := unix.Lstat(name, &st); err != nil {
			t.Fatal(err)
		}
		if e.IsDir() && st.Ino > last {
			far, last = name, st.Ino
		}
	}
	return far
}

// churn has the kernel remove some files and make others, as far as there is
// room.
func churn(t testing.TB, dir string, r *rand.Rand) {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	room := int64(st.Bfree) * int64(st.Bsize) / 2
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && r.IntN(4) == 0 {
			err = os.Remove(path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for k := 0; room > 0 && k < 300; k++ {
		sub := filepath.Join(dir, fmt.Sprintf("new%d", r.IntN(30)))
		b := make([]byte, r.Int64N(min(room, 400<<10)+1))
		for i := range b {
			b[i] = byte(r.Uint32())
		}
		room -= int64(len(b)) + 20<<10
		name := filepath.Join(sub, fmt.Sprint(r.Uint32()))
		err := os.MkdirAll(sub, 0o755)
		if err == nil {
			err = os.WriteFile(name, b, 0o644)
		}
		if err == nil && k%3 == 0 {
			err = unix.Lsetxattr(name, "user.churn", b[:min(len(b), 300)], 0)
		}
		if errors.Is(err, unix.ENOSPC) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// withoutBlocks leaves out i_blocks, which counts the nodes of extent trees.
func withoutBlocks(m manifest) manifest {
	re := regexp.MustCompile(` blocks \d+ `)
	for k, v := range m {
		m[k] = re.ReplaceAllString(v, " ")
	}
	return m
}

var resizeLong = flag.Bool("resize.long", false, "resize many more file systems, to many more sizes")

// TestResizeRandom has the kernel fill file systems with files of all kinds,
// and resizes them up and down.
func TestResizeRandom(t *testing.T) {
	ext2 := populateOptions{entries: 300, comb: 300, far: 5 << 30, noFallocate: true}
	ext4 := populateOptions{entries: 1500, comb: 900, far: 1 << 40}
	ea := ext4
	ea.eaInode = true
	old := ext2
	old.oldInodes = true
	for i, c := range []struct {
		args string
		fill populateOptions
	}{
		{"-t ext4 -b 1024 -g 2048 -G 4 -O ea_inode,large_dir,metadata_csum_seed,orphan_file", ea},
		{"-t ext3 -b 1024 -g 1024", ext2},
		{"-t ext4 -b 4096 -g 2048 -O ea_inode,fast_commit", ea},
		{"-t ext2 -b 1024 -I 128 -g 2048", old},
		{"-t ext4 -b 2048 -g 2048 -O ^metadata_csum,^64bit,^uninit_bg,^flex_bg", ext4},
		{"-t ext4 -b 1024 -g 1024 -O ^metadata_csum,uninit_bg,^64bit", ext4},
		{"-t ext4 -b 1024 -g 4096 -O meta_bg,^resize_inode", ext4},
		{"-t ext4 -b 1024 -g 4096 -O sparse_super2", ext4},
		{"-t ext4 -b 4096 -g 4096 -O ^has_journal,verity", ext4},
		{"-r 0 -b 1024 -g 4096", old},
	} {
		t.Run(c.args, func(t *testing.T) {
			if i > 1 && (testing.Short() || !*resizeLong) {
				t.Skip("-resize.long")
			}
			oracle.Require(t, "mke2fs", "resize2fs")
			image := filepath.Join(t.TempDir(), "image")
			oracle.MustRun(t, "mke2fs", append(append([]string{"-q", "-F", "-N", "6000", "-E", "lazy_itable_init=0"}, strings.Fields(c.args)...), image, "100M")...)
			dir := mountAt(t, image, "noatime,user_xattr,acl")
			r := rand.New(rand.NewPCG(uint64(i), 1))
			for k := range 40 { // the kernel spreads these over the groups
				sub := filepath.Join(dir, fmt.Sprintf("d%d", k))
				if err := os.Mkdir(sub, 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(sub, "a"), make([]byte, r.IntN(60000)), 0o644); err != nil {
					t.Fatal(err)
				}
				if err := os.Mkdir(filepath.Join(sub, "sub"), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.Link(filepath.Join(sub, "a"), filepath.Join(dir, fmt.Sprintf("link%d", k))); err != nil {
					t.Fatal(err)
				}
			}
			populate(t, farthest(t, dir), c.fill)
			umountAt(t, dir)
			fsckCounts(t, image)
			want := withoutBlocks(readManifest(t, openImage(t, image, nil)))
			least, err := MinimumSize(t.Context(), openImage(t, image, nil).dev)
			if err != nil {
				t.Fatal(err)
			}
			rounds := 3
			if *resizeLong {
				rounds = 12
			}
			moved := int64(0)
			for k := range rounds {
				size := least + r.Int64N(120<<20-least)
				opts := ResizeOptions{Shrink: true}
				if k%3 == 1 {
					size, opts = 0, ResizeOptions{Minimum: true}
				}
				res, err := tryResize(t, image, size, opts)
				if err != nil && !errors.Is(err, ErrMinimum) {
					t.Fatalf("%d bytes: %v", size, err)
				}
				fsckCounts(t, image)
				compareManifests(t, withoutBlocks(readManifest(t, openImage(t, image, nil))), want)
				if res != nil {
					t.Logf("%+v", *res)
					moved += res.MovedInodes
				}
				if t.Failed() {
					return
				}
				if *resizeLong && k%2 == 0 {
					dir := mountAt(t, image, "noatime,user_xattr,acl")
					churn(t, dir, r)
					umountAt(t, dir)
					fsckCounts(t, image)
					want = withoutBlocks(readManifest(t, openImage(t, image, nil)))
					if least, err = MinimumSize(t.Context(), openImage(t, image, nil).dev); err != nil {
						t.Fatal(err)
					}
				}
			}
			if moved == 0 && i < 2 {
				t.Error("no inode has moved")
			}
			dir = mountAt(t, image, "ro")
			got := withoutBlocks(dirManifest(t, dir))
			umountAt(t, dir)
			compareManifests(t, got, want)
		})
	}
}

// TestResizeRefused tries what cannot be done. The file systems stay as they are.
func TestResizeRefused(t *testing.T) {
	for _, c := range []struct {
		args string
		size int64
		opts ResizeOptions
		want error
		text string
	}{
		{"-t ext4 -b 4096 -O bigalloc -C 16384", 10 << 20, ResizeOptions{Shrink: true}, ErrUnsupported, "bigalloc"},
		{"-t ext4 -b 4096 -O stable_inodes", 10 << 20, ResizeOptions{Shrink: true}, ErrUnsupported, "stable_inodes"},
		{"-t ext4 -b 4096", 10 << 20, ResizeOptions{}, ErrShrink, ""},
		{"-t ext4 -b 4096", 5 << 20, ResizeOptions{Shrink: true}, ErrMinimum, "needs"},
		{"-t ext4 -b 1024 -O ^64bit", 4<<40 + 1<<20, ResizeOptions{}, ErrUnsupported, "64bit"},
		{"-t ext4 -b 4096 -i 4096", 60 << 40, ResizeOptions{}, ErrUnsupported, "inodes in each group"},
	} {
		oracle.Require(t, "mke2fs", "e2fsck")
		image := filepath.Join(t.TempDir(), "image")
		oracle.MustRun(t, "mke2fs", append(append([]string{"-q", "-F"}, strings.Fields(c.args)...), image, "40M")...)
		before, err := os.ReadFile(image)
		if err != nil {
			t.Fatal(err)
		}
		dev := blockdev.NewMemory(max(c.size, 40<<20))
		if _, err := dev.WriteAt(before, 0); err != nil {
			t.Fatal(err)
		}
		c.opts.Size = c.size
		_, err = Resize(t.Context(), dev, &c.opts)
		if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v", c.args, err)
			continue
		}
		if _, again := PlanResize(t.Context(), dev, dev.Size(), &c.opts); again == nil || again.Error() != err.Error() {
			t.Errorf("%s: %v, PlanResize: %v", c.args, err, again)
		}
		after := make([]byte, len(before))
		if _, err := dev.ReadAt(after, 0); err != nil || !bytes.Equal(before, after) {
			t.Errorf("%s: the file system has changed: %v", c.args, err)
		}
	}
}

// TestGrowFull grows a file system without a journal that has no room for one,
// and a large one with large blocks.
func TestGrowFull(t *testing.T) {
	oracle.Require(t, "mke2fs", "e2fsck")
	for _, c := range []struct {
		args, before string
		after        int64
	}{
		{"-t ext2 -b 1024", "1440K", 30 << 20},
		{"-t ext4 -b 65536", "100M", 3 << 40},
		{"-t ext4 -b 4096 -G 64", "3G", 700 << 30},
	} {
		image := filepath.Join(t.TempDir(), "image")
		oracle.MustRun(t, "mke2fs", append(append([]string{"-q", "-F"}, strings.Fields(c.args)...), image, c.before)...)
		if r := resizeTo(t, image, c.after, ResizeOptions{}); r.NewSize < c.after-c.after/20 {
			t.Errorf("%s: %d bytes, want %d", c.args, r.NewSize, c.after)
		}
		fsck(t, image)
	}
}

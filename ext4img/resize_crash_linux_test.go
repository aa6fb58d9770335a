package ext4img

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"qimg/qcow2/blockdev/blocktest"
	"qimg/qcow2/blockdev/oracle"
)

// resizeCrashImage makes a file system whose files lie all over it.
func resizeCrashImage(t testing.TB, args, size string) string {
	t.Helper()
	oracle.Require(t, "mke2fs", "e2fsck", "debugfs")
	image := filepath.Join(t.TempDir(), "image")
	tree := t.TempDir()
	for i := range 60 {
		name := filepath.Join(tree, fmt.Sprintf("d%d", i%9), strings.Repeat("n", 30)+fmt.Sprint(i))
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(strings.Repeat(fmt.Sprint(i), 1+i*i*15)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	oracle.MustRun(t, "mke2fs", append(append([]string{"-q", "-F", "-E", "lazy_itable_init=0,hash_seed=01234567-0123-0123-0123-0123456789ab", "-U", "01234567-0123-0123-0123-0123456789ab", "-d", tree}, strings.Fields(args)...), image, size)...)
	// What is removed leaves the first inodes and blocks free.
	var rm strings.Builder
	for i := range 42 {
		fmt.Fprintf(&rm, "rm d%d/%s%d\n", i%9, strings.Repeat("n", 30), i)
	}
	debugfs(t, image, rm.String())
	fsck(t, image)
	return image
}

// TestCrashResize cuts resizing short in every way that a disk can. What is
// left is a file system that e2fsck -p finds clean or makes so, with all files,
// and that can be resized.
func TestCrashResize(t *testing.T) {
	for i, c := range []struct {
		name, args string
		before     string
		after      int64 // KiB; 0: the smallest
	}{
		{"grow", "-t ext4 -b 1024 -g 1024 -N 256 -J size=1 -E resize=100000", "4M", 9000},
		{"shrink", "-t ext4 -b 1024 -g 1024 -N 128 -J size=1 -O ^flex_bg", "8M", 0},
		{"grow-meta_bg", "-t ext4 -b 1024 -g 512 -N 256 -J size=1 -O ^resize_inode", "5M", 12000},
		{"grow-ext2", "-t ext2 -b 1024 -g 1024 -N 128", "4M", 9000},
		{"shrink-flex", "-t ext4 -b 1024 -g 1024 -N 128 -J size=1 -G 4", "8M", 0},
		{"shrink-ext3", "-t ext3 -b 1024 -g 1024 -N 128 -J size=1", "8M", 0},
		{"shrink-ext2", "-t ext2 -b 1024 -g 1024 -N 128", "6M", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			if i > 1 && !*resizeLong {
				t.Skip("-resize.long")
			}
			image := resizeCrashImage(t, c.args, c.before)
			opts := ResizeOptions{Minimum: true}
			if c.after != 0 {
				opts = ResizeOptions{Shrink: true}
				if err := os.Truncate(image, c.after<<10); err != nil {
					t.Fatal(err)
				}
			}
			base := openMemory(t, image)
			rec, err := blocktest.NewRecorder(base.Clone())
			if err != nil {
				t.Fatal(err)
			}
			want := withoutBlocks(treeOf(t, base))
			res, err := Resize(t.Context(), rec, &opts)
			if err != nil {
				t.Fatal(err)
			}
			crash, every := &blocktest.CrashOptions{Subsets: 16, Tears: 3, Seed: uint64(i)}, 12-7*b2i(c.after != 0)
			if *resizeLong {
				crash, every = &blocktest.CrashOptions{Subsets: 64, Tears: 16}, 3
			}
			r := rand.New(rand.NewPCG(3, 4))
			states, looked, unchanged := 0, 0, 0
			for s, err := range rec.CrashStates(crash) {
				if err != nil {
					t.Fatal(err)
				}
				if states++; r.IntN(every) != 0 {
					continue
				}
				looked++
				writeMemory(t, image, s.Dev())
				if r := oracle.Run(t, "e2fsck", "-p", image); r.Code > 1 {
					t.Fatalf("e2fsck -p: %d\n%s%s\n%v", r.Code, r.Stdout, r.Stderr, s)
				}
				fsck(t, image)
				dev := openMemory(t, image)
				if got := withoutBlocks(treeOf(t, dev)); !maps.Equal(got, want) {
					t.Fatalf("files have changed\n%v", s)
				}
				again, err := Resize(t.Context(), dev, &opts)
				if err != nil {
					t.Fatalf("again: %v\n%v", err, s)
				}
				if again.NewSize != res.NewSize && again.NewSize > res.NewSize+res.NewSize/10 {
					t.Fatalf("again: %d bytes, not %d\n%v", again.NewSize, res.NewSize, s)
				}
				unchanged += b2i(again.OldSize == res.OldSize)
				writeMemory(t, image, dev)
				fsck(t, image)
				if got := withoutBlocks(treeOf(t, dev)); !maps.Equal(got, want) {
					t.Fatalf("files have changed after another Resize\n%v", s)
				}
			}
			t.Logf("%+v: %d states, e2fsck looked at %d, in %d the size was the old one", *res, states, looked, unchanged)
			if looked < 20 || unchanged == 0 || unchanged == looked {
				t.Errorf("%d states, e2fsck looked at %d, in %d the size was the old one", states, looked, unchanged)
			}
		})
	}
}

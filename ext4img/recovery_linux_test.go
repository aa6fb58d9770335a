package ext4img

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/oracle"
)

// TestReplayKernel takes copies of mounted file systems that have not written
// back what their journals hold, and compares what is read from them with what
// the kernel reads after its own replay.
func TestReplayKernel(t *testing.T) {
	oracle.Require(t, "mke2fs")
	for i, c := range []struct {
		name, args, mount string
		steps             int
	}{
		{"ext3-data", "-t ext3 -b 1024 -J size=1", "data=journal", 4}, // the log goes round
		{"ext4", "-t ext4 -b 4096 -J size=4", "", 3},
		{"ext4-data", "-t ext4 -b 1024 -J size=1", "data=journal", 4},
		{"csum-v1", "-t ext4 -b 1024 -O ^metadata_csum", "journal_checksum", 2},
		{"async", "-t ext4 -b 1024 -O ^metadata_csum,^64bit", "journal_async_commit,data=writeback", 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			if i%3 != 0 && testing.Short() {
				t.Skip("short")
			}
			image := filepath.Join(t.TempDir(), "image")
			oracle.MustRun(t, "mke2fs", append(append([]string{"-q", "-F", "-E", "lazy_itable_init=0"}, strings.Fields(c.args)...), image, "64M")...)
			dir := mountAt(t, image, "noatime,commit=1000"+prefix(",", c.mount))
			r := rand.New(rand.NewPCG(3, 4))
			var names []string
			for step := range c.steps {
				names = disturb(t, dir, names, r, step)
				if step%2 == 1 || step == c.steps-1 {
					compareReplay(t, image, dir, step == c.steps-1, false)
				}
			}
		})
	}
}

// TestReplayFastCommits does the same with fast commits, which only some
// operations make. The kernel's own replay loses the data of files that were
// inline before, so that there the tree that was synced is the judge.
func TestReplayFastCommits(t *testing.T) {
	oracle.Require(t, "mke2fs")
	for _, c := range []struct {
		name, args string
		live       bool
	}{
		{"4k", "-t ext4 -b 4096 -O fast_commit", false},
		{"4k-live", "-t ext4 -b 4096 -O fast_commit", true},
		{"1k-inline", "-t ext4 -b 1024 -O fast_commit,inline_data", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			image := filepath.Join(t.TempDir(), "image")
			oracle.MustRun(t, "mke2fs", append(append([]string{"-q", "-F", "-E", "lazy_itable_init=0"}, strings.Fields(c.args)...), image, "64M")...)
			dir := mountAt(t, image, "noatime,commit=1000")
			write := func(name string, off int64, n int, flags int) {
				t.Helper()
				f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR|flags, 0o644)
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				if _, err := f.WriteAt([]byte(strings.Repeat(name+"\n", n)), off); err != nil {
					t.Fatal(err)
				}
				if err := f.Sync(); err != nil {
					t.Fatal(err)
				}
			}
			check := func(err error) {
				t.Helper()
				if err != nil {
					t.Fatal(err)
				}
			}
			check(os.Mkdir(filepath.Join(dir, "old"), 0o755))
			for i := range 200 {
				check(os.WriteFile(filepath.Join(dir, "old", fmt.Sprint(i)), []byte("old"), 0o644))
			}
			oracle.MustRun(t, "sync", "-f", dir)
			found := false
			for step := range 6 {
				name := fmt.Sprintf("new%d", step)
				write(name, 0, 10+3000*(step%2), os.O_CREATE)
				check(os.Remove(filepath.Join(dir, "old", fmt.Sprint(step))))
				check(os.Link(filepath.Join(dir, "old/100"), filepath.Join(dir, "old", "link"+name)))
				write("old/150", int64(step)*20000, 100, 0)
				if step > 3 {
					check(os.Truncate(filepath.Join(dir, "new1"), int64(100*(10-step))))
				}
				check(os.Rename(filepath.Join(dir, "old", fmt.Sprint(20+step)), filepath.Join(dir, fmt.Sprint("moved", step))))
				write(name, 30000, 1, 0) // which syncs all that came before
				if step%2 == 1 {
					f := compareReplay(t, image, dir, step == 5, c.live)
					found = found || f.fc != nil
				}
			}
			if !found {
				t.Error("the kernel made no fast commits")
			}
		})
	}
}

// disturb changes a mounted tree, and syncs some of it.
func disturb(t *testing.T, dir string, names []string, r *rand.Rand, step int) []string {
	t.Helper()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	content := make([]byte, 40000)
	for i := range content {
		content[i] = byte(r.Uint32())
	}
	// Blocks that begin with the magic number of the journal are escaped in it.
	for i := 0; i < len(content); i += 1024 {
		copy(content[i:], "\xc0\x3b\x39\x98")
	}
	for i := range 60 {
		switch k := r.IntN(10); {
		case k < 4 || len(names) < 5:
			name := filepath.Join(dir, fmt.Sprintf("f%d-%d", step, i))
			check(os.WriteFile(name, content[:r.IntN(len(content))], 0o600))
			names = append(names, name)
		case k < 6:
			// Directories that come and go leave revoked blocks behind.
			name := filepath.Join(dir, fmt.Sprintf("d%d-%d", step, i))
			check(os.Mkdir(name, 0o755))
			for j := range 20 {
				check(os.WriteFile(filepath.Join(name, strings.Repeat("x", 60)+fmt.Sprint(j)), nil, 0o600))
			}
			names = append(names, name)
		default:
			k := r.IntN(len(names))
			check(os.RemoveAll(names[k]))
			names = append(names[:k], names[k+1:]...)
		}
		if i%20 == 0 {
			oracle.MustRun(t, "sync", "-f", dir)
		}
	}
	oracle.MustRun(t, "sync", "-f", dir)
	return names
}

// compareReplay compares a copy of the image of a mounted file system with
// what the kernel makes of it, or with the mounted tree.
func compareReplay(t *testing.T, image, dir string, unmount, live bool) *FS {
	t.Helper()
	snapshot := filepath.Join(t.TempDir(), "copy")
	oracle.MustRun(t, "cp", "--sparse=always", image, snapshot)
	dev, err := blockdev.OpenFile(snapshot, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	f, err := Open(plainReader{dev}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if f.journal == nil || len(f.journal.blocks) == 0 {
		t.Error("nothing was replayed")
	}
	got := readManifest(t, f)
	var want manifest
	if live {
		want = dirManifest(t, dir)
	}
	if unmount {
		umountAt(t, dir)
	}
	if !live {
		// The file system has the same UUID as the one that is mounted, which
		// the kernel does not mind.
		mnt := mountAt(t, snapshot, "noatime")
		want = dirManifest(t, mnt)
		umountAt(t, mnt)
	}
	if f.fc != nil {
		// Fast commits do not hold the times and sizes of directories; the
		// kernel's replay makes new ones.
		for path, line := range got {
			if strings.HasPrefix(line, "04") {
				got[path] = withoutTimes(line)
				want[path] = withoutTimes(want[path])
			}
		}
	}
	compareManifests(t, got, want)
	return f
}

// withoutTimes cuts size, blocks and time from a line of a manifest.
func withoutTimes(line string) string {
	head, rest, _ := strings.Cut(line, " size ")
	_, tail, _ := strings.Cut(rest, " dev ")
	return head + tail
}

// TestReplayDebugfs has debugfs write journals with checksums of each version,
// and e2fsck replay them.
func TestReplayDebugfs(t *testing.T) {
	oracle.Require(t, "mke2fs", "debugfs", "e2fsck")
	for _, c := range []struct{ name, args, open string }{
		{"none", "-O ^metadata_csum,^64bit", "jo"},
		{"64bit", "-O ^metadata_csum,64bit", "jo"},
		{"v2", "-O metadata_csum", "jo -c -v 2"},
		{"v3", "-O metadata_csum", "jo -c -v 3"},
	} {
		t.Run(c.name, func(t *testing.T) {
			tmp := t.TempDir()
			image := filepath.Join(tmp, "image")
			data := make([]byte, 30*1024)
			for i := range data {
				data[i] = byte(i / 1024)
			}
			copy(data[5*1024:], "\xc0\x3b\x39\x98 escaped")
			file := filepath.Join(tmp, "data")
			if err := os.WriteFile(file, data, 0o600); err != nil {
				t.Fatal(err)
			}
			oracle.MustRun(t, "mke2fs", append(append([]string{"-q", "-F", "-t", "ext4", "-b", "1024"}, strings.Fields(c.args)...), image, "16M")...)
			script := fmt.Sprintf("write %s target\n%s\njw -b 9000-9009 %s\njw -b 9005-9014 %s\njw -r 9000,9002,9012\njw -b 9002 %s\njw -r 9007 -b 9007 %s\njc\n", file, c.open, file, file, file, file)
			cmds := filepath.Join(tmp, "cmds")
			if err := os.WriteFile(cmds, []byte(script), 0o600); err != nil {
				t.Fatal(err)
			}
			oracle.MustRun(t, "debugfs", "-w", "-f", cmds, image)
			f := openImage(t, image, nil)
			if f.journal == nil {
				t.Fatal("nothing was replayed")
			}
			got := make([]byte, 20*1024)
			if err := f.readBlocks(got, 8998); err != nil {
				t.Fatal(err)
			}
			if r := oracle.Run(t, "e2fsck", "-fy", "-E", "journal_only", image); r.Code > 1 {
				t.Fatalf("e2fsck: %d\n%s", r.Code, r.Stdout)
			}
			after := openImage(t, image, nil)
			want := make([]byte, len(got))
			if err := after.readBlocks(want, 8998); err != nil {
				t.Fatal(err)
			}
			for i := range len(got) / 1024 {
				if string(got[i*1024:][:1024]) != string(want[i*1024:][:1024]) {
					t.Errorf("block %d: %.20q, want %.20q", 8998+i, got[i*1024:], want[i*1024:])
				}
			}
		})
	}
}

// TestReplayDamaged damages blocks of a journal one by one: what is read is
// some state that a transaction left, or an error.
func TestReplayDamaged(t *testing.T) {
	oracle.Require(t, "mke2fs", "debugfs")
	tmp := t.TempDir()
	image, file, cmds := filepath.Join(tmp, "image"), filepath.Join(tmp, "data"), filepath.Join(tmp, "cmds")
	if err := os.WriteFile(file, []byte(strings.Repeat("new content of a block\n", 1000)), 0o600); err != nil {
		t.Fatal(err)
	}
	oracle.MustRun(t, "mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", image, "16M")
	if err := os.WriteFile(cmds, fmt.Appendf(nil, "jo -c -v 3\njw -b 9000-9009 %s\njw -r 9000\njw -b 9010 %s\njc\n", file, file), 0o600); err != nil {
		t.Fatal(err)
	}
	oracle.MustRun(t, "debugfs", "-w", "-f", cmds, image)
	good := openImage(t, image, nil)
	r, err := good.openJournal(journalIno)
	if err != nil {
		t.Fatal(err)
	}
	whole := len(good.journal.blocks)
	states := map[string]int{}
	for n := range int64(20) {
		_, phys, _, err := r.log.run(n * 1024)
		if err != nil {
			t.Fatal(err)
		}
		dev := damagedReader{good.dev, phys + 100}
		f, err := Open(dev, nil)
		switch {
		case err == nil && f.journal == nil:
			states["none"]++
		case err == nil && len(f.journal.blocks) == whole:
			states["whole"]++
		case err == nil:
			states["part"]++
		case errors.Is(err, ErrChecksum):
			states["checksum"]++
		default:
			t.Errorf("block %d of the journal: %v", n, err)
		}
	}
	t.Log(states)
	if states["checksum"] < 10 || states["part"] == 0 || states["whole"] == 0 {
		t.Errorf("states: %v", states)
	}
}

// damagedReader is a device with one byte that is wrong.
type damagedReader struct {
	blockdev.Reader
	off int64
}

func (d damagedReader) ReadAt(p []byte, off int64) (int, error) {
	n, err := d.Reader.ReadAt(p, off)
	if i := d.off - off; i >= 0 && i < int64(n) {
		p[i] ^= 0x55
	}
	return n, err
}

package ext4img

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"qimg/qcow2/blockdev/oracle"
)

// hostTree makes a tree with one of everything that a tar archive can hold. plain
// leaves out what ustar cannot.
func hostTree(t *testing.T, plain bool) string {
	t.Helper()
	dir := t.TempDir()
	must := func(errs ...error) {
		t.Helper()
		for _, err := range errs {
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	write := func(name, text string) string {
		p := filepath.Join(dir, name)
		must(os.MkdirAll(filepath.Dir(p), 0o755), os.WriteFile(p, []byte(text), 0o644))
		return p
	}
	for i := range 200 {
		write(fmt.Sprintf("files/d%d/f%d", i%7, i), strings.Repeat(fmt.Sprint(i), i*11))
	}
	write("names/\xe9\xff", "1")
	write("names/new\nline", "2")
	write("names/ ", "3")
	must(os.Link(filepath.Join(dir, "files/d1/f1"), filepath.Join(dir, "hard")), os.Link(filepath.Join(dir, "hard"), filepath.Join(dir, "names/hard")),
		os.Symlink("../nowhere", filepath.Join(dir, "link")), os.Symlink(strings.Repeat("x", 90), filepath.Join(dir, "link90")),
		unix.Mkfifo(filepath.Join(dir, "fifo"), 0o620), os.Mkdir(filepath.Join(dir, "empty"), 0o700),
		os.Chmod(filepath.Join(dir, "empty"), 0o770|os.ModeSetgid|os.ModeSticky), os.Chmod(filepath.Join(dir, "files/d2/f2"), 0o4751|os.ModeSetuid))
	if os.Geteuid() == 0 {
		must(unix.Mknod(filepath.Join(dir, "char"), unix.S_IFCHR|0o640, int(unix.Mkdev(4, 65))),
			unix.Mknod(filepath.Join(dir, "block"), unix.S_IFBLK|0o600, int(unix.Mkdev(259, 70))),
			os.Lchown(filepath.Join(dir, "files/d3/f3"), 1000, 100), os.Lchown(filepath.Join(dir, "link"), 5, 6))
	}
	if !plain {
		long := strings.Repeat("long-name-", 20)
		write(filepath.Join("long", long, long, "f"), "deep")
		must(os.Symlink(strings.Repeat("target/", 100), filepath.Join(dir, "longlink")), os.Link(filepath.Join(dir, "long", long, long, "f"), filepath.Join(dir, "long/"+long+"/hard")))
		for name, offs := range map[string][]int64{"hole": nil, "islands": {0, 1 << 20, 5<<20 + 100}, "tail": {3<<20 + 1}} {
			f, err := os.Create(write("sparse/"+name, ""))
			must(err, f.Truncate(6<<20))
			for _, off := range offs {
				_, err := f.WriteAt([]byte("island"), off)
				must(err)
			}
			must(f.Close())
		}
		f, err := os.Create(write("sparse/comb", ""))
		must(err)
		for i := range int64(600) {
			_, err := f.WriteAt(bytes.Repeat([]byte{byte(i + 1)}, 4096), i*3*4096)
			must(err)
		}
		must(f.Close())
		if os.Geteuid() == 0 {
			gid := uint32(4000000000) // more than an int on 32 bits
			must(os.Lchown(filepath.Join(dir, "files/d3/f10"), 3000000, int(int32(gid))))
		}
	}
	for i, name := range []string{"files/d1/f1", "fifo", "empty", "link"} {
		at := time.Unix(1e9+int64(i), int64(i)*111111111)
		ts := []unix.Timespec{unix.NsecToTimespec(at.UnixNano()), unix.NsecToTimespec(at.UnixNano())}
		must(unix.UtimesNanoAt(unix.AT_FDCWD, filepath.Join(dir, name), ts, unix.AT_SYMLINK_NOFOLLOW))
	}
	return dir
}

// addXattrs gives a tree xattrs and ACLs, if its file system can hold them.
func addXattrs(t *testing.T, dir string) {
	t.Helper()
	set := func(name, x, value string) {
		t.Helper()
		if err := unix.Lsetxattr(filepath.Join(dir, name), x, []byte(value), 0); errors.Is(err, unix.ENOTSUP) {
			oracle.Missing(t, "a file system with xattrs")
		} else if err != nil {
			t.Fatal(err)
		}
	}
	acl := encodeACL([]aclEntry{{aclUserObj, 6, 0}, {aclUser, 4, 100001}, {aclGroupObj, 4, 0}, {aclMask, 6, 0}, {aclOther, 4, 0}})
	set("files/d1/f1", "user.a", "1")
	set("files/d1/f1", "user.binary", "\x00\n=\xff")
	set("files/d1/f8", "user.big", strings.Repeat("v", 2000))
	set("files/d2", "system.posix_acl_default", acl)
	set("files/d2/f9", "system.posix_acl_access", acl)
	if os.Geteuid() == 0 {
		set("files/d4/f4", "security.capability", "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00")
		set("link", "trusted.t", "on a symlink")
	}
}

// TestTarGNU has GNU tar make archives in all its formats and extract them
// again: the trees of archive and extracted files have to be the same.
func TestTarGNU(t *testing.T) {
	oracle.Require(t, "tar")
	for _, c := range []struct {
		name   string
		plain  bool
		xattrs bool
		args   []string
	}{
		{"v7", true, false, []string{"--format=v7", "--exclude=./fifo", "--exclude=./block", "--exclude=./char"}},
		{"ustar", true, false, []string{"--format=ustar"}},
		{"oldgnu", false, false, []string{"--format=oldgnu", "--sparse"}},
		{"gnu", false, false, []string{"--format=gnu", "--sparse"}},
		{"pax", false, true, []string{"--format=pax"}},
		{"pax-0.0", false, false, []string{"--format=pax", "--sparse", "--sparse-version=0.0"}},
		{"pax-0.1", false, true, []string{"--format=pax", "--sparse", "--sparse-version=0.1"}},
		{"pax-1.0", false, true, []string{"--format=pax", "--sparse", "--sparse-version=1.0"}},
		{"pax-raw", false, false, []string{"--format=pax", "--sparse", "--hole-detection=raw"}},
		{"global", false, false, []string{"--format=pax", "--pax-option=globexthdr.name=g,comment=hello,mtime=1000000000"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir, out := hostTree(t, c.plain), t.TempDir()
			x := []string{"--numeric-owner"}
			if c.xattrs {
				addXattrs(t, dir)
				x = append(x, "--xattrs", "--xattrs-include=*", "--acls")
			}
			archive := filepath.Join(t.TempDir(), "a.tar")
			oracle.MustRun(t, "tar", append(append(append([]string{"-cf", archive}, c.args...), x...), "-C", dir, ".")...)
			oracle.MustRun(t, "tar", append(x, "-xpf", archive, "-C", out)...)
			f, err := os.Open(archive)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			fi, err := f.Stat()
			if err != nil {
				t.Fatal(err)
			}
			warn := &ScanOptions{Warn: func(s string) { t.Error("warning:", s) }}
			want, err := Scan(t.Context(), out, warn)
			if err != nil {
				t.Fatal(err)
			}
			defer want.Close()
			got := merge(t, warn, Tar(f, fi.Size()))
			if diff := cmp.Diff(dump(t, want), dump(t, got)); diff != "" {
				t.Errorf("from the archive (+) and from what was extracted (-):\n%s", diff)
			}
			if sum(t, want) != sum(t, got) {
				t.Error("the images differ")
			}
		})
	}
}

// sum is the hash of all that a tree makes of a file system.
func sum(t testing.TB, tree *Tree) [32]byte {
	t.Helper()
	l, err := NewLayout(t.Context(), tree, &LayoutOptions{Minimize: true})
	if err != nil {
		t.Fatal(err)
	}
	h := &hashSink{sha256.New()}
	if err := l.Write(t.Context(), h, &WriteOptions{Workers: 1}); err != nil {
		t.Fatal(err)
	}
	return [32]byte(h.Sum(nil))
}

// hashSink hashes what is written, and where; it is for one worker.
type hashSink struct{ hash.Hash }

func (h *hashSink) WriteAt(p []byte, off int64) (int, error) {
	binary.Write(h, binary.LittleEndian, off)
	return h.Write(p)
}

// TestTarSystem has a Debian tree go through GNU tar.
func TestTarSystem(t *testing.T) {
	if testing.Short() {
		t.Skip("half a gigabyte")
	}
	oracle.Require(t, "tar")
	oracle.RequireRoot(t)
	root := oracle.Input(t, "rootfs")
	archive := filepath.Join(t.TempDir(), "a.tar")
	oracle.MustRun(t, "tar", "--format=pax", "--xattrs", "--xattrs-include=*", "--acls", "--sparse", "-cf", archive, "-C", root, ".")
	f, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	want, err := Scan(t.Context(), root, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer want.Close()
	got := merge(t, nil, Tar(f, fi.Size()))
	if want.digest("") != got.digest("") {
		t.Error(cmp.Diff(dump(t, want), dump(t, got)))
	}
	if sum(t, want) != sum(t, got) {
		t.Error("the images differ")
	}
}

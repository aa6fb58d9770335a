package cli_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"qimg/cmd/internal/cli"
	"qimg/qcow2/blockdev/oracle"
)

// emptyImage has mke2fs make an empty file system in a qcow2 image.
func emptyImage(t *testing.T, path, size string, mkfs ...string) {
	t.Helper()
	oracle.Require(t, "mke2fs", "e2fsck", "qemu-img")
	raw := filepath.Join(t.TempDir(), "raw")
	oracle.MustRun(t, "mke2fs", append(append([]string{"-q", "-F"}, mkfs...), raw, size)...)
	oracle.MustRun(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path)
}

// sound has e2fsck and qemu-img check an image, and returns it as a raw disk.
func sound(t *testing.T, path string) string {
	t.Helper()
	oracle.MustRun(t, "qemu-img", "check", "-q", path)
	raw := filepath.Join(t.TempDir(), "raw")
	oracle.MustRun(t, "qemu-img", "convert", "-O", "raw", path, raw)
	oracle.MustRun(t, "e2fsck", "-fn", raw)
	return raw
}

// mountRO has the kernel mount a raw disk for reading.
func mountRO(t *testing.T, raw string) string {
	t.Helper()
	oracle.RequireRoot(t)
	dir := t.TempDir()
	oracle.MustRun(t, "mount", "-o", "loop,ro", raw, dir)
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// TestCpInKernel copies files of all kinds into file systems, from the host and
// from an image, and compares what the kernel's mount has with the source.
func TestCpInKernel(t *testing.T) {
	m := kernelImage(t, "-t", "ext4", "-O", "64bit")
	want := described(t, m.dir)
	for _, mkfs := range []string{"-t ext4", "-t ext4 -b 1024 -O inline_data,ea_inode", "-t ext4 -O ^has_journal -I 128", "-t ext3 -b 1024", "-t ext2"} {
		t.Run(mkfs, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "fs.qcow2")
			emptyImage(t, path, "64M", strings.Fields(mkfs)...)
			want := want
			if strings.Contains(mkfs, "128") || strings.Contains(mkfs, "ext2") || strings.Contains(mkfs, "ext3") {
				want = described(t, m.dir)
			}
			from := m.dir + "/."
			if strings.Contains(mkfs, "1024") {
				from = m.image + ":/"
			}
			mustRun(t, "cp", "-a", from, path+":/")
			got := described(t, mountRO(t, sound(t, path)))
			if strings.Contains(mkfs, "128") { // inodes have no room for nanoseconds, nor for times before 1901
				forget(want, got)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("-source +image\n%s", diff)
			}
			// Once more over what is there, and away with it.
			mustRun(t, "cp", "-a", from, path+":/")
			again := described(t, mountRO(t, sound(t, path)))
			if strings.Contains(mkfs, "128") {
				forget(want, again)
			}
			if diff := cmp.Diff(want, again); diff != "" {
				t.Errorf("again: -source +image\n%s", diff)
			}
			args := []string{"rm", "-r"}
			for _, e := range oracleNames(t, m.dir) {
				if e != "lost+found" {
					args = append(args, path+":/"+e)
				}
			}
			mustRun(t, args...)
			if got := described(t, mountRO(t, sound(t, path))); len(got) != 0 {
				t.Errorf("left: %v", got)
			}
		})
	}
}

// forget takes the fractions of seconds out of descriptions.
func forget(all ...map[string]string) {
	for _, m := range all {
		for name, s := range m {
			f := strings.SplitN(s, " ", 4)
			f[2], _, _ = strings.Cut(f[2], ".")
			m[name] = strings.Join(f, " ")
		}
	}
}

func oracleNames(t *testing.T, dir string) (names []string) {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list {
		names = append(names, e.Name())
	}
	return names
}

// hash is the content of a file of the host.
func hash(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", sha256.Sum256(b))
}

// TestCpInKeeps replaces files, which keep what they are without -a, and follows
// symlinks inside the image.
func TestCpInKeeps(t *testing.T) {
	oracle.RequireRoot(t)
	t.Chdir(t.TempDir())
	emptyImage(t, "fs.qcow2", "16M", "-t", "ext4")
	if err := os.MkdirAll("src/etc/dir", 0o755); err != nil {
		t.Fatal(err)
	}
	writeFile(t, "src/etc/shadow", "old")
	writeFile(t, "src/etc/one", "linked")
	for _, err := range []error{
		os.Chown("src/etc/shadow", 0, 42), os.Chmod("src/etc/shadow", 0o640), os.Link("src/etc/one", "src/etc/two"),
		os.Symlink("/etc/shadow", "src/etc/absolute"), os.Symlink("../../../etc/dir", "src/etc/up"), os.Symlink("nowhere", "src/etc/dangling"),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	oracle.MustRun(t, "setfattr", "-n", "user.kept", "-v", "1", "src/etc/shadow")
	mustRun(t, "cp", "-a", "src/.", "fs.qcow2:/")
	writeFile(t, "new", "new content")
	if err := os.Chmod("new", 0o4755|os.ModeSetuid); err != nil {
		t.Fatal(err)
	}
	mustRun(t, "cp", "new", "fs.qcow2:/etc/absolute")
	mustRun(t, "cp", "new", "src/etc/shadow", "fs.qcow2:/etc/up")
	mustRun(t, "cp", "--owner", "7:8", "new", "fs.qcow2:/etc/owned")
	mustRun(t, "cp", "new", "fs.qcow2:/etc/one")
	mustRun(t, "cp", "fs.qcow2:/etc/two", "fs.qcow2:/etc/dir/two")
	dir := mountRO(t, sound(t, "fs.qcow2"))
	for name, want := range map[string]string{
		"etc/shadow":     "100640 0:42 new content user.kept=\"1\"",
		"etc/dir/new":    "100755 0:0 new content",
		"etc/dir/shadow": "100640 0:42 old",
		"etc/owned":      "100755 7:8 new content",
		"etc/one":        "100644 0:0 new content",
		"etc/two":        "100644 0:0 linked",
		"etc/dir/two":    "100644 0:0 linked",
	} {
		path := filepath.Join(dir, name)
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			t.Error(err)
			continue
		}
		b, err := os.ReadFile(path)
		if got := fmt.Sprintf("%o %d:%d %s", st.Mode, st.Uid, st.Gid, b) + xattrsOf(t, path); got != want || err != nil {
			t.Errorf("%s: %q, want %q, %v", name, got, want, err)
		}
	}
}

// TestEditRefused has changes that are refused leave an image byte for byte as
// it was.
func TestEditRefused(t *testing.T) {
	t.Chdir(t.TempDir())
	emptyImage(t, "fs.qcow2", "16M", "-t", "ext4")
	oracle.MustRun(t, "qemu-img", "convert", "-O", "vmdk", "fs.qcow2", "fs.vmdk")
	if err := os.MkdirAll("src/dir/below", 0o755); err != nil {
		t.Fatal(err)
	}
	writeFile(t, "file", "content")
	if err := os.Symlink("nowhere", "src/dangling"); err != nil {
		t.Fatal(err)
	}
	large := make([]byte, 17<<20)
	rand.NewChaCha8([32]byte{}).Read(large)
	if err := os.WriteFile("large", large, 0o666); err != nil {
		t.Fatal(err)
	}
	mustRun(t, "cp", "-r", "src/.", "file", "fs.qcow2:/")
	mustRun(t, "snapshot", "-c", "one", "fs.qcow2")
	before := hash(t, "fs.qcow2")
	for _, c := range []struct{ args, want string }{
		{"cp large fs.qcow2:/", "large: no space left in the file system"},
		{"cp -r file src large fs.qcow2:/", "large: no space left in the file system"},
		{"cp file nope fs.qcow2:/", "nope: no such file or directory"},
		{"cp file fs.qcow2:/nope/file", "fs.qcow2:/nope/file: no such file or directory"},
		{"cp file fs.qcow2:/nope/", "fs.qcow2:/nope/: no such file or directory"},
		{"cp file fs.qcow2:/dangling", "fs.qcow2:/dangling: is a symlink that leads nowhere"},
		{"cp file large fs.qcow2:/file", "fs.qcow2:/file: not a directory"},
		{"cp -r src/dir fs.qcow2:/file", "src/dir: not a directory"},
		{"cp -r fs.qcow2:/dir fs.qcow2:/dir/below", "a directory is copied into itself"},
		{"cp fs.qcow2:/file fs.qcow2:/", "source and destination are the same file"},
		{"cp file fs.qcow2 fs.qcow2:/", "fs.qcow2: the image cannot be copied into itself"},
		{"cp -r file . fs.qcow2:/dir", "./fs.qcow2: the image cannot be copied into itself"},
		{"cp file fs.qcow2@one:/", "a snapshot cannot be changed"},
		{"cp file fs.vmdk:/", "which qimg reads and does not write"},
		{"cp --owner root file fs.qcow2:/", "expected numbers UID[:GID]"},
		{"mkdir fs.qcow2:/dir", "fs.qcow2:/dir: ext4: name \"dir\": file already exists"},
		{"mkdir fs.qcow2:/new fs.qcow2:/nope/new", "fs.qcow2:/nope/new: no such file or directory"},
		{"mkdir -p fs.qcow2:/new fs.qcow2:/file/new", "fs.qcow2:/file/new: /file: not a directory"},
		{"mkdir -p fs.qcow2:/dangling/new", "fs.qcow2:/dangling/new: ext4: name \"dangling\": file already exists"},
		{"mkdir fs.qcow2:/", "fs.qcow2:/: file exists"},
		{"mkdir fs.qcow2@one:/new", "a snapshot cannot be changed"},
		{"mkdir --mode 8 fs.qcow2:/new", "--mode '8': expected octal digits, 7777 at most"},
		{"rm fs.qcow2:/dir", "is a directory, which is removed with -r"},
		{"rm -r fs.qcow2:/", "is the root directory, which cannot be removed"},
		{"rm -r fs.qcow2:/dir/..", "is the root directory, which cannot be removed"},
		{"rm -r fs.qcow2:/dir/below/.", "the names . and .. cannot be removed"},
		{"rm fs.qcow2:/file fs.qcow2:/nope", "fs.qcow2:/nope: no such file or directory"},
		{"rm fs.qcow2:/file/", "not a directory"},
		{"rm fs.qcow2@one:/file", "a snapshot cannot be changed"},
	} {
		r := run(t, strings.Fields(c.args)...)
		if r.Code != 1 || !strings.Contains(r.Stderr, c.want) || strings.Count(r.Stderr, "\n") > 2 {
			t.Errorf("%s: %+v", c.args, r)
		}
		if hash(t, "fs.qcow2") != before {
			t.Fatalf("%s: the image has changed", c.args)
		}
	}
	// Dry runs.
	for args, want := range map[string]string{
		"cp -n -r file src/. src fs.qcow2:/":             "M /file\nM /dangling\nA /src\nA /src/dangling\nA /src/dir\nA /src/dir/below\n",
		"mkdir -n -p fs.qcow2:/dir/a/b fs.qcow2:/dir":    "A /dir/a\nA /dir/a/b\n",
		"rm -n -r fs.qcow2:/dir fs.qcow2:/file":          "D /dir\nD /dir/below\nD /file\n",
		"rm -n --ignore-missing fs.qcow2:/nope":          "",
		"cp -n large fs.qcow2:/file":                     "M /file\n",
		"cp -n --owner 5 fs.qcow2:/file fs.qcow2:/other": "A /other\n",
	} {
		r := run(t, strings.Fields(args)...)
		if full := strings.Contains(args, "large"); r.Stdout != want || (r.Code == 0) == full {
			t.Errorf("%s: %+v", args, r)
		}
		if hash(t, "fs.qcow2") != before {
			t.Fatalf("%s: the image has changed", args)
		}
	}
	sound(t, "fs.qcow2")

	// One that QEMU uses.
	oracle.Require(t, "qemu-io")
	holder := exec.CommandContext(t.Context(), "qemu-io", "-f", "qcow2", "fs.qcow2")
	stdin, err := holder.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := holder.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	defer holder.Wait()
	defer stdin.Close()
	if _, err := io.ReadFull(stdout, make([]byte, len("qemu-io> "))); err != nil {
		t.Fatal(err)
	}
	for _, args := range []string{"cp file fs.qcow2:/x", "rm fs.qcow2:/file"} {
		if r := run(t, strings.Fields(args)...); r.Code != 1 || !strings.Contains(r.Stderr, "Is another process using the image [fs.qcow2]?") {
			t.Errorf("%s: %+v", args, r)
		}
	}
}

// TestEditSnapshot takes files back out of a snapshot of the same image.
func TestEditSnapshot(t *testing.T) {
	t.Chdir(t.TempDir())
	emptyImage(t, "base.qcow2", "16M", "-t", "ext4")
	writeFile(t, "file", "first")
	mustRun(t, "cp", "file", "base.qcow2:/")
	oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "fs.qcow2")
	base := hash(t, "base.qcow2")
	mustRun(t, "snapshot", "-c", "one", "fs.qcow2")
	writeFile(t, "file", "second")
	mustRun(t, "cp", "file", "fs.qcow2:/")
	mustRun(t, "cp", "fs.qcow2@one:/file", "fs.qcow2:/before")
	mustRun(t, "rm", "fs.qcow2:/file")
	sound(t, "fs.qcow2")
	if got := mustRun(t, "cat", "fs.qcow2:/before", "fs.qcow2@one:/file"); got != "firstfirst" || hash(t, "base.qcow2") != base {
		t.Errorf("%q", got)
	}
}

// TestEditLarge makes changes that do not fit a journal in several transactions.
func TestEditLarge(t *testing.T) {
	t.Chdir(t.TempDir())
	emptyImage(t, "fs.qcow2", "64M", "-t", "ext4", "-b", "1024", "-J", "size=1", "-N", "12000")
	for d := range 10 {
		for f := range 500 {
			name := fmt.Sprintf("src/%d/%d", d, f)
			if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
				t.Fatal(err)
			}
			writeFile(t, name, name)
		}
	}
	const warning = "it is made in several transactions, each of them wholly or not at all\n"
	r := run(t, "cp", "-a", "src", "fs.qcow2:/")
	if r.Code != 0 || !strings.HasSuffix(r.Stderr, warning) {
		t.Fatalf("%+v", r)
	}
	raw := sound(t, "fs.qcow2")
	if r := run(t, "diff", "src", raw+":/src"); r.Code != 0 {
		t.Errorf("%+v", r)
	}
	if r := run(t, "rm", "-r", "fs.qcow2:/src"); r.Code != 0 || !strings.HasSuffix(r.Stderr, warning) {
		t.Fatalf("%+v", r)
	}
	sound(t, "fs.qcow2")
	if got := mustRun(t, "ls", "fs.qcow2:/"); got != "lost+found\n" {
		t.Errorf("%q", got)
	}
}

// TestCpInFullHost copies more than the host has room for: the error is about
// the image, which has what it had.
func TestCpInFullHost(t *testing.T) {
	oracle.RequireRoot(t)
	t.Chdir(t.TempDir())
	if err := os.Mkdir("small", 0o777); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", "small", "tmpfs", 0, "size=6m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount("small", 0); err != nil {
			t.Error(err)
		}
	})
	emptyImage(t, "small/fs.qcow2", "32M", "-t", "ext4")
	writeFile(t, "file", "content")
	large := make([]byte, 8<<20)
	rand.NewChaCha8([32]byte{}).Read(large)
	if err := os.WriteFile("large", large, 0o666); err != nil {
		t.Fatal(err)
	}
	mustRun(t, "cp", "file", "small/fs.qcow2:/")
	want := regexp.MustCompile(`^[a-z-]+: large: ext4: write of blocks from \d+ on: .*small/fs.qcow2.*: no space left on device\n$`)
	if r := run(t, "cp", "large", "file", "small/fs.qcow2:/lost+found"); r.Code != 1 || !want.MatchString(r.Stderr) {
		t.Errorf("%+v", r)
	}
	sound(t, "small/fs.qcow2")
	if got := mustRun(t, "ls", "small/fs.qcow2:/lost+found") + mustRun(t, "cat", "small/fs.qcow2:/file"); got != "content" {
		t.Errorf("%q", got)
	}
}

const cpKilled = "QIMG_TEST_CP_KILLED"

// TestCpKilled kills a process that replaces a tree by another over and over:
// the image has one of them, wholly.
func TestCpKilled(t *testing.T) {
	if dir := os.Getenv(cpKilled); dir != "" {
		tree, dir := dir[0], dir[1:]
		for {
			var stderr bytes.Buffer
			args := []string{"qimg", "cp", "-r", filepath.Join(dir, string(tree)) + "/.", filepath.Join(dir, "fs.qcow2") + ":/"}
			if code := cli.Run(context.Background(), args, cli.Host{Out: io.Discard, Err: &stderr, Getenv: os.Getenv}); code != 0 {
				t.Fatal(stderr.String())
			}
			fmt.Println("done")
			tree ^= 'a' ^ 'b'
		}
	}
	dir := t.TempDir()
	image := filepath.Join(dir, "fs.qcow2")
	emptyImage(t, image, "64M", "-t", "ext4")
	for _, tree := range []string{"a", "b"} {
		for i := range 60 {
			name := filepath.Join(dir, tree, fmt.Sprintf("d%d/f%d", i%7, i))
			if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
				t.Fatal(err)
			}
			writeFile(t, name, strings.Repeat(tree, 1000*(i%20)+1))
		}
	}
	mustRun(t, "cp", "-r", filepath.Join(dir, "a")+"/.", image+":/")
	r := rand.New(rand.NewPCG(1, 2))
	seen, done := map[string]int{}, 0
	// On a slow machine it goes on, with more time, until both trees were seen.
	for round := 0; round < 12 || len(seen) != 2 || done == 0; round++ {
		if round == 120 {
			t.Fatalf("one of the trees was never seen: %d copies, then the image had %v", done, seen)
		}
		cmd := exec.Command(os.Args[0], "-test.run=^TestCpKilled$")
		cmd.Env = append(os.Environ(), cpKilled+"="+string("ba"[round%2])+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.AfterFunc(time.Duration(20_000+r.IntN(150_000*(1+round/12)))*time.Microsecond, func() { cmd.Process.Kill() })
		rest, _ := io.ReadAll(out)
		done += bytes.Count(rest, []byte("done"))
		cmd.Wait()
		if bytes.Contains(rest, []byte("FAIL")) {
			t.Fatalf("round %d: %s", round, rest)
		}
		raw := filepath.Join(dir, "raw")
		oracle.MustRun(t, "qemu-img", "convert", "-O", "raw", image, raw)
		if r := oracle.Run(t, "e2fsck", "-p", raw); r.Code > 1 {
			t.Fatalf("round %d: %+v", round, r)
		}
		oracle.MustRun(t, "e2fsck", "-fn", raw)
		if !sameTree(t, raw) || !sameTree(t, image) { // of image the journal is replayed in memory
			t.Fatalf("round %d: the image has neither tree", round)
		}
		seen[mustRun(t, "cat", raw+":/d0/f0")]++
	}
	t.Logf("%d copies, then the image had %v", done, seen)
}

// sameTree reports whether a disk has all of tree a, or all of tree b.
func sameTree(t *testing.T, raw string) bool {
	t.Helper()
	args := []string{"cat"}
	for i := range 60 {
		args = append(args, fmt.Sprintf("%s:/d%d/f%d", raw, i%7, i))
	}
	content := mustRun(t, args...)
	return strings.Trim(content, "a") == "" || strings.Trim(content, "b") == ""
}

// TestEditUser edits an image as a user who has no rights but to the file.
func TestEditUser(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	emptyImage(t, "fs.qcow2", "16M", "-t", "ext4")
	if err := os.MkdirAll("src/dir", 0o755); err != nil {
		t.Fatal(err)
	}
	writeFile(t, "src/dir/file", "content")
	if os.Geteuid() == 0 {
		const nobody = 65534
		for _, name := range []string{".", "fs.qcow2", "src", "src/dir", "src/dir/file"} {
			if err := os.Chown(name, nobody, nobody); err != nil {
				t.Fatal(err)
			}
		}
		for p := filepath.Dir(dir); p != "/" && p != os.TempDir(); p = filepath.Dir(p) {
			if err := os.Chmod(p, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := unix.Setresuid(-1, nobody, -1); err != nil {
			t.Fatal(err)
		}
	}
	results := []oracle.Result{
		run(t, "cp", "-a", "src/dir", "fs.qcow2:/"),
		run(t, "cp", "--owner", "0", "src/dir/file", "fs.qcow2:/root"),
		run(t, "rm", "-r", "fs.qcow2:/lost+found"),
	}
	if os.Geteuid() != os.Getuid() {
		if err := unix.Setresuid(-1, os.Getuid(), -1); err != nil {
			panic(err) // nothing after this could be trusted
		}
	}
	for _, r := range results {
		if r.Code != 0 || r.Stderr != "" {
			t.Errorf("%+v", r)
		}
	}
	mustRun(t, "stat", "fs.qcow2:/dir/file", "fs.qcow2:/root")
	if got := mustRun(t, "cat", "fs.qcow2:/dir/file", "fs.qcow2:/root"); got != "contentcontent" {
		t.Errorf("%q", got)
	}
}

// TestEditOthers refuses to change other file systems, by name.
func TestEditOthers(t *testing.T) {
	t.Chdir(t.TempDir())
	oracle.Require(t, "mkfs.fat", "mkfs.xfs", "mkswap")
	writeFile(t, "file", "content")
	for _, c := range []struct{ size, program, args, want string }{
		{"16M", "mkfs.fat", "", "the disk holds vfat: only the files of ext2, ext3 and ext4 can be changed"},
		{"400M", "mkfs.xfs", "-q -f", "the disk holds xfs: only the files of ext2, ext3 and ext4 can be changed"},
		{"16M", "mkswap", "-q", "the disk holds swap: only the files of ext2, ext3 and ext4 can be changed"},
		{"16M", "true", "", "no file system was found"},
	} {
		oracle.MustRun(t, "truncate", "-s", c.size, "raw")
		oracle.Run(t, c.program, append(strings.Fields(c.args), "raw")...)
		for _, args := range []string{"cp -f raw file raw:/x", "rm -f raw raw:/x"} {
			if r := run(t, strings.Fields(args)...); r.Code != 1 || !strings.Contains(r.Stderr, "raw: "+c.want+"\n") {
				t.Errorf("%s, %s: %+v", c.program, args, r)
			}
		}
		if err := os.Remove("raw"); err != nil {
			t.Fatal(err)
		}
	}
}

// TestEditDamaged has damage and a used journal be met: what needs e2fsck is
// refused, and what the kernel replays is replayed.
func TestEditDamaged(t *testing.T) {
	t.Chdir(t.TempDir())
	oracle.Require(t, "debugfs")
	emptyImage(t, "fs.qcow2", "16M", "-t", "ext4")
	oracle.MustRun(t, "qemu-img", "convert", "-O", "raw", "fs.qcow2", "raw")
	writeFile(t, "file", "content")
	oracle.MustRun(t, "debugfs", "-w", "-R", "ssv state 3", "raw")
	before := hash(t, "raw")
	for _, args := range []string{"cp -f raw file raw:/x", "rm -f raw -r raw:/lost+found"} {
		if r := run(t, strings.Fields(args)...); r.Code != 1 || !strings.Contains(r.Stderr, "the kernel has found errors: run e2fsck") {
			t.Errorf("%s: %+v", args, r)
		}
	}
	if hash(t, "raw") != before {
		t.Error("the image has changed")
	}
}

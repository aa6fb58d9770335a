package cli_test

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"qimg/qcow2/blockdev/oracle"
)

// mounted is a file system that the kernel wrote, mounted read-only.
type mounted struct{ image, dir string }

// kernelImage has the kernel fill a file system with files of all kinds. It needs
// root.
func kernelImage(t *testing.T, mkfs ...string) mounted {
	t.Helper()
	oracle.RequireRoot(t)
	oracle.Require(t, "mke2fs", "setfattr", "setfacl", "ls", "tar")
	dir := t.TempDir()
	m := mounted{filepath.Join(dir, "fs.img"), filepath.Join(dir, "mnt")}
	if err := os.Mkdir(m.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	oracle.MustRun(t, "mke2fs", append(append([]string{"-q", "-F"}, mkfs...), m.image, "64M")...)
	if r := oracle.Run(t, "mount", "-o", "loop", m.image, m.dir); r.Code != 0 {
		oracle.Missing(t, "a kernel that mounts ext4")
	}
	t.Cleanup(func() {
		if err := unix.Unmount(m.dir, 0); err != nil {
			t.Error(err)
		}
	})
	fill(t, m.dir)
	oracle.MustRun(t, "mount", "-o", "remount,ro", m.dir)
	return m
}

// fill makes files of all kinds.
func fill(t *testing.T, dir string) {
	t.Helper()
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	in := func(name string) string { return filepath.Join(dir, name) }
	for _, d := range []string{"etc", "usr/lib", "many", "deep/er/and/deeper", "boot", "names"} {
		do(os.MkdirAll(in(d), 0o755))
	}
	writeFile(t, in("usr/lib/os-release"), "ID=test\nPRETTY_NAME=\"Test \\\"OS\\\" 1\"\nVERSION_ID=1\n")
	do(os.Symlink("../usr/lib/os-release", in("etc/os-release")))
	writeFile(t, in("etc/hostname"), "guest\n")
	writeFile(t, in("boot/vmlinuz-6.1.0-9"), "kernel")
	writeFile(t, in("boot/vmlinuz-6.1.0-10"), "kernel")
	for i := range 1500 {
		writeFile(t, in(fmt.Sprintf("many/file-%d", i)), strings.Repeat("x", i%7))
	}
	for i, name := range []string{"new\nline", "esc\x1b[31m", "latin\xe9", "ünï", "back\\slash", " space ", strings.Repeat("n", 255), ".hidden", "-rf"} {
		writeFile(t, in("names/"+name), fmt.Sprint(i))
	}
	do(os.Symlink(strings.Repeat("long/", 40), in("long-link")))
	do(os.Symlink("/etc/hostname", in("absolute-link")))
	do(os.Symlink("loop-b", in("loop-a")))
	do(os.Symlink("loop-a", in("loop-b")))
	do(os.Symlink("../../../../etc/hostname", in("deep/up-link")))
	writeFile(t, in("hard-1"), "linked")
	do(os.Link(in("hard-1"), in("deep/hard-2")))
	writeFile(t, in("content"), strings.Repeat("0123456789abcdef", 40_000))
	f, err := os.Create(in("sparse"))
	do(err)
	for _, off := range []int64{1 << 20, 5 << 20, 9<<20 - 3} {
		_, err := f.WriteAt([]byte("island"), off)
		do(err)
	}
	do(f.Truncate(12<<20 + 5))
	do(f.Close())
	f, err = os.Create(in("reserved"))
	do(err)
	if err := unix.Fallocate(int(f.Fd()), 0, 0, 300_000); err != unix.EOPNOTSUPP { // ext3 has none
		do(err)
	}
	_, err = f.WriteAt([]byte("written"), 100_000)
	do(err)
	do(f.Close())
	do(unix.Mkfifo(in("fifo"), 0o640))
	do(unix.Mknod(in("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	do(unix.Mknod(in("disk"), unix.S_IFBLK|0o660, int(unix.Mkdev(259, 70_000))))
	l, err := net.Listen("unix", in("socket"))
	do(err)
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	writeFile(t, in("setuid"), "program")
	do(os.Chown(in("setuid"), 1000, 70_000))
	do(os.Chmod(in("setuid"), 0o755|os.ModeSetuid|os.ModeSticky))
	do(os.Lchown(in("long-link"), 12, 13))
	do(os.Chmod(in("deep"), 0o700|os.ModeSetgid))
	oracle.MustRun(t, "setfattr", "-n", "user.text", "-v", "value", in("content"))
	oracle.MustRun(t, "setfattr", "-n", "user.bytes", "-v", "0x00ff0a3d", in("content"))
	oracle.MustRun(t, "setfattr", "-n", "trusted.large", "-v", strings.Repeat("v", 900), in("deep"))
	oracle.MustRun(t, "setfattr", "-n", "security.capability", "-v", "0x0100000200040000000000000000000000000000", in("setuid"))
	oracle.MustRun(t, "setfacl", "-m", "u:1000:rwx,g:77:r-x,m::rwx", in("hard-1"))
	oracle.MustRun(t, "setfacl", "-m", "d:u:1000:rwx,d:o::-", in("deep"))
	at := time.Unix(1_700_000_000, 123_456_789)
	for _, name := range []string{"content", "sparse", "deep/er", "names/new\nline", "setuid"} {
		do(os.Chtimes(in(name), at, at.Add(time.Second)))
	}
	do(os.Chtimes(in("hard-1"), time.Unix(-1_000_000, 5), time.Unix(-2_000_000_000, 7)))
}

var totalLine = regexp.MustCompile(`(?m)^total \d+\n`)

// TestLsKernel lists a file system as ls lists the kernel's mount of it.
func TestLsKernel(t *testing.T) {
	m := kernelImage(t, "-t", "ext4")
	t.Setenv("LC_ALL", "C")
	for _, args := range [][]string{{"-R"}, {"-lR"}, {"-laR"}, {"-a"}, {"-ld"}} {
		theirs := oracle.MustRun(t, "ls", append(append([]string{"-n", "--time-style=long-iso", "--show-control-chars"}, args...), m.dir)...)
		if !strings.ContainsAny(args[0], "l") {
			theirs = oracle.MustRun(t, "ls", append(append([]string{"-1", "--show-control-chars"}, args...), m.dir)...)
		}
		theirs = totalLine.ReplaceAllString(theirs, "")
		theirs = strings.ReplaceAll(theirs, m.dir, m.image+":")
		ours := mustRun(t, append(append([]string{"ls"}, args...), m.image+":/")...)
		ours = strings.ReplaceAll(ours, m.image+":/\n", m.image+":\n") // -d
		ours = strings.Replace(ours, m.image+":/:\n", m.image+"::\n", 1)
		if args[0] == "-laR" || args[0] == "-a" { // the parent of the mount is another
			dots := regexp.MustCompile(`(?m)^.*\.\.\n`)
			ours, theirs = dots.ReplaceAllString(ours, ""), dots.ReplaceAllString(theirs, "")
			spaces := regexp.MustCompile(` +`)
			ours, theirs = spaces.ReplaceAllString(ours, " "), spaces.ReplaceAllString(theirs, " ")
		}
		if diff := cmp.Diff(theirs, ours); diff != "" {
			t.Errorf("%q: -ls +qimg\n%s", args, diff)
		}
	}
	if got := mustRun(t, "ls", "-b", m.image+":/names"); !strings.HasPrefix(got, " space \n-rf\nback\\slash\nesc\\x1b[31m\nlatin\\xe9\nnew\\nline\nnnn") {
		t.Errorf("escaped: %q", got)
	}

	// All that the kernel tells is in the JSON.
	var list []struct {
		Path, Type, Mode, Target string
		Inode                    uint64
		UID, GID                 uint32
		Size, Blocks, Links      int64
		Mtime                    int64 `json:"mtime-sec"`
		MtimeNsec                int64 `json:"mtime-nsec"`
		Major, Minor             uint32
		Xattrs                   []struct {
			Name, Value string
			Hex         string `json:"value-hex"`
		}
	}
	if err := json.Unmarshal([]byte(mustRun(t, "ls", "-R", "--xattrs", "--output=json", m.image+":/")), &list); err != nil {
		t.Fatal(err)
	}
	seen := 0
	for _, e := range list {
		if e.Path == "" {
			continue // no UTF-8
		}
		var st unix.Stat_t
		if err := unix.Lstat(m.dir+e.Path, &st); err != nil {
			t.Error(err)
			continue
		}
		seen++
		var names [4096]byte
		n, err := unix.Llistxattr(m.dir+e.Path, names[:])
		if err != nil {
			t.Error(err)
		}
		var xattrs []string
		for name := range strings.SplitSeq(strings.TrimRight(string(names[:n]), "\x00"), "\x00") {
			if name != "" {
				xattrs = append(xattrs, name)
			}
		}
		if st.Ino != e.Inode || fmt.Sprintf("%04o", st.Mode&0o7777) != e.Mode || st.Uid != e.UID || st.Gid != e.GID || st.Size != e.Size ||
			st.Blocks != e.Blocks || int64(st.Nlink) != e.Links || int64(st.Mtim.Sec) != e.Mtime || int64(st.Mtim.Nsec) != e.MtimeNsec ||
			unix.Mkdev(e.Major, e.Minor) != st.Rdev || len(xattrs) != len(e.Xattrs) {
			t.Errorf("%+v, expected %+v %q", e, st, xattrs)
		}
	}
	if seen < 1530 {
		t.Errorf("%d files", seen)
	}
}

// TestCatKernel prints files as cat prints those of the kernel's mount.
func TestCatKernel(t *testing.T) {
	m := kernelImage(t, "-t", "ext3", "-b", "1024")
	for _, name := range []string{"content", "sparse", "reserved", "absolute-link", "many/file-6", "many/file-7", "names/latin\xe9"} {
		theirs, err := os.ReadFile(filepath.Join(m.dir, name))
		if name == "absolute-link" {
			theirs, err = []byte("guest\n"), nil
		}
		if err != nil {
			t.Fatal(err)
		}
		if ours := mustRun(t, "cat", m.image+":/"+name); ours != string(theirs) {
			t.Errorf("%s: %d bytes, expected %d", name, len(ours), len(theirs))
		}
	}
	if got := mustRun(t, "cat", m.image+":/etc/hostname", m.image+":/deep/up-link"); got != "guest\nguest\n" {
		t.Errorf("%q", got)
	}
	for name, want := range map[string]string{
		"nope": "no such file or directory", "loop-a": "too many levels of symbolic links", "etc": "is a directory",
		"fifo": "a fifo has no content", "content/x": "not a directory",
	} {
		r := run(t, "cat", m.image+":/"+name)
		if r.Code != 1 || r.Stdout != "" || !strings.Contains(r.Stderr, want) {
			t.Errorf("%s: %+v", name, r)
		}
	}
}

// described tells all of a tree that a copy of it has to keep: type, mode, owner,
// size, content, time of modification, device, target, links and extended
// attributes, by path. Sockets are left out, and of the root directory all but
// what is in it.
func described(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	first := map[uint64]string{} // names by inode
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || path == dir || d.Type() == os.ModeSocket || d.Name() == "lost+found" {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, path)
		s := fmt.Sprintf("%o %d:%d %d.%09d %#x", st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec, st.Rdev)
		switch {
		case d.Type() == os.ModeSymlink:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			s += " -> " + target
		case d.Type().IsRegular():
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			s += fmt.Sprintf(" %d bytes %x", st.Size, sha256.Sum256(b))
			if rel == "sparse" && st.Blocks*512 < st.Size/2 {
				s += " sparse"
			}
			if st.Nlink > 1 {
				if first[st.Ino] == "" {
					first[st.Ino] = rel
				}
				s += " linked to " + first[st.Ino]
			}
		}
		all[rel] = s + xattrsOf(t, path)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// xattrsOf returns the extended attributes of a file in one text.
func xattrsOf(t *testing.T, path string) string {
	t.Helper()
	names, value := make([]byte, 64<<10), make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, names)
	if err != nil {
		t.Fatal(err)
	}
	var list []string
	for name := range strings.SplitSeq(strings.TrimRight(string(names[:n]), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, fmt.Sprintf(" %s=%q", name, value[:n]))
	}
	sort.Strings(list)
	return strings.Join(list, "")
}

// TestTarKernel has GNU tar unpack what qimg packs, and compares that with the
// kernel's mount.
func TestTarKernel(t *testing.T) {
	m := kernelImage(t, "-t", "ext4", "-O", "inline_data")
	out := oracle.MountNew(t, "mkfs.ext4")
	archive := filepath.Join(t.TempDir(), "a.tar")
	r := run(t, "tar", "-o", archive, m.image+":/")
	if r.Code != 0 || r.Stderr != "qemu-img: warning: "+m.image+":/socket: a socket is left out\n" {
		t.Fatalf("%+v", r)
	}
	oracle.MustRun(t, "tar", "-C", out, "--numeric-owner", "--xattrs", "--xattrs-include=*", "--acls", "-xpf", archive)
	if diff := cmp.Diff(described(t, m.dir), described(t, out)); diff != "" {
		t.Errorf("-mount +unpacked\n%s", diff)
	}
	if again, err := os.ReadFile(archive); err != nil || string(again) != mustRun(t, "tar", m.image+":/") {
		t.Error("the archive is not the same twice")
	}

	// A single file.
	writeFile(t, archive, mustRun(t, "tar", m.image+":/sparse"))
	if got := oracle.MustRun(t, "tar", "-tf", archive); got != "sparse\n" {
		t.Errorf("%q", got)
	}
}

// TestCpKernel copies a file system out, and compares that with the kernel's
// mount.
func TestCpKernel(t *testing.T) {
	m := kernelImage(t, "-t", "ext4", "-O", "64bit,inline_data,ea_inode")
	out := oracle.MountNew(t, "mkfs.ext4")
	r := run(t, "cp", "-a", "--devices", m.image+":/", out)
	if r.Code != 0 || r.Stderr != "qemu-img: warning: "+m.image+":/socket: a socket is left out\n" {
		t.Fatalf("%+v", r)
	}
	want := described(t, m.dir)
	if diff := cmp.Diff(want, described(t, out)); diff != "" {
		t.Errorf("-mount +copied\n%s", diff)
	}
	// Once more over what is there: files are replaced, and end the same.
	writeFile(t, filepath.Join(out, "content"), "other")
	oracle.MustRun(t, "ln", "-sfn", "content", filepath.Join(out, "hard-1"))
	mustRun(t, "cp", "-a", "--devices", m.image+":/hard-1", m.image+":/content", m.image+":/null", m.image+":/names", out)
	oracle.MustRun(t, "ln", "-f", filepath.Join(out, "hard-1"), filepath.Join(out, "deep/hard-2"))
	oracle.MustRun(t, "touch", "-r", filepath.Join(m.dir, "deep"), filepath.Join(out, "deep"))
	if diff := cmp.Diff(want, described(t, out)); diff != "" {
		t.Errorf("again: -mount +copied\n%s", diff)
	}

	// Without -a files are the user's, and no program gets rights of others.
	dir := t.TempDir()
	if r := run(t, "cp", "-r", m.image+":/", filepath.Join(dir, "new")); r.Code != 0 || !strings.Contains(r.Stderr, "a device is left out") {
		t.Fatalf("%+v", r)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(dir, "new/setuid"), &st); err != nil || st.Mode&0o7777 != 0o755 || st.Uid != 0 || st.Mtim.Nsec != 123_456_789 {
		t.Errorf("%+v, %v", st, err)
	}
	// A file, under its name, another name, by a symlink, and to a pipe.
	t.Chdir(dir)
	mustRun(t, "cp", m.image+":/content", m.image+":/absolute-link", ".")
	mustRun(t, "cp", m.image+":/etc/hostname", "other")
	if got := mustRun(t, "cp", m.image+":/etc/hostname", "-"); got != "guest\n" {
		t.Errorf("%q", got)
	}
	for _, name := range []string{"other", "absolute-link"} {
		if b, err := os.ReadFile(name); string(b) != "guest\n" {
			t.Errorf("%s: %q, %v", name, b, err)
		}
	}
	if r := run(t, "cp", m.image+":/etc", "."); r.Code != 1 || !strings.Contains(r.Stderr, "is a directory, which is copied with -r") {
		t.Errorf("%+v", r)
	}
}

// TestCpStays copies trees over symlinks that lead out of the destination.
func TestCpStays(t *testing.T) {
	oracle.Require(t, "mke2fs", "debugfs")
	dir := t.TempDir()
	t.Chdir(dir)
	if err := os.MkdirAll("src/a/b", 0o755); err != nil {
		t.Fatal(err)
	}
	writeFile(t, "src/a/b/file", "from the image")
	writeFile(t, "src/link", "from the image")
	mustRun(t, "build", "-q", "src", "fs.img")
	for _, d := range []string{"outside", "dst"} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	writeFile(t, "outside/file", "mine")
	for link, target := range map[string]string{"dst/a": "../outside", "dst/link": "../outside/file"} {
		if err := os.Symlink(target, link); err != nil {
			t.Fatal(err)
		}
	}
	r := run(t, "cp", "-r", "fs.img:/", "dst")
	if r.Code != 1 || !strings.Contains(r.Stderr, "fs.img:/a: open a: not a directory") {
		t.Errorf("%+v", r)
	}
	if b, err := os.ReadFile("outside/file"); string(b) != "mine" {
		t.Errorf("%q, %v", b, err)
	}
	if list, err := os.ReadDir("outside"); len(list) != 1 {
		t.Errorf("%v, %v", list, err)
	}
	if b, err := os.ReadFile("dst/link"); string(b) != "from the image" {
		t.Errorf("%q, %v", b, err)
	}
	// A name that is a path, which only a damaged directory holds.
	image, err := os.ReadFile("fs.img")
	if err != nil {
		t.Fatal(err)
	}
	hostile := strings.ReplaceAll(string(image), "link", "../x")
	writeFile(t, "hostile.img", hostile)
	r = run(t, "cp", "-r", "hostile.img:/", "dst")
	if _, err := os.Lstat("x"); r.Code != 1 || !os.IsNotExist(err) {
		t.Errorf("%+v, %v", r, err)
	}
}

// TestDiffKernel lists what the kernel changed in a copy of a file system.
func TestDiffKernel(t *testing.T) {
	m := kernelImage(t, "-t", "ext4")
	dir := t.TempDir()
	t.Chdir(dir)
	oracle.MustRun(t, "cp", "--sparse=always", m.image, "new.img")
	oracle.MustRun(t, "sh", "-e", "-c", `mkdir mnt; mount -o loop new.img mnt; trap "umount mnt" EXIT; cd mnt
		printf X | dd of=sparse bs=1 seek=5242881 conv=notrunc status=none; touch -r content sparse
		mkdir added; echo 1 >added/file; rm -r deep/er; rm fifo; chmod 600 hard-1; chown 5 setuid; setfattr -n user.text -v other content
		rm null; mknod -m 666 null c 1 5; ln -sf elsewhere loop-a; rm etc/hostname; mkdir etc/hostname; truncate -s 3 many/file-5
		touch -d @1600000000 many/file-5 loop-a -h; touch -d @1700000001.123456789 sparse; cp --reflink=never -p content content2; mv content2 content; touch -r setuid content
		cd ..; umount mnt; trap - EXIT`)
	r := run(t, "diff", m.image, "new.img")
	var got []string
	for line := range strings.Lines(r.Stdout) {
		// Directories whose entries changed have another time.
		if !strings.HasPrefix(line, "M /deep (") && line != "M /etc (mtime)\n" && line != "M / (mtime)\n" {
			got = append(got, line)
		}
	}
	want := []string{
		"A /added\n", "M /content (xattrs)\n", "D /deep/er\n", "M /deep/hard-2 (mode, xattrs)\n", "M /etc/hostname (type)\n", "D /fifo\n",
		"M /hard-1 (mode, xattrs)\n", "M /loop-a (target, mtime)\n", "M /many/file-5 (content, size, mtime)\n", "M /null (device, mode, mtime)\n",
		"M /setuid (mode, owner, xattrs)\n", "M /sparse (content)\n",
	}
	if diff := cmp.Diff(want, got); diff != "" || r.Code != 1 || r.Stderr != "" {
		t.Errorf("-want +got\n%s%+v", diff, r)
	}
	if got := run(t, "diff", "-r", m.image, "new.img").Stdout; !strings.Contains(got, "A /added\nA /added/file\n") || !strings.Contains(got, "D /deep/er\nD /deep/er/and\n") {
		t.Errorf("%s", got)
	}

	// Snapshots of an image, and the mount.
	oracle.Require(t, "qemu-img")
	oracle.MustRun(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", m.image, "a.qcow2")
	oracle.MustRun(t, "qemu-img", "snapshot", "-c", "one", "a.qcow2")
	for _, args := range [][]string{{"a.qcow2@one", "a.qcow2"}, {m.image, "a.qcow2@1"}, {m.dir, "a.qcow2@one:/"}} {
		if r := run(t, append([]string{"diff"}, args...)...); r.Code != 0 || r.Stdout != "" || r.Stderr != "" {
			t.Errorf("%q: %+v", args, r)
		}
	}
	if r := run(t, "diff", m.image, "nope.img"); r.Code != 2 {
		t.Errorf("%+v", r)
	}
}

package blockdev_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/oracle"
)

// An output that a QEMU uses is refused, before anything is made.
func TestCreateFileInUse(t *testing.T) {
	for _, args := range [][]string{nil, {"-r"}} {
		checkFDs(t)
		path := image(t, "qcow2")
		before, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		release := holdIO(t, append(args, "-f", "qcow2", path)...)
		for _, opts := range []*blockdev.CreateOptions{nil, {NoSync: true}} {
			if o, err := blockdev.CreateFile(path, opts); !errors.Is(err, blockdev.ErrLocked) {
				t.Errorf("qemu-io %q holds it: %v, %v", args, o, err)
			}
		}
		wantDir(t, filepath.Dir(path), map[string]string{"disk.qcow2": string(before)})
		release()
		create(t, path, "new").Abort()
	}
}

// Until Commit or Abort QEMU refuses the old file, and the new one is locked
// by the time it can be seen.
func TestCreateFileLocks(t *testing.T) {
	checkFDs(t)
	path := image(t, "raw")
	o := create(t, path, strings.Repeat("x", 4096))
	if r := oracle.Run(t, "qemu-io", "-f", "raw", "-c", "write 0 512", path); r.Code == 0 || !strings.Contains(r.Stderr, writeLock) {
		t.Errorf("qemu-io on a file that is being replaced: exit %d: %s", r.Code, r.Stderr)
	}
	if !o.File().Locked() {
		t.Error("the new file is not locked")
	}
	if held := heldBytes(t, "/proc/self/fd/"+fdOf(t, o.File())); len(held) != 5 {
		t.Errorf("of the new file the bytes %v are locked", held)
	}
	if _, err := blockdev.CreateFile(path, nil); !errors.Is(err, blockdev.ErrLocked) {
		t.Errorf("a second CreateFile: %v", err)
	}
	commit(t, o)
	oracle.MustRun(t, "qemu-io", "-f", "raw", "-c", "write 0 512", path)
	if held := heldBytes(t, path); held != nil {
		t.Errorf("bytes %v are locked after Commit", held)
	}
}

func fdOf(t *testing.T, f *blockdev.File) string {
	t.Helper()
	var want unix.Stat_t
	c, err := f.OS().SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Control(func(fd uintptr) { err = unix.Fstat(int(fd), &want) }); err != nil {
		t.Fatal(err)
	}
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		var st unix.Stat_t
		if unix.Stat("/proc/self/fd/"+n.Name(), &st) == nil && st.Ino == want.Ino && st.Dev == want.Dev {
			return n.Name()
		}
	}
	t.Fatal("no such descriptor")
	return ""
}

func TestCreateFileRefusesFifo(t *testing.T) {
	checkFDs(t)
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o666); err != nil {
		t.Fatal(err)
	}
	if _, err := blockdev.CreateFile(fifo, nil); err == nil || !strings.Contains(err.Error(), fifo) {
		t.Errorf("fifo: %v", err)
	}
	wantDirNames(t, filepath.Dir(fifo), "fifo")
}

func wantDirNames(t *testing.T, dir string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("the directory holds %q, want %q", got, want)
	}
}

func TestCreateFileUmask(t *testing.T) {
	defer unix.Umask(unix.Umask(0o027))
	path := filepath.Join(t.TempDir(), "new")
	commit(t, create(t, path, ""))
	if st, err := os.Stat(path); err != nil || st.Mode() != 0o640 {
		t.Errorf("mode %v, want 0640 (%v)", st.Mode(), err)
	}
}

func TestCreateFileOwner(t *testing.T) {
	oracle.RequireRoot(t)
	path := filepath.Join(t.TempDir(), "old")
	write(t, path, "old", 0o640)
	if err := os.Chown(path, 1234, 5678); err != nil {
		t.Fatal(err)
	}
	commit(t, create(t, path, "new"))
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if s := st.Sys().(*syscall.Stat_t); s.Uid != 1234 || s.Gid != 5678 || st.Mode() != 0o640 {
		t.Errorf("owner %d:%d mode %v", s.Uid, s.Gid, st.Mode())
	}
}

// After a failed write there is nothing to commit.
func TestCreateFileFailedWrite(t *testing.T) {
	checkFDs(t)
	for _, opts := range []*blockdev.CreateOptions{nil, {NoSync: true}} {
		dir := t.TempDir()
		write(t, filepath.Join(dir, "old"), "old", 0o666)
		for _, name := range []string{"old", "new"} {
			o, err := blockdev.CreateFile(filepath.Join(dir, name), opts)
			if err != nil {
				t.Fatal(err)
			}
			withFileLimit(t, 4096, func() {
				if err := o.File().Truncate(8192); !errors.Is(err, syscall.EFBIG) {
					t.Errorf("truncate over the limit: %v", err)
				}
			})
			if err := o.Commit(); !errors.Is(err, syscall.EFBIG) {
				t.Errorf("Commit after a failed truncate: %v", err)
			}
		}
		wantDir(t, dir, map[string]string{"old": "old"})
	}
}

// While it is written the file has no name, so a kill leaves nothing.
func TestCreateFileUnnamed(t *testing.T) {
	checkFDs(t)
	dir := t.TempDir()
	o := create(t, filepath.Join(dir, "new"), "x")
	st, err := o.File().OS().Stat()
	if err != nil {
		t.Fatal(err)
	}
	if n := st.Sys().(*syscall.Stat_t).Nlink; n != 0 {
		t.Errorf("%d links; this file system may have no O_TMPFILE", n)
	}
	wantDirNames(t, dir)
	if err := o.Abort(); err != nil {
		t.Fatal(err)
	}
}

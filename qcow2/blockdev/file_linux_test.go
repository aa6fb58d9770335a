package blockdev_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/blocktest"
	"qimg/qcow2/blockdev/oracle"
)

// checkFDs checks that the test leaves as many descriptors open as it found.
// It is called first, so that it looks last.
func checkFDs(t *testing.T) {
	before := openFDs(t)
	t.Cleanup(func() {
		if after := openFDs(t); after != before {
			t.Errorf("%d open descriptors, %d before the test", after, before)
		}
	})
}

func openFDs(t *testing.T) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

func blocks(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

func TestFileSparse(t *testing.T) {
	const size = 8 << 20
	f := tempFile(t, size, rw)
	if e, err := f.NextExtent(0); err != nil || e.Kind != blockdev.Zero || e.Len != size {
		t.Fatalf("new file: %+v, %v", e, err)
	}
	if _, err := f.WriteAt(bytes.Repeat([]byte{1}, size), 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	if err := f.WriteZeroes(1<<20, 4<<20); err != nil {
		t.Fatal(err)
	}
	if used := blocks(t, f.Name()); used > 5<<20 {
		t.Errorf("%d bytes are allocated of 4 MiB data", used)
	}
	if e, err := f.NextExtent(1 << 20); err != nil || e.Kind != blockdev.Zero || e.Len != 4<<20 || e.Host != f || e.HostOff != 1<<20 {
		t.Errorf("the hole: %+v, %v", e, err)
	}
}

// Allocate takes space and leaves what is read as it was.
func TestFileAllocate(t *testing.T) {
	const size = 8 << 20
	f := tempFile(t, size, rw)
	if err := f.Allocate(1<<20, 4<<20); err != nil {
		t.Fatal(err)
	}
	if n := blocks(t, f.Name()); n < 4<<20 || n >= size {
		t.Errorf("%d bytes are taken, expected 4 MiB", n)
	}
	if e, err := f.NextExtent(0); err != nil || e.Kind != blockdev.Zero || e.Len != size {
		t.Errorf("%+v, %v: something was written", e, err)
	}
	if f.Size() != size {
		t.Errorf("the size is %d", f.Size())
	}
	if err := f.Allocate(size-1, 2); !errors.Is(err, blockdev.ErrRange) {
		t.Errorf("over the end: %v", err)
	}
	readonly := openFile(t, f.Name(), &blockdev.FileOptions{NoLock: true})
	if err := readonly.Allocate(0, 1); !errors.Is(err, blockdev.ErrReadOnly) {
		t.Errorf("opened for reading: %v", err)
	}
}

// TestFileCopyRange copies on file systems that share blocks, and on one that
// does not.
func TestFileCopyRange(t *testing.T) {
	want := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	for _, mkfs := range []string{"mkfs.btrfs", "mkfs.xfs"} {
		t.Run(mkfs, func(t *testing.T) {
			dir := oracle.MountNew(t, mkfs)
			src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
			if err := os.WriteFile(src, want[:len(want)-5], 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(dst, make([]byte, 4<<20), 0o600); err != nil {
				t.Fatal(err)
			}
			s, err := os.Open(src)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			f := openFile(t, dst, rw)
			if !f.Shares(s) {
				t.Error("the file system shares no blocks")
			}
			if n, err := f.CopyRange(8192, s, 4096, 1<<19); n != 1<<19 || err != nil {
				t.Errorf("aligned: %d, %v", n, err)
			}
			if n, err := f.CopyRange(1<<20, s, 0, 8192+5); n != 8192 || !errors.Is(err, errors.ErrUnsupported) {
				t.Errorf("a part of a block at the end: %d, %v", n, err)
			}
			if n, err := f.CopyRange(5, s, 0, 8192); n != 0 || !errors.Is(err, errors.ErrUnsupported) {
				t.Errorf("not aligned: %d, %v", n, err)
			}
			if n, err := f.CopyRange(2<<20, s, 0, 1<<20); n != 0 || !errors.Is(err, errors.ErrUnsupported) {
				t.Errorf("beyond the end of the source: %d, %v", n, err)
			}
			got := make([]byte, 4<<20)
			if _, err := f.ReadAt(got, 0); err != nil {
				t.Fatal(err)
			}
			expect := make([]byte, 4<<20)
			copy(expect[8192:], want[4096:4096+1<<19])
			copy(expect[1<<20:], want[:8192])
			if !bytes.Equal(got, expect) {
				t.Error("wrong bytes were copied")
			}
			if out := oracle.MustRun(t, "filefrag", "-v", dst); !strings.Contains(out, "shared") {
				t.Errorf("no blocks are shared:\n%s", out)
			}
			f.Close()
		})
	}

	src := tempFile(t, 1<<20, rw)
	f := tempFile(t, 2<<20, rw)
	pr, pw, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer pr.Close()
	defer pw.Close()
	for _, from := range []*os.File{pr, src.OS()} {
		if n, err := f.CopyRange(0, from, 0, 10); n != 0 || !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("copy of 10 bytes: %d, %v", n, err)
		}
	}
	// Nothing of this was a failed write.
	if _, err := f.WriteAt(want, 0); err != nil {
		t.Error(err)
	}
}

func TestOpenFileRefusesFifo(t *testing.T) {
	checkFDs(t)
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o666); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		_, err := blockdev.OpenFile(fifo, nil)
		done <- err
	}()
	select {
	case err := <-done:
		if err == nil || !strings.Contains(err.Error(), fifo) {
			t.Errorf("fifo: %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("opening a fifo hangs")
	}
}

// A failed write makes the file read-only. The failure is a real one: the
// process's limit of the size of files.
func TestFileFailedWrite(t *testing.T) {
	f := tempFile(t, 1<<20, rw)
	withFileLimit(t, 4096, func() {
		if _, err := f.WriteAt(make([]byte, 8192), 0); !errors.Is(err, syscall.EFBIG) {
			t.Errorf("write over the limit: %v", err)
		}
	})
	checkFailed(t, f, syscall.EFBIG)
}

func TestFileFailedTruncate(t *testing.T) {
	f := tempFile(t, 1000, rw)
	withFileLimit(t, 4096, func() {
		if err := f.Truncate(8192); !errors.Is(err, syscall.EFBIG) {
			t.Errorf("truncate over the limit: %v", err)
		}
	})
	if f.Size() != 1000 {
		t.Errorf("size %d after a failed truncate", f.Size())
	}
	checkFailed(t, f, syscall.EFBIG)
}

// A file on a full file system, /dev/full's like for a regular file.
func TestFileFull(t *testing.T) {
	oracle.RequireRoot(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		oracle.Missing(t, "leave to mount a tmpfs")
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	path := filepath.Join(dir, "f")
	if err := os.WriteFile(path, nil, 0o666); err != nil {
		t.Fatal(err)
	}
	f := openFile(t, path, rw)
	if err := f.Truncate(1 << 20); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(make([]byte, 1<<20), 0); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("write to a full file system: %v", err)
	}
	checkFailed(t, f, syscall.ENOSPC)
	if err := f.CutBack(1<<20 + 1); !errors.Is(err, blockdev.ErrRange) {
		t.Errorf("cut back to more: %v, want ErrRange", err)
	}
	if err := f.CutBack(4096); err != nil || f.Size() != 4096 {
		t.Errorf("cut back: %d bytes, %v", f.Size(), err)
	}
	checkFailed(t, f, syscall.ENOSPC)
	f.Close()
}

func checkFailed(t *testing.T, f *blockdev.File, first error) {
	t.Helper()
	_, werr := f.WriteAt([]byte{1}, 0)
	_, cerr := f.CopyRange(0, f.OS(), 100, 1)
	for op, err := range map[string]error{"write": werr, "copy": cerr, "sync": f.Sync(),
		"truncate": f.Truncate(5), "zero": f.WriteZeroes(0, 1), "discard": f.Discard(0, 1), "allocate": f.Allocate(0, 1)} {
		if !errors.Is(err, blockdev.ErrReadOnly) || !errors.Is(err, first) {
			t.Errorf("%s after a failed write: %v", op, err)
		}
	}
	if _, err := f.ReadAt(make([]byte, 1), 0); err != nil {
		t.Errorf("read after a failed write: %v", err)
	}
}

// withFileLimit runs fn while no file can be written beyond limit.
func withFileLimit(t *testing.T, limit uint64, fn func()) {
	t.Helper()
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &old); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: limit, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	defer unix.Setrlimit(unix.RLIMIT_FSIZE, &old)
	fn()
}

// A real block device: its size cannot be changed and it has no holes, all
// else holds.
func TestFileBlockDevice(t *testing.T) {
	oracle.RequireRoot(t)
	img := filepath.Join(t.TempDir(), "img")
	if err := os.WriteFile(img, make([]byte, 1<<20), 0o666); err != nil {
		t.Fatal(err)
	}
	r := oracle.Run(t, "losetup", "--find", "--show", img)
	if r.Code != 0 {
		oracle.Missing(t, "a loop device")
	}
	dev := strings.TrimSpace(r.Stdout)
	t.Cleanup(func() { detach(t, dev) })
	checkFDs(t)
	blocktest.TestDevice(t, func(t *testing.T) blockdev.Device {
		f := openFile(t, dev, rw)
		if f.Size() != 1<<20 {
			t.Fatalf("size %d", f.Size())
		}
		return f
	})
	f := openFile(t, dev, rw)
	if !f.Locked() {
		t.Error("a block device is not locked")
	}
	if err := f.Truncate(1 << 19); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("truncate: %v", err)
	}
}

// detach is not oracle.Run, whose context is over when a test is cleaned up.
func detach(t *testing.T, dev string) {
	if out, err := exec.Command(oracle.Path(t, "losetup"), "--detach", dev).CombinedOutput(); err != nil {
		t.Errorf("losetup --detach: %v: %s", err, out)
	}
}

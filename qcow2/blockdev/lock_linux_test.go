package blockdev_test

import (
	"bufio"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/oracle"
)

// heldBytes returns which of QEMU's lock bytes anybody holds on a file.
func heldBytes(t *testing.T, path string) []int64 {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	c, err := f.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var held []int64
	cerr := c.Control(func(fd uintptr) {
		for at := int64(0); at < 300; at++ {
			lk := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: at, Len: 1}
			if err = unix.FcntlFlock(fd, unix.F_OFD_GETLK, &lk); err != nil {
				return
			}
			if lk.Type != unix.F_UNLCK {
				held = append(held, at)
			}
		}
	})
	if err := errors.Join(cerr, err); err != nil {
		t.Fatal(err)
	}
	return held
}

// hold runs a QEMU program that reads commands and answers, and returns once
// it has said ready. It ends when the test does, or when the returned func is
// called.
func hold(t *testing.T, ready, say, program string, args ...string) (release func()) {
	t.Helper()
	oracle.Require(t, program)
	cmd := exec.Command(program, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	released := false
	release = func() {
		if released {
			return
		}
		released = true
		stdin.Close()
		cmd.Process.Kill()
		cmd.Wait()
	}
	t.Cleanup(release)
	io.WriteString(stdin, say)
	for lines := bufio.NewScanner(stdout); lines.Scan(); {
		if strings.Contains(lines.Text(), ready) {
			go io.Copy(io.Discard, stdout)
			return release
		}
	}
	release()
	t.Fatalf("%s %q ended: %s", program, args, stderr.String())
	return nil
}

// holdIO opens an image in a qemu-io that waits.
func holdIO(t *testing.T, args ...string) (release func()) {
	t.Helper()
	return hold(t, "MiB", "length\n", "qemu-io", args...)
}

// holdMachine opens a drive in a machine that does not run yet.
func holdMachine(t *testing.T, drive, device string) (release func()) {
	t.Helper()
	// The greeting comes before the drive is there; an answer comes after.
	return hold(t, `"return"`, `{"execute":"qmp_capabilities"}`, "qemu-system-x86_64", "-accel", "tcg", "-S", "-m", "64", "-nodefaults", "-display", "none",
		"-qmp", "stdio", "-drive", drive+",if=none,id=d", "-device", "virtio-blk-pci,drive=d"+device)
}

// image makes an image of 4 MiB.
func image(t *testing.T, format string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk."+format)
	oracle.MustRun(t, "qemu-img", "create", "-q", "-f", format, path, "4M")
	return path
}

var (
	reader     = &blockdev.FileOptions{}
	writer     = &blockdev.FileOptions{Write: true}
	forceShare = &blockdev.FileOptions{ForceShare: true}
	noLock     = &blockdev.FileOptions{Write: true, NoLock: true}
)

const (
	writeLock  = `Failed to get "write" lock`
	sharedLock = `Failed to get shared "write" lock`
)

// checkOpen opens path and checks for the conflict that is wanted, "" for none.
func checkOpen(t *testing.T, what, path string, opts *blockdev.FileOptions, want string) {
	t.Helper()
	held := heldBytes(t, path)
	f, err := blockdev.OpenFile(path, opts)
	if err == nil {
		defer f.Close()
	}
	var locked *blockdev.LockError
	switch {
	case want == "" && err != nil:
		t.Errorf("%s: %v", what, err)
	case want == "" && f.Locked() == opts.NoLock:
		t.Errorf("%s: Locked() is %v", what, f.Locked())
	case want != "" && (!errors.Is(err, blockdev.ErrLocked) || !errors.As(err, &locked) || locked.Reason() != want):
		t.Errorf("%s: %v, want %s", what, err, want)
	case want != "":
		if now := heldBytes(t, path); !slices.Equal(held, now) {
			t.Errorf("%s: after the conflict %v is locked, before %v", what, now, held)
		}
	}
}

// The bytes and conflicts of what QEMU's programs open.
func TestLockQEMUHolds(t *testing.T) {
	type opener func(t *testing.T) (path string, release func())
	simple := func(format string, args ...string) opener {
		return func(t *testing.T) (string, func()) {
			path := image(t, format)
			return path, holdIO(t, append(args, "-f", format, path)...)
		}
	}
	machine := func(format, drive, device string) opener {
		return func(t *testing.T) (string, func()) {
			path := image(t, format)
			return path, holdMachine(t, "format="+format+",file="+path+drive, device)
		}
	}
	overlay := func(args ...string) opener {
		return func(t *testing.T) (string, func()) {
			base := image(t, "qcow2")
			top := base + ".top"
			oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
			return base, holdIO(t, append(args, "-f", "qcow2", top)...)
		}
	}
	rdwr := []int64{100, 101, 103, 201, 203}
	rdonly := []int64{100, 201, 203}
	for _, c := range []struct {
		name          string
		open          opener
		held          []int64
		reader, write string
	}{
		{"qemu-io qcow2", simple("qcow2"), rdwr, sharedLock, writeLock},
		{"qemu-io qcow2 read-only", simple("qcow2", "-r"), rdonly, "", writeLock},
		{"qemu-io qcow2 force-share", simple("qcow2", "-r", "-U"), []int64{100}, "", ""},
		{"qemu-io raw", simple("raw"), []int64{100, 101}, sharedLock, sharedLock},
		{"backing file", overlay(), rdonly, "", writeLock},
		{"backing file read-only", overlay("-r"), rdonly, "", writeLock},
		{"backing file force-share", overlay("-r", "-U"), []int64{100}, "", ""},
		{"machine qcow2", machine("qcow2", "", ""), rdwr, sharedLock, writeLock},
		{"machine snapshot", machine("qcow2", ",snapshot=on", ""), rdonly, "", writeLock},
		{"machine raw", machine("raw", "", ""), []int64{100, 101, 201}, sharedLock, writeLock},
		{"machine raw share-rw", machine("raw", "", ",share-rw=on"), []int64{100, 101}, sharedLock, sharedLock},
	} {
		t.Run(c.name, func(t *testing.T) {
			checkFDs(t)
			path, release := c.open(t)
			if diff := cmp.Diff(c.held, heldBytes(t, path)); diff != "" {
				t.Errorf("bytes held (-want +got):\n%s", diff)
			}
			checkOpen(t, "reader", path, reader, c.reader)
			checkOpen(t, "writer", path, writer, c.write)
			checkOpen(t, "force-share", path, forceShare, "")
			checkOpen(t, "no lock", path, noLock, "")
			release()
			checkOpen(t, "writer when all is over", path, writer, "")
		})
	}
}

// The bytes of what this package opens, and what QEMU's programs make of them.
func TestLockWeHold(t *testing.T) {
	for _, c := range []struct {
		name        string
		opts        *blockdev.FileOptions
		held        []int64
		read, write string // conflicts of a QEMU that reads or writes
	}{
		{"writer", writer, []int64{100, 101, 103, 201, 203}, sharedLock, writeLock},
		{"reader", reader, []int64{100, 201, 203}, "", writeLock},
		{"force-share", forceShare, []int64{100}, "", ""},
		{"no lock", noLock, nil, "", ""},
	} {
		for _, format := range []string{"qcow2", "raw"} {
			t.Run(c.name+" "+format, func(t *testing.T) {
				checkFDs(t)
				path := image(t, format)
				f := openFile(t, path, c.opts)
				if diff := cmp.Diff(c.held, heldBytes(t, path)); diff != "" {
					t.Errorf("bytes held (-want +got):\n%s", diff)
				}
				check := func(want string, program string, args ...string) {
					t.Helper()
					r := oracle.Run(t, program, append(args, path)...)
					if want == "" && r.Code != 0 || want != "" && (r.Code == 0 || !strings.Contains(r.Stderr, want)) {
						t.Errorf("%s %q: exit %d: %s, want %q", program, args, r.Code, r.Stderr, want)
					}
				}
				read := c.read
				if format == "raw" {
					read = "" // a QEMU that only reads a raw file lets others write it
				}
				check(read, "qemu-img", "info", "-f", format)
				check("", "qemu-img", "info", "-U", "-f", format)
				check(c.write, "qemu-io", "-f", format, "-c", "write 0 64k")
				check(read, "qemu-io", "-r", "-f", format, "-c", "read 0 64k")
				if format == "qcow2" {
					check(c.read, "qemu-img", "check", "-f", format)
				}
				checkOpen(t, "our reader", path, reader, c.read)
				checkOpen(t, "our writer", path, writer, c.write)
				if err := f.Close(); err != nil {
					t.Fatal(err)
				}
				check("", "qemu-io", "-f", format, "-c", "write 0 64k")
			})
		}
	}
}

// An older QEMU, or anybody, can hold a byte exclusively.
func TestLockExclusive(t *testing.T) {
	f := tempFile(t, 1000, noLock)
	c, err := f.OS().SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if cerr := c.Control(func(fd uintptr) {
		err = unix.FcntlFlock(fd, unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Start: 203, Len: 1})
	}); cerr != nil || err != nil {
		t.Fatal(cerr, err)
	}
	if _, err := blockdev.OpenFile(f.Name(), nil); !errors.Is(err, blockdev.ErrLocked) {
		t.Errorf("byte 203 held exclusively: %v", err)
	}
}

// On a descriptor that is not open for reading there can be no shared lock;
// that is an error, not a missing feature.
func TestLockWriteOnly(t *testing.T) {
	w, err := os.OpenFile(filepath.Join(t.TempDir(), "f"), os.O_WRONLY|os.O_CREATE, 0o666)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, err := blockdev.NewFile(w, writer); err == nil || errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("write-only descriptor: %v", err)
	}
	if held := heldBytes(t, w.Name()); held != nil {
		t.Errorf("bytes %v are locked", held)
	}
}

// A conflict leaves the caller's file open, with none of its bytes locked.
func TestLockConflictUndone(t *testing.T) {
	checkFDs(t)
	first := tempFile(t, 1000, reader)
	f, err := os.OpenFile(first.Name(), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	_, err = blockdev.NewFile(f, writer)
	want := first.Name() + `: Failed to get "write" lock: another process (a running virtual machine?) uses the image`
	if !errors.Is(err, blockdev.ErrLocked) || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
	first.Close()
	if held := heldBytes(t, f.Name()); held != nil {
		t.Errorf("bytes %v are still locked", held)
	}
	if _, err := blockdev.NewFile(f, writer); err != nil {
		t.Errorf("when the other is closed: %v", err)
	}
}

package blockdev_test

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/oracle"
)

// TestStream writes a file in and out of order: it holds what was written, and
// most of it has left the page cache before the end.
func TestStream(t *testing.T) {
	checkFDs(t)
	const size = 96 << 20
	path := filepath.Join(t.TempDir(), "file")
	out, err := blockdev.CreateFile(path, &blockdev.CreateOptions{Stream: true})
	if err != nil {
		t.Fatal(err)
	}
	defer out.Abort()
	f := out.File()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	want := make([]byte, size)
	rng := rand.NewChaCha8([32]byte{1})
	rng.Read(want)
	write := func(off, n int) {
		if _, err := f.WriteAt(want[off:off+n], int64(off)); err != nil {
			t.Fatal(err)
		}
	}
	write(80<<20, 5000) // far ahead, then back
	for off := 0; off < size; off += 2 << 20 {
		write(off+1<<20, 1<<20) // as two workers write
		write(off, 1<<20)
	}
	write(0, 512)
	oracle.Require(t, "fincore")
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.OS().Fd()), &st); err != nil {
		t.Fatal(err)
	}
	if int64(st.Type) != unix.TMPFS_MAGIC {
		name := "/proc/self/fd/" + strconv.Itoa(int(f.OS().Fd()))
		if link, err := os.Readlink(name); err == nil && !strings.Contains(link, "(deleted)") {
			name = link
		} else {
			name = "/proc/" + strconv.Itoa(os.Getpid()) + name[len("/proc/self"):]
		}
		text := strings.TrimSpace(oracle.MustRun(t, "fincore", "--bytes", "--noheadings", "--output", "RES", name))
		resident, err := strconv.Atoi(text)
		if err != nil || resident > size/2 {
			t.Errorf("%s of %d bytes are in the page cache (%v)", text, size, err)
		}
	}
	if err := out.Commit(); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("other bytes (%v)", err)
	}
}

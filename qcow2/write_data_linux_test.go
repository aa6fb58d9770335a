package qcow2_test

import (
	"bytes"
	"os"
	"syscall"
	"testing"

	"qimg/qcow2"
	"qimg/qcow2/blockdev/oracle"
)

// A discard gives back the space of an external data file, raw or not, and what
// is written there afterwards stays.
func TestDiscardDataFile(t *testing.T) {
	oracle.Require(t, "qemu-img")
	for _, raw := range []string{"off", "on"} {
		t.Run("data_file_raw="+raw, func(t *testing.T) {
			t.Chdir(t.TempDir())
			oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=data,data_file_raw="+raw, "a.qcow2", "4M")
			im, err := qcow2.Open("a.qcow2", &qcow2.OpenOptions{Write: true, Backing: qcow2.BackingFollow})
			if err != nil {
				t.Fatal(err)
			}
			want := noise(1, 4<<20)
			write := func(off, n int64) {
				t.Helper()
				if _, err := im.WriteAt(want[off:off+n], off); err != nil {
					t.Fatal(err)
				}
			}
			write(0, 4<<20)
			if err := im.Sync(); err != nil {
				t.Fatal(err)
			}
			before := allocated(t, "data")
			if err := im.Discard(1<<20, 2<<20); err != nil {
				t.Fatal(err)
			}
			copy(want[1<<20:3<<20], make([]byte, 2<<20))
			copy(want[2<<20:], noise(2, 512))
			write(2<<20, 512)
			if err := im.Sync(); err != nil {
				t.Fatal(err)
			}
			if freed := before - allocated(t, "data"); freed < 2<<20-64<<10 {
				t.Errorf("%d bytes were given back, expected nearly %d", freed, 2<<20)
			}
			if !bytes.Equal(bytesOf(t, im), want) {
				t.Error("the disk reads otherwise")
			}
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile("want", want, 0o600); err != nil {
				t.Fatal(err)
			}
			oracle.MustRun(t, "qemu-img", "check", "-q", "a.qcow2")
			oracle.MustRun(t, "qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", "a.qcow2", "want")
			if raw == "on" {
				oracle.MustRun(t, "qemu-img", "compare", "-q", "-f", "raw", "-F", "raw", "data", "want")
			}
		})
	}
}

// allocated returns the bytes that a file takes on its disk.
func allocated(t *testing.T, name string) int64 {
	t.Helper()
	var st syscall.Stat_t
	if err := syscall.Stat(name, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

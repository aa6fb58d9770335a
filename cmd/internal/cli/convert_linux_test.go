package cli_test

import (
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"qimg/qcow2/blockdev/oracle"
)

// A convert onto a file system that is full leaves nothing of itself, and what
// was there before.
func TestConvertFull(t *testing.T) {
	oracle.Require(t, "qemu-img")
	oracle.RequireRoot(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1536k"); err != nil {
		oracle.Missing(t, "leave to mount a tmpfs")
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	t.Chdir(t.TempDir())
	randomFile(t, "disk", 6<<20)
	writeFile(t, dir+"/out", "old content")
	for _, form := range []string{
		"-O raw", "-O raw -S 0", "-O raw -o preallocation=full", "-O raw -o preallocation=falloc", "-t writeback -O raw",
		"-O qcow2", "-O qcow2 -c", "-O qcow2 -c -o compression_type=zstd", "-O qcow2 -o preallocation=metadata",
		"-O qcow2 -o preallocation=full", "-O qcow2 -o data_file=" + dir + "/data", "-O qcow2 -o cluster_size=512",
	} {
		r := run(t, append([]string{"convert", "-f", "raw"}, append(strings.Fields(form), "disk", dir+"/out")...)...)
		if r.Code != 1 || !strings.Contains(r.Stderr, "No space left on device") {
			t.Errorf("%s: %+v", form, r)
		}
		if got := filesOf(t, dir); !slices.Equal(got, []string{"out"}) {
			t.Errorf("%s: files were left behind: %q", form, got)
		}
		if b, err := os.ReadFile(dir + "/out"); err != nil || string(b) != "old content" {
			t.Errorf("%s: the old file: %q, %v", form, b, err)
		}
		var fs unix.Statfs_t
		if err := unix.Statfs(dir, &fs); err != nil || fs.Blocks-fs.Bfree > 2 {
			t.Errorf("%s: %d blocks are taken, %v", form, fs.Blocks-fs.Bfree, err)
		}
	}
}

// Pipes with a name are read and written like - is.
func TestConvertFIFO(t *testing.T) {
	t.Chdir(t.TempDir())
	disk := randomFile(t, "disk", 1<<20)
	for _, name := range []string{"in", "out"} {
		if err := unix.Mkfifo(name, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	go os.WriteFile("in", disk, 0)
	read := make(chan []byte)
	go func() {
		b, _ := os.ReadFile("out")
		read <- b
	}()
	mustRun(t, "convert", "-f", "raw", "-O", "raw", "in", "out")
	if b := <-read; !slices.Equal(b, disk) {
		t.Error(cmp.Diff(len(disk), len(b)))
	}
}

// A device that is an input, or lies on one, is not written to, whatever the name of
// its node.
func TestConvertSelfDevice(t *testing.T) {
	oracle.RequireRoot(t)
	dir := t.TempDir()
	disk := randomFile(t, dir+"/disk", 1<<20)
	r := oracle.Run(t, "losetup", "--find", "--show", dir+"/disk")
	if r.Code != 0 {
		oracle.Missing(t, "a loop device")
	}
	dev := strings.TrimSpace(r.Stdout)
	t.Cleanup(func() { exec.Command(oracle.Path(t, "losetup"), "--detach", dev).Run() })
	var st unix.Stat_t
	if err := unix.Stat(dev, &st); err != nil {
		t.Fatal(err)
	}
	alias := dir + "/alias"
	if err := unix.Mknod(alias, unix.S_IFBLK|0o600, int(st.Rdev)); err != nil {
		oracle.Missing(t, "leave to make a device node")
	}
	mustRun(t, "create", "-q", "-f", "qcow2", "-b", "disk", "-F", "raw", dir+"/above")
	for _, line := range []string{
		"convert -U -f raw -O raw DEV DEV", "convert -f raw -O raw DEV ALIAS", "convert -U -f raw -O qcow2 DEV ALIAS",
		"convert -f raw -n -O raw DISK DEV", "convert -n -O raw ABOVE DEV", "convert -f raw -O raw DEV DISK", "dd -O raw if=ABOVE of=ALIAS",
		"convert -f raw -n -O raw DEV ALIAS", "dd -U -f raw -O raw if=DEV of=DEV", "dd -f raw -O raw count=1 if=ALIAS of=DEV",
	} {
		args := strings.Fields(strings.NewReplacer("DEV", dev, "ALIAS", alias, "DISK", dir+"/disk", "ABOVE", dir+"/above").Replace(line))
		if r := run(t, args...); r.Code != 1 || !strings.Contains(r.Stderr, "is an input") {
			t.Errorf("%s: %+v", line, r)
		}
		if b, err := os.ReadFile(dev); err != nil || !slices.Equal(b, disk) {
			t.Fatalf("%s: the input has changed, %v", line, err)
		}
	}
}

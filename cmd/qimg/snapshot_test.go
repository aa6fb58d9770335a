//go:build linux && amd64

package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"qimg/qcow2/blockdev/oracle"
)

// counter is what runs in a guest whose snapshots are taken: it counts, and
// says so once it has found the count on its disk.
const counter = `#!/bin/busybox sh
export PATH=/bin
/bin/busybox mkdir -p /proc /dev
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
while read -r m; do insmod "/modules/$m"; done </modules/order
while [ ! -b /dev/sda ]; do sleep 0.1; done
i=0
while :; do
	printf '%-512s' "count $i" >/disk-now
	dd if=/dev/sda of=/disk-was bs=512 count=1 2>/dev/null
	[ $i = 0 ] || cmp -s /disk-was /disk-then || echo "the disk is another"
	dd if=/disk-now of=/dev/sda bs=512 count=1 2>/dev/null
	sync
	echo 3 >/proc/sys/vm/drop_caches
	cp /disk-now /disk-then
	echo "count $i"
	i=$((i + 1))
	sleep 0.1
done
`

// TestSnapshotGuests exports a running machine that QEMU has saved in an image,
// resumes two machines at once from the files, and imports the state of one of
// them, and of one that QEMU has migrated to a file, into images that QEMU loads
// again.
func TestSnapshotGuests(t *testing.T) {
	oracle.Require(t, "qemu-system-x86_64", "qemu-img", "busybox")
	g := newGuests(t)
	disk := filepath.Join(g.dir, "disk.qcow2")
	qimg(t, "create", "-q", "-f", "qcow2", disk, "16M")

	first := g.start(disk)
	first.count(t, 3)
	first.command(t, "savevm here")
	first.stop(t)
	saved := first.last()

	out, mem := filepath.Join(g.dir, "out.qcow2"), filepath.Join(g.dir, "out.mem")
	qimg(t, "snapshot", "--export", "here", "--disk", out, "--vmstate", mem, disk)
	oracle.MustRun(t, "qemu-img", "check", out)
	var two []*machine
	for range 2 {
		two = append(two, g.start(out, "-snapshot", "-incoming", "exec: cat "+mem))
	}
	for _, m := range two {
		m.count(t, saved+4)
		m.resumed(t, saved)
	}
	moved := filepath.Join(g.dir, "moved.mem")
	two[0].stop(t)
	two[1].stop(t)

	// A machine whose disk is its own is migrated to a file; the disk is then as
	// the file has it.
	third := g.start(out, "-incoming", "exec: cat "+mem)
	third.count(t, saved+3)
	third.command(t, `migrate "exec: cat >`+moved+`"`)
	third.stop(t)
	last := third.last()

	for _, c := range []struct {
		name, disk, mem string
		last            int
	}{
		{"its own disk", out, moved, last},
		{"another disk", "", mem, saved},
	} {
		args := []string{"snapshot", "--import", "again", "--vmstate", c.mem}
		image := c.disk
		if image == "" {
			image = filepath.Join(g.dir, "new.qcow2")
			qimg(t, "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", image, "1M")
			qimg(t, "snapshot", "--export", "here", "--disk", out, disk)
			args = append(args, "--disk", out)
		}
		qimg(t, append(args, image)...)
		oracle.MustRun(t, "qemu-img", "check", image)
		m := g.start(image, "-loadvm", "again")
		m.count(t, c.last+4)
		m.resumed(t, c.last)
		m.stop(t)
		oracle.MustRun(t, "qemu-img", "check", image)
	}
}

// guests are machines of one kind.
type guests struct {
	t              *testing.T
	dir            string
	kernel, initrd string
	n              int
}

func newGuests(t *testing.T) *guests {
	t.Helper()
	kernel, version := findKernel(t)
	g := &guests{t: t, dir: t.TempDir(), kernel: kernel}
	var archive cpio
	archive.add("init", 0o100755, []byte(counter))
	archive.add("bin", 0o040755, nil)
	archive.add("modules", 0o040755, nil)
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatal(err)
	}
	archive.addFile(t, "bin/busybox", busybox)
	lib := filepath.Join("/lib/modules", version)
	var order strings.Builder
	for _, m := range moduleOrder(t, lib, "ata_piix", "sd_mod") {
		archive.addFile(t, "modules/"+filepath.Base(m), filepath.Join(lib, m))
		fmt.Fprintln(&order, filepath.Base(m))
	}
	archive.add("modules/order", 0o100644, []byte(order.String()))
	archive.add("TRAILER!!!", 0, nil)
	g.initrd = filepath.Join(g.dir, "initrd")
	if err := os.WriteFile(g.initrd, archive.buf.Bytes(), 0o666); err != nil {
		t.Fatal(err)
	}
	return g
}

// machine is a guest that runs.
type machine struct {
	cmd             *exec.Cmd
	serial, monitor string
	errors          strings.Builder
	done            chan struct{}
}

// start starts a machine with a disk. It ends with the test at the latest.
func (g *guests) start(disk string, args ...string) *machine {
	g.t.Helper()
	g.n++
	m := &machine{
		serial:  filepath.Join(g.dir, fmt.Sprintf("serial%d", g.n)),
		monitor: filepath.Join(g.dir, fmt.Sprintf("mon%d", g.n)),
		done:    make(chan struct{}),
	}
	m.cmd = exec.CommandContext(g.t.Context(), "qemu-system-x86_64", append([]string{"-accel", "tcg", "-m", "96", "-nodefaults",
		"-display", "none", "-serial", "file:" + m.serial, "-monitor", "unix:" + m.monitor + ",server=on,wait=off", "-no-reboot",
		"-kernel", g.kernel, "-initrd", g.initrd, "-append", "console=ttyS0 quiet panic=-1",
		"-drive", "file=" + disk + ",format=qcow2,if=ide"}, args...)...)
	m.cmd.Stderr = &m.errors
	if err := m.cmd.Start(); err != nil {
		g.t.Fatal(err)
	}
	go func() {
		m.cmd.Wait()
		close(m.done)
	}()
	g.t.Cleanup(func() {
		m.cmd.Process.Kill()
		<-m.done
	})
	return m
}

// said returns the lines that the guest has said to their end.
func (m *machine) said() []string {
	b, _ := os.ReadFile(m.serial)
	b = b[:bytes.LastIndexByte(b, '\n')+1]
	return strings.FieldsFunc(string(b), func(r rune) bool { return r == '\r' || r == '\n' })
}

// counts returns the counts that the guest has said.
func (m *machine) counts() (list []int) {
	for _, line := range m.said() {
		var n int
		if _, err := fmt.Sscanf(line, "count %d", &n); err == nil {
			list = append(list, n)
		}
	}
	return list
}

func (m *machine) last() int {
	list := m.counts()
	if len(list) == 0 {
		return -1
	}
	return list[len(list)-1]
}

// count waits until the guest has counted up to n.
func (m *machine) count(t *testing.T, n int) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); m.last() < n; {
		select {
		case <-m.done:
			t.Fatalf("QEMU has ended: %s\n%q", m.errors.String(), m.said())
		case <-time.After(50 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			t.Fatalf("the guest does not count up to %d: %q", n, m.said())
		}
	}
}

// resumed checks that the guest has gone on where it was when it had counted up
// to saved, on its own disk.
func (m *machine) resumed(t *testing.T, saved int) {
	t.Helper()
	list := m.counts()
	for i, n := range list {
		if n != list[0]+i {
			t.Errorf("the guest does not count: %v", list)
			break
		}
	}
	// A line that was cut by the snapshot counts for neither machine.
	if list[0] < saved || list[0] > saved+2 {
		t.Errorf("the guest went on at %d, expected %d", list[0], saved+1)
	}
	if all := strings.Join(m.said(), "\n"); strings.Contains(all, "the disk is another") {
		t.Errorf("the guest says that its disk is not that of its memory:\n%s", all)
	}
}

// command has the monitor do something and waits until it is done.
func (m *machine) command(t *testing.T, line string) {
	t.Helper()
	conn, err := net.Dial("unix", m.monitor)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Minute))
	r := bufio.NewReader(conn)
	// The prompt comes at the beginning and when a command is done.
	prompt := func() string {
		var b strings.Builder
		for !strings.HasSuffix(b.String(), "(qemu) ") {
			c, err := r.ReadByte()
			if err != nil {
				t.Fatalf("monitor: %v after %q", err, b.String())
			}
			b.WriteByte(c)
		}
		return b.String()
	}
	prompt()
	if _, err := io.WriteString(conn, line+"\n"); err != nil {
		t.Fatal(err)
	}
	if said := prompt(); strings.Contains(said, "Error") {
		t.Fatalf("%s: %s", line, said)
	}
}

// stop ends the machine, after its last write.
func (m *machine) stop(t *testing.T) {
	t.Helper()
	conn, err := net.Dial("unix", m.monitor)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "quit\n"); err != nil {
		t.Fatal(err)
	}
	select {
	case <-m.done:
	case <-time.After(time.Minute):
		t.Fatal("QEMU does not end")
	}
}

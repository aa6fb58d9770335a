package cli_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"qimg/qcow2"
	"qimg/qcow2/blockdev/oracle"
)

// setSnapshot puts an entry with other extra data, id and name in place of the
// only one of a snapshot table.
func setSnapshot(t *testing.T, file string, extra []byte, id, name string) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	at := binary.BigEndian.Uint64(b[64:])
	entry := bytes.Clone(b[at : at+40])
	binary.BigEndian.PutUint16(entry[12:], uint16(len(id)))
	binary.BigEndian.PutUint16(entry[14:], uint16(len(name)))
	binary.BigEndian.PutUint32(entry[36:], uint32(len(extra)))
	entry = append(append(append(entry, extra...), id...), name...)
	if end := int(at) + len(entry); end > len(b) {
		b = append(b, make([]byte, end-len(b))...)
	}
	copy(b[at:], entry)
	writeFile(t, file, string(b))
}

// table returns what an image has in its snapshot table, without what differs
// between two that were made one after the other.
func table(t *testing.T, file string) []qcow2.Snapshot {
	t.Helper()
	im, err := qcow2.Open(file, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	list := append([]qcow2.Snapshot(nil), im.Snapshots()...)
	for i := range list {
		list[i].DateSec, list[i].DateNsec, list[i].L1TableOffset = 0, 0, 0
	}
	return list
}

// Entries that QEMU does not make are shown, found and written as it does.
func TestSnapshotTable(t *testing.T) {
	oracle.Require(t, "qemu-img")
	t.Chdir(t.TempDir())
	known := make([]byte, 24)
	binary.BigEndian.PutUint64(known[0:], 5<<32)    // vm state size
	binary.BigEndian.PutUint64(known[8:], 1<<20)    // disk size
	binary.BigEndian.PutUint64(known[16:], 1<<63|9) // icount
	for name, c := range map[string]struct {
		extra    []byte
		id, name string
	}{
		"no extra data":      {nil, "1", "x"},
		"vm state size only": {known[:8], "1", "x"},
		"no icount":          {known[:16], "1", "x"},
		"unknown extra data": {append(known[:24:24], "0123456789abcdef and 5 more"...), "1", "x"},
		"most extra data":    {append(known[:24:24], strings.Repeat("m", 1000)...), "1", "x"},
		"words as id":        {known, "some id", "x"},
		"number in front":    {known, " +41st", "x"},
		"negative":           {known, "-3", "x"},
		"highest":            {known, "18446744073709551615", "x"},
		"too high":           {known, "99999999999999999999999", "x"},
		"zeroes in names":    {known, "7\x00eight", "x\x00y"},
		"long names":         {known, strings.Repeat("i", 200), strings.Repeat("n", 400)},
		"not UTF-8":          {known, "\xff", "\xfe\x01\x1b"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, file := range []string{"ours", "theirs"} {
				oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", file, "1M")
				oracle.MustRun(t, "qemu-img", "snapshot", "-c", "x", file)
				setSnapshot(t, file, c.extra, c.id, c.name)
			}
			same(t, "snapshot", "-l", "ours")
			var list []struct {
				Snapshots []struct {
					Unknown string `json:"unknown-extra-data"`
					Size    int    `json:"extra-data-size"`
				}
			}
			if err := json.Unmarshal([]byte(mustRun(t, "snapshot", "-l", "--output=json", "ours")), &list); err != nil {
				t.Fatal(err)
			}
			s := list[0].Snapshots[0]
			if want := fmt.Sprintf("%x", c.extra[min(24, len(c.extra)):]); s.Unknown != want || s.Size != len(c.extra) {
				t.Errorf("extra data of %d bytes, unknown %q, expected %q", s.Size, s.Unknown, want)
			}
			w := twins{t, "ours", "theirs"}
			w.do("snapshot", "-c", "more")
			if name != "highest" && name != "too high" { // where QEMU gives the same id again
				w.do("snapshot", "-c", "more")
			}
			if diff := cmp.Diff(table(t, "theirs"), table(t, "ours")); diff != "" {
				t.Errorf("-qemu-img +qimg\n%s", diff)
			}
			same(t, "snapshot", "-l", "ours")
		})
	}
}

// QEMU looks for vm state behind the disk as it was when it was saved.
func TestSnapshotResized(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-system-x86_64")
	t.Chdir(t.TempDir())
	// An L2 table maps 2 MiB.
	mustRun(t, "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "image", "8389120")
	for _, size := range []uint64{8389120, 8388708} { // and one that is no multiple of 512, as nothing makes any more
		b, err := os.ReadFile("image")
		if err != nil {
			t.Fatal(err)
		}
		binary.BigEndian.PutUint64(b[24:], size)
		writeFile(t, "image", string(b))
		monitor(t, "savevm x\n", "image")
		mustRun(t, "snapshot", "--export", "x", "--vmstate", "before", "image")
		mustRun(t, "snapshot", "--export", "x", "--vmstate", "after", "image")
		for _, to := range []string{"+64M", "8M", "5M"} {
			if size%512 != 0 {
				break // QEMU does not find it then
			}
			oracle.MustRun(t, "qemu-img", "resize", "-q", "--shrink", "image", to)
			mustRun(t, "snapshot", "--export", "x", "--vmstate", "after", "image")
			sameFiles(t, "before", "after")
		}
		incoming(t, "after", "image")
		mustRun(t, "snapshot", "-a", "x", "image")
		oracle.MustRun(t, "qemu-img", "check", "image")
		if out := monitor(t, "info snapshots\nloadvm x\ninfo status\n", "image"); !strings.Contains(out, "paused") || strings.Contains(out, "Error") {
			t.Errorf("loadvm: %s", out)
		}
		mustRun(t, "snapshot", "-d", "x", "image")
		oracle.MustRun(t, "qemu-img", "check", "image")
	}
}

// What --import makes QEMU loads, whatever the image is like.
func TestSnapshotImport(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-system-x86_64")
	t.Chdir(t.TempDir())
	mustRun(t, "create", "-q", "-f", "qcow2", "saved", "8M")
	monitor(t, "savevm x\n", "saved")
	mustRun(t, "snapshot", "--export", "x", "--vmstate", "mem", "saved")
	mustRun(t, "create", "-q", "-f", "qcow2", "base", "8M")
	oracle.MustRun(t, "qemu-io", "-c", "write -P 6 0 8M", "base")
	for _, options := range []string{
		"compat=0.10", "compat=1.1", "cluster_size=512", "cluster_size=2M", "extended_l2=on", "refcount_bits=64", "refcount_bits=2", "lazy_refcounts=on",
		"compat=0.10,backing_file=base,backing_fmt=qcow2", "backing_file=base,backing_fmt=qcow2", "extended_l2=on,backing_file=base,backing_fmt=qcow2",
	} {
		t.Run(options, func(t *testing.T) {
			os.Remove("image")
			mustRun(t, "create", "-q", "-f", "qcow2", "-o", options, "image", "8M")
			oracle.MustRun(t, "qemu-io", "-c", "write -P 1 1M 2M", "image")
			mustRun(t, "snapshot", "--import", "mine", "--vmstate", "mem", "image")
			oracle.MustRun(t, "qemu-img", "check", "image")
			oracle.MustRun(t, "qemu-io", "-c", "read -P 1 1M 2M", "image")
			mustRun(t, "snapshot", "--export", "mine", "--vmstate", "again", "image")
			sameFiles(t, "mem", "again")
			oracle.MustRun(t, "qemu-io", "-c", "write -P 2 0 3M", "image")
			if out := monitor(t, "loadvm mine\ninfo status\nsavevm other\n", "image"); !strings.Contains(out, "paused") || strings.Contains(out, "Error") {
				t.Errorf("loadvm: %s", out)
			}
			oracle.MustRun(t, "qemu-img", "check", "image")
			oracle.MustRun(t, "qemu-io", "-c", "read -P 1 1M 2M", "image")

			// A disk of its own.
			os.Remove("disk")
			mustRun(t, "create", "-q", "-f", "qcow2", "disk", "8M")
			oracle.MustRun(t, "qemu-io", "-c", "write -P 3 100k 3M", "-c", "write -z 1M 100k", "disk")
			mustRun(t, "snapshot", "--import", "third", "--disk", "disk", "--vmstate", "mem", "image")
			oracle.MustRun(t, "qemu-img", "check", "image")
			oracle.MustRun(t, "qemu-img", "convert", "-l", "snapshot.name=third", "-O", "raw", "image", "raw")
			oracle.MustRun(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", "raw", "disk")
			mustRun(t, "snapshot", "--export", "third", "--vmstate", "again", "image")
			sameFiles(t, "mem", "again")
			mustRun(t, "snapshot", "-d", "mine", "image")
			mustRun(t, "snapshot", "-a", "third", "image")
			oracle.MustRun(t, "qemu-img", "check", "image")
			oracle.MustRun(t, "qemu-img", "compare", "image", "disk")
		})
	}
	writeFile(t, "no stream", "QEVN and more")
	for _, c := range []struct {
		want string
		args []string
	}{
		{`the vm state begins with "QEVN", expected "QEVM": it is no migration stream of QEMU`, []string{"new", "--vmstate", "no stream", "image"}},
		{`the vm state begins with "", expected "QEVM": it is no migration stream of QEMU`, []string{"new", "--vmstate", "-", "image"}},
		{"there is neither --vmstate nor --disk", []string{"new", "image"}},
		{"Could not open 'nope': No such file or directory", []string{"new", "--vmstate", "nope", "image"}},
		{"Could not open 'nope': Could not open 'nope': No such file or directory", []string{"new", "--disk", "nope", "image"}},
		{"there is a snapshot of that name or id", []string{"third", "--vmstate", "mem", "image"}},
		{"there is a snapshot of that name or id", []string{"3", "--vmstate", "mem", "image"}},
	} {
		want := oracle.Result{Stderr: fmt.Sprintf("qemu-img: Could not import snapshot '%s': %s\n", c.args[0], c.want), Code: 1}
		if diff := cmp.Diff(want, run(t, append([]string{"snapshot", "--import"}, c.args...)...)); diff != "" {
			t.Errorf("-want +got\n%s", diff)
		}
	}
}

// monitor runs commands in a machine with a disk that does not run.
func monitor(t *testing.T, commands, disk string, args ...string) string {
	t.Helper()
	args = append([]string{"-S", "-display", "none", "-nodefaults", "-m", "8", "-machine", "pc,accel=tcg",
		"-drive", "file=" + disk + ",format=qcow2,if=ide", "-serial", "none", "-monitor", "stdio"}, args...)
	return oracle.MustRun(t, "sh", append([]string{"-c", `commands=$1; shift; { sleep 0.3; printf '%s' "$commands"; sleep 0.3; echo quit; } | timeout 60 qemu-system-x86_64 "$@" 2>&1`, "sh", commands}, args...)...)
}

// incoming checks that a machine with a disk takes a vm state.
func incoming(t *testing.T, state, disk string) {
	t.Helper()
	r := oracle.Run(t, "sh", "-c", `{ for i in $(seq 200); do echo info status; sleep 0.2; grep -q 'prelaunch\|fail' said && break; done; echo quit; } |
timeout 60 qemu-system-x86_64 -display none -nodefaults -m 8 -machine pc,accel=tcg -drive file="$2",format=qcow2,if=ide -snapshot \
	-serial none -monitor stdio -incoming "exec: cat '$1'" >said 2>&1`, "sh", state, disk)
	said, err := os.ReadFile("said")
	if err != nil {
		t.Fatal(err)
	}
	if r.Code != 0 || !strings.Contains(string(said), "VM status: paused (prelaunch)") {
		t.Errorf("QEMU does not take the vm state: exit %d, %s", r.Code, said)
	}
}

func sameFiles(t *testing.T, a, b string) {
	t.Helper()
	x, err := os.ReadFile(a)
	if err != nil {
		t.Fatal(err)
	}
	y, err := os.ReadFile(b)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(x, y) {
		t.Errorf("%s and %s differ", a, b)
	}
}

// What is encrypted in an image is exported as it is read, and imported
// encrypted.
func TestSnapshotEncrypted(t *testing.T) {
	zoo(t)
	image, err := os.ReadFile("luks-snapshot.qcow2")
	if err != nil {
		t.Fatal(err)
	}
	t.Chdir(t.TempDir())
	writeFile(t, "image", string(image))
	state := "QEVM" + strings.Repeat("state of a machine", 9999)
	writeFile(t, "mem", state)
	secret := func(args ...string) []string {
		return append(append([]string{"--object", "secret,id=key,data=zoo-secret", "--image-opts"}, args...),
			"driver=qcow2,encrypt.key-secret=key,file.filename=image")
	}
	snapshot := func(args ...string) []string { return append([]string{"snapshot"}, secret(args...)...) }
	oracle.MustRun(t, "qemu-img", append(append([]string{"convert", "-l", "snapshot.name=s", "-O", "raw"}, secret()...), "raw")...)
	mustRun(t, snapshot("--export", "s", "--disk", "disk")...)
	oracle.MustRun(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", "disk", "raw")
	mustRun(t, snapshot("--import", "new", "--disk", "disk", "--vmstate", "mem")...)
	oracle.MustRun(t, "qemu-img", append([]string{"check"}, secret()...)...)
	oracle.MustRun(t, "qemu-img", append(append([]string{"convert", "-l", "snapshot.name=new", "-O", "raw"}, secret()...), "raw2")...)
	sameFiles(t, "raw", "raw2")
	mustRun(t, snapshot("--export", "new", "--vmstate", "again")...)
	sameFiles(t, "mem", "again")
	if b, err := os.ReadFile("image"); err != nil || bytes.Contains(b, []byte(state[:100])) {
		t.Errorf("the vm state is not encrypted (%v)", err)
	}
	if r := run(t, "snapshot", "--export", "s", "--disk", "disk", "image"); r.Code != 1 || !strings.Contains(r.Stderr, "encrypt.key-secret") {
		t.Errorf("without a passphrase: %+v", r)
	}
	// Changes that need no guest data need no passphrase.
	mustRun(t, "snapshot", "-a", "s", "image")
	mustRun(t, "snapshot", "-d", "new", "image")
	oracle.MustRun(t, "qemu-img", append([]string{"check"}, secret()...)...)
}

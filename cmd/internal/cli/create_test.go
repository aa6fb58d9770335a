package cli_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"qimg/qcow2/blockdev/oracle"
)

// TestCreate makes the same image with qemu-img and with qimg: the same is
// printed, and qemu-img says the same of both.
func TestCreate(t *testing.T) {
	oracle.Require(t, "qemu-img")
	t.Chdir(t.TempDir())
	oracle.MustRun(t, "qemu-img", "create", "-f", "qcow2", "base.qcow2", "3M")
	writeFile(t, "base.raw", strings.Repeat("raw ", 5000))
	if err := os.Mkdir("sub", 0o777); err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		"-f raw x 1M",
		"x 1001",
		"-f raw -o size=1M x",
		"-f raw -o preallocation=falloc x 1M",
		"-f raw -o preallocation=full x 1M",
		"-f raw -o nocow=off,extent_size_hint=1M x 4k",
		"-f qcow2 x 0",
		"-f qcow2 x 1000",
		"-fqcow2 x 10G",
		"-f qcow2 -q x 10G",
		"-qf qcow2 x 10G",
		"x -f qcow2 10G",
		"-f qcow2 -o compat=0.10 x 64M",
		"-f qcow2 -o compat=v3 x 64M",
		"-f qcow2 -o cluster_size=512 x 64M",
		"-f qcow2 -o cluster_size=2M x 1T",
		"-f qcow2 -o cluster_size=4k -o refcount_bits=1 x 64M",
		"-f qcow2 -o refcount_bits=64,lazy_refcounts=on x 64M",
		"-f qcow2 -o extended_l2 x 64M",
		"-f qcow2 -o noextended_l2 x 64M",
		"-f qcow2 -o extended_l2=on,cluster_size=128k x 64M",
		"-f qcow2 -o compression_type=zstd x 64M",
		"-f qcow2 -o preallocation=off x 4M",
		"-f qcow2 -o preallocation=metadata x 4M",
		"-f qcow2 -o preallocation=falloc x 4M",
		"-f qcow2 -o preallocation=full x 4M",
		"-f qcow2 -o data_file=data x 4M",
		"-f qcow2 -o data_file=data,data_file_raw=on x 4M",
		"-f qcow2 -b base.qcow2 -F qcow2 x",
		"-f qcow2 -b base.qcow2 -F qcow2 x 8M",
		"-f qcow2 -b base.raw -F raw x",
		"-f qcow2 -o backing_file=base.raw,backing_fmt=raw x",
		"-f qcow2 -b ../base.qcow2 -F qcow2 sub/x",
		"-f qcow2 -u -b nope -F qcow2 x 1M",
		"-f qcow2 -u -b a,b -F qcow2 x 1M",
		"-f qcow2 -u -b base.qcow2 -F vmdk x 1M",
		"-f qcow2 -b file:base.qcow2 -F qcow2 x",
		`-f qcow2 -b json:{"driver":"raw","offset":512,"file.filename":"base.raw"} -F raw x`,
		"-f qcow2 -o backing_file=nope -b base.qcow2 -F qcow2 x",
		"-f qcow2 -o preallocation=metadata,extended_l2=on,backing_file=base.qcow2,backing_fmt=qcow2 x",
		"-f qcow2 -o data_file=file:data x 1000",
		"-f qcow2 -o data_file=data,backing_file=base.qcow2,backing_fmt=qcow2 x",
		"-f qcow2 -o data_file=data,preallocation=full x 1M",
		"-f qcow2 -o cluster_size=4k,cluster_size=8k x 1M",
		"-f qcow2 -o cluster_size=2M x 64T",
		"-f qcow2 -o size=2M x",
		"-f qcow2 file:x 1M",
		"-f qcow2 ./x 1M",
		"-f file x 1M",
		"-f file -o preallocation=falloc x 1M",
	} {
		args := append([]string{"create"}, strings.Fields(line)...)
		file := "x"
		if strings.Contains(line, "sub/x") {
			file = "sub/x"
		}
		want := oracle.Run(t, "qemu-img", args...)
		if want.Code != 0 {
			t.Fatalf("%s: %s", line, want.Stderr)
		}
		wantInfo := oracle.Run(t, "qemu-img", "info", file)
		wantMap := oracle.Run(t, "qemu-img", "map", "--output=json", file)
		os.Remove(file)
		os.Remove("data")
		if diff := cmp.Diff(want, run(t, args...)); diff != "" {
			t.Errorf("%s: -qemu-img +qimg\n%s", line, diff)
			continue
		}
		gotInfo := oracle.Run(t, "qemu-img", "info", file)
		if diff := cmp.Diff(withoutDiskSize(wantInfo), withoutDiskSize(gotInfo)); diff != "" {
			t.Errorf("%s: info: -qemu-img +qimg\n%s", line, diff)
		}
		// The first block of a raw image is written by QEMU alone, and what is
		// preallocated lies elsewhere.
		if strings.Contains(line, "qcow2 ") && (!strings.Contains(line, "preallocation=") || strings.Contains(line, "data_file")) {
			if diff := cmp.Diff(wantMap, oracle.Run(t, "qemu-img", "map", "--output=json", file)); diff != "" {
				t.Errorf("%s: map: -qemu-img +qimg\n%s", line, diff)
			}
		}
		if strings.Contains(line, "qcow2 ") && !strings.Contains(line, "-u ") {
			oracle.MustRun(t, "qemu-img", "check", "-f", "qcow2", file)
		}
		os.Remove(file)
		os.Remove("data")
	}
}

// TestCreateReplaces makes an image over an older file: by rename, not by
// writing into it.
func TestCreateReplaces(t *testing.T) {
	t.Chdir(t.TempDir())
	writeFile(t, "x", "old")
	if err := os.Link("x", "other"); err != nil {
		t.Fatal(err)
	}
	mustRun(t, "create", "-f", "qcow2", "x", "1M")
	if b, err := os.ReadFile("other"); err != nil || string(b) != "old" {
		t.Errorf("the older file was written to: %q, %v", b, err)
	}
	if r := run(t, "create", "-f", "qcow2", "-o", "refcount_bits=3", "x", "1M"); r.Code != 1 {
		t.Errorf("exit %d", r.Code)
	}
	if !strings.Contains(mustRun(t, "info", "x"), "file format: qcow2") {
		t.Error("a failed create touched the older image")
	}
}

// TestCreateOptions has qemu-img and qimg take and refuse the same values of -o,
// in the same words.
func TestCreateOptions(t *testing.T) {
	oracle.Require(t, "qemu-img")
	t.Chdir(t.TempDir())
	for _, option := range []string{
		"compat=0.10", "compat=1.1", "compat=v2", "compat=v3", "compat=3", "compat=", "cluster_size=64k", "cluster_size=4096",
		"cluster_size=0x10000", "cluster_size=0.5k", "cluster_size=1M", "cluster_size=3K", "cluster_size=foo", "cluster_size=64x",
		"cluster_size=-1", "cluster_size=0", "cluster_size=k", "cluster_size=", "cluster_size=9E", "cluster_size=16E",
		"refcount_bits=8", "refcount_bits=0x10", "refcount_bits=010", "refcount_bits=foo", "refcount_bits=", "refcount_bits=-",
		"refcount_bits=0", "refcount_bits=-1", "refcount_bits=128", "refcount_bits=4294967312", "lazy_refcounts=yes", "lazy_refcounts=off",
		"lazy_refcounts=", "lazy_refcounts=1", "extended_l2=on", "extended_l2=maybe", "data_file_raw=off", "data_file_raw=2",
		"compression_type=zstd", "compression_type=zlib", "compression_type=ZLIB", "compression_type=", "preallocation=metadata",
		"preallocation=full", "preallocation=", "backing_file=", "backing_fmt=", "backing_fmt=foo", "data_file=", "foo=bar",
	} {
		args := []string{"create", "-f", "qcow2", "-o", option, "x", "1M"}
		want := oracle.Run(t, "qemu-img", args...)
		wantInfo := oracle.Run(t, "qemu-img", "info", "x")
		os.Remove("x")
		if diff := cmp.Diff(want, run(t, args...)); diff != "" {
			t.Errorf("%s: -qemu-img +qimg\n%s", option, diff)
		} else if diff := cmp.Diff(withoutDiskSize(wantInfo), withoutDiskSize(oracle.Run(t, "qemu-img", "info", "x"))); want.Code == 0 && diff != "" {
			t.Errorf("%s: info: -qemu-img +qimg\n%s", option, diff)
		}
		os.Remove("x")
	}
}

// TestCreateSpace finds what space a raw image takes and whether it was
// written. QEMU itself always writes the first block.
func TestCreateSpace(t *testing.T) {
	oracle.Require(t, "qemu-img")
	t.Chdir(t.TempDir())
	for _, c := range []struct {
		mode, size string
		written    bool
	}{{"off", "0 B", false}, {"falloc", "8 MiB", false}, {"full", "8 MiB", true}} {
		mustRun(t, "create", "-f", "raw", "-o", "preallocation="+c.mode, "x", "8M")
		if info := oracle.MustRun(t, "qemu-img", "info", "-f", "raw", "x"); !strings.Contains(info, "disk size: "+c.size+"\n") {
			t.Errorf("preallocation=%s: expected %s:\n%s", c.mode, c.size, info)
		}
		m := oracle.MustRun(t, "qemu-img", "map", "-f", "raw", "x")
		if written := strings.Count(m, "\n") > 1; written != c.written {
			t.Errorf("preallocation=%s: written %v\n%s", c.mode, written, m)
		}
		os.Remove("x")
	}
}

// TestCreateRefused has qemu-img and qimg refuse the same, and qimg leave no
// file behind.
func TestCreateRefused(t *testing.T) {
	chain(t)
	before, _ := filepath.Glob("*")
	for _, line := range []string{
		`"" 1M`, `-f qcow2 "" 1M`, "sub 1M", "-f qcow2 sub/ 1M", "-f qcow2 -o data_file=sub x 1M", "-f qcow2 -o data_file=nope/d x 1M",
		"-f raw nope/x 1M", "x -1", "x 1e3", "x 9223372036854775807", "x 9223372036854775808", "-f qcow2 x 9223372036854775807",
		"-f qcow2 -o size=15E x", "-f qcow2 -o size=16E x", "-f qcow2 -o cluster_size=2M x 4E", "-f qcow2 -o cluster_size=512 x 129G",
		"-f raw -o preallocation=metadata x 1M", "-f raw -o preallocation= x 1M", "-f raw -o nocow=maybe x 1M", "-f raw -o cluster_size=64k x 1M",
		"-f qcow2 -b miss -F qcow2 x", "-f qcow2 -b miss2 -F qcow2 x", "-f qcow2 -b badbase -F qcow2 x", "-f qcow2 -b sub -F raw x 1M", "-f qcow2 -b x -F qcow2 x 1M",
		`-f qcow2 -b "" -F qcow2 x 1M`, `-f qcow2 -b a -F "" x 1M`, "-f qcow2 -b a -F foo x 1M", "-f qcow2 -u -b a -F foo x 1M", "-f qcow2 -b foo:x -F qcow2 x 1M",
		"-f qcow2 -b json:{ -F qcow2 x 1M", "-f qcow2 -b a x", "-f qcow2 -b hole x", "-f qcow2 -u -b nope -F raw x", "-f qcow2 -o backing_fmt=qcow2 x 1M",
		"-f qcow2 -o data_file=d,data_file_raw=on,backing_file=a,backing_fmt=qcow2 x", "-f qcow2 -o data_file_raw=on x 1M", "-f qcow2 -o compat=0.10,data_file=d x 1M",
		"-f qcow2 -o preallocation=metadata,backing_file=a,backing_fmt=qcow2 x", "-f qcow2 -o extended_l2=on,cluster_size=8k x 1M", "-f qcow2 -o a=b, x 1M",
		`-f qcow2 -o "" x 1M`, `-f "" x 1M`, "-f qcow2 foo:x 1M", "-f qcow2 --object secret,id=x x 1M",
	} {
		args := append([]string{"create"}, fields(line)...)
		want := oracle.Run(t, "qemu-img", args...)
		for _, left := range []string{"x", "d"} { // QEMU leaves what it began
			os.Remove(left)
		}
		got := run(t, args...)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: -qemu-img +qimg\n%s", line, diff)
		}
		if got.Code == 0 {
			t.Errorf("%s: not refused", line)
		}
		if after, _ := filepath.Glob("*"); !cmp.Equal(before, after) {
			t.Fatalf("%s: left behind: %s", line, cmp.Diff(before, after))
		}
	}
	r := run(t, "create", "-f", "qcow2", "-o", "data_file=./x", "x", "1M")
	if _, err := os.Stat("x"); r.Code != 1 || !strings.Contains(r.Stderr, `Failed to get shared "resize" lock`) || err == nil {
		t.Errorf("an image that is its own data file: %+v, %v", r, err)
	}
}

// TestCreateHelp compares the list of options.
func TestCreateHelp(t *testing.T) {
	oracle.Require(t, "qemu-img")
	for _, line := range []string{"-f qcow2 -o help", "-f qcow2 -o help x", "-o help", "-o size=1,help x", "-f foo -o help"} {
		same(t, append([]string{"create"}, strings.Fields(line)...)...)
	}
}

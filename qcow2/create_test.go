package qcow2_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/oracle"
)

type createCase struct {
	qemu string // options of qemu-img create, DIR for the directory
	size int64
	opts qcow2.CreateOptions
}

func createCases() []createCase {
	format := func(f qcow2.FormatOptions) qcow2.CreateOptions { return qcow2.CreateOptions{FormatOptions: f} }
	backing := qcow2.FormatOptions{BackingFile: "base", BackingFormat: "raw"}
	extended := qcow2.FormatOptions{ExtendedL2: true}
	return []createCase{
		{"", 0, qcow2.CreateOptions{}},
		{"", 700, qcow2.CreateOptions{}},
		{"", 1 << 30, qcow2.CreateOptions{}},
		{"", 1 << 40, qcow2.CreateOptions{}},
		{"-o compat=0.10", 1 << 30, format(qcow2.FormatOptions{Version: 2})},
		{"-o compat=1.1", 1 << 30, format(qcow2.FormatOptions{Version: 3})},
		{"-o cluster_size=512", 64 << 20, format(qcow2.FormatOptions{ClusterSize: 512})},
		{"-o cluster_size=512,compat=0.10", 64 << 20, format(qcow2.FormatOptions{ClusterSize: 512, Version: 2})},
		{"-o cluster_size=4k", 1 << 30, format(qcow2.FormatOptions{ClusterSize: 4096})},
		{"-o cluster_size=8k", 1 << 30, format(qcow2.FormatOptions{ClusterSize: 8192})},
		{"-o cluster_size=2M", 1 << 40, format(qcow2.FormatOptions{ClusterSize: 2 << 20})},
		{"-o refcount_bits=1", 1 << 30, format(qcow2.FormatOptions{RefcountBits: 1})},
		{"-o refcount_bits=64", 1 << 30, format(qcow2.FormatOptions{RefcountBits: 64})},
		{"-o lazy_refcounts=on", 1 << 30, format(qcow2.FormatOptions{LazyRefcounts: true})},
		{"-o extended_l2=on", 1 << 30, format(extended)},
		{"-o compression_type=zstd", 1 << 30, format(qcow2.FormatOptions{Compression: qcow2.CompressionZstd})},
		{"-u -b base -F raw", 1 << 30, format(backing)},
		{"-u -b base -F raw -o compat=0.10", 1 << 30, format(qcow2.FormatOptions{Version: 2, BackingFile: "base", BackingFormat: "raw"})},
		{"-u -b base -F raw -o cluster_size=512", 64 << 20, format(qcow2.FormatOptions{ClusterSize: 512, BackingFile: "base", BackingFormat: "raw"})},
		{"-o preallocation=metadata", 1<<30 + 512, qcow2.CreateOptions{Preallocation: qcow2.PreallocationMetadata}},
		{"-o preallocation=metadata,compat=0.10", 1 << 30, qcow2.CreateOptions{FormatOptions: qcow2.FormatOptions{Version: 2}, Preallocation: qcow2.PreallocationMetadata}},
		{"-o preallocation=metadata,cluster_size=512,refcount_bits=64", 8 << 20, qcow2.CreateOptions{FormatOptions: qcow2.FormatOptions{ClusterSize: 512, RefcountBits: 64}, Preallocation: qcow2.PreallocationMetadata}},
		{"-o preallocation=metadata,extended_l2=on", 1 << 30, qcow2.CreateOptions{FormatOptions: extended, Preallocation: qcow2.PreallocationMetadata}},
		{"-u -b base -F raw -o preallocation=metadata,extended_l2=on", 1 << 20, qcow2.CreateOptions{FormatOptions: qcow2.FormatOptions{ExtendedL2: true, BackingFile: "base", BackingFormat: "raw"}, Preallocation: qcow2.PreallocationMetadata}},
		{"-o preallocation=falloc", 4 << 20, qcow2.CreateOptions{Preallocation: qcow2.PreallocationFalloc}},
		{"-o preallocation=full", 4 << 20, qcow2.CreateOptions{Preallocation: qcow2.PreallocationFull}},
		{"-o data_file=DIR/data", 1<<20 + 512, qcow2.CreateOptions{}},
		{"-o data_file=DIR/data,data_file_raw=on", 1<<20 + 512, qcow2.CreateOptions{DataFileRaw: true}},
		{"-o data_file=DIR/data,preallocation=metadata", 1 << 20, qcow2.CreateOptions{Preallocation: qcow2.PreallocationMetadata}},
		{"-o data_file=DIR/data,preallocation=falloc", 1 << 20, qcow2.CreateOptions{Preallocation: qcow2.PreallocationFalloc}},
		{"-o data_file=DIR/data,data_file_raw=on,preallocation=full,extended_l2=on", 1 << 20, qcow2.CreateOptions{FormatOptions: extended, DataFileRaw: true, Preallocation: qcow2.PreallocationFull}},
	}
}

// createImage calls Create for files in dir.
func createImage(t *testing.T, dir string, c createCase) error {
	t.Helper()
	opts := c.opts
	create := func(name string) *blockdev.Output {
		out, err := blockdev.CreateFile(filepath.Join(dir, name), &blockdev.CreateOptions{NoSync: true})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { out.Abort() })
		return out
	}
	image := create("image")
	var data *blockdev.Output
	if strings.Contains(c.qemu, "data_file=") {
		data = create("data")
		opts.DataFile, opts.Data = filepath.Join(dir, "data"), data.File()
	}
	if err := qcow2.Create(context.Background(), image.File(), c.size, &opts); err != nil {
		return err
	}
	if data != nil {
		if err := data.Commit(); err != nil {
			t.Fatal(err)
		}
	}
	if err := image.Commit(); err != nil {
		t.Fatal(err)
	}
	return nil
}

// qemuCreate calls qemu-img create for files in dir.
func qemuCreate(t *testing.T, dir string, c createCase) oracle.Result {
	args := []string{"create", "-q", "-f", "qcow2"}
	args = append(args, strings.Fields(strings.ReplaceAll(c.qemu, "DIR", dir))...)
	return oracle.Run(t, "qemu-img", append(args, filepath.Join(dir, "image"), fmt.Sprint(c.size))...)
}

// qemuInfo is what qemu-img says of the image in dir, without what depends on
// the file system.
func qemuInfo(t *testing.T, dir string) string {
	t.Helper()
	s := oracle.MustRun(t, "qemu-img", "info", "-f", "qcow2", "--output=json", filepath.Join(dir, "image"))
	s = regexp.MustCompile(`"actual-size": \d+`).ReplaceAllString(s, "")
	return strings.ReplaceAll(s, dir, "DIR")
}

// headerOf is the header of the image in dir without the places of tables and
// the size of the refcount table, which QEMU makes larger than needed.
func headerOf(t *testing.T, dir string) []byte {
	t.Helper()
	f, err := os.Open(filepath.Join(dir, "image"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 512)
	if _, err := f.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	if binary.BigEndian.Uint64(b[40:]) != 0 {
		clear(b[40:48])
	}
	clear(b[48:60])
	return b
}

func TestCreate(t *testing.T) {
	oracle.Require(t, "qemu-img")
	for i, c := range createCases() {
		t.Run(fmt.Sprint(i), func(t *testing.T) { // a name that qemu-img takes in an option
			t.Log(c.size, c.qemu)
			root := t.TempDir()
			ours, theirs := filepath.Join(root, "a"), filepath.Join(root, "b")
			for _, dir := range []string{ours, theirs} {
				if err := os.Mkdir(dir, 0o777); err != nil {
					t.Fatal(err)
				}
				writeFile(t, filepath.Join(dir, "base"), []byte(strings.Repeat("base", 1<<18)))
			}
			if err := createImage(t, ours, c); err != nil {
				t.Fatal(err)
			}
			if r := qemuCreate(t, theirs, c); r.Code != 0 {
				t.Fatal(r.Stderr)
			}
			if d := cmp.Diff(qemuInfo(t, theirs), qemuInfo(t, ours)); d != "" {
				t.Errorf("qemu-img info (-theirs +ours):\n%s", d)
			}
			if d := cmp.Diff(headerOf(t, theirs), []byte(strings.ReplaceAll(string(headerOf(t, ours)), ours, theirs))); d != "" {
				t.Errorf("header (-theirs +ours):\n%s", d)
			}
			image := filepath.Join(ours, "image")
			if r := oracle.Run(t, "qemu-img", "check", "-f", "qcow2", image); r.Code != 0 {
				t.Errorf("qemu-img check: exit %d\n%s%s", r.Code, r.Stdout, r.Stderr)
			}
			// The status can differ where QEMU writes zeroes behind the end of the
			// disk, and where clusters are smaller than the blocks of the host.
			args := []string{"compare", "-f", "qcow2", "-F", "qcow2", image, filepath.Join(theirs, "image")}
			if c.size%65536 == 0 && (c.opts.ClusterSize == 0 || c.opts.ClusterSize >= 4096) {
				args = append(args, "-s")
			}
			if r := oracle.Run(t, "qemu-img", args...); r.Code != 0 {
				t.Errorf("qemu-img %s: exit %d\n%s%s", args, r.Code, r.Stdout, r.Stderr)
			}
			if !strings.Contains(c.qemu, "data_file=") {
				return
			}
			data, err := os.Stat(filepath.Join(ours, "data"))
			if err != nil {
				t.Fatal(err)
			}
			if data.Size() != c.size {
				t.Errorf("data file of %d bytes, expected %d", data.Size(), c.size)
			}
		})
	}
}

func TestCreateRefuses(t *testing.T) {
	oracle.Require(t, "qemu-img")
	format := func(f qcow2.FormatOptions) qcow2.CreateOptions { return qcow2.CreateOptions{FormatOptions: f} }
	name := strings.Repeat("n", 1024)
	for _, c := range []createCase{
		{"-o cluster_size=3k", 1 << 20, format(qcow2.FormatOptions{ClusterSize: 3072})},
		{"-o cluster_size=256", 1 << 20, format(qcow2.FormatOptions{ClusterSize: 256})},
		{"-o cluster_size=4M", 1 << 20, format(qcow2.FormatOptions{ClusterSize: 4 << 20})},
		{"-o extended_l2=on,cluster_size=8k", 1 << 20, format(qcow2.FormatOptions{ExtendedL2: true, ClusterSize: 8192})},
		{"-o extended_l2=on,compat=0.10", 1 << 20, format(qcow2.FormatOptions{ExtendedL2: true, Version: 2})},
		{"-o lazy_refcounts=on,compat=0.10", 1 << 20, format(qcow2.FormatOptions{LazyRefcounts: true, Version: 2})},
		{"-o refcount_bits=3", 1 << 20, format(qcow2.FormatOptions{RefcountBits: 3})},
		{"-o refcount_bits=128", 1 << 20, format(qcow2.FormatOptions{RefcountBits: 128})},
		{"-o refcount_bits=8,compat=0.10", 1 << 20, format(qcow2.FormatOptions{RefcountBits: 8, Version: 2})},
		{"-o compression_type=zstd,compat=0.10", 1 << 20, format(qcow2.FormatOptions{Compression: qcow2.CompressionZstd, Version: 2})},
		{"-o backing_fmt=raw", 1 << 20, format(qcow2.FormatOptions{BackingFormat: "raw"})},
		{"-u -F raw -b " + name, 1 << 20, format(qcow2.FormatOptions{BackingFormat: "raw", BackingFile: name})},
		{"-u -F raw -b x -o preallocation=metadata", 1 << 20, qcow2.CreateOptions{FormatOptions: qcow2.FormatOptions{BackingFormat: "raw", BackingFile: "x"}, Preallocation: qcow2.PreallocationMetadata}},
		{"-o data_file_raw=on", 1 << 20, qcow2.CreateOptions{DataFileRaw: true}},
		{"-u -F raw -b x -o data_file=DIR/data,data_file_raw=on", 1 << 20, qcow2.CreateOptions{FormatOptions: qcow2.FormatOptions{BackingFormat: "raw", BackingFile: "x"}, DataFileRaw: true}},
		{"-o data_file=DIR/data,compat=0.10", 1 << 20, format(qcow2.FormatOptions{Version: 2})},
		{"-o cluster_size=512", 1 << 40, format(qcow2.FormatOptions{ClusterSize: 512})},
		{"", 100 << 50, qcow2.CreateOptions{}},
	} {
		dir := t.TempDir()
		r := qemuCreate(t, dir, c)
		if r.Code == 0 {
			t.Fatalf("qemu-img create %s: no error", c.qemu)
		}
		os.Remove(filepath.Join(dir, "image"))
		err := createImage(t, dir, c)
		var opt qcow2.OptionError
		if !errors.As(err, &opt) {
			t.Errorf("%s: error %v, expected an OptionError", c.qemu, err)
			continue
		}
		if got := fmt.Sprintf("qemu-img: %s: %v\n", filepath.Join(dir, "image"), err); got != r.Stderr {
			t.Errorf("%s:\n%sqemu-img says:\n%s", c.qemu, got, r.Stderr)
		}
	}
	small := createCase{"", 1 << 20, format(qcow2.FormatOptions{ClusterSize: 512, BackingFile: name[:500]})}
	if err := createImage(t, t.TempDir(), small); err == nil {
		t.Error("a header larger than its cluster was written")
	}
}

// Preallocation has to take space, and a cancelled one to leave no image.
func TestCreatePreallocates(t *testing.T) {
	for _, prealloc := range []qcow2.Preallocation{qcow2.PreallocationFalloc, qcow2.PreallocationFull} {
		d, path := sparseFile(t)
		var last int64
		opts := qcow2.CreateOptions{Preallocation: prealloc, Progress: func(done, total int64) {
			if done <= last || total != 8<<20 {
				t.Errorf("progress %d of %d after %d", done, total, last)
			}
			last = done
		}}
		if err := qcow2.Create(context.Background(), d, 8<<20, &opts); err != nil {
			t.Fatal(err)
		}
		info := oracle.MustRun(t, "qemu-img", "info", "--output=json", path)
		var size int64
		if m := regexp.MustCompile(`"actual-size": (\d+)`).FindStringSubmatch(info); m != nil {
			fmt.Sscan(m[1], &size)
		}
		if size < 8<<20 {
			t.Errorf("%v: the image takes %d bytes", prealloc, size)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	m := blockdev.NewMemory(0)
	if err := qcow2.Create(ctx, m, 8<<20, &qcow2.CreateOptions{Preallocation: qcow2.PreallocationFull}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	b := make([]byte, 4)
	if _, err := m.ReadAt(b, 0); err != nil || binary.BigEndian.Uint32(b) != 0 {
		t.Errorf("cancelled: the header is there: %x, %v", b, err)
	}
}

package cli_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"qimg/qcow2/blockdev/oracle"
)

func TestResizeMessages(t *testing.T) {
	oracle.Require(t, "qemu-img")
	tw := newRivals(t)
	tw.qemu("qemu-img", "create", "-q", "-f", "raw", "raw", "1M")
	tw.qemu("qemu-img", "create", "-q", "-f", "qcow2", "base", "10M")
	tw.qemu("qemu-img", "create", "-q", "-f", "qcow2", "v3", "4M")
	tw.qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10", "v2", "4M")
	tw.qemu("qemu-img", "snapshot", "-c", "a", "v2")
	tw.qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "over", "4M")
	tw.qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=v2", "-b", "base", "-F", "qcow2", "over2", "4M")
	for _, line := range []string{
		"resize",
		"resize v3",
		"resize v3 raw v2 1",
		"resize -Z v3 1",
		"resize -f v3",
		"resize v3 abc",
		"resize v3 +",
		"resize v3 ",
		"resize v3 99999999999999999999",
		"resize v3 0",
		"resize v3 -4M",
		"resize v3 -- -5M",
		"resize v3 1M",
		"resize v3 -1M",
		"resize v3 1000",
		"resize --shrink v3 1000",
		"resize v3 +1000",
		"resize v3 1E",
		"resize v3 7E",
		"resize v3 9E",
		"resize v3 4294967296G",
		"resize --preallocation=foo v3 +1M",
		"resize --preallocation=full v3 4M",
		"resize --preallocation=full --shrink v3 -1M",
		"resize nope 1M",
		"resize -f foo v3 1M",
		"resize -f qcow2 raw 2M",
		"resize v2 5M",
		"resize over2 8M",
		"resize v3 4M",
		"resize v3 ++1M",
		"resize --shrink v3 -1M",
		"resize -q v3 +1M",
		"resize --image-opts driver=qcow2,file.filename=v3 +1M",
		"resize raw +1M",
		"resize -f raw raw 1001",
		"resize -f raw raw +1k",
		"resize -f raw --shrink raw -1k",
		"resize -f raw --shrink raw 1025",
		"resize -f raw --preallocation=metadata raw +1M",
		"resize -f raw --preallocation=falloc raw +1M",
		"resize -f raw --preallocation=full raw +1M",
		"resize --image-opts driver=raw,size=512,file.filename=raw +1M",
		"resize --image-opts driver=raw,offset=512,file.filename=raw +1M",
	} {
		tw.same(strings.Split(line, " ")...)
	}
	for _, file := range []string{"v2", "v3", "over", "over2", "raw"} {
		tw.alike(file, true)
	}
	size := tw.lengths("raw")
	if size[0] != size[1] {
		t.Errorf("raw files of %d bytes by qemu-img, %d by qimg", size[0], size[1])
	}
}

// Images of many kinds are resized by both programs, several times.
func TestResize(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	dir := t.TempDir()
	base := filepath.Join(dir, "base")
	oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "raw", base, "6M")
	oracle.MustRun(t, "qemu-io", "-f", "raw", "-c", "write -P 9 0 6M", base)
	for i, create := range []string{
		"",
		"compat=0.10",
		"cluster_size=512",
		"cluster_size=512,refcount_bits=64",
		"cluster_size=4k,refcount_bits=1",
		"cluster_size=2M",
		"extended_l2=on",
		"extended_l2=on,cluster_size=16k,backing_file=" + base + ",backing_fmt=raw",
		"backing_file=" + base + ",backing_fmt=raw",
		"preallocation=metadata,cluster_size=4k",
		"data_file=data",
		"data_file=data,data_file_raw=on",
	} {
		snapshot := i%2 == 0 && !strings.Contains(create, "data_file") && i != 4
		t.Run(create, func(t *testing.T) {
			tw := newRivals(t)
			args := []string{"create", "-q", "-f", "qcow2"}
			if create != "" {
				args = append(args, "-o", create)
			}
			tw.qemu("qemu-img", append(args, "x", "4M")...)
			tw.qemu("qemu-io", "-c", "write -P 1 0 500k", "-c", "write -P 2 2M 100k", "-c", "write -P 3 4190208 4096", "-c", "write -z 1M 200k", "x")
			if snapshot {
				tw.in(tw.dirs[0], func() { oracle.MustRun(t, "qemu-img", "snapshot", "-c", "a", "x") })
				copySparse(t, filepath.Join(tw.dirs[0], "x"), filepath.Join(tw.dirs[1], "x"))
				tw.qemu("qemu-io", "-c", "write -P 4 64k 100k", "x")
			}
			// Where qemu-img shows what was cut off, or what was in clusters
			// before, qimg shows zeroes, as a file that becomes longer.
			model := filepath.Join(t.TempDir(), "model")
			tw.in(tw.dirs[0], func() { oracle.MustRun(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", "x", model) })
			grown := "1G" // beyond one L2 table
			if strings.Contains(create, "cluster_size=512") || strings.Contains(create, "raw=on") {
				grown = "9M" // which qemu-img map needs no minutes for
			}
			for _, size := range []string{"5M", "5123k", "--preallocation=metadata 6M", "--preallocation=falloc 7M", "--preallocation=full 8M",
				"--shrink 7340544", "--shrink 3M", grown, "--shrink 2M", "--shrink 128k"} {
				args := append([]string{"resize", "-f", "qcow2"}, strings.Fields(size)...)
				tw.same(append(args[:len(args)-1:len(args)-1], "x", args[len(args)-1])...)
				virtual, _ := sizes(t, filepath.Join(tw.dirs[0], "x"))
				if err := os.Truncate(model, virtual); err != nil {
					t.Fatal(err)
				}
				tw.alikeBut("x", model, true)
				if t.Failed() {
					t.Fatal("at ", size)
				}
			}
			if snapshot {
				compareSnapshots(t, filepath.Join(tw.dirs[0], "x"), filepath.Join(tw.dirs[1], "x"))
			}
			if strings.Contains(create, "data_file") {
				if end := tw.lengths("data"); end[0] != end[1] {
					t.Errorf("data files of %d bytes by qemu-img, %d by qimg", end[0], end[1])
				}
			}
			end := tw.lengths("x")
			// Tables that are written anew leave a gap of a few clusters.
			if _, cluster := sizes(t, filepath.Join(tw.dirs[0], "x")); end[1] > end[0]+3*cluster {
				t.Errorf("file of %d bytes, qemu-img's has %d", end[1], end[0])
			}
		})
	}
}

// lengths returns the lengths of a file in both folders.
func (tw *rivals) lengths(file string) (n [2]int64) {
	tw.t.Helper()
	for i, dir := range tw.dirs {
		fi, err := os.Stat(filepath.Join(dir, file))
		if err != nil {
			tw.t.Fatal(err)
		}
		n[i] = fi.Size()
	}
	return n
}

// A file whose end becomes free gets short, whatever lay there.
func TestResizeShrinkFile(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	for _, create := range []string{"cluster_size=4k", "cluster_size=4k,refcount_bits=64", "compat=0.10"} {
		for _, bitmaps := range []bool{false, true} {
			if bitmaps && create == "compat=0.10" {
				continue
			}
			t.Run(fmt.Sprint(create, " ", bitmaps), func(t *testing.T) {
				tw := newRivals(t)
				tw.qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", create, "x", "64M")
				if bitmaps {
					tw.qemu("qemu-img", "bitmap", "--add", "-g", "512", "x", "b0")
				}
				tw.qemu("qemu-io", "-c", "write -P 1 0 40M", "x")
				before := tw.lengths("x")[1]
				tw.same("resize", "--shrink", "x", "1M")
				tw.alike("x", true)
				// Tables that are written anew leave a gap of a few clusters.
				_, cluster := sizes(t, filepath.Join(tw.dirs[0], "x"))
				end := tw.lengths("x")
				if t.Logf("%d bytes, then %d by qemu-img, %d by qimg", before, end[0], end[1]); end[1] > end[0]+8*cluster {
					t.Error("qimg leaves more")
				}
			})
		}
	}
}

// sizes returns the sizes of a disk and of its clusters.
func sizes(t *testing.T, path string) (virtual, cluster int64) {
	t.Helper()
	var info struct {
		Size    int64 `json:"virtual-size"`
		Cluster int64 `json:"cluster-size"`
	}
	if err := json.Unmarshal([]byte(oracle.MustRun(t, "qemu-img", "info", "--output=json", path)), &info); err != nil {
		t.Fatal(err)
	}
	return info.Size, info.Cluster
}

// What a disk gains reads as zeroes, also where an earlier one was cut inside a
// cluster.
func TestResizeTail(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	t.Chdir(t.TempDir())
	for _, version := range []string{"0.10", "1.1"} {
		for _, snapshot := range []bool{false, true} {
			if snapshot && version == "0.10" {
				continue
			}
			t.Run(fmt.Sprint(version, snapshot), func(t *testing.T) {
				oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat="+version, "x", "1M")
				oracle.MustRun(t, "qemu-io", "-c", "write -P 1 0 1M", "x")
				if snapshot {
					oracle.MustRun(t, "qemu-img", "snapshot", "-c", "a", "x")
				}
				mustRun(t, "resize", "--shrink", "x", "513k")
				mustRun(t, "resize", "x", "1M")
				oracle.MustRun(t, "qemu-io", "-c", "read -P 1 0 513k", "-c", "read -P 0 513k 511k", "x")
				if r := oracle.Run(t, "qemu-io", "-c", "read -P 1 0 513k", "-c", "read -P 0 513k 511k", "x"); strings.Contains(r.Stdout, "failed") {
					t.Error(r.Stdout)
				}
				oracle.MustRun(t, "qemu-img", "check", "x")
				if snapshot {
					oracle.MustRun(t, "qemu-img", "convert", "-l", "a", "-O", "raw", "x", "raw")
					if r := oracle.Run(t, "qemu-io", "-f", "raw", "-c", "read -P 1 0 1M", "raw"); strings.Contains(r.Stdout, "failed") {
						t.Error("snapshot: ", r.Stdout)
					}
				}
			})
		}
	}
}

package cli_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"qimg/qcow2/blockdev/oracle"
)

// TestMeasureZoo measures every image of the zoo for both formats.
func TestMeasureZoo(t *testing.T) {
	files := zoo(t)
	// qemu-img does not end on these, or takes minutes.
	files = slices.DeleteFunc(files, func(f string) bool {
		return f == "chain-loop.qcow2" || slices.Contains([]string{"huge-1e-cs2m.qcow2", "huge-1p-cs2m.qcow2"}, f)
	})
	options := []string{"", "cluster_size=512", "cluster_size=2M,extended_l2=on", "compat=0.10", "refcount_bits=1,cluster_size=4k"}
	bitmaps := 0
	for i, file := range files {
		if testing.Short() && i%8 != 0 {
			continue
		}
		lines := [][]string{{"measure", "-O", "qcow2", "--output=json", file}, {"measure", "-U", file}}
		if o := options[i%len(options)]; o != "" {
			lines[0] = append(lines[0], "-o", o)
		}
		for _, args := range lines {
			want, got := oracle.Run(t, "qemu-img", args...), run(t, args...)
			want.Stderr, got.Stderr = firstError(want.Stderr), firstError(got.Stderr)
			if strings.Contains(want.Stdout, "bitmaps") {
				bitmaps++
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%q: -qemu-img +qimg\n%s", args, diff)
			}
		}
	}
	if bitmaps < 50 && !testing.Short() {
		t.Errorf("bitmaps of %d images, expected more", bitmaps)
	}
}

// TestMeasure measures on many command lines.
func TestMeasure(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	t.Chdir(t.TempDir())
	for _, line := range []string{
		"create -q -f qcow2 a 5M", "create -q -f qcow2 -b a -F qcow2 over 6M", "create -q -f raw raw 3M",
		"create -q -f qcow2 -o preallocation=metadata pre 4M", "create -q -f qcow2 -o compat=0.10 old 4M",
		"bitmap --add a one", "bitmap --add -g 512 a a-longer-name", "resize -q a 7M", "snapshot -c snap a",
	} {
		oracle.MustRun(t, "qemu-img", strings.Fields(line)...)
	}
	for _, name := range []string{"a", "over", "raw", "pre", "old"} {
		format := "qcow2"
		if name == "raw" {
			format = "raw"
		}
		oracle.MustRun(t, "qemu-io", "-f", format, "-c", "write 100k 100k", "-c", "write 400k 1", "-c", "write -z 1M 100k", "-c", "write 1500k 700k", name)
	}
	writeFile(t, "odd", strings.Repeat("o", 70001))
	for _, line := range []string{
		"", "a a", "-f qcow2", "--image-opts", "-U", "--size 1G a", "nope", "-f foo a", "-f raw a", "-f qcow2 raw", "--image-opts -f raw a",
		"--size x", "--size -1", "--size 8E", "--size 9223372036854775807", "--size 0", "--size 1", "--size 1T -O qcow2", "--size 1 -O qcow2", "--size 0 -O qcow2",
		"--size 9223372036854775807 -O qcow2", "--size 8191P -O qcow2 -o cluster_size=2M", "--size 1G --output json", "--output=xml --size 1G",
		"--size 1G -O foo", "--size 1G -O vmdk", "--size 1G -O file", "--size 1G -O nbd", "-O foo nope", "-O foo a",
		"--size 1G -o foo", "--size 1G -O qcow2 -o foo=1", "--size 1G -O qcow2 -o help", "--size 1G -O qcow2 -o ,,", "--size 1G -o preallocation=foo",
		"--size 1G -O qcow2 -o preallocation=foo", "--size 1G -O qcow2 -o preallocation=full", "--size 1G -O qcow2 -o preallocation=falloc",
		"--size 1G -O qcow2 -o preallocation=metadata", "--size 1G -O qcow2 -o cluster_size=0", "--size 1G -O qcow2 -o cluster_size=3000",
		"--size 1G -O qcow2 -o cluster_size=4M", "--size 1G -O qcow2 -o cluster_size=8k,extended_l2=on", "--size 1G -O qcow2 -o extended_l2=on",
		"--size 1G -O qcow2 -o compat=v3", "--size 1G -O qcow2 -o compat=v2", "--size 1G -O qcow2 -o compat=0.10,extended_l2=on",
		"--size 1G -O qcow2 -o compat=0.10,refcount_bits=8", "--size 1G -O qcow2 -o compat=0.10,refcount_bits=16",
		"--size 1G -O qcow2 -o refcount_bits=0", "--size 1G -O qcow2 -o refcount_bits=3", "--size 1G -O qcow2 -o refcount_bits=128",
		"--size 1G -O qcow2 -o lazy_refcounts=on,compat=0.10", "--size 1G -O qcow2 -o compression_type=foo", "--size 1G -O qcow2 -o size=2G",
		"-O qcow2 -o size=1G", "-O qcow2 -o size=8191P a", "-O qcow2 -o size=1T a", "-O raw -o size=1T a",
		"--size 1G -O qcow2 -o encrypt.format=luks", "--size 1G -O qcow2 -o encrypt.format=luks,encrypt.key-secret=s",
		"--object secret,id=s,data=x --size 1G -O qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,encrypt.cipher-alg=aes-128,encryption=on,cluster_size=4k",
		"--object secret,id=s,data=x -O qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.cipher-alg=foo a",
		"--size 1G -O qcow2 -o encrypt.format=aes", "--size 1G -O qcow2 -o encrypt.format=foo", "--size 1G -O qcow2 -o encryption=on",
		"-O qcow2 -o backing_file=x a", "-O qcow2 -o backing_file=,backing_fmt=foo a", "--size 1G -O qcow2 -o backing_file=x",
		"-O qcow2 -o backing_fmt=raw a", "-O qcow2 -o data_file=x a", "-O qcow2 -o preallocation=full a", "-O qcow2 -o compat=0.10 a",
		"-O qcow2 a", "-O qcow2 over", "-O qcow2 pre", "-O qcow2 old", "-O qcow2 raw", "-O qcow2 -f raw odd", "-f raw odd", "over", "--output json over",
		"-O qcow2 -o cluster_size=512 --output json a", "-O qcow2 -o cluster_size=512 pre", "-O qcow2 -U a", "-O qcow2 -o nocow=on a",
		"-l snap", "-l snap --size 1G", "-l snap -O qcow2 a", "-l 1 -O qcow2 a", "-l nope a", "-l snap raw", "-l snap nope", "-l snapshot.name=snap -O qcow2 a",
		"-l snapshot.id=1,snapshot.name=snap a", "-l snapshot.id=snap a", "-l snapshot.foo=1 a",
		"--image-opts -O qcow2 driver=qcow2,file.filename=a", "--image-opts driver=raw,file.filename=raw,offset=512",
	} {
		same(t, append([]string{"measure"}, strings.Fields(line)...)...)
	}
	holdImage(t, "a")
	same(t, "measure", "-O", "qcow2", "a")
	same(t, "measure", "-O", "qcow2", "-U", "a")
}

// TestMeasureRandom measures disks of any size for images of any kind.
func TestMeasureRandom(t *testing.T) {
	oracle.Require(t, "qemu-img")
	r := rand.New(rand.NewPCG(5, 5))
	for range 120 {
		size := r.Int64N(1 << (10 + r.IntN(53)))
		options := fmt.Sprintf("cluster_size=%d,refcount_bits=%d", 512<<r.IntN(13), 1<<r.IntN(7))
		if r.IntN(2) == 0 {
			options += ",extended_l2=on"
		}
		same(t, "measure", "-O", "qcow2", "-o", options, "--size", fmt.Sprint(size))
	}
}

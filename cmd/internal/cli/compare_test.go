package cli_test

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"qimg/qcow2/blockdev/oracle"
)

// TestCompareZoo compares every image of the zoo with its conversion to raw and
// with the next image.
func TestCompareZoo(t *testing.T) {
	files := zoo(t)
	dir := t.TempDir()
	files = slices.DeleteFunc(files, func(f string) bool { return f == "chain-loop.qcow2" || strings.HasPrefix(f, "huge-") })
	identical := 0
	for i, file := range files {
		if testing.Short() && i%8 != 0 {
			continue
		}
		lines := [][]string{{"compare", file, files[(i+1)%len(files)]}}
		raw := filepath.Join(dir, file+".raw")
		if oracle.Run(t, "qemu-img", "convert", "-O", "raw", file, raw).Code == 0 {
			lines = [][]string{{"compare", raw, file}, {"compare", "-s", "-U", file, raw}, {"compare", "-s", file, files[(i+1)%len(files)]}}
		}
		for _, args := range lines {
			want, got := oracle.Run(t, "qemu-img", args...), run(t, args...)
			if want.Stdout == "Images are identical.\n" {
				identical++
			}
			want.Stderr, got.Stderr = firstError(want.Stderr), firstError(got.Stderr)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%q: -qemu-img +qimg\n%s", args, diff)
			}
		}
		os.Remove(raw)
	}
	if identical < 90 && !testing.Short() {
		t.Errorf("%d images are identical, expected more", identical)
	}
}

// firstError is what a message of qemu-img says before the cause, without what
// the format driver says itself.
func firstError(s string) string {
	i := max(strings.Index(s, "qemu-img: "), 0)
	return errorCause.ReplaceAllString(firstPart(s[i:]), "$1")
}

var errorCause = regexp.MustCompile(`(?s)(block status|failed for [^:\n]*|offset \d+ of [^:\n]*).*`)

// TestCompare compares images of different sizes, formats, content and
// allocation, on many command lines.
func TestCompare(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	t.Chdir(t.TempDir())
	for _, line := range []string{
		"create -q -f qcow2 a 4M",
		"create -q -f qcow2 long 5M",
		"create -q -f qcow2 -o compat=0.10 empty 4M",
		"create -q -f raw hole 4M",
		"create -q -f qcow2 -o preallocation=metadata pre 4M",
	} {
		oracle.MustRun(t, "qemu-img", strings.Fields(line)...)
	}
	for _, name := range []string{"a", "long", "pre"} {
		oracle.MustRun(t, "qemu-io", "-c", "write -P 3 100k 1M", "-c", "write -z 2M 100k", name)
	}
	for _, line := range []string{
		"convert -O raw a raw", "convert -c -O qcow2 a packed", "convert -O qcow2 -o cluster_size=512 a small",
		"create -q -f qcow2 -b a -F qcow2 over", "create -q -f qcow2 -b a -F qcow2 overlong 6M", "create -q -f qcow2 -b raw -F raw differs",
	} {
		oracle.MustRun(t, "qemu-img", strings.Fields(line)...)
	}
	oracle.MustRun(t, "qemu-io", "-c", "write -P 1 4718599 1", "long")
	oracle.MustRun(t, "qemu-io", "-c", "write -P 3 700001 300", "-c", "write -P 4 701001 300", "differs")
	writeFile(t, "odd", strings.Repeat("o", 1000))
	writeFile(t, "odder", strings.Repeat("o", 1000)+strings.Repeat("\x00", 20)+"x")
	oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=abc", "-o", "encrypt.format=aes,encrypt.key-secret=s", "aes", "4M")
	for _, line := range []string{
		"", "a", "a a a", "-f", "-Z a a", "a nope", "nope a", "nope nada", "-p -q nope a", "-p a nope",
		"-T foo a a", "-p -T foo a a", "-T none a a", "-f foo a a", "-F foo a a", "-f raw a a", "-F raw a a", "-f raw -F raw a a", "-F qcow2 a raw",
		"a raw", "raw a", "-q a raw", "-s a raw", "-q -s a raw", "a packed", "-s a packed", "a small", "-s a small", "a pre", "-s a pre",
		"a empty", "empty a", "empty hole", "-s empty hole", "-s hole hole", "-s a a", "-q a empty",
		"a long", "long a", "-s a long", "-q a long", "a overlong", "overlong a", "overlong long", "-s over a", "-s a over", "over raw",
		"a differs", "differs a", "raw differs", "-s raw differs", "differs long",
		"-f raw -F raw odd odd", "-f raw -F raw odd odder", "-f raw -F raw -s odder odd", "-f raw odd hole", "-U a raw",
		"--image-opts driver=qcow2,file.filename=a driver=raw,file.filename=raw", "--image-opts -f qcow2 a a",
		"--image-opts a nope", "--image-opts driver=foo a", "-U --image-opts driver=qcow2,file.filename=a,force-share=off a",
		"--image-opts driver=raw,file.filename=odd,size=512 driver=raw,file.filename=odder,size=512",
		"--object foo a a", "--object secret,id=s,data=abc --object secret,id=s,data=abc a a",
		"--object secret,id=s,data=abc --image-opts driver=qcow2,file.filename=aes,encrypt.key-secret=s driver=raw,file.filename=hole",
		"--object secret,id=s,data=abc --image-opts driver=qcow2,file.filename=aes driver=raw,file.filename=hole",
	} {
		same(t, append([]string{"compare"}, strings.Fields(line)...)...)
	}
	release := holdImage(t, "a")
	same(t, "compare", "a", "raw")
	same(t, "compare", "-U", "a", "raw")
	release()

	got := run(t, "compare", "-p", "a", "raw")
	want := regexp.MustCompile(`^    \(0\.00/100%\)\r(    \(\d+\.\d\d/100%\)\r)*    \(100\.00/100%\)\rImages are identical\.\n\n$`)
	if got.Code != 0 || got.Stderr != "" || !want.MatchString(got.Stdout) {
		t.Errorf("%+v", got)
	}
}

// TestCompareReadError tells which of two images cannot be read, and where.
func TestCompareReadError(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	t.Chdir(t.TempDir())
	oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "raw", "raw", "3M")
	oracle.MustRun(t, "qemu-io", "-f", "raw", "-c", "write -P 3 0 3M", "raw")
	oracle.MustRun(t, "qemu-img", "convert", "-c", "-O", "qcow2", "raw", "bad")
	b, err := os.ReadFile("bad")
	if err != nil {
		t.Fatal(err)
	}
	l1 := binary.BigEndian.Uint64(b[40:])
	l2 := binary.BigEndian.Uint64(b[l1:]) & 0x00fffffffffffe00
	at := binary.BigEndian.Uint64(b[l2+8*30:]) & (1<<54 - 1) // cluster 30
	copy(b[at:], "\xff\xff\xff\xff\xff\xff")
	writeFile(t, "bad", string(b))
	for _, line := range []string{"bad raw", "raw bad", "bad bad"} {
		args := append([]string{"compare"}, strings.Fields(line)...)
		want, got := oracle.Run(t, "qemu-img", args...), run(t, args...)
		want.Stderr, got.Stderr = firstError(want.Stderr), firstError(got.Stderr)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%q: -qemu-img +qimg\n%s", args, diff)
		}
	}
}

// TestCompareRandom compares and measures the layers of random chains.
func TestCompareRandom(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	for seed := range uint64(6) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Chdir(t.TempDir())
			r := rand.New(rand.NewPCG(seed, 6))
			chain := randomChain(t, r)
			top := chain[len(chain)-1].name
			oracle.MustRun(t, "qemu-img", "convert", "-O", []string{"raw", "qcow2"}[r.IntN(2)], top, "flat")
			for _, l := range append(chain, &layer{name: "flat"}) {
				same(t, "compare", top, l.name)
				same(t, "compare", "-s", l.name, top)
				same(t, "measure", "-O", "qcow2", "-o", fmt.Sprintf("cluster_size=%d", 512<<r.IntN(13)), l.name)
			}
		})
	}
}

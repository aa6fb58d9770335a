package cli_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"qimg/qcow2/blockdev/oracle"
)

// dd prints what qemu-img prints and makes the same disk, and nothing if it
// fails.
func TestDD(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	t.Chdir(t.TempDir())
	for _, line := range []string{
		"create -q -f raw raw 3M", "create -q -f qcow2 a 4M", "create -q -f qcow2 -b a -F qcow2 top",
	} {
		oracle.MustRun(t, "qemu-img", strings.Fields(line)...)
	}
	oracle.MustRun(t, "qemu-io", "-f", "raw", "-c", "write -P 1 100k 1M", "-c", "write -P 2 2097153 3000", "raw")
	oracle.MustRun(t, "qemu-io", "-c", "write -P 3 0 2M", "-c", "write -z 300k 300k", "-c", "write -P 4 3M 1M", "a")
	oracle.MustRun(t, "qemu-io", "-c", "write -P 5 1M 100k", "top")
	writeFile(t, "odd", strings.Repeat("odd", 1000))
	writeFile(t, "dir.txt", "")
	oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=abc", "-o", "encrypt.format=aes,encrypt.key-secret=s", "aes", "1M")
	for _, line := range []string{
		"", "if=raw", "of=out", "foo", "foo=1", "if=raw of=out foo", "if=nope of=out", "if= of=out", "if=raw of=", "if=raw of=. count=1",
		"if=raw of=nope/out", "if=raw of=foo:x", "-Z if=raw of=out", "-f if=raw",
		"-f foo if=raw of=out", "-f qcow2 if=raw of=out", "-O foo if=raw of=out", "-O foo if=nope of=out",
		"bs=0 if=raw of=out", "bs=2G if=raw of=out", "bs=x if=raw of=out", "bs=-1 if=raw of=out", "count=x", "count=-1", "skip=x", "skip=9E", "bs=1.5k if=raw of=out",
		"if=raw of=out", "-f raw -O raw if=raw of=out", "-O file if=raw of=out", "-O qcow2 if=raw of=out", "-O qcow2 if=a of=out", "if=a of=out", "-f raw if=a of=out",
		"if=top of=out", "-O qcow2 if=top of=out", "-U if=top of=out", "-O qcow2 -U if=a bs=1M skip=1 of=out",
		"if=odd -f raw of=out", "-O qcow2 if=odd -f raw of=out", "-f raw if=odd of=out bs=1 skip=7 count=1000", "-f raw if=odd of=out bs=1000 skip=2",
		"bs=1M count=2 if=a of=out", "bs=64k count=20 skip=3 if=a of=out", "bs=1 count=5 if=a of=out", "bs=1000 count=3000 skip=3 -O qcow2 if=a of=out",
		"count=0 if=a of=out", "-O qcow2 count=0 if=a of=out", "count=2 skip=1 if=a of=out", "count=1 skip=1 if=a of=out", "count=1 skip=2 if=a of=out",
		"skip=8192 if=a of=out", "skip=8193 if=a of=out", "-O qcow2 skip=99999 if=a of=out", "skip=9223372036854775807 bs=2 if=a of=out",
		"count=9223372036854775807 bs=1M if=a of=out", "count=1 count=3 skip=1 if=raw if=a of=x of=out", "bs=2147483647 if=a of=out",
		"if=raw of=dir.txt", "-O qcow2 if=a of=dir.txt",
		"--image-opts if=driver=qcow2,file.filename=a of=out", "--image-opts -f raw if=a of=out",
		"--object secret,id=s,data=abc --image-opts if=encrypt.key-secret=s,file.filename=aes of=out", "if=aes of=out",
		"-- if=raw of=out count=3",
	} {
		t.Run(line, func(t *testing.T) {
			output := "out"
			if strings.Contains(line, "dir.txt") {
				output = "dir.txt"
			}
			args := append([]string{"dd"}, strings.Fields(line)...)
			want := oracle.Run(t, "qemu-img", args...)
			theirs, err := os.ReadFile(output)
			made := err == nil
			if made {
				defer os.Remove(output)
				defer os.Remove("theirs")
				if err := os.Rename(output, "theirs"); err != nil {
					t.Fatal(err)
				}
			}
			if diff := cmp.Diff(want, run(t, args...)); diff != "" {
				t.Fatalf("-qemu-img +qimg\n%s", diff)
			}
			ours, err := os.ReadFile(output)
			if (err == nil) != made {
				t.Fatal(err)
			}
			if !made || bytes.Equal(theirs, ours) {
				return
			}
			format := "raw"
			if bytes.HasPrefix(theirs, []byte("QFI\xfb")) && !strings.Contains(line, "-f raw if=a") {
				format = "qcow2"
				oracle.MustRun(t, "qemu-img", "check", output)
			}
			oracle.MustRun(t, "qemu-img", "compare", "-f", format, "-F", format, "theirs", output)
			if a, b := headerText(t, ".", "theirs"), headerText(t, ".", output); format == "qcow2" && strings.ReplaceAll(a, "theirs", output) != b {
				t.Errorf("%s%s", a, b)
			}
			if format == "raw" && len(theirs) != len(ours) {
				t.Errorf("%d bytes, %d of qemu-img", len(ours), len(theirs))
			}
		})
	}
	holdImage(t, "a")
	same(t, "dd", "if=a", "of=out")
	if _, err := os.Stat("out"); !errors.Is(err, fs.ErrNotExist) {
		t.Error("an output was made of an image in use")
	}
}

// dd refuses to write what it reads, which qemu-img does not, and leaves an older
// output as it was when it fails.
func TestDDKeeps(t *testing.T) {
	oracle.Require(t, "qemu-img")
	t.Chdir(t.TempDir())
	writeFile(t, "raw", strings.Repeat("data", 1024))
	oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "raw", "-F", "raw", "top")
	for _, line := range []string{"-f raw if=raw of=raw", "-f raw if=raw of=./raw", "if=top of=raw", "if=top of=top", "-O qcow2 if=top of=raw"} {
		before := filesOf(t, ".")
		if r := run(t, append([]string{"dd"}, strings.Fields(line)...)...); r.Code != 1 || !strings.Contains(r.Stderr, "error while creating output image") {
			t.Errorf("%s: %+v", line, r)
		}
		if diff := cmp.Diff(before, filesOf(t, ".")); diff != "" {
			t.Error(diff)
		}
	}
	if b, err := os.ReadFile("raw"); err != nil || string(b) != strings.Repeat("data", 1024) {
		t.Error("the input was changed")
	}
	oracle.MustRun(t, "qemu-img", "convert", "-c", "-O", "qcow2", "-f", "raw", "raw", "bad")
	b, err := os.ReadFile("bad")
	if err != nil {
		t.Fatal(err)
	}
	copy(b[len(b)-512:], bytes.Repeat([]byte{0xff}, 512))
	writeFile(t, "bad", string(b))
	writeFile(t, "old", "old")
	if r := run(t, "dd", "if=bad", "of=old"); r.Code != 1 || !strings.HasPrefix(r.Stderr, "qemu-img: error while reading from input image file: ") {
		t.Errorf("%+v", r)
	}
	if b, err := os.ReadFile("old"); err != nil || string(b) != "old" {
		t.Errorf("%q, %v", b, err)
	}
}

// TestDDDash: "-" is the name of a file, as for qemu-img.
func TestDDDash(t *testing.T) {
	t.Chdir(t.TempDir())
	writeFile(t, "in", strings.Repeat("x", 4096))
	if out := mustRun(t, "dd", "-f", "raw", "-O", "raw", "if=in", "of=-"); out != "" {
		t.Errorf("%q", out)
	}
	if b, err := os.ReadFile("-"); err != nil || string(b) != strings.Repeat("x", 4096) {
		t.Errorf("%d bytes, %v", len(b), err)
	}
}

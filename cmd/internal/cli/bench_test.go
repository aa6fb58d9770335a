package cli_test

import (
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"qimg/qcow2/blockdev/oracle"
)

var seconds = regexp.MustCompile(`in \d+\.\d{3} seconds`)

// bench prints what qemu-img prints, but for the time that it took, and writes
// the same.
func TestBench(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	dir := t.TempDir()
	t.Chdir(dir)
	oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "a", "1M")
	oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "a", "-F", "qcow2", "top", "2M")
	oracle.MustRun(t, "qemu-io", "-c", "write -P 9 100k 600k", "a")
	writeFile(t, "odd", strings.Repeat("odd", 1000))
	images := []*layer{{name: "a", format: "qcow2"}, {name: "top", format: "qcow2"}, {name: "odd", format: "raw"}}
	for _, line := range []string{
		"", "a a", "nope", "-Z a", "-c", "-f foo a", "--image-opts -f raw a", "-f qcow2 odd",
		"-c x a", "-c -1 a", "-c 3000000000 a", "-c 010 a", "-c 0x10 a", "-c 0 a", "-d x a", "-d 3000000000 a", "-d -1 a",
		"-s x a", "-s 3G a", "-s -1 a", "-S x a", "-S 2G a", "-o x a", "-o -1 a", "-i foo a", "-t foo a", "-n a", "-i native a", "-n nope",
		"-w --pattern 256 a", "-w --pattern x a", "--flush-interval 10 a", "-w --flush-interval 10 a", "-w --flush-interval x a",
		"-c 1000 a", "-c 1000 top", "-c 300 -d 1 a", "-q -c 10 a", "-U -c 10 a", "-c 3 -s 0 a", "-c 100 -i threads a", "-c 100 -i io_uring -t none a",
		"-c 10 -n -t none a", "-c 30 -o 1M a", "-c 10 -o 100M a", "-c 1000 -s 3000 a", "-c 100 -s 64k -S 4k a", "-c 1 -f raw -s 512 odd",
		"-c 10 -s 512 -S 3500 -f raw odd", "-w -U a",
		"-c 200 -w a", "-c 33 -w --pattern 77 -s 8k -S 20k -o 12345 top", "-c 500 -w --pattern 0xff -d 4 --flush-interval 16 top",
		"-c 500 -w --pattern 3 -d 16 --flush-interval 16 top", "-c 500 -w --pattern 3 -d 16 --flush-interval 16 --no-drain top", "-c 7 -w --flush-interval 100 a",
		"-w -c 5 -s 512 odd", "-f raw -w -c 5 -s 512 odd", "-w -c 1 -o 1M a",
		"--image-opts -c 10 driver=qcow2,file.filename=a",
	} {
		t.Run(line, func(t *testing.T) {
			args := append([]string{"bench"}, strings.Fields(line)...)
			if !strings.Contains(line, "-w") {
				want, got := oracle.Run(t, "qemu-img", args...), run(t, args...)
				want.Stdout, got.Stdout = seconds.ReplaceAllString(want.Stdout, "in"), seconds.ReplaceAllString(got.Stdout, "in")
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("-qemu-img +qimg\n%s", diff)
				}
				return
			}
			theirs, ours := t.TempDir(), t.TempDir()
			copyDir(t, dir, theirs)
			copyDir(t, dir, ours)
			t.Chdir(theirs)
			want := oracle.Run(t, "qemu-img", args...)
			t.Chdir(ours)
			got := run(t, args...)
			want.Stdout, got.Stdout = seconds.ReplaceAllString(want.Stdout, "in"), seconds.ReplaceAllString(got.Stdout, "in")
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("-qemu-img +qimg\n%s", diff)
			}
			sameImages(t, theirs, ours, images)
		})
	}
	holdImage(t, "a")
	same(t, "bench", "a")
}

// qemu-img does not end on the first, and needs more memory than there is for
// the second.
func TestBenchRefuses(t *testing.T) {
	t.Chdir(t.TempDir())
	writeFile(t, "raw", "x")
	for line, want := range map[string]string{
		"-d 0 raw":           "Invalid queue depth specified",
		"-d 10000 -s 1G raw": "take more memory than the limit of 1073741824 bytes",
	} {
		if r := run(t, append([]string{"bench"}, strings.Fields(line)...)...); r.Code != 1 || !strings.Contains(r.Stderr, want) {
			t.Errorf("%s: %+v", line, r)
		}
	}
}

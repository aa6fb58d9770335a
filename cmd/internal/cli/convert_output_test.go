package cli_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"qimg/cmd/internal/cli"
	"qimg/qcow2/blockdev/oracle"
)

// randomFile writes a raw disk of random bytes, and zeroes in between.
func randomFile(t *testing.T, name string, size int) []byte {
	t.Helper()
	r := rand.New(rand.NewPCG(uint64(size), 5))
	b := make([]byte, size)
	for i := range b {
		if i>>15%3 != 1 {
			b[i] = byte(r.Uint32()) & 0x3f
		}
	}
	writeFile(t, name, string(b))
	return b
}

// piped runs qimg with a standard input.
func piped(t *testing.T, in io.Reader, args ...string) oracle.Result {
	t.Helper()
	var stdout, stderr bytes.Buffer
	code := cli.Run(t.Context(), append([]string{"qimg"}, args...), cli.Host{In: in, Out: &stdout, Err: &stderr})
	return oracle.Result{Stdout: stdout.String(), Stderr: stderr.String(), Code: code}
}

func TestConvertPipes(t *testing.T) {
	oracle.Require(t, "qemu-img")
	t.Chdir(t.TempDir())
	disk := randomFile(t, "disk", 3<<20+700)
	padded := string(append(disk, make([]byte, 512-700%512)...))
	oracle.MustRun(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", "disk", "disk.qcow2")
	image, err := os.ReadFile("disk.qcow2")
	if err != nil {
		t.Fatal(err)
	}
	before := filesOf(t, ".")
	for _, args := range [][]string{
		{"convert", "-O", "raw", "disk.qcow2", "-"},
		{"convert", "-m", "3", "disk.qcow2", "-"},
		{"convert", "-f", "raw", "-O", "raw", "disk", "-"},
	} {
		if r := piped(t, nil, args...); r.Code != 0 || r.Stderr != "" || r.Stdout != padded {
			t.Errorf("%q: exit %d, %q, %d bytes, expected %d", args, r.Code, r.Stderr, len(r.Stdout), len(padded))
		}
	}
	if r := piped(t, bytes.NewReader(disk), "convert", "-", "-"); r.Code != 0 || r.Stdout != padded {
		t.Errorf("from a pipe to a pipe: exit %d, %q, %d bytes", r.Code, r.Stderr, len(r.Stdout))
	}
	for _, args := range [][]string{
		{"convert", "-O", "qcow2", "-", "out"},
		{"convert", "-f", "raw", "-O", "qcow2", "-c", "-", "out"},
		{"convert", "-O", "raw", "-", "out"},
	} {
		if r := piped(t, bytes.NewReader(disk), args...); r != (oracle.Result{}) {
			t.Errorf("%q: %+v", args, r)
		}
		oracle.MustRun(t, "qemu-img", "compare", "disk", "out")
		if err := os.Remove("out"); err != nil {
			t.Fatal(err)
		}
	}
	for want, args := range map[string][]string{
		"an image of format 'qcow2' cannot be written to a pipe: it needs a file; raw can": {"convert", "-O", "qcow2", "disk", "-"},
		"Could not open '-': it is in format qcow2, and only":                              {"convert", "-O", "raw", "-", "out"},
		"Could not open '-': only a raw disk can be read from a pipe, format 'qcow2'":      {"convert", "-f", "qcow2", "-O", "raw", "-", "out"},
		"Could not open '-': read at offset 1000: no such luck":                            {"convert", "-f", "raw", "-O", "raw", "-", "out"},
	} {
		var in io.Reader = bytes.NewReader(image)
		if strings.Contains(want, "luck") {
			in = io.MultiReader(strings.NewReader(strings.Repeat("x", 1000)), failingReader{})
		}
		if r := piped(t, in, args...); r.Code != 1 || !strings.Contains(r.Stderr, want) || r.Stdout != "" {
			t.Errorf("%q: %+v", args, r)
		}
	}
	if diff := cmp.Diff(before, filesOf(t, ".")); diff != "" {
		t.Errorf("files -before +after\n%s", diff)
	}
}

type failingReader struct{}

func (failingReader) Read([]byte) (int, error) { return 0, fmt.Errorf("no such luck") }

// An image does not depend on how many work on it, and the levels make it
// smaller.
func TestConvertSameBytes(t *testing.T) {
	t.Chdir(t.TempDir())
	randomFile(t, "disk", 5<<20)
	for _, form := range []string{"-O qcow2", "-O qcow2 -c", "-O qcow2 -c -o compression_type=zstd", "-O qcow2 -o cluster_size=4k,refcount_bits=64", "-O qcow2 -o extended_l2=on"} {
		var first []byte
		for _, workers := range []string{"1", "2", "5", "16"} {
			mustRun(t, append(strings.Fields("convert -f raw -m "+workers+" "+form), "disk", "out")...)
			b, err := os.ReadFile("out")
			if err != nil {
				t.Fatal(err)
			}
			if first == nil {
				first = b
			}
			if !bytes.Equal(b, first) {
				t.Errorf("%s: %s workers make another image than 1", form, workers)
			}
		}
	}
	// Neither does one that exists and is written in place.
	mustRun(t, "create", "-q", "-f", "qcow2", "old", "6M")
	mustRun(t, "convert", "-f", "raw", "-O", "qcow2", "-c", "disk", "full")
	mustRun(t, "resize", "-q", "full", "6M")
	mustRun(t, "snapshot", "-c", "before", "full")
	for _, form := range []string{"-n old", "-n -c old", "-n full", "-n -c full", "-n --target-is-zero old", "-o preallocation=metadata out", "-o data_file=data out"} {
		var first [][]byte
		for i := range 6 {
			args := strings.Fields("convert -f raw -O qcow2 -m " + []string{"1", "3", "16"}[i%3] + " " + form)
			out := args[len(args)-1]
			if out != "out" {
				b, err := os.ReadFile(out)
				if err != nil {
					t.Fatal(err)
				}
				writeFile(t, "out", string(b))
			}
			previous := runtime.GOMAXPROCS(1 + i%5)
			mustRun(t, append(args[:len(args)-1], "disk", "out")...)
			runtime.GOMAXPROCS(previous)
			var made [][]byte
			for _, name := range []string{"out", "data"} {
				if b, err := os.ReadFile(name); err == nil {
					made = append(made, b)
				}
			}
			if first == nil {
				first = made
			}
			if !slices.EqualFunc(made, first, bytes.Equal) {
				t.Errorf("%s: run %d makes another image than the first", form, i)
			}
		}
	}
	for _, typ := range []string{"zlib", "zstd"} {
		var sizes []int64
		for _, level := range []string{"1", "9"} {
			mustRun(t, "convert", "-f", "raw", "-O", "qcow2", "-c", "--compression-level", level, "-o", "compression_type="+typ, "disk", "out")
			info, err := os.Stat("out")
			if err != nil {
				t.Fatal(err)
			}
			sizes = append(sizes, info.Size())
		}
		if sizes[1] >= sizes[0] {
			t.Errorf("%s: levels 1 and 9 make images of %d bytes", typ, sizes)
		}
	}
	for _, args := range []string{"--compression-level 3", "-c --compression-level 0", "-c --compression-level 10", "-c --compression-level x"} {
		if r := run(t, strings.Fields("convert -O qcow2 "+args+" disk new")...); r.Code != 1 || r.Stderr == "" {
			t.Errorf("%s: %+v", args, r)
		}
	}
}

// A damaged image is an error that says where, and makes no output. With
// --salvage all that can be read is there, and each sector that cannot is named.
func TestConvertDamaged(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	t.Chdir(t.TempDir())
	for _, c := range []struct {
		name   string
		flags  []string // of the image
		damage func(b []byte)
		cut    int64
		want   string // without --salvage
		first  int64  // sector that cannot be read
		lost   int    // sectors
		theirs bool   // qemu-img says the same with --salvage
	}{
		{"l2 entry", nil, func(b []byte) { b[0x4000e] = 2 }, 0,
			"error while reading block status at offset 65536: qcow2: l2 entry at 0x40008: cluster offset 0x60200 not aligned to 0x10000", 65536, 128, true},
		{"l1 entry", nil, func(b []byte) { b[0x30006] = 2 }, 0,
			"error while reading block status at offset 0: qcow2: l1 entry at 0x30000: l2 table offset 0x40200 not aligned to 0x10000", 0, 4096, true},
		{"truncated", nil, nil, 0x61a00,
			"error while reading block status at offset 72192: qcow2: l2 entry at 0x40008: cluster offset 0x60000: the file ends at 0x61a00: it is truncated", 72192, 4*128 - 13, false},
		{"truncated table", nil, nil, 0x48000,
			"error while reading block status at offset 0: qcow2: l1 entry at 0x30000: l2 table offset 0x40000 is beyond the end of the file at 0x48000: it is truncated", 0, 4096, false},
		{"truncated l1 table", nil, nil, 0x30000,
			"Could not open 'damaged': qcow2: l1 table at 0x30000: of 1 entries is beyond the end of the file at 0x30000: it is truncated", -1, 0, false},
		{"compressed", []string{"-c"}, func(b []byte) { copy(b[0x50000+80:], strings.Repeat("\xff", 60)) }, 0,
			"error while reading at byte 65536: qcow2: compressed cluster at 0x50", 65536, 128, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Chdir(t.TempDir())
			oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "good", "2M")
			oracle.MustRun(t, "qemu-io", "-c", "write -P 1 0 256k", "-c", "write -P 2 1M 64k", "good")
			oracle.MustRun(t, "qemu-img", append(append([]string{"convert"}, c.flags...), "-O", "qcow2", "good", "damaged")...)
			b, err := os.ReadFile("damaged")
			if err != nil {
				t.Fatal(err)
			}
			if c.damage != nil {
				c.damage(b)
			}
			if c.cut > 0 {
				b = b[:c.cut]
			}
			writeFile(t, "damaged", string(b))
			for _, form := range []string{"raw", "qcow2"} {
				r := run(t, "convert", "-O", form, "damaged", "out")
				if r.Code != 1 || !strings.HasPrefix(r.Stderr, "qemu-img: "+c.want) || slices.Contains(filesOf(t, "."), "out") {
					t.Errorf("%+v", r)
				}
			}
			if c.first < 0 {
				return
			}
			r := run(t, "convert", "--salvage", "-m", "1", "-O", "raw", "damaged", "out")
			warnings := regexp.MustCompile(`(?m)^qemu-img: warning: .*\n`).FindAllString(r.Stderr, -1)
			lost := slices.DeleteFunc(slices.Clone(warnings), func(s string) bool { return strings.Contains(s, "block status") })
			if r.Code != 0 || len(lost) != c.lost || !strings.HasPrefix(lost[0], fmt.Sprintf("qemu-img: warning: error while reading offset %d: ", c.first)) {
				t.Errorf("exit %d, %d lines, %.300s", r.Code, len(lost), r.Stderr)
			}
			// What is wrong is said once.
			_, cause, ok := strings.Cut(c.want, "qcow2: ")
			if !ok || strings.Count(r.Stderr, "qcow2: "+cause) != 1 {
				t.Errorf("want once %q: %.300s", cause, r.Stderr)
			}
			if quiet := run(t, "convert", "-q", "--salvage", "-O", "raw", "damaged", "quiet"); quiet != (oracle.Result{}) {
				t.Errorf("-q: %+v", quiet)
			}
			theirs := oracle.Run(t, "qemu-img", "convert", "--salvage", "-m", "1", "-O", "raw", "damaged", "theirs")
			oracle.MustRun(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", "theirs", "out")
			if c.theirs {
				want := strings.SplitAfter(theirs.Stderr[strings.Index(theirs.Stderr, "qemu-img: "):], "\n") // behind what is wrong
				want = want[:len(want)-1]
				slices.Sort(want)
				slices.Sort(warnings)
				if diff := cmp.Diff(want, warnings); diff != "" {
					t.Errorf("-qemu-img +qimg\n%s", diff)
				}
			}
		})
	}
}

// An input that is in use, or an output, is refused as qemu-img does.
func TestConvertLocks(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	t.Chdir(t.TempDir())
	threeLayers(t)
	oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "out.qcow2", "8M")
	for _, c := range []struct{ hold, args string }{
		{"top.qcow2", "-O raw top.qcow2 out"},
		{"base.qcow2", "-O raw top.qcow2 out"},
		{"raw.img", "-f raw -O raw raw.img out"},
		{"raw.img", "-O raw raw.img out"},
		{"out.qcow2", "-O raw top.qcow2 out.qcow2"},
		{"out.qcow2", "-n -O qcow2 top.qcow2 out.qcow2"},
	} {
		release := holdImage(t, "-f", map[bool]string{true: "raw", false: "qcow2"}[c.hold == "raw.img"], c.hold)
		same(t, append([]string{"convert"}, strings.Fields(c.args)...)...)
		release()
	}
	holdImage(t, "top.qcow2")
	mustRun(t, "convert", "-U", "-O", "raw", "top.qcow2", "out")
}

// An output that is an input, or lies below one, is refused, whatever its name.
func TestConvertSelf(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	t.Chdir(t.TempDir())
	threeLayers(t)
	for _, link := range [][2]string{{"top.qcow2", "top-link"}, {"base.qcow2", "base-link"}, {"raw.img", "raw-link"}} {
		if err := os.Link(link[0], link[1]); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(link[0], link[1]+"-sym"); err != nil {
			t.Fatal(err)
		}
	}
	oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=data", "ext.qcow2", "1M")
	before := map[string]string{}
	for _, name := range filesOf(t, ".") {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		before[name] = string(b)
	}
	links := [][2]string{{".", "here"}, {"new", "new-sym"}}
	for _, link := range links {
		if err := os.Symlink(link[0], link[1]); err != nil {
			t.Fatal(err)
		}
	}
	for _, line := range []string{
		"-O raw top.qcow2 top-link",
		"-O raw top.qcow2 top-link-sym",
		"-O raw top.qcow2 base-link",
		"-O raw top.qcow2 base-link-sym",
		"-O qcow2 raw.img raw-link",
		"-O raw raw-link raw.img",
		"-n -O raw raw-link raw.img",
		"-n -O qcow2 top.qcow2 base-link-sym",
		"-O raw ext.qcow2 data",
		"-O qcow2 -o data_file=raw-link raw.img out",
		"-n -f raw -O qcow2 data ext.qcow2",
		"-O qcow2 -o data_file=here/new raw.img new",
		"-O qcow2 -o data_file=new-sym raw.img new",
	} {
		for _, share := range []string{"", "-U "} { // with -U no lock tells
			r := run(t, append([]string{"convert"}, strings.Fields(share+line)...)...)
			if r.Code != 1 || r.Stderr == "" {
				t.Errorf("%s%s: %+v", share, line, r)
			}
		}
	}
	for name, content := range before {
		if b, err := os.ReadFile(name); err != nil || string(b) != content {
			t.Errorf("%s has changed: %v", name, err)
		}
	}
	if got := filesOf(t, "."); len(got) != len(before)+len(links) {
		t.Errorf("files were left behind: %q", got)
	}
}

// -n with -c writes what is there anew, also where the input ends in the middle of
// a cluster, which qemu-img refuses.
func TestConvertCompressInto(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	t.Chdir(t.TempDir())
	disk := randomFile(t, "disk", 1<<20+5000)
	oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "out", "2M")
	oracle.MustRun(t, "qemu-io", "-c", "write -P 7 0 2M", "out")
	oracle.MustRun(t, "qemu-img", "snapshot", "-c", "before", "out")
	mustRun(t, "convert", "-f", "raw", "-n", "-c", "--compression-level", "9", "-O", "qcow2", "disk", "out")
	if r := oracle.Run(t, "qemu-img", "check", "out"); r.Code != 0 || !strings.Contains(r.Stdout, "% compressed") {
		t.Errorf("check: %+v", r)
	}
	padded := append(disk, make([]byte, 512-5000%512)...)
	writeFile(t, "want", string(append(padded, bytes.Repeat([]byte{7}, 2<<20-len(padded))...)))
	sameGuestAs(t, "raw", "want", "qcow2", "out")
}

// Encrypted images are made, and read with their passphrase.
func TestConvertEncrypt(t *testing.T) {
	oracle.Require(t, "qemu-img")
	t.Chdir(t.TempDir())
	randomFile(t, "disk", 1<<20)
	secret := []string{"--object", "secret,id=s,data=letmein"}
	const luks = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1"
	for _, options := range []string{luks, luks + ",preallocation=metadata", luks + ",data_file=data", "encrypt.format=aes,encrypt.key-secret=s"} {
		mustRun(t, append(append([]string{"convert"}, secret...), "-f", "raw", "-O", "qcow2", "-o", options, "disk", "out")...)
		image := "driver=qcow2,encrypt.key-secret=s,file.filename=out"
		if !strings.Contains(options, "aes") { // qemu-img opens such images no more
			oracle.MustRun(t, "qemu-img", append(append([]string{"compare"}, secret...), "--image-opts", "driver=raw,file.filename=disk", image)...)
		}
		mustRun(t, append(append([]string{"convert"}, secret...), "--image-opts", "-O", "raw", image, "plain")...)
		sameGuestAs(t, "raw", "disk", "raw", "plain")
	}
}

func TestConvertProgress(t *testing.T) {
	t.Chdir(t.TempDir())
	randomFile(t, "disk", 4<<20)
	got := run(t, "convert", "-p", "-O", "qcow2", "disk", "out")
	want := regexp.MustCompile(`^    \(0\.00/100%\)\r(    \(\d+\.\d\d/100%\)\r)+    \(100\.00/100%\)\r\n$`)
	if got.Code != 0 || got.Stderr != "" || !want.MatchString(got.Stdout) {
		t.Errorf("%+v", got)
	}
	start := time.Now()
	mustRun(t, "convert", "-f", "raw", "-r", "10M", "-O", "raw", "disk", "slow")
	if took := time.Since(start); took < 200*time.Millisecond {
		t.Errorf("2.7 MiB at 10 MiB a second took %v", took)
	}
}

// killConvert is the variable that makes TestConvertKill the process that is
// killed: its arguments.
const killConvert = "QIMG_TEST_KILL_CONVERT"

// A convert that is killed leaves what was there before, or a whole image.
func TestConvertKill(t *testing.T) {
	if args := os.Getenv(killConvert); args != "" {
		os.Exit(cli.Run(t.Context(), strings.Fields(args), cli.Host{Out: io.Discard, Err: io.Discard}))
	}
	oracle.Require(t, "qemu-img")
	dir := t.TempDir()
	t.Chdir(dir)
	randomFile(t, "disk", 24<<20)
	r := rand.New(rand.NewPCG(1, 1))
	left, complete := 0, 0
	for i := range 16 {
		form := []string{"-O raw", "-O qcow2", "-O qcow2 -c", "-O qcow2 -o preallocation=metadata"}[i%4]
		old := ""
		if i%8 < 4 {
			old = "old content"
			writeFile(t, "out", old)
		}
		cmd := exec.Command(os.Args[0], "-test.run=^TestConvertKill$")
		cmd.Env = append(os.Environ(), killConvert+"=qimg convert -t writeback -f raw "+form+" disk out")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		timer := time.AfterFunc(time.Duration(10+r.IntN(90))*time.Millisecond, func() { cmd.Process.Kill() })
		cmd.Wait() // it was killed, or not
		timer.Stop()
		b, err := os.ReadFile("out")
		switch {
		case os.IsNotExist(err) && old == "", err == nil && string(b) == old && old != "":
			left++
		case err != nil:
			t.Fatal(err)
		default:
			complete++
			oracle.MustRun(t, "qemu-img", "compare", "-f", "raw", "-F", strings.Fields(form)[1], "disk", "out")
		}
		if got := filesOf(t, dir); len(got) > 2 && runtime.GOOS == "linux" {
			t.Errorf("files were left behind: %q", got)
		}
		os.Remove("out")
	}
	t.Logf("%d as before, %d complete", left, complete)
	if left == 0 {
		t.Error("none was killed in time")
	}
}

// A convert that is interrupted says so, and leaves what was there before.
func TestConvertInterrupt(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	randomFile(t, "disk", 2<<20)
	writeFile(t, "out", "old content")
	for _, args := range []string{"-O raw disk out", "-O qcow2 disk out", "-O qcow2 -c disk out", "-O qcow2 -o preallocation=metadata disk out", "disk -"} {
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(50*time.Millisecond, cancel)
		r := runAs(t, ctx, nil, append([]string{"qimg", "convert", "-f", "raw", "-r", "1M"}, strings.Fields(args)...)...)
		if r.Code != 130 || r.Stderr != "qimg: interrupted\n" {
			t.Errorf("%s: exit %d, %q", args, r.Code, r.Stderr)
		}
	}
	if b, err := os.ReadFile("out"); err != nil || string(b) != "old content" {
		t.Errorf("the old file: %d bytes, %v", len(b), err)
	}
	if got := filesOf(t, dir); len(got) != 2 {
		t.Errorf("files were left behind: %q", got)
	}
}

// Images of other formats are inputs like any other.
func TestConvertForeign(t *testing.T) {
	oracle.Require(t, "qemu-img")
	t.Chdir(t.TempDir())
	randomFile(t, "disk", 2<<20)
	for _, format := range []string{"vmdk", "vdi", "vpc", "vhdx"} {
		name := filepath.Join(t.TempDir(), "disk."+format)
		oracle.MustRun(t, "qemu-img", "convert", "-f", "raw", "-O", format, "disk", name)
		for _, form := range []string{"raw", "qcow2"} {
			for _, flags := range [][]string{nil, {"-f", format}} {
				mustRun(t, append(append([]string{"convert", "-O", form}, flags...), name, "out")...)
				sameGuestAs(t, format, name, form, "out")
			}
		}
	}
}

func sameGuestAs(t *testing.T, f, a, g, b string) {
	t.Helper()
	if r := oracle.Run(t, "qemu-img", "compare", "-f", f, "-F", g, a, b); r.Code != 0 {
		t.Errorf("compare %s %s: %v", a, b, r)
	}
}

// TestConvertSelfStdout: standard output is no input.
func TestConvertSelfStdout(t *testing.T) {
	t.Chdir(t.TempDir())
	text := strings.Repeat("x", 4096)
	writeFile(t, "in", text)
	f, err := os.OpenFile("in", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var stderr bytes.Buffer
	code := cli.Run(t.Context(), []string{"qimg", "convert", "-f", "raw", "-O", "raw", "in", "-"}, cli.Host{Out: f, Err: &stderr, Getenv: os.Getenv})
	if code != 1 || !strings.Contains(stderr.String(), "standard output is an input") {
		t.Errorf("exit %d: %s", code, &stderr)
	}
	if b, err := os.ReadFile("in"); err != nil || string(b) != text {
		t.Errorf("%d bytes, %v", len(b), err)
	}
}

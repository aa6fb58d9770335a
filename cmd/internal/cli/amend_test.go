package cli_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"qimg/qcow2/blockdev/oracle"
)

// rivals are two folders with the same files: qemu-img works in the first, qimg
// in the second.
type rivals struct {
	t    testing.TB
	dirs [2]string
}

func newRivals(t testing.TB) *rivals {
	return &rivals{t, [2]string{t.TempDir(), t.TempDir()}}
}

// copy copies a file into both, with its holes.
func (tw *rivals) copy(path string) {
	tw.t.Helper()
	for _, dir := range tw.dirs {
		copySparse(tw.t, path, filepath.Join(dir, filepath.Base(path)))
	}
}

func copySparse(t testing.TB, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(to)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	zero := make([]byte, 64<<10)
	for off := 0; off < len(b); off += len(zero) {
		p := b[off:min(off+len(zero), len(b))]
		if bytes.Equal(p, zero[:len(p)]) {
			continue
		}
		if _, err := f.WriteAt(p, int64(off)); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(int64(len(b))); err != nil {
		t.Fatal(err)
	}
}

// link makes links to files in both.
func (tw *rivals) link(paths ...string) {
	tw.t.Helper()
	for _, dir := range tw.dirs {
		for _, path := range paths {
			if err := os.Symlink(path, filepath.Join(dir, filepath.Base(path))); err != nil {
				tw.t.Fatal(err)
			}
		}
	}
}

// qemu runs a program in both.
func (tw *rivals) qemu(program string, args ...string) {
	tw.t.Helper()
	for _, dir := range tw.dirs {
		tw.in(dir, func() { oracle.MustRun(tw.t, program, args...) })
	}
}

// in runs f in a folder.
func (tw *rivals) in(dir string, f func()) {
	tw.t.Helper()
	was, err := os.Getwd()
	if err == nil {
		err = os.Chdir(dir)
	}
	if err != nil {
		tw.t.Fatal(err)
	}
	defer os.Chdir(was)
	f()
}

// same runs both programs, each in its folder, and compares what they do.
func (tw *rivals) same(args ...string) oracle.Result {
	tw.t.Helper()
	var want, got oracle.Result
	tw.in(tw.dirs[0], func() { want = oracle.Run(tw.t, "qemu-img", args...) })
	tw.in(tw.dirs[1], func() { got = run(tw.t, args...) })
	if diff := cmp.Diff(want, got); diff != "" {
		tw.t.Errorf("%q: -qemu-img +qimg\n%s", args, diff)
	}
	return got
}

// alike compares what is in the two folders, by qemu-img alone. mapped says that
// the images are made of the same extents, wherever those lie.
func (tw *rivals) alike(file string, mapped bool) {
	tw.t.Helper()
	tw.alikeBut(file, filepath.Join(tw.dirs[0], file), mapped)
}

// alikeBut is alike, but the guest has to read what is in model.
func (tw *rivals) alikeBut(file, model string, mapped bool) {
	tw.t.Helper()
	look := func(args ...string) (out [2]oracle.Result) {
		tw.t.Helper()
		for i, dir := range tw.dirs {
			tw.in(dir, func() { out[i] = withoutDiskSize(oracle.Run(tw.t, "qemu-img", args...)) })
		}
		return out
	}
	info := look("info", file)
	for i := range info {
		info[i].Stderr = "" // of bitmaps that qemu-img leaks
		info[i].Stdout = snapshotDate.ReplaceAllString(info[i].Stdout, " DATE")
	}
	if diff := cmp.Diff(info[0], info[1]); diff != "" {
		tw.t.Errorf("%s: info: -qemu-img +qimg\n%s", file, diff)
	}
	tw.in(tw.dirs[1], func() {
		if r := oracle.Run(tw.t, "qemu-img", "check", file); r.Code != 0 && r.Code != 63 {
			tw.t.Errorf("%s: check: exit %d\n%s%s", file, r.Code, r.Stdout, r.Stderr)
		}
		if r := oracle.Run(tw.t, "qemu-img", "compare", model, file); r.Code != 0 {
			tw.t.Errorf("%s: compare: exit %d: %s%s", file, r.Code, r.Stdout, r.Stderr)
		}
	})
	if !mapped {
		return
	}
	maps := look("map", "--output=json", file)
	if diff := cmp.Diff(extents(tw.t, maps[0].Stdout), extents(tw.t, maps[1].Stdout)); diff != "" {
		tw.t.Errorf("%s: map: -qemu-img +qimg\n%s", file, diff)
	}
}

// extents turns a map into runs of guest bytes that are of one make, whatever
// the files below it have: holes, and where.
func extents(t testing.TB, text string) (runs []string) {
	t.Helper()
	var list []struct {
		Start, Length int64
		Depth         int
		Present, Zero bool
		Offset        *int64
	}
	if err := json.Unmarshal([]byte(text), &list); err != nil {
		t.Fatalf("%v: %q", err, text)
	}
	last := ""
	for _, e := range list {
		make := fmt.Sprintf("depth %d, present %v, place %v, zero %v", e.Depth, e.Present, e.Offset != nil, e.Zero && e.Offset == nil)
		if make != last {
			runs = append(runs, fmt.Sprintf("%d: %s", e.Start, make))
		}
		last = make
	}
	return runs
}

func TestAmendMessages(t *testing.T) {
	oracle.Require(t, "qemu-img")
	tw := newRivals(t)
	tw.qemu("qemu-img", "create", "-q", "-f", "raw", "raw", "1M")
	tw.qemu("qemu-img", "create", "-q", "-f", "qcow2", "v3", "4M")
	tw.qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10", "v2", "4M")
	tw.qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", "v3", "-F", "qcow2", "over", "4M")
	tw.qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=data,data_file_raw=on", "ext", "4M")
	for _, line := range []string{
		"amend",
		"amend v3",
		"amend -o compat=0.10",
		"amend -o compat=0.10 v3 v2",
		"amend -Z",
		"amend -o",
		"amend -o , v3",
		"amend -o help",
		"amend -f qcow2 -o help",
		"amend -f raw -o help",
		"amend -f foo -o help",
		"amend -o help v3",
		"amend -p -o help v3",
		"amend -f raw -o help raw",
		"amend -f raw -o compat=0.10 raw",
		"amend -o compat=0.10 raw",
		"amend -t foo -o compat=0.10 v3",
		"amend -o compat=0.10 nope",
		"amend -o foo v3",
		"amend -o foo=1 v3",
		"amend -o cluster_size=512 v3",
		"amend -o cluster_size=512,foo=1 v3",
		"amend -o extended_l2=on,compat=1.1 v3",
		"amend -o preallocation=full -o lazy_refcounts=on v3",
		"amend -o compat=5 v3",
		"amend -o compat= v3",
		"amend -o refcount_bits=3 v3",
		"amend -o refcount_bits=0 v3",
		"amend -o refcount_bits=128 v3",
		"amend -o refcount_bits=x v3",
		"amend -o refcount_bits=8 v2",
		"amend -o refcount_bits=8,compat=0.10 v3",
		"amend -o lazy_refcounts=on v2",
		"amend -o lazy_refcounts=on,compat=0.10 v3",
		"amend -o lazy_refcounts=maybe v3",
		"amend -o data_file=x v3",
		"amend -o data_file_raw=on v3",
		"amend -o data_file_raw=off v3",
		"amend -o encrypt.state=active v3",
		"amend -o encrypt.keyslot=x v3",
		"amend -o backing_file= v3",
		"amend -o backing_file=v3 over",
		"amend -o backing_fmt=qcow2 over",
		"amend -o backing_file=v3,backing_fmt=raw over",
		"amend -o backing_file=v3,backing_fmt=qcow2 over",
		"amend -o size=1000 v3",
		"amend -o size=x v3",
		"amend -o size=1E v3",
		"amend -o size=0 v3",
		"amend -o size=6M v3",
		"amend -o size=5M,lazy_refcounts=on v3",
		"amend -o compat=0.10 ext",
		"amend -o data_file_raw=on ext",
		"amend -o data_file_raw=off ext",
		"amend -o data_file=./data ext",
		"amend -p -o compat=1.1 v2",
		"amend -p -o compat=0.10 v2",
		"amend -p -o compat=0.10 v3",
		"amend -p -o compat=0.10,size=1000 v3",
		"amend -qp -o compat=1.1 v2",
		"amend -o compat=1.1,refcount_bits=64 -o lazy_refcounts=on v2",
		"amend --force -t none -o refcount_bits=16 v2",
		"amend --image-opts -o compat=v2 driver=qcow2,file.filename=v2",
	} {
		tw.same(strings.Fields(line)...)
	}
	for _, file := range []string{"v2", "v3", "over", "ext"} {
		tw.alike(file, true)
	}
}

// Every image of the zoo becomes one of version 2, or is refused, as qemu-img has
// it; but where qemu-img leaks clusters qimg does not.
func TestAmendZoo(t *testing.T) {
	files := zoo(t)
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	accepted, refused := 0, 0
	for _, file := range files {
		name := strings.TrimSuffix(file, ".qcow2")
		switch {
		case strings.HasPrefix(name, "hostile-"), strings.HasPrefix(name, "corrupt-"), name == "chain-loop", name == "bit-corrupt":
			continue
		}
		if r := oracle.Run(t, "qemu-img", "check", "-q", file); r.Code != 0 && name != "lazy-dirty" {
			continue // encrypted, damaged, without a backing file
		}
		t.Run(name, func(t *testing.T) {
			all, err := filepath.Glob(filepath.Join(dir, strings.Split(file, ".")[0]+".*"))
			if err != nil {
				t.Fatal(err)
			}
			tw := newRivals(t)
			for _, path := range all {
				if base := filepath.Base(path); base == file || base == name+".data" {
					tw.copy(path)
				} else {
					tw.link(path)
				}
			}
			if name == "lazy-dirty" { // what a repair prints is not of interest here
				tw.qemu("qemu-img", "check", "-q", "-r", "all", file)
			}
			if tw.same("amend", "-f", "qcow2", "-o", "compat=0.10", file).Code != 0 {
				refused++
				if r := oracle.Run(t, "cmp", filepath.Join(tw.dirs[1], file), file); r.Code != 0 {
					t.Errorf("was refused and has changed: %s", r.Stdout)
				}
				return
			}
			accepted++
			if strings.HasPrefix(name, "huge") {
				return // to look at them takes qemu-img too long
			}
			tw.alike(file, false)
			var header [8]byte
			f, err := os.Open(filepath.Join(tw.dirs[1], file))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := io.ReadFull(f, header[:]); err != nil || header[7] != 2 {
				t.Errorf("version %d, %v", header[7], err)
			}
			compareSnapshots(t, file, filepath.Join(tw.dirs[1], file))
		})
	}
	t.Logf("%d accepted, %d refused", accepted, refused)
	if !oracle.SlowBuild && (accepted < 60 || refused < 10) {
		t.Error("few images")
	}
}

// compareSnapshots compares the content of the snapshots of two images.
func compareSnapshots(t *testing.T, a, b string) {
	t.Helper()
	list := regexp.MustCompile(`(?m)^(\d+) `).FindAllStringSubmatch(oracle.MustRun(t, "qemu-img", "snapshot", "-l", a), -1)
	dir := t.TempDir()
	for _, s := range list {
		var raw [2]string
		for i, path := range []string{a, b} {
			raw[i] = filepath.Join(dir, fmt.Sprint(i, ".raw"))
			oracle.MustRun(t, "qemu-img", "convert", "-l", "snapshot.id="+s[1], "-O", "raw", path, raw[i])
		}
		if r := oracle.Run(t, "cmp", raw[0], raw[1]); r.Code != 0 {
			t.Errorf("snapshot %s: %s", s[1], r.Stdout)
		}
	}
}

// Refcounts of every width become those of every other.
func TestAmendRefcountBits(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	widths := []string{"1", "2", "4", "8", "16", "32", "64"}
	for _, snapshots := range []int{0, 5} {
		for _, from := range widths {
			if snapshots > 0 && len(from) == 1 && from < "8" {
				continue
			}
			made := filepath.Join(t.TempDir(), "x")
			oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512,refcount_bits="+from, made, "1M")
			oracle.MustRun(t, "qemu-io", "-c", "write -P 7 1000 300000", made)
			for i := range snapshots {
				oracle.MustRun(t, "qemu-img", "snapshot", "-c", fmt.Sprint("s", i), made)
			}
			for _, to := range widths {
				if from == to || snapshots == 0 && from != "1" && to != "64" && to != "1" {
					continue
				}
				t.Run(fmt.Sprintf("%d snapshots, %s to %s", snapshots, from, to), func(t *testing.T) {
					tw := newRivals(t)
					tw.copy(made)
					tw.same("amend", "-o", "refcount_bits="+to, "x")
					tw.alike("x", true)
				})
			}
		}
	}
}

// What the guest of a snapshot reads stays what it is: qemu-img takes data of
// zstd that only a snapshot has for data of zlib afterwards.
func TestAmendZstdSnapshot(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	t.Chdir(t.TempDir())
	oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "compression_type=zstd", "x", "1M")
	oracle.MustRun(t, "qemu-io", "-c", "write -c -P 5 0 64k", "x")
	oracle.MustRun(t, "qemu-img", "snapshot", "-c", "a", "x")
	oracle.MustRun(t, "qemu-io", "-c", "write -P 6 0 64k", "x")
	want := "qemu-img: Cannot downgrade an image with zstd compression type and existing compressed clusters\n"
	if r := run(t, "amend", "-o", "compat=0.10", "x"); r.Code != 1 || r.Stderr != want {
		t.Errorf("%+v", r)
	}
	oracle.MustRun(t, "qemu-img", "snapshot", "-d", "a", "x")
	mustRun(t, "amend", "-o", "compat=0.10", "x")
}

// The state of a machine in a snapshot has to be of less than 4 GiB.
func TestAmendVMState(t *testing.T) {
	oracle.Require(t, "qemu-img")
	tw := newRivals(t)
	made := filepath.Join(t.TempDir(), "x")
	oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", made, "1M")
	oracle.MustRun(t, "qemu-img", "snapshot", "-c", "a", made)
	b, err := os.ReadFile(made)
	if err != nil {
		t.Fatal(err)
	}
	table := binary.BigEndian.Uint64(b[64:])
	binary.BigEndian.PutUint64(b[table+40:], 1<<32) // vm_state_size of the extra data
	if err := os.WriteFile(made, b, 0o666); err != nil {
		t.Fatal(err)
	}
	tw.copy(made)
	if r := tw.same("amend", "-o", "compat=0.10", "x"); r.Code != 1 {
		t.Errorf("%+v", r)
	}
}

// An image of LUKS over a backing file: its zeroes become encrypted zeroes.
// qemu-img writes zeroes that are not encrypted.
func TestAmendEncrypted(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	t.Chdir(t.TempDir())
	secret := []string{"--object", "secret,id=s,data=abc"}
	opts := "driver=qcow2,file.filename=x,encrypt.key-secret=s"
	oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "raw", "base", "1M")
	oracle.MustRun(t, "qemu-io", "-f", "raw", "-c", "write -P 9 0 1M", "base")
	// That qemu-img makes one fails now and then: it cannot measure its time.
	mustRun(t, "create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", secret[0], secret[1],
		"-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1", "x", "1M")
	io := func(commands ...string) string {
		args := append(append([]string{}, secret...), "--image-opts")
		for _, c := range commands {
			args = append(args, "-c", c)
		}
		r := oracle.Run(t, "qemu-io", append(args, opts)...)
		return r.Stdout + r.Stderr
	}
	io("write -P 3 0 128k", "write -z 64k 192k", "write -z 512k 64k")
	mustRun(t, "amend", secret[0], secret[1], "--image-opts", "-o", "compat=0.10", opts)
	if got := io("read -P 3 0 64k", "read -P 0 64k 192k", "read -P 9 256k 256k", "read -P 0 512k 64k", "read -P 9 576k 64k"); strings.Contains(got, "failed") || strings.Count(got, "read ") != 5 {
		t.Error(got)
	}
	oracle.MustRun(t, "qemu-img", "check", secret[0], secret[1], "--image-opts", opts)
	mustRun(t, "resize", secret[0], secret[1], "--image-opts", opts, "2M")
	mustRun(t, "amend", secret[0], secret[1], "--image-opts", "-o", "compat=1.1", opts)
	mustRun(t, "resize", secret[0], secret[1], "--preallocation=metadata", "--image-opts", opts, "3M")
	if got := io("read -P 9 576k 448k", "read -P 0 1M 2M"); strings.Contains(got, "failed") {
		t.Error(got)
	}
	oracle.MustRun(t, "qemu-img", "check", secret[0], secret[1], "--image-opts", opts)
}

// A disk of a whole system becomes one of version 2.
func TestAmendRoot(t *testing.T) {
	tree := oracle.Input(t, "rootfs")
	oracle.Require(t, "qemu-img")
	tw := newRivals(t)
	made := filepath.Join(t.TempDir(), "root.qcow2")
	mustRun(t, "build", "-q", "--size", "2G", tree, made)
	oracle.MustRun(t, "qemu-io", "-c", "write -z 100M 1M", "-c", "write -z 1M 128k", made)
	oracle.MustRun(t, "qemu-img", "snapshot", "-c", "a", made)
	tw.copy(made)
	tw.same("amend", "-p", "-o", "compat=0.10", "root.qcow2")
	tw.alike("root.qcow2", false)
}

// A dry run tells what the real one does, and changes nothing.
func TestAmendDryRun(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	t.Chdir(t.TempDir())
	oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "raw", "base", "4M")
	oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "x", "8M")
	oracle.MustRun(t, "qemu-io", "-c", "write -z 0 320k", "-c", "write -z 5M 128k", "-c", "write 1M 64k", "x")
	oracle.MustRun(t, "qemu-img", "bitmap", "--add", "x", "b0")
	before, err := os.ReadFile("x")
	if err != nil {
		t.Fatal(err)
	}
	got := mustRun(t, "amend", "--dry-run", "-o", "compat=0.10", "x")
	fi, err := os.Stat("x")
	if err != nil {
		t.Fatal(err)
	}
	if after, err := os.ReadFile("x"); err != nil || string(after) != string(before) {
		t.Fatal("a dry run changes the image")
	}
	mustRun(t, "amend", "-o", "compat=0.10", "x")
	now, err := os.Stat("x")
	if err != nil {
		t.Fatal(err)
	}
	want := regexp.MustCompile(`^compat: 1.1 -> 0.10
bitmaps: 1 removed
zero clusters: 2 become unallocated, 5 are filled with zeroes
bytes needed: \d+
` + fmt.Sprintf("file size: %d -> %d\n$", fi.Size(), now.Size()))
	if !want.MatchString(got) {
		t.Errorf("dry run prints\n%sexpected %s", got, want)
	}
	if r := run(t, "amend", "--dry-run", "-o", "refcount_bits=8", "x"); r.Code != 1 || !strings.Contains(r.Stderr, "Refcount widths other") {
		t.Errorf("%+v", r)
	}
	if got := mustRun(t, "amend", "--dry-run", "-o", "compat=v2", "x"); !strings.HasPrefix(got, "nothing changes\n") {
		t.Errorf("dry run prints %q", got)
	}
}

// With --keep-bitmaps an image that has bitmaps is refused.
func TestAmendKeepBitmaps(t *testing.T) {
	oracle.Require(t, "qemu-img")
	t.Chdir(t.TempDir())
	oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "x", "8M")
	oracle.MustRun(t, "qemu-img", "bitmap", "--add", "x", "b0")
	if r := run(t, "amend", "--keep-bitmaps", "-o", "compat=0.10", "x"); r.Code != 1 || r.Stderr != "qemu-img: Cannot downgrade an image with bitmaps\n" {
		t.Errorf("%+v", r)
	}
	mustRun(t, "bitmap", "--remove", "x", "b0")
	mustRun(t, "amend", "--keep-bitmaps", "-o", "compat=0.10", "x")
}

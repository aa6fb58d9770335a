package cli_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"qimg/cloudimg/parttable"
	"qimg/cmd/internal/cli"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/oracle"
)

// buildTree makes a source with times that every build sees alike.
func buildTree(t testing.TB, name string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(name, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(name, "hello.txt"), "hello\n")
	writeFile(t, filepath.Join(name, "sub", "zeroes and more"), strings.Repeat("\x00", 100_000)+strings.Repeat("more", 300_000))
	writeFile(t, filepath.Join(name, "sub", "empty"), "")
	when := time.Unix(1_700_000_000, 0)
	for _, p := range []string{"sub/zeroes and more", "sub/empty", "hello.txt", "sub", "."} {
		if err := os.Chtimes(filepath.Join(name, p), when, when); err != nil {
			t.Fatal(err)
		}
	}
}

// extract writes a partition of a raw disk into a file.
func extract(t testing.TB, disk string, number int, name string) *parttable.Partition {
	t.Helper()
	f, err := blockdev.OpenFile(disk, &blockdev.FileOptions{NoLock: true})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	table, err := parttable.Read(f)
	if err != nil || len(table.Findings) > 0 {
		t.Fatal(table, err)
	}
	s, err := table.ReaderSection(f, number)
	if err != nil {
		t.Fatal(err)
	}
	out, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if _, err := io.Copy(out, io.NewSectionReader(s, 0, s.Size())); err != nil {
		t.Fatal(err)
	}
	p, err := table.Partition(number)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func sameContent(t testing.TB, names ...string) {
	t.Helper()
	first, err := os.ReadFile(names[0])
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names[1:] {
		if b, err := os.ReadFile(n); err != nil || !bytes.Equal(b, first) {
			t.Errorf("%s differs from %s: %v", n, names[0], err)
		}
	}
}

// TestBuildPartition makes disks of one partition: all formats hold the same, the
// table is right, and the file system is that of a build without one.
func TestBuildPartition(t *testing.T) {
	oracle.Require(t, "sfdisk", "e2fsck", "qemu-img")
	t.Chdir(t.TempDir())
	buildTree(t, "tree")
	mustRun(t, "build", "--minimize", "tree", "plain.raw")
	for _, table := range []string{"gpt", "mbr"} {
		args := []string{"build", "--partition", table, "--partition-type", "linux-root-x86-64", "--minimize", "tree"}
		mustRun(t, append(args, "disk.raw")...)
		if out := oracle.MustRun(t, "sfdisk", "-V", "disk.raw"); !strings.Contains(out, "No errors detected") {
			t.Error(out)
		}
		p := extract(t, "disk.raw", 1, "part.raw")
		sameContent(t, "plain.raw", "part.raw")
		oracle.MustRun(t, "e2fsck", "-fn", "part.raw")
		info, err := os.Stat("disk.raw")
		tail := map[string]int64{"gpt": 33 * 512, "mbr": 0}[table]
		if err != nil || p.Start != 1<<20 || info.Size() != p.End()+tail {
			t.Errorf("%s: %+v, %d bytes", table, p, info.Size())
		}
		if name := p.Type.Name(); name != "linux-root-x86-64" && table == "gpt" || table == "mbr" && name != "linux" {
			t.Errorf("%s: type %s", table, name)
		}
		for _, opts := range [][]string{nil, {"-c"}, {"-c", "--compression", "zstd", "--cluster-size", "2M"}, {"--compat", "0.10", "--cluster-size", "512"}} {
			mustRun(t, append(append(args, "disk.qcow2"), opts...)...)
			oracle.MustRun(t, "qemu-img", "check", "disk.qcow2")
			oracle.MustRun(t, "qemu-img", "convert", "-O", "raw", "disk.qcow2", "again.raw")
			sameContent(t, "disk.raw", "again.raw")
		}
		mustRun(t, append(args, "--align", "4k", "small.raw")...)
		if p := extract(t, "small.raw", 1, "part.raw"); table == "gpt" && p.Start != 20480 || table == "mbr" && p.Start != 4096 {
			t.Errorf("%s: begins at %d", table, p.Start)
		}
	}
}

// TestBuildPartitionSize: --size is that of the disk, and the size that an error
// names is the smallest that works.
func TestBuildPartitionSize(t *testing.T) {
	oracle.Require(t, "e2fsck")
	t.Chdir(t.TempDir())
	buildTree(t, "tree")
	for _, table := range []string{"gpt", "mbr"} {
		mustRun(t, "build", "--partition", table, "--size", "100M", "tree", "disk.raw")
		p := extract(t, "disk.raw", 1, "part.raw")
		info, err := os.Stat("disk.raw")
		if err != nil || info.Size() != 100<<20 || info.Size()-p.End() > 33*512+4096 {
			t.Errorf("%s: %d bytes, %+v, %v", table, info.Size(), p, err)
		}
		oracle.MustRun(t, "e2fsck", "-fn", "part.raw")
		r := run(t, "build", "--partition", table, "--size", "3M", "tree", "small.raw")
		m := regexp.MustCompile(`a disk of 3 MiB is too small[^\n]*\nUse --size (\S+) or more`).FindStringSubmatch(r.Stderr)
		if r.Code != 1 || m == nil {
			t.Fatalf("%s: %+v", table, r)
		}
		mustRun(t, "build", "--partition", table, "--size", m[1], "tree", "small.raw")
		if r := run(t, "build", "--partition", table, "--size", "1M", "tree", "small.raw"); r.Code != 1 || !strings.Contains(r.Stderr, "nothing is left of a disk of 1048576 bytes") {
			t.Errorf("%s: %+v", table, r)
		}
	}
}

// TestBuildStream writes to standard output what goes into a file.
func TestBuildStream(t *testing.T) {
	t.Chdir(t.TempDir())
	buildTree(t, "tree")
	for _, opts := range [][]string{{"-f", "raw", "--free", "1M"}, {"--partition", "gpt", "--minimize"}, {"--block-size", "1k", "--size", "20000000"}} {
		args := append([]string{"build", "-q"}, opts...)
		mustRun(t, append(args, "tree", "disk.raw")...)
		r := run(t, append(args[:1:1], append(opts, "tree", "-")...)...)
		if r.Code != 0 || r.Stderr != "" {
			t.Fatalf("exit %d, %s", r.Code, r.Stderr)
		}
		writeFile(t, "stdout", r.Stdout)
		sameContent(t, "disk.raw", "stdout")
	}
	if r := run(t, "build", "-f", "qcow2", "tree", "-"); r.Code != 1 || !strings.Contains(r.Stderr, "cannot be written to a pipe") || r.Stdout != "" {
		t.Errorf("%+v", r)
	}
}

// diskJSON is a disk with a partition of each kind.
const diskJSON = `{
  "id": "01234567-89ab-cdef-0123-456789abcdef",
  "partitions": [
    {"type": "esp", "label": "EFI system", "source": "esp", "fs-label": "esp", "fs-uuid": "12AB-34CD", "size": "40M"},
    {"type": "linux-root-x86-64", "number": 9, "label": "root", "source": "tree", "fs-label": "root",
     "fs-uuid": "11111111-2222-3333-4444-555555555555", "free": "10M", "owner": "0:0", "exclude": ["empty"]},
    {"fs": "swap", "size": "16M", "fs-label": "swap", "fs-uuid": "77777777-2222-3333-4444-555555555555"},
    {"file": "image", "type": "0fc63daf-8483-4772-8e79-3d69d8477de4", "uuid": "99999999-2222-3333-4444-555555555555", "bootable": true},
    {"size": "1M"},
    {"fs": "fat32", "type": "ms-data", "source": "esp", "minimize": true}
  ]
}`

// TestBuildDisk makes a disk of several partitions, and has others judge each.
func TestBuildDisk(t *testing.T) {
	oracle.Require(t, "sfdisk", "sgdisk", "e2fsck", "fsck.fat", "mcopy", "blkid", "mkswap", "debugfs", "qemu-img")
	dir := t.TempDir()
	t.Chdir(dir)
	buildTree(t, "tree")
	buildTree(t, "esp")
	image := randomFile(t, "image", 1<<20+100)
	writeFile(t, "disk.json", diskJSON)
	t.Chdir(t.TempDir()) // names in the file are seen from its place
	out := mustRun(t, "build", "--disk", dir+"/disk.json", "disk.raw")
	if !regexp.MustCompile(`^disk.raw: gpt, 6 partitions, [0-9.]+ MiB\n  1: fat16, 40 MiB at 1 MiB, 5 entries, .*\n  2: ext4, .*\n  3: swap, 16 MiB at .*\n  4: image, .*\n  5: empty, .*\n  6: fat32, .*\n$`).MatchString(out) {
		t.Error(out)
	}
	if out := oracle.MustRun(t, "sfdisk", "-V", "disk.raw"); !strings.Contains(out, "No errors detected") {
		t.Error(out)
	}
	if out := oracle.MustRun(t, "sgdisk", "-v", "disk.raw"); !strings.Contains(out, "No problems found") {
		t.Error(out)
	}
	esp := extract(t, "disk.raw", 1, "esp")
	if esp.Name != "EFI system" || esp.Type.Name() != "esp" {
		t.Errorf("%+v", esp)
	}
	extract(t, "disk.raw", 9, "root")
	extract(t, "disk.raw", 10, "swap")
	p := extract(t, "disk.raw", 11, "file")
	extract(t, "disk.raw", 12, "none")
	extract(t, "disk.raw", 13, "fat32")
	for _, name := range []string{"esp", "fat32"} {
		oracle.MustRun(t, "fsck.fat", "-n", name)
		to := t.TempDir()
		oracle.MustRun(t, "mcopy", "-n", "-s", "-i", name, "::sub", "::hello.txt", to)
		sameContent(t, dir+"/tree/hello.txt", to+"/hello.txt")
		sameContent(t, dir+"/tree/sub/zeroes and more", to+"/sub/zeroes and more")
	}
	oracle.MustRun(t, "e2fsck", "-fn", "root")
	for name, want := range map[string]string{
		"esp":  "LABEL=\"ESP\" UUID=\"12AB-34CD\"",
		"root": "LABEL=\"root\" UUID=\"11111111-2222-3333-4444-555555555555\"",
		"swap": "LABEL=\"swap\" UUID=\"77777777-2222-3333-4444-555555555555\"",
	} {
		out := oracle.MustRun(t, "blkid", "-p", "-o", "full", name)
		out = regexp.MustCompile(` (LABEL_FATBOOT|VERSION|BLOCK_SIZE|SEC_TYPE)="[^"]*"`).ReplaceAllString(out, "")
		if !strings.Contains(out, want) {
			t.Errorf("blkid says %s", out)
		}
	}
	if b, err := os.ReadFile("esp"); err != nil || binary.LittleEndian.Uint32(b[28:]) != 2048 {
		t.Errorf("the FAT does not say what lies before it: %v", err)
	}
	writeFile(t, "made", strings.Repeat("\x00", 16<<20))
	oracle.MustRun(t, "mkswap", "-L", "swap", "-U", "77777777-2222-3333-4444-555555555555", "made")
	sameContent(t, "made", "swap")
	if out := oracle.MustRun(t, "debugfs", "-R", "ls /sub", "root"); strings.Contains(out, "empty") || !strings.Contains(out, "zeroes") {
		t.Error(out)
	}
	if b, err := os.ReadFile("file"); err != nil || !bytes.Equal(b[:len(image)], image) || !p.Bootable {
		t.Errorf("the image differs: %+v, %v", p, err)
	}
	if b, err := os.ReadFile("none"); err != nil || len(bytes.Trim(b, "\x00")) > 0 {
		t.Errorf("an empty partition is not: %v", err)
	}
	mustRun(t, "build", "-q", "-c", "--disk", dir+"/disk.json", "disk.qcow2")
	oracle.MustRun(t, "qemu-img", "convert", "-O", "raw", "disk.qcow2", "again.raw")
	mustRun(t, "build", "-q", "--disk", dir+"/disk.json", "third.raw")
	sameContent(t, "disk.raw", "again.raw", "third.raw")
}

// TestBuildDiskSources: FAT takes the sources that ext4 takes.
func TestBuildDiskSources(t *testing.T) {
	oracle.Require(t, "tar", "fsck.fat", "mdir")
	t.Chdir(t.TempDir())
	buildTree(t, "tree")
	oracle.MustRun(t, "tar", "-C", "tree", "-czf", "tree.tar.gz", ".")
	for i, source := range []string{"tree", "tree.tar.gz"} {
		writeFile(t, "disk.json", fmt.Sprintf(`{"table": "mbr", "partitions": [{"fs": "fat", "source": %q, "minimize": true}]}`, source))
		mustRun(t, "build", "--disk", "disk.json", fmt.Sprintf("%d.raw", i))
	}
	sameContent(t, "0.raw", "1.raw")
	if err := os.MkdirAll("over/sub", 0o755); err != nil {
		t.Fatal(err)
	}
	writeFile(t, "over/sub/new", "new")
	writeFile(t, "disk.json", `{"partitions": [{"type": "esp", "source": "tree.tar.gz", "over": ["over"], "exclude": ["hello.txt"]}]}`)
	mustRun(t, "build", "--disk", "disk.json", "over.raw")
	extract(t, "over.raw", 1, "part")
	oracle.MustRun(t, "fsck.fat", "-n", "part")
	if out := oracle.MustRun(t, "mdir", "-/", "-b", "-i", "part", "::"); strings.Contains(out, "hello") || !strings.Contains(out, "sub/new") || strings.Contains(out, "lost") {
		t.Error(out)
	}
}

// TestBuildDiskRest: the last partition takes what is left of a disk with a size.
func TestBuildDiskRest(t *testing.T) {
	oracle.Require(t, "e2fsck", "fsck.fat")
	t.Chdir(t.TempDir())
	buildTree(t, "tree")
	for _, table := range []string{"gpt", "mbr"} {
		for _, fs := range []string{"ext4", "fat", "swap", "none"} {
			source := ""
			if fs == "ext4" || fs == "fat" {
				source = `"source": "tree",`
			}
			writeFile(t, "disk.json", fmt.Sprintf(`{"table": %q, "size": "64M", "align": "64k", "partitions": [{"size": "5M"}, {"fs": %q, %s "size": "rest"}]}`, table, fs, source))
			mustRun(t, "build", "-q", "--disk", "disk.json", "disk.raw")
			p := extract(t, "disk.raw", 2, "part")
			want := int64(64<<20 - 5<<20 - 64<<10)
			if table == "gpt" {
				want -= 5 * 4096
			}
			if p.Size != want {
				t.Errorf("%s %s: %d bytes, not %d", table, fs, p.Size, want)
			}
			switch fs {
			case "ext4":
				oracle.MustRun(t, "e2fsck", "-fn", "part")
			case "fat":
				oracle.MustRun(t, "fsck.fat", "-n", "part")
			}
		}
	}
}

// TestBuildDiskRefused: files that say something impossible are errors that name
// the partition, and leave no output.
func TestBuildDiskRefused(t *testing.T) {
	t.Chdir(t.TempDir())
	buildTree(t, "tree")
	for file, want := range map[string]string{
		``:                       "disk.json: EOF",
		`{}`:                     "disk.json: no partitions",
		`{"partitions": [1]}`:    "cannot unmarshal",
		`{"partitions": [null]}`: "partition 1 is null",
		`{"partitions": [{"fs": "none", "size": "1M"}]} x`: "something follows the disk",
		`{"partition": []}`: `unknown field "partition"`,
		`{"table": "bsd", "partitions": [{"size": "1M"}]}`:                               "gpt or mbr, not 'bsd'",
		`{"align": "3k", "partitions": [{"size": "1M"}]}`:                                "power of two",
		`{"size": "x", "partitions": [{"size": "1M"}]}`:                                  "Invalid size 'x'",
		`{"size": "3M", "partitions": [{"size": "1M"}, {"size": "1M"}]}`:                 "is too small for its partitions",
		`{"partitions": [{"fs": "ntfs", "size": "1M"}]}`:                                 "partition 1: fs is ext4, fat",
		`{"partitions": [{"fs": "fat64", "source": "tree"}]}`:                            "partition 1: fs is fat, fat12",
		`{"partitions": [{"fs": "ext4", "size": "1M"}]}`:                                 "partition 1: fs ext4 needs a source",
		`{"partitions": [{"fs": "swap"}]}`:                                               "partition 1: fs swap needs a size",
		`{"partitions": [{"fs": "swap", "size": "8k"}]}`:                                 "partition 1: a swap area has at least 40960 bytes",
		`{"partitions": [{"fs": "swap", "size": "1M", "source": "tree"}]}`:               "partition 1: source does not go with fs swap",
		`{"partitions": [{"fs": "fat", "source": "tree", "owner": "1"}]}`:                "partition 1: owner does not go with fs fat",
		`{"partitions": [{"file": "x", "fs": "ext4"}]}`:                                  "partition 1: fs does not go with file",
		`{"partitions": [{"file": "nope"}]}`:                                             "partition 1: Could not open 'nope': No such file",
		`{"partitions": [{"source": "tree", "size": "9M", "free": "1M"}]}`:               "only one of size, free and minimize",
		`{"partitions": [{"source": "nope"}]}`:                                           "partition 1: ",
		`{"partitions": [{"source": "nope", "fs": "fat"}]}`:                              "partition 1: ",
		`{"partitions": [{"size": "1M"}, {"source": "tree", "size": "2M"}]}`:             "partition 2: a disk of 2 MiB is too small: tree needs",
		`{"partitions": [{"source": "tree", "fs": "fat", "size": "500k"}]}`:              "partition 1: the FAT file system has room for",
		`{"partitions": [{"size": "rest"}]}`:                                             "partition 1: rest is possible on a disk that has a size",
		`{"size": "9M", "partitions": [{"size": "rest"}, {"size": "1M"}]}`:               "partition 2: ",
		`{"partitions": [{"type": "nope", "size": "1M"}]}`:                               "partition 1: partition type 'nope'",
		`{"table": "mbr", "partitions": [{"label": "x", "size": "1M"}]}`:                 "partition 1: an MBR has no labels",
		`{"partitions": [{"number": 200, "size": "1M"}]}`:                                "partition 200: numbers of a gpt are from 1 to 128",
		`{"partitions": [{"fs": "fat", "source": "tree", "fs-uuid": "12345"}]}`:          "is as 1234-ABCD",
		`{"partitions": [{"fs": "fat", "source": "tree", "fs-label": "more than 11!"}]}`: "FAT label",
		`{"partitions": [{"source": "tree", "fs-label": "more than 16 bytes"}]}`:         "label",
	} {
		writeFile(t, "disk.json", file)
		r := run(t, "build", "--disk", "disk.json", "disk.raw")
		if r.Code != 1 || !strings.Contains(r.Stderr, want) || r.Stdout != "" {
			t.Errorf("%s: %+v, not %q", file, r, want)
		}
		if diff := cmp.Diff([]string{"disk.json", "tree"}, filesOf(t, ".")); diff != "" {
			t.Fatalf("%s: %s", file, diff)
		}
	}
	writeFile(t, "disk.json", diskJSON)
	for _, line := range []string{"--size 1G disk.raw", "--label x disk.raw", "--partition gpt disk.raw", "tree disk.raw", "-n disk.raw", "disk"} {
		if r := run(t, append([]string{"build", "--disk", "disk.json"}, strings.Fields(line)...)...); r.Code != 1 || r.Stderr == "" {
			t.Errorf("%s: %+v", line, r)
		}
	}
	for _, line := range []string{"--align 2M tree disk.raw", "--partition-type esp tree disk.raw", "--partition gtp tree disk.raw",
		"--partition gpt --partition-type 83 tree disk.raw", "--partition mbr --partition-type bios-boot tree disk.raw", "--partition gpt --align 1000 tree disk.raw"} {
		if r := run(t, append([]string{"build"}, strings.Fields(line)...)...); r.Code != 1 || r.Stderr == "" {
			t.Errorf("%s: %+v", line, r)
		}
	}
}

// TestBuildDiskChanged: a source that changes is named, and no output left.
func TestBuildDiskChanged(t *testing.T) {
	t.Chdir(t.TempDir())
	if err := os.Mkdir("tree", 0o755); err != nil {
		t.Fatal(err)
	}
	for i := range 40 {
		writeFile(t, fmt.Sprintf("tree/%02d", i), strings.Repeat(fmt.Sprintf("%08d", i*7919), 1<<17))
	}
	for _, fs := range []string{"ext4", "fat"} {
		writeFile(t, "disk.json", fmt.Sprintf(`{"partitions": [{"fs": %q, "source": "tree"}]}`, fs))
		writeFile(t, "tree/39", strings.Repeat("x", 1<<20))
		stderr := &canceller{cancel: func() { os.Truncate("tree/39", 1000) }}
		code := runTo(t, stderr, "build", "--progress=plain", "--disk", "disk.json", "disk.raw")
		if code != 1 || !strings.Contains(stderr.String(), "tree/39: changed while it was read") {
			t.Errorf("%s: exit %d: %s", fs, code, stderr.String())
		}
		if diff := cmp.Diff([]string{"disk.json", "tree"}, filesOf(t, ".")); diff != "" {
			t.Error(diff)
		}
	}
}

// runTo is run with a place for what is printed about errors and progress.
func runTo(t testing.TB, stderr io.Writer, args ...string) int {
	t.Helper()
	return cli.Run(t.Context(), append([]string{"qimg"}, args...),
		cli.Host{Out: io.Discard, Err: stderr, Getenv: func(string) string { return "" }})
}

package cli_test

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"qimg/qcow2/blockdev/oracle"
)

// convertInputs makes the images that the command lines below name.
func convertInputs(t *testing.T) {
	t.Helper()
	writeFile(t, "raw.img", strings.Repeat("raw data", 1<<14))
	writeFile(t, "odd.img", strings.Repeat("odd", 1000)) // no whole sectors
	writeFile(t, "empty.img", "")
	writeFile(t, "key", "letmein")
	for _, line := range []string{
		"create -q -f qcow2 base.qcow2 1M",
		"create -q -f qcow2 -b base.qcow2 -F qcow2 mid.qcow2",
		"create -q -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2",
		"create -q -f qcow2 big.qcow2 3M",
		"create -q -f qcow2 fresh.qcow2 3M",
		"create -q -f qcow2 -o compat=0.10 old.qcow2 2M",
		"create -q -f qcow2 snap.qcow2 1M",
		"create -q -f qcow2 bitmaps.qcow2 1M",
		"create -q -f qcow2 broken.qcow2 1M",
		"create -q -f raw space.img 1M",
		"create -q -f raw holes.img 4M",
		"create -q -f qcow2 -o data_file=data.raw ext.qcow2 1M",
	} {
		oracle.MustRun(t, "qemu-img", strings.Fields(line)...)
	}
	// qemu-img measures for longer, and not always with success.
	mustRun(t, strings.Fields("create -q -f qcow2 --object secret,id=s,file=key -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 luks.qcow2 1M")...)
	for _, c := range [][]string{
		{"qemu-io", "-c", "write -P 1 0 500k", "base.qcow2"},
		{"qemu-io", "-c", "write -P 2 200k 200k", "mid.qcow2"},
		{"qemu-io", "-c", "write -P 3 300k 10k", "-c", "write -z 100k 128k", "top.qcow2"},
		{"qemu-io", "-c", "write -P 1 0 64k", "-c", "write -P 2 300k 100k", "-c", "write -z 700k 64k", "snap.qcow2"},
		{"qemu-img", "snapshot", "-c", "first", "snap.qcow2"},
		{"qemu-io", "-c", "write -P 3 100k 300k", "snap.qcow2"},
		{"qemu-img", "snapshot", "-c", "1x", "snap.qcow2"},
		{"qemu-io", "-c", "write -P 4 0 1M", "snap.qcow2"},
		{"qemu-img", "bitmap", "--add", "-g", "32k", "bitmaps.qcow2", "a"},
		{"qemu-img", "bitmap", "--add", "--disable", "bitmaps.qcow2", "b"},
		{"qemu-img", "bitmap", "--add", "bitmaps.qcow2", "c"},
		{"qemu-io", "-c", "write -P 5 100k 300k", "bitmaps.qcow2"},
		{"qemu-img", "bitmap", "--add", "broken.qcow2", "good"},
		{"qemu-img", "bitmap", "--add", "broken.qcow2", "bad"},
		{"qemu-img", "bitmap", "--add", "broken.qcow2", "fine"},
		{"qemu-io", "-c", "write -P 6 10k 30k", "-c", "write -P 7 500k 8k", "broken.qcow2"},
		{"qemu-io", "-f", "raw", "-c", "write -P 8 10k 30k", "-c", "write -P 9 2M 1k", "-c", "write -P 9 2052k 1k", "holes.img"},
		{"qemu-io", "-f", "raw", "-c", "write -P 7 0 1M", "space.img"},
		{"qemu-io", "-c", "write -P 8 10k 300k", "ext.qcow2"},
		{"qemu-io", "-c", "write -P 8 10k 300k", "old.qcow2"},
		{"qemu-io", "-c", "write -P 9 700k 2M", "big.qcow2"},
		{"qemu-io", "--object", "secret,id=s,file=key", "-c", "write -P 8 10k 300k", "--image-opts", "encrypt.key-secret=s,file.filename=luks.qcow2"},
	} {
		oracle.MustRun(t, c[0], c[1:]...)
	}
	breakBitmap(t, "broken.qcow2", "bad")
}

// breakBitmap marks a bitmap as not saved.
func breakBitmap(t *testing.T, image, name string) {
	t.Helper()
	b, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	// The entry of the directory has its flags 12 bytes behind its beginning and
	// its name behind 24.
	at := bytes.Index(b, append(make([]byte, 4), name+"\x00"...)) - 20
	if at < 0 {
		t.Fatal("no entry")
	}
	b[at+15] |= 1
	if err := os.WriteFile(image, b, 0o666); err != nil {
		t.Fatal(err)
	}
}

// filesOf lists the files of a folder.
func filesOf(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// convert prints what qemu-img prints, makes the same image, and nothing if it
// fails.
func TestConvert(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	dir := t.TempDir()
	t.Chdir(dir)
	convertInputs(t)
	for _, line := range []string{
		"top.qcow2",
		"top.qcow2 out",
		"-O raw top.qcow2 out",
		"-O qcow2 top.qcow2 out",
		"-O qcow2 -c top.qcow2 out",
		"-p -O qcow2 empty.img out",
		"-O qcow2 odd.img out",
		"-O raw odd.img out",
		"odd.img odd.img out",
		"-O foo top.qcow2 out",
		"-f foo top.qcow2 out",
		"-f qcow2 raw.img out",
		"-f raw top.qcow2 out",
		"-O qcow2 nope out",
		"-O qcow2 top.qcow2 nope/out",
		"-O qcow2 top.qcow2 .",
		"-O qcow2 top.qcow2 foo:out",
		"-O qcow2 top.qcow2 file:out",
		"-t foo top.qcow2 out",
		"-T foo top.qcow2 out",
		"-t none top.qcow2 out",
		"-m 0 top.qcow2 out",
		"-m 17 top.qcow2 out",
		"-m x top.qcow2 out",
		"-m 3 top.qcow2 out",
		"-S 1 top.qcow2 out",
		"-S x top.qcow2 out",
		"-S 17M top.qcow2 out",
		"-S 64k top.qcow2 out",
		"-S 512 holes.img out",
		"-S 0 -O raw snap.qcow2 out",
		"-S 0 -O qcow2 snap.qcow2 out",
		"-S 0 -c -O qcow2 snap.qcow2 out",
		"-S 1k -O raw holes.img out",
		"-S 64k -O raw holes.img out",
		"-S 1M -O raw holes.img out",
		"-S 64k -O qcow2 holes.img out",
		"-S 1M -O qcow2 holes.img out",
		"-S 128k -c -O qcow2 holes.img out",
		"-O qcow2 holes.img out",
		"-O qcow2 -o cluster_size=512 holes.img out",
		"-O qcow2 -o cluster_size=4k holes.img out",
		"-O qcow2 -o cluster_size=2M holes.img out",
		"-O qcow2 -o extended_l2=on holes.img out",
		"-O qcow2 -o extended_l2=on,cluster_size=1M snap.qcow2 out",
		"-B base.qcow2 -F qcow2 -O qcow2 -o extended_l2=on top.qcow2 out",
		"-O qcow2 -S 0 -o extended_l2=on holes.img out",
		"-O qcow2 -c -o extended_l2=on holes.img out",
		"-O qcow2 -o compat=0.10 holes.img out",
		"-c -O qcow2 -o compression_type=zstd holes.img out",
		"-C -O raw holes.img out",
		"-C -O qcow2 raw.img out",
		"-C -c -O qcow2 raw.img out",
		"-C -S 4k -O qcow2 raw.img out",
		"-C --salvage -O qcow2 raw.img out",
		"-W -O qcow2 raw.img out",
		"-r x raw.img out",
		"-r 100M raw.img out",
		"-c raw.img out",
		"-c -O raw raw.img out",
		"--skip-broken-bitmaps raw.img out",
		"--target-image-opts raw.img out",
		"--target-is-zero raw.img out",
		"-n -o size=1M raw.img out",
		"-n raw.img out",
		"-n raw.img space.img",
		"-n -O raw raw.img space.img",
		"-n -O qcow2 raw.img space.img",
		"-n -O qcow2 raw.img big.qcow2",
		"-n -O qcow2 snap.qcow2 big.qcow2",
		"-n -O qcow2 -S 0 snap.qcow2 big.qcow2",
		"-n -O qcow2 --target-is-zero snap.qcow2 big.qcow2",
		"-n -O qcow2 top.qcow2 old.qcow2",
		"-n -O raw top.qcow2 raw.img",
		"-n -O raw odd.img odd.img",
		"-n -O qcow2 -B base.qcow2 top.qcow2 big.qcow2",
		"-n --target-image-opts raw.img driver=qcow2,file.filename=big.qcow2",
		"-n --target-image-opts raw.img driver=raw,file.filename=space.img",
		"-n --target-image-opts -O qcow2 raw.img driver=qcow2,file.filename=big.qcow2",
		"-n --target-image-opts raw.img file.filename=nope",
		"-n -c -O raw raw.img space.img",
		"-n -c -O qcow2 snap.qcow2 fresh.qcow2",
		"-n -c -O qcow2 old.qcow2 fresh.qcow2",
		"-l first -O raw snap.qcow2 out",
		"-l 1 -O raw snap.qcow2 out",
		"-l 1x -O qcow2 snap.qcow2 out",
		"-l nope -O qcow2 snap.qcow2 out",
		"-l first -O qcow2 raw.img out",
		"-l first snap.qcow2 snap.qcow2 out",
		"-l snapshot.id=1 -O raw snap.qcow2 out",
		"-l snapshot.name=first -O raw snap.qcow2 out",
		"-l snapshot.name=1 -O raw snap.qcow2 out",
		"-l snapshot.id=1,snapshot.name=first -O raw snap.qcow2 out",
		"-l snapshot.id=2,snapshot.name=first -O raw snap.qcow2 out",
		"-l snapshot.foo=2 -O raw snap.qcow2 out",
		"-l snapshot.id -O raw snap.qcow2 out",
		"-l snapshot.id=1 -O raw snap.qcow2 raw.img out",
		"-B base.qcow2 -O qcow2 top.qcow2 out",
		"-B base.qcow2 -F qcow2 -O qcow2 top.qcow2 out",
		"-B base.qcow2 -F qcow2 -O qcow2 -o compat=0.10 top.qcow2 out",
		"-B base.qcow2 -F qcow2 -O qcow2 -c top.qcow2 out",
		"-B base.qcow2 -F qcow2 -O qcow2 -S 0 top.qcow2 out",
		"-B mid.qcow2 -F qcow2 -O qcow2 top.qcow2 out",
		"-B raw.img -F raw -O qcow2 top.qcow2 out",
		"-B raw.img -F raw -O qcow2 holes.img out",
		"-B raw.img -F raw -O qcow2 space.img out",
		"-B nope -F raw -O qcow2 space.img out",
		"-B raw.img -F qcow2 -O qcow2 space.img out",
		"-B raw.img -F foo -O qcow2 space.img out",
		"-B raw.img -F raw -O raw space.img out",
		"-F raw -O raw space.img out",
		"-F raw -O qcow2 space.img out",
		"-B raw.img -F raw -O qcow2 odd.img odd.img out",
		"-O qcow2 -o backing_file=raw.img,backing_fmt=raw space.img out",
		"-O qcow2 -o backing_file=raw.img space.img out",
		"-O qcow2 -o foo=1 space.img out",
		"-O qcow2 -o size=1k raw.img out",
		"-O qcow2 -o ,,foo raw.img out",
		"-O qcow2 -o help",
		"-O raw -o help",
		"-O qcow2 -o help a b",
		"-O foo -o help a b",
		"-O qcow2 -o preallocation=metadata raw.img out",
		"-O qcow2 -o preallocation=falloc raw.img out",
		"-O qcow2 -o preallocation=full snap.qcow2 out",
		"-O qcow2 -o preallocation=foo snap.qcow2 out",
		"-O qcow2 -c -o preallocation=full snap.qcow2 out",
		"-O raw -o preallocation=full snap.qcow2 out",
		"-O raw -o preallocation=falloc snap.qcow2 out",
		"-O raw -o preallocation=metadata snap.qcow2 out",
		"-O qcow2 -o data_file=out.data snap.qcow2 out",
		"-O qcow2 -o data_file=out.data,data_file_raw=on snap.qcow2 out",
		"-O qcow2 -o data_file=out.data,compat=0.10 snap.qcow2 out",
		"-O qcow2 -o lazy_refcounts=on,refcount_bits=1 snap.qcow2 out",
		"-O qcow2 -o refcount_bits=3 snap.qcow2 out",
		"-O qcow2 -o cluster_size=3000 snap.qcow2 out",
		"-O qcow2 -o compat=0.10,compression_type=zstd snap.qcow2 out",
		"-O qcow2 ext.qcow2 out",
		"-O raw ext.qcow2 out",
		"-O raw luks.qcow2 out",
		"-O raw --object secret,id=s,file=key --image-opts encrypt.key-secret=s,file.filename=luks.qcow2 out",
		"-O raw -f qcow2 --image-opts file.filename=luks.qcow2 out",
		"-O qcow2 -c --object secret,id=s,file=key -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=100 snap.qcow2 out",
		"-O qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=100 snap.qcow2 out",
		"-O qcow2 -o encrypt.format=luks snap.qcow2 out",
		"--bitmaps raw.img out",
		"--bitmaps old.qcow2 out",
		"--bitmaps bitmaps.qcow2 out",
		"--bitmaps -O qcow2 bitmaps.qcow2 bitmaps.qcow2 out",
		"--bitmaps -O qcow2 bitmaps.qcow2 out",
		"--bitmaps -O qcow2 -o compat=0.10 bitmaps.qcow2 out",
		"--bitmaps -O qcow2 broken.qcow2 out",
		"--bitmaps --skip-broken-bitmaps -O qcow2 broken.qcow2 out",
		"--bitmaps -n -O qcow2 bitmaps.qcow2 broken.qcow2",
		"--bitmaps -n -O raw bitmaps.qcow2 space.img",
		"-O raw top.qcow2 top.qcow2",
		"-O qcow2 top.qcow2 base.qcow2",
		"-O raw raw.img raw.img",
		"-n -O raw raw.img raw.img",
		"-n -O qcow2 top.qcow2 top.qcow2",
		"-n -O qcow2 top.qcow2 base.qcow2",
		"-q -p -O raw raw.img out",
	} {
		t.Run(line, func(t *testing.T) {
			args := strings.Fields("convert " + line)
			for i := range args {
				args[i] = strings.ReplaceAll(args[i], "''", "")
			}
			theirs, ours := t.TempDir(), t.TempDir()
			for _, to := range []string{theirs, ours} {
				if strings.HasPrefix(line, "-n") || strings.Contains(line, " -n ") {
					copyDir(t, dir, to) // one of them is written
				} else {
					linkDir(t, dir, to)
				}
			}
			t.Chdir(theirs)
			want := oracle.Run(t, "qemu-img", args...)
			t.Chdir(ours)
			if diff := cmp.Diff(want, run(t, args...)); diff != "" {
				t.Fatalf("-qemu-img +qimg\n%s", diff)
			}
			for _, name := range filesOf(t, ours) {
				sameOutput(t, theirs, ours, name)
			}
		})
	}
}

// linkDir gives the files of a folder names in another.
func linkDir(t *testing.T, from, to string) {
	t.Helper()
	for _, name := range filesOf(t, from) {
		if err := os.Link(filepath.Join(from, name), filepath.Join(to, name)); err != nil {
			t.Fatal(err)
		}
	}
}

// sameOutput compares a file that both programs have made or changed.
func sameOutput(t *testing.T, theirs, ours, name string) {
	t.Helper()
	x, errX := os.Stat(filepath.Join(theirs, name))
	y, errY := os.Stat(filepath.Join(ours, name))
	if errX == nil && errY == nil && os.SameFile(x, y) {
		return // an input
	}
	a, err := os.ReadFile(filepath.Join(theirs, name))
	if err != nil {
		t.Error(err)
		return
	}
	if b, err := os.ReadFile(filepath.Join(ours, name)); err == nil && bytes.Equal(a, b) {
		return
	}
	l := &layer{name: name, format: "raw"}
	if bytes.HasPrefix(a, []byte("QFI\xfb")) {
		l.format = "qcow2"
	}
	t.Chdir(ours)
	info := headerText(t, theirs, name)
	if l.format == "qcow2" {
		if r := oracle.Run(t, "qemu-img", "check", name); r.Code != 0 {
			t.Errorf("%s: check: %v", name, r)
		}
		if diff := cmp.Diff(info, headerText(t, ours, name)); diff != "" {
			t.Errorf("%s: info -qemu-img +qimg\n%s", name, diff)
		}
	}
	sameGuest(t, filepath.Join(theirs, name), filepath.Join(ours, name), l.format)
	if diff := cmp.Diff(mapOf(t, theirs, l), mapOf(t, ours, l)); diff != "" {
		t.Errorf("%s: map -qemu-img +qimg\n%s", name, diff)
	}
}

// randomConverts is how many conversions TestConvertRandom makes.
var randomConverts = flag.Uint64("random.converts", 16, "how many conversions TestConvertRandom makes")

// Random chains, in random forms: the guest reads the same as after qemu-img's
// convert, and the same is stored.
func TestConvertRandom(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	for seed := range *randomConverts {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { convertRandom(t, rand.New(rand.NewPCG(seed, 3))) })
	}
}

func convertRandom(t *testing.T, r *rand.Rand) {
	dir := t.TempDir()
	t.Chdir(dir)
	chain := randomChain(t, r)
	top := chain[len(chain)-1]
	format := "qcow2"
	options := []string{fmt.Sprintf("cluster_size=%d", 4096<<r.IntN(6))}
	args := []string{"convert"}
	exact, exists := true, false
	switch r.IntN(6) {
	case 0:
		format, options = "raw", nil
	case 1:
		args = append(args, "-c")
	case 2:
		options = append(options, "compat=0.10")
	case 3:
		options = append(options[:0], fmt.Sprintf("extended_l2=on,cluster_size=%d", 16384<<r.IntN(4)))
	case 4:
		existing := randomLayer(t, r, "out", nil, top.size/512)
		oracle.MustRun(t, "qemu-img", "resize", "-q", "-f", existing.format, "--shrink", "out", fmt.Sprint(top.size+512*r.Int64N(200)))
		format, options, exists = existing.format, nil, true
		args = append(args, "-n")
	}
	if r.IntN(2) == 0 {
		args = append(args, "-S", []string{"0", "512", "1k", "16k", "64k", "256k", "1M"}[r.IntN(7)])
	}
	if below := chain[len(chain)-2]; format == "qcow2" && !exists && r.IntN(3) == 0 {
		// qemu-img compresses what is left to it of the last cluster.
		exact = exact && !slices.Contains(args, "-c")
		args = append(args, "-B", below.name, "-F", below.format)
	}
	if len(options) > 0 {
		args = append(args, "-o", strings.Join(options, ","))
	}
	args = append(args, "-f", top.format, "-O", format, top.name, "out")
	theirs, ours := both(t, dir, args...)
	out := &layer{name: "out", format: format}
	sameImages(t, theirs, ours, []*layer{out})
	sameGuestAs(t, top.format, filepath.Join(dir, top.name), format, filepath.Join(ours, "out"))
	a, b := mapOf(t, theirs, out), mapOf(t, ours, out)
	if format == "raw" && !exists {
		a, b = withFirstBlock(a), withFirstBlock(b)
	}
	if diff := cmp.Diff(a, b); exact && diff != "" {
		t.Errorf("%q: map -qemu-img +qimg\n%s", args, diff)
	}
}

// zooImage is what the expectations say of an image of the zoo.
type zooImage struct {
	Name   string
	OpenOK bool `json:"open_ok"`
	Secret string
	Size   int64 `json:"virtual_size"`
}

// zooForms are what every image of the zoo is converted to.
func zooForms() [][]string {
	return [][]string{
		{"-O", "raw"},
		{"-O", "qcow2"},
		{"-O", "qcow2", "-o", "compat=0.10"},
		{"-O", "qcow2", "-c"},
		{"-O", "qcow2", "-c", "-o", "compression_type=zstd"},
		{"-O", "qcow2", "-c", "-o", "compat=0.10"},
	}
}

// Every image of the zoo is converted as by qemu-img: the guest reads the same,
// and the same is stored of it. Each run takes some of the forms for each image.
func TestConvertZoo(t *testing.T) {
	oracle.Require(t, "qemu-img")
	zoo(t)
	names, err := filepath.Glob("*.expected.json")
	if err != nil {
		t.Fatal(err)
	}
	for i, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		var want zooImage
		if err := json.Unmarshal(b, &want); err != nil {
			t.Fatal(name, err)
		}
		if !want.OpenOK || want.Size > 100<<20 {
			continue
		}
		for j, form := range zooForms() {
			if (i+j)%len(zooForms()) == 0 {
				t.Run(want.Name+" "+strings.Join(form[1:], " "), func(t *testing.T) { convertZoo(t, want, form) })
			}
		}
	}
}

func convertZoo(t *testing.T, want zooImage, form []string) {
	dir := t.TempDir()
	t.Chdir(oracle.Input(t, "zoo")) // names of data files and json: are relative to it
	file := want.Name + ".qcow2"
	source := []string{"-f", "qcow2", file}
	if want.Secret != "" {
		source = []string{"--object", "secret,id=s,data=" + want.Secret, "--image-opts", "driver=qcow2,encrypt.key-secret=s,file.filename=" + file}
	}
	args := append(append([]string{"convert"}, form...), source...)
	their, our := filepath.Join(dir, "theirs"), filepath.Join(dir, "ours")
	theirs, ours := oracle.Run(t, "qemu-img", append(args, their)...), run(t, append(args, our)...)
	damaged := strings.Contains(ours.Stderr, "it is truncated")
	if damaged { // qemu-img takes what is not there for zeroes
		if ours.Code != 1 || ours.Stdout != "" || slices.Contains(filesOf(t, dir), "ours") {
			t.Errorf("%+v", ours)
		}
		ours = run(t, append(args, "--salvage", "-q", our)...)
	}
	switch {
	case theirs.Code != ours.Code:
		t.Fatalf("qemu-img: %v\nqimg: %v", theirs, ours)
	case theirs.Code != 0:
		if got := filesOf(t, dir); slices.Contains(got, "ours") {
			t.Errorf("files were left behind: %q", got)
		}
		return
	}
	if diff := cmp.Diff(theirs, ours); diff != "" {
		t.Errorf("-qemu-img +qimg\n%s", diff)
	}
	sameGuest(t, their, our, form[1])
	if form[1] == "qcow2" {
		if r := oracle.Run(t, "qemu-img", "check", our); r.Code != 0 {
			t.Errorf("check: %v", r)
		}
	}
	if damaged {
		return
	}
	a, b := mapOf(t, dir, &layer{name: "theirs", format: form[1]}), mapOf(t, dir, &layer{name: "ours", format: form[1]})
	if form[1] == "raw" {
		a, b = withFirstBlock(a), withFirstBlock(b)
	}
	if diff := cmp.Diff(a, b); diff != "" {
		t.Errorf("map -qemu-img +qimg\n%s", diff)
	}
}

// withFirstBlock is the map of a raw image with data in its first block, which
// QEMU writes when it creates a file.
func withFirstBlock(runs []mapRun) []mapRun {
	const block = 4096
	if len(runs) == 0 || runs[0].Data || runs[0].Length < block {
		return runs
	}
	out := []mapRun{{Length: block, Data: true}}
	runs[0].Start, runs[0].Length = block, runs[0].Length-block
	if runs[0].Length == 0 {
		runs = runs[1:]
		if len(runs) > 0 && runs[0].Data {
			out[0].Length += runs[0].Length
			runs = runs[1:]
		}
	}
	return append(out, runs...)
}

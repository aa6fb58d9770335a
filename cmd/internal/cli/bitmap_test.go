package cli_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"qimg/qcow2/blockdev/oracle"
)

// nodeName is a name that QEMU makes up for an image, where qimg has its path.
var nodeName = regexp.MustCompile(`#block\d+`)

// makeBitmaps makes images with bitmaps in all states.
func makeBitmaps(t *testing.T) {
	t.Helper()
	oracle.Require(t, "qemu-img", "qemu-io")
	for _, line := range []string{
		"create -q -f qcow2 a.qcow2 1M", "create -q -f qcow2 other.qcow2 1M", "create -q -f qcow2 large.qcow2 2M", "create -q -f qcow2 full.qcow2 300G",
		"create -q -f qcow2 -o compat=0.10 v2.qcow2 1M", "create -q -f raw r.raw 1M", "create -q -f qcow2 lost.qcow2 1M",
		"create -q -f qcow2 -o cluster_size=512 small.qcow2 1M",
		"bitmap --add a.qcow2 b", "bitmap --add --disable -g 4k a.qcow2 c", "bitmap --add -g 2k other.qcow2 x", "bitmap --add large.qcow2 b",
		"bitmap --add lost.qcow2 l",
	} {
		oracle.MustRun(t, "qemu-img", strings.Fields(line)...)
	}
	for _, args := range [][]string{{"-c", "write 0 4k", "a.qcow2"}, {"-c", "write 100k 3k", "other.qcow2"}} {
		oracle.MustRun(t, "qemu-io", args...)
	}
	oracle.Run(t, "qemu-io", "-c", "write 0 1k", "-c", "abort", "lost.qcow2")
	oracle.MustRun(t, "qemu-img", "bitmap", "--add", "lost.qcow2", "good")
}

// TestBitmap does the same to two copies of images by qemu-img and by qimg.
func TestBitmap(t *testing.T) {
	images, work := t.TempDir(), t.TempDir()
	t.Chdir(images)
	makeBitmaps(t)
	t.Chdir(work)
	long := strings.Repeat("n", 1023)
	for _, line := range []string{
		// How it is called.
		"", "a.qcow2 b", "--add", "--add a.qcow2", "--add a.qcow2 b c", "--add a.qcow2 EMPTY", "--remove a.qcow2 EMPTY", "--add -g 3 a.qcow2 EMPTY", "--merge", "-Z", "-q --add a.qcow2 n", "-U --add a.qcow2 n",
		"--add=1 a.qcow2 n", "--add -g x a.qcow2 n", "--add -g -1 a.qcow2 n", "--add -g 1.5 a.qcow2 n", "-g 1k --remove a.qcow2 b", "-g 0 --remove a.qcow2 b",
		"-F raw --merge x a.qcow2 b", "-b other.qcow2 --add a.qcow2 n", "-g x", "-f", "--image-opts --add -f qcow2 file.filename=a.qcow2 n",
		"--add -f foo a.qcow2 n", "--add --object foo a.qcow2 n",
		// What cannot be.
		"--add nope.qcow2 n", "--merge b -b nope.qcow2 a.qcow2 b", "--merge x -F qcow2 -b r.raw a.qcow2 b", "--add r.raw n", "--add -f raw r.raw n", "--remove -f raw r.raw n",
		"--merge b -f raw r.raw n", "--merge b -b r.raw -F raw a.qcow2 b", "--add v2.qcow2 n", "--remove v2.qcow2 n", "--add -g 1000 a.qcow2 n",
		"--add -g 256 a.qcow2 n", "--add -g 4G a.qcow2 n", "--add -g 8G a.qcow2 b", "--add -g 1000 a.qcow2 b", "--add a.qcow2 b", "--add a.qcow2 " + long + "n", "--add -g 512 full.qcow2 n",
		"--clear a.qcow2 n", "--remove a.qcow2 n", "--enable a.qcow2 n", "--disable a.qcow2 n", "--merge b a.qcow2 n", "--merge n a.qcow2 b",
		"--merge b -b large.qcow2 a.qcow2 b", "--merge b -b a.qcow2 a.qcow2 b", "--clear lost.qcow2 l", "--enable lost.qcow2 l", "--disable lost.qcow2 l", "--merge l lost.qcow2 good",
		"--merge good lost.qcow2 l", "--merge n lost.qcow2 l", "--merge l -b lost.qcow2 a.qcow2 n", "--merge l -b lost.qcow2 a.qcow2 b", "--add lost.qcow2 l",
		// What is done.
		"--add a.qcow2 n", "--add -g 2G a.qcow2 n", "-g 512 --add a.qcow2 n", "--add -g 0 a.qcow2 n", "--add -g 128k full.qcow2 n", "--add small.qcow2 n",
		"--add a.qcow2 " + long, "--ad a.qcow2 n", "--image-opts --add driver=qcow2,file.filename=a.qcow2 n", "--add --object secret,id=s,data=abc a.qcow2 n",
		"--clear a.qcow2 b", "--remove a.qcow2 b", "--disable a.qcow2 b", "--enable a.qcow2 c", "--enable a.qcow2 b", "--merge b a.qcow2 c", "--merge b a.qcow2 b",
		"--merge x -b other.qcow2 a.qcow2 b", "--merge x -b other.qcow2 -F qcow2 a.qcow2 c", "--remove lost.qcow2 l", "--clear lost.qcow2 good", "--remove lost.qcow2 good",
		"--add --disable a.qcow2 n", "--add --merge b --merge c -g 8k a.qcow2 n", "--remove --add --merge b a.qcow2 c",
		"--clear --merge x -b other.qcow2 --disable a.qcow2 b", "a.qcow2 --add b --remove", "--remove -f qcow2 -- a.qcow2 b",
		// Up to the one that fails.
		"--add --add a.qcow2 n", "--clear --merge n --remove a.qcow2 b", "--disable --add a.qcow2 b", "--remove --remove a.qcow2 b",
	} {
		args := append([]string{"bitmap"}, strings.Fields(strings.ReplaceAll(line, "EMPTY", "\x00"))...)
		for i := range args {
			args[i] = strings.Trim(args[i], "\x00")
		}
		type outcome struct {
			oracle.Result
			Infos []string
		}
		try := func(do func() oracle.Result) (o outcome) {
			if err := os.CopyFS(work, os.DirFS(images)); err != nil {
				t.Fatal(err)
			}
			o.Result = do()
			for _, file := range []string{"a.qcow2", "lost.qcow2", "full.qcow2", "small.qcow2", "v2.qcow2"} {
				if !strings.Contains(line, file) {
					continue
				}
				o.Infos = append(o.Infos, withoutDiskSize(oracle.Run(t, "qemu-img", "info", file)).Stdout)
				if r := oracle.Run(t, "qemu-img", "check", file); r.Code != 0 {
					t.Errorf("%q: check of %s: exit %d\n%s%s", args, file, r.Code, r.Stdout, r.Stderr)
				}
			}
			files, _ := filepath.Glob("*")
			for _, file := range files {
				if err := os.Remove(file); err != nil {
					t.Fatal(err)
				}
			}
			return o
		}
		want := try(func() oracle.Result { return oracle.Run(t, "qemu-img", args...) })
		got := try(func() oracle.Result { return run(t, args...) })
		want.Stderr = nodeName.ReplaceAllString(want.Stderr, "NODE")
		for _, file := range []string{"a.qcow2", "v2.qcow2", "r.raw", "full.qcow2"} {
			got.Stderr = strings.NewReplacer("persistent in '"+file+"'", "persistent in 'NODE'", "bitmaps to "+file, "bitmaps to NODE").Replace(got.Stderr)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%q: -qemu-img +qimg\n%s", args, diff)
		}
	}
}

// bitmapDiffers lists the images of the zoo where adding a bitmap ends
// otherwise than with qemu-img.
var bitmapDiffers = map[string]string{
	"corrupt-reftable-zero.qcow2": "qemu-img marks it corrupt and says that all is well; qimg refuses",
	"empty-0.qcow2":               "qemu-img loses the bitmap and says that all is well; qimg refuses",
	"extdata-missing.qcow2":       "the data file is not needed",
	"luks.qcow2":                  "the key is not needed",
	"luks-2keys.qcow2":            "the key is not needed",
	"luks-cbc-essiv.qcow2":        "the key is not needed",
	"luks-snapshot.qcow2":         "the key is not needed",
}

// TestBitmapZoo adds a bitmap to copies of all images of the zoo but the large
// ones.
func TestBitmapZoo(t *testing.T) {
	files := zoo(t)
	source, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	data, _ := filepath.Glob("*.data")
	t.Chdir(t.TempDir())
	for _, file := range data {
		b, err := os.ReadFile(filepath.Join(source, file))
		if err != nil {
			t.Fatal(err)
		}
		writeFile(t, file, string(b))
	}
	added := 0
	for _, file := range files {
		b, err := os.ReadFile(filepath.Join(source, file))
		if err != nil {
			t.Fatal(err)
		}
		if len(b) > 2<<20 || file == "chain-loop.qcow2" {
			continue
		}
		// The backing files are not there, and not needed.
		try := func(do func() oracle.Result) (code int, info string) {
			writeFile(t, "i.qcow2", string(b))
			code = do().Code
			return code, withoutDiskSize(oracle.Run(t, "qemu-img", "info", "i.qcow2")).Stdout
		}
		args := []string{"bitmap", "--add", "i.qcow2", "a new one"}
		wantCode, wantInfo := try(func() oracle.Result { return oracle.Run(t, "qemu-img", args...) })
		check := oracle.Run(t, "qemu-img", "check", "i.qcow2").Code
		code, info := try(func() oracle.Result { return run(t, args...) })
		if got := oracle.Run(t, "qemu-img", "check", "i.qcow2").Code; got != check && bitmapDiffers[file] == "" {
			t.Errorf("%s: check exits with %d, want %d", file, got, check)
		}
		if same, reason := code == wantCode && info == wantInfo, bitmapDiffers[file]; same == (reason != "") {
			t.Errorf("%s (%s): exit %d, want %d\n%s", file, reason, code, wantCode, cmp.Diff(wantInfo, info))
		}
		if code == 0 {
			added++
		}
	}
	if added < 50 && !oracle.SlowBuild {
		t.Errorf("only %d images have a bitmap more", added)
	}
}

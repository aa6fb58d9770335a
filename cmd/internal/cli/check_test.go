package cli_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"qimg/qcow2/blockdev/oracle"
)

// checkDiffers lists the images of the zoo that qimg does not check, or of
// which it says something else.
var checkDiffers = map[string]string{
	"hostile-snapshots-huge.qcow2": "the size of its snapshot table is refused when it is opened",
	"aes-legacy.qcow2":             "it is checked without the passphrase, which the tables do not need",
	"luks.qcow2":                   "it is checked without the passphrase, which the tables do not need",
	"luks-2keys.qcow2":             "it is checked without the passphrase, which the tables do not need",
	"luks-cbc-essiv.qcow2":         "it is checked without the passphrase, which the tables do not need",
	"luks-snapshot.qcow2":          "it is checked without the passphrase, which the tables do not need",
}

func TestCheckZoo(t *testing.T) {
	files := zoo(t)
	// qemu-img does not end on this one.
	if i := slices.Index(files, "chain-loop.qcow2"); i >= 0 {
		files = slices.Delete(files, i, i+1)
		if r := run(t, "check", "chain-loop.qcow2"); r.Code != 1 {
			t.Errorf("an image that is its own backing file: exit %d", r.Code)
		}
	}
	codes := map[int]int{}
	for _, file := range files {
		for _, args := range [][]string{{"check", file}, {"check", "-U", "--output=json", file}, {"check", "-q", "-f", "qcow2", file}} {
			want, got := oracle.Run(t, "qemu-img", args...), run(t, args...)
			codes[want.Code]++
			if want.Code == 1 {
				want.Stderr, got.Stderr = firstPart(want.Stderr), firstPart(got.Stderr)
			}
			diff := cmp.Diff(want, got)
			switch reason := checkDiffers[file]; {
			case diff == "" && reason != "":
				t.Errorf("%q: the same, although %s", args, reason)
			case diff != "" && reason == "":
				t.Errorf("%q: -qemu-img +qimg\n%s", args, diff)
			}
		}
	}
	for _, code := range []int{0, 1, 2, 3} {
		if codes[code] == 0 && !oracle.SlowBuild {
			t.Errorf("no image has exit status %d", code)
		}
	}
}

func TestCheckUsage(t *testing.T) {
	oracle.Require(t, "qemu-img")
	t.Chdir(t.TempDir())
	writeFile(t, "text", strings.Repeat("text", 200))
	writeFile(t, "empty", "")
	for _, line := range []string{
		"check", "check -f", "check nope", "check text", "check empty", "check -f raw text", "check -f qcow2 text",
		"check -T foo text",
		"check -r", "check -r foo text", "check -r all nope", "check -r leaks -f raw text", "check -r all text", "check -r all -U -f qcow2 text",
		"check --repair=leaks -q -f raw text", "check --output=xml text", "check --force-share -q --format raw text", "check text text", "check .",
	} {
		same(t, strings.Fields(line)...)
	}
}

// repairDiffers lists the images of the zoo that qimg repairs otherwise than
// qemu-img.
var repairDiffers = map[string]string{
	"corrupt-l1-reserved.qcow2":    "qemu-img does not clear reserved bits",
	"hostile-snapshots-huge.qcow2": "qemu-img repairs it half, and sets the corrupt bit",
}

// endOffset is the part of an output that depends on where new tables lie.
var endOffset = regexp.MustCompile(`(?m)^(Image end offset:|    "image-end-offset":) \d+,?$`)

// TestRepairZoo repairs every image of the zoo, and so does qemu-img.
func TestRepairZoo(t *testing.T) {
	files := zoo(t)
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	all, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	t.Chdir(t.TempDir())
	for _, e := range all {
		if err := os.Symlink(filepath.Join(dir, e.Name()), e.Name()); err != nil {
			t.Fatal(err)
		}
	}
	for _, file := range files {
		if file == "chain-loop.qcow2" {
			continue // qemu-img does not end
		}
		if strings.Contains(checkDiffers[file], "passphrase") {
			continue // qemu-img refuses
		}
		b, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			t.Fatal(err)
		}
		fresh := func() {
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
			writeFile(t, file, string(b))
		}
		clean := oracle.Run(t, "qemu-img", "check", "-q", file).Code == 0
		for _, mode := range []string{"leaks", "all"} {
			if clean && mode == "leaks" {
				continue
			}
			fresh()
			want := oracle.Run(t, "qemu-img", "check", "-r", mode, file)
			fresh()
			got := run(t, "check", "-r", mode, file)
			for _, r := range []*oracle.Result{&want, &got} {
				r.Stdout = endOffset.ReplaceAllString(r.Stdout, "")
			}
			if want.Code == 1 {
				want.Stderr, got.Stderr = firstPart(want.Stderr), firstPart(got.Stderr)
			}
			// New tables leave nothing to be freed.
			if before, _, rebuilt := strings.Cut(want.Stderr, "Rebuilding refcount structure\n"); rebuilt && want.Code == 0 {
				want.Stderr = before
			}
			if strings.HasPrefix(file, "luks") || file == "aes-legacy.qcow2" {
				if got.Code != 0 {
					t.Errorf("%s -r %s without the passphrase: %+v", file, mode, got)
				}
				continue
			}
			diff := cmp.Diff(want, got)
			switch reason := repairDiffers[file]; {
			case diff == "" && reason != "" && mode == "all":
				t.Errorf("%s: the same, although %s", file, reason)
			case diff != "" && reason == "":
				t.Errorf("%s -r %s: -qemu-img +qimg\n%s", file, mode, diff)
			}
			after, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if clean && file != "bit-corrupt.qcow2" && !bytes.Equal(after, b) {
				t.Errorf("%s: a good image changes", file)
			}
			if code := oracle.Run(t, "qemu-img", "check", "-q", file).Code; code != got.Code && got.Code != 1 {
				t.Errorf("%s -r %s: exit %d, and qemu-img check exits %d afterwards", file, mode, got.Code, code)
			}
		}
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(filepath.Join(dir, file), file); err != nil {
			t.Fatal(err)
		}
	}
}

// TestCheckNoRefcountTable: an image without a refcount table is checked and
// repaired.
func TestCheckNoRefcountTable(t *testing.T) {
	oracle.Require(t, "qemu-img")
	t.Chdir(t.TempDir())
	oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "x", "64M")
	b, err := os.ReadFile("x")
	if err != nil {
		t.Fatal(err)
	}
	clear(b[48:60])
	writeFile(t, "x", string(b))
	same(t, "check", "x")
	same(t, "check", "--output=json", "x")
	if r := run(t, "check", "-r", "all", "--dry-run", "--output=json", "x"); r.Code != 2 || !json.Valid([]byte(r.Stdout)) {
		t.Errorf("%+v", r)
	}
	mustRun(t, "check", "-r", "all", "x")
	same(t, "check", "x")
}

// TestCheckRepairRest: a cluster beyond the end of the file is inside of it
// after a repair that made the file longer, and is repaired then.
func TestCheckRepairRest(t *testing.T) {
	oracle.Require(t, "qemu-img")
	oracle.Require(t, "qemu-io")
	t.Chdir(t.TempDir())
	oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "x", "32k")
	oracle.MustRun(t, "qemu-io", "-c", "write 0 512", "x")
	b, err := os.ReadFile("x")
	if err != nil {
		t.Fatal(err)
	}
	b = append(b, make([]byte, -len(b)&511)...)
	be := binary.BigEndian
	const offset = 0x00ff_ffff_ffff_fe00
	l2 := be.Uint64(b[be.Uint64(b[40:]):]) & offset
	be.PutUint64(b[l2:], uint64(len(b)))
	writeFile(t, "x", string(b))
	if out := mustRun(t, "check", "-r", "all", "x"); !strings.Contains(out, "1 leaked clusters\n    1 corruptions") {
		t.Error(out)
	}
	same(t, "check", "x")
}

// TestCheckDryRun: a repair that is only tried changes nothing.
func TestCheckDryRun(t *testing.T) {
	zoo(t)
	const file = "corrupt-shared.qcow2" // of the zoo, which cannot be written to
	for _, mode := range []string{"leaks", "all"} {
		want, got := run(t, "check", file), run(t, "check", "-r", mode, "--dry-run", file)
		// With wrong refcounts other copied flags are wrong than without.
		if got.Code != want.Code || !strings.HasPrefix(got.Stdout, "A repair would make right") || mode == "leaks" && !strings.HasSuffix(got.Stdout, want.Stdout) {
			t.Errorf("-r %s: %+v, expected %+v", mode, got, want)
		}
		if r := run(t, "check", "-r", mode, "--dry-run", "--output=json", file); !json.Valid([]byte(r.Stdout)) || !strings.Contains(r.Stdout, "refcount table") {
			t.Errorf("%+v", r)
		}
	}
	if r := run(t, "check", "--dry-run", file); r.Code != 1 || r.Stdout != "" {
		t.Errorf("%+v", r)
	}
	if r := run(t, "check", "--stale", "snap-1.qcow2"); r.Code != 0 {
		t.Errorf("%+v", r)
	}
}

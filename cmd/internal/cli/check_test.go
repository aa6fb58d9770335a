package cli_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"qimg/qcow2/blockdev/oracle"
)

// checkDiffers lists the images of the zoo that qimg does not check, or of
// which it says something else.
var checkDiffers = map[string]string{
	"aes-legacy.qcow2":             "it is checked without the key, which the tables do not need",
	"luks.qcow2":                   "it is checked without the key, which the tables do not need",
	"luks-2keys.qcow2":             "it is checked without the key, which the tables do not need",
	"luks-cbc-essiv.qcow2":         "it is checked without the key, which the tables do not need",
	"luks-snapshot.qcow2":          "it is checked without the key, which the tables do not need",
	"hostile-snapshots-huge.qcow2": "the size of its snapshot table is refused when it is opened",
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
		if codes[code] == 0 {
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
		"check -T foo text", "check --output=xml text", "check --force-share -q --format raw text", "check text text", "check .",
	} {
		same(t, strings.Fields(line)...)
	}
}

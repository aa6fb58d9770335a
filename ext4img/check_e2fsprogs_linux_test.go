package ext4img

import (
	"compress/gzip"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/oracle"
)

// TestCheckE2fsprogs compares what Check says of the test images of e2fsprogs,
// whose sources E2FSPROGS_SRC names, with what e2fsck says.
func TestCheckE2fsprogs(t *testing.T) {
	src := os.Getenv("E2FSPROGS_SRC")
	if src == "" {
		t.Skip("E2FSPROGS_SRC names no sources")
	}
	oracle.Require(t, "e2fsck")
	images, err := filepath.Glob(filepath.Join(src, "tests", "*", "image.gz"))
	if err != nil || len(images) < 100 {
		t.Fatalf("%d images: %v", len(images), err)
	}
	same, other := 0, 0
	for _, path := range images {
		name := filepath.Base(filepath.Dir(path))
		image := filepath.Join(t.TempDir(), "image")
		gunzip(t, path, image)
		r := oracle.Run(t, "timeout", "5", "e2fsck", "-fn", image) // it waits for owners that multiple mount protection tells of
		if r.Code == 124 {
			t.Logf("%s: e2fsck does not end", name)
			continue
		}
		dev, err := blockdev.OpenFile(image, nil)
		if err != nil {
			t.Fatal(err)
		}
		bad, text := false, ""
		for f, err := range Check(t.Context(), dev, nil) {
			if err != nil {
				text += err.Error() + "\n"
				bad = bad || !errors.Is(err, ErrUnsupported)
				if errors.Is(err, ErrUnsupported) {
					text += "(unsupported)\n"
				}
			} else if f.Severity == Error {
				bad = true
				text += f.String() + "\n"
			}
		}
		dev.Close()
		if editable(t, image) && (bad || r.Code > 4 || r.Code == 4 && !dirtyImages[name]) {
			t.Errorf("%s: is edited, and e2fsck exits with %d, Check says %v", name, r.Code, bad)
		}
		if bad == (r.Code != 0) {
			same++
			continue
		}
		other++
		t.Logf("%s: e2fsck exits with %d, and Check says %v\n%.700s\n%.1500s", name, r.Code, bad, text, r.Stdout)
	}
	t.Logf("%d the same, %d other", same, other)
}

// dirtyImages are sound once their journals are replayed or their quotas counted
// anew, which e2fsck -n does not do.
var dirtyImages = map[string]bool{"f_jnl_64bit": true}

// editable reports whether an image can be opened for editing.
func editable(t *testing.T, image string) bool {
	t.Helper()
	dev, err := blockdev.OpenFile(image, &blockdev.FileOptions{Write: true})
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	_, err = OpenEditor(t.Context(), dev, nil)
	return err == nil
}

func gunzip(t testing.TB, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	z, err := gzip.NewReader(in)
	if err != nil {
		t.Fatal(err)
	}
	out, err := os.Create(to)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, z); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
}

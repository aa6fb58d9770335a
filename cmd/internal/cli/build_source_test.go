package cli_test

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"qimg/qcow2/blockdev/oracle"
)

// tarLayer is a tar archive of files, by path.
func tarLayer(t *testing.T, paths ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, p := range paths {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: p, Mode: 0o4755, Uid: 100000, Gid: 70000, Size: int64(len(p))}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(p)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// makeLayout writes an image layout of layers, under a name.
func makeLayout(t *testing.T, dir, tag string, layers ...[]byte) {
	t.Helper()
	blob := func(mediaType string, data []byte) map[string]any {
		sum := fmt.Sprintf("%x", sha256.Sum256(data))
		if err := os.MkdirAll(filepath.Join(dir, "blobs/sha256"), 0o777); err != nil {
			t.Fatal(err)
		}
		writeFile(t, filepath.Join(dir, "blobs/sha256", sum), string(data))
		return map[string]any{"mediaType": mediaType, "digest": "sha256:" + sum, "size": len(data)}
	}
	asJSON := func(v any) []byte {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	var list []any
	for _, l := range layers {
		list = append(list, blob("application/vnd.oci.image.layer.v1.tar", l))
	}
	config := blob("application/vnd.oci.image.config.v1+json", asJSON(map[string]any{"os": "linux", "architecture": runtime.GOARCH}))
	m := blob("application/vnd.oci.image.manifest.v1+json", asJSON(map[string]any{"config": config, "layers": list}))
	m["annotations"] = map[string]string{"org.opencontainers.image.ref.name": tag}
	writeFile(t, filepath.Join(dir, "index.json"), string(asJSON(map[string]any{"manifests": []any{m}})))
}

// TestBuildOCI builds from a container image, with a directory over it.
func TestBuildOCI(t *testing.T) {
	oracle.Require(t, "e2fsck", "debugfs")
	t.Chdir(t.TempDir())
	makeLayout(t, "image", "v1:1", tarLayer(t, "etc/a", "etc/b", "opt/old/x"), tarLayer(t, "etc/.wh.a", "opt/.wh..wh..opq", "opt/new", "usr/bin/su"))
	if err := os.Mkdir("over", 0o777); err != nil {
		t.Fatal(err)
	}
	writeFile(t, "over/top", "top")
	for _, name := range []string{"oci:image", "oci:image:v1:1", "oci:image:1"} {
		mustRun(t, "build", "-q", name, "over", "out.raw")
		oracle.MustRun(t, "e2fsck", "-fn", "out.raw")
		for dir, want := range map[string]string{"/": "etc lost+found opt top usr", "/etc": "b", "/opt": "new"} {
			var names []string
			for line := range strings.Lines(oracle.MustRun(t, "debugfs", "-R", "ls -p "+dir, "out.raw")) {
				if f := strings.Split(line, "/"); len(f) > 5 && f[5] != "." && f[5] != ".." {
					names = append(names, f[5])
				}
			}
			slices.Sort(names)
			if got := strings.Join(names, " "); got != want {
				t.Errorf("%s: %s has %q, want %q", name, dir, got, want)
			}
		}
		stat := oracle.MustRun(t, "debugfs", "-R", "stat /usr/bin/su", "out.raw")
		for _, want := range []string{"Mode:  04755", "User: 100000", "Group: 70000"} {
			if !strings.Contains(stat, want) {
				t.Errorf("no %q in\n%s", want, stat)
			}
		}
	}
	for _, c := range []struct{ name, want string }{
		{"oci:image:v2", `oci:image:v2: "v2": no such image; there is: v1:1`},
		{"oci:nothing:v2", "no such file"},
	} {
		r := run(t, "build", "-q", c.name, "no.raw")
		if r.Code != 1 || !strings.Contains(r.Stderr, c.want) {
			t.Errorf("%s: %+v", c.name, r)
		}
	}
	blobs, err := filepath.Glob("image/blobs/sha256/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range blobs { // the layers are the largest ones
		if info, err := os.Stat(b); err == nil && info.Size() > 1024 {
			if err := os.Truncate(b, info.Size()-512); err != nil {
				t.Fatal(err)
			}
		}
	}
	if r := run(t, "build", "-q", "oci:image", "no.raw"); r.Code != 1 || !strings.Contains(r.Stderr, "digest mismatch") {
		t.Errorf("a damaged image: %+v", r)
	}
	if left, err := filepath.Glob("*"); err != nil || strings.Join(left, " ") != "image out.raw over" {
		t.Errorf("left behind: %q, %v", left, err)
	}
}

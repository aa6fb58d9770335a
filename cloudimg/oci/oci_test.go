package oci_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"qimg/cloudimg/oci"
)

// object is JSON.
type object = map[string]any

const (
	typeIndex    = "application/vnd.oci.image.index.v1+json"
	typeManifest = "application/vnd.oci.image.manifest.v1+json"
	typeConfig   = "application/vnd.oci.image.config.v1+json"
	typeLayer    = "application/vnd.oci.image.layer.v1.tar"
)

// files are what is in a layout, by path.
type files map[string][]byte

// blob adds a blob and returns its descriptor.
func (f files) blob(mediaType string, data []byte, more object) object {
	sum := fmt.Sprintf("%x", sha256.Sum256(data))
	f["blobs/sha256/"+sum] = data
	d := object{"mediaType": mediaType, "digest": "sha256:" + sum, "size": len(data)}
	maps.Copy(d, more)
	return d
}

func (f files) json(mediaType string, v any, more object) object {
	return f.blob(mediaType, marshal(v), more)
}

func marshal(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return b
}

// image adds an image of layers and returns the descriptor of its manifest.
func (f files) image(arch string, more object, layers ...object) object {
	config := f.json(typeConfig, object{"os": "linux", "architecture": arch}, nil)
	return f.json(typeManifest, object{"schemaVersion": 2, "mediaType": typeManifest, "config": config, "layers": layers}, more)
}

func (f files) index(manifests ...object) {
	f["index.json"] = marshal(object{"schemaVersion": 2, "manifests": manifests})
	f["oci-layout"] = []byte(`{"imageLayoutVersion":"1.0.0"}`)
}

// dir writes the files to a new directory.
func (f files) dir(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	for name, data := range f {
		p := filepath.Join(dir, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(p), 0o777); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, data, 0o666); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// tar writes the files to an archive.
func (f files) tar(t testing.TB) string {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, name := range slices.Sorted(maps.Keys(f)) {
		h := &tar.Header{Name: name, Size: int64(len(f[name])), Typeflag: tar.TypeReg}
		if to, ok := strings.CutPrefix(string(f[name]), "SYMLINK "); ok {
			h = &tar.Header{Name: name, Linkname: to, Typeflag: tar.TypeSymlink}
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Size > 0 {
			w.Write(f[name])
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return write(t, b.Bytes())
}

func write(t testing.TB, data []byte) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "image.tar")
	if err := os.WriteFile(p, data, 0o666); err != nil {
		t.Fatal(err)
	}
	return p
}

func gz(data []byte) []byte {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	w.Write(data)
	w.Close()
	return b.Bytes()
}

func zst(data []byte) []byte {
	w, err := zstd.NewWriter(nil)
	if err != nil {
		panic(err)
	}
	return w.EncodeAll(data, nil)
}

// text is content that stands for a layer.
func text(s string) []byte { return []byte(strings.Repeat(s, 3000)) }

// read returns the layers of an image.
func read(t testing.TB, path string, opts *oci.Options) ([]string, error) {
	t.Helper()
	if opts == nil {
		opts = &oci.Options{}
	}
	opts.TempDir = t.TempDir()
	im, err := oci.Open(context.Background(), path, opts)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, l := range im.Layers {
		b, err := io.ReadAll(io.NewSectionReader(l, 0, l.Size()))
		if err != nil {
			t.Error(err)
		}
		if _, err := l.Stat(); err != nil {
			t.Error(err)
		}
		out = append(out, string(b[:1]))
		if !bytes.Equal(b, text(string(b[:1]))) {
			t.Errorf("a layer of %d bytes that differ", len(b))
		}
	}
	if err := im.Close(); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(opts.TempDir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	return out, nil
}

func other() string {
	if runtime.GOARCH == "arm64" {
		return "amd64"
	}
	return "arm64"
}

// TestLayouts opens image layouts, as directories and as archives.
func TestLayouts(t *testing.T) {
	tag := func(name string) object {
		return object{"annotations": object{"org.opencontainers.image.ref.name": name}}
	}
	platform := func(arch, variant string) object {
		return object{"platform": object{"os": "linux", "architecture": arch, "variant": variant}}
	}
	here := runtime.GOARCH
	for name, c := range map[string]struct {
		make func(f files)
		opts oci.Options
		want string // layers, or an error
	}{
		"one": {func(f files) {
			f.index(f.image(here, nil, f.blob(typeLayer+"+gzip", gz(text("a")), nil), f.blob(typeLayer+"+zstd", zst(text("b")), nil), f.blob(typeLayer, text("c"), nil)))
		}, oci.Options{}, "abc"},
		"docker's types": {func(f files) {
			config := f.json("application/vnd.docker.container.image.v1+json", object{"os": "linux", "architecture": here}, nil)
			f.index(f.json("application/vnd.docker.distribution.manifest.v2+json", object{"config": config,
				"layers": []object{f.blob("application/vnd.docker.image.rootfs.diff.tar.gzip", gz(text("a")), nil)}}, nil))
		}, oci.Options{}, "a"},
		"tags": {func(f files) {
			f.index(f.image(here, tag("one"), f.blob(typeLayer, text("a"), nil)), f.image(here, tag("two"), f.blob(typeLayer, text("b"), nil)))
		}, oci.Options{Tag: "two"}, "b"},
		"no tag": {func(f files) {
			f.index(f.image(here, tag("one"), f.blob(typeLayer, text("a"), nil)), f.image(here, tag("two"), f.blob(typeLayer, text("b"), nil)))
		}, oci.Options{}, "no such image without a name; there is: one, two"},
		"other tag": {func(f files) { f.index(f.image(here, tag("one"))) }, oci.Options{Tag: "x"}, `"x": no such image; there is: one`},
		"long name": {func(f files) {
			f.index(f.image(here, tag("example.org/a:one"), f.blob(typeLayer, text("a"), nil)))
		}, oci.Options{Tag: "one"}, "a"},
		"platform of the host": {func(f files) {
			f.index(f.json(typeIndex, object{"manifests": []object{
				f.image(other(), platform(other(), ""), f.blob(typeLayer, text("a"), nil)), f.image(here, platform(here, "v9"), f.blob(typeLayer, text("b"), nil)),
				f.json(typeManifest, object{}, object{"platform": object{"os": "unknown", "architecture": "unknown"}}),
			}}, tag("x")))
		}, oci.Options{}, "b"},
		"platform": {func(f files) {
			f.index(f.image("arm", platform("arm", "v6"), f.blob(typeLayer, text("a"), nil)), f.image("arm", platform("arm", "v7"), f.blob(typeLayer, text("b"), nil)))
		}, oci.Options{Platform: "linux/arm"}, "a"},
		"other platform": {func(f files) {
			f.index(f.image(other(), platform(other(), ""), f.blob(typeLayer, text("a"), nil)))
		}, oci.Options{}, "a"},
		"no such platform": {func(f files) {
			f.index(f.image(here, platform(here, ""), f.blob(typeLayer, text("a"), nil)))
		}, oci.Options{Platform: "linux/riscv64"}, "no such image for linux/riscv64; there is: linux/" + here},
		"untold platform": {func(f files) {
			f.index(f.image(other(), nil, f.blob(typeLayer, text("a"), nil)))
		}, oci.Options{Platform: "linux/" + here}, "this one is for linux/" + other()},
		"bad platform": {func(f files) {}, oci.Options{Platform: "arm64"}, "expected OS/ARCHITECTURE"},
		"wrong layer": {func(f files) {
			d := f.blob(typeLayer+"+gzip", gz(text("a")), nil)
			f[blobName(d)][20] ^= 1
			f.index(f.image(here, nil, d))
		}, oci.Options{}, "digest mismatch"},
		"wrong size": {func(f files) {
			d := f.blob(typeLayer, text("a"), nil)
			d["size"] = 7
			f.index(f.image(here, nil, d))
		}, oci.Options{}, "3000 bytes, expected 7: digest mismatch"},
		"wrong size of the manifest": {func(f files) {
			d := f.image(here, nil)
			d["size"] = 7
			f.index(d)
		}, oci.Options{}, "expected 7: digest mismatch"},
		"wrong manifest": {func(f files) {
			d := f.image(here, nil)
			f[blobName(d)][5] ^= 0x20
			f.index(d)
		}, oci.Options{}, "digest mismatch"},
		"missing layer": {func(f files) {
			d := f.blob(typeLayer, text("a"), nil)
			delete(f, blobName(d))
			f.index(f.image(here, nil, d))
		}, oci.Options{}, "layer 1"},
		"digest of a path": {func(f files) {
			f.index(f.image(here, nil, object{"mediaType": typeLayer, "digest": "sha256:../../../etc/passwd", "size": 1}))
		}, oci.Options{}, "is not a digest"},
		"digest algorithm": {func(f files) {
			f.index(f.image(here, nil, object{"mediaType": typeLayer, "digest": "md5:00", "size": 1}))
		}, oci.Options{}, `algorithm "md5" is not known`},
		"sha512": {func(f files) {
			sum := fmt.Sprintf("%x", sha512.Sum512(text("a")))
			f["blobs/sha512/"+sum] = text("a")
			f.index(f.image(here, nil, object{"mediaType": typeLayer, "digest": "sha512:" + sum, "size": 3000}))
		}, oci.Options{}, "a"},
		"encrypted": {func(f files) {
			f.index(f.image(here, nil, f.blob(typeLayer+"+gzip+encrypted", text("a"), nil)))
		}, oci.Options{}, "unsupported"},
		"an artifact": {func(f files) {
			config := f.json("application/vnd.cncf.helm.config.v1+json", object{}, nil)
			f.index(f.json(typeManifest, object{"config": config}, nil))
		}, oci.Options{}, "no container image"},
		"endless indexes": {func(f files) {
			d := f.json(typeIndex, object{"manifests": []object{}}, nil)
			for range 10 {
				d = f.json(typeIndex, object{"manifests": []object{d}}, nil)
			}
			f.index(d)
		}, oci.Options{}, "over 4 indexes in each other"},
		"nothing":  {func(f files) { f["x"] = []byte("x") }, oci.Options{}, "neither index.json nor manifest.json"},
		"bad JSON": {func(f files) { f["index.json"] = []byte("{") }, oci.Options{}, "index.json: unexpected end"},
	} {
		t.Run(name, func(t *testing.T) {
			f := files{}
			c.make(f)
			for kind, path := range map[string]string{"dir": f.dir(t), "tar": f.tar(t)} {
				opts := c.opts
				layers, err := read(t, path, &opts)
				got := strings.Join(layers, "")
				if err != nil {
					got = err.Error()
				}
				if err == nil && got != c.want || !strings.Contains(got, c.want) {
					t.Errorf("%s: %s, want %s", kind, got, c.want)
				}
			}
		})
	}
}

func blobName(d object) string {
	return "blobs/sha256/" + strings.TrimPrefix(d["digest"].(string), "sha256:")
}

// TestSaved opens what docker saved before it wrote layouts.
func TestSaved(t *testing.T) {
	digest := func(b []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(b)) }
	makeFiles := func(diffIDs ...string) files {
		config := marshal(object{"os": "linux", "architecture": other(), "rootfs": object{"type": "layers", "diff_ids": diffIDs}})
		name := fmt.Sprintf("%x.json", sha256.Sum256(config))
		return files{
			name: config, "1/layer.tar": text("a"), "2/layer.tar": gz(text("b")), "3/layer.tar": []byte("SYMLINK ../1/layer.tar"),
			"manifest.json": marshal([]object{
				{"Config": name, "RepoTags": []string{"example.org/a:one", "b:two"}, "Layers": []string{"1/layer.tar", "2/layer.tar", "3/layer.tar"}},
				{"Config": name, "RepoTags": []string{"c:three"}, "Layers": []string{"1/layer.tar"}},
			}),
		}
	}
	a, b := digest(text("a")), digest(text("b"))
	for name, c := range map[string]struct {
		files files
		tag   string
		want  string
	}{
		"tag":        {makeFiles(a, b, a), "one", "aba"},
		"name":       {makeFiles(a, b, a), "b:two", "aba"},
		"one layer":  {makeFiles(a), "three", "a"},
		"no tag":     {makeFiles(a), "", "no such image without a name; there is: example.org/a:one, b:two, c:three"},
		"other tag":  {makeFiles(a), "four", "no such image"},
		"changed":    {makeFiles(a, a, a), "one", "layer 2 (2/layer.tar): sha256:"},
		"too few":    {makeFiles(a, b), "one", "3 layers, and the configuration tells of 2"},
		"bad digest": {makeFiles("x"), "three", "is not known"},
	} {
		layers, err := read(t, c.files.tar(t), &oci.Options{Tag: c.tag})
		got := strings.Join(layers, "")
		if err != nil {
			got = err.Error()
		}
		if err == nil && got != c.want || !strings.Contains(got, c.want) {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
	f := makeFiles(a)
	for name := range f {
		if strings.HasSuffix(name, ".json") && name != "manifest.json" {
			f[name] = append(f[name], ' ')
		}
	}
	if _, err := read(t, f.tar(t), &oci.Options{Tag: "three"}); !errors.Is(err, oci.ErrDigest) {
		t.Errorf("a changed configuration: %v", err)
	}
}

// TestArchives opens archives that are compressed, and refuses what is none.
func TestArchives(t *testing.T) {
	f := files{}
	f.index(f.image(runtime.GOARCH, nil, f.blob(typeLayer, text("a"), nil)))
	data, err := os.ReadFile(f.tar(t))
	if err != nil {
		t.Fatal(err)
	}
	if layers, err := read(t, write(t, gz(data)), nil); err != nil || len(layers) != 1 {
		t.Errorf("compressed: %q, %v", layers, err)
	}
	for name, bad := range map[string][]byte{"text": text("no archive"), "cut": data[:len(data)/2], "empty": nil, "cut gzip": gz(data)[:200]} {
		if _, err := read(t, write(t, bad), nil); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
	// A link that leads out of a directory is not followed.
	out := t.TempDir()
	if err := os.WriteFile(filepath.Join(out, "index.json"), f["index.json"], 0o666); err != nil {
		t.Fatal(err)
	}
	delete(f, "index.json")
	dir := f.dir(t)
	if err := os.Symlink(filepath.Join(out, "index.json"), filepath.Join(dir, "index.json")); err != nil {
		t.Skip(err)
	}
	if _, err := read(t, dir, nil); err == nil {
		t.Error("a link out of the layout is followed")
	}
}

// FuzzOpen opens archives of any bytes.
func FuzzOpen(f *testing.F) {
	files := files{}
	files.index(files.image(runtime.GOARCH, nil, files.blob(typeLayer+"+gzip", gz([]byte("a")), nil)))
	data, err := os.ReadFile(files.tar(f))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Fuzz(func(t *testing.T, data []byte) {
		im, err := oci.Open(context.Background(), write(t, data), &oci.Options{TempDir: t.TempDir()})
		if err == nil {
			im.Close()
		}
	})
}

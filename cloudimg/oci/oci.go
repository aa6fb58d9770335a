// Package oci reads container images from the disk: image layouts of the OCI and
// what `docker save` writes, as a directory or as a tar archive, compressed or
// not.
//
//	index.json, oci-layout    an image layout; names and platforms select a manifest
//	manifest.json             docker-save without a layout; names select an image
//
// Open finds the image and gives its layers, the lowest first, as tar archives
// that are not compressed. Every blob that is read has the size and the digest
// that its descriptor tells, sha256 or sha512; layers that docker-save names
// without a digest have that of the image's configuration (diff_ids).
//
// What the layers make of a tree is for others: see ext4img.Layer. Registries are
// not known, nor are layers that are encrypted or lie elsewhere (urls).
//
// The formats are specified by the OCI image specification, image-layout.md,
// image-index.md, manifest.md and config.md.
package oci

import (
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"path"
	"runtime"
	"slices"
	"strings"

	"qimg/cloudimg/decomp"
	"qimg/qcow2/blockdev"
)

var (
	// ErrFormat says that there is no container image.
	ErrFormat = errors.New("not a container image")
	// ErrDigest says that a blob is not the one that it should be.
	ErrDigest = errors.New("digest mismatch")
	// ErrNotFound says that there is no image of that name or platform.
	ErrNotFound = errors.New("no such image")
	// ErrUnsupported says that an image needs what this package does not know.
	ErrUnsupported = errors.New("unsupported")
)

// Options say which image to open.
type Options struct {
	// Tag is the name of the image: org.opencontainers.image.ref.name in a
	// layout, NAME:TAG or TAG alone in what docker saved. "" is the only one.
	Tag string
	// Platform is OS/ARCHITECTURE[/VARIANT]; "" is linux and the architecture
	// that the program runs on. An image that is there for one platform alone
	// is taken whatever that is, unless Platform is given.
	Platform string
	// TempDir is the folder for layers that have to be decompressed.
	TempDir string
}

// Image is an image that is open. Its layers are safe for concurrent use.
type Image struct {
	// Digest is that of the manifest; "" where there is none.
	Digest string
	// Platform is what the configuration says.
	Platform string
	Layers   []*Layer // the lowest first

	store   store
	closers []io.Closer
}

// Layer is a tar archive, not compressed.
type Layer struct {
	// Digest is that of the blob, which may be compressed, or of the archive.
	Digest string

	r    io.ReaderAt
	size int64
	stat func() (fs.FileInfo, error)
}

// ReadAt implements io.ReaderAt.
func (l *Layer) ReadAt(p []byte, off int64) (int, error) { return l.r.ReadAt(p, off) }

// Size returns the size of the archive in bytes.
func (l *Layer) Size() int64 { return l.size }

// Stat tells of the file that the layer is read from, so that its changes are
// noticed.
func (l *Layer) Stat() (fs.FileInfo, error) { return l.stat() }

const (
	maxJSON   = 8 << 20 // an index, manifest or configuration
	maxLayers = 1000    // dockerd stops at 127
	maxNested = 4       // indexes in indexes
)

// descriptor is what points to a blob.
type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int64             `json:"size"`
	Annotations map[string]string `json:"annotations"`
	Platform    *platform         `json:"platform"`
}

type platform struct {
	OS           string `json:"os"`
	Architecture string `json:"architecture"`
	Variant      string `json:"variant"`
}

func (p *platform) String() string {
	return strings.TrimSuffix(p.OS+"/"+p.Architecture+"/"+p.Variant, "/")
}

// fits says whether this is the platform asked for: "" asks for any variant.
func (p *platform) fits(want *platform) bool {
	return p.OS == want.OS && p.Architecture == want.Architecture && (want.Variant == "" || p.Variant == want.Variant)
}

type index struct {
	Manifests []descriptor `json:"manifests"`
}

type manifest struct {
	MediaType string       `json:"mediaType"`
	Config    descriptor   `json:"config"`
	Layers    []descriptor `json:"layers"`
}

type config struct {
	platform
	RootFS struct {
		DiffIDs []string `json:"diff_ids"`
	} `json:"rootfs"`
}

// saved is an entry of docker's manifest.json.
type saved struct {
	Config   string   `json:"Config"`
	RepoTags []string `json:"RepoTags"`
	Layers   []string `json:"Layers"`
}

// Open opens the image at name, a directory or a tar archive. Layers that are
// compressed are decompressed into temporary files, which go away with Close.
func Open(ctx context.Context, name string, opts *Options) (*Image, error) {
	if opts == nil {
		opts = &Options{}
	}
	want, err := parsePlatform(opts.Platform)
	if err != nil {
		return nil, err
	}
	st, err := openStore(ctx, name, opts.TempDir)
	if err != nil {
		return nil, err
	}
	im := &Image{store: st}
	if err := im.open(ctx, opts, want); err != nil {
		return nil, errors.Join(err, im.Close())
	}
	return im, nil
}

// Close removes what was decompressed.
func (im *Image) Close() error {
	var errs []error
	for _, c := range im.closers {
		errs = append(errs, c.Close())
	}
	im.closers = nil
	return errors.Join(append(errs, im.store.Close())...)
}

func parsePlatform(s string) (*platform, error) {
	if s == "" {
		return &platform{OS: "linux", Architecture: runtime.GOARCH}, nil
	}
	f := strings.Split(s, "/")
	if len(f) < 2 || len(f) > 3 || slices.Contains(f, "") {
		return nil, fmt.Errorf("platform %q: expected OS/ARCHITECTURE[/VARIANT]", s)
	}
	return &platform{f[0], f[1], strings.Join(f[2:], "")}, nil
}

func (im *Image) open(ctx context.Context, opts *Options, want *platform) error {
	var top index
	err := im.readJSON("index.json", nil, &top)
	if err == nil {
		return im.openLayout(ctx, opts, want, top)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var list []saved
	if err := im.readJSON("manifest.json", nil, &list); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: neither index.json nor manifest.json is there", ErrFormat)
	} else if err != nil {
		return err
	}
	return im.openSaved(ctx, opts, want, list)
}

// readJSON reads a file of the store; of d, if not nil, it has size and digest.
func (im *Image) readJSON(name string, d *descriptor, v any) error {
	f, err := im.store.open(name)
	if err != nil {
		return err
	}
	if f.size > maxJSON {
		return fmt.Errorf("%s: %d bytes, expected %d at most", name, f.size, maxJSON)
	}
	b := make([]byte, f.size)
	if _, err := io.ReadFull(io.NewSectionReader(f, 0, f.size), b); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if d != nil {
		if d.Size != f.size {
			return fmt.Errorf("%s: %d bytes, expected %d: %w", name, f.size, d.Size, ErrDigest)
		}
		if err := verify(context.Background(), f, d.Digest); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// blobPath is where a blob lies in a layout.
func blobPath(digest string) (string, error) {
	algorithm, sum, _ := strings.Cut(digest, ":")
	if _, err := newHash(algorithm); err != nil {
		return "", err
	}
	b, err := hex.DecodeString(sum)
	if h, _ := newHash(algorithm); err != nil || len(b) != h.Size() || strings.ToLower(sum) != sum {
		return "", fmt.Errorf("%q is not a digest", digest)
	}
	return path.Join("blobs", algorithm, sum), nil
}

func newHash(algorithm string) (hash.Hash, error) {
	switch algorithm {
	case "sha256":
		return sha256.New(), nil
	case "sha512":
		return sha512.New(), nil
	}
	return nil, fmt.Errorf("the digest algorithm %q is not known: %w", algorithm, ErrUnsupported)
}

// verify reads all of a file and compares its digest.
func verify(ctx context.Context, f file, digest string) error {
	algorithm, _, _ := strings.Cut(digest, ":")
	h, err := newHash(algorithm)
	if err != nil {
		return err
	}
	buf := make([]byte, 1<<20)
	for off := int64(0); off < f.size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := f.ReadAt(buf[:min(int64(len(buf)), f.size-off)], off)
		h.Write(buf[:n])
		if off += int64(n); err != nil && (err != io.EOF || off < f.size) {
			return err
		}
	}
	if got := algorithm + ":" + hex.EncodeToString(h.Sum(nil)); got != digest {
		return fmt.Errorf("%s, expected %s: %w", got, digest, ErrDigest)
	}
	return nil
}

const (
	refName        = "org.opencontainers.image.ref.name"
	containerdName = "io.containerd.image.name"
)

// tagged says whether an image has a name: as it is, or behind the last colon
// of a longer one.
func tagged(tag string, names ...string) bool {
	for _, n := range names {
		if n == tag || n != "" && strings.HasSuffix(n, ":"+tag) && !strings.Contains(tag, "/") {
			return true
		}
	}
	return false
}

func isIndex(mediaType string) bool {
	return mediaType == "application/vnd.oci.image.index.v1+json" || mediaType == "application/vnd.docker.distribution.manifest.list.v2+json"
}

func isManifest(mediaType string) bool {
	return mediaType == "" || mediaType == "application/vnd.oci.image.manifest.v1+json" || mediaType == "application/vnd.docker.distribution.manifest.v2+json"
}

// openLayout opens an image of an image layout.
func (im *Image) openLayout(ctx context.Context, opts *Options, want *platform, top index) error {
	list := top.Manifests
	var names []string
	for _, d := range list {
		if n := d.Annotations[refName]; n != "" && !slices.Contains(names, n) {
			names = append(names, n)
		}
	}
	if opts.Tag != "" {
		list = slices.DeleteFunc(slices.Clone(list), func(d descriptor) bool {
			return !tagged(opts.Tag, d.Annotations[refName], d.Annotations[containerdName])
		})
		if len(list) == 0 {
			return fmt.Errorf("%q: %w; there is: %s", opts.Tag, ErrNotFound, strings.Join(names, ", "))
		}
	} else if len(names) > 1 {
		return fmt.Errorf("%w without a name; there is: %s", ErrNotFound, strings.Join(names, ", "))
	}
	for range maxNested {
		d, err := choose(list, want, opts.Platform != "")
		if err != nil {
			return err
		}
		name, err := blobPath(d.Digest)
		if err != nil {
			return err
		}
		if isIndex(d.MediaType) {
			var next index
			if err := im.readJSON(name, d, &next); err != nil {
				return err
			}
			list = next.Manifests
			continue
		}
		if !isManifest(d.MediaType) {
			return fmt.Errorf("%s is of type %q: %w", d.Digest, d.MediaType, ErrUnsupported)
		}
		var m manifest
		if err := im.readJSON(name, d, &m); err != nil {
			return err
		}
		im.Digest = d.Digest
		return im.openManifest(ctx, opts, want, &m)
	}
	return fmt.Errorf("over %d indexes in each other: %w", maxNested, ErrUnsupported)
}

// choose returns the manifest for a platform. One that tells none is taken
// where there is no better.
func choose(list []descriptor, want *platform, asked bool) (*descriptor, error) {
	var untold, told []*descriptor
	var there []string
	for i := range list {
		d := &list[i]
		p := d.Platform
		switch {
		case p == nil:
			untold = append(untold, d)
		case p.OS == "unknown": // attestations, which are no images
		case p.fits(want):
			return d, nil
		default:
			told = append(told, d)
			there = append(there, p.String())
		}
	}
	switch {
	case len(untold) == 1:
		return untold[0], nil
	case len(untold) > 1:
		return nil, fmt.Errorf("%d images do not tell their platform: %w", len(untold), ErrNotFound)
	case len(told) == 1 && !asked:
		return told[0], nil
	}
	return nil, fmt.Errorf("%w for %s; there is: %s", ErrNotFound, want, strings.Join(there, ", "))
}

// openManifest opens the layers of a manifest.
func (im *Image) openManifest(ctx context.Context, opts *Options, want *platform, m *manifest) error {
	name, err := blobPath(m.Config.Digest)
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	if t := m.Config.MediaType; t != "application/vnd.oci.image.config.v1+json" && t != "application/vnd.docker.container.image.v1+json" {
		return fmt.Errorf("a configuration of type %q, which is no container image: %w", t, ErrUnsupported)
	}
	var c config
	if err := im.readJSON(name, &m.Config, &c); err != nil {
		return err
	}
	if err := im.setPlatform(&c, opts, want); err != nil {
		return err
	}
	if len(m.Layers) > maxLayers {
		return fmt.Errorf("%d layers: expected %d at most", len(m.Layers), maxLayers)
	}
	for i := range m.Layers {
		d := &m.Layers[i]
		if !strings.HasPrefix(d.MediaType, "application/vnd.oci.image.layer.") && !strings.HasPrefix(d.MediaType, "application/vnd.docker.image.rootfs.") || strings.HasSuffix(d.MediaType, "+encrypted") {
			return fmt.Errorf("layer %d is of type %q: %w", i+1, d.MediaType, ErrUnsupported)
		}
		name, err := blobPath(d.Digest)
		if err != nil {
			return fmt.Errorf("layer %d: %w", i+1, err)
		}
		f, err := im.store.open(name)
		if err == nil && f.size != d.Size {
			err = fmt.Errorf("%d bytes, expected %d: %w", f.size, d.Size, ErrDigest)
		}
		if err == nil {
			err = im.addLayer(ctx, f, d.Digest, "", opts.TempDir)
		}
		if err != nil {
			return fmt.Errorf("layer %d (%s): %w", i+1, name, err)
		}
	}
	return nil
}

func (im *Image) setPlatform(c *config, opts *Options, want *platform) error {
	im.Platform = c.platform.String()
	if opts.Platform != "" && !c.fits(want) {
		return fmt.Errorf("%w for %s: this one is for %s", ErrNotFound, want, im.Platform)
	}
	return nil
}

// addLayer opens a layer. Its blob has a digest, or else its content.
func (im *Image) addLayer(ctx context.Context, f file, digest, diffID, tempDir string) error {
	format, err := decomp.Detect(f)
	if err != nil {
		return err
	}
	sum := make(chan error, 1)
	if digest != "" {
		go func() { sum <- verify(ctx, f, digest) }()
	} else {
		sum <- nil
	}
	l := &Layer{Digest: digest, r: f, size: f.size, stat: f.stat}
	if format != "" {
		var d *decomp.Disk
		if d, err = decomp.Open(ctx, f, tempDir, nil); err == nil {
			im.closers = append(im.closers, d)
			l.r, l.size = d, d.Size()
		}
	}
	if e := <-sum; e != nil { // which tells more than what decompressing finds
		return e
	}
	if err != nil {
		return err
	}
	if diffID != "" {
		l.Digest = diffID
		if err := verify(ctx, file{l.r, l.size, nil}, diffID); err != nil {
			return err
		}
	}
	im.Layers = append(im.Layers, l)
	return nil
}

// openSaved opens an image that docker saved without a layout.
func (im *Image) openSaved(ctx context.Context, opts *Options, want *platform, list []saved) error {
	var found []saved
	var names []string
	for _, s := range list {
		names = append(names, s.RepoTags...)
		if opts.Tag == "" || tagged(opts.Tag, s.RepoTags...) {
			found = append(found, s)
		}
	}
	switch {
	case len(found) == 0:
		return fmt.Errorf("%q: %w; there is: %s", opts.Tag, ErrNotFound, strings.Join(names, ", "))
	case len(found) > 1:
		return fmt.Errorf("%w without a name; there is: %s", ErrNotFound, strings.Join(names, ", "))
	}
	s := found[0]
	var c config
	// The configuration is named by its digest: HEX.json, or a blob of a layout.
	sum := strings.TrimSuffix(path.Base(s.Config), ".json")
	f, err := im.store.open(s.Config)
	if err != nil {
		return err
	}
	if err := im.readJSON(s.Config, &descriptor{Digest: "sha256:" + sum, Size: f.size}, &c); err != nil {
		return err
	}
	if err := im.setPlatform(&c, opts, want); err != nil {
		return err
	}
	if len(s.Layers) > maxLayers || len(s.Layers) != len(c.RootFS.DiffIDs) {
		return fmt.Errorf("%d layers, and the configuration tells of %d: %w", len(s.Layers), len(c.RootFS.DiffIDs), ErrFormat)
	}
	for i, name := range s.Layers {
		diffID := c.RootFS.DiffIDs[i]
		f, err := im.store.open(name)
		if err == nil {
			_, err = blobPath(diffID)
		}
		if err == nil {
			err = im.addLayer(ctx, f, "", diffID, opts.TempDir)
		}
		if err != nil {
			return fmt.Errorf("layer %d (%s): %w", i+1, name, err)
		}
	}
	return nil
}

var _ blockdev.Reader = file{}

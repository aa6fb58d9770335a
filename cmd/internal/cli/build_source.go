package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"qimg/cloudimg/decomp"
	"qimg/cloudimg/oci"
	"qimg/ext4img"
	"qimg/qcow2/blockdev"
)

// sourceHelp is what the help of build says of sources.
const sourceHelp = `Each SOURCE is one of these, and later ones lie over earlier ones: a directory merges
with a directory and has its own owner and mode, anything else replaces what was there.

  DIR               a directory
  FILE.tar          a tar archive of any kind, by content also compressed (gzip, xz, zstd,
                    bzip2), with extended attributes, ACLs, holes and devices
  -                 such an archive on standard input
  oci:PATH[:TAG]    a container image: a layout of the OCI or what docker saved, as a
                    directory or archive; layers are verified, whiteouts applied`

// sourceOptions are the options of build that are about its sources.
type sourceOptions struct {
	manifests  []string
	uidMaps    []string
	gidMaps    []string
	platform   string
	maxEntries int64
}

// parse reads the options into those of a scan.
func (o *sourceOptions) parse(scan *ext4img.ScanOptions) (err error) {
	if o.maxEntries < 0 {
		return fmt.Errorf("--max-entries is a number above 0, not %d", o.maxEntries)
	}
	scan.MaxEntries = o.maxEntries
	if scan.UIDMap, err = parseIDMaps("uid-map", o.uidMaps); err != nil {
		return err
	}
	if scan.GIDMap, err = parseIDMaps("gid-map", o.gidMaps); err != nil {
		return err
	}
	if scan.Owner != nil && len(scan.UIDMap)+len(scan.GIDMap) > 0 {
		return errors.New("only one of --owner and --uid-map, --gid-map can be used")
	}
	return nil
}

func parseIDMaps(flag string, values []string) ([]ext4img.IDMap, error) {
	var maps []ext4img.IDMap
	for _, s := range values {
		var n [3]uint32
		f := strings.Split(s, ":")
		bad := len(f) != len(n)
		for i := 0; i < len(n) && !bad; i++ {
			v, err := strconv.ParseUint(f[i], 10, 32)
			n[i], bad = uint32(v), err != nil
		}
		if bad {
			return nil, fmt.Errorf("--%s is FROM:TO:COUNT, in numbers, not '%s'", flag, s)
		}
		maps = append(maps, ext4img.IDMap{From: n[0], To: n[1], Count: n[2]})
	}
	return maps, nil
}

// sourceSet is the sources of a build.
type sourceSet struct {
	host    Host
	warn    func(text string)
	output  string
	tempDir string
	names   []string // of each of the sources, as the user has them
	isDir   []bool
	sources []ext4img.Source
	closers []io.Closer
}

func (s *sourceSet) close() error {
	var errs []error
	for _, c := range s.closers {
		errs = append(errs, c.Close())
	}
	s.closers = nil
	return errors.Join(errs...)
}

func (s *sourceSet) add(name string, isDir bool, source ext4img.Source) {
	s.names = append(s.names, name)
	s.isDir = append(s.isDir, isDir)
	s.sources = append(s.sources, source)
}

// scanTree reads the sources, which stay open until close.
func (d *disk) scanTree(ctx context.Context, host Host, warn func(string)) (*ext4img.Tree, error) {
	d.scan.Warn = warn
	d.set = &sourceSet{host: host, warn: warn, output: d.output, tempDir: filepath.Dir(d.output)}
	if info, err := os.Stat(d.output); d.output == "-" || err == nil && !info.Mode().IsRegular() {
		d.set.tempDir = host.tempDir()
	}
	return d.set.scan(ctx, d.sources, &d.from, &d.scan)
}

// close closes the sources, after the tree.
func (d *disk) close() error {
	if d.set == nil {
		return nil
	}
	return d.set.close()
}

// sourceError names the place of an error in a source as the user does.
func (d *disk) sourceError(err error) error {
	if d.set != nil {
		return d.set.error(err, d.scan.SkipUnreadable)
	}
	return dirError(d.source, err)
}

// sourcePath is a path in the tree as messages have it.
func (d *disk) sourcePath(path string) string {
	if d.set != nil && (len(d.set.isDir) != 1 || !d.set.isDir[0]) {
		return "/" + strings.TrimPrefix(path, ".")
	}
	return filepath.Join(d.source, path)
}

func (s *sourceSet) scan(ctx context.Context, names []string, o *sourceOptions, scan *ext4img.ScanOptions) (*ext4img.Tree, error) {
	for _, name := range names {
		if err := s.open(ctx, name, o); err != nil {
			return nil, err
		}
	}
	for _, name := range o.manifests {
		f, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		s.closers = append(s.closers, f)
		s.add("", false, ext4img.Manifest(f, name, filepath.Dir(name)))
	}
	return ext4img.Merge(ctx, s.sources, scan)
}

const ociPrefix = "oci:"

// open opens a source by its name.
func (s *sourceSet) open(ctx context.Context, name string, o *sourceOptions) error {
	if image, ok := strings.CutPrefix(name, ociPrefix); ok {
		return s.openImage(ctx, name, image, o.platform)
	}
	if name == "-" {
		return s.openInput(ctx)
	}
	info, err := os.Stat(name)
	if err != nil {
		return err
	}
	if info.IsDir() {
		exclude, err := s.outputIn(name)
		if err != nil {
			return err
		}
		s.add(name, true, ext4img.Dir(name, exclude...))
		return nil
	}
	if out, err := os.Stat(s.output); err == nil && os.SameFile(info, out) {
		return fmt.Errorf("%s is the output, too", name)
	}
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	s.closers = append(s.closers, f)
	if !info.Mode().IsRegular() {
		return s.spoolTar(ctx, name, f)
	}
	return s.openTar(ctx, name, &sizedFile{f, info.Size()})
}

// sizedFile is a file of a known size.
type sizedFile struct {
	*os.File
	size int64
}

func (f *sizedFile) Size() int64 { return f.size }

// openInput opens standard input.
func (s *sourceSet) openInput(ctx context.Context) error {
	const name = "standard input"
	in := s.host.In
	if in == nil {
		in = eofReader{}
	}
	s.host.In = nil // which can be read once
	if f, ok := in.(*os.File); ok {
		// A file is as good as its name, if nothing of it was read before.
		info, err := f.Stat()
		if err == nil && info.Mode().IsRegular() {
			if at, err := f.Seek(0, io.SeekCurrent); err == nil && at == 0 {
				return s.openTar(ctx, name, &sizedFile{f, info.Size()})
			}
		}
	}
	return s.spoolTar(ctx, name, in)
}

// spoolTar adds an archive that can only be read once, by way of a temporary
// file.
func (s *sourceSet) spoolTar(ctx context.Context, name string, r io.Reader) error {
	out, err := newFile(filepath.Join(s.tempDir, "qimg-input"), &blockdev.CreateOptions{NoSync: true, NoLock: true})
	if err != nil {
		return err
	}
	s.closers = append(s.closers, closeFunc(out.Abort))
	if _, err := blockdev.Spool(out.File(), &input{ctx: ctx, r: r}); err != nil {
		return prefixError(name, err)
	}
	return s.openTar(ctx, name, out.File())
}

// openTar adds an archive, which may be compressed.
func (s *sourceSet) openTar(ctx context.Context, name string, r blockdev.Reader) error {
	format, err := decomp.Detect(r)
	if err != nil {
		return err
	}
	if format != "" {
		d, err := decomp.Open(ctx, r, s.tempDir, nil)
		if err != nil {
			return prefixError(name, err)
		}
		s.closers = append(s.closers, d)
		r = d
	}
	if ok, err := ext4img.IsTar(r); err != nil || !ok {
		if err == nil {
			err = errors.New("it is neither a directory nor a tar archive")
		}
		return prefixError(name, err)
	}
	s.add(name, false, ext4img.Tar(r, r.Size()))
	return nil
}

// openImage adds the layers of a container image.
func (s *sourceSet) openImage(ctx context.Context, name, image, platform string) error {
	path, tag := splitImage(image)
	im, err := oci.Open(ctx, path, &oci.Options{Tag: tag, Platform: platform, TempDir: s.tempDir})
	if err != nil {
		return prefixError(name, err)
	}
	s.closers = append(s.closers, im)
	for i, l := range im.Layers {
		s.add(fmt.Sprintf("%s: layer %d", name, i+1), false, ext4img.Layer(l, l.Size()))
	}
	if len(im.Layers) == 0 {
		return prefixError(name, errors.New("the image has no layers"))
	}
	return nil
}

// splitImage separates the path of an image from its name, either of which may
// have colons: the longest path that is there is the one.
func splitImage(image string) (path, tag string) {
	for end := len(image); end > 0; end = strings.LastIndexByte(image[:end], ':') {
		if _, err := os.Stat(image[:end]); err == nil {
			return image[:end], strings.TrimPrefix(image[end:], ":")
		}
	}
	return image, ""
}

// outputIn returns the pattern that leaves the output out of a directory, if it
// lies there, and says so if there is something to leave out.
func (s *sourceSet) outputIn(dir string) ([]string, error) {
	source, err := filepath.EvalSymlinks(dir)
	if err == nil {
		source, err = filepath.Abs(source)
	}
	if err != nil {
		return nil, nil // which the scan says better
	}
	var exclude []string
	places := []string{s.output}
	if target, err := filepath.EvalSymlinks(s.output); err == nil && target != s.output {
		places = append(places, target)
	}
	for _, p := range places {
		parent, err := filepath.EvalSymlinks(filepath.Dir(p))
		if err != nil {
			continue // the output cannot be made there, which is said later
		}
		if parent, err = filepath.Abs(parent); err != nil {
			return nil, err
		}
		rel, err := filepath.Rel(source, filepath.Join(parent, filepath.Base(p)))
		if err != nil || rel == "." || !filepath.IsLocal(rel) {
			continue
		}
		if _, err := os.Lstat(p); err == nil {
			exclude = append(exclude, "/"+literal(filepath.ToSlash(rel)))
			s.warn(p + " is the output: it is left out")
		}
	}
	return exclude, nil
}

// literal is the pattern that matches a path alone.
func literal(path string) string {
	return strings.NewReplacer(`\`, `\\`, "*", `\*`, "?", `\?`, "[", `\[`).Replace(path)
}

// error names the place of an error in a source as the user does.
func (s *sourceSet) error(err error, skipUnreadable bool) error {
	var se *ext4img.SourceError
	if !errors.As(err, &se) || se.Index >= len(s.names) {
		if len(s.names) == 1 && s.isDir[0] {
			return dirError(s.names[0], err)
		}
		return err
	}
	name := s.names[se.Index]
	if name == "" || errors.Is(err, context.Canceled) {
		return err // it tells its place itself
	}
	if !s.isDir[se.Index] {
		return prefixError(name, err)
	}
	err = dirError(name, err)
	if errors.Is(err, fs.ErrPermission) && !skipUnreadable {
		return withHint(err, "Use --skip-unreadable to leave out what cannot be read.\n")
	}
	return err
}

// dirError names the place of an error below a directory.
func dirError(dir string, err error) error {
	var pe *fs.PathError
	if !errors.As(err, &pe) || pe.Path == dir || filepath.IsAbs(pe.Path) {
		return err
	}
	return &fs.PathError{Op: pe.Op, Path: printable(filepath.Join(dir, pe.Path)), Err: pe.Err}
}

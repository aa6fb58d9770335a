package qcow2

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"

	"qimg/qcow2/blockdev"
)

// FileError is an error of opening a file that an image names.
type FileError struct {
	Backing bool   // a backing file; an external data file otherwise
	Depth   int    // of the image that names it: 0 is the one that was opened
	Path    string // "" if it is not known
	Err     error
}

func (e *FileError) Error() string { return e.Err.Error() }

// Unwrap returns Err.
func (e *FileError) Unwrap() error { return e.Err }

// fileError makes err a FileError, unless it comes from further below and is one.
func (im *Image) fileError(backing bool, path string, err error) error {
	if below := (*FileError)(nil); err == nil || errors.As(err, &below) {
		return err
	}
	return &FileError{backing, im.id, path, err}
}

// openDataFile sets im.data.
func (im *Image) openDataFile() error {
	if im.header.IncompatibleFeatures&IncompatDataFile == 0 {
		im.data = im.dev
		return nil
	}
	if d := im.shared.opts.DataDevice; d != nil && im.id == 0 {
		im.data = d
		return nil
	}
	name := im.header.DataFile()
	switch im.shared.opts.Backing {
	case BackingIgnore:
		return nil
	case BackingRefuse:
		return refused("external data file", name)
	}
	if im.probed {
		return guessed("external data file", name)
	}
	if name == "" {
		return headerError(ErrBacking, "external data file extension", "is missing: the data file has no name")
	}
	ref, err := parseReference(name)
	if err != nil {
		return err
	}
	if ref.format != "" && ref.format != "raw" && ref.format != "file" {
		return fmt.Errorf("qcow2: external data file %q: format %q, expected raw: %w", name, ref.format, ErrUnsupported)
	}
	path, err := im.resolve(ref)
	if err != nil {
		return fmt.Errorf("qcow2: external data file: %w", err)
	}
	f, err := im.shared.openFile(path, im.writes)
	if err != nil {
		return im.fileError(false, path, fmt.Errorf("qcow2: external data file: %w", err))
	}
	im.data = f
	im.closers = append(im.closers, f)
	return nil
}

// openBacking sets im.backing.
func (im *Image) openBacking() error {
	name := im.header.BackingFile
	if d := im.shared.opts.BackingDevice; d != nil && im.id == 0 {
		im.backing, im.backingName = d, "given in its place"
		if f, ok := d.(*blockdev.File); ok {
			im.backingName = f.Name()
		}
		return nil
	}
	if name == "" || im.shared.opts.Backing == BackingIgnore {
		return nil
	}
	if im.shared.opts.Backing == BackingRefuse {
		return refused("backing file", name)
	}
	if im.probed {
		return guessed("backing file", name)
	}
	ref, err := parseReference(name)
	if err != nil {
		return im.fileError(true, "", err)
	}
	if ref.format == "" {
		ref.format = im.header.BackingFormat()
	}
	if ref.path, err = im.resolve(ref); err != nil {
		return fmt.Errorf("qcow2: backing file: %w", err)
	}
	write := false
	if ask := im.shared.opts.WriteBacking; ask != nil {
		b := BackingFile{Depth: im.id + 1, Name: name, Path: ref.path}
		if own, ok := im.dev.(*blockdev.File); ok {
			b.Overlay = own.Name()
		}
		write = ask(b)
	}
	f, err := im.shared.openFile(ref.path, write)
	if err != nil {
		return im.fileError(true, ref.path, fmt.Errorf("qcow2: backing file: %w", err))
	}
	im.backingName = f.Name()
	im.backingProbed = ref.format == ""
	dev, err := im.shared.openFormat(f, ref, write)
	if err != nil {
		f.Close()
		return im.fileError(true, ref.path, im.inBacking(err))
	}
	im.backing = dev
	// An Image leaves its file open, and what is no Closer cannot close it.
	c, ok := dev.(io.Closer)
	if ok {
		im.closers = append(im.closers, c)
	}
	if _, image := dev.(*Image); !ok || image {
		im.closers = append(im.closers, f)
	}
	return nil
}

func refused(what, name string) error {
	return fmt.Errorf("qcow2: image names the %s %q: %w", what, name, ErrBacking)
}

func guessed(what, name string) error {
	return fmt.Errorf("qcow2: image names the %s %q, but its own format was only guessed: name the format of this image in the one above: %w", what, name, ErrBacking)
}

// chainError is an error of a file below the image that was opened.
type chainError struct {
	name string
	err  error
}

func (e *chainError) Error() string { return "backing file " + e.name + ": " + e.err.Error() }

func (e *chainError) Unwrap() error { return e.err }

// inBacking gives an error of the backing file its name, unless it comes from
// further below and has one.
func (im *Image) inBacking(err error) error {
	if below := (*chainError)(nil); err == nil || errors.As(err, &below) {
		return err
	}
	return &chainError{im.backingName, err}
}

// openFormat opens a backing file in the format that its overlay names; where
// it names none the format is that of the magic number, and raw only if there
// is none, as in QEMU. An image whose format was found so leads to no other
// file: a guest can write what makes a raw image look like one.
func (s *shared) openFormat(f *blockdev.File, ref reference, write bool) (blockdev.Reader, error) {
	format := ref.format
	probed := format == ""
	if probed {
		var err error
		if format, err = Probe(f); err != nil {
			return nil, err
		}
	}
	switch {
	case format == "qcow2":
		return s.open(f, ref, probed, write)
	case format == "raw" || format == "file":
		return f, s.enter(f)
	case s.opts.OpenFormat != nil:
		if err := s.enter(f); err != nil {
			return nil, err
		}
		return s.opts.OpenFormat(f, format)
	}
	return nil, fmt.Errorf("format %q: %w", format, ErrUnsupported)
}

// Probe names the format of an image by its magic number, in QEMU's word for
// it; "raw" where there is none that is known. A guest can write what it likes
// at the beginning of a raw disk: what Probe says of one is what the guest
// wants it to say.
func Probe(f io.ReaderAt) (format string, err error) {
	b := make([]byte, 512)
	if err := readFull(f, b, 0); err != nil {
		return "", err
	}
	for _, m := range []struct {
		off           int
		magic, format string
	}{
		{0, "QFI\xfb\x00\x00\x00\x01", "qcow"},
		{0, "QFI\xfb", "qcow2"},
		{0, "KDMV", "vmdk"},
		{0, "COWD", "vmdk"},
		{0, "# Disk Descriptor", "vmdk"},
		{0x40, "\x7f\x10\xda\xbe", "vdi"},
		{0, "conectix", "vpc"},
		{0, "vhdxfile", "vhdx"},
		{0, "QED\x00", "qed"},
		{0, "LUKS\xba\xbe", "luks"},
		{0, "WithoutFreeSpace", "parallels"},
		{0, "WithouFreSpacExt", "parallels"},
	} {
		if strings.HasPrefix(string(b[m.off:]), m.magic) {
			return m.format, nil
		}
	}
	return "raw", nil
}

// reference is a file that an image names.
type reference struct {
	path   string
	format string // "" if the name does not say
	// asIs: a relative path is relative to the working directory, not to the
	// image. QEMU takes names with a protocol so.
	asIs bool
	// keySecret is the id of the passphrase that the name gives, or "".
	keySecret string
}

// parseReference reads the name of a file as QEMU does: a path, file:PATH, or
// json:{...} with the options of the drivers raw or qcow2 over file.
func parseReference(name string) (reference, error) {
	if s, ok := strings.CutPrefix(name, "json:"); ok {
		return parseJSONReference(s)
	}
	if s, ok := strings.CutPrefix(name, "file:"); ok {
		return reference{path: s, asIs: true}, nil
	}
	if i := strings.IndexAny(name, ":/"); i >= 0 && name[i] == ':' && filepath.VolumeName(name) == "" {
		return reference{}, fmt.Errorf("qcow2: %q: protocol %q: %w", name, name[:i], ErrUnsupported)
	}
	return reference{path: name}, nil
}

func parseJSONReference(s string) (reference, error) {
	var options map[string]any
	if err := json.Unmarshal([]byte(s), &options); err != nil {
		return reference{}, fmt.Errorf("qcow2: json:%s: %w: %w", s, ErrBacking, err)
	}
	flat := make(map[string]string)
	if err := flatten(flat, "", options); err != nil {
		return reference{}, fmt.Errorf("qcow2: json:%s: %w", s, err)
	}
	r := reference{asIs: true}
	for key, value := range flat {
		switch key {
		case "driver":
			r.format = value
		case "filename", "file.filename":
			if r.path != "" {
				return r, fmt.Errorf("qcow2: json:%s: two file names: %w", s, ErrBacking)
			}
			r.path = value
		case "encrypt.key-secret":
			r.keySecret = value
		case "encrypt.format": // the header says it
		case "file.driver":
			if value != "file" {
				return r, fmt.Errorf("qcow2: json:%s: file driver %q: %w", s, value, ErrUnsupported)
			}
		default:
			return r, fmt.Errorf("qcow2: json:%s: option %q: %w", s, key, ErrUnsupported)
		}
	}
	if r.path == "" {
		return r, fmt.Errorf("qcow2: json:%s: no file name: %w", s, ErrBacking)
	}
	return r, nil
}

// flatten turns objects in objects into names with dots. The name is short
// (maxBackingFileSize, maxDataFileSize), so the depth is bounded.
func flatten(flat map[string]string, prefix string, options map[string]any) error {
	for key, value := range options {
		switch v := value.(type) {
		case string:
			if _, twice := flat[prefix+key]; twice {
				return fmt.Errorf("option %q is there twice: %w", prefix+key, ErrBacking)
			}
			flat[prefix+key] = v
		case map[string]any:
			if err := flatten(flat, prefix+key+".", v); err != nil {
				return err
			}
		default:
			return fmt.Errorf("option %q: %w", prefix+key, ErrUnsupported)
		}
	}
	return nil
}

// resolve returns the path of a file that the image names, relative to the
// folder that the image lies in.
func (im *Image) resolve(r reference) (string, error) {
	if r.asIs || filepath.IsAbs(r.path) {
		return r.path, nil
	}
	f, ok := im.dev.(*blockdev.File)
	if !ok {
		return "", fmt.Errorf("%q is relative to an image that is no file: %w", r.path, ErrBacking)
	}
	// Not filepath.Join: it would take "a/link/../b" for "a/b".
	dir, _ := filepath.Split(f.Name())
	return dir + r.path, nil
}

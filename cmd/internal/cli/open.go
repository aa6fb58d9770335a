package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"syscall"

	"qimg/cloudimg/formats"
	"qimg/qcow2"
	"qimg/qcow2/blockdev"
)

// openOptions says how an image is opened.
type openOptions struct {
	format    string // "": found by the first bytes, unless hasFormat
	hasFormat bool   // a format was given, an empty one too
	imageOpts bool   // the image is named by options
	// forceShare looks at an image that a running machine uses.
	forceShare bool
	// chain opens the backing and data files too.
	chain bool
	// locked needs no passphrase of an encrypted image where none is named, or
	// where there are no secrets: the guest data stays locked.
	locked bool
	// write opens the image for writing, and warns of a raw image whose format
	// was not given.
	write bool
	// damaged opens a qcow2 image to be repaired: what it lies in is opened as
	// write says, the image itself for reading, and not at all if it is damaged.
	damaged bool
	// unopened opens what a qcow2 image lies in, and not the image.
	unopened bool
	// layer, if set, is told each backing file, and tells whether it is opened
	// for writing too.
	layer func(qcow2.BackingFile) bool
	// below opens an image that is, or is to become, a backing file: one of qcow2
	// or raw alone.
	below bool
	// opened, if set, is told the path of each file that is opened but for those
	// that an image names.
	opened func(path string)
	// complete refuses to read what a truncated qcow2 image lacks.
	complete bool
	// snapshot, if set, is read in place of the active content.
	snapshot string
	// cacheSize bounds the tables in memory, in bytes; 0: what the library has.
	cacheSize int64
	// level is that of clusters that are written compressed; 0: what the library
	// has.
	level   int
	secrets *secrets
	host    Host // for warnings
}

// image is an image that is open.
type image struct {
	arg    string // as it was given
	name   string // its path, or json: with what the path does not say
	format string // qcow2, raw, one of package formats, or file for a file that is taken as it is
	// probed: the format was found by the first bytes, which a guest can write.
	probed bool
	file   *blockdev.File
	// inUse is the error of its lock if another process writes to it: only a raw
	// image is then read.
	inUse error
	// dev is what the format lies in, or the disk itself if it is raw. It is a
	// blockdev.Device if the image was opened for writing.
	dev     blockdev.Reader
	qcow2   *qcow2.Image   // nil: another format
	foreign *formats.Image // nil: raw or qcow2
	options object         // in which it differs from others of its name and format
	closers []io.Closer
}

// openImage opens an image. Errors are in qemu-img's words where it has some;
// the caller puts couldNotOpen around them.
//
// For reading it opens all formats of package formats, by name or by their first
// bytes, also as openOptions.chain and format say of qcow2 and raw: a command has
// nothing to do for them, if it reads the disk by img.reader() and img.size() (not
// img.dev, which is the file that the image lies in) and takes img.qcow2 == nil
// for "not qcow2", img.format == "raw" for raw. With openOptions.write they are
// refused, and so they are below another image.
func openImage(ctx context.Context, arg string, o *openOptions) (*image, error) {
	opts := blockOptions{}
	name := &arg
	switch {
	case o.imageOpts && (o.format != "" || o.hasFormat):
		return nil, &bareError{messagef("--image-opts and --format are mutually exclusive")}
	case o.imageOpts:
		var err error
		if opts, err = parseImageOpts(arg, o.host); err != nil {
			return nil, err
		}
		name = nil
		if share, ok := opts["force-share"]; ok && share != "on" && o.forceShare {
			return nil, &bareError{messagef("--force-share/-U conflicts with image options")}
		}
	case o.format != "", o.hasFormat:
		opts["driver"] = o.format
	}
	n := &opening{ctx: ctx, openOptions: o, write: o.write, forceShare: o.forceShare}
	img, err := n.open(name, opts, false)
	if err != nil {
		return nil, err
	}
	if o.write && !n.write {
		img.close()
		return nil, messagef("Block node is read-only")
	}
	img.arg = arg
	return img, nil
}

// bareError is an error of an image that is told without its name.
type bareError struct{ err error }

func (e *bareError) Error() string { return e.err.Error() }
func (e *bareError) Unwrap() error { return e.err }

// close closes the image. Of one that was written to it writes the rest first:
// the error tells if that failed.
func (img *image) close() error {
	var errs []error
	for _, c := range slices.Backward(img.closers) {
		errs = append(errs, c.Close())
	}
	img.closers = nil
	return errors.Join(errs...)
}

// closeTo closes the image after work that ended with *err. What Close says is
// the error where there is none.
func (img *image) closeTo(err *error) {
	if e := img.close(); *err == nil {
		*err = e
	}
}

// reader returns the disk.
func (img *image) reader() blockdev.Reader {
	switch {
	case img.qcow2 != nil:
		return img.qcow2
	case img.foreign != nil:
		return img.foreign
	}
	return img.dev
}

// size returns the virtual size; that of a raw image is in whole sectors.
func (img *image) size() int64 { return (img.reader().Size() + 511) &^ 511 }

// probe tells the format of a file by its first bytes. A format that qimg does
// not read is no raw disk either: its size would be taken for the disk's.
func probe(f io.ReaderAt) (string, error) {
	format, err := formats.Detect(f)
	if err == nil && format != "raw" && format != "qcow2" && !slices.Contains(formats.Foreign(), format) {
		err = fmt.Errorf("it is in format %s, which qimg does not read (with -f raw it is taken byte by byte)", format)
	}
	return format, err
}

// couldNotOpen is the message of a command whose image cannot be opened.
func couldNotOpen(name string, err error) error {
	if bare := (*bareError)(nil); errors.As(err, &bare) {
		return err
	}
	return prefixError(fmt.Sprintf("Could not open '%s'", name), err)
}

// prefixError puts text before the message of an error, and keeps its hint.
func prefixError(text string, err error) error {
	var cmd *cmdError
	if errors.As(err, &cmd) {
		return withHint(fmt.Errorf("%s: %w", text, cmd.err), cmd.hint)
	}
	return fmt.Errorf("%s: %w", text, err)
}

// lockText is a lock that another process holds, in qemu-img's words.
type lockText struct{ *blockdev.LockError }

func (e *lockText) Error() string { return e.Reason() }
func (e *lockText) Unwrap() error { return e.LockError }

func lockHint(name string) string {
	return fmt.Sprintf("Is another process using the image [%s]?\n", name)
}

// strerror is the text of C for an error number, which begins in upper case.
func strerror(errno syscall.Errno) string {
	s := errno.Error()
	return strings.ToUpper(s[:1]) + s[1:]
}

// combinePath is the path of a file that the image at base names.
func combinePath(base, name string) string {
	if _, ok := protocol(name); ok || isAbs(name) {
		return name
	}
	i := strings.LastIndexFunc(base, func(r rune) bool { return r < 0x80 && os.IsPathSeparator(uint8(r)) })
	return base[:i+1] + name
}

// isAbs reports whether QEMU takes a path for absolute.
func isAbs(path string) bool { return path != "" && os.IsPathSeparator(path[0]) }

package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"syscall"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/transfer"
)

// convertTarget is the output of convert: a new file or device, an image that
// exists, or a pipe.
type convertTarget struct {
	o    *convertOptions
	srcs *convertSources
	name string // as it was given
	size int64

	// Of a new image.
	opts      *optionList
	create    *qcow2.CreateOptions // nil: raw
	files     qcow2Target          // of a raw one without a data file
	backing   *image
	writer    *qcow2.Writer // nil: the image is written in place
	made      *qcow2.Image  // a new image that is written in place
	finished  bool          // writer
	allocated bool          // in advance, encrypted: what is not written is no zeroes

	existing *image // with -n
	stream   bool
	out      io.Writer // of a stream
	pipe     *os.File  // nil: out is standard output
}

// newConvertTarget checks the options of the output, in qemu-img's order.
func (o *convertOptions) newConvertTarget(name string, srcs *convertSources) (*convertTarget, error) {
	t := &convertTarget{o: o, srcs: srcs, name: name, size: srcs.Size()}
	t.stream = !o.targetOpts && (name == "-" || isPipe(name))
	hasBacking := o.hasBacking
	if !o.noCreate {
		if err := t.parseOptions(); err != nil {
			return nil, err
		}
		hasBacking = t.opts.has("backing_file")
	}
	switch {
	case o.targetIsZero && hasBacking:
		return nil, messagef("Cannot use --target-is-zero when the destination image has a backing file")
	case len(srcs.images) > 1 && hasBacking:
		return nil, messagef("Having a backing file for the target makes no sense when concatenating multiple input images")
	case t.opts != nil && hasBacking && !t.opts.has("backing_fmt"):
		return nil, messagef("Use of backing file requires explicit backing format")
	}
	if o.compress && t.opts != nil {
		switch {
		case o.format != "qcow2":
			return nil, messagef("Compression not supported for this file format")
		case t.opts.bool("encryption") || t.opts.has("encrypt.format"):
			return nil, messagef("Compression and encryption not supported at the same time")
		case t.opts.has("preallocation") && t.opts.str("preallocation") != "off":
			return nil, messagef("Compression and preallocation not supported at the same time")
		}
	}
	if o.bitmaps {
		if err := o.checkBitmaps(srcs); err != nil {
			return nil, err
		}
	}
	return t, nil
}

// parseOptions reads -o, -B and -F.
func (t *convertTarget) parseOptions() error {
	o := t.o
	descs, err := formatOptions(o.format)
	if err != nil {
		return err
	}
	if _, err := localPath(t.name); err != nil {
		return err
	}
	t.opts = newOptionList(append(descs, fileOptions(descs)...))
	if err := t.opts.parse(o.options.String()); err != nil {
		return err
	}
	t.opts.values["size"] = strconv.FormatInt(t.size, 10)
	if o.hasBacking && t.opts.set("backing_file", o.backing) != nil {
		return messagef("Backing file not supported for file format '%s'", o.format)
	}
	if o.hasBackingFormat && t.opts.set("backing_fmt", o.backingFormat) != nil {
		return messagef("Backing file format not supported for file format '%s'", o.format)
	}
	return nil
}

// open begins a new image, or opens one that exists.
func (t *convertTarget) open(ctx context.Context) (err error) {
	switch {
	case t.stream:
		return t.openStream(ctx)
	case t.o.noCreate:
		return t.openExisting(ctx)
	}
	if err := t.begin(ctx); err != nil {
		if errors.Is(err, syscall.ENOSPC) {
			err = &ioError{err}
		}
		return prefixError(fmt.Sprintf("%s: error while converting %s", t.name, t.o.format), err)
	}
	if err := checkCache("cache", t.o.cache); err != nil {
		return err
	}
	if t.create == nil {
		return t.checkBitmapSupport("raw", 3)
	}
	if err := t.openBacking(ctx); err != nil {
		return couldNotOpen(t.name, err)
	}
	return t.checkBitmapSupport("qcow2", t.create.Version)
}

// checkBitmapSupport refuses --bitmaps for an image that has none.
func (t *convertTarget) checkBitmapSupport(format string, version int) error {
	if t.o.bitmaps && (format != "qcow2" || version == 2) {
		return messagef("Format driver '%s' does not support bitmaps", format)
	}
	return nil
}

// refuseSources refuses an output whose place is that of an input.
func (t *convertTarget) refuseSources(output string) error {
	info, err := os.Stat(output)
	if err != nil { // it is new
		return nil
	}
	if path := t.srcs.overlapping(info); path != "" {
		return fmt.Errorf("output '%s' is an input, or in the backing chain of one: '%s'", output, path)
	}
	return nil
}

// refuseStdout refuses to write to standard output if that is one of the inputs.
func (t *convertTarget) refuseStdout() error {
	o, ok := t.o.host.Out.(*output)
	if !ok {
		return nil
	}
	f, ok := o.w.(*os.File)
	if !ok {
		return nil
	}
	info, err := f.Stat()
	if err != nil {
		return nil // what is wrong shows when it is written
	}
	if path := t.srcs.overlapping(info); path != "" {
		return fmt.Errorf("standard output is an input, or in the backing chain of one: '%s'", path)
	}
	return nil
}

// unsafe reports whether nothing is synced.
func (o *convertOptions) unsafe() bool { return o.cache == "unsafe" }

// begin makes an empty image, in files that are not committed yet.
func (t *convertTarget) begin(ctx context.Context) error {
	path, err := localPath(t.name)
	if err != nil {
		return err
	}
	if t.o.format != "qcow2" {
		t.files.image, err = beginRaw(ctx, path, t.opts, t.o.unsafe(), t.refuseSources)
		return err
	}
	if t.create, err = qcow2Options(t.opts, t.o.source.secrets); err != nil {
		return err
	}
	if t.files, err = beginQcow2(path, t.opts, t.create, t.o.unsafe()); err != nil {
		return err
	}
	if err := t.refuseSources(t.files.image.dev.Name()); err != nil {
		return err
	}
	if t.files.data != nil {
		if err := t.refuseSources(t.files.data.dev.Name()); err != nil {
			return err
		}
		if t.o.compress {
			return errors.New("clusters of an image with an external data file cannot be compressed")
		}
	}
	return t.beginQcow2(ctx)
}

// openBacking opens the backing file of the new image.
func (t *convertTarget) openBacking(ctx context.Context) error {
	if t.create.BackingFile == "" {
		return nil
	}
	var err error
	t.backing, err = openImage(ctx, combinePath(t.name, t.create.BackingFile), &openOptions{
		format: t.create.BackingFormat, hasFormat: true, chain: true, below: true, secrets: t.o.source.secrets, host: t.o.host,
	})
	if err != nil {
		return prefixError("Could not open backing file", err)
	}
	return nil
}

// beginQcow2 begins the new image in its file: by a Writer, unless it has to be
// written in place.
func (t *convertTarget) beginQcow2(ctx context.Context) (err error) {
	file := t.files.image
	prealloc := t.create.Preallocation != qcow2.PreallocationOff || t.create.DataFileRaw
	if t.files.data == nil && !prealloc && (file.out != nil || t.o.compress) {
		t.writer, err = qcow2.NewWriter(ctx, file.dev, t.size, &qcow2.WriterOptions{
			FormatOptions: t.create.FormatOptions, Compress: t.o.compress, CompressionLevel: t.o.level, InOrder: true,
			StoreZeroes: t.o.hasSparse && t.o.sparse == 0,
			Sync:        file.out == nil && !t.o.unsafe(),
		})
		return err
	}
	t.allocated = prealloc && t.create.Encrypt.Method != qcow2.CryptNone
	return qcow2.Create(ctx, file.dev, t.size, t.create)
}

// openMade opens the new image to be written in place.
func (t *convertTarget) openMade() (*qcow2.Image, error) {
	opts := &qcow2.OpenOptions{
		Write:   true,
		Backing: qcow2.BackingIgnore,
		Secret:  func(qcow2.SecretRequest) ([]byte, error) { return t.create.Encrypt.Passphrase, nil },
	}
	if t.backing != nil {
		opts.BackingDevice = t.backing.reader()
	}
	if t.files.data != nil {
		opts.DataDevice = t.files.data.dev
	}
	return qcow2.New(t.files.image.dev, opts)
}

// openExisting opens the image that -n writes.
func (t *convertTarget) openExisting(ctx context.Context) error {
	o := t.o
	if err := checkCache("cache", o.cache); err != nil {
		return err
	}
	open := &openOptions{format: o.format, hasFormat: o.hasFormat || !o.targetOpts, imageOpts: o.targetOpts,
		chain: true, write: true, level: o.level, secrets: o.source.secrets, host: o.host}
	img, err := openImage(ctx, t.name, open)
	if err != nil {
		return couldNotOpen(t.name, err)
	}
	t.existing = img
	if err := t.refuseSources(img.file.Name()); err != nil {
		return err
	}
	if img.qcow2 != nil {
		h := img.qcow2.Header()
		if data := h.DataFile(); data != "" {
			if err := t.refuseSources(combinePath(img.file.Name(), data)); err != nil {
				return err
			}
		}
	}
	version := 3
	if img.qcow2 != nil {
		version = int(img.qcow2.Header().Version)
	}
	if err := t.checkBitmapSupport(img.format, version); err != nil {
		return err
	}
	switch {
	case o.compress && img.qcow2 == nil:
		return messagef("Compression not supported for this file format")
	case img.size() < t.size:
		return messagef("output file is smaller than input file")
	}
	return nil
}

// openStream opens the pipe.
func (t *convertTarget) openStream(ctx context.Context) (err error) {
	o := t.o
	switch {
	case o.format != "raw":
		return fmt.Errorf("an image of format '%s' cannot be written to a pipe: it needs a file; raw can", o.format)
	case o.bitmaps:
		return t.checkBitmapSupport("raw", 3)
	case t.opts != nil && t.opts.str("preallocation") != "" && t.opts.str("preallocation") != "off":
		return messagef("Unsupported preallocation mode '%s'", t.opts.str("preallocation"))
	}
	if err := checkCache("cache", o.cache); err != nil {
		return err
	}
	if t.name == "-" {
		if err := t.refuseStdout(); err != nil {
			return err
		}
		t.out, err = imageWriter(o.host.Out)
		return err
	}
	t.pipe, err = unlessDone(ctx, 0, func() (*os.File, error) { return os.OpenFile(t.name, os.O_WRONLY, 0) })
	if err == nil {
		t.out, err = imageWriter(newOutput(ctx, t.pipe))
	}
	return err
}

// copy copies the sources.
func (t *convertTarget) copy(ctx context.Context, srcs *convertSources, p *progress) error {
	opts := t.o.transferOptions(p)
	if t.o.salvage && !t.o.quiet {
		if err := t.o.warnExtents(ctx, srcs, srcs.Size()); err != nil {
			return err
		}
	}
	if t.stream {
		return copyError(transfer.Stream(ctx, t.out, srcs, opts))
	}
	if t.backing != nil {
		srcs.split = t.backing.size()
	}
	switch {
	case t.backing != nil || t.o.noCreate && t.o.hasBacking:
		opts.Keep = func(e blockdev.Extent) bool {
			return e.Depth > 0 || t.backing != nil && e.Off >= srcs.split && e.Kind.ReadsZero()
		}
	case t.o.noCreate:
		opts.TargetIsZero = t.o.targetIsZero
	default:
		opts.TargetIsZero = t.readsZero()
	}
	return copyError(t.transfer(ctx, srcs, opts))
}

// readsZero reports whether a new image reads as zeroes before it is written.
func (t *convertTarget) readsZero() bool { return t.files.image.out != nil && !t.allocated }

// transfer copies src to the output.
func (t *convertTarget) transfer(ctx context.Context, src blockdev.Reader, opts *transfer.Options) error {
	dst, err := t.device()
	if err != nil {
		return err
	}
	switch dst.(type) {
	case *qcow2.Image, clearedImage: // clusters get their places as they are written
		opts.InOrder = true
	}
	if err := transfer.Copy(ctx, dst, src, opts); err != nil || t.writer == nil {
		return err
	}
	t.finished = true
	return t.writer.Finish()
}

// device returns what the copy is written to.
func (t *convertTarget) device() (transfer.Target, error) {
	switch {
	case t.writer != nil:
		return t.writer, nil
	case t.create != nil:
		var err error
		t.made, err = t.openMade()
		return t.made, err
	case t.existing == nil:
		return t.files.image.dev, nil
	case t.existing.qcow2 != nil && t.o.compress:
		return t.existing.qcow2.NewCompressedWriter()
	case t.existing.qcow2 != nil:
		return clearedImage{t.existing.qcow2}, nil
	}
	dev := t.existing.dev.(blockdev.Device) // it was opened for writing
	if f, ok := dev.(*blockdev.File); ok && f.Size() < t.size {
		return f, f.Truncate(t.size) // of its last sector the file has a part
	}
	return dev, nil
}

// clearedImage is an image that exists. Zeroes give its space back, as in qemu-img.
type clearedImage struct{ *qcow2.Image }

func (t clearedImage) WriteZeroes(off, n int64) error { return t.Clear(off, n) }

// forBitmaps returns the output as an image whose bitmaps can be changed, and
// what is to be called then.
func (t *convertTarget) forBitmaps() (im *qcow2.Image, finish func() error, err error) {
	switch {
	case t.existing != nil:
		return t.existing.qcow2, func() error { return nil }, nil
	case t.made != nil:
		return t.made, func() error { return nil }, nil
	}
	im, err = t.openMade()
	if err != nil {
		return nil, nil, err
	}
	return im, im.Close, nil
}

// commit makes the output complete.
func (t *convertTarget) commit() (err error) {
	defer t.abort()
	switch {
	case t.pipe != nil:
		pipe := t.pipe
		t.pipe = nil
		return pipe.Close()
	case t.stream:
		return nil
	case t.existing != nil:
		if !t.o.unsafe() {
			err = blockdev.Sync(t.existing.reader())
		}
		t.existing.closeTo(&err)
		return err
	case t.made != nil:
		if err := t.made.Close(); err != nil {
			return err
		}
	}
	return t.files.commit()
}

// abort drops what is not committed.
func (t *convertTarget) abort() {
	if t.writer != nil && !t.finished {
		t.writer.Abort()
	}
	if t.made != nil {
		t.made.Close()
	}
	t.files.abort()
	for _, img := range []*image{t.backing, t.existing} {
		if img != nil {
			img.close()
		}
	}
	if t.pipe != nil {
		t.pipe.Close()
	}
}

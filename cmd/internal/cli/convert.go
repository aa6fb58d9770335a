package cli

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/transfer"
)

type convertOptions struct {
	host          Host
	source        openOptions // of the inputs
	format        string      // of the output
	targetOpts    bool        // the output is named by options
	backing       string
	backingFormat string
	options       optionArgs
	snapshot      snapshotArg
	cache         string
	sourceCache   string
	sparse        sparseArg
	workers       workersArg
	rate          rateArg
	level         int

	causes map[string]bool // why something cannot be read, as far as it was told

	compress, noCreate, kernelCopy, outOfOrder bool
	progress, quiet                            bool
	bitmaps, skipBroken, salvage, targetIsZero bool

	// -O, -B, -F, -S, --compression-level were given, maybe with empty values.
	hasFormat, hasBacking, hasBackingFormat, hasSparse, hasLevel bool
}

func newConvert(host Host) *cobra.Command {
	o := convertOptions{host: host, snapshot: snapshotArg{host: host}}
	cmd := &cobra.Command{
		Use:   "convert [-f FORMAT] [-O FORMAT] [-c] [-o OPTIONS] [-l SNAPSHOT] [-p] FILE... OUTPUT",
		Short: "Copy images into another, in another format",
		Long: "Copy an image into another, maybe in another format. Several are copied one behind\n" +
			"the other.\n\n" +
			"The output is there when it is complete, and not before: what fails, or is killed,\n" +
			"leaves an older file as it was. Only with -n, and on a device, is it written in\n" +
			"place. An output that is an input, or in the backing chain of one, is refused.\n" +
			"As in qemu-img nothing is synced unless -t names another mode than unsafe.\n\n" +
			"FILE - or a pipe is a raw disk that is read from there, into a temporary file in\n" +
			"the directory of the output; OUTPUT - or a pipe gets a raw disk. Other formats need\n" +
			"a file. A snapshot (-l) has the size that the disk had then.",
		Example: "  qimg convert -O qcow2 disk.raw disk.qcow2\n" +
			"  qimg convert -c -O qcow2 -o compression_type=zstd disk.raw small.qcow2\n" +
			"  qimg convert -O qcow2 -l before-upgrade disk.qcow2 old.qcow2\n" +
			"  qimg convert -O raw disk.qcow2 - | ssh host 'cat > disk.raw'",
		RunE: func(cmd *cobra.Command, args []string) error {
			given := cmd.Flags().Changed
			o.hasFormat, o.hasBacking = given("output-format"), given("backing")
			o.hasBackingFormat, o.hasSparse = given("backing-format"), given("sparse")
			o.hasLevel = given("compression-level")
			return runConvert(cmd.Context(), &o, args)
		},
	}
	f := cmd.Flags()
	o.source.addFlags(f, host)
	o.source.addForceShare(f)
	f.StringVarP(&o.format, "output-format", "O", "", "format of the output: raw or qcow2 (default raw)")
	f.BoolVarP(&o.compress, "compress", "c", false, "compress the clusters of a qcow2 output")
	f.IntVar(&o.level, "compression-level", 0, "with -c: 1, the fastest, to 9, the smallest")
	f.VarP(&o.options, "options", "o", "options of the output format, as NAME=VALUE,...; -O FORMAT -o help lists them")
	f.StringVarP(&o.backing, "backing", "B", "", "backing file of the output: what the first layer of the input does not hold is left to it")
	f.StringVarP(&o.backingFormat, "backing-format", "F", "", "format of the backing file of the output")
	f.VarP(&o.snapshot, "snapshot", "l", "convert the snapshot of this id or name; or snapshot.id=ID,snapshot.name=NAME")
	f.BoolVarP(&o.noCreate, "no-create", "n", false, "write into an image that exists")
	f.BoolVar(&o.targetOpts, "target-image-opts", false, "OUTPUT stands for options, as FILE with --image-opts; needs -n")
	f.BoolVar(&o.targetIsZero, "target-is-zero", false, "the image that exists reads as zeroes; needs -n")
	f.VarP(&o.sparse, "sparse", "S", "bytes of zeroes in a row that are not written; 0 writes everything")
	f.BoolVarP(&o.kernelCopy, "copy-range", "C", false, "let the kernel copy, with the zeroes in the data")
	f.VarP(&o.workers, "workers", "m", "parts that are copied at the same time, 1 to 16 (default: one for each processor)")
	f.BoolVarP(&o.outOfOrder, "out-of-order", "W", false, "for qemu-img's sake: parts are written as they come anyway")
	f.VarP(&o.rate, "rate", "r", "bytes to write a second at most")
	f.StringVarP(&o.cache, "cache", "t", "unsafe", "cache mode of the output: all but unsafe sync it at the end")
	f.StringVarP(&o.sourceCache, "source-cache", "T", "writeback", "cache mode of the input, for qemu-img's sake: it changes nothing")
	f.BoolVar(&o.bitmaps, "bitmaps", false, "copy the persistent bitmaps, too")
	f.BoolVar(&o.skipBroken, "skip-broken-bitmaps", false, "leave out those that are inconsistent")
	f.BoolVar(&o.salvage, "salvage", false, "go on where the input cannot be read, with zeroes in its place")
	f.BoolVarP(&o.progress, "progress", "p", false, "print the progress")
	f.BoolVarP(&o.quiet, "quiet", "q", false, "print errors only")
	return cmd
}

// snapshotArg is -l.
type snapshotArg struct {
	host     Host
	any      string            // an id, or else a name; "": none
	selected map[string]string // snapshot.id, snapshot.name; nil: none
}

func (s *snapshotArg) String() string { return s.any }
func (s *snapshotArg) Type() string   { return "snapshot" }

func (s *snapshotArg) Set(arg string) error {
	if !strings.HasPrefix(arg, "snapshot.") {
		s.any = arg
		return nil
	}
	l := newOptionList([]optionDesc{{name: "snapshot.id"}, {name: "snapshot.name"}})
	s.host.warnShort(splitOptions(arg))
	if err := l.parse(arg); err != nil {
		return messagef("%w\nFailed in parsing snapshot param '%s'", err, arg)
	}
	s.selected = l.values
	return nil
}

// sparseArg is -S in bytes.
type sparseArg int64

func (s *sparseArg) String() string { return "4k" }
func (s *sparseArg) Type() string   { return "size" }

func (s *sparseArg) Set(arg string) error {
	n, err := sizeArg("buffer size for sparse output", arg)
	if err != nil {
		return err
	}
	if n%512 != 0 || n > 16<<20 {
		return messagef("Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to %d. Select 0 to disable sparse detection (fully allocates output).", 16<<20)
	}
	*s = sparseArg(n)
	return nil
}

// workersArg is -m.
type workersArg int

func (w *workersArg) String() string { return "" }
func (w *workersArg) Type() string   { return "number" }

func (w *workersArg) Set(arg string) error {
	n, err := strconv.ParseInt(strings.TrimLeft(arg, " \t\n\v\f\r"), 0, 64)
	if err != nil || n < 1 || n > transfer.MaxWorkers {
		return messagef("Invalid number of coroutines. Allowed number of coroutines is between 1 and %d", transfer.MaxWorkers)
	}
	*w = workersArg(n)
	return nil
}

// rateArg is -r.
type rateArg int64

func (r *rateArg) String() string { return "" }
func (r *rateArg) Type() string   { return "size" }

func (r *rateArg) Set(arg string) error {
	n, err := sizeArg("rate limit", arg)
	*r = rateArg(n)
	return err
}

// check checks what does not go together, in the order of qemu-img.
func (o *convertOptions) check(args []string) error {
	switch {
	case o.skipBroken && !o.bitmaps:
		return messagef("Use of --skip-broken-bitmaps requires --bitmaps")
	case o.compress && o.kernelCopy:
		return messagef("Cannot enable copy offloading when -c is used")
	case o.hasSparse && o.kernelCopy:
		return messagef("Cannot enable copy offloading when -S is used")
	case o.kernelCopy && o.salvage:
		return messagef("Cannot use copy offloading in salvaging mode")
	case o.targetOpts && !o.noCreate:
		return messagef("--target-image-opts requires use of -n flag")
	case o.noCreate && len(o.options) > 0:
		return messagef("-o has no effect when skipping image creation")
	case o.targetIsZero && !o.noCreate:
		return messagef("--target-is-zero requires use of -n flag")
	case o.hasLevel && !o.compress:
		return messagef("--compression-level requires -c")
	case o.hasLevel && (o.level < 1 || o.level > qcow2.MaxCompressionLevel):
		return messagef("Invalid compression level. It is between 1 and %d", qcow2.MaxCompressionLevel)
	}
	return nil
}

func runConvert(ctx context.Context, o *convertOptions, args []string) error {
	if !o.hasFormat && !o.targetOpts {
		o.format = "raw"
	}
	if err := o.check(args); err != nil {
		return err
	}
	if wantsHelp(o.options.String()) {
		return createHelp(o.host, o.format, len(args) > 1)
	}
	if len(args) < 2 {
		return messagef("Must specify image file name")
	}
	if err := checkCache("source cache", o.sourceCache); err != nil {
		return err
	}
	p := newProgress(o.host, o.progress && !o.quiet, 1)
	err := o.convert(ctx, args[:len(args)-1], args[len(args)-1], p)
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	p.end(err == nil)
	return err
}

// convert copies the inputs to the output.
func (o *convertOptions) convert(ctx context.Context, names []string, name string, p *progress) error {
	srcs, err := o.openSources(ctx, names, name)
	defer srcs.close()
	if err != nil {
		return err
	}
	out, err := o.newConvertTarget(name, srcs)
	if err != nil {
		return err
	}
	if err := out.open(ctx); err != nil {
		out.abort()
		return err
	}
	err = out.copy(ctx, srcs, p)
	if err == nil && o.bitmaps {
		err = out.copyBitmaps(ctx, srcs.images[0].qcow2)
	}
	if err != nil {
		out.abort()
		return err
	}
	return out.commit()
}

// transferOptions are the options of the copy itself.
func (o *convertOptions) transferOptions(p *progress) *transfer.Options {
	t := &transfer.Options{
		Workers:    int(o.workers),
		KernelCopy: o.kernelCopy,
		Rate:       int64(o.rate),
		Progress:   p.update,
	}
	if o.hasSparse {
		t.Sparse = int64(o.sparse)
		if t.Sparse == 0 {
			t.Sparse = -1
		}
	}
	if o.salvage {
		o.causes = map[string]bool{}
		t.Salvage = func(err *transfer.ReadError) {
			if !o.quiet {
				o.warnLost(err)
			}
		}
	}
	return t
}

// maxCauses bounds how often salvage tells what is wrong with an image.
const maxCauses = 1000

// warnLost tells of a sector that cannot be read, in qemu-img's words. What is wrong
// with an image is told once, before the first of its sectors.
func (o *convertOptions) warnLost(err *transfer.ReadError) {
	what, cause := "", ioText(err.Err)
	if err.Extents {
		what = "block status at "
	}
	if errno := syscall.Errno(0); !errors.As(err.Err, &errno) {
		if !o.causes[cause] && len(o.causes) < maxCauses {
			o.causes[cause] = true
			fmt.Fprintln(o.host.Err, cause)
		}
		cause = strerror(syscall.EIO)
	}
	o.host.warn("error while reading %soffset %d: %s", what, err.Off, cause)
}

// warnExtents tells of what salvage will find no extents of. qemu-img says that
// before it copies, and again then.
func (o *convertOptions) warnExtents(ctx context.Context, src blockdev.ExtentReader, size int64) error {
	for off := int64(0); off < size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		e, err := src.NextExtent(off)
		if err != nil {
			o.warnLost(&transfer.ReadError{Off: off, Extents: true, Err: err})
			e.Len = 512
		}
		off += e.Len
	}
	return nil
}

// copyError puts an error of a copy in qemu-img's words.
func copyError(err error) error {
	var read *transfer.ReadError
	var write *transfer.WriteError
	switch {
	case errors.As(err, &read) && read.Extents:
		return fmt.Errorf("error while reading block status at offset %d: %w", read.Off, &ioError{read.Err})
	case errors.As(err, &read):
		return fmt.Errorf("error while reading at byte %d: %w", read.Off, &ioError{read.Err})
	case errors.As(err, &write):
		return fmt.Errorf("error while writing at byte %d: %w", write.Off, &ioError{write.Err})
	}
	return err
}

// ioError is an error of a device, in the words of C where it has some.
type ioError struct{ error }

func (e *ioError) Error() string { return ioText(e.error) }
func (e *ioError) Unwrap() error { return e.error }

func ioText(err error) string {
	if errno := syscall.Errno(0); errors.As(err, &errno) {
		return strerror(errno)
	}
	return err.Error()
}

// copyBitmaps copies the persistent bitmaps of src to the output.
func (t *convertTarget) copyBitmaps(ctx context.Context, src *qcow2.Image) error {
	list, err := src.Bitmaps()
	if err != nil {
		return err
	}
	im, finish, err := t.forBitmaps()
	if err != nil {
		return err
	}
	for _, b := range list {
		if b.Flags&qcow2.BitmapInUse != 0 {
			t.o.host.warn("Skipping inconsistent bitmap '%s'", b.Name)
			continue
		}
		opts := &qcow2.BitmapOptions{Granularity: int64(b.Granularity()), Disabled: b.Flags&qcow2.BitmapAuto == 0}
		what := "create"
		if err = im.AddBitmap(ctx, b.Name, opts); err == nil {
			what = "populate"
			if err = im.MergeBitmap(ctx, b.Name, src, b.Name); err != nil {
				err = errors.Join(err, im.RemoveBitmap(ctx, b.Name))
			}
		}
		if err != nil {
			text, hint := bitmapText(t.name, err)
			err = withHint(messagef("Failed to %s bitmap %s: %s", what, b.Name, text), hint)
			break
		}
	}
	if e := finish(); err == nil {
		err = e
	}
	return err
}

// checkBitmaps looks for what prevents the copy of the bitmaps of an image.
func (o *convertOptions) checkBitmaps(srcs *convertSources) error {
	if len(srcs.images) > 1 {
		return messagef("Copying bitmaps only possible with single source")
	}
	im := srcs.images[0].qcow2
	if im == nil || im.Header().Version < 3 {
		return messagef("Source lacks bitmap support")
	}
	list, err := im.Bitmaps()
	if err != nil {
		return err
	}
	for _, b := range list {
		if b.Flags&qcow2.BitmapInUse != 0 && !o.skipBroken {
			return withHint(messagef("Cannot copy inconsistent bitmap '%s'", b.Name),
				"Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it\n")
		}
	}
	return nil
}

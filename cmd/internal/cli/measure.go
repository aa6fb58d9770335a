package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
)

type measureOptions struct {
	open     openOptions
	size     byteCount
	format   string // of the new image
	options  optionArgs
	snapshot snapshotArg
	output   string
	flags    *pflag.FlagSet
}

func newMeasure(host Host) *cobra.Command {
	o := measureOptions{size: byteCount{what: "image size"}, snapshot: snapshotArg{host: host}}
	cmd := &cobra.Command{
		Use:   "measure [-O FORMAT] [-o OPTIONS] [--output=human|json] [-f FORMAT] [-l SNAPSHOT] [-U] FILE | --size SIZE",
		Short: "Tell how large the file of a new image gets",
		Long: "Tell how large the file of a new image gets: with the content of an image, or\n" +
			"with a disk of a size. A compressed image is smaller. A snapshot (-l) has the size\n" +
			"that the disk had then.",
	}
	f := cmd.Flags()
	o.flags = f
	o.open.addFlags(f, host)
	o.open.addForceShare(f)
	f.Var(&o.size, "size", "size of an empty disk")
	f.StringVarP(&o.format, "output-format", "O", "raw", "format of the new image: raw or qcow2")
	f.VarP(&o.options, "options", "o", "options of the format, as NAME=VALUE,...")
	f.VarP(&o.snapshot, "snapshot", "l", "measure the snapshot of this id or name; or snapshot.id=ID,snapshot.name=NAME")
	f.Var((*outputArg)(&o.output), "output", "human or json")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return runMeasure(cmd.Context(), host, &o, args)
	}
	return cmd
}

// outputArg is --output, checked as it is read.
type outputArg string

func (o *outputArg) String() string { return "human" }
func (o *outputArg) Type() string   { return "string" }

func (o *outputArg) Set(s string) error {
	*o = outputArg(s)
	return checkOutput(s)
}

func runMeasure(ctx context.Context, host Host, o *measureOptions, args []string) error {
	given := o.flags.Changed
	switch {
	case len(args) > 1:
		return messagef("At most one filename argument is allowed.")
	case len(args) == 0 && (given("image-opts") || given("format") || given("snapshot")):
		return messagef("--image-opts, -f, and -l require a filename argument.")
	case len(args) == 1 && given("size"):
		return messagef("--size N cannot be used together with a filename.")
	case len(args) == 0 && !given("size"):
		return messagef("Either --size N or one filename must be specified.")
	}
	var img *image
	var src blockdev.Reader
	if len(args) == 1 {
		o.open.chain = true
		o.open.cacheSize = 1 << 20 // each table is looked at once
		var err error
		if img, err = openImage(ctx, args[0], &o.open); err != nil {
			return couldNotOpen(args[0], err)
		}
		defer func() { img.close() }()
		if img, err = useSnapshot(ctx, img, &o.snapshot, &o.open); err != nil {
			return err
		}
		src = newGuestDisk(img)
	}
	descs, err := formatOptions(o.format)
	switch {
	case o.format == "file" || err != nil && slices.Contains(qemuDrivers(), o.format):
		return messagef("Block driver '%s' does not support size measurement", o.format)
	case err != nil:
		return err
	}
	opts := newOptionList(append(descs, fileOptions(descs)...))
	if err := opts.parse(o.options.String()); err != nil {
		return errors.Join(err, messagef("Invalid options for file format '%s'", o.format))
	}
	if given("size") {
		opts.values["size"] = fmt.Sprint(o.size.n)
	}
	var sizes object
	if o.format == "raw" {
		n := (opts.uint("size") + 511) &^ 511
		if src != nil {
			n = uint64(src.Size())
		}
		sizes = object{{"required", n}, {"fully-allocated", n}}
	} else if sizes, err = measureQcow2(ctx, img, src, opts, o.open.secrets); err != nil {
		return err
	}
	if o.output == "json" {
		if len(sizes) > 2 { // the bitmaps come first, by the order of QEMU's hash tables
			sizes = object{sizes[2], sizes[0], sizes[1]}
		}
		_, err := fmt.Fprint(host.Out, prettyJSON(sizes))
		return err
	}
	names := map[string]string{"required": "required size", "fully-allocated": "fully allocated size", "bitmaps": "bitmaps size"}
	for _, m := range sizes {
		fmt.Fprintf(host.Out, "%s: %d\n", names[m.key], m.value)
	}
	return nil
}

// measureQcow2 measures a qcow2 image of src, or one of a size.
func measureQcow2(ctx context.Context, img *image, src blockdev.Reader, opts *optionList, s *secrets) (object, error) {
	co, err := measuredOptions(opts, s)
	if err != nil {
		return nil, err
	}
	// What the options say of the size is looked at for an image, too.
	m, err := qcow2.Measure(ctx, int64(opts.uint("size")), nil, co)
	if err == nil && src != nil {
		m, err = qcow2.Measure(ctx, 0, src, co)
		if err != nil && !errors.As(err, new(qcow2.OptionError)) {
			return nil, messagef("Unable to get block status: %w", err)
		}
	}
	if err != nil {
		return nil, err
	}
	sizes := object{{"required", m.Required}, {"fully-allocated", m.FullyAllocated}}
	if img == nil || img.qcow2 == nil || img.qcow2.Header().Version < 3 || co.Version == 2 {
		return sizes, nil
	}
	n, err := img.qcow2.MeasureBitmaps(co.ClusterSize)
	if err != nil {
		return nil, err
	}
	return append(sizes, member{"bitmaps", n}), nil
}

// measuredOptions turns -o into what is measured, checked as qemu-img measure
// does, which is not what create does.
func measuredOptions(l *optionList, s *secrets) (*qcow2.CreateOptions, error) {
	co := &qcow2.CreateOptions{}
	co.ExtendedL2 = l.bool("extended_l2")
	var err error
	if co.ClusterSize, err = clusterSize(l.uint("cluster_size")); err != nil {
		return nil, err
	}
	switch compat := l.str("compat"); {
	case !l.has("compat") || compat == "1.1":
	case compat == "0.10":
		co.Version = 2
	default:
		return nil, messagef("Invalid compatibility level: '%s'", compat)
	}
	n := l.uint("refcount_bits")
	if n == 0 || n > 64 {
		return nil, messagef("Refcount width must be a power of two and may not exceed 64 bits")
	}
	co.RefcountBits = int(n)
	if mode := l.str("preallocation"); l.has("preallocation") {
		if co.Preallocation, err = parsePreallocation(mode); err != nil {
			return nil, messagef("invalid parameter value: %s", mode)
		}
	}
	if l.has("backing_file") {
		co.BackingFile = "backing file" // whatever it is
	}
	if l.str("encrypt.format") == "luks" {
		delete(l.values, "encryption")
		co.Encrypt, err = encryptOptions(l, s)
	}
	return co, err
}

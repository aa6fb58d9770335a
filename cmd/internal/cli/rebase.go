package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
)

type rebaseOptions struct {
	open          openOptions
	backing       string
	backingFormat string
	hasBacking    bool // -b was given, maybe with an empty name
	unsafe        bool
	cache, source string
	progress      bool
	quiet         bool
	forceShare    bool // of the new backing file
}

func newRebase(host Host) *cobra.Command {
	o := rebaseOptions{}
	cmd := &cobra.Command{
		Use:   "rebase [-q] [-p] [-f FORMAT] [-u] -b BACKING [-F FORMAT] FILE",
		Short: "Give an image another backing file",
		Long: "Give an image another backing file; with -b '' none.\n\n" +
			"What its guest sees stays the same: where the image holds nothing, and the two\n" +
			"backing files differ, it gets the content of the old one. With -u no data is\n" +
			"looked at: only the name changes, as is right for a file that was moved.",
		RunE: func(cmd *cobra.Command, args []string) error {
			o.hasBacking = cmd.Flags().Changed("backing")
			return runRebase(cmd.Context(), host, &o, args)
		},
	}
	f := cmd.Flags()
	o.open.addFlags(f, host)
	f.StringVarP(&o.backing, "backing", "b", "", "new backing file")
	f.StringVarP(&o.backingFormat, "backing-format", "F", "", "format of the new backing file")
	f.BoolVarP(&o.unsafe, "unsafe", "u", false, "only change the name of the backing file")
	f.StringVarP(&o.cache, "cache", "t", "writeback", "cache mode, for qemu-img's sake: it changes nothing")
	f.StringVarP(&o.source, "source-cache", "T", "writeback", "cache mode of the backing files, which changes nothing either")
	f.BoolVarP(&o.progress, "progress", "p", false, "print the progress")
	f.BoolVarP(&o.quiet, "quiet", "q", false, "print errors only")
	f.BoolVarP(&o.forceShare, "force-share", "U", false, "a running machine may write the new backing file")
	return cmd
}

func runRebase(ctx context.Context, host Host, o *rebaseOptions, args []string) error {
	if len(args) != 1 {
		return usagef("Expecting one image file name")
	}
	if !o.unsafe && !o.hasBacking {
		return usagef("Must specify backing file (-b) or use unsafe mode (-u)")
	}
	p := newProgress(host, o.progress && !o.quiet, 2)
	err := rebase(ctx, o, args[0], p)
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	p.end(err == nil)
	return err
}

func rebase(ctx context.Context, o *rebaseOptions, name string, p *progress) (err error) {
	if err := checkCache("cache", o.cache); err != nil {
		return err
	}
	if err := checkCache("source cache", o.source); err != nil {
		return err
	}
	full := combinePath(name, o.backing)
	layers := &layers{base: full, named: true}
	o.open.chain, o.open.write = !o.unsafe, true
	o.open.layer = func(b qcow2.BackingFile) bool {
		b.Overlay = "" // the name was made relative to the image already
		return layers.add(b)
	}
	img, err := openImage(ctx, name, &o.open)
	if err != nil {
		return layers.openError(name, err)
	}
	defer img.closeTo(&err)
	if f := o.backingFormat; f != "" && checkDriver(f) != nil && !slices.Contains(qemuDrivers(), f) {
		return messagef("Invalid format name: '%s'", o.backingFormat)
	}
	var backing blockdev.Reader
	if !o.unsafe && o.backing != "" {
		if backing = layers.reader(img); backing == nil {
			below, err := openImage(ctx, full, &openOptions{format: o.backingFormat, chain: true, below: true, forceShare: o.forceShare, secrets: o.open.secrets, host: o.open.host})
			if err != nil {
				return prefixError(fmt.Sprintf("Could not open new backing file '%s'", o.backing), err)
			}
			defer below.close()
			backing = below.reader()
		}
	}
	format := o.backingFormat
	if o.backing == "" {
		format = ""
	}
	switch {
	case o.backing != "" && format == "":
		return messagef("Could not change the backing file to '%s': backing format must be specified", o.backing)
	case img.qcow2 == nil && !o.hasBacking:
		return messagef("Could not change the backing file to '(null)': Operation not supported")
	case img.qcow2 == nil:
		return messagef("Could not change the backing file to '%s': Operation not supported", o.backing)
	case o.unsafe:
		err = img.qcow2.SetBacking(ctx, o.backing, format)
	default:
		err = img.qcow2.Rebase(ctx, backing, o.backing, format, &qcow2.RebaseOptions{Progress: p.update})
	}
	var option qcow2.OptionError
	switch {
	case errors.As(err, &option):
		return messagef("Could not change the backing file to '%s': Invalid argument", o.backing)
	case errors.Is(err, qcow2.ErrLimit):
		return messagef("Could not change the backing file to '%s': No space left in the file header", o.backing)
	}
	return err
}

package cli

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/spf13/cobra"

	"qimg/qcow2"
)

type commitOptions struct {
	open     openOptions
	base     string
	keep     bool
	rate     string
	cache    string
	progress bool
	quiet    bool
}

func newCommit(host Host) *cobra.Command {
	o := commitOptions{}
	cmd := &cobra.Command{
		Use:   "commit [-q] [-p] [-f FORMAT] [-b BASE] [-d] [-r RATE] FILE",
		Short: "Write what an image holds into its backing file",
		Long: "Write what an image holds into its backing file, and empty the image.\n\n" +
			"With -b it goes into an image further down in the backing chain, and nothing is\n" +
			"emptied. What lies between them is then of no use any more.",
		RunE: func(cmd *cobra.Command, args []string) error {
			return runCommit(cmd, host, &o, args)
		},
	}
	f := cmd.Flags()
	o.open.addFlags(f, host)
	f.StringVarP(&o.base, "base", "b", "", "image of the backing chain to write")
	f.BoolVarP(&o.keep, "keep", "d", false, "do not empty the image")
	f.StringVarP(&o.rate, "rate", "r", "", "bytes to write a second at most")
	f.StringVarP(&o.cache, "cache", "t", "writeback", "cache mode, for qemu-img's sake: it changes nothing")
	f.BoolVarP(&o.progress, "progress", "p", false, "print the progress")
	f.BoolVarP(&o.quiet, "quiet", "q", false, "print errors only")
	return cmd
}

func runCommit(cmd *cobra.Command, host Host, o *commitOptions, args []string) error {
	var rate int64
	if cmd.Flags().Changed("rate") {
		var err error
		if rate, err = sizeArg("rate limit", o.rate); err != nil {
			return err
		}
	}
	if len(args) != 1 {
		return usagef("Expecting one image file name")
	}
	if err := checkCache("cache", o.cache); err != nil {
		return err
	}
	layers := &layers{base: o.base, named: cmd.Flags().Changed("base"), write: true}
	o.open.chain, o.open.write, o.open.layer = true, true, layers.add
	img, err := openImage(cmd.Context(), args[0], &o.open)
	if err != nil {
		return layers.openError(args[0], err)
	}
	p := newProgress(host, o.progress && !o.quiet, 1)
	err = commit(cmd.Context(), img, layers, &qcow2.CommitOptions{Keep: o.keep || layers.named, Rate: rate, Progress: p.update})
	if cmd.Context().Err() != nil {
		err = cmd.Context().Err()
	}
	img.closeTo(&err)
	p.end(err == nil)
	if err == nil && !o.quiet {
		fmt.Fprintln(host.Out, "Image committed.")
	}
	return err
}

func commit(ctx context.Context, img *image, l *layers, opts *qcow2.CommitOptions) error {
	switch {
	case l.named && l.depth == 0:
		return messagef("Did not find '%s' in the backing chain of '%s'", l.base, img.arg)
	case img.qcow2 == nil || img.qcow2.Backing() == nil:
		return messagef("Image does not have a backing file")
	case l.named:
		opts.Base = l.reader(img)
	}
	err := img.qcow2.Commit(ctx, opts)
	var option qcow2.OptionError
	var bitmap *qcow2.BitmapError
	switch {
	case errors.As(err, &option) || errors.As(err, &bitmap): // the base cannot grow
		return messagef("Block job failed: Operation not supported")
	case errors.Is(err, qcow2.ErrBacking): // a raw base would look like something else
		return messagef("Block job failed: Operation not permitted")
	case errors.Is(err, syscall.ENOSPC):
		return messagef("Block job failed: %s", strerror(syscall.ENOSPC))
	}
	return err
}

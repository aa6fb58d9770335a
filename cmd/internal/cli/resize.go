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

type resizeOptions struct {
	open     openOptions
	prealloc preallocationFlag
	shrink   bool
	fs       bool
	quiet    bool
}

func newResize(host Host) *cobra.Command {
	o := resizeOptions{}
	cmd := &cobra.Command{
		Use: "resize [-q] [-f FORMAT] [--preallocation=MODE] [--shrink] FILE [+|-]SIZE\n" +
			"  qimg resize --fs [-q] [-f FORMAT] [--shrink] FILE[:PART] [+|-]SIZE|min|max",
		Short: "Change the size of a disk",
		Long: "Change the size of a disk to SIZE, or by it with + or -. What the disk gains\n" +
			"reads as zeroes. An image of version 2 that has snapshots has to be made one of\n" +
			"version 3 first: qimg amend -o compat=1.1.\n\n" +
			"With --fs the ext2, ext3 or ext4 file system in IMAGE[:PART], the partition that it is\n" +
			"in, which has to be the last one, and the image change their sizes together. max is\n" +
			"all of the disk, min as small as the file system gets: it has no free space then. A\n" +
			"SIZE that is smaller needs --shrink, and no file is lost: what does not fit is refused.",
		Example: "  qimg resize disk.qcow2 20G\n" +
			"  qimg resize --shrink disk.qcow2 -5G\n" +
			"  qimg resize --fs disk.qcow2 20G\n" +
			"  qimg resize --fs disk.qcow2 min",
		Annotations: map[string]string{lastOperand: "SIZE"},
		RunE: func(cmd *cobra.Command, args []string) error {
			return runResize(cmd.Context(), host, &o, args)
		},
	}
	f := cmd.Flags()
	o.open.addFlags(f, host)
	f.Var(&o.prealloc, "preallocation", "of what the disk gains: off, metadata, falloc or full")
	f.BoolVar(&o.shrink, "shrink", false, "allow a smaller size: what lies beyond it is lost")
	f.BoolVar(&o.fs, "fs", false, "resize the last partition and the file system in it, too")
	f.BoolVarP(&o.quiet, "quiet", "q", false, "print errors only")
	return cmd
}

// preallocationFlag is the value of --preallocation.
type preallocationFlag struct{ qcow2.Preallocation }

func (p *preallocationFlag) Set(value string) (err error) {
	if p.Preallocation, err = parsePreallocation(value); err != nil {
		return messagef("Invalid preallocation mode '%s'", value)
	}
	return nil
}

func (p *preallocationFlag) Type() string { return "MODE" }

func runResize(ctx context.Context, host Host, o *resizeOptions, args []string) (err error) {
	if len(args) != 2 {
		return usagef("Expecting image file name and size")
	}
	if o.fs {
		return runResizeFS(ctx, host, o, args)
	}
	name := args[0]
	if _, err := newDiskSize(args[1], 0); err != nil { // before the image is looked at
		return err
	}
	o.open.chain, o.open.write = true, true
	img, err := openImage(ctx, name, &o.open)
	if err != nil {
		return couldNotOpen(name, err)
	}
	defer img.closeTo(&err)
	current := img.size()
	n, err := newDiskSize(args[1], current)
	if err != nil {
		return err
	}
	switch {
	case n <= 0:
		return messagef("New image size must be positive")
	case n <= current && o.prealloc.Preallocation != qcow2.PreallocationOff:
		return messagef("Preallocation can only be used for growing images")
	case n < current && !o.shrink:
		message(host.Err, host.name, messagef("Use the --shrink option to perform a shrink operation."))
		host.warn("Shrinking an image will delete all data beyond the shrunken image's end. " +
			"Before performing such an operation, make sure there is no important data there.")
		return exit(exitFailed)
	}
	if err := img.resize(ctx, n, &qcow2.ResizeOptions{Shrink: o.shrink, Preallocation: o.prealloc.Preallocation}); err != nil {
		return resizeError(ctx, img, err)
	}
	if !o.quiet {
		fmt.Fprintln(host.Out, "Image resized.")
	}
	return nil
}

// resize gives an image a size.
func (img *image) resize(ctx context.Context, size int64, opts *qcow2.ResizeOptions) error {
	if img.qcow2 == nil {
		return resizeRaw(ctx, img, size, opts.Preallocation)
	}
	return img.qcow2.Resize(ctx, size, opts)
}

// checkResizeRaw returns the error of a raw disk that is part of a file.
func checkResizeRaw(img *image) error {
	if slices.ContainsFunc(img.options, func(m member) bool { return m.key == "size" }) {
		return messagef("Cannot resize fixed-size raw disks")
	}
	return nil
}

// resizeRaw gives a raw disk a size. On an error it is as long as before.
func resizeRaw(ctx context.Context, img *image, size int64, prealloc qcow2.Preallocation) error {
	f := img.file
	if err := checkResizeRaw(img); err != nil {
		return err
	}
	old := f.Size()
	size += old - img.dev.Size() // what lies before the disk
	if prealloc == qcow2.PreallocationMetadata {
		return messagef("Unsupported preallocation mode: %s", prealloc)
	}
	err := f.Truncate(size)
	if errors.Is(err, errors.ErrUnsupported) {
		return messagef("Cannot resize device files")
	}
	if err == nil && size > old {
		switch prealloc {
		case qcow2.PreallocationFalloc:
			err = blockdev.AllocateZeroes(ctx, f, old, size-old, nil)
		case qcow2.PreallocationFull:
			err = blockdev.FillZeroes(ctx, f, old, size-old, nil)
		}
		if err != nil {
			return errors.Join(err, f.Truncate(old))
		}
	}
	if err != nil {
		return err
	}
	return f.Sync()
}

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
	quiet    bool
}

func newResize(host Host) *cobra.Command {
	o := resizeOptions{}
	cmd := &cobra.Command{
		Use:   "resize [-q] [-f FORMAT] [--preallocation=MODE] [--shrink] FILE [+|-]SIZE",
		Short: "Change the size of a disk",
		Long: "Change the size of a disk to SIZE, or by it with + or -. What the disk gains\n" +
			"reads as zeroes. An image of version 2 that has snapshots has to be made one of\n" +
			"version 3 first: qimg amend -o compat=1.1.",
		Example: "  qimg resize disk.qcow2 20G\n" +
			"  qimg resize --shrink disk.qcow2 -5G",
		Annotations: map[string]string{lastOperand: "SIZE"},
		RunE: func(cmd *cobra.Command, args []string) error {
			return runResize(cmd.Context(), host, &o, args)
		},
	}
	f := cmd.Flags()
	o.open.addFlags(f, host)
	f.Var(&o.prealloc, "preallocation", "of what the disk gains: off, metadata, falloc or full")
	f.BoolVar(&o.shrink, "shrink", false, "allow a smaller size: what lies beyond it is lost")
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
	name, size := args[0], args[1]
	sign := int64(0)
	switch size[:min(len(size), 1)] {
	case "+":
		sign, size = 1, size[1:]
	case "-":
		sign, size = -1, size[1:]
	}
	l := newOptionList([]optionDesc{{"size", sizeOption, "", ""}})
	if err := l.set("size", size); err != nil {
		return err
	}
	o.open.chain, o.open.write = true, true
	img, err := openImage(ctx, name, &o.open)
	if err != nil {
		return couldNotOpen(name, err)
	}
	defer img.closeTo(&err)
	n, current := int64(l.uint("size")), img.size()
	if sign != 0 {
		n = current + sign*n
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
	if img.qcow2 == nil {
		err = resizeRaw(ctx, img, n, o.prealloc.Preallocation)
	} else {
		err = img.qcow2.Resize(ctx, n, &qcow2.ResizeOptions{Shrink: o.shrink, Preallocation: o.prealloc.Preallocation})
	}
	if err != nil {
		return resizeError(ctx, img, err)
	}
	if !o.quiet {
		fmt.Fprintln(host.Out, "Image resized.")
	}
	return nil
}

// resizeRaw gives a raw disk a size. On an error it is as long as before.
func resizeRaw(ctx context.Context, img *image, size int64, prealloc qcow2.Preallocation) error {
	f := img.file
	if slices.ContainsFunc(img.options, func(m member) bool { return m.key == "size" }) {
		return messagef("Cannot resize fixed-size raw disks")
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

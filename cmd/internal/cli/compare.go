package cli

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"qimg/qcow2/blockdev"
	"qimg/qcow2/transfer"
)

// Exit codes of compare, besides 0: those of qemu-img.
const (
	exitDifferent  = 1
	exitNotOpened  = 2 // an image cannot be opened
	exitNoExtents  = 3 // what an image is made of cannot be told
	exitReadFailed = 4
)

type compareOptions struct {
	open        openOptions // of the first image; the second has a format of its own
	format      string
	hasFormat   bool
	cache       string
	strict      bool
	progress    bool
	quiet       bool
	first, last string
}

func newCompare(host Host) *cobra.Command {
	o := compareOptions{}
	cmd := &cobra.Command{
		Use:   "compare [-f FORMAT] [-F FORMAT] [-s] [-p] [-q] [-U] FILE1 FILE2",
		Short: "Tell whether two images have the same content",
		Long: "Tell whether two images have the same content. Of images of different sizes the\n" +
			"longer one has to read as zeroes behind the end of the other.\n\n" +
			"The exit status is 0 if it is the same, 1 if it is not, and 2 or more after an\n" +
			"error.",
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) != 2 {
				return usagef("Expecting two image file names")
			}
			o.hasFormat = cmd.Flags().Changed("second-format")
			o.first, o.last = args[0], args[1]
			return runCompare(cmd.Context(), host, &o)
		},
	}
	f := cmd.Flags()
	o.open.addFlags(f, host)
	o.open.addForceShare(f)
	f.Lookup("object").Value = &compareObject{o.open.secrets}
	f.Lookup("format").Usage = "format of the first image (default: found by its first bytes)"
	f.StringVarP(&o.format, "second-format", "F", "", "format of the second image")
	f.StringVarP(&o.cache, "source-cache", "T", "writeback", "cache mode, for qemu-img's sake: it changes nothing")
	f.BoolVarP(&o.strict, "strict", "s", false, "the sizes, and where data is allocated, have to be the same too")
	f.BoolVarP(&o.progress, "progress", "p", false, "print the progress")
	f.BoolVarP(&o.quiet, "quiet", "q", false, "print errors only")
	return cmd
}

// compareObject is --object, whose errors have a status of their own here.
type compareObject struct{ *secrets }

func (o *compareObject) Set(arg string) error { return withCode(o.secrets.Set(arg), exitNotOpened) }

// withCode gives an error its exit status, unless it is nil or none.
func withCode(err error, code int) error {
	cmd := (*cmdError)(nil)
	switch {
	case err == nil:
		return nil
	case !errors.As(err, &cmd):
		return &cmdError{code: code, err: err}
	case cmd.err == nil:
		return err
	}
	return &cmdError{code: code, err: err, hint: cmd.hint}
}

func runCompare(ctx context.Context, host Host, o *compareOptions) error {
	p := &progress{host: host, show: o.progress && !o.quiet, skip: 2}
	same, err := compare(ctx, host, o, p)
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	if p.show {
		fmt.Fprintln(host.Out)
	}
	if err == nil && !same {
		return exit(exitDifferent)
	}
	return err
}

// compare tells what it finds.
func compare(ctx context.Context, host Host, o *compareOptions, p *progress) (same bool, err error) {
	if err := checkCache("source cache", o.cache); err != nil {
		return false, withCode(err, exitNotOpened)
	}
	o.open.chain = true
	second := o.open
	second.format, second.hasFormat = o.format, o.hasFormat
	var disks [2]*guestDisk
	for i, name := range []string{o.first, o.last} {
		img, err := openImage(ctx, name, [...]*openOptions{&o.open, &second}[i])
		if err != nil {
			return false, withCode(couldNotOpen(name, err), exitNotOpened)
		}
		defer img.close()
		disks[i] = newGuestDisk(img)
	}
	p.print(0)
	say := func(format string, args ...any) {
		if !o.quiet {
			fmt.Fprintf(host.Out, format+"\n", args...)
		}
	}
	short, long := min(disks[0].size, disks[1].size), max(disks[0].size, disks[1].size)
	opts := &transfer.CompareOptions{Progress: p.update}
	if o.strict {
		if short != long {
			say("Strict mode: Image size mismatch!")
			return false, nil
		}
		opts.Alike = func(a, b *blockdev.Extent) bool { return disks[0].status(a) == disks[1].status(b) }
	}
	d, err := transfer.Compare(ctx, disks[0], disks[1], opts)
	bad := (*transfer.CompareError)(nil)
	isRead := errors.As(err, &bad)
	if err != nil && !isRead {
		return false, err
	}
	if short != long && (d == nil || d.Off >= short) && (!isRead || bad.Off >= short) {
		say("Warning: Image size mismatch!")
	}
	switch {
	case isRead && bad.Extents:
		return false, withCode(messagef("Sector allocation test failed for %s: %w", o.name(bad.Disk), bad.Err), exitNoExtents)
	case isRead:
		return false, withCode(messagef("Error while reading offset %d of %s: %w", bad.Off, o.name(bad.Disk), bad.Err), exitReadFailed)
	case d == nil:
		say("Images are identical.")
		return true, nil
	case d.Kind == transfer.DifferentAllocation:
		say("Strict mode: Offset %d block status mismatch!", d.Off)
	default:
		off := d.Off &^ 511 // as qemu-img tells it
		for _, disk := range disks {
			if end := disk.Reader.Size(); d.Off >= end {
				off = max(off, end)
			}
		}
		say("Content mismatch at offset %d!", off)
	}
	return false, nil
}

// name returns how an image was named.
func (o *compareOptions) name(disk int) string { return [...]string{o.first, o.last}[disk] }

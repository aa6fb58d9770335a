package cli

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"

	"github.com/spf13/cobra"

	"qimg/qcow2/blockdev"
	"qimg/qcow2/transfer"
)

type ddOptions struct {
	host     Host
	open     openOptions // of the input
	format   string      // of the output
	in, out  string
	block    int64
	count    int64 // of blocks of the input, from its beginning
	skip     int64 // of these
	hasCount bool
	hasIn    bool
	hasOut   bool
}

func newDD(host Host) *cobra.Command {
	o := ddOptions{host: host, block: 512}
	cmd := &cobra.Command{
		Use:   "dd [-f FORMAT] [-O FORMAT] [-U] [bs=SIZE] [count=BLOCKS] [skip=BLOCKS] if=FILE of=OUTPUT",
		Short: "Copy a part of an image into a new one",
		Long: "Copy a part of an image into a new one: the blocks from skip on, up to block count,\n" +
			"counted from the beginning of the input as qemu-img does. A block has 512 bytes\n" +
			"unless bs says otherwise.\n\n" +
			"The output is there when it is complete, and not before. What is zeroes takes no\n" +
			"space in it.",
		RunE: func(cmd *cobra.Command, args []string) error { return runDD(cmd.Context(), &o, args) },
	}
	f := cmd.Flags()
	o.open.addFlags(f, host)
	o.open.addForceShare(f)
	f.StringVarP(&o.format, "output-format", "O", "raw", "format of the output: raw or qcow2")
	return cmd
}

// operand reads NAME=VALUE.
func (o *ddOptions) operand(arg string) (err error) {
	name, value, ok := strings.Cut(arg, "=")
	switch {
	case !ok:
		return messagef("unrecognized operand %s", name)
	case name == "bs":
		o.block, err = sizeArgIn("bs", value, 1, math.MaxInt32)
	case name == "count":
		o.count, err = sizeArg("count", value)
		o.hasCount = true
	case name == "skip":
		o.skip, err = sizeArg("skip", value)
	case name == "if":
		o.in, o.hasIn = value, true
	case name == "of":
		o.out, o.hasOut = value, true
	default:
		return messagef("unrecognized operand %s", name)
	}
	return err
}

func runDD(ctx context.Context, o *ddOptions, args []string) error {
	for _, arg := range args {
		if err := o.operand(arg); err != nil {
			return err
		}
	}
	if !o.hasIn || !o.hasOut {
		return messagef("Must specify both input and output files")
	}
	err := o.dd(ctx)
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	return err
}

// dd makes the output as convert does.
func (o *ddOptions) dd(ctx context.Context) error {
	convert := &convertOptions{host: o.host, source: o.open, format: o.format, cache: "writeback"}
	srcs, err := convert.openSources(ctx, []string{o.in}, o.out)
	defer srcs.close()
	if err != nil {
		return err
	}
	if _, err := formatOptions(o.format); err != nil {
		return messagef("Unknown file format")
	}
	behind, err := o.cut(srcs)
	if err != nil {
		return err
	}
	out, err := convert.newConvertTarget(o.out, srcs)
	if err != nil {
		return err
	}
	out.stream = false // "-" is a file, as in qemu-img
	if err := out.begin(ctx); err != nil {
		out.abort()
		return prefixError(o.out+": error while creating output image", err)
	}
	if behind {
		message(o.host.Err, o.host.name, fmt.Errorf("%s: cannot skip to specified offset", o.in))
	}
	if err := o.copy(ctx, out, srcs); err != nil {
		out.abort()
		return err
	}
	return out.commit()
}

// cut leaves of the input what is to be copied. behind says that nothing is left
// because the input ends before.
func (o *ddOptions) cut(srcs *convertSources) (behind bool, err error) {
	whole := srcs.joined
	end := whole.Size()
	if o.hasCount && o.count <= math.MaxInt64/o.block {
		end = min(end, o.count*o.block)
	}
	start := end
	if o.skip <= math.MaxInt64/o.block && o.skip*o.block <= end {
		start = o.skip * o.block
	} else {
		behind = true
	}
	part, err := blockdev.NewReaderSection(&whole, start, end-start)
	if err != nil {
		return behind, err
	}
	srcs.joined = joined{}
	srcs.add(part, (end-start+511)&^511, 512)
	return behind, nil
}

func (o *ddOptions) copy(ctx context.Context, out *convertTarget, srcs *convertSources) error {
	err := out.transfer(ctx, srcs, &transfer.Options{TargetIsZero: out.readsZero()})
	var read *transfer.ReadError
	var write *transfer.WriteError
	switch {
	case errors.As(err, &read):
		return messagef("error while reading from input image file: %w", &ioError{read.Err})
	case errors.As(err, &write):
		return messagef("error while writing to output image file: %w", &ioError{write.Err})
	}
	return err
}

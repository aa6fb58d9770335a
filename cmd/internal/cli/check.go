package cli

import (
	"bufio"
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"qimg/qcow2"
)

type checkOptions struct {
	open   openOptions
	output string
	cache  string
	quiet  bool
}

func newCheck(host Host) *cobra.Command {
	o := checkOptions{}
	cmd := &cobra.Command{
		Use:   "check [-q] [-f FORMAT] [--output=human|json] FILE",
		Short: "Check the tables of an image",
		Long: "Check the tables of an image.\n\n" +
			"Exit status: 0 the image is good, 1 it could not be checked, 2 it is corrupt,\n" +
			"3 it has leaked clusters but is good otherwise, 63 its format has nothing to check.",
		RunE: func(cmd *cobra.Command, args []string) error {
			return runCheck(cmd.Context(), host, &o, args)
		},
	}
	f := cmd.Flags()
	o.open.addFlags(f, host)
	o.open.addForceShare(f)
	f.StringVar(&o.output, "output", "human", "human or json")
	f.StringVarP(&o.cache, "cache", "T", "writeback", "cache mode, for qemu-img's sake: it changes nothing")
	f.BoolVarP(&o.quiet, "quiet", "q", false, "print errors only")
	return cmd
}

func runCheck(ctx context.Context, host Host, o *checkOptions, args []string) error {
	if len(args) != 1 {
		return usagef("Expecting one image file name")
	}
	if err := checkOutput(o.output); err != nil {
		return err
	}
	if err := checkCache("source cache", o.cache); err != nil {
		return err
	}
	o.open.chain = true
	img, err := openImage(args[0], &o.open)
	if err != nil {
		return couldNotOpen(args[0], err)
	}
	defer img.close()
	if img.qcow2 == nil {
		return &cmdError{code: exitNoCheck, err: messagef("This image format does not support checks")}
	}
	findings := bufio.NewWriter(host.Err) // there can be millions
	res, err := img.qcow2.Check(ctx, &qcow2.CheckOptions{
		Found: func(f qcow2.Finding) { fmt.Fprintln(findings, f) },
	})
	findings.Flush()
	if err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return messagef("Check failed: %w", err)
	}
	switch {
	case o.quiet:
	case o.output == "json":
		io.WriteString(host.Out, prettyJSON(checkJSON(img, &res)))
	default:
		printCheck(host.Out, &res)
	}
	switch {
	case res.CheckErrors > 0:
		return messagef("Check failed")
	case res.Corruptions > 0:
		return exit(exitCorrupt)
	case res.Leaks > 0:
		return exit(exitLeaks)
	}
	return nil
}

// checkJSON is a result in the order of qemu-img. What is 0 is left out, but
// for the number of errors.
func checkJSON(img *image, res *qcow2.CheckResult) object {
	o := object{}
	add := func(key string, n int64) {
		if n != 0 {
			o.add(key, n)
		}
	}
	add("image-end-offset", res.ImageEndOffset)
	add("compressed-clusters", res.CompressedClusters)
	add("total-clusters", res.TotalClusters)
	add("corruptions", res.Corruptions)
	o.add("check-errors", res.CheckErrors)
	add("leaks", res.Leaks)
	add("allocated-clusters", res.AllocatedClusters)
	o.add("filename", img.arg)
	o.add("format", img.format)
	add("fragmented-clusters", res.FragmentedClusters)
	return o
}

func printCheck(w io.Writer, res *qcow2.CheckResult) {
	if res.Corruptions == 0 && res.Leaks == 0 && res.CheckErrors == 0 {
		fmt.Fprintln(w, "No errors were found on the image.")
	}
	if res.Corruptions > 0 {
		fmt.Fprintf(w, "\n%d errors were found on the image.\n"+
			"Data may be corrupted, or further writes to the image may corrupt it.\n", res.Corruptions)
	}
	if res.Leaks > 0 {
		fmt.Fprintf(w, "\n%d leaked clusters were found on the image.\n"+
			"This means waste of disk space, but no harm to data.\n", res.Leaks)
	}
	if res.CheckErrors > 0 {
		fmt.Fprintf(w, "\n%d internal errors have occurred during the check.\n", res.CheckErrors)
	}
	if res.TotalClusters > 0 && res.AllocatedClusters > 0 {
		percent := func(n, of int64) float64 { return float64(n) * 100 / float64(of) }
		fmt.Fprintf(w, "%d/%d = %.2f%% allocated, %.2f%% fragmented, %.2f%% compressed clusters\n",
			res.AllocatedClusters, res.TotalClusters, percent(res.AllocatedClusters, res.TotalClusters),
			percent(res.FragmentedClusters, res.AllocatedClusters), percent(res.CompressedClusters, res.AllocatedClusters))
	}
	if res.ImageEndOffset > 0 {
		fmt.Fprintf(w, "Image end offset: %d\n", res.ImageEndOffset)
	}
}

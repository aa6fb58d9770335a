package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"qimg/qcow2"
)

type checkOptions struct {
	open   openOptions
	output string
	cache  string
	quiet  bool
	repair repairMode
	dryRun bool
	stale  bool
	fs     bool
}

// repairMode is the value of -r; "" means none.
type repairMode string

func (m *repairMode) String() string { return string(*m) }
func (m *repairMode) Type() string   { return "string" }

// Set implements pflag.Value.
func (m *repairMode) Set(s string) error {
	if s != "leaks" && s != "all" {
		return usagef("Unknown option value for -r (expecting 'leaks' or 'all'): %s", s)
	}
	*m = repairMode(s)
	return nil
}

func newCheck(host Host) *cobra.Command {
	o := checkOptions{}
	cmd := &cobra.Command{
		Use:   "check [-q] [-r leaks|all [--dry-run] | --fs] [-f FORMAT] [--output=human|json] FILE",
		Short: "Check the tables of an image, and repair them",
		Long: "Check the tables of an image. With -r what is wrong is repaired, all of it in one\n" +
			"step: a crash leaves the image as it was, or repaired. Then it is checked again.\n" +
			"-r leaks fails if refcounts are so wrong that they have to be built anew, which\n" +
			"-r all does.\n\n" +
			"With --fs the ext2, ext3 and ext4 file systems in IMAGE[@SNAPSHOT][:PART] are checked\n" +
			"instead, as e2fsck -n does, but with their journals replayed in memory. JSON is an\n" +
			"object: image, and file-systems, an array of partition, type, errors, notes and\n" +
			"findings, each of kind, severity, detail and where they are known group, inode, block.\n\n" +
			"Exit status: 0 the image is good, 1 it could not be checked, 2 it is corrupt,\n" +
			"3 it has leaked clusters but is good otherwise, 63 its format has nothing to check.",
		RunE: func(cmd *cobra.Command, args []string) error {
			if o.fs {
				return runCheckFS(cmd.Context(), host, &o, args)
			}
			return runCheck(cmd.Context(), host, &o, args)
		},
	}
	f := cmd.Flags()
	o.open.addFlags(f, host)
	o.open.addForceShare(f)
	f.StringVar(&o.output, "output", "human", "human or json")
	f.StringVarP(&o.cache, "cache", "T", "writeback", "cache mode, for qemu-img's sake: it changes nothing")
	f.BoolVarP(&o.quiet, "quiet", "q", false, "print errors only")
	f.VarP(&o.repair, "repair", "r", "repair leaked clusters only (leaks), or whatever can be (all)")
	f.BoolVar(&o.dryRun, "dry-run", false, "with -r: print what a repair would change, and change nothing")
	f.BoolVar(&o.fs, "fs", false, "check the file systems in the image, not its tables")
	f.BoolVar(&o.stale, "stale", false, "tell of copied flags in tables of snapshots that are out of date, which is allowed")
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
	if o.dryRun && o.repair == "" {
		return usagef("--dry-run needs -r")
	}
	o.open.chain, o.open.locked = true, true
	o.open.write = o.repair != "" && !o.dryRun
	o.open.damaged = true
	img, err := openImage(ctx, args[0], &o.open)
	if err != nil {
		return couldNotOpen(args[0], err)
	}
	defer img.close()
	if img.format != "qcow2" {
		return &cmdError{code: exitNoCheck, err: messagef("This image format does not support checks")}
	}
	findings := bufio.NewWriter(host.Err) // there can be millions
	defer findings.Flush()
	found := func(f qcow2.Finding) {
		f.Repaired = f.Repaired && !o.dryRun
		if f.Severity != qcow2.Note || f.Kind != qcow2.Overlap {
			fmt.Fprintln(findings, f)
		}
	}
	check := func() (qcow2.CheckResult, error) {
		return img.qcow2.Check(ctx, &qcow2.CheckOptions{Stale: o.stale, Found: found})
	}
	if o.repair == "" && img.qcow2 == nil {
		return o.checkDamaged(ctx, host, img, found)
	}
	if o.repair == "" {
		res, err := check()
		if err != nil {
			return checkError(ctx, err)
		}
		return o.result(host, img, &qcow2.RepairResult{Check: res})
	}
	repair, err := qcow2.Repair(ctx, img.dev, &qcow2.RepairOptions{Leaks: o.repair == "leaks", DryRun: o.dryRun, Found: found})
	if errors.Is(err, qcow2.ErrRebuild) {
		fmt.Fprintln(findings, "ERROR need to rebuild refcount structures")
		return messagef("Check failed: %s", strerror(syscall.EIO))
	}
	if err != nil {
		return checkError(ctx, err)
	}
	findings.Flush()
	if o.dryRun {
		return o.plan(host, img, &repair)
	}
	if err := o.repairRest(ctx, img, &repair); err != nil {
		return checkError(ctx, err)
	}
	if repair.CorruptionsFixed+repair.LeaksFixed > 0 {
		if !o.quiet && o.output == "human" {
			fmt.Fprintf(host.Out, "The following inconsistencies were found and repaired:\n\n    %d leaked clusters\n    %d corruptions\n\n"+
				"Double checking the fixed image now...\n", repair.LeaksFixed, repair.CorruptionsFixed)
		}
		im, err := qcow2.New(img.dev, &qcow2.OpenOptions{Backing: qcow2.BackingIgnore})
		if err != nil {
			return checkError(ctx, err)
		}
		defer im.Close()
		img.qcow2 = im
		if repair.Check, err = check(); err != nil {
			return checkError(ctx, err)
		}
	}
	return o.result(host, img, &repair)
}

// repairRounds is how often an image is repaired at most.
const repairRounds = 8

// repairRest repairs what a repair has left, and adds to its counts. What lay
// beyond the end of the file, for example, can lie inside of it afterwards.
func (o *checkOptions) repairRest(ctx context.Context, img *image, sum *qcow2.RepairResult) error {
	last := *sum
	for range repairRounds - 1 {
		if last.Clean() || last.CorruptionsFixed+last.LeaksFixed == 0 {
			return nil
		}
		var err error
		if last, err = qcow2.Repair(ctx, img.dev, &qcow2.RepairOptions{Leaks: o.repair == "leaks"}); err != nil {
			return err
		}
		sum.CorruptionsFixed += last.CorruptionsFixed
		sum.LeaksFixed += last.LeaksFixed
	}
	return nil
}

// checkDamaged checks an image without a refcount table. One whose snapshot
// table is over the limits can be repaired only.
func (o *checkOptions) checkDamaged(ctx context.Context, host Host, img *image, found func(qcow2.Finding)) error {
	_, err := headerOf(img.dev)
	var bad *qcow2.FormatError
	if errors.As(err, &bad) && bad.Field != "refcount_table_clusters" {
		return couldNotOpen(img.arg, err)
	}
	res, err := qcow2.Repair(ctx, img.dev, &qcow2.RepairOptions{DryRun: true, Found: func(f qcow2.Finding) {
		f.Repaired = false
		found(f)
	}})
	if err != nil {
		return checkError(ctx, err)
	}
	return o.result(host, img, &qcow2.RepairResult{Check: res.Check})
}

func checkError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return messagef("Check failed: %w", err)
}

// result prints the result of a check, and what was repaired before it.
func (o *checkOptions) result(host Host, img *image, res *qcow2.RepairResult) error {
	switch {
	case o.quiet:
	case o.output == "json":
		io.WriteString(host.Out, prettyJSON(checkJSON(img, res, nil)))
	default:
		printCheck(host.Out, &res.Check)
	}
	return checkStatus(&res.Check)
}

// plan prints what a repair would do. The exit status is that of the image as
// it is.
func (o *checkOptions) plan(host Host, img *image, res *qcow2.RepairResult) error {
	switch {
	case o.quiet:
	case o.output == "json":
		var lines []any
		for line := range strings.Lines(res.Plan.String()) {
			lines = append(lines, strings.TrimSuffix(line, "\n"))
		}
		io.WriteString(host.Out, prettyJSON(checkJSON(img, res, lines)))
	default:
		fmt.Fprintf(host.Out, "A repair would make right %d leaked clusters and %d corruptions:\n\n%s\n", res.LeaksFixed, res.CorruptionsFixed, &res.Plan)
		printCheck(host.Out, &res.Check)
	}
	return checkStatus(&res.Check)
}

func checkStatus(res *qcow2.CheckResult) error {
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
// for the number of errors. plan is what a repair would do, if that was asked.
func checkJSON(img *image, repair *qcow2.RepairResult, plan []any) object {
	res := &repair.Check
	m := map[string]any{"check-errors": res.CheckErrors, "filename": img.arg, "format": img.format}
	for key, n := range map[string]int64{
		"image-end-offset": res.ImageEndOffset, "total-clusters": res.TotalClusters, "allocated-clusters": res.AllocatedClusters,
		"fragmented-clusters": res.FragmentedClusters, "compressed-clusters": res.CompressedClusters,
		"corruptions": res.Corruptions, "corruptions-fixed": repair.CorruptionsFixed, "leaks": res.Leaks, "leaks-fixed": repair.LeaksFixed,
	} {
		if n != 0 {
			m[key] = n
		}
	}
	o := object{}
	for _, key := range qdictOrder(m) {
		o.add(key, m[key])
	}
	if plan != nil {
		o.add("plan", plan)
	}
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

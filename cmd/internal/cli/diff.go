package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"qimg/cloudimg/guest"
	"qimg/cmd/internal/term"
)

type diffOptions struct {
	open   openOptions
	whole  bool
	output string
}

func newDiff(host Host) *cobra.Command {
	o := diffOptions{}
	cmd := &cobra.Command{
		Use:   "diff [-r] [--output=human|json] IMAGE[@SNAPSHOT][:PART][:/PATH] IMAGE[@SNAPSHOT][:PART][:/PATH]",
		Short: "List the files that are different in two images",
		Long: "List the files that are different in two images, snapshots or directories of them,\n" +
			"with all below. A directory of the host can take the place of either. A line begins\n" +
			"with A for what only the second has, D for what only the first has, M for what is\n" +
			"different, and ends with what that is: type, content, size, mode, owner, mtime,\n" +
			"links, device, target, xattrs. Bytes that two snapshots share are not read.\n\n" +
			"The exit status is 0 if nothing is different, 1 if something is, 2 after an error.\n\n" + placeHelp + "\n" +
			"JSON is an array with an object for each file: path, change (added, removed,\n" +
			"changed), what, an array, of those that changed, and old and new, objects as those\n" +
			"of ls without path.",
		Example: "  qimg diff disk.qcow2@before disk.qcow2\n" +
			"  qimg diff a.qcow2:1:/etc b.raw:1:/etc",
		RunE: func(cmd *cobra.Command, args []string) error {
			different, err := runDiff(cmd.Context(), host, &o, args)
			if err == nil && different {
				return exit(exitDifferent)
			}
			if errors.Is(err, context.Canceled) {
				return err
			}
			return withCode(err, exitNotOpened)
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.BoolVarP(&o.whole, "recursive", "r", false, "of a directory that only one has list all that is below, too")
	f.StringVar(&o.output, "output", "human", "human or json")
	o.open.addPlaceFlags(f, host)
	return cmd
}

func runDiff(ctx context.Context, host Host, o *diffOptions, args []string) (different bool, err error) {
	if len(args) != 2 {
		return false, usagef("Expecting two directories in images")
	}
	if err := checkOutput(o.output); err != nil {
		return false, err
	}
	images := &places{open: &o.open, fs: guest.FSOptions{Below: true}}
	defer images.close()
	var at [2]place
	var trees [2]guest.FS
	var files [2]*guest.File
	for i, arg := range args {
		if info, err := os.Stat(arg); err == nil && info.IsDir() {
			root, err := os.OpenRoot(arg)
			if err != nil {
				return false, err
			}
			defer root.Close()
			at[i], trees[i] = place{arg: arg}, guest.Host(root)
			if files[i], err = trees[i].Lookup("/", false); err != nil {
				return false, err
			}
			continue
		}
		at[i] = imagePlace(arg, o.open.imageOpts)
		if trees[i], files[i], err = images.file(ctx, &at[i], true); err != nil {
			return false, err
		}
	}
	w := bufio.NewWriterSize(host.Out, 64<<10)
	p := &diffPrinter{w: w, trees: trees, escape: term.IsTerminal(host.Out), problems: problems{host: host}}
	if o.output == "json" {
		p.json = &jsonList{w: w}
	}
	for c, err := range guest.Diff(ctx, trees[0], trees[1], files[0], files[1], &guest.DiffOptions{Whole: o.whole}) {
		if ctx.Err() != nil {
			return false, ctx.Err()
		}
		if err != nil {
			p.add(at[0].error("", err))
			continue
		}
		different = true
		p.print(c)
	}
	if p.json != nil {
		p.json.close()
	}
	if err := w.Flush(); err != nil {
		return false, err
	}
	if p.n > 0 {
		return false, exit(exitNotOpened)
	}
	return different, nil
}

// diffPrinter prints changes.
type diffPrinter struct {
	w      *bufio.Writer
	trees  [2]guest.FS
	json   *jsonList
	escape bool
	problems
}

func (p *diffPrinter) print(c *guest.Change) {
	if p.json != nil {
		p.printJSON(c)
		return
	}
	path := "/" + c.Path
	if p.escape {
		path = printable(path)
	}
	switch {
	case c.Old == nil:
		fmt.Fprintf(p.w, "A %s\n", path)
	case c.New == nil:
		fmt.Fprintf(p.w, "D %s\n", path)
	default:
		fmt.Fprintf(p.w, "M %s (%s)\n", path, strings.Join(c.What, ", "))
	}
}

func (p *diffPrinter) printJSON(c *guest.Change) {
	var o object
	o.addText("path", "/"+c.Path)
	switch {
	case c.Old == nil:
		o.add("change", "added")
	case c.New == nil:
		o.add("change", "removed")
	default:
		what := []any{}
		for _, w := range c.What {
			what = append(what, w)
		}
		o.add("change", "changed")
		o.add("what", what)
	}
	for i, f := range []*guest.File{c.Old, c.New} {
		if f == nil {
			continue
		}
		file, err := fileJSON(nil, p.trees[i], f, false)
		if err != nil {
			p.add(err)
		}
		o.add([]string{"old", "new"}[i], file)
	}
	p.json.add(o)
}

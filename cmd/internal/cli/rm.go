package cli

import (
	"context"
	"errors"
	"io/fs"
	"path"
	"strings"

	"github.com/spf13/cobra"

	"qimg/cloudimg/guest"
)

type rmOptions struct {
	open      openOptions
	recursive bool
	missing   bool
	dryRun    bool
}

func newRm(host Host) *cobra.Command {
	o := rmOptions{}
	cmd := &cobra.Command{
		Use:   "rm [-r] [-n] [--ignore-missing] IMAGE[:PART]:/PATH...",
		Short: "Remove files in images",
		Long: "Remove files in images, of ext2, ext3 and ext4 file systems. Symlinks on the way are\n" +
			"followed, and one that is named is removed itself. In each file system all is removed\n" +
			"or nothing, also after a crash: it is one transaction of the journal. What does not\n" +
			"fit the journal is removed in several, which is said; without a journal a crash can\n" +
			"leave a part, sound after e2fsck. A damaged file system, and an image that a machine\n" +
			"uses, is refused. -f is the format of the image; --ignore-missing is -f of rm(1).\n\n" + placeHelp,
		Example: "  qimg rm disk.qcow2:/etc/machine-id\n" +
			"  qimg rm -r -n disk.qcow2:/var/cache/apt",
		RunE: func(cmd *cobra.Command, args []string) error {
			return runRm(cmd.Context(), host, &o, args)
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.BoolVarP(&o.recursive, "recursive", "r", false, "remove directories with all below")
	f.BoolVar(&o.missing, "ignore-missing", false, "what is not there is no error")
	f.BoolVarP(&o.dryRun, "dry-run", "n", false, "change nothing, and print what would be removed")
	o.open.addFlags(f, host)
	o.open.chain = true
	return cmd
}

func runRm(ctx context.Context, host Host, o *rmOptions, args []string) error {
	if strings.Contains(o.open.format, ":/") { // rm -f IMAGE:/PATH, as of rm(1)
		return usagef("-f is the format of the image; what rm(1) calls -f is --ignore-missing here")
	}
	if len(args) == 0 {
		return usagef("Expecting a file in an image")
	}
	var groups placeGroups
	for _, arg := range args {
		p, ok := parsePlace(arg, o.open.imageOpts)
		if !ok {
			return notAPlace(arg)
		}
		switch base := path.Base(p.path); {
		case path.Clean(p.path) == "/":
			return p.error("", errors.New("is the root directory, which cannot be removed"))
		case base == "." || base == "..":
			return p.error("", errors.New("the names . and .. cannot be removed"))
		}
		groups.add(&p)
	}
	for _, g := range groups {
		if err := remove(ctx, host, o, g); err != nil {
			return err
		}
	}
	return nil
}

// remove removes files of one file system.
func remove(ctx context.Context, host Host, o *rmOptions, list []*place) (err error) {
	e, err := openEditing(ctx, host, list[0], &o.open, o.dryRun)
	if err != nil {
		return err
	}
	defer e.img.closeTo(&err)
	return e.run(ctx, func(x *guest.Edits) error {
		for _, p := range list {
			err := removePlace(ctx, e, o, x, p)
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err != nil && !(o.missing && errors.Is(err, fs.ErrNotExist)) {
				return p.error("", err)
			}
		}
		return nil
	})
}

func removePlace(ctx context.Context, e *editing, o *rmOptions, x *guest.Edits, p *place) error {
	tree := guest.Ext(e.fs)
	f, err := tree.Lookup(strings.TrimRight(p.path, "/"), false)
	if err != nil {
		return err
	}
	dir, name, err := x.Tx().Parent(p.path)
	switch {
	case err != nil:
		return err
	case f.IsDir() && !o.recursive:
		return errors.New("is a directory, which is removed with -r")
	case !f.IsDir() && strings.HasSuffix(p.path, "/"):
		return errors.New("not a directory")
	}
	if o.dryRun {
		for n, err := range guest.Walk(ctx, tree, f) {
			if err != nil {
				return err
			}
			e.tell(x, "D", path.Join(path.Clean(p.path), n.Path))
		}
	}
	return x.Remove(dir, name)
}

package cli

import (
	"context"
	"errors"
	"fmt"
	"path"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"qimg/cloudimg/guest"
	"qimg/ext4img"
)

type mkdirOptions struct {
	open    openOptions
	parents bool
	dryRun  bool
	mode    string
	owner   string
	attr    ext4img.Attr // what mode and owner say
}

func newMkdir(host Host) *cobra.Command {
	o := mkdirOptions{}
	cmd := &cobra.Command{
		Use:   "mkdir [-p] [--mode MODE] [--owner UID[:GID]] [-n] IMAGE[:PART]:/PATH...",
		Short: "Make directories in images",
		Long: "Make directories in images, in ext2, ext3 and ext4 file systems. In each file system\n" +
			"all are made or none, also after a crash: it is one transaction of the journal. A\n" +
			"damaged file system, and an image that a machine uses, is refused.\n\n" + placeHelp,
		Example: "  qimg mkdir disk.qcow2:/srv/data\n" +
			"  qimg mkdir -p --mode 700 --owner 1000 disk.qcow2:/home/me/.ssh",
		RunE: func(cmd *cobra.Command, args []string) error {
			return runMkdir(cmd.Context(), host, &o, args)
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.BoolVarP(&o.parents, "parents", "p", false, "make directories on the way, too, and take those that are there")
	f.StringVar(&o.mode, "mode", "755", "octal permissions of what is made")
	f.StringVar(&o.owner, "owner", "0", "UID[:GID] that what is made belongs to, GID being UID if not given")
	f.BoolVarP(&o.dryRun, "dry-run", "n", false, "change nothing, and print what would be made")
	o.open.addFlags(f, host)
	o.open.chain = true
	return cmd
}

func runMkdir(ctx context.Context, host Host, o *mkdirOptions, args []string) error {
	if len(args) == 0 {
		return usagef("Expecting a directory in an image")
	}
	mode, err := strconv.ParseUint(o.mode, 8, 16)
	if err != nil || mode > 0o7777 {
		return usagef("--mode '%s': expected octal digits, 7777 at most", printable(o.mode))
	}
	owner, err := parseOwner(o.owner)
	if err != nil {
		return err
	}
	o.attr.Mode = uint16(mode)
	if owner != nil {
		o.attr.UID, o.attr.GID = owner.UID, owner.GID
	}
	var groups placeGroups
	for _, arg := range args {
		p, ok := parsePlace(arg, o.open.imageOpts)
		if !ok {
			return notAPlace(arg)
		}
		groups.add(&p)
	}
	for _, g := range groups {
		if err := makeDirs(ctx, host, o, g); err != nil {
			return err
		}
	}
	return nil
}

// makeDirs makes directories in one file system.
func makeDirs(ctx context.Context, host Host, o *mkdirOptions, list []*place) (err error) {
	e, err := openEditing(ctx, host, list[0], &o.open, o.dryRun)
	if err != nil {
		return err
	}
	defer e.img.closeTo(&err)
	return e.run(ctx, func(x *guest.Edits) error {
		for _, p := range list {
			if err := makeDir(e, o, x, p); err != nil {
				return p.error("", err)
			}
		}
		return nil
	})
}

// makeDir makes a directory, and with -p those on the way to it.
func makeDir(e *editing, o *mkdirOptions, x *guest.Edits, p *place) error {
	full := strings.TrimRight(p.path, "/")
	paths := []string{full}
	if o.parents {
		paths = paths[:0]
		for i := 1; i < len(full); i++ {
			if full[i] == '/' && full[i-1] != '/' {
				paths = append(paths, full[:i])
			}
		}
		paths = append(paths, full)
	}
	for _, at := range paths {
		if o.parents {
			if ino, err := e.fs.Resolve(at, true); err == nil {
				if n, err := e.fs.Inode(ino); err != nil {
					return err
				} else if !n.IsDir() {
					return fmt.Errorf("%s: %w", printable(at), ext4img.ErrNotDir)
				}
				continue
			}
		}
		if base := path.Base(at); at == "" || base == "." || base == ".." {
			return errors.New("file exists")
		}
		dir, name, err := x.Tx().Parent(at)
		if err == nil {
			_, err = x.Tx().Mkdir(dir, name, o.attr)
		}
		if err == nil {
			e.tell(x, "A", path.Clean(at))
			err = x.Step()
		}
		if err != nil {
			return err
		}
	}
	return nil
}

package cli

import (
	"context"
	"fmt"
	"path"

	"github.com/spf13/cobra"

	"qimg/cloudimg/guest"
)

type tarOptions struct {
	open   openOptions
	output string
}

func newTar(host Host) *cobra.Command {
	o := tarOptions{}
	cmd := &cobra.Command{
		Use:   "tar [-o FILE] IMAGE[@SNAPSHOT][:PART][:/PATH]",
		Short: "Write a directory of an image as a tar archive",
		Long: "Write a directory of an image, with all below, as a tar archive to standard output.\n" +
			"The names in it begin with \"./\", as those of tar -C DIRECTORY -c . do. The format\n" +
			"is pax, with the records of GNU tar for extended attributes, ACLs and holes:\n" +
			"tar --numeric-owner --xattrs --xattrs-include='*' --acls -xp restores all. The same\n" +
			"file system makes the same bytes.\n\n" + placeHelp,
		Example: "  qimg tar disk.qcow2 | tar -tv\n" +
			"  qimg tar -o etc.tar disk.qcow2@before:/etc",
		RunE: func(cmd *cobra.Command, args []string) error {
			return runTar(cmd.Context(), host, &o, args)
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVarP(&o.output, "output", "o", "-", "`FILE` to make, replacing an older one; - is standard output")
	o.open.addPlaceFlags(f, host)
	return cmd
}

func runTar(ctx context.Context, host Host, o *tarOptions, args []string) error {
	if len(args) != 1 {
		return usagef("Expecting one directory in an image")
	}
	images := &places{open: &o.open}
	defer images.close()
	p := imagePlace(args[0], o.open.imageOpts)
	fsys, f, err := images.file(ctx, &p, true)
	if err != nil {
		return err
	}
	bad := problems{host: host}
	opts := &guest.TarOptions{
		Problem: func(path string, err error) { bad.add(p.error(path, err)) },
		Skipped: func(path string) { host.warn("%s: a socket is left out", printable(p.join(path))) },
	}
	name := path.Base(p.path)
	if o.output == "-" {
		if err := guest.Tar(ctx, host.Out, fsys, f, name, opts); err != nil {
			return err
		}
		return bad.err()
	}
	out, err := newFile(o.output, nil)
	if err != nil {
		return prefixError(o.output, err)
	}
	defer out.Abort()
	if err := guest.Tar(ctx, out.File().OS(), fsys, f, name, opts); err != nil {
		return fmt.Errorf("%s: %w", o.output, err)
	}
	if bad.n > 0 {
		return bad.err() // what is not whole is not made
	}
	return out.Commit()
}

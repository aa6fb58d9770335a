package cli

import (
	"context"
	"errors"
	"io"

	"github.com/spf13/cobra"

	"qimg/cloudimg/guest"
	"qimg/qcow2/transfer"
)

func newCat(host Host) *cobra.Command {
	o := openOptions{}
	cmd := &cobra.Command{
		Use:   "cat IMAGE[@SNAPSHOT][:PART]:/PATH...",
		Short: "Print files in images",
		Long:  "Print files in images, one behind the other, to standard output.\n\n" + placeHelp,
		Example: "  qimg cat disk.qcow2:/etc/os-release\n" +
			"  qimg cat disk.qcow2@before:/var/log/syslog | tail",
		RunE: func(cmd *cobra.Command, args []string) error {
			return runCat(cmd.Context(), host, &o, args)
		},
	}
	o.addPlaceFlags(cmd.Flags(), host)
	return cmd
}

func runCat(ctx context.Context, host Host, o *openOptions, args []string) error {
	if len(args) == 0 {
		return usagef("Expecting a file in an image")
	}
	images := &places{open: o}
	defer images.close()
	bad := problems{host: host}
	for _, arg := range args {
		if err := catFile(ctx, host.Out, images, arg); err != nil {
			if e := (*transfer.WriteError)(nil); errors.As(err, &e) || ctx.Err() != nil {
				return err
			}
			bad.add(err)
		}
	}
	return bad.err()
}

func catFile(ctx context.Context, w io.Writer, images *places, arg string) error {
	p, ok := parsePlace(arg, images.open.imageOpts)
	if !ok {
		return notAPlace(arg)
	}
	fsys, f, err := images.file(ctx, &p, true)
	if err != nil {
		return err
	}
	return p.wrap(writeContent(ctx, w, fsys, f))
}

// notAPlace is the error of an argument that has to be a file in an image.
func notAPlace(arg string) error {
	return usagef("'%s' is not a file in an image: those are named as in disk.qcow2:/etc/hosts", printable(arg))
}

// wrap names the place in an error.
func (p *place) wrap(err error) error {
	if err == nil || errors.Is(err, context.Canceled) {
		return err
	}
	return p.error("", err)
}

// writeContent writes the content of a regular file. What is wrong with the
// output is a *transfer.WriteError.
func writeContent(ctx context.Context, w io.Writer, fsys guest.FS, f *guest.File) error {
	if f.IsDir() {
		return errors.New("is a directory")
	}
	c, err := fsys.Content(f)
	if err != nil {
		return err
	}
	defer c.Close()
	return transfer.Stream(ctx, w, c, nil)
}

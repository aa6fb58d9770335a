package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"qimg/cloudimg/guest"
)

type cpOptions struct {
	open      openOptions
	recursive bool
	archive   bool
	devices   bool
	owner     string
	dryRun    bool
}

func newCp(host Host) *cobra.Command {
	o := cpOptions{}
	cmd := &cobra.Command{
		Use:   "cp [-r] [-a] [--devices] [--owner UID[:GID]] [-n] SOURCE... DESTINATION",
		Short: "Copy files out of images, into them, and between them",
		Long: "Copy files out of images, into them, and between them. If DESTINATION is a directory\n" +
			"it gets the files under their names; a SOURCE that is the root directory, or ends in\n" +
			"\"/.\", is what lies in it. - is standard input or output.\n\n" +
			"Kept are contents with their holes, permissions, times, and with -r symlinks and\n" +
			"hard links; with -a owners, setuid bits, extended attributes and ACLs, too. Symlinks\n" +
			"that are named are followed unless -r or -a is given.\n\n" +
			"Out of an image, owners need root, and nothing outside of DESTINATION is written,\n" +
			"whatever the image holds. Each file is complete or not there.\n\n" +
			"Into an image with an ext2, ext3 or ext4 file system all is copied or nothing, also\n" +
			"after a crash: it is one transaction of the journal. What does not fit the journal is\n" +
			"copied in several, which is said; without a journal a crash can leave a part, sound\n" +
			"after e2fsck. Owners are those of the source, or --owner; without -a a file that is\n" +
			"there keeps its owner, permissions and extended attributes, and its other names the old\n" +
			"content. A damaged file system, and an image that a machine uses, is refused.\n\n" + placeHelp,
		Example: "  qimg cp disk.qcow2:/etc/hosts .\n" +
			"  qimg cp -a disk.qcow2@before:/home backup\n" +
			"  qimg cp --owner 0 motd disk.qcow2:/etc/motd\n" +
			"  qimg cp -a a.qcow2:/etc/ssh b.qcow2:/etc",
		RunE: func(cmd *cobra.Command, args []string) error {
			return runCp(cmd.Context(), host, &o, args)
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.BoolVarP(&o.recursive, "recursive", "r", false, "copy directories with all below")
	f.BoolVarP(&o.archive, "archive", "a", false, "as -r, and keep owners, setuid bits, extended attributes and ACLs")
	f.BoolVar(&o.devices, "devices", false, "out of an image: make device nodes, which needs root")
	f.BoolVarP(&o.dryRun, "dry-run", "n", false, "into an image: change nothing, and print what would be made (A) and replaced (M)")
	f.StringVar(&o.owner, "owner", "", "into an image: UID[:GID] that what is made belongs to, GID being UID if not given")
	o.open.addPlaceFlags(f, host)
	return cmd
}

// endpoint is a source or the destination of a copy.
type endpoint struct {
	place        // in an image
	host  string // "": in an image; - is standard input or output
}

// endpoint reads an argument.
func (o *cpOptions) endpoint(arg string) endpoint {
	if arg == "-" {
		return endpoint{host: arg}
	}
	if p, ok := parsePlace(arg, o.open.imageOpts); ok {
		return endpoint{place: p}
	}
	return endpoint{host: arg}
}

func runCp(ctx context.Context, host Host, o *cpOptions, args []string) error {
	if len(args) < 2 {
		return usagef("Expecting a source and a destination")
	}
	o.recursive = o.recursive || o.archive
	var sources []endpoint
	for _, arg := range args[:len(args)-1] {
		sources = append(sources, o.endpoint(arg))
	}
	to := o.endpoint(args[len(args)-1])
	for _, s := range sources {
		if s.host != "" && to.host != "" {
			return usagef("Neither '%s' nor '%s' is in an image: those are named as in disk.qcow2:/etc/hosts", printable(s.host), printable(to.host))
		}
	}
	c := &copying{ctx: ctx, o: o, bad: problems{host: host}, images: &places{open: &o.open}}
	defer c.close()
	if to.host == "" {
		return c.in(sources, &to.place)
	}
	if o.dryRun || o.owner != "" {
		return usagef("--dry-run and --owner are for copies into an image")
	}
	if err := c.out(sources, to.host); err != nil {
		return err
	}
	return c.bad.err()
}

// copying is what cp does.
type copying struct {
	ctx    context.Context
	o      *cpOptions
	bad    problems
	images *places
	roots  []*os.Root // of sources
	temps  []string   // directories that are removed
}

func (c *copying) close() {
	c.images.close()
	for _, r := range c.roots {
		r.Close()
	}
	for _, t := range c.temps {
		os.RemoveAll(t)
	}
}

// out copies files out of images.
func (c *copying) out(sources []endpoint, to string) error {
	if to == "-" {
		for i := range sources {
			if err := catFile(c.ctx, c.bad.host.Out, c.images, sources[i].arg); err != nil {
				return err
			}
		}
		return nil
	}
	info, err := os.Stat(to)
	isDir := err == nil && info.IsDir()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if len(sources) > 1 && !isDir {
		return fmt.Errorf("%s: not a directory", printable(to))
	}
	dir, name := to, ""
	if !isDir {
		// What is there is a file that nobody holds, and none of the images.
		old, err := newFile(to, nil)
		if err != nil {
			return err
		}
		if err := old.Abort(); err != nil {
			return err
		}
		if dir, name = filepath.Split(filepath.Clean(to)); dir == "" {
			dir = "."
		}
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	var p *place // what is copied
	x := guest.NewExtractor(root, &guest.ExtractOptions{
		Archive: c.o.archive,
		Devices: c.o.devices,
		Problem: func(path string, err error) { c.bad.add(p.error(path, err)) },
		Skipped: func(path, why string) { c.bad.host.warn("%s: %s", printable(p.join(path)), why) },
	})
	for i := range sources {
		p = &sources[i].place
		if err := c.outOne(x, p, name); err != nil {
			if c.ctx.Err() != nil {
				return c.ctx.Err()
			}
			c.bad.add(err)
		}
	}
	x.Close()
	return nil
}

// outOne copies a file, or a directory with all below, to a name; "" is its own.
func (c *copying) outOne(x *guest.Extractor, p *place, name string) error {
	fsys, f, err := c.images.file(c.ctx, p, !c.o.recursive)
	if err != nil {
		return err
	}
	if f.IsDir() && !c.o.recursive {
		return p.error("", errors.New("is a directory, which is copied with -r"))
	}
	switch {
	case name != "":
	case f.IsDir() && (path.Clean(p.path) == "/" || strings.HasSuffix(p.path, "/.")):
		name = "."
	default:
		name = path.Base(p.path)
	}
	return p.wrap(x.Copy(c.ctx, name, fsys, f))
}

package cli

import (
	"bufio"
	"context"
	"fmt"
	"strconv"

	"github.com/spf13/cobra"

	"qimg/cloudimg/guest"
	"qimg/qcow2/blockdev"
)

type statOptions struct {
	open    openOptions
	extents bool
	output  string
}

func newStat(host Host) *cobra.Command {
	o := statOptions{}
	cmd := &cobra.Command{
		Use:   "stat [--extents] [--output=human|json] IMAGE[@SNAPSHOT][:PART]:/PATH...",
		Short: "Tell all about files in images",
		Long: "Tell all that an inode says: type, mode, owner, size, links, times, extended\n" +
			"attributes, and with --extents where the content lies. A symlink is not followed.\n\n" + placeHelp + "\n" +
			"JSON is an array with an object for each file, as ls has it with --xattrs; of ext2,\n" +
			"ext3 and ext4 also flags, generation, version and project. With --extents also\n" +
			"extents, an array of offset and length in bytes, kind (data, unwritten, hole) and\n" +
			"of data physical, the offset in the file system.",
		RunE: func(cmd *cobra.Command, args []string) error {
			return runStat(cmd.Context(), host, &o, args)
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.BoolVar(&o.extents, "extents", false, "tell where the content lies, too")
	f.StringVar(&o.output, "output", "human", "human or json")
	o.open.addPlaceFlags(f, host)
	return cmd
}

func runStat(ctx context.Context, host Host, o *statOptions, args []string) error {
	if len(args) == 0 {
		return usagef("Expecting a file in an image")
	}
	if err := checkOutput(o.output); err != nil {
		return err
	}
	images := &places{open: &o.open}
	defer images.close()
	bad := problems{host: host}
	w := bufio.NewWriter(host.Out)
	list := jsonList{w: w}
	for _, arg := range args {
		p := imagePlace(arg, o.open.imageOpts)
		fsys, f, err := images.file(ctx, &p, false)
		if err == nil && o.output == "json" {
			var j object
			if j, err = o.json(ctx, &p, fsys, f); err == nil {
				list.add(j)
			}
			err = p.wrap(err)
		} else if err == nil {
			err = p.wrap(o.print(ctx, w, &p, fsys, f))
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			bad.add(err)
		}
	}
	if o.output == "json" {
		list.close()
	}
	if err := w.Flush(); err != nil {
		return err
	}
	return bad.err()
}

func (o *statOptions) json(ctx context.Context, p *place, fsys guest.FS, f *guest.File) (object, error) {
	var j object
	j.addText("path", p.path)
	j, err := fileJSON(j, fsys, f, true)
	if err != nil {
		return nil, err
	}
	if n := f.Inode(); n != nil {
		j = append(j, object{{"flags", fmt.Sprintf("%#x", n.Flags)}, {"generation", int64(n.Generation)},
			{"version", n.Version}, {"project", int64(n.ProjID)}}...)
	}
	if !o.extents || f.Type() != guest.ModeRegular {
		return j, nil
	}
	list := []any{}
	err = eachFileExtent(ctx, fsys, f, func(e *blockdev.Extent) {
		x := object{{"offset", e.Off}, {"length", e.Len}, {"kind", extentKind(e)}}
		if e.Host != nil {
			x.add("physical", e.HostOff)
		}
		list = append(list, x)
	})
	j.add("extents", list)
	return j, err
}

// print prints all of an inode.
func (o *statOptions) print(ctx context.Context, w *bufio.Writer, p *place, fsys guest.FS, f *guest.File) error {
	line := func(key, format string, args ...any) {
		fmt.Fprintf(w, "%-8s %s\n", key+":", printable(fmt.Sprintf(format, args...)))
	}
	line("File", "%s", p.path)
	line("Type", "%s", typeName(f.Type()))
	if f.Type() == guest.ModeSymlink {
		target, err := fsys.Readlink(f)
		if err != nil {
			return err
		}
		line("Target", "%s", target)
	}
	if t := f.Type(); t == guest.ModeChar || t == guest.ModeBlock {
		line("Device", "%d, %d", f.Major, f.Minor)
	}
	line("Size", "%d", f.Size)
	line("Blocks", "%d", f.Blocks)
	line("Inode", "%d", f.Ino)
	line("Links", "%d", f.Links)
	line("Mode", "%04o %s", f.Mode&0o7777, modeText(f.Mode))
	line("Owner", "%d:%d", f.UID, f.GID)
	for i, t := range fileTimes(f) {
		if !t.at.IsZero() {
			line([...]string{"Access", "Modify", "Change", "Birth"}[i], "%s", t.at.Local().Format("2006-01-02 15:04:05.000000000 -0700"))
		}
	}
	if n := f.Inode(); n != nil {
		line("Flags", "%#x", n.Flags)
		line("Version", "%d, generation %d", n.Version, n.Generation)
		if n.ProjID != 0 {
			line("Project", "%d", n.ProjID)
		}
	}
	for x, err := range fsys.Xattrs(f) {
		if err != nil {
			return err
		}
		line("Xattr", "%s = %s", x.Name, strconv.Quote(x.Value))
	}
	if !o.extents || f.Type() != guest.ModeRegular {
		return nil
	}
	fmt.Fprintf(w, "%16s %16s %16s  %s\n", "Offset", "Length", "Physical", "Kind")
	return eachFileExtent(ctx, fsys, f, func(e *blockdev.Extent) {
		physical := "-"
		if e.Host != nil {
			physical = strconv.FormatInt(e.HostOff, 10)
		}
		fmt.Fprintf(w, "%16d %16d %16s  %s\n", e.Off, e.Len, physical, extentKind(e))
	})
}

// extentKind names an extent of a file.
func extentKind(e *blockdev.Extent) string {
	switch e.Kind {
	case blockdev.Unallocated:
		return "hole"
	case blockdev.Zero:
		return "unwritten"
	}
	return "data"
}

// eachFileExtent tells the extents of a file, each as long as it can be.
func eachFileExtent(ctx context.Context, fsys guest.FS, f *guest.File, fn func(*blockdev.Extent)) error {
	c, err := fsys.Content(f)
	if err != nil {
		return err
	}
	defer c.Close()
	var last blockdev.Extent
	for off := int64(0); off < c.Size(); {
		if err := ctx.Err(); err != nil {
			return err
		}
		e, err := blockdev.NextExtent(c, off)
		if err != nil {
			return err
		}
		if e.Kind == last.Kind && (e.Host == nil) == (last.Host == nil) && (e.Host == nil || e.HostOff == last.HostOff+last.Len) {
			last.Len += e.Len
		} else {
			if last.Len > 0 {
				fn(&last)
			}
			last = e
		}
		off += e.Len
	}
	if last.Len > 0 {
		fn(&last)
	}
	return nil
}

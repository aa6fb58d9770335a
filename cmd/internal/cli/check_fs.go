package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"

	"qimg/cloudimg/guest"
	"qimg/ext4img"
)

// runCheckFS is check --fs.
func runCheckFS(ctx context.Context, host Host, o *checkOptions, args []string) error {
	if len(args) != 1 {
		return usagef("Expecting one image file name")
	}
	if err := checkOutput(o.output); err != nil {
		return err
	}
	if o.repair != "" || o.dryRun || o.stale {
		return usagef("--fs cannot be used with -r, --dry-run and --stale: file systems are checked, not repaired")
	}
	p := imagePlace(args[0], o.open.imageOpts)
	if p.path != "/" {
		return usagef("--fs needs an image, or one of its partitions, not a file in it")
	}
	o.open.chain = true
	images := &places{open: &o.open}
	defer images.close()
	d, err := images.disk(ctx, &p)
	if err != nil {
		return err
	}
	volumes := d.disk.Volumes
	if p.part != "" {
		v, err := d.disk.Select(p.part)
		if err != nil {
			return selectError(&p, err)
		}
		volumes = []guest.Volume{*v}
	}
	c := &fsCheck{o: o, out: bufio.NewWriter(host.Out), err: host.Err}
	for i := range volumes {
		if err := c.volume(ctx, d.disk, &volumes[i]); err != nil {
			return prefixError(p.image, err)
		}
	}
	if o.output == "json" {
		list := object{{"image", d.image}, {"file-systems", c.list}}
		io.WriteString(c.out, prettyJSON(list))
	}
	if err := c.out.Flush(); err != nil {
		return err
	}
	switch {
	case c.errors > 0:
		return exit(exitCorrupt)
	case c.checked == 0:
		return &cmdError{code: exitNoCheck, err: messagef("%s: there is no ext2, ext3 or ext4 file system to check", printable(p.image))}
	}
	return nil
}

// fsCheck is the check of the file systems of an image.
type fsCheck struct {
	o       *checkOptions
	out     *bufio.Writer
	err     io.Writer
	list    []any
	checked int
	errors  int
}

// volume checks what a partition is filled with.
func (c *fsCheck) volume(ctx context.Context, disk *guest.Disk, v *guest.Volume) error {
	if !v.IsExt() {
		if v.FS.Type != "" && c.o.output == "human" && !c.o.quiet {
			fmt.Fprintf(c.out, "%s holds %s, which is not checked.\n", v, v.FS.Type)
		}
		return nil
	}
	dev, err := disk.Device(v)
	if err != nil {
		return err
	}
	findings := []any{}
	n, notes := 0, 0
	for f, err := range ext4img.Check(ctx, dev, nil) {
		if errors.Is(err, ext4img.ErrUnsupported) {
			return err
		}
		if err != nil {
			return fmt.Errorf("%s: %w", v, err)
		}
		if f.Severity == ext4img.Error {
			n++
		} else {
			notes++
		}
		if c.o.output == "json" {
			findings = append(findings, findingJSON(&f))
		} else if f.Severity == ext4img.Error || !c.o.quiet {
			fmt.Fprintf(c.out, "%s: %s\n", v, printable(f.String()))
		}
	}
	c.checked++
	c.errors += n
	switch {
	case c.o.output == "json":
		o := object{{"partition", int64(v.Number)}, {"type", v.FS.Type}, {"errors", int64(n)}, {"notes", int64(notes)}, {"findings", findings}}
		c.list = append(c.list, o)
	case c.o.quiet:
	case n > 0:
		fmt.Fprintf(c.out, "%s: errors found in the %s file system: %d.\n", v, v.FS.Type, n)
	default:
		fmt.Fprintf(c.out, "%s: no errors were found in the %s file system.\n", v, v.FS.Type)
	}
	return nil
}

func findingJSON(f *ext4img.Finding) object {
	o := object{{"kind", f.Kind.String()}, {"severity", f.Severity.String()}}
	if f.Group >= 0 {
		o.add("group", f.Group)
	}
	if f.Ino != 0 {
		o.add("inode", int64(f.Ino))
	}
	if f.Block >= 0 {
		o.add("block", f.Block)
	}
	o.addText("detail", f.Detail)
	return o
}

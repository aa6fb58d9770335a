package cli

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"qimg/cloudimg/guest"
)

type inspectOptions struct {
	open   openOptions
	output string
}

func newInspect(host Host) *cobra.Command {
	o := inspectOptions{}
	cmd := &cobra.Command{
		Use:   "inspect [--output=human|json] IMAGE[@SNAPSHOT]",
		Short: "Tell the partitions, file systems and operating system of an image",
		Long: "Tell the partitions, file systems and operating system of an image.\n\n" +
			"JSON is an object: image, size, table (gpt, mbr or none), partitions, an array of\n" +
			"number (0: the whole disk), start and size in bytes, and where they are known\n" +
			"part-type, part-name and part-uuid; filesystem, an object of type (as blkid names\n" +
			"it), version, label, uuid, size and used in bytes. Where there is an operating\n" +
			"system: system, an object of partition, id, name, version, codename, arch,\n" +
			"hostname, machine-id, and kernels, an array of version, partition and path.",
		RunE: func(cmd *cobra.Command, args []string) error {
			return runInspect(cmd.Context(), host, &o, args)
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVar(&o.output, "output", "human", "human or json")
	o.open.addPlaceFlags(f, host)
	return cmd
}

func runInspect(ctx context.Context, host Host, o *inspectOptions, args []string) error {
	if len(args) != 1 {
		return usagef("Expecting one image file name")
	}
	if err := checkOutput(o.output); err != nil {
		return err
	}
	images := &places{open: &o.open}
	defer images.close()
	p := imagePlace(args[0], o.open.imageOpts)
	if p.path != "/" || p.part != "" {
		return usagef("Expecting an image, not a place in one")
	}
	d, err := images.disk(ctx, &p)
	if err != nil {
		return err
	}
	m, err := d.disk.Machine(ctx)
	if err != nil {
		return couldNotOpen(p.image, err)
	}
	if o.output == "json" {
		io.WriteString(host.Out, prettyJSON(inspectJSON(d, m)))
		return nil
	}
	printInspect(host.Out, d, m)
	return nil
}

func inspectJSON(d *openPlace, m *guest.Machine) object {
	table := d.disk.Table
	if table == "" {
		table = "none"
	}
	list := []any{}
	for i := range d.disk.Volumes {
		list = append(list, volumeJSON(&d.disk.Volumes[i]))
	}
	o := object{{"image", d.image}}
	if d.snapshot != "" {
		o.addText("snapshot", d.snapshot)
	}
	o = append(o, object{{"size", d.img.size()}, {"table", table}, {"partitions", list}}...)
	if m == nil {
		return o
	}
	sys := object{{"partition", int64(m.Volume.Number)}}
	for _, f := range machineFields(m) {
		sys.addText(f.key, f.value)
	}
	kernels := []any{}
	for _, k := range m.Kernels {
		var e object
		e.addText("version", k.Version)
		e.add("partition", int64(k.Volume.Number))
		e.addText("path", k.Path)
		kernels = append(kernels, e)
	}
	sys.add("kernels", kernels)
	o.add("system", sys)
	return o
}

func volumeJSON(v *guest.Volume) object {
	o := object{{"number", int64(v.Number)}, {"start", v.Start}, {"size", v.Size}}
	text := func(o *object, key, value string) {
		if value != "" {
			o.addText(key, value)
		}
	}
	text(&o, "part-type", v.PartType)
	text(&o, "part-name", v.PartName)
	text(&o, "part-uuid", v.PartUUID)
	if v.FS.Type == "" {
		return o
	}
	fs := object{{"type", v.FS.Type}}
	text(&fs, "version", v.FS.Version)
	text(&fs, "label", v.FS.Label)
	text(&fs, "uuid", v.FS.UUID)
	if v.FS.Size >= 0 {
		fs.add("size", v.FS.Size)
	}
	if v.FS.Used >= 0 {
		fs.add("used", v.FS.Used)
	}
	o.add("filesystem", fs)
	return o
}

func printInspect(w io.Writer, d *openPlace, m *guest.Machine) {
	line := func(key, format string, args ...any) {
		fmt.Fprintf(w, "%s: %s\n", key, printable(fmt.Sprintf(format, args...)))
	}
	line("image", "%s", d.image)
	if d.snapshot != "" {
		line("snapshot", "%s", d.snapshot)
	}
	line("size", "%s (%d bytes)", humanSize(uint64(d.img.size())), d.img.size())
	table := d.disk.Table
	if table == "" {
		table = "none"
	}
	line("partition table", "%s", table)
	for i := range d.disk.Volumes {
		v := &d.disk.Volumes[i]
		parts := []string{humanSize(uint64(v.Size))}
		if v.FS.Type == "" {
			parts = append(parts, "nothing known")
		} else {
			parts = append(parts, v.FS.Type)
		}
		add := func(key, value string) {
			if value != "" {
				parts = append(parts, key+" "+value)
			}
		}
		add("version", v.FS.Version)
		add("label", v.FS.Label)
		add("uuid", v.FS.UUID)
		if v.FS.Used >= 0 {
			parts = append(parts, humanSize(uint64(v.FS.Used))+" used")
		}
		add("type", v.PartType)
		add("name", v.PartName)
		key := "whole disk"
		if v.Number > 0 {
			key = fmt.Sprintf("partition %d", v.Number)
		}
		line(key, "%s", strings.Join(parts, ", "))
	}
	if m == nil {
		return
	}
	for _, f := range machineFields(m) {
		line(f.key, "%s", f.value)
	}
	for _, k := range m.Kernels {
		line("kernel", "%s (%s)", k.Version, k.Path)
	}
}

// machineField is one of the texts that are told of an operating system.
type machineField struct{ key, value string }

// machineFields are those that are known.
func machineFields(m *guest.Machine) []machineField {
	all := []machineField{
		{"id", m.ID}, {"name", m.Name}, {"version", m.Version}, {"codename", m.Codename},
		{"arch", m.Arch}, {"hostname", m.Hostname}, {"machine-id", m.MachineID},
	}
	return slices.DeleteFunc(all, func(f machineField) bool { return f.value == "" })
}

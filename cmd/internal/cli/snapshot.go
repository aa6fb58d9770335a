package cli

import (
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"qimg/qcow2"
)

type snapshotOptions struct {
	open    openOptions
	action  snapshotAction
	output  string
	quiet   bool
	disk    string
	vmState string
}

// snapshotAction is what is done, and to which snapshot.
type snapshotAction struct {
	letter byte // of the option; 0: none was given
	tag    string
}

func newSnapshot(host Host) *cobra.Command {
	o := snapshotOptions{}
	cmd := &cobra.Command{
		Use: "snapshot [-l | -a SNAPSHOT | -c SNAPSHOT | -d SNAPSHOT | --from FILE] [-q] [-U] [-f FORMAT] FILE...\n" +
			"  qimg snapshot --export SNAPSHOT [--disk FILE] [--vmstate FILE] [-U] [-f FORMAT] FILE\n" +
			"  qimg snapshot --import SNAPSHOT [--disk FILE] [--vmstate FILE] [-f FORMAT] FILE",
		Short: "List, create, apply, delete, export and import the snapshots inside images",
		Long: "List, create, apply, delete, export and import the snapshots inside images.\n\n" +
			"What is changed is changed in all images or in none: all are opened, and all that\n" +
			"can fail for their sake is done in each, before the first is changed. The change\n" +
			"is then one write of 512 bytes for each image. A crash or a failing disk between\n" +
			"two of those can leave some changed and some not, each of them whole. An image\n" +
			"and its backing file cannot be changed together.\n\n" +
			"--from FILE, or - for standard input, holds a change on each line: create NAME,\n" +
			"apply ID-OR-NAME, delete NAME or delete-id ID. What follows the first blank, up\n" +
			"to the end of the line, is the name; empty lines are skipped.\n\n" +
			"--export writes a snapshot to files of its own, both or neither. The vm state is a\n" +
			"migration stream of QEMU, so that any number of machines resume from it:\n" +
			"qemu-system-x86_64 ... -snapshot -incoming \"exec: cat FILE\". Of an encrypted\n" +
			"image the files hold what is read: they are not encrypted. --import makes a\n" +
			"snapshot of such a stream, which -loadvm loads.\n\n" +
			"JSON of -l is an array with an object for each image: filename, and snapshots,\n" +
			"an array of what the table has: id, name, date-sec and date-nsec (since 1970),\n" +
			"vm-clock-sec and vm-clock-nsec (how long the guest had run), icount (left out if\n" +
			"there is none), vm-state-size and disk-size in bytes, l1-offset in bytes and\n" +
			"l1-size in entries, extra-data-size in bytes and unknown-extra-data in\n" +
			"hexadecimal digits.",
		RunE: func(cmd *cobra.Command, args []string) error {
			return runSnapshot(cmd.Context(), host, &o, args)
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	for _, a := range []struct{ letter, name, help string }{
		{"l", "list", "list the snapshots"},
		{"a", "apply", "make the content of `SNAPSHOT`, an id or a name, that of the disk"},
		{"c", "create", "create a snapshot of the name `SNAPSHOT`"},
		{"d", "delete", "delete the first snapshot of the name `SNAPSHOT`"},
	} {
		flag := f.VarPF(&snapshotFlag{&o.action, a.letter[0]}, a.name, a.letter, a.help)
		if a.letter == "l" {
			flag.NoOptDefVal = "true"
		}
	}
	o.open.addFlags(f, host)
	o.open.addForceShare(f)
	f.StringVar(&o.output, "output", "human", "of -l: human or json")
	f.VarPF(&snapshotFlag{&o.action, 'f'}, "from", "", "make all the changes that `FILE` lists, or none")
	f.VarPF(&snapshotFlag{&o.action, 'i'}, "import", "", "create a snapshot of the name `SNAPSHOT` from a vm state, and from a disk if it is not that of the image")
	f.VarPF(&snapshotFlag{&o.action, 'e'}, "export", "", "write the disk or the vm state of `SNAPSHOT`, an id or a name, to files of their own")
	f.StringVar(&o.disk, "disk", "", "of --export: qcow2 `FILE` to make of the disk, replacing an older one; of --import: image to take the disk from")
	f.StringVar(&o.vmState, "vmstate", "", "of --export: `FILE` to make of the vm state; of --import: file to read it from; - is standard output or input")
	f.BoolVarP(&o.quiet, "quiet", "q", false, "print errors only; nothing else is printed but the list")
	return cmd
}

// snapshotFlag is one of the options of which only one can be given.
type snapshotFlag struct {
	action *snapshotAction
	letter byte
}

func (f *snapshotFlag) String() string { return "" }

func (f *snapshotFlag) Type() string {
	if f.letter == 'l' {
		return "bool"
	}
	return "snapshot"
}

func (f *snapshotFlag) Set(tag string) error {
	if f.action.letter != 0 {
		return usagef("Cannot mix '-l', '-a', '-c', '-d'")
	}
	*f.action = snapshotAction{f.letter, tag}
	return nil
}

func runSnapshot(ctx context.Context, host Host, o *snapshotOptions, args []string) error {
	if len(args) == 0 {
		return usagef("Expecting one image file name")
	}
	if err := checkOutput(o.output); err != nil {
		return err
	}
	o.open.chain, o.open.locked = true, true
	switch o.action.letter {
	case 'l':
		return listSnapshots(ctx, host, o, args)
	case 'e', 'i':
		o.open.locked = false
		if len(args) != 1 {
			return usagef("Expecting one image file name")
		}
		if o.action.letter == 'e' {
			return exportSnapshot(ctx, host, o, args[0])
		}
	}
	steps, err := o.steps(ctx, host)
	if err != nil {
		return err
	}
	return changeSnapshots(ctx, o, args, steps)
}

// snapshotList is the snapshots of an image.
type snapshotList struct {
	name      string
	snapshots []qcow2.Snapshot
}

func listSnapshots(ctx context.Context, host Host, o *snapshotOptions, names []string) error {
	var lists []snapshotList
	for _, name := range names {
		img, err := openImage(ctx, name, &o.open)
		if err != nil {
			return couldNotOpen(name, err)
		}
		l := snapshotList{name: name}
		// QEMU has none where there is an external data file.
		if img.qcow2 != nil && img.qcow2.Header().IncompatibleFeatures&qcow2.IncompatDataFile == 0 {
			l.snapshots = img.qcow2.Snapshots()
		}
		img.close()
		lists = append(lists, l)
	}
	switch {
	case o.output == "json":
		list := []any{}
		for _, l := range lists {
			list = append(list, l.json())
		}
		io.WriteString(host.Out, prettyJSON(list))
	case len(lists) == 1:
		if len(lists[0].snapshots) > 0 {
			printSnapshots(host.Out, lists[0].snapshots)
		}
	default:
		for _, l := range lists {
			fmt.Fprintf(host.Out, "image: %s\n", l.name)
			if len(l.snapshots) > 0 {
				printSnapshots(host.Out, l.snapshots)
			}
			fmt.Fprintln(host.Out)
		}
		printTags(host.Out, lists)
	}
	return nil
}

func (l *snapshotList) json() object {
	list := []any{}
	for i := range l.snapshots {
		s := &l.snapshots[i]
		o := object{
			{"id", s.ID},
			{"name", s.Name},
			{"date-sec", int64(s.DateSec)},
			{"date-nsec", int64(s.DateNsec)},
			{"vm-clock-sec", s.VMClockNsec / 1e9},
			{"vm-clock-nsec", s.VMClockNsec % 1e9},
		}
		if s.ICount != qcow2.NoICount {
			o.add("icount", s.ICount)
		}
		list = append(list, append(o, object{
			{"vm-state-size", s.VMStateSize},
			{"disk-size", s.DiskSize},
			{"l1-offset", s.L1TableOffset},
			{"l1-size", int64(s.L1Size)},
			{"extra-data-size", int64(s.ExtraDataSize)},
			{"unknown-extra-data", hex.EncodeToString(s.UnknownExtraData)},
		}...))
	}
	return object{{"filename", l.name}, {"snapshots", list}}
}

// printTags prints which image has which tag, and under which ids.
func printTags(w io.Writer, lists []snapshotList) {
	var tags []string
	ids := map[string][]string{} // by tag, then image
	width := len("TAG")
	for i, l := range lists {
		for _, s := range l.snapshots {
			if ids[s.Name] == nil {
				tags = append(tags, s.Name)
				ids[s.Name] = make([]string, len(lists))
				width = max(width, len(s.Name))
			}
			at := &ids[s.Name][i]
			if *at != "" {
				*at += ","
			}
			*at += s.ID
		}
	}
	row := func(tag string, cells []string) {
		line := bytePad(tag, width)
		for i, c := range cells {
			line += "  " + bytePad(c, len(lists[i].name))
		}
		fmt.Fprintln(w, strings.TrimRight(line, " "))
	}
	fmt.Fprintln(w, "Snapshot ids by tag and image:")
	names := make([]string, len(lists))
	for i, l := range lists {
		names[i] = l.name
	}
	row("TAG", names)
	for _, tag := range tags {
		cells := ids[tag]
		for i := range cells {
			if cells[i] == "" {
				cells[i] = "-"
			}
		}
		row(tag, cells)
	}
}

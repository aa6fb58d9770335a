package cli

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"qimg/cmd/internal/term"
	"qimg/ext4img"
)

type buildOptions struct {
	format         string
	size           string
	free           string
	minimize       bool
	label          string
	uuid           string
	owner          string
	modeMask       string
	exclude        []string
	compat         string
	clusterSize    string
	compress       bool
	compression    string
	blockSize      string
	noJournal      bool
	reserved       string
	skipUnreadable bool
	quiet          bool
	progress       string

	partition     string
	partitionType string
	align         string
	disk          string
	inPlace       bool

	from sourceOptions
}

func newBuild(host Host) *cobra.Command {
	o := buildOptions{}
	cmd := &cobra.Command{
		Use:   "build [SOURCE... | --disk FILE.json] OUTPUT",
		Short: "Make a disk with an ext4 file system from directories, archives, container images",
		Long: "Make a disk with an ext4 file system that holds what the sources hold.\n" +
			"OUTPUT is complete or not there: an older file is replaced at the very end. Its\n" +
			"extension tells the format: .qcow2; .raw, .img or .ext4 for raw. - is standard output,\n" +
			"for a raw disk, and a block device is overwritten with -n.\n\n" +
			"The same tree and the same options make the same bytes. Access times are not\n" +
			"kept, and SOURCE_DATE_EPOCH is an upper bound for all others. What the user may\n" +
			"not see is not packed: trusted extended attributes show for root alone.\n\n" +
			"Sizes are bytes, or have one of the suffixes k, M, G, T, P, E (powers of 1024).\n\n" +
			sourceHelp + "\n\n" + diskHelp,
		Example: "  qimg build ./workload data.qcow2\n" +
			"  qimg build base.tar.zst ./overlay --manifest devices.mtree root.qcow2\n" +
			"  qimg build oci:image.tar:latest image.qcow2\n" +
			"  qimg build --owner 1000 --free 2G --label data ./workload data.qcow2\n" +
			"  qimg build -c --compression zstd --minimize ./workload small.qcow2\n" +
			"  qimg build --partition gpt --partition-type linux-root-x86-64 ./root root.qcow2\n" +
			"  qimg build ./workload - | zstd >data.raw.zst\n" +
			"  qimg build --disk disk.json disk.qcow2",
		RunE: func(cmd *cobra.Command, args []string) error {
			if cmd.Flags().Changed("disk") {
				return runBuildDisk(cmd.Context(), host, &o, cmd.Flags().Changed, args)
			}
			return runBuild(cmd.Context(), host, &o, cmd.Flags().Changed, args)
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVarP(&o.format, "format", "f", "", "qcow2 or raw (default: the extension of OUTPUT tells)")
	f.StringVar(&o.size, "size", "", "size of the disk (default: what SOURCE needs, plus --free)")
	f.StringVar(&o.free, "free", "", "free space in the disk: a size, or N% of what SOURCE needs (default: 20%, at least 64M)")
	f.BoolVar(&o.minimize, "minimize", false, "the smallest disk that holds the tree (with a journal 2048 blocks)")
	f.StringVar(&o.label, "label", "", "name of the file system, at most 16 bytes")
	f.StringVar(&o.uuid, "uuid", "", "UUID of the file system (default: made from names, metadata and options)")
	f.StringVar(&o.owner, "owner", "", "UID[:GID] that everything belongs to, GID being UID if not given (default: as in SOURCE)")
	f.StringArrayVar(&o.from.uidMaps, "uid-map", nil, "FROM:TO:COUNT: uids from FROM on become those from TO on, others are an error (repeatable)")
	f.StringArrayVar(&o.from.gidMaps, "gid-map", nil, "the same of gids")
	f.StringVar(&o.modeMask, "mode-mask", "", "octal mode bits that files and directories keep: 755 takes write from group and others, and setuid, setgid, sticky from all")
	f.StringArrayVar(&o.exclude, "exclude", nil, "leave out what matches, with all below it: a name as *.o, or with a slash a path from SOURCE as /tmp/* (repeatable)")
	f.StringArrayVar(&o.from.manifests, "manifest", nil, "make and change what this list in the format of mtree(5) tells, over all sources: owners, modes, devices (repeatable)")
	f.StringVar(&o.from.platform, "platform", "", "OS/ARCHITECTURE[/VARIANT] of a container image (default: linux and that of this machine)")
	f.Int64Var(&o.from.maxEntries, "max-entries", 0, "refuse archives that make more entries (default: 4194304)")
	f.StringVar(&o.compat, "compat", "1.1", "qcow2 version: 0.10 (v2) or 1.1 (v3)")
	f.StringVar(&o.clusterSize, "cluster-size", "64k", "qcow2 cluster size")
	f.BoolVarP(&o.compress, "compress", "c", false, "compress the qcow2 clusters")
	f.StringVar(&o.compression, "compression", "zlib", "of -c: zlib or zstd")
	f.StringVar(&o.blockSize, "block-size", "4k", "ext4 block size: 1k, 2k or 4k")
	f.BoolVar(&o.noJournal, "no-journal", false, "make no journal")
	f.StringVar(&o.reserved, "reserved", "0", "percent of the blocks that only root can use")
	f.StringVar(&o.partition, "partition", "none", "put the file system into a partition of a table: gpt or mbr; none: it fills the disk")
	f.StringVar(&o.partitionType, "partition-type", "linux", "type of that partition: linux, linux-root-x86-64, esp ..., a GUID, or for mbr a byte in hexadecimal digits")
	f.StringVar(&o.align, "align", "1M", "the partition begins at a multiple of it")
	f.StringVar(&o.disk, "disk", "", "make a disk of several partitions, as this JSON file tells")
	f.BoolVarP(&o.inPlace, "in-place", "n", false, "OUTPUT is a block device, and what it holds is overwritten")
	f.BoolVar(&o.skipUnreadable, "skip-unreadable", false, "warn about what cannot be read, and leave it out")
	f.BoolVarP(&o.quiet, "quiet", "q", false, "print errors and warnings only")
	f.StringVar(&o.progress, "progress", "auto", "auto (a bar on a terminal), plain (lines) or none")
	return cmd
}

// disk is a build with its options read.
type disk struct {
	source, output string   // source is what messages call it
	sources        []string // of which it is made
	from           sourceOptions
	set            *sourceSet // of sources, once they are open
	scan           ext4img.ScanOptions
	layout         ext4img.LayoutOptions
	freePercent    float64 // of what is needed; 0: layout says
	// sizeHint says how a larger size is asked for.
	sizeHint string
	// around returns the size of the disk around a file system; nil: the same.
	around func(size int64) int64
}

func runBuild(ctx context.Context, host Host, o *buildOptions, given func(flag string) bool, args []string) error {
	if len(args) < 2 && (len(args) == 0 || len(o.from.manifests) == 0) {
		return usagef("Expecting a source directory and an output file name")
	}
	if o.from.platform != "" && !slices.ContainsFunc(args, func(s string) bool { return strings.HasPrefix(s, ociPrefix) }) {
		return errors.New("--platform goes with a source oci:PATH only")
	}
	last := len(args) - 1
	d := o.newDisk(args[last], args[:last]...)
	defer d.close()
	if err := o.parse(d, host.Getenv); err != nil {
		return err
	}
	progress, err := o.newProgress(host, d.output)
	if err != nil {
		return err
	}
	defer progress.Close()
	target, err := o.newTarget(host, given, d.output)
	if err != nil {
		return err
	}
	defer target.close()
	if target.device != nil && d.layout.Size == 0 && o.free == "" && !o.minimize {
		d.layout.Size = target.size()
	}
	table, err := o.newTable(d, target, given)
	if err != nil {
		return err
	}
	tree, err := d.scanTree(ctx, host, host.warnText)
	if err != nil {
		return d.sourceError(err)
	}
	defer tree.Close()
	layout, err := d.newLayout(ctx, tree)
	if err != nil {
		return d.sourceError(err)
	}
	if target.device != nil && layout.Size() > target.size() {
		return fmt.Errorf("%s has %d bytes, %d are needed", d.output, target.size(), layout.Size())
	}
	if table != nil {
		err = table.writeLayout(ctx, layout, progress, d.sourceError)
	} else {
		err = target.writeLayout(ctx, layout, progress, d.sourceError)
	}
	if err != nil {
		return err
	}
	if !o.quiet {
		progress.Close()
		target.report("%s: %d entries, %s, ext4 %s (free %s)", d.output, tree.Entries(),
			humanSize(uint64(tree.Bytes())), humanSize(uint64(layout.Size())), humanSize(uint64(layout.FreeBytes())))
	}
	return nil
}

func (o *buildOptions) newProgress(host Host, output string) (*term.Progress, error) {
	mode := term.Mode(o.progress)
	if o.quiet {
		mode = term.None
	}
	progress, err := term.NewProgress(host.Err, mode, output)
	if err != nil {
		return nil, usagef("%v", err)
	}
	return progress, nil
}

// warnText prints a warning that names something in a source.
func (h Host) warnText(text string) {
	fmt.Fprintf(h.Err, "%s: warning: %s\n", h.name, printable(text))
}

// newDisk begins a disk of what the sources hold.
func (o *buildOptions) newDisk(output string, sources ...string) *disk {
	return &disk{
		source: strings.Join(sources, " "), sources: sources, from: o.from, output: output, sizeHint: "Use --size %s or more.",
		scan:   ext4img.ScanOptions{Exclude: o.exclude, SkipUnreadable: o.skipUnreadable},
		layout: ext4img.LayoutOptions{Minimize: o.minimize, Label: o.label, NoJournal: o.noJournal},
	}
}

// parse reads the options of the file system.
func (o *buildOptions) parse(d *disk, getenv func(string) string) error {
	return errors.Join(o.parseSizes(d), o.parseTree(d, getenv), o.from.parse(&d.scan))
}

func (o *buildOptions) parseSizes(d *disk) (err error) {
	if o.size != "" && (o.free != "" || o.minimize) || o.free != "" && o.minimize {
		return errors.New("only one of --size, --free and --minimize can be used")
	}
	if o.size != "" {
		if d.layout.Size, err = sizeArg("size '"+o.size+"'", o.size); err != nil {
			return err
		}
		if d.layout.Size == 0 {
			return errors.New("a disk of 0 bytes holds nothing")
		}
		if d.layout.Size <= math.MaxInt64-511 {
			d.layout.Size = (d.layout.Size + 511) &^ 511 // disks have whole sectors
		}
	}
	if percent, ok := strings.CutSuffix(o.free, "%"); ok {
		d.freePercent, err = strconv.ParseFloat(percent, 64)
		if err != nil || !(d.freePercent >= 0 && d.freePercent <= 1e6) {
			return fmt.Errorf("--free is a size or a percentage, not '%s'", o.free)
		}
	} else if o.free != "" {
		if d.layout.Free, err = sizeArg("free space '"+o.free+"'", o.free); err != nil {
			return err
		}
	}
	if o.free != "" && d.freePercent == 0 && d.layout.Free == 0 {
		d.layout.Minimize = true
	}
	block, err := sizeArg("block size", o.blockSize)
	if err != nil {
		return err
	}
	if block != 1024 && block != 2048 && block != 4096 {
		return fmt.Errorf("--block-size is 1k, 2k or 4k, not '%s'", o.blockSize)
	}
	d.layout.BlockSize = int(block)
	d.layout.ReservedPercent, err = strconv.ParseFloat(strings.TrimSuffix(o.reserved, "%"), 64)
	if r := d.layout.ReservedPercent; err != nil || !(r >= 0 && r <= 50) {
		return fmt.Errorf("--reserved is a percentage from 0 to 50, not '%s'", o.reserved)
	}
	if o.uuid != "" {
		if d.layout.UUID, err = ext4img.ParseUUID(o.uuid); err != nil {
			return err
		}
	}
	return nil
}

// parseTree reads what changes the tree.
func (o *buildOptions) parseTree(d *disk, getenv func(string) string) error {
	if o.owner != "" {
		uid, gid, ok := strings.Cut(o.owner, ":")
		if !ok {
			gid = uid
		}
		u, err1 := strconv.ParseUint(uid, 10, 32)
		g, err2 := strconv.ParseUint(gid, 10, 32)
		if err1 != nil || err2 != nil {
			return fmt.Errorf("--owner is UID or UID:GID, in numbers, not '%s'", o.owner)
		}
		d.scan.Owner = &ext4img.Owner{UID: uint32(u), GID: uint32(g)}
	}
	if o.modeMask != "" {
		m, err := strconv.ParseUint(o.modeMask, 8, 16)
		if err != nil || m == 0 || m > 0o7777 {
			return fmt.Errorf("--mode-mask is octal, from 1 to 7777, not '%s'", o.modeMask)
		}
		d.scan.ModeMask = uint16(m)
	}
	t, err := sourceDateEpoch(getenv)
	if err == nil && t != nil {
		d.scan.MaxTime, d.layout.Time = t, *t
	}
	return err
}

// sourceDateEpoch returns SOURCE_DATE_EPOCH; nil: it is not set.
func sourceDateEpoch(getenv func(string) string) (*int64, error) {
	s := getenv("SOURCE_DATE_EPOCH")
	if s == "" {
		return nil, nil
	}
	t, err := strconv.ParseInt(s, 10, 64)
	if err != nil || t < 0 {
		return nil, messagef("SOURCE_DATE_EPOCH is a number of seconds, not '%s'", s)
	}
	return &t, nil
}

// printable replaces what a terminal would take for a command.
func printable(text string) string {
	if utf8.ValidString(text) && strings.IndexFunc(text, func(r rune) bool { return !strconv.IsPrint(r) }) < 0 {
		return text
	}
	quoted := strconv.Quote(text)
	return strings.ReplaceAll(quoted[1:len(quoted)-1], `\"`, `"`)
}

// newLayout decides where everything goes.
func (d *disk) newLayout(ctx context.Context, tree *ext4img.Tree) (*ext4img.Layout, error) {
	if d.freePercent > 0 {
		smallest := d.layout
		smallest.Minimize = true
		l, err := ext4img.NewLayout(ctx, tree, &smallest)
		if err != nil {
			return nil, err
		}
		d.layout.Free = int64(max(1, math.Round(float64(l.Size())*d.freePercent/100)))
	}
	l, err := ext4img.NewLayout(ctx, tree, &d.layout)
	var small *ext4img.SizeError
	if errors.As(err, &small) {
		return nil, d.tooSmall(small)
	}
	return l, err
}

// tooSmall says what a disk that is too small lacks.
func (d *disk) tooSmall(e *ext4img.SizeError) error {
	around := d.around
	if around == nil {
		around = func(size int64) int64 { return size }
	}
	var hint strings.Builder
	fmt.Fprintf(&hint, d.sizeHint+"\n", sizeFlag(around(e.MinSize)))
	if e.MinSize == 2048*int64(d.layout.BlockSize) {
		hint.WriteString("That is what a journal asks for; --no-journal does without.\n")
	}
	for i, dir := range e.Largest {
		if i == 0 {
			hint.WriteString("Largest directories:\n")
		}
		fmt.Fprintf(&hint, "%10s  %s\n", humanSize(uint64(dir.Bytes)), printable(d.sourcePath(dir.Path)))
	}
	err := fmt.Errorf("a disk of %s is too small: %s needs %s (%d bytes) and %d inodes",
		humanSize(uint64(around(e.Size))), d.source, humanSize(uint64(e.Bytes)), e.Bytes, e.Inodes)
	return withHint(err, hint.String())
}

// sizeFlag is a size as a flag takes it, rounded up.
func sizeFlag(n int64) string {
	for _, u := range []struct {
		suffix string
		shift  uint
	}{{"G", 30}, {"M", 20}, {"k", 10}} {
		// A size that is large in a unit loses little by rounding.
		if n>>u.shift >= 100 || n&(1<<u.shift-1) == 0 {
			return strconv.FormatInt((n-1)>>u.shift+1, 10) + u.suffix
		}
	}
	return strconv.FormatInt(n, 10)
}

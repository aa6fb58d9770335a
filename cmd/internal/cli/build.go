package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"qimg/cmd/internal/term"
	"qimg/ext4img"
	"qimg/qcow2"
	"qimg/qcow2/blockdev"
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
}

func newBuild(host Host) *cobra.Command {
	o := buildOptions{}
	cmd := &cobra.Command{
		Use:   "build SOURCE OUTPUT",
		Short: "Make a disk with an ext4 file system from a directory",
		Long: "Make a disk with an ext4 file system that holds what the directory SOURCE holds.\n" +
			"OUTPUT is complete or not there: an older file is replaced at the very end. Its\n" +
			"extension tells the format: .qcow2; .raw, .img or .ext4 for raw.\n\n" +
			"The same tree and the same options make the same bytes. Access times are not\n" +
			"kept, and SOURCE_DATE_EPOCH is an upper bound for all others. What the user may\n" +
			"not see is not packed: trusted extended attributes show for root alone.\n\n" +
			"Sizes are bytes, or have one of the suffixes k, M, G, T, P, E (powers of 1024).",
		Example: "  qimg build ./workload data.qcow2\n" +
			"  qimg build --owner 1000 --free 2G --label data ./workload data.qcow2\n" +
			"  qimg build -c --compression zstd --minimize ./workload small.qcow2",
		RunE: func(cmd *cobra.Command, args []string) error {
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
	f.StringVar(&o.modeMask, "mode-mask", "", "octal mode bits that files and directories keep: 755 takes write from group and others, and setuid, setgid, sticky from all")
	f.StringArrayVar(&o.exclude, "exclude", nil, "leave out what matches, with all below it: a name as *.o, or with a slash a path from SOURCE as /tmp/* (repeatable)")
	f.StringVar(&o.compat, "compat", "1.1", "qcow2 version: 0.10 (v2) or 1.1 (v3)")
	f.StringVar(&o.clusterSize, "cluster-size", "64k", "qcow2 cluster size")
	f.BoolVarP(&o.compress, "compress", "c", false, "compress the qcow2 clusters")
	f.StringVar(&o.compression, "compression", "zlib", "of -c: zlib or zstd")
	f.StringVar(&o.blockSize, "block-size", "4k", "ext4 block size: 1k, 2k or 4k")
	f.BoolVar(&o.noJournal, "no-journal", false, "make no journal")
	f.StringVar(&o.reserved, "reserved", "0", "percent of the blocks that only root can use")
	f.BoolVar(&o.skipUnreadable, "skip-unreadable", false, "warn about what cannot be read, and leave it out")
	f.BoolVarP(&o.quiet, "quiet", "q", false, "print errors and warnings only")
	f.StringVar(&o.progress, "progress", "auto", "auto (a bar on a terminal), plain (lines) or none")
	return cmd
}

// disk is a build with its options read.
type disk struct {
	source, output string
	qcow2          *qcow2.WriterOptions // nil: raw
	scan           ext4img.ScanOptions
	layout         ext4img.LayoutOptions
	freePercent    float64 // of what is needed; 0: layout says
}

func runBuild(ctx context.Context, host Host, o *buildOptions, given func(flag string) bool, args []string) error {
	if len(args) != 2 {
		return usagef("Expecting a source directory and an output file name")
	}
	d, err := o.parse(host, given, args[0], args[1])
	if err != nil {
		return err
	}
	mode := term.Mode(o.progress)
	if o.quiet {
		mode = term.None
	}
	progress, err := term.NewProgress(host.Err, mode, d.output)
	if err != nil {
		return usagef("%v", err)
	}
	defer progress.Close()
	warn := func(text string) { fmt.Fprintf(host.Err, "%s: warning: %s\n", host.name, printable(text)) }
	d.scan.Warn = warn
	if err := d.excludeOutput(warn); err != nil {
		return err
	}
	// An output that cannot be made is found before the source is read.
	out, err := newFile(d.output, nil)
	if err != nil {
		return d.outputError(err)
	}
	if err := out.Abort(); err != nil {
		return d.outputError(err)
	}

	tree, err := ext4img.Scan(ctx, d.source, &d.scan)
	if err != nil {
		return d.sourceError(err)
	}
	defer tree.Close()
	layout, err := d.newLayout(ctx, tree)
	if err != nil {
		return d.sourceError(err)
	}
	if err := d.write(ctx, layout, progress); err != nil {
		return d.sourceError(err)
	}
	if !o.quiet {
		progress.Close()
		fmt.Fprintf(host.Out, "%s: %d entries, %s, ext4 %s (free %s)\n", d.output, tree.Entries(),
			humanSize(uint64(tree.Bytes())), humanSize(uint64(layout.Size())), humanSize(uint64(layout.FreeBytes())))
	}
	return nil
}

// parse reads the options.
func (o *buildOptions) parse(host Host, given func(flag string) bool, source, output string) (*disk, error) {
	d := &disk{source: source, output: output}
	d.scan = ext4img.ScanOptions{Exclude: o.exclude, SkipUnreadable: o.skipUnreadable}
	d.layout = ext4img.LayoutOptions{
		Minimize: o.minimize, Label: o.label, NoJournal: o.noJournal,
	}
	return d, errors.Join(o.parseFormat(d, given), o.parseSizes(d), o.parseTree(d, host.Getenv))
}

func (o *buildOptions) parseFormat(d *disk, given func(flag string) bool) error {
	format := o.format
	if format == "" {
		switch ext := strings.ToLower(filepath.Ext(d.output)); ext {
		case ".qcow2":
			format = "qcow2"
		case ".raw", ".img", ".ext4":
			format = "raw"
		default:
			return fmt.Errorf("%s: the extension does not tell the format: it is .qcow2, or .raw, .img, .ext4; otherwise use -f qcow2 or -f raw", d.output)
		}
	}
	switch format {
	case "raw":
		for _, flag := range []string{"compress", "compression", "compat", "cluster-size"} {
			if given(flag) {
				return fmt.Errorf("--%s goes with qcow2 only", flag)
			}
		}
		return nil
	case "qcow2":
	default:
		return messagef("Unknown file format '%s'", format)
	}
	if given("compression") && !o.compress {
		return errors.New("--compression goes with -c only")
	}
	cluster, err := sizeArg("cluster size", o.clusterSize)
	if err != nil {
		return err
	}
	create := qcow2.FormatOptions{}
	if create.ClusterSize, err = clusterSize(uint64(cluster)); err != nil {
		return err
	}
	if create.Version, err = parseCompat(o.compat); err != nil {
		return fmt.Errorf("--compat is 0.10 or 1.1, not '%s'", o.compat)
	}
	if create.Compression, err = parseCompression(o.compression); err != nil {
		return fmt.Errorf("--compression is zlib or zstd, not '%s'", o.compression)
	}
	d.qcow2 = &qcow2.WriterOptions{FormatOptions: create, Compress: o.compress}
	return nil
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
	if s := getenv("SOURCE_DATE_EPOCH"); s != "" {
		t, err := strconv.ParseInt(s, 10, 64)
		if err != nil || t < 0 {
			return messagef("SOURCE_DATE_EPOCH is a number of seconds, not '%s'", s)
		}
		d.scan.MaxTime = &t
		d.layout.Time = t
	}
	return nil
}

// excludeOutput leaves the output out of the disk if it lies in the source,
// and says so if there is something to leave out.
func (d *disk) excludeOutput(warn func(string)) error {
	source, err := filepath.EvalSymlinks(d.source)
	if err == nil {
		source, err = filepath.Abs(source)
	}
	if err != nil {
		return nil // which the scan says better
	}
	places := []string{d.output}
	if target, err := filepath.EvalSymlinks(d.output); err == nil && target != d.output {
		places = append(places, target)
	}
	for _, p := range places {
		dir, err := filepath.EvalSymlinks(filepath.Dir(p))
		if err != nil {
			continue // the output cannot be made there, which is said later
		}
		if dir, err = filepath.Abs(dir); err != nil {
			return err
		}
		rel, err := filepath.Rel(source, filepath.Join(dir, filepath.Base(p)))
		if err != nil || rel == "." || !filepath.IsLocal(rel) {
			continue
		}
		if _, err := os.Lstat(p); err == nil {
			d.scan.Exclude = append(d.scan.Exclude, "/"+literal(filepath.ToSlash(rel)))
			warn(p + " is the output: it is left out")
		}
	}
	return nil
}

// literal is the pattern that matches a path alone.
func literal(path string) string {
	return strings.NewReplacer(`\`, `\\`, "*", `\*`, "?", `\?`, "[", `\[`).Replace(path)
}

// sourceError names the place of an error in the source as the user does.
func (d *disk) sourceError(err error) error {
	var pe *fs.PathError
	if !errors.As(err, &pe) || pe.Path == d.source {
		return err
	}
	if !filepath.IsAbs(pe.Path) {
		err = &fs.PathError{Op: pe.Op, Path: printable(filepath.Join(d.source, pe.Path)), Err: pe.Err}
	}
	if errors.Is(err, fs.ErrPermission) && !d.scan.SkipUnreadable {
		return withHint(err, "Use --skip-unreadable to leave out what cannot be read.\n")
	}
	return err
}

// outputError names the output, unless the error does so already.
func (d *disk) outputError(err error) error {
	if strings.Contains(err.Error(), d.output) || errors.Is(err, context.Canceled) {
		return err
	}
	return prefixError(d.output, err)
}

// printable replaces what a terminal would take for a command.
func printable(text string) string {
	if strings.IndexFunc(text, func(r rune) bool { return !strconv.IsPrint(r) }) < 0 {
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
	var hint strings.Builder
	fmt.Fprintf(&hint, "Use --size %s or more.\n", sizeFlag(e.MinSize))
	if e.MinSize == 2048*int64(d.layout.BlockSize) {
		hint.WriteString("That is what a journal asks for; --no-journal does without.\n")
	}
	for i, dir := range e.Largest {
		if i == 0 {
			hint.WriteString("Largest directories:\n")
		}
		fmt.Fprintf(&hint, "%10s  %s\n", humanSize(uint64(dir.Bytes)), printable(filepath.Join(d.source, dir.Path)))
	}
	err := fmt.Errorf("a disk of %s is too small: %s needs %s (%d bytes) and %d inodes",
		humanSize(uint64(e.Size)), d.source, humanSize(uint64(e.Bytes)), e.Bytes, e.Inodes)
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

// write makes the output.
func (d *disk) write(ctx context.Context, layout *ext4img.Layout, progress *term.Progress) error {
	out, err := newFile(d.output, &blockdev.CreateOptions{Stream: true})
	if err != nil {
		return d.outputError(err)
	}
	defer out.Abort()
	wo := &ext4img.WriteOptions{Progress: progress.Update}
	if d.qcow2 == nil {
		err = writeRaw(ctx, out.File(), layout, wo)
	} else {
		err = d.writeQcow2(ctx, out.File(), layout, wo)
	}
	if err == nil {
		err = ctx.Err()
	}
	if err == nil {
		err = out.Commit()
	}
	// What is wrong with the source names a path below it, the rest is about
	// the output.
	if pe := (*fs.PathError)(nil); err != nil && (!errors.As(err, &pe) || filepath.IsAbs(pe.Path)) {
		return d.outputError(err)
	}
	return err
}

func writeRaw(ctx context.Context, f *blockdev.File, layout *ext4img.Layout, wo *ext4img.WriteOptions) error {
	if err := f.Truncate(layout.Size()); err != nil {
		return err
	}
	return layout.Write(ctx, f, wo)
}

func (d *disk) writeQcow2(ctx context.Context, f *blockdev.File, layout *ext4img.Layout, wo *ext4img.WriteOptions) error {
	d.qcow2.Extents = layout.Extents()
	img, err := qcow2.NewWriter(ctx, f, layout.Size(), d.qcow2)
	if err != nil {
		return err
	}
	defer img.Abort()
	if err := layout.Write(ctx, img, wo); err != nil {
		return err
	}
	return img.Finish()
}

package cli

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
)

// dumpParts are the parts of an image that dump prints, in order. Those behind
// the first dumpDefaultParts can be long and have to be asked for.
func dumpParts() []string {
	return []string{"header", "extensions", "l1", "refcount-table", "snapshots", "bitmaps", "l2", "refcounts"}
}

const dumpDefaultParts = 6

type dumpOptions struct {
	open        openOptions
	output      string
	what        string
	snapshot    string
	entries     string
	guestOffset string
	hostOffset  string
	empty       bool
}

func newDump(host Host) *cobra.Command {
	o := dumpOptions{}
	cmd := &cobra.Command{
		Use:   "dump [--what PART,...] [--snapshot ID] [--output=human|json] FILE",
		Short: "Print the tables of a qcow2 image as they are stored",
		Long: "Print the tables of a qcow2 image as they are stored, also of a damaged one: what\n" +
			"cannot be read is shown with its error, and the rest goes on.\n\n" +
			"PART is header, extensions, l1, refcount-table, snapshots, bitmaps, l2, refcounts or\n" +
			"all; the first six are printed if none is named. --entries FIRST[-LAST] chooses\n" +
			"entries of the tables: of l1 and refcount-table by index, of l2 by guest cluster, of\n" +
			"refcounts by cluster of the file. --guest-offset chooses the entries of l1 and l2\n" +
			"that map an offset of the disk, and --host-offset those of refcount-table and\n" +
			"refcounts that are about an offset of the file.\n\n" +
			"Exit status: 0, or 1 if a part could not be read.",
		RunE: func(cmd *cobra.Command, args []string) error {
			return runDump(cmd.Context(), host, &o, args)
		},
	}
	f := cmd.Flags()
	o.open.addFlags(f, host)
	o.open.addForceShare(f)
	f.StringVar(&o.output, "output", "human", "human or json")
	f.StringVar(&o.what, "what", "", "parts to print, separated by commas")
	f.StringVarP(&o.snapshot, "snapshot", "l", "", "L1 and L2 tables of a snapshot, by id or name, in place of the active ones")
	f.StringVar(&o.entries, "entries", "", "entries of the tables: FIRST or FIRST-LAST")
	f.StringVar(&o.guestOffset, "guest-offset", "", "entries that map this offset of the disk")
	f.StringVar(&o.hostOffset, "host-offset", "", "refcounts of this offset of the file")
	f.BoolVar(&o.empty, "empty", false, "entries that are 0 too")
	return cmd
}

// dumper prints the parts of an image.
type dumper struct {
	d      *qcow2.Dump
	w      *bufio.Writer
	json   bool
	items  int // of the list that is being printed
	failed bool
	ranges map[string]qcow2.Entries
	l1     qcow2.L1Table
}

func runDump(ctx context.Context, host Host, o *dumpOptions, args []string) error {
	if len(args) != 1 {
		return usagef("Expecting one image file name")
	}
	if err := checkOutput(o.output); err != nil {
		return err
	}
	parts, err := o.parts()
	if err != nil {
		return err
	}
	o.open.unopened = true
	img, err := openImage(ctx, args[0], &o.open)
	if err != nil {
		return couldNotOpen(args[0], err)
	}
	defer img.close()
	p := &dumper{w: bufio.NewWriter(host.Out), json: o.output == "json"}
	defer p.w.Flush()
	if p.d, err = qcow2.NewDump(ctx, img.dev); err != nil {
		return couldNotOpen(args[0], qcow2Error(err))
	}
	if p.ranges, err = o.ranges(p.d); err != nil {
		return err
	}
	if p.l1, err = o.table(p.d); err != nil {
		return err
	}
	if p.json {
		p.w.WriteString("{")
	}
	for i, part := range parts {
		if p.json && i > 0 {
			p.w.WriteString(",")
		}
		p.part(part)
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	if p.json {
		p.w.WriteString("\n}\n")
	}
	if p.failed {
		return exit(exitFailed)
	}
	return nil
}

// parts returns the parts to be printed, in their order.
func (o *dumpOptions) parts() ([]string, error) {
	if o.what == "all" {
		return dumpParts(), nil
	}
	if o.what == "" {
		return dumpParts()[:dumpDefaultParts], nil
	}
	want := strings.Split(o.what, ",")
	for _, w := range want {
		if !slices.Contains(dumpParts(), w) {
			return nil, messagef("--what has no part '%s' (expecting all or some of %s)", w, strings.Join(dumpParts(), ","))
		}
	}
	var parts []string
	for _, p := range dumpParts() {
		if slices.Contains(want, p) {
			parts = append(parts, p)
		}
	}
	return parts, nil
}

// ranges returns which entries of each table are wanted.
func (o *dumpOptions) ranges(d *qcow2.Dump) (map[string]qcow2.Entries, error) {
	all := qcow2.Entries{Last: math.MaxInt64, Empty: o.empty}
	if o.entries != "" {
		first, last, isRange := strings.Cut(o.entries, "-")
		if !isRange {
			last = first
		}
		var err error
		if all.First, err = strconv.ParseInt(first, 0, 64); err == nil {
			all.Last, err = strconv.ParseInt(last, 0, 64)
		}
		if err != nil || all.First < 0 || all.Last < all.First {
			return nil, messagef("--entries expects FIRST or FIRST-LAST, not '%s'", o.entries)
		}
	}
	r := map[string]qcow2.Entries{"l1": all, "l2": all, "refcount-table": all, "refcounts": all}
	one := func(option, value string, parts [2]string, per int64) error {
		if value == "" {
			return nil
		}
		off, err := parseSize(value)
		if err != nil || off > math.MaxInt64 {
			return messagef("--%s expects an offset, not '%s'", option, value)
		}
		cluster := int64(off) / d.ClusterSize()
		r[parts[0]] = qcow2.Entries{First: cluster / per, Last: cluster / per, Empty: true}
		r[parts[1]] = qcow2.Entries{First: cluster, Last: cluster, Empty: true}
		return nil
	}
	if err := one("guest-offset", o.guestOffset, [2]string{"l1", "l2"}, d.L2Entries()); err != nil {
		return nil, err
	}
	return r, one("host-offset", o.hostOffset, [2]string{"refcount-table", "refcounts"}, d.RefcountsPerBlock())
}

// table returns the L1 table to be printed.
func (o *dumpOptions) table(d *qcow2.Dump) (qcow2.L1Table, error) {
	if o.snapshot == "" {
		return d.ActiveL1(), nil
	}
	for _, byName := range []bool{false, true} {
		for s, err := range d.Snapshots() {
			if err == nil && (s.ID == o.snapshot && !byName || s.Name == o.snapshot && byName) {
				return qcow2.L1Table{Off: int64(min(s.L1TableOffset, math.MaxInt64)), Size: s.L1Size}, nil
			}
		}
	}
	return qcow2.L1Table{}, messagef("Snapshot '%s' not found", o.snapshot)
}

// part prints a part.
func (p *dumper) part(part string) {
	d := p.d
	h, err := d.Header()
	switch part {
	case "header":
		p.header(&h, err)
	case "extensions":
		p.begin(part, fmt.Sprintf("%d header extensions", len(h.Extensions)))
		for i, e := range h.Extensions {
			p.item(int64(i), nil, extensionObject(&e))
		}
		p.end()
	case "l1":
		p.begin(part, fmt.Sprintf("l1 table at %#x, %d entries", p.l1.Off, p.l1.Size))
		for e, err := range d.L1(p.l1, p.ranges[part]) {
			p.item(e.Index, err, l1Object(d, &e))
		}
		p.end()
	case "l2":
		p.begin(part, "l2 tables")
		for e, err := range d.L2(p.l1, p.ranges[part]) {
			p.item(e.Index, err, l2Object(d, &e))
		}
		p.end()
	case "refcount-table":
		p.begin(part, fmt.Sprintf("refcount table at %#x, %d clusters", h.RefcountTableOffset, h.RefcountTableClusters))
		for e, err := range d.RefcountTable(p.ranges[part]) {
			p.item(e.Index, err, refcountTableObject(d, &e))
		}
		p.end()
	case "refcounts":
		p.begin(part, "refcounts")
		for r, err := range d.Refcounts(p.ranges[part]) {
			o := object{}
			if err == nil {
				o.add("host", hexNumber(r.Cluster*d.ClusterSize()))
				o.add("clusters", r.N)
				o.add("refcount", r.Refcount)
			}
			p.item(r.Cluster, err, o)
		}
		p.end()
	case "snapshots":
		p.begin(part, fmt.Sprintf("snapshot table at %#x, %d snapshots", h.SnapshotsOffset, h.NbSnapshots))
		for s, err := range d.Snapshots() {
			p.item(s.Index, err, snapshotEntryObject(&s))
		}
		p.end()
	case "bitmaps":
		p.begin(part, "bitmap directory")
		i := int64(0)
		for b, err := range d.Bitmaps() {
			p.item(i, err, bitmapEntryObject(&b))
			i++
		}
		p.end()
	}
}

// begin begins a part that is a list.
func (p *dumper) begin(part, title string) {
	p.items = 0
	if p.json {
		fmt.Fprintf(p.w, "\n    \"%s\": [", part)
	} else {
		fmt.Fprintf(p.w, "%s\n", title)
	}
}

func (p *dumper) end() {
	switch {
	case p.json && p.items > 0:
		p.w.WriteString("\n    ]")
	case p.json:
		p.w.WriteString("]")
	}
}

// item prints an entry, or an error in its place. An entry without any value
// cannot be read at all.
func (p *dumper) item(index int64, err error, o object) {
	all := object{{"index", index}}
	if err == nil || len(o) > 0 {
		all = append(all, o...)
	}
	if err != nil {
		p.failed = true
		all.add("error", err.Error())
	}
	if p.json {
		if p.items > 0 {
			p.w.WriteString(",")
		}
		var b strings.Builder
		appendLineJSON(&b, all)
		fmt.Fprintf(p.w, "\n        %s", b.String())
	} else {
		fmt.Fprintf(p.w, "  [%d]", index)
		writeLine(p.w, all[1:])
	}
	p.items++
}

// writeLine prints the members of an object in a line.
func writeLine(w io.Writer, o object) {
	for _, m := range o {
		switch v := m.value.(type) {
		case bool:
			fmt.Fprintf(w, " %s", m.key) // only those that are so are there
		case string:
			if strings.ContainsAny(v, " \"") || v == "" {
				v = strconv.Quote(v)
			}
			fmt.Fprintf(w, " %s=%s", m.key, v)
		default:
			fmt.Fprintf(w, " %s=%v", m.key, v)
		}
	}
	fmt.Fprintln(w)
}

// header prints the header.
func (p *dumper) header(h *qcow2.Header, err error) {
	o := headerObject(h)
	if err != nil {
		p.failed = true
		o.add("error", err.Error())
	}
	if p.json {
		var b strings.Builder
		appendJSON(&b, o, 1)
		fmt.Fprintf(p.w, "\n    \"header\": %s", b.String())
		return
	}
	fmt.Fprintln(p.w, "header")
	for _, m := range o {
		fmt.Fprintf(p.w, "  %s: %v\n", m.key, m.value)
	}
}

func hexNumber[T int64 | uint64 | uint32](n T) string { return fmt.Sprintf("%#x", n) }

// headerObject has the fields of the header under the names of the
// specification.
func headerObject(h *qcow2.Header) object {
	o := object{}
	o.add("version", int64(h.Version))
	o.add("backing_file_offset", hexNumber(h.BackingFileOffset))
	o.add("backing_file_size", int64(h.BackingFileSize))
	o.add("cluster_bits", int64(h.ClusterBits))
	o.add("size", h.Size)
	o.add("crypt_method", h.CryptMethod.String())
	o.add("l1_size", int64(h.L1Size))
	o.add("l1_table_offset", hexNumber(h.L1TableOffset))
	o.add("refcount_table_offset", hexNumber(h.RefcountTableOffset))
	o.add("refcount_table_clusters", int64(h.RefcountTableClusters))
	o.add("nb_snapshots", int64(h.NbSnapshots))
	o.add("snapshots_offset", hexNumber(h.SnapshotsOffset))
	if h.Version >= 3 {
		features := func(bits uint64, names string) string {
			return strings.TrimSpace(fmt.Sprintf("%#x %s", bits, names))
		}
		o.add("incompatible_features", features(uint64(h.IncompatibleFeatures), h.IncompatibleFeatures.String()))
		o.add("compatible_features", features(uint64(h.CompatibleFeatures), h.CompatibleFeatures.String()))
		o.add("autoclear_features", features(uint64(h.AutoclearFeatures), h.AutoclearFeatures.String()))
		o.add("refcount_order", int64(h.RefcountOrder))
		o.add("header_length", int64(h.HeaderLength))
		o.add("compression_type", h.CompressionType.String())
	}
	if h.BackingFile != "" {
		o.add("backing_file", h.BackingFile)
	}
	return o
}

// extensionObject describes a header extension: what is known of it, or its
// bytes.
func extensionObject(e *qcow2.Extension) object {
	o := object{{"type", fmt.Sprintf("%#08x", e.Type)}, {"length", int64(len(e.Data))}}
	switch name := e.Name(); name {
	case "":
		o.add("data", fmt.Sprintf("%x", e.Data[:min(len(e.Data), 64)]))
	case "backing file format", "external data file name":
		o.add("name", name)
		o.add("value", strings.TrimRight(string(e.Data), "\x00"))
	default:
		o.add("name", name)
	}
	return o
}

func addFlags(o *object, copied bool, reserved uint64) {
	if copied {
		o.add("copied", true)
	}
	if reserved != 0 {
		o.add("reserved", hexNumber(reserved))
	}
}

func l1Object(d *qcow2.Dump, e *qcow2.L1Entry) object {
	o := object{}
	o.add("offset", hexNumber(e.Off))
	o.add("entry", hexNumber(e.Entry))
	if n := d.ClusterSize() * d.L2Entries(); e.Index <= math.MaxInt64/n {
		o.add("guest", hexNumber(e.Index*n))
	}
	if e.L2Offset() != 0 {
		o.add("l2-table", hexNumber(e.L2Offset()))
	}
	addFlags(&o, e.Copied(), e.Reserved())
	return o
}

func l2Object(d *qcow2.Dump, e *qcow2.L2Entry) object {
	o := object{}
	o.add("offset", hexNumber(e.Off))
	if e.Kind == 0 {
		return o // it is of an error
	}
	o.add("guest", hexNumber(e.Index*d.ClusterSize()))
	o.add("entry", hexNumber(e.Entry))
	if d.Extended() {
		o.add("subclusters-allocated", hexNumber(e.Bitmap&math.MaxUint32))
		o.add("subclusters-zero", hexNumber(e.Bitmap>>32))
	}
	o.add("kind", e.Kind.String())
	if e.HostSize != 0 {
		o.add("host", hexNumber(e.Host))
	}
	if e.Kind == blockdev.Compressed {
		o.add("bytes", e.HostSize)
	}
	addFlags(&o, e.Copied(), e.Reserved())
	return o
}

func refcountTableObject(d *qcow2.Dump, e *qcow2.RefcountTableEntry) object {
	o := object{}
	o.add("offset", hexNumber(e.Off))
	o.add("entry", hexNumber(e.Entry))
	if n := d.ClusterSize() * d.RefcountsPerBlock(); e.Index <= math.MaxInt64/n {
		o.add("host", hexNumber(e.Index*n))
	}
	if e.Block() != 0 {
		o.add("block", hexNumber(e.Block()))
	}
	addFlags(&o, false, e.Reserved())
	return o
}

func snapshotEntryObject(e *qcow2.SnapshotEntry) object {
	o := object{}
	if e.Off == 0 {
		return o
	}
	s := &e.Snapshot
	o.add("offset", hexNumber(e.Off))
	o.add("id", s.ID)
	o.add("name", s.Name)
	o.add("l1_table_offset", hexNumber(s.L1TableOffset))
	o.add("l1_size", int64(s.L1Size))
	o.add("date_sec", int64(s.DateSec))
	o.add("date_nsec", int64(s.DateNsec))
	o.add("vm_clock_nsec", s.VMClockNsec)
	o.add("vm_state_size", s.VMStateSize)
	o.add("disk_size", s.DiskSize)
	if s.ICount != qcow2.NoICount {
		o.add("icount", s.ICount)
	}
	o.add("extra_data_size", int64(e.StoredExtraData()))
	if len(s.UnknownExtraData) > 0 {
		o.add("unknown_extra_data", fmt.Sprintf("%x", s.UnknownExtraData))
	}
	return o
}

func bitmapEntryObject(e *qcow2.BitmapEntry) object {
	o := object{}
	o.add("offset", hexNumber(e.Off))
	if e.TableOffset == 0 && e.Name == "" {
		return o
	}
	b := &e.Bitmap
	o.add("name", b.Name)
	o.add("bitmap_table_offset", hexNumber(b.TableOffset))
	o.add("bitmap_table_size", int64(b.TableSize))
	o.add("flags", strings.TrimSpace(fmt.Sprintf("%#x %s", uint32(b.Flags), strings.Join(b.Flags.Names(), ", "))))
	o.add("type", int64(b.Type))
	o.add("granularity_bits", int64(b.GranularityBits))
	if len(b.ExtraData) > 0 {
		o.add("extra_data", fmt.Sprintf("%x", b.ExtraData[:min(len(b.ExtraData), 64)]))
	}
	return o
}

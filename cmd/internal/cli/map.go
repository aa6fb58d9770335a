package cli

import (
	"bufio"
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"qimg/cloudimg/formats"
	"qimg/qcow2"
	"qimg/qcow2/blockdev"
)

type mapOptions struct {
	open   openOptions
	output string
	start  byteCount
	length byteCount
}

func newMap(host Host) *cobra.Command {
	o := mapOptions{start: byteCount{what: "start offset"}, length: byteCount{what: "max length"}}
	cmd := &cobra.Command{
		Use:   "map [-f FORMAT] [--output=human|json] [-s OFFSET] [-l LENGTH] FILE",
		Short: "Tell where the data of an image lies",
		Long: "Tell where the data of an image lies: in which file of its backing chain, at which\n" +
			"offset of it, and what of the disk reads as zeroes.",
	}
	f := cmd.Flags()
	o.open.addFlags(f, host)
	o.open.addForceShare(f)
	f.StringVar(&o.output, "output", "human", "human or json")
	f.VarP(&o.start, "start-offset", "s", "begin at this offset of the disk")
	f.VarP(&o.length, "max-length", "l", "tell of so many bytes at most")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return runMap(cmd.Context(), host, &o, f, args)
	}
	return cmd
}

// byteCount is an option that is a size, checked as it is read.
type byteCount struct {
	what string // for messages
	n    int64
}

func (s *byteCount) String() string { return "" }

func (s *byteCount) Type() string { return "size" }

// Set reads the size.
func (s *byteCount) Set(v string) (err error) {
	s.n, err = sizeArg(s.what, v)
	return err
}

func runMap(ctx context.Context, host Host, o *mapOptions, f *pflag.FlagSet, args []string) error {
	if len(args) != 1 {
		return usagef("Expecting one image file name")
	}
	if err := checkOutput(o.output); err != nil {
		return err
	}
	o.open.chain = true
	o.open.cacheSize = 1 << 20 // each table is looked at once
	img, err := openImage(ctx, args[0], &o.open)
	if err != nil {
		return couldNotOpen(args[0], err)
	}
	defer img.close()
	end := img.size()
	if f.Changed("max-length") {
		end = min(o.start.n+o.length.n, end)
	}
	w := bufio.NewWriter(host.Out)
	var p mapPrinter = &mapText{w: w}
	if o.output == "json" {
		p = &mapJSON{w: w}
	}
	err = printMap(ctx, newMapper(img), p, o.start.n, end)
	if e := w.Flush(); err == nil {
		err = e
	}
	return err
}

// mapEntry is a run of the disk that is alike.
type mapEntry struct {
	start, length       int64
	depth               int // of the image in the chain that decides
	present, zero, data bool
	hasOffset           bool
	offset              int64
	file                string // that offset is of
}

// joins reports whether next goes on with e.
func (e *mapEntry) joins(next *mapEntry) bool {
	return e.length > 0 && e.zero == next.zero && e.data == next.data && e.depth == next.depth && e.present == next.present &&
		e.file == next.file && e.hasOffset == next.hasOffset && (!e.hasOffset || e.offset+e.length == next.offset)
}

type mapPrinter interface {
	begin()
	// entry prints e; next is what follows, nil at the end, and may be changed
	// to join with more.
	entry(e, next *mapEntry) error
}

// printMap goes through the disk from off to end.
func printMap(ctx context.Context, m *mapper, p mapPrinter, off, end int64) error {
	p.begin()
	e := mapEntry{start: off}
	for e.start+e.length < end {
		if err := ctx.Err(); err != nil {
			return err
		}
		off := e.start + e.length
		next, err := m.status(off, end-off)
		if err != nil {
			return messagef("Could not read file metadata: %w", err)
		}
		if e.joins(&next) {
			e.length += next.length
			continue
		}
		if e.length > 0 {
			if err := p.entry(&e, &next); err != nil {
				return err
			}
		}
		e = next
	}
	return p.entry(&e, nil)
}

// mapText prints the table for people: data alone.
type mapText struct{ w io.Writer }

func (t *mapText) begin() {
	fmt.Fprintf(t.w, "%-16s%-16s%-16s%s\n", "Offset", "Length", "Mapped to", "File")
}

func (t *mapText) entry(e, next *mapEntry) error {
	if e.data && !e.hasOffset {
		return messagef("File contains external, encrypted or compressed clusters.")
	}
	if e.data && !e.zero {
		fmt.Fprintf(t.w, "%-16s%-16s%-16s%s\n", cHex(e.start), cHex(e.length), cHex(e.offset), e.file)
	}
	if next != nil && (!next.data || next.zero) {
		next.data, next.zero = false, true
	}
	return nil
}

// cHex is C's %#x, which has no prefix for 0.
func cHex(n int64) string {
	if n == 0 {
		return "0"
	}
	return fmt.Sprintf("%#x", n)
}

// mapJSON prints the list of all entries.
type mapJSON struct{ w io.Writer }

func (j *mapJSON) begin() { io.WriteString(j.w, "[") }

func (j *mapJSON) entry(e, next *mapEntry) error {
	fmt.Fprintf(j.w, `{ "start": %d, "length": %d, "depth": %d, "present": %t, "zero": %t, "data": %t`,
		e.start, e.length, e.depth, e.present, e.zero, e.data)
	if e.hasOffset {
		fmt.Fprintf(j.w, `, "offset": %d`, e.offset)
	}
	end := "}]\n"
	if next != nil {
		end = "},\n"
	}
	_, err := io.WriteString(j.w, end)
	return err
}

// mapper tells what a disk is made of.
type mapper struct {
	dev   blockdev.Reader
	chain []mapLayer
}

// mapLayer is an image of the backing chain.
type mapLayer struct {
	im    *qcow2.Image // nil: raw
	asked bool
	holes bool // the holes of its file are zeroes of the disk
}

func newMapper(img *image) *mapper {
	m := &mapper{dev: img.reader()}
	for dev := m.dev; dev != nil; {
		im, _ := dev.(*qcow2.Image)
		m.chain = append(m.chain, mapLayer{im: im})
		if im == nil {
			break
		}
		dev = im.Backing()
	}
	return m
}

// status tells of at most limit bytes at off.
func (m *mapper) status(off, limit int64) (mapEntry, error) {
	if size := m.dev.Size(); off >= size { // the rest of the last sector of a raw image
		e := mapEntry{start: off, length: limit, present: true, zero: true, hasOffset: true, offset: off, file: fileName(m.dev)}
		if size > 0 {
			x, err := blockdev.NextExtent(m.dev, size-1)
			if err != nil {
				return e, err
			}
			e.hasOffset = x.Host != nil
			e.offset, e.file = x.HostOff+1+off-size, fileName(x.Host)
		}
		return e, nil
	}
	x, err := blockdev.NextExtent(m.dev, off)
	if err != nil {
		return mapEntry{}, err
	}
	e := mapEntry{
		start: off, length: min(x.Len, limit), depth: x.Depth,
		present: x.Kind != blockdev.Unallocated, zero: x.Kind.ReadsZero(), data: !x.Kind.ReadsZero(),
	}
	if x.Host == nil {
		return e, nil
	}
	e.hasOffset, e.offset, e.file = true, x.HostOff, fileName(x.Host)
	if _, foreign := m.dev.(*formats.Image); foreign {
		e.data = true // a hole of the file is data of the image
	}
	if x.Kind != blockdev.Data {
		return e, nil
	}
	return e, m.lookBelow(&e, x.Host)
}

// lookBelow finds the holes of the file that e lies in, where they count.
func (m *mapper) lookBelow(e *mapEntry, host blockdev.Reader) error {
	layer := &m.chain[e.depth]
	if layer.im == nil {
		return nil
	}
	if !layer.asked {
		// An error means that nothing is known of the holes.
		layer.holes, _ = layer.im.PreallocatedMetadata()
		layer.asked = true
	}
	if !layer.holes {
		return nil
	}
	size := host.Size()
	if e.offset >= size {
		e.zero = true
		return nil
	}
	x, err := blockdev.NextExtent(host, e.offset)
	if err != nil {
		return err
	}
	e.zero = x.Kind.ReadsZero()
	if !e.zero || e.offset+x.Len < size {
		e.length = min(e.length, x.Len)
	}
	return nil
}

func fileName(dev blockdev.Reader) string {
	if f, ok := dev.(*blockdev.File); ok {
		return f.Name()
	}
	return ""
}

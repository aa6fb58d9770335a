package cli

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
)

type infoOptions struct {
	open   openOptions
	output string
	chain  bool
}

func newInfo(host Host) *cobra.Command {
	o := infoOptions{}
	cmd := &cobra.Command{
		Use:   "info [-f FORMAT] [--output=human|json] [--backing-chain] FILE",
		Short: "Tell what an image is",
		RunE: func(cmd *cobra.Command, args []string) error {
			return runInfo(cmd.Context(), host, &o, args)
		},
	}
	f := cmd.Flags()
	o.open.addFlags(f, host)
	o.open.addForceShare(f)
	f.StringVar(&o.output, "output", "human", "human or json")
	f.BoolVar(&o.chain, "backing-chain", false, "tell about the backing files too")
	return cmd
}

func runInfo(ctx context.Context, host Host, o *infoOptions, args []string) error {
	if len(args) != 1 {
		return usagef("Expecting one image file name")
	}
	if err := checkOutput(o.output); err != nil {
		return err
	}
	infos, err := queryChain(ctx, args[0], o)
	if err != nil {
		return err
	}
	if o.output == "human" {
		for i, info := range infos {
			if i > 0 {
				fmt.Fprintln(host.Out)
			}
			info.print(host.Out)
		}
		return nil
	}
	var v any = infos[0].json()
	if o.chain {
		list := []any{}
		for _, info := range infos {
			list = append(list, info.json())
		}
		v = list
	}
	_, err = io.WriteString(host.Out, prettyJSON(v))
	return err
}

// maxChain bounds the files that --backing-chain tells about, as the library
// bounds a chain that it opens.
const maxChain = 200

// queryChain looks at an image and, if that is wanted, at its backing files.
func queryChain(ctx context.Context, name string, o *infoOptions) ([]*imageInfo, error) {
	var infos []*imageInfo
	for open := o.open; ; {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		info, err := queryInfo(ctx, name, &open)
		if err != nil {
			return nil, couldNotOpen(name, err)
		}
		for _, above := range infos {
			if blockdev.SameFile(above.file, info.file) {
				return nil, messagef("Backing file '%s' creates an infinite loop.", name)
			}
		}
		if infos = append(infos, info); len(infos) > maxChain {
			return nil, messagef("Backing chain of '%s' is longer than %d files", infos[0].name, maxChain)
		}
		if name = info.fullBacking; !o.chain || name == "" {
			return infos, nil
		}
		open.imageOpts, open.format = false, info.backingFormat
	}
}

// imageInfo is what info tells about one image.
type imageInfo struct {
	name, format  string
	file          os.FileInfo
	size          int64
	allocated     int64 // bytes on the disk
	clusterSize   int64 // 0: none
	encrypted     bool
	dirty         bool
	backing       string // as stored; "": none
	fullBacking   string
	backingFormat string
	snapshots     []qcow2.Snapshot
	specific      object // of the format; nil: none
}

func queryInfo(ctx context.Context, name string, o *openOptions) (*imageInfo, error) {
	img, err := openImage(ctx, name, o)
	if err != nil {
		return nil, err
	}
	defer img.close()
	info := &imageInfo{name: img.name, format: img.format, size: img.size()}
	if info.file, err = img.file.OS().Stat(); err != nil {
		return nil, err
	}
	if info.allocated, err = img.file.Allocated(); err != nil {
		return nil, err
	}
	if img.foreign != nil {
		info.clusterSize = img.foreign.BlockSize()
		info.specific = foreignSpecific(img)
	}
	if img.qcow2 == nil {
		return info, nil
	}
	h := img.qcow2.Header()
	info.clusterSize = h.ClusterSize()
	info.encrypted = h.CryptMethod != qcow2.CryptNone
	info.dirty = h.IncompatibleFeatures&qcow2.IncompatDirty != 0
	if h.BackingFile != "" {
		info.backing = h.BackingFile
		info.fullBacking = combinePath(img.name, h.BackingFile)
		info.backingFormat = h.BackingFormat()
	}
	info.snapshots = img.qcow2.Snapshots()
	info.specific, err = qcow2Specific(img.qcow2, &h)
	return info, err
}

// qcow2Specific is what qemu-img tells of qcow2 alone, in its order.
func qcow2Specific(img *qcow2.Image, h *qcow2.Header) (object, error) {
	v3 := h.Version >= 3
	o := object{}
	if v3 {
		o.add("compat", "1.1")
	} else {
		o.add("compat", "0.10")
	}
	o.add("compression-type", h.CompressionType.String())
	if v3 {
		o.add("lazy-refcounts", h.CompatibleFeatures&qcow2.CompatLazyRefcounts != 0)
	}
	bitmaps, err := img.Bitmaps()
	if err != nil {
		return nil, err
	}
	if len(bitmaps) > 0 {
		o.add("bitmaps", bitmapList(bitmaps))
	}
	o.add("refcount-bits", int64(1)<<h.RefcountOrder)
	if name := h.DataFile(); name != "" {
		o.add("data-file", name)
	}
	switch h.CryptMethod {
	case qcow2.CryptAES:
		o.add("encrypt", object{{"format", "aes"}})
	case qcow2.CryptLUKS:
		luks, _, err := img.LUKS()
		if err != nil {
			return nil, err
		}
		o.add("encrypt", luksObject(&luks))
	}
	if h.IncompatibleFeatures&qcow2.IncompatDataFile != 0 {
		o.add("data-file-raw", h.AutoclearFeatures&qcow2.AutoclearDataFileRaw != 0)
	}
	if v3 {
		o.add("corrupt", h.IncompatibleFeatures&qcow2.IncompatCorrupt != 0)
		o.add("extended-l2", h.IncompatibleFeatures&qcow2.IncompatExtendedL2 != 0)
	}
	return o, nil
}

func luksObject(h *qcow2.LUKSHeader) object {
	// The mode is that of the cipher, then how its vectors are made: xts-plain64,
	// cbc-essiv:sha256.
	mode, ivgen, _ := strings.Cut(h.CipherMode, "-")
	ivgen, ivhash, _ := strings.Cut(ivgen, ":")
	bits := h.MasterKeyLen * 8
	if mode == "xts" {
		bits /= 2 // two keys
	}
	slots := []any{}
	for _, s := range h.KeySlots {
		slot := object{{"active", s.Active}}
		if s.Active {
			slot.add("iters", int64(s.Iterations))
		}
		slot.add("key-offset", s.KeyOffset)
		if s.Active {
			slot.add("stripes", int64(s.Stripes))
		}
		slots = append(slots, slot)
	}
	o := object{{"ivgen-alg", ivgen}, {"hash-alg", h.HashSpec}, {"cipher-alg", fmt.Sprintf("%s-%d", h.CipherName, bits)},
		{"uuid", h.UUID}}
	if ivgen == "essiv" {
		o.add("ivgen-hash-alg", ivhash)
	}
	return append(o, object{{"format", "luks"}, {"cipher-mode", mode}, {"slots", slots},
		{"payload-offset", h.PayloadOffset}, {"master-key-iters", int64(h.MasterKeyIterations)}}...)
}

func bitmapList(bitmaps []qcow2.Bitmap) []any {
	list := []any{}
	for _, b := range bitmaps {
		flags := []any{}
		for _, name := range b.Flags.Names() {
			flags = append(flags, name)
		}
		list = append(list, object{{"flags", flags}, {"name", b.Name}, {"granularity", int64(1) << b.GranularityBits}})
	}
	return list
}

func (i *imageInfo) json() object {
	o := object{}
	if i.backingFormat != "" {
		o.add("backing-filename-format", i.backingFormat)
	}
	if len(i.snapshots) > 0 {
		list := []any{}
		for n := range i.snapshots {
			list = append(list, snapshotJSON(&i.snapshots[n]))
		}
		o.add("snapshots", list)
	}
	o.add("virtual-size", i.size)
	o.add("filename", i.name)
	if i.clusterSize > 0 {
		o.add("cluster-size", i.clusterSize)
	}
	o.add("format", i.format)
	o.add("actual-size", i.allocated)
	if i.specific != nil {
		o.add("format-specific", object{{"type", i.format}, {"data", i.specific}})
	}
	if i.backing != "" {
		o.add("full-backing-filename", i.fullBacking)
	}
	if i.encrypted {
		o.add("encrypted", true)
	}
	if i.backing != "" {
		o.add("backing-filename", i.backing)
	}
	o.add("dirty-flag", i.dirty)
	return o
}

func snapshotJSON(s *qcow2.Snapshot) object {
	o := object{}
	if s.ICount != qcow2.NoICount {
		o.add("icount", int64(s.ICount))
	}
	o.add("vm-clock-nsec", s.VMClockNsec%1e9)
	o.add("name", cut(s.Name, maxSnapshotName))
	o.add("date-sec", int64(s.DateSec))
	o.add("date-nsec", int64(s.DateNsec))
	o.add("vm-clock-sec", s.VMClockNsec/1e9)
	o.add("id", cut(s.ID, maxSnapshotID))
	o.add("vm-state-size", s.VMStateSize)
	return o
}

func (i *imageInfo) print(w io.Writer) {
	fmt.Fprintf(w, "image: %s\nfile format: %s\nvirtual size: %s (%d bytes)\ndisk size: %s\n",
		i.name, i.format, humanSize(uint64(i.size)), i.size, humanSize(uint64(i.allocated)))
	if i.encrypted {
		fmt.Fprintln(w, "encrypted: yes")
	}
	if i.clusterSize > 0 {
		fmt.Fprintf(w, "cluster_size: %d\n", i.clusterSize)
	}
	if i.dirty {
		fmt.Fprintln(w, "cleanly shut down: no")
	}
	if i.backing != "" {
		fmt.Fprintf(w, "backing file: %s", i.backing)
		if i.backing != i.fullBacking {
			fmt.Fprintf(w, " (actual path: %s)", i.fullBacking)
		}
		fmt.Fprintln(w)
		if i.backingFormat != "" {
			fmt.Fprintf(w, "backing file format: %s\n", i.backingFormat)
		}
	}
	if len(i.snapshots) > 0 {
		printSnapshots(w, i.snapshots)
	}
	if i.specific != nil {
		fmt.Fprintln(w, "Format specific information:")
		printObject(w, i.specific, 1)
	}
}

// How much of the id and the name of a snapshot QEMU knows, in bytes.
const (
	maxSnapshotID   = 127
	maxSnapshotName = qcow2.MaxSnapshotName
)

// printSnapshots prints the table of snapshots; times are local.
func printSnapshots(w io.Writer, list []qcow2.Snapshot) {
	const row = "%s %s %8s%20s%13s%11s\n"
	fmt.Fprintf(w, "Snapshot list:\n%-10s%-17s%8s%20s%13s%11s\n", "ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT")
	for _, s := range list {
		sec := s.VMClockNsec / 1e9
		clock := fmt.Sprintf("%02d:%02d:%02d.%03d", sec/3600, sec/60%60, sec%60, s.VMClockNsec/1e6%1000)
		icount := ""
		if s.ICount != qcow2.NoICount {
			icount = fmt.Sprint(int64(s.ICount))
		}
		date := time.Unix(int64(s.DateSec), 0).Format("2006-01-02 15:04:05")
		fmt.Fprintf(w, row, bytePad(cut(s.ID, maxSnapshotID), 9), bytePad(cut(s.Name, maxSnapshotName), 16), humanSize(s.VMStateSize), date, clock, icount)
	}
}

// cut returns n bytes of s at most.
func cut(s string, n int) string { return s[:min(len(s), n)] }

// bytePad pads a string to a number of bytes, as C does; fmt counts runes.
func bytePad(s string, n int) string { return s + strings.Repeat(" ", max(0, n-len(s))) }

// printObject prints a JSON object for people: a member a line, dashes in keys
// as blanks, 4 blanks a level.
func printObject(w io.Writer, v any, depth int) {
	line := func(key string, v any) {
		fmt.Fprintf(w, "%*s%s:", 4*depth, "", key)
		switch v.(type) {
		case object, []any:
			fmt.Fprintln(w)
			printObject(w, v, depth+1)
		default:
			fmt.Fprintf(w, " %v\n", v)
		}
	}
	switch v := v.(type) {
	case object:
		for _, m := range v {
			line(strings.ReplaceAll(m.key, "-", " "), m.value)
		}
	case []any:
		for i, e := range v {
			line(fmt.Sprintf("[%d]", i), e)
		}
	}
}

package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"qimg/cloudimg/fat"
	"qimg/cloudimg/parttable"
	"qimg/cmd/internal/term"
	"qimg/ext4img"
	"qimg/qcow2/blockdev"
)

// diskHelp is what the help of build says of --disk.
const diskHelp = `A disk of several partitions is told by a JSON file:

  {
    "table": "gpt",
    "partitions": [
      { "type": "esp", "fs": "fat", "source": "esp", "size": "100M" },
      { "type": "linux-root-x86-64", "label": "root", "fs": "ext4", "source": "root", "free": "1G" },
      { "fs": "swap", "size": "512M" }
    ]
  }

  table       gpt (default) or mbr
  id          GUID of the disk, or signature in hexadecimal digits (default: derived)
  size        of the disk (default: what the partitions need)
  align       partitions begin at multiples of it (default: 1M)

Of a partition, in the order on the disk:

  fs          ext4, fat, fat12, fat16, fat32, swap or none (default: fat for type esp,
              none without a source, else ext4)
  source      what ext4 and fat hold: any SOURCE but -, from the place of the JSON file
  over        a list of more sources, which lie over it
  exclude, manifest  lists, as the options
  file        in place of fs and source: a raw image, taken as it is
  size        of the partition, or "rest" for the last one of a disk with a size
              (default: what is needed, and free)
  free        free space, a size or N% (default: 20%, at least 64M)
  minimize    true: as small as it can be
  type        esp, swap, linux, linux-root-x86-64 ..., a GUID, or a byte in hexadecimal
              digits (default: what fits fs)
  number      default: the next one
  label, uuid of the partition, in a GPT
  bootable    true: marked for BIOSes
  fs-label, fs-uuid  of the file system; of fat a label and a serial as 1234-ABCD
  owner, uid-map, gid-map, mode-mask, block-size, no-journal, reserved  of ext4, as the
              options`

// maxDiskFile bounds what is read of a JSON file.
const maxDiskFile = 1 << 20

// diskFile is what the JSON file of --disk says.
type diskFile struct {
	Table      string      `json:"table"`
	ID         string      `json:"id"`
	Size       string      `json:"size"`
	Align      string      `json:"align"`
	Partitions []*diskPart `json:"partitions"`
}

// diskPart is one partition.
type diskPart struct {
	FS        string   `json:"fs"`
	Source    string   `json:"source"`
	Over      []string `json:"over"`
	Manifest  []string `json:"manifest"`
	UIDMap    []string `json:"uid-map"`
	GIDMap    []string `json:"gid-map"`
	File      string   `json:"file"`
	Size      string   `json:"size"`
	Free      string   `json:"free"`
	Minimize  bool     `json:"minimize"`
	Type      string   `json:"type"`
	Number    int      `json:"number"`
	Label     string   `json:"label"`
	UUID      string   `json:"uuid"`
	Bootable  bool     `json:"bootable"`
	FSLabel   string   `json:"fs-label"`
	FSUUID    string   `json:"fs-uuid"`
	Owner     string   `json:"owner"`
	ModeMask  string   `json:"mode-mask"`
	Exclude   []string `json:"exclude"`
	BlockSize string   `json:"block-size"`
	NoJournal bool     `json:"no-journal"`
	Reserved  string   `json:"reserved"`
}

// readDiskFile reads and checks a JSON file.
func readDiskFile(name string) (*diskFile, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxDiskFile+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxDiskFile {
		return nil, fmt.Errorf("%s: more than %d bytes", name, maxDiskFile)
	}
	d := &diskFile{Table: "gpt", Align: "1M"}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(d); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if dec.More() {
		return nil, fmt.Errorf("%s: something follows the disk", name)
	}
	if len(d.Partitions) == 0 {
		return nil, fmt.Errorf("%s: no partitions", name)
	}
	for i, p := range d.Partitions {
		if p == nil {
			return nil, fmt.Errorf("%s: partition %d is null", name, i+1)
		}
		paths := []*string{&p.Source, &p.File}
		for _, list := range [][]string{p.Over, p.Manifest} {
			for i := range list {
				paths = append(paths, &list[i])
			}
		}
		for _, path := range paths {
			image, ok := strings.CutPrefix(*path, ociPrefix)
			if image != "" && !filepath.IsAbs(image) {
				image = filepath.Join(filepath.Dir(name), image)
			}
			if *path = image; ok {
				*path = ociPrefix + image
			}
		}
		p.complete()
		if err := p.check(); err != nil {
			return nil, fmt.Errorf("%s: partition %d: %w", name, i+1, err)
		}
	}
	return d, nil
}

// complete fills in what was left out.
func (p *diskPart) complete() {
	if p.FS == "" && p.File == "" {
		switch {
		case p.Source == "":
			p.FS = "none"
		case strings.EqualFold(p.Type, "esp"):
			p.FS = "fat"
		default:
			p.FS = "ext4"
		}
	}
	if p.Type == "" {
		switch {
		case strings.HasPrefix(p.FS, "fat"):
			p.Type = "esp"
		case p.FS == "swap":
			p.Type = "swap"
		default:
			p.Type = "linux"
		}
	}
}

// check refuses keys that do not go together.
func (p *diskPart) check() error {
	fat := strings.HasPrefix(p.FS, "fat")
	tree := p.FS == "ext4" || fat
	for _, c := range []struct {
		given bool
		key   string
		ok    bool
	}{
		{p.FS != "", "fs", p.File == ""},
		{p.Source != "", "source", tree},
		{p.Free != "", "free", tree},
		{p.Minimize, "minimize", tree},
		{p.FSLabel != "", "fs-label", tree || p.FS == "swap"},
		{p.FSUUID != "", "fs-uuid", tree || p.FS == "swap"},
		{len(p.Over) > 0, "over", tree},
		{len(p.Manifest) > 0, "manifest", tree},
		{len(p.UIDMap) > 0, "uid-map", p.FS == "ext4"},
		{len(p.GIDMap) > 0, "gid-map", p.FS == "ext4"},
		{p.Owner != "", "owner", p.FS == "ext4"},
		{p.ModeMask != "", "mode-mask", p.FS == "ext4"},
		{len(p.Exclude) > 0, "exclude", tree},
		{p.BlockSize != "", "block-size", p.FS == "ext4"},
		{p.NoJournal, "no-journal", p.FS == "ext4"},
		{p.Reserved != "", "reserved", p.FS == "ext4"},
	} {
		switch {
		case !c.given || c.ok:
		case p.File != "":
			return fmt.Errorf("%s does not go with file", c.key)
		default:
			return fmt.Errorf("%s does not go with fs %s", c.key, p.FS)
		}
	}
	given := 0
	for _, set := range []bool{p.Size != "", p.Free != "", p.Minimize} {
		if set {
			given++
		}
	}
	switch {
	case p.File == "" && !tree && p.FS != "swap" && p.FS != "none":
		return fmt.Errorf("fs is ext4, fat, fat12, fat16, fat32, swap or none, not '%s'", p.FS)
	case fat && p.FS != "fat" && p.FS != "fat12" && p.FS != "fat16" && p.FS != "fat32":
		return fmt.Errorf("fs is fat, fat12, fat16 or fat32, not '%s'", p.FS)
	case tree && p.Source == "":
		return fmt.Errorf("fs %s needs a source", p.FS)
	case p.File == "" && !tree && p.Size == "":
		return fmt.Errorf("fs %s needs a size", p.FS)
	case given > 1:
		return errors.New("only one of size, free and minimize can be used")
	}
	return nil
}

// partitionedDisk is a disk in the making.
type partitionedDisk struct {
	host    Host
	opts    *buildOptions
	target  *buildTarget
	warn    func(string)
	spec    parttable.Spec
	align   int64
	size    int64 // of the disk; 0: what is needed
	content []blockdev.Reader
	lines   []string // about the partitions
	closers []func() error
}

// runBuildDisk makes the disk that a JSON file tells of.
func runBuildDisk(ctx context.Context, host Host, o *buildOptions, given func(flag string) bool, args []string) error {
	if len(args) != 1 {
		return usagef("Expecting one output file name with --disk")
	}
	for _, flag := range []string{"size", "free", "minimize", "label", "uuid", "owner", "mode-mask", "exclude", "block-size",
		"no-journal", "reserved", "partition", "partition-type", "align", "manifest", "uid-map", "gid-map"} {
		if given(flag) {
			return fmt.Errorf("--%s does not go with --disk, whose file says such things", flag)
		}
	}
	file, err := readDiskFile(o.disk)
	if err != nil {
		return err
	}
	progress, err := o.newProgress(host, args[0])
	if err != nil {
		return err
	}
	defer progress.Close()
	target, err := o.newTarget(host, given, args[0])
	if err != nil {
		return err
	}
	defer target.close()
	d := &partitionedDisk{host: host, opts: o, target: target, warn: host.warnText, size: target.size()}
	defer d.close()
	if err := d.parse(file); err != nil {
		return err
	}
	for i, p := range file.Partitions {
		if err := d.add(ctx, p); err != nil {
			return prefixError(fmt.Sprintf("partition %d", i+1), err)
		}
	}
	if err := d.write(ctx, progress); err != nil {
		return err
	}
	if !o.quiet {
		progress.Close()
		target.report("%s: %s, %d partitions, %s", args[0], d.spec.Kind, len(d.spec.Partitions), humanSize(uint64(d.size)))
		for _, line := range d.lines {
			target.report("%s", line)
		}
	}
	return nil
}

// parse reads what is said of the disk.
func (d *partitionedDisk) parse(file *diskFile) (err error) {
	if d.spec.Kind, err = parseTable(file.Table); err != nil {
		return err
	}
	d.spec.ID = file.ID
	if d.align, err = parseAlign(file.Align); err != nil {
		return err
	}
	if file.Size == "" {
		return nil
	}
	size, err := sizeArg("size '"+file.Size+"'", file.Size)
	switch {
	case err != nil:
		return err
	case d.size > 0 && size != d.size:
		return fmt.Errorf("%s has %d bytes, the disk is to have %d", d.target.output, d.size, size)
	}
	d.size = (size + 511) &^ 511
	return nil
}

func parseTable(s string) (parttable.Kind, error) {
	switch s {
	case "gpt":
		return parttable.GPT, nil
	case "mbr":
		return parttable.MBR, nil
	}
	return 0, fmt.Errorf("a partition table is gpt or mbr, not '%s'", s)
}

func parseAlign(s string) (int64, error) {
	align, err := sizeArg("alignment", s)
	if err == nil && (align < 512 || align > 1<<30 || align&(align-1) != 0) {
		err = fmt.Errorf("the alignment is a power of two from 512 to 1G, not '%s'", s)
	}
	return align, err
}

// close closes the sources, trees before what they are of.
func (d *partitionedDisk) close() {
	for _, c := range slices.Backward(d.closers) {
		c()
	}
}

// add adds the next partition.
func (d *partitionedDisk) add(ctx context.Context, p *diskPart) error {
	typ, err := parttable.ParseType(d.spec.Kind, p.Type)
	if err != nil {
		return err
	}
	part := parttable.Partition{Number: p.Number, Type: typ, Name: p.Label, UUID: p.UUID, Bootable: p.Bootable, Size: 1}
	switch p.Size {
	case "":
	case "rest":
		if d.size == 0 {
			return errors.New("rest is possible on a disk that has a size")
		}
		part.Size = 0
	default:
		if part.Size, err = sizeArg("size '"+p.Size+"'", p.Size); err != nil {
			return err
		}
	}
	// Where it begins is known before its size is.
	d.spec.Partitions = append(d.spec.Partitions, part)
	if _, err := d.spec.Place(d.align, d.size); err != nil {
		return d.target.error(err)
	}
	placed := &d.spec.Partitions[len(d.spec.Partitions)-1]
	if p.Size == "" {
		placed.Size = 0
	}
	c, err := d.partContent(ctx, p, placed)
	if err != nil {
		return err
	}
	d.content = append(d.content, c.r)
	if p.Size == "" {
		placed.Size = (c.r.Size() + 511) &^ 511
	}
	d.lines = append(d.lines, fmt.Sprintf("  %d: %s, %s at %s%s", len(d.lines)+1, c.what,
		humanSize(uint64(placed.Size)), humanSize(uint64(placed.Start)), c.more))
	return nil
}

// partContent is what a partition holds.
type partContent struct {
	r    blockdev.Reader // nil: zeroes
	what string          // in a word
	more string          // for the line about it
}

// partContent makes what a partition at its place holds. Its size is 0 if it is to
// be what is needed.
func (d *partitionedDisk) partContent(ctx context.Context, p *diskPart, part *parttable.Partition) (*partContent, error) {
	switch {
	case p.File != "":
		return d.imageContent(p, part)
	case p.FS == "ext4":
		return d.ext4Content(ctx, p, part)
	case p.FS == "swap":
		return d.swapContent(p, part)
	case p.FS == "none":
		return &partContent{what: "empty"}, nil
	}
	return d.fatContent(ctx, p, part)
}

func (d *partitionedDisk) imageContent(p *diskPart, part *parttable.Partition) (*partContent, error) {
	f, err := blockdev.OpenFile(p.File, nil)
	if err != nil {
		return nil, openError(p.File, err)
	}
	d.closers = append(d.closers, f.Close)
	switch {
	case f.Size() == 0:
		return nil, fmt.Errorf("%s is empty", p.File)
	case part.Size > 0 && f.Size() > part.Size:
		return nil, fmt.Errorf("%s has %d bytes, the partition %d", p.File, f.Size(), part.Size)
	}
	name := func(err error) error { return prefixError(p.File, err) }
	return &partContent{&sourceReader{f, name}, "image", ""}, nil
}

// ext4Content makes an ext4 file system, with the options that those of the
// command are for a disk of one.
func (d *partitionedDisk) ext4Content(ctx context.Context, p *diskPart, part *parttable.Partition) (*partContent, error) {
	source, tree, layout, err := d.layout(ctx, d.ext4Options(p), p, part.Size)
	if err != nil {
		return nil, err
	}
	more := fmt.Sprintf(", %d entries, %s (free %s)", tree.Entries(), humanSize(uint64(tree.Bytes())), humanSize(uint64(layout.FreeBytes())))
	return &partContent{&sourceReader{layout.Reader(), source.sourceError}, "ext4", more}, nil
}

func (d *partitionedDisk) ext4Options(p *diskPart) *buildOptions {
	o := &buildOptions{
		free: p.Free, minimize: p.Minimize, label: p.FSLabel, uuid: p.FSUUID, owner: p.Owner, modeMask: p.ModeMask,
		exclude: p.Exclude, blockSize: p.BlockSize, noJournal: p.NoJournal, reserved: p.Reserved,
		skipUnreadable: d.opts.skipUnreadable,
		from:           sourceOptions{manifests: p.Manifest, uidMaps: p.UIDMap, gidMaps: p.GIDMap, platform: d.opts.from.platform, maxEntries: d.opts.from.maxEntries},
	}
	if o.blockSize == "" {
		o.blockSize = "4k"
	}
	if o.reserved == "" {
		o.reserved = "0"
	}
	return o
}

// layout decides an ext4 file system of size bytes, or of the size that the options
// say, of the sources of a partition.
func (d *partitionedDisk) layout(ctx context.Context, o *buildOptions, p *diskPart, size int64) (*disk, *ext4img.Tree, *ext4img.Layout, error) {
	source := o.newDisk(d.target.output, append([]string{p.Source}, p.Over...)...)
	if err := o.parse(source, d.host.Getenv); err != nil {
		return nil, nil, nil, err
	}
	source.layout.Size = size
	source.sizeHint = `Use "size": "%s" or more.`
	d.closers = append(d.closers, source.close)
	tree, err := source.scanTree(ctx, d.host, d.warn)
	if err != nil {
		return nil, nil, nil, source.sourceError(err)
	}
	d.closers = append(d.closers, tree.Close)
	layout, err := source.newLayout(ctx, tree)
	if err != nil {
		return nil, nil, nil, source.sourceError(err)
	}
	return source, tree, layout, nil
}

// fatContent makes a FAT file system. Its files are read from an ext4 one that
// exists nowhere, so that both take the same sources.
func (d *partitionedDisk) fatContent(ctx context.Context, p *diskPart, part *parttable.Partition) (*partContent, error) {
	o := d.ext4Options(p)
	o.free, o.minimize, o.noJournal, o.label, o.uuid = "", true, true, "", ""
	source, _, layout, err := d.layout(ctx, o, p, 0)
	if err != nil {
		return nil, err
	}
	tree, err := newTreeFS(&sourceReader{layout.Reader(), func(err error) error { return &namedError{source.sourceError(err)} }})
	if err != nil {
		return nil, err
	}
	name := func(err error) error {
		var named *namedError
		if errors.As(err, &named) {
			return named.error
		}
		return source.sourceError(err)
	}
	opts := &fat.Options{Size: part.Size, Label: p.FSLabel, MaxTime: source.scan.MaxTime}
	if part.Start/512 <= math.MaxUint32 {
		opts.Hidden = uint32(part.Start / 512)
	}
	fmt.Sscanf(p.FS, "fat%d", &opts.Bits)
	if p.FSUUID != "" {
		if opts.Serial, err = parseSerial(p.FSUUID); err != nil {
			return nil, err
		}
	}
	volume, err := fat.New(ctx, tree, opts)
	if err == nil && part.Size == 0 && !p.Minimize {
		if opts.Free, err = freeSpace(p.Free, volume.Size()); err != nil {
			return nil, err
		}
		volume, err = fat.New(ctx, tree, opts)
	}
	if err != nil {
		return nil, name(err)
	}
	more := fmt.Sprintf(", %d entries, %s (free %s)", volume.Entries(), humanSize(uint64(volume.Bytes())), humanSize(uint64(volume.FreeBytes())))
	return &partContent{&sourceReader{volume, name}, fmt.Sprintf("fat%d", volume.Bits()), more}, nil
}

// namedError is an error that names its place as the user knows it.
type namedError struct{ error }

// treeFS is the tree of an ext4 file system that was made for its sake.
type treeFS struct{ *ext4img.FS }

func newTreeFS(dev blockdev.Reader) (treeFS, error) {
	f, err := ext4img.Open(dev, nil)
	return treeFS{f}, err
}

// ReadDir leaves out the directory that every ext4 has.
func (t treeFS) ReadDir(name string) ([]fs.DirEntry, error) {
	list, err := t.FS.ReadDir(name)
	if name == "." {
		list = slices.DeleteFunc(list, func(e fs.DirEntry) bool { return e.Name() == "lost+found" && e.IsDir() })
	}
	return list, err
}

// freeSpace is the free space of a file system that needs so many bytes.
func freeSpace(free string, need int64) (int64, error) {
	o := &buildOptions{free: free, blockSize: "4k", reserved: "0"}
	fs := &disk{}
	if err := o.parseSizes(fs); err != nil {
		return 0, err
	}
	switch {
	case free == "":
		return max(need/5, 64<<20), nil
	case fs.freePercent > 0:
		return int64(float64(need) * fs.freePercent / 100), nil
	}
	return fs.layout.Free, nil
}

// parseSerial reads the number of a FAT volume.
func parseSerial(s string) (uint32, error) {
	var hi, lo uint32
	if n, err := fmt.Sscanf(s+"\n", "%4x-%4x\n", &hi, &lo); n != 2 || err != nil || len(s) != 9 || hi|lo == 0 {
		return 0, fmt.Errorf("the fs-uuid of a FAT is as 1234-ABCD, not '%s'", s)
	}
	return hi<<16 | lo, nil
}

// swapContent makes a swap area, as mkswap does.
func (d *partitionedDisk) swapContent(p *diskPart, part *parttable.Partition) (*partContent, error) {
	area, err := newSwap(part.Size, p.FSLabel, p.FSUUID, fmt.Appendf(nil, "swap %d", part.Start))
	if err != nil {
		return nil, err
	}
	return &partContent{area, "swap", ""}, nil
}

// write puts the disk together and writes it.
func (d *partitionedDisk) write(ctx context.Context, progress *term.Progress) (err error) {
	if d.size, err = d.spec.Place(d.align, d.size); err != nil {
		return d.target.error(err)
	}
	whole, err := parttable.NewDisk(d.size, &d.spec, d.content)
	if err != nil {
		return d.target.error(err)
	}
	return d.target.writeDisk(ctx, whole, progress)
}

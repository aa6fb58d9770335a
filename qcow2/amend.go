package qcow2

import (
	"context"
	"math/bits"
	"slices"
	"strconv"
)

// AmendOptions says what Amend changes. What is zero, or nil, stays as it is.
type AmendOptions struct {
	Version      int // 2 or 3
	RefcountBits int // a power of two from 1 to 64; version 3 only, but for 16
	// LazyRefcounts; version 3 only.
	LazyRefcounts *bool
	// DataFile is the name of the external data file, in an image that has one.
	// The files themselves are left alone. "" removes the name.
	DataFile *string
	// DataFileRaw can only be cleared.
	DataFileRaw *bool
	// BackingFile and BackingFormat have to be those that the image has, both or
	// neither: they are changed by a rebase.
	BackingFile, BackingFormat *string
	Size                       int64 // of the disk in bytes, a multiple of 512; larger or smaller

	// KeepBitmaps refuses a change to version 2, which knows no bitmaps, in an
	// image that has some. Without it they are removed.
	KeepBitmaps bool
	// DryRun changes nothing, but does everything else. The image can be open
	// for reading. What would have been written is kept in memory, but for the
	// clusters of guest data.
	DryRun bool
	// Progress is told how much of the work is done, in units that mean nothing
	// else, by the goroutine that called Amend. total grows when a part of the
	// work turns out to be longer. Nil: nobody is told.
	Progress func(done, total int64)
}

// AmendResult tells what Amend did.
type AmendResult struct {
	// Changes are the options that changed, in the order in which they were
	// dealt with.
	Changes []AmendChange
	// Of a change to version 2: the bitmaps that were removed, zero clusters
	// that became unallocated, and those that became clusters of zeroes,
	// because a backing file would show through.
	Bitmaps, Unallocated, Filled int64
	// Allocated are the bytes that were allocated for new tables and clusters.
	// Those of the tables whose place they took are free then.
	Allocated int64
	// FileSize is the length of the image file before and after in bytes.
	FileSize [2]int64
}

// AmendChange is an option of an image that changed.
type AmendChange struct {
	Option   string // in the words of qemu-img: compat, refcount_bits, size ...
	From, To string
}

// Amend changes options of an image in place. All that can be refused is refused
// before the first write, as an OptionError in the words of qemu-img.
//
// A change to version 2 turns zero clusters, also those of snapshots, into
// unallocated ones, or clusters of zeroes over a backing file, and clears what
// version 2 does not know: lazy refcounts, bitmaps, unknown features.
//
// Order: all new tables and clusters, sync; the header, sync. A crash leaves
// the image as it was or with all changes.
func (im *Image) Amend(ctx context.Context, opts *AmendOptions) (AmendResult, error) {
	if opts == nil {
		opts = &AmendOptions{}
	}
	if opts.DryRun {
		return im.amendShadow(ctx, opts)
	}
	if im.w != nil {
		im.mu.Lock()
		defer im.mu.Unlock()
	}
	if err := im.mayChange("amend"); err != nil {
		return AmendResult{}, err
	}
	t, err := im.begin(ctx)
	if err != nil {
		return AmendResult{}, err
	}
	defer t.abort()
	a := amending{AmendOptions: opts, t: t, result: AmendResult{FileSize: [2]int64{t.fileSize, 0}}}
	if err := a.check(); err != nil {
		return AmendResult{}, err
	}
	if err := a.apply(); err != nil {
		return AmendResult{}, err
	}
	if len(a.result.Changes) == 0 {
		a.result.FileSize[1] = t.fileSize
		return a.result, nil
	}
	if err := t.commitResize(); err != nil {
		return AmendResult{}, err
	}
	a.result.Allocated = t.taken << im.geo.clusterBits
	a.result.FileSize[1] = im.w.dev.Size()
	return a.result, nil
}

// amendShadow amends a copy of the image that is dropped.
func (im *Image) amendShadow(ctx context.Context, opts *AmendOptions) (AmendResult, error) {
	if im.w != nil {
		if err := im.Sync(); err != nil {
			return AmendResult{}, err
		}
	}
	defer im.rlock()()
	if im.closed.Load() {
		return AmendResult{}, im.readable()
	}
	copied, err := New(newShadow(im.dev), &OpenOptions{Write: true, Backing: BackingIgnore})
	if err != nil {
		return AmendResult{}, err
	}
	copied.backing, copied.crypt = im.backing, im.crypt
	if d := im.data; d != nil && im.geo.dataFile {
		s := newShadow(d)
		copied.data, copied.w.data = s, s
	}
	o := *opts
	o.DryRun = false
	return copied.Amend(ctx, &o)
}

// amending is a call of Amend that goes on.
type amending struct {
	*AmendOptions
	t       *txn
	version uint32 // that the image will have
	width   uint   // refcount_bits that it will have
	result  AmendResult

	// Of the progress: parts of the work, those that are done, and what they
	// and the current one took.
	parts, partsDone int64
	before, current  int64
}

// check tells why the options cannot be had, in the order of QEMU
// (block/qcow2.c, qcow2_amend_options).
func (a *amending) check() error {
	t, h := a.t, &a.t.header
	raw := h.AutoclearFeatures&AutoclearDataFileRaw != 0
	switch {
	case a.Version != 0 && a.Version != 2 && a.Version != 3:
		return optionError("Unknown compatibility level %d", a.Version)
	case a.DataFile != nil && !t.im.geo.dataFile:
		return OptionError("data-file can only be set for images that use an external data file")
	case a.DataFile != nil && len(*a.DataFile) > maxDataFileSize:
		return optionError("Name of the data file has %d bytes, at most %d are allowed", len(*a.DataFile), maxDataFileSize)
	case a.DataFileRaw != nil && *a.DataFileRaw && !raw:
		return OptionError("data-file-raw cannot be set on existing images")
	case a.RefcountBits < 0 || a.RefcountBits > 64 || a.RefcountBits&(a.RefcountBits-1) != 0:
		return OptionError("Refcount width must be a power of two and may not exceed 64 bits")
	}
	a.version, a.width = h.Version, 1<<h.RefcountOrder
	if a.Version != 0 {
		a.version = uint32(a.Version)
	}
	if a.RefcountBits != 0 && uint(a.RefcountBits) != a.width {
		a.width = uint(a.RefcountBits)
		if a.version < 3 && a.width != 16 {
			return OptionError("Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)")
		}
		c, n, err := t.im.w.alloc.tooWide(a.width)
		if err != nil {
			return err
		}
		if n != 0 {
			return optionError("Cannot decrease refcount entry width to %d bits: Cluster at offset %#x has a refcount of %d", a.width, c<<h.ClusterBits, n)
		}
	}
	if a.BackingFile != nil || a.BackingFormat != nil {
		format, hasFormat := h.extension(extBackingFormat)
		if !same(a.BackingFile, h.BackingFile, h.BackingFile != "") || !same(a.BackingFormat, cString(format), hasFormat) {
			return ErrAmendBacking
		}
	}
	if a.LazyRefcounts != nil && *a.LazyRefcounts && h.CompatibleFeatures&CompatLazyRefcounts == 0 && a.version < 3 {
		return OptionError("Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)")
	}
	size := t.im.size
	if a.Size != 0 {
		size = a.Size
		if err := t.checkResize(size, PreallocationOff, max(a.version, h.Version)); err != nil {
			return err
		}
	}
	if a.version < h.Version {
		return t.checkDowngrade(a.width, size, a.KeepBitmaps)
	}
	return nil
}

// ErrAmendBacking is the error of AmendOptions that name another backing file.
const ErrAmendBacking = OptionError("Cannot amend the backing file")

// same reports whether an option, which may not be given, is the value that the
// image has, or that both are missing.
func same(option *string, value string, has bool) bool {
	if option == nil {
		return !has
	}
	return has && *option == value
}

// apply does what was asked for.
func (a *amending) apply() error {
	t, h := a.t, &a.t.header
	upgrade, downgrade := a.version > h.Version, a.version < h.Version
	width := uint(1) << h.RefcountOrder
	for _, part := range []bool{upgrade || downgrade, a.width != width} {
		if part {
			a.parts++
		}
	}
	if downgrade || a.width != width {
		if err := t.checkCounted(); err != nil {
			return err
		}
	}
	if upgrade || downgrade {
		a.changed("compat", compat(h.Version), compat(a.version))
	}
	if upgrade {
		a.progress(0, 2)
		t.upgrade()
		a.progress(1, 2)
		a.progress(2, 2)
		a.nextPart()
	}
	if a.width != width {
		a.changed("refcount_bits", strconv.Itoa(int(width)), strconv.Itoa(int(a.width)))
		t.alloced = true
		if err := t.im.w.alloc.setWidth(a.width, a.step); err != nil {
			return err
		}
		h.RefcountOrder = uint32(bits.TrailingZeros(a.width))
		a.nextPart()
	}
	a.dataFile()
	if a.LazyRefcounts != nil {
		a.feature("lazy_refcounts", h.CompatibleFeatures&CompatLazyRefcounts != 0, *a.LazyRefcounts)
		h.CompatibleFeatures &^= CompatLazyRefcounts
		if *a.LazyRefcounts {
			h.CompatibleFeatures |= CompatLazyRefcounts
		}
	}
	if a.Size != 0 && a.Size != t.im.size {
		a.changed("size", strconv.FormatInt(t.im.size, 10), strconv.FormatInt(a.Size, 10))
		if err := t.resize(a.Size, &ResizeOptions{}); err != nil {
			return err
		}
	}
	if !downgrade {
		return nil
	}
	if h.CompatibleFeatures&CompatLazyRefcounts != 0 {
		a.changed("lazy_refcounts", onOff(true), onOff(false))
	}
	if h.CompressionType != CompressionZlib {
		a.changed("compression_type", h.CompressionType.String(), CompressionZlib.String())
	}
	if x, ok := h.Bitmaps(); ok {
		a.result.Bitmaps = int64(x.NbBitmaps)
	}
	e, err := t.downgrade(a.step)
	a.result.Unallocated, a.result.Filled = e.dropped, e.filled
	return err
}

// dataFile changes what the header says of the external data file.
func (a *amending) dataFile() {
	h := &a.t.header
	if a.DataFileRaw != nil && !*a.DataFileRaw {
		a.feature("data_file_raw", h.AutoclearFeatures&AutoclearDataFileRaw != 0, false)
		h.AutoclearFeatures &^= AutoclearDataFileRaw
	}
	if a.DataFile == nil || *a.DataFile == h.DataFile() {
		return
	}
	a.changed("data_file", h.DataFile(), *a.DataFile)
	i := slices.IndexFunc(h.Extensions, func(x Extension) bool { return x.Type == extDataFile })
	h.Extensions = slices.DeleteFunc(h.Extensions, func(x Extension) bool { return x.Type == extDataFile })
	if *a.DataFile != "" {
		h.Extensions = slices.Insert(h.Extensions, max(i, 0), Extension{extDataFile, []byte(*a.DataFile)})
	}
}

// upgrade makes the new state one of version 3.
func (t *txn) upgrade() {
	// Version 3 needs the size of the disk in every entry.
	t.snapshotsChanged = slices.ContainsFunc(t.snapshots, func(s Snapshot) bool { return s.ExtraDataSize < snapshotExtraDataV3 })
	h := &t.header
	h.Version, h.HeaderLength = 3, 0
	h.addFeatureNames()
}

func (a *amending) changed(option, from, to string) {
	a.result.Changes = append(a.result.Changes, AmendChange{option, from, to})
}

func (a *amending) feature(option string, from, to bool) {
	if from != to {
		a.changed(option, onOff(from), onOff(to))
	}
}

func onOff(on bool) string {
	if on {
		return "on"
	}
	return "off"
}

func compat(version uint32) string {
	if version == 2 {
		return "0.10"
	}
	return "1.1"
}

// step is progress, and an end of the work if its context is done.
func (a *amending) step(done, total int64) error {
	a.progress(done, total)
	return a.t.ctx.Err()
}

// progress tells how much of the current part is done. A part that has not begun
// is taken to be as long as those that have are on average.
func (a *amending) progress(done, total int64) {
	a.current = total
	if a.Progress != nil {
		sum := a.before + total
		a.Progress(a.before+done, sum+sum*(a.parts-a.partsDone-1)/(a.partsDone+1))
	}
}

func (a *amending) nextPart() {
	a.partsDone++
	a.before += a.current
}

package qcow2

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"qimg/qcow2/blockdev"
	"qimg/qcow2/transfer"
)

// SetBacking makes the image name another backing file, as it is to be stored,
// and its format; an empty name means none. Nothing else changes: unless the
// new file reads as the old one does, the guest sees other data. From then on
// what lies in a backing file cannot be read before the image is opened again.
//
// Names that cannot be stored are an OptionError, and match ErrLimit if the
// first cluster has no room for them. Order: one write of the header, by a
// transaction.
func (im *Image) SetBacking(ctx context.Context, name, format string) error {
	if im.w != nil {
		im.mu.Lock()
		defer im.mu.Unlock()
	}
	if err := im.mayChange("set backing file"); err != nil {
		return err
	}
	return im.setBacking(ctx, nil, name, format)
}

// setBacking makes dev, which the names stand for, the backing file.
func (im *Image) setBacking(ctx context.Context, dev blockdev.Reader, name, format string) error {
	t, err := im.begin(ctx)
	if err != nil {
		return err
	}
	defer t.abort()
	if err := t.header.setBacking(name, format); err != nil {
		return err
	}
	if err := t.commit(); err != nil {
		return err
	}
	im.backing, im.backingName, im.backingProbed = dev, name, format == ""
	return nil
}

// setBacking sets the name and the format of the backing file.
func (h *Header) setBacking(name, format string) error {
	switch {
	case name == "" && format != "":
		return OptionError("Backing format cannot be used without backing file")
	case name != "" && h.AutoclearFeatures&AutoclearDataFileRaw != 0:
		return OptionError("Backing file and data-file-raw cannot be used at the same time")
	case len(name) > maxBackingFileSize || len(format) > maxBackingFormatSize:
		return optionError("Could not assign backing file '%s' with format '%s': Invalid argument", name, format)
	}
	h.BackingFile = name
	i := slices.IndexFunc(h.Extensions, func(e Extension) bool { return e.Type == extBackingFormat })
	h.Extensions = slices.DeleteFunc(h.Extensions, func(e Extension) bool { return e.Type == extBackingFormat })
	if format != "" {
		h.Extensions = slices.Insert(h.Extensions, max(i, 0), Extension{extBackingFormat, []byte(format)})
	}
	return nil
}

// RebaseOptions says how Rebase works. The zero value, and nil, are allowed.
type RebaseOptions struct {
	// Progress is told how much of the disk has been dealt with, in bytes, one
	// call at a time. Nil: nobody is told.
	Progress func(done, total int64)
}

// Rebase gives the image another backing file and keeps what its guest sees:
// where the image has nothing of its own, and the old and the new backing file
// differ, it gets the content of the old one. backing is the new one, which can
// be an image of the chain, and is nil for none; name and format are what is
// stored for it, as SetBacking has them. The image reads from backing
// afterwards but does not close it.
//
// Clusters that differ are written with their data. Only those beyond the end of
// the old backing file are marked as zeroes.
//
// Order: data and tables as WriteAt does, sync, the header. The guest of the
// image sees no change at any point. If Rebase fails the image has its old
// backing file, and some of the data.
func (im *Image) Rebase(ctx context.Context, backing blockdev.Reader, name, format string, opts *RebaseOptions) error {
	if im.w != nil {
		im.mu.Lock()
		defer im.mu.Unlock()
	}
	if err := im.mayChange("rebase"); err != nil {
		return err
	}
	if err := im.readable(); err != nil {
		return err
	}
	if im.backing == nil && im.header.BackingFile != "" {
		return fmt.Errorf("qcow2: rebase: %w", im.noFile("backing file", im.header.BackingFile))
	}
	if (backing == nil) != (name == "") {
		return fmt.Errorf("qcow2: rebase: a backing file and its name go together: %w", ErrBacking)
	}
	h := im.header
	h.Extensions = slices.Clone(h.Extensions)
	if err := h.setBacking(name, format); err != nil {
		return err
	}
	r := &rebase{im: im, new: backing}
	if im.backing != nil {
		r.oldSize = sectors(im.backing.Size())
	}
	if backing != nil {
		_, r.common = im.overlayOf(backing)
	}
	im.w.rebase = true
	err := r.run(ctx, opts)
	im.w.rebase = false
	if err != nil {
		return fmt.Errorf("qcow2: rebase: %w", err)
	}
	return im.setBacking(ctx, backing, name, format)
}

// rebase is a Rebase that goes on. As a disk it is the old backing file, of which
// is unallocated what the image need not get; and it is the image that gets the
// rest, in whole blocks. A block is what the image allocates at once, so that
// nothing around it has to be read again.
type rebase struct {
	mu      sync.Mutex // guards im, whose own is held by Rebase
	im      *Image
	new     blockdev.Reader // nil: none
	oldSize int64
	// common is the depth of new in the chain, 0 if it is not there.
	common int
}

// run writes into the image what the new backing file does not have.
func (r *rebase) run(ctx context.Context, opts *RebaseOptions) error {
	if err := r.im.prepare(); err != nil {
		return r.im.fail(err)
	}
	r.im.w.unsynced = true
	o := &transfer.Options{
		Workers: copyWorkers, InOrder: true, Sparse: -1, Keep: unallocated, Base: backingFile{r.new},
	}
	if opts != nil {
		o.Progress = opts.Progress
	}
	return transfer.Copy(ctx, r, r, o)
}

func (r *rebase) Size() int64 { return r.im.size }

// Granularity implements transfer.Skipper.
func (r *rebase) Granularity() int64 { return 1 << r.im.geo.subBits }

// Skip implements transfer.Skipper.
func (r *rebase) Skip(off, n int64) error { return nil }

// ReadAt reads the old backing file.
func (r *rebase) ReadAt(p []byte, off int64) (int, error) {
	n, err := backingFile{r.im.backing}.ReadAt(p, off)
	return n, r.im.inBacking(err)
}

// NextExtent implements blockdev.ExtentReader: of data is what has to be compared,
// as far as tables say.
func (r *rebase) NextExtent(off int64) (blockdev.Extent, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e, err := r.im.nextExtent(off)
	if err != nil {
		return e, err
	}
	held := e.Kind != blockdev.Unallocated
	same := held && (e.Depth == 0 || r.common > 0 && e.Depth >= r.common)
	if !same {
		f := blockdev.Extent{Kind: blockdev.Unallocated}
		if r.new != nil && off < r.new.Size() {
			if f, err = blockdev.NextExtent(r.new, off); err != nil {
				return e, err
			}
			e.Len = min(e.Len, f.Len)
		}
		same = e.Kind.ReadsZero() && f.Kind.ReadsZero() ||
			e.Kind == blockdev.Data && f.Kind == blockdev.Data && e.HostOff == f.HostOff && blockdev.SameHost(e.Host, f.Host)
	}
	kind := blockdev.Data
	if same {
		kind = blockdev.Unallocated
	}
	return blockdev.Extent{Off: off, Len: e.Len, Kind: kind}, nil
}

// WriteAt writes blocks of the old backing file into the image. What lies behind
// its end becomes zeroes, with what lies before it in the same block if that is
// zeroes by the tables.
func (r *rebase) WriteAt(p []byte, off int64) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	end := off + int64(len(p))
	at := min(max(off, r.oldSize), end)
	if before := at & (r.Granularity() - 1); before > 0 && at < end {
		e, err := r.im.nextExtent(at - before)
		if err != nil {
			return 0, err
		}
		if e.Kind.ReadsZero() && e.Len >= before {
			at -= before
		}
	}
	n, err := r.im.writeGuest(p[:at-off], off)
	if err == nil && at < end {
		n, err = len(p), r.im.zeroGuest(at, end-at)
	}
	return n, r.im.fail(err)
}

// backingFile is a backing file that may be short, or nil, read as a longer
// disk.
type backingFile struct{ dev blockdev.Reader }

func (b backingFile) ReadAt(p []byte, off int64) (int, error) {
	if b.dev == nil || off >= b.dev.Size() {
		clear(p)
	} else if err := readFull(b.dev, p, off); err != nil {
		return 0, err
	}
	return len(p), nil
}

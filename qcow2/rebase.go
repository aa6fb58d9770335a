package qcow2

import (
	"bytes"
	"context"
	"fmt"
	"slices"

	"qimg/qcow2/blockdev"
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
	// Progress is told how much of the disk has been dealt with, in bytes, by
	// the goroutine that called Rebase. Nil: nobody is told.
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
	r := rebase{im: im, ctx: ctx, old: im.backing, new: backing}
	if im.backing != nil {
		r.oldSize = sectors(im.backing.Size())
	}
	if _, r.common = im.overlayOf(backing); backing == nil {
		r.common = 0
	}
	if opts != nil {
		r.progress = opts.Progress
	}
	im.w.rebase = true
	err := r.run()
	im.w.rebase = false
	if err != nil {
		return fmt.Errorf("qcow2: rebase: %w", err)
	}
	return im.setBacking(ctx, backing, name, format)
}

// rebase is a Rebase that goes on.
type rebase struct {
	im       *Image
	ctx      context.Context
	old, new blockdev.Reader // nil: none
	oldSize  int64
	// common is the depth of new in the chain, 0 if it is not there.
	common   int
	progress func(done, total int64)

	oldBuf, newBuf []byte
}

// run writes into the image what the new backing file does not have.
func (r *rebase) run() error {
	if err := r.im.prepare(); err != nil {
		return r.im.fail(err)
	}
	r.im.w.unsynced = true
	size := r.im.size
	for off := int64(0); off < size; {
		if err := r.ctx.Err(); err != nil {
			return err
		}
		n, differs, err := r.next(off)
		if err == nil && differs {
			err = r.compare(off, n)
		}
		if err != nil {
			return err
		}
		off += n
		if r.progress != nil {
			r.progress(off, size)
		}
	}
	return nil
}

// next returns the length of a run from off on that may differ and is to be
// compared, up to the size of a buffer, or else need not be looked at.
func (r *rebase) next(off int64) (n int64, differs bool, err error) {
	limit := r.im.size
	if off < r.oldSize {
		limit = min(limit, r.oldSize)
	}
	for at := off; at < limit; {
		m, d, err := r.piece(at, limit-at)
		if err != nil {
			return 0, false, err
		}
		if at != off && d != differs {
			break
		}
		at += m
		n, differs = at-off, d
		if !d {
			break
		}
		if n >= copyBuffer {
			n = (off+copyBuffer)&^(copyBuffer-1) - off
			break
		}
	}
	return n, differs, nil
}

// piece tells whether the first n of limit bytes at off have to be compared, as
// far as tables say. What does is whole blocks, of which the image has nothing.
func (r *rebase) piece(off, limit int64) (n int64, differs bool, err error) {
	e, err := r.im.nextExtent(off)
	if err != nil {
		return 0, false, err
	}
	n = min(e.Len, limit)
	held := e.Kind != blockdev.Unallocated
	if held && e.Depth == 0 {
		return n, false, nil
	}
	same := held && r.common > 0 && e.Depth >= r.common
	if !same {
		f := blockdev.Extent{Kind: blockdev.Unallocated}
		if r.new != nil && off < r.new.Size() {
			if f, err = blockdev.NextExtent(r.new, off); err != nil {
				return 0, false, err
			}
			n = min(n, f.Len)
		}
		same = e.Kind.ReadsZero() && f.Kind.ReadsZero() ||
			e.Kind == blockdev.Data && f.Kind == blockdev.Data && e.HostOff == f.HostOff && sameFile(e.Host, f.Host)
	}
	block := int64(1) << r.im.geo.subBits
	end := off + n
	if down := end &^ (block - 1); same && n < limit && down > off {
		return down - off, false, nil
	} else if same && n == limit {
		return n, false, nil
	}
	return min((end+block-1)&^(block-1)-off, limit), true, nil
}

// compare reads n bytes at off of the old and the new backing file, and writes
// those blocks of the old one that differ. A block is what the image allocates
// at once, so that nothing around it has to be read again.
func (r *rebase) compare(off, n int64) error {
	if r.oldBuf == nil {
		r.oldBuf, r.newBuf = make([]byte, copyBuffer), make([]byte, copyBuffer)
	}
	old, now := r.oldBuf[:n], r.newBuf[:n]
	zero := off >= r.oldSize
	read := make(chan error)
	go func() { read <- readBacking(r.new, now, off) }()
	err := r.im.inBacking(readBacking(r.old, old, off))
	if err2 := <-read; err == nil {
		err = err2
	}
	if err != nil {
		return err
	}
	block := int64(1) << r.im.geo.subBits
	blockEnd := func(at int64) int64 { return min((off+at+block)&^(block-1)-off, n) }
	for at := int64(0); at < n; {
		end := blockEnd(at)
		if bytes.Equal(old[at:end], now[at:end]) {
			at = end
			continue
		}
		for end < n && !bytes.Equal(old[end:blockEnd(end)], now[end:blockEnd(end)]) {
			end = blockEnd(end)
		}
		var err error
		if zero {
			err = r.zero(off+at, end-at)
		} else {
			_, err = r.im.writeGuest(old[at:end], off+at)
		}
		if err != nil {
			return r.im.fail(err)
		}
		at = end
	}
	return nil
}

// readBacking fills p with what a backing file that may be short, or nil, has at
// off.
func readBacking(d blockdev.Reader, p []byte, off int64) error {
	if d == nil || off >= d.Size() {
		clear(p)
		return nil
	}
	return readFull(d, p, off)
}

// zero makes n bytes at off, behind the old backing file, read as zeroes: whole
// blocks, where what lies before them in the first one is zeroes by the tables.
func (r *rebase) zero(off, n int64) error {
	if before := off & (1<<r.im.geo.subBits - 1); before > 0 {
		e, err := r.im.nextExtent(off - before)
		if err != nil {
			return err
		}
		if e.Kind.ReadsZero() && e.Len >= before {
			off, n = off-before, n+before
		}
	}
	return r.im.zeroGuest(off, n)
}

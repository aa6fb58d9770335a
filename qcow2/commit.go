package qcow2

import (
	"context"
	"fmt"

	"qimg/qcow2/blockdev"
	"qimg/qcow2/transfer"
)

// CommitOptions says how the content of an image goes into one below it. The
// zero value, and nil, mean: into the backing file, and the image is emptied.
type CommitOptions struct {
	// Base is the image of the chain that is written, as Backing returned it;
	// nil means the backing file. It has to be open for writing: see
	// OpenOptions.WriteBacking.
	Base blockdev.Reader
	// Keep leaves the image as it is. It is needed with a Base further down:
	// what lies between would show through an empty image.
	Keep bool
	// Rate bounds what is written, in bytes a second; 0 means no bound.
	Rate int64
	// Progress is told how much of the disk has been dealt with, in bytes, one
	// call at a time. Nil: nobody is told.
	Progress func(done, total int64)
}

// Commit writes what the image, and those between it and the base, hold into
// the base, which then reads as the image does, at least as long; a base that
// is shorter grows. Then the image is emptied, but for its snapshots. What
// reads as zeroes by its tables becomes so in the base, where whole clusters
// give their space back.
//
// Order: the base grows; data and zeroes; the base is synced; one transaction
// empties the image. The guest of the image sees no change at any point. If
// Commit fails the base has some of the data, and the image all of it.
func (im *Image) Commit(ctx context.Context, opts *CommitOptions) error {
	if opts == nil {
		opts = &CommitOptions{}
	}
	if im.w != nil {
		im.mu.Lock()
		defer im.mu.Unlock()
	}
	if err := im.mayChange("commit"); err != nil {
		return err
	}
	if err := im.readable(); err != nil {
		return err
	}
	overlay, depth := im.overlayOf(opts.Base)
	switch {
	case overlay == nil && opts.Base != nil:
		return fmt.Errorf("qcow2: commit: the base is not in the backing chain: %w", ErrBacking)
	case overlay == nil:
		return fmt.Errorf("qcow2: commit: there is no backing file, or it was not opened: %w", ErrBacking)
	case depth > 1 && !opts.Keep:
		return fmt.Errorf("qcow2: commit: the image cannot be emptied over an image that is not the base: %w", ErrBacking)
	}
	base, ok := overlay.backing.(blockdev.Device)
	if below, image := overlay.backing.(*Image); !ok || image && below.w == nil {
		return fmt.Errorf("qcow2: commit: base %s: %w", overlay.backingName, blockdev.ErrReadOnly)
	}
	if err := im.commitInto(ctx, base, layers{im, depth}, overlay.backingProbed, opts); err != nil {
		return fmt.Errorf("qcow2: commit: %w", err)
	}
	if opts.Keep {
		return nil
	}
	if err := im.empty(ctx); err != nil {
		return fmt.Errorf("qcow2: commit: empty the image: %w", err)
	}
	return nil
}

// commitInto writes what layers hold into the base below them, and syncs. probed
// says that the base is raw by its first bytes.
func (im *Image) commitInto(ctx context.Context, base blockdev.Device, l layers, probed bool, opts *CommitOptions) error {
	if probed {
		if err := l.checkProbe(); err != nil {
			return err
		}
	}
	if im.size > sectors(base.Size()) {
		if err := growDisk(ctx, base, im.size); err != nil {
			return err
		}
	}
	err := transfer.Copy(ctx, commitTarget{ctx, base, im.size}, l, &transfer.Options{
		Workers: copyWorkers, InOrder: true, Keep: unallocated, Rate: opts.Rate, Progress: opts.Progress,
	})
	if err != nil {
		return err
	}
	return blockdev.Sync(base)
}

// layers is what an image and those below it hold, down to the one before depth:
// a disk of which the rest is unallocated. mu of the image is held.
type layers struct {
	im    *Image
	depth int
}

func (l layers) Size() int64 { return l.im.size }

func (l layers) ReadAt(p []byte, off int64) (int, error) {
	if err := l.im.readGuest(p, off); err != nil {
		return 0, err
	}
	return len(p), nil
}

// NextExtent implements blockdev.ExtentReader. It looks at no table of the
// image at depth.
func (l layers) NextExtent(off int64) (blockdev.Extent, error) {
	im, e := l.im, blockdev.Extent{Off: off, Len: l.im.size - off, Kind: blockdev.Zero}
	for depth := 1; ; depth++ {
		r, err := im.lookup(off, e.Len)
		if err != nil {
			return e, err
		}
		e.Len = r.n
		switch {
		case r.kind == runZero:
			return e, nil
		case r.kind != runUnallocated:
			e.Kind = blockdev.Data
			return e, nil
		case depth == l.depth:
			e.Kind = blockdev.Unallocated
			return e, nil
		}
		below := im.backing.(*Image) // the image at depth is further down
		if off >= below.size {
			return e, nil
		}
		im, e.Len = below, min(e.Len, below.size-off)
	}
}

// unallocated reports whether the target of a copy has an extent already.
func unallocated(e blockdev.Extent) bool { return e.Kind == blockdev.Unallocated }

// checkProbe refuses data that would make a raw base, whose format was found by
// its first bytes, look like something else: a guest can have written it.
func (l layers) checkProbe() error {
	if l.im.size == 0 {
		return nil
	}
	if e, err := l.NextExtent(0); err != nil || unallocated(e) {
		return err
	}
	format, err := Probe(l)
	if err == nil && format != "raw" {
		err = fmt.Errorf("the raw base would look like an image in format %s, as the overlay does not name its format: %w", format, ErrBacking)
	}
	return err
}

// commitTarget is the base as a disk of the size of the image. It is written by
// one at a time.
type commitTarget struct {
	ctx  context.Context
	base blockdev.Device
	size int64
}

func (t commitTarget) Size() int64 { return t.size }

func (t commitTarget) WriteAt(p []byte, off int64) (int, error) {
	if end := off + int64(len(p)); end > t.base.Size() { // in the last sector
		if err := growDisk(t.ctx, t.base, end); err != nil {
			return 0, err
		}
	}
	return t.base.WriteAt(p, off)
}

// WriteSparse writes zeroes in data as data.
func (t commitTarget) WriteSparse(p []byte, off int64, _ []blockdev.Range) error {
	_, err := t.WriteAt(p, off)
	return err
}

// WriteZeroes makes a range read as zeroes and gives back the space of whole
// clusters.
func (t commitTarget) WriteZeroes(off, n int64) error {
	if n = min(n, t.base.Size()-off); n <= 0 {
		return nil
	}
	if im, ok := t.base.(*Image); ok {
		return im.Clear(off, n)
	}
	return blockdev.WriteZeroes(t.base, off, n)
}

// growDisk makes a disk longer, by zeroes.
func growDisk(ctx context.Context, d blockdev.Device, size int64) error {
	if im, ok := d.(*Image); ok {
		return im.Resize(ctx, size, nil)
	}
	t, ok := d.(blockdev.Truncater)
	if !ok {
		return fmt.Errorf("the base has %d bytes, the image %d, and the base cannot grow: %w", d.Size(), size, ErrLimit)
	}
	return t.Truncate(size)
}

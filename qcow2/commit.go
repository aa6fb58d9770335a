package qcow2

import (
	"context"
	"fmt"
	"time"

	"qimg/qcow2/blockdev"
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
	// Progress is told how much of the disk has been dealt with, in bytes, by
	// the goroutine that called Commit. Nil: nobody is told.
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
	c := commit{im: im, base: base, depth: depth, opts: opts, ctx: ctx, start: time.Now()}
	if err := c.run(overlay.backingProbed); err != nil {
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

// commit is a Commit that goes on.
type commit struct {
	im      *Image
	base    blockdev.Device
	depth   int // of base
	opts    *CommitOptions
	ctx     context.Context
	start   time.Time
	written int64
}

// piece is a run of the disk: what a layer above the base holds (runData), where
// one reads as zeroes (runZero), or where none has anything (runUnallocated).
type piece struct {
	off, n int64
	kind   runKind
	b      []byte // of runData, n bytes
	err    error
}

// run writes what lies above the base into it, and syncs. What is written next
// is read meanwhile.
func (c *commit) run(probed bool) error {
	if probed {
		if err := c.checkProbe(); err != nil {
			return err
		}
	}
	if c.im.size > sectors(c.base.Size()) {
		if err := growDisk(c.ctx, c.base, c.im.size); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithCancel(c.ctx)
	pieces, free := make(chan piece), make(chan []byte, 2)
	free <- make([]byte, copyBuffer)
	free <- make([]byte, copyBuffer)
	go c.read(ctx, pieces, free)
	defer func() {
		cancel()
		for range pieces {
		}
	}()
	for p := range pieces {
		if p.err != nil {
			return p.err
		}
		if err := c.put(p); err != nil {
			return err
		}
		if p.b != nil {
			free <- p.b[:cap(p.b)]
		}
		if c.opts.Progress != nil {
			c.opts.Progress(p.off+p.n, c.im.size)
		}
	}
	if err := c.ctx.Err(); err != nil {
		return err
	}
	return blockdev.Sync(c.base)
}

// read reads what lies above the base, piece by piece, with buffers from free.
func (c *commit) read(ctx context.Context, pieces chan<- piece, free <-chan []byte) {
	defer close(pieces)
	for off := int64(0); off < c.im.size; {
		p := c.next(off)
		if p.err == nil && p.kind == runData {
			select {
			case b := <-free:
				p.b = b[:p.n]
			case <-ctx.Done():
				return
			}
			p.err = c.im.readGuest(p.b, off)
		}
		select {
		case pieces <- p:
		case <-ctx.Done():
			return
		}
		if p.err != nil {
			return
		}
		off += p.n
	}
}

// next returns a run from off on. One of data fits into a buffer.
func (c *commit) next(off int64) piece {
	p := piece{off: off}
	for off < c.im.size && (p.kind != runData || p.n < copyBuffer) {
		kind, n, err := c.look(off)
		if err == nil {
			err = c.ctx.Err()
		}
		if err != nil {
			p.err = err
			return p
		}
		if p.n > 0 && kind != p.kind {
			break
		}
		p.kind = kind
		p.n += n
		off += n
	}
	if p.kind == runData && p.n > copyBuffer {
		// Up to a round offset, so that clusters of the base stay whole.
		p.n = (p.off+copyBuffer)&^(copyBuffer-1) - p.off
	}
	return p
}

// look tells what the layers above the base have in the first n bytes from off
// on.
func (c *commit) look(off int64) (kind runKind, n int64, err error) {
	im, n := c.im, c.im.size-off
	for depth := 1; ; depth++ {
		r, err := im.lookup(off, n)
		if err != nil {
			return 0, 0, err
		}
		n = r.n
		switch {
		case r.kind == runZero:
			return runZero, n, nil
		case r.kind != runUnallocated:
			return runData, n, nil
		case depth == c.depth:
			return runUnallocated, n, nil
		}
		below := im.backing.(*Image) // the base is further down
		if off >= below.size {
			return runZero, n, nil
		}
		im, n = below, min(n, below.size-off)
	}
}

// checkProbe refuses data that would make a raw base, whose format was found by
// its first bytes, look like something else: a guest can have written it.
func (c *commit) checkProbe() error {
	if c.im.size == 0 {
		return nil
	}
	kind, _, err := c.look(0)
	if err != nil || kind == runUnallocated {
		return err
	}
	format, err := Probe(guestReader{c.im})
	if err == nil && format != "raw" {
		err = fmt.Errorf("the raw base would look like an image in format %s, as the overlay does not name its format: %w", format, ErrBacking)
	}
	return err
}

// guestReader reads the guest of an image whose mu is held.
type guestReader struct{ im *Image }

func (r guestReader) ReadAt(p []byte, off int64) (int, error) {
	clear(p)
	n := min(int64(len(p)), r.im.size-off)
	return len(p), r.im.readGuest(p[:n], off)
}

// put writes a piece into the base.
func (c *commit) put(p piece) error {
	switch p.kind {
	case runUnallocated:
		return nil
	case runZero:
		return zeroDisk(c.base, p.off, min(p.n, c.base.Size()-p.off))
	}
	if end := p.off + p.n; end > c.base.Size() { // in the last sector
		if err := growDisk(c.ctx, c.base, end); err != nil {
			return err
		}
	}
	if _, err := c.base.WriteAt(p.b, p.off); err != nil {
		return err
	}
	c.written += p.n
	return c.throttle()
}

// throttle waits until as much may have been written.
func (c *commit) throttle() error {
	if c.opts.Rate <= 0 {
		return nil
	}
	due := time.Duration(float64(c.written) / float64(c.opts.Rate) * float64(time.Second))
	timer := time.NewTimer(time.Until(c.start.Add(due)))
	defer timer.Stop()
	select {
	case <-c.ctx.Done():
		return c.ctx.Err()
	case <-timer.C:
		return nil
	}
}

// zeroDisk makes n bytes at off read as zeroes and gives back the space of
// whole clusters.
func zeroDisk(d blockdev.Device, off, n int64) error {
	if n <= 0 {
		return nil
	}
	if im, ok := d.(*Image); ok {
		if err := im.Discard(off, n); err != nil {
			return err
		}
	}
	return blockdev.WriteZeroes(d, off, n)
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

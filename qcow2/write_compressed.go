package qcow2

import (
	"fmt"

	"qimg/qcow2/transfer"
)

// WriteCompressed writes p, whole clusters, at off, and stores them compressed
// where that makes them smaller; those of zeroes are marked as WriteZeroes does.
// The last cluster of the disk may be shorter. It cannot be done to an encrypted
// image, nor to one with an external data file: the error matches
// ErrUnsupported.
//
// Clusters are compressed in the goroutine of the caller, so that several can
// work side by side; where they go in the file depends on which comes first then:
// see CompressedWriter. OpenOptions.CompressionLevel says how hard. Order: as
// WriteAt.
func (im *Image) WriteCompressed(p []byte, off int64) error {
	c, cluster, err := im.compressor(off, int64(len(p)))
	if err != nil {
		return err
	}
	for len(p) > 0 {
		part := p[:min(int64(len(p)), cluster)]
		k, err := c.pack(part, off, cluster)
		if err == nil {
			err = im.placePacked(k)
			c.drop(k)
		}
		if err != nil {
			return err
		}
		p, off = p[len(part):], off+int64(len(part))
	}
	return nil
}

// compressor returns what compresses the clusters of the image, and their size, if
// n bytes at off can be written compressed.
func (im *Image) compressor(off, n int64) (*compressor, int64, error) {
	defer im.rlock()()
	cluster := im.geo.clusterSize
	switch end := off + n; {
	case off%cluster != 0 || end%cluster != 0 && end != im.size:
		return nil, 0, fmt.Errorf("qcow2: compressed write of %d bytes at %#x: expected multiples of %#x", n, off, cluster)
	case im.geo.dataFile || im.header.CryptMethod != CryptNone:
		return nil, 0, fmt.Errorf("qcow2: compressed write to an image that is encrypted, or has an external data file: %w", ErrUnsupported)
	}
	p := &im.packer
	p.once.Do(func() {
		p.c, p.err = newCompressor(im.header.CompressionType, im.shared.opts.CompressionLevel, cluster)
	})
	return p.c, cluster, p.err
}

// packed is a cluster, or the part of one before the end of a disk, in the form
// that it is stored in.
type packed struct {
	off  int64
	p    []byte
	zero bool
	buf  *[]byte // p compressed, of the pool; nil: it does not get smaller
}

// pack finds the form for p, which lies at off.
func (c *compressor) pack(p []byte, off, cluster int64) (packed, error) {
	k := packed{off: off, p: p, zero: transfer.IsZero(p)}
	if k.zero {
		return k, nil
	}
	whole := p
	if short := cluster - int64(len(p)); short > 0 {
		whole = append(append(make([]byte, 0, cluster), p...), make([]byte, short)...)
	}
	var err error
	k.buf, err = c.compress(whole)
	return k, err
}

// drop gives back what was packed.
func (c *compressor) drop(k packed) {
	if k.buf != nil {
		c.buffers.Put(k.buf)
	}
}

// placePacked stores a cluster.
func (im *Image) placePacked(k packed) error {
	return im.change("write compressed", k.off, int64(len(k.p)), func() (err error) {
		switch {
		case k.zero:
			return im.zeroGuest(k.off, int64(len(k.p)))
		case k.buf == nil:
			_, err = im.writeGuest(k.p, k.off)
			return err
		}
		return im.placeCompressed(*k.buf, k.off)
	})
}

// placeCompressed stores a compressed cluster.
func (im *Image) placeCompressed(b []byte, off int64) error {
	if err := im.relieve(); err != nil {
		return err
	}
	at, err := im.l2ForWrite(off)
	if err != nil {
		return err
	}
	old, _ := im.entry(at)
	if _, bad := im.classify(at.slice[at.at:], off); bad != nil {
		bad.Off = at.off + at.at
		return bad
	}
	host, err := im.allocBytes(int64(len(b)))
	if err != nil {
		return err
	}
	entry, err := im.geo.compressedEntry(host, int64(len(b)))
	if err != nil {
		return err
	}
	im.w.unsynced = true
	if _, err := im.w.dev.WriteAt(b, host); err != nil {
		return err
	}
	im.freeEntry(old, false)
	im.set(at, entry, 0)
	return nil
}

// allocBytes returns the place of n bytes, at most a cluster, and counts a
// reference to each cluster that they lie in: behind those before, if there is
// room.
func (im *Image) allocBytes(n int64) (int64, error) {
	g, w := &im.geo, im.w
	room := func() int64 { return -w.packed & (g.clusterSize - 1) }
	share := func() (bool, error) {
		if room() == 0 {
			return false, nil
		}
		refs, err := w.alloc.get(w.packed >> g.clusterBits)
		return err == nil && refs < w.alloc.maxRefcount(), err
	}
	host := w.packed
	ok, err := share()
	if err != nil {
		return 0, err
	}
	if !ok || n > room() {
		c, _, err := w.alloc.alloc(1, 1)
		if err != nil {
			return 0, err
		}
		next := c << g.clusterBits
		if ok, err = share(); err != nil { // the allocation may have flushed
			return 0, err
		}
		if host = w.packed; !ok || host+room() != next {
			host, ok = next, false
		}
	}
	if ok {
		if err := w.alloc.add(host>>g.clusterBits, 1); err != nil {
			return 0, err
		}
	}
	w.packed = host + n
	return host, nil
}

// compressedEntry is the L2 entry of n compressed bytes at off.
func (g *geometry) compressedEntry(off, n int64) (uint64, error) {
	if off>>g.csizeShift != 0 {
		return 0, fmt.Errorf("qcow2: compressed cluster at %#x of the file: the format has %d bits for the offset: %w", off, g.csizeShift, ErrLimit)
	}
	sectors := (off+n-1)/compressedSectorSize - off/compressedSectorSize
	return oflagCompressed | uint64(sectors)<<g.csizeShift | uint64(off), nil
}

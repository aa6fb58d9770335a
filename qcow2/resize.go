package qcow2

import (
	"context"
	"encoding/binary"
	"fmt"
	"slices"

	"qimg/qcow2/blockdev"
	"qimg/qcow2/transfer"
)

// ResizeOptions says how Resize works. The zero value, and nil, mean: the disk
// can only grow, and what it gains takes no space.
type ResizeOptions struct {
	// Shrink allows a smaller size: what lies beyond it is lost.
	Shrink bool
	// Preallocation is that of what the disk gains.
	Preallocation Preallocation
	// Progress is told how many of the zeroes that preallocation writes have
	// been written, by the goroutine that called Resize. Nil: nobody is told.
	Progress func(done, total int64)
}

// Resize makes the disk one of size bytes, a multiple of 512. What it gains
// reads as zeroes; what it loses is given back, and the image file becomes
// shorter as far as its end is free. An external data file gets the size too.
// The snapshots are as before, bitmaps are resized with it.
//
// What cannot be done is an OptionError in the words of qemu-img, or a
// *BitmapError; the image has not changed then.
//
// Order: preallocated data and all new tables, sync, the header, sync; then, if
// the disk became smaller, tables at the end of the file move down, in the same
// way, and the file is cut. A crash leaves the disk as it was or resized.
func (im *Image) Resize(ctx context.Context, size int64, opts *ResizeOptions) error {
	if opts == nil {
		opts = &ResizeOptions{}
	}
	if im.w != nil {
		im.mu.Lock()
		defer im.mu.Unlock()
	}
	t, err := im.beginResize(ctx, size, opts)
	if err != nil {
		return err
	}
	defer t.abort()
	if err := t.resize(size, opts); err != nil {
		return err
	}
	return t.commitResize()
}

// CheckResize returns the error that Resize has before it changes something.
func (im *Image) CheckResize(ctx context.Context, size int64, opts *ResizeOptions) error {
	if opts == nil {
		opts = &ResizeOptions{}
	}
	if im.w != nil {
		im.mu.Lock()
		defer im.mu.Unlock()
	}
	t, err := im.beginResize(ctx, size, opts)
	if err == nil {
		t.abort()
	}
	return err
}

// beginResize begins a change of the size that can be done.
func (im *Image) beginResize(ctx context.Context, size int64, opts *ResizeOptions) (*txn, error) {
	if err := im.mayChange("resize"); err != nil {
		return nil, err
	}
	if size < im.size && !opts.Shrink {
		return nil, OptionError("Use the --shrink option to perform a shrink operation.")
	}
	t, err := im.begin(ctx)
	if err != nil {
		return nil, err
	}
	if err := t.checkResize(size, opts.Preallocation, t.header.Version); err != nil {
		t.abort()
		return nil, err
	}
	return t, nil
}

// checkResize tells why the disk cannot be given a size, in the order of QEMU
// (block/qcow2.c, qcow2_co_truncate). version is that of the image then.
func (t *txn) checkResize(size int64, prealloc Preallocation, version uint32) error {
	im, g := t.im, &t.im.geo
	switch {
	case prealloc > PreallocationFull:
		return optionError("Unsupported preallocation mode '%s'", prealloc)
	case size < 0:
		return OptionError("Image size cannot be negative")
	case size%sectorSize != 0:
		return optionError("The new size must be a multiple of %d", sectorSize)
	case len(t.snapshots) > 0 && version < 3:
		return OptionError("Can't resize a v2 image which has snapshots")
	}
	if list, err := im.readBitmaps(); err != nil {
		return err
	} else if i := slices.IndexFunc(list, func(b Bitmap) bool { return b.Flags&BitmapInUse != 0 }); i >= 0 {
		return &BitmapError{Name: list[i].Name, Reason: BitmapInconsistent}
	}
	switch {
	case size < im.size && prealloc != PreallocationOff:
		return OptionError("Preallocation can't be used for shrinking an image")
	case g.l1Entries(uint64(size)) > maxL1Size/l1EntrySize:
		return OptionError("Failed to grow the L1 table: File too large")
	case size > g.clusters(im.size)<<g.clusterBits && version < 3 && im.backs(im.size):
		return OptionError("Failed to zero out new clusters: Operation not supported")
	case g.dataFile && im.w.data == nil:
		return im.noFile("external data file", t.header.DataFile())
	}
	return nil
}

// resize makes the disk of the new state one of size bytes.
func (t *txn) resize(size int64, o *ResizeOptions) error {
	im, g, h := t.im, &t.im.geo, &t.header
	counted := t.counted
	old := im.size
	up := func(n int64) int64 { return g.clusters(n) << g.clusterBits }
	t.resized = true
	// An old entry without a size has that of the disk.
	if slices.ContainsFunc(t.snapshots, func(s Snapshot) bool { return s.ExtraDataSize < snapshotExtraDataV3 }) {
		t.snapshotsChanged = true
	}
	if size < old {
		t.placed = make(map[int64]bool)
	}
	// Behind the disk there can be the vm state of a snapshot that was applied.
	if err := t.cut(up(min(old, size))); err != nil {
		return err
	}
	n := int(g.l1Entries(uint64(size)))
	if size < old {
		t.shrink = true
		t.l1 = t.l1[:min(len(t.l1), max(n, 1))]
	} else {
		t.l1 = append(t.l1, make([]uint64, max(0, n-len(t.l1)))...)
		if err := t.grow(old, size, o); err != nil {
			return err
		}
	}
	h.Size = uint64(size)
	if err := t.resizeBitmaps(t.ctx, size); err != nil {
		return err
	}
	if len(t.snapshots) == 0 {
		t.counted = counted // nothing is shared
	}
	return nil
}

// cut gives up all clusters of the active tables from the guest offset from on,
// a multiple of the cluster size.
func (t *txn) cut(from int64) error {
	g := &t.im.geo
	for i := from >> g.l2Coverage(); i < int64(len(t.l1)); i++ {
		first := max(0, from-i<<g.l2Coverage()) >> g.clusterBits * g.l2EntrySize
		if first > 0 {
			if err := t.editL2(i, func(b []byte) (bool, error) { return t.dropEntries(b[first:]) }); err != nil {
				return err
			}
			continue
		}
		b, err := t.l2(t.l1[i])
		if err != nil {
			return err
		}
		if b == nil {
			continue
		}
		if _, err := t.dropEntries(b); err != nil {
			return err
		}
		if err := t.addRef(int64(t.l1[i]&l1OffsetMask), g.clusterSize, -1); err != nil {
			return err
		}
		t.l1[i] = 0
	}
	return nil
}

// dropEntries clears L2 entries and gives up what they refer to.
func (t *txn) dropEntries(b []byte) (changed bool, err error) {
	for at := int64(0); at < int64(len(b)); at += t.im.geo.l2EntrySize {
		entry := binary.BigEndian.Uint64(b[at:])
		if err := t.addEntryRef(entry, -1); err != nil {
			return false, err
		}
		p := b[at : at+t.im.geo.l2EntrySize]
		changed = changed || !transfer.IsZero(p)
		clear(p)
	}
	return changed, nil
}

// editL2 changes the L2 table of an entry of the active L1 table: f is given a
// copy, or a new table, and tells whether it has changed it.
func (t *txn) editL2(i int64, f func(b []byte) (bool, error)) error {
	g := &t.im.geo
	b, err := t.l2(t.l1[i])
	if err != nil {
		return err
	}
	old := b != nil
	if !old {
		b = make([]byte, g.clusterSize)
	}
	if changed, err := f(b); !changed || err != nil {
		return err
	}
	off, err := t.writeL2(b)
	if err != nil {
		return err
	}
	if old {
		if err := t.addRef(int64(t.l1[i]&l1OffsetMask), g.clusterSize, -1); err != nil {
			return err
		}
	}
	t.l1[i] = uint64(off) | oflagCopied
	return nil
}

// grow makes what the disk gains read as zeroes, and preallocates it.
func (t *txn) grow(old, size int64, o *ResizeOptions) error {
	im, g := t.im, &t.im.geo
	prealloc := o.Preallocation
	if im.rawData() {
		prealloc = max(prealloc, PreallocationMetadata) // the data file is all that is read
	}
	var was int64 // size of the data file
	if g.dataFile {
		was = im.w.data.Size()
		if err := sizeDataFile(im.w.data, max(size, was)); err != nil {
			return im.fail(err)
		}
	}
	if size > old && g.inCluster(uint64(old)) != 0 {
		if err := t.clearTail(old, prealloc != PreallocationOff); err != nil {
			return err
		}
	}
	from, to := g.clusters(old)<<g.clusterBits, g.clusters(size)<<g.clusterBits
	if g.dataFile {
		start := old
		if im.header.CryptMethod != CryptNone {
			start = min(from, size) // what clearTail has written are no zeroes
		}
		if n := min(size, was) - start; n > 0 {
			if err := blockdev.WriteZeroes(im.w.data, start, n); err != nil {
				return im.fail(err)
			}
		}
		if err := setAside(t.ctx, im.w.data, start, size-start, prealloc, o.Progress); err != nil {
			return im.fail(err)
		}
		if err := blockdev.Sync(im.w.data); err != nil {
			return im.fail(err)
		}
	}
	s := g.l2Coverage()
	backed := im.backs(old)
	for lo := from; lo < to && (prealloc != PreallocationOff || backed); {
		if err := t.ctx.Err(); err != nil {
			return err
		}
		i := lo >> s
		hi := min(to, (i+1)<<s)
		at := (lo - i<<s) >> g.clusterBits * g.l2EntrySize
		err := t.editL2(i, func(b []byte) (bool, error) {
			entries := b[at : at+(hi-lo)>>g.clusterBits*g.l2EntrySize]
			if prealloc == PreallocationOff {
				t.markZero(entries)
				return true, nil
			}
			progress := o.Progress
			if progress != nil {
				progress = func(done, _ int64) { o.Progress(lo-from+done, to-from) }
			}
			return true, t.preallocate(entries, lo, backed, prealloc, progress)
		})
		if err != nil {
			return err
		}
		lo = hi
	}
	return nil
}

// markZero makes empty L2 entries read as zeroes, whatever the backing file has.
func (t *txn) markZero(entries []byte) {
	for at := int64(0); at < int64(len(entries)); at += t.im.geo.l2EntrySize {
		if t.im.geo.extended {
			binary.BigEndian.PutUint64(entries[at+8:], zeroSubclusters)
		} else {
			binary.BigEndian.PutUint64(entries[at:], oflagZero)
		}
	}
}

// preallocate gives empty L2 entries, from the guest offset guest on, clusters
// that read as zeroes. backed: the backing file must not show through.
func (t *txn) preallocate(entries []byte, guest int64, backed bool, prealloc Preallocation, progress func(done, total int64)) error {
	im, g := t.im, &t.im.geo
	n := int64(len(entries)) / g.l2EntrySize
	var flag, bitmap uint64
	if backed {
		bitmap = subclusterAllocMask
	}
	if im.header.CryptMethod != CryptNone && t.header.Version >= 3 {
		// What is written is not what is read.
		flag, bitmap = oflagZero, zeroSubclusters
	}
	host := guest
	if !g.dataFile {
		var err error
		if host, err = t.alloc(n << g.clusterBits); err != nil {
			return err
		}
		if flag == 0 {
			if err := t.zero(guest, host, n<<g.clusterBits); err != nil {
				return err
			}
		}
		if im.header.CryptMethod == CryptNone || flag != 0 {
			if err := setAside(t.ctx, im.w.dev, host, n<<g.clusterBits, prealloc, progress); err != nil {
				return im.fail(err)
			}
		}
	}
	for i := range n {
		p := entries[i*g.l2EntrySize:]
		entry := uint64(host+i<<g.clusterBits) | oflagCopied
		if g.extended {
			binary.BigEndian.PutUint64(p[8:], bitmap)
		} else {
			entry |= flag
		}
		binary.BigEndian.PutUint64(p, entry)
	}
	return nil
}

// zero makes clusters that alloc returned read as zeroes by the guest, which has
// them from the guest offset guest on.
func (t *txn) zero(guest, host, n int64) error {
	im := t.im
	if im.header.CryptMethod == CryptNone {
		// What lies beyond the old end of the file is zero already.
		if n = min(n, t.fileSize-host); n <= 0 {
			return nil
		}
		if err := blockdev.WriteZeroes(im.w.dev, host, n); err != nil {
			return im.fail(fmt.Errorf("qcow2: write zeroes at %#x: %w", host, err))
		}
		return nil
	}
	if err := im.readable(); err != nil {
		return err
	}
	zeroes := make([]byte, im.geo.clusterSize)
	for at := int64(0); at < n; at += int64(len(zeroes)) {
		if err := t.ctx.Err(); err != nil {
			return err
		}
		if err := im.writeHost(zeroes, guest+at, host+at); err != nil {
			return im.fail(err)
		}
	}
	return nil
}

// clearTail makes the rest of the cluster that a disk of old bytes ends in read
// as zeroes. place: the cluster gets a place even if nothing has to be written.
func (t *txn) clearTail(old int64, place bool) error {
	im, g := t.im, &t.im.geo
	if err := im.readable(); err != nil {
		return err
	}
	in := old & (g.clusterSize - 1)
	start := old - in
	cluster := make([]byte, g.clusterSize)
	if err := im.readGuest(cluster, start); err != nil {
		return err
	}
	stale := !transfer.IsZero(cluster[in:])
	clear(cluster[in:])
	i := start >> g.l2Coverage()
	at := start >> g.clusterBits & (1<<g.l2Bits - 1) * g.l2EntrySize
	return t.editL2(i, func(b []byte) (bool, error) {
		entry := binary.BigEndian.Uint64(b[at:])
		typ := g.clusterType(entry)
		if !stale && !(place && (typ == clusterUnallocated || typ == clusterZeroPlain)) {
			return false, nil
		}
		if typ == clusterNormal && !g.extended {
			host := int64(entry & l2OffsetMask)
			n, err := t.refcount(host >> g.clusterBits)
			if err != nil {
				return false, err
			}
			if n == 1 || g.dataFile { // nobody sees what lies behind the disk
				return false, im.fail(im.writeHost(cluster[in:], old, host+in))
			}
		}
		to := start
		if !g.dataFile {
			if err := t.addEntryRef(entry, -1); err != nil {
				return false, err
			}
			var err error
			if to, err = t.alloc(g.clusterSize); err != nil {
				return false, err
			}
		}
		binary.BigEndian.PutUint64(b[at:], uint64(to)|oflagCopied)
		if g.extended && !stale {
			return true, nil // the subclusters stay what they are
		}
		if g.extended {
			binary.BigEndian.PutUint64(b[at+8:], subclusterAllocMask)
		}
		return true, im.fail(im.writeHost(cluster, start, to))
	})
}

// commitResize is commit, and makes the files shorter after it.
func (t *txn) commitResize() error {
	im := t.im
	if err := t.commit(); err != nil {
		return err
	}
	if im.geo.dataFile && t.resized {
		if err := sizeDataFile(im.w.data, im.size); err != nil {
			return im.fail(err)
		}
	}
	if !t.shrink {
		return nil
	}
	if err := im.compact(t.ctx, t.placed); err != nil {
		return err
	}
	d, ok := im.w.dev.(blockdev.Truncater)
	last, err := im.w.alloc.lastUsed()
	if end := (last + 1) << im.geo.clusterBits; ok && err == nil && end < im.w.dev.Size() {
		err = d.Truncate(end)
	}
	return im.fail(err)
}

// compact moves those of the tables in the given clusters down for which there
// is room, so that the file can become shorter, and gives up refcount blocks
// that count nothing.
func (im *Image) compact(ctx context.Context, clusters map[int64]bool) error {
	t, err := im.begin(ctx)
	if err != nil {
		return err
	}
	defer t.abort()
	t.shrink, t.alloced = true, true
	a, g := im.w.alloc, &im.geo
	high := func(off uint64) bool {
		c := int64(off) >> g.clusterBits
		return clusters[c] && c > a.cursor
	}
	for i, entry := range t.l1 {
		off := entry & l1OffsetMask
		if off == 0 || !high(off) {
			continue
		}
		b, err := t.l2(entry)
		if err != nil {
			return err
		}
		to, err := t.writeL2(b)
		if err != nil {
			return err
		}
		if err := t.count(int64(off), g.clusterSize, -1); err != nil {
			return err
		}
		t.l1[i] = uint64(to) | entry&oflagCopied
	}
	t.moveL1 = high(t.header.L1TableOffset)
	t.snapshotsChanged = t.header.NbSnapshots > 0 && high(t.header.SnapshotsOffset)
	if err := t.moveBitmaps(high); err != nil {
		return err
	}
	for i := range a.table {
		if off := a.table[i]; off != 0 && high(off) && !a.moved[int64(i)] {
			if _, err := a.change(int64(i)); err != nil {
				return err
			}
			if err := a.settle(); err != nil {
				return err
			}
		}
	}
	return t.commit()
}

// moveBitmaps writes the tables of bitmaps anew for which high says so, with what
// they refer to, and the directory.
func (t *txn) moveBitmaps(high func(off uint64) bool) error {
	list, err := t.im.readBitmaps()
	if err != nil {
		return err
	}
	x, _ := t.header.Bitmaps()
	changed := len(list) > 0 && high(x.DirectoryOffset)
	for i := range list {
		b := &list[i]
		if !high(b.TableOffset) {
			continue
		}
		changed = true
		cluster := make([]byte, t.im.geo.clusterSize)
		err := t.rewriteBitmapTable(t.ctx, b, int64(b.TableSize), func(_ int64, entry uint64) (uint64, error) {
			off := entry & bitmapTableOffsetMask
			if off == 0 || !high(off) {
				return entry, nil
			}
			if err := readFull(t.im.dev, cluster, int64(off)); err != nil {
				return 0, fmt.Errorf("qcow2: bitmap %q: cluster at %#x: %w", b.Name, off, err)
			}
			return t.replaceBitmapCluster(entry, cluster)
		})
		if err != nil {
			return err
		}
	}
	if !changed {
		return nil
	}
	return t.writeBitmaps(list)
}

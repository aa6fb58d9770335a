package qcow2

import (
	"fmt"

	"qimg/qcow2/blockdev"
)

// maxWriteRun bounds the clusters that are allocated at once, in bytes.
const maxWriteRun int64 = 32 << 20

// subclusters returns the bits of a subcluster bitmap, alloc and zero alike,
// for the bytes of a cluster from lo up to hi, which are rounded outwards.
func (g *geometry) subclusters(lo, hi int64) uint64 {
	first, last := uint(lo>>g.subBits), uint((hi-1)>>g.subBits)
	return (1<<(last-first+1) - 1) << first
}

const zeroSubclusters = subclusterAllocMask << 32 // all of a cluster read as zeroes

// writePiece writes the first bytes of p at off and returns how many: those
// that lie in clusters of one make, within one slice of an L2 table.
func (im *Image) writePiece(p []byte, off int64) (int, error) {
	if err := im.relieve(); err != nil {
		return 0, err
	}
	g := &im.geo
	at, err := im.l2ForWrite(off)
	if err != nil {
		return 0, err
	}
	in := off & (g.clusterSize - 1)
	// The clusters of the slice, and no more than p needs.
	limit := min((int64(len(at.slice))-at.at)/g.l2EntrySize, (in+int64(len(p))+g.clusterSize-1)>>g.clusterBits, max(maxWriteRun>>g.clusterBits, 1))
	p = p[:min(int64(len(p)), limit<<g.clusterBits-in)]
	host, ok, err := im.ownCluster(at, off)
	if err != nil {
		return 0, err
	}
	if ok {
		n := g.clusterSize - in
		for next := at; n < int64(len(p)); n += g.clusterSize {
			next.at += g.l2EntrySize
			more, ok, err := im.ownCluster(next, off+n)
			if err != nil {
				return 0, err
			}
			if !ok || more != host+in+n {
				break
			}
		}
		return im.overwrite(p[:min(int64(len(p)), n)], off, at, host)
	}
	entry, bitmap := im.entry(at)
	typ := g.clusterType(entry)
	if typ == clusterZeroAlloc && entry&oflagCopied != 0 && !g.dataFile {
		if err := im.checkInFile(int64(entry & l2OffsetMask)); err != nil {
			return 0, err
		}
		p = p[:min(int64(len(p)), g.clusterSize-in)]
		return len(p), im.fillClusters(p, off, at, int64(entry&l2OffsetMask), 1)
	}
	if g.extended && (typ == clusterUnallocated || typ == clusterZeroPlain) {
		return im.newSubclusters(p, off, at, bitmap)
	}
	// A run of clusters that all need a place.
	n := int64(1)
	for next := at; n < limit; n++ {
		next.at += g.l2EntrySize
		if _, ok, err := im.ownCluster(next, off-in+n<<g.clusterBits); err != nil {
			return 0, err
		} else if ok {
			break
		}
		if e, _ := im.entry(next); g.clusterType(e) == clusterZeroAlloc && e&oflagCopied != 0 && !g.dataFile || g.extended {
			break
		}
	}
	if g.dataFile {
		host = off - in
	} else {
		c, got, err := im.w.alloc.alloc(1, n)
		if err != nil {
			return 0, err
		}
		host, n = c<<g.clusterBits, got
		// The allocation may have flushed, which changes no entry.
	}
	p = p[:min(int64(len(p)), n<<g.clusterBits-in)]
	return len(p), im.fillClusters(p, off, at, host, n)
}

// ownCluster returns the place of the cluster of off if it is data of the guest
// alone, which may be overwritten.
func (im *Image) ownCluster(at l2Place, off int64) (host int64, ok bool, err error) {
	g := &im.geo
	entry, _ := im.entry(at)
	r, bad := im.classify(at.slice[at.at:], off)
	if bad != nil {
		bad.Off = at.off + at.at
		return 0, false, bad
	}
	if g.clusterType(entry) != clusterNormal || entry&oflagCopied == 0 {
		return 0, false, nil
	}
	host = r.host &^ (g.clusterSize - 1)
	return host, true, im.checkInFile(host)
}

// checkInFile refuses a cluster that the guest has beyond the end of the file,
// where a damaged image would make it grow to any size, unless it is counted.
func (im *Image) checkInFile(host int64) error {
	if im.geo.dataFile || host < im.w.dev.Size() {
		return nil
	}
	if n, err := im.w.alloc.get(host >> im.geo.clusterBits); n == 1 || err != nil {
		return err
	}
	return fmt.Errorf("qcow2: cluster at %#x is beyond the end of the file at %#x, and has no refcount: run check: %w", host, im.w.dev.Size(), ErrCorrupt)
}

// overwrite writes p into clusters that the guest has alone. With extended L2
// entries subclusters that are not allocated become so.
func (im *Image) overwrite(p []byte, off int64, at l2Place, host int64) (int, error) {
	g := &im.geo
	in := off & (g.clusterSize - 1)
	if !g.extended {
		return len(p), im.writeHost(p, off, host+in)
	}
	p = p[:min(int64(len(p)), g.clusterSize-in)]
	entry, bitmap := im.entry(at)
	need := g.subclusters(in, in+int64(len(p)))
	if bitmap&need == need { // allocated, and so not zero
		return len(p), im.writeHost(p, off, host+in)
	}
	if err := im.fillSubclusters(p, off, host, bitmap); err != nil {
		return 0, err
	}
	im.set(at, entry, (bitmap|need)&^(need<<32))
	return len(p), nil
}

// newSubclusters writes p into a cluster that has no place yet.
func (im *Image) newSubclusters(p []byte, off int64, at l2Place, bitmap uint64) (int, error) {
	g := &im.geo
	in := off & (g.clusterSize - 1)
	p = p[:min(int64(len(p)), g.clusterSize-in)]
	host := off - in
	if !g.dataFile {
		c, _, err := im.w.alloc.alloc(1, 1)
		if err != nil {
			return 0, err
		}
		host = c << g.clusterBits
	}
	if err := im.fillSubclusters(p, off, host, bitmap); err != nil {
		return 0, err
	}
	need := g.subclusters(in, in+int64(len(p)))
	im.set(at, uint64(host)|oflagCopied, (bitmap|need)&^(need<<32))
	return len(p), nil
}

// fillSubclusters writes p, which lies in one cluster, at its place in the
// cluster at host, with what else the guest has in the subclusters that it
// begins and ends in, unless those are allocated.
func (im *Image) fillSubclusters(p []byte, off, host int64, bitmap uint64) error {
	g := &im.geo
	sub := int64(1) << g.subBits
	lo, hi := off, off+int64(len(p))
	if bitmap&g.subclusters(lo&(g.clusterSize-1), lo&(g.clusterSize-1)+1) == 0 {
		lo &^= sub - 1
	}
	if last := hi - 1; bitmap&g.subclusters(last&(g.clusterSize-1), last&(g.clusterSize-1)+1) == 0 {
		hi = last&^(sub-1) + sub
	}
	return im.writeMixed(p, off, lo, hi, host+lo&(g.clusterSize-1))
}

// fillClusters writes p at its place in n clusters from host on, with what else
// the guest has in the clusters that it begins and ends in, and enters them.
func (im *Image) fillClusters(p []byte, off int64, at l2Place, host, n int64) error {
	g := &im.geo
	start := off &^ (g.clusterSize - 1)
	if err := im.writeMixed(p, off, start, start+n<<g.clusterBits, host); err != nil {
		return err
	}
	for i := range n {
		old, _ := im.entry(at)
		if old&l2OffsetMask != uint64(host+i<<g.clusterBits) || g.clusterType(old) == clusterCompressed {
			im.freeEntry(old, false)
		}
		im.set(at, uint64(host+i<<g.clusterBits)|oflagCopied, subclusterAllocMask)
		at.at += g.l2EntrySize
	}
	return nil
}

// writeMixed writes the guest bytes from lo up to hi to host: p, which begins at
// off, and around it what the guest has there now. Both lie in the clusters
// that p begins and ends in.
func (im *Image) writeMixed(p []byte, off, lo, hi, host int64) error {
	end := off + int64(len(p))
	if hi-lo <= 2*im.geo.clusterSize && (lo < off || end < hi) {
		b := make([]byte, hi-lo)
		if err := im.readGuest(b[:off-lo], lo); err != nil {
			return err
		}
		copy(b[off-lo:], p)
		if err := im.readGuest(b[end-lo:], end); err != nil {
			return err
		}
		return im.writeHost(b, lo, host)
	}
	if lo < off {
		// The first cluster by itself.
		first := min(lo+im.geo.clusterSize, hi)
		if err := im.writeMixed(p[:first-off], off, lo, first, host); err != nil {
			return err
		}
		p, host, lo, off = p[first-off:], host+first-lo, first, first
	}
	if end < hi {
		last := hi - im.geo.clusterSize
		if err := im.writeMixed(p[last-off:], last, last, hi, host+last-lo); err != nil {
			return err
		}
		p = p[:last-off]
	}
	if len(p) == 0 {
		return nil
	}
	return im.writeHost(p, off, host)
}

// writeHost writes guest bytes that begin at the guest offset off to their
// place in the data file.
func (im *Image) writeHost(p []byte, off, host int64) error {
	if im.w.data == nil {
		return im.noFile("external data file", im.header.DataFile())
	}
	if im.crypt != nil {
		return im.writeEncrypted(p, off, host)
	}
	return im.writeData(p, off, host)
}

// writeData writes what the data file has to hold at host.
func (im *Image) writeData(p []byte, off, host int64) error {
	im.w.unsynced = true
	n := int64(len(p))
	if im.geo.dataFile {
		if end := host + n; end > im.w.data.Size() {
			// The disk ends inside a cluster.
			if end = min(end, max(im.size, im.w.data.Size())); host >= end {
				return nil
			}
			if t, ok := im.w.data.(blockdev.Truncater); ok && end > im.w.data.Size() {
				if err := t.Truncate(end); err != nil {
					return err
				}
			}
			p = p[:end-host]
		}
	} else {
		if err := im.checkOverlap(host, n); err != nil {
			return err
		}
		if err := im.reserve((host + n + im.geo.clusterSize - 1) &^ (im.geo.clusterSize - 1)); err != nil {
			return err
		}
	}
	if _, err := im.w.data.WriteAt(p, host); err != nil {
		return fmt.Errorf("qcow2: write guest data at %#x to %#x: %w", off, host, err)
	}
	return nil
}

// writeEncrypted writes guest bytes encrypted, with those around them in the
// first and last sector.
func (im *Image) writeEncrypted(p []byte, off, host int64) error {
	const mask = sectorSize - 1
	lo := off &^ mask
	hi := (off + int64(len(p)) + mask) &^ mask
	b := make([]byte, hi-lo)
	if lo < off || hi > off+int64(len(p)) {
		// The sectors at the ends may lie in one.
		if err := im.readGuest(b[:sectorSize], lo); err != nil {
			return err
		}
		if err := im.readGuest(b[len(b)-sectorSize:], hi-sectorSize); err != nil {
			return err
		}
	}
	copy(b[off-lo:], p)
	if err := im.crypt.encrypt(b, lo, host-(off-lo)); err != nil {
		return err
	}
	return im.writeData(b, lo, host-(off-lo))
}

// zeroGuest makes n bytes at off read as zeroes.
func (im *Image) zeroGuest(off, n int64) error {
	return im.eachPart(off, n, func(at l2Place, off, lo, hi int64) error {
		return im.zeroCluster(at, off, lo, hi)
	}, im.zeroEdge)
}

// eachPart calls part for each cluster of n bytes at off, with the place of its
// L2 entry, the guest offset of the cluster, and which of its bytes are meant:
// whole subclusters. Bytes at the ends that make up no subcluster go to edge.
// Clusters at the end of the disk are whole.
func (im *Image) eachPart(off, n int64, part func(at l2Place, off, lo, hi int64) error, edge func(off, n int64) error) error {
	g := &im.geo
	sub := int64(1) << g.subBits
	end := off + n
	lo, hi := (off+sub-1)&^(sub-1), end&^(sub-1)
	if end == im.size && end > lo {
		hi = (end + g.clusterSize - 1) &^ (g.clusterSize - 1)
	}
	if lo >= hi {
		return edge(off, n)
	}
	if off < lo {
		if err := edge(off, lo-off); err != nil {
			return err
		}
	}
	for lo < hi {
		if err := im.relieve(); err != nil {
			return err
		}
		if skip := im.nothingThere(lo, hi); skip > lo {
			lo = skip
			continue
		}
		at, err := im.l2ForWrite(lo)
		if err != nil {
			return err
		}
		start := lo &^ (g.clusterSize - 1)
		to := min(hi, start+g.clusterSize)
		if _, bad := im.classify(at.slice[at.at:], lo); bad != nil {
			bad.Off = at.off + at.at
			return bad
		}
		if err := part(at, start, lo-start, to-start); err != nil {
			return err
		}
		lo = to
	}
	if hi < end {
		return edge(hi, end-hi)
	}
	return nil
}

// nothingThere returns the end of the run of guest bytes from off on that read
// as zeroes because no layer holds anything, where a whole L2 table can be
// passed over; off otherwise.
func (im *Image) nothingThere(off, end int64) int64 {
	if im.backs(off) || im.l1Entry(off>>im.geo.l2Coverage())&l1OffsetMask != 0 || im.rawData() {
		return off
	}
	return min(end, im.holeEnd(off, end-off))
}

// backs reports whether a backing file shows through at off or behind it, or may
// do so later.
func (im *Image) backs(off int64) bool {
	return im.w.rebase || im.header.BackingFile != "" && (im.backing == nil || off < im.backing.Size())
}

// rawData reports whether the data file has to be a raw image by itself.
func (im *Image) rawData() bool { return im.header.AutoclearFeatures&AutoclearDataFileRaw != 0 }

// zeroEdge writes zeroes where they are not read already.
func (im *Image) zeroEdge(off, n int64) error {
	zeroes := make([]byte, min(n, im.geo.clusterSize))
	for n > 0 {
		r, err := im.lookup(off, n)
		if err != nil {
			return err
		}
		if r.kind != runZero && (r.kind != runUnallocated || im.backs(off)) || im.rawData() {
			r.n = min(r.n, int64(len(zeroes)))
			if _, err := im.writeGuest(zeroes[:r.n], off); err != nil {
				return err
			}
		}
		off, n = off+r.n, n-r.n
	}
	return nil
}

// zeroCluster makes the bytes of a cluster from lo up to hi read as zeroes.
func (im *Image) zeroCluster(at l2Place, off, lo, hi int64) error {
	g := &im.geo
	entry, bitmap := im.entry(at)
	typ := g.clusterType(entry)
	if im.rawData() && im.w.data != nil {
		if err := im.zeroData(off+lo, hi-lo); err != nil {
			return err
		}
	}
	whole := hi-lo == g.clusterSize
	switch {
	case g.extended && typ == clusterCompressed && !whole:
		return im.zeroEdge(off+lo, hi-lo)
	case g.extended:
		// A place that others have too is given up with the last subcluster.
		need := g.subclusters(lo, hi)
		bitmap = bitmap&^need | need<<32
		if whole && entry&oflagCopied == 0 {
			im.freeEntry(entry, false)
			entry = 0
		} else if !whole && entry&oflagCopied == 0 && typ == clusterNormal {
			return im.zeroEdge(off+lo, hi-lo)
		}
		if typ == clusterCompressed {
			bitmap = zeroSubclusters
		}
		im.set(at, entry, bitmap)
	case typ == clusterZeroPlain || typ == clusterZeroAlloc:
	case typ == clusterUnallocated && !im.backs(off):
	case im.header.Version < 3:
		if im.backs(off) {
			return im.zeroEdge(off+lo, hi-lo)
		}
		im.freeEntry(entry, false)
		im.set(at, 0, 0)
	case entry&oflagCopied != 0:
		im.set(at, entry|oflagZero, 0)
	default:
		im.freeEntry(entry, false)
		im.set(at, oflagZero, 0)
	}
	return nil
}

// zeroData makes the data file hold zeroes, and gives back the space where the
// file can. The place in an external data file is the guest's.
func (im *Image) zeroData(off, n int64) error {
	if im.w.data == nil {
		return im.noFile("external data file", im.header.DataFile())
	}
	im.w.unsynced = true
	if n = min(n, im.w.data.Size()-off); n <= 0 {
		return nil
	}
	return blockdev.WriteZeroes(im.w.data, off, n)
}

// discardGuest gives back whole clusters.
func (im *Image) discardGuest(off, n int64) error {
	g := &im.geo
	return im.eachPart(off, n, func(at l2Place, off, lo, hi int64) error {
		entry, bitmap := im.entry(at)
		typ := g.clusterType(entry)
		if hi-lo != g.clusterSize || typ == clusterZeroPlain {
			return nil
		}
		if im.rawData() {
			return im.zeroData(off, g.clusterSize)
		}
		if typ == clusterUnallocated && bitmap == 0 && !im.backs(off) {
			return nil
		}
		if g.dataFile && (typ == clusterNormal || typ == clusterZeroAlloc) {
			// At once: a later write puts its data at the same place.
			if err := im.zeroData(off, g.clusterSize); err != nil {
				return err
			}
		}
		to, toBitmap := uint64(0), uint64(0)
		if im.backs(off) {
			switch {
			case im.header.Version < 3:
				return nil
			case g.extended:
				toBitmap = zeroSubclusters
			default:
				to = oflagZero
			}
		}
		im.freeEntry(entry, true)
		im.set(at, to, toBitmap)
		return nil
	}, func(int64, int64) error { return nil })
}

package qcow2

import (
	"encoding/binary"
	"fmt"
	"io"
	"math"

	"qimg/qcow2/blockdev"
)

// runKind is what a run of guest bytes is made of in one image.
type runKind uint8

const (
	runUnallocated runKind = iota // the backing file decides
	runZero
	runData
	runCompressed // one cluster
)

// run is a run of guest bytes of one kind.
type run struct {
	kind runKind
	n    int64 // bytes, 1 at least
	// host is the place of the first byte in the data file, -1 without one.
	// A zero run and an unallocated one (a subcluster) can have space kept.
	host  int64
	entry uint64 // L2 entry of a compressed cluster
}

// hole is a range of the guest whose L1 entries are all empty. The entry at its
// end may be empty too.
type hole struct{ start, end int64 }

// maxSlice is the largest part of an L2 table or refcount block that is read
// and cached at once.
const maxSlice = 64 << 10

func (im *Image) sliceSize() int64 { return min(im.geo.clusterSize, maxSlice) }

// slice returns the part of a table at off, an offset aligned to sliceSize.
func (im *Image) slice(off int64) ([]byte, error) {
	if im.w != nil {
		if d := im.w.dirty[off]; d != nil {
			return d.b, nil
		}
	}
	key := tableKey{im.id, off}
	if b := im.shared.tables.get(key); b != nil {
		return b, nil
	}
	b := make([]byte, im.sliceSize())
	if err := readFull(im.dev, b, off); err != nil {
		return nil, err
	}
	im.shared.tables.put(key, b)
	return b, nil
}

// lookup tells what lies at off, for up to limit bytes that are alike and, if
// they have a place, contiguous. 0 <= off, off+limit <= size.
func (im *Image) lookup(off, limit int64) (run, error) {
	g := &im.geo
	index := off >> g.l2Coverage()
	entry := im.l1Entry(index)
	l2Off := int64(entry & l1OffsetMask)
	if l2Off == 0 {
		return run{runUnallocated, min(limit, im.holeEnd(off, limit)-off), -1, 0}, nil
	}
	if g.inCluster(uint64(l2Off)) != 0 {
		return run{}, &FormatError{"l1 entry", im.l1Off + index*l1EntrySize, "l2 table offset",
			fmt.Sprintf("%#x not aligned to %#x", l2Off, g.clusterSize), ErrCorrupt}
	}
	if im.shared.opts.RefuseTruncated && l2Off+g.clusterSize > im.dev.Size() {
		return run{}, &FormatError{"l1 entry", im.l1Off + index*l1EntrySize, "l2 table offset",
			fmt.Sprintf("%#x is beyond the end of the file at %#x: it is truncated", l2Off, im.dev.Size()), ErrCorrupt}
	}
	if l2Off >= im.dev.Size() && im.w == nil { // zeroes
		return run{runUnallocated, min(limit, (index+1)<<g.l2Coverage()-off), -1, 0}, nil
	}
	inTable := (off >> g.clusterBits & (1<<g.l2Bits - 1)) * g.l2EntrySize
	inSlice := inTable & (im.sliceSize() - 1)
	table, err := im.slice(l2Off + inTable - inSlice)
	if err != nil {
		return run{}, fmt.Errorf("qcow2: l2 table at %#x: %w", l2Off, err)
	}
	r, bad := im.classify(table[inSlice:], off)
	if bad == nil && r.kind == runData && limit > 0 {
		if limit = min(limit, im.present(r.host)); limit == 0 {
			bad = &FormatError{"l2 entry", -1, "cluster offset",
				fmt.Sprintf("%#x: the file ends at %#x: it is truncated", r.host&^(g.clusterSize-1), im.data.Size()), ErrCorrupt}
		}
	}
	if bad != nil {
		bad.Off = l2Off + inTable
		return run{}, bad
	}
	// Go on while the next subcluster is of the same make.
	sub := int64(1) << g.subBits
	at := off&^(sub-1) + sub
	for r.kind != runCompressed && at-off < limit {
		if at&(g.clusterSize-1) == 0 {
			if inSlice += g.l2EntrySize; inSlice == int64(len(table)) {
				break
			}
		}
		next, bad := im.classify(table[inSlice:], at)
		if bad != nil || next.kind != r.kind || r.host < 0 && next.host >= 0 || r.host >= 0 && next.host != r.host+at-off {
			break
		}
		at += sub
	}
	if r.kind == runCompressed {
		at = off&^(g.clusterSize-1) + g.clusterSize
	}
	r.n = min(limit, at-off)
	return r, nil
}

// present returns how many bytes, in sectors, the data file has from host on,
// where it is an error to read more.
func (im *Image) present(host int64) int64 {
	if !im.shared.opts.RefuseTruncated || im.data == nil {
		return math.MaxInt64
	}
	return max(im.data.Size()-host, 0) &^ (sectorSize - 1)
}

// holeEnd returns the end of the run of empty L1 entries around off, or a place
// in the run that is limit bytes from off or more. The last entry of the table
// can map more than the disk has.
func (im *Image) holeEnd(off, limit int64) int64 {
	s := im.geo.l2Coverage()
	n := int64(len(im.l1) / l1EntrySize)
	mapped := max(im.size, n<<s)
	start, i := off>>s<<s, off>>s+1
	h := im.hole.Load()
	known := h != nil && h.start <= off && off < h.end
	if known {
		if h.end-off >= limit || h.end == mapped {
			return h.end
		}
		start, i = h.start, h.end>>s
	}
	for ; i<<s-off < limit; i++ {
		if i >= n {
			i = max((im.size-1)>>s+1, n) // the rest of the table is empty
			break
		}
		if im.l1Entry(i)&l1OffsetMask != 0 {
			break
		}
	}
	end := min(i<<s, mapped)
	if !known || end > h.end {
		im.hole.Store(&hole{start, end})
	}
	return end
}

// classify reads the L2 entry at the start of b for the guest offset off, as
// QEMU's qcow2_get_host_offset does. The n of its run is not set.
func (im *Image) classify(b []byte, off int64) (run, *FormatError) {
	g := &im.geo
	entry := binary.BigEndian.Uint64(b)
	corrupt := func(field, format string, args ...any) (run, *FormatError) {
		return run{}, &FormatError{"l2 entry", -1, field, fmt.Sprintf(format, args...), ErrCorrupt}
	}
	var subAlloc, subZero bool
	typ := g.clusterType(entry)
	if g.extended && typ != clusterCompressed {
		bitmap := binary.BigEndian.Uint64(b[8:])
		alloc, zero := uint32(bitmap), uint32(bitmap>>32)
		if alloc&zero != 0 || typ == clusterUnallocated && alloc != 0 {
			return corrupt("subcluster bitmap", "%#016x contradicts itself or the cluster offset", bitmap)
		}
		x := uint(off>>g.subBits) & (subclustersPerCluster - 1)
		subAlloc, subZero = alloc>>x&1 != 0, zero>>x&1 != 0
	}
	switch typ {
	case clusterCompressed:
		if g.dataFile {
			return corrupt("", "compressed cluster in an image with an external data file")
		}
		return run{kind: runCompressed, host: -1, entry: entry}, nil
	case clusterUnallocated:
		if subZero {
			return run{kind: runZero, host: -1}, nil
		}
		return run{kind: runUnallocated, host: -1}, nil
	case clusterZeroPlain:
		if im.header.Version < 3 {
			return corrupt("zero flag", "in a version 2 image")
		}
		return run{kind: runZero, host: -1}, nil
	}
	host := int64(entry & l2OffsetMask)
	if g.inCluster(uint64(host)) != 0 {
		return corrupt("cluster offset", "%#x not aligned to %#x", host, g.clusterSize)
	}
	if g.dataFile && host != off&^(g.clusterSize-1) {
		return corrupt("cluster offset", "%#x, expected the guest offset %#x with an external data file", host, off&^(g.clusterSize-1))
	}
	r := run{kind: runData, host: host + off&(g.clusterSize-1)}
	switch {
	case typ == clusterZeroAlloc:
		if im.header.Version < 3 {
			return corrupt("zero flag", "in a version 2 image")
		}
		r.kind = runZero
	case g.extended && subZero:
		r.kind = runZero
	case g.extended && !subAlloc:
		r.kind = runUnallocated
	}
	return r, nil
}

// ReadAt implements io.ReaderAt on what the guest sees. Guest clusters beyond
// the end of the image file read as zeroes, as in QEMU.
func (im *Image) ReadAt(p []byte, off int64) (int, error) {
	if im.w != nil {
		im.mu.RLock()
		defer im.mu.RUnlock()
	}
	if err := im.readable(); err != nil {
		return 0, err
	}
	if off < 0 {
		return 0, fmt.Errorf("qcow2: read at offset %d: %w", off, blockdev.ErrRange)
	}
	if off >= im.size {
		if len(p) == 0 {
			return 0, nil
		}
		return 0, io.EOF
	}
	var atEnd error
	if int64(len(p)) > im.size-off {
		p, atEnd = p[:im.size-off], io.EOF
	}
	for done := 0; done < len(p); {
		r, err := im.lookup(off+int64(done), int64(len(p)-done))
		if err != nil {
			return done, err
		}
		if err := im.readRun(p[done:done+int(r.n)], off+int64(done), r); err != nil {
			return done, err
		}
		done += int(r.n)
	}
	return len(p), atEnd
}

// readRun fills p, which is as long as r, with the guest bytes at off.
func (im *Image) readRun(p []byte, off int64, r run) error {
	switch r.kind {
	case runZero:
		clear(p)
	case runData:
		if im.data == nil {
			return im.noFile("external data file", im.header.DataFile())
		}
		var err error
		if im.crypt != nil {
			err = im.readSectors(p, off, r.host)
		} else {
			err = readFull(im.data, p, r.host)
		}
		if err != nil {
			return fmt.Errorf("qcow2: guest offset %#x: %w", off, err)
		}
	case runCompressed:
		return im.readCompressed(p, off&(im.geo.clusterSize-1), r.entry)
	case runUnallocated:
		if im.backing == nil {
			if im.header.BackingFile != "" {
				return im.noFile("backing file", im.header.BackingFile)
			}
			clear(p)
			return nil
		}
		return im.inBacking(readFull(im.backing, p, off))
	}
	return nil
}

func (im *Image) noFile(what, name string) error {
	return fmt.Errorf("qcow2: %s %q was not opened: %w", what, name, ErrBacking)
}

package qcow2

import (
	"context"
	"encoding/binary"
	"fmt"
	"iter"
	"math"

	"qimg/qcow2/blockdev"
	"qimg/qcow2/transfer"
)

// Dump reads the parts of an image one by one, as they are stored, whatever
// else is wrong with it. It holds none of them: memory is that of 64 KiB of a
// table, or of the bitmap directory.
//
// Every sequence goes on after an error where that can be, and ends where ctx
// does.
type Dump struct {
	ctx    context.Context
	dev    blockdev.Reader
	header Header
	geo    geometry
	err    error // of the header
}

// NewDump reads the header of the image in dev. An error means that it has no
// header, or none that says how large clusters are.
func NewDump(ctx context.Context, dev blockdev.Reader) (*Dump, error) {
	b, err := readFirstCluster(dev)
	if err != nil {
		return nil, err
	}
	if n := len(b); n < headerSizeV2 {
		b = append(b, make([]byte, headerSizeV2-n)...)
	}
	d := &Dump{ctx: ctx, dev: dev}
	d.header, d.err = parseHeader(b)
	h := d.header
	h.RefcountOrder = min(h.RefcountOrder, maxRefcountOrder)
	d.geo = h.geometry()
	return d, nil
}

// Header returns the header as far as it could be read, and what is wrong with
// it.
func (d *Dump) Header() (Header, error) { return d.header, d.err }

// Name returns what the specification calls a type of header extension, "" if it
// does not know it.
func (e *Extension) Name() string {
	switch e.Type {
	case extBackingFormat:
		return "backing file format"
	case extFeatureNames:
		return "feature name table"
	case extBitmaps:
		return "bitmaps extension"
	case extCrypto:
		return "full disk encryption header pointer"
	case extDataFile:
		return "external data file name"
	}
	return ""
}

// L1Entry is an entry of an L1 table.
type L1Entry struct {
	Index int64
	Off   int64 // in the file, in bytes
	Entry uint64
}

// L2Offset returns where the L2 table lies, in bytes; 0: there is none.
func (e L1Entry) L2Offset() int64 { return int64(e.Entry & l1OffsetMask) }

// Copied reports whether the entry has the copied flag.
func (e L1Entry) Copied() bool { return e.Entry&oflagCopied != 0 }

// Reserved returns the reserved bits that are set.
func (e L1Entry) Reserved() uint64 { return e.Entry & l1ReservedMask }

// L1Table is the place of an L1 table.
type L1Table struct {
	Off  int64  // bytes
	Size uint32 // entries
}

// ActiveL1 returns the place of the active L1 table.
func (d *Dump) ActiveL1() L1Table {
	return L1Table{int64(min(d.header.L1TableOffset, math.MaxInt64)), d.header.L1Size}
}

// Entries is a range of entries, and whether those that are 0 are wanted too.
type Entries struct {
	First, Last int64
	Empty       bool
}

// tableEntries goes through entries of size bytes of a table at off, as far as
// the file goes. The slice is valid until the next step.
func (d *Dump) tableEntries(what string, off, n, size int64, want Entries) iter.Seq2[tableEntry, error] {
	return func(yield func(tableEntry, error) bool) {
		first := max(want.First, 0)
		last := min(want.Last, n-1)
		if off < 0 || first > last {
			return
		}
		per := maxSlice / size
		for at := first; at <= last; at += per {
			if err := d.ctx.Err(); err != nil {
				yield(tableEntry{}, err)
				return
			}
			place := off + at*size
			if place >= d.dev.Size() || place < off {
				yield(tableEntry{index: at, off: place}, fmt.Errorf("qcow2: %s at %#x: entries from %d on are beyond the end of the file at %#x: %w", what, off, at, d.dev.Size(), ErrCorrupt))
				return
			}
			b := make([]byte, min(per, last-at+1)*size)
			if err := readFull(d.dev, b, place); err != nil {
				if !yield(tableEntry{index: at, off: place}, fmt.Errorf("qcow2: %s at %#x: %w", what, off, err)) {
					return
				}
				continue
			}
			for i := int64(0); i < int64(len(b)); i += size {
				e := tableEntry{at + i/size, place + i, b[i : i+size]}
				if (want.Empty || !transfer.IsZero(e.b)) && !yield(e, nil) {
					return
				}
			}
		}
	}
}

type tableEntry struct {
	index, off int64
	b          []byte
}

// L1 goes through the entries of an L1 table.
func (d *Dump) L1(t L1Table, want Entries) iter.Seq2[L1Entry, error] {
	return func(yield func(L1Entry, error) bool) {
		for e, err := range d.tableEntries("l1 table", t.Off, int64(t.Size), l1EntrySize, want) {
			x := L1Entry{Index: e.index, Off: e.off}
			if err == nil {
				x.Entry = binary.BigEndian.Uint64(e.b)
			}
			if !yield(x, err) {
				return
			}
		}
	}
}

// L2Entry is an entry of an L2 table.
type L2Entry struct {
	Index  int64 // guest cluster
	Off    int64 // in the file, in bytes
	Entry  uint64
	Bitmap uint64 // of subclusters, if the image has them
	// Kind is data, zero, compressed or unallocated, before subclusters are
	// looked at.
	Kind blockdev.ExtentKind
	// Host and HostSize are the place of what it names, in the file or the
	// external data file; HostSize is 0 if it names none.
	Host, HostSize int64
}

// Copied reports whether the entry has the copied flag.
func (e L2Entry) Copied() bool { return e.Entry&oflagCopied != 0 }

// Reserved returns the reserved bits that are set.
func (e L2Entry) Reserved() uint64 {
	if e.Kind == blockdev.Compressed {
		return 0
	}
	return e.Entry & l2ReservedMask
}

// ClusterSize returns the cluster size in bytes.
func (d *Dump) ClusterSize() int64 { return d.geo.clusterSize }

// L2Entries returns how many entries an L2 table has.
func (d *Dump) L2Entries() int64 { return 1 << d.geo.l2Bits }

// Extended reports whether L2 entries have subcluster bitmaps.
func (d *Dump) Extended() bool { return d.geo.extended }

// L2 goes through the L2 entries of the guest clusters of want that have an L2
// table. An error is of a whole table; Index is that of its first entry then.
func (d *Dump) L2(t L1Table, want Entries) iter.Seq2[L2Entry, error] {
	return func(yield func(L2Entry, error) bool) {
		g := &d.geo
		first, last := max(want.First, 0), min(want.Last, math.MaxInt64>>g.clusterBits)
		for l1, err := range d.L1(t, Entries{First: first >> g.l2Bits, Last: last >> g.l2Bits}) {
			start := l1.Index << g.l2Bits
			off := l1.L2Offset()
			if err == nil && g.inCluster(uint64(off)) != 0 {
				err = &FormatError{"l1 entry", l1.Off, "l2 table offset", fmt.Sprintf("%#x not aligned to %#x", off, g.clusterSize), ErrCorrupt}
			}
			if err != nil {
				if !yield(L2Entry{Index: start, Off: l1.Off}, err) {
					return
				}
				continue
			}
			if off == 0 {
				continue
			}
			for e, err := range d.tableEntries("l2 table", off, 1<<g.l2Bits, g.l2EntrySize, Entries{first - start, last - start, want.Empty}) {
				x := L2Entry{Index: start + e.index, Off: e.off}
				if err == nil {
					x = d.l2Entry(x, e.b)
				}
				if !yield(x, err) {
					return
				}
			}
		}
	}
}

func (d *Dump) l2Entry(x L2Entry, b []byte) L2Entry {
	g := &d.geo
	x.Entry, x.Bitmap = g.entryIn(b)
	x.Host = int64(x.Entry & l2OffsetMask)
	switch g.clusterType(x.Entry) {
	case clusterCompressed:
		x.Kind = blockdev.Compressed
		x.Host, x.HostSize = g.compressed(x.Entry)
	case clusterNormal:
		x.Kind, x.HostSize = blockdev.Data, g.clusterSize
	case clusterZeroAlloc:
		x.Kind, x.HostSize = blockdev.Zero, g.clusterSize
	case clusterZeroPlain:
		x.Kind = blockdev.Zero
	default:
		x.Kind = blockdev.Unallocated
	}
	return x
}

// RefcountTableEntry is an entry of the refcount table.
type RefcountTableEntry struct {
	Index int64
	Off   int64 // in the file, in bytes
	Entry uint64
}

// Block returns where the refcount block lies, in bytes; 0: there is none.
func (e RefcountTableEntry) Block() uint64 { return e.Entry & reftableOffsetMask }

// Reserved returns the reserved bits that are set.
func (e RefcountTableEntry) Reserved() uint64 { return e.Entry & reftableReservedMask }

// RefcountTable goes through the entries of the refcount table.
func (d *Dump) RefcountTable(want Entries) iter.Seq2[RefcountTableEntry, error] {
	return func(yield func(RefcountTableEntry, error) bool) {
		h := &d.header
		n := int64(h.RefcountTableClusters) << h.ClusterBits / reftableEntrySize
		for e, err := range d.tableEntries("refcount table", int64(min(h.RefcountTableOffset, math.MaxInt64)), n, reftableEntrySize, want) {
			x := RefcountTableEntry{Index: e.index, Off: e.off}
			if err == nil {
				x.Entry = binary.BigEndian.Uint64(e.b)
			}
			if !yield(x, err) {
				return
			}
		}
	}
}

// RefcountsPerBlock returns how many refcounts a refcount block has.
func (d *Dump) RefcountsPerBlock() int64 { return d.geo.refcountsPerBlock() }

// RefcountRun is N clusters of the file from Cluster on with the same refcount.
type RefcountRun struct {
	Cluster, N int64
	Refcount   uint64
}

// Refcounts goes through the stored refcounts of the clusters of want, in runs.
// An error is of a whole block; Cluster is its first one then.
func (d *Dump) Refcounts(want Entries) iter.Seq2[RefcountRun, error] {
	return func(yield func(RefcountRun, error) bool) {
		var run RefcountRun
		flush := func() bool {
			r := run
			run = RefcountRun{}
			return r.N == 0 || r.Refcount == 0 && !want.Empty || yield(r, nil)
		}
		for r, err := range d.refcounts(want) {
			if err != nil {
				if !flush() || !yield(r, err) {
					return
				}
				continue
			}
			if run.N > 0 && run.Refcount == r.Refcount && run.Cluster+run.N == r.Cluster {
				run.N++
				continue
			}
			if !flush() {
				return
			}
			run = r
		}
		flush()
	}
}

// refcounts goes through the refcounts one by one.
func (d *Dump) refcounts(want Entries) iter.Seq2[RefcountRun, error] {
	return func(yield func(RefcountRun, error) bool) {
		g := &d.geo
		per := g.refcountsPerBlock()
		first, last := max(want.First, 0), min(want.Last, math.MaxInt64>>g.clusterBits)
		if d.header.RefcountOrder > maxRefcountOrder {
			yield(RefcountRun{}, headerError(ErrCorrupt, "refcount_order", "%d, expected at most %d", d.header.RefcountOrder, maxRefcountOrder))
			return
		}
		for t, err := range d.RefcountTable(Entries{First: first / per, Last: last / per}) {
			start := t.Index * per
			if err == nil && (t.Reserved() != 0 || g.inCluster(t.Block()) != 0 || t.Block() >= uint64(d.dev.Size())) {
				err = &FormatError{"refcount table entry", t.Off, "refcount block offset", fmt.Sprintf("%#x not aligned to %#x or not in the file", t.Entry, g.clusterSize), ErrCorrupt}
			}
			if err != nil {
				if !yield(RefcountRun{Cluster: start}, err) {
					return
				}
				continue
			}
			for at := int64(0); at < g.clusterSize; at += maxSlice {
				b := make([]byte, min(maxSlice, g.clusterSize))
				in := at * 8 / int64(g.refcountBits) // refcounts before this part
				if start+in > last || start+in+int64(len(b))*8/int64(g.refcountBits) <= first {
					continue
				}
				err := d.ctx.Err()
				if err == nil {
					err = readFull(d.dev, b, int64(t.Block())+at)
				}
				if err != nil {
					if !yield(RefcountRun{Cluster: start + in}, fmt.Errorf("qcow2: refcount block at %#x: %w", t.Block(), err)) || d.ctx.Err() != nil {
						return
					}
					continue
				}
				for i := range int64(len(b)) * 8 / int64(g.refcountBits) {
					c := start + in + i
					if c >= first && c <= last && !yield(RefcountRun{c, 1, blockRefcount(b, g.refcountBits, i)}, nil) {
						return
					}
				}
			}
		}
	}
}

// SnapshotEntry is an entry of the snapshot table.
type SnapshotEntry struct {
	Index int64
	Off   int64 // in the file, in bytes
	// Snapshot has at most 1024 bytes of extra data.
	Snapshot
	stored uint32 // bytes of extra data in the file
	end    int64  // of the entry
}

// StoredExtraData returns the bytes of extra data that the entry says it has.
func (e *SnapshotEntry) StoredExtraData() uint32 { return e.stored }

// Snapshots goes through the snapshot table.
func (d *Dump) Snapshots() iter.Seq2[SnapshotEntry, error] {
	return func(yield func(SnapshotEntry, error) bool) {
		n := int64(0)
		for e, err := range snapshotEntries(d.dev, &d.header) {
			if e := d.ctx.Err(); e != nil {
				err = e
			}
			n++
			if !yield(e, err) || err != nil {
				return
			}
		}
		if h := &d.header; n < int64(h.NbSnapshots) {
			yield(SnapshotEntry{Index: n}, &FormatError{"snapshot table", -1, "", fmt.Sprintf("entries from %d to %d are beyond the end of the file", n, h.NbSnapshots-1), ErrCorrupt})
		}
	}
}

// snapshotEntries goes through the entries of a snapshot table that begin in
// the file. What lies beyond its end is zeroes. It ends with an error.
func snapshotEntries(dev blockdev.Reader, h *Header) iter.Seq2[SnapshotEntry, error] {
	return func(yield func(SnapshotEntry, error) bool) {
		head := make([]byte, snapshotHeaderSize)
		start := int64(min(h.SnapshotsOffset, math.MaxInt64))
		pos := start
		for i := range int64(h.NbSnapshots) {
			if pos += -(pos - start) & 7; pos >= dev.Size() {
				return
			}
			e := SnapshotEntry{Index: i, Off: pos}
			err := readFull(dev, head, pos)
			if err == nil {
				e.stored = binary.BigEndian.Uint32(head[36:])
				kept := int64(min(e.stored, maxSnapshotExtraData))
				names := int64(binary.BigEndian.Uint16(head[12:])) + int64(binary.BigEndian.Uint16(head[14:]))
				b := make([]byte, snapshotHeaderSize+kept+names) // at most 40 + 1024 + 2*65535
				e.end = pos + snapshotHeaderSize + int64(e.stored) + names
				if err = readFull(dev, b[:snapshotHeaderSize+kept], pos); err == nil {
					err = readFull(dev, b[snapshotHeaderSize+kept:], e.end-names)
				}
				binary.BigEndian.PutUint32(b[36:], uint32(kept))
				e.Snapshot = parseSnapshot(b, h.Size&^511)
			}
			if err != nil {
				yield(e, fmt.Errorf("qcow2: snapshot table at %#x: %w", pos, err))
				return
			}
			if !yield(e, nil) {
				return
			}
			pos = e.end
		}
	}
}

// BitmapEntry is an entry of the bitmap directory.
type BitmapEntry struct {
	Off int64 // in the file, in bytes
	Bitmap
}

// Bitmaps goes through the bitmap directory, also where the autoclear bit says
// that it is stale. An error comes with the entry that it is of, which is
// the last one if it says nothing about where the next one is.
func (d *Dump) Bitmaps() iter.Seq2[BitmapEntry, error] {
	return func(yield func(BitmapEntry, error) bool) {
		data, ok := d.header.extension(extBitmaps)
		if !ok {
			return
		}
		bad := func(off int64, err error) {
			yield(BitmapEntry{Off: off}, &FormatError{"bitmap directory", off, "", err.Error(), ErrCorrupt})
		}
		if len(data) != bitmapsExtensionSize {
			bad(-1, fmt.Errorf("header extension of %d bytes, expected %d", len(data), bitmapsExtensionSize))
			return
		}
		ext := parseBitmapsExtension(data)
		off := int64(min(ext.DirectoryOffset, math.MaxInt64))
		n := min(ext.DirectorySize, maxBitmapDirectorySize)
		dir, err := readTable(d.dev, off, int64(n))
		if err != nil {
			bad(off, err)
			return
		}
		at := 0
		for i := uint32(0); i < ext.NbBitmaps && at < len(dir); i++ {
			b, n, err := parseBitmap(dir[at:])
			if err != nil {
				bad(off+int64(at), err)
				return
			}
			e := BitmapEntry{off + int64(at), b}
			if err := b.check(&d.geo, int64(min(d.header.Size, math.MaxInt64))&^511); err != nil {
				err = &FormatError{"bitmap directory", e.Off, "", err.Error(), ErrCorrupt}
				if !yield(e, err) {
					return
				}
			} else if !yield(e, nil) {
				return
			}
			at += n
		}
		if uint64(at) != ext.DirectorySize {
			bad(off+int64(at), fmt.Errorf("%d of %d bytes are %d bitmaps", at, ext.DirectorySize, ext.NbBitmaps))
		}
	}
}

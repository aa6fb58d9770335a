package qcow2

import (
	"encoding/binary"
	"fmt"
	"math"
	"slices"
)

// checkDowngrade tells why the image cannot become one of version 2, in the
// order of QEMU (block/qcow2.c, qcow2_downgrade). refcountBits and size are
// those that it will have then.
func (t *txn) checkDowngrade(refcountBits uint, size int64, keepBitmaps bool) error {
	h := &t.header
	if refcountBits != 16 {
		return OptionError("compat=0.10 requires refcount_bits=16")
	}
	if t.im.geo.dataFile {
		return OptionError("Cannot downgrade an image with a data file")
	}
	// Programs of that time do not know the fields for these.
	for _, s := range t.snapshots {
		if s.VMStateSize > math.MaxUint32 || s.DiskSize != uint64(size) {
			return OptionError("Internal snapshots prevent downgrade of image")
		}
	}
	if left := h.IncompatibleFeatures &^ (IncompatCompression | IncompatDirty); left != 0 {
		return optionError("Cannot downgrade an image with incompatible features %#x set", uint64(left))
	}
	if _, ok := h.Bitmaps(); ok && keepBitmaps {
		return OptionError("Cannot downgrade an image with bitmaps")
	}
	if h.CompressionType == CompressionZlib {
		return nil
	}
	// QEMU looks at the active clusters alone, and after the expansion.
	compressed := false
	err := t.eachL1(func(_ int, l1 []uint64) (bool, error) {
		return false, t.eachTable(l1, func(_ int64, b []byte) error {
			for at := 0; at < len(b); at += l2EntrySizeStandard {
				compressed = compressed || b[at]&(oflagCompressed>>56) != 0
			}
			return nil
		})
	})
	if compressed {
		return OptionError("Cannot downgrade an image with zstd compression type and existing compressed clusters")
	}
	return err
}

// downgrade makes the new state one of version 2.
func (t *txn) downgrade(progress func(done, total int64) error) (expansion, error) {
	e := expansion{t: t, seen: make(map[int64]int64), progress: progress}
	e.total = int64(len(t.l1))
	for _, s := range t.snapshots {
		e.total += int64(s.L1Size)
	}
	if err := t.eachL1(e.expand); err != nil {
		return e, err
	}
	if _, ok := t.header.Bitmaps(); ok {
		if err := t.freeBitmaps(); err != nil {
			return e, err
		}
	}
	h := &t.header
	h.Version, h.HeaderLength, h.UnknownFields = 2, 0, nil
	h.IncompatibleFeatures, h.CompatibleFeatures, h.AutoclearFeatures = 0, 0, 0
	h.CompressionType = CompressionZlib
	h.Extensions = slices.DeleteFunc(h.Extensions, func(x Extension) bool { return x.Type == extFeatureNames || x.Type == extBitmaps })
	return e, nil
}

// eachL1 calls f with the active L1 table (i is -1) and with that of each
// snapshot. One that f says it has changed is written anew.
func (t *txn) eachL1(f func(i int, l1 []uint64) (changed bool, err error)) error {
	if _, err := f(-1, t.l1); err != nil {
		return err
	}
	for i := range t.snapshots {
		s := &t.snapshots[i]
		l1, err := t.readL1(int64(s.L1TableOffset), s.L1Size)
		if err != nil {
			return err
		}
		changed, err := f(i, l1)
		if err != nil {
			return err
		}
		if !changed {
			continue
		}
		off, err := t.writeL1(l1)
		if err != nil {
			return err
		}
		if err := t.count(int64(s.L1TableOffset), int64(s.L1Size)*l1EntrySize, -1); err != nil {
			return err
		}
		s.L1TableOffset = uint64(off)
		t.snapshotsChanged = true
	}
	return nil
}

// eachTable calls f with the L2 tables of an L1 table, by their index in it. The
// bytes are valid until f returns.
func (t *txn) eachTable(l1 []uint64, f func(i int64, b []byte) error) error {
	var buf []byte
	for i, entry := range l1 {
		var err error
		if buf, err = t.readL2(buf, entry); err != nil {
			return err
		}
		if entry&l1OffsetMask == 0 {
			continue
		}
		if err := f(int64(i), buf); err != nil {
			return err
		}
	}
	return nil
}

// expansion turns zero clusters into what version 2 knows.
type expansion struct {
	t *txn
	// seen are the tables that several L1 tables have, and what they became.
	seen            map[int64]int64
	done, total     int64 // L1 entries
	progress        func(done, total int64) error
	dropped, filled int64 // zero clusters that became unallocated, or clusters of zeroes
}

// expand expands the zero clusters of an L1 table and tells whether it has
// changed.
func (e *expansion) expand(_ int, l1 []uint64) (changed bool, err error) {
	t, g := e.t, &e.t.im.geo
	var buf []byte
	for i, entry := range l1 {
		e.done++
		if err := e.progress(e.done, e.total); err != nil {
			return false, err
		}
		off := int64(entry & l1OffsetMask)
		if off == 0 {
			continue
		}
		to, ok := e.seen[off]
		if !ok {
			if buf, err = t.readL2(buf, entry); err != nil {
				return false, err
			}
			if to, err = e.table(buf, off, int64(i)<<g.l2Coverage()); err != nil {
				return false, err
			}
		}
		if to == off {
			continue
		}
		if ok {
			if err := t.addRef(to, g.clusterSize, 1); err != nil {
				return false, err
			}
		}
		if err := t.addRef(off, g.clusterSize, -1); err != nil {
			return false, err
		}
		l1[i] = uint64(to) // commit sets the copied flags of the active tables
		changed = true
	}
	return changed, nil
}

// table expands the zero clusters of an L2 table at off and returns where the
// new one lies, or off if there are none. guest is what the table maps first.
func (e *expansion) table(b []byte, off, guest int64) (to int64, err error) {
	t, g := e.t, &e.t.im.geo
	n, err := t.refcount(off >> g.clusterBits)
	if err != nil {
		return 0, err
	}
	if !hasZeroFlag(b) {
		if n > 1 {
			e.seen[off] = off
		}
		return off, nil
	}
	if n == 0 || n > math.MaxInt32 {
		return 0, &FormatError{"l2 table", off, "", fmt.Sprintf("has refcount %d: run check", n), ErrCorrupt}
	}
	paths := int(n) // from L1 tables to each entry
	changed := false
	for at := int64(0); at < int64(len(b)); at += l2EntrySizeStandard {
		entry := binary.BigEndian.Uint64(b[at:])
		typ := g.clusterType(entry)
		if typ != clusterZeroPlain && typ != clusterZeroAlloc {
			continue
		}
		// The place that a cluster has may hold what others read.
		if err := t.addEntryRef(entry, -paths); err != nil {
			return 0, err
		}
		entry, changed = 0, true
		if cluster := guest + at/l2EntrySizeStandard<<g.clusterBits; t.im.backs(cluster) {
			host, err := t.alloc(g.clusterSize)
			if err != nil {
				return 0, err
			}
			if err := t.addRef(host, g.clusterSize, paths-1); err != nil {
				return 0, err
			}
			if err := t.zero(cluster, host, g.clusterSize); err != nil {
				return 0, err
			}
			if entry = uint64(host); paths == 1 {
				entry |= oflagCopied
			}
			e.filled++
		} else {
			e.dropped++
		}
		binary.BigEndian.PutUint64(b[at:], entry)
	}
	to = off
	if changed {
		if to, err = t.writeL2(b); err != nil {
			return 0, err
		}
	}
	if paths > 1 {
		e.seen[off] = to
	}
	return to, nil
}

// hasZeroFlag reports whether an entry of an L2 table may have the zero flag.
func hasZeroFlag(b []byte) bool {
	for at := l2EntrySizeStandard - 1; at < len(b); at += l2EntrySizeStandard {
		if b[at]&oflagZero != 0 {
			return true
		}
	}
	return false
}

package qcow2

import (
	"encoding/binary"
	"fmt"
	"io"

	"qimg/qcow2/blockdev"
	"qimg/qcow2/transfer"
)

// load fills a snapshot from opts.
func (s *SnapshotTxn) load(sn *Snapshot, opts *SnapshotOptions) error {
	if err := s.im.readable(); err != nil {
		return err
	}
	if err := s.share(); err != nil {
		return err
	}
	if err := s.dropVMState(); err != nil {
		return err
	}
	w := &treeWriter{s: s, index: -1, l2: make([]byte, s.im.geo.clusterSize)}
	if opts.Disk != nil {
		sn.DiskSize = uint64(opts.Disk.Size()+sectorSize-1) &^ (sectorSize - 1)
		if s.t.header.Version < 3 && sn.DiskSize != s.t.header.Size&^(sectorSize-1) {
			return fmt.Errorf("qcow2: snapshot of a disk of %d bytes in a version 2 image of %d: %w", sn.DiskSize, s.t.header.Size, ErrUnsupported)
		}
		if err := w.disk(opts.Disk); err != nil {
			return err
		}
		if err := w.flush(); err != nil {
			return err
		}
	} else {
		if err := s.shareTables(1); err != nil {
			return err
		}
		w.l1 = append(w.l1, s.t.l1...)
	}
	if n := s.im.geo.l1Entries(sn.DiskSize); n > maxL1Size/l1EntrySize {
		return fmt.Errorf("qcow2: snapshot of a disk of %d bytes needs %d L1 entries, expected at most %d: %w", sn.DiskSize, n, maxL1Size/l1EntrySize, ErrLimit)
	} else if int(n) > len(w.l1) {
		w.l1 = append(w.l1, make([]uint64, int(n)-len(w.l1))...)
	}
	if opts.VMState != nil {
		n, err := w.stream(opts.VMState, s.t.header.vmStateOffset(sn))
		if err != nil {
			return err
		}
		sn.VMStateSize = uint64(n)
	}
	return s.putL1(sn, w.l1)
}

// dropVMState gives up the vm state that an applied snapshot has left behind the
// disk, as QEMU does once it has saved another.
func (s *SnapshotTxn) dropVMState() error {
	t := s.t
	end := int(s.im.geo.l1Entries(t.header.Size))
	for i := end; i < len(t.l1); i++ {
		if err := s.countTree(t.l1[i], -1); err != nil {
			return err
		}
		t.l1[i] = 0
	}
	t.l1 = t.l1[:min(max(end, 1), len(t.l1))] // an empty table has no place
	return nil
}

// treeWriter makes the tables of a snapshot, in the order of the guest, and
// writes its data.
type treeWriter struct {
	s     *SnapshotTxn
	l1    []uint64
	index int64 // of the L2 table being filled, in l1; -1: none
	l2    []byte
}

// set sets the L2 entry of a cluster.
func (w *treeWriter) set(off int64, entry, bitmap uint64) error {
	g := &w.s.im.geo
	if index := off >> g.l2Coverage(); index != w.index {
		if err := w.flush(); err != nil {
			return err
		}
		w.index = index
	}
	at := (off >> g.clusterBits & (1<<g.l2Bits - 1)) * g.l2EntrySize
	binary.BigEndian.PutUint64(w.l2[at:], entry)
	if g.extended {
		binary.BigEndian.PutUint64(w.l2[at+8:], bitmap)
	}
	return nil
}

// flush writes the L2 table being filled.
func (w *treeWriter) flush() error {
	if w.index < 0 {
		return nil
	}
	if w.index >= maxL1Size/l1EntrySize {
		return fmt.Errorf("qcow2: snapshot needs %d L1 entries, expected at most %d: %w", w.index+1, maxL1Size/l1EntrySize, ErrLimit)
	}
	if n := int(w.index) + 1; n > len(w.l1) {
		w.l1 = append(w.l1, make([]uint64, n-len(w.l1))...)
	}
	off, err := w.s.t.writeL2(w.l2)
	w.l1[w.index] = uint64(off)
	clear(w.l2)
	w.index = -1
	return err
}

// data writes whole clusters.
func (w *treeWriter) data(p []byte, off int64) error {
	g := &w.s.im.geo
	host, err := w.s.t.alloc(int64(len(p)))
	if err != nil {
		return err
	}
	if err := w.s.im.fail(w.s.im.writeHost(p, off, host)); err != nil {
		return err
	}
	for at := int64(0); at < int64(len(p)); at += g.clusterSize {
		if err := w.set(off+at, uint64(host+at), subclusterAllocMask); err != nil {
			return err
		}
	}
	return nil
}

// zero makes a cluster read as zeroes.
func (w *treeWriter) zero(off int64) error {
	h, g := &w.s.t.header, &w.s.im.geo
	switch {
	case h.BackingFile == "":
		return nil
	case g.extended:
		return w.set(off, 0, zeroSubclusters)
	case h.Version >= 3:
		return w.set(off, oflagZero, 0)
	}
	return w.data(make([]byte, g.clusterSize), off)
}

// stream writes what r holds at the guest offset off, and returns how much that
// is.
func (w *treeWriter) stream(r io.Reader, off int64) (n int64, err error) {
	g := &w.s.im.geo
	buf := make([]byte, max(copyBuffer, g.clusterSize))
	for {
		if err := w.s.t.ctx.Err(); err != nil {
			return n, err
		}
		part, err := io.ReadFull(r, buf)
		if part > 0 {
			whole := (int64(part) + g.clusterSize - 1) &^ (g.clusterSize - 1)
			clear(buf[part:whole])
			if err := w.data(buf[:whole], off+n); err != nil {
				return n, err
			}
			n += int64(part)
		}
		switch err {
		case nil:
		case io.EOF, io.ErrUnexpectedEOF:
			return n, w.flush()
		default:
			return n, fmt.Errorf("qcow2: read vm state at offset %d: %w", n, err)
		}
	}
}

// disk writes the content of src. What reads as zeroes gets no place.
func (w *treeWriter) disk(src blockdev.Reader) error {
	g := &w.s.im.geo
	buf := make([]byte, max(copyBuffer, g.clusterSize))
	for off, size := int64(0), src.Size(); off < size; {
		if err := w.s.t.ctx.Err(); err != nil {
			return err
		}
		hole, err := zeroesAt(src, off)
		if err != nil {
			return fmt.Errorf("qcow2: disk of the snapshot at offset %d: %w", off, err)
		}
		if off+hole < size {
			hole &^= g.clusterSize - 1
		}
		if hole > 0 {
			if w.s.t.header.BackingFile == "" {
				off += hole
				continue
			}
			for end := off + hole; off < end; off += g.clusterSize {
				if err := w.zero(off); err != nil {
					return err
				}
			}
			continue
		}
		n := min(int64(len(buf)), size-off)
		if err := readFull(src, buf[:n], off); err != nil {
			return fmt.Errorf("qcow2: disk of the snapshot at offset %d: %w", off, err)
		}
		whole := (n + g.clusterSize - 1) &^ (g.clusterSize - 1)
		clear(buf[n:whole])
		if err := w.clusters(buf[:whole], off); err != nil {
			return err
		}
		off += n
	}
	return nil
}

// zeroesAt returns how many bytes from off on src says to read as zeroes.
func zeroesAt(src blockdev.Reader, off int64) (int64, error) {
	x, ok := src.(blockdev.ExtentReader)
	if !ok {
		return 0, nil
	}
	e, err := x.NextExtent(off)
	if err != nil || !e.Kind.ReadsZero() {
		return 0, err
	}
	return e.Len, nil
}

// clusters writes whole clusters, those of zeroes as such.
func (w *treeWriter) clusters(p []byte, off int64) error {
	size := w.s.im.geo.clusterSize
	for at := int64(0); at < int64(len(p)); {
		end := at
		for end < int64(len(p)) && !transfer.IsZero(p[end:end+size]) {
			end += size
		}
		if end > at {
			if err := w.data(p[at:end], off+at); err != nil {
				return err
			}
			at = end
			continue
		}
		if err := w.zero(off + at); err != nil {
			return err
		}
		at += size
	}
	return nil
}

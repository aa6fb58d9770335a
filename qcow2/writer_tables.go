package qcow2

import (
	"bufio"
	"context"
	"encoding/binary"
	"io"
)

// tableWriter writes tables one behind the other, in large pieces.
type tableWriter struct {
	*bufio.Writer // keeps the first error until Flush
	geo           *geometry
}

const tableBuffer = 1 << 20

func newTableWriter(dst io.Writer, geo *geometry) tableWriter {
	return tableWriter{bufio.NewWriterSize(dst, tableBuffer), geo}
}

// contextWriter writes until ctx ends.
type contextWriter struct {
	ctx context.Context
	w   io.Writer
}

func (w contextWriter) Write(p []byte) (int, error) {
	if err := w.ctx.Err(); err != nil {
		return 0, err
	}
	return w.w.Write(p)
}

func (w tableWriter) uint64(v uint64) {
	if w.Available() < 8 {
		w.Flush()
	}
	w.Write(binary.BigEndian.AppendUint64(w.AvailableBuffer(), v))
}

// zeroes writes n zero bytes.
func (w tableWriter) zeroes(n int64) {
	for n > 0 {
		if w.Available() == 0 && w.Flush() != nil {
			return
		}
		b := w.AvailableBuffer()
		b = b[:min(n, int64(cap(b)))]
		clear(b)
		w.Write(b)
		n -= int64(len(b))
	}
}

// pad fills up the last cluster of a table of n bytes.
func (w tableWriter) pad(n int64) { w.zeroes(w.geo.clusters(n)<<w.geo.clusterBits - n) }

// l2Tables writes the L2 tables of a plan. host gives the place of a planned
// guest cluster; flags are set in all entries, bitmap is the second word of
// extended ones.
func (w tableWriter) l2Tables(p plan, host func(cluster, rank int64) int64, flags, bitmap uint64) {
	entries := int64(1) << w.geo.l2Bits
	table, next := int64(-1), entries // next entry of table
	for _, r := range p {
		for i := range r.n {
			c := r.cluster + i
			if t := c >> w.geo.l2Bits; t != table {
				if _, err := w.Write(nil); err != nil {
					return // an earlier error, which Flush tells
				}
				w.zeroes((entries - next) * w.geo.l2EntrySize)
				table, next = t, 0
			}
			entry := c & (entries - 1)
			w.zeroes((entry - next) * w.geo.l2EntrySize)
			w.uint64(uint64(host(c, r.rank+i)) | flags)
			if w.geo.extended {
				w.uint64(bitmap)
			}
			next = entry + 1
		}
	}
	w.zeroes((entries - next) * w.geo.l2EntrySize)
}

// l1Table writes the L1 table of a plan whose L2 tables lie one behind the
// other from the host cluster first on.
func (w tableWriter) l1Table(p plan, l1Size, first int64) {
	next := int64(0)
	for t := range p.tables(w.geo.l2Bits) {
		w.zeroes((t - next) * l1EntrySize)
		w.uint64(uint64(first<<w.geo.clusterBits) | oflagCopied)
		first++
		next = t + 1
	}
	w.zeroes((l1Size - next) * l1EntrySize)
	w.pad(l1Size * l1EntrySize)
}

// refcounts writes the refcount blocks that have no place yet and the
// refcount table, and returns where the table lies, in clusters, and how many
// it takes. It goes at the host cluster used; placed are the offsets of the
// earlier blocks. block is the first that is written: it has the refcounts of
// the clusters below counted; those from there on have refcount one.
func (w tableWriter) refcounts(used int64, placed []int64, block []byte, counted int64) (at, clusters int64, err error) {
	blocks, clusters, err := w.geo.refcountArea(used, int64(len(placed)))
	if err != nil {
		return 0, 0, err
	}
	total, per := used+blocks+clusters, w.geo.refcountsPerBlock()
	for b := range blocks {
		start := (int64(len(placed)) + b) * per
		for c := max(start, counted); c < min(start+per, total); c++ {
			putRefcount(block, w.geo.refcountBits, c-start, 1)
		}
		if _, err := w.Write(block); err != nil {
			return 0, 0, err
		}
		clear(block)
	}
	for _, off := range placed {
		w.uint64(uint64(off))
	}
	for b := range blocks {
		w.uint64(uint64((used + b) << w.geo.clusterBits))
	}
	w.pad((int64(len(placed)) + blocks) * reftableEntrySize)
	return used + blocks, clusters, nil
}

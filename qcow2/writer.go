package qcow2

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"sync/atomic"

	"qimg/qcow2/blockdev"
)

// ErrNotPlanned: a range was written that the plan of a Writer does not have.
var ErrNotPlanned = errors.New("not in the plan of the image")

// WriterOptions says what image a Writer makes.
type WriterOptions struct {
	FormatOptions
	// Compress stores clusters compressed. It decides how the Writer works:
	// see Writer.
	Compress bool
	// CompressionLevel is 1 for the fastest to MaxCompressionLevel for the
	// smallest clusters; 0 is the default, fast for what it saves. Levels 8 and 9
	// of zstd take 34 MiB for each processor.
	CompressionLevel int
	// Extents are the guest ranges that will be written, as offset and length
	// in bytes: ascending, not overlapping, inside the image. They are rounded
	// out to clusters. What lies outside stays unallocated and reads as zeroes
	// or from the backing file. Nil: nothing is written. The sequence is gone
	// through once, by NewWriter. With a backing file they have to cover whole
	// clusters: the rest of a cluster would hide what is below it.
	Extents iter.Seq2[int64, int64]
	// StoreZeroes stores clusters of zeroes that are given to WriteAt like others.
	StoreZeroes bool
	// InOrder: the disk will be written from its beginning to its end, in place
	// of Extents; see Writer.
	InOrder bool
	// Sync makes Finish sync the device before it writes the header, so that
	// after a crash there is no header of tables that are not there. It is for
	// devices that nobody syncs and then puts in place by a rename, as
	// blockdev.CreateFile does. What Finish has done survives a crash once the
	// device is synced again.
	Sync bool
}

// Writer makes a whole new image in one pass.
//
// Without compression every planned cluster has its place from the start, in
// ascending order, and all tables are on the device when NewWriter returns.
// WriteAt and CopyRange then go straight to the device, at any alignment,
// from any number of goroutines. What is planned and never written reads as
// zeroes.
//
// With compression the place of a cluster depends on the size of those before
// it. WriteAt takes whole clusters (see Granularity), compresses them in the
// goroutine of the caller, and places them in the order of the guest, so that
// the image does not depend on the number of goroutines. A cluster that comes
// before its turn is kept; when 12 MiB are kept the caller has to wait until
// those before it have come. So each goroutine has to take the lowest part of
// the plan that no other has taken, and everything planned has to be written,
// or named by WriteZeroes; else WriteAt waits forever (Abort ends that).
// Clusters of zeroes are not stored, unless StoreZeroes is set; those that do not
// get smaller are stored as they are.
//
// With InOrder there is no plan: what is stored is known only while it is being
// written. All of the disk is named, from its beginning to its end and in whole
// clusters, by WriteAt, WriteSparse, WriteZeroes and Skip; each goroutine takes
// the lowest part that no other has taken. Without compression and encryption
// each of these calls waits until those before it have their places, and then
// writes side by side with them.
//
// With encryption all of that is the same, since what is never written would
// not read as zeroes, but clusters are encrypted, not compressed. Both together
// are refused, as by QEMU.
//
// The device has to read as zeroes. If its size is 0 the Writer gives it the
// size it needs, by Truncate; otherwise it has to be large enough.
//
// An error of WriteAt, WriteZeroes or CopyRange, whatever it is, means that
// something is missing in the image: the Writer keeps it, wakes whoever waits,
// and every later call, Finish too, refuses with an error that matches it. Only
// errors.ErrUnsupported of CopyRange is not one: what it has not copied can be
// written.
//
// Order of writes: tables and data in any order, a sync if WriterOptions.Sync
// says so, the header last, by Finish; until then the first cluster is zero
// and nothing takes the file for an image.
type Writer struct {
	dst      blockdev.Device
	growable bool
	header   Header
	geo      geometry
	plan     plan
	sync     bool // before the header
	inOrder  bool
	done     atomic.Bool
	failed   atomic.Pointer[error] // the first error

	crypt     *crypt // nil: not encrypted
	cryptArea []byte // what is not zero of the encryption header, which lies in the second cluster
	first     int64  // cluster behind the header and the encryption header

	ordered *orderedWriter // nil: every cluster has its place
}

// NewWriter begins an image of size bytes, rounded up to a multiple of 512, on
// dst. Options that do not go together are an OptionError, a plan that needs
// tables larger than QEMU takes is ErrLimit. ctx ends NewWriter while it writes
// tables; it is not used afterwards.
func NewWriter(ctx context.Context, dst blockdev.Device, size int64, opts *WriterOptions) (*Writer, error) {
	if opts == nil {
		opts = &WriterOptions{}
	}
	if opts.Compress && opts.Encrypt.Method != CryptNone {
		return nil, OptionError("Compression and encryption not supported at the same time")
	}
	if opts.InOrder && opts.Extents != nil {
		return nil, OptionError("A plan and writing in order exclude each other")
	}
	h, err := opts.header(size)
	if err != nil {
		return nil, err
	}
	h.addFeatureNames()
	if _, err := h.firstCluster(); err != nil {
		return nil, err
	}
	w, err := newWriter(dst, h, &opts.FormatOptions)
	if err != nil {
		return nil, err
	}
	w.sync, w.inOrder = opts.Sync, opts.InOrder
	w.plan, err = newPlan(opts.Extents, int64(h.Size), w.geo.clusterBits, h.BackingFile != "")
	if err != nil {
		return nil, err
	}
	if opts.Compress || opts.InOrder || w.crypt != nil {
		w.ordered, err = newOrderedWriter(w, opts)
	} else {
		err = w.writeTables(ctx, w.host, w.plan.clusters(), 0, subclusterAllocMask)
	}
	if err != nil {
		return nil, err
	}
	return w, nil
}

// newWriter makes the keys of the image, if it is to be encrypted. h is the
// header for the options.
func newWriter(dst blockdev.Device, h Header, opts *FormatOptions) (*Writer, error) {
	w := &Writer{dst: dst, growable: dst.Size() == 0, header: h, geo: h.geometry(), first: 1}
	luks, err := opts.Encrypt.check()
	if err != nil {
		return nil, err
	}
	if luks != nil {
		w.first += w.geo.clusters(luks.PayloadOffset)
	}
	w.crypt, w.cryptArea, err = opts.Encrypt.create(luks)
	return w, err
}

// Size returns the virtual size in bytes.
func (w *Writer) Size() int64 { return int64(w.header.Size) }

// Granularity returns what offsets and lengths given to WriteAt and
// WriteZeroes have to be multiples of: the cluster size with compression, else
// 1. A write that ends at the end of the image may be shorter.
func (w *Writer) Granularity() int64 {
	if w.ordered != nil {
		return w.geo.clusterSize
	}
	return 1
}

// host returns the place of a planned cluster that is not compressed.
func (w *Writer) host(_, rank int64) int64 { return (w.first + rank) << w.geo.clusterBits }

// writeTables writes the final tables of an image that is not compressed,
// behind the headers and so many clusters of data. flags are set in all L2
// entries, bitmap is their second word if they are extended.
func (w *Writer) writeTables(ctx context.Context, host func(cluster, rank int64) int64, data int64, flags, bitmap uint64) error {
	l2 := w.first + data
	l1 := l2
	for range w.plan.tables(w.geo.l2Bits) {
		l1++
	}
	used := l1 + w.geo.clusters(int64(w.header.L1Size)*l1EntrySize)
	blocks, clusters, err := w.geo.refcountArea(used, 0)
	if err != nil {
		return err
	}
	if err := w.grow(used + blocks + clusters); err != nil {
		return err
	}
	if len(w.cryptArea) > 0 {
		if _, err := w.dst.WriteAt(w.cryptArea, w.geo.clusterSize); err != nil {
			return err
		}
	}
	t := newTableWriter(contextWriter{ctx, io.NewOffsetWriter(w.dst, l2<<w.geo.clusterBits)}, &w.geo)
	t.l2Tables(w.plan, host, oflagCopied|flags, bitmap)
	t.l1Table(w.plan, int64(w.header.L1Size), l2)
	at, clusters, err := t.refcounts(used, nil, make([]byte, w.geo.clusterSize), 0)
	if err != nil {
		return err
	}
	w.setTables(l1, at, clusters)
	return t.Flush()
}

// setTables puts the places of the tables, in clusters, into the header.
func (w *Writer) setTables(l1, reftable, reftableClusters int64) {
	if w.header.L1Size > 0 {
		w.header.L1TableOffset = uint64(l1) << w.geo.clusterBits
	}
	w.header.RefcountTableOffset = uint64(reftable) << w.geo.clusterBits
	w.header.RefcountTableClusters = uint32(reftableClusters) // at most maxReftableSize bytes
}

// grow makes the device hold so many clusters.
func (w *Writer) grow(clusters int64) error {
	size := clusters << w.geo.clusterBits
	if t, ok := w.dst.(blockdev.Truncater); ok && w.growable {
		return t.Truncate(size)
	}
	if have := w.dst.Size(); have < size {
		return fmt.Errorf("qcow2: the image needs %d bytes, the device has %d", size, have)
	}
	return nil
}

// fail keeps the first error and wakes those who wait, since there is nothing
// to wait for any more. The lock of an orderedWriter must not be held.
func (w *Writer) fail(err error) error {
	if err == nil {
		return nil
	}
	first := err
	if w.failed.CompareAndSwap(nil, &first) && w.ordered != nil {
		w.ordered.wake()
	}
	return err
}

// usable returns why nothing can be written any more.
func (w *Writer) usable() error {
	if err := w.failed.Load(); err != nil {
		return fmt.Errorf("qcow2: image cannot be written after an earlier error: %w", *err)
	}
	if w.done.Load() {
		return os.ErrClosed
	}
	return nil
}

// WriteAt writes p to the guest range at off, which has to be planned
// (ErrNotPlanned) and, with compression, to be whole clusters that were not
// written before. It is safe for concurrent use. After Finish the error is
// os.ErrClosed.
func (w *Writer) WriteAt(p []byte, off int64) (int, error) {
	if err := w.usable(); err != nil {
		return 0, err
	}
	n, err := w.write(p, off)
	return n, w.fail(err)
}

func (w *Writer) write(p []byte, off int64) (done int, err error) {
	if err := w.check(off, int64(len(p))); err != nil {
		return 0, err
	}
	if w.ordered != nil {
		return w.ordered.write(p, off)
	}
	for done < len(p) {
		host, n, err := w.locate(off+int64(done), int64(len(p)-done))
		if err != nil {
			return done, err
		}
		m, err := w.dst.WriteAt(p[done:done+int(n)], host)
		done += m
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

// CopyRange implements blockdev.RangeCopier where the device does and there is
// neither compression nor encryption. The range has to be planned. In order it
// has to be whole clusters, and it is copied as a whole or not at all: what the
// device does not take is read and written. It is safe for concurrent use.
func (w *Writer) CopyRange(off int64, src *os.File, srcOff, n int64) (int64, error) {
	if err := w.usable(); err != nil {
		return 0, err
	}
	done, err := w.copyRange(off, src, srcOff, n)
	if errors.Is(err, errors.ErrUnsupported) {
		return done, err
	}
	return done, w.fail(err)
}

func (w *Writer) copyRange(off int64, src *os.File, srcOff, n int64) (done int64, err error) {
	if err := w.check(off, n); err != nil {
		return 0, err
	}
	rc, ok := w.dst.(blockdev.RangeCopier)
	if ok && w.ordered != nil {
		f, file := w.dst.(*blockdev.File)
		ok = file && w.ordered.direct && f.Shares(src)
	}
	if !ok {
		return 0, fmt.Errorf("qcow2: copy by the kernel: %w", errors.ErrUnsupported)
	}
	if w.ordered != nil {
		if err := w.ordered.copyRange(rc, off, src, srcOff, n); err != nil {
			return 0, err
		}
		return n, nil
	}
	for done < n {
		host, part, err := w.locate(off+done, n-done)
		if err != nil {
			return done, err
		}
		m, err := rc.CopyRange(host, src, srcOff+done, part)
		done += m
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

// WriteZeroes makes a planned range read as zeroes. Without compression a
// range that was not written before does so already. It is safe for concurrent
// use.
func (w *Writer) WriteZeroes(off, n int64) error {
	if err := w.usable(); err != nil {
		return err
	}
	return w.fail(w.writeZeroes(off, n))
}

func (w *Writer) writeZeroes(off, n int64) error {
	if err := w.check(off, n); err != nil {
		return err
	}
	if w.ordered != nil {
		return w.ordered.writeNothing(contentZero, off, n)
	}
	for end := off + n; off < end; {
		host, part, err := w.locate(off, end-off)
		if err != nil {
			return err
		}
		if err := blockdev.WriteZeroes(w.dst, host, part); err != nil {
			return err
		}
		off += part
	}
	return nil
}

// DataGranularity returns what offset and length of the data in WriteSparse have
// to be multiples of: Granularity, but the size of a subcluster where there are
// extended L2 entries and clusters are written in order and as they are.
func (w *Writer) DataGranularity() int64 {
	if w.ordered != nil && w.ordered.subclusters {
		return 1 << w.geo.subBits
	}
	return w.Granularity()
}

// WriteSparse implements blockdev.SparseWriter for whole clusters, of the piece;
// for its data see DataGranularity.
func (w *Writer) WriteSparse(p []byte, off int64, data []blockdev.Range) error {
	if err := w.usable(); err != nil {
		return err
	}
	return w.fail(w.writeSparse(p, off, data))
}

func (w *Writer) writeSparse(p []byte, off int64, data []blockdev.Range) error {
	if err := w.check(off, int64(len(p))); err != nil {
		return err
	}
	at, end := off, off+int64(len(p))
	for _, r := range data {
		if r.Off < at || r.Len <= 0 || r.Len > end-r.Off {
			return fmt.Errorf("qcow2: write of %d bytes at %#x: data of %d bytes at %#x is out of order", len(p), off, r.Len, r.Off)
		}
		if err := w.checkUnits(r.Off, r.Len, w.DataGranularity()); err != nil {
			return err
		}
		at = r.Off + r.Len
	}
	if w.ordered != nil {
		return w.ordered.writeSparse(p, off, data)
	}
	at = off
	for _, r := range data {
		if err := w.writeZeroes(at, r.Off-at); err != nil {
			return err
		}
		if _, err := w.write(p[r.Off-off:][:r.Len], r.Off); err != nil {
			return err
		}
		at = r.Off + r.Len
	}
	return w.writeZeroes(at, end-at)
}

// Skip leaves whole clusters unallocated, so that a backing file shows through
// or they read as zeroes. It is for images that are written in order.
func (w *Writer) Skip(off, n int64) error {
	if err := w.usable(); err != nil {
		return err
	}
	return w.fail(w.skip(off, n))
}

func (w *Writer) skip(off, n int64) error {
	if err := w.check(off, n); err != nil {
		return err
	}
	if !w.inOrder {
		return fmt.Errorf("qcow2: skip of %d bytes at %#x: the image has a plan", n, off)
	}
	return w.ordered.writeNothing(contentSkipped, off, n)
}

// check checks a guest range that is to be written.
func (w *Writer) check(off, n int64) error { return w.checkUnits(off, n, w.Granularity()) }

func (w *Writer) checkUnits(off, n, unit int64) error {
	if off < 0 || n < 0 || n > w.Size()-off {
		return fmt.Errorf("qcow2: write of %d bytes at %#x: image ends at %#x: %w", n, off, w.Size(), ErrNotPlanned)
	}
	if mask := unit - 1; off&mask != 0 || n&mask != 0 && off+n != w.Size() {
		return fmt.Errorf("qcow2: write of %d bytes at %#x: expected multiples of %#x", n, off, mask+1)
	}
	return nil
}

// locate returns where the guest range at off lies on the device, and how many
// of its n bytes lie there in a row.
func (w *Writer) locate(off, n int64) (host, part int64, err error) {
	cluster := off >> w.geo.clusterBits
	r, ok := w.plan.find(cluster)
	if !ok {
		return 0, 0, fmt.Errorf("qcow2: write at %#x: %w", off, ErrNotPlanned)
	}
	host = w.host(0, r.rank+cluster-r.cluster) | int64(w.geo.inCluster(uint64(off)))
	return host, min(n, r.end()<<w.geo.clusterBits-off), nil
}

// Abort ends the Writer without an image and wakes whoever waits in WriteAt:
// that and every later call returns an error that matches os.ErrClosed. What
// was written stays on the device. After Finish it does nothing.
func (w *Writer) Abort() {
	if w.done.Swap(true) {
		return
	}
	w.fail(os.ErrClosed)
}

// Finish writes what is left and then the header, unless an earlier call has
// failed: see Writer. No other call may be under way. Planned clusters that were
// never written read as zeroes; with compression they stay unallocated, so that
// a backing file shows through.
func (w *Writer) Finish() error {
	if err := w.usable(); err != nil {
		return err
	}
	w.done.Store(true)
	return w.fail(w.finish())
}

func (w *Writer) finish() error {
	if w.ordered != nil {
		if err := w.ordered.finish(); err != nil {
			return err
		}
	}
	b, err := w.header.firstCluster()
	if err != nil {
		return err // checked by NewWriter
	}
	if w.sync {
		if err := blockdev.Sync(w.dst); err != nil {
			return err
		}
	}
	_, err = w.dst.WriteAt(b, 0)
	return err
}

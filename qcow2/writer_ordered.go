package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"sync"

	"qimg/qcow2/blockdev"
	"qimg/qcow2/transfer"
)

// parkedBytes is how much is kept at most that has come before its turn, in the
// buffers of a compressor.
const parkedBytes = 12 << 20

// growStep is by how much a device grows whose final size is not known yet.
const growStep = 64 << 20

// content is a cluster, or a run of those without data, that waits for its place.
type content struct {
	cluster int64
	n       int64 // clusters
	kind    contentKind
	data    []byte  // of stored and compressed
	buf     *[]byte // of the pool, holds data; nil if data is the caller's
}

type contentKind uint8

const (
	contentSkipped contentKind = iota // stays unallocated
	contentZero                       // reads as zeroes
	contentStored                     // a whole cluster
	contentCompressed
)

// orderedWriter places clusters in the order of the guest.
type orderedWriter struct {
	w *Writer
	c *compressor
	// compress: else clusters are stored as they are, or encrypted.
	compress    bool
	storeZeroes bool
	// direct: clusters are written by the caller, and tables by themselves, in
	// place of all in a row.
	direct bool
	// subclusters: what is zeroes in a cluster, with extended L2 entries, has no
	// place.
	subclusters bool

	mu     sync.Mutex
	turn   sync.Cond         // next has changed, or the Writer has failed
	next   int64             // cluster whose turn it is
	busy   bool              // it is being placed
	parked map[int64]content // by cluster, all above next
	limit  int               // of parked

	// The rest belongs to whoever has set busy.
	alloc    *appender
	blocks   []int64  // places of the refcount blocks that have one
	l1       []uint64 // final entries
	l2       []byte   // the L2 table being filled
	l2Index  int64    // its index in the L1 table; -1: none
	size     int64    // of the device, in clusters
	secret   []byte   // the cluster that is being encrypted
	out      []byte   // bytes to be written at outStart
	outStart int64
}

func newOrderedWriter(w *Writer, opts *WriterOptions) (*orderedWriter, error) {
	c, err := newCompressor(w.header.CompressionType, opts.CompressionLevel, w.geo.clusterSize)
	if err != nil {
		return nil, err
	}
	o := &orderedWriter{
		w: w, c: c, compress: opts.Compress, storeZeroes: opts.StoreZeroes, direct: !opts.Compress && w.crypt == nil,
		parked:  map[int64]content{},
		limit:   int(parkedBytes / c.bufferSize),
		alloc:   newAppender(&w.geo),
		l1:      make([]uint64, w.header.L1Size), // at most maxL1Size bytes, see setSize
		l2:      make([]byte, w.geo.clusterSize),
		l2Index: -1,
	}
	if !o.direct {
		o.out = make([]byte, 0, max(tableBuffer, 2*w.geo.clusterSize))
	}
	o.subclusters = o.direct && w.geo.extended
	o.turn.L = &o.mu
	if !opts.InOrder {
		o.next = w.plan.from(0)
	}
	o.alloc.clusters(w.first - 1)
	for area, off := w.cryptArea, w.geo.clusterSize; len(area) > 0; off += w.geo.clusterSize {
		n := min(int64(len(area)), w.geo.clusterSize)
		if err := o.put(off, area[:n]); err != nil {
			return nil, err
		}
		area = area[n:]
	}
	if w.crypt != nil {
		o.secret = make([]byte, w.geo.clusterSize)
	}
	return o, nil
}

func (o *orderedWriter) wake() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.turn.Broadcast()
}

func (o *orderedWriter) write(p []byte, off int64) (int, error) {
	if o.direct {
		if err := o.writeSparse(p, off, []blockdev.Range{{Off: off, Len: int64(len(p))}}); err != nil {
			return 0, err
		}
		return len(p), nil
	}
	g := &o.w.geo
	done := 0
	for done < len(p) {
		cluster, err := o.planned(off + int64(done))
		if err != nil {
			return done, err
		}
		part := p[done:min(len(p), done+int(g.clusterSize))]
		c, err := o.encode(part)
		if err != nil {
			return done, err
		}
		c.cluster, c.n = cluster, 1
		if err := o.submit(c); err != nil {
			return done, err
		}
		done += len(part)
	}
	return done, nil
}

// writeSparse writes those clusters of p, which lies at off, that data names.
func (o *orderedWriter) writeSparse(p []byte, off int64, data []blockdev.Range) error {
	if !o.direct {
		at := off
		for _, r := range data {
			if err := o.writeNothing(contentZero, at, r.Off-at); err != nil {
				return err
			}
			if _, err := o.write(p[r.Off-off:][:r.Len], r.Off); err != nil {
				return err
			}
			at = r.Off + r.Len
		}
		return o.writeNothing(contentZero, at, off+int64(len(p))-at)
	}
	g := &o.w.geo
	runs, err := o.take(off>>g.clusterBits, g.clusters(int64(len(p))), func() ([]hostRun, error) {
		if o.subclusters {
			return o.placeSubclusters(off, off+int64(len(p)), data)
		}
		var runs []hostRun
		at := off
		for _, r := range data {
			if err := o.placeNothing(contentZero, at>>g.clusterBits, (r.Off-at)>>g.clusterBits); err != nil {
				return nil, err
			}
			var err error
			if runs, err = o.placeData(runs, r); err != nil {
				return nil, err
			}
			at = r.Off + r.Len
		}
		return runs, o.placeNothing(contentZero, at>>g.clusterBits, g.clusters(off+int64(len(p))-at))
	})
	if err != nil {
		return err
	}
	for _, r := range runs {
		if _, err := o.w.dst.WriteAt(p[r.off-off:][:r.n], r.host); err != nil {
			return err
		}
	}
	return nil
}

// copyRange places whole clusters and has the device take them from src.
func (o *orderedWriter) copyRange(rc blockdev.RangeCopier, off int64, src *os.File, srcOff, n int64) error {
	g := &o.w.geo
	runs, err := o.take(off>>g.clusterBits, g.clusters(n), func() ([]hostRun, error) {
		return o.placeData(nil, blockdev.Range{Off: off, Len: n})
	})
	if err != nil {
		return err
	}
	for _, r := range runs {
		at := srcOff + r.off - off
		done, err := rc.CopyRange(r.host, src, at, r.n)
		if errors.Is(err, errors.ErrUnsupported) {
			rest := r.n - done
			_, err = io.CopyN(io.NewOffsetWriter(o.w.dst, r.host+done), io.NewSectionReader(src, at+done, rest), rest)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// hostRun is where n bytes of the guest at off are to be written.
type hostRun struct{ host, off, n int64 }

// take waits until it is the turn of n clusters, and has them placed.
func (o *orderedWriter) take(cluster, n int64, do func() ([]hostRun, error)) ([]hostRun, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for (cluster > o.next || o.busy) && o.w.usable() == nil {
		o.turn.Wait()
	}
	if err := o.w.usable(); err != nil {
		return nil, err
	}
	if cluster < o.next {
		return nil, o.errTwice(cluster)
	}
	o.busy = true
	o.mu.Unlock()
	runs, err := do()
	o.mu.Lock()
	if err != nil {
		return nil, err // busy stays set: nothing is placed any more
	}
	o.busy = false
	o.next += n
	o.turn.Broadcast()
	return runs, nil
}

// placeData gives the clusters of r places, in a row as far as the L2 table
// goes.
func (o *orderedWriter) placeData(runs []hostRun, r blockdev.Range) ([]hostRun, error) {
	g := &o.w.geo
	for at, end := r.Off, r.Off+r.Len; at < end; {
		cluster := at >> g.clusterBits
		next := min(end, (cluster|(1<<g.l2Bits-1)+1)<<g.clusterBits)
		if err := o.beginL2(cluster); err != nil {
			return nil, err
		}
		n := g.clusters(next - at)
		first := o.alloc.clusters(n)
		for i := range n {
			o.setL2(cluster+i, uint64(first+i)<<g.clusterBits|oflagCopied, subclusterAllocMask)
		}
		if err := o.placeBlocks(); err != nil {
			return nil, err
		}
		if err := o.reserve(o.alloc.next); err != nil {
			return nil, err
		}
		runs = append(runs, hostRun{first << g.clusterBits, at, next - at})
		at = next
	}
	return runs, nil
}

// placeSubclusters gives the clusters from off to end that hold some of data
// places, for the subclusters that do.
func (o *orderedWriter) placeSubclusters(off, end int64, data []blockdev.Range) (runs []hostRun, err error) {
	g := &o.w.geo
	for next := off; off < end; off = next {
		next = min(off+g.clusterSize, end)
		cluster := off >> g.clusterBits
		if len(data) == 0 || data[0].Off >= next {
			if err := o.placeNothing(contentZero, cluster, 1); err != nil {
				return nil, err
			}
			continue
		}
		if err := o.beginL2(cluster); err != nil {
			return nil, err
		}
		host := o.alloc.clusters(1) << g.clusterBits
		var bitmap uint64
		for len(data) > 0 && data[0].Off < next {
			lo, hi := max(data[0].Off, off), min(data[0].Off+data[0].Len, next)
			bitmap |= g.subclusters(lo-off, hi-off)
			r := hostRun{host + lo - off, lo, hi - lo}
			if i := len(runs) - 1; i >= 0 && runs[i].host+runs[i].n == r.host && runs[i].off+runs[i].n == r.off {
				runs[i].n += r.n
			} else {
				runs = append(runs, r)
			}
			if data[0].Off+data[0].Len > next {
				break
			}
			data = data[1:]
		}
		if o.w.header.BackingFile != "" {
			bitmap |= (^bitmap & subclusterAllocMask) << 32
		}
		o.setL2(cluster, uint64(host)|oflagCopied, bitmap)
		if err := o.placeBlocks(); err != nil {
			return nil, err
		}
		if err := o.reserve(o.alloc.next); err != nil {
			return nil, err
		}
	}
	return runs, nil
}

// placeNothing stores that clusters are zeroes, where that has to be said.
func (o *orderedWriter) placeNothing(kind contentKind, cluster, n int64) error {
	if n == 0 || kind == contentSkipped || o.w.header.BackingFile == "" {
		return nil
	}
	for i := range n {
		if err := o.place(content{cluster: cluster + i, n: 1, kind: kind}); err != nil {
			return err
		}
	}
	return nil
}

// writeNothing names a range without data.
func (o *orderedWriter) writeNothing(kind contentKind, off, n int64) error {
	if n == 0 {
		return nil
	}
	g := &o.w.geo
	if o.direct {
		_, err := o.take(off>>g.clusterBits, g.clusters(n), func() ([]hostRun, error) {
			return nil, o.placeNothing(kind, off>>g.clusterBits, g.clusters(n))
		})
		return err
	}
	for end := off + n; off < end; {
		cluster, err := o.planned(off)
		if err != nil {
			return err
		}
		part := g.clusters(end - off)
		if r, ok := o.w.plan.find(cluster); ok {
			part = min(part, r.end()-cluster)
		}
		if err := o.submit(content{cluster: cluster, n: part, kind: kind}); err != nil {
			return err
		}
		off += part << g.clusterBits
	}
	return nil
}

// planned returns the cluster at off, which the plan has to have if there is one.
func (o *orderedWriter) planned(off int64) (int64, error) {
	cluster := off >> o.w.geo.clusterBits
	if !o.w.inOrder {
		if _, ok := o.w.plan.find(cluster); !ok {
			return 0, fmt.Errorf("qcow2: write at %#x: %w", off, ErrNotPlanned)
		}
	}
	return cluster, nil
}

// encode makes of p, a cluster or its part before the end of the image, what
// is stored of it.
func (o *orderedWriter) encode(p []byte) (content, error) {
	if !o.storeZeroes && transfer.IsZero(p) {
		return content{kind: contentZero}, nil
	}
	c := content{kind: contentStored, data: p}
	if short := o.w.geo.clusterSize - int64(len(p)); short > 0 {
		c = o.copied(c)
		*c.buf = append(*c.buf, make([]byte, short)...)
		c.data = *c.buf
	}
	if !o.compress {
		return c, nil
	}
	buf, err := o.c.compress(c.data)
	if err != nil || buf == nil {
		return c, err
	}
	o.release(c)
	return content{kind: contentCompressed, data: *buf, buf: buf}, nil
}

// copied returns c with its data in a buffer of the pool.
func (o *orderedWriter) copied(c content) content {
	if c.buf == nil && c.data != nil {
		c.buf = o.c.buffers.Get().(*[]byte)
		*c.buf = append((*c.buf)[:0], c.data...)
		c.data = *c.buf
	}
	return c
}

func (o *orderedWriter) release(c content) {
	if c.buf != nil {
		o.c.buffers.Put(c.buf)
	}
}

// submit places c if it is its turn, and with it all that waited for it; else
// c is parked.
func (o *orderedWriter) submit(c content) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	for c.cluster > o.next && len(o.parked) >= o.limit && o.w.usable() == nil {
		o.turn.Wait()
	}
	if err := o.w.usable(); err != nil {
		return err
	}
	if _, ok := o.parked[c.cluster]; ok || c.cluster < o.next || c.cluster == o.next && o.busy {
		return o.errTwice(c.cluster)
	}
	if c.cluster > o.next {
		o.parked[c.cluster] = o.copied(c)
		return nil
	}
	for ok := true; ok; {
		o.busy = true
		o.mu.Unlock()
		err := o.placeRun(c)
		o.mu.Lock()
		if err != nil {
			return err // busy stays set: nothing is placed any more
		}
		o.busy = false
		o.next += c.n
		if !o.w.inOrder {
			o.next = o.w.plan.from(o.next)
		}
		c, ok = o.parked[o.next]
		delete(o.parked, o.next)
		o.turn.Broadcast()
	}
	return nil
}

func (o *orderedWriter) errTwice(cluster int64) error {
	return fmt.Errorf("qcow2: cluster at %#x written twice", cluster<<o.w.geo.clusterBits)
}

// placeRun stores what was submitted. It comes here in the order of the guest.
func (o *orderedWriter) placeRun(c content) error {
	defer o.release(c)
	if c.data == nil {
		return o.placeNothing(c.kind, c.cluster, c.n)
	}
	return o.place(c)
}

// place stores a cluster.
func (o *orderedWriter) place(c content) error {
	g := &o.w.geo
	if err := o.beginL2(c.cluster); err != nil {
		return err
	}
	var entry, bitmap uint64
	switch {
	case c.kind == contentZero && g.extended:
		bitmap = zeroSubclusters
	case c.kind == contentZero && o.w.header.Version >= 3:
		entry = oflagZero
	case c.kind == contentCompressed:
		n := int64(len(c.data))
		off := o.alloc.bytes(n)
		var err error
		if entry, err = g.compressedEntry(off, n); err != nil {
			return err
		}
		if err := o.put(off, c.data); err != nil {
			return err
		}
	default:
		if c.data == nil { // version 2 has no other zeroes over a backing file
			c.data = make([]byte, g.clusterSize)
		}
		off := o.alloc.clusters(1) << g.clusterBits
		entry, bitmap = uint64(off)|oflagCopied, subclusterAllocMask
		if o.w.crypt != nil {
			copy(o.secret, c.data) // which can be the caller's
			c.data = o.secret
			if err := o.w.crypt.encrypt(c.data, c.cluster<<g.clusterBits, off); err != nil {
				return err
			}
		}
		if err := o.put(off, c.data); err != nil {
			return err
		}
	}
	o.setL2(c.cluster, entry, bitmap)
	return o.placeBlocks()
}

// beginL2 stores the L2 table that was filled if a cluster lies in another.
func (o *orderedWriter) beginL2(cluster int64) error {
	t := cluster >> o.w.geo.l2Bits
	if t == o.l2Index {
		return nil
	}
	err := o.placeL2()
	o.l2Index = t
	return err
}

func (o *orderedWriter) setL2(cluster int64, entry, bitmap uint64) {
	g := &o.w.geo
	at := o.l2[cluster&(1<<g.l2Bits-1)*g.l2EntrySize:]
	binary.BigEndian.PutUint64(at, entry)
	if g.extended {
		binary.BigEndian.PutUint64(at[8:], bitmap)
	}
}

// placeL2 stores the L2 table that was filled.
func (o *orderedWriter) placeL2() error {
	if o.l2Index < 0 {
		return nil
	}
	off := o.alloc.clusters(1) << o.w.geo.clusterBits
	o.l1[o.l2Index] = uint64(off) | oflagCopied
	err := o.put(off, o.l2)
	clear(o.l2)
	return err
}

// placeBlocks stores the refcount blocks that are final.
func (o *orderedWriter) placeBlocks() error {
	a := o.alloc
	for len(a.full) > 0 {
		block := a.full[0]
		a.full = a.full[1:]
		off := a.clusters(1) << o.w.geo.clusterBits
		o.blocks = append(o.blocks, off)
		if err := o.put(off, block); err != nil {
			return err
		}
	}
	return nil
}

// put writes p, at most a cluster, at off. Bytes that nobody puts are zero.
func (o *orderedWriter) put(off int64, p []byte) error {
	if o.direct {
		if err := o.reserve(o.w.geo.clusters(off + int64(len(p)))); err != nil {
			return err
		}
		_, err := o.w.dst.WriteAt(p, off)
		return err
	}
	end := off + int64(len(p)) - o.outStart
	switch {
	case off < o.outStart: // a cluster left with room is gone on with
		_, err := o.w.dst.WriteAt(p, off)
		return err
	case end > int64(cap(o.out)):
		if err := o.flush(); err != nil {
			return err
		}
		o.outStart, end = off, int64(len(p))
	}
	if n := int64(len(o.out)); end > n {
		o.out = o.out[:end]
		clear(o.out[n:])
	}
	copy(o.out[off-o.outStart:], p)
	return nil
}

func (o *orderedWriter) flush() error {
	if len(o.out) == 0 {
		return nil
	}
	if err := o.reserve(o.w.geo.clusters(o.outStart + int64(len(o.out)))); err != nil {
		return err
	}
	_, err := o.w.dst.WriteAt(o.out, o.outStart)
	o.out = o.out[:0]
	return err
}

// reserve makes the device hold so many clusters.
func (o *orderedWriter) reserve(clusters int64) error {
	if clusters <= o.size {
		return nil
	}
	if o.w.growable {
		clusters += growStep >> o.w.geo.clusterBits
	}
	if err := o.w.grow(clusters); err != nil {
		return err
	}
	o.size = clusters
	return nil
}

// finish stores what is parked and the tables.
func (o *orderedWriter) finish() error {
	if o.w.inOrder && o.next < o.w.geo.clusters(o.w.Size()) {
		return fmt.Errorf("qcow2: nothing was written from %#x on: %w", o.next<<o.w.geo.clusterBits, ErrNotPlanned)
	}
	for _, cluster := range slices.Sorted(maps.Keys(o.parked)) {
		if cluster < o.next {
			return o.errTwice(cluster)
		}
		if err := o.placeRun(o.parked[cluster]); err != nil {
			return err
		}
	}
	if err := o.placeL2(); err != nil {
		return err
	}
	g := &o.w.geo
	n := g.clusters(int64(len(o.l1)) * l1EntrySize)
	l1 := o.alloc.clusters(n)
	table := o.l2 // no longer needed
	for i := range n {
		clear(table)
		entries := o.l1[i*g.clusterSize/l1EntrySize:]
		for j, e := range entries[:min(int64(len(entries)), g.clusterSize/l1EntrySize)] {
			binary.BigEndian.PutUint64(table[j*l1EntrySize:], e)
		}
		if err := o.put((l1+i)<<g.clusterBits, table); err != nil {
			return err
		}
	}
	if err := o.placeBlocks(); err != nil {
		return err
	}
	if err := o.flush(); err != nil {
		return err
	}
	used := o.alloc.next
	blocks, clusters, err := g.refcountArea(used, int64(len(o.blocks)))
	if err != nil {
		return err
	}
	if err := o.w.grow(used + blocks + clusters); err != nil {
		return err
	}
	t := newTableWriter(io.NewOffsetWriter(o.w.dst, used<<g.clusterBits), g)
	at, clusters, err := t.refcounts(used, o.blocks, o.alloc.block, used)
	if err != nil {
		return err
	}
	o.w.setTables(l1, at, clusters)
	return t.Flush()
}

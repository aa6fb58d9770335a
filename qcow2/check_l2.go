package qcow2

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"runtime"
	"slices"
	"sync"
)

// l2Visit is an L2 table with the number of L1 entries that point at it, of
// all L1 tables and of the active one.
type l2Visit struct {
	off         int64
	all, active int64
	hole        bool // nothing is in it
}

// l2Visits collects visits. Those of one table are put together from time to
// time, so that it stays in proportion to the tables that there are.
type l2Visits struct {
	list    []l2Visit
	compact int // length at which to put together
}

func (v *l2Visits) add(x l2Visit) {
	if len(v.list) >= max(v.compact, 1<<16) {
		v.merge()
		v.compact = 2 * len(v.list)
	}
	v.list = appendDoubling(v.list, x)
}

// appendDoubling appends to a long list with less copying than append has.
func appendDoubling[T any](list []T, x T) []T {
	if len(list) == cap(list) {
		list = append(make([]T, 0, max(2*len(list), 64)), list...)
	}
	return append(list, x)
}

func (v *l2Visits) merge() {
	slices.SortFunc(v.list, func(a, b l2Visit) int { return cmp.Compare(a.off, b.off) })
	n := 0
	for _, x := range v.list {
		if n > 0 && v.list[n-1].off == x.off {
			v.list[n-1].all += x.all
			v.list[n-1].active += x.active
			continue
		}
		v.list[n] = x
		n++
	}
	v.list = v.list[:n]
}

// l2Job is a part of an L2 table, or some whole ones, on its way through the
// goroutines that read and parse them.
type l2Job struct {
	visits []l2Visit
	from   int64  // byte in the table that b begins with; 0 for whole ones
	size   int64  // bytes of each table that are in b
	b      []byte // a part of each of visits, in order
	err    error
	done   chan struct{}

	// What parseL2 found.
	refs                           []l2Ref
	findings                       []Finding
	active, compressed, fragmented int64 // clusters
	first, next                    int64 // place of the first cluster, -1 without any; end of the last one, 0 without any
	copiedBad                      bool  // a copied flag is missing in an image with an external data file
}

// l2Ref is a reference to n bytes at off, or to each of n clusters, from L2
// entries in a row that k L1 entries name.
type l2Ref struct {
	off, n, k int64
	findings  int32 // of the job, that come before it
	mark      mark
	clusters  bool
}

// at returns the table of byte i of b, and the place in it.
func (j *l2Job) at(i int, g *geometry) (v *l2Visit, at int64) {
	return &j.visits[int64(i)/j.size], j.from + int64(i)%j.size
}

// maxL2Workers bounds the goroutines of a check.
const maxL2Workers = 8

// eachL2 reads all L2 tables, in parts of 64 KiB at most, calls parse for each
// part, on several goroutines, and then apply for each in order.
func (c *checker) eachL2(parse func(*l2Job), apply func(*l2Job) error) error {
	workers := min(runtime.GOMAXPROCS(0), maxL2Workers)
	slots := make([]l2Job, 3*workers)
	jobs := make(chan *l2Job, len(slots))
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for j := range jobs {
				if j.err = c.readJob(j); j.err == nil {
					parse(j)
				}
				j.done <- struct{}{}
			}
		})
	}
	defer wg.Wait()
	defer close(jobs)
	finish := func(j *l2Job) error {
		<-j.done
		if j.err != nil {
			return j.err
		}
		c.progress(int64(len(j.b)))
		return apply(j)
	}
	started := 0
	start := func(visits []l2Visit, from, size int64) error {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		j := &slots[started%len(slots)]
		if started >= len(slots) {
			if err := finish(j); err != nil {
				return err
			}
		} else {
			j.b, j.done = make([]byte, 0, maxSlice), make(chan struct{}, 1)
		}
		j.visits, j.from, j.size, j.b = visits, from, size, j.b[:int64(len(visits))*size]
		started++
		jobs <- j
		return nil
	}
	table := c.im.geo.clusterSize
	most := int(max(1, maxSlice/table)) // tables of a job
	for list := c.visits.list; len(list) > 0; {
		n := 0
		for n < len(list) && n < most && !list[n].hole {
			n++
		}
		for from := int64(0); n > 0 && from < table; from += maxSlice {
			if err := start(list[:n], from, min(table, maxSlice)); err != nil {
				return err
			}
		}
		list = list[max(1, n):]
	}
	for i := max(0, started-len(slots)); i < started; i++ {
		if err := finish(&slots[i%len(slots)]); err != nil {
			return err
		}
	}
	return nil
}

// readJob fills b. Tables in a row are read at once.
func (c *checker) readJob(j *l2Job) error {
	for i := 0; i < len(j.visits); {
		n := 1
		for i+n < len(j.visits) && j.from == 0 && j.visits[i+n].off == j.visits[i].off+int64(n)*j.size {
			n++
		}
		off := j.visits[i].off
		if err := readFull(c.im.dev, j.b[int64(i)*j.size:int64(i+n)*j.size], off+j.from); err != nil {
			return fmt.Errorf("qcow2: check: l2 table at %#x: %w", off, err)
		}
		i += n
	}
	return nil
}

// parseL2 checks the entries of a job and collects what they refer to. It is
// called on several goroutines.
func (c *checker) parseL2(j *l2Job) {
	j.refs, j.findings = j.refs[:0], j.findings[:0]
	j.active, j.compressed, j.fragmented, j.first, j.copiedBad = 0, 0, 0, -1, false
	for i := range j.visits {
		j.next = 0
		c.parseTable(j, &j.visits[i], j.b[int64(i)*j.size:int64(i+1)*j.size])
	}
}

// refer notes a reference to n bytes at off, or to n clusters.
func (j *l2Job) refer(off, n int64, v *l2Visit, m mark, clusters bool) {
	if v.active == 0 {
		m = 0
	}
	j.refs = append(j.refs, l2Ref{off, n, v.all, int32(len(j.findings)), m, clusters})
}

// cluster counts a guest cluster at off that is not compressed, for qemu-img's
// figure of fragmentation.
func (j *l2Job) cluster(v *l2Visit, off int64) {
	j.active += v.active
	if j.next != 0 && off != j.next {
		j.fragmented += v.active
	}
	if j.first < 0 {
		j.first = off
	}
}

// parseTable does what parseL2 does for a part of one table.
func (c *checker) parseTable(j *l2Job, v *l2Visit, b []byte) {
	g := &c.im.geo
	simple := !g.extended && !g.dataFile
	for i := 0; i < len(b); i += int(g.l2EntrySize) {
		entry := binary.BigEndian.Uint64(b[i:])
		if off := int64(entry & l2OffsetMask); simple && entry&^(oflagCopied|l2OffsetMask) == 0 && g.inCluster(uint64(off)) == 0 && off < 1<<55 {
			// A plain cluster, or none. Most have the next one behind them.
			if off == 0 {
				continue
			}
			n := 1
			for next := entry + uint64(g.clusterSize); i+8 < len(b) && binary.BigEndian.Uint64(b[i+8:]) == next; next += uint64(g.clusterSize) {
				n++
				i += 8
			}
			j.cluster(v, off)
			j.active += v.active * int64(n-1)
			j.next = off + int64(n)<<g.clusterBits
			j.refer(off, int64(n), v, copiedMark(entry), true)
			continue
		}
		if entry, bitmap := g.entryIn(b[i:]); entry|bitmap != 0 {
			c.parseEntry(j, v, j.from+int64(i), entry, bitmap)
		}
	}
}

// holdsData reports whether an entry of a cluster that is neither compressed
// nor unallocated says that there is guest data in it.
func (g *geometry) holdsData(entry, bitmap uint64) bool {
	if g.extended {
		return bitmap&subclusterAllocMask != 0
	}
	return entry&oflagZero == 0
}

// zeroVersion2 reports whether an entry has the zero flag, which version 2 does
// not know.
func (c *checker) zeroVersion2(entry uint64) bool {
	return c.im.header.Version < 3 && entry&oflagZero != 0 && entry&oflagCompressed == 0
}

// becomesZero reports whether a repair takes the cluster from an entry, which
// holds no data.
func (c *checker) becomesZero(entry, bitmap uint64) bool {
	g := &c.im.geo
	if c.fix == nil || !c.fix.all || entry&oflagCompressed != 0 {
		return false
	}
	return c.zeroVersion2(entry) || g.inCluster(entry&l2OffsetMask) != 0 && !g.holdsData(entry, bitmap)
}

func copiedMark(entry uint64) mark {
	if entry&oflagCopied != 0 {
		return markCopied
	}
	return markPlain
}

// parseEntry does what parseL2 does for the entry at byte at of its table.
func (c *checker) parseEntry(j *l2Job, v *l2Visit, at int64, entry, bitmap uint64) {
	g := &c.im.geo
	bad := func(kind FindingKind) {
		j.findings = append(j.findings, Finding{Kind: kind, Off: v.off + at, Index: at / g.l2EntrySize, Value: entry, Count: v.all})
	}
	typ := g.clusterType(entry)
	if typ != clusterCompressed && entry&l2ReservedMask != 0 {
		bad(L2Reserved)
	}
	if c.zeroVersion2(entry) {
		bad(ZeroFlagVersion2)
	}
	switch typ {
	case clusterCompressed:
		if entry&oflagCopied != 0 {
			bad(CompressedCopied)
		}
		if g.dataFile {
			bad(CompressedDataFile)
			return
		}
		if bitmap != 0 {
			bad(CompressedSubclusters)
			return
		}
		off, n := g.compressed(entry)
		j.refer(off, n, v, 0, false)
		j.active += v.active
		j.compressed += v.active
		j.fragmented += v.active
	case clusterZeroAlloc, clusterNormal:
		off := int64(entry & l2OffsetMask)
		if bitmap>>32&bitmap != 0 {
			bad(SubclustersContradict)
		}
		m := copiedMark(entry)
		if g.inCluster(uint64(off)) != 0 {
			m = markCopied | markPlain // it is looked at again
			if g.holdsData(entry, bitmap) {
				bad(DataUnaligned)
			} else {
				bad(PreallocatedUnaligned)
			}
		}
		if c.becomesZero(entry, bitmap) {
			return
		}
		j.cluster(v, off)
		j.next = off + g.clusterSize
		if g.dataFile {
			j.copiedBad = j.copiedBad || v.active > 0 && m != markCopied
		} else {
			j.refer(off, g.clusterSize, v, m, false)
		}
	case clusterUnallocated:
		if bitmap&subclusterAllocMask != 0 {
			bad(SubclustersUnallocated)
		}
	}
}

// countL2 counts what parseL2 found.
func (c *checker) countL2(j *l2Job) error {
	told := 0
	tell := func(n int) {
		for ; told < n; told++ {
			c.found(j.findings[told])
		}
	}
	for _, r := range j.refs {
		tell(int(r.findings))
		if r.clusters {
			c.referClusters(r.off, r.n, r.k, r.mark)
		} else {
			c.refer(r.off, r.n, r.k, r.mark)
		}
	}
	tell(len(j.findings))
	c.res.AllocatedClusters += j.active
	c.res.CompressedClusters += j.compressed
	c.res.FragmentedClusters += j.fragmented
	c.copiedBad = c.copiedBad || j.copiedBad
	if j.from > 0 && c.next != 0 && j.first >= 0 && j.first != c.next {
		c.res.FragmentedClusters += j.visits[0].active
	}
	if j.from == 0 || j.next != 0 {
		c.next = j.next
	}
	return nil
}

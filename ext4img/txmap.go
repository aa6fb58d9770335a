package ext4img

import (
	"fmt"
	"slices"
)

// sectors is how many units of i_blocks a cluster has.
func (s *Superblock) sectorsPerCluster() int64 { return int64(s.ClusterSize / 512) }

// goal returns where a new block of an inode is to lie: behind another, or in
// the inode's group.
func (t *Tx) goal(n *Inode, behind int64) int64 {
	if behind > 0 {
		return behind + 1
	}
	s := t.sb()
	return s.groupStart(int64(n.Ino-1) / int64(s.InodesPerGroup))
}

// allocMeta allocates a block of zeroes, for what maps an inode's content or
// belongs to it otherwise.
func (t *Tx) allocMeta(n *Inode, behind int64) (int64, error) {
	block, _, err := t.allocBlocks(t.goal(n, behind), 1)
	if err != nil {
		return 0, err
	}
	t.fresh(block)
	n.Blocks += t.sb().sectorsPerCluster()
	t.dirty(n)
	return block, t.checkBlocks(n)
}

// checkBlocks returns an error for more blocks than i_blocks can count.
func (t *Tx) checkBlocks(n *Inode) error {
	if t.sb().ROCompat&ROCompatHugeFile == 0 && n.Blocks >= 1<<32 {
		return fmt.Errorf("ext4: inode %d: %d blocks of 512 bytes without the huge_file feature: %w", n.Ino, n.Blocks, ErrTooLarge)
	}
	return nil
}

// freeMeta frees a block of an inode that allocMeta has allocated.
func (t *Tx) freeMeta(n *Inode, block int64) error {
	n.Blocks -= t.sb().sectorsPerCluster()
	t.dirty(n)
	return t.freeBlocks(block, 1)
}

// appendBlock adds a block of zeroes to the end of a directory, or of another
// file that holds metadata, whose size is a whole number of blocks: allocated,
// mapped, and counted in i_size and i_blocks. It is fresh.
func (t *Tx) appendBlock(n *Inode) (logical, physical int64, err error) {
	bs := int64(t.sb().BlockSize)
	if n.Size%bs != 0 {
		return 0, 0, place{"inode", n.Ino, -1}.corrupt("i_size", "%d, expected a multiple of %d", n.Size, bs)
	}
	logical = n.Size / bs
	if physical, err = t.mapNew(n, logical); err != nil {
		return 0, 0, err
	}
	t.fresh(physical)
	n.Size += bs
	t.dirty(n)
	return logical, physical, nil
}

// dirBlock returns a block of a directory, to be changed, and where it lies.
// Where there is no journal a block that is in use is left as it is, and
// another takes its place, so that a crash leaves one of them.
func (t *Tx) dirBlock(n *Inode, logical int64) (b []byte, physical int64, err error) {
	stored, physical, err := t.fs.dirBlockAt(n, logical)
	if err != nil {
		return nil, 0, err
	}
	if s := t.staged[physical]; t.e.journal != nil || s != nil && s.fresh || t.sb().clusterRatio() > 1 {
		b, err = t.edit(physical)
		return b, physical, err
	}
	stored = slices.Clone(stored)
	if err := t.unmap(n, logical, logical+1); err != nil {
		return nil, 0, err
	}
	if physical, err = t.mapNew(n, logical); err != nil {
		return nil, 0, err
	}
	b = t.fresh(physical)
	copy(b, stored)
	return b, physical, nil
}

// mapNew makes a logical block that is a hole lead to a block that is not in
// use: a new one or, with bigalloc, one of a cluster that the inode has.
func (t *Tx) mapNew(n *Inode, logical int64) (int64, error) {
	ratio := t.sb().clusterRatio()
	if ratio > 1 {
		first := logical - logical%ratio
		base, err := t.clusterOf(n, first)
		if err != nil {
			return 0, err
		}
		if base != 0 {
			physical := base + logical - first
			return physical, t.mapRun(n, extent{logical: logical, physical: physical, len: 1})
		}
	}
	behind, err := t.before1(n, logical)
	if err != nil {
		return 0, err
	}
	start, _, err := t.allocBlocks(t.goal(n, behind), 1)
	if err != nil {
		return 0, err
	}
	n.Blocks += t.sb().sectorsPerCluster()
	physical := start + logical%ratio
	if err := t.mapRun(n, extent{logical: logical, physical: physical, len: 1}); err != nil {
		return 0, err
	}
	return physical, t.checkBlocks(n)
}

// before1 returns where the block before a logical one lies; 0: nowhere.
func (t *Tx) before1(n *Inode, logical int64) (int64, error) {
	if logical == 0 {
		return 0, nil
	}
	m, err := t.fs.mapping(n, logical-1)
	if err != nil {
		return 0, err
	}
	return m.at(logical - 1).physical, nil
}

// clusterOf returns the first block of the cluster that the logical blocks
// from first on, as many as a cluster has, lie in; 0 if none of them is mapped.
func (t *Tx) clusterOf(n *Inode, first int64) (int64, error) {
	base := int64(0)
	err := t.eachMapped(n, first, first+t.sb().clusterRatio(), func(e extent) error {
		b := e.physical - (e.logical - first)
		if base == 0 && b > 0 && (b-t.sb().FirstDataBlock)%t.sb().clusterRatio() == 0 {
			base = b
		} else if b != base {
			return place{"extent tree", n.Ino, -1}.corrupt("", "logical blocks from %d on do not lie in one cluster", first)
		}
		return nil
	})
	return base, err
}

// eachMapped calls fn with the extents of the logical blocks from from to to.
func (t *Tx) eachMapped(n *Inode, from, to int64, fn func(extent) error) error {
	for from < to {
		m, err := t.fs.mapping(n, from)
		if err != nil {
			return err
		}
		for from < min(m.to, to) {
			e := m.at(from)
			e.len = min(e.len, to-from)
			if e.physical != 0 {
				if err := fn(e); err != nil {
					return err
				}
			}
			from += e.len
		}
	}
	return nil
}

// mapRun makes logical blocks that are a hole lead to a run of blocks.
func (t *Tx) mapRun(n *Inode, e extent) error {
	if e.logical+e.len >= maxLogical {
		return fmt.Errorf("ext4: inode %d: logical block %d: %w", n.Ino, e.logical+e.len, ErrTooLarge)
	}
	if n.Flags&extentsFl == 0 {
		return t.insertPointers(n, e)
	}
	for e.len > 0 {
		part := e
		part.len = min(part.len, extentMaxLen)
		if err := t.insertExtent(n, part); err != nil {
			return err
		}
		e.logical += part.len
		e.physical += part.len
		e.len -= part.len
	}
	return nil
}

// unmap makes a hole of the logical blocks from from to to, and frees the
// clusters that no others lie in.
func (t *Tx) unmap(n *Inode, from, to int64) error {
	if from >= to {
		return nil
	}
	u := unmapper{t: t, n: n}
	var err error
	if n.Flags&extentsFl == 0 {
		err = t.removePointers(n, from, to, u.add)
	} else {
		err = t.removeExtents(n, from, to, u.add)
	}
	if err == nil {
		err = u.free()
	}
	t.dirty(n)
	return err
}

// unmapper frees what is taken out of a map.
type unmapper struct {
	t    *Tx
	n    *Inode
	list []extent // that were not freed yet
}

// maxUnmapped bounds the extents that are kept until the map is as it will be,
// which has to be known for clusters of several blocks alone.
const maxUnmapped = 1 << 20

func (u *unmapper) add(e extent) error {
	if k := len(u.list); k > 0 {
		if last := &u.list[k-1]; last.logical+last.len == e.logical && last.physical+last.len == e.physical {
			last.len += e.len
			return nil
		}
		if u.t.sb().clusterRatio() == 1 {
			if err := u.free(); err != nil {
				return err
			}
		} else if k == maxUnmapped {
			return place{"extent tree", u.n.Ino, -1}.unsupported("", "has more than %d extents", maxUnmapped)
		}
	}
	u.list = append(u.list, e)
	return nil
}

func (u *unmapper) free() error {
	t, s := u.t, u.t.sb()
	ratio, base := s.clusterRatio(), s.FirstDataBlock
	last := int64(-1) // the cluster that was looked at last
	for _, e := range u.list {
		lo, hi := (e.physical-base)/ratio, (e.physical+e.len-1-base)/ratio+1 // clusters
		first := e.logical - (e.physical-base)%ratio                         // logical block of cluster lo
		if ratio > 1 {
			// Only the first and the last cluster can have blocks that stay.
			if lo == last {
				lo, first = lo+1, first+ratio
			} else if stays, err := t.clusterOf(u.n, first); err != nil {
				return err
			} else if stays != 0 {
				lo, first = lo+1, first+ratio
			}
			last = hi - 1
			if lo < hi {
				if stays, err := t.clusterOf(u.n, first+(hi-1-lo)*ratio); err != nil {
					return err
				} else if stays != 0 {
					hi--
				}
			}
		}
		if lo >= hi {
			continue
		}
		u.n.Blocks -= (hi - lo) * s.sectorsPerCluster()
		start := base + lo*ratio
		if err := t.freeBlocks(start, min((hi-lo)*ratio, s.BlocksCount-start)); err != nil {
			return err
		}
	}
	u.list = u.list[:0]
	return nil
}

// claim makes the logical blocks from from to to lead to blocks that were free
// before the transaction, where whatever the caller writes next becomes part
// of the file with the commit. What their clusters hold besides is copied.
func (t *Tx) claim(n *Inode, from, to int64) error {
	s := t.sb()
	ratio := s.clusterRatio()
	for at := from - from%ratio; at < to; {
		r, isNew, err := t.claimRun(n, at, ceilDiv(to, ratio)*ratio)
		if err != nil {
			return err
		}
		lo, hi := max(r.start, from), min(r.end, to)
		switch {
		case isNew && ratio == 1:
		case isNew:
			err = t.fillCluster(n, r.start, lo, hi)
		default:
			err = t.move(n, r, lo, hi)
		}
		if err != nil {
			return err
		}
		at = r.end
	}
	return nil
}

// claimRun returns the logical blocks from a cluster on, at most to end, that
// lie in new blocks, or those that do not.
func (t *Tx) claimRun(n *Inode, at, end int64) (r run, isNew bool, err error) {
	ratio := t.sb().clusterRatio()
	r = run{at, at}
	for r.end < end {
		isNewHere, step := false, ratio
		if ratio > 1 {
			base, err := t.clusterOf(n, r.end)
			if err != nil {
				return r, false, err
			}
			if base != 0 {
				if isNewHere, err = t.isNew(base); err != nil {
					return r, false, err
				}
			}
		} else {
			m, err := t.fs.mapping(n, r.end)
			if err != nil {
				return r, false, err
			}
			e := m.at(r.end)
			step = min(e.len, end-r.end)
			if e.physical != 0 {
				if isNewHere, err = t.isNew(e.physical); err != nil {
					return r, false, err
				}
				isNewHere = isNewHere && !e.unwritten
				for k := int64(1); k < step; k++ {
					same, err := t.isNew(e.physical + k)
					if err != nil {
						return r, false, err
					}
					if (same && !e.unwritten) != isNewHere {
						step = k
					}
				}
			}
		}
		if r.end > at && isNewHere != isNew {
			return r, isNew, nil
		}
		isNew = isNewHere
		r.end += step
		if isNew && ratio > 1 {
			return r, isNew, nil // one by one
		}
	}
	return r, isNew, nil
}

// fillCluster maps what is a hole of the logical blocks from lo to hi of a
// cluster that the inode has.
func (t *Tx) fillCluster(n *Inode, first, lo, hi int64) error {
	base, err := t.clusterOf(n, first)
	if err != nil {
		return err
	}
	var holes []run
	at := lo
	if err := t.eachMapped(n, lo, hi, func(e extent) error {
		if e.logical > at {
			holes = append(holes, run{at, e.logical})
		}
		if at = e.logical + e.len; e.unwritten {
			holes = append(holes, run{e.logical, at})
		}
		return nil
	}); err != nil {
		return err
	}
	if at < hi {
		holes = append(holes, run{at, hi})
	}
	for _, h := range holes {
		if err := t.removeUnwritten(n, h); err != nil {
			return err
		}
		if err := t.mapRun(n, extent{logical: h.start, physical: base + h.start - first, len: h.len()}); err != nil {
			return err
		}
	}
	return nil
}

// removeUnwritten takes extents that were never written out of the map, and
// leaves their clusters alone.
func (t *Tx) removeUnwritten(n *Inode, r run) error {
	if n.Flags&extentsFl == 0 {
		return nil
	}
	return t.removeExtents(n, r.start, r.end, func(extent) error { return nil })
}

// move gives the logical blocks of whole clusters new places. Those from lo to
// hi are mapped, whether they were before or not; the contents of the others
// are copied.
func (t *Tx) move(n *Inode, r run, lo, hi int64) error {
	s := t.sb()
	ratio := s.clusterRatio()
	if r.len() > s.FreeBlocksCount {
		return ErrNoSpace
	}
	var kept []extent
	for _, part := range [...]run{{r.start, lo}, {hi, r.end}} {
		if err := t.eachMapped(n, part.start, part.end, func(e extent) error {
			if !e.unwritten {
				kept = append(kept, e)
			}
			return nil
		}); err != nil {
			return err
		}
	}
	behind, err := t.before1(n, r.start)
	if err != nil {
		return err
	}
	if err := t.unmap(n, r.start, r.end); err != nil {
		return err
	}
	for at := r.start; at < r.end; {
		start, got, err := t.allocBlocks(t.goal(n, behind), r.end-at)
		if err != nil {
			return err
		}
		got = ceilDiv(got, ratio) * ratio
		n.Blocks += got / ratio * s.sectorsPerCluster()
		if err := t.checkBlocks(n); err != nil {
			return err
		}
		if from, to := max(at, lo), min(at+got, hi); from < to {
			if err := t.mapRun(n, extent{logical: from, physical: start + from - at, len: to - from}); err != nil {
				return err
			}
		}
		for _, e := range kept {
			from, to := max(at, e.logical), min(at+got, e.logical+e.len)
			if from >= to {
				continue
			}
			if err := t.mapRun(n, extent{logical: from, physical: start + from - at, len: to - from}); err != nil {
				return err
			}
			if err := t.copyBlocks(e.physical+from-e.logical, start+from-at, to-from); err != nil {
				return err
			}
		}
		at += got
		behind = start + got - 1
	}
	t.dirty(n)
	return nil
}

// copyBlocks copies content to blocks that are free in the committed state.
func (t *Tx) copyBlocks(from, to, n int64) error {
	bs := int64(t.sb().BlockSize)
	step := max(writeSize/bs, 1)
	b := make([]byte, min(n, step)*bs)
	for n > 0 {
		part := b[:min(n, step)*bs]
		if err := t.fs.readBlocks(part, from); err != nil {
			return err
		}
		if err := t.writeData(part, to); err != nil {
			return err
		}
		k := int64(len(part)) / bs
		from, to, n = from+k, to+k, n-k
	}
	return nil
}

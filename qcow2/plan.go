package qcow2

import (
	"cmp"
	"fmt"
	"iter"
	"slices"
)

// plannedRun is a run of planned guest clusters.
type plannedRun struct {
	cluster int64 // first guest cluster
	n       int64 // clusters
	rank    int64 // planned clusters before it
}

func (r plannedRun) end() int64 { return r.cluster + r.n }

// compare tells whether a run lies before a cluster, holds it, or lies behind it.
func (r plannedRun) compare(cluster int64) int {
	switch {
	case r.end() <= cluster:
		return -1
	case r.cluster > cluster:
		return 1
	}
	return 0
}

// plan is the set of guest clusters that an image gets, ascending. Runs
// neither touch nor overlap.
type plan []plannedRun

// newPlan rounds extents out to clusters. With whole they have to cover the
// clusters that they touch, together and up to size, which is in sectors.
func newPlan(extents iter.Seq2[int64, int64], size int64, clusterBits uint, whole bool) (plan, error) {
	if extents == nil {
		return nil, nil
	}
	var p plan
	var last int64
	edge := func(off int64) error {
		if !whole || off&(1<<clusterBits-1) == 0 {
			return nil
		}
		return fmt.Errorf("qcow2: plan with an edge at %#x inside a cluster of %d bytes: what is written of it would hide the rest of it in the backing file", off, 1<<clusterBits)
	}
	for off, n := range extents {
		if off < last || n < 0 || n > size-off {
			return nil, fmt.Errorf("qcow2: planned extent of %d bytes at %#x: expected one between %#x and the end at %#x", n, off, last, size)
		}
		if n == 0 {
			continue
		}
		if off > last {
			if err := cmp.Or(edge(last), edge(off)); err != nil {
				return nil, err
			}
		}
		last = off + n
		first, end := off>>clusterBits, (last-1)>>clusterBits+1
		if len(p) > 0 && first <= p[len(p)-1].end() {
			r := &p[len(p)-1]
			r.n = end - r.cluster
			continue
		}
		p = append(p, plannedRun{first, end - first, p.clusters()})
	}
	if last > size-sectorSize {
		return p, nil // up to the end of the image
	}
	return p, edge(last)
}

// clusters returns how many clusters are planned.
func (p plan) clusters() int64 {
	if len(p) == 0 {
		return 0
	}
	r := p[len(p)-1]
	return r.rank + r.n
}

// find returns the run that holds a guest cluster.
func (p plan) find(cluster int64) (plannedRun, bool) {
	i, ok := slices.BinarySearchFunc(p, cluster, plannedRun.compare)
	if !ok {
		return plannedRun{}, false
	}
	return p[i], true
}

// from returns the first planned cluster that is not below cluster; one that no
// image has if there is none.
func (p plan) from(cluster int64) int64 {
	i, ok := slices.BinarySearchFunc(p, cluster, plannedRun.compare)
	switch {
	case ok:
		return cluster
	case i < len(p):
		return p[i].cluster
	}
	return 1 << 62
}

// tables yields the L2 tables that the plan needs, as L1 indexes.
func (p plan) tables(l2Bits uint) iter.Seq[int64] {
	return func(yield func(int64) bool) {
		next := int64(0)
		for _, r := range p {
			for t := max(next, r.cluster>>l2Bits); t <= (r.end()-1)>>l2Bits; t++ {
				if !yield(t) {
					return
				}
				next = t + 1
			}
		}
	}
}

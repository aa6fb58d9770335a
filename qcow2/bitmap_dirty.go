package qcow2

import (
	"maps"
	"slices"
	"sort"
)

const (
	dirtyPageBits = 4096 // bits of a page of a dirtySet

	// maxDirtyPages bounds a dirtySet, to about 20 MiB.
	maxDirtyPages = 32768
)

// dirtySet is a set of bits of which few are expected to be set, or long runs.
// Its memory follows what is set, not the size of the disk.
type dirtySet struct {
	pages map[int64]*[dirtyPageBits / 8]byte
	runs  []bitRange // of pages that are all ones; ascending, they do not touch
}

// bitRange is [first, end).
type bitRange struct{ first, end int64 }

// full reports whether the set is as large as it may become. A call of add
// makes it larger by three entries at most.
func (d *dirtySet) full() bool { return len(d.pages)+len(d.runs) >= maxDirtyPages }

// add adds the bits from first to end.
func (d *dirtySet) add(first, end int64) {
	if d.pages == nil {
		d.pages = make(map[int64]*[dirtyPageBits / 8]byte)
	}
	lo, hi := (first+dirtyPageBits-1)/dirtyPageBits, end/dirtyPageBits // whole pages
	if lo > hi {
		d.addBits(hi, first, end)
		return
	}
	d.addBits(lo-1, first, lo*dirtyPageBits)
	if lo < hi {
		d.addPages(lo, hi)
	}
	d.addBits(hi, hi*dirtyPageBits, end)
}

// addBits adds bits of one page.
func (d *dirtySet) addBits(page, first, end int64) {
	if first == end || d.inRuns(page) {
		return
	}
	p := d.pages[page]
	if p == nil {
		p = new([dirtyPageBits / 8]byte)
		d.pages[page] = p
	}
	setBits(p[:], first-page*dirtyPageBits, end-page*dirtyPageBits)
}

// inRuns reports whether a page is in a run.
func (d *dirtySet) inRuns(page int64) bool {
	i := sort.Search(len(d.runs), func(i int) bool { return d.runs[i].end > page })
	return i < len(d.runs) && d.runs[i].first <= page
}

// addPages adds whole pages.
func (d *dirtySet) addPages(lo, hi int64) {
	if hi-lo < int64(len(d.pages)) {
		for page := lo; page < hi; page++ {
			delete(d.pages, page)
		}
	} else {
		maps.DeleteFunc(d.pages, func(page int64, _ *[dirtyPageBits / 8]byte) bool { return lo <= page && page < hi })
	}
	i := sort.Search(len(d.runs), func(i int) bool { return d.runs[i].end >= lo })
	j := i
	for ; j < len(d.runs) && d.runs[j].first <= hi; j++ {
		lo, hi = min(lo, d.runs[j].first), max(hi, d.runs[j].end)
	}
	d.runs = slices.Replace(d.runs, i, j, bitRange{lo, hi})
}

// each calls f for the runs of bits in the set, in ascending order; two runs do
// not touch.
func (d *dirtySet) each(f func(first, end int64) error) error {
	run := bitRun{f: f}
	runs := d.runs
	before := func(page int64) error {
		for ; len(runs) > 0 && runs[0].first < page; runs = runs[1:] {
			if err := run.add(runs[0].first*dirtyPageBits, runs[0].end*dirtyPageBits); err != nil {
				return err
			}
		}
		return nil
	}
	for _, page := range slices.Sorted(maps.Keys(d.pages)) {
		if err := before(page); err != nil {
			return err
		}
		at := page * dirtyPageBits
		err := eachRun(d.pages[page][:], dirtyPageBits, func(first, end int64) error { return run.add(at+first, at+end) })
		if err != nil {
			return err
		}
	}
	if len(runs) > 0 {
		if err := before(runs[len(runs)-1].end); err != nil {
			return err
		}
	}
	return run.flush()
}

package qcow2

import (
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// bitList lists the bits of runs.
func bitList(t *testing.T, each func(f func(first, end int64) error) error) []int64 {
	t.Helper()
	var list []int64
	last := int64(-1)
	err := each(func(first, end int64) error {
		if first <= last || first >= end {
			t.Errorf("run from %d to %d after one that ends at %d", first, end, last)
		}
		for last = end; first < end; first++ {
			list = append(list, first)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	return list
}

func TestBits(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		p, model := make([]byte, 32), make([]bool, 256)
		for range r.IntN(6) {
			first := r.Int64N(256)
			end := first + r.Int64N(256-first+1)
			changed := false
			for i := first; i < end; i++ {
				changed = changed || !model[i]
				model[i] = true
			}
			if got := setBits(p, first, end); got != changed {
				t.Fatalf("set %d to %d: changed %v, want %v", first, end, got, changed)
			}
		}
		n := r.Int64N(257)
		var want []int64
		for i, set := range model[:n] {
			if set {
				want = append(want, int64(i))
			}
		}
		got := bitList(t, func(f func(first, end int64) error) error { return eachRun(p, n, f) })
		if !slices.Equal(got, want) {
			t.Fatalf("first %d bits of %x: %v, want %v", n, p, got, want)
		}
		if got, want := clearBits(p, n), slices.Contains(model[n:], true); got != want {
			t.Fatalf("clear from %d: changed %v, want %v", n, got, want)
		}
		got = bitList(t, func(f func(first, end int64) error) error { return eachRun(p, 256, f) })
		if !slices.Equal(got, want) {
			t.Fatalf("cleared from %d: %v, want %v", n, got, want)
		}
	}
}

func TestDirtySet(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	const size = 20 * dirtyPageBits
	for range 200 {
		var d dirtySet
		model := make([]bool, size)
		for range r.IntN(30) {
			first := r.Int64N(size)
			n := r.Int64N([]int64{2, 100, dirtyPageBits, size}[r.IntN(4)])
			if r.IntN(4) == 0 { // whole pages
				first, n = first&^(dirtyPageBits-1), (n|1)*dirtyPageBits
			}
			end := min(first+n, size)
			d.add(first, end)
			for i := first; i < end; i++ {
				model[i] = true
			}
		}
		var want []int64
		for i, set := range model {
			if set {
				want = append(want, int64(i))
			}
		}
		if got := bitList(t, d.each); !slices.Equal(got, want) {
			t.Fatalf("%d bits, want %d: %s", len(got), len(want), cmp.Diff(want, got))
		}
	}
}

// The memory of a set follows what is set, and full tells when it is too much.
func TestDirtySetBounds(t *testing.T) {
	var d dirtySet
	d.add(0, 1<<50)
	d.add(7, 1<<49)
	if len(d.pages) > 2 || len(d.runs) != 1 || d.full() {
		t.Errorf("one run is %d pages and %d runs, full %v", len(d.pages), len(d.runs), d.full())
	}
	for i := range int64(maxDirtyPages) {
		d.add(1<<51+2*i*dirtyPageBits, 1<<51+2*i*dirtyPageBits+1)
	}
	if !d.full() {
		t.Error("not full")
	}
	d.add(0, 1<<52)
	if len(d.pages) != 0 || len(d.runs) != 1 {
		t.Errorf("what a run covers stays: %d pages and %d runs", len(d.pages), len(d.runs))
	}
}

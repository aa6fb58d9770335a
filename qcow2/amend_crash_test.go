package qcow2_test

import (
	"context"
	"errors"
	"testing"

	"qimg/qcow2"
	"qimg/qcow2/blockdev/blocktest"
	"qimg/qcow2/blockdev/oracle"
)

// amendOp is a change of the options or the size of a fixture.
type amendOp struct {
	name    string
	refused func(v variant) bool
	run     func(ctx context.Context, im *qcow2.Image, c int64) error
}

func amendOps() []amendOp {
	never := func(variant) bool { return false }
	amend := func(o qcow2.AmendOptions) func(ctx context.Context, im *qcow2.Image, c int64) error {
		return func(ctx context.Context, im *qcow2.Image, c int64) error {
			o := o
			o.Size *= c
			_, err := im.Amend(ctx, &o)
			return err
		}
	}
	resize := func(clusters, more int64, o qcow2.ResizeOptions) func(ctx context.Context, im *qcow2.Image, c int64) error {
		return func(ctx context.Context, im *qcow2.Image, c int64) error { return im.Resize(ctx, clusters*c+more, &o) }
	}
	toV2 := func(v variant) bool {
		return v.ExtendedL2 || v.data || v.compressed && v.Compression == qcow2.CompressionZstd
	}
	v2Snapshot := func(v variant) bool { return v.Version == 2 && v.snapshot }
	shrink := qcow2.ResizeOptions{Shrink: true}
	lazy, eager := true, false
	return []amendOp{
		{"v2", func(v variant) bool { return v.RefcountBits != 16 || toV2(v) }, amend(qcow2.AmendOptions{Version: 2})},
		{"v2, 16 bits", toV2, amend(qcow2.AmendOptions{Version: 2, RefcountBits: 16})},
		{"v2, smaller", func(v variant) bool { return v.snapshot || toV2(v) },
			amend(qcow2.AmendOptions{Version: 2, RefcountBits: 16, Size: 33})},
		{"v3", never, amend(qcow2.AmendOptions{Version: 3})},
		{"v3, 64 bits, lazy", never, amend(qcow2.AmendOptions{Version: 3, RefcountBits: 64, LazyRefcounts: &lazy})},
		{"1 bit", func(v variant) bool { return v.snapshot || v.compressed }, amend(qcow2.AmendOptions{Version: 3, RefcountBits: 1})},
		{"32 bits", func(v variant) bool { return v.Version == 2 }, amend(qcow2.AmendOptions{RefcountBits: 32})},
		{"not lazy", never, amend(qcow2.AmendOptions{LazyRefcounts: &eager})},
		{"grow", v2Snapshot, resize(fixtureClusters+1, 0, qcow2.ResizeOptions{})},
		{"grow far", v2Snapshot, func(ctx context.Context, im *qcow2.Image, c int64) error {
			// More L1 entries, and no more guest bytes than a trial keeps well.
			return im.Resize(ctx, min(9000, 40<<20/c)*c+512, nil)
		}},
		{"grow, metadata", v2Snapshot, resize(fixtureClusters+80, 0, qcow2.ResizeOptions{Preallocation: qcow2.PreallocationMetadata})},
		{"grow, full", v2Snapshot, resize(fixtureClusters+20, 512, qcow2.ResizeOptions{Preallocation: qcow2.PreallocationFull})},
		{"shrink", v2Snapshot, resize(mixedAt+3, 0, shrink)},
		{"shrink into a cluster", v2Snapshot, resize(plainAt+2, -512, shrink)},
		{"shrink to a sector", v2Snapshot, resize(0, 512, shrink)},
	}
}

// TestCrashAmend looks at what a crash leaves of changes of the options and the
// size of every variant, and lets the guest write afterwards.
func TestCrashAmend(t *testing.T) {
	opts := &blocktest.CrashOptions{Subsets: 16, Tears: 2}
	if *crashLong {
		opts = nil
	}
	states := 0
	for vi, v := range variants() {
		t.Run(v.name, func(t *testing.T) {
			f := newFixture(t, v)
			for i, op := range amendOps() {
				if ((vi+i)%4 != 0 || oracle.SlowBuild && vi%4 != 0) && !*crashLong {
					continue
				}
				t.Run(op.name, func(t *testing.T) {
					tr := f.trial(t)
					do := func() error { return op.run(t.Context(), tr.Image, f.c) }
					if op.refused(v) {
						var option qcow2.OptionError
						if err := tr.Refused(op.name, do); !errors.As(err, &option) {
							t.Errorf("%v, expected an OptionError", err)
						}
					} else {
						tr.Do(op.name, do)
					}
					tr.Write(0, noise(77, int(min(3*f.c/2, tr.Image.Size()))))
					tr.Sync()
					states += tr.Verify(opts)
				})
			}
		})
	}
	t.Logf("%d states", states)
}

// TestFaultsAmend lets one call of the device after the other fail.
func TestFaultsAmend(t *testing.T) {
	step, runs := 7, 0
	if *crashLong {
		step = 1
	}
	for vi, v := range variants() {
		for i, op := range amendOps() {
			if op.refused(v) || ((vi+i)%7 != 0 || oracle.SlowBuild && vi%4 != 0) && !*crashLong {
				continue
			}
			t.Run(v.name+", "+op.name, func(t *testing.T) {
				f := newFixture(t, v)
				runs += qcow2.TrialFaults(t, f.dev, &qcow2.TrialOptions{Open: f.open, Data: f.data}, step, func(tr *qcow2.Trial) {
					tr.Do(op.name, func() error { return op.run(t.Context(), tr.Image, f.c) })
				})
			})
		}
	}
	t.Logf("%d runs", runs)
}

package qcow2_test

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/blocktest"
	"qimg/qcow2/blockdev/oracle"
)

// snapshotWork changes snapshots in every way, with guest writes between.
func snapshotWork(tr *qcow2.Trial, v variant, c int64) {
	ctx := context.Background()
	state := noise(60, int(2*c)+100)
	tr.Do("create", func() error {
		_, err := tr.Image.CreateSnapshot(ctx, "a", &qcow2.SnapshotOptions{Date: time.Unix(1e9, 5000), VMClock: time.Hour, ICount: 7})
		return err
	})
	tr.Write(plainAt*c+100, noise(61, int(3*c)))
	tr.Write(compressedAt*c+c/2, noise(62, int(c)))
	tr.Do("create several, delete one", func() error {
		tx, err := tr.Image.BeginSnapshots(ctx)
		if err != nil {
			return err
		}
		defer tx.Abort()
		for _, name := range []string{"b", "c", "d"} {
			if _, err := tx.Create(name, nil); err != nil {
				return err
			}
		}
		if err := tx.Delete("c"); err != nil {
			return err
		}
		return tx.Commit()
	})
	tr.Zero(mixedAt*c, 3*c)
	tr.Do("create with vm state", func() error {
		_, err := tr.Image.CreateSnapshot(ctx, "vm", &qcow2.SnapshotOptions{VMState: bytes.NewReader(state), ICount: qcow2.NoICount})
		return err
	})
	tr.Do("apply", func() error { return tr.Image.ApplySnapshot(ctx, "a") })
	tr.Write(emptyAt*c, noise(63, int(2*c)))
	tr.Do("apply vm state", func() error { return tr.Image.ApplySnapshot(ctx, "vm") })
	tr.Do("create with vm state over another", func() error {
		_, err := tr.Image.CreateSnapshot(ctx, "vm 2", &qcow2.SnapshotOptions{VMState: bytes.NewReader(state[:c])})
		return err
	})
	tr.Do("apply vm state again", func() error { return tr.Image.ApplySnapshot(ctx, "vm") })
	tr.Do("create over vm state", func() error { _, err := tr.Image.CreateSnapshot(ctx, "with state", nil); return err })
	if v.Version != 2 {
		disk := blockdev.NewMemory(fixtureClusters * c / 2)
		if _, err := disk.WriteAt(noise(64, int(5*c)), 3*c+7); err != nil {
			panic(err)
		}
		tr.Do("create from a disk", func() error {
			_, err := tr.Image.CreateSnapshot(ctx, "disk", &qcow2.SnapshotOptions{Disk: disk, VMState: bytes.NewReader(state)})
			return err
		})
		tr.Do("apply what is shorter", func() error { return tr.Image.ApplySnapshot(ctx, "disk") })
		tr.Write(0, noise(65, int(c)))
	}
	for _, name := range []string{"a", "vm", "b"} {
		tr.Do("delete "+name, func() error { return tr.Image.DeleteSnapshot(ctx, name) })
	}
	tr.Sync()
}

// A crash leaves each change of snapshots undone or done.
func TestCrashSnapshots(t *testing.T) {
	states := 0
	for vi, v := range variants() {
		if oracle.SlowBuild && vi%10 != 0 {
			continue
		}
		t.Run(v.name, func(t *testing.T) {
			opts := &blocktest.CrashOptions{Subsets: 8, Tears: 1}
			switch {
			case *crashLong:
				opts = nil
			case v.ClusterSize > 512: // where a state takes long
				opts.Subsets = 1
			}
			f := newFixture(t, v)
			tr := f.trial(t)
			create := func() error { _, err := tr.Image.CreateSnapshot(t.Context(), "a", nil); return err }
			switch {
			case v.data:
				if err := tr.Refused("create", create); !errors.Is(err, qcow2.ErrUnsupported) {
					t.Error(err)
				}
				if err := tr.Refused("apply", func() error { return tr.Image.ApplySnapshot(t.Context(), "a") }); !errors.Is(err, qcow2.ErrUnsupported) {
					t.Error(err)
				}
				if err := tr.Refused("delete", func() error { return tr.Image.DeleteSnapshot(t.Context(), "a") }); !errors.Is(err, qcow2.ErrNotFound) {
					t.Error(err)
				}
			case v.RefcountBits == 1:
				if err := tr.Refused("create", create); !errors.Is(err, qcow2.ErrLimit) {
					t.Error(err)
				}
			default:
				snapshotWork(tr, v, f.c)
			}
			states += tr.Verify(opts)
		})
	}
	t.Logf("%d states", states)
}

// Every call of the device fails once.
func TestFaultsSnapshots(t *testing.T) {
	runs := 0
	for _, v := range variants() {
		if v.data || v.RefcountBits == 1 || v.ClusterSize != 512 && !*crashLong {
			continue
		}
		t.Run(v.name, func(t *testing.T) {
			f := newFixture(t, v)
			step := 29
			if *crashLong {
				step = 1
			} else if oracle.SlowBuild {
				step *= 8
			}
			runs += qcow2.TrialFaults(t, f.dev, &qcow2.TrialOptions{Open: f.open}, step, func(tr *qcow2.Trial) { snapshotWork(tr, v, f.c) })
		})
	}
	t.Logf("%d runs", runs)
}

package qcow2_test

import (
	"testing"

	"qimg/qcow2"
	"qimg/qcow2/blockdev/oracle"
)

// TestFaults lets one call of the device after the other fail while the guest
// writes, and while the image is changed as a whole.
func TestFaults(t *testing.T) {
	runs := 0
	for _, v := range variants() {
		t.Run(v.name, func(t *testing.T) {
			step := 7
			if v.ExtendedL2 {
				step = 37 // its clusters are large
			}
			if *crashLong {
				step = 1
			} else if oracle.SlowBuild {
				step *= 60
			}
			f := newFixture(t, v)
			runs += qcow2.TrialFaults(t, f.dev, &qcow2.TrialOptions{Open: f.open, Data: f.data}, step, func(tr *qcow2.Trial) {
				tr.Write(emptyAt*f.c+10, noise(40, int(f.c)*5/2))
				tr.Write(compressedAt*f.c+70, noise(41, int(f.c)))
				tr.Sync()
				tr.Zero(mixedAt*f.c, 3*f.c)
				tr.Write(emptyTableAt*f.c+10, noise(42, int(f.c)))
				tr.Discard((plainAt+1)*f.c, 2*f.c)
				tr.Sync()
				tr.Write(plainAt*f.c+100, noise(43, int(f.c)))
				tr.Write(zeroAllocAt*f.c+100, noise(44, int(f.c)))
				for _, op := range wholeOps(v) {
					op.run(tr, f.c, 1)
				}
				tr.Write(plainAt*f.c, noise(45, int(f.c)))
			})
		})
	}
	t.Logf("%d runs", runs)
}

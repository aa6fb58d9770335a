package qcow2_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"testing"
	"time"

	"qimg/qcow2"
)

// killWriter is the variable that makes TestKill the process that is killed:
// the number of its round.
const killWriter = "QIMG_TEST_KILL_WRITER"

const killSize = 512 << 10

// killBatch is what a writer does before it syncs.
func killBatch(round, batch int, cluster int64) []guestOp {
	r := rand.New(rand.NewPCG(uint64(round), uint64(batch)))
	return randomOps(r, 1+r.IntN(6), killSize, cluster, true)
}

// withKillSnapshot makes the snapshot of a batch if there is none, deletes it
// otherwise.
func withKillSnapshot(im *qcow2.Image) error {
	if len(im.Snapshots()) > 0 {
		return im.DeleteSnapshot(context.Background(), "s")
	}
	_, err := im.CreateSnapshot(context.Background(), "s", nil)
	return err
}

// killOpen opens the image of a test; other systems than Linux have no locks.
func killOpen(path string, write bool, snapshot string) (*qcow2.Image, error) {
	return qcow2.Open(path, &qcow2.OpenOptions{Write: write, Snapshot: snapshot, NoLock: runtime.GOOS != "linux"})
}

// writeUntilKilled acknowledges every batch, and every change of the snapshot,
// by a line once it is safe.
func writeUntilKilled(path string, round int) error {
	im, err := killOpen(path, true, "")
	if err != nil {
		return err
	}
	h := im.Header()
	for batch := 0; ; batch++ {
		for _, op := range killBatch(round, batch, h.ClusterSize()) {
			if err := op.do(im); err != nil {
				return err
			}
		}
		if err := im.Sync(); err != nil {
			return err
		}
		fmt.Println("written")
		if batch%4 == 3 {
			if err := withKillSnapshot(im); err != nil {
				return err
			}
			fmt.Println("snapshot")
		}
	}
}

// killed is what is safe in the image of the test.
type killed struct {
	guest    []byte
	snapshot []byte // nil: there is none
}

// replay does what a writer did that has acknowledged so many lines. It
// returns what may be there of its next step: for guest data what each operation
// of it leads to.
func (k *killed) replay(round, lines int, cluster int64) (guests [][]byte, snapshotNext bool) {
	batch := 0
	toggle := func() {
		if k.snapshot != nil {
			k.snapshot = nil
		} else {
			k.snapshot = bytes.Clone(k.guest)
		}
	}
	for range lines {
		if batch > 0 && batch%4 == 0 && snapshotNext {
			toggle()
			snapshotNext = false
			continue
		}
		for _, op := range killBatch(round, batch, cluster) {
			op.apply(k.guest, cluster)
		}
		batch++
		snapshotNext = batch%4 == 0
	}
	if snapshotNext {
		return nil, true
	}
	now := bytes.Clone(k.guest)
	for _, op := range killBatch(round, batch, cluster) {
		op.apply(now, cluster)
		guests = append(guests, bytes.Clone(now))
	}
	return guests, false
}

// TestKill kills a process that writes an image, again and again: it is never
// corrupt, and nothing is lost that the process said was safe.
func TestKill(t *testing.T) {
	if round, err := strconv.Atoi(os.Getenv(killWriter)); err == nil {
		t.Fatal(writeUntilKilled(os.Getenv(killWriter+"_PATH"), round))
	}
	kills := 30
	if *crashLong {
		kills = 1000
	}
	for _, o := range []qcow2.FormatOptions{{ClusterSize: 512}, {ClusterSize: 4096, Version: 2}, {ClusterSize: 65536, ExtendedL2: true, LazyRefcounts: true}} {
		t.Run(fmt.Sprint(o.ClusterSize), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "image.qcow2")
			saveFile(t, newImage(t, killSize, o), path)
			k := &killed{guest: make([]byte, killSize)}
			r := rand.New(rand.NewPCG(uint64(o.ClusterSize), 7))
			total := 0
			for round := range (kills + 2) / 3 {
				lines := killOne(t, path, round, time.Duration(1+r.IntN(50))*time.Millisecond)
				total += lines
				k.verify(t, path, round, lines, o.ClusterSize)
			}
			t.Logf("%d acknowledged steps", total)
			if total == 0 {
				t.Error("no writer has done anything")
			}
		})
	}
}

// killOne starts a writer, kills it that long after it has begun, and returns
// how many lines it has acknowledged.
func killOne(t *testing.T, path string, round int, after time.Duration) int {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^TestKill$", "-test.count=1")
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d", killWriter, round), killWriter+"_PATH="+path)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	timer := time.AfterFunc(after+20*time.Millisecond, func() { cmd.Process.Kill() })
	defer timer.Stop()
	lines := 0
	s := bufio.NewScanner(out)
	for s.Scan() {
		if s.Text() != "written" && s.Text() != "snapshot" {
			t.Errorf("the writer says %q", s.Text())
		}
		lines++
	}
	cmd.Wait() // it was killed
	if t.Failed() {
		t.FailNow()
	}
	return lines
}

// verify looks at the image that a killed writer has left, and takes what it
// is now for what is safe.
func (k *killed) verify(t *testing.T, path string, round, lines int, cluster int64) {
	t.Helper()
	guests, snapshotNext := k.replay(round, lines, cluster)
	im, err := killOpen(path, false, "")
	if err != nil {
		t.Fatalf("round %d, %d lines: %v", round, lines, err)
	}
	if im.Header().IncompatibleFeatures&qcow2.IncompatDirty != 0 {
		im.Close()
		if im, err = killOpen(path, true, ""); err != nil {
			t.Fatal(err)
		}
	}
	defer im.Close()
	res, err := im.Check(t.Context(), nil)
	if err != nil || res.Corruptions+res.CheckErrors != 0 {
		t.Fatalf("round %d, %d lines: check: %+v, %v", round, lines, res, err)
	}
	got := make([]byte, killSize)
	if _, err := im.ReadAt(got, 0); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	for off := 0; off < killSize; off += 512 {
		sector := got[off : off+512]
		ok := bytes.Equal(sector, k.guest[off:off+512])
		for _, g := range guests {
			ok = ok || bytes.Equal(sector, g[off:off+512])
		}
		if !ok {
			text := fmt.Sprintf("is       %x\nit was   %x\n", sector, k.guest[off:off+512])
			for i, g := range guests {
				text += fmt.Sprintf("step %-3d %x\n", i, g[off:off+512])
			}
			t.Fatalf("round %d, %d lines: sector at %d is neither as it was nor as written:\n%s", round, lines, off, text)
		}
	}
	had := k.snapshot != nil
	has := len(im.Snapshots()) > 0
	if has != had && !snapshotNext {
		t.Fatalf("round %d, %d lines: a snapshot: %v, expected %v", round, lines, has, had)
	}
	k.guest = got
	if !has {
		k.snapshot = nil
		return
	}
	if !had {
		k.snapshot = bytes.Clone(got)
	}
	sn, err := killOpen(path, false, "s")
	if err != nil {
		t.Fatal(err)
	}
	defer sn.Close()
	content := make([]byte, killSize)
	if _, err := sn.ReadAt(content, 0); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	if !bytes.Equal(content, k.snapshot) {
		t.Fatalf("round %d, %d lines: the snapshot holds something else", round, lines)
	}
}

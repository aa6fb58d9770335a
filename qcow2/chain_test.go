package qcow2_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/blocktest"
)

// memoryImage makes an image over below, which can be nil, and writes random
// data into it.
func memoryImage(t testing.TB, r *rand.Rand, size int64, format qcow2.FormatOptions, below blockdev.Reader) *blockdev.Memory {
	t.Helper()
	m := blockdev.NewMemory(0)
	if below != nil {
		format.BackingFile, format.BackingFormat = "below", "raw"
	}
	if err := qcow2.Create(t.Context(), m, size, &qcow2.CreateOptions{FormatOptions: format}); err != nil {
		t.Fatal(err)
	}
	im := openOver(t, m, below)
	for range 8 {
		off := 512 * r.Int64N(size/512)
		n := min(512*(1+r.Int64N(8)), size-off)
		var err error
		if r.IntN(4) == 0 {
			err = im.WriteZeroes(off, n)
		} else {
			_, err = im.WriteAt(bytes.Repeat([]byte{byte(1 + r.IntN(3))}, int(n)), off)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	return m
}

// openOver opens an image for writing, with its backing file.
func openOver(t testing.TB, dev blockdev.Device, below blockdev.Reader) *qcow2.Image {
	t.Helper()
	im, err := qcow2.New(dev, &qcow2.OpenOptions{Write: true, BackingDevice: below})
	if err != nil {
		t.Fatal(err)
	}
	return im
}

func writeAll(t testing.TB, d blockdev.Device, p []byte, off int64) {
	t.Helper()
	if _, err := d.WriteAt(p, off); err != nil {
		t.Fatal(err)
	}
}

// intact reports what is wrong with an image over below whose guest has to read
// want. Leaks are wrong if it is clean that is asked for.
func intact(t testing.TB, dev *blockdev.Memory, below blockdev.Reader, want []byte, clean bool) error {
	t.Helper()
	im, err := qcow2.New(dev, &qcow2.OpenOptions{BackingDevice: below})
	if err != nil {
		return err
	}
	defer im.Close()
	if err := sound(t, im, clean); err != nil {
		return err
	}
	if got := bytesOf(t, im); !bytes.Equal(got, want) {
		return fmt.Errorf("the guest reads something else")
	}
	return nil
}

// sound reports what check finds. Leaks count if it is clean that is asked for.
func sound(t testing.TB, im *qcow2.Image, clean bool) error {
	t.Helper()
	leaks, err := qcow2.CheckLeaks(t, im)
	if err == nil && clean && leaks > 0 {
		err = fmt.Errorf("check: %d leaks", leaks)
	}
	return err
}

// small are kinds of images of a few clusters.
func small() map[string]qcow2.FormatOptions {
	return map[string]qcow2.FormatOptions{
		"512":    {ClusterSize: 512},
		"512-v2": {ClusterSize: 512, Version: 2},
		"4096":   {ClusterSize: 4096},
		"extl2":  {ClusterSize: 16 << 10, ExtendedL2: true},
	}
}

var chainCrashes = &blocktest.CrashOptions{Subsets: 24, Tears: 2}

package qcow2_test

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/oracle"
)

// change makes one random change to an image and to what it should read as.
func change(r *rand.Rand, im *qcow2.Image, want []byte, most int) (string, error) {
	off := r.IntN(len(want))
	n := 1 + r.IntN(min(most, len(want)-off))
	if r.IntN(3) == 0 { // aligned
		off &^= 511
		n = min((n+511)&^511, len(want)-off)
	}
	switch r.IntN(5) {
	case 0:
		clear(want[off : off+n])
		return fmt.Sprintf("zero %d+%d", off, n), im.WriteZeroes(int64(off), int64(n))
	case 1:
		// What is discarded reads as zeroes where it can be discarded.
		err := im.Discard(int64(off), int64(n))
		if err == nil {
			_, err = im.ReadAt(want[off:off+n], int64(off))
			if err == io.EOF {
				err = nil
			}
		}
		return fmt.Sprintf("discard %d+%d", off, n), err
	}
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(r.Uint32())
	}
	copy(want[off:], p)
	_, err := im.WriteAt(p, int64(off))
	return fmt.Sprintf("write %d+%d", off, n), err
}

// Random changes of images of every kind read back, through this package and
// through qemu-img, and leave no leak.
func TestWrite(t *testing.T) {
	oracle.Require(t, "qemu-img")
	for i, o := range []qcow2.FormatOptions{
		{},
		{Version: 2},
		{ClusterSize: 512},
		{ClusterSize: 512, RefcountBits: 1},
		{ClusterSize: 512, RefcountBits: 64},
		{ClusterSize: 4096, RefcountBits: 64},
		{ClusterSize: 1024, RefcountBits: 8, Version: 3},
		{ClusterSize: 2 << 20, RefcountBits: 2},
		{ClusterSize: 16384, ExtendedL2: true},
		{ExtendedL2: true, LazyRefcounts: true},
		{ClusterSize: 512, Version: 2, BackingFile: "base.raw", BackingFormat: "raw"},
		{BackingFile: "base.raw", BackingFormat: "raw"},
		{ExtendedL2: true, ClusterSize: 32768, BackingFile: "base.raw", BackingFormat: "raw"},
		{ClusterSize: 4096, BackingFile: "base.raw", BackingFormat: "raw"},
	} {
		t.Run(fmt.Sprintf("%+v", o), func(t *testing.T) {
			dir := t.TempDir()
			r := rand.New(rand.NewPCG(uint64(i), 1))
			want := make([]byte, 3<<20+512*7)
			if o.BackingFile != "" {
				base := make([]byte, 2<<20+512)
				for i := range base {
					base[i] = byte(r.Uint32())
				}
				copy(want, base)
				if err := os.WriteFile(filepath.Join(dir, "base.raw"), base, 0o666); err != nil {
					t.Fatal(err)
				}
			}
			name := filepath.Join(dir, "a.qcow2")
			out, err := blockdev.CreateFile(name, nil)
			if err != nil {
				t.Fatal(err)
			}
			if err := qcow2.Create(t.Context(), out.File(), int64(len(want)), &qcow2.CreateOptions{FormatOptions: o}); err != nil {
				t.Fatal(err)
			}
			if err := out.Commit(); err != nil {
				t.Fatal(err)
			}
			for range 4 {
				im, err := qcow2.Open(name, &qcow2.OpenOptions{Write: true, Backing: qcow2.BackingFollow})
				if err != nil {
					t.Fatal(err)
				}
				for range 25 {
					what, err := change(r, im, want, 300000)
					if err != nil {
						t.Fatalf("%s: %v", what, err)
					}
					if r.IntN(5) == 0 {
						if err := im.Sync(); err != nil {
							t.Fatal(err)
						}
					}
				}
				if !bytes.Equal(bytesOf(t, im), want) {
					t.Fatal("open image reads something else")
				}
				if err := im.Close(); err != nil {
					t.Fatal(err)
				}
				if im, err = qcow2.Open(name, &qcow2.OpenOptions{Backing: qcow2.BackingFollow}); err != nil {
					t.Fatal(err)
				}
				qcow2.MustHaveLeaks(t, im, 0)
				if !bytes.Equal(bytesOf(t, im), want) {
					t.Fatal("image reads something else")
				}
				im.Close()
			}
			oracle.MustRun(t, "qemu-img", "check", name)
			raw := filepath.Join(dir, "a.raw")
			oracle.MustRun(t, "qemu-img", "convert", "-O", "raw", name, raw)
			if got, err := os.ReadFile(raw); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("qemu-img reads something else (%v)", err)
			}
		})
	}
}

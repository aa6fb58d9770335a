package qcow2_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"testing"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/blocktest"
)

// After a crash at any write there is no image, or the whole one.
func TestCrash(t *testing.T) {
	type writing struct {
		name string
		want []byte
		run  func(d blockdev.Device) error
	}
	m := randomModel(rand.New(rand.NewPCG(3, 3)), 2<<20, 4096)
	writer := func(name string, opts qcow2.WriterOptions) writing {
		opts.ClusterSize = 4096
		opts.Extents = planOf(m.extents)
		return writing{name, m.bytes, func(d blockdev.Device) error {
			w, err := qcow2.NewWriter(t.Context(), d, int64(len(m.bytes)), &opts)
			if err != nil {
				return err
			}
			writeModel(t, w, m, 4096, 3, rand.New(rand.NewPCG(4, 4)))
			return w.Finish()
		}}
	}
	create := func(name string, opts qcow2.CreateOptions) writing {
		opts.ClusterSize = 4096
		return writing{name, make([]byte, 8<<20), func(d blockdev.Device) error {
			return qcow2.Create(t.Context(), d, 8<<20, &opts)
		}}
	}
	for _, c := range []writing{
		writer("plain", qcow2.WriterOptions{}),
		writer("plain, synced", qcow2.WriterOptions{Sync: true}),
		writer("compressed", qcow2.WriterOptions{Compress: true}),
		create("empty", qcow2.CreateOptions{}),
		create("metadata", qcow2.CreateOptions{Preallocation: qcow2.PreallocationMetadata}),
		create("full", qcow2.CreateOptions{Preallocation: qcow2.PreallocationFull}),
	} {
		t.Run(c.name, func(t *testing.T) {
			d, err := blocktest.NewRecorder(blockdev.NewMemory(0))
			if err != nil {
				t.Fatal(err)
			}
			if err := c.run(d); err != nil {
				t.Fatal(err)
			}
			states, images := 0, 0
			for state, err := range d.States() {
				if err != nil {
					t.Fatal(err)
				}
				if isWholeImage(t, state, c.want) {
					images++
				}
				states++
			}
			if ops := len(d.Ops()); images != 1 || states != ops+1 {
				t.Errorf("%d images in %d states after %d operations, expected one at the end", images, states, ops)
			}
		})
	}
}

// isWholeImage reports whether d is an image, which has to be clean and hold
// what is wanted.
func isWholeImage(t *testing.T, d blockdev.Device, want []byte) bool {
	t.Helper()
	im, err := qcow2.New(d, nil)
	if errors.Is(err, qcow2.ErrFormat) {
		return false
	}
	if err != nil {
		t.Fatalf("neither an image nor none: %v", err)
	}
	defer im.Close()
	qcow2.MustHaveLeaks(t, im, 0)
	got := make([]byte, im.Size())
	if _, err := im.ReadAt(got, 0); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("the guest reads something else")
	}
	return true
}

package qcow2_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/transfer"
)

// TestMeasureWriter: no image that Writer makes is larger than what was measured.
func TestMeasureWriter(t *testing.T) {
	for seed := range uint64(40) {
		r := rand.New(rand.NewPCG(seed, 7))
		src := blockdev.NewMemory(512 * (1 + r.Int64N(1<<r.IntN(14))))
		for range r.IntN(10) {
			n := 1 + r.Int64N(min(100000, src.Size()))
			p := make([]byte, n)
			for i := range p {
				p[i] = byte(i%255) + 1
			}
			if _, err := src.WriteAt(p, r.Int64N(src.Size()-n+1)); err != nil {
				t.Fatal(err)
			}
		}
		opts := &qcow2.CreateOptions{}
		opts.ClusterSize = 512 << r.IntN(10)
		opts.ExtendedL2 = opts.ClusterSize >= 16384 && r.IntN(2) == 0
		opts.RefcountBits = 1 << r.IntN(7)
		m, err := qcow2.Measure(t.Context(), 0, src, opts)
		if err != nil {
			t.Fatal(err)
		}
		dst := blockdev.NewMemory(0)
		w, err := qcow2.NewWriter(t.Context(), dst, src.Size(), &qcow2.WriterOptions{FormatOptions: opts.FormatOptions, InOrder: true})
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(transfer.Copy(t.Context(), w, src, nil), w.Finish()); err != nil {
			t.Fatal(err)
		}
		if uint64(dst.Size()) > m.Required {
			t.Errorf("seed %d: %d bytes, measured %d", seed, dst.Size(), m.Required)
		}
		full := blockdev.NewMemory(0)
		opts.Preallocation = qcow2.PreallocationFull
		if err := qcow2.Create(t.Context(), full, src.Size(), opts); err != nil {
			t.Fatal(err)
		}
		if uint64(full.Size()) > m.FullyAllocated {
			t.Errorf("seed %d: %d bytes with everything, measured %d", seed, full.Size(), m.FullyAllocated)
		}
	}
}

func TestMeasureErrors(t *testing.T) {
	for _, c := range []struct {
		size int64
		opts qcow2.CreateOptions
	}{
		{-1, qcow2.CreateOptions{}},
		{1 << 60, qcow2.CreateOptions{}},
		{0, qcow2.CreateOptions{FormatOptions: qcow2.FormatOptions{ClusterSize: 1000}}},
		{0, qcow2.CreateOptions{FormatOptions: qcow2.FormatOptions{RefcountBits: 3}}},
		{0, qcow2.CreateOptions{FormatOptions: qcow2.FormatOptions{Version: 2, RefcountBits: 8}}},
	} {
		if _, err := qcow2.Measure(t.Context(), c.size, nil, &c.opts); !errors.As(err, new(qcow2.OptionError)) {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

func ExampleMeasure() {
	m, err := qcow2.Measure(context.Background(), 10<<30, nil, nil)
	if err != nil {
		fmt.Println(err)
	}
	fmt.Println(m.Required, m.FullyAllocated)
	// Output: 1900544 10739318784
}

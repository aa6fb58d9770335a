package qcow2_test

import (
	"context"
	"fmt"
	"log"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
)

// An image of 1 GiB in which two ranges hold data. A file comes from
// blockdev.CreateFile, and is committed after Finish.
func ExampleWriter() {
	dst := blockdev.NewMemory(0)
	w, err := qcow2.NewWriter(context.Background(), dst, 1<<30, &qcow2.WriterOptions{
		Extents: func(yield func(off, n int64) bool) {
			_ = yield(0, 4096) && yield(512<<20, 100<<10)
		},
	})
	if err != nil {
		log.Fatal(err)
	}
	for _, off := range []int64{512<<20 + 1000, 0} {
		if _, err := w.WriteAt([]byte("data"), off); err != nil {
			log.Fatal(err)
		}
	}
	if err := w.Finish(); err != nil {
		log.Fatal(err)
	}
	fmt.Println(w.Size(), dst.Size()>>10, "KiB")
	// Output: 1073741824 576 KiB
}

var (
	_ blockdev.RangeCopier = (*qcow2.Writer)(nil)
	_ blockdev.ZeroWriter  = (*qcow2.Writer)(nil)
)

package qcow2_test

import (
	"bytes"
	"context"
	"fmt"
	"log"
	"time"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
)

// A new image with some data, read and checked again.
func Example() {
	dev := blockdev.NewMemory(0)
	data := []byte("hello, guest")
	w, err := qcow2.NewWriter(context.Background(), dev, 1<<30, &qcow2.WriterOptions{
		Extents: func(yield func(off, n int64) bool) { yield(65536, int64(len(data))) },
	})
	if err != nil {
		log.Fatal(err)
	}
	if _, err := w.WriteAt(data, 65536); err != nil {
		log.Fatal(err)
	}
	if err := w.Finish(); err != nil {
		log.Fatal(err)
	}

	im, err := qcow2.New(dev, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer im.Close()
	b := make([]byte, len(data))
	if _, err := im.ReadAt(b, 65536); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%d bytes, %q at 64 KiB\n", im.Size(), bytes.TrimRight(b, "\x00"))
	for off := int64(0); off < im.Size(); {
		e, err := im.NextExtent(off)
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(e.Off, e.Len, e.Kind)
		off += e.Len
	}
	res, err := im.Check(context.Background(), &qcow2.CheckOptions{
		Found: func(f qcow2.Finding) { fmt.Println(f) },
	})
	fmt.Println(res.Corruptions, res.Leaks, err)
	// Output:
	// 1073741824 bytes, "hello, guest" at 64 KiB
	// 0 65536 unallocated
	// 65536 65536 data
	// 131072 1073610752 unallocated
	// 0 0 <nil>
}

// An empty image is written, and a snapshot keeps what it held. The image could
// as well be a file: blockdev.CreateFile for Create, then Open by its name.
func ExampleImage_CreateSnapshot() {
	ctx := context.Background()
	dev := blockdev.NewMemory(0)
	if err := qcow2.Create(ctx, dev, 1<<30, nil); err != nil {
		log.Fatal(err)
	}
	im, err := qcow2.New(dev, &qcow2.OpenOptions{Write: true})
	if err != nil {
		log.Fatal(err)
	}
	if _, err := im.WriteAt([]byte("old"), 65536); err != nil {
		log.Fatal(err)
	}
	if _, err := im.CreateSnapshot(ctx, "before", &qcow2.SnapshotOptions{Date: time.Now()}); err != nil {
		log.Fatal(err)
	}
	if _, err := im.WriteAt([]byte("new"), 65536); err != nil {
		log.Fatal(err)
	}
	if err := im.Sync(); err != nil { // what is written survives a crash from here on
		log.Fatal(err)
	}
	if err := im.Close(); err != nil {
		log.Fatal(err)
	}

	b := make([]byte, 3)
	for _, snapshot := range []string{"", "before"} {
		im, err := qcow2.New(dev, &qcow2.OpenOptions{Snapshot: snapshot})
		if err != nil {
			log.Fatal(err)
		}
		if _, err := im.ReadAt(b, 65536); err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%q: %s\n", snapshot, b)
		if err := im.Close(); err != nil {
			log.Fatal(err)
		}
	}
	// Output:
	// "": new
	// "before": old
}

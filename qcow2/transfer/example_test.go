package transfer_test

import (
	"context"
	"fmt"
	"log"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/transfer"
)

// A disk of 1 GiB with two islands of data becomes a qcow2 image. Only the data
// is read and stored.
func Example() {
	ctx := context.Background()
	disk := blockdev.NewMemory(1 << 30)
	for _, off := range []int64{0, 700 << 20} {
		if _, err := disk.WriteAt([]byte("data"), off); err != nil {
			log.Fatal(err)
		}
	}
	file := blockdev.NewMemory(0)
	w, err := qcow2.NewWriter(ctx, file, disk.Size(), &qcow2.WriterOptions{InOrder: true})
	if err != nil {
		log.Fatal(err)
	}
	if err := transfer.Copy(ctx, w, disk, nil); err != nil {
		log.Fatal(err)
	}
	if err := w.Finish(); err != nil {
		log.Fatal(err)
	}
	im, err := qcow2.New(file, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer im.Close()
	d, err := transfer.Compare(ctx, disk, im, nil)
	fmt.Println(file.Size()>>10, "KiB, difference:", d, err)

	if _, err := disk.WriteAt([]byte("other"), 700<<20); err != nil {
		log.Fatal(err)
	}
	d, err = transfer.Compare(ctx, disk, im, nil)
	fmt.Println(d.Kind, "at", d.Off>>20, "MiB", err)
	// Output:
	// 512 KiB, difference: <nil> <nil>
	// content at 700 MiB <nil>
}

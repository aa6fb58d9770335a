package formats_test

import (
	"context"
	"fmt"
	"log"
	"os"
	"path/filepath"

	"qimg/cloudimg/formats"
	"qimg/qcow2/blockdev"
)

func Example() {
	dir, err := os.MkdirTemp("", "example")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "disk.vdi")
	if err := os.WriteFile(path, tinyVDI(), 0o666); err != nil {
		log.Fatal(err)
	}

	im, err := formats.Open(context.Background(), path, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer im.Close()
	fmt.Println(im.Format(), im.Size())
	var disk blockdev.Reader = im // what transfer.Copy takes
	for off := int64(0); off < disk.Size(); {
		e, err := blockdev.NextExtent(disk, off)
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(e.Off, e.Len, e.Kind, e.HostOff)
		off += e.Len
	}
	// Output:
	// vdi 3145728
	// 0 1048576 zero 0
	// 1048576 1048576 data 1024
	// 2097152 1048576 zero 0
}

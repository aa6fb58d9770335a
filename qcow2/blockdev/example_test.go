package blockdev_test

import (
	"fmt"
	"log"
	"os"
	"path/filepath"

	"qimg/qcow2/blockdev"
)

// A new file appears under its name when it is complete, and is then read
// through a window.
func Example() {
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "disk.img")

	out, err := blockdev.CreateFile(path, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer out.Abort()
	if err := out.File().Truncate(1 << 20); err != nil {
		log.Fatal(err)
	}
	if _, err := out.File().WriteAt([]byte("hello"), 512<<10); err != nil {
		log.Fatal(err)
	}
	_, err = os.Stat(path)
	fmt.Println("before Commit:", os.IsNotExist(err))
	if err := out.Commit(); err != nil {
		log.Fatal(err)
	}

	disk, err := blockdev.OpenFile(path, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer disk.Close()
	half, err := blockdev.NewReaderSection(disk, 512<<10, 512<<10)
	if err != nil {
		log.Fatal(err)
	}
	p := make([]byte, 5)
	if _, err := half.ReadAt(p, 0); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s, %d bytes\n", p, half.Size())
	// Output:
	// before Commit: true
	// hello, 524288 bytes
}

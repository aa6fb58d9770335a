package fat_test

import (
	"context"
	"fmt"
	"io"
	"log"
	"testing/fstest"

	"qimg/cloudimg/fat"
)

// A file system is decided, and then read as a disk.
func Example() {
	tree := fstest.MapFS{"meta-data": {Data: []byte("instance-id: one\n")}, "user-data": {Data: []byte("#cloud-config\n")}}
	seed, err := fat.New(context.Background(), tree, &fat.Options{Size: 2 << 20, Label: "cidata"})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(seed.Bits(), seed.Entries())
	n, err := io.Copy(io.Discard, io.NewSectionReader(seed, 0, seed.Size()))
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(n)
	// Output:
	// 12 3
	// 2097152
}

package decomp_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"

	"qimg/cloudimg/decomp"
	"qimg/qcow2/blockdev"
)

// A disk that was compressed is read at any place, and one that is larger than
// expected is refused.
func ExampleOpen() {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	disk := make([]byte, 1<<20)
	copy(disk[1<<19:], "some data")
	if _, err := w.Write(disk); err != nil {
		log.Fatal(err)
	}
	if err := w.Close(); err != nil {
		log.Fatal(err)
	}
	file := blockdev.NewMemory(int64(b.Len())) // most often of blockdev.OpenFile
	if _, err := file.WriteAt(b.Bytes(), 0); err != nil {
		log.Fatal(err)
	}

	ctx := context.Background()
	d, err := decomp.Open(ctx, file, os.TempDir(), nil)
	if err != nil {
		log.Fatal(err)
	}
	defer d.Close()
	p := make([]byte, 9)
	if _, err := d.ReadAt(p, 1<<19); err != nil && err != io.EOF {
		log.Fatal(err)
	}
	fmt.Printf("%s, %d bytes: %s\n", d.Format(), d.Size(), p)

	_, err = decomp.Open(ctx, file, os.TempDir(), &decomp.Options{MaxSize: 1 << 16})
	fmt.Println(errors.Is(err, decomp.ErrLimit), err)
	// Output:
	// gzip, 1048576 bytes: some data
	// true decomp: gzip: the content has more than 65536 bytes: limit exceeded
}

package ext4img_test

import (
	"context"
	"fmt"
	"log"
	"os"
	"path/filepath"

	"qimg/ext4img"
	"qimg/qcow2/blockdev"
)

// A directory becomes a raw disk: complete, or not there.
func Example() {
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "example")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	source, output := filepath.Join(dir, "source"), filepath.Join(dir, "disk.raw")
	if err := os.Mkdir(source, 0o755); err != nil {
		log.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(source, "hello"), []byte("hello\n"), 0o644); err != nil {
		log.Fatal(err)
	}

	tree, err := ext4img.Scan(ctx, source, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer tree.Close()
	layout, err := ext4img.NewLayout(ctx, tree, &ext4img.LayoutOptions{Size: 64 << 20, Label: "data"})
	if err != nil {
		log.Fatal(err) // a *ext4img.SizeError says how large the disk has to be
	}
	out, err := blockdev.CreateFile(output, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer out.Abort() // does nothing after Commit
	if err := out.File().Truncate(layout.Size()); err != nil {
		log.Fatal(err)
	}
	if err := layout.Write(ctx, out.File(), nil); err != nil {
		log.Fatal(err)
	}
	if err := out.Commit(); err != nil {
		log.Fatal(err)
	}
	info, err := os.Stat(output)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(tree.Entries(), "entries,", info.Size()>>20, "MiB")
	// Output: 2 entries, 64 MiB
}

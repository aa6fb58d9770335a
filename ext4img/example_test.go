package ext4img_test

import (
	"context"
	"fmt"
	"io/fs"
	"log"
	"os"
	"path/filepath"
	"strings"
	"testing/fstest"

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

// A disk is read without a mount, as an io/fs and by inode.
func ExampleOpen() {
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "example")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.WriteFile(filepath.Join(dir, "hello"), []byte("hello\n"), 0o640); err != nil {
		log.Fatal(err)
	}
	if err := os.Symlink("/hello", filepath.Join(dir, "link")); err != nil {
		log.Fatal(err)
	}
	tree, err := ext4img.Scan(ctx, dir, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer tree.Close()
	layout, err := ext4img.NewLayout(ctx, tree, &ext4img.LayoutOptions{Label: "data"})
	if err != nil {
		log.Fatal(err)
	}
	disk := blockdev.NewMemory(layout.Size())
	if err := layout.Write(ctx, disk, nil); err != nil {
		log.Fatal(err)
	}

	f, err := ext4img.Open(disk, nil)
	if err != nil {
		log.Fatal(err) // *ext4img.FormatError: what is wrong, and where
	}
	fmt.Println("label", f.Super().Label)
	content, err := fs.ReadFile(f, "link") // the symlink is followed inside the disk
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s", content)
	for e, err := range f.Walk(ext4img.RootIno) {
		if err != nil {
			log.Fatal(err)
		}
		n, err := f.Inode(e.Ino)
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%s %o\n", e.Path, n.Mode)
	}
	// Output:
	// label data
	// hello
	// hello 100640
	// link 120777
	// lost+found 40700
}

// Files of an existing file system are changed in one transaction.
func ExampleOpenEditor() {
	ctx := context.Background()
	// What is there: a file system with /etc/hostname.
	tree, err := ext4img.Merge(ctx, []ext4img.Source{ext4img.FromFS(fstest.MapFS{"etc/hostname": {Data: []byte("old\n"), Mode: 0o644}})}, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer tree.Close()
	layout, err := ext4img.NewLayout(ctx, tree, nil)
	if err != nil {
		log.Fatal(err)
	}
	disk := blockdev.NewMemory(layout.Size())
	if err := layout.Write(ctx, disk, nil); err != nil {
		log.Fatal(err)
	}

	ed, err := ext4img.OpenEditor(ctx, disk, nil)
	if err != nil {
		log.Fatal(err)
	}
	tx, err := ed.Begin()
	if err != nil {
		log.Fatal(err)
	}
	defer tx.Discard() // does nothing after Commit
	if err := tx.WriteFile("/etc/hostname", []byte("new\n"), 0o644); err != nil {
		log.Fatal(err)
	}
	if err := tx.MkdirAll("/srv/data", 0o755); err != nil {
		log.Fatal(err)
	}
	if err := tx.Commit(ctx); err != nil {
		log.Fatal(err)
	}
	for f, err := range ext4img.Check(ctx, disk, nil) {
		log.Fatal(f, err) // there are none
	}
	b, err := tx.FS().ReadFile("etc/hostname")
	fmt.Printf("%q %v\n", b, err)
	// Output:
	// "new\n" <nil>
}

// A list of changes makes what the user who runs the program could not.
func ExampleMerge() {
	sources := []ext4img.Source{
		ext4img.FromFS(fstest.MapFS{"bin/su": {Data: []byte("#!/bin/sh\n"), Mode: 0o755}}),
		ext4img.Manifest(strings.NewReader("./bin/su mode=4755\n./dev/null type=char mode=666 device=linux,1,3\n"), "changes", ""),
	}
	tree, err := ext4img.Merge(context.Background(), sources, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer tree.Close()
	layout, err := ext4img.NewLayout(context.Background(), tree, nil)
	if err != nil {
		log.Fatal(err)
	}
	image, err := ext4img.Open(layout.Reader(), nil)
	if err != nil {
		log.Fatal(err)
	}
	for _, name := range []string{"bin/su", "dev/null"} {
		info, err := image.Stat(name)
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(info)
	}
	// Output:
	// urwxr-xr-x 10 1970-01-01 00:00:00 su
	// Dcrw-rw-rw- 0 1970-01-01 00:00:00 null
}

package oci_test

import (
	"context"
	"log"

	"qimg/cloudimg/oci"
	"qimg/ext4img"
)

// The layers of a container image become a tree.
func Example() {
	ctx := context.Background()
	image, err := oci.Open(ctx, "image.tar", &oci.Options{Tag: "latest", TempDir: "."})
	if err != nil {
		log.Fatal(err)
	}
	defer image.Close()
	var sources []ext4img.Source
	for _, l := range image.Layers {
		sources = append(sources, ext4img.Layer(l, l.Size()))
	}
	tree, err := ext4img.Merge(ctx, sources, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer tree.Close()
	log.Print(tree.Entries(), " entries")
}

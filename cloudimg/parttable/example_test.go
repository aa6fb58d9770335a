package parttable_test

import (
	"fmt"
	"log"

	"qimg/cloudimg/parttable"
	"qimg/qcow2/blockdev"
)

// A table is written, and read back; a partition is a disk of its own.
func Example() {
	typ, err := parttable.ParseType(parttable.GPT, "linux-root-x86-64")
	if err != nil {
		log.Fatal(err)
	}
	spec := &parttable.Spec{Kind: parttable.GPT, Partitions: []parttable.Partition{{Type: typ, Name: "root", Size: 10 << 20}}}
	size, err := spec.Place(1<<20, 0)
	if err != nil {
		log.Fatal(err)
	}
	disk := blockdev.NewMemory(size)
	if _, err := parttable.Write(disk, spec); err != nil {
		log.Fatal(err)
	}

	table, err := parttable.Read(disk)
	if err != nil {
		log.Fatal(err)
	}
	for _, p := range table.Partitions {
		fmt.Println(p.Number, p.Name, p.Type.Name(), p.Start, p.Size)
	}
	root, err := table.Section(disk, 1)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(root.Size(), size)
	// Output:
	// 1 root linux-root-x86-64 1048576 10485760
	// 10485760 11551232
}

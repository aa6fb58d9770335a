// Package parttable reads and writes partition tables: GPT and MBR.
//
// Read takes a disk apart. What a table says is not believed: partitions that
// are empty, outside the disk, or in a chain of extended partitions that goes
// nowhere are left out and told of as findings. Write makes a table whose bytes
// depend on the spec alone: no clock and no random numbers.
//
//	supported            read  write
//	GPT                  yes   yes    128-byte entries, 512 and 4096-byte sectors
//	GPT, backup alone    yes          if there is a protective MBR
//	MBR, primary         yes   yes    512-byte sectors
//	MBR, logical         yes   no
//	others (BSD, Apple)  no    no
//
// Tables are written, and the sectors of an MBR are parsed, by go-diskfs. Its
// reader of GPT is not used: it takes counts and offsets from the disk as they
// are.
//
// The formats are specified by the UEFI specification, chapter 5; what is
// refused is what the kernel refuses (block/partitions/efi.c and msdos.c).
//
// All functions are safe for concurrent use as far as the device is.
package parttable

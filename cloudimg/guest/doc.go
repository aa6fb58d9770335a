// Package guest opens a disk as a machine: partitions, the file systems in
// them, and the operating system on one of these.
//
//	file system          recognised  files read  files changed
//	ext2, ext3, ext4     yes         yes         by package ext4img
//	FAT                  yes         yes         no
//	ISO 9660             yes         yes         no
//	others               by name     no          no
//
// Everything on a disk is written by somebody else: names can have any bytes,
// directories can lead to themselves, and sizes can lie. Paths and symlinks are
// resolved inside the guest, and never lead to a file of the host.
//
// All types are safe for concurrent use, unless they say otherwise.
package guest

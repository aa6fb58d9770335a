package guest

import (
	"cmp"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"qimg/cloudimg/parttable"
	"qimg/ext4img"
	"qimg/qcow2/blockdev"
)

// Disk is a disk taken apart: its partitions and what they are filled with.
type Disk struct {
	// Table is the kind of the partition table: gpt or mbr; "" if the disk has
	// none.
	Table string
	// Volumes are the partitions by number, or the whole disk. A disk with an ISO
	// 9660 file system can have both.
	Volumes []Volume

	dev   blockdev.Reader
	table *parttable.Table // nil: none
}

// Volume is a partition, or a disk that has none.
type Volume struct {
	Number      int   // of the partition, from 1, as the kernel counts; 0: the whole disk
	Start, Size int64 // in bytes
	// Of the partition: its type in words, its name and its PARTUUID.
	PartType, PartName, PartUUID string
	// FS is what it is filled with.
	FS Signature
}

// Open takes a disk apart. Nothing is read of the files in it. The device is
// used until the last call of any method.
func Open(dev blockdev.Reader) (*Disk, error) {
	d := &Disk{dev: dev}
	if err := d.partitions(); err != nil {
		return nil, err
	}
	// A disk that can be burnt, too, has a table in front of the descriptors.
	if whole, err := Detect(dev); err == nil && d.table != nil && whole.Type == "iso9660" {
		d.Volumes = append([]Volume{{Size: dev.Size()}}, d.Volumes...)
	}
	for i := range d.Volumes {
		v := &d.Volumes[i]
		part, err := d.Device(v)
		if err != nil {
			return nil, err
		}
		if v.FS, err = Detect(part); err != nil {
			return nil, fmt.Errorf("%s: %w", v, err)
		}
	}
	return d, nil
}

// partitions fills in what the partition table says. What is wrong with single
// partitions is left out.
func (d *Disk) partitions() error {
	t, err := parttable.Read(d.dev)
	if errors.Is(err, parttable.ErrNoTable) {
		d.Volumes = []Volume{{Size: d.dev.Size()}}
		return nil
	}
	if err != nil {
		return err
	}
	d.Table, d.table = t.Kind.String(), t
	for i := range t.Partitions {
		p := &t.Partitions[i]
		if !p.Extended {
			d.Volumes = append(d.Volumes, Volume{
				Number: p.Number, Start: p.Start, Size: p.Size,
				PartType: cmp.Or(p.Type.Name(), p.Type.String()), PartName: p.Name, PartUUID: p.UUID,
			})
		}
	}
	return nil
}

// Device returns a volume as a disk.
func (d *Disk) Device(v *Volume) (blockdev.Reader, error) {
	if v.Number == 0 {
		return d.dev, nil
	}
	return d.table.ReaderSection(d.dev, v.Number)
}

// WritableDevice returns a volume of dev, the same disk opened for writing. A
// partition that shares bytes with another one is refused.
func (d *Disk) WritableDevice(dev blockdev.Device, v *Volume) (blockdev.Device, error) {
	if v.Number == 0 {
		return dev, nil
	}
	return d.table.Section(dev, v.Number)
}

// String names the volume in messages.
func (v *Volume) String() string {
	if v.Number == 0 {
		return "the disk"
	}
	return fmt.Sprintf("partition %d", v.Number)
}

// IsExt reports whether package ext4img reads and changes the file system.
func (v *Volume) IsExt() bool {
	return v.FS.Type == "ext2" || v.FS.Type == "ext3" || v.FS.Type == "ext4"
}

// readable reports whether the files can be read.
func (v *Volume) readable() bool {
	return v.IsExt() || v.FS.Type == "vfat" || v.FS.Type == "iso9660"
}

// noFiles are the types that are no file systems.
var noFiles = map[string]bool{
	"": true, "swap": true, "swsuspend": true, "crypto_LUKS": true, "LVM2_member": true, "linux_raid_member": true,
	"jbd": true, "bcache": true, "BitLocker": true, "DM_verity_hash": true,
}

// FSOptions say how the files of a volume are read.
type FSOptions struct {
	// Below makes the extents of contents tell where the bytes lie in the files
	// that the disk is made of. Without it they tell what the file system knows:
	// offsets in the volume.
	Below bool
}

// FS opens the file system of a volume. One whose files cannot be read is an
// error that names it and matches ErrUnsupported.
func (d *Disk) FS(v *Volume, opts *FSOptions) (FS, error) {
	dev, err := d.Device(v)
	if err != nil {
		return nil, err
	}
	if opts == nil || !opts.Below {
		dev = flat{dev}
	}
	switch {
	case v.IsExt():
		f, err := ext4img.Open(dev, nil)
		if err != nil {
			return nil, err
		}
		return Ext(f), nil
	case v.FS.Type == "vfat":
		return newFAT(dev)
	case v.FS.Type == "iso9660":
		return newISO(dev)
	case v.FS.Type == "":
		return nil, fmt.Errorf("%s: %w", v, ErrNoFileSystem)
	}
	return nil, fmt.Errorf("%s holds %s: %w", v, v.FS.Type, ErrUnsupported)
}

// flat is a disk that is not looked into.
type flat struct{ blockdev.Reader }

func (f flat) NextExtent(off int64) (blockdev.Extent, error) {
	return blockdev.Extent{Off: off, Len: f.Size() - off, Kind: blockdev.Data, Host: f, HostOff: off}, nil
}

// SelectError says that the choice of a volume is not clear.
type SelectError struct {
	Text    string
	Volumes []Volume // of the disk
	Err     error
}

func (e *SelectError) Error() string { return e.Text }
func (e *SelectError) Unwrap() error { return e.Err }

// Select returns the volume that a name stands for: a number of a partition,
// or label=, uuid=, partlabel= or partuuid= with a value. "" is the only file
// system, or the only one with an operating system.
func (d *Disk) Select(name string) (*Volume, error) {
	if name == "" {
		return d.selectDefault()
	}
	key, value, named := strings.Cut(name, "=")
	number, err := strconv.Atoi(name)
	if !named && err != nil {
		return nil, fmt.Errorf("partition '%s': expected a number, label=, uuid=, partlabel= or partuuid=", name)
	}
	var found []*Volume
	for i := range d.Volumes {
		v := &d.Volumes[i]
		match := false
		switch {
		case !named:
			match = v.Number == number
		case key == "label":
			match = v.FS.Label == value
		case key == "uuid":
			match = strings.EqualFold(v.FS.UUID, value)
		case key == "partlabel":
			match = v.Number > 0 && v.PartName == value
		case key == "partuuid":
			match = v.Number > 0 && strings.EqualFold(v.PartUUID, value)
		}
		if match {
			found = append(found, v)
		}
	}
	switch len(found) {
	case 0:
		return nil, &SelectError{fmt.Sprintf("there is no partition '%s'", name), d.Volumes, ErrNoFileSystem}
	case 1:
		return found[0], nil
	}
	return nil, &SelectError{fmt.Sprintf("there are %d partitions '%s'", len(found), name), d.Volumes, ErrAmbiguous}
}

// IsSelector reports whether a text is in the form of a name for Select.
func IsSelector(name string) bool {
	if n, err := strconv.Atoi(name); err == nil && n >= 0 && name[0] != '+' {
		return true
	}
	key, _, ok := strings.Cut(name, "=")
	return ok && (key == "label" || key == "uuid" || key == "partlabel" || key == "partuuid")
}

func (d *Disk) selectDefault() (*Volume, error) {
	var all []*Volume
	for i := range d.Volumes {
		if v := &d.Volumes[i]; !noFiles[v.FS.Type] {
			all = append(all, v)
		}
	}
	switch len(all) {
	case 0:
		if len(d.Volumes) == 1 && d.Volumes[0].FS.Type != "" {
			return &d.Volumes[0], nil // FS says what it is
		}
		return nil, &SelectError{ErrNoFileSystem.Error(), d.Volumes, ErrNoFileSystem}
	case 1:
		return all[0], nil
	}
	if all[0].Number == 0 {
		return all[0], nil
	}
	var roots []*Volume
	for _, v := range all {
		if d.isRoot(v) {
			roots = append(roots, v)
		}
	}
	if len(roots) == 1 {
		return roots[0], nil
	}
	text := ErrAmbiguous.Error()
	if len(roots) > 1 {
		text += " with an operating system"
	}
	return nil, &SelectError{text, d.Volumes, ErrAmbiguous}
}

// isRoot reports whether a volume holds an operating system. One that is
// damaged, or not read, does not.
func (d *Disk) isRoot(v *Volume) bool {
	if !v.readable() {
		return false
	}
	fsys, err := d.FS(v, nil)
	if err != nil {
		return false
	}
	_, err = osRelease(fsys)
	return err == nil
}

package guest

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"strings"
	"unicode/utf16"

	"qimg/ext4img"
	"qimg/qcow2/blockdev"
)

// Signature tells what a partition, or a whole disk, is filled with.
type Signature struct {
	// Type is named as blkid names it: ext4, xfs, vfat, swap, crypto_LUKS,
	// LVM2_member, linux_raid_member and so on; "" if nothing was recognised.
	Type    string
	Version string // of the format, where there are several
	Label   string
	UUID    string // as blkid prints it
	// Size and Used are in bytes; -1: not known.
	Size, Used int64
}

// detector looks at the first bytes and the end of a device.
type detector struct {
	dev  blockdev.Reader
	head []byte // the first 128 KiB
	sig  Signature
}

// detectHead is how much of a device is looked at, but for what lies at its end.
const detectHead = 128 << 10

// Detect tells what a device is filled with by its magic numbers, as libblkid
// does (util-linux, libblkid/src/superblocks). An error is one of the device.
func Detect(dev blockdev.Reader) (Signature, error) {
	d := &detector{dev: dev, head: make([]byte, min(detectHead, dev.Size()))}
	if n, err := dev.ReadAt(d.head, 0); n < len(d.head) && err != nil && err != io.EOF {
		return Signature{}, err
	}
	// What is sure comes before what is one word of magic.
	for _, probe := range []func(*detector) bool{
		(*detector).luks, (*detector).lvm, (*detector).raid, (*detector).squashfs, (*detector).xfs, (*detector).btrfs,
		(*detector).swap, (*detector).iso9660, (*detector).udf, (*detector).f2fs, (*detector).erofs, (*detector).apfs,
		(*detector).others, (*detector).zfs, (*detector).ext, (*detector).ntfs, (*detector).fat,
	} {
		d.sig = Signature{Size: -1, Used: -1}
		if probe(d) {
			return d.sig, nil
		}
	}
	return Signature{Size: -1, Used: -1}, nil
}

// at returns n bytes at off of the beginning, nil if there are none.
func (d *detector) at(off, n int) []byte {
	if off+n > len(d.head) {
		return nil
	}
	return d.head[off : off+n]
}

// is reports whether a magic number is there.
func (d *detector) is(off int, magic string) bool { return string(d.at(off, len(magic))) == magic }

// found fills in the signature.
func (d *detector) found(typ string, label, uuid []byte) bool {
	d.sig.Type, d.sig.Label = typ, cString(label)
	if len(uuid) == 16 && !allZero(uuid) {
		d.sig.UUID = formatUUID(uuid)
	}
	return true
}

// size fills in the sizes, unless they cannot be.
func (d *detector) size(unit, total, free uint64) {
	const limit = 1 << 62
	if unit == 0 || total > limit/unit || free > total {
		return
	}
	d.sig.Size, d.sig.Used = int64(unit*total), int64(unit*(total-free))
}

func cString(b []byte) string {
	s, _, _ := strings.Cut(string(b), "\x00")
	return s
}

func allZero(b []byte) bool { return len(bytes.Trim(b, "\x00")) == 0 }

func formatUUID(b []byte) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:16])
}

// utf16Label is a label in UTF-16, little endian.
func utf16Label(b []byte) []byte {
	var units []uint16
	for ; len(b) > 1; b = b[2:] {
		u := binary.LittleEndian.Uint16(b)
		if u == 0 {
			break
		}
		units = append(units, u)
	}
	return []byte(string(utf16.Decode(units)))
}

func (d *detector) ext() bool {
	b := d.at(1024, 1024)
	if b == nil || binary.LittleEndian.Uint16(b[0x38:]) != 0xef53 {
		return false
	}
	le := binary.LittleEndian
	compat, incompat, ro := ext4img.Compat(le.Uint32(b[0x5c:])), ext4img.Incompat(le.Uint32(b[0x60:])), ext4img.ROCompat(le.Uint32(b[0x64:]))
	const ext3Incompat = ext4img.IncompatFiletype | ext4img.IncompatRecover | ext4img.IncompatMetaBG
	const ext3RO = ext4img.ROCompatSparseSuper | ext4img.ROCompatLargeFile | ext4img.ROCompat(4)
	typ := "ext2"
	switch {
	case incompat&ext4img.IncompatJournalDev != 0:
		typ = "jbd"
	case incompat&^ext3Incompat != 0 || ro&^ext3RO != 0:
		typ = "ext4"
	case compat&ext4img.CompatHasJournal != 0:
		typ = "ext3"
	}
	d.found(typ, b[0x78:0x88], b[0x68:0x78])
	if log := le.Uint32(b[0x18:]); log <= 6 {
		total, free := uint64(le.Uint32(b[4:])), uint64(le.Uint32(b[0xc:]))
		if incompat&ext4img.Incompat64bit != 0 {
			total |= uint64(le.Uint32(b[0x150:])) << 32
			free |= uint64(le.Uint32(b[0x158:])) << 32
		}
		if cluster := le.Uint32(b[0x1c:]); ro&ext4img.ROCompatBigalloc != 0 && log <= cluster && cluster < 20 {
			free <<= cluster - log
		}
		d.size(1024<<log, total, free)
	}
	return true
}

func (d *detector) xfs() bool {
	b := d.at(0, 512)
	if b == nil || !d.is(0, "XFSB") {
		return false
	}
	be := binary.BigEndian
	d.found("xfs", b[108:120], b[32:48])
	d.size(uint64(be.Uint32(b[4:])), be.Uint64(b[8:]), be.Uint64(b[144:]))
	return true
}

func (d *detector) btrfs() bool {
	b := d.at(0x10000, 4096)
	if b == nil || !d.is(0x10040, "_BHRfS_M") {
		return false
	}
	le := binary.LittleEndian
	d.found("btrfs", b[0x12b:0x22b], b[0x20:0x30])
	if total, used := le.Uint64(b[0x70:]), le.Uint64(b[0x78:]); used <= total {
		d.size(1, total, total-used)
	}
	return true
}

func (d *detector) swap() bool {
	for _, page := range []int{4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10} {
		switch {
		case d.is(page-10, "SWAPSPACE2"):
			d.found("swap", d.at(1024+28, 16), d.at(1024+12, 16))
			d.sig.Version = "1"
			if last := binary.LittleEndian.Uint32(d.at(1024+4, 4)); last > 0 {
				d.sig.Size = int64(page) * (int64(last) + 1)
			}
			return true
		case d.is(page-10, "SWAP-SPACE"):
			d.found("swap", nil, nil)
			d.sig.Version = "0"
			return true
		case d.is(page-10, "S1SUSPEND"), d.is(page-10, "S2SUSPEND"), d.is(page-10, "LINHIB0001"):
			return d.found("swsuspend", d.at(1024+28, 16), d.at(1024+12, 16))
		}
	}
	return false
}

func (d *detector) luks() bool {
	b := d.at(0, 512)
	if b == nil || !d.is(0, "LUKS\xba\xbe") {
		return false
	}
	version := binary.BigEndian.Uint16(b[6:])
	d.found("crypto_LUKS", nil, nil)
	if version == 2 {
		d.sig.Label = cString(b[24:72])
	}
	d.sig.Version, d.sig.UUID = fmt.Sprint(version), cString(b[168:208])
	return true
}

func (d *detector) lvm() bool {
	for off := 0; off < 2048; off += 512 {
		if d.is(off, "LABELONE") && d.is(off+24, "LVM2 001") && d.at(off, 512) != nil {
			d.found("LVM2_member", nil, nil)
			id := string(d.at(off+32, 32))
			for i, n := range []int{6, 4, 4, 4, 4, 4, 6} {
				if i > 0 {
					d.sig.UUID += "-"
				}
				d.sig.UUID, id = d.sig.UUID+id[:n], id[n:]
			}
			return true
		}
	}
	return false
}

func (d *detector) raid() bool {
	const magic = "\xfc\x4e\x2b\xa9"
	for off, version := range map[int]string{0: "1.1", 4096: "1.2"} {
		if b := d.at(off, 64); b != nil && d.is(off, magic) {
			d.found("linux_raid_member", b[32:64], b[16:32])
			d.sig.Version = version
			return true
		}
	}
	size := d.dev.Size()
	b := make([]byte, 64)
	tail := func(off int64, version string) bool {
		if off < 0 || off+64 > size {
			return false
		}
		if n, _ := d.dev.ReadAt(b, off); n < len(b) || string(b[:4]) != magic {
			return false
		}
		d.sig.Version = version
		return true
	}
	if tail((size/512-16)&^7*512, "1.0") {
		return d.found("linux_raid_member", b[32:64], b[16:32])
	}
	if tail(size&^(64<<10-1)-64<<10, "0.90.0") {
		return d.found("linux_raid_member", nil, append(append([]byte{}, b[20:24]...), b[52:64]...))
	}
	return false
}

func (d *detector) squashfs() bool {
	b := d.at(0, 96)
	if b == nil || !d.is(0, "hsqs") {
		return false
	}
	d.found("squashfs", nil, nil)
	if size := binary.LittleEndian.Uint64(b[40:]); size < 1<<62 {
		d.size(1, size, 0)
	}
	return true
}

func (d *detector) iso9660() bool {
	b := d.at(0x8000, 2048)
	if b == nil || !d.is(0x8001, "CD001") || b[0] != 1 {
		return false
	}
	d.found("iso9660", bytes.TrimRight(b[40:72], " "), nil)
	for _, date := range [][]byte{b[830:846], b[813:829]} { // of modification, of creation
		if len(bytes.Trim(date, "0\x00")) > 0 {
			s := string(date)
			d.sig.UUID = fmt.Sprintf("%s-%s-%s-%s-%s-%s-%s", s[:4], s[4:6], s[6:8], s[8:10], s[10:12], s[12:14], s[14:16])
			break
		}
	}
	d.size(uint64(binary.LittleEndian.Uint16(b[128:])), uint64(binary.LittleEndian.Uint32(b[80:])), 0)
	return true
}

func (d *detector) udf() bool {
	for off := 0x8000; off < 0x10000; off += 2048 {
		if d.is(off+1, "NSR02") || d.is(off+1, "NSR03") {
			return d.found("udf", nil, nil)
		}
	}
	return false
}

func (d *detector) f2fs() bool {
	b := d.at(1024, 0x7c+1024)
	if b == nil || !d.is(1024, "\x10\x20\xf5\xf2") {
		return false
	}
	return d.found("f2fs", utf16Label(b[0x7c:0x7c+1024]), b[0x6c:0x7c])
}

func (d *detector) erofs() bool {
	b := d.at(1024, 128)
	if b == nil || !d.is(1024, "\xe2\xe1\xf5\xe0") {
		return false
	}
	return d.found("erofs", b[64:80], b[48:64])
}

func (d *detector) apfs() bool {
	if b := d.at(0, 96); b != nil && d.is(32, "NXSB") {
		return d.found("apfs", nil, b[72:88])
	}
	return false
}

// zfs looks for the magic number of an uberblock of the first label.
func (d *detector) zfs() bool {
	if d.dev.Size() < 1<<20 {
		return false
	}
	b := make([]byte, 128<<10)
	if n, _ := d.dev.ReadAt(b, 128<<10); n < len(b) {
		return false
	}
	for off := 0; off < len(b); off += 1024 {
		if v := binary.LittleEndian.Uint64(b[off:]); v == 0x00bab10c || v == 0x0cb1ba00<<32 {
			return d.found("zfs_member", nil, nil)
		}
	}
	return false
}

// others are formats that are told by name alone.
func (d *detector) others() bool {
	for _, o := range []struct {
		off         int
		magic, name string
	}{
		{0, "bcachefs", "bcachefs"},
		{4096 + 24, "\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81", "bcache"},
		{4096 + 24, "\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef", "bcachefs"},
		{3, "-FVE-FS-", "BitLocker"},
		{3, "EXFAT   ", "exfat"},
		{0, "ReFS", "ReFS"},
		{3, "ReFS", "ReFS"},
		{0, "verity\x00\x00", "DM_verity_hash"},
		{0, "\x45\x3d\xcd\x28", "cramfs"},
		{0x8000, "JFS1", "jfs"},
		{0x10000 + 52, "ReIsErFs", "reiserfs"},
		{0x10000 + 52, "ReIsEr2Fs", "reiserfs"},
		{0x10000 + 52, "ReIsEr3Fs", "reiserfs"},
		{0x10000 + 1372, "\x54\x19\x01\x00", "ufs"},
		{0x10000 + 1372, "\x19\x01\x54\x19", "ufs"},
		{8192 + 1372, "\x54\x19\x01\x00", "ufs"},
		{1024 + 6, "\x34\x34", "nilfs2"},
		{1024, "H+\x00\x04", "hfsplus"},
		{1024, "HX\x00\x05", "hfsplus"},
	} {
		if d.is(o.off, o.magic) {
			return d.found(o.name, nil, nil)
		}
	}
	return false
}

func (d *detector) ntfs() bool {
	b := d.at(0, 512)
	if b == nil || !d.is(3, "NTFS    ") {
		return false
	}
	d.found("ntfs", nil, nil)
	le := binary.LittleEndian
	d.sig.UUID = fmt.Sprintf("%016X", le.Uint64(b[0x48:]))
	if total := le.Uint64(b[0x28:]); total < 1<<53 {
		d.sig.Size = int64(total) * int64(le.Uint16(b[11:]))
	}
	return true
}

func (d *detector) fat() bool {
	if d.at(0, 512) == nil {
		return false
	}
	v, err := newFAT(d.dev)
	if err != nil {
		return false
	}
	d.found("vfat", nil, nil)
	d.sig.Version = fmt.Sprintf("FAT%d", v.bits)
	d.sig.Label = v.label()
	if v.serial != 0 {
		d.sig.UUID = fmt.Sprintf("%04X-%04X", v.serial>>16, v.serial&0xffff)
	}
	d.sig.Size = v.totalSectors * v.sectorSize
	return true
}

package qcow2_test

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/oracle"
)

// poke is bytes that are put into a file.
type poke struct {
	off int64
	b   []byte
}

func poke64(off int64, v uint64) poke { return poke{off, binary.BigEndian.AppendUint64(nil, v)} }
func poke16(off int64, v uint16) poke { return poke{off, binary.BigEndian.AppendUint16(nil, v)} }

// TestRepairLikeIotests: the broken images that QEMU's own tests 060, 080, 108
// and 138 make, repaired by both. Tables lie where qemu-img create puts them.
func TestRepairLikeIotests(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	const (
		copied            = 1 << 63
		reftable, block   = 0x10000, 0x20000
		l1, l2, data      = 0x30000, 0x40000, 0x50000
		write64k          = "write -P 42 0 64k"
		small             = "cluster_size=512"
		refcountBits1     = "refcount_bits=1"
		refcountTable     = 48
		refcountTableSize = 56
	)
	for _, c := range []struct {
		name, opts, size string
		before           []string // of qemu-io
		snapshot         bool     // is made then
		after            []string // of qemu-io
		pokes            []poke
		length           int64 // of the file then; 0: as it is
		// only tells why qemu-img ends otherwise.
		only string
	}{
		{name: "060 L2 reference into L1", size: "64M", pokes: []poke{poke64(l1, l1|copied)}, only: "qemu-img fails"},
		{name: "060 data reference into refcount block", size: "64M", length: l2 + 0x10000,
			pokes: []poke{poke64(l1, l2|copied), poke16(block+8, 1), poke64(l2, block|copied)}},
		{name: "060 data reference into inactive L2 table", size: "64M", before: []string{"write -P 1 0 512"}, snapshot: true,
			after: []string{"write -P 2 0 512"}, pokes: []poke{poke64(0x80000, l2|copied)}},
		{name: "060 unallocated header", size: "64M", before: []string{write64k}, pokes: []poke{poke16(block, 0)}},
		{name: "060 unaligned L1 entry", size: "64M", before: []string{write64k}, pokes: []poke{poke64(l1, copied|0x42a00)},
			only: "the leaked clusters may be those of the L2 table"},
		{name: "060 unaligned L2 entry", size: "64M", before: []string{write64k}, pokes: []poke{poke64(l2, copied|0x52a00)}},
		{name: "060 unaligned zero cluster", size: "64M", before: []string{write64k}, pokes: []poke{poke64(l2, copied|0x52a01)}},
		{name: "060 zero cluster in the header", size: "64M", before: []string{write64k}, pokes: []poke{poke64(l2, copied|0x2a01)}},
		{name: "060 unaligned refcount block", size: "64M", pokes: []poke{poke64(reftable, 0x22a00)}, only: "qemu-img fails"},
		{name: "060 unaligned refcount block, dirty", size: "64M", pokes: []poke{poke64(reftable, 0xffff2a00), {79, []byte{1}}}, only: "qemu-img fails"},
		{name: "060 empty refcount table", size: "64M", pokes: []poke{poke64(reftable, 0)}},
		{name: "060 empty refcount table with data", size: "64M", before: []string{write64k}, pokes: []poke{poke64(reftable, 0)}},
		{name: "060 empty refcount block", size: "64M", before: []string{write64k}, pokes: []poke{poke64(block, 0)}},
		{name: "060 zero refcount table size", size: "64M", before: []string{write64k}, pokes: []poke{{refcountTableSize, make([]byte, 4)}}},
		{name: "060 wrong refcount table offset", size: "64M", before: []string{write64k}, pokes: []poke{poke64(refcountTable, 0)}},
		{name: "060 refcount block out of bounds", size: "64M", pokes: []poke{poke64(reftable+8, 0x00ffffff00000000)}, only: "qemu-img makes the file that long or fails"},
		{name: "060 refcount block that none covers", opts: refcountBits1, size: "64M", pokes: []poke{poke64(reftable+8, 0x1000000000)}, only: "qemu-img makes the file that long"},
		{name: "060 refcount block covered by an unaligned one", opts: refcountBits1, size: "64M",
			pokes: []poke{poke64(reftable+8, 0x1000000000), poke64(reftable+16, 0x200)}, only: "qemu-img makes the file that long"},
		{name: "080 huge L2 entry", size: "64M", before: []string{"write 0 512"}, pokes: []poke{poke64(l2, 0xbfffffffffff0000)}, only: "reserved bits are cleared"},
		{name: "080 large L2 entry", size: "64M", before: []string{"write 0 512"}, pokes: []poke{poke64(l2, 0x800000ffffff0000)}},
		{name: "080 snapshot L1 table offset", size: "64M", before: []string{"write 0 512"}, snapshot: true, pokes: []poke{poke64(0x70000, 0x400200)},
			only: "what leaked may be of the snapshot"},
		{name: "080 snapshot L1 table size", size: "64M", before: []string{"write 0 512"}, snapshot: true, pokes: []poke{{0x70008, []byte{0x10, 0, 0, 0}}},
			only: "what leaked may be of the snapshot"},
		{name: "080 too many snapshots", size: "64M", pokes: []poke{{60, []byte{0, 1, 0, 1}}}, only: "there are none in the file"},
		{name: "108 no refcount table", size: "64M", before: []string{write64k}, pokes: []poke{poke64(refcountTable, 0), {refcountTableSize, make([]byte, 4)}}},
		{name: "108 data in new refcount block area", opts: small, size: "64M", before: []string{"write 0 0x1b200"}, length: 0x20200,
			pokes: []poke{poke64(0x1ccc8, 0x20000|copied)}},
		{name: "108 refcount block behind the end", size: "64M", pokes: []poke{poke64(reftable+8, 0x100000), poke16(block+32, 1)}},
		{name: "108 refcount block behind the end, free", size: "64M", pokes: []poke{poke64(reftable+8, 0x100000)}},
		{name: "108 signed overflow", size: "64M", pokes: []poke{poke64(reftable+8, 0x7fffffffffff0000)}},
		{name: "108 unsigned overflow", size: "64M", pokes: []poke{poke64(reftable+8, 0xffffffffffff0000)}},
		{name: "138 32 PB", opts: small, size: "512", before: []string{"write 0 512"}, pokes: []poke{poke64(2048+8, 0x0080000000000000)}},
		{name: "138 leak and corruption", size: "64k", before: []string{"write 0 64k"}, pokes: []poke{poke16(block, 2), poke64(l1, l2)}},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "x")
			args := []string{"create", "-q", "-f", "qcow2"}
			if c.opts != "" {
				args = append(args, "-o", c.opts)
			}
			oracle.MustRun(t, "qemu-img", append(args, path, c.size)...)
			for _, cmd := range c.before {
				oracle.MustRun(t, "qemu-io", "-c", cmd, path)
			}
			if c.snapshot {
				oracle.MustRun(t, "qemu-img", "snapshot", "-c", "foo", path)
			}
			for _, cmd := range c.after {
				oracle.MustRun(t, "qemu-io", "-c", cmd, path)
			}
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			if c.length > 0 {
				err = f.Truncate(c.length)
			}
			for _, p := range c.pokes {
				if err == nil {
					_, err = f.WriteAt(p.b, p.off)
				}
			}
			f.Close()
			if err != nil {
				t.Fatal(err)
			}
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			dev := disk(t, b)
			guest := guestOf(dev)
			res := repair(t, dev, &qcow2.RepairOptions{Found: func(f qcow2.Finding) { t.Log(f) }})
			sameGuest(t, guest, guestOf(dev))
			converges(t, bytesOf(t, dev))
			write(t, path, bytesOf(t, dev))
			after := runQEMUCheck(t, path)
			if res.Clean() && after.code != 0 {
				t.Errorf("%+v; qemu-img is not content: %+v", res, after)
			}
			if c.only != "" {
				return
			}
			write(t, path, b)
			if want := runQEMUCheck(t, path, "-r", "all"); want.code != after.code {
				t.Errorf("exit %d, %+v; qemu-img: %+v", after.code, res, want)
			}
		})
	}
}

// fixedSize is a device that cannot grow.
type fixedSize struct{ blockdev.Device }

// TestRepairFixedSize: on a device that cannot grow the space behind the last
// cluster in use serves.
func TestRepairFixedSize(t *testing.T) {
	x := qcow2.NewTiny()
	x.Put(qcow2.TinyL2, qcow2.TinyData)
	b := append(x.Bytes(), make([]byte, 4096)...)
	dev := disk(t, b)
	res, err := qcow2.Repair(t.Context(), fixedSize{dev}, nil)
	if err != nil || !res.Clean() || dev.Size() != int64(len(b)) {
		t.Errorf("%+v, %v", res, err)
	}
	sameGuest(t, qcow2.TinyGuest(), guestOf(dev))
	dev = disk(t, x.Bytes())
	if _, err := qcow2.Repair(t.Context(), fixedSize{dev}, nil); err == nil {
		t.Error("there is no room, and no error")
	}
}

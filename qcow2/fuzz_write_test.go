package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"testing"

	"qimg/qcow2/blockdev"
)

// fuzzImages are small valid images of several kinds.
func fuzzImages(t testing.TB) [][]byte {
	tiny := NewTiny()
	list := [][]byte{tiny.Bytes()}
	add := func(o FormatOptions, work func(im *Image) error) {
		dev := blockdev.NewMemory(0)
		if err := Create(context.Background(), dev, 96<<10, &CreateOptions{FormatOptions: o}); err != nil {
			t.Fatal(err)
		}
		im, err := New(dev, &OpenOptions{Write: true})
		if err != nil {
			t.Fatal(err)
		}
		for off := int64(0); off < 40<<10; off += 7000 {
			if _, err := im.WriteAt(bytes.Repeat([]byte{byte(off>>9) | 1}, 3000), off); err != nil {
				t.Fatal(err)
			}
		}
		if err := im.WriteZeroes(20<<10, 4<<10); err != nil {
			t.Fatal(err)
		}
		if work != nil {
			if err := work(im); err != nil {
				t.Fatal(err)
			}
		}
		if err := im.Close(); err != nil {
			t.Fatal(err)
		}
		list = append(list, memoryBytes(dev))
	}
	snapshot := func(im *Image) error {
		if _, err := im.CreateSnapshot(context.Background(), "s", nil); err != nil {
			return err
		}
		_, err := im.WriteAt(bytes.Repeat([]byte{0x77}, 3000), 100)
		return err
	}
	add(FormatOptions{ClusterSize: 512}, snapshot)
	add(FormatOptions{ClusterSize: 512, RefcountBits: 1}, nil)
	add(FormatOptions{ClusterSize: 512, RefcountBits: 64}, snapshot)
	add(FormatOptions{ClusterSize: 4096, Version: 2}, snapshot)
	add(FormatOptions{ClusterSize: 16 << 10, ExtendedL2: true}, snapshot)
	add(FormatOptions{ClusterSize: 4096, LazyRefcounts: true}, func(im *Image) error {
		return im.AddBitmap(context.Background(), "b", &BitmapOptions{Granularity: 512})
	})
	return list
}

// fuzzFields returns where an image has its fields: those of the header and the
// entries of its tables; and the sectors of the tables that no guest write
// moves.
func fuzzFields(b []byte) (fields []int64, tables []int64) {
	im, err := New(fuzzMemory(b), &OpenOptions{Backing: BackingIgnore})
	if err != nil {
		return nil, nil
	}
	defer im.Close()
	h, g := &im.header, &im.geo
	entries := func(off, n int64) {
		for at := off; 0 <= at && at < off+n && at+8 <= int64(len(b)); at += 8 {
			fields = append(fields, at)
		}
	}
	table := func(off, n int64) {
		entries(off, n)
		for at := off &^ 511; 0 <= at && at < off+n && at+512 <= int64(len(b)); at += 512 {
			tables = append(tables, at)
		}
	}
	table(0, headerSizeNow)
	table(int64(h.L1TableOffset), int64(h.L1Size)*l1EntrySize)
	table(int64(h.RefcountTableOffset), 16) // the rest is empty
	for at := int64(h.RefcountTableOffset); at+8 <= int64(len(b)); at += 8 {
		off := int64(binary.BigEndian.Uint64(b[at:]))
		if off <= 0 {
			break
		}
		table(off, min(g.clusterSize, 256))
	}
	for i := range int64(h.L1Size) {
		if off := int64(im.l1Entry(i) & l1OffsetMask); off != 0 {
			entries(off, min(g.clusterSize, 512))
		}
	}
	if h.NbSnapshots > 0 {
		table(int64(h.SnapshotsOffset), im.snapEnd-int64(h.SnapshotsOffset))
		for _, s := range im.snapshots {
			if int64(s.L1Size)*l1EntrySize > maxL1Size {
				continue // which is no table
			}
			table(int64(s.L1TableOffset), int64(s.L1Size)*l1EntrySize)
		}
	}
	if x, ok := h.Bitmaps(); ok {
		table(int64(x.DirectoryOffset), int64(x.DirectorySize))
	}
	return fields, tables
}

func fuzzMemory(b []byte) *blockdev.Memory {
	m := blockdev.NewMemory(int64(len(b)))
	if _, err := m.WriteAt(b, 0); err != nil {
		panic(err)
	}
	return m
}

// FuzzWrite changes fields of valid images, and then writes to them what the
// rest of the input says. Each edit has six bytes: which field, which of its
// bytes or bits, and how. Whatever the image is then, nothing panics, takes
// long or much memory, and no guest data goes upon a table that the image has
// had. An image that is not damaged stays so.
func FuzzWrite(f *testing.F) {
	images := fuzzImages(f)
	for i := range images {
		f.Add(byte(i), []byte{}, []byte("\x00\x00\x10\x20\x01\x00\x40\x08\x02\x00\x80\x04\x03"))
		f.Add(byte(i), []byte{9, 0, 3, 1, 0, 0, 20, 0, 0, 0, 2, 5}, []byte("\x00\x10\x10\x20\x04\x04\x05\x06"))
	}
	fields := make([][]int64, len(images))
	for i, b := range images {
		fields[i], _ = fuzzFields(b)
	}
	f.Fuzz(func(t *testing.T, which byte, edits, ops []byte) {
		i := int(which) % len(images)
		b := bytes.Clone(images[i])
		for ; len(edits) >= 6; edits = edits[6:] {
			fuzzEdit(b, fields[i], edits)
		}
		fuzzUse(t, b, ops, bytes.Equal(b, images[i]))
	})
}

// fuzzEdit changes one field.
func fuzzEdit(b []byte, fields []int64, e []byte) {
	at := fields[int(binary.LittleEndian.Uint16(e))%len(fields)]
	v := binary.BigEndian.Uint64(b[at:])
	other := fields[int(binary.LittleEndian.Uint16(e[2:]))%len(fields)]
	switch e[4] % 8 {
	case 0: // one bit
		v ^= 1 << (e[5] % 64)
	case 1: // what another field has
		v = binary.BigEndian.Uint64(b[other:])
	case 2: // where another field is
		v = v&^l1OffsetMask | uint64(other)&^511
	case 3: // a byte
		shift := 8 * (e[5] % 8)
		v = v&^(0xff<<shift) | uint64(e[2])<<shift
	case 4: // small steps
		v += uint64(int64(int8(e[5])))
	case 5:
		v = 0
	case 6: // steps of a sector
		v += uint64(int64(int8(e[5]))) << 9
	case 7: // a large number
		v = 1<<(e[5]%64) - uint64(e[2]%3)
	}
	binary.BigEndian.PutUint64(b[at:], v)
}

// fuzzUse writes to an image and checks what is left.
func fuzzUse(t *testing.T, b, ops []byte, valid bool) {
	dev := fuzzMemory(b)
	sound := false
	var im *Image
	var err error
	var use Use
	use.Of(func() {
		if im, err := New(dev, nil); err == nil {
			res, err := im.Check(t.Context(), nil)
			sound = err == nil && res.Corruptions+res.CheckErrors == 0
			im.Close()
		}
		im, err = New(dev, &OpenOptions{Write: true})
	})
	use.Bounded(t, dev, len(b))
	if err != nil {
		if valid {
			t.Fatal(err)
		}
		return
	}
	size, guestOnly := im.Size(), true
	if dev.Size() > 64<<20 {
		t.Fatalf("opening has made the file %d bytes long", dev.Size())
	}
	// Opening repairs an image with the dirty bit, and so moves tables.
	_, tables := fuzzFields(memoryBytes(dev))
	refcountTable := im.header.RefcountTableOffset
	fill := bytes.Repeat([]byte{0xa7}, 8<<10)
	for i := 0; len(ops) >= 4 && i < 12; i++ {
		off := int64(binary.LittleEndian.Uint16(ops)) << 4
		n := int64(ops[2]) << 5
		if ops[3]&8 != 0 {
			off = size - off // at the end of the disk
		}
		use.Of(func() {
			switch ops[3] % 8 {
			case 0, 1, 2:
				_, err = im.WriteAt(fill[:n], off)
			case 3:
				err = im.WriteZeroes(off, n)
			case 4:
				err = im.Discard(off, n)
			case 5:
				err = im.Sync()
			case 6:
				guestOnly = false
				_, err = im.CreateSnapshot(t.Context(), "new", nil)
			case 7:
				guestOnly = false
				err = im.DeleteSnapshot(t.Context(), "s")
			}
		})
		if valid && err != nil && !errors.Is(err, blockdev.ErrRange) && !errors.Is(err, ErrNotFound) && !errors.Is(err, ErrLimit) {
			t.Fatal(err)
		}
		ops = ops[4:]
	}
	use.Of(func() { err = im.Close() })
	if valid && err != nil {
		t.Fatal(err)
	}
	use.Bounded(t, dev, len(b))
	if guestOnly && im.header.RefcountTableOffset == refcountTable {
		sector := make([]byte, 512)
		for _, at := range tables {
			if _, err := dev.ReadAt(sector, at); err == nil && bytes.Equal(sector, fill[:512]) {
				t.Fatalf("guest data lies upon the table at %#x", at)
			}
		}
	}
	if !sound {
		return
	}
	im, err = New(dev, nil)
	if err != nil {
		t.Fatalf("a sound image cannot be opened any more: %v", err)
	}
	defer im.Close()
	res, err := im.Check(t.Context(), nil)
	if err != nil || res.Corruptions+res.CheckErrors > 0 {
		t.Fatalf("a sound image has become corrupt: %+v, %v", res, err)
	}
}

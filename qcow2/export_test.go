package qcow2

import (
	"bytes"
	"encoding/binary"

	"github.com/klauspost/compress/flate"
)

// Tiny is a valid image of 512-byte clusters: header, refcount table, refcount
// block, L1 table, L2 table, a data cluster, a cluster with a compressed one.
// Its guest of 32 KiB holds data at 0, zeroes at 512, compressed data at 1024,
// and nothing else.
type Tiny struct {
	Header Header
	Image  []byte
}

// Offsets in the image of Tiny.
const (
	TinyReftable = 512
	TinyRefblock = 1024
	TinyL1       = 1536
	TinyL2       = 2048
	TinyData     = 2560
	TinyPacked   = 3072
	TinyEnd      = 3584
	TinySize     = 32768
)

// TinyGuest is what the guest of a Tiny reads.
func TinyGuest() []byte {
	b := make([]byte, TinySize)
	for i := range 512 {
		b[i], b[1024+i] = byte(i), byte(i/64)
	}
	return b
}

func NewTiny() *Tiny {
	t := &Tiny{
		Header: Header{
			Version: 3, ClusterBits: 9, Size: TinySize,
			L1Size: 1, L1TableOffset: TinyL1,
			RefcountTableOffset: TinyReftable, RefcountTableClusters: 1,
			RefcountOrder: 4,
		},
		Image: make([]byte, TinyEnd),
	}
	guest := TinyGuest()
	copy(t.Image[TinyData:], guest[:512])
	var packed bytes.Buffer
	w, err := flate.NewWriter(&packed, 9)
	if err != nil {
		panic(err)
	}
	w.Write(guest[1024:1536])
	w.Close()
	copy(t.Image[TinyPacked:], packed.Bytes()) // at most one sector
	t.Put(TinyReftable, TinyRefblock)
	for i := range TinyEnd / 512 {
		binary.BigEndian.PutUint16(t.Image[TinyRefblock+2*i:], 1)
	}
	t.Put(TinyL1, TinyL2|oflagCopied)
	t.Put(TinyL2, TinyData|oflagCopied)
	t.Put(TinyL2+8, oflagZero)
	t.Put(TinyL2+16, TinyPacked|oflagCompressed)
	return t
}

// Put stores a table entry.
func (t *Tiny) Put(off int, entry uint64) { binary.BigEndian.PutUint64(t.Image[off:], entry) }

// Bytes returns the image with its header.
func (t *Tiny) Bytes() []byte {
	b := bytes.Clone(t.Image)
	copy(b, t.Header.appendTo(nil))
	return b
}

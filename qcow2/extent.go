package qcow2

import (
	"fmt"
	"os"

	"qimg/qcow2/blockdev"
)

// maxPieces bounds the work of one NextExtent call: parts of L2 tables that it
// joins to one extent.
const maxPieces = 4096

// NextExtent implements blockdev.ExtentReader. It returns a run of one kind that
// starts at off, which may end early: what follows it can be of the same kind.
// Work is in proportion to the tables of the run, not to its length: one without
// L2 tables is one step.
//
// Host is the image file, a backing file or the data file, nil for compressed
// and encrypted data. Zero and Unallocated extents can have one too: space
// that is kept. Bytes of Host beyond its end count as zeroes.
func (im *Image) NextExtent(off int64) (blockdev.Extent, error) {
	defer im.rlock()()
	if im.closed.Load() {
		return blockdev.Extent{}, fmt.Errorf("qcow2: next extent: %w", os.ErrClosed)
	}
	if off < 0 || off >= im.size {
		return blockdev.Extent{}, fmt.Errorf("qcow2: next extent at offset %d of %d: %w", off, im.size, blockdev.ErrRange)
	}
	return im.nextExtent(off)
}

// nextExtent is NextExtent with im.mu held.
func (im *Image) nextExtent(off int64) (blockdev.Extent, error) {
	e, whole, err := im.piece(off, im.size-off)
	if err != nil {
		return blockdev.Extent{}, err
	}
	for i := 0; i < maxPieces && whole && e.Off+e.Len < im.size; i++ {
		next, ok, err := im.piece(e.Off+e.Len, im.size-e.Off-e.Len)
		// Two pieces of one depth lie in one file.
		if err != nil || !ok || next.Kind != e.Kind || next.Depth != e.Depth || (next.Host == nil) != (e.Host == nil) ||
			e.Host != nil && next.HostOff != e.HostOff+e.Len {
			break
		}
		e.Len += next.Len
	}
	return e, nil
}

// piece is an extent of at most limit bytes from one part of a table. joins is
// false if it comes from a device that this package does not know, whose
// pieces cannot be compared.
func (im *Image) piece(off, limit int64) (e blockdev.Extent, joins bool, err error) {
	r, err := im.lookup(off, limit)
	if err != nil {
		return e, false, err
	}
	e = blockdev.Extent{Off: off, Len: r.n}
	if r.host >= 0 && im.header.CryptMethod == CryptNone {
		if im.data == nil {
			return e, false, im.noFile("external data file", im.header.DataFile())
		}
		e.Host, e.HostOff = im.data, r.host
	}
	switch r.kind {
	case runZero:
		e.Kind = blockdev.Zero
	case runData:
		e.Kind = blockdev.Data
	case runCompressed:
		e.Kind = blockdev.Compressed
	case runUnallocated:
		if im.backing == nil && im.header.BackingFile != "" {
			return e, false, im.noFile("backing file", im.header.BackingFile)
		}
		if im.backing == nil || off >= sectors(im.backing.Size()) {
			e.Kind = blockdev.Unallocated
			return e, true, nil
		}
		e, joins, err = backingPiece(im.backing, off, min(r.n, sectors(im.backing.Size())-off))
		e.Depth++
		return e, joins, im.inBacking(err)
	}
	return e, true, nil
}

// sectors rounds a size up to sectors, which is what a guest sees of a raw
// backing file.
func sectors(n int64) int64 { return roundUp(n, sectorSize) }

func backingPiece(dev blockdev.Reader, off, limit int64) (blockdev.Extent, bool, error) {
	if im, ok := dev.(*Image); ok {
		return im.piece(off, limit)
	}
	if off >= dev.Size() { // the rest of the last sector
		return blockdev.Extent{Off: off, Len: limit, Kind: blockdev.Zero, Host: dev, HostOff: off}, true, nil
	}
	e, err := blockdev.NextExtent(dev, off)
	e.Len = min(e.Len, limit)
	_, known := dev.(*blockdev.File)
	return e, known, err
}

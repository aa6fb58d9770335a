package fat

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sort"

	"qimg/qcow2/blockdev"
)

// ErrChanged says that a file is not what it was when New read the tree.
var ErrChanged = errors.New("changed while it was read")

// objectAt returns the index of the last object at or before a cluster, or 0.
func (v *Volume) objectAt(c int64) int {
	return max(0, sort.Search(len(v.objects), func(i int) bool { return v.objects[i].cluster > c })-1)
}

// used returns the end of what is not free, in bytes.
func (v *Volume) used() int64 {
	return (v.geo.dataStart() + (v.next-2)*v.geo.perCluster) * sectorSize
}

// NextExtent implements blockdev.ExtentReader: behind the last used cluster all is
// zeroes.
func (v *Volume) NextExtent(off int64) (blockdev.Extent, error) {
	switch used := v.used(); {
	case off < 0 || off >= v.Size():
		return blockdev.Extent{}, fmt.Errorf("offset %d: %w", off, blockdev.ErrRange)
	case off < used:
		return blockdev.Extent{Off: off, Len: used - off, Kind: blockdev.Data}, nil
	}
	return blockdev.Extent{Off: off, Len: v.Size() - off, Kind: blockdev.Zero}, nil
}

// ReadAt implements io.ReaderAt. A file that has changed since New gives an error
// that names it and matches ErrChanged.
func (v *Volume) ReadAt(b []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, fmt.Errorf("offset %d: %w", off, blockdev.ErrRange)
	}
	for n < len(b) {
		at := off + int64(n)
		if at >= v.Size() {
			return n, io.EOF
		}
		m, err := v.readPart(b[n:min(int64(len(b)), int64(n)+v.Size()-at)], at)
		n += m
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// readPart reads from one area, as far as it reaches.
func (v *Volume) readPart(b []byte, off int64) (int, error) {
	g := v.geo
	area := func(end int64) { b = b[:min(int64(len(b)), end*sectorSize-off)] }
	switch s := off / sectorSize; {
	case s < g.reserved:
		return copy(b, v.bootArea()[off:]), nil
	case s < g.reserved+g.fatSectors:
		area(g.reserved + g.fatSectors)
		v.putFAT(b, off-g.reserved*sectorSize)
	case s < g.rootStart():
		area(g.rootStart())
		v.putFAT(b, off-(g.reserved+g.fatSectors)*sectorSize)
	case s < g.dataStart():
		area(g.dataStart())
		putContent(b, v.root, off-g.rootStart()*sectorSize)
	default:
		return v.readData(b, off-g.dataStart()*sectorSize)
	}
	return len(b), nil
}

// putContent fills b with what content has from off on, and zeroes.
func putContent(b, content []byte, off int64) {
	clear(b)
	if off < int64(len(content)) {
		copy(b, content[off:])
	}
}

// readData reads from one object in the clusters, off bytes into them.
func (v *Volume) readData(b []byte, off int64) (int, error) {
	cs := v.geo.clusterSize()
	c := 2 + off/cs
	if c >= v.next || len(v.objects) == 0 {
		clear(b)
		return len(b), nil
	}
	i := v.objectAt(c)
	o := &v.objects[i]
	end := v.next
	if i+1 < len(v.objects) {
		end = v.objects[i+1].cluster
	}
	b = b[:min(int64(len(b)), (end-2)*cs-off)]
	off -= (o.cluster - 2) * cs
	if o.node.dir {
		putContent(b, o.dir, off)
		return len(b), nil
	}
	if err := v.readFile(b, o.node, off); err != nil {
		return 0, err
	}
	return len(b), nil
}

// readFile fills b with what a file has from off on, and zeroes.
func (v *Volume) readFile(b []byte, n *node, off int64) error {
	if off >= n.size {
		clear(b)
		return nil
	}
	f, err := v.fsys.Open(n.path())
	if err != nil {
		return err
	}
	defer f.Close()
	changed := func(how string) error {
		return &fs.PathError{Op: "read", Path: n.path(), Err: fmt.Errorf("%w: %s", ErrChanged, how)}
	}
	part := b[:min(int64(len(b)), n.size-off)]
	clear(b[len(part):])
	var r io.Reader = f
	switch s := f.(type) {
	case io.ReaderAt:
		r = io.NewSectionReader(s, off, int64(len(part)))
	case io.Seeker:
		_, err = s.Seek(off, io.SeekStart)
	default:
		_, err = io.CopyN(io.Discard, f, off)
	}
	if err == nil {
		_, err = io.ReadFull(r, part)
	}
	switch {
	case err == io.EOF || err == io.ErrUnexpectedEOF:
		return changed("it ended early")
	case err != nil:
		return err
	}
	if now, err := f.Stat(); err != nil || now.Size() != n.size || now.ModTime().UnixNano() != n.seen {
		return changed("it was written to")
	}
	return nil
}

package formats

import (
	"encoding/binary"
	"fmt"
	"io"
	"sync"

	"qimg/qcow2/blockdev"
)

// run is a piece of a disk that lies in one place.
type run struct {
	n    int64 // bytes, at least 1
	kind blockdev.ExtentKind
	host int64 // in the file, of Data and Compressed
}

// mapped is a disk whose pieces lie in a file as tables say.
type mapped struct {
	format string
	file   blockdev.Reader
	size   int64
	// find returns what lies at off, from there on. It is called from several
	// goroutines. 0 <= off < size.
	find func(off int64) (run, error)
	// inflate reads len(p) bytes at off, which lie in one Compressed run.
	inflate func(p []byte, off int64, r run) error
	// holes says that the holes of the file are zeroes of the disk that are
	// worth looking for: the file has its full size from the beginning.
	holes bool
}

// Size returns the virtual size in bytes.
func (d *mapped) Size() int64 { return d.size }

func (d *mapped) checkRange(off int64) error {
	if off < 0 {
		return fmt.Errorf("%s: offset %d: %w", d.format, off, blockdev.ErrRange)
	}
	return nil
}

// ReadAt implements io.ReaderAt.
func (d *mapped) ReadAt(p []byte, off int64) (int, error) {
	if err := d.checkRange(off); err != nil {
		return 0, err
	}
	var end error
	if off >= d.size {
		p, end = nil, io.EOF
	} else if int64(len(p)) > d.size-off {
		p, end = p[:d.size-off], io.EOF
	}
	done := 0
	for done < len(p) {
		at := off + int64(done)
		r, err := d.find(at)
		if err != nil {
			return done, err
		}
		q := p[done:]
		if int64(len(q)) > r.n {
			q = q[:r.n]
		}
		switch r.kind {
		case blockdev.Data:
			err = d.readFile(q, r.host, at)
		case blockdev.Compressed:
			err = d.inflate(q, at, r)
		default:
			clear(q)
		}
		if err != nil {
			return done, err
		}
		done += len(q)
	}
	return done, end
}

// readFile reads bytes of the file, which are those of the disk at off.
func (d *mapped) readFile(p []byte, host, off int64) error {
	if n := d.file.Size() - int64(len(p)); host < 0 || host > n {
		return at{d.format, "data", host}.corrupt("", "of %d bytes for offset %d of the disk are not in the file of %d bytes", len(p), off, d.file.Size())
	}
	if n, err := d.file.ReadAt(p, host); n < len(p) {
		return err
	}
	return nil
}

// maxJoin bounds the runs that one extent is made of.
const maxJoin = 1 << 16

// NextExtent implements blockdev.ExtentReader.
func (d *mapped) NextExtent(off int64) (blockdev.Extent, error) {
	if err := d.checkRange(off); err != nil {
		return blockdev.Extent{}, err
	}
	if off >= d.size {
		return blockdev.Extent{}, fmt.Errorf("%s: offset %d of a disk of %d bytes: %w", d.format, off, d.size, blockdev.ErrRange)
	}
	r, err := d.find(off)
	if err != nil {
		return blockdev.Extent{}, err
	}
	n := r.n
	for i := 0; i < maxJoin && n < d.size-off; i++ {
		next, err := d.find(off + n)
		if err != nil || next.kind != r.kind || r.kind == blockdev.Data && next.host != r.host+n {
			break
		}
		n += next.n
	}
	e := blockdev.Extent{Off: off, Len: min(n, d.size-off), Kind: r.kind}
	if r.kind != blockdev.Data || r.host < 0 || r.host >= d.file.Size() {
		return e, nil // what is not in the file is an error of ReadAt
	}
	e.Host, e.HostOff = d.file, r.host
	e.Len = min(e.Len, d.file.Size()-r.host)
	if d.holes {
		x, err := blockdev.NextExtent(d.file, r.host)
		if err != nil {
			return blockdev.Extent{}, err
		}
		e.Len = min(e.Len, x.Len)
		if x.Kind.ReadsZero() {
			e.Kind = blockdev.Zero
		}
	}
	return e, nil
}

// The cache of a table, 1 MiB.
const (
	pageSize = 16 << 10
	maxPages = 64
)

// table reads the entries of a table in a file through a cache. It can be used by
// several goroutines.
type table struct {
	file   blockdev.Reader
	off, n int64 // bytes; an entry does not cross a multiple of pageSize
	mu     sync.Mutex
	pages  map[int64][]byte
	order  []int64 // of the pages in memory, the oldest at next
	next   int
	where  at
}

// newTable returns the table of n bytes at off. It has to lie in the file.
func newTable(file blockdev.Reader, off, n uint64, where at) (*table, error) {
	size := uint64(file.Size())
	where.off = int64(min(off, 1<<63-1))
	if off > size || n > size-off {
		return nil, where.corrupt("", "has %d bytes at %#x, the file ends at %#x", n, off, size)
	}
	return &table{file: file, off: int64(off), n: int64(n), pages: map[int64][]byte{}, where: where}, nil
}

// bytes returns n bytes at off, which are those of one entry.
func (t *table) bytes(off, n int64) ([]byte, error) {
	if off < 0 || off > t.n-n {
		return nil, t.where.corrupt("", "has no entry at offset %d, it has %d bytes", off, t.n)
	}
	key := off / pageSize
	page, ok := t.pages[key]
	if !ok {
		page = make([]byte, min(pageSize, t.n-key*pageSize))
		if m, err := t.file.ReadAt(page, t.off+key*pageSize); m < len(page) {
			return nil, err
		}
		if len(t.order) < maxPages {
			t.order = append(t.order, key)
		} else {
			delete(t.pages, t.order[t.next])
			t.order[t.next] = key
			t.next = (t.next + 1) % maxPages
		}
		t.pages[key] = page
	}
	return page[off%pageSize:][:n], nil
}

// uint32 returns the 4 bytes at off.
func (t *table) uint32(order binary.ByteOrder, off int64) (uint32, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	b, err := t.bytes(off, 4)
	if err != nil {
		return 0, err
	}
	return order.Uint32(b), nil
}

// uint64 returns the 8 bytes at off.
func (t *table) uint64(order binary.ByteOrder, off int64) (uint64, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	b, err := t.bytes(off, 8)
	if err != nil {
		return 0, err
	}
	return order.Uint64(b), nil
}

// readStruct reads a structure of n bytes. The file has to hold all of it.
func readStruct(file blockdev.Reader, off uint64, n int64, where at) ([]byte, error) {
	size := file.Size()
	where.off = int64(min(off, 1<<63-1))
	if off > uint64(size) || n > size-int64(off) {
		return nil, where.corrupt("", "has %d bytes, the file ends at %#x", n, size)
	}
	b := make([]byte, n)
	if m, err := file.ReadAt(b, int64(off)); m < len(b) {
		return nil, err
	}
	return b, nil
}

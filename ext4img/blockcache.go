package ext4img

import (
	"fmt"
	"io"
	"sync"
)

const (
	cachePage = 16 << 10 // bytes read at once, or one block where that is more
	cacheSize = 16 << 20 // bytes kept: the inodes of a directory of 50,000 files
)

// blockCache keeps pages of metadata that were read last. Pages are never
// changed, so that what was returned stays valid when it leaves the cache. It
// is safe for concurrent use.
type blockCache struct {
	mu    sync.Mutex
	pages map[int64]*cachedPage
	clock []*cachedPage // in the order of the hand
	hand  int
	limit int
}

type cachedPage struct {
	index int64
	data  []byte
	used  bool // since the hand passed
}

func (c *blockCache) get(index int64) ([]byte, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	p, ok := c.pages[index]
	if !ok {
		return nil, false
	}
	p.used = true
	return p.data, true
}

func (c *blockCache) put(index int64, data []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pages == nil {
		c.pages = make(map[int64]*cachedPage)
	}
	if _, ok := c.pages[index]; ok {
		return
	}
	p := &cachedPage{index: index, data: data}
	c.pages[index] = p
	if len(c.clock) < c.limit {
		c.clock = append(c.clock, p)
		return
	}
	for c.clock[c.hand].used {
		c.clock[c.hand].used = false
		c.hand = (c.hand + 1) % len(c.clock)
	}
	delete(c.pages, c.clock[c.hand].index)
	c.clock[c.hand] = p
	c.hand = (c.hand + 1) % len(c.clock)
}

// block returns a block of metadata, which must not be changed. The block lies
// inside the file system, or an error says that it does not.
func (f *FS) block(n int64) ([]byte, error) {
	bs := int64(f.sb.BlockSize)
	if n < 0 || n >= f.sb.BlocksCount {
		return nil, place{name: "block", block: n}.corrupt("", "the file system has %d blocks", f.sb.BlocksCount)
	}
	perPage := max(cachePage/bs, 1)
	index, in := n/perPage, n%perPage
	page, ok := f.cache.get(index)
	if !ok {
		first := index * perPage
		page = make([]byte, min(perPage, f.sb.BlocksCount-first)*bs)
		if err := f.readBlocks(page, first); err != nil {
			// Perhaps another block of the page is to blame.
			page = make([]byte, bs)
			if err := f.readBlocks(page, n); err != nil {
				return nil, fmt.Errorf("ext4: block %d: %w", n, err)
			}
			return page, nil
		}
		f.cache.put(index, page)
	}
	return page[in*bs : (in+1)*bs : (in+1)*bs], nil
}

// readBlocks fills p, whole blocks, from a block on that lies inside the file
// system with all of them.
func (f *FS) readBlocks(p []byte, block int64) error {
	return f.readBytes(p, block*int64(f.sb.BlockSize))
}

// readBytes fills p with the bytes of the file system from off on, blocks in
// the journal instead of those that they replace.
func (f *FS) readBytes(p []byte, off int64) error {
	if err := readFull(f.dev, p, off); err != nil {
		return err
	}
	return f.journal.patch(f.dev, p, off, int64(f.sb.BlockSize))
}

// readFull reads all of p, or fails.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return err
}

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
	if old := c.clock[c.hand]; c.pages[old.index] == old {
		delete(c.pages, old.index)
	}
	c.clock[c.hand] = p
	c.hand = (c.hand + 1) % len(c.clock)
}

// drop forgets a page.
func (c *blockCache) drop(index int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	p, ok := c.pages[index]
	if !ok {
		return
	}
	delete(c.pages, index)
	// The place in the clock is used again before that of any other page.
	p.used = false
	p.index = -1
}

// dropBlocks forgets what was read of the blocks from start to end-1, which
// have changed on the device.
func (f *FS) dropBlocks(start, end int64) {
	perPage := max(cachePage/int64(f.sb.BlockSize), 1)
	for index := start / perPage; index <= (end-1)/perPage; index++ {
		f.cache.drop(index)
	}
}

// block returns a block of metadata, which must not be changed. The block lies
// inside the file system, or an error says that it does not.
func (f *FS) block(n int64) ([]byte, error) {
	if n < 0 || n >= f.sb.BlocksCount {
		return nil, place{name: "block", block: n}.corrupt("", "the file system has %d blocks", f.sb.BlocksCount)
	}
	if b, ok := f.tx.stagedBlock(n); ok {
		return b, nil
	}
	return f.storedBlock(n)
}

// storedBlock is block without what a transaction has changed.
func (f *FS) storedBlock(n int64) ([]byte, error) {
	bs := int64(f.sb.BlockSize)
	perPage := max(cachePage/bs, 1)
	index, in := n/perPage, n%perPage
	page, ok := f.cache.get(index)
	if ok && int64(len(page)) < (in+1)*bs { // the file system has grown
		f.cache.drop(index)
		ok = false
	}
	if !ok {
		first := index * perPage
		page = make([]byte, min(perPage, f.sb.BlocksCount-first)*bs)
		if err := f.readStored(page, first*bs); err != nil {
			// Perhaps another block of the page is to blame.
			page = make([]byte, bs)
			if err := f.readStored(page, n*bs); err != nil {
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
// the journal, and those that a transaction has changed, instead of those that
// they replace.
func (f *FS) readBytes(p []byte, off int64) error {
	if err := f.readStored(p, off); err != nil {
		return err
	}
	f.tx.patch(p, off)
	return nil
}

// readStored is readBytes without what a transaction has changed.
func (f *FS) readStored(p []byte, off int64) error {
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

package qcow2

import (
	"container/list"
	"sync"
)

// tableKey names a part of a table: the image in the chain and the offset.
type tableKey struct {
	image int
	off   int64
}

const cacheShards = 8

// tableCache keeps the parts of tables used last, within a bound of bytes.
// What it holds is changed only by an image that is open for writing, of its own
// tables, while nobody else looks at them.
type tableCache struct {
	shards [cacheShards]cacheShard
}

type cacheShard struct {
	mu        sync.Mutex
	size, max int64
	items     map[tableKey]*list.Element
	lru       list.List // of cacheItem, the last used in front
}

type cacheItem struct {
	key tableKey
	b   []byte
}

func (c *tableCache) init(size int64) {
	for i := range c.shards {
		c.shards[i].max = size / cacheShards
		c.shards[i].items = make(map[tableKey]*list.Element)
	}
}

func (c *tableCache) shard(k tableKey) *cacheShard {
	h := (uint64(k.off) ^ uint64(k.image)) * 0x9e3779b97f4a7c15
	return &c.shards[h>>32%cacheShards]
}

func (c *tableCache) get(k tableKey) []byte {
	s := c.shard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.items[k]
	if e == nil {
		return nil
	}
	s.lru.MoveToFront(e)
	return e.Value.(cacheItem).b
}

// put adds b, unless another was quicker, and drops what is over the bound; at
// least the newest item of each shard stays.
func (c *tableCache) put(k tableKey, b []byte) {
	s := c.shard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.items[k] != nil {
		return
	}
	s.items[k] = s.lru.PushFront(cacheItem{k, b})
	s.size += int64(len(b))
	for s.size > s.max && s.lru.Len() > 1 {
		old := s.lru.Remove(s.lru.Back()).(cacheItem)
		delete(s.items, old.key)
		s.size -= int64(len(old.b))
	}
}

// set puts b in the place of what is there.
func (c *tableCache) set(k tableKey, b []byte) {
	s := c.shard(k)
	s.mu.Lock()
	if e := s.items[k]; e != nil {
		s.size -= int64(len(e.Value.(cacheItem).b))
		s.lru.Remove(e)
		delete(s.items, k)
	}
	s.mu.Unlock()
	c.put(k, b)
}

// forget drops everything of an image.
func (c *tableCache) forget(image int) {
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.Lock()
		for k, e := range s.items {
			if k.image == image {
				s.size -= int64(len(e.Value.(cacheItem).b))
				s.lru.Remove(e)
				delete(s.items, k)
			}
		}
		s.mu.Unlock()
	}
}

// clusterCacheSize is how many clusters are kept that were decompressed in part,
// so that small reads one after the other decompress each cluster once, and a
// single one no more of it than it needs.
const clusterCacheSize = 4

type clusterKey struct {
	image int
	entry uint64
}

// clusterCache keeps the compressed clusters last read in part.
type clusterCache struct {
	mu      sync.Mutex
	entries [clusterCacheSize]*partCluster
	next    int
}

// partCluster is a cluster whose first n bytes have been decompressed.
type partCluster struct {
	mu    sync.Mutex
	key   clusterKey
	b     []byte // a whole cluster
	n     int
	codec *codec // that goes on behind them
	err   error
}

// get returns the entry of a cluster, a new one if there is none.
func (c *clusterCache) get(k clusterKey, size int64) *partCluster {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range c.entries {
		if e != nil && e.key == k {
			return e
		}
	}
	e := c.entries[c.next]
	// One that is still being read is left to its reader.
	if e == nil || len(e.b) != int(size) || !e.mu.TryLock() {
		e = &partCluster{b: make([]byte, size), codec: &codec{}}
		e.mu.Lock()
	}
	e.key, e.n, e.err = k, 0, nil
	e.mu.Unlock()
	c.entries[c.next] = e
	c.next = (c.next + 1) % clusterCacheSize
	return e
}

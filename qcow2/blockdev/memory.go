package blockdev

import (
	"fmt"
	"io"
	"slices"
	"sync"
)

// memoryChunk is the unit in which a Memory keeps what was written.
const memoryChunk = 64 << 10

// Memory is a device in memory. Only chunks of 64 KiB that were written take
// space, so a device of 1 TiB with few writes is cheap. Sync has nothing to do.
//
// All methods are safe for concurrent use.
type Memory struct {
	mu     sync.RWMutex
	size   int64
	chunks []chunk // ascending by index, no index twice
}

type chunk struct {
	index  int64
	data   *[memoryChunk]byte
	shared bool // with a clone: to be copied before it is changed
}

// NewMemory returns a device of size bytes that reads as zeroes. It panics on
// a negative size.
func NewMemory(size int64) *Memory {
	if size < 0 {
		panic(fmt.Sprintf("blockdev: internal error: memory device of %d bytes", size))
	}
	return &Memory{size: size}
}

// Clone returns a device of the same content. The two share what was written
// until one of them changes it, so a clone is made in time and space that
// depend on the number of chunks alone.
func (m *Memory) Clone() *Memory {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := range m.chunks {
		m.chunks[i].shared = true
	}
	return &Memory{size: m.size, chunks: slices.Clone(m.chunks)}
}

// own makes chunk i one that can be changed.
func (m *Memory) own(i int) *[memoryChunk]byte {
	c := &m.chunks[i]
	if c.shared {
		data := *c.data
		c.data, c.shared = &data, false
	}
	return c.data
}

// Size returns the size in bytes.
func (m *Memory) Size() int64 {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.size
}

// ReadAt implements io.ReaderAt. At the end of the device it returns the bytes
// that are there and io.EOF.
func (m *Memory) ReadAt(p []byte, off int64) (int, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if off < 0 {
		return 0, fmt.Errorf("memory: read: %w", checkRange(off, int64(len(p)), m.size))
	}
	if off >= m.size {
		return 0, eofUnlessEmpty(p)
	}
	var err error
	if int64(len(p)) > m.size-off {
		p, err = p[:m.size-off], io.EOF
	}
	for done := 0; done < len(p); {
		index, in := (off+int64(done))/memoryChunk, (off+int64(done))%memoryChunk
		part := p[done:min(len(p), done+int(memoryChunk-in))]
		if i, ok := m.find(index); ok {
			copy(part, m.chunks[i].data[in:])
		} else {
			clear(part)
		}
		done += len(part)
	}
	return len(p), err
}

// WriteAt implements io.WriterAt. A write that reaches beyond the end writes
// nothing and is an error that matches ErrRange.
func (m *Memory) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := checkRange(off, int64(len(p)), m.size); err != nil {
		return 0, fmt.Errorf("memory: write: %w", err)
	}
	for done := 0; done < len(p); {
		index, in := (off+int64(done))/memoryChunk, (off+int64(done))%memoryChunk
		i, ok := m.find(index)
		if !ok {
			m.chunks = slices.Insert(m.chunks, i, chunk{index: index, data: new([memoryChunk]byte)})
		}
		done += copy(m.own(i)[in:], p[done:])
	}
	return len(p), nil
}

// find returns the place of a chunk, or where it would have to be put.
func (m *Memory) find(index int64) (int, bool) {
	return slices.BinarySearchFunc(m.chunks, index, func(c chunk, index int64) int {
		switch {
		case c.index < index:
			return -1
		case c.index > index:
			return 1
		}
		return 0
	})
}

// Sync does nothing.
func (m *Memory) Sync() error { return nil }

// WriteZeroes makes a range read as zeroes and gives back the chunks that are
// wholly inside it.
func (m *Memory) WriteZeroes(off, n int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := checkRange(off, n, m.size); err != nil {
		return fmt.Errorf("memory: write zeroes: %w", err)
	}
	m.zero(off, off+n)
	return nil
}

// Discard is WriteZeroes: a discarded range reads as zeroes.
func (m *Memory) Discard(off, n int64) error { return m.WriteZeroes(off, n) }

// zero makes the bytes from off up to end zero.
func (m *Memory) zero(off, end int64) {
	first, _ := m.find(off / memoryChunk)
	keep := first
	for i := first; i < len(m.chunks); i++ {
		start := m.chunks[i].index * memoryChunk
		lo, hi := max(off-start, 0), min(end-start, memoryChunk)
		if lo == 0 && hi == memoryChunk {
			continue
		}
		if lo < hi {
			clear(m.own(i)[lo:hi])
		}
		m.chunks[keep] = m.chunks[i]
		keep++
	}
	clear(m.chunks[keep:])
	m.chunks = m.chunks[:keep]
}

// Truncate sets the size. What the device gains reads as zeroes.
func (m *Memory) Truncate(size int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if size < 0 {
		return fmt.Errorf("memory: truncate to %d bytes: %w", size, ErrRange)
	}
	if size < m.size {
		// The end is that of the last chunk, so that it goes wholly.
		m.zero(size, (m.size+memoryChunk-1)/memoryChunk*memoryChunk)
	}
	m.size = size
	return nil
}

// NextExtent tells chunks that were written (Data) from those that were not
// (Unallocated).
func (m *Memory) NextExtent(off int64) (Extent, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if err := checkRange(off, 1, m.size); err != nil {
		return Extent{}, fmt.Errorf("memory: next extent: %w", err)
	}
	e := Extent{Off: off, Kind: Unallocated}
	end := m.size
	i, ok := m.find(off / memoryChunk)
	if ok {
		e.Kind, e.Host, e.HostOff = Data, m, off
		next := m.chunks[i].index
		for ; i < len(m.chunks) && m.chunks[i].index == next; i++ {
			next++
		}
		end = min(end, next*memoryChunk)
	} else if i < len(m.chunks) {
		end = m.chunks[i].index * memoryChunk
	}
	e.Len = end - off
	return e, nil
}

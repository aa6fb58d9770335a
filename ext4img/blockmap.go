package ext4img

import "encoding/binary"

// The block map of ext2 and ext3: i_block holds twelve blocks, and three that
// lead to more through one, two and three levels of blocks full of pointers
// (kernel: Documentation/filesystems/ext4/ifork.rst, "Direct/Indirect Block
// Addressing").
const (
	directBlocks   = 12 // EXT4_NDIR_BLOCKS
	indirectLevels = 3
)

// blockMap returns the part of a block map that a logical block belongs to:
// the direct blocks, the pointers of one block, or a hole that a missing
// pointer leaves.
func (f *FS) blockMap(n *Inode, logical int64) (*mapping, error) {
	p := place{"block map", n.Ino, -1}
	if logical < directBlocks {
		return parsePointers(p, n.block()[:4*directBlocks], 0, f.sb)
	}
	perBlock := int64(f.sb.BlockSize / 4)
	from, covers := int64(directBlocks), int64(1)
	for level := 1; ; level++ {
		covers *= perBlock
		if level > indirectLevels {
			return &mapping{from, max(from, maxLogical), nil}, nil // no map reaches this
		}
		if logical < from+covers {
			pointer := int64(binary.LittleEndian.Uint32(n.block()[4*(directBlocks+level-1):]))
			return f.indirect(p, n, pointer, level, from, covers, logical)
		}
		from += covers
	}
}

// indirect follows a pointer that covers so many logical blocks through that
// many levels.
func (f *FS) indirect(p place, n *Inode, pointer int64, level int, from, covers, logical int64) (*mapping, error) {
	for {
		if pointer == 0 {
			return &mapping{from, min(from+covers, maxLogical), nil}, nil
		}
		if pointer <= f.sb.FirstDataBlock || pointer >= f.sb.BlocksCount {
			return nil, p.corrupt("", "pointer %d for logical block %d, and the file system has %d blocks", pointer, from, f.sb.BlocksCount)
		}
		b, err := f.block(pointer)
		if err != nil {
			return nil, err
		}
		p = place{"indirect block", n.Ino, pointer}
		if level == 1 {
			return parsePointers(p, b, from, f.sb)
		}
		covers /= int64(f.sb.BlockSize / 4)
		i := (logical - from) / covers
		from += i * covers
		pointer = int64(binary.LittleEndian.Uint32(b[4*i:]))
		level--
	}
}

// parsePointers joins the pointers of logical blocks from from on to extents
// inside the file system.
func parsePointers(p place, b []byte, from int64, s *Superblock) (*mapping, error) {
	m := &mapping{from, min(from+int64(len(b)/4), maxLogical), nil}
	for i := range m.to - m.from {
		block := int64(binary.LittleEndian.Uint32(b[4*i:]))
		if block == 0 {
			continue
		}
		if block <= s.FirstDataBlock || block >= s.BlocksCount {
			return nil, p.corrupt("", "pointer %d for logical block %d, and the file system has %d blocks", block, from+i, s.BlocksCount)
		}
		if k := len(m.extents); k > 0 {
			if e := &m.extents[k-1]; e.logical+e.len == from+i && e.physical+e.len == block {
				e.len++
				continue
			}
		}
		m.extents = append(m.extents, extent{logical: from + i, physical: block, len: 1})
	}
	return m, nil
}

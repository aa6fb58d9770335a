package ext4img

// Bitmaps of blocks and inodes (kernel:
// Documentation/filesystems/ext4/bitmaps.rst). One bit is a cluster, which
// without bigalloc is a block, or an inode; bits beyond the end of the group
// are set.

// clusterRatio is the number of blocks of a cluster.
func (s *Superblock) clusterRatio() int64 { return int64(s.ClusterSize / s.BlockSize) }

// blockBitmap returns a copy of the bitmap of the clusters of a group, whose
// descriptor is d: one block.
func (f *FS) blockBitmap(group int64, d groupDesc) ([]byte, error) {
	if d.flags&bgBlockUninit != 0 {
		return f.sb.initialBlockBitmap(group, d), nil
	}
	b, err := f.bitmap(place{"block bitmap of group " + itoa(group), 0, d.blockBitmap}, d.blockCsum, f.sb.ClustersPerGroup)
	if err == nil {
		f.setBitmapEnd(b, ceilDiv(f.sb.groupEnd(group)-f.sb.groupStart(group), f.sb.clusterRatio()))
	}
	return b, err
}

// inodeBitmap returns a copy of the bitmap of the inodes of a group, whose
// descriptor is d: one block.
func (f *FS) inodeBitmap(group int64, d groupDesc) ([]byte, error) {
	if d.flags&bgInodeUninit != 0 {
		b := make([]byte, f.sb.BlockSize)
		f.setBitmapEnd(b, int64(f.sb.InodesPerGroup))
		return b, nil
	}
	b, err := f.bitmap(place{"inode bitmap of group " + itoa(group), 0, d.inodeBitmap}, d.inodeCsum, int64(f.sb.InodesPerGroup))
	if err == nil {
		f.setBitmapEnd(b, int64(f.sb.InodesPerGroup))
	}
	return b, err
}

func (f *FS) setBitmapEnd(b []byte, from int64) { setBits(b, from, 8*int64(len(b))) }

// bitmap reads a block of so many bits and compares them with their checksum.
func (f *FS) bitmap(p place, csum uint32, bits int64) ([]byte, error) {
	b := make([]byte, f.sb.BlockSize)
	if err := f.readBlocks(b, p.block); err != nil {
		return nil, err
	}
	if f.sb.hasCsum() && !f.ignoreChecksums {
		if want := bitmapChecksum(f.sb, b, bits); csum != want {
			return nil, p.checksum(csum, want)
		}
	}
	return b, nil
}

// bitmapChecksum is what the checksum of a bitmap of so many bits has to be.
// Short descriptors have its low half.
func bitmapChecksum(s *Superblock, b []byte, bits int64) uint32 {
	crc := crc32c(s.ChecksumSeed, b[:bits/8])
	if s.DescSize < descSize {
		crc &= 0xffff
	}
	return crc
}

// initialBlockBitmap is the bitmap of a group whose own is not written: only
// the group's own structures are in use (kernel: fs/ext4/balloc.c,
// ext4_init_block_bitmap).
func (s *Superblock) initialBlockBitmap(group int64, d groupDesc) []byte {
	b := make([]byte, s.BlockSize)
	start, end := s.groupStart(group), s.groupEnd(group)
	ratio := s.clusterRatio()
	mark := func(from, n int64) {
		from, to := max(from, start), min(from+n, end)
		if from < to {
			setBits(b, (from-start)/ratio, ceilDiv(to-start, ratio))
		}
	}
	mark(start, s.baseBlocks(group))
	mark(d.blockBitmap, 1)
	mark(d.inodeBitmap, 1)
	mark(d.inodeTable, s.inodeTableBlocks())
	setBits(b, ceilDiv(end-start, ratio), 8*int64(len(b)))
	return b
}

// descBlocks is the number of blocks that all descriptors fill.
func (s *Superblock) descBlocks() int64 {
	return ceilDiv(s.groups, int64(s.BlockSize/s.DescSize))
}

// baseBlocks is the number of blocks at the beginning of a group that hold
// copies of the superblock and of descriptors (kernel: fs/ext4/balloc.c,
// ext4_num_base_meta_clusters).
func (s *Superblock) baseBlocks(group int64) int64 {
	n := int64(0)
	if s.hasSuper(group) {
		n = 1
		if group == 0 && s.FirstDataBlock == 0 && s.BlockSize == minBlockSize {
			n++ // the superblock lies in block 1
		}
	}
	perBlock := int64(s.BlockSize / s.DescSize)
	if s.Incompat&IncompatMetaBG == 0 || group < int64(s.FirstMetaBG)*perBlock {
		if n == 0 {
			return 0
		}
		if s.Incompat&IncompatMetaBG != 0 {
			return n + int64(s.FirstMetaBG) + s.ReservedGDT
		}
		return n + s.descBlocks() + s.ReservedGDT
	}
	switch group % perBlock {
	case 0, 1, perBlock - 1:
		n++
	}
	return n
}

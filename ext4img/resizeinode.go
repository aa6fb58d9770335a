package ext4img

import "encoding/binary"

// The resize inode holds the blocks that are kept for a longer descriptor
// table: it is an ext2-style file whose double-indirect block points to the
// reserved blocks of group 0, each of which, as an indirect block, points to
// its copies in the backup groups (e2fsprogs: lib/ext2fs/res_gdt.c).

// backupGroups calls fn with the groups that have copies of the descriptors.
func (g *geometry) backupGroups(fn func(group int64)) {
	for i := int64(1); i < g.groups; i++ {
		if g.hasSuper(i) {
			fn(i)
		}
	}
}

func (l *Layout) resizeDiskInode() *diskInode {
	g := l.geo
	backups := int64(0)
	g.backupGroups(func(int64) { backups++ })
	perBlock := g.blockSize / 4
	n := &diskInode{
		mode: modeReg | 0o600, links: 1, sec: l.time,
		size:   (perBlock*perBlock + perBlock + 12) * g.blockSize,
		blocks: 1 + g.reservedGDT*(1+backups),
	}
	binary.LittleEndian.PutUint32(n.block[13*4:], uint32(g.block(l.resizePos)))
	return n
}

// firstReservedGDT is the first reserved descriptor block of group 0.
func (g *geometry) firstReservedGDT() int64 { return g.firstDataBlock + 1 + g.descBlocks }

// putResizeDind writes the double-indirect block.
func (l *Layout) putResizeDind(b []byte) {
	g := l.geo
	for i := range g.reservedGDT {
		slot := (g.descBlocks + i) % (g.blockSize / 4)
		binary.LittleEndian.PutUint32(b[4*slot:], uint32(g.firstReservedGDT()+i))
	}
}

// putReservedGDT writes a reserved descriptor block of group 0.
func (l *Layout) putReservedGDT(b []byte, block int64) {
	at := 0
	l.geo.backupGroups(func(group int64) {
		binary.LittleEndian.PutUint32(b[at:], uint32(block+group*l.geo.blocksPerGroup))
		at += 4
	})
}

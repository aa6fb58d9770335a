package ext4img

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/bits"
)

// checkSuper checks what the superblock says beyond what Open needs.
func (c *checker) checkSuper() {
	s := c.sb
	p := place{"superblock", 0, -1}
	bad := func(field, format string, args ...any) {
		c.damage(SuperblockDamaged, -1, p.corrupt(field, format, args...))
	}
	switch {
	case s.State&StateErrors != 0:
		c.find(StateMarkedErrors, -1, 0, -1, "the kernel has found errors in the file system: run e2fsck")
	case s.State&StateClean == 0 && s.Compat&CompatHasJournal == 0:
		c.find(NotUnmounted, -1, 0, -1, "the file system was not unmounted in order: run e2fsck")
	}
	if s.RBlocksCount > s.BlocksCount {
		bad("s_r_blocks_count", "%d of %d blocks", s.RBlocksCount, s.BlocksCount)
	}
	if s.RevLevel > 0 && (s.FirstIno < firstIno || uint32(s.FirstIno) > s.InodesCount) {
		bad("s_first_ino", "%d, expected %d to %d", s.FirstIno, firstIno, s.InodesCount)
	}
	if s.ReservedGDT > int64(s.BlockSize/4) {
		bad("s_reserved_gdt_blocks", "%d, expected at most %d", s.ReservedGDT, s.BlockSize/4)
	}
	if s.InodesPerGroup%8 != 0 {
		bad("s_inodes_per_group", "%d, expected a multiple of 8", s.InodesPerGroup)
	}
	wrong := func(text string) { c.damage(FeaturesDamaged, -1, p.corrupt("", "%s", text)) }
	both := func(a bool, b bool, text string) {
		if a && b {
			wrong(text)
		}
	}
	both(s.Compat&CompatResizeInode != 0, s.Incompat&IncompatMetaBG != 0, "resize_inode and meta_bg exclude each other")
	both(s.ROCompat&ROCompatGDTCsum != 0, s.hasCsum(), "uninit_bg and metadata_csum exclude each other")
	both(s.ROCompat&ROCompatBigalloc != 0, s.Incompat&IncompatExtents == 0, "bigalloc needs extents")
	both(s.Compat&CompatResizeInode == 0, s.ReservedGDT != 0 && s.Incompat&IncompatMetaBG == 0, "descriptor blocks are reserved without resize_inode")
	both(s.RevLevel == 0, s.Compat != 0 || s.Incompat != 0 || s.ROCompat != 0, "a file system of revision 0 has features")
	both(s.Incompat&IncompatCsumSeed != 0, !s.hasCsum(), "metadata_csum_seed needs metadata_csum")
	both(s.ROCompat&ROCompatOrphanPresent != 0, s.Compat&CompatOrphanFile == 0, "orphan_present needs orphan_file")
	both(s.Compat&CompatHasJournal == 0, s.Incompat&IncompatRecover != 0, "needs_recovery without a journal")
}

// readGroup reads the descriptor of a group and claims what belongs to it.
func (c *checker) readGroup(g int64) {
	s := c.sb
	grp := &c.groups[g]
	d, err := c.fs.groupDesc(g)
	if err != nil {
		c.damage(GroupDamaged, g, err)
		return
	}
	grp.desc, grp.ok = d, true
	start, end := s.groupStart(g), s.groupEnd(g)
	c.claim(BlockShared, 0, start, min(s.baseBlocks(g), end-start))
	if g == 0 && s.FirstDataBlock > 0 && s.clusterRatio() > 1 {
		c.find(SuperblockDamaged, g, 0, -1, "the first data block is no cluster")
	}
	for _, part := range [...]struct {
		name     string
		start, n int64
	}{
		{"block bitmap", d.blockBitmap, 1}, {"inode bitmap", d.inodeBitmap, 1}, {"inode table", d.inodeTable, s.inodeTableBlocks()},
	} {
		if s.Incompat&IncompatFlexBG == 0 && (part.start < start || part.start+part.n > end) {
			c.find(GroupDamaged, g, 0, part.start, "the %s lies outside of its group, and the file system has no flex_bg", part.name)
		}
		c.claimMeta(g, part.name, part.start, part.n)
	}
	if d.flags&^(bgInodeUninit|bgBlockUninit|bgInodeZeroed) != 0 {
		c.find(GroupDamaged, g, 0, -1, "bg_flags %#x has unknown bits", d.flags)
	}
	if d.itableUnused > s.InodesPerGroup {
		c.find(GroupDamaged, g, 0, -1, "bg_itable_unused is %d of %d", d.itableUnused, s.InodesPerGroup)
		grp.desc.itableUnused = 0
	}
}

// claimMeta claims blocks of a group's own. With bigalloc several of them can
// lie in one cluster.
func (c *checker) claimMeta(g int64, name string, start, n int64) {
	s := c.sb
	if s.clusterRatio() == 1 {
		c.claim(BlockShared, 0, start, n)
		return
	}
	// Blocks of clusters that are claimed already are metadata, too, as long as
	// no inode was looked at.
	for start < start+n && n > 0 {
		grp := (start - s.FirstDataBlock) / s.BlocksPerGroup
		stop := min(start+n, s.groupEnd(grp))
		from, to := (start-s.groupStart(grp))/s.clusterRatio(), ceilDiv(stop-s.groupStart(grp), s.clusterRatio())
		if c.groups[grp].used == nil {
			c.groups[grp].used = make([]byte, s.BlockSize)
		}
		setBits(c.groups[grp].used, from, to)
		n -= stop - start
		start = stop
	}
}

// checkBitmaps compares bitmaps and counts with what is in use.
func (c *checker) checkBitmaps() {
	s := c.sb
	var freeBlocks int64
	var freeInodes uint32
	sound := true
	for g := range c.groups {
		if c.failed() != nil {
			return
		}
		grp := &c.groups[g]
		if !grp.ok {
			sound = false
			continue
		}
		freeBlocks += c.checkBlockBitmap(int64(g))
		freeInodes += c.checkInodeBitmap(int64(g))
	}
	if !sound {
		return
	}
	if freeBlocks *= s.clusterRatio(); s.FreeBlocksCount != freeBlocks {
		c.find(SuperblockCounts, -1, 0, -1, "s_free_blocks_count is %d, expected %d", s.FreeBlocksCount, freeBlocks)
	}
	if s.FreeInodesCount != freeInodes {
		c.find(SuperblockCounts, -1, 0, -1, "s_free_inodes_count is %d, expected %d", s.FreeInodesCount, freeInodes)
	}
}

// checkBlockBitmap returns how many clusters of a group are free.
func (c *checker) checkBlockBitmap(g int64) int64 {
	s, grp := c.sb, &c.groups[g]
	d := &grp.desc
	clusters := ceilDiv(s.groupEnd(g)-s.groupStart(g), s.clusterRatio())
	used := grp.used
	if used == nil {
		used = make([]byte, s.BlockSize)
	}
	free := clusters - countBitsTo(used, clusters)
	if int64(d.freeBlocks) != free {
		c.find(GroupCounts, g, 0, -1, "bg_free_blocks_count is %d, expected %d", d.freeBlocks, free)
	}
	stored, err := c.fs.blockBitmap(g, *d)
	if err != nil {
		c.damage(BlockBitmapDamaged, g, err)
		return free
	}
	for at := int64(0); at < clusters; {
		if at%8 == 0 && at+8 <= clusters && stored[at/8] == used[at/8] {
			at += 8
			continue
		}
		is, want := testBit(stored, at), testBit(used, at)
		if is == want {
			at++
			continue
		}
		from := at
		for at < clusters && testBit(stored, at) == is && testBit(used, at) == want {
			at++
		}
		k, text := BlockLeaked, "are in use in the bitmap alone"
		if want {
			k, text = BlockNotMarked, "are in use, and free in the bitmap"
		}
		c.find(k, g, 0, s.groupStart(g)+from*s.clusterRatio(), "and on: %d clusters %s", at-from, text)
	}
	if d.flags&bgBlockUninit == 0 {
		c.checkPadding(BlockBitmapDamaged, g, d.blockBitmap, clusters)
	}
	return free
}

// checkPadding checks that the bits of a bitmap behind the last are set.
func (c *checker) checkPadding(k Kind, g, block, bits int64) {
	b, err := c.fs.block(block)
	if err != nil {
		c.damage(k, g, err)
		return
	}
	if nextClear(b, bits, 8*int64(len(b))) < 8*int64(len(b)) {
		c.find(k, g, 0, block, "bits behind the last are not set")
	}
}

// checkInodeBitmap returns how many inodes of a group are free.
func (c *checker) checkInodeBitmap(g int64) uint32 {
	s, grp := c.sb, &c.groups[g]
	d := &grp.desc
	per := int64(s.InodesPerGroup)
	used := make([]byte, s.BlockSize)
	var dirs uint32
	for i := range grp.inodes {
		if n := &grp.inodes[i]; n.mode != 0 {
			setBits(used, int64(i), int64(i)+1)
			if n.mode&modeType == modeDir {
				dirs++
			}
		}
	}
	// Those of the file system are always in use.
	if first := int64(s.FirstIno) - 1 - g*per; first > 0 {
		setBits(used, 0, min(first, per))
	}
	inUse := countBitsTo(used, per)
	free := s.InodesPerGroup - uint32(inUse)
	if d.freeInodes != free {
		c.find(GroupCounts, g, 0, -1, "bg_free_inodes_count is %d, expected %d", d.freeInodes, free)
	}
	if d.usedDirs != dirs {
		c.find(GroupCounts, g, 0, -1, "bg_used_dirs_count is %d, expected %d", d.usedDirs, dirs)
	}
	stored, err := c.fs.inodeBitmap(g, *d)
	if err != nil {
		c.damage(InodeBitmapDamaged, g, err)
		return free
	}
	if !bytes.Equal(stored[:per/8], used[:per/8]) {
		for at := range per {
			ino := Ino(g*per + at + 1)
			switch is, want := testBit(stored, at), testBit(used, at); {
			case is && !want:
				c.find(InodeLeaked, g, ino, -1, "is in use in the bitmap alone")
			case want && !is:
				c.find(InodeNotMarked, g, ino, -1, "is in use, and free in the bitmap")
			}
		}
	}
	if d.flags&bgInodeUninit == 0 {
		c.checkPadding(InodeBitmapDamaged, g, d.inodeBitmap, per)
	}
	return free
}

// countBitsTo counts the bits that are set among the first n.
func countBitsTo(b []byte, n int64) int64 {
	var sum int64
	for at := int64(0); at < n; at++ {
		if at%64 == 0 && at+64 <= n {
			sum += int64(bits.OnesCount64(binary.LittleEndian.Uint64(b[at/8:])))
			at += 63
			continue
		}
		sum += int64(b2i(testBit(b, at)))
	}
	return sum
}

// checkJournal checks the journal's inode and superblock.
func (c *checker) checkJournal() {
	s := c.sb
	if s.Compat&CompatHasJournal == 0 || s.JournalInum == 0 {
		return
	}
	p := place{"journal", s.JournalInum, -1}
	if s.JournalInum >= s.FirstIno && s.JournalInum != journalIno {
		c.damage(JournalDamaged, -1, p.corrupt("s_journal_inum", "%d, expected %d", s.JournalInum, journalIno))
		return
	}
	r, err := c.fs.openJournal(s.JournalInum)
	if err != nil {
		c.damage(JournalDamaged, -1, err)
		return
	}
	if n := r.log.in; n.Size/int64(s.BlockSize) < r.maxLen {
		c.damage(JournalDamaged, -1, p.corrupt("i_size", "%d, expected %d blocks", n.Size, r.maxLen))
	}
	super := make([]byte, superblockSize)
	if err := readFull(r.log, super, 0); err != nil {
		c.damage(JournalDamaged, -1, err)
		return
	}
	be := binary.BigEndian
	if n := be.Uint32(super[0x40:]); be.Uint32(super[4:]) == jbd2SuperblockV2 && n > 1 {
		c.damage(JournalDamaged, -1, p.corrupt("s_nr_users", "%d, expected 1", n))
	}
	if r.start != 0 && s.Incompat&IncompatRecover == 0 {
		c.damage(JournalDamaged, -1, p.corrupt("s_start", "%d, and the superblock says that nothing has to be replayed", r.start))
	}
}

// readOrphans reads which inodes a crash has left without names.
func (c *checker) readOrphans() {
	s := c.sb
	per := int64(s.InodesPerGroup)
	note := func(ino Ino) bool {
		if ino < s.FirstIno || uint32(ino) > s.InodesCount || c.orphans[ino] || !c.groups[int64(ino-1)/per].ok {
			c.find(OrphansDamaged, -1, ino, -1, "is among the orphans")
			return false
		}
		c.orphans[ino] = true
		return len(c.orphans) <= maxOrphans
	}
	for ino := s.LastOrphan; ino != 0 && note(ino); {
		n, err := c.fs.inode(ino)
		if err != nil {
			c.damage(OrphansDamaged, -1, err)
			break
		}
		ino = Ino(n.Dtime)
	}
	c.readOrphanFile(note)
	if len(c.orphans) > 0 {
		c.find(OrphansLeft, -1, 0, -1, "%d inodes are to be freed or cut off by the next mount", len(c.orphans))
	}
}

func (c *checker) readOrphanFile(note func(Ino) bool) {
	s, le := c.sb, binary.LittleEndian
	if s.Compat&CompatOrphanFile == 0 {
		return
	}
	n, err := c.fs.Inode(s.OrphanFileInum)
	if err != nil {
		c.damage(OrphansDamaged, -1, err)
		return
	}
	bs := int64(s.BlockSize)
	p := place{"orphan file", n.Ino, -1}
	if !n.IsRegular() || n.Size%bs != 0 || n.Size > s.BlocksCount*bs || n.Flags&inlineDataFl != 0 {
		c.damage(OrphansDamaged, -1, p.corrupt("i_size", "%d, i_mode %#o", n.Size, n.Mode))
		return
	}
	file := &File{fs: c.fs, in: n}
	empty := true
	for at := int64(0); at < n.Size; at += bs {
		_, phys, _, err := file.run(at)
		if err != nil {
			c.damage(OrphansDamaged, -1, err)
			return
		}
		if phys < 0 {
			c.damage(OrphansDamaged, -1, p.corrupt("", "has a hole at its block %d", at/bs))
			return
		}
		block := phys / bs
		b, err := c.fs.block(block)
		if err != nil {
			c.damage(OrphansDamaged, -1, err)
			return
		}
		p.block = block
		end := len(b) - orphanTailLen
		if m := le.Uint32(b[end:]); m != orphanMagic {
			c.damage(OrphansDamaged, -1, p.corrupt("ob_magic", "%s", hexNot(m, orphanMagic)))
			return
		}
		if found, want := le.Uint32(b[end+4:]), orphanChecksum(s, n, block, b); s.hasCsum() && found != want {
			c.damage(OrphansDamaged, -1, p.checksum(found, want))
			return
		}
		for i := 0; i < end; i += 4 {
			if ino := Ino(le.Uint32(b[i:])); ino != 0 {
				empty = false
				if !note(ino) {
					return
				}
			}
		}
	}
	if !empty && s.ROCompat&ROCompatOrphanPresent == 0 {
		c.damage(OrphansDamaged, -1, p.corrupt("", "has entries, and the superblock says that it has none"))
	}
}

// checkResizeInode checks the inode that holds the blocks that are kept for
// more descriptors: see resizeinode.go.
func (c *checker) checkResizeInode(n *Inode) {
	s, le := c.sb, binary.LittleEndian
	bad := func(format string, args ...any) {
		c.find(ResizeInodeDamaged, -1, n.Ino, -1, "%s", fmt.Sprintf(format, args...))
	}
	if s.Compat&CompatResizeInode == 0 {
		if !isZero(n.block()) || n.Links != 0 {
			bad("is in use without the resize_inode feature")
		}
		return
	}
	if !n.IsRegular() || n.Links != 1 || n.Flags&(extentsFl|inlineDataFl) != 0 {
		bad("has mode %#o, %d links and flags %#x", n.Mode, n.Links, n.Flags)
		return
	}
	perBlock := int64(s.BlockSize / 4)
	dind := int64(le.Uint32(n.block()[13*4:]))
	for i := range 15 {
		if p := le.Uint32(n.block()[4*i:]); i != 13 && p != 0 {
			bad("leads to block %d", p)
			return
		}
	}
	if dind <= s.FirstDataBlock || dind >= s.BlocksCount {
		bad("leads to block %d, and the file system has %d", dind, s.BlocksCount)
		return
	}
	c.claim(BlockShared, n.Ino, dind, 1)
	b, err := c.fs.block(dind)
	if err != nil {
		c.damage(ResizeInodeDamaged, -1, err)
		return
	}
	var backups []int64
	for g := int64(1); g < s.groups; g++ {
		if s.hasSuper(g) {
			backups = append(backups, g)
		}
	}
	descs := s.descBlocks()
	first := max(s.FirstDataBlock, int64(superblockOff/s.BlockSize)) + 1 + descs
	expected := map[int64]int64{}
	for i := range s.ReservedGDT {
		expected[(descs+i)%perBlock] = first + i
	}
	for slot := range perBlock {
		if p := int64(le.Uint32(b[4*slot:])); p != expected[slot] {
			bad("slot %d leads to block %d, expected %d", slot, p, expected[slot])
			return
		}
	}
	for i := range s.ReservedGDT {
		b, err := c.fs.block(first + i)
		if err != nil {
			c.damage(ResizeInodeDamaged, -1, err)
			return
		}
		for k, g := range backups {
			if k >= int(perBlock) {
				break
			}
			if p := int64(le.Uint32(b[4*k:])); p != first+i+g*s.BlocksPerGroup {
				bad("block %d leads to block %d, expected %d", first+i, p, first+i+g*s.BlocksPerGroup)
				return
			}
		}
	}
	if want := (1 + s.ReservedGDT*(1+int64(len(backups)))) * int64(s.BlockSize/512); n.Blocks != want && s.clusterRatio() == 1 {
		c.find(InodeBlocksWrong, -1, n.Ino, -1, "i_blocks is %d, expected %d", n.Blocks, want)
	}
}

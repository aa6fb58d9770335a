package ext4img

import (
	"encoding/binary"
	"fmt"
	"slices"
)

// Fast commits are notes of what changed since the last transaction: names,
// inodes and ranges instead of blocks. They lie behind the log, in a chain of
// tags that each commit ends with its checksum (kernel:
// fs/ext4/fast_commit.h and fast_commit.c).

// fc_tag.
const (
	fcAddRange = 1
	fcDelRange = 2
	fcCreat    = 3
	fcLink     = 4
	fcUnlink   = 5
	fcInode    = 6
	fcPad      = 7
	fcTail     = 8
	fcHead     = 9
)

const fcTagLen = 4 // fc_tag, fc_len

// maxFCExtents limits the extents of all files that fast commits change, so
// that memory does not grow with the files.
const maxFCExtents = 1 << 19

// fastCommits is what fast commits make of a file system. It is not changed
// once it was made; nil is none.
type fastCommits struct {
	inodes  map[Ino][]byte   // as they would be on the device, but for i_block of files with extents, and checksums
	extents map[Ino][]extent // the whole map
	dirs    map[Ino]*fcDir
	count   int // of extents
}

// fcDir is what happened to a directory.
type fcDir struct {
	created bool              // its blocks hold nothing yet
	parent  Ino               // if created
	names   map[string]Dirent // Ino 0: removed
	order   []string          // names, as they came
}

func (c *fastCommits) dir(ino Ino) *fcDir {
	if c == nil {
		return nil
	}
	return c.dirs[ino]
}

// fcRecord is one tag.
type fcRecord struct {
	tag   uint16
	value []byte
}

// parseFCRecords splits a block of the fast commit area; what is no tag ends
// it. raw is the tag with its value.
func parseFCRecords(b []byte, fn func(r fcRecord, raw []byte) bool) {
	for len(b) >= fcTagLen {
		tag, n := binary.LittleEndian.Uint16(b), int(binary.LittleEndian.Uint16(b[2:]))
		if n > len(b)-fcTagLen {
			return
		}
		if !fn(fcRecord{tag, b[fcTagLen : fcTagLen+n]}, b[:fcTagLen+n]) {
			return
		}
		b = b[fcTagLen+n:]
	}
}

// replayFastCommits applies the fast commits that follow the last transaction.
func (f *FS) replayFastCommits(r *recovery) error {
	c := &fastCommits{inodes: map[Ino][]byte{}, extents: map[Ino][]extent{}, dirs: map[Ino]*fcDir{}}
	f.fc = c
	le := binary.LittleEndian
	var pending []fcRecord // of the commit that is not complete yet
	var held int64         // bytes in pending
	var crc uint32
	var failure error
	done, begun := false, false
	b := make([]byte, r.blockSize)
	for n := r.last + 1; n < r.maxLen && !done && failure == nil; n++ {
		if err := readFull(r.log, b, n*r.blockSize); err != nil {
			return err
		}
		done = true // unless the block has a tag
		parseFCRecords(b, func(rec fcRecord, raw []byte) bool {
			done = false
			switch rec.tag {
			case fcHead:
				if len(rec.value) < 8 || le.Uint32(rec.value[4:]) != r.end {
					done = true // left from before
					return false
				}
				if features := le.Uint32(rec.value); features != 0 {
					failure = place{"fast commit", 0, -1}.unsupported("fc_features", "%#x", features)
					return false
				}
				begun = true
			case fcTail:
				if len(rec.value) < 8 || !begun || le.Uint32(rec.value) != r.end {
					done = true
					return false
				}
				crc = crc32c(crc, raw[:fcTagLen+4])
				if found := le.Uint32(rec.value[4:]); found != crc {
					failure = place{"fast commit", 0, -1}.checksum(found, crc)
					return false
				}
				crc = 0
				for _, p := range pending {
					if failure = f.applyFC(c, p); failure != nil {
						return false
					}
				}
				pending, held = nil, 0
				return false // the rest of the block is padding
			case fcAddRange, fcDelRange, fcCreat, fcLink, fcUnlink, fcInode, fcPad:
				if !begun {
					done = true
					return false
				}
				if held += int64(len(raw)); held > 16<<20 {
					failure = place{"fast commit", 0, -1}.unsupported("", "is larger than 16 MiB, and has to be replayed by a mount first")
					return false
				}
				pending = append(pending, fcRecord{rec.tag, slices.Clone(rec.value)})
			default:
				done = true
				return false
			}
			crc = crc32c(crc, raw)
			return true
		})
	}
	if failure != nil {
		return fmt.Errorf("fast commits: %w", failure)
	}
	if len(c.inodes) == 0 && len(c.extents) == 0 && len(c.dirs) == 0 {
		f.fc = nil
	}
	return nil
}

// applyFC applies one tag.
func (f *FS) applyFC(c *fastCommits, r fcRecord) error {
	le := binary.LittleEndian
	p := place{"fast commit", 0, -1}
	v := r.value
	least := map[uint16]int{fcAddRange: 4 + extentLen, fcDelRange: 12, fcCreat: 9, fcLink: 9, fcUnlink: 9, fcInode: 4 + oldInodeSize}[r.tag]
	if len(v) < least {
		return p.corrupt("fc_len", "%d of tag %d, expected at least %d", len(v), r.tag, least)
	}
	switch r.tag {
	case fcInode:
		return f.applyFCInode(c, Ino(le.Uint32(v)), v[4:])
	case fcAddRange:
		ino, e := Ino(le.Uint32(v)), parseExtent(v[4:])
		if e.len == 0 || e.physical <= f.sb.FirstDataBlock || e.physical > f.sb.BlocksCount-e.len || e.logical+e.len > maxLogical {
			return p.corrupt("fc_ex", "%d blocks at %d for logical block %d of inode %d", e.len, e.physical, e.logical, ino)
		}
		return f.applyFCRange(c, ino, e, true)
	case fcDelRange:
		e := extent{logical: int64(le.Uint32(v[4:])), len: int64(le.Uint32(v[8:]))}
		return f.applyFCRange(c, Ino(le.Uint32(v)), e, false)
	case fcCreat, fcLink, fcUnlink:
		return f.applyFCName(c, r.tag, Ino(le.Uint32(v)), Ino(le.Uint32(v[4:])), string(v[8:]))
	}
	return nil
}

// applyFCInode puts the fields of an inode in the place of those that it has.
// i_block stays where it is the root of an extent tree.
func (f *FS) applyFCInode(c *fastCommits, ino Ino, v []byte) error {
	old, _, err := f.rawInode(ino)
	if old == nil { // a wrong checksum does not matter: it is replaced
		return err
	}
	b := slices.Clone(old)
	if len(v) > len(b) {
		return place{"fast commit", ino, -1}.corrupt("fc_len", "%d bytes of an inode of %d", len(v), len(b))
	}
	block := slices.Clone(b[inodeBlockOff : inodeBlockOff+inodeBlockLen])
	copy(b, v)
	if binary.LittleEndian.Uint32(b[0x20:])&extentsFl != 0 {
		if binary.LittleEndian.Uint16(block) != extentMagic {
			clear(block)
			putExtentHeader(block, 0, extentRootMax, 0)
		}
		copy(b[inodeBlockOff:], block)
	}
	c.inodes[ino] = b
	return nil
}

// applyFCRange makes an extent part of a file's map, or a range a hole.
func (f *FS) applyFCRange(c *fastCommits, ino Ino, e extent, add bool) error {
	list, ok := c.extents[ino]
	if !ok {
		n, err := f.inode(ino)
		if err != nil {
			return err
		}
		// A file whose data lay in the inode has no map yet: its ranges come
		// before the inode that says so.
		for logical := int64(0); logical < maxLogical && n.Flags&inlineDataFl == 0; {
			m, err := f.mapping(n, logical)
			if err != nil {
				return err
			}
			list = append(list, m.extents...)
			if c.count += len(m.extents); c.count > maxFCExtents {
				return place{"fast commit", ino, -1}.unsupported("", "changes files of more than %d extents, and has to be replayed by a mount first", maxFCExtents)
			}
			logical = m.to
		}
	}
	before := len(list)
	list = cutExtents(list, e.logical, e.logical+e.len)
	if add {
		i, _ := slices.BinarySearchFunc(list, e.logical, func(x extent, logical int64) int { return int(min(max(x.logical-logical, -1), 1)) })
		list = slices.Insert(list, i, e)
	}
	c.count += len(list) - before
	c.extents[ino] = list
	return nil
}

// cutExtents returns a list of extents without the logical blocks from from to
// to.
func cutExtents(list []extent, from, to int64) []extent {
	out := make([]extent, 0, len(list)+1)
	for _, e := range list {
		end := e.logical + e.len
		if end <= from || e.logical >= to {
			out = append(out, e)
			continue
		}
		if e.logical < from {
			out = append(out, extent{e.logical, e.physical, from - e.logical, e.unwritten})
		}
		if end > to {
			out = append(out, extent{to, e.physical + to - e.logical, end - to, e.unwritten})
		}
	}
	return out
}

// applyFCName adds a name to a directory, or removes it.
func (f *FS) applyFCName(c *fastCommits, tag uint16, parent, ino Ino, name string) error {
	p := place{"fast commit", parent, -1}
	if len(name) > maxNameLen || uint32(ino) > f.sb.InodesCount || ino == 0 {
		return p.corrupt("fc_dname", "of %d bytes for inode %d", len(name), ino)
	}
	d := c.dirs[parent]
	if d == nil {
		d = &fcDir{names: map[string]Dirent{}}
		c.dirs[parent] = d
	}
	if _, ok := d.names[name]; !ok {
		d.order = append(d.order, name)
	}
	if tag == fcUnlink {
		d.names[name] = Dirent{}
		return nil
	}
	n, err := f.inode(ino)
	if err != nil {
		return err
	}
	if tag == fcCreat && n.IsDir() {
		c.dirs[ino] = &fcDir{created: true, parent: parent, names: map[string]Dirent{}}
	}
	t := FileType(fileType(n.Mode))
	if f.sb.Incompat&IncompatFiletype == 0 {
		t = TypeUnknown
	}
	d.names[name] = Dirent{ino, t, name}
	return nil
}

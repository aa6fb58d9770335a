package ext4img

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math"

	"qimg/qcow2/blockdev"
)

const verityFl = 0x100000 // the content has a Merkle tree

// editable returns an inode that is in use, and that operations may change.
func (t *Tx) editable(ino Ino) (*Inode, error) {
	s := t.sb()
	if ino != RootIno && (ino < s.FirstIno || s.OrphanFileInum == ino && s.Compat&CompatOrphanFile != 0) {
		return nil, place{"inode", ino, -1}.unsupported("", "belongs to the file system itself")
	}
	n, err := t.used(ino)
	if err == nil && n.Flags&eaInodeFl != 0 {
		err = place{"inode", ino, -1}.unsupported("i_flags", "%#x: holds the value of an xattr", n.Flags)
	}
	return n, err
}

// regular returns the inode of a regular file whose content may be changed.
func (t *Tx) regular(ino Ino) (*Inode, error) {
	n, err := t.editable(ino)
	switch {
	case err != nil:
		return nil, err
	case n.IsDir():
		return nil, ErrIsDir
	case !n.IsRegular():
		return nil, fmt.Errorf("ext4: inode %d: %s has no content", ino, typeName(n.Mode))
	case n.Flags&encryptFl != 0:
		return nil, &FormatError{"content", ino, -1, "", "is encrypted", ErrEncrypted}
	case n.Flags&verityFl != 0:
		return nil, place{"content", ino, -1}.unsupported("i_flags", "%#x: verity", n.Flags)
	case n.Flags&comprFl != 0 && n.Flags&extentsFl == 0:
		return nil, place{"content", ino, -1}.unsupported("i_flags", "%#x: compressed", n.Flags)
	}
	return n, nil
}

// maxSize is the largest size of a file.
func (t *Tx) maxSize(n *Inode) int64 {
	s := t.sb()
	bs := int64(s.BlockSize)
	if n.Flags&extentsFl != 0 {
		return (maxLogical - 1) * bs
	}
	p := bs / 4
	limit := min(directBlocks+p+p*p+p*p*p, maxLogical-1) * bs
	if s.RevLevel == 0 {
		limit = min(limit, math.MaxInt32)
	}
	return limit
}

// setSize sets the size of a regular file.
func (t *Tx) setSize(n *Inode, size int64) error {
	if size < 0 || size > t.maxSize(n) {
		return fmt.Errorf("ext4: inode %d: a size of %d bytes, and %d are possible: %w", n.Ino, size, t.maxSize(n), ErrTooLarge)
	}
	n.Size = size
	if s := t.sb(); size > math.MaxInt32 && s.ROCompat&ROCompatLargeFile == 0 {
		s.ROCompat |= ROCompatLargeFile
	}
	t.dirty(n)
	return nil
}

// modified sets the times of a file whose content has changed.
func (t *Tx) modified(n *Inode) {
	n.Mtime, n.Ctime = t.now, t.now
	t.dirty(n)
}

// WriteAt writes to a regular file, which grows if need be. What was there
// stays in its place until the commit: the blocks move.
func (t *Tx) WriteAt(ino Ino, p []byte, off int64) error {
	return t.do(func() error {
		n, err := t.regular(ino)
		if err != nil {
			return err
		}
		return t.write(n, p, off)
	})
}

// Append writes to the end of a regular file.
func (t *Tx) Append(ino Ino, p []byte) error {
	return t.do(func() error {
		n, err := t.regular(ino)
		if err != nil {
			return err
		}
		return t.write(n, p, n.Size)
	})
}

func (t *Tx) write(n *Inode, p []byte, off int64) error {
	switch {
	case off < 0 || off > t.maxSize(n)-int64(len(p)):
		return fmt.Errorf("ext4: inode %d: write of %d bytes at %d: %w", n.Ino, len(p), off, ErrTooLarge)
	case len(p) == 0:
		return nil
	}
	end := off + int64(len(p))
	if n.Flags&inlineDataFl != 0 {
		if done, err := t.writeInline(n, p, off); done || err != nil {
			return err
		}
	}
	bs := int64(t.sb().BlockSize)
	if off > n.Size {
		if err := t.zeroTail(n, n.Size); err != nil {
			return err
		}
	}
	from, to := off/bs, ceilDiv(end, bs)
	// The first and the last block as they will be; what is whole needs no
	// copy.
	edge := func(logical int64) ([]byte, error) {
		b := make([]byte, bs)
		if err := t.readOld(n, b, logical); err != nil {
			return nil, err
		}
		lo, hi := max(off, logical*bs), min(end, (logical+1)*bs)
		copy(b[lo-logical*bs:], p[lo-off:hi-off])
		return b, nil
	}
	head, tail := []byte(nil), []byte(nil)
	var err error
	if off%bs != 0 || end < (from+1)*bs {
		if head, err = edge(from); err != nil {
			return err
		}
	}
	if end%bs != 0 && (to-1 > from || head == nil) {
		if tail, err = edge(to - 1); err != nil {
			return err
		}
	}
	if err := t.claim(n, from, to); err != nil {
		return err
	}
	if end > n.Size {
		if err := t.setSize(n, end); err != nil {
			return err
		}
	}
	t.modified(n)
	return t.eachMapped(n, from, to, func(e extent) error {
		for e.len > 0 {
			k := int64(1)
			b := head
			switch {
			case e.logical == from && head != nil:
			case e.logical == to-1 && tail != nil:
				b = tail
			default:
				stop := e.logical + e.len
				if tail != nil {
					stop = min(stop, to-1)
				}
				k = stop - e.logical
				b = p[e.logical*bs-off : stop*bs-off]
			}
			if err := t.writeData(b, e.physical); err != nil {
				return err
			}
			e.logical, e.physical, e.len = e.logical+k, e.physical+k, e.len-k
		}
		return nil
	})
}

// readOld reads a block of a file as it is, zeroes behind the file's end.
func (t *Tx) readOld(n *Inode, b []byte, logical int64) error {
	bs := int64(len(b))
	clear(b)
	if logical*bs >= n.Size {
		return nil
	}
	c := &File{fs: t.fs, in: n}
	m, err := c.ReadAt(b[:min(bs, n.Size-logical*bs)], logical*bs)
	if err == io.EOF && m > 0 {
		err = nil
	}
	return err
}

// zeroTail makes what the block of a file's new end holds behind that zeroes,
// where it does not: the file may grow over it.
func (t *Tx) zeroTail(n *Inode, size int64) error {
	bs := int64(t.sb().BlockSize)
	logical, in := size/bs, size%bs
	if in == 0 {
		return nil
	}
	m, err := t.fs.mapping(n, logical)
	if err != nil {
		return err
	}
	e := m.at(logical)
	if e.physical == 0 || e.unwritten {
		return nil
	}
	b := make([]byte, bs)
	if err := t.fs.readBlocks(b, e.physical); err != nil {
		return err
	}
	if isZero(b[in:]) {
		return nil
	}
	clear(b[in:])
	if err := t.claim(n, logical, logical+1); err != nil {
		return err
	}
	return t.eachMapped(n, logical, logical+1, func(e extent) error { return t.writeData(b, e.physical) })
}

// Truncate sets the size of a regular file. What it gains is a hole.
func (t *Tx) Truncate(ino Ino, size int64) error {
	return t.do(func() error {
		n, err := t.regular(ino)
		if err != nil {
			return err
		}
		if size < 0 || size > t.maxSize(n) {
			return fmt.Errorf("ext4: inode %d: a size of %d bytes, and %d are possible: %w", ino, size, t.maxSize(n), ErrTooLarge)
		}
		t.modified(n)
		return t.truncate(n, size)
	})
}

func (t *Tx) truncate(n *Inode, size int64) error {
	if n.Flags&inlineDataFl != 0 {
		if done, err := t.truncateInline(n, size); done || err != nil {
			return err
		}
	}
	bs := int64(t.sb().BlockSize)
	old := n.Size
	if size <= old { // blocks can lie behind the end, too
		if err := t.unmap(n, ceilDiv(size, bs), maxLogical); err != nil {
			return err
		}
	}
	if err := t.zeroTail(n, min(size, old)); err != nil {
		return err
	}
	return t.setSize(n, size)
}

// dropContent frees what an inode of any type holds.
func (t *Tx) dropContent(n *Inode) error {
	switch n.Type() {
	case modeReg, modeDir:
	case modeLink:
		if t.fs.isFastSymlink(n) {
			return nil
		}
	default:
		return nil
	}
	if n.Flags&inlineDataFl != 0 {
		return nil
	}
	return t.unmap(n, 0, maxLogical)
}

// SetContent makes a regular file hold what a reader does, and nothing else.
// Where the reader knows of extents that read as zeroes, the file has holes.
// ctx is looked at before each piece of 1 MiB. The content goes to free blocks
// at once, so that memory does not depend on its size.
func (t *Tx) SetContent(ctx context.Context, ino Ino, src blockdev.Reader) error {
	return t.do(func() error {
		n, err := t.regular(ino)
		if err != nil {
			return err
		}
		size := src.Size()
		if err := t.startOver(n); err != nil {
			return err
		}
		if err := t.setSize(n, size); err != nil {
			return err
		}
		t.modified(n)
		bs := int64(t.sb().BlockSize)
		pending := run{} // blocks that hold data
		for off := int64(0); off < size; {
			e, err := blockdev.NextExtent(src, off)
			if err != nil {
				return err
			}
			if end := off + e.Len; !e.Kind.ReadsZero() {
				if off/bs > pending.end {
					if err := t.fill(ctx, n, pending, src); err != nil {
						return err
					}
					pending.start = off / bs
				}
				pending.end = ceilDiv(end, bs)
			}
			off += e.Len
		}
		return t.fill(ctx, n, pending, src)
	})
}

// startOver makes a regular file empty.
func (t *Tx) startOver(n *Inode) error {
	if n.Flags&inlineDataFl != 0 {
		if err := t.leaveInline(n); err != nil {
			return err
		}
	}
	if err := t.unmap(n, 0, maxLogical); err != nil {
		return err
	}
	n.Size = 0
	return nil
}

// fill copies blocks of a file, which are a hole, from a reader.
func (t *Tx) fill(ctx context.Context, n *Inode, r run, src blockdev.Reader) error {
	if r.len() == 0 {
		return nil
	}
	if err := t.claim(n, r.start, r.end); err != nil || t.plan {
		return err
	}
	bs := int64(t.sb().BlockSize)
	buf := make([]byte, min(r.len(), max(writeSize/bs, 1))*bs)
	return t.eachMapped(n, r.start, r.end, func(e extent) error {
		for e.len > 0 {
			if err := ctx.Err(); err != nil {
				return err
			}
			k := min(e.len, int64(len(buf))/bs)
			b := buf[:k*bs]
			have := min(int64(len(b)), src.Size()-e.logical*bs)
			if err := readFull(src, b[:have], e.logical*bs); err != nil {
				return err
			}
			clear(b[have:])
			if err := t.writeData(b, e.physical); err != nil {
				return err
			}
			e.logical, e.physical, e.len = e.logical+k, e.physical+k, e.len-k
		}
		return nil
	})
}

// setTarget makes a new symlink lead to a target.
func (t *Tx) setTarget(n *Inode, target string) error {
	bs := t.sb().BlockSize
	switch {
	case target == "":
		return fmt.Errorf("ext4: a symlink to nothing: %w", errInvalid)
	case len(target) > min(maxPathLen, bs-1):
		return fmt.Errorf("ext4: a symlink to a path of %d bytes, and %d are possible: %w", len(target), min(maxPathLen, bs-1), ErrTooLarge)
	case bytes.IndexByte([]byte(target), 0) >= 0:
		return fmt.Errorf("ext4: a symlink to %q: %w", target, errInvalid)
	}
	if len(target) < inodeBlockLen {
		n.Flags &^= extentsFl
		clear(n.block())
		copy(n.block(), target)
		n.Size = int64(len(target))
		t.dirty(n)
		return nil
	}
	_, physical, err := t.appendBlock(n)
	if err != nil {
		return err
	}
	b, err := t.edit(physical)
	if err != nil {
		return err
	}
	copy(b, target)
	n.Size = int64(len(target))
	t.dirty(n)
	return nil
}

// setRdev gives a new device node its numbers: those of 8:8 bits in the first
// word, in their old form.
func (n *Inode) setRdev(major, minor uint32) {
	le := binary.LittleEndian
	clear(n.block())
	if major < 256 && minor < 256 {
		le.PutUint32(n.block(), major<<8|minor)
		return
	}
	le.PutUint32(n.block()[4:], minor&0xff|major<<8|minor&^0xff<<12)
}

// inlineRoom is how many bytes an inode with inline data has room for, as its
// xattr system.data is now.
func (t *Tx) inlineRoom(n *Inode) (int64, error) {
	rest, err := t.fs.inlineRest(n)
	return inodeBlockLen + int64(len(rest)), err
}

// writeInline writes to a file whose content lies in the inode; done is false
// if it has no room there, and the content lies in blocks then.
func (t *Tx) writeInline(n *Inode, p []byte, off int64) (done bool, err error) {
	room, err := t.inlineRoom(n)
	if err != nil {
		return false, err
	}
	if off+int64(len(p)) > room {
		return false, t.convertInline(n)
	}
	if err := t.putInline(n, p, off); err != nil {
		return false, err
	}
	n.Size = max(n.Size, off+int64(len(p)))
	t.modified(n)
	return true, nil
}

// putInline changes bytes of inline data, inside of the room that there is.
func (t *Tx) putInline(n *Inode, p []byte, off int64) error {
	rest, err := t.fs.inlineRest(n) // lies in n.raw
	if err != nil {
		return err
	}
	if off < inodeBlockLen {
		k := copy(n.block()[off:], p)
		p, off = p[k:], off+int64(k)
	}
	copy(rest[min(off-inodeBlockLen, int64(len(rest))):], p)
	return nil
}

func (t *Tx) truncateInline(n *Inode, size int64) (done bool, err error) {
	room, err := t.inlineRoom(n)
	if err != nil {
		return false, err
	}
	if size > room {
		return false, t.convertInline(n)
	}
	if size < n.Size {
		if err := t.putInline(n, make([]byte, n.Size-size), size); err != nil {
			return false, err
		}
	}
	n.Size = size
	t.dirty(n)
	return true, nil
}

// convertInline moves the content of a file from the inode to a block.
func (t *Tx) convertInline(n *Inode) error {
	c, err := t.fs.content(n)
	if err != nil {
		return err
	}
	b := bytes.Clone(c.inline)
	mtime, ctime := n.Mtime, n.Ctime
	if err := t.leaveInline(n); err != nil {
		return err
	}
	n.Size = 0
	if err := t.write(n, b, 0); err != nil {
		return err
	}
	n.Mtime, n.Ctime = mtime, ctime
	return nil
}

// leaveInline makes an inode that holds its content one that has none, and
// whose content will lie in blocks.
func (t *Tx) leaveInline(n *Inode) error {
	if err := t.removeXattr(n, xattrSystem, "data"); err != nil {
		return err
	}
	n.Flags &^= inlineDataFl
	clear(n.block())
	if t.sb().Incompat&IncompatExtents != 0 {
		n.Flags |= extentsFl
		putExtentHeader(n.block(), 0, extentRootMax, 0)
	}
	t.dirty(n)
	return nil
}

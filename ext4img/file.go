package ext4img

import (
	"fmt"
	"io"
	"sync/atomic"

	"qimg/qcow2/blockdev"
)

// File reads the content of a regular file. It is a blockdev.Reader and a
// blockdev.ExtentReader, safe for concurrent use, and has nothing to close.
// Holes and blocks that were allocated but never written read as zeroes.
type File struct {
	fs     *FS
	in     *Inode
	inline []byte // the content, if the inode holds it
	last   atomic.Pointer[mapping]
}

// File returns the content of a regular file. Anything else is an error; the
// content of an encrypted file one that matches ErrEncrypted.
func (f *FS) File(ino Ino) (*File, error) {
	n, err := f.Inode(ino)
	if err != nil {
		return nil, err
	}
	return f.file(n)
}

func (f *FS) file(n *Inode) (*File, error) {
	switch {
	case n.IsDir():
		return nil, ErrIsDir
	case !n.IsRegular():
		return nil, fmt.Errorf("ext4: inode %d: %s has no content", n.Ino, typeName(n.Mode))
	case n.Flags&encryptFl != 0:
		return nil, &FormatError{"content", n.Ino, -1, "", "is encrypted", ErrEncrypted}
	case n.Flags&comprFl != 0 && n.Flags&extentsFl == 0:
		return nil, place{"content", n.Ino, -1}.unsupported("i_flags", "%#x: compressed", n.Flags)
	}
	return f.content(n)
}

// content returns the bytes of a file of any type that has some.
func (f *FS) content(n *Inode) (*File, error) {
	c := &File{fs: f, in: n}
	if n.Flags&inlineDataFl != 0 {
		b, err := f.inlineData(n)
		if err != nil {
			return nil, err
		}
		if n.Size > int64(len(b)) {
			return nil, place{"inline data", n.Ino, -1}.corrupt("i_size", "%d, and the inode holds %d bytes", n.Size, len(b))
		}
		c.inline = b[:n.Size:n.Size]
	}
	return c, nil
}

// Inode returns the inode of the file.
func (c *File) Inode() *Inode { return c.in }

// Size returns the size in bytes.
func (c *File) Size() int64 { return c.in.Size }

// mapping returns the part of the file's map that a logical block belongs to.
func (c *File) mapping(logical int64) (*mapping, error) {
	if m := c.last.Load(); m != nil && m.from <= logical && logical < m.to {
		return m, nil
	}
	m, err := c.fs.mapping(c.in, logical)
	if err == nil {
		c.last.Store(m)
	}
	return m, err
}

// run returns the longest run of one kind from a byte on that one part of the
// map tells: its length, and where it begins on the device; -1 for what reads
// as zeroes.
func (c *File) run(off int64) (n, phys int64, unwritten bool, err error) {
	bs := int64(c.fs.sb.BlockSize)
	logical, in := off/bs, off%bs
	m, err := c.mapping(logical)
	if err != nil {
		return 0, 0, false, err
	}
	e := m.at(logical)
	n = e.len*bs - in
	if e.physical == 0 || e.unwritten {
		return n, -1, e.unwritten, nil
	}
	return n, e.physical*bs + in, false, nil
}

// ReadAt implements io.ReaderAt.
func (c *File) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("ext4: inode %d: read at offset %d: %w", c.in.Ino, off, blockdev.ErrRange)
	}
	if len(p) == 0 {
		return 0, nil
	}
	if off >= c.in.Size {
		return 0, io.EOF
	}
	var eof error
	if rest := c.in.Size - off; int64(len(p)) > rest {
		p, eof = p[:rest], io.EOF
	}
	if c.in.Flags&inlineDataFl != 0 {
		copy(p, c.inline[off:])
		return len(p), eof
	}
	done := 0
	for done < len(p) {
		n, phys, _, err := c.run(off + int64(done))
		if err != nil {
			return done, err
		}
		// What lies behind on the device, too, is read with it.
		for phys >= 0 && n < int64(len(p)-done) {
			more, next, _, err := c.run(off + int64(done) + n)
			if err != nil || next != phys+n {
				break
			}
			n += more
		}
		part := p[done:min(int64(len(p)), int64(done)+n)]
		if phys < 0 {
			clear(part)
		} else if err := c.fs.readBytes(part, phys); err != nil {
			return done, fmt.Errorf("ext4: inode %d: offset %d: %w", c.in.Ino, off+int64(done), err)
		}
		done += len(part)
	}
	return done, eof
}

// NextExtent implements blockdev.ExtentReader. A hole is Unallocated, blocks
// that were never written are Zero; what holds data is as the device below
// says, which can know that a range reads as zeroes, and in which file its
// bytes lie.
func (c *File) NextExtent(off int64) (blockdev.Extent, error) {
	if off < 0 || off >= c.in.Size {
		return blockdev.Extent{}, fmt.Errorf("ext4: inode %d: extent at offset %d of %d bytes: %w", c.in.Ino, off, c.in.Size, blockdev.ErrRange)
	}
	rest := c.in.Size - off
	if c.in.Flags&inlineDataFl != 0 {
		return blockdev.Extent{Off: off, Len: rest, Kind: blockdev.Data}, nil
	}
	n, phys, unwritten, err := c.run(off)
	if err != nil {
		return blockdev.Extent{}, err
	}
	n = min(n, rest)
	switch {
	case unwritten:
		return blockdev.Extent{Off: off, Len: n, Kind: blockdev.Zero}, nil
	case phys < 0:
		return blockdev.Extent{Off: off, Len: n, Kind: blockdev.Unallocated}, nil
	}
	// Blocks that the journal has newer copies of are read through it.
	bs := int64(c.fs.sb.BlockSize)
	if b, ok := c.fs.journal.next(phys / bs); ok && b.block*bs < phys+n {
		if b.block > phys/bs {
			n = b.block*bs - phys
		} else {
			return blockdev.Extent{Off: off, Len: min(n, (b.block+1)*bs-phys), Kind: blockdev.Data}, nil
		}
	}
	e, err := blockdev.NextExtent(c.fs.dev, phys)
	if err != nil {
		return blockdev.Extent{}, err
	}
	e.Off, e.Len, e.Depth = off, min(e.Len, n), 0
	return e, nil
}

// typeName is the type of a file in words.
func typeName(mode uint16) string {
	switch mode & modeType {
	case modeReg:
		return "a regular file"
	case modeDir:
		return "a directory"
	case modeLink:
		return "a symlink"
	case modeChar:
		return "a character device"
	case modeBlock:
		return "a block device"
	case modeFifo:
		return "a fifo"
	case modeSocket:
		return "a socket"
	}
	return fmt.Sprintf("a file of type %#x", mode&modeType)
}

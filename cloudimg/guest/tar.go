package guest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"path"
	"strconv"
	"strings"
	"time"

	"qimg/qcow2/blockdev"
)

// TarOptions say how Tar works. The zero value is the default.
type TarOptions struct {
	// Problem is told what cannot be read, or is left out, which does not stop
	// the archive. Of a file whose content cannot be read to its end the rest is
	// zeroes. Nil: the first such error ends the archive.
	Problem func(path string, err error)
	// Skipped is told of each socket, which an archive cannot hold.
	Skipped func(path string)
}

// Tar writes a file, and all below it if it is a directory, as a pax archive
// (POSIX.1-2008, pax, "pax Interchange Format"), with the records of GNU tar:
// extended attributes (SCHILY.xattr), ACLs (SCHILY.acl) and holes (GNU.sparse
// 1.0). Names begin with "./"; a single file has the name given.
//
// Kept: contents, holes, modes, owners, times of modification to the
// nanosecond, hard links, symlinks, devices, fifos, extended attributes, ACLs,
// names of any bytes. Sockets, which tar does not know, are left out and told of.
// The archive depends on the file system alone: entries are in the order of
// names.
//
// Memory is a few MiB, and a few bytes for each file that has several names.
func Tar(ctx context.Context, w io.Writer, fsys FS, from *File, name string, opts *TarOptions) error {
	if opts == nil {
		opts = &TarOptions{}
	}
	t := &tarWriter{ctx: ctx, out: newAhead(w), fs: fsys, opts: opts, links: map[fileKey]string{}}
	err := t.walk(from, name)
	if e := t.out.close(err == nil); err == nil || errors.Is(err, errAhead) {
		err = e
	}
	return err
}

type tarWriter struct {
	ctx   context.Context
	out   *ahead
	fs    FS
	opts  *TarOptions
	links map[fileKey]string // names of files that have more than one
}

func (t *tarWriter) walk(from *File, name string) error {
	for n, err := range Walk(t.ctx, t.fs, from) {
		if err != nil {
			if err := t.problem("", err); err != nil {
				return err
			}
			continue
		}
		full := "./" + n.Path
		switch {
		case !from.IsDir():
			full = name
		case n.IsDir() && n.Path != "":
			full += "/"
		}
		if err := t.entry(full, n); err != nil {
			return err
		}
	}
	return t.out.zeroes(2 * tarBlock)
}

// problem tells of an error, or returns it if that ends the archive.
func (t *tarWriter) problem(path string, err error) error {
	var pe *PathError
	if errors.As(err, &pe) {
		path, err = pe.Path, pe.Err
	} else if t.ctx.Err() != nil {
		return t.ctx.Err()
	}
	if t.opts.Problem == nil {
		return &PathError{path, err}
	}
	t.opts.Problem(path, err)
	return nil
}

const tarBlock = 512

// tarHeader is what a header is made of.
type tarHeader struct {
	name, link   string
	typ          byte
	mode         uint16
	uid, gid     uint32
	size         int64
	mtime        time.Time
	major, minor uint32
	records      []byte // of the extended header
}

// record adds a record to the extended header: its length, which counts itself,
// a key and a value.
func (h *tarHeader) record(key, value string) {
	n := len(key) + len(value) + 3 // blank, = and newline
	length := n + len(strconv.Itoa(n))
	if l := len(strconv.Itoa(length)); n+l != length {
		length = n + l
	}
	h.records = append(h.records, fmt.Sprintf("%d %s=%s\n", length, key, value)...)
}

// entry writes a file.
func (t *tarWriter) entry(name string, n *Node) error {
	h := &tarHeader{name: name, mode: n.Mode & 0o7777, uid: n.UID, gid: n.GID, mtime: n.Mtime}
	if n.Links > 1 && !n.IsDir() && n.Ino != 0 {
		if first, ok := t.links[n.key()]; ok {
			h.typ, h.link = '1', first
			return t.header(h)
		}
		t.links[n.key()] = name
	}
	var content Content
	var err error
	switch n.Type() {
	case ModeRegular:
		h.typ = '0'
		content, err = t.fs.Content(n.File)
	case ModeDir:
		h.typ = '5'
	case ModeSymlink:
		h.typ = '2'
		h.link, err = t.fs.Readlink(n.File)
	case ModeChar, ModeBlock:
		h.typ, h.major, h.minor = '3', n.Major, n.Minor
		if n.Type() == ModeBlock {
			h.typ = '4'
		}
	case ModeFifo:
		h.typ = '6'
	case ModeSocket:
		delete(t.links, n.key())
		if t.opts.Skipped != nil {
			t.opts.Skipped(n.Path)
		}
		return nil
	default:
		err = fmt.Errorf("a file of type %#x is left out", n.Type())
	}
	if err == nil {
		err = t.xattrs(h, n)
	}
	if err != nil {
		if content != nil {
			content.Close()
		}
		delete(t.links, n.key())
		return t.problem(n.Path, err)
	}
	if content == nil {
		return t.header(h)
	}
	defer content.Close()
	return t.file(h, n, content)
}

// xattrs adds the extended attributes to a header, in the way of GNU tar.
func (t *tarWriter) xattrs(h *tarHeader, n *Node) error {
	for x, err := range t.fs.Xattrs(n.File) {
		if err != nil {
			return err
		}
		if kind, ok := strings.CutPrefix(x.Name, "system.posix_acl_"); ok {
			text, err := aclText(x.Value)
			if err != nil {
				return fmt.Errorf("xattr %s: %w", x.Name, err)
			}
			h.record("SCHILY.acl."+kind, text)
		}
		h.record("SCHILY.xattr."+strings.NewReplacer("%", "%25", "=", "%3D").Replace(x.Name), x.Value)
	}
	return nil
}

// aclText is a POSIX ACL in words, with numbers for users and groups (Linux,
// include/uapi/linux/posix_acl_xattr.h).
func aclText(value string) (string, error) {
	b := []byte(value)
	if len(b) < 4 || len(b)%8 != 4 || binary.LittleEndian.Uint32(b) != 2 {
		return "", errors.New("malformed POSIX ACL")
	}
	var s strings.Builder
	for b = b[4:]; len(b) > 0; b = b[8:] {
		tag, perm, id := binary.LittleEndian.Uint16(b), binary.LittleEndian.Uint16(b[2:]), binary.LittleEndian.Uint32(b[4:])
		switch tag {
		case 0x01:
			s.WriteString("user::")
		case 0x02:
			fmt.Fprintf(&s, "user:%d:", id)
		case 0x04:
			s.WriteString("group::")
		case 0x08:
			fmt.Fprintf(&s, "group:%d:", id)
		case 0x10:
			s.WriteString("mask::")
		case 0x20:
			s.WriteString("other::")
		default:
			return "", fmt.Errorf("malformed POSIX ACL: tag %#x", tag)
		}
		for i, c := range []byte("rwx") {
			if perm>>(2-i)&1 == 0 {
				c = '-'
			}
			s.WriteByte(c)
		}
		s.WriteByte('\n')
	}
	return s.String(), nil
}

// file writes a regular file.
func (t *tarWriter) file(h *tarHeader, n *Node, c Content) error {
	h.size = c.Size()
	sparse, mapSize, dataSize := false, int64(0), int64(0)
	if e, ok := c.(blockdev.ExtentReader); ok {
		count, err := t.segments(e, c.Size(), nil)
		if err != nil {
			return t.problem(n.Path, err)
		}
		if sparse = count.data < c.Size(); sparse {
			mapSize = (int64(len(strconv.Itoa(count.n))+1) + count.text + tarBlock - 1) &^ (tarBlock - 1)
			dataSize = count.data
			h.record("GNU.sparse.major", "1")
			h.record("GNU.sparse.minor", "0")
			h.record("GNU.sparse.name", h.name)
			h.record("GNU.sparse.realsize", strconv.FormatInt(c.Size(), 10))
			dir, base := path.Split(h.name)
			h.name, h.size = dir+"GNUSparseFile.0/"+base, mapSize+dataSize
			if err := t.header(h); err != nil {
				return err
			}
			if err := t.sparseMap(e, c.Size(), count.n, mapSize); err != nil {
				return err
			}
		}
	}
	if !sparse {
		if err := t.header(h); err != nil {
			return err
		}
		if err := t.content(n.Path, c, 0, c.Size()); err != nil {
			return err
		}
		return t.out.zeroes(-h.size & (tarBlock - 1))
	}
	var fail error
	_, err := t.segments(c.(blockdev.ExtentReader), c.Size(), func(off, length int64) bool {
		fail = t.content(n.Path, c, off, length)
		return fail == nil
	})
	if err == nil {
		err = fail
	}
	if err != nil {
		return err
	}
	return t.out.zeroes(-h.size & (tarBlock - 1))
}

// sparseCount is how long the map of a sparse file is: pieces, bytes of their
// lines, and bytes of data.
type sparseCount struct {
	n    int
	text int64
	data int64
}

// segments calls fn with the pieces of data of a file, ascending, and with one
// of no length at the end if a hole is there. fn returns false to stop.
func (t *tarWriter) segments(e blockdev.ExtentReader, size int64, fn func(off, length int64) bool) (count sparseCount, err error) {
	more := true
	emit := func(off, length int64) {
		count.n++
		count.text += int64(len(strconv.FormatInt(off, 10)) + len(strconv.FormatInt(length, 10)) + 2)
		count.data += length
		if fn != nil {
			more = fn(off, length)
		}
	}
	start, end := int64(0), int64(0) // of the data that was not yet told
	for off := int64(0); off < size && more; {
		if err := t.ctx.Err(); err != nil {
			return count, err
		}
		x, err := e.NextExtent(off)
		if err != nil {
			return count, err
		}
		if !x.Kind.ReadsZero() {
			if off > end {
				if end > start {
					emit(start, end-start)
				}
				start = off
			}
			end = off + x.Len
		}
		off += x.Len
	}
	if more && end > start {
		emit(start, end-start)
	}
	if more && end < size {
		emit(size, 0)
	}
	return count, nil
}

// sparseMap writes the map of a sparse file.
func (t *tarWriter) sparseMap(e blockdev.ExtentReader, size int64, n int, mapSize int64) error {
	head := strconv.Itoa(n) + "\n"
	written := int64(len(head))
	if err := t.out.write([]byte(head)); err != nil {
		return err
	}
	var fail error
	_, err := t.segments(e, size, func(off, length int64) bool {
		line := strconv.FormatInt(off, 10) + "\n" + strconv.FormatInt(length, 10) + "\n"
		written += int64(len(line))
		fail = t.out.write([]byte(line))
		return fail == nil
	})
	if err == nil {
		err = fail
	}
	if err != nil {
		return err
	}
	return t.out.zeroes(mapSize - written)
}

// content writes a piece of a file.
func (t *tarWriter) content(path string, c Content, off, length int64) error {
	for length > 0 {
		if err := t.ctx.Err(); err != nil {
			return err
		}
		b, err := t.out.space()
		if err != nil {
			return err
		}
		b = b[:min(int64(len(b)), length)]
		n, err := c.ReadAt(b, off)
		if n < len(b) {
			if err == nil || err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			if err := t.problem(path, fmt.Errorf("offset %d: %w", off+int64(n), err)); err != nil {
				return err
			}
			t.out.advance(n)
			return t.out.zeroes(length - int64(n))
		}
		t.out.advance(n)
		off, length = off+int64(n), length-int64(n)
	}
	return nil
}

// header writes a header, and an extended one before it if there is something
// that it cannot hold.
func (t *tarWriter) header(h *tarHeader) error {
	if err := t.ctx.Err(); err != nil {
		return err
	}
	var b [tarBlock]byte
	if !putName(b[:], h.name) {
		h.record("path", h.name)
	}
	if len(h.link) > 100 {
		h.record("linkpath", h.link)
	}
	const octal7, octal11 = 1<<21 - 1, 1<<33 - 1
	sec := h.mtime.Unix()
	if h.mtime.IsZero() {
		sec = 0
	}
	if ns := h.mtime.Nanosecond(); ns != 0 || sec < 0 || sec > octal11 {
		h.record("mtime", paxTime(sec, int64(ns)))
	}
	if h.uid > octal7 {
		h.record("uid", strconv.FormatUint(uint64(h.uid), 10))
	}
	if h.gid > octal7 {
		h.record("gid", strconv.FormatUint(uint64(h.gid), 10))
	}
	if h.size > octal11 {
		h.record("size", strconv.FormatInt(h.size, 10))
	}
	if len(h.records) > 0 {
		dir, base := path.Split(strings.TrimSuffix(h.name, "/"))
		x := dir + "PaxHeaders/" + base
		x = x[:min(len(x), 100)]
		var xb [tarBlock]byte
		copy(xb[:100], x)
		putHeader(xb[:], &tarHeader{typ: 'x', mode: 0o644, size: int64(len(h.records))}, max(sec, 0))
		if err := t.out.write(xb[:]); err != nil {
			return err
		}
		if err := t.out.write(h.records); err != nil {
			return err
		}
		if err := t.out.zeroes(-int64(len(h.records)) & (tarBlock - 1)); err != nil {
			return err
		}
	}
	copy(b[157:257], h.link)
	putHeader(b[:], h, max(sec, 0))
	return t.out.write(b[:])
}

// paxTime is a time in decimal digits.
func paxTime(sec, ns int64) string {
	sign := ""
	if sec < 0 {
		sign, sec = "-", -sec
		if ns > 0 {
			sec, ns = sec-1, 1e9-ns
		}
	}
	s := sign + strconv.FormatInt(sec, 10)
	if ns > 0 {
		s += "." + strings.TrimRight(fmt.Sprintf("%09d", ns), "0")
	}
	return s
}

// putName puts a name into a header; it reports whether it fits.
func putName(b []byte, name string) bool {
	if len(name) <= 100 {
		copy(b[:100], name)
		return true
	}
	// The part before a slash can lie in a field of its own.
	for i := len(name) - 101; i < len(name)-1 && i <= 155; i++ {
		if i > 0 && name[i] == '/' {
			copy(b[:100], name[i+1:])
			copy(b[345:500], name[:i])
			return true
		}
	}
	copy(b[:100], name)
	return false
}

// putHeader fills in all but the names. What does not fit is in records.
func putHeader(b []byte, h *tarHeader, sec int64) {
	octal := func(off, digits int, v int64) {
		if v >= 1<<(3*digits) {
			v = 0
		}
		copy(b[off:], fmt.Sprintf("%0*o", digits, v))
	}
	octal(100, 7, int64(h.mode))
	octal(108, 7, int64(h.uid))
	octal(116, 7, int64(h.gid))
	octal(124, 11, h.size)
	octal(136, 11, sec)
	b[156] = h.typ
	copy(b[257:], "ustar\x0000")
	octal(329, 7, int64(h.major))
	octal(337, 7, int64(h.minor))
	sum := int64(8 * ' ')
	for i, c := range b {
		if i < 148 || i >= 156 {
			sum += int64(c)
		}
	}
	copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
}

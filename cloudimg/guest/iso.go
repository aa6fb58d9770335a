package guest

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"strings"
	"time"
	"unicode/utf16"

	"qimg/qcow2/blockdev"
)

// isoFS reads ISO 9660 with the extensions Rock Ridge (IEEE P1281 and P1282)
// and Joliet, one directory record at a time. The reader of go-diskfs allocates
// what the descriptors claim, and needs a primary one.
type isoFS struct {
	dev       blockdev.Reader
	blockSize int64
	root      *File
	rock      bool
	skip      int // bytes before the fields of Rock Ridge in a record
	joliet    bool
}

const (
	isoSector = 2048
	// maxISODescriptors, maxISOExtents and maxISOFields bound lists that a disk
	// can make as long as it likes: of volume descriptors, of the parts of a
	// file (4 GiB each), and of fields outside the record.
	maxISODescriptors = 64
	maxISOExtents     = 4096
	maxISOFields      = 32
)

// isoNode is what the records of a file say.
type isoNode struct {
	extents []blockdev.Range
	target  string // of a symlink
	zipped  bool   // compressed by zisofs
}

func newISO(dev blockdev.Reader) (*isoFS, error) {
	var primary, joliet []byte
	for i := range int64(maxISODescriptors) {
		b := make([]byte, isoSector)
		if err := readFull(dev, b, 0x8000+i*isoSector); err != nil {
			return nil, err
		}
		if string(b[1:6]) != "CD001" || b[0] == 255 {
			break
		}
		switch escape := b[88:91]; {
		case b[0] == 1 && primary == nil:
			primary = b
		case b[0] == 2 && escape[0] == '%' && escape[1] == '/' && bytes.IndexByte([]byte("@CE"), escape[2]) >= 0:
			joliet = b
		}
	}
	if primary == nil {
		return nil, ErrNoFileSystem
	}
	v := &isoFS{dev: dev, blockSize: int64(binary.LittleEndian.Uint16(primary[128:]))}
	if v.blockSize != 512 && v.blockSize != 1024 && v.blockSize != 2048 {
		return nil, fmt.Errorf("iso9660: blocks of %d bytes, expected 512, 1024 or 2048", v.blockSize)
	}
	root := primary[156:190]
	if err := v.findRock(root); err != nil {
		return nil, err
	}
	if !v.rock && joliet != nil {
		v.joliet, root = true, joliet[156:190]
	}
	f, err := v.file(root)
	if err == nil && !f.IsDir() {
		err = fmt.Errorf("iso9660: root directory: %w", errNotDir)
	}
	v.root = f
	return v, err
}

// findRock looks for Rock Ridge in the record "." of the root directory, which
// then begins with a field SP.
func (v *isoFS) findRock(root []byte) error {
	var first []byte
	f, err := v.file(root)
	if err != nil {
		return err
	}
	for r, err := range v.records(f) {
		if err != nil {
			return err
		}
		first = bytes.Clone(r)
		break
	}
	area := systemUse(first)
	if len(area) < 7 || string(area[:2]) != "SP" || area[4] != 0xbe || area[5] != 0xef {
		return nil
	}
	v.skip = int(area[6])
	// Other extensions use these fields, too.
	for field := range v.fields(first, 0) {
		switch string(field[:2]) {
		case "RR", "PX":
			v.rock = true
		}
	}
	return nil
}

// systemUse is what follows the name in a record.
func systemUse(r []byte) []byte {
	if len(r) < 34 {
		return nil
	}
	n := 33 + int(r[32])
	n += n & 1
	if n > len(r) {
		return nil
	}
	return r[n:]
}

// fields returns the fields of the system use area of a record, those in other
// places too. Those that do not fit end the list.
func (v *isoFS) fields(r []byte, skip int) iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		area := systemUse(r)
		if skip > len(area) {
			return
		}
		area = area[skip:]
		for range maxISOFields {
			var more []byte
			for len(area) >= 4 && int(area[2]) >= 4 && int(area[2]) <= len(area) {
				field := area[:area[2]]
				area = area[area[2]:]
				switch name := string(field[:2]); {
				case name == "ST":
					area = nil
				case name == "CE" && len(field) >= 28:
					le := binary.LittleEndian
					n := int64(le.Uint32(field[20:]))
					if n > isoSector {
						return
					}
					more = make([]byte, n)
					if readFull(v.dev, more, int64(le.Uint32(field[4:]))*v.blockSize+int64(le.Uint32(field[12:]))) != nil {
						return
					}
				case !yield(field):
					return
				}
			}
			if more == nil {
				return
			}
			area = more
		}
	}
}

// records returns the records of a directory, each until the next one.
func (v *isoFS) records(dir *File) iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		c := &isoContent{v, dir.own.(*isoNode).extents, dir.Size}
		b := make([]byte, isoSector)
		for off := int64(0); off < dir.Size; off += isoSector {
			n, err := c.ReadAt(b, off)
			if err != nil && err != io.EOF {
				yield(nil, fmt.Errorf("iso9660: directory at offset %d: %w", c.extents[0].Off+off, err))
				return
			}
			for at := 0; at < n && b[at] != 0; at += int(b[at]) {
				if length := int(b[at]); length < 34 || at+length > n || 33+int(b[at+32]) > length {
					if !yield(nil, fmt.Errorf("iso9660: directory record at offset %d: %d bytes", c.extents[0].Off+off+int64(at), length)) {
						return
					}
					break
				}
				if !yield(b[at:at+int(b[at])], nil) {
					return
				}
			}
		}
	}
}

const (
	isoDirFlag   = 0x02
	isoMoreFlag  = 0x80
	isoAssocFlag = 0x04
)

// file is what a record says.
func (v *isoFS) file(r []byte) (*File, error) {
	le := binary.LittleEndian
	n := &isoNode{}
	f := &File{Mode: ModeRegular | 0o444, Links: 1, Mtime: isoTime(r[18:25]), own: n}
	if r[25]&isoDirFlag != 0 {
		f.Mode = ModeDir | 0o555
	}
	block := int64(le.Uint32(r[2:])) + int64(r[1])
	size := int64(le.Uint32(r[10:]))
	if v.rock {
		moved, err := v.rockFields(r, f, n)
		if err != nil {
			return nil, err
		}
		if moved > 0 {
			block, size = moved, -1
		}
	}
	off := block * v.blockSize
	if size < 0 { // that of a directory that lies elsewhere is told there
		b := make([]byte, 34)
		if err := readFull(v.dev, b, off); err != nil {
			return nil, err
		}
		size = int64(le.Uint32(b[10:]))
	}
	if f.Type() != ModeDir && f.Type() != ModeRegular {
		size = 0
	}
	if size > 0 && (off > v.dev.Size() || size > v.dev.Size()-off) {
		return nil, fmt.Errorf("iso9660: %d bytes at offset %d, and the disk has %d: %w", size, off, v.dev.Size(), io.ErrUnexpectedEOF)
	}
	if f.IsDir() || size > 0 {
		f.Ino = uint64(block)
	}
	f.Size, n.extents = size, []blockdev.Range{{Off: off, Len: size}}
	if n.target != "" {
		f.Size = int64(len(n.target))
	}
	f.Blocks = (size + 2047) / 2048 * 4
	return f, nil
}

// rockFields reads the fields of Rock Ridge. moved is the block where the
// directory lies if it is not where the record says.
func (v *isoFS) rockFields(r []byte, f *File, n *isoNode) (moved int64, err error) {
	le := binary.LittleEndian
	var link rockLink
	for field := range v.fields(r, v.skip) {
		switch name := string(field[:2]); {
		case name == "PX" && len(field) >= 36:
			f.Mode, f.Links = uint16(le.Uint32(field[4:])), le.Uint32(field[12:])
			f.UID, f.GID = le.Uint32(field[20:]), le.Uint32(field[28:])
		case name == "PN" && len(field) >= 20:
			f.Major, f.Minor = le.Uint32(field[4:]), le.Uint32(field[12:])
			if f.Major == 0 {
				f.Major, f.Minor = f.Minor>>8, f.Minor&0xff
			}
		case name == "SL" && len(field) >= 5:
			link.add(field[5:])
		case name == "TF" && len(field) >= 5:
			rockTimes(f, field)
		case name == "CL" && len(field) >= 12:
			moved = int64(le.Uint32(field[4:]))
			f.Mode = f.Mode&^ModeType | ModeDir
		case name == "ZF":
			n.zipped = true
		}
	}
	n.target = link.text.String()
	return moved, nil
}

// rockLink puts together where a symlink leads.
type rockLink struct {
	text strings.Builder
	open bool // the last component goes on
}

func (l *rockLink) add(b []byte) {
	for len(b) >= 2 && int(b[1])+2 <= len(b) && l.text.Len() < 4096 {
		flags, part := b[0], string(b[2:2+b[1]])
		b = b[2+b[1]:]
		if n := l.text.Len(); !l.open && n > 0 && l.text.String()[n-1] != '/' {
			l.text.WriteByte('/')
		}
		switch {
		case flags&2 != 0:
			part = "."
		case flags&4 != 0:
			part = ".."
		case flags&8 != 0:
			part = "/"
		}
		l.text.WriteString(part)
		l.open = flags&1 != 0
	}
}

// rockTimes reads a field TF.
func rockTimes(f *File, field []byte) {
	n := 7
	if field[4]&0x80 != 0 {
		n = 17
	}
	b := field[5:]
	for i, t := range []*time.Time{&f.Crtime, &f.Mtime, &f.Atime, &f.Ctime} {
		if field[4]&(1<<i) == 0 {
			continue
		}
		if len(b) < n {
			return
		}
		if n == 7 {
			*t = isoTime(b[:7])
		} else if at, err := time.Parse("20060102150405", string(b[:14])); err == nil {
			*t = at.Add(-time.Duration(int8(b[16])) * 15 * time.Minute)
		}
		b = b[n:]
	}
}

// isoTime is a time of seven bytes.
func isoTime(b []byte) time.Time {
	if allZero(b) {
		return time.Time{}
	}
	t := time.Date(1900+int(b[0]), time.Month(b[1]), int(b[2]), int(b[3]), int(b[4]), int(b[5]), 0, time.UTC)
	return t.Add(-time.Duration(int8(b[6])) * 15 * time.Minute)
}

// name is the name that a record gives a file; ok is false for a record that
// names none.
func (v *isoFS) name(r []byte) (name string, ok bool) {
	b := r[33 : 33+int(r[32])]
	if len(b) == 0 || len(b) == 1 && b[0] <= 1 {
		return "", false
	}
	switch {
	case v.rock:
		var rock strings.Builder
		for field := range v.fields(r, v.skip) {
			switch string(field[:2]) {
			case "RE": // it lies elsewhere in the tree
				return "", false
			case "NM":
				if len(field) >= 5 && rock.Len() < 1024 {
					rock.Write(field[5:])
				}
			}
		}
		if rock.Len() > 0 {
			return rock.String(), true
		}
	case v.joliet:
		var units []uint16
		for ; len(b) > 1; b = b[2:] {
			units = append(units, binary.BigEndian.Uint16(b))
		}
		name, _, _ = strings.Cut(string(utf16.Decode(units)), ";")
		return name, true
	}
	// As Linux shows them: in lower case, without version.
	name, _, _ = strings.Cut(string(b), ";")
	return strings.TrimSuffix(strings.ToLower(name), "."), true
}

func (v *isoFS) Entries(dir *File) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		var parts *File // the file of which more parts have to come
		for r, err := range v.records(dir) {
			var f *File
			var name string
			if err == nil {
				var ok bool
				if name, ok = v.name(r); !ok || r[25]&isoAssocFlag != 0 {
					continue
				}
				f, err = v.file(r)
			}
			if err != nil {
				if !yield(Entry{}, err) {
					return
				}
				continue
			}
			if parts != nil {
				n := parts.own.(*isoNode)
				n.extents = append(n.extents, f.own.(*isoNode).extents...)
				parts.Size += f.Size
				f = parts
			}
			parts = nil
			if r[25]&isoMoreFlag != 0 && len(f.own.(*isoNode).extents) < maxISOExtents {
				parts = f
				continue
			}
			if !yield(Entry{Name: name, Type: f.Type(), own: f}, nil) {
				return
			}
		}
	}
}

func (v *isoFS) Lookup(path string, follow bool) (*File, error) {
	equal := strings.EqualFold
	if v.rock {
		equal = func(a, b string) bool { return a == b }
	}
	return lookup(v, v.root, path, follow, equal)
}

func (v *isoFS) Child(_ *File, e *Entry) (*File, error) { return e.own.(*File), nil }

func (v *isoFS) Readlink(f *File) (string, error) {
	if t := f.own.(*isoNode).target; f.Type() == ModeSymlink && t != "" {
		return t, nil
	}
	return "", fs.ErrInvalid
}

func (v *isoFS) Xattrs(*File) iter.Seq2[Xattr, error] { return func(func(Xattr, error) bool) {} }

func (v *isoFS) Content(f *File) (Content, error) {
	n := f.own.(*isoNode)
	switch {
	case f.IsDir():
		return nil, errIsDir
	case n.zipped:
		return nil, fmt.Errorf("compressed by zisofs: %w", ErrUnsupported)
	}
	return &isoContent{v, n.extents, f.Size}, nil
}

// isoContent is the parts of a file one behind the other.
type isoContent struct {
	v       *isoFS
	extents []blockdev.Range // at least one
	size    int64
}

func (c *isoContent) Size() int64  { return c.size }
func (c *isoContent) Close() error { return nil }

func (c *isoContent) ReadAt(p []byte, off int64) (done int, err error) {
	if off < 0 {
		return 0, fmt.Errorf("offset %d: %w", off, blockdev.ErrRange)
	}
	for _, x := range c.extents {
		if done == len(p) {
			return done, nil
		}
		if off >= x.Len {
			off -= x.Len
			continue
		}
		n := min(int64(len(p)-done), x.Len-off)
		if err := readFull(c.v.dev, p[done:done+int(n)], x.Off+off); err != nil {
			return done, err
		}
		done, off = done+int(n), 0
	}
	if done < len(p) {
		err = io.EOF
	}
	return done, err
}

package ext4img

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"math"
	"net/url"
	"slices"
	"strconv"
	"strings"
)

// Types of tar entries (POSIX.1-2024 pax, "ustar Interchange Format"; GNU tar
// manual, "Basic Tar Format").
const (
	tarReg, tarRegOld = '0', 0
	tarLink           = '1'
	tarSymlink        = '2'
	tarChar           = '3'
	tarBlock          = '4'
	tarDir            = '5'
	tarFifo           = '6'
	tarCont           = '7' // a regular file
	tarPax            = 'x' // records for the next entry
	tarPaxSolaris     = 'X'
	tarPaxGlobal      = 'g' // records for all entries that follow
	tarGNULongName    = 'L'
	tarGNULongLink    = 'K'
	tarGNUSparse      = 'S'
	tarGNUDumpDir     = 'D' // a directory, with a list of its names as content
	tarGNUVolume      = 'V' // a name for the archive
	tarGNUMulti       = 'M' // the rest of a file from another archive
)

const (
	tarBlockLen = 512
	// maxTarExtra bounds what an entry has in records before it: xattrs, maps
	// of sparse files.
	maxTarExtra = 8 << 20
	// maxTarXattrs is more than an inode and a block can hold the names of.
	maxTarXattrs = 1024
)

// TarError is something wrong in a tar archive, or unknown.
type TarError struct {
	Entry  int64 // number of the entry, from 1
	Offset int64 // of its first header, in bytes
	Name   string
	Err    error
}

func (e *TarError) Error() string {
	name := ""
	if e.Name != "" {
		name = fmt.Sprintf(" (%q)", e.Name)
	}
	return fmt.Sprintf("tar entry %d at offset %d%s: %v", e.Entry, e.Offset, name, e.Err)
}

func (e *TarError) Unwrap() error { return e.Err }

// tarEntry is one member of an archive.
type tarEntry struct {
	number, off  int64 // as in TarError
	typ          byte
	name, link   string
	mode         uint16
	uid, gid     uint32
	major, minor uint32
	sec          int64
	nsec         uint32
	size         int64      // of the content
	data         int64      // where what is stored of it begins
	sparse       bool       // pieces are what is stored
	pieces       []tarPiece // ascending
	xattrs       []tarXattr
	acl          [2]string // access and default, as text
	warnings     []string
}

// tarPiece is a part of a sparse file.
type tarPiece struct {
	span
	at int64 // where it is stored, counted from tarEntry.data
}

type tarXattr struct{ name, value string }

// tarReader reads the headers of an archive. Content is not read.
type tarReader struct {
	r      io.ReaderAt
	size   int64
	pos    int64 // of the next header
	number int64
	global []tarXattr // records of global headers, each key once
	// charge is told of each piece of a sparse file.
	charge func(n int64) error
	ended  bool // the blocks that end an archive were there

	buf    [4 << 10]byte // what lies at bufOff
	bufOff int64
	bufLen int
}

// bytes returns n bytes at off, which is in the archive, up to the length of
// the buffer. They are good until the next call.
func (t *tarReader) bytes(off int64, n int) ([]byte, error) {
	if off < t.bufOff || off+int64(n) > t.bufOff+int64(t.bufLen) {
		want := int(min(int64(len(t.buf)), t.size-off))
		got, err := t.r.ReadAt(t.buf[:want], off)
		t.bufOff, t.bufLen = off, got
		if got < n {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF // the archive shrinks
			}
			return nil, err
		}
	}
	return t.buf[off-t.bufOff:][:n], nil
}

// block returns the block at off.
func (t *tarReader) block(off int64) ([]byte, error) {
	if left := t.size - off; left < tarBlockLen {
		return nil, fmt.Errorf("the archive ends within a block, %d bytes behind offset %d", left, off)
	}
	return t.bytes(off, tarBlockLen)
}

// extra returns the content of an extended header.
func (t *tarReader) extra(off, n int64) ([]byte, error) {
	if n > maxTarExtra {
		return nil, fmt.Errorf("an extended header of %d bytes: expected %d at most", n, maxTarExtra)
	}
	if n > t.size-off {
		return nil, t.short(off, n)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(io.NewSectionReader(t.r, off, n), b); err != nil {
		return nil, err
	}
	return b, nil
}

func (t *tarReader) short(off, n int64) error {
	return fmt.Errorf("%d bytes from offset %d on: the archive ends at offset %d", n, off, t.size)
}

// skip sets pos behind n bytes of content at off.
func (t *tarReader) skip(off, n int64) error {
	if n > t.size-off {
		return t.short(off, n)
	}
	t.pos = min(off+(n+tarBlockLen-1)/tarBlockLen*tarBlockLen, t.size)
	return nil
}

// next returns the next entry, or io.EOF. It is good until the next call.
func (t *tarReader) next() (*tarEntry, error) {
	e := &tarEntry{number: t.number + 1, off: t.pos}
	err := t.read(e)
	if err == io.EOF {
		return nil, err
	}
	if err != nil {
		return nil, t.fail(e, err)
	}
	t.number++
	return e, nil
}

func (t *tarReader) fail(e *tarEntry, err error) error {
	return &TarError{Entry: e.number, Offset: e.off, Name: e.name, Err: err}
}

// read reads headers up to the one of an entry.
func (t *tarReader) read(e *tarEntry) error {
	var long [2]string // name, link of GNU tar
	var local []tarXattr
	extra := int64(0) // bytes of extended headers
	for {
		off := t.pos
		if off == t.size {
			if off > e.off {
				return errors.New("the archive ends behind an extended header")
			}
			return io.EOF
		}
		h, err := t.block(off)
		if err != nil {
			return err
		}
		if allZero(h) {
			if off > e.off {
				return errors.New("the archive ends behind an extended header")
			}
			// A second block of zeroes is usual, and not always there.
			t.ended = true
			return io.EOF
		}
		if err := checkTarSum(h); err != nil {
			return err
		}
		size, err := tarNumber(h[124:136])
		if err == nil && size < 0 {
			err = errors.New("below 0")
		}
		if err != nil {
			return fmt.Errorf("size: %w", err)
		}
		data := off + tarBlockLen
		typ := h[156]
		switch typ {
		case tarPax, tarPaxSolaris, tarPaxGlobal, tarGNULongName, tarGNULongLink:
			if extra += size; extra > maxTarExtra {
				return fmt.Errorf("extended headers of %d bytes: expected %d at most", extra, maxTarExtra)
			}
			b, err := t.extra(data, size)
			if err != nil {
				return err
			}
			switch typ {
			case tarPaxGlobal:
				err = t.setGlobal(b)
			case tarGNULongName, tarGNULongLink:
				text, _, _ := strings.Cut(string(b), "\x00")
				long[tarGNULongName-typ] = text
			default:
				local, err = parsePax(local, b)
			}
			if err != nil {
				return err
			}
			if err := t.skip(data, size); err != nil {
				return err
			}
			continue
		case tarGNUVolume:
			if err := t.skip(data, size); err != nil {
				return err
			}
			e.off = t.pos
			continue
		}
		return t.entry(e, h, data, size, long, local)
	}
}

// setGlobal keeps the records of a global header that make sense for several
// entries.
func (t *tarReader) setGlobal(b []byte) error {
	list, err := parsePax(nil, b)
	for _, x := range list {
		if x.name != "mtime" && x.name != "uid" && x.name != "gid" {
			continue
		}
		t.global = slices.DeleteFunc(t.global, func(old tarXattr) bool { return old.name == x.name })
		t.global = append(t.global, x)
	}
	return err
}

// entry reads the header of an entry, and applies what came before it.
func (t *tarReader) entry(e *tarEntry, h []byte, data, size int64, long [2]string, local []tarXattr) error {
	e.typ = h[156]
	posix := string(h[257:263]) == "ustar\x00"
	e.name, e.link = tarText(h[:100]), tarText(h[157:257])
	if posix {
		prefix := h[345:500]
		if string(h[508:512]) == "tar\x00" { // of star, which keeps times behind it
			prefix = h[345:476]
		}
		if p := tarText(prefix); p != "" {
			e.name = p + "/" + e.name
		}
	}
	if long[0] != "" {
		e.name = long[0]
	}
	if long[1] != "" {
		e.link = long[1]
	}
	p := paxState{e: e, size: size, realSize: -1}
	e.size = size
	var err error
	number := func(what string, b []byte, low, high int64) int64 {
		v, numErr := tarNumber(b)
		if numErr == nil && (v < low || v > high) {
			numErr = fmt.Errorf("%d: expected %d to %d", v, low, high)
		}
		if numErr != nil && err == nil {
			err = fmt.Errorf("%s: %w", what, numErr)
		}
		return v
	}
	e.mode = uint16(number("mode", h[100:108], 0, math.MaxInt64) & 0o7777)
	p.uid = number("uid", h[108:116], math.MinInt64, math.MaxInt64)
	p.gid = number("gid", h[116:124], math.MinInt64, math.MaxInt64)
	e.sec = number("mtime", h[136:148], math.MinInt64, math.MaxInt64)
	if e.typ == tarChar || e.typ == tarBlock {
		e.major = uint32(number("major device number", h[329:337], 0, math.MaxUint32))
		e.minor = uint32(number("minor device number", h[337:345], 0, math.MaxUint32))
	}
	if err != nil {
		return err
	}
	for _, records := range [][]tarXattr{t.global, local} {
		for _, x := range records {
			if err := p.record(x.name, x.value); err != nil {
				return fmt.Errorf("record %s: %w", strconv.Quote(x.name), err)
			}
		}
	}
	if p.name != "" {
		e.name = p.name
	}
	for _, id := range [...]struct {
		what string
		v    int64
		to   *uint32
	}{{"uid", p.uid, &e.uid}, {"gid", p.gid, &e.gid}} {
		if id.v < 0 || id.v > math.MaxUint32 {
			return fmt.Errorf("%s %d: expected 0 to %d", id.what, id.v, uint32(math.MaxUint32))
		}
		*id.to = uint32(id.v)
	}

	switch e.typ {
	case tarReg, tarRegOld, tarCont:
		e.typ = tarReg
		if strings.HasSuffix(e.name, "/") { // a directory of the time before there was a type for it
			e.typ = tarDir
		}
	case tarGNUDumpDir:
		e.typ = tarDir
	case tarGNUSparse:
		e.typ = tarReg
		if err := t.oldSparse(e, &p, h, &data); err != nil {
			return err
		}
	case tarLink, tarSymlink, tarChar, tarBlock, tarDir, tarFifo:
		p.size = 0 // whatever the header says
	case tarGNUMulti:
		return errors.New("it goes on from another volume, and volumes are not put together")
	default:
		return fmt.Errorf("type %q is not known", e.typ)
	}
	e.size, e.data = p.size, data
	if e.typ == tarReg && (p.sparse || e.sparse) {
		if err := t.sparse(e, &p); err != nil {
			return err
		}
	}
	return t.skip(data, p.size)
}

// paxState is what records say of an entry, besides what goes right into it.
type paxState struct {
	e        *tarEntry
	size     int64 // of what is stored
	uid, gid int64
	sparse   bool
	name     string // GNU.sparse.name
	major    int64  // version of the sparse format: 1, or 0
	realSize int64  // of a sparse file; -1: not said
	numbers  []int64
}

// record applies one record.
func (p *paxState) record(key, value string) (err error) {
	e := p.e
	if value == "" && !strings.Contains(key, ".xattr.") {
		return nil // the header's is good
	}
	number := func() (v int64) {
		v, err = strconv.ParseInt(value, 10, 64)
		if err == nil && v < 0 {
			err = fmt.Errorf("%d: below 0", v)
		}
		return v
	}
	switch key {
	case "path":
		e.name = value
	case "GNU.sparse.name":
		p.name = value // path is another one, for programs that do not know this
	case "linkpath":
		e.link = value
	case "size":
		p.size = number()
	case "uid":
		p.uid = number()
	case "gid":
		p.gid = number()
	case "mtime":
		e.sec, e.nsec, err = paxTime(value)
	case "SCHILY.acl.access":
		e.acl[0] = value
	case "SCHILY.acl.default":
		e.acl[1] = value
	case "SCHILY.acl.ace":
		e.warnings = append(e.warnings, "an ACL of NFSv4 is left out")
	case "RHT.security.selinux":
		e.xattrs = append(e.xattrs, tarXattr{"security.selinux", value + "\x00"})
	case "GNU.sparse.major":
		p.sparse, p.major = true, number()
		if p.major > 1 {
			err = fmt.Errorf("version %d of sparse files is not known", p.major)
		}
	case "GNU.sparse.size", "GNU.sparse.realsize":
		p.sparse, p.realSize = true, number()
	case "GNU.sparse.offset", "GNU.sparse.numbytes":
		p.numbers = append(p.numbers, number())
	case "GNU.sparse.map":
		for s := range strings.SplitSeq(value, ",") {
			value = s
			p.numbers = append(p.numbers, number())
			if err != nil {
				break
			}
		}
	default:
		if name, ok := strings.CutPrefix(key, "SCHILY.xattr."); ok {
			// GNU tar writes the two characters so that a key cannot have.
			name = strings.NewReplacer("%25", "%", "%3D", "=").Replace(name)
			e.xattrs = append(e.xattrs, tarXattr{name, value})
		} else if name, ok := strings.CutPrefix(key, "LIBARCHIVE.xattr."); ok {
			var b []byte
			if name, err = url.PathUnescape(name); err == nil {
				b, err = base64.RawStdEncoding.DecodeString(strings.TrimRight(value, "="))
			}
			for _, x := range e.xattrs {
				if x.name == name { // bsdtar writes them in both forms
					return err
				}
			}
			e.xattrs = append(e.xattrs, tarXattr{name, string(b)})
		}
	}
	if err == nil && len(e.xattrs) > maxTarXattrs {
		err = fmt.Errorf("over %d xattrs", maxTarXattrs)
	}
	return err
}

// oldSparse reads the map of a sparse file in the header and the blocks behind
// it, which data is moved behind.
func (t *tarReader) oldSparse(e *tarEntry, p *paxState, h []byte, data *int64) error {
	e.sparse = true
	real, err := tarNumber(h[483:495])
	if err != nil || real < 0 {
		return fmt.Errorf("size of a sparse file: %w", cmpErr(err))
	}
	p.realSize = real
	numbers := p.numbers[:0]
	list, more := h[386:482], h[482] != 0
	for {
		for ; len(list) >= 24; list = list[24:] {
			if list[0] == 0 {
				break
			}
			off, err1 := tarNumber(list[:12])
			n, err2 := tarNumber(list[12:24])
			if err := errors.Join(err1, err2); err != nil {
				return fmt.Errorf("map of a sparse file: %w", err)
			}
			numbers = append(numbers, off, n)
		}
		if !more {
			break
		}
		if err := t.charge(21); err != nil {
			return err
		}
		b, err := t.block(*data)
		if err != nil {
			return err
		}
		*data += tarBlockLen
		list, more = b[:504], b[504] != 0
	}
	p.numbers = numbers
	return nil
}

func cmpErr(err error) error {
	if err == nil {
		return errors.New("below 0")
	}
	return err
}

// sparse makes the pieces of a sparse file of what was said of it. The map of
// version 1 is the beginning of what is stored.
func (t *tarReader) sparse(e *tarEntry, p *paxState) error {
	stored := p.size
	switch {
	case e.sparse: // read by oldSparse
	case p.major == 1:
		n, err := t.sparseMap(e, p)
		if err != nil {
			return err
		}
		e.data += n
		stored -= n
	default:
		if err := t.charge(int64(len(p.numbers) / 2)); err != nil {
			return err
		}
	}
	e.sparse = true
	if p.realSize < 0 {
		return errors.New("a sparse file without its size")
	}
	e.size = p.realSize
	if len(p.numbers)%2 != 0 {
		return fmt.Errorf("the map of a sparse file has %d numbers, which are no pairs", len(p.numbers))
	}
	end, at := int64(0), int64(0)
	for i := 0; i < len(p.numbers); i += 2 {
		off, n := p.numbers[i], p.numbers[i+1]
		if off < end || n < 0 || off > e.size || n > e.size-off {
			return fmt.Errorf("the map of a sparse file has %d bytes at %d: expected them from %d on, and up to %d", n, off, end, e.size)
		}
		end = off + n
		if n > 0 {
			e.pieces = append(e.pieces, tarPiece{span{off, end}, at})
			at += n
		}
	}
	if at != stored {
		return fmt.Errorf("%d bytes of a sparse file are stored, and its map has %d", stored, at)
	}
	return nil
}

// sparseMap reads a map in decimal lines: the number of pieces, then offset and
// length of each. It returns the length of the map, in whole blocks.
func (t *tarReader) sparseMap(e *tarEntry, p *paxState) (int64, error) {
	pos, end := e.data, e.data
	var b []byte
	line := func() (int64, error) {
		v, digits := int64(0), 0
		for {
			if len(b) == 0 {
				if end-e.data >= p.size {
					return 0, errors.New("the map of a sparse file is longer than what is stored")
				}
				var err error
				if b, err = t.block(end); err != nil {
					return 0, err
				}
				end += tarBlockLen
			}
			c := b[0]
			b = b[1:]
			pos++
			if c == '\n' && digits > 0 {
				return v, nil
			}
			if digits++; c < '0' || c > '9' || digits > 18 {
				return 0, fmt.Errorf("the map of a sparse file has %q at offset %d", c, pos-1)
			}
			v = v*10 + int64(c-'0')
		}
	}
	count, err := line()
	if err != nil {
		return 0, err
	}
	p.numbers = nil
	for range count {
		if err := t.charge(1); err != nil {
			return 0, err
		}
		off, err := line()
		if err != nil {
			return 0, err
		}
		n, err := line()
		if err != nil {
			return 0, err
		}
		p.numbers = append(p.numbers, off, n)
	}
	if end-e.data > p.size {
		return 0, errors.New("the map of a sparse file is longer than what is stored")
	}
	return end - e.data, nil
}

// checkTarSum checks a header's checksum: the sum of its bytes, those of the
// checksum taken for blanks. Some old programs took bytes as signed.
func checkTarSum(h []byte) error {
	want, err := tarNumber(h[148:156])
	if err != nil {
		return fmt.Errorf("not a tar header: checksum: %w", err)
	}
	var unsigned, signed int64
	for i, c := range h {
		if i >= 148 && i < 156 {
			c = ' '
		}
		unsigned += int64(c)
		signed += int64(int8(c))
	}
	if want != unsigned && want != signed {
		return fmt.Errorf("not a tar header, or a damaged one: its checksum is %d, expected %d", want, unsigned)
	}
	return nil
}

// tarText is a field of text, which ends with a zero byte or its last byte.
func tarText(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}

// tarNumber reads a number: octal digits, or with the highest bit set a binary
// number in two's complement, as GNU tar and star write it.
func tarNumber(b []byte) (int64, error) {
	if b[0]&0x80 != 0 {
		v := int64(int8(b[0]<<1)) >> 1 // the sign is the second bit
		for _, c := range b[1:] {
			if v > math.MaxInt64>>8 || v < math.MinInt64>>8 {
				return 0, errors.New("a number of over 63 bits")
			}
			v = v<<8 | int64(c)
		}
		return v, nil
	}
	text := strings.Trim(string(b), " \x00")
	if i := strings.IndexAny(text, " \x00"); i >= 0 {
		text = text[:i]
	}
	if text == "" {
		return 0, nil
	}
	v, err := strconv.ParseInt(text, 8, 64)
	if err != nil || v < 0 {
		return 0, fmt.Errorf("%q is not an octal number", text)
	}
	return v, nil
}

// parsePax adds the records of an extended header to a list: "LENGTH KEY=VALUE\n"
// each, the length being that of the whole. Those of sparse files may come
// several times; of others the last is good.
func parsePax(list []tarXattr, b []byte) ([]tarXattr, error) {
	for len(b) > 0 {
		i := bytes.IndexByte(b, ' ')
		if i < 1 || i > 9 {
			return nil, errors.New("a record without a length")
		}
		n, err := strconv.Atoi(string(b[:i]))
		if err != nil || n <= i+2 || n > len(b) || b[n-1] != '\n' {
			return nil, fmt.Errorf("a record of length %q, of which %d bytes are left", b[:i], len(b))
		}
		key, value, ok := strings.Cut(string(b[i+1:n-1]), "=")
		if !ok || key == "" || strings.IndexByte(key, 0) >= 0 {
			return nil, fmt.Errorf("a record %.20q without a key", b[i+1:n-1])
		}
		list = append(list, tarXattr{key, value})
		b = b[n:]
	}
	return list, nil
}

// paxTime reads seconds with a decimal fraction.
func paxTime(value string) (sec int64, nsec uint32, err error) {
	whole, fraction, _ := strings.Cut(value, ".")
	sec, err = strconv.ParseInt(whole, 10, 64)
	if err != nil {
		return 0, 0, fmt.Errorf("%q is not a time", value)
	}
	digits := (fraction + "000000000")[:9]
	for _, c := range []byte(fraction) {
		if c < '0' || c > '9' {
			return 0, 0, fmt.Errorf("%q is not a time", value)
		}
	}
	n, err := strconv.ParseUint(digits, 10, 32)
	if err != nil {
		return 0, 0, fmt.Errorf("%q is not a time", value)
	}
	nsec = uint32(n)
	if whole[0] == '-' && nsec > 0 {
		if sec == math.MinInt64 {
			return 0, 0, fmt.Errorf("%q is not a time", value)
		}
		sec, nsec = sec-1, 1e9-nsec
	}
	return sec, nsec, nil
}

package guest

import (
	"encoding/binary"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"strings"
	"sync"
	"time"
	"unicode/utf16"

	"qimg/qcow2/blockdev"
)

// fatFS reads FAT12, FAT16 and FAT32 (Microsoft, "FAT: General Overview of
// On-Disk Format" 1.03). Nothing is held but a few KiB: tables and directories
// are read where they are needed, and a chain that is longer than the file
// system is an error. The reader of go-diskfs allocates what the boot sector
// claims, and has no bound for chains.
type fatFS struct {
	dev          blockdev.Reader
	bits         int   // of an entry of the table: 12, 16 or 32
	sectorSize   int64 // BPB_BytsPerSec
	totalSectors int64 // BPB_TotSec16, BPB_TotSec32
	clusterSize  int64
	clusters     int64 // of data; their numbers begin at 2
	table        int64 // offset of the first FAT
	data         int64 // offset of cluster 2
	root         int64 // offset of the root directory of FAT12 and FAT16
	rootSize     int64
	rootCluster  uint32 // BPB_RootClus
	serial       uint32 // BS_VolID
	bootLabel    string // BS_VolLab
}

// newFAT reads the boot sector. Where it is none the error matches
// ErrNoFileSystem.
func newFAT(dev blockdev.Reader) (*fatFS, error) {
	b := make([]byte, 512)
	if n, err := dev.ReadAt(b, 0); n < len(b) {
		if err == io.EOF {
			err = ErrNoFileSystem
		}
		return nil, err
	}
	le := binary.LittleEndian
	v := &fatFS{dev: dev, sectorSize: int64(le.Uint16(b[11:]))}
	perCluster, reserved, tables := int64(b[13]), int64(le.Uint16(b[14:])), int64(b[16])
	rootEntries := int64(le.Uint16(b[17:]))
	v.totalSectors = int64(le.Uint16(b[19:]))
	if v.totalSectors == 0 {
		v.totalSectors = int64(le.Uint32(b[32:]))
	}
	tableSectors := int64(le.Uint16(b[22:]))
	old := tableSectors != 0
	if !old {
		tableSectors = int64(le.Uint32(b[36:]))
	}
	switch {
	case b[0] != 0xeb && b[0] != 0xe9,
		v.sectorSize < 512 || v.sectorSize > 4096 || v.sectorSize&(v.sectorSize-1) != 0,
		perCluster == 0 || perCluster&(perCluster-1) != 0,
		reserved == 0, tables == 0 || tables > 4, tableSectors == 0, b[21] < 0xf0,
		rootEntries == 0 && old:
		return nil, ErrNoFileSystem
	}
	v.clusterSize = perCluster * v.sectorSize
	rootSectors := (rootEntries*32 + v.sectorSize - 1) / v.sectorSize
	v.table = reserved * v.sectorSize
	v.root = v.table + tables*tableSectors*v.sectorSize
	v.rootSize = rootEntries * 32
	v.data = v.root + rootSectors*v.sectorSize
	v.clusters = (v.totalSectors*v.sectorSize - v.data) / v.clusterSize
	if v.clusters < 1 || v.data >= dev.Size() {
		return nil, ErrNoFileSystem
	}
	extended := b[38:]
	switch {
	case !old:
		v.bits, v.rootCluster = 32, le.Uint32(b[44:])
		extended = b[66:]
	case v.clusters < 4085:
		v.bits = 12
	default:
		v.bits = 16
	}
	// No entries, no clusters.
	v.clusters = min(v.clusters, tableSectors*v.sectorSize*8/int64(v.bits)-2)
	if extended[0] == 0x28 || extended[0] == 0x29 {
		v.serial = le.Uint32(extended[1:])
	}
	if extended[0] == 0x29 {
		v.bootLabel = strings.TrimRight(string(extended[5:16]), " \x00")
	}
	return v, nil
}

// next returns the cluster that follows one; 0 at the end of a chain.
func (v *fatFS) next(cluster uint32) (uint32, error) {
	var b [4]byte
	off, n := int64(cluster)*int64(v.bits)/8, max(v.bits/8, 2)
	if err := readFull(v.dev, b[:n], v.table+off); err != nil {
		return 0, err
	}
	e := binary.LittleEndian.Uint32(b[:])
	switch {
	case v.bits == 12 && cluster%2 == 1:
		e >>= 4
	case v.bits == 12:
		e &= 0xfff
	case v.bits == 32:
		e &= 0x0fffffff
	}
	if end := uint32(0x0ffffff8) & (1<<v.bits - 1); e >= end {
		return 0, nil
	}
	if err := v.checkCluster(e); err != nil {
		return 0, fmt.Errorf("FAT entry of cluster %d: %w", cluster, err)
	}
	return e, nil
}

func (v *fatFS) checkCluster(c uint32) error {
	if c < 2 || int64(c)-2 >= v.clusters {
		return fmt.Errorf("cluster %d, expected 2 to %d", c, v.clusters+1)
	}
	return nil
}

// readFull reads all of b.
func readFull(r io.ReaderAt, b []byte, off int64) error {
	n, err := r.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// fatNode is what a directory entry says of a file.
type fatNode struct {
	cluster uint32
	root    bool // the root directory of FAT12 and FAT16
}

func (v *fatFS) rootFile() *File {
	f := &File{Ino: uint64(v.rootCluster), Mode: ModeDir | 0o755, Links: 1, own: fatNode{v.rootCluster, v.bits != 32}}
	if v.bits != 32 {
		f.Ino = 1
	}
	return f
}

func (v *fatFS) Lookup(path string, follow bool) (*File, error) {
	return lookup(v, v.rootFile(), path, follow, strings.EqualFold)
}

func (v *fatFS) Child(_ *File, e *Entry) (*File, error) { return e.own.(*File), nil }

func (v *fatFS) Readlink(*File) (string, error) { return "", fs.ErrInvalid }

func (v *fatFS) Xattrs(*File) iter.Seq2[Xattr, error] { return func(func(Xattr, error) bool) {} }

func (v *fatFS) Content(f *File) (Content, error) {
	if f.IsDir() {
		return nil, errIsDir
	}
	return &fatContent{v: v, first: f.own.(fatNode).cluster, size: f.Size}, nil
}

// fatContent is what a chain of clusters holds.
type fatContent struct {
	v     *fatFS
	first uint32
	size  int64

	mu      sync.Mutex
	index   int64 // of cluster in the chain
	cluster uint32
}

func (c *fatContent) Size() int64  { return c.size }
func (c *fatContent) Close() error { return nil }

// seek returns the cluster of an index in the chain.
func (c *fatContent) seek(index int64) (uint32, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cluster == 0 || index < c.index {
		if err := c.v.checkCluster(c.first); err != nil {
			return 0, err
		}
		c.index, c.cluster = 0, c.first
	}
	if index >= c.v.clusters {
		return 0, fmt.Errorf("chain of cluster %d: longer than the file system", c.first)
	}
	for c.index < index {
		next, err := c.v.next(c.cluster)
		if err == nil && next == 0 {
			err = fmt.Errorf("chain of cluster %d ends after %d clusters: %w", c.first, c.index+1, io.ErrUnexpectedEOF)
		}
		if err != nil {
			c.cluster = 0
			return 0, err
		}
		c.index, c.cluster = c.index+1, next
	}
	return c.cluster, nil
}

func (c *fatContent) ReadAt(p []byte, off int64) (done int, err error) {
	if off < 0 {
		return 0, fmt.Errorf("offset %d: %w", off, blockdev.ErrRange)
	}
	cs := c.v.clusterSize
	for done < len(p) {
		at := off + int64(done)
		if at >= c.size {
			return done, io.EOF
		}
		first, err := c.seek(at / cs)
		if err != nil {
			return done, err
		}
		// Clusters that lie behind each other are read at once.
		n, last := cs-at%cs, first
		limit := min(int64(len(p)-done), c.size-at)
		for n < limit {
			next, err := c.seek((at + n) / cs)
			if err != nil || next != last+1 {
				break
			}
			n, last = n+cs, next
		}
		n = min(n, limit)
		if err := readFull(c.v.dev, p[done:done+int(n)], c.v.data+int64(first-2)*cs+at%cs); err != nil {
			return done, err
		}
		done += int(n)
	}
	return done, nil
}

// records calls fn with each record of a directory that is in use. fn returns
// false to stop.
func (v *fatFS) records(n fatNode, fn func(r []byte) bool) error {
	var r blockdev.Reader = &fatContent{v: v, first: n.cluster, size: v.clusters * v.clusterSize}
	if n.root {
		var err error
		if r, err = blockdev.NewReaderSection(v.dev, v.root, min(v.rootSize, v.dev.Size()-v.root)); err != nil {
			return err
		}
	}
	b := make([]byte, min(v.clusterSize, 4<<10))
	// A directory has at most 65536 records (spec, section 6).
	for off := int64(0); off < 65536*32; off += int64(len(b)) {
		got, err := r.ReadAt(b, off)
		for i := 0; i+32 <= got; i += 32 {
			if b[i] == 0 {
				return nil
			}
			if b[i] != 0xe5 && !fn(b[i:i+32]) {
				return nil
			}
		}
		if n.root && err == io.EOF {
			return nil
		}
		if err != nil {
			if c, ok := r.(*fatContent); ok && c.ended(off+int64(got)) {
				return nil
			}
			return err
		}
	}
	return nil
}

// ended reports whether the chain ends, in order, at an offset.
func (c *fatContent) ended(off int64) bool {
	if off == 0 || off%c.v.clusterSize != 0 {
		return false
	}
	last, err := c.seek(off/c.v.clusterSize - 1)
	if err != nil {
		return false
	}
	next, err := c.v.next(last)
	return err == nil && next == 0
}

// Attributes of records.
const (
	fatReadOnly = 0x01
	fatVolume   = 0x08
	fatDir      = 0x10
	fatLong     = 0x0f
)

func (v *fatFS) Entries(dir *File) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		var long longName
		more := true
		err := v.records(dir.own.(fatNode), func(r []byte) bool {
			if r[11]&0x3f == fatLong {
				long.add(r)
				return true
			}
			name := long.take(r)
			if r[11]&fatVolume != 0 || r[0] == '.' {
				return true
			}
			if !validName(name) {
				name = shortName(r)
			}
			f := v.file(r)
			more = yield(Entry{Name: name, Type: f.Type(), own: f}, nil)
			return more
		})
		if err != nil && more {
			yield(Entry{}, err)
		}
	}
}

// file is what a record says.
func (v *fatFS) file(r []byte) *File {
	le := binary.LittleEndian
	cluster := uint32(le.Uint16(r[26:]))
	if v.bits == 32 {
		cluster |= uint32(le.Uint16(r[20:])) << 16
	}
	f := &File{Ino: uint64(cluster), Mode: ModeRegular | 0o644, Links: 1, Size: int64(le.Uint32(r[28:])), own: fatNode{cluster: cluster}}
	if r[11]&fatReadOnly != 0 {
		f.Mode = ModeRegular | 0o444
	}
	if r[11]&fatDir != 0 {
		f.Mode, f.Size = ModeDir|0o755, 0
	}
	f.Blocks = (f.Size + v.clusterSize - 1) / v.clusterSize * (v.clusterSize / 512)
	f.Mtime = fatTime(le.Uint16(r[24:]), le.Uint16(r[22:]), 0)
	f.Crtime = fatTime(le.Uint16(r[16:]), le.Uint16(r[14:]), r[13])
	f.Atime = fatTime(le.Uint16(r[18:]), 0, 0)
	return f
}

// fatTime is a time, which has no zone, taken for UTC.
func fatTime(date, clock uint16, tenths uint8) time.Time {
	if date == 0 {
		return time.Time{}
	}
	return time.Date(1980+int(date>>9), time.Month(date>>5&15), int(date&31), int(clock>>11), int(clock>>5&63), int(clock&31)*2, int(tenths)*10e6, time.UTC)
}

// longName collects the records of a long name, which come last part first.
type longName struct {
	units [20 * 13]uint16
	next  uint8 // the part that has to come; 0: all are there
	n     int   // units of the whole name; 0: there is none
	sum   byte
}

func (l *longName) add(r []byte) {
	order := r[0]
	if order&0x40 != 0 {
		order &= 0x3f
		*l = longName{next: order, n: int(order) * 13, sum: r[13]}
	}
	if order == 0 || order > 20 || order != l.next || r[13] != l.sum {
		*l = longName{}
		return
	}
	l.next--
	part := l.units[int(order-1)*13:]
	for i, off := range [13]int{1, 3, 5, 7, 9, 14, 16, 18, 20, 22, 24, 28, 30} {
		part[i] = binary.LittleEndian.Uint16(r[off:])
	}
}

// take returns the name of a record, "" if it has no long one.
func (l *longName) take(r []byte) string {
	was := *l
	*l = longName{}
	var sum byte
	for _, c := range r[:11] {
		sum = sum<<7 | sum>>1
		sum += c
	}
	if was.n == 0 || was.next != 0 || was.sum != sum {
		return ""
	}
	units := was.units[:was.n]
	for i, u := range units {
		if u == 0 {
			units = units[:i]
			break
		}
	}
	return string(utf16.Decode(units))
}

// cp437 is what the bytes from 0x80 on of short names are.
const cp437 = "ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜ¢£¥₧ƒáíóúñÑªº¿⌐¬½¼¡«»░▒▓│┤╡╢╖╕╣║╗╝╜╛┐" +
	"└┴┬├─┼╞╟╚╔╩╦╠═╬╧╨╤╥╙╘╒╓╫╪┘┌█▄▌▐▀αßΓπΣσµτΦΘΩδ∞φε∩≡±≥≤⌠⌡÷≈°∙·√ⁿ²■\u00a0"

// shortName is the name of a record in 8.3, in lower case where it says so.
func shortName(r []byte) string {
	part := func(b []byte, lower bool) string {
		s := []byte(strings.TrimRight(string(b), " "))
		for i, c := range s {
			if lower && 'A' <= c && c <= 'Z' {
				s[i] = c + 'a' - 'A'
			}
		}
		return string(s)
	}
	base := append([]byte{}, r[:8]...)
	if base[0] == 0x05 {
		base[0] = 0xe5
	}
	name := part(base, r[12]&0x08 != 0)
	if ext := part(r[8:11], r[12]&0x10 != 0); ext != "" {
		name += "." + ext
	}
	high := []rune(cp437)
	var s strings.Builder
	for _, c := range []byte(name) {
		if c < 0x80 {
			s.WriteByte(c)
		} else {
			s.WriteRune(high[c-0x80])
		}
	}
	return s.String()
}

// label is the name of the file system.
func (v *fatFS) label() string {
	label := ""
	v.records(v.rootFile().own.(fatNode), func(r []byte) bool {
		if r[11]&0x3f != fatLong && r[11]&(fatVolume|fatDir) == fatVolume {
			label = strings.TrimRight(string(r[:11]), " ")
		}
		return label == ""
	})
	if label == "" {
		label = v.bootLabel
	}
	if label == "NO NAME" {
		return ""
	}
	return label
}

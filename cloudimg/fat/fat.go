package fat

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"slices"
	"strings"
	"time"
)

// Limits of what is taken. The format has the first two.
const (
	maxFileSize = math.MaxUint32
	maxDirSize  = 65536 * 32 // what all programs read
	maxEntries  = 1 << 16    // of the whole tree; bounds memory
	maxDepth    = 100        // directories below each other
)

// Options say what file system is made. The zero value and nil mean: as small as
// it can be, of the width that fits.
type Options struct {
	// Size is the size in bytes, down to whole sectors of 512; 0: what is needed
	// plus Free.
	Size int64
	// Free is the number of bytes in clusters that stay free, if Size is 0.
	Free int64
	// Bits is the width of the FAT: 12, 16 or 32; 0: 32 from 512 MiB on, else
	// what fits.
	Bits int
	// Label is the name of the volume, at most 11 characters, in upper case.
	Label string
	// Serial is the number of the volume; 0: derived from the tree and from
	// these options.
	Serial uint32
	// Hidden is the number of sectors before the file system on its disk.
	Hidden uint32
	// MaxTime, if not nil, replaces every later time (in seconds since 1970;
	// SOURCE_DATE_EPOCH).
	MaxTime *int64
}

// SizeError says that a tree does not fit a file system.
type SizeError struct {
	Size, Need int64 // bytes of clusters that there are, and that the tree takes
}

func (e *SizeError) Error() string {
	return fmt.Sprintf("the FAT file system has room for %d bytes, %d are needed", e.Size, e.Need)
}

// Volume is a FAT file system as a disk that is read: a blockdev.Reader and
// ExtentReader. The files are opened when they are read. It is immutable and safe
// for concurrent use.
type Volume struct {
	fsys    fs.FS
	geo     *geometry
	label   [11]byte
	serial  uint32
	hidden  uint32
	objects []object // files with content and directories, by cluster
	root    []byte   // the root directory of a FAT12 or FAT16
	next    int64    // first free cluster
	entries int64
	bytes   int64
}

// object is something in clusters.
type object struct {
	cluster int64  // first
	dir     []byte // content of a directory; nil: a file
	node    *node
}

// node is a file or directory of the tree.
type node struct {
	name    string
	dir     bool
	size    int64
	seen    int64  // its time of modification, in nanoseconds since 1970
	date    uint16 // what is stored of it
	clock   uint16
	entries []*node // of a directory, by name
	parent  *node
	short   [11]byte
	whole   bool  // short says all
	cluster int64 // first; 0: none, or the root
}

// path returns the name of a node in the tree.
func (n *node) path() string {
	switch {
	case n.parent == nil:
		return "."
	case n.parent.parent == nil:
		return n.name
	}
	return n.parent.path() + "/" + n.name
}

// slots returns how many entries of 32 bytes a file takes in its directory.
func (n *node) slots() int64 {
	if n.whole {
		return 1
	}
	return 1 + int64(longEntries(utf16Of(n.name)))
}

// New decides the file system that holds what the root directory of fsys holds.
// It reads the tree, and no content. A tree that does not fit gives a *SizeError;
// errors about a file name its path in a *fs.PathError.
func New(ctx context.Context, fsys fs.FS, opts *Options) (*Volume, error) {
	if opts == nil {
		opts = &Options{}
	}
	if !slices.Contains([]int{0, 12, 16, 32}, opts.Bits) {
		return nil, fmt.Errorf("a FAT has 12, 16 or 32 bits, not %d", opts.Bits)
	}
	v := &Volume{fsys: fsys, serial: opts.Serial, hidden: opts.Hidden}
	var err error
	if v.label, err = label(opts.Label); err != nil {
		return nil, err
	}
	s := scanner{ctx: ctx, fsys: fsys, maxTime: opts.MaxTime}
	root, err := s.scan()
	if err != nil {
		return nil, err
	}
	v.entries, v.bytes = int64(len(s.all)), s.bytes
	if err := v.choose(root, opts); err != nil {
		return nil, err
	}
	if v.serial == 0 {
		v.serial = deriveSerial(s.all, v)
	}
	v.place(root, s.all)
	return v, nil
}

// Size returns the size in bytes.
func (v *Volume) Size() int64 { return v.geo.sectors * sectorSize }

// Bits returns the width of the FAT.
func (v *Volume) Bits() int { return v.geo.bits }

// FreeBytes returns how many bytes of clusters are free.
func (v *Volume) FreeBytes() int64 { return (v.geo.clusters + 2 - v.next) * v.geo.clusterSize() }

// Entries returns the number of files and directories, the root among them.
func (v *Volume) Entries() int64 { return v.entries }

// Bytes returns the sum of the sizes of the files.
func (v *Volume) Bytes() int64 { return v.bytes }

// scanner reads a tree.
type scanner struct {
	ctx     context.Context
	fsys    fs.FS
	maxTime *int64
	all     []*node // the order on the disk
	bytes   int64
}

func (s *scanner) scan() (*node, error) {
	info, err := fs.Stat(s.fsys, ".")
	if err != nil {
		return nil, err
	}
	root := &node{dir: true}
	root.date, root.clock = dosTime(s.time(info.ModTime()))
	s.all = append(s.all, root)
	return root, s.readDir(root, 1)
}

func (s *scanner) readDir(dir *node, depth int) error {
	if depth > maxDepth {
		return pathError(dir.path(), fmt.Errorf("more than %d directories below each other", maxDepth))
	}
	list, err := fs.ReadDir(s.fsys, dir.path())
	if err != nil {
		return err
	}
	slices.SortFunc(list, func(a, b fs.DirEntry) int { return cmp.Compare(a.Name(), b.Name()) })
	folded := map[string]string{}
	for _, e := range list {
		if err := s.ctx.Err(); err != nil {
			return err
		}
		n, err := s.entry(dir, e)
		if err != nil {
			return err
		}
		key := strings.ToUpper(n.name)
		if other, ok := folded[key]; ok {
			return pathError(n.path(), fmt.Errorf("FAT cannot tell the name from that of %s", other))
		}
		folded[key] = n.name
		dir.entries = append(dir.entries, n)
		s.all = append(s.all, n)
		s.bytes += n.size
		if len(s.all) > maxEntries {
			return pathError(n.path(), fmt.Errorf("more than %d files", maxEntries))
		}
	}
	if err := shorten(dir); err != nil {
		return err
	}
	for _, n := range dir.entries {
		if n.dir {
			if err := s.readDir(n, depth+1); err != nil {
				return err
			}
		}
	}
	return nil
}

func pathError(path string, err error) error {
	return &fs.PathError{Op: "fat", Path: path, Err: err}
}

// entry reads what is known of a file besides its content.
func (s *scanner) entry(dir *node, e fs.DirEntry) (*node, error) {
	n := &node{name: e.Name(), parent: dir}
	if err := checkName(n.name); err != nil {
		return nil, pathError(n.path(), err)
	}
	info, err := e.Info()
	switch {
	case err != nil:
		return nil, err
	case info.IsDir():
		n.dir = true
	case !info.Mode().IsRegular():
		return nil, pathError(n.path(), fmt.Errorf("FAT holds files and directories only, this is of type %v", info.Mode().Type()))
	case info.Size() > maxFileSize:
		return nil, pathError(n.path(), fmt.Errorf("%d bytes are too many for FAT, which has %d for a file", info.Size(), int64(maxFileSize)))
	default:
		n.size = info.Size()
	}
	n.seen = info.ModTime().UnixNano()
	n.date, n.clock = dosTime(s.time(info.ModTime()))
	return n, nil
}

// shorten gives the entries of a directory their short names.
func shorten(dir *node) (err error) {
	short := &shortNames{used: map[[11]byte]bool{}, next: map[string]int{}}
	var rest []*node
	for _, n := range dir.entries {
		var ok bool
		if n.short, n.whole, ok = short.plain(n.name); !ok {
			rest = append(rest, n)
		}
	}
	for _, n := range rest {
		if n.short, err = short.numbered(n.name); err != nil {
			return pathError(n.path(), err)
		}
	}
	size := int64(64) // . and ..
	for _, n := range dir.entries {
		size += 32 * n.slots()
	}
	if size > maxDirSize {
		return pathError(dir.path(), errors.New("too many files for a directory of FAT"))
	}
	return nil
}

// time brings a time into what FAT can tell.
func (s *scanner) time(t time.Time) time.Time {
	first := time.Date(1980, 1, 1, 0, 0, 0, 0, time.UTC)
	last := time.Date(2107, 12, 31, 23, 59, 58, 0, time.UTC)
	t = t.UTC()
	if s.maxTime != nil && t.Unix() > *s.maxTime {
		t = time.Unix(*s.maxTime, 0).UTC()
	}
	switch {
	case t.Before(first):
		return first
	case t.After(last):
		return last
	}
	return t
}

// dirSize returns the size of a directory's entries in bytes.
func (v *Volume) dirSize(n *node) int64 {
	slots := int64(2) // . and ..
	if n.parent == nil {
		slots = 0
		if v.hasLabel() {
			slots = 1
		}
	}
	for _, e := range n.entries {
		slots += e.slots()
	}
	return 32 * slots
}

func (v *Volume) hasLabel() bool { return v.label[0] != ' ' }

// need returns how many clusters the tree takes.
func (v *Volume) need(n *node, g *geometry) int64 {
	size := n.size
	if n.dir {
		size = v.dirSize(n)
		if n.parent == nil && g.rootSectors > 0 {
			size = 0
		} else {
			size = max(size, 1)
		}
	}
	clusters := (size + g.clusterSize() - 1) / g.clusterSize()
	for _, e := range n.entries {
		clusters += v.need(e, g)
	}
	return clusters
}

// choose finds the geometry.
func (v *Volume) choose(root *node, opts *Options) error {
	rootEntries := v.dirSize(root) / 32
	if opts.Size != 0 {
		g, err := newGeometry(opts.Size, opts.Bits, rootEntries)
		if err != nil {
			return err
		}
		if need := v.need(root, g); need > g.clusters {
			return &SizeError{g.clusters * g.clusterSize(), need * g.clusterSize()}
		}
		v.geo = g
		return nil
	}
	if opts.Free < 0 || opts.Free > maxSize {
		return fmt.Errorf("%d free bytes are not possible", opts.Free)
	}
	size := int64(128 << 10)
	switch opts.Bits {
	case 16:
		size = 2 << 20
	case 32:
		size = 33 << 20
	}
	// What is missing is added until nothing is; each step adds a cluster at
	// least.
	for {
		g, err := newGeometry(size, opts.Bits, rootEntries)
		if err != nil {
			if size += 64 << 10; size > maxSize || opts.Bits == 12 && size > 512<<20 || opts.Bits == 16 && size > 8<<30 {
				return err
			}
			continue
		}
		cs := g.clusterSize()
		missing := v.need(root, g) + (opts.Free+cs-1)/cs - g.clusters
		if missing <= 0 {
			v.geo = g
			return nil
		}
		size += missing * cs
	}
}

// place gives everything its clusters.
func (v *Volume) place(root *node, all []*node) {
	cs := v.geo.clusterSize()
	v.next = 2
	take := func(n *node, size int64) {
		n.cluster = v.next
		v.objects = append(v.objects, object{cluster: v.next, node: n})
		v.next += (size + cs - 1) / cs
	}
	for _, n := range all {
		if n.dir && (n.parent != nil || v.geo.rootSectors == 0) {
			take(n, max(v.dirSize(n), 1))
		}
	}
	for _, n := range all {
		if !n.dir && n.size > 0 {
			take(n, n.size)
		}
	}
	for i := range v.objects {
		if o := &v.objects[i]; o.node.dir {
			o.dir = v.encodeDir(o.node)
		}
	}
	if v.geo.rootSectors > 0 {
		v.root = v.encodeDir(root)
	}
	for _, n := range all {
		n.entries = nil
	}
}

// deriveSerial makes a number of all but the content of files.
func deriveSerial(all []*node, v *Volume) uint32 {
	h := sha256.New()
	fmt.Fprintf(h, "%q %+v\n", v.label, *v.geo)
	for _, n := range all {
		fmt.Fprintf(h, "%q %v %d %d\n", n.path(), n.dir, n.size, uint32(n.date)<<16|uint32(n.clock))
	}
	return binary.LittleEndian.Uint32(h.Sum(nil)) | 1
}

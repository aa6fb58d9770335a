package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"sync"
	"sync/atomic"

	"qimg/qcow2/blockdev"
)

// BackingPolicy says what happens to other files that an image names: its
// backing file and its external data file.
type BackingPolicy uint8

const (
	// BackingRefuse makes opening an image that names another file an error
	// that matches ErrBacking.
	BackingRefuse BackingPolicy = iota
	// BackingFollow opens them, as QEMU does. It is for images that come from
	// where the names in them can be trusted: they can name any file that the
	// program may read. Where an image does not say what format its backing
	// file has, that file may name no other, which is an error that matches
	// ErrBacking too.
	BackingFollow
	// BackingIgnore opens the image by itself, to look at its metadata.
	// Reading what lies in another file is an error that matches ErrBacking.
	BackingIgnore
)

// OpenOptions says how an image is opened. The zero value, and nil, mean: with
// the lock of a reader, and without other files, so that an image that needs
// some is refused.
type OpenOptions struct {
	// Write opens the image, and its external data file, for reading and
	// writing, with the lock of a writer; backing files are opened for reading
	// as ever. An image that has its corrupt bit set is refused, and one that
	// has its dirty bit set is repaired.
	Write bool
	// ForceShare and NoLock are those of blockdev.FileOptions, for all files.
	ForceShare, NoLock bool
	// Backing says whether other files are opened, in the whole chain.
	Backing BackingPolicy
	// BackingDevice and DataDevice, if set, are read in place of the backing and
	// of the external data file that the image names; an empty BackingDevice
	// makes it an image without a backing file. They stay open. With Write
	// DataDevice has to be a blockdev.Device.
	BackingDevice, DataDevice blockdev.Reader
	// WriteBacking, if set, is asked of each backing file whether it is opened
	// for writing too, as Commit needs it.
	WriteBacking func(BackingFile) bool
	// Snapshot is the id or the name of a snapshot whose content is read in
	// place of the active one; an id goes before a name. It cannot be written.
	Snapshot string
	// RefuseTruncated makes tables and clusters of the guest that lie beyond the
	// end of their file an error that matches ErrCorrupt: the file is truncated.
	// They read as zeroes otherwise, as in QEMU. It does not go with Write.
	RefuseTruncated bool
	// CompressionLevel is that of WriteCompressed; see WriterOptions.
	CompressionLevel int
	// CacheSize bounds the L2 tables kept in memory for the whole chain, in
	// bytes. 0 means 32 MiB.
	CacheSize int64
	// Secret, if set, gives the passphrase of an encrypted image. It is called
	// when one is opened, so once for each encrypted image of a chain. Nil, and
	// a nil passphrase, leave the guest data locked: reading it is
	// ErrEncrypted; its errors are those of opening. A passphrase that does not
	// fit makes opening fail with ErrPassphrase; that of legacy AES cannot be
	// checked. The time that LUKS takes by design grows with the iterations that
	// the image names, up to the limit of about a minute.
	Secret func(SecretRequest) ([]byte, error)
	// OpenFormat, if set, opens backing files of formats other than qcow2 and
	// raw. If it succeeds the reader takes over f: where it is an io.Closer,
	// its Close has to close f, unless it is an *Image.
	OpenFormat func(f *blockdev.File, format string) (blockdev.Reader, error)
}

// BackingFile is a backing file that is about to be opened.
type BackingFile struct {
	Depth   int    // 1: that of the image that is opened, and so on
	Overlay string // path of the image that names it; "" if it does not lie in a file
	Name    string // as that image has it
	Path    string // of the file itself
}

// SecretRequest says of which image a passphrase is wanted.
type SecretRequest struct {
	File  string // path of the image; "" if it does not lie in a file
	Depth int    // 0: the image that is opened, 1: its backing file, and so on
	// ID is what the json: name of a backing file has as encrypt.key-secret.
	ID string
}

const defaultCacheSize = 32 << 20

// Image is a qcow2 image with its backing chain. It is a blockdev.Reader and
// blockdev.ExtentReader of what the guest sees, and a blockdev.Device if it was
// opened for writing.
//
// All methods but Close are safe for concurrent use; those that change the
// image wait for each other.
//
// After a failed write an image can only be read, and says why.
type Image struct {
	// mu guards all that changes, in an image that is open for writing: w is
	// nil in others, and mu unused.
	mu sync.RWMutex
	w  *writeState

	packer struct { // of WriteCompressed
		once sync.Once
		c    *compressor
		err  error
	}

	dev     blockdev.Reader // the image file
	data    blockdev.Reader // where guest clusters lie; nil if it is not opened
	backing blockdev.Reader // nil if there is none or it is not opened
	// backingName is the path of the backing file, for errors.
	backingName string
	// backingProbed: that the backing file is raw was found by its first bytes.
	backingProbed bool
	// probed: that the file is qcow2 was found by its magic number, below
	// another image.
	probed bool

	shared  *shared
	id      int    // of this image in the chain
	writes  bool   // opened for writing
	crypt   *crypt // nil: not encrypted, or locked
	closers []io.Closer
	closed  atomic.Bool

	header    Header
	geo       geometry
	size      int64
	l1        []byte // L1 table as stored, as far as the file goes
	l1Off     int64  // where it lies in the file
	snapshots []Snapshot
	snapEnd   int64     // end of the snapshot table, 0 without snapshots
	snapshot  *Snapshot // that is read; nil: the active content

	hole atomic.Pointer[hole] // the last run of empty L1 entries found
}

// shared is what the images of one chain have in common.
type shared struct {
	opts     OpenOptions
	tables   tableCache
	clusters clusterCache
	codecs   sync.Pool
	files    []os.FileInfo // of the images opened so far
}

// Open opens an image file, and the files that it names as opts.Backing says.
// For reading the image may have its dirty or its corrupt bit set.
func Open(path string, opts *OpenOptions) (*Image, error) {
	s := newShared(opts)
	f, err := s.openFile(path, s.opts.Write)
	if err != nil {
		return nil, err
	}
	im, err := s.open(f, reference{}, false, s.opts.Write)
	if err != nil {
		f.Close()
		return nil, err
	}
	im.closers = append(im.closers, f)
	return im, nil
}

// New opens an image that lies in dev, as Open does. With opts.Write dev has to
// be a blockdev.Device, and a blockdev.Truncater for the image to grow. Other
// files are looked for where dev lies if it is a *blockdev.File, and cannot be
// opened otherwise. Close does not close dev.
func New(dev blockdev.Reader, opts *OpenOptions) (*Image, error) {
	s := newShared(opts)
	return s.open(dev, reference{}, false, s.opts.Write)
}

func newShared(opts *OpenOptions) *shared {
	s := &shared{}
	if opts != nil {
		s.opts = *opts
	}
	if s.opts.CacheSize <= 0 {
		s.opts.CacheSize = defaultCacheSize
	}
	s.tables.init(s.opts.CacheSize)
	s.codecs.New = func() any { return &codec{} }
	return s
}

func (s *shared) openFile(path string, write bool) (*blockdev.File, error) {
	return blockdev.OpenFile(path, &blockdev.FileOptions{Write: write, ForceShare: s.opts.ForceShare, NoLock: s.opts.NoLock})
}

// open opens the next image of the chain, which the one above names by ref. On
// error it closes what it opened, not dev.
func (s *shared) open(dev blockdev.Reader, ref reference, probed, write bool) (*Image, error) {
	im := &Image{dev: dev, shared: s, id: len(s.files), probed: probed, writes: write}
	if err := s.enter(dev); err != nil {
		return nil, err
	}
	if err := im.readHeader(); err != nil {
		return nil, err
	}
	l1Size := im.header.L1Size
	if im.id == 0 && s.opts.Snapshot != "" {
		if s.opts.Write {
			return nil, fmt.Errorf("qcow2: a snapshot is opened for writing: %w", blockdev.ErrReadOnly)
		}
		sn, err := findSnapshot(im.snapshots, s.opts.Snapshot)
		if err != nil {
			return nil, err
		}
		if err := im.useSnapshot(sn); err != nil {
			return nil, err
		}
		im.snapshot = sn
		im.l1Off, l1Size = int64(sn.L1TableOffset), sn.L1Size
	}
	if err := im.readL1(l1Size); err != nil {
		return nil, err
	}
	if s.opts.RefuseTruncated && int64(len(im.l1)) < int64(l1Size)*l1EntrySize {
		return nil, &FormatError{"l1 table", im.l1Off, "", fmt.Sprintf("of %d entries is beyond the end of the file at %#x: it is truncated", l1Size, dev.Size()), ErrCorrupt}
	}
	if err := im.unlock(ref.keySecret); err != nil {
		return nil, err
	}
	err := im.openDataFile()
	if err == nil {
		err = im.openBacking()
	}
	if err == nil && im.writes {
		err = im.openWrite()
	}
	if err != nil {
		im.closeAll()
		return nil, err
	}
	return im, nil
}

// enter notes the file of an image and refuses one that is in the chain
// already.
func (s *shared) enter(dev blockdev.Reader) error {
	if len(s.files) >= maxChain {
		return fmt.Errorf("qcow2: backing chain of more than %d images: %w", maxChain, ErrLimit)
	}
	var info os.FileInfo
	if f, ok := dev.(*blockdev.File); ok {
		var err error
		if info, err = f.OS().Stat(); err != nil {
			return err
		}
		for _, other := range s.files {
			if other != nil && blockdev.SameFile(info, other) {
				return fmt.Errorf("qcow2: backing chain is a loop: %s is its own backing file: %w", f.Name(), ErrCorrupt)
			}
		}
	}
	s.files = append(s.files, info)
	return nil
}

// readHeader reads the header and the snapshot table.
func (im *Image) readHeader() error {
	b, err := readFirstCluster(im.dev)
	if err != nil {
		return err
	}
	if im.header, err = parseHeader(b); err != nil {
		return err
	}
	im.geo = im.header.geometry()
	// The guest sees whole sectors; parseHeader bounds Size by the L1 table.
	im.size = int64(im.header.Size) &^ 511
	im.l1Off = int64(im.header.L1TableOffset)
	im.snapshots, im.snapEnd, err = readSnapshots(im.dev, &im.header)
	return err
}

// readL1 reads the L1 table, as far as the file goes.
func (im *Image) readL1(entries uint32) (err error) {
	if im.l1, err = readTable(im.dev, im.l1Off, int64(entries)*l1EntrySize); err != nil {
		return fmt.Errorf("qcow2: l1 table at %#x: %w", im.l1Off, err)
	}
	return nil
}

// readFirstCluster returns the cluster of the header, as far as the file goes.
func readFirstCluster(dev blockdev.Reader) ([]byte, error) {
	prefix := make([]byte, headerSizeV2)
	if err := readFull(dev, prefix, 0); err != nil {
		return nil, fmt.Errorf("qcow2: header: %w", err)
	}
	h, err := parsePrefix(prefix)
	if err != nil {
		return nil, err
	}
	b, err := readTable(dev, 0, h.ClusterSize())
	if err != nil {
		return nil, fmt.Errorf("qcow2: header: %w", err)
	}
	return b, nil
}

func (im *Image) useSnapshot(sn *Snapshot) error {
	off := int64(-1)
	if sn.L1Size > maxL1Size/l1EntrySize {
		return &FormatError{"snapshot " + sn.ID, off, "l1_size", fmt.Sprintf("%d, expected at most %d", sn.L1Size, maxL1Size/l1EntrySize), ErrLimit}
	}
	if im.geo.inCluster(sn.L1TableOffset) != 0 || sn.L1TableOffset > math.MaxInt64-maxL1Size {
		return &FormatError{"snapshot " + sn.ID, off, "l1_table_offset", fmt.Sprintf("%#x not aligned to %#x or too large", sn.L1TableOffset, im.geo.clusterSize), ErrCorrupt}
	}
	if n := im.geo.l1Entries(sn.DiskSize); n > uint64(sn.L1Size) {
		return &FormatError{"snapshot " + sn.ID, off, "l1_size", fmt.Sprintf("%d, expected %d at least for a size of %d", sn.L1Size, n, sn.DiskSize), ErrCorrupt}
	}
	im.size = int64(sn.DiskSize) &^ 511
	return nil
}

// Size returns the virtual size in bytes, a multiple of 512: that of the
// snapshot if one is read.
func (im *Image) Size() int64 {
	defer im.rlock()()
	return im.size
}

// Header returns the header. Its slices are shared and not to be changed.
func (im *Image) Header() Header {
	defer im.rlock()()
	return im.header
}

// Snapshots returns the snapshot table. It is shared and not to be changed.
func (im *Image) Snapshots() []Snapshot {
	defer im.rlock()()
	return im.snapshots
}

// rlock keeps an image that is open for writing as it is, until the func that
// it returns is called.
func (im *Image) rlock() (unlock func()) {
	if im.w == nil {
		return func() {}
	}
	im.mu.RLock()
	return im.mu.RUnlock
}

// Backing returns the backing file as it was opened, an *Image if it is qcow2;
// nil if there is none or it was not opened.
func (im *Image) Backing() blockdev.Reader { return im.backing }

// Close closes all files that were opened for the image. Of an image that is
// open for writing it writes first, and syncs, what has not been written yet;
// the error tells if that failed, or if any change failed before. Afterwards
// every method returns an error that matches os.ErrClosed.
func (im *Image) Close() error {
	var err error
	if im.w != nil {
		im.mu.Lock()
		defer im.mu.Unlock()
		if !im.closed.Load() {
			err = im.finish()
		}
	}
	if im.closed.Swap(true) {
		return fmt.Errorf("qcow2: close: %w", os.ErrClosed)
	}
	return errors.Join(err, im.closeAll())
}

// finish writes all that is left to be written.
func (im *Image) finish() error {
	if im.w.err != nil {
		return im.w.err
	}
	if err := im.bitmapsEnd(context.Background()); err != nil {
		return err
	}
	return im.fail(im.flush())
}

func (im *Image) closeAll() error {
	var errs []error
	for _, c := range im.closers {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

// readable tells whether guest data can be read.
func (im *Image) readable() error {
	if im.closed.Load() {
		return fmt.Errorf("qcow2: read: %w", os.ErrClosed)
	}
	if m := im.header.CryptMethod; m != CryptNone && im.crypt == nil {
		return fmt.Errorf("qcow2: crypt_method %s: %w", m, ErrEncrypted)
	}
	return nil
}

// l1Entry returns an entry of the L1 table in use; what lies beyond the end of
// the file is 0.
func (im *Image) l1Entry(i int64) uint64 {
	if i >= int64(len(im.l1)/l1EntrySize) {
		return 0
	}
	return binary.BigEndian.Uint64(im.l1[i*l1EntrySize:])
}

// l1Words returns the active L1 table in host order.
func (im *Image) l1Words() []uint64 {
	l1 := make([]uint64, im.header.L1Size) // at most maxL1Size
	for i := range l1 {
		l1[i] = im.l1Entry(int64(i))
	}
	return l1
}

// readFull fills p from off. What lies beyond the end of the device is zeroes,
// as QEMU reads it.
func readFull(dev io.ReaderAt, p []byte, off int64) error {
	n, err := dev.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err != nil && err != io.EOF {
		return err
	}
	clear(p[n:])
	return nil
}

// readTable returns n bytes at off, or fewer if the device ends before; the
// caller counts the rest as zeroes. It allocates no more than the device has.
func readTable(dev blockdev.Reader, off, n int64) ([]byte, error) {
	b := make([]byte, max(0, min(n, dev.Size()-off)))
	return b, readFull(dev, b, off)
}

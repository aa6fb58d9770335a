package ext4img

import (
	"encoding/binary"
	"fmt"
	"io"
	"strconv"

	"qimg/qcow2/blockdev"
)

// OpenOptions say how Open reads a file system. The zero value is the default.
type OpenOptions struct {
	// IgnoreChecksums reads structures whose checksums do not match. All else
	// that is checked still is, and so are the checksums of a journal that has
	// to be replayed.
	IgnoreChecksums bool
	// IgnoreJournal leaves a journal that has to be replayed alone: what is
	// read is what the blocks themselves hold, which need not be consistent.
	IgnoreJournal bool
}

// FS is an ext2, ext3 or ext4 file system that is read. It never writes. All
// methods are safe for concurrent use.
//
// Nothing is read before it is needed, and at most a few MiB of metadata are
// kept; no content is. What is damaged is an error where it is met, a
// *FormatError as a rule; the rest can be read.
//
// As an fs.FS it has the names of the file system as they are, in any bytes.
// Symlinks are followed inside the file system alone. Info of files gives its
// *Inode as Sys.
type FS struct {
	dev             blockdev.Reader
	sb              *Superblock
	ignoreChecksums bool
	cache           blockCache
	journal         *overlay     // nil: nothing to replay
	tx              *Tx          // whose changes are read; nil: none
	fc              *fastCommits // nil: none to replay
}

// Open reads the superblock of a device that holds a file system from its
// first byte on. The device is used until the last call of any method.
//
// Where the journal has to be replayed, Open does so in memory: later reads
// find what a mount would. The device is not changed. A journal on another
// device is an error that matches ErrUnsupported then.
func Open(dev blockdev.Reader, opts *OpenOptions) (*FS, error) {
	if opts == nil {
		opts = &OpenOptions{}
	}
	f := &FS{dev: dev, ignoreChecksums: opts.IgnoreChecksums}
	if err := f.readSuperblock(); err != nil {
		return nil, err
	}
	f.cache.limit = max(cacheSize/max(cachePage, f.sb.BlockSize), 16)
	if f.sb.Incompat&IncompatRecover != 0 && !opts.IgnoreJournal {
		if err := f.replay(); err != nil {
			return nil, fmt.Errorf("replay of the journal: %w", err)
		}
	}
	return f, nil
}

// readSuperblock reads the primary superblock.
func (f *FS) readSuperblock() error {
	b := make([]byte, superblockSize)
	if err := readFull(f.dev, b, superblockOff); err != nil {
		if err == io.ErrUnexpectedEOF {
			return &FormatError{"superblock", 0, -1, "", fmt.Sprintf("the device has %d bytes", f.dev.Size()), ErrFormat}
		}
		return err
	}
	if f.sb != nil { // the journal may hold a newer one
		if err := f.journal.patch(f.dev, b, superblockOff, int64(f.sb.BlockSize)); err != nil {
			return err
		}
	}
	sb, err := parseSuperblock(b, f.dev.Size(), f.ignoreChecksums)
	if err != nil {
		return err
	}
	f.sb = sb
	return nil
}

// Super returns what the superblock says, after the journal was replayed.
func (f *FS) Super() Superblock { return *f.sb }

// inodeSeed is where the checksums of an inode and of its blocks start.
func (s *Superblock) inodeSeed(ino Ino, generation uint32) uint32 {
	var b [8]byte
	binary.LittleEndian.PutUint32(b[:], uint32(ino))
	binary.LittleEndian.PutUint32(b[4:], generation)
	return crc32c(s.ChecksumSeed, b[:])
}

func itoa(n int64) string { return strconv.FormatInt(n, 10) }

func hexNot(found, want uint32) string { return fmt.Sprintf("%#x, expected %#x", found, want) }

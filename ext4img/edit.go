package ext4img

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"qimg/qcow2/blockdev"
)

// Errors of editing that tell what the matter is; errors.Is finds them.
var (
	// ErrNoSpace: the file system has too few free blocks. Nothing has changed.
	ErrNoSpace = errors.New("no space left in the file system")
	// ErrNoInodes: the file system has no free inode. It matches ErrNoSpace,
	// too.
	ErrNoInodes = fmt.Errorf("no free inode: %w", ErrNoSpace)
	// ErrTooLarge: a transaction does not fit the journal, or a file exceeds
	// what its map can hold. Nothing has changed.
	ErrTooLarge = errors.New("too large")
	// ErrNotClean: the file system has to be checked and repaired first.
	ErrNotClean = errors.New("file system is not clean")
	// ErrBusy: another transaction has begun and is not over.
	ErrBusy = errors.New("another transaction is open")
)

// EditOptions say how OpenEditor opens a file system. The zero value is the
// default.
type EditOptions struct {
	// Now, if not nil, is the clock: new times are those of when the
	// transaction has begun.
	Now func() time.Time
}

// Editor changes an ext2, ext3 or ext4 file system, in transactions. It is
// used by one goroutine, and nothing else may write the device meanwhile.
type Editor struct {
	dev     blockdev.Device
	fs      *FS
	journal *journalWriter // nil: the file system has none
	now     func() time.Time

	shrinkTo int64 // nothing is allocated from this block on; 0: no bound

	mu  sync.Mutex
	tx  *Tx   // that is open
	err error // of the device: no more transactions
}

// OpenEditor opens a file system for editing. A device that is no
// blockdev.Syncer is taken to need no sync.
//
// A journal that has to be replayed is, on the device, in such an order that a
// crash leaves it to be replayed again; orphans that a crash has left are
// freed. Before that all of it is checked, as by Check: what is damaged, or uses a
// feature that is not known well enough to write it, is an error, and nothing has
// changed.
func OpenEditor(ctx context.Context, dev blockdev.Device, opts *EditOptions) (*Editor, error) {
	return openEditor(ctx, dev, opts, true)
}

// openEditor opens a file system, without a check only for tests.
func openEditor(ctx context.Context, dev blockdev.Device, opts *EditOptions, check bool) (*Editor, error) {
	if opts == nil {
		opts = &EditOptions{}
	}
	e := &Editor{dev: dev, now: opts.Now}
	if e.now == nil {
		e.now = time.Now
	}
	var err error
	if e.fs, err = Open(dev, nil); err != nil {
		return nil, err
	}
	if err := e.fs.sb.checkWritable(); err != nil {
		return nil, err
	}
	if err := e.fs.checkMMP(); err != nil {
		return nil, err
	}
	if check {
		if err := checkEditable(ctx, dev); err != nil {
			return nil, err
		}
	}
	if err := e.openJournal(ctx); err != nil {
		return nil, err
	}
	if err := e.dropOrphans(ctx); err != nil {
		return nil, fmt.Errorf("orphans: %w", err)
	}
	return e, nil
}

// checkEditable refuses a file system in which Check finds an error.
func checkEditable(ctx context.Context, dev blockdev.Reader) error {
	first, n := Finding{}, 0
	for f, err := range Check(ctx, dev, nil) {
		if err != nil {
			return err
		}
		if f.Severity == Error {
			if n++; n == 1 {
				first = f
			}
		}
	}
	if n == 0 {
		return nil
	}
	more := ""
	if n > 1 {
		more = fmt.Sprintf(" (and %d more)", n-1)
	}
	return fmt.Errorf("ext4: %v%s: %w: run e2fsck", first, more, ErrNotClean)
}

const (
	compatWritable   = ^(CompatImagicInodes | CompatLazyBG | CompatExcludeInode | CompatExcludeBitmap)
	roCompatWritable = ROCompatSparseSuper | ROCompatLargeFile | ROCompatHugeFile | ROCompatGDTCsum | ROCompatDirNlink |
		ROCompatExtraIsize | ROCompatBigalloc | ROCompatMetadataCsum | ROCompatProject | ROCompatVerity | ROCompatOrphanPresent
)

// checkWritable refuses file systems that use what has to be known for
// writing, and is not.
func (s *Superblock) checkWritable() error {
	p := place{"superblock", 0, -1}
	if unknown := s.ROCompat &^ roCompatWritable; unknown != 0 {
		return p.unsupported("s_feature_ro_compat", "has features that cannot be written: %v", unknown)
	}
	if unknown := s.Compat &^ compatWritable; unknown != 0 {
		return p.unsupported("s_feature_compat", "has features that cannot be written: %v", unknown)
	}
	if s.Compat&CompatHasJournal != 0 && s.JournalInum == 0 {
		return p.unsupported("s_journal_dev", "%#x: the journal lies on another device", s.JournalDev)
	}
	if s.State&StateErrors != 0 {
		return &FormatError{p.name, 0, -1, "s_state", "the kernel has found errors: run e2fsck", ErrNotClean}
	}
	return nil
}

// Begin begins a transaction. There is one at a time.
func (e *Editor) Begin() (*Tx, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case e.err != nil:
		return nil, e.err
	case e.tx != nil:
		return nil, ErrBusy
	}
	t := &Tx{
		e: e, fs: e.fs, now: e.now(), before: *e.fs.sb,
		staged:    map[int64]*stagedBlock{},
		descs:     map[int64]*groupDesc{},
		inodes:    map[Ino]*txInode{},
		groups:    map[int64]*txGroup{},
		freed:     map[Ino]bool{},
		unflushed: map[Ino]bool{},
		gained:    map[Ino]bool{},
		lost:      map[Ino]bool{},
	}
	e.tx, e.fs.tx = t, t
	return t, nil
}

// fail makes the editor refuse all further transactions after an error of the
// device, and returns that.
func (e *Editor) fail(err error) error {
	if e.err == nil {
		e.err = fmt.Errorf("%w after: %w", blockdev.ErrReadOnly, err)
	}
	return err
}

func (e *Editor) sync() error {
	if err := blockdev.Sync(e.dev); err != nil {
		return fmt.Errorf("ext4: sync: %w", err)
	}
	return nil
}

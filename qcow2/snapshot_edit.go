package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"qimg/qcow2/blockdev"
)

// Errors of changes of snapshots, beside ErrNotFound, and ErrLimit where a
// refcount is too narrow for one more snapshot.
var (
	// ErrSnapshots: the image has as many snapshots as it can have.
	ErrSnapshots = fmt.Errorf("too many snapshots: %w", ErrLimit)
	// ErrBitmaps: a snapshot cannot be applied to an image with bitmaps, which
	// would no longer tell what has changed.
	ErrBitmaps = errors.New("image has bitmaps")
)

// MaxSnapshotName is how long the name of a snapshot can be, in bytes: QEMU
// reads no more of it.
const MaxSnapshotName = 255

// SnapshotOptions says what a new snapshot notes, and what it holds beside the
// disk. The zero value, and nil, mean what qemu-img notes, but for the date:
// no vm state, a clock and an instruction count of 0.
type SnapshotOptions struct {
	Date    time.Time     // from 1970 to 2106; the zero value: 1970
	VMClock time.Duration // how long the guest has run
	ICount  uint64        // instructions of the guest; NoICount: none
	// VMState, if set, is read to its end and becomes the state of the machine.
	// What it has to be is up to who loads it: QEMU takes the stream of a
	// migration. The snapshot has it alone: the disk in use keeps none.
	VMState io.Reader
	// Disk, if set, becomes the content of the snapshot in place of that of the
	// disk in use, which stays as it is. Its size can be another than that of
	// the image only in version 3.
	Disk blockdev.Reader
}

// SnapshotTxn is a number of changes of the snapshots of an image that take
// effect together: after a crash there are all of them or none. It holds the
// image from BeginSnapshots until Commit or Abort: whoever wants to read or
// write meanwhile waits. After an error only Abort is left.
//
// It is not safe for concurrent use.
type SnapshotTxn struct {
	im     *Image
	t      *txn
	err    error
	lastID uint64
	// news are the places in t.snapshots of those that share the disk as it is
	// now, but are not counted yet.
	news  []int
	freed []freedRange // what may be free after the commit

	checked bool // that the disk's clusters have refcounts
}

// BeginSnapshots begins a transaction on an image that is open for writing. ctx
// ends its calls early, Commit up to the moment when it takes effect.
func (im *Image) BeginSnapshots(ctx context.Context) (*SnapshotTxn, error) {
	im.mu.Lock()
	t, err := im.beginSnapshots(ctx)
	if err != nil {
		im.mu.Unlock()
		return nil, err
	}
	s := &SnapshotTxn{im: im, t: t}
	for i := range t.snapshots {
		s.lastID = max(s.lastID, leadingNumber(t.snapshots[i].ID))
	}
	return s, nil
}

func (im *Image) beginSnapshots(ctx context.Context) (*txn, error) {
	if err := im.mayChange("change snapshots"); err != nil {
		return nil, err
	}
	return im.begin(ctx)
}

// CreateSnapshot creates a snapshot, as a transaction of its own does, and
// returns its id.
func (im *Image) CreateSnapshot(ctx context.Context, name string, opts *SnapshotOptions) (id string, err error) {
	err = im.changeSnapshots(ctx, func(s *SnapshotTxn) error {
		id, err = s.Create(name, opts)
		return err
	})
	return id, err
}

// ApplySnapshot applies a snapshot, as a transaction of its own does.
func (im *Image) ApplySnapshot(ctx context.Context, idOrName string) error {
	return im.changeSnapshots(ctx, func(s *SnapshotTxn) error { return s.Apply(idOrName) })
}

// DeleteSnapshot deletes the first snapshot of a name, as a transaction of its
// own does.
func (im *Image) DeleteSnapshot(ctx context.Context, name string) error {
	return im.changeSnapshots(ctx, func(s *SnapshotTxn) error { return s.Delete(name) })
}

func (im *Image) changeSnapshots(ctx context.Context, do func(s *SnapshotTxn) error) error {
	s, err := im.BeginSnapshots(ctx)
	if err != nil {
		return err
	}
	defer s.Abort()
	if err := do(s); err != nil {
		return err
	}
	return s.Commit()
}

// Snapshots returns the snapshots as the transaction has left them. It is not
// to be changed. Where those that it has made lie is known after the commit.
func (s *SnapshotTxn) Snapshots() []Snapshot { return s.t.snapshots }

// do runs a step. The first error is the last that is done.
func (s *SnapshotTxn) do(step func() error) error {
	switch {
	case s.t == nil:
		return fmt.Errorf("qcow2: change snapshots: the transaction has ended")
	case s.err != nil:
		return fmt.Errorf("qcow2: change snapshots: after an earlier failure: %w", s.err)
	case s.t.prepared:
		return fmt.Errorf("qcow2: change snapshots: the transaction is prepared")
	}
	s.err = step()
	return s.err
}

// Create makes a snapshot of the disk as it is, at the end of the table, and
// returns its id: the highest number among the ids, and one. Other snapshots of
// the name can exist. Snapshots of one disk after the other cost its tables once.
//
// An image with an external data file is refused (ErrUnsupported).
func (s *SnapshotTxn) Create(name string, opts *SnapshotOptions) (id string, err error) {
	if opts == nil {
		opts = &SnapshotOptions{}
	}
	err = s.do(func() error {
		id, err = s.create(name, opts)
		return err
	})
	return id, err
}

func (s *SnapshotTxn) create(name string, opts *SnapshotOptions) (string, error) {
	t := s.t
	if err := s.check(); err != nil {
		return "", err
	}
	switch {
	case len(t.snapshots) >= maxSnapshots:
		return "", fmt.Errorf("qcow2: create snapshot: %w of %d", ErrSnapshots, maxSnapshots)
	case s.im.geo.dataFile:
		return "", errDataFileSnapshots()
	case len(name) > MaxSnapshotName || strings.Contains(name, "\x00"):
		return "", fmt.Errorf("qcow2: snapshot name %q, expected at most %d bytes and no zero: %w", name, MaxSnapshotName, ErrLimit)
	}
	sn := Snapshot{
		L1Size:        uint32(len(t.l1)),
		VMClockNsec:   uint64(opts.VMClock),
		DiskSize:      t.header.Size &^ (sectorSize - 1),
		ICount:        opts.ICount,
		ID:            s.newID(),
		Name:          name,
		ExtraDataSize: snapshotExtraDataSize,
	}
	if d := opts.Date; !d.IsZero() {
		sn.DateSec, sn.DateNsec = uint32(d.Unix()), uint32(d.Nanosecond())
	}
	if opts.VMState != nil || opts.Disk != nil {
		if err := s.load(&sn, opts); err != nil {
			return "", err
		}
	} else {
		s.news = append(s.news, len(t.snapshots))
	}
	t.snapshots = append(t.snapshots, sn)
	t.snapshotsChanged = true
	return sn.ID, nil
}

// newID returns the id of a new snapshot.
func (s *SnapshotTxn) newID() string {
	for {
		s.lastID++ // QEMU wraps around too
		id := strconv.FormatUint(s.lastID, 10)
		if s.lastID > uint64(len(s.t.snapshots)) || !slices.ContainsFunc(s.t.snapshots, func(sn Snapshot) bool { return sn.ID == id }) {
			return id
		}
	}
}

// leadingNumber returns the number that s begins with, as strtoul of C does.
func leadingNumber(s string) uint64 {
	s = strings.TrimLeft(s, " \t\n\v\f\r")
	negative := strings.HasPrefix(s, "-")
	if negative || strings.HasPrefix(s, "+") {
		s = s[1:]
	}
	end := 0
	for end < len(s) && '0' <= s[end] && s[end] <= '9' {
		end++
	}
	n, err := strconv.ParseUint(s[:end], 10, 64) // the greatest number if it is out of range
	if negative && err == nil {
		n = -n
	}
	return n
}

// Apply makes the content of a snapshot, found by its id or else by its name,
// that of the disk, with its size. What the disk held is given up, and so is
// vm state that an earlier Apply brought; the vm state of the snapshot comes
// with it.
//
// An image with bitmaps is refused (ErrBitmaps), and so is one with an external
// data file, or of version 2 if the sizes differ (ErrUnsupported).
func (s *SnapshotTxn) Apply(idOrName string) error {
	return s.do(func() error { return s.apply(idOrName) })
}

// check refuses, once, an image of which the disk would lose data.
func (s *SnapshotTxn) check() error {
	if s.checked {
		return nil
	}
	s.checked = true
	return s.t.checkCounted()
}

func (s *SnapshotTxn) apply(idOrName string) error {
	t, g := s.t, &s.im.geo
	if err := s.check(); err != nil {
		return err
	}
	if _, ok := t.header.Bitmaps(); ok {
		return fmt.Errorf("qcow2: apply snapshot: %w", ErrBitmaps)
	}
	if g.dataFile {
		return errDataFileSnapshots()
	}
	sn, err := findSnapshot(t.snapshots, idOrName)
	if err != nil {
		return err
	}
	if err := s.share(); err != nil {
		return err
	}
	l1, err := t.readL1(int64(sn.L1TableOffset), sn.L1Size)
	if err != nil {
		return err
	}
	if sn.DiskSize != t.header.Size&^(sectorSize-1) {
		entries := g.l1Entries(sn.DiskSize)
		switch {
		case t.header.Version < 3:
			return fmt.Errorf("qcow2: apply snapshot: its disk has %d bytes, that of the image %d, and a version 2 image with snapshots is not resized: %w",
				sn.DiskSize, t.header.Size, ErrUnsupported)
		case sn.DiskSize&(sectorSize-1) != 0:
			return &FormatError{"snapshot " + sn.ID, -1, "disk_size", fmt.Sprintf("%d, expected a multiple of %d", sn.DiskSize, sectorSize), ErrCorrupt}
		case entries > maxL1Size/l1EntrySize:
			return &FormatError{"snapshot " + sn.ID, -1, "disk_size", fmt.Sprintf("%d needs %d L1 entries, expected at most %d", sn.DiskSize, entries, maxL1Size/l1EntrySize), ErrLimit}
		}
		t.header.Size = sn.DiskSize
	}
	// A table is never empty, so that it has a place.
	if n := max(1, int(g.l1Entries(t.header.Size))); n > len(l1) {
		l1 = append(l1, make([]uint64, n-len(l1))...)
	}
	old := t.l1
	if len(old) == 0 && len(l1) == 1 && l1[0] == 0 {
		return nil
	}
	same := func(i int) bool { return i < len(l1) && i < len(old) && (l1[i]^old[i])&l1OffsetMask == 0 }
	for i := range l1 {
		l1[i] &= l1OffsetMask
		if !same(i) {
			if err := s.countTree(l1[i], 1); err != nil {
				return err
			}
		}
	}
	for i := range old {
		if !same(i) {
			if err := s.countTree(old[i], -1); err != nil {
				return err
			}
		}
	}
	t.l1 = l1
	return nil
}

// Delete deletes the first snapshot of a name.
//
// An image with an external data file has none that could be found.
func (s *SnapshotTxn) Delete(name string) error {
	return s.do(func() error {
		return s.remove(name, func(sn Snapshot) bool { return sn.Name == name })
	})
}

// DeleteID deletes the first snapshot of an id.
func (s *SnapshotTxn) DeleteID(id string) error {
	return s.do(func() error {
		return s.remove(id, func(sn Snapshot) bool { return sn.ID == id })
	})
}

func (s *SnapshotTxn) remove(what string, match func(Snapshot) bool) error {
	t := s.t
	i := slices.IndexFunc(t.snapshots, match)
	if i < 0 || s.im.geo.dataFile {
		return fmt.Errorf("qcow2: %q: %w", what, ErrNotFound)
	}
	if err := s.share(); err != nil {
		return err
	}
	sn := t.snapshots[i]
	l1, err := t.readL1(int64(sn.L1TableOffset), sn.L1Size)
	if err != nil {
		return err
	}
	for _, entry := range l1 {
		if err := s.countTree(entry, -1); err != nil {
			return err
		}
	}
	if err := s.giveUp(int64(sn.L1TableOffset), int64(sn.L1Size)*l1EntrySize); err != nil {
		return err
	}
	t.snapshots = slices.Delete(t.snapshots, i, i+1)
	t.snapshotsChanged = true
	return nil
}

func errDataFileSnapshots() error {
	return fmt.Errorf("qcow2: an image with an external data file has no snapshots: %w", ErrUnsupported)
}

// share counts the references of the snapshots in news, and writes their L1
// tables.
func (s *SnapshotTxn) share() error {
	if len(s.news) == 0 {
		return nil
	}
	if err := s.shareTables(len(s.news)); err != nil {
		return err
	}
	for _, i := range s.news {
		if err := s.putL1(&s.t.snapshots[i], s.t.l1); err != nil {
			return err
		}
	}
	s.news = nil
	return nil
}

// shareTables counts n more references to all tables of the disk. L2 tables with
// copied flags are written anew without, as nothing is the disk's alone any
// more.
func (s *SnapshotTxn) shareTables(n int) error {
	t, g := s.t, &s.im.geo
	for i, entry := range t.l1 {
		b, err := t.l2(entry)
		if err != nil {
			return err
		}
		off := int64(entry & l1OffsetMask)
		t.l1[i] = uint64(off)
		if b == nil {
			continue
		}
		if clearCopied(b, g) {
			if err := t.addRef(off, g.clusterSize, -1); err != nil {
				return err
			}
			if off, err = t.writeL2(b); err != nil {
				return err
			}
			t.l1[i] = uint64(off)
		}
		if err := s.countTable(off, b, n); err != nil {
			return err
		}
	}
	return nil
}

// clearCopied clears the copied flags of an L2 table and reports whether there
// were some.
func clearCopied(b []byte, g *geometry) (changed bool) {
	for at := int64(0); at < int64(len(b)); at += g.l2EntrySize {
		if e := binary.BigEndian.Uint64(b[at:]); e&oflagCopied != 0 {
			binary.BigEndian.PutUint64(b[at:], e&^oflagCopied)
			changed = true
		}
	}
	return changed
}

// putL1 writes the L1 table of a new snapshot. An empty one has no place.
func (s *SnapshotTxn) putL1(sn *Snapshot, l1 []uint64) error {
	sn.L1TableOffset, sn.L1Size = 0, uint32(len(l1)) // bounded by maxL1Size
	if len(l1) == 0 {
		return nil
	}
	b := appendEntries(nil, l1)
	off, err := s.t.alloc(int64(len(b)))
	if err != nil {
		return err
	}
	sn.L1TableOffset = uint64(off)
	// The rest of the cluster means nothing: zeroes there would be most of what
	// a snapshot writes.
	return s.t.write(append(b, make([]byte, -len(b)&(sectorSize-1))...), off)
}

// countTree adds delta to the references to an L2 table and to all that its
// entries refer to.
func (s *SnapshotTxn) countTree(l1Entry uint64, delta int) error {
	b, err := s.t.l2(l1Entry)
	if b == nil || err != nil {
		return err
	}
	return s.countTable(int64(l1Entry&l1OffsetMask), b, delta)
}

// countTable is countTree for a table at off that was read.
func (s *SnapshotTxn) countTable(off int64, b []byte, delta int) error {
	g := &s.im.geo
	if err := s.count(off, g.clusterSize, delta); err != nil {
		return err
	}
	for at := int64(0); at < int64(len(b)); at += g.l2EntrySize {
		entry := binary.BigEndian.Uint64(b[at:])
		if entry == 0 {
			continue
		}
		err := s.t.addEntryRef(entry, delta)
		if typ := g.clusterType(entry); err == nil && delta > 0 && (typ == clusterNormal || typ == clusterZeroAlloc) {
			err = s.counted(int64(entry&l2OffsetMask), delta)
		}
		if err != nil {
			var bad *FormatError
			if errors.As(err, &bad) && bad.Off < 0 {
				bad.Off = off + at
			}
			return err
		}
		if delta < 0 {
			s.freedEntry(entry)
		}
	}
	return nil
}

func (s *SnapshotTxn) count(off, n int64, delta int) error {
	if delta < 0 {
		return s.giveUp(off, n)
	}
	if err := s.t.addRef(off, n, delta); err != nil {
		return err
	}
	return s.counted(off, delta)
}

// counted refuses a cluster that nothing but the n references added referred to:
// it is free for others, though it is in use.
func (s *SnapshotTxn) counted(off int64, n int) error {
	refs, err := s.t.refcount(off >> s.im.geo.clusterBits)
	if err == nil && refs == uint64(n) {
		err = fmt.Errorf("qcow2: the cluster at %#x has refcount 0, but a table refers to it: run check -r all: %w", off, ErrCorrupt)
	}
	return err
}

// giveUp takes a reference from each cluster that n bytes at off lie in.
func (s *SnapshotTxn) giveUp(off, n int64) error {
	if n == 0 {
		return nil
	}
	s.mayBeFree(off, n)
	return s.t.addRef(off, n, -1)
}

// freedEntry notes what an L2 entry refers to.
func (s *SnapshotTxn) freedEntry(entry uint64) {
	if _, off, n := s.im.geo.named(entry); n > 0 {
		s.mayBeFree(off, n)
	}
}

// maxFreedRanges bounds what is remembered to be given back to the file system.
const maxFreedRanges = 1 << 20

// mayBeFree notes that a reference to the clusters that n bytes at off lie in
// was given up.
func (s *SnapshotTxn) mayBeFree(off, n int64) {
	mask := s.im.geo.clusterSize - 1
	n = (off+n+mask)&^mask - off&^mask
	off &^= mask
	if f := s.freed; len(f) > 0 && off >= f[len(f)-1].off && off <= f[len(f)-1].off+f[len(f)-1].n {
		f[len(f)-1].n = max(f[len(f)-1].n, off+n-f[len(f)-1].off)
	} else if len(f) < maxFreedRanges {
		s.freed = append(f, freedRange{off: off, n: n})
	}
}

// Prepare does all that can fail for a reason of the image or for want of
// space, and makes it durable: after it Commit writes one sector. So several
// images can be changed together, but for what happens between their commits.
func (s *SnapshotTxn) Prepare() error {
	return s.do(func() error {
		if err := s.share(); err != nil {
			return err
		}
		return s.t.prepare()
	})
}

// Commit makes the changes take effect, and ends the transaction. Order: new
// tables and data, sync; the header, sync; then space that nothing uses any more
// is given back to the file system. An error means that nothing has changed,
// unless the header could not be written or synced: then either state can be
// on disk, and the handle can only be read.
func (s *SnapshotTxn) Commit() error {
	if s.t == nil || s.err != nil || !s.t.prepared {
		if err := s.Prepare(); err != nil {
			return err
		}
	}
	if s.err = s.t.commit(); s.err != nil {
		return s.err
	}
	err := s.discard()
	s.end()
	return err
}

// discard gives the clusters that the commit has freed back to the file system.
func (s *SnapshotTxn) discard() error {
	dev, ok := s.im.w.dev.(blockdev.Discarder)
	if !ok {
		return nil
	}
	g := &s.im.geo
	for _, f := range s.freed {
		var off, n int64 // a run that is free
		for c := f.off >> g.clusterBits; c <= (f.off+f.n)>>g.clusterBits; c++ {
			used := true
			if c<<g.clusterBits < f.off+f.n {
				refs, err := s.im.w.alloc.get(c)
				if err != nil {
					return err
				}
				used = refs > 0
			}
			if !used {
				if n == 0 {
					off = c << g.clusterBits
				}
				n += g.clusterSize
				continue
			}
			if n = min(n, s.im.w.dev.Size()-off); n > 0 {
				if err := dev.Discard(off, n); err != nil {
					return s.im.fail(fmt.Errorf("qcow2: the snapshots are changed, but %d bytes at %#x that became free could not be given back: %w", n, off, err))
				}
			}
			n = 0
		}
	}
	return nil
}

// Abort ends the transaction and drops its changes. After Commit it does
// nothing.
func (s *SnapshotTxn) Abort() {
	if s.t != nil {
		s.end()
	}
}

func (s *SnapshotTxn) end() {
	s.t.abort()
	s.t = nil
	s.im.mu.Unlock()
}

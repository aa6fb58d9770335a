package ext4img

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"runtime"
	"sync"
	"sync/atomic"

	"qimg/qcow2/blockdev"
)

// CheckOptions say how Check works. The zero value is the default.
type CheckOptions struct {
	// MaxFindings bounds the findings; the last one says that there are more. 0:
	// 10,000.
	MaxFindings int
	// Workers is how many groups are looked at at once; 0: as many as there are
	// processors.
	Workers int
}

const defaultMaxFindings = 10000

// Check verifies a file system and changes nothing: superblock, groups,
// bitmaps, inodes, maps, directories and their indexes, links, xattrs, counts,
// checksums, journal. It finds what e2fsck finds in its five passes. A journal
// that has to be replayed is, in memory, and what is checked is what a mount
// would find.
//
// An error ends the check: of the device, of the context, or one that matches
// ErrFormat or ErrUnsupported. What is damaged is a finding instead. Memory
// grows with the groups that have anything in use, by about two bits for each
// of their blocks and 16 bytes for each of their inodes.
func Check(ctx context.Context, dev blockdev.Reader, opts *CheckOptions) iter.Seq2[Finding, error] {
	if opts == nil {
		opts = &CheckOptions{}
	}
	return func(yield func(Finding, error) bool) {
		c := &checker{ctx: ctx, max: opts.MaxFindings, values: map[Ino]uint64{}, blocks: map[int64]*sharedXattrs{}, orphans: map[Ino]bool{}}
		if c.max <= 0 {
			c.max = defaultMaxFindings
		}
		workers := opts.Workers
		if workers <= 0 {
			workers = runtime.GOMAXPROCS(0)
		}
		err := c.run(dev, workers)
		for _, f := range c.findings {
			if !yield(f, nil) {
				return
			}
		}
		if err != nil {
			yield(Finding{}, err)
		}
	}
}

// checker is one check.
type checker struct {
	ctx context.Context
	fs  *FS
	sb  *Superblock
	max int

	mu       sync.Mutex
	findings []Finding
	err      error

	groups []checkGroup

	xattrMu sync.Mutex
	values  map[Ino]uint64 // how many places lead to an inode with a value
	blocks  map[int64]*sharedXattrs

	dirMu sync.Mutex
	dirs  []checkDir

	orphans map[Ino]bool // written before the inodes are read
}

// checkGroup is what is known of a group.
type checkGroup struct {
	desc   groupDesc
	ok     bool // desc is sound
	mu     sync.Mutex
	used   []byte // the bitmap as it has to be; nil: nothing in use
	once   sync.Once
	inodes []checkInode // nil: none in use, and nothing leads to one
}

// checkInode is what is known of an inode.
type checkInode struct {
	links uint32 // i_links_count
	found atomic.Uint32
	mode  uint16 // 0: not in use
	flags uint8
	ftype atomic.Uint32 // one more than the type that entries tell; mixed: several
}

const (
	inodeOrphan = 1 << iota // no name has to lead to it
	inodeHidden             // belongs to the file system
	inodeValue              // holds the value of an xattr
)

const mixedTypes = 1 << 8

// checkDir is a directory.
type checkDir struct {
	ino, dotdot Ino
}

// sharedXattrs is a block of xattrs.
type sharedXattrs struct {
	refs, found uint32
}

// add notes a finding.
func (c *checker) add(f Finding) {
	f.Severity = max(f.Severity, f.Kind.severity())
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case len(c.findings) < c.max-1 || len(c.findings) == c.max-1 && f.Kind == TooMany:
		c.findings = append(c.findings, f)
	case len(c.findings) == c.max-1:
		c.findings = append(c.findings, Finding{Kind: TooMany, Severity: Error, Block: -1, Group: -1, Detail: fmt.Sprintf("there are more than these %d findings", c.max-1)})
	}
}

func (c *checker) find(k Kind, group int64, ino Ino, block int64, format string, args ...any) {
	c.add(Finding{Kind: k, Ino: ino, Block: block, Group: group, Detail: fmt.Sprintf(format, args...)})
}

// damage makes a finding of an error about the file system. Others end the
// check.
func (c *checker) damage(k Kind, group int64, err error) {
	if err == nil {
		return
	}
	var fe *FormatError
	if !errors.As(err, &fe) {
		c.fail(err)
		return
	}
	c.add(Finding{Kind: k, Ino: fe.Ino, Block: fe.Block, Group: group, Detail: fe.text()})
}

// text is the error without the place that a finding tells itself.
func (e *FormatError) text() string {
	s := e.Struct
	if e.Field != "" {
		s += ": " + e.Field
	}
	return s + ": " + e.Detail
}

func (c *checker) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = err
	}
}

func (c *checker) failed() error {
	if err := c.ctx.Err(); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

func (c *checker) run(dev blockdev.Reader, workers int) error {
	if err := c.open(dev); err != nil || c.fs == nil {
		return err
	}
	c.checkSuper()
	c.groups = make([]checkGroup, c.sb.groups) // at most one for each 8,192 bytes of the device
	for g := range c.groups {
		if err := c.failed(); err != nil {
			return err
		}
		c.readGroup(int64(g))
	}
	if s := c.sb; s.Incompat&IncompatMMP != 0 {
		if s.MMPBlock <= s.FirstDataBlock || s.MMPBlock >= s.BlocksCount {
			c.find(SuperblockDamaged, -1, 0, -1, "s_mmp_block is %d, and the file system has %d blocks", s.MMPBlock, s.BlocksCount)
		} else {
			c.claim(BlockShared, 0, s.MMPBlock, 1)
			if err := c.fs.checkMMP(); !errors.Is(err, ErrNotClean) {
				c.damage(SuperblockDamaged, -1, err)
			}
		}
	}
	c.checkJournal()
	c.readOrphans()
	if err := c.failed(); err != nil {
		return err
	}
	var next atomic.Int64
	var wg sync.WaitGroup
	for range min(workers, len(c.groups)) {
		wg.Go(func() {
			for c.failed() == nil {
				g := next.Add(1) - 1
				if g >= int64(len(c.groups)) {
					return
				}
				c.checkInodes(g)
			}
		})
	}
	wg.Wait()
	if err := c.failed(); err != nil {
		return err
	}
	c.checkLinks()
	c.checkConnected()
	c.checkXattrCounts()
	c.checkBitmaps()
	return c.failed()
}

// open opens the file system; fs stays nil if it is too damaged for more.
func (c *checker) open(dev blockdev.Reader) error {
	f, err := Open(dev, nil)
	switch {
	case err == nil:
	case errors.Is(err, ErrFormat):
		return err
	case errors.Is(err, ErrCorrupt):
		var fe *FormatError
		k := SuperblockDamaged
		if errors.As(err, &fe) && fe.Struct != "superblock" {
			k = JournalDamaged
		}
		c.damage(k, -1, err)
		return c.err
	default:
		return err
	}
	if f.fc != nil {
		return place{"journal", f.sb.JournalInum, -1}.unsupported("", "holds fast commits, and has to be replayed by a mount or by e2fsck first")
	}
	c.fs, c.sb = f, f.sb
	if f.sb.Incompat&IncompatRecover != 0 {
		c.find(JournalDirty, -1, f.sb.JournalInum, -1, "the journal has to be replayed")
	}
	return nil
}

// inode returns what is known of an inode, which is in range.
func (c *checker) inode(ino Ino) *checkInode {
	per := c.sb.InodesPerGroup
	g := &c.groups[uint32(ino-1)/per]
	g.once.Do(func() { g.inodes = make([]checkInode, per) }) // at most 8 for each byte of a block
	return &g.inodes[uint32(ino-1)%per]
}

// claim marks a run of blocks, inside of the file system, as in use, and finds
// those that were already: it reports whether there are any.
func (c *checker) claim(k Kind, ino Ino, start, n int64) (twice bool) {
	s := c.sb
	ratio := s.clusterRatio()
	end := start + n
	for start < end {
		g := (start - s.FirstDataBlock) / s.BlocksPerGroup
		stop := min(end, s.groupEnd(g))
		from, to := (start-s.groupStart(g))/ratio, ceilDiv(stop-s.groupStart(g), ratio)
		grp := &c.groups[g]
		grp.mu.Lock()
		if grp.used == nil {
			grp.used = make([]byte, s.BlockSize)
		}
		shared := nextSet(grp.used, from, to)
		setBits(grp.used, from, to)
		grp.mu.Unlock()
		if shared < to {
			twice = true
			c.find(k, g, ino, s.groupStart(g)+shared*ratio, "is in use twice")
		}
		start = stop
	}
	return twice
}

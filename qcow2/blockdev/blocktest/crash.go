package blocktest

import (
	"cmp"
	"fmt"
	"iter"
	"math/rand/v2"
	"slices"
	"strings"

	"qimg/qcow2/blockdev"
)

// SectorSize is the unit that a crash leaves whole.
const SectorSize = 512

// maxDense is the largest range of zeroes whose unaligned ends are looked
// after; a longer one is replayed as it is.
const maxDense = 1 << 20

// CrashOptions says which states CrashStates goes through. The zero value, and
// nil, mean the defaults.
type CrashOptions struct {
	// Subsets bounds how many subsets of the unsynced operations are tried at
	// each Sync. Where there are no more, all of them are; else those with one
	// operation, those without one, and random ones. 0 means 1024, so up to
	// ten operations all of them.
	Subsets int
	// Tears bounds the places at which each operation is torn. 0 means 16.
	Tears int
	// AtEnd leaves out the crashes before the last operation.
	AtEnd bool
	// Seed is that of the random choices.
	Seed uint64
	// Garbage fills the first sector that a torn write did not reach with
	// something that was never written. No order of writes can make up for
	// that where data is overwritten in place.
	Garbage bool
}

// CrashState is what a crash can leave behind.
type CrashState struct {
	// Devs are the devices: that of the recorder, and those that Beside gave,
	// in that order. They are the receiver's to keep and to change; it costs
	// little until it does.
	Devs []*blockdev.Memory
	// Mark is the last that was noted before the crash; nil if there was none.
	Mark any

	at   string
	ops  []crashOp
	kept []part
}

// Dev is the device of the recorder.
func (s CrashState) Dev() *blockdev.Memory { return s.Devs[0] }

// String says what has happened and what is missing.
func (s CrashState) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "crash %s, mark %v", s.at, s.Mark)
	for i, op := range s.ops {
		switch p := s.kept[i]; {
		case p.none():
			fmt.Fprintf(&b, "\n\tlost %d: %v", op.index, op)
		case p.of(op):
			fmt.Fprintf(&b, "\n\tkept %d: %v", op.index, op)
		default:
			fmt.Fprintf(&b, "\n\ttorn %d: %v, kept sectors %d to %d of %d", op.index, op, p.lo, p.hi-1, op.sectors())
		}
	}
	return b.String()
}

// crashOp is an operation in whole sectors.
type crashOp struct {
	Op
	index int // among all operations
	dev   int
}

// String names the device only if it is not the first.
func (o crashOp) String() string {
	if o.dev == 0 {
		return o.Op.String()
	}
	return fmt.Sprintf("%v of device %d", o.Op, o.dev)
}

func (o crashOp) sectors() int64 {
	if o.Kind == Truncate {
		return 1
	}
	return max(1, (o.N+SectorSize-1)/SectorSize)
}

// part is the sectors of an operation, from lo up to hi, that were written.
type part struct{ lo, hi int64 }

func (p part) none() bool         { return p.lo == p.hi }
func (p part) of(op crashOp) bool { return p == whole(op) }
func whole(op crashOp) part       { return part{0, op.sectors()} }
func (o crashOp) cut(p part) Op {
	if p.of(o) {
		return o.Op
	}
	lo, hi := p.lo*SectorSize, min(p.hi*SectorSize, o.N)
	op := Op{Kind: o.Kind, Off: o.Off + lo, N: hi - lo}
	if o.Data != nil {
		op.Data = o.Data[lo:hi]
	}
	return op
}

// CrashStates goes through the states that a crash can leave, in the order of
// the operations:
//
//   - after each operation, with all that was done before;
//   - before each Sync and at the end, with some of what was not synced then
//     and without the rest: the subsets that opts bounds;
//   - the same with one operation torn at a sector, its first or its last part
//     missing, and either all other operations done or only those before it.
//
// Truncate, Discard and WriteZeroes are lost and kept as writes are. A write
// that does not begin and end at a sector is done with the rest of the sector
// as it was then, as a page cache does. Two writes to the same place are never
// done in the wrong order.
//
// The Mark of a state is the last that was noted before the next operation, or
// before the Sync. So a model that is noted once Sync has returned is the one
// that the states from then on have to hold.
//
// An error ends the sequence.
func (r *Recorder) CrashStates(opts *CrashOptions) iter.Seq2[CrashState, error] {
	return func(yield func(CrashState, error) bool) {
		c := &crash{yield: yield}
		if opts != nil {
			c.opts = *opts
		}
		c.opts.Subsets = cmp.Or(c.opts.Subsets, 1024)
		c.opts.Tears = cmp.Or(c.opts.Tears, 16)
		c.rand = rand.New(rand.NewPCG(c.opts.Seed, 0))
		if err := c.run(r.log); err != nil {
			yield(CrashState{}, err)
		}
	}
}

// crash is one run of CrashStates.
type crash struct {
	opts  CrashOptions
	yield func(CrashState, error) bool
	rand  *rand.Rand

	synced  []*blockdev.Memory // what is safe
	now     []*blockdev.Memory // what a reader would see
	pending []crashOp          // what is between them
	marks   []any              // that of each state with the first n pending
}

func (c *crash) run(l *oplog) error {
	l.mu.Lock()
	ops, marks := slices.Clone(l.ops), slices.Clone(l.marks)
	for _, base := range l.bases {
		c.synced = append(c.synced, base.Clone())
		c.now = append(c.now, base.Clone())
	}
	l.mu.Unlock()

	var mark any
	next := 0 // of marks
	for i := 0; ; i++ {
		for ; next < len(marks) && marks[next].after <= i; next++ {
			mark = marks[next].value
		}
		wanted := i == len(ops) || !c.opts.AtEnd
		if wanted && !c.emit(fmt.Sprintf("after %d operations", i), mark, c.all()) {
			return nil
		}
		if wanted {
			c.marks = append(c.marks, mark)
		}
		if i == len(ops) || ops[i].Kind == Sync {
			if wanted && !c.atSync(fmt.Sprintf("before operation %d", i), mark) || i == len(ops) {
				return nil
			}
			c.sync(ops[i].dev)
			continue
		}
		if err := c.do(ops[i], i); err != nil {
			return err
		}
	}
}

// do adds an operation in whole sectors.
func (c *crash) do(l loggedOp, i int) error {
	dev := c.now[l.dev]
	if err := l.Apply(dev); err != nil {
		return fmt.Errorf("replay of %v: %w", l.Op, err)
	}
	op := crashOp{l.Op, i, l.dev}
	if op.Kind == Write || op.Kind != Truncate && op.N <= maxDense {
		end := min((op.Off+op.N+SectorSize-1)/SectorSize*SectorSize, dev.Size())
		op.Off -= op.Off % SectorSize
		op.N = end - op.Off
		op.Data = make([]byte, op.N)
		if err := readAll(dev, op.Data, op.Off); err != nil {
			return err
		}
		op.Kind = Write
	}
	c.pending = append(c.pending, op)
	return nil
}

// sync makes safe what was done to a device.
func (c *crash) sync(dev int) {
	c.synced[dev] = c.now[dev].Clone()
	var left []crashOp // the states keep the old list
	for _, op := range c.pending {
		if op.dev != dev {
			left = append(left, op)
		}
	}
	c.pending, c.marks = left, nil
}

func (c *crash) all() []part {
	kept := make([]part, len(c.pending))
	for i, op := range c.pending {
		kept[i] = whole(op)
	}
	return kept
}

// emit yields a state with what is kept of the pending operations.
func (c *crash) emit(at string, mark any, kept []part) bool {
	s := CrashState{Mark: mark, at: at, ops: slices.Clip(c.pending), kept: kept}
	for _, m := range c.synced {
		s.Devs = append(s.Devs, m.Clone())
	}
	for i, op := range c.pending {
		if kept[i].none() {
			continue
		}
		if err := op.cut(kept[i]).Apply(s.Devs[op.dev]); err != nil {
			c.yield(s, fmt.Errorf("replay of %v: %w", op, err))
			return false
		}
		if c.opts.Garbage && !kept[i].of(op) && op.Kind == Write {
			if err := c.garbage(s.Devs[op.dev], op, kept[i]); err != nil {
				c.yield(s, err)
				return false
			}
		}
	}
	return c.yield(s, nil)
}

// garbage spoils the sector of a torn write that is next to what was written.
func (c *crash) garbage(m *blockdev.Memory, op crashOp, p part) error {
	sector := p.hi
	if p.hi == op.sectors() {
		sector = p.lo - 1
	}
	b := make([]byte, SectorSize)
	for i := range b {
		b[i] = byte(c.rand.Uint32())
	}
	spoiled := op.cut(part{sector, sector + 1})
	spoiled.Data = b[:spoiled.N]
	return spoiled.Apply(m)
}

// atSync yields the states with a part of what is pending.
func (c *crash) atSync(at string, mark any) bool {
	n := len(c.pending)
	kept := make([]part, n)
	subset := func(has func(i int) bool) bool {
		prefix := 0
		for i := range n {
			if kept[i] = (part{}); has(i) {
				kept[i] = whole(c.pending[i])
				if i == prefix {
					prefix++
				} else {
					prefix = -1
				}
			}
		}
		// A prefix was there already, unless the mark has changed.
		if first := len(c.marks) - n - 1; prefix >= 0 && first >= 0 && c.marks[first+prefix] == mark {
			return true
		}
		return c.emit(at, mark, slices.Clone(kept))
	}
	if n < 31 && 1<<n <= c.opts.Subsets {
		for bits := range 1 << n {
			if !subset(func(i int) bool { return bits>>i&1 != 0 }) {
				return false
			}
		}
	} else {
		left := c.opts.Subsets
		for _, one := range c.rand.Perm(n) {
			if left -= 2; left < c.opts.Subsets/2 {
				break
			}
			if !subset(func(i int) bool { return i == one }) || !subset(func(i int) bool { return i != one }) {
				return false
			}
		}
		for ; left > 0; left-- {
			likely := []float64{0.1, 0.5, 0.9}[c.rand.IntN(3)]
			if !subset(func(int) bool { return c.rand.Float64() < likely }) {
				return false
			}
		}
	}
	for i, op := range c.pending {
		if !c.torn(at, mark, i, op.sectors()) {
			return false
		}
	}
	return true
}

// torn yields the states in which operation i is torn.
func (c *crash) torn(at string, mark any, i int, sectors int64) bool {
	cuts := make([]int64, 0, c.opts.Tears)
	if sectors-1 <= int64(c.opts.Tears) {
		for cut := int64(1); cut < sectors; cut++ {
			cuts = append(cuts, cut)
		}
	} else {
		for range c.opts.Tears {
			cuts = append(cuts, 1+c.rand.Int64N(sectors-1))
		}
	}
	for _, cut := range cuts {
		for _, p := range []part{{0, cut}, {cut, sectors}} {
			kept := c.all()
			kept[i] = p
			if i < len(kept)-1 {
				if !c.emit(at, mark, slices.Clone(kept)) {
					return false
				}
				clear(kept[i+1:])
			}
			if !c.emit(at, mark, kept) {
				return false
			}
		}
	}
	return true
}

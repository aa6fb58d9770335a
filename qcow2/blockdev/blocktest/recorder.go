package blocktest

import (
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"sync"

	"qimg/qcow2/blockdev"
)

// OpKind is a call of a device.
type OpKind uint8

const (
	Read OpKind = 1 + iota // ReadAt or NextExtent
	Write
	Sync
	Truncate
	Discard
	WriteZeroes
)

func (k OpKind) String() string {
	names := []string{"", "read", "write", "sync", "truncate", "discard", "write zeroes"}
	if k > 0 && int(k) < len(names) {
		return names[k]
	}
	return fmt.Sprintf("OpKind(%d)", uint8(k))
}

// Op is one recorded call that changed, or synced, a device.
type Op struct {
	Kind OpKind
	Off  int64
	N    int64  // length of the range; for Truncate the new size
	Data []byte // of a Write, N bytes
}

func (o Op) String() string { return fmt.Sprintf("%v %d+%d", o.Kind, o.Off, o.N) }

// Apply does to m what the call did to its device. A discarded range reads as
// zeroes then. A range beyond the end of m, as when the Truncate before it is
// left out, makes m longer, as it would a file.
func (o Op) Apply(m *blockdev.Memory) error {
	if o.Kind != Sync && o.Kind != Truncate && o.Off+o.N > m.Size() {
		if err := m.Truncate(o.Off + o.N); err != nil {
			return err
		}
	}
	switch o.Kind {
	case Write:
		_, err := m.WriteAt(o.Data, o.Off)
		return err
	case Truncate:
		return m.Truncate(o.N)
	case Discard, WriteZeroes:
		return m.WriteZeroes(o.Off, o.N)
	}
	return nil
}

// Recorder is a device that passes every call on to another and records those
// that change or sync it, in the order in which they were done. It is safe for
// concurrent use. It is no RangeCopier, so that every byte is seen, and no
// Allocator.
//
// To test what a crash leaves behind, run the work on a recorder, note what
// has to be safe once a sync has returned, and look at every state:
//
//	r, err := blocktest.NewRecorder(dev)
//	...
//	work(r) // calls r.Mark(model) when its sync has returned
//	for state, err := range r.CrashStates(nil) {
//		if err != nil {
//			t.Fatal(err)
//		}
//		if err := verify(state.Dev(), state.Mark); err != nil {
//			t.Fatalf("%v\n%v", err, state)
//		}
//	}
type Recorder struct {
	d   blockdev.Device
	dev int // number of the device in the log
	log *oplog
}

// oplog is what the recorders of one crash have in common.
type oplog struct {
	mu    sync.Mutex
	bases []*blockdev.Memory // what the devices held first
	ops   []loggedOp
	marks []logMark
}

type loggedOp struct {
	Op
	dev int
}

// logMark is a value that was noted after so many operations.
type logMark struct {
	after int
	value any
}

// NewRecorder returns a recorder on d. What d holds now is where States and
// CrashStates begin.
func NewRecorder(d blockdev.Device) (*Recorder, error) {
	return newRecorder(d, &oplog{})
}

// Beside returns a recorder on a second device, whose operations are recorded
// in one order with those of r. A Sync is that of one device alone.
func (r *Recorder) Beside(d blockdev.Device) (*Recorder, error) {
	return newRecorder(d, r.log)
}

func newRecorder(d blockdev.Device, l *oplog) (*Recorder, error) {
	base, ok := d.(*blockdev.Memory)
	if ok {
		base = base.Clone()
	} else {
		base = blockdev.NewMemory(d.Size())
		if err := copyData(base, d); err != nil {
			return nil, err
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.bases = append(l.bases, base)
	return &Recorder{d, len(l.bases) - 1, l}, nil
}

// Mark notes a value that belongs to what was recorded so far: what has to be
// there after a crash from now on. Values are compared with ==.
func (r *Recorder) Mark(value any) {
	r.log.mu.Lock()
	defer r.log.mu.Unlock()
	r.log.marks = append(r.log.marks, logMark{len(r.log.ops), value})
}

// copyData copies all that does not read as zeroes.
func copyData(dst *blockdev.Memory, src blockdev.Reader) error {
	for off := int64(0); off < src.Size(); {
		e, err := blockdev.NextExtent(src, off)
		if err != nil {
			return err
		}
		if !e.Kind.ReadsZero() {
			if _, err := io.Copy(io.NewOffsetWriter(dst, off), io.NewSectionReader(src, off, e.Len)); err != nil {
				return err
			}
		}
		off += e.Len
	}
	return nil
}

// readAll fills p from off; what lies behind the end is zeroes.
func readAll(r blockdev.Reader, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if err != nil && err != io.EOF {
		return err
	}
	clear(p[n:])
	return nil
}

// Ops returns what was recorded of the device.
func (r *Recorder) Ops() []Op {
	r.log.mu.Lock()
	defer r.log.mu.Unlock()
	var ops []Op
	for _, op := range r.log.ops {
		if op.dev == r.dev {
			ops = append(ops, op.Op)
		}
	}
	return ops
}

// States goes through the states that the device was in: before the first
// recorded operation and after each. It is one device, which is taken on by
// one operation between two states, so it is not to be written. An error ends
// the sequence.
func (r *Recorder) States() iter.Seq2[*blockdev.Memory, error] {
	return func(yield func(*blockdev.Memory, error) bool) {
		r.log.mu.Lock()
		m := r.log.bases[r.dev].Clone()
		r.log.mu.Unlock()
		if !yield(m, nil) {
			return
		}
		for _, op := range r.Ops() {
			if err := op.Apply(m); err != nil {
				yield(nil, fmt.Errorf("replay of %v: %w", op, err))
				return
			}
			if !yield(m, nil) {
				return
			}
		}
	}
}

// do runs a call and records it if it has succeeded.
func (r *Recorder) do(op Op, call func() error) error {
	r.log.mu.Lock()
	defer r.log.mu.Unlock()
	err := call()
	if err == nil {
		r.log.ops = append(r.log.ops, loggedOp{op, r.dev})
	}
	return err
}

// Size returns the size of the device.
func (r *Recorder) Size() int64 { return r.d.Size() }

// ReadAt reads from the device.
func (r *Recorder) ReadAt(p []byte, off int64) (int, error) { return r.d.ReadAt(p, off) }

// NextExtent is the device's.
func (r *Recorder) NextExtent(off int64) (blockdev.Extent, error) {
	return blockdev.NextExtent(r.d, off)
}

// WriteAt writes to the device. Of a write that fails the part that was
// written is recorded.
func (r *Recorder) WriteAt(p []byte, off int64) (n int, err error) {
	r.log.mu.Lock()
	defer r.log.mu.Unlock()
	n, err = r.d.WriteAt(p, off)
	if n > 0 {
		r.log.ops = append(r.log.ops, loggedOp{Op{Write, off, int64(n), slices.Clone(p[:n])}, r.dev})
	}
	return n, err
}

// Sync syncs the device.
func (r *Recorder) Sync() error {
	return r.do(Op{Kind: Sync}, func() error { return blockdev.Sync(r.d) })
}

// Truncate sets the size of the device.
func (r *Recorder) Truncate(size int64) error {
	return r.do(Op{Kind: Truncate, N: size}, func() error { return truncate(r.d, size) })
}

// Discard discards a range of the device.
func (r *Recorder) Discard(off, n int64) error {
	return r.do(Op{Kind: Discard, Off: off, N: n}, func() error { return discard(r.d, off, n) })
}

// WriteZeroes makes a range of the device read as zeroes.
func (r *Recorder) WriteZeroes(off, n int64) error {
	return r.do(Op{Kind: WriteZeroes, Off: off, N: n}, func() error { return blockdev.WriteZeroes(r.d, off, n) })
}

func truncate(d blockdev.Device, size int64) error {
	if t, ok := d.(blockdev.Truncater); ok {
		return t.Truncate(size)
	}
	return fmt.Errorf("truncate: %w", errors.ErrUnsupported)
}

func discard(d blockdev.Device, off, n int64) error {
	if t, ok := d.(blockdev.Discarder); ok {
		return t.Discard(off, n)
	}
	return fmt.Errorf("discard: %w", errors.ErrUnsupported)
}

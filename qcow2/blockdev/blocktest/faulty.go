package blocktest

import (
	"errors"
	"io"
	"sync"

	"qimg/qcow2/blockdev"
)

// Fault says which call of a Faulty fails, and how.
type Fault struct {
	// Call is the number of the failing call, from 1, among those of Kind.
	// 0 is none.
	Call int
	// Kind is the kind of call that is counted; 0 is every kind.
	Kind OpKind
	// Err is what the call returns: syscall.EIO, syscall.ENOSPC and so on.
	Err error
	// Short lets a failing read do the first half of its bytes, a failing write
	// those whole sectors that end in the first half.
	Short bool
	// Sticky lets every counted call after that one fail too.
	Sticky bool
}

// Faulty is a device that passes every call on to another, except the one that
// its Fault names. It is safe for concurrent use, and no RangeCopier and no
// Allocator.
type Faulty struct {
	d     blockdev.Device
	fault Fault

	mu    sync.Mutex
	calls int
	fired OpKind
}

// NewFaulty returns d with a fault. Err has to be set when Call is.
func NewFaulty(d blockdev.Device, fault Fault) *Faulty {
	if fault.Call != 0 && fault.Err == nil {
		panic("blocktest: internal error: a fault without an error")
	}
	return &Faulty{d: d, fault: fault}
}

// Fired reports whether a call has failed.
func (f *Faulty) Fired() bool { return f.FiredKind() != 0 }

// FiredKind returns the kind of the call that has failed first, 0 if none has.
func (f *Faulty) FiredKind() OpKind {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.fired
}

// Calls returns how many calls of the fault's Kind there were.
func (f *Faulty) Calls() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls
}

// next counts a call and returns its error if it is to fail.
func (f *Faulty) next(kind OpKind) error {
	if f.fault.Kind != 0 && f.fault.Kind != kind {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls++
	if f.fault.Call == 0 || f.calls < f.fault.Call || f.calls > f.fault.Call && !f.fault.Sticky {
		return nil
	}
	if f.fired == 0 {
		f.fired = kind
	}
	return f.fault.Err
}

// Size returns the size of the device.
func (f *Faulty) Size() int64 { return f.d.Size() }

// ReadAt counts as Read.
func (f *Faulty) ReadAt(p []byte, off int64) (int, error) {
	return f.transfer(Read, f.d.ReadAt, p, off)
}

// WriteAt counts as Write.
func (f *Faulty) WriteAt(p []byte, off int64) (int, error) {
	return f.transfer(Write, f.d.WriteAt, p, off)
}

func (f *Faulty) transfer(kind OpKind, do func([]byte, int64) (int, error), p []byte, off int64) (int, error) {
	fault := f.next(kind)
	if fault == nil {
		return do(p, off)
	}
	if !f.fault.Short {
		return 0, fault
	}
	half := int64(len(p) / 2)
	if kind == Write {
		half = max((off+half)/SectorSize*SectorSize-off, 0)
	}
	n, err := do(p[:half], off)
	if err != nil && !errors.Is(err, io.EOF) {
		return n, err
	}
	return n, fault
}

// NextExtent counts as Read.
func (f *Faulty) NextExtent(off int64) (blockdev.Extent, error) {
	if err := f.next(Read); err != nil {
		return blockdev.Extent{}, err
	}
	return blockdev.NextExtent(f.d, off)
}

// Sync counts as Sync.
func (f *Faulty) Sync() error {
	if err := f.next(Sync); err != nil {
		return err
	}
	return blockdev.Sync(f.d)
}

// Truncate counts as Truncate.
func (f *Faulty) Truncate(size int64) error {
	if err := f.next(Truncate); err != nil {
		return err
	}
	return truncate(f.d, size)
}

// Discard counts as Discard.
func (f *Faulty) Discard(off, n int64) error {
	if err := f.next(Discard); err != nil {
		return err
	}
	return discard(f.d, off, n)
}

// WriteZeroes counts as WriteZeroes.
func (f *Faulty) WriteZeroes(off, n int64) error {
	if err := f.next(WriteZeroes); err != nil {
		return err
	}
	return blockdev.WriteZeroes(f.d, off, n)
}

package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/blocktest"
	"qimg/qcow2/blockdev/oracle"
)

// Trial is work on an image that is recorded, so that every state that a crash
// can leave is looked at:
//
//	tr := qcow2.NewTrial(t, dev, nil) // dev holds an image
//	tr.Write(4096, data)
//	tr.Sync()
//	tr.Do("snapshot create", func() error { return tr.Image.CreateSnapshot(...) })
//	tr.Write(8192, data)
//	tr.Verify(nil)
//
// In every state the image opens, Check finds no corruption, the guest reads
// what Sync acknowledged or, sector by sector, what was written later, and
// everything else (size, features, snapshots with their content) is as it was
// before an operation of Do or as it is after it. There are no leaks, except
// after guest writes up to the end of the next Do. Some states are written to,
// some are repaired on a device that fails, and some are shown to qemu-img
// check.
//
// TrialFaults runs such work on a device that fails.
type Trial struct {
	// Image is open for writing. Guest data is to be changed by the methods of
	// the trial only.
	Image *Image
	// RepairFaults counts the repairs that met a fault.
	RepairFaults int

	t    testing.TB
	opts TrialOptions
	dev  *blocktest.Recorder
	data *blocktest.Recorder // nil without a data file
	now  []outcome           // what a crash may leave; the last is what was asked for
	cur  []byte              // what the guest reads
	// changed: there was a change of guest data since the last Do.
	changed bool

	// With a device that fails:
	faulty *blocktest.Faulty
	failed error     // of the first operation that failed
	dos    []outcome // what each Do leads to
}

// TrialOptions are the options of NewTrial. The zero value, and nil, are good
// for an image without other files.
type TrialOptions struct {
	// Open says how the image is opened, for writing and to look at a state.
	// A backing file has to be named by its full path.
	Open OpenOptions
	// Data is the external data file of the image.
	Data *blockdev.Memory
	// Wrap, if set, puts a device between the image and the recorder.
	Wrap func(d blockdev.Device) blockdev.Device
	// Digest, if set, returns more that has to be as before or as after an
	// operation, for instance what bitmaps say.
	Digest func(im *Image) (string, error)
	// Every n-th state is written to, and shown to qemu-img check, and so is
	// the last. 0 means 20 and 200, a negative number never. The states before
	// those written to are repaired.
	EveryWrite, EveryOracle int

	fault   *blocktest.Fault
	failing int       // which device has it
	dos     []outcome // of a run without faults
}

// outcome is a state that a crash may leave.
type outcome struct {
	guest  []byte       // what is safe
	writes []guestWrite // what came later
	leaks  bool         // there may be some
	rest   string       // all else
}

// guestWrite is what a change of guest data makes of whole sectors.
type guestWrite struct {
	off   int64
	bytes []byte
}

// expectation is the mark of a recorded operation.
type expectation struct {
	name string
	alts []outcome // any of them
}

func (e *expectation) String() string { return e.name }

// NewTrial opens an image in dev for writing. What is done to it from then on
// is recorded.
func NewTrial(t testing.TB, dev *blockdev.Memory, opts *TrialOptions) *Trial {
	t.Helper()
	tr := &Trial{t: t}
	if opts != nil {
		tr.opts = *opts
	}
	if tr.opts.EveryWrite == 0 {
		tr.opts.EveryWrite = 20
	}
	if tr.opts.EveryOracle == 0 {
		tr.opts.EveryOracle = 200
	}
	var err error
	if tr.dev, err = blocktest.NewRecorder(dev); err != nil {
		t.Fatal(err)
	}
	devs := []blockdev.Device{tr.dev}
	if tr.opts.Data != nil {
		if tr.data, err = tr.dev.Beside(tr.opts.Data); err != nil {
			t.Fatal(err)
		}
		devs = append(devs, tr.data)
	}
	o := tr.below()
	tr.now, tr.cur = []outcome{o}, slices.Clone(o.guest)
	tr.mark("open")
	if wrap := tr.opts.Wrap; wrap != nil {
		for i := range devs {
			devs[i] = wrap(devs[i])
		}
	}
	if tr.opts.fault != nil {
		tr.faulty = blocktest.NewFaulty(devs[tr.opts.failing], *tr.opts.fault)
		devs[tr.opts.failing] = tr.faulty
	}
	tr.Image, err = tr.open(true, devs...)
	if !tr.try("open", err) {
		return tr
	}
	t.Cleanup(func() { tr.Image.Close() })
	return tr
}

// try tells whether an operation went well. One that did not ends the test,
// unless the device has failed.
func (tr *Trial) try(name string, err error) bool {
	tr.t.Helper()
	if err == nil {
		return true
	}
	if tr.faulty == nil || !tr.faulty.Fired() {
		tr.t.Fatalf("%s: %v", name, err)
	}
	if !errors.Is(err, tr.opts.fault.Err) {
		tr.t.Fatalf("%s: %v, expected one of %v", name, err, tr.opts.fault.Err)
	}
	tr.failed = fmt.Errorf("%s: %w", name, err)
	return false
}

// refuses reports whether there was a failure before; what is done then has to
// fail too, unless only a read has failed.
func (tr *Trial) refuses(name string, op func() error) bool {
	tr.t.Helper()
	if tr.failed == nil {
		return false
	}
	if tr.Image == nil || tr.faulty.FiredKind() == blocktest.Read {
		return true
	}
	if err := op(); !errors.Is(err, blockdev.ErrReadOnly) || !errors.Is(err, tr.opts.fault.Err) {
		tr.t.Fatalf("%s: %v, expected it to be refused after %v", name, err, tr.failed)
	}
	return true
}

// open opens the image that lies in the first device, with its data file.
func (tr *Trial) open(write bool, devs ...blockdev.Device) (*Image, error) {
	opts := tr.opts.Open
	opts.Write = write
	if len(devs) > 1 {
		opts.Backing = BackingIgnore
	}
	im, err := New(devs[0], &opts)
	if err == nil && len(devs) > 1 {
		im.data = devs[1]
		if write {
			im.w.data = devs[1]
		}
	}
	return im, err
}

// mark notes what has to be true from now on.
func (tr *Trial) mark(name string) *expectation {
	e := &expectation{name, slices.Clone(tr.now)}
	tr.dev.Mark(e)
	return e
}

// below returns what the image is that lies on the recorded devices, whatever
// the one that is open has not written yet.
func (tr *Trial) below() outcome {
	tr.t.Helper()
	devs := []blockdev.Device{tr.dev}
	if tr.data != nil {
		devs = append(devs, tr.data)
	}
	o, err := tr.look(devs)
	if err != nil {
		tr.t.Fatal(err)
	}
	return o
}

// look returns what an image is.
func (tr *Trial) look(devs []blockdev.Device) (outcome, error) {
	im, err := tr.open(false, devs...)
	if err != nil {
		return outcome{}, err
	}
	defer im.Close()
	o := outcome{}
	if o.guest, err = readImage(im); err != nil {
		return o, err
	}
	o.rest, err = tr.digest(im, devs)
	return o, err
}

func readImage(im *Image) ([]byte, error) {
	b := make([]byte, im.Size())
	_, err := im.ReadAt(b, 0)
	if err == io.EOF {
		err = nil
	}
	return b, err
}

// digest tells everything but what the guest reads.
func (tr *Trial) digest(im *Image, devs []blockdev.Device) (string, error) {
	h := im.Header()
	var b strings.Builder
	fmt.Fprintf(&b, "version %d, size %d, backing %q %q, data file %q, refcounts 2^%d, compression %v, incompatible %v, compatible %v, autoclear %v\n",
		h.Version, h.Size, h.BackingFile, h.BackingFormat(), h.DataFile(), h.RefcountOrder, h.CompressionType,
		h.IncompatibleFeatures&^IncompatDirty, h.CompatibleFeatures, h.AutoclearFeatures)
	for _, s := range im.Snapshots() {
		opts := tr.opts.Open
		opts.Snapshot = s.ID
		sn, err := New(devs[0], &opts)
		if err != nil {
			return "", fmt.Errorf("snapshot %s: %w", s.ID, err)
		}
		content, err := readImage(sn)
		if err == nil && s.VMStateSize > 0 {
			state := make([]byte, min(s.VMStateSize, 1<<20))
			table := int64(1) << im.geo.l2Coverage()
			err = sn.readGuest(state, (int64(s.DiskSize)+table-1)&^(table-1))
			content = append(content, state...)
		}
		sn.Close()
		if err != nil {
			return "", fmt.Errorf("snapshot %s: %w", s.ID, err)
		}
		fmt.Fprintf(&b, "snapshot %q %q: %d.%09d, clock %d, vm state %d, size %d, icount %d, extra %d %x, content %08x%08x\n", s.ID, s.Name,
			s.DateSec, s.DateNsec, s.VMClockNsec, s.VMStateSize, s.DiskSize, s.ICount, s.ExtraDataSize, s.UnknownExtraData, crc32.ChecksumIEEE(content), crc32.Checksum(content, crc32.MakeTable(crc32.Castagnoli)))
	}
	list, err := im.Bitmaps()
	if err != nil {
		return "", err
	}
	for _, x := range list {
		fmt.Fprintf(&b, "bitmap %q: flags %v, granularity 2^%d\n", x.Name, x.Flags, x.GranularityBits)
	}
	if tr.opts.Digest != nil {
		more, err := tr.opts.Digest(im)
		if err != nil {
			return "", err
		}
		b.WriteString(more)
	}
	return b.String(), nil
}

// Write writes guest data.
func (tr *Trial) Write(off int64, p []byte) {
	tr.t.Helper()
	tr.change(fmt.Sprintf("write %d+%d", off, len(p)), off, p, false, func() error {
		n, err := tr.Image.WriteAt(p, off)
		if err == nil && n != len(p) {
			err = io.ErrShortWrite
		}
		return err
	})
}

// Pack writes guest data, whole clusters, compressed.
func (tr *Trial) Pack(off int64, p []byte) {
	tr.t.Helper()
	tr.change(fmt.Sprintf("pack %d+%d", off, len(p)), off, p, false, func() error { return tr.Image.WriteCompressed(p, off) })
}

// Zero makes guest data zeroes.
func (tr *Trial) Zero(off, n int64) {
	tr.t.Helper()
	tr.change(fmt.Sprintf("zero %d+%d", off, n), off, make([]byte, n), false, func() error { return tr.Image.WriteZeroes(off, n) })
}

// Clear makes guest data zeroes, and gives back its space.
func (tr *Trial) Clear(off, n int64) {
	tr.t.Helper()
	tr.change(fmt.Sprintf("clear %d+%d", off, n), off, make([]byte, n), false, func() error { return tr.Image.Clear(off, n) })
}

// Discard discards guest data. What it makes zeroes is the image's to say.
func (tr *Trial) Discard(off, n int64) {
	tr.t.Helper()
	tr.change(fmt.Sprintf("discard %d+%d", off, n), off, make([]byte, n), true, func() error { return tr.Image.Discard(off, n) })
}

// change runs a change of guest data, which makes it p, and checks what it
// leaves. With some any byte of p may be missing.
func (tr *Trial) change(name string, off int64, p []byte, some bool, do func() error) {
	tr.t.Helper()
	if tr.refuses(name, do) {
		return
	}
	lo, end := off&^(blocktest.SectorSize-1), off+int64(len(p))
	hi := min((end+blocktest.SectorSize-1)&^(blocktest.SectorSize-1), int64(len(tr.cur)))
	is := slices.Clone(tr.cur[lo:hi])
	copy(is[off-lo:], p)
	before := tr.now[len(tr.now)-1]
	after := before
	after.leaks = true
	after.writes = append(slices.Clip(before.writes), guestWrite{lo, is})
	tr.now[len(tr.now)-1] = after
	e := tr.mark(name)
	good := tr.try(name, do())
	got := slices.Clone(is)
	if good {
		if err := readFull(tr.Image, got, lo); !tr.try("read", err) {
			copy(got, is)
		}
	}
	for i := range got {
		if got[i] != is[i] && (!some || got[i] != tr.cur[lo+int64(i)]) {
			tr.t.Fatalf("%s: guest byte %d is %#x, expected %#x", name, lo+int64(i), got[i], is[i])
		}
	}
	copy(is, got)
	copy(tr.cur[lo:], is)
	// The first change clears autoclear bits and marks bitmaps; no guest data
	// changes before that.
	if tr.changed && !strings.Contains(before.rest, "bitmap") {
		return
	}
	tr.changed = true
	if rest := tr.below().rest; rest != before.rest {
		before.leaks, after.rest = true, rest
		tr.now = append(tr.now[:len(tr.now)-1], before, after)
		e.alts = slices.Clone(tr.now)
		tr.mark(name)
	}
}

// Sync syncs; all of the guest's changes so far are safe then.
func (tr *Trial) Sync() {
	tr.t.Helper()
	if tr.refuses("sync", tr.Image.Sync) || !tr.try("sync", tr.Image.Sync()) {
		return
	}
	leaks := tr.now[len(tr.now)-1].leaks
	tr.settle()
	if !bytes.Equal(tr.now[0].guest, tr.cur) {
		tr.t.Fatal("sync has not written what the guest reads")
	}
	tr.now[0].leaks = leaks
	tr.mark("synced")
}

// settle makes what is on the devices the only state.
func (tr *Trial) settle() {
	tr.t.Helper()
	o := tr.below()
	tr.now, tr.cur = []outcome{o}, slices.Clone(o.guest)
}

// Do runs an operation that a crash leaves undone or done as a whole. What the
// image is afterwards is taken for right: the caller looks at it.
func (tr *Trial) Do(name string, op func() error) {
	tr.t.Helper()
	tr.do(name, op, false)
}

// DoOrRefuse is Do for an operation that may also be refused, for a reason that
// lies in the image: nothing has changed then.
func (tr *Trial) DoOrRefuse(name string, op func() error) {
	tr.t.Helper()
	tr.do(name, op, true)
}

func (tr *Trial) do(name string, op func() error, refusable bool) {
	tr.t.Helper()
	if tr.refuses(name, op) {
		return
	}
	before := tr.now[len(tr.now)-1].rest
	tr.changed = false
	e := tr.mark(name)
	err := op()
	var option OptionError
	var bitmap *BitmapError
	if refusable && (errors.As(err, &option) || errors.As(err, &bitmap) || errors.Is(err, ErrLimit) || errors.Is(err, ErrNotFound) || errors.Is(err, ErrBitmaps)) {
		if rest := tr.below().rest; rest != before {
			tr.t.Fatalf("%s: %v, and the image has changed:\n%sbefore:\n%s", name, err, rest, before)
		}
		return
	}
	good := tr.try(name, err)
	if good {
		leaks := tr.now[0].leaks
		tr.settle()
		tr.dos = append(tr.dos, tr.now[0])
		after := tr.now[0]
		// What guest writes before it have leaked stays so until it is done.
		after.leaks = leaks
		e.alts = append(e.alts, after)
	} else {
		if n := len(tr.dos); n < len(tr.opts.dos) {
			tr.now = append(tr.now, tr.opts.dos[n])
			tr.now[len(tr.now)-1].leaks = tr.now[0].leaks
		}
		e.alts = slices.Clone(tr.now)
	}
	tr.mark(name + " done")
}

// Refused runs an operation that has to fail and to change nothing; it returns
// the error.
func (tr *Trial) Refused(name string, op func() error) error {
	tr.t.Helper()
	before := tr.below().rest
	tr.mark(name)
	err := op()
	if err == nil {
		tr.t.Fatalf("%s: no error", name)
	}
	if rest := tr.below().rest; rest != before {
		tr.t.Fatalf("%s: %v, and the image has changed:\n%sbefore:\n%s", name, err, rest, before)
	}
	return err
}

// Verify closes the image, looks at all states and returns how many there were.
// It reports the first bad state.
func (tr *Trial) Verify(opts *blocktest.CrashOptions) int {
	tr.t.Helper()
	n, err := tr.TryVerify(opts)
	if err != nil {
		tr.t.Fatal(err)
	}
	return n
}

// close closes the image, which stores the bitmaps that record writes.
func (tr *Trial) close() error {
	before := tr.now[len(tr.now)-1].rest
	e := tr.mark("close")
	err := tr.Image.Close()
	if err != nil {
		return err
	}
	if after := tr.below(); after.rest != before {
		after.leaks = true // of what was written before
		tr.now = append(tr.now, after)
		e.alts = slices.Clone(tr.now)
	}
	return nil
}

// TryVerify is Verify that returns what is wrong.
func (tr *Trial) TryVerify(opts *blocktest.CrashOptions) (n int, err error) {
	if err := tr.close(); err != nil {
		return 0, fmt.Errorf("close: %w", err)
	}
	for s, err := range tr.dev.CrashStates(opts) {
		if err != nil {
			return n, err
		}
		n++
		write := tr.opts.EveryWrite > 0 && n%tr.opts.EveryWrite == 0
		repair := tr.opts.EveryWrite > 0 && n%tr.opts.EveryWrite == tr.opts.EveryWrite-1
		oracle := tr.opts.EveryOracle > 0 && n%tr.opts.EveryOracle == 0
		if repair {
			if err := tr.checkRepair(s.Devs, s.Mark.(*expectation).alts, n/tr.opts.EveryWrite); err != nil {
				return n, fmt.Errorf("state %d: repair: %w\n%v", n, err, s)
			}
		}
		if err := tr.checkState(s.Devs, s.Mark.(*expectation).alts, write, oracle); err != nil {
			return n, fmt.Errorf("state %d: %w\n%v", n, err, s)
		}
	}
	end := outcome{guest: tr.cur, rest: tr.now[len(tr.now)-1].rest}
	if err := tr.checkState(tr.memories(), []outcome{end}, tr.opts.EveryWrite > 0, tr.opts.EveryOracle > 0); err != nil {
		return n, fmt.Errorf("in the end: %w", err)
	}
	return n, nil
}

// trialFaults are the ways in which a call of a device fails, once or for good.
func trialFaults() []blocktest.Fault {
	var list []blocktest.Fault
	for _, sticky := range []bool{false, true} {
		list = append(list,
			blocktest.Fault{Err: syscall.EIO, Sticky: sticky},
			blocktest.Fault{Err: syscall.ENOSPC, Sticky: sticky},
			blocktest.Fault{Err: syscall.ENOSPC, Sticky: sticky, Kind: blocktest.Write, Short: true},
			blocktest.Fault{Err: syscall.EIO, Sticky: sticky, Kind: blocktest.Read, Short: true},
			blocktest.Fault{Err: syscall.EIO, Sticky: sticky, Kind: blocktest.Sync},
		)
	}
	return list
}

// TrialFaults runs work on copies of an image while one call of the device
// after the other fails, in each way that there is: until none fails any more.
// Every change that comes after a failed write or sync has to be refused, with
// that error. What is left then, and what a crash makes of it, has to be as
// Trial says. It returns how many runs there were.
//
// The work is to be the same each time. step is 1, or larger to leave out calls
// between those that fail.
func TrialFaults(t testing.TB, dev *blockdev.Memory, opts *TrialOptions, step int, work func(tr *Trial)) int {
	t.Helper()
	o := TrialOptions{}
	if opts != nil {
		o = *opts
	}
	o.EveryOracle, o.EveryWrite = -1, 1
	run := func(fault *blocktest.Fault) *Trial {
		o.fault = fault
		mine := o
		if o.Data != nil {
			mine.Data = o.Data.Clone()
		}
		tr := NewTrial(t, dev.Clone(), &mine)
		if tr.failed == nil {
			work(tr)
		}
		return tr
	}
	good := run(nil)
	if _, err := good.TryVerify(&blocktest.CrashOptions{AtEnd: true}); err != nil {
		t.Fatalf("without a fault: %v", err)
	}
	o.dos = good.dos
	runs := 0
	faults := trialFaults()
	if o.Data != nil {
		faults = append(faults, faults...)
	}
	for i, fault := range faults {
		o.failing = i / len(trialFaults())
		for fault.Call = 1 + i%step; ; fault.Call += step {
			tr := run(&fault)
			runs++
			if !tr.faulty.Fired() {
				break
			}
			if err := tr.checkFault(); err != nil {
				t.Fatalf("%v fails, %+v, %v: %v", tr.faulty.FiredKind(), fault, tr.failed, err)
			}
		}
	}
	return runs
}

// checkFault looks at what work has left that met a fault.
func (tr *Trial) checkFault() error {
	if tr.Image != nil {
		err := tr.close()
		if tr.failed == nil {
			// It is the close that failed, or a read that nobody needed.
			if err != nil && !errors.Is(err, tr.opts.fault.Err) {
				return fmt.Errorf("close: %w", err)
			}
		} else if err == nil && tr.faulty.FiredKind() != blocktest.Read {
			return errors.New("close: no error")
		}
	}
	for s, err := range tr.dev.CrashStates(&blocktest.CrashOptions{AtEnd: true, Subsets: 8, Tears: 1}) {
		if err != nil {
			return err
		}
		if err := tr.checkState(s.Devs, s.Mark.(*expectation).alts, false, false); err != nil {
			return fmt.Errorf("%w\n%v", err, s)
		}
	}
	return tr.checkState(tr.memories(), tr.now, true, false)
}

// memories returns what the recorded devices hold now.
func (tr *Trial) memories() []*blockdev.Memory {
	list := []*blockdev.Memory{tr.memory(tr.dev)}
	if tr.data != nil {
		list = append(list, tr.memory(tr.data))
	}
	return list
}

// memory returns what a recorded device holds now.
func (tr *Trial) memory(r *blocktest.Recorder) *blockdev.Memory {
	var m *blockdev.Memory
	for state, err := range r.States() {
		if err != nil {
			tr.t.Fatal(err)
		}
		m = state
	}
	return m
}

// checkState looks at one state.
func (tr *Trial) checkState(ms []*blockdev.Memory, alts []outcome, write, oracle bool) error {
	devs := make([]blockdev.Device, len(ms))
	for i, d := range ms {
		devs[i] = d
	}
	im, err := tr.open(false, devs...)
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	defer func() { im.Close() }()
	if im.Header().IncompatibleFeatures&IncompatDirty != 0 {
		im.Close()
		if im, err = tr.open(true, devs...); err == nil {
			err = im.Close()
		}
		if err != nil {
			return fmt.Errorf("repair of a dirty image: %w", err)
		}
		if im, err = tr.open(false, devs...); err != nil {
			return fmt.Errorf("open after repair: %w", err)
		}
	}
	leaks, err := CheckLeaks(tr.t, im)
	if err != nil {
		return err
	}
	guest, err := readImage(im)
	if err != nil {
		return err
	}
	rest, err := tr.digest(im, devs)
	if err != nil {
		return err
	}
	err = errors.New("no expectation")
	for _, alt := range alts {
		if err = alt.matches(guest, rest, leaks); err == nil {
			break
		}
	}
	if err != nil {
		return err
	}
	if oracle {
		if err := tr.askQEMU(ms, leaks > 0); err != nil {
			return err
		}
	}
	if !write {
		return nil
	}
	if err := tr.writeOn(devs, guest); err != nil {
		return fmt.Errorf("write to what is left: %w", err)
	}
	return nil
}

// checkRepair repairs a state while one call of the device fails, by seed, and
// repairs what that leaves.
func (tr *Trial) checkRepair(ms []*blockdev.Memory, alts []outcome, seed int) error {
	faults := trialFaults()
	fault := faults[seed%len(faults)]
	fault.Call = 1 + seed/len(faults)%8
	if fault.Kind == blocktest.Read || fault.Kind == 0 {
		fault.Call = 1 + seed/len(faults)%40
	}
	ms = slices.Clone(ms)
	ms[0] = ms[0].Clone()
	bad := blocktest.NewFaulty(ms[0], fault)
	res, err := Repair(tr.t.Context(), bad, nil)
	if bad.Fired() {
		tr.RepairFaults++
	}
	switch {
	case err != nil && !(bad.Fired() && errors.Is(err, fault.Err)):
		return err
	case err == nil && bad.Fired() && bad.FiredKind() != blocktest.Read:
		return fmt.Errorf("no error although %v failed", bad.FiredKind())
	}
	if err := tr.checkState(ms, alts, false, false); err != nil {
		return fmt.Errorf("after %+v: %w", fault, err)
	}
	if res, err = Repair(tr.t.Context(), ms[0], nil); err != nil || !res.Clean() {
		return fmt.Errorf("once more: %v, %+v", err, res)
	}
	alts = slices.Clone(alts)
	for i := range alts {
		alts[i].leaks = false
	}
	return tr.checkState(ms, alts, false, false)
}

// matches compares what was found with an outcome.
func (o *outcome) matches(guest []byte, rest string, leaks int64) error {
	if rest != o.rest {
		return fmt.Errorf("the image is\n%snot\n%s", rest, o.rest)
	}
	if leaks > 0 && !o.leaks {
		return fmt.Errorf("%d leaked clusters", leaks)
	}
	if len(guest) != len(o.guest) {
		return fmt.Errorf("guest of %d bytes, expected %d", len(guest), len(o.guest))
	}
	for off := 0; off < len(guest); off += blocktest.SectorSize {
		end := min(off+blocktest.SectorSize, len(guest))
		got := guest[off:end]
		ok := bytes.Equal(got, o.guest[off:end])
		for i := 0; !ok && i < len(o.writes); i++ {
			w := o.writes[i]
			ok = w.off <= int64(off) && int64(off) < w.off+int64(len(w.bytes)) && bytes.Equal(got, w.bytes[int64(off)-w.off:int64(end)-w.off])
		}
		if !ok {
			return fmt.Errorf("guest sector at %d is neither as before nor as written: %x..., before %x...", off, got[:16], o.guest[off:off+16])
		}
	}
	return nil
}

// writeOn uses the image that a crash has left.
func (tr *Trial) writeOn(devs []blockdev.Device, guest []byte) error {
	im, err := tr.open(true, devs...)
	if err != nil {
		return err
	}
	guest = slices.Clone(guest)
	for i, n := range []int{700, 5000, len(guest) / 3} {
		off := len(guest) * i / 3 &^ 511
		p := guest[off:min(off+n, len(guest))]
		for j := range p {
			p[j] = byte(i + 1)
		}
		if _, err := im.WriteAt(p, int64(off)); err != nil {
			im.Close()
			return err
		}
	}
	if err := im.Close(); err != nil {
		return err
	}
	if im, err = tr.open(false, devs...); err != nil {
		return err
	}
	defer im.Close()
	if _, err := CheckLeaks(tr.t, im); err != nil {
		return err
	}
	got, err := readImage(im)
	if err == nil && !bytes.Equal(got, guest) {
		err = errors.New("the guest reads something else than was written")
	}
	return err
}

// askQEMU lets qemu-img judge a state, unless there is an external data file.
func (tr *Trial) askQEMU(ms []*blockdev.Memory, leaks bool) error {
	if len(ms) > 1 {
		return nil
	}
	path := filepath.Join(tr.t.TempDir(), "state.qcow2")
	defer os.Remove(path)
	if err := os.WriteFile(path, memoryBytes(ms[0]), 0o600); err != nil {
		return err
	}
	want := 0
	if leaks {
		want = 3
	}
	args := []string{"check", "-f", "qcow2", path}
	if secret := tr.opts.Open.Secret; secret != nil {
		passphrase, err := secret(SecretRequest{})
		if err != nil {
			return err
		}
		args = []string{"check", "--object", "secret,id=s,data=" + string(passphrase), "--image-opts", "driver=qcow2,encrypt.key-secret=s,file.filename=" + strings.ReplaceAll(path, ",", ",,")}
	}
	if r := oracle.Run(tr.t, "qemu-img", args...); r.Code != want {
		return fmt.Errorf("qemu-img check: exit %d, expected %d\n%s%s", r.Code, want, r.Stdout, r.Stderr)
	}
	return nil
}

func memoryBytes(m *blockdev.Memory) []byte {
	b := make([]byte, m.Size())
	if n, err := m.ReadAt(b, 0); n != len(b) {
		panic(err)
	}
	return b
}

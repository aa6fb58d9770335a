package qcow2

import (
	"context"
	"errors"
	"fmt"
	"iter"

	"qimg/qcow2/blockdev"
)

// Preallocation is how much of a new image gets its place at once.
type Preallocation uint8

// Kinds of preallocation.
const (
	PreallocationOff      Preallocation = iota // nothing
	PreallocationMetadata                      // a host cluster for every guest cluster, left as a hole
	PreallocationFalloc                        // as metadata, and space for them is reserved, or else zeroes are written
	PreallocationFull                          // as metadata, and zeroes are written to them
)

func (p Preallocation) String() string {
	switch p {
	case PreallocationOff:
		return "off"
	case PreallocationMetadata:
		return "metadata"
	case PreallocationFalloc:
		return "falloc"
	case PreallocationFull:
		return "full"
	}
	return fmt.Sprintf("Preallocation(%d)", uint8(p))
}

// CreateOptions says what empty image Create makes.
type CreateOptions struct {
	FormatOptions
	// Preallocation other than off cannot be used with a backing file unless
	// ExtendedL2 is set.
	Preallocation Preallocation

	// DataFile is the name, as it is stored, of an external data file, and
	// Data that file, which Create gives the size of the disk, by Truncate if
	// it can; version 3 only.
	DataFile string
	// Data has to read as zeroes, like the image: the guest sees what is in it.
	Data blockdev.Device
	// DataFileRaw keeps the data file a raw image of the disk by itself. All
	// metadata is preallocated, and there can be no backing file.
	DataFileRaw bool

	// Progress is told how many of the zeroes that preallocation writes have
	// been written, by the goroutine that called Create. Nil: nobody is told.
	Progress func(done, total int64)
}

// Create makes an empty image of size bytes, rounded up to a multiple of 512,
// on dst, as qemu-img create does. For dst see Writer. Options that do not go
// together are an OptionError.
//
// An encrypted image of version 2 cannot say that preallocated clusters are
// zero: they read as what zeroes decrypt to, as in QEMU.
//
// Order of writes: tables, preallocated data, the data file's size, the header
// last. Create does not sync.
func Create(ctx context.Context, dst blockdev.Device, size int64, opts *CreateOptions) error {
	if opts == nil {
		opts = &CreateOptions{}
	}
	prealloc := opts.Preallocation
	h, err := opts.header(size)
	switch {
	case err != nil:
		return err
	case prealloc > PreallocationFull:
		return optionError("Unsupported preallocation mode '%s'", prealloc)
	case prealloc != PreallocationOff && opts.BackingFile != "" && !opts.ExtendedL2:
		return OptionError("Backing file and preallocation can only be used at the same time if extended_l2 is on")
	case opts.DataFileRaw && opts.DataFile == "":
		return OptionError("data-file-raw requires data-file")
	case opts.DataFileRaw && opts.BackingFile != "":
		return OptionError("Backing file and data-file-raw cannot be used at the same time")
	case opts.DataFile != "" && h.Version == 2:
		return needsV3("External data files are only supported with")
	case len(opts.DataFile) > maxDataFileSize:
		return optionError("Name of the data file has %d bytes, at most %d are allowed", len(opts.DataFile), maxDataFileSize)
	case opts.DataFile != "" && opts.Data == nil:
		return OptionError("data-file names a file that was not given")
	}
	if opts.DataFile != "" {
		h.IncompatibleFeatures |= IncompatDataFile
		h.Extensions = append(h.Extensions, Extension{extDataFile, []byte(opts.DataFile)})
	}
	if opts.DataFileRaw {
		h.AutoclearFeatures |= AutoclearDataFileRaw
		prealloc = max(prealloc, PreallocationMetadata)
	}
	h.addFeatureNames()
	if _, err := h.firstCluster(); err != nil {
		return err
	}

	w, err := newWriter(dst, h, &opts.FormatOptions)
	if err != nil {
		return err
	}
	if prealloc != PreallocationOff {
		w.plan, err = newPlan(extents(0, w.Size()), w.Size(), w.geo.clusterBits, true)
		if err != nil {
			return err
		}
	}
	// The subclusters of preallocated clusters stay unallocated: a backing
	// file shows through. Without them, what is preallocated of an encrypted
	// image has to be said to be zero: decrypted, its zeroes are none.
	const bitmap = 0
	flags := uint64(0)
	if w.crypt != nil && h.Version >= 3 && !opts.ExtendedL2 {
		flags = oflagZero
	}
	if opts.DataFile != "" {
		same := func(cluster, _ int64) int64 { return cluster << w.geo.clusterBits }
		if err := w.writeTables(ctx, same, 0, flags, bitmap); err != nil {
			return err
		}
		if err := sizeDataFile(opts.Data, w.Size()); err != nil {
			return err
		}
		if err := setAside(ctx, opts.Data, 0, w.Size(), prealloc, opts.Progress); err != nil {
			return err
		}
		return w.Finish()
	}
	clusters := w.plan.clusters()
	if err := w.writeTables(ctx, w.host, clusters, flags, bitmap); err != nil {
		return err
	}
	if err := setAside(ctx, dst, w.host(0, 0), clusters<<w.geo.clusterBits, prealloc, opts.Progress); err != nil {
		return err
	}
	return w.Finish()
}

// sizeDataFile gives an external data file the size of the disk. One that
// cannot change its size has to be large enough.
func sizeDataFile(d blockdev.Device, size int64) error {
	if d.Size() == size {
		return nil
	}
	if t, ok := d.(blockdev.Truncater); ok {
		if err := t.Truncate(size); !errors.Is(err, errors.ErrUnsupported) {
			return err
		}
	}
	if d.Size() < size {
		return fmt.Errorf("qcow2: data file of %d bytes, expected %d at least", d.Size(), size)
	}
	return nil
}

// setAside preallocates n bytes at off, which read as zeroes.
func setAside(ctx context.Context, d blockdev.Device, off, n int64, prealloc Preallocation, progress func(done, total int64)) error {
	switch {
	case n == 0:
		return nil // the device may end before off
	case prealloc == PreallocationFalloc:
		return blockdev.AllocateZeroes(ctx, d, off, n, progress)
	case prealloc == PreallocationFull:
		return blockdev.FillZeroes(ctx, d, off, n, progress)
	}
	return nil
}

// extents is a sequence of one extent.
func extents(off, n int64) iter.Seq2[int64, int64] {
	return func(yield func(int64, int64) bool) { yield(off, n) }
}

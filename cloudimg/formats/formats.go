// Package formats opens disk images by the name of their format or by their magic
// number: raw, qcow2 and, for reading only, the formats that other machines use.
//
//	format  read                                    refused
//	vmdk    monolithicSparse, streamOptimized       descriptors of other files, parents, COWD
//	vdi     dynamic, static                         differencing images, blocks other than 1 MiB
//	vpc     VHD, dynamic and fixed                  differencing images
//	vhdx    dynamic, fixed                          differencing images, a log that is not empty
//	gzip    raw disks that are compressed,          what package decomp does not know
//	xz      by way of a temporary file
//	zstd
//	bzip2
//
// What QEMU 7.2 reads of these is read to the same bytes. An image never leads to
// another file: one that needs a parent, or names the files that its data lies in,
// is refused. Of qcow2 images the backing file and the data file are refused, too;
// package qcow2 opens those.
//
// Each image is a blockdev.Reader whose extents tell holes from data, and where in
// the file the data lies. Tables are read through caches of bounded size, so that
// opening an image takes the same time and memory whatever its size.
package formats

import (
	"context"
	"errors"
	"fmt"
	"io"

	"qimg/cloudimg/decomp"
	"qimg/qcow2"
	"qimg/qcow2/blockdev"
)

// Names of formats, in QEMU's words where it has some.
const (
	Raw   = "raw"
	QCOW2 = "qcow2"
	VMDK  = "vmdk"
	VDI   = "vdi"
	VPC   = "vpc" // VHD of Virtual PC
	VHDX  = "vhdx"
	// Raw disks that are compressed as a whole.
	Gzip  = decomp.Gzip
	XZ    = decomp.XZ
	Zstd  = decomp.Zstd
	Bzip2 = decomp.Bzip2
)

// Detect names the format of an image by its magic number: one of the names of
// this package, another word of QEMU for a format that this package does not
// read, or Raw where there is no magic number that is known. A fixed VPC image
// has none at its beginning and is Raw, as for QEMU.
//
// A guest can write what it likes at the beginning of a raw disk: what Detect
// says of one is what the guest wants it to say.
func Detect(r io.ReaderAt) (string, error) {
	format, err := qcow2.Probe(r)
	if err == nil && format == Raw {
		if format, err = decomp.Detect(r); format == "" {
			format = Raw
		}
	}
	return format, err
}

// Foreign lists the formats besides raw and qcow2, for which an Image is the only
// way to them.
func Foreign() []string { return []string{VMDK, VDI, VPC, VHDX, Gzip, XZ, Zstd, Bzip2} }

// Options says how an image is opened.
type Options struct {
	// Format is the name of the format; "" means that of Detect. Where an image
	// comes from somebody else who cannot choose the format, name it.
	Format string
	// TempDir is the folder for the temporary file of a compressed image, which
	// is as large as the data in its content. Without it such an image is
	// refused.
	TempDir string
	// MaxSize bounds the content of a compressed image in bytes, as that of
	// decomp.Options does; what has more is a *decomp.SizeError. It is for no
	// other format.
	MaxSize int64
}

// Image is an image that is open for reading. ReadAt and NextExtent are safe for
// concurrent use. NextExtent of raw images is that of their file.
type Image struct {
	disk      blockdev.Reader
	format    string
	blockSize int64
	vmdk      *VMDKInfo
	closers   []io.Closer
}

// New opens the image in file. Close leaves file open. Memory is that of the
// caches, a few MiB whatever the image says, but up to 24 MiB, and 3 MiB for each
// read that goes on, where a VMDK image has compressed grains of 1 MiB.
//
// An image that is compressed as a whole is decompressed to its end, which ctx can
// stop, and checked; memory is that of package decomp then. If its format was found
// by Detect its content has to be a raw disk; if it was named the content is taken
// for one.
//
// Of the errors see the variables of this package; an image that needs other
// files is refused with one that matches ErrReference.
func New(ctx context.Context, file blockdev.Reader, opts *Options) (*Image, error) {
	if opts == nil {
		opts = &Options{}
	}
	format := opts.Format
	if format == "" {
		var err error
		if format, err = Detect(file); err != nil {
			return nil, err
		}
	}
	switch format {
	case Raw:
		return &Image{disk: file, format: Raw}, nil
	case QCOW2:
		im, err := qcow2.New(file, nil)
		if err != nil {
			return nil, err
		}
		h := im.Header()
		return &Image{disk: im, format: QCOW2, blockSize: h.ClusterSize(), closers: []io.Closer{im}}, nil
	case VMDK:
		return openVMDK(file)
	case VDI:
		return openVDI(file)
	case VPC:
		return openVPC(file)
	case VHDX:
		return openVHDX(file)
	case Gzip, XZ, Zstd, Bzip2:
		return openCompressed(ctx, file, format, opts)
	}
	return nil, fmt.Errorf("image format %q: %w", format, ErrUnsupported)
}

func openCompressed(ctx context.Context, file blockdev.Reader, format string, opts *Options) (*Image, error) {
	d, err := decomp.Open(ctx, file, opts.TempDir, &decomp.Options{Format: format, MaxSize: opts.MaxSize})
	if err != nil {
		return nil, err
	}
	if opts.Format == "" {
		inner, err := Detect(d)
		if err == nil && inner != Raw {
			err = fmt.Errorf("%s: the content is in format %s: only raw disks are read from within: %w", format, inner, ErrUnsupported)
		}
		if err != nil {
			return nil, errors.Join(err, d.Close())
		}
	}
	return &Image{disk: d, format: format, closers: []io.Closer{d}}, nil
}

// Open opens the image in the file at path, with the lock of a reader. Close
// closes the file.
func Open(ctx context.Context, path string, opts *Options) (*Image, error) {
	f, err := blockdev.OpenFile(path, nil)
	if err != nil {
		return nil, err
	}
	im, err := New(ctx, f, opts)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	im.closers = append(im.closers, f)
	return im, nil
}

// Format returns the name of the format.
func (im *Image) Format() string { return im.format }

// Size returns the virtual size in bytes.
func (im *Image) Size() int64 { return im.disk.Size() }

// BlockSize returns the size of the units that the format allocates, in bytes; 0
// if it has none.
func (im *Image) BlockSize() int64 { return im.blockSize }

// ReadAt implements io.ReaderAt.
func (im *Image) ReadAt(p []byte, off int64) (int, error) { return im.disk.ReadAt(p, off) }

// NextExtent implements blockdev.ExtentReader. Bytes that lie unchanged in the
// file of the image have it as their Host.
func (im *Image) NextExtent(off int64) (blockdev.Extent, error) {
	return blockdev.NextExtent(im.disk, off)
}

// Close gives back what the image has taken. Close of an image that is closed
// does nothing.
func (im *Image) Close() error {
	var errs []error
	for _, c := range im.closers {
		errs = append(errs, c.Close())
	}
	im.closers = nil
	return errors.Join(errs...)
}

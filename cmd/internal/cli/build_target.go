package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"qimg/cmd/internal/term"
	"qimg/ext4img"
	"qimg/qcow2"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/transfer"
)

// buildTarget is where build writes a disk: a new file, a block device, or a pipe.
type buildTarget struct {
	host   Host
	output string               // as it was given
	qcow2  *qcow2.WriterOptions // nil: raw
	device *blockdev.File       // nil: no block device
	stream bool
}

// newTarget reads the options of the output, and opens it if it is a block
// device.
func (o *buildOptions) newTarget(host Host, given func(flag string) bool, output string) (*buildTarget, error) {
	t := &buildTarget{host: host, output: output, stream: output == "-" || isPipe(output)}
	if err := o.parseFormat(t, given); err != nil {
		return nil, err
	}
	info, err := os.Stat(output)
	isDevice := err == nil && info.Mode()&(os.ModeDevice|os.ModeCharDevice) == os.ModeDevice
	switch {
	case o.inPlace && !isDevice:
		return nil, fmt.Errorf("-n goes with a block device only, which %s is not", output)
	case isDevice && !o.inPlace:
		return nil, withHint(fmt.Errorf("%s is a block device", output), "Use -n to overwrite all that it holds.\n")
	case isDevice && t.qcow2 != nil:
		return nil, fmt.Errorf("%s is a block device, which takes -f raw only", output)
	case t.stream && t.qcow2 != nil:
		return nil, errors.New("an image of format 'qcow2' cannot be written to a pipe: it needs a file; raw can")
	case isDevice:
		return t, t.openDevice()
	case !t.stream:
		// An output that cannot be made is found before the source is read.
		out, err := newFile(output, nil)
		if err != nil {
			return nil, t.error(err)
		}
		return t, t.error(out.Abort())
	}
	return t, nil
}

// parseFormat finds the format, and reads the options of qcow2.
func (o *buildOptions) parseFormat(t *buildTarget, given func(flag string) bool) error {
	format := o.format
	if format == "" {
		switch ext := strings.ToLower(filepath.Ext(t.output)); {
		case ext == ".qcow2":
			format = "qcow2"
		case ext == ".raw" || ext == ".img" || ext == ".ext4", t.stream, o.inPlace:
			format = "raw"
		default:
			return fmt.Errorf("%s: the extension does not tell the format: it is .qcow2, or .raw, .img, .ext4; otherwise use -f qcow2 or -f raw", t.output)
		}
	}
	switch format {
	case "raw":
		for _, flag := range []string{"compress", "compression", "compat", "cluster-size"} {
			if given(flag) {
				return fmt.Errorf("--%s goes with qcow2 only", flag)
			}
		}
		return nil
	case "qcow2":
	default:
		return messagef("Unknown file format '%s'", format)
	}
	if given("compression") && !o.compress {
		return errors.New("--compression goes with -c only")
	}
	cluster, err := sizeArg("cluster size", o.clusterSize)
	if err != nil {
		return err
	}
	create := qcow2.FormatOptions{}
	if create.ClusterSize, err = clusterSize(uint64(cluster)); err != nil {
		return err
	}
	if create.Version, err = parseCompat(o.compat); err != nil {
		return fmt.Errorf("--compat is 0.10 or 1.1, not '%s'", o.compat)
	}
	if create.Compression, err = parseCompression(o.compression); err != nil {
		return fmt.Errorf("--compression is zlib or zstd, not '%s'", o.compression)
	}
	t.qcow2 = &qcow2.WriterOptions{FormatOptions: create, Compress: o.compress}
	return nil
}

// openDevice opens a block device that nobody else uses: Linux refuses O_EXCL
// where it, or a partition of it, is mounted or part of another device.
func (t *buildTarget) openDevice() error {
	f, err := os.OpenFile(t.output, os.O_RDWR|os.O_EXCL, 0)
	if errors.Is(err, syscall.EBUSY) {
		return withHint(fmt.Errorf("%s is in use", t.output), "Is it, or a partition of it, mounted?\n")
	}
	if err != nil {
		return openError(t.output, err)
	}
	if t.device, err = blockdev.NewFile(f, &blockdev.FileOptions{Write: true}); err != nil {
		f.Close()
		return openError(t.output, err)
	}
	return nil
}

// close gives back a device.
func (t *buildTarget) close() {
	if t.device != nil {
		t.device.Close()
	}
}

// size is how large the disk has to be; 0: as it turns out.
func (t *buildTarget) size() int64 {
	if t.device == nil {
		return 0
	}
	return t.device.Size()
}

// error names the output, unless the error does so already.
func (t *buildTarget) error(err error) error {
	if err == nil || strings.Contains(err.Error(), t.output) || errors.Is(err, context.Canceled) {
		return err
	}
	return prefixError(t.output, err)
}

// report prints a line about what was made, unless that is on standard output.
func (t *buildTarget) report(format string, args ...any) {
	if t.output != "-" {
		fmt.Fprintf(t.host.Out, format+"\n", args...)
	}
}

// writeLayout writes a disk that is one file system.
func (t *buildTarget) writeLayout(ctx context.Context, layout *ext4img.Layout, progress *term.Progress, source func(error) error) error {
	if t.device != nil || t.stream {
		return t.writeDisk(ctx, &sourceReader{layout.Reader(), source}, progress)
	}
	err := t.writeFile(ctx, func(f *blockdev.File) error {
		opts := &ext4img.WriteOptions{Progress: progress.Update}
		if t.qcow2 == nil {
			if err := f.Truncate(layout.Size()); err != nil {
				return err
			}
			return layout.Write(ctx, f, opts)
		}
		t.qcow2.Extents = layout.Extents()
		img, err := qcow2.NewWriter(ctx, f, layout.Size(), t.qcow2)
		if err != nil {
			return err
		}
		defer img.Abort()
		if err := layout.Write(ctx, img, opts); err != nil {
			return err
		}
		return img.Finish()
	})
	// What is wrong with the source names a path below it, the rest is about
	// the output.
	if pe := (*fs.PathError)(nil); err != nil && (!errors.As(err, &pe) || filepath.IsAbs(pe.Path)) {
		return t.error(err)
	}
	return source(err)
}

// writeDisk writes a disk that is read. What is wrong with its sources it says
// itself.
func (t *buildTarget) writeDisk(ctx context.Context, disk blockdev.Reader, progress *term.Progress) error {
	opts := &transfer.Options{Progress: progress.Update}
	var err error
	switch {
	case t.stream:
		err = t.writeStream(ctx, disk, opts)
	case t.device != nil:
		// A call for each short run of zeroes would take longer than writing it.
		opts.Sparse = transfer.BufferSize
		if err = transfer.Copy(ctx, t.device, disk, opts); err == nil {
			err = t.device.Sync()
		}
	default:
		err = t.writeFile(ctx, func(f *blockdev.File) error {
			opts.TargetIsZero = true
			if t.qcow2 == nil {
				if err := f.Truncate(disk.Size()); err != nil {
					return err
				}
				return transfer.Copy(ctx, f, disk, opts)
			}
			t.qcow2.InOrder = true
			img, err := qcow2.NewWriter(ctx, f, disk.Size(), t.qcow2)
			if err != nil {
				return err
			}
			defer img.Abort()
			if err := transfer.Copy(ctx, img, disk, opts); err != nil {
				return err
			}
			return img.Finish()
		})
	}
	var read *transfer.ReadError
	if errors.As(err, &read) {
		return read.Err
	}
	return t.error(err)
}

// writeFile makes a new file, complete or not at all.
func (t *buildTarget) writeFile(ctx context.Context, write func(f *blockdev.File) error) error {
	out, err := newFile(t.output, &blockdev.CreateOptions{Stream: true})
	if err != nil {
		return err
	}
	defer out.Abort()
	if err := write(out.File()); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return out.Commit()
}

func (t *buildTarget) writeStream(ctx context.Context, disk blockdev.Reader, opts *transfer.Options) error {
	if t.output == "-" {
		w, err := imageWriter(t.host.Out)
		if err != nil {
			return err
		}
		return transfer.Stream(ctx, w, disk, opts)
	}
	pipe, err := unlessDone(ctx, 0, func() (*os.File, error) { return os.OpenFile(t.output, os.O_WRONLY, 0) })
	if err != nil {
		return err
	}
	w, err := imageWriter(newOutput(ctx, pipe))
	if err == nil {
		err = transfer.Stream(ctx, w, disk, opts)
	}
	return errors.Join(err, pipe.Close())
}

// sourceReader is a disk that is read from sources, whose errors are named as the
// user knows them.
type sourceReader struct {
	blockdev.Reader
	name func(error) error
}

func (r *sourceReader) ReadAt(p []byte, off int64) (int, error) {
	n, err := r.Reader.ReadAt(p, off)
	if err != nil && n < len(p) {
		err = r.name(err)
	}
	return n, err
}

func (r *sourceReader) NextExtent(off int64) (blockdev.Extent, error) {
	return blockdev.NextExtent(r.Reader, off)
}

package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime"
	"sync"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
)

// exportSnapshot writes the disk and the vm state of a snapshot to files.
func exportSnapshot(ctx context.Context, host Host, o *snapshotOptions, name string) error {
	if o.disk == "" && o.vmState == "" {
		return usagef("--export needs --disk, --vmstate or both")
	}
	o.open.snapshot = o.action.tag
	img, err := openImage(ctx, name, &o.open)
	if err != nil {
		if errors.Is(err, qcow2.ErrNotFound) {
			return messagef("Could not export snapshot '%s': snapshot not found", o.action.tag)
		}
		return couldNotOpen(name, err)
	}
	defer img.close()
	if img.qcow2 == nil {
		return messagef("Could not export snapshot '%s': Block driver does not support snapshots", o.action.tag)
	}
	if err := o.export(ctx, host, img.qcow2); err != nil {
		return prefixError(fmt.Sprintf("Could not export snapshot '%s'", o.action.tag), err)
	}
	return nil
}

// export makes both files or neither.
func (o *snapshotOptions) export(ctx context.Context, host Host, img *qcow2.Image) error {
	var outs []*blockdev.Output
	create := func(path string) (*blockdev.File, error) {
		out, err := newFile(path, &blockdev.CreateOptions{Stream: true})
		if err != nil {
			return nil, err
		}
		outs = append(outs, out)
		return out.File(), nil
	}
	defer func() {
		for _, out := range outs {
			out.Abort()
		}
	}()
	if o.disk != "" {
		f, err := create(o.disk)
		if err != nil {
			return err
		}
		if err := exportDisk(ctx, f, img); err != nil {
			return err
		}
	}
	if o.vmState != "" {
		state, err := img.VMState()
		if err != nil {
			return err
		}
		if state.Size() == 0 {
			return errors.New("it has no vm state, it is one of the disk alone")
		}
		if o.vmState == "-" {
			var w io.Writer
			if w, err = imageWriter(host.Out); err == nil {
				_, err = io.Copy(contextWriter{ctx, w}, io.NewSectionReader(state, 0, state.Size()))
			}
		} else {
			var f *blockdev.File
			if f, err = create(o.vmState); err == nil {
				if err = f.Truncate(state.Size()); err == nil {
					err = copyExtents(ctx, f, state, state)
				}
			}
		}
		if err != nil {
			return err
		}
	}
	return commitAll(outs)
}

// commitAll gives new files their names. What can fail without harm, does so
// before the first has its name; if a later one fails then, those that took no
// older file's place are removed again.
func commitAll(outs []*blockdev.Output) error {
	if len(outs) > 1 {
		for _, out := range outs {
			if err := out.File().Sync(); err != nil {
				return err
			}
		}
	}
	var made []string
	for _, out := range outs {
		path := out.File().Name()
		_, err := os.Lstat(path)
		isNew := errors.Is(err, fs.ErrNotExist)
		if err := out.Commit(); err != nil {
			for _, path := range made {
				err = errors.Join(err, os.Remove(path))
			}
			return err
		}
		if isNew {
			made = append(made, path)
		}
	}
	return nil
}

// exportDisk writes what img reads as a new image without a backing file.
func exportDisk(ctx context.Context, f *blockdev.File, img *qcow2.Image) error {
	h := img.Header()
	var failed error
	w, err := qcow2.NewWriter(ctx, f, img.Size(), &qcow2.WriterOptions{
		FormatOptions: qcow2.FormatOptions{Version: int(h.Version), ClusterSize: h.ClusterSize()},
		Extents: func(yield func(int64, int64) bool) {
			failed = eachExtent(ctx, img, img.Size(), yield)
		},
	})
	if err = errors.Join(failed, err); err != nil {
		return err
	}
	defer w.Abort()
	if err := copyExtents(ctx, w, img, img); err != nil {
		return err
	}
	return w.Finish()
}

// eachExtent calls f with offset and length of every range that has to be
// read, until it returns false.
func eachExtent(ctx context.Context, src blockdev.ExtentReader, size int64, f func(off, n int64) bool) error {
	for off := int64(0); off < size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		e, err := src.NextExtent(off)
		if err != nil {
			return err
		}
		if !e.Kind.ReadsZero() && !f(off, e.Len) {
			return nil
		}
		off += e.Len
	}
	return nil
}

// copyStep is how much is read at once, in bytes.
const copyStep = 1 << 20

// copyExtents writes what src does not read as zeroes to the same place of dst,
// on all cores. Both have to be safe for concurrent use.
func copyExtents(ctx context.Context, dst io.WriterAt, src blockdev.Reader, extents blockdev.ExtentReader) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	type part struct{ off, n int64 }
	parts := make(chan part)
	var workers sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), 8) {
		workers.Go(func() {
			buf := make([]byte, copyStep)
			for p := range parts {
				if ctx.Err() != nil {
					continue
				}
				b := buf[:p.n]
				_, err := src.ReadAt(b, p.off)
				if err == nil || err == io.EOF {
					_, err = dst.WriteAt(b, p.off)
				}
				if err != nil {
					cancel(err)
				}
			}
		})
	}
	err := eachExtent(ctx, extents, src.Size(), func(off, n int64) bool {
		for n > 0 && ctx.Err() == nil {
			// A step ends at a multiple of its size, so that clusters are read once.
			step := min(n, copyStep-off%copyStep)
			parts <- part{off, step}
			off, n = off+step, n-step
		}
		return ctx.Err() == nil
	})
	close(parts)
	workers.Wait()
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

// contextWriter stops writing once ctx is done.
type contextWriter struct {
	ctx context.Context
	w   io.Writer
}

func (w contextWriter) Write(p []byte) (int, error) {
	if err := w.ctx.Err(); err != nil {
		return 0, err
	}
	return w.w.Write(p)
}

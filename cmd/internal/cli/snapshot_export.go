package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/transfer"
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
				err = transfer.Stream(ctx, w, state, nil)
			}
		} else {
			var f *blockdev.File
			if f, err = create(o.vmState); err == nil {
				if err = f.Truncate(state.Size()); err == nil {
					err = transfer.Copy(ctx, f, state, &transfer.Options{TargetIsZero: true})
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
	w, err := qcow2.NewWriter(ctx, f, img.Size(), &qcow2.WriterOptions{
		FormatOptions: qcow2.FormatOptions{Version: int(h.Version), ClusterSize: h.ClusterSize()}, InOrder: true,
	})
	if err != nil {
		return err
	}
	defer w.Abort()
	if err := transfer.Copy(ctx, w, img, nil); err != nil {
		return err
	}
	return w.Finish()
}

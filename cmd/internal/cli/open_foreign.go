package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"

	"qimg/cloudimg/formats"
)

// openForeign opens an image in a format that is only read.
func (o *opening) openForeign(img, file *image, opts blockOptions, _ bool) error {
	switch {
	case o.below:
		return fmt.Errorf("it is in format %s; qimg reads backing files in qcow2 and raw", img.format)
	case o.write:
		return fmt.Errorf("it is in format %s, which qimg reads and does not write (with -f raw it is taken byte by byte)", img.format)
	case o.chain && (opts["backing"] != nil || len(opts.take("backing.")) > 0):
		return messagef("Driver doesn't support backing files")
	}
	ctx := o.host.ctx
	if ctx == nil {
		ctx = context.Background()
	}
	var err error
	fo := &formats.Options{TempDir: o.host.tempDir()}
	if !img.probed {
		fo.Format = img.format
	}
	if img.foreign, err = formats.New(ctx, img.dev, fo); err != nil {
		return foreignError(img.format, file.name, err)
	}
	img.closers = append(img.closers, img.foreign)
	img.setName(file, map[string]any{})
	return nil
}

// tempDir is the folder for large temporary files, chosen as QEMU does.
func (h Host) tempDir() string {
	if h.Getenv != nil {
		if dir := h.Getenv("TMPDIR"); dir != "" {
			return dir
		}
	}
	if info, err := os.Stat("/var/tmp"); err == nil && info.IsDir() {
		return "/var/tmp"
	}
	return os.TempDir()
}

// foreignError puts an error of opening an image in qemu-img's words.
func foreignError(format, name string, err error) error {
	if !errors.Is(err, formats.ErrFormat) {
		return err
	}
	switch format {
	case formats.VMDK:
		return messagef("invalid VMDK image descriptor")
	case formats.VPC:
		return messagef("invalid VPC image")
	case formats.VHDX:
		return messagef("Could not open '%s': %s", name, strerror(syscall.EINVAL))
	}
	return err
}

// foreignSpecific is what qemu-img tells of a format alone, in its order; nil for
// most.
func foreignSpecific(img *image) object {
	v, ok := img.foreign.VMDK()
	if !ok {
		return nil
	}
	extent := object{}
	if v.Compressed {
		extent.add("compressed", true)
	}
	extent = append(extent, object{{"virtual-size", img.size()}, {"filename", img.file.Name()},
		{"cluster-size", img.foreign.BlockSize()}, {"format", ""}}...)
	return object{{"cid", int64(v.CID)}, {"parent-cid", int64(v.ParentCID)}, {"create-type", v.CreateType}, {"extents", []any{extent}}}
}

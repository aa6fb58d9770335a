package cli

import (
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
	"syscall"

	"qimg/cloudimg/decomp"
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
	fo := &formats.Options{TempDir: o.host.tempDir()}
	if !img.probed {
		fo.Format = img.format
	}
	var err error
	if isCompressed(img.format) {
		if fo.MaxSize, err = maxSize(opts); err != nil {
			return err
		}
	}
	if img.foreign, err = formats.New(o.ctx, img.dev, fo); err != nil {
		return foreignError(img.format, file.name, err)
	}
	img.closers = append(img.closers, img.foreign)
	img.setName(file, map[string]any{})
	return nil
}

// isCompressed reports whether a format is that of a raw disk that is compressed as a
// whole.
func isCompressed(format string) bool {
	return slices.Contains([]string{formats.Gzip, formats.XZ, formats.Zstd, formats.Bzip2}, format)
}

// maxSize reads the option that bounds the content of a compressed disk.
func maxSize(opts blockOptions) (int64, error) {
	const name = "max-size"
	l, err := opts.absorb([]optionDesc{{name: name, typ: sizeOption}})
	if err != nil || !l.has(name) {
		return 0, err
	}
	n := l.uint(name)
	if n == 0 || n > math.MaxInt64 {
		return 0, messagef("Parameter '%s' expects a size from 1 on", name)
	}
	return int64(n), nil
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
	if size := (*decomp.SizeError)(nil); errors.As(err, &size) {
		return withHint(err, fmt.Sprintf("With --image-opts driver=%s,max-size=SIZE,file.filename=%s it can have as much as SIZE.\n", format, strings.ReplaceAll(name, ",", ",,")))
	}
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

package cli

import (
	"context"
	"errors"
	"fmt"
	"math"

	"qimg/cloudimg/guest"
	"qimg/cloudimg/parttable"
	"qimg/ext4img"
	"qimg/qcow2"
	"qimg/qcow2/blockdev"
)

// fsResize is a disk whose size changes with that of a file system in it.
type fsResize struct {
	host   Host
	o      *resizeOptions
	place  place
	img    *image
	volume *guest.Volume
	part   *parttable.Partition // nil: the file system fills the disk
	tail   int64                // bytes behind the last partition

	minimum bool  // disk and end are what they are at most
	disk    int64 // the new size
	end     int64 // of the partition, or of the disk
	result  *ext4img.ResizeResult
}

// runResizeFS is resize --fs.
func runResizeFS(ctx context.Context, host Host, o *resizeOptions, args []string) (err error) {
	r := &fsResize{host: host, o: o, place: imagePlace(args[0], o.open.imageOpts)}
	switch {
	case r.place.path != "/":
		return usagef("--fs needs an image, or one of its partitions, not a file in it")
	case r.place.snapshot != "":
		return messagef("The file system of a snapshot cannot be resized")
	case o.prealloc.Preallocation != qcow2.PreallocationOff:
		return usagef("--preallocation cannot be used with --fs")
	}
	o.open.chain, o.open.write = true, true
	if r.img, err = openImage(ctx, r.place.image, &o.open); err != nil {
		return couldNotOpen(r.place.image, err)
	}
	defer r.img.closeTo(&err)
	if err := r.find(); err != nil {
		return err
	}
	if err := r.plan(ctx, args[1]); err != nil {
		return err
	}
	if err := r.run(ctx); err != nil {
		return err
	}
	if !o.quiet {
		r.report()
	}
	return nil
}

// find finds the file system and its partition.
func (r *fsResize) find() error {
	disk, err := guest.Open(r.img.reader())
	if err != nil {
		return couldNotOpen(r.place.image, err)
	}
	if r.volume, err = disk.Select(r.place.part); err != nil {
		return selectError(&r.place, err)
	}
	if !r.volume.IsExt() {
		holds := r.volume.FS.Type
		if holds == "" {
			holds = "nothing known"
		}
		return messagef("%s holds %s: only ext2, ext3 and ext4 file systems can be resized", r.volume, holds)
	}
	if r.volume.Number == 0 {
		return nil
	}
	t, err := parttable.Read(r.img.reader())
	if err != nil {
		return prefixError(r.place.image, err)
	}
	r.tail = t.Tail()
	r.part, err = t.Partition(r.volume.Number)
	return err
}

// start is where the file system begins.
func (r *fsResize) start() int64 {
	if r.part == nil {
		return 0
	}
	return r.part.Start
}

// oldEnd is where the partition, or the disk, ends now.
func (r *fsResize) oldEnd() int64 {
	if r.part == nil {
		return r.img.size()
	}
	return r.part.End()
}

// partAlign is what the size of a partition is a multiple of.
const partAlign = 4096

// plan decides on all sizes. What cannot be done is an error here; nothing has
// changed then.
func (r *fsResize) plan(ctx context.Context, size string) error {
	current := r.img.size()
	section, err := blockdev.NewReaderSection(r.img.reader(), r.start(), r.oldEnd()-r.start())
	if err != nil {
		return err
	}
	opts := &ext4img.ResizeOptions{Shrink: true}
	switch size {
	case "max":
		r.disk = current
	case "min":
		opts.Minimum, r.minimum = true, true
		least, err := ext4img.PlanResize(ctx, section, section.Size(), opts)
		if err != nil {
			return prefixError(r.place.image, err)
		}
		r.setMinimum(least.NewSize)
	default:
		n, err := newDiskSize(size, current)
		if err != nil {
			return err
		}
		r.disk = n
	}
	switch {
	case r.disk <= 0:
		return messagef("New image size must be positive")
	case r.disk%512 != 0:
		return messagef("The new size must be a multiple of 512")
	case r.disk < current && !r.o.shrink && size != "min":
		return messagef("Use the --shrink option to perform a shrink operation.")
	}
	if size != "min" {
		r.end = r.disk
		if r.part != nil {
			r.end = (r.disk - r.tail) / partAlign * partAlign
			if r.disk >= current { // as it is, it can end a bit later
				r.end = max(r.end, r.part.End())
			}
		}
	}
	if r.end <= r.start() {
		return messagef("%s begins at %d, which leaves nothing of a disk of %d bytes", r.volume, r.start(), r.disk)
	}
	if r.part != nil {
		if err := parttable.CheckResize(r.img.reader(), r.disk, r.part.Number, r.end); err != nil {
			return prefixError(r.place.image, err)
		}
	}
	if err := r.checkImage(ctx); err != nil {
		return err
	}
	opts.Size = r.end - r.start()
	r.result, err = ext4img.PlanResize(ctx, section, opts.Size, opts)
	if err != nil {
		err = prefixError(r.place.image, err)
		if errors.Is(err, ext4img.ErrMinimum) {
			err = withHint(err, "The smallest size is that of: qimg resize --fs "+printable(r.place.arg)+" min\n")
		}
	}
	return err
}

// setMinimum makes disk and partition as small as a file system.
func (r *fsResize) setMinimum(size int64) {
	r.end = min(r.start()+(size+partAlign-1)/partAlign*partAlign, r.oldEnd())
	r.disk = min((r.end+r.tail+511)&^511, r.img.size())
}

// checkImage returns the error of an image whose size cannot be changed.
func (r *fsResize) checkImage(ctx context.Context) error {
	img := r.img
	switch _, whole := img.dev.(*blockdev.File); {
	case r.disk == img.size():
		return nil
	case img.qcow2 != nil:
		if err := img.qcow2.CheckResize(ctx, r.disk, &qcow2.ResizeOptions{Shrink: true}); err != nil {
			return resizeError(ctx, img, err)
		}
		return nil
	case !whole:
		return messagef("Cannot resize a part of a file")
	}
	if err := checkResizeRaw(img); err != nil {
		return err
	}
	if err := img.file.Truncate(img.file.Size()); errors.Is(err, errors.ErrUnsupported) {
		return messagef("Cannot resize device files")
	}
	return nil
}

// run does what was planned. Order: where the disk grows, the image, the
// partition, the file system; else the other way round. Each is whole before the
// next begins.
func (r *fsResize) run(ctx context.Context) error {
	steps := []func(context.Context) error{r.resizeImage, r.resizePartition, r.resizeFS}
	if r.disk < r.img.size() {
		steps = []func(context.Context) error{r.resizeFS, r.resizePartition, r.resizeImage}
	}
	for _, step := range steps {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (r *fsResize) resizeImage(ctx context.Context) error {
	if r.disk == r.img.size() {
		return nil
	}
	if err := r.img.resize(ctx, r.disk, &qcow2.ResizeOptions{Shrink: true}); err != nil {
		return resizeError(ctx, r.img, err)
	}
	return nil
}

func (r *fsResize) resizePartition(context.Context) error {
	if r.part == nil {
		return nil
	}
	dev, err := r.img.writable()
	if err != nil {
		return err
	}
	if err := parttable.Resize(dev, r.disk, r.part.Number, r.end); err != nil {
		return prefixError(r.place.image, err)
	}
	return nil
}

func (r *fsResize) resizeFS(ctx context.Context) error {
	dev, err := r.img.writable()
	if err != nil {
		return err
	}
	// While the file system shrinks it needs all that it has.
	end := max(r.end, min(r.start()+r.result.OldSize, dev.Size()))
	section, err := blockdev.NewSection(dev, r.start(), end-r.start())
	if err != nil {
		return err
	}
	opts := &ext4img.ResizeOptions{Size: r.end - r.start(), Shrink: true, Minimum: r.minimum}
	if r.result, err = ext4img.Resize(ctx, section, opts); err != nil {
		return prefixError(r.place.image, err)
	}
	if r.minimum { // it can be less than was planned
		r.setMinimum(r.result.NewSize)
	}
	return nil
}

func (r *fsResize) report() {
	w := r.host.Out
	fmt.Fprintln(w, "Image resized.")
	if r.part != nil {
		fmt.Fprintf(w, "Partition %d: %s, was %s.\n", r.part.Number, sizeText(r.end-r.start()), sizeText(r.part.Size))
	}
	fmt.Fprintf(w, "File system: %s, was %s.\n", sizeText(r.result.NewSize), sizeText(r.result.OldSize))
}

// sizeText is a size for people and for programs.
func sizeText(n int64) string { return fmt.Sprintf("%s (%d bytes)", humanSize(uint64(n)), n) }

// writable returns the disk of an image that was opened for writing.
func (img *image) writable() (blockdev.Device, error) {
	dev, ok := img.reader().(blockdev.Device)
	if !ok {
		return nil, messagef("Block node is read-only")
	}
	return dev, nil
}

// newDiskSize reads a size, or with a sign by how much another one changes.
func newDiskSize(size string, current int64) (int64, error) {
	sign := int64(0)
	switch size[:min(len(size), 1)] {
	case "+":
		sign, size = 1, size[1:]
	case "-":
		sign, size = -1, size[1:]
	}
	l := newOptionList([]optionDesc{{"size", sizeOption, "", ""}})
	if err := l.set("size", size); err != nil {
		return 0, err
	}
	n := int64(l.uint("size"))
	if sign == 1 && n > math.MaxInt64-current {
		return 0, messagef("New image size is too large")
	}
	if sign != 0 {
		n = current + sign*n
	}
	return n, nil
}

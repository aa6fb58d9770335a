package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"syscall"

	"qimg/cloudimg/formats"
	"qimg/qcow2"
	"qimg/qcow2/blockdev"
)

// opening opens the parts of one image, from its options, as QEMU's
// bdrv_open_inherit does (block.c): the file, the format over it, and the
// backing and data files that the options name in place of the image.
type opening struct {
	ctx context.Context
	*openOptions
	// Of the part that is opened, and of those below it. direct is cache.direct,
	// which changes nothing else.
	write, forceShare, direct bool
}

// open opens one part. name is nil where the options alone say what it is.
// below says that it has a format above it, so that it is a file unless its
// driver says otherwise.
func (o *opening) open(name *string, opts blockOptions, below bool) (*image, error) {
	if name != nil {
		if js, ok := strings.CutPrefix(*name, "json:"); ok {
			said, err := parseJSONName(js)
			if err != nil {
				return nil, err
			}
			for key, value := range said {
				if _, ok := opts[key]; !ok {
					opts[key] = value
				}
			}
			name = nil
		}
	}
	driver, given := opts.str("driver")
	if given {
		if err := checkDriver(driver); err != nil {
			return nil, err
		}
		below = driver == "file"
	}
	if below {
		return o.openFile(name, opts, given)
	}
	if isOn(opts["read-only"]) {
		o.write = false
	}
	o.direct = o.direct || isOn(opts["cache.direct"])
	backing, withBacking := opts["backing"]
	if withBacking && backing == "" {
		o.host.warn(`Use of "backing": "" is deprecated; use "backing": null instead`)
	}
	noBacking := false
	if withBacking && (backing == nil || backing == "") {
		delete(opts, "backing")
		noBacking = true
	}
	file, err := o.openChild(name, opts)
	if err != nil {
		return nil, err
	}
	img, err := o.openFormat(driver, file, opts, noBacking)
	if err != nil && file != nil {
		file.close()
	}
	return img, err
}

// isOn reports whether an option is on before it is checked.
func isOn(v any) bool { return v == "on" || v == true }

// openChild opens the file of a format, nil if none is named.
func (o *opening) openChild(name *string, opts blockOptions) (*image, error) {
	sub := opts.take("file.")
	ref, isRef := opts.str("file")
	delete(opts, "file")
	switch {
	case isRef && (name != nil || len(sub) > 0):
		return nil, messagef("Cannot reference an existing block device with additional options or a new filename")
	case isRef:
		return nil, noNode(ref)
	case name == nil && len(sub) == 0:
		return nil, nil
	}
	return o.open(name, sub, true)
}

// noNode is the error of a reference to what other programs of QEMU have.
func noNode(ref string) error {
	return messagef("Cannot find device='%s' nor node-name='%s'", ref, ref)
}

// openFormat opens the image in file.
func (o *opening) openFormat(format string, file *image, opts blockOptions, noBacking bool) (*image, error) {
	img := &image{format: format}
	if format == "" {
		if file == nil {
			return nil, messagef("Must specify either driver or file")
		}
		var err error
		if img.format, err = probe(file.reader()); err != nil {
			return nil, err
		}
		img.probed = true
	}
	if err := o.commonOptions(opts); err != nil {
		return nil, err
	}
	if file != nil && file.inUse != nil && img.format != "raw" {
		return nil, file.inUse
	}
	if file == nil {
		return nil, messagef(`A block device must be specified for "file"`)
	}
	img.file, img.dev, img.inUse = file.file, file.reader(), file.inUse
	img.closers = append(img.closers, file.closers...)
	open := o.openForeign
	switch img.format {
	case "qcow2":
		open = o.openQcow2
	case "raw":
		open = o.openRaw
	}
	own := len(img.closers)
	err := open(img, file, opts, noBacking)
	if err == nil {
		if names := qdictOrder(opts); len(names) > 0 {
			err = messagef("Block format '%s' does not support the option '%s'", img.format, names[0])
		}
	}
	if err != nil {
		img.closers = img.closers[own:] // the caller closes the file
		img.close()
		return nil, err
	}
	return img, nil
}

// name the image by its file, or by all options if that does not say enough.
// options are those besides the driver and the file.
func (img *image) setName(file *image, options map[string]any) {
	plain := len(options) == 0 && file.format == "file"
	options["driver"] = img.format
	options["file"] = file.options
	for _, key := range qdictOrder(options) {
		img.options.add(key, options[key])
	}
	img.name = file.name
	if !plain {
		var b strings.Builder
		appendLineJSON(&b, img.options)
		img.name = "json:" + b.String()
	}
}

// openRaw opens a raw image, or a part of one.
func (o *opening) openRaw(img, file *image, opts blockOptions, _ bool) error {
	strong := map[string]any{}
	for _, key := range []string{"offset", "size"} {
		if v, ok := opts[key]; ok {
			strong[key] = v
		}
	}
	l, err := opts.absorb([]optionDesc{{name: "offset", typ: sizeOption}, {name: "size", typ: sizeOption}})
	if err != nil {
		return err
	}
	if o.write && img.probed {
		fmt.Fprintf(o.host.Err, "WARNING: Image format was not specified for '%s' and probing guessed raw.\n"+
			"         Automatically detecting the format is dangerous for raw images, write operations on block 0 will be restricted.\n"+
			"         Specify the 'raw' format explicitly to remove the restrictions.\n", file.name)
	}
	off, size, whole := l.uint("offset"), l.uint("size"), uint64(file.size())
	switch {
	case off > whole:
		return messagef("Offset (%d) cannot be greater than size of the containing file (%d)", off, whole)
	case l.has("size") && whole-off < size:
		return messagef("The sum of offset (%d) and size (%d) has to be smaller or equal to the  actual size of the containing file (%d)", off, size, whole)
	case l.has("size") && size%512 != 0:
		return messagef("Specified size is not multiple of 512")
	case !l.has("size"):
		size = whole - off
	}
	if off > 0 || l.has("size") {
		// The last sector of the file can be one that it only begins.
		size = min(size, uint64(max(img.dev.Size()-int64(off), 0)))
		off = min(off, uint64(img.dev.Size()))
		if d, ok := img.dev.(blockdev.Device); ok {
			img.dev, err = blockdev.NewSection(d, int64(off), int64(size))
		} else {
			img.dev, err = blockdev.NewReaderSection(img.dev, int64(off), int64(size))
		}
		if err != nil {
			return err
		}
	}
	img.setName(file, strong)
	if o.chain && (opts["backing"] != nil || len(opts.take("backing.")) > 0) {
		return messagef("Driver doesn't support backing files")
	}
	return nil
}

// openQcow2 opens a qcow2 image and what belongs to it.
func (o *opening) openQcow2(img, file *image, opts blockOptions, noBacking bool) error {
	strong := map[string]any{}
	if v, ok := opts["encrypt.key-secret"]; ok {
		strong["encrypt.key-secret"] = v
	}
	l, err := opts.absorb(qcow2RuntimeOptions())
	if err != nil {
		return err
	}
	if o.unopened {
		img.setName(file, strong)
		return nil
	}
	qo := &qcow2.OpenOptions{Write: o.write && !o.damaged, ForceShare: o.forceShare, Backing: qcow2.BackingIgnore, Snapshot: o.snapshot, CacheSize: o.cacheSize, RefuseTruncated: o.complete, CompressionLevel: o.level}
	if o.chain {
		qo.Backing, qo.WriteBacking = qcow2.BackingFollow, o.layer
		qo.Secret = func(r qcow2.SecretRequest) ([]byte, error) {
			if r.Depth == 0 {
				r.ID = l.str("encrypt.key-secret")
			}
			if o.locked && (r.ID == "" || o.secrets == nil) {
				return nil, nil
			}
			return o.secrets.passphrase(r.ID)
		}
	}
	if err := o.openData(img, opts, qo); err != nil {
		return err
	}
	if noBacking {
		qo.BackingDevice = blockdev.NewMemory(0)
	} else if err := o.openBacking(img, opts, qo); err != nil {
		return err
	}
	if img.qcow2, err = qcow2.New(img.dev, qo); err != nil {
		if o.damaged && isDamaged(img.dev) {
			img.setName(file, strong)
			return nil
		}
		return qcow2Error(err)
	}
	img.closers = append(img.closers, img.qcow2)
	h := img.qcow2.Header()
	if err := checkRuntimeOptions(l, &h); err != nil {
		return err
	}
	if qo.DataDevice != nil && h.IncompatibleFeatures&qcow2.IncompatDataFile == 0 {
		return messagef("'data-file' can only be set for images with an external data file")
	}
	img.setName(file, strong)
	return nil
}

// isDamaged reports whether an image cannot be opened because of its snapshot
// table, or for want of a refcount table, which can be repaired.
func isDamaged(dev blockdev.Reader) bool {
	_, err := headerOf(dev)
	var bad *qcow2.FormatError
	return errors.As(err, &bad) && (bad.Struct == "snapshot table" || bad.Field == "nb_snapshots" ||
		bad.Field == "refcount_table_clusters" && errors.Is(err, qcow2.ErrCorrupt))
}

// qcow2Error puts an error of opening an image, or a file that it names, in
// qemu-img's words.
func qcow2Error(err error) error {
	steps := 0
	var file *qcow2.FileError
	named := errors.As(err, &file)
	if named {
		steps = file.Depth
		if file.Backing {
			steps++
		}
	}
	switch {
	case errors.Is(err, qcow2.ErrFormat):
		err = messagef("Image is not in qcow2 format")
	case errors.Is(err, qcow2.ErrMarkedCorrupt):
		err = messagef("qcow2: Image is corrupt; cannot be opened read/write")
	case errors.Is(err, qcow2.ErrPassphrase):
		err = messagef("Invalid password, cannot unlock any keyslot")
	case named:
		err = openError(file.Path, file.Err)
	}
	for range steps {
		err = prefixError("Could not open backing file", err)
	}
	return err
}

// openData opens the external data file that the options name.
func (o *opening) openData(img *image, opts blockOptions, qo *qcow2.OpenOptions) error {
	sub := opts.take("data-file.")
	ref, isRef := opts.str("data-file")
	delete(opts, "data-file")
	switch {
	case !o.chain:
		return nil
	case isRef:
		return noNode(ref)
	case len(sub) == 0:
		return nil
	}
	data, err := o.open(nil, sub, true)
	if err != nil {
		return err
	}
	img.closers = append(img.closers, data.closers...)
	qo.DataDevice = data.reader()
	return nil
}

// openBacking opens the backing file that the options name or describe.
func (o *opening) openBacking(img *image, opts blockOptions, qo *qcow2.OpenOptions) error {
	if !o.chain {
		return nil
	}
	sub := opts.take("backing.")
	ref, isRef := opts.str("backing")
	switch {
	case isRef:
		return messagef("Could not open backing file: %w", noNode(ref))
	case len(sub) == 0:
		return nil
	}
	h, err := headerOf(img.dev)
	if err != nil {
		return qcow2Error(err)
	}
	var name *string
	if _, ok := sub["file.filename"]; !ok && h.BackingFile != "" {
		full := combinePath(img.file.Name(), h.BackingFile)
		name = &full
	}
	if _, ok := sub["driver"]; !ok && h.BackingFormat() != "" {
		sub["driver"] = h.BackingFormat()
	}
	options := *o.openOptions
	options.below = true
	below := *o
	below.openOptions, below.write = &options, false
	backing, err := below.open(name, sub, false)
	if err != nil {
		return prefixError("Could not open backing file", err)
	}
	img.closers = append(img.closers, backing.closers...)
	qo.BackingDevice = backing.reader()
	return nil
}

// headerOf reads the header of an image.
func headerOf(dev blockdev.Reader) (h qcow2.Header, err error) {
	im, err := qcow2.New(dev, &qcow2.OpenOptions{Backing: qcow2.BackingIgnore})
	if err != nil {
		return h, err
	}
	defer im.Close()
	return im.Header(), nil
}

// commonOptions checks the options that all drivers have.
func (o *opening) commonOptions(opts blockOptions) error {
	l, err := opts.absorb([]optionDesc{
		{name: "driver"}, {name: "node-name"}, {name: "cache.direct", typ: boolOption}, {name: "cache.no-flush", typ: boolOption},
		{name: "read-only", typ: boolOption}, {name: "auto-read-only", typ: boolOption}, {name: "detect-zeroes"}, {name: "discard"},
		{name: "force-share", typ: boolOption},
	})
	if err != nil {
		return err
	}
	if l.bool("force-share") {
		o.forceShare = true
	}
	if o.forceShare && o.write {
		return messagef("force-share=on can only be used with read-only images")
	}
	if d := l.str("discard"); l.has("discard") && !slices.Contains([]string{"off", "ignore", "on", "unmap"}, d) {
		return messagef("Invalid discard option")
	}
	if d := l.str("detect-zeroes"); l.has("detect-zeroes") {
		switch {
		case !slices.Contains([]string{"off", "on", "unmap"}, d):
			return messagef("invalid parameter value: %s", d)
		case d == "unmap" && l.str("discard") != "on" && l.str("discard") != "unmap":
			return messagef("setting detect-zeroes to unmap is not allowed without setting discard operation to unmap")
		}
	}
	if n := l.str("node-name"); l.has("node-name") && (!wellFormedID(n) || len(n) > 31) {
		return messagef("Invalid node-name: '%s'", n)
	}
	return nil
}

// openFile opens a file of the host. given says that its driver was.
func (o *opening) openFile(name *string, opts blockOptions, given bool) (*image, error) {
	if name != nil {
		if _, twice := opts["filename"]; twice {
			return nil, messagef("Can't specify 'file' and 'filename' options at the same time")
		}
		path, err := localPath(*name)
		if err != nil {
			return nil, err
		}
		if _, ok := protocol(path); ok {
			path = "./" + path // as QEMU tells it
		}
		opts["filename"] = path
	}
	if _, ok := opts.str("filename"); !ok && !given {
		return nil, messagef("Must specify either driver or file")
	}
	if isOn(opts["read-only"]) {
		o.write = false
	}
	direct := o.direct || isOn(opts["cache.direct"])
	if err := o.commonOptions(opts); err != nil {
		return nil, err
	}
	path, _ := opts.str("filename")
	if path == "" {
		return nil, messagef("The 'file' block driver requires a file name")
	}
	l, err := opts.absorb([]optionDesc{
		{name: "filename"}, {name: "aio"}, {name: "aio-max-batch", typ: numberOption}, {name: "locking"}, {name: "pr-manager"},
		{name: "drop-cache", typ: boolOption}, {name: "x-check-cache-dropped", typ: boolOption},
	})
	if err != nil {
		return nil, err
	}
	switch aio := l.str("aio"); {
	case l.has("aio") && aio != "threads" && aio != "native" && aio != "io_uring":
		return nil, messagef("invalid parameter value: %s", aio)
	case aio == "native" && !direct:
		return nil, messagef("aio=native was specified, but it requires cache.direct=on, which was not specified.")
	}
	locking := l.str("locking")
	if l.has("locking") && locking != "on" && locking != "off" && locking != "auto" {
		return nil, messagef("invalid parameter value: %s", locking)
	}
	if l.has("pr-manager") {
		return nil, messagef("No persistent reservation manager with id '%s'", l.str("pr-manager"))
	}
	fo := &blockdev.FileOptions{Write: o.write, ForceShare: o.forceShare, NoLock: locking == "off"}
	f, err := blockdev.OpenFile(path, fo)
	var inUse error
	if errors.Is(err, blockdev.ErrLocked) && !o.write {
		// Of a raw image QEMU reads what others write.
		inUse = openError(path, err)
		fo.ForceShare = true
		f, err = blockdev.OpenFile(path, fo)
	}
	if err != nil {
		return nil, openError(path, err)
	}
	if o.opened != nil {
		o.opened(path)
	}
	if names := qdictOrder(opts); len(names) > 0 {
		f.Close()
		return nil, messagef("Block protocol 'file' doesn't support the option '%s'", names[0])
	}
	return &image{name: path, format: "file", file: f, dev: f, inUse: inUse, closers: []io.Closer{f},
		options: object{{"driver", "file"}, {"filename", path}}}, nil
}

// openError puts an error of the file system in qemu-img's words.
func openError(name string, err error) error {
	var lock *blockdev.LockError
	var errno syscall.Errno
	switch {
	case errors.As(err, &lock):
		return withHint(&lockText{lock}, lockHint(name))
	case errors.Is(err, blockdev.ErrNotWritable):
		return messagef("The device is not writable: %s", strerror(syscall.EACCES))
	}
	if info, e := os.Stat(name); e == nil && !info.Mode().IsRegular() && info.Mode()&os.ModeDevice == 0 {
		return fmt.Errorf("'file' driver requires '%s' to be a regular file", name)
	}
	if errors.As(err, &errno) {
		return messagef("Could not open '%s': %s", name, strerror(errno))
	}
	return err
}

// checkDriver refuses a driver that qimg does not have.
func checkDriver(name string) error {
	switch {
	case slices.Contains([]string{"qcow2", "raw", "file"}, name), slices.Contains(formats.Foreign(), name):
		return nil
	case slices.Contains(qemuDrivers(), name):
		return unsupportedDriver("driver", name)
	}
	return messagef("Unknown driver '%s'", name)
}

// checkProtocol refuses what stands before a colon in the name of an image.
func checkProtocol(name string) error {
	switch {
	case name == "file":
		return nil
	case slices.Contains(qemuDrivers(), name), strings.Contains(name, "+"):
		return unsupportedDriver("protocol", name)
	}
	return messagef("Unknown protocol '%s'", name)
}

func unsupportedDriver(what, name string) error {
	return fmt.Errorf("%s '%s' is not supported: qimg opens images of the formats %s in local files", what, name, strings.Join(append([]string{"qcow2", "raw"}, formats.Foreign()...), ", "))
}

// qemuDrivers are drivers that QEMU has, without those of checkDriver.
func qemuDrivers() []string {
	return []string{"blkdebug", "blklogwrites", "blkverify", "bochs", "cloop", "compress", "copy-before-write", "copy-on-read", "dmg",
		"ftp", "ftps", "gluster", "host_cdrom", "host_device", "http", "https", "io_uring", "iscsi", "iser", "luks", "nbd", "nfs",
		"null-aio", "null-co", "nvme", "nvme-io_uring", "parallels", "preallocate", "qcow", "qed", "quorum", "rbd", "replication",
		"snapshot-access", "ssh", "throttle", "vdi", "vhdx", "virtio-blk-vfio-pci", "virtio-blk-vhost-user", "virtio-blk-vhost-vdpa",
		"vmdk", "vpc", "vvfat"}
}

// qcow2RuntimeOptions are the options of an image that is opened.
func qcow2RuntimeOptions() []optionDesc {
	descs := []optionDesc{
		{name: "lazy-refcounts", typ: boolOption}, {name: "pass-discard-request", typ: boolOption},
		{name: "pass-discard-snapshot", typ: boolOption}, {name: "pass-discard-other", typ: boolOption},
		{name: "overlap-check"}, {name: "overlap-check.template"}, {name: "cache-size", typ: sizeOption}, {name: "l2-cache-size", typ: sizeOption},
		{name: "l2-cache-entry-size", typ: sizeOption}, {name: "refcount-cache-size", typ: sizeOption},
		{name: "cache-clean-interval", typ: numberOption}, {name: "encrypt.format"}, {name: "encrypt.key-secret"},
	}
	for _, table := range []string{"main-header", "active-l1", "active-l2", "refcount-table", "refcount-block", "snapshot-table",
		"inactive-l1", "inactive-l2", "bitmap-directory"} {
		descs = append(descs, optionDesc{name: "overlap-check." + table, typ: boolOption})
	}
	return descs
}

// checkRuntimeOptions checks the values. What the options ask for is done by
// qimg in its own way: tables are cached within a bound, and all that is
// written is checked for overlaps.
func checkRuntimeOptions(l *optionList, h *qcow2.Header) error {
	total, l2, refcount := l.uint("cache-size"), l.uint("l2-cache-size"), l.uint("refcount-cache-size")
	if l.has("cache-size") {
		switch {
		case l.has("l2-cache-size") && l.has("refcount-cache-size"):
			return messagef("cache-size, l2-cache-size and refcount-cache-size may not be set at the same time")
		case l2 > total:
			return messagef("l2-cache-size may not exceed cache-size")
		case refcount > total:
			return messagef("refcount-cache-size may not exceed cache-size")
		}
	}
	if n := l.uint("l2-cache-entry-size"); l.has("l2-cache-entry-size") && (n < 512 || n > uint64(h.ClusterSize()) || n&(n-1) != 0) {
		return messagef("L2 cache entry size must be a power of two between 512 and the cluster size (%d)", h.ClusterSize())
	}
	if format := l.str("encrypt.format"); l.has("encrypt.format") {
		method := map[qcow2.CryptMethod]string{qcow2.CryptAES: "aes", qcow2.CryptLUKS: "luks"}[h.CryptMethod]
		switch {
		case method == "":
			return messagef("No encryption in image header, but options specified format '%s'", format)
		case format != method:
			return messagef("Header reported '%s' encryption format but options specify '%s'", method, format)
		}
	}
	if l.bool("lazy-refcounts") && h.Version < 3 {
		return messagef("Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level")
	}
	all, template := l.str("overlap-check"), l.str("overlap-check.template")
	switch {
	case l.has("overlap-check") && l.has("overlap-check.template") && all != template:
		return messagef("Conflicting values for qcow2 options 'overlap-check' ('%s') and 'overlap-check.template' ('%s')", all, template)
	case l.has("overlap-check.template"):
		all = template
	case !l.has("overlap-check"):
		all = "cached"
	}
	if !slices.Contains([]string{"none", "constant", "cached", "all"}, all) {
		return messagef("Unsupported value '%s' for qcow2 option 'overlap-check'. Allowed are any of the following: none, constant, cached, all", all)
	}
	return nil
}

package cli

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
)

type createOptions struct {
	host          Host
	format        string
	backing       string
	backingFormat string
	options       optionArgs
	noOpen        bool
	quiet         bool
	// -b and -F were given, maybe with empty names.
	hasBacking, hasBackingFormat bool
	secrets                      secrets
}

func newCreate(host Host) *cobra.Command {
	o := createOptions{host: host, secrets: secrets{out: host.Out}}
	cmd := &cobra.Command{
		Use:   "create [-f FORMAT] [-b BACKING -F FORMAT] [-o OPTIONS] FILE [SIZE]",
		Short: "Make an empty image",
		Example: "  qimg create -f qcow2 disk.qcow2 10G\n" +
			"  qimg create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2\n" +
			"  qimg create -f qcow2 --object secret,id=s,file=passphrase -o encrypt.format=luks,encrypt.key-secret=s secret.qcow2 10G\n" +
			"  qimg map --object secret,id=s,file=passphrase --image-opts encrypt.key-secret=s,file.filename=secret.qcow2",
		RunE: func(cmd *cobra.Command, args []string) error {
			o.hasBacking = cmd.Flags().Changed("backing")
			o.hasBackingFormat = cmd.Flags().Changed("backing-format")
			return runCreate(cmd.Context(), host, &o, args)
		},
	}
	f := cmd.Flags()
	f.StringVarP(&o.format, "format", "f", "raw", "format of the new image: raw or qcow2")
	f.StringVarP(&o.backing, "backing", "b", "", "backing file: what the new image does not hold is read from it")
	f.StringVarP(&o.backingFormat, "backing-format", "F", "", "format of the backing file")
	f.VarP(&o.options, "options", "o", "options of the format, as NAME=VALUE,...; -f FORMAT -o help lists them")
	f.BoolVarP(&o.noOpen, "unsafe", "u", false, "do not look at the backing file")
	f.BoolVarP(&o.quiet, "quiet", "q", false, "print nothing")
	f.Var(&o.secrets, "object", "make an object: secret,id=ID,data=TEXT or secret,id=ID,file=FILE")
	return cmd
}

// noSize is the size of an image when none was given.
const noSize = math.MaxUint64

func runCreate(ctx context.Context, host Host, o *createOptions, args []string) error {
	list := o.options.String()
	if wantsHelp(list) {
		return createHelp(host, o.format, len(args) > 0)
	}
	if len(args) == 0 {
		return usagef("Expecting image file name")
	}
	size := uint64(noSize)
	if len(args) > 1 {
		n, err := sizeArg("image size", args[1])
		if err != nil {
			return err
		}
		size = uint64(n)
	}
	if len(args) > 2 {
		return usagef("Unexpected argument: %s", args[2])
	}
	if err := create(ctx, host, o, list, args[0], size); err != nil {
		return prefixError(args[0], err)
	}
	return nil
}

func createHelp(host Host, format string, withFile bool) error {
	descs, err := formatOptions(format)
	if err != nil {
		return err
	}
	if withFile {
		printOptionHelp(host.Out, "Supported options", append(descs, fileOptions(descs)...))
		return nil
	}
	printOptionHelp(host.Out, "Supported "+format+" options", descs)
	fmt.Fprint(host.Out, "\nThe protocol level may support further options.\n"+
		"Specify the target filename to include those options.\n")
	return nil
}

// formatOptions are the options of a format.
func formatOptions(format string) ([]optionDesc, error) {
	size := optionDesc{"size", sizeOption, "Virtual disk size", ""}
	switch format {
	case "raw":
		return []optionDesc{size}, nil
	case "file":
		return append([]optionDesc{size}, fileOptions(nil)...), nil
	case "qcow2":
		return []optionDesc{
			{"encryption", boolOption, "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)", ""},
			{"encrypt.format", stringOption, "Encrypt the image, format choices: 'aes', 'luks'", ""},
			{"encrypt.key-secret", stringOption, "ID of secret providing qcow AES key or LUKS passphrase", ""},
			{"encrypt.cipher-alg", stringOption, "Name of encryption cipher algorithm", ""},
			{"encrypt.cipher-mode", stringOption, "Name of encryption cipher mode", ""},
			{"encrypt.ivgen-alg", stringOption, "Name of IV generator algorithm", ""},
			{"encrypt.ivgen-hash-alg", stringOption, "Name of IV generator hash algorithm", ""},
			{"encrypt.hash-alg", stringOption, "Name of encryption hash algorithm", ""},
			{"encrypt.iter-time", numberOption, "Time to spend in PBKDF in milliseconds", ""},
			{"cluster_size", sizeOption, "qcow2 cluster size", "65536"},
			{"extended_l2", boolOption, "Extended L2 tables", "off"},
			{"preallocation", stringOption, "Preallocation mode (allowed values: off, metadata, falloc, full)", ""},
			{"compression_type", stringOption, "Compression method used for image cluster compression", "zlib"},
			size,
			{"compat", stringOption, "Compatibility level (v2 [0.10] or v3 [1.1])", ""},
			{"backing_file", stringOption, "File name of a base image", ""},
			{"backing_fmt", stringOption, "Image format of the base image", ""},
			{"data_file", stringOption, "File name of an external data file", ""},
			{"data_file_raw", boolOption, "The external data file must stay valid as a raw image", ""},
			{"lazy_refcounts", boolOption, "Postpone refcount updates", "off"},
			{"refcount_bits", numberOption, "Width of a reference count entry in bits", "16"},
		}, nil
	}
	return nil, messagef("Unknown file format '%s'", format)
}

// fileOptions are the options of the file that an image lies in, without
// those that the format has. nocow and extent_size_hint are advice to single
// file systems; they are taken and not passed on.
func fileOptions(format []optionDesc) []optionDesc {
	all := []optionDesc{
		{"nocow", boolOption, "Turn off copy-on-write (valid only on btrfs)", ""},
		{"preallocation", stringOption, "Preallocation mode (allowed values: off, falloc, full)", ""},
		{"extent_size_hint", sizeOption, "Extent size hint for the image file, 0 to disable", ""},
	}
	var out []optionDesc
	for _, d := range all {
		if newOptionList(format).index(d.name) < 0 {
			out = append(out, d)
		}
	}
	return out
}

func create(ctx context.Context, host Host, o *createOptions, list, name string, size uint64) error {
	descs, err := formatOptions(o.format)
	if err != nil {
		return err
	}
	path, err := localPath(name)
	if err != nil {
		return err
	}
	opts := newOptionList(append(descs, fileOptions(descs)...))
	if err := opts.parse(list); err != nil {
		return err
	}
	if opts.has("size") && size != noSize {
		return messagef("The image size must be specified only once")
	}
	if size != noSize {
		opts.values["size"] = strconv.FormatUint(size, 10)
	}
	if o.hasBacking && opts.set("backing_file", o.backing) != nil {
		return messagef("Backing file not supported for file format '%s'", o.format)
	}
	if o.hasBackingFormat && opts.set("backing_fmt", o.backingFormat) != nil {
		return messagef("Backing file format not supported for file format '%s'", o.format)
	}
	if backing := opts.str("backing_file"); opts.has("backing_file") {
		if err := checkBacking(ctx, name, backing, o, opts); err != nil {
			return err
		}
	}
	if !opts.has("size") {
		return messagef("Image creation needs a size parameter")
	}
	if !o.quiet {
		fmt.Fprintf(host.Out, "Formatting '%s', fmt=%s %s\n", name, o.format, opts)
	}
	if o.format == "qcow2" {
		err = createQcow2(ctx, path, opts, &o.secrets)
	} else {
		err = createRaw(ctx, path, opts)
	}
	if errors.Is(err, syscall.EFBIG) {
		hint := ""
		if opts.uint("cluster_size") > 0 {
			hint = " (try using a larger cluster size)"
		}
		return messagef("The image size is too large for file format '%s'%s", o.format, hint)
	}
	return err
}

// diskSize returns the size that the options say, in whole sectors; negative if
// it is too large to be one.
func diskSize(opts *optionList) int64 { return int64(opts.uint("size")+511) &^ 511 }

// checkBacking looks at the backing file: it has to be there, and gives its
// size to an image that has none.
func checkBacking(ctx context.Context, name, backing string, o *createOptions, opts *optionList) error {
	switch {
	case backing == name:
		return messagef("Error: Trying to create an image with the same filename as the backing file")
	case backing == "":
		return messagef("Expected backing file name, got empty string")
	}
	format := opts.str("backing_fmt")
	if o.noOpen {
		if format == "" {
			return messagef("Backing file specified without backing format")
		}
		return nil
	}
	full := combinePath(name, backing)
	if format == "" && opts.has("backing_fmt") {
		return withHint(messagef("Unknown driver ''"), "Could not open backing image.\n")
	}
	img, err := openImage(ctx, full, &openOptions{format: format, forceShare: true, chain: true, below: true, locked: true, host: o.host})
	if err != nil {
		return withHint(err, "Could not open backing image.\n")
	}
	defer img.close()
	if format == "" {
		return withHint(messagef("Backing file specified without backing format"),
			fmt.Sprintf("Detected format of %s.", img.format))
	}
	if !opts.has("size") {
		opts.values["size"] = strconv.FormatInt(img.size(), 10)
	}
	return nil
}

// newFile begins a new file, with the errors in qemu-img's words.
func newFile(path string, opts *blockdev.CreateOptions) (*blockdev.Output, error) {
	out, err := blockdev.CreateFile(path, opts)
	var lock *blockdev.LockError
	var errno syscall.Errno
	switch {
	case errors.As(err, &lock):
		return nil, withHint(errors.New(lock.Reason()), lockHint(path))
	case errors.As(err, &errno):
		return nil, messagef("Could not create '%s': %s", path, strerror(errno))
	case err != nil && path == "":
		return nil, messagef("Could not create '': %s", strerror(syscall.ENOENT))
	}
	if info, e := os.Stat(path); err != nil && e == nil && info.IsDir() {
		return nil, messagef("Could not create '%s': %s", path, strerror(syscall.EISDIR))
	}
	return out, err
}

// target is where a new image is made: a new file, or a block device.
type target struct {
	out    *blockdev.Output // nil: a device
	dev    *blockdev.File
	noSync bool
}

func newTarget(path string, noSync bool) (*target, error) {
	info, err := os.Stat(path)
	if err == nil && info.Mode()&(os.ModeDevice|os.ModeCharDevice) == os.ModeDevice {
		f, err := blockdev.OpenFile(path, &blockdev.FileOptions{Write: true})
		if err != nil {
			return nil, openError(path, err)
		}
		return &target{dev: f, noSync: noSync}, nil
	}
	out, err := newFile(path, &blockdev.CreateOptions{NoSync: noSync})
	if err != nil {
		return nil, err
	}
	return &target{out: out, dev: out.File()}, nil
}

// commit makes the image complete.
func (t *target) commit() error {
	if t.out != nil {
		return t.out.Commit()
	}
	if !t.noSync {
		if err := t.dev.Sync(); err != nil {
			return err
		}
	}
	return t.dev.Close()
}

// abort drops what is not committed; a device keeps what was written.
func (t *target) abort() {
	if t.out != nil {
		t.out.Abort()
	} else {
		t.dev.Close()
	}
}

// checkPreallocation refuses modes that leave on a device what lies there: it
// would be read.
func (t *target) checkPreallocation(mode string) error {
	if t.out == nil && mode != "" && mode != "off" && mode != "full" {
		return fmt.Errorf("preallocation=%s cannot be used on a device, whose old content would be read; off and full can", mode)
	}
	return nil
}

func createRaw(ctx context.Context, path string, opts *optionList) error {
	t, err := beginRaw(ctx, path, opts, false, nil)
	if err != nil {
		return err
	}
	return t.commit()
}

// beginRaw makes an empty raw image that is not committed yet. check, if set, is
// asked before anything is written.
func beginRaw(ctx context.Context, path string, opts *optionList, noSync bool, check func(path string) error) (*target, error) {
	mode, size := opts.str("preallocation"), diskSize(opts)
	switch {
	case size < 0:
		return nil, messagef("Could not resize file: Invalid argument")
	case mode == "metadata":
		return nil, messagef("Unsupported preallocation mode: metadata")
	case opts.has("preallocation") && mode != "off" && mode != "falloc" && mode != "full":
		return nil, messagef("invalid parameter value: %s", mode)
	}
	t, err := newTarget(path, noSync)
	if err != nil {
		return nil, err
	}
	if check != nil {
		err = check(path)
	}
	if err == nil {
		err = t.makeRaw(ctx, mode, size)
	}
	if err != nil {
		t.abort()
		return nil, err
	}
	return t, nil
}

// makeRaw gives a raw image its size, and its space as mode says.
func (t *target) makeRaw(ctx context.Context, mode string, size int64) error {
	err := t.checkPreallocation(mode)
	switch {
	case err != nil:
	case t.out != nil:
		if err = t.dev.Truncate(size); err != nil {
			err = messagef("Could not resize file: %w", &ioError{err})
		}
	case size > t.dev.Size():
		err = messagef("Cannot grow device files")
	default:
		// So that no format is found there.
		err = t.dev.WriteZeroes(0, min(size, 512))
	}
	switch {
	case err != nil:
		return err
	case mode == "falloc":
		return blockdev.AllocateZeroes(ctx, t.dev, 0, size, nil)
	case mode == "full":
		return blockdev.FillZeroes(ctx, t.dev, 0, size, nil)
	}
	return nil
}

func createQcow2(ctx context.Context, path string, opts *optionList, s *secrets) error {
	co, err := qcow2Options(opts, s)
	if err != nil {
		return err
	}
	t, err := beginQcow2(path, opts, co, false)
	if err != nil {
		return err
	}
	defer t.abort()
	if err := qcow2.Create(ctx, t.image.dev, diskSize(opts), co); err != nil {
		return err
	}
	return t.commit()
}

// qcow2Target is where a new qcow2 image is made.
type qcow2Target struct {
	image *target
	data  *target // the external data file; nil: none
}

// beginQcow2 begins the files of a new image, empty ones, and sets co.Data.
func beginQcow2(path string, opts *optionList, co *qcow2.CreateOptions, noSync bool) (t qcow2Target, err error) {
	if diskSize(opts) < 0 {
		return t, messagef("Could not resize image: Image size cannot be negative")
	}
	defer func() {
		if err != nil {
			t.abort()
		}
	}()
	if t.image, err = newTarget(path, noSync); err != nil {
		return t, err
	}
	mode := opts.str("preallocation")
	if err := t.image.checkPreallocation(mode); err != nil || co.DataFile == "" {
		return t, err
	}
	if co.DataFile, err = localPath(co.DataFile); err != nil {
		return t, err
	}
	if samePath(co.DataFile, path) {
		return t, withHint(messagef(`Failed to get shared "resize" lock`), lockHint(path))
	}
	if t.data, err = newTarget(co.DataFile, noSync); err != nil {
		return t, err
	}
	if t.image.out != nil && t.data.out != nil && t.image.out.SamePlace(t.data.out) {
		return t, withHint(messagef(`Failed to get shared "resize" lock`), lockHint(path))
	}
	co.Data = t.data.dev
	return t, t.data.checkPreallocation(mode)
}

// commit makes the image complete, the data file first.
func (t qcow2Target) commit() error {
	if t.data != nil {
		if err := t.data.commit(); err != nil {
			return err
		}
	}
	return t.image.commit()
}

// abort drops what is not committed.
func (t qcow2Target) abort() {
	for _, f := range []*target{t.image, t.data} {
		if f != nil {
			f.abort()
		}
	}
}

// samePath reports whether two names are those of one place.
func samePath(a, b string) bool {
	a, errA := filepath.Abs(a)
	b, errB := filepath.Abs(b)
	return errA == nil && errB == nil && a == b
}

// localPath returns the path that a name of an image means. A prefix up to a
// colon names a protocol, of which there is "file" alone.
func localPath(name string) (string, error) {
	proto, ok := protocol(name)
	if !ok {
		return name, nil
	}
	if err := checkProtocol(proto); err != nil {
		return "", err
	}
	return strings.TrimPrefix(name, "file:"), nil
}

// protocol returns what stands before a colon in front of the first separator.
func protocol(name string) (string, bool) {
	if os.PathSeparator == '\\' && len(name) > 1 && name[1] == ':' {
		return "", false // a drive
	}
	i := strings.IndexAny(name, ":/")
	if i < 0 || name[i] != ':' || os.PathSeparator == '\\' && strings.ContainsRune(name[:i], '\\') {
		return "", false
	}
	return name[:i], true
}

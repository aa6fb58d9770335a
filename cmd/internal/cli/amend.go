package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"

	"github.com/spf13/cobra"

	"qimg/qcow2"
)

type amendOptions struct {
	open        openOptions
	options     optionArgs
	cache       string
	progress    bool
	quiet       bool
	force       bool
	dryRun      bool
	keepBitmaps bool
	// keySlots, if set, changes the key slots of an encrypted image.
	keySlots func(context.Context) error
}

func newAmend(host Host) *cobra.Command {
	o := amendOptions{}
	cmd := &cobra.Command{
		Use:   "amend [-p] [-q] [-f FORMAT] [-t CACHE] [--dry-run] [--keep-bitmaps] -o OPTIONS FILE",
		Short: "Change options of an image",
		Long: "Change options of an image in place, all of them or none.\n\n" +
			"-o compat=0.10 makes an image one of version 2, which old programs read. Its\n" +
			"zero clusters become unallocated, or clusters of zeroes over a backing file.\n" +
			"Its bitmaps are removed. What else version 2 has not is refused: a data file,\n" +
			"extended L2 entries, clusters compressed by zstd, refcounts of other than 16 bits\n" +
			"(add refcount_bits=16), snapshots of another size than the disk.",
		Example: "  qimg amend -f qcow2 -o compat=0.10 disk.qcow2\n" +
			"  qimg amend --dry-run -o compat=1.1,refcount_bits=64 disk.qcow2\n" +
			"  qimg amend --object secret,id=old,file=old --object secret,id=new,file=new -o encrypt.state=active,encrypt.new-secret=new --image-opts encrypt.key-secret=old,file.filename=secret.qcow2",
		RunE: func(cmd *cobra.Command, args []string) error {
			return runAmend(cmd.Context(), host, &o, args)
		},
	}
	f := cmd.Flags()
	o.open.addFlags(f, host)
	f.VarP(&o.options, "options", "o", "what to change, as NAME=VALUE,...; -f qcow2 -o help lists it")
	f.StringVarP(&o.cache, "cache", "t", "writeback", "cache mode, for qemu-img's sake: it changes nothing")
	f.BoolVarP(&o.progress, "progress", "p", false, "print how much is done")
	f.BoolVarP(&o.quiet, "quiet", "q", false, "print errors only")
	f.BoolVar(&o.force, "force", false, "allow what can make the data of an encrypted image unreadable")
	f.BoolVar(&o.dryRun, "dry-run", false, "change nothing, but print what would be changed")
	f.BoolVar(&o.keepBitmaps, "keep-bitmaps", false, "of compat=0.10: refuse an image that has bitmaps, rather than remove them")
	return cmd
}

func runAmend(ctx context.Context, host Host, o *amendOptions, args []string) (err error) {
	list := o.options.String()
	switch {
	case len(o.options) == 0:
		return usagef("Must specify options (-o)")
	case o.open.format != "" && wantsHelp(list):
		return amendHelp(host, o.open.format)
	}
	p := amendProgress{w: io.Discard}
	if o.progress && !o.quiet {
		p.w = host.Out
	}
	defer fmt.Fprintln(p.w)
	if len(args) != 1 {
		return messagef("Expecting one image file name")
	}
	if err := checkCache("cache", o.cache); err != nil {
		return err
	}
	o.open.chain, o.open.write = true, !o.dryRun
	img, err := openImage(ctx, args[0], &o.open)
	if err != nil {
		return couldNotOpen(args[0], err)
	}
	defer img.closeTo(&err)
	if wantsHelp(list) || img.qcow2 == nil {
		return amendHelp(host, img.format)
	}
	ao, err := o.amend(list, img)
	if err != nil {
		return err
	}
	p.print(0)
	ao.Progress = func(done, total int64) { p.print(100 * float32(done) / float32(total)) }
	if o.keySlots != nil {
		// Nothing is changed if the rest is refused.
		check := *ao
		check.DryRun, check.Progress = true, nil
		if _, err = img.qcow2.Amend(ctx, &check); err == nil {
			err = o.keySlots(ctx)
		}
	}
	var result qcow2.AmendResult
	if err == nil {
		result, err = img.qcow2.Amend(ctx, ao)
	}
	p.print(100)
	switch {
	case err == qcow2.ErrAmendBacking:
		return withHint(err, fmt.Sprintf("You can use '%s rebase' instead.\n", host.name))
	case err != nil:
		return resizeError(ctx, img, err)
	}
	if o.dryRun && !o.quiet {
		printAmend(host.Out, &result)
	}
	return nil
}

// amendDescs are the options that can be changed.
func amendDescs() []optionDesc {
	return []optionDesc{
		{"encrypt.state", stringOption, "Select new state of affected keyslots (active/inactive)", ""},
		{"encrypt.keyslot", numberOption, "Select a single keyslot to modify explicitly", ""},
		{"encrypt.old-secret", stringOption, "Select all keyslots that match this password", ""},
		{"encrypt.new-secret", stringOption, "New secret to set in the matching keyslots. Empty string to erase", ""},
		{"encrypt.iter-time", numberOption, "Time to spend in PBKDF in milliseconds", ""},
		{"size", sizeOption, "Virtual disk size", ""},
		{"compat", stringOption, "Compatibility level (v2 [0.10] or v3 [1.1])", ""},
		{"backing_file", stringOption, "File name of a base image", ""},
		{"backing_fmt", stringOption, "Image format of the base image", ""},
		{"data_file", stringOption, "File name of an external data file", ""},
		{"data_file_raw", boolOption, "The external data file must stay valid as a raw image", ""},
		{"lazy_refcounts", boolOption, "Postpone refcount updates", ""},
		{"refcount_bits", numberOption, "Width of a reference count entry in bits", ""},
	}
}

func amendHelp(host Host, format string) error {
	if _, err := formatOptions(format); err != nil {
		return err
	}
	if format != "qcow2" {
		return messagef("Format driver '%s' does not support option amendment", format)
	}
	printOptionHelp(host.Out, "Amend options for 'qcow2'", amendDescs())
	return nil
}

// amend turns -o into options of the library, which checks them together.
func (o *amendOptions) amend(list string, img *image) (*qcow2.AmendOptions, error) {
	l := newOptionList(amendDescs())
	if err := l.parse(list); err != nil {
		create, _ := formatOptions("qcow2")
		if newOptionList(append(amendDescs(), create...)).parse(list) == nil {
			return nil, withHint(err, "This option is only supported for image creation\n")
		}
		return nil, err
	}
	ao := &qcow2.AmendOptions{KeepBitmaps: o.keepBitmaps, DryRun: o.dryRun, Size: int64(l.uint("size"))}
	var err error
	if o.keySlots, err = o.encryption(l, img.qcow2); err != nil {
		return nil, err
	}
	if l.has("compat") {
		if ao.Version, err = parseCompat(l.str("compat")); err != nil {
			return nil, messagef("Unknown compatibility level %s", l.str("compat"))
		}
	}
	text := func(name string) *string {
		if !l.has(name) {
			return nil
		}
		s := l.str(name)
		return &s
	}
	flag := func(name string) *bool {
		if !l.has(name) {
			return nil
		}
		b := l.bool(name)
		return &b
	}
	ao.BackingFile, ao.BackingFormat = text("backing_file"), text("backing_fmt")
	ao.DataFile, ao.DataFileRaw = text("data_file"), flag("data_file_raw")
	ao.LazyRefcounts = flag("lazy_refcounts")
	if l.has("refcount_bits") {
		ao.RefcountBits = int(int32(l.uint("refcount_bits"))) // an int in QEMU
		if ao.RefcountBits == 0 {
			ao.RefcountBits = -1 // refused
		}
	}
	return ao, nil
}

// encryption turns encrypt.* into a change of the key slots of an image, nil if
// none is asked for.
func (o *amendOptions) encryption(l *optionList, im *qcow2.Image) (func(context.Context) error, error) {
	given := false
	for _, d := range l.descs {
		given = given || strings.HasPrefix(d.name, "encrypt.") && l.has(d.name)
	}
	if !given {
		return nil, nil
	}
	switch im.Header().CryptMethod {
	case qcow2.CryptNone:
		return nil, messagef("Can't amend encryption options - encryption not present")
	case qcow2.CryptAES:
		return nil, messagef("Only LUKS encryption options can be amended")
	}
	state := l.str("encrypt.state")
	active := state == "active"
	switch {
	case !l.has("encrypt.state"):
		return nil, messagef("Parameter 'state' is missing")
	case !active && state != "inactive":
		return nil, notAccepted("state", state)
	case active && !l.has("encrypt.new-secret"):
		return nil, messagef("'new-secret' is required to activate a keyslot")
	case active && l.has("encrypt.old-secret"):
		return nil, messagef("'old-secret' must not be given when activating keyslots")
	case !active && l.has("encrypt.new-secret"):
		return nil, messagef("'new-secret' must not be given when erasing keyslots")
	case !active && l.has("encrypt.iter-time"):
		return nil, messagef("'iter-time' must not be given when erasing keyslots")
	case o.dryRun:
		return nil, messagef("--dry-run does not tell what becomes of key slots")
	}
	ko := &qcow2.KeySlotOptions{Force: o.force, IterTime: iterTime(l)}
	if l.has("encrypt.keyslot") {
		slot := int(int32(min(l.uint("encrypt.keyslot"), math.MaxInt32)))
		ko.Slot = &slot
	}
	change, name := im.AddPassphrase, "encrypt.new-secret"
	if !active {
		change, name = im.ErasePassphrase, "encrypt.old-secret"
	}
	var passphrase []byte
	if l.has(name) {
		var err error
		if passphrase, err = o.open.secrets.passphrase(l.str(name)); err != nil {
			return nil, err
		}
	}
	return func(ctx context.Context) error { return change(ctx, passphrase, ko) }, nil
}

// resizeError puts an error of a change of an image in qemu-img's words.
func resizeError(ctx context.Context, img *image, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if e := (*qcow2.BitmapError)(nil); errors.As(err, &e) {
		text, hint := bitmapText(img.name, err)
		return withHint(messagef("%s", text), hint)
	}
	return err
}

// printAmend prints what would be changed.
func printAmend(w io.Writer, r *qcow2.AmendResult) {
	for _, c := range r.Changes {
		fmt.Fprintf(w, "%s: %s -> %s\n", c.Option, c.From, c.To)
	}
	if r.Bitmaps > 0 {
		fmt.Fprintf(w, "bitmaps: %d removed\n", r.Bitmaps)
	}
	if r.Unallocated+r.Filled > 0 {
		fmt.Fprintf(w, "zero clusters: %d become unallocated, %d are filled with zeroes\n", r.Unallocated, r.Filled)
	}
	if len(r.Changes) == 0 {
		fmt.Fprintln(w, "nothing changes")
	}
	fmt.Fprintf(w, "bytes needed: %d\nfile size: %d -> %d\n", r.Allocated, r.FileSize[0], r.FileSize[1])
}

// amendProgress prints as qemu-img does: steps of more than one percent.
type amendProgress struct {
	w    io.Writer
	last float32
}

func (p *amendProgress) print(percent float32) {
	percent = min(percent, 100)
	if percent > p.last+1 || percent < p.last-1 || percent == 100 || percent == 0 {
		p.last = percent
		fmt.Fprintf(p.w, "    (%3.2f/100%%)\r", percent)
	}
}

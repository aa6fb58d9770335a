package cli

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"qimg/qcow2"
)

type bitmapOptions struct {
	open         openOptions
	actions      []bitmapAction
	granularity  granularity
	source       string
	sourceFormat string
}

// bitmapAction is one of the actions of a call, in the order in which they were
// given.
type bitmapAction struct{ op, source string }

func newBitmap(host Host) *cobra.Command {
	o := bitmapOptions{}
	cmd := &cobra.Command{
		Use:   "bitmap (--merge SOURCE|--add|--remove|--clear|--enable|--disable)... [-b FILE [-F FORMAT]] [-g GRANULARITY] FILE BITMAP",
		Short: "Change a dirty bitmap of an image",
		Long: "Change a dirty bitmap of an image, by one or more actions in the order in which\n" +
			"they are given. Each is done wholly or not at all.",
		RunE: func(cmd *cobra.Command, args []string) error {
			return runBitmap(cmd.Context(), host, &o, args)
		},
	}
	f := cmd.Flags()
	o.open.addFlags(f, host)
	for _, a := range [][2]string{
		{"add", "add the bitmap"}, {"remove", "remove it"}, {"clear", "clear its bits"},
		{"enable", "have it record writes"}, {"disable", "have it record none"},
	} {
		f.Var(&actionFlag{&o, a[0]}, a[0], a[1])
		f.Lookup(a[0]).NoOptDefVal = "true"
	}
	f.Var(&actionFlag{&o, "merge"}, "merge", "set the bits that are set in another bitmap, of the same image or that of -b")
	f.VarP(&o.granularity, "granularity", "g", "bytes of a bit, for --add (default: the cluster size, within 4k and 64k)")
	f.StringVarP(&o.source, "source-file", "b", "", "image that --merge takes its bitmaps from")
	f.StringVarP(&o.sourceFormat, "source-format", "F", "", "format of that image")
	return cmd
}

// actionFlag adds an action each time that it is given.
type actionFlag struct {
	o  *bitmapOptions
	op string
}

func (f *actionFlag) Set(value string) error {
	f.o.actions = append(f.o.actions, bitmapAction{f.op, value})
	return nil
}

func (f *actionFlag) String() string { return "" }

func (f *actionFlag) Type() string {
	if f.op == "merge" {
		return "SOURCE"
	}
	return "bool"
}

// granularity is the value of -g.
type granularity int64

func (g *granularity) Set(value string) error {
	n, err := sizeArg("granularity", value)
	*g = granularity(n)
	return err
}

func (g *granularity) String() string { return fmt.Sprint(int64(*g)) }

func (g *granularity) Type() string { return "SIZE" }

func runBitmap(ctx context.Context, host Host, o *bitmapOptions, args []string) (err error) {
	given := map[string]bool{}
	for _, a := range o.actions {
		given[a.op] = true
	}
	switch {
	case len(o.actions) == 0:
		return messagef("Need at least one of --add, --remove, --clear, --enable, --disable, or --merge")
	case o.granularity != 0 && !given["add"]:
		return messagef("granularity only supported with --add")
	case o.sourceFormat != "" && o.source == "":
		return messagef("-F only supported with -b")
	case o.source != "" && !given["merge"]:
		return messagef("Merge bitmap source file only supported with --merge")
	case len(args) != 2:
		return messagef("Expecting filename and bitmap name")
	}
	o.open.write = true
	img, err := openImage(ctx, args[0], &o.open)
	if err != nil {
		return couldNotOpen(args[0], err)
	}
	defer img.closeTo(&err)
	src := img
	if o.source != "" {
		src, err = openImage(ctx, o.source, &openOptions{format: o.sourceFormat, secrets: o.open.secrets, host: host})
		if err != nil {
			return couldNotOpen(o.source, err)
		}
		defer src.close()
	}
	for _, a := range o.actions {
		if err := changeBitmap(ctx, img, src, args[1], a, int64(o.granularity)); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			text, hint := bitmapText(img.name, err)
			return withHint(messagef("Operation %s on bitmap %s failed: %s", a.op, args[1], text), hint)
		}
	}
	return nil
}

// changeBitmap does one action on a bitmap of img.
func changeBitmap(ctx context.Context, img, src *image, name string, a bitmapAction, granularity int64) error {
	switch {
	case img.qcow2 == nil && a.op == "add":
		return messagef("Can't store persistent bitmaps to %s: Operation not supported", img.name)
	case img.qcow2 == nil:
		return &qcow2.BitmapError{Name: name, Reason: qcow2.BitmapNotFound}
	case a.op == "merge" && src.qcow2 == nil:
		return &qcow2.BitmapError{Name: a.source, Reason: qcow2.BitmapNotFound}
	}
	im := img.qcow2
	switch a.op {
	case "add":
		return im.AddBitmap(ctx, name, &qcow2.BitmapOptions{Granularity: granularity})
	case "remove":
		return im.RemoveBitmap(ctx, name)
	case "clear":
		return im.ClearBitmap(ctx, name)
	case "enable":
		return im.EnableBitmap(ctx, name)
	case "disable":
		return im.DisableBitmap(ctx, name)
	}
	return im.MergeBitmap(ctx, name, src.qcow2, a.source)
}

// bitmapText puts an error of the bitmaps of an image in qemu-img's words, with
// the lines that follow them.
func bitmapText(image string, err error) (text, hint string) {
	var e *qcow2.BitmapError
	if !errors.As(err, &e) {
		return err.Error(), ""
	}
	switch e.Reason {
	case qcow2.BitmapExists:
		return "Bitmap already exists: " + e.Name, ""
	case qcow2.BitmapNotFound:
		return fmt.Sprintf("Dirty bitmap '%s' not found", e.Name), ""
	case qcow2.BitmapInconsistent:
		return fmt.Sprintf("Bitmap '%s' is inconsistent and cannot be used", e.Name),
			"Try block-dirty-bitmap-remove to delete this bitmap from disk\n"
	case qcow2.BitmapSizesDiffer:
		return fmt.Sprintf("Bitmaps are of different sizes (destination size is %d, source size is %d) and can't be merged", e.Sizes[0], e.Sizes[1]), ""
	case qcow2.BitmapNameEmpty:
		return "Bitmap name cannot be empty", ""
	case qcow2.BitmapBadGranularity:
		return "Granularity must be power of 2 and at least 512", ""
	case qcow2.BitmapVersion2:
		text = "Cannot store dirty bitmaps in qcow2 v2 files"
	case qcow2.BitmapTooLarge:
		text = "Too much space will be occupied by the bitmap. Use larger granularity"
	case qcow2.BitmapNameLong:
		text = "Name length exceeds maximum (1023 characters)"
	case qcow2.BitmapTooMany:
		text = "Maximum number of persistent bitmaps is already reached"
	case qcow2.BitmapDirectoryFull:
		text = "Not enough space in the bitmap directory"
	default:
		text = e.Reason.String()
	}
	return fmt.Sprintf("Can't make bitmap '%s' persistent in '%s': %s", e.Name, image, text), ""
}

package cli

import (
	"slices"

	"github.com/spf13/pflag"
)

// addFlags adds the options that all commands on one image have: -f,
// --image-opts and --object.
func (o *openOptions) addFlags(f *pflag.FlagSet, host Host) {
	o.host = host
	o.secrets = &secrets{out: host.Out}
	f.VarP((*formatValue)(o), "format", "f", "format of the image (default: found by its first bytes)")
	f.BoolVar(&o.imageOpts, "image-opts", false, "FILE stands for options: driver=qcow2,file.filename=NAME[,encrypt.key-secret=ID]")
	f.Var(o.secrets, "object", "make an object: secret,id=ID,data=TEXT or secret,id=ID,file=FILE")
}

// formatValue is -f. An empty one is a format that there is not: what a script
// leaves out by mistake is not probed.
type formatValue openOptions

func (v *formatValue) Set(s string) error {
	v.format, v.hasFormat = s, true
	return nil
}

func (v *formatValue) String() string { return v.format }
func (v *formatValue) Type() string   { return "string" }

// addForceShare adds -U.
func (o *openOptions) addForceShare(f *pflag.FlagSet) {
	f.BoolVarP(&o.forceShare, "force-share", "U", false, "look at an image that a running machine uses")
}

// checkCache checks a cache mode of QEMU: -T for the image that is read
// ("source cache"), -t for the one that is written ("cache"). None changes what
// is done.
func checkCache(what, mode string) error {
	if !slices.Contains([]string{"none", "off", "writeback", "unsafe", "directsync", "writethrough"}, mode) {
		return messagef("Invalid %s option: %s", what, mode)
	}
	return nil
}

// checkOutput checks the value of --output.
func checkOutput(output string) error {
	if output != "human" && output != "json" {
		return messagef("--output must be used with human or json as argument.")
	}
	return nil
}

// Package cli is the command line of qimg: flags, messages, exit codes, JSON.
// Each command is a file; what it does is in the libraries.
//
// The commands that qemu-img has take its options and print its texts.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"runtime/debug"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Host is what the program has from the system.
type Host struct {
	Out, Err io.Writer
	Getenv   func(string) string

	name string // of the program, for warnings
}

// Run runs the program and returns its exit status. args are its name, which
// messages begin with, and its arguments.
func Run(ctx context.Context, args []string, host Host) int {
	name := "qimg"
	if len(args) > 0 {
		name = strings.TrimSuffix(filepath.Base(args[0]), ".exe")
		args = args[1:]
	}
	out := &output{w: host.Out}
	host.Out, host.name = out, name
	root := newRoot(name, args, host)
	root.SetArgs(args)
	root.SetOut(host.Out)
	root.SetErr(host.Err)
	err := unknownCommand(root, args)
	if err == nil {
		err = root.ExecuteContext(ctx)
	}
	if err == nil && out.err != nil {
		err = fmt.Errorf("standard output: %w", out.err)
	}
	return report(host.Err, name, err)
}

func newRoot(name string, args []string, host Host) *cobra.Command {
	root := &cobra.Command{
		Use:   name + " COMMAND",
		Short: "qimg makes, inspects and checks disk images",
		Long: "qimg makes, inspects and checks disk images. It needs no root, no mount and no\n" +
			"other program. create, info and check are used as those of qemu-img.",
		Version:            version(),
		Args:               cobra.ArbitraryArgs,
		SilenceErrors:      true,
		SilenceUsage:       true,
		DisableSuggestions: true,
		CompletionOptions:  cobra.CompletionOptions{DisableDefaultCmd: true},
		RunE: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usagef("Not enough arguments")
			}
			return usagef("Command not found: %s", args[0])
		},
	}
	root.Flags().BoolP("version", "V", false, "print the version")
	root.SetVersionTemplate("{{.Name}} version {{.Version}}\n")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return flagError(args, err) })
	root.AddCommand(newBuild(host), newCreate(host), newInfo(host), newCheck(host))
	return root
}

// unknownCommand says so before the command's flags are taken for the
// program's.
func unknownCommand(root *cobra.Command, args []string) error {
	if len(args) == 0 || strings.HasPrefix(args[0], "-") || args[0] == "help" {
		return nil
	}
	for _, c := range root.Commands() {
		if c.Name() == args[0] {
			return nil
		}
	}
	return usagef("Command not found: %s", args[0])
}

// flagError says in getopt's way what pflag found.
func flagError(args []string, err error) error {
	var unknown *pflag.NotExistError
	var missing *pflag.ValueRequiredError
	switch {
	case errors.As(err, &unknown):
		return usagef("unrecognized option '%s'", asGiven(args, unknown.GetSpecifiedName(), unknown.GetSpecifiedShortnames()))
	case errors.As(err, &missing):
		return usagef("missing argument for option '%s'", asGiven(args, missing.GetSpecifiedName(), missing.GetSpecifiedShortnames()))
	}
	return usagef("%v", err)
}

// asGiven finds the argument that an option stands in: a long name, or a group
// of letters that ends in those given.
func asGiven(args []string, name, letters string) string {
	for _, a := range args {
		long := strings.HasPrefix(a, "--")
		if letters == "" && (a == "--"+name || strings.HasPrefix(a, "--"+name+"=")) ||
			letters != "" && !long && strings.HasPrefix(a, "-") && strings.HasSuffix(a, letters) {
			return a
		}
	}
	return "--" + name
}

func version() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}

// output keeps the first error of standard output, so that a full disk is not
// taken for success.
type output struct {
	w   io.Writer
	err error
}

func (o *output) Write(p []byte) (int, error) {
	n, err := o.w.Write(p)
	if err != nil && o.err == nil {
		o.err = err
	}
	return n, err
}

// Package cli is the command line of qimg: flags, messages, exit codes, JSON.
// Each command is a file; what it does is in the libraries.
//
// The commands that qemu-img has take its options and print its texts.
package cli

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"runtime/debug"
	"strings"

	"github.com/spf13/cobra"

	"qimg/cloudimg/formats"
)

// Host is what the program has from the system.
type Host struct {
	In       io.Reader // nil: empty
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
	out := newOutput(ctx, host.Out)
	host.Out, host.Err, host.name = out, newOutput(ctx, host.Err), name
	err := execute(ctx, newRoot(host), args)
	if err == nil && out.err != nil {
		err = fmt.Errorf("standard output: %w", out.err)
	}
	return report(host.Err, name, err)
}

// execute reads the options of the program and runs the command.
func execute(ctx context.Context, root *cobra.Command, args []string) error {
	if len(args) == 0 {
		return usagef("Not enough arguments")
	}
	args, err := getopt(root.Flags(), append([]string{root.Name()}, args...), true)
	if err != nil {
		return helped(root, err)
	}
	if len(args) == 0 {
		return nil // as qemu-img
	}
	for _, c := range root.Commands() {
		if c.Name() == args[0] || args[0] == "help" {
			root.SetArgs(args)
			return root.ExecuteContext(ctx)
		}
	}
	return usagef("Command not found: %s", args[0])
}

func newRoot(host Host) *cobra.Command {
	root := &cobra.Command{
		Use:   host.name,
		Short: "qimg makes, converts, inspects, changes and repairs disk images",
		Long: "qimg makes, converts, inspects, changes and repairs disk images. It needs no root,\n" +
			"no mount and no other program. All commands but build and dump are used as those\n" +
			"of qemu-img.\n\n" +
			"Supported formats: file qcow2 raw\n" +
			"For reading also: " + strings.Join(formats.Foreign(), " "),
		SilenceErrors:      true,
		SilenceUsage:       true,
		DisableSuggestions: true,
		CompletionOptions:  cobra.CompletionOptions{DisableDefaultCmd: true},
	}
	root.SetOut(host.Out)
	root.SetErr(host.Err)
	root.Flags().BoolP("version", "V", false, "print the version")
	root.Flags().StringP("trace", "T", "", "for qemu-img's sake: nothing is traced")
	root.InitDefaultHelpFlag()
	if host.name == "qemu-img" {
		root.SetHelpTemplate(versionText(host.name) +
			"usage: qemu-img [standard options] command [command options]\n" + root.HelpTemplate())
	}
	root.AddCommand(
		newAmend(host),
		newBench(host),
		newBitmap(host),
		newBuild(host),
		newCat(host),
		newCheck(host),
		newCommit(host),
		newCompare(host),
		newConvert(host),
		newCp(host),
		newCreate(host),
		newDD(host),
		newDiff(host),
		newDump(host),
		newInfo(host),
		newInspect(host),
		newLs(host),
		newMap(host),
		newMeasure(host),
		newMkdir(host),
		newRebase(host),
		newResize(host),
		newRm(host),
		newSnapshot(host),
		newStat(host),
		newTar(host),
		newTree(host),
	)
	for _, c := range root.Commands() {
		useGetopt(c)
	}
	return root
}

// lastOperand is the annotation of a command whose last argument is none of its
// options, whatever it begins with.
const lastOperand = "last operand"

// useGetopt has a command's options read by getopt.
func useGetopt(c *cobra.Command) {
	run := c.RunE
	c.DisableFlagParsing, c.DisableFlagsInUseLine = true, true
	c.RunE = func(c *cobra.Command, args []string) error {
		var last []string
		if c.Annotations[lastOperand] != "" && len(args) > 1 {
			args, last = args[:len(args)-1], args[len(args)-1:]
		}
		operands, err := getopt(c.Flags(), append([]string{c.Name()}, args...), false)
		if err != nil {
			return helped(c, err)
		}
		if c.Annotations[lastOperand] != "" && last == nil {
			return usagef("Not enough arguments")
		}
		return run(c, append(operands, last...))
	}
}

// helped prints the help of a command, or the version, if that is what was
// asked for.
func helped(c *cobra.Command, err error) error {
	switch err {
	case errHelp:
		return c.Help()
	case errVersion:
		_, err = fmt.Fprint(c.OutOrStdout(), versionText(c.Root().Name()))
	}
	return err
}

// qemuVersion is the version of qemu-img that the commands are those of. What
// calls qemu-img looks for it.
const qemuVersion = "7.2.0"

// versionText is what --version prints. Under the name of qemu-img it begins as
// qemu-img's does.
func versionText(name string) string {
	if name == "qemu-img" {
		return fmt.Sprintf("qemu-img version %s (qimg %s)\nCopyright (c) the authors of qimg\n", qemuVersion, version())
	}
	return fmt.Sprintf("%s version %s\n", name, version())
}

func version() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}

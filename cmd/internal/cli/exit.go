package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
)

// Exit codes of the program, those of qemu-img.
const (
	exitOK          = 0
	exitFailed      = 1   // the command failed, or was not used as it should be
	exitCorrupt     = 2   // check: the image is corrupt
	exitLeaks       = 3   // check: the image is good but has leaked clusters
	exitNoCheck     = 63  // check: the format has nothing to check
	exitInterrupted = 130 // stopped by a signal; nothing was left behind
)

// cmdError is an error with what else has to be said about it.
type cmdError struct {
	code int
	err  error  // nil: everything has been said already
	hint string // lines that follow the message as they are
}

func (e *cmdError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit status %d", e.code)
	}
	return e.err.Error()
}

func (e *cmdError) Unwrap() error { return e.err }

// messagef is an error in the words of qemu-img, which begin in upper case.
func messagef(format string, args ...any) error { return fmt.Errorf(format, args...) }

// exit ends a command with a status and no message.
func exit(code int) error { return &cmdError{code: code} }

// withHint adds lines to an error, each to end in a newline.
func withHint(err error, hint string) error {
	return &cmdError{code: exitFailed, err: err, hint: hint}
}

// usagef is an error in the way that the program was called.
func usagef(format string, args ...any) error {
	return &usageError{fmt.Sprintf(format, args...)}
}

type usageError struct{ text string }

func (e *usageError) Error() string { return e.text }

// report prints an error in the way of qemu-img and returns the exit status.
func report(w io.Writer, name string, err error) int {
	var usage *usageError
	var cmd *cmdError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &usage):
		message(w, name, err)
		fmt.Fprintf(w, "Try '%s --help' for more information\n", name)
		return exitFailed
	case errors.As(err, &cmd):
		if cmd.err != nil {
			message(w, name, cmd.err)
			io.WriteString(w, cmd.hint)
		}
		return cmd.code
	case errors.Is(err, context.Canceled):
		fmt.Fprintf(w, "%s: interrupted\n", name)
		return exitInterrupted
	}
	message(w, name, err)
	return exitFailed
}

// message prints an error, each line of it behind the name of the program.
func message(w io.Writer, name string, err error) {
	for line := range strings.SplitSeq(err.Error(), "\n") {
		fmt.Fprintf(w, "%s: %s\n", name, line)
	}
}

// warn prints a warning.
func (h Host) warn(format string, args ...any) {
	message(h.Err, h.name+": warning", fmt.Errorf(format, args...))
}

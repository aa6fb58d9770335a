package cli

import (
	"errors"
	"strconv"
	"strings"

	"github.com/spf13/pflag"
)

// What was asked for instead of running a command.
var (
	errHelp    = errors.New("the help was asked for")
	errVersion = errors.New("the version was asked for")
)

// getopt reads a command line as getopt_long of glibc does, whose ways scripts
// rely on: options and operands in any order up to "--", letters in groups,
// long names cut short, each option dealt with as it comes. argv[0] is the name
// of the program or command. It returns the operands.
//
// An error is a usage error in the words of qemu-img, which names the argument
// before the one that comes next; what the value of an option refuses; errHelp
// or errVersion.
func getopt(flags *pflag.FlagSet, argv []string, stopAtOperand bool) ([]string, error) {
	g := scanner{argv: append([]string{}, argv...), next: 1, first: 1, last: 1}
	for {
		if !g.advance(stopAtOperand) {
			return g.argv[g.next:], nil
		}
		f, value, err := g.option(flags)
		if err != nil {
			return nil, err
		}
		switch f.Name {
		case "help":
			return nil, errHelp
		case "version":
			return nil, errVersion
		}
		if err := f.Value.Set(value); err != nil {
			if number := (*strconv.NumError)(nil); errors.As(err, &number) {
				err = usagef("--%s expects a number, not '%s'", f.Name, value)
			}
			return nil, err
		}
		f.Changed = true
	}
}

// scanner is the state of getopt. argv[first:last] are the operands passed by
// so far; they move behind the options.
type scanner struct {
	argv        []string
	next        int // the argument to look at
	first, last int
	letters     string // not yet looked at in the group at next
}

// advance goes to the next option and reports whether there is one. At the end
// the operands are argv[next:].
func (g *scanner) advance(stopAtOperand bool) bool {
	if g.letters != "" {
		return true
	}
	g.collect()
	if !stopAtOperand {
		for g.next < len(g.argv) && !isOption(g.argv[g.next]) {
			g.next++
		}
		g.last = g.next
	}
	if g.next < len(g.argv) && g.argv[g.next] == "--" {
		g.next++
		g.collect()
		g.last, g.next = len(g.argv), len(g.argv)
	}
	if g.next == len(g.argv) {
		g.next = g.first
		return false
	}
	if !isOption(g.argv[g.next]) {
		return false
	}
	if !strings.HasPrefix(g.argv[g.next], "--") {
		g.letters = g.argv[g.next][1:]
	}
	return true
}

// collect moves the operands passed by behind the options that came after them.
func (g *scanner) collect() {
	if g.first == g.last {
		g.first = g.next
	} else if g.last != g.next {
		operands := append([]string{}, g.argv[g.first:g.last]...)
		copy(g.argv[g.first:], g.argv[g.last:g.next])
		g.first += g.next - g.last
		copy(g.argv[g.first:], operands)
	}
	g.last = g.next
}

func isOption(arg string) bool { return len(arg) > 1 && arg[0] == '-' }

// option takes the option at next with its value.
func (g *scanner) option(flags *pflag.FlagSet) (f *pflag.Flag, value string, err error) {
	var attached bool
	if g.letters == "" {
		var name string
		name, value, attached = strings.Cut(g.argv[g.next][2:], "=")
		f = findLong(flags, name)
		g.next++
		if f == nil || attached && f.NoOptDefVal != "" {
			return nil, "", usagef("unrecognized option '%s'", g.argv[g.next-1])
		}
	} else {
		letter := g.letters[:1]
		if g.letters = g.letters[1:]; g.letters == "" {
			g.next++
		}
		if letter[0] < 0x80 {
			f = flags.ShorthandLookup(letter)
		}
		if f == nil {
			return nil, "", usagef("unrecognized option '%s'", g.argv[g.next-1])
		}
		if f.NoOptDefVal == "" && g.letters != "" {
			value, attached = g.letters, true
			g.letters = ""
			g.next++
		}
	}
	switch {
	case f.NoOptDefVal != "":
		return f, f.NoOptDefVal, nil
	case attached:
		return f, value, nil
	case g.next == len(g.argv):
		return nil, "", usagef("missing argument for option '%s'", g.argv[g.next-1])
	}
	g.next++
	return f, g.argv[g.next-1], nil
}

// findLong finds an option by its name, or by what only its name begins with.
func findLong(flags *pflag.FlagSet, name string) *pflag.Flag {
	if f := flags.Lookup(name); f != nil {
		return f
	}
	var found []*pflag.Flag
	flags.VisitAll(func(f *pflag.Flag) {
		if strings.HasPrefix(f.Name, name) {
			found = append(found, f)
		}
	})
	if len(found) != 1 {
		return nil
	}
	return found[0]
}

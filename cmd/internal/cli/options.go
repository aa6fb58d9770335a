package cli

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
)

// optionType is the type of a creation option.
type optionType int

const (
	stringOption optionType = iota
	boolOption
	numberOption
	sizeOption
)

func (t optionType) String() string {
	return [...]string{"str", "bool (on/off)", "num", "size"}[t]
}

// optionDesc describes an option of -o.
type optionDesc struct {
	name string
	typ  optionType
	help string
	def  string // "": none
}

// optionList is what -o says. It keeps the order of its descriptions.
type optionList struct {
	descs  []optionDesc
	values map[string]string // as given; numbers and sizes in decimal
}

func newOptionList(descs []optionDesc) *optionList {
	return &optionList{descs, map[string]string{}}
}

// optionArgs are the arguments of -o, which can be given several times. It is a
// pflag.Value.
type optionArgs []string

// String joins the arguments.
func (o *optionArgs) String() string { return strings.Join(*o, ",") }

// Type is the name in the help.
func (o *optionArgs) Type() string { return "options" }

// Set adds an argument. It refuses one whose commas would join with the ones
// between the arguments.
func (o *optionArgs) Set(arg string) error {
	tail := len(arg) - len(strings.TrimRight(arg, ","))
	if arg == "" || arg[0] == ',' || tail%2 != 0 {
		return messagef("Invalid option list: %s", arg)
	}
	*o = append(*o, arg)
	return nil
}

// optionPair is an option as it is given.
type optionPair struct {
	name, value string
	short       bool // it has no value of its own
}

// splitOptions splits "a=b,c,nod" into names and values; ",," in a value is a
// comma. An option without a value is "on", and "off" if it begins with "no".
func splitOptions(s string) (pairs []optionPair) {
	for s != "" {
		i := strings.IndexAny(s, "=,")
		if i < 0 {
			i = len(s)
		}
		p := optionPair{s[:i], "on", true}
		if strings.HasPrefix(s[i:], "=") {
			p.short = false
			p.value, s = optionValue(s[i+1:])
		} else {
			if off, ok := strings.CutPrefix(p.name, "no"); ok {
				p.name, p.value = off, "off"
			}
			s = strings.TrimPrefix(s[i:], ",")
		}
		pairs = append(pairs, p)
	}
	return pairs
}

// optionValue cuts a value off at a comma that is not doubled.
func optionValue(s string) (value, rest string) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == ',' {
			if !strings.HasPrefix(s[i+1:], ",") {
				return b.String(), s[i+1:]
			}
			i++
		}
		b.WriteByte(s[i])
	}
	return b.String(), ""
}

// wantsHelp reports whether an option list asks for the list of options.
func wantsHelp(s string) bool {
	for _, p := range splitOptions(s) {
		if p.short && p.value == "on" && (p.name == "help" || p.name == "?") {
			return true
		}
	}
	return false
}

// parse adds the options of -o.
func (l *optionList) parse(s string) error {
	for _, p := range splitOptions(s) {
		if err := l.set(p.name, p.value); err != nil {
			return err
		}
	}
	return nil
}

// index finds a description; -1 if there is none.
func (l *optionList) index(name string) int {
	return slices.IndexFunc(l.descs, func(d optionDesc) bool { return d.name == name })
}

// set gives an option its value.
func (l *optionList) set(name, value string) error {
	i := l.index(name)
	if i < 0 {
		return messagef("Invalid parameter '%s'", name)
	}
	switch l.descs[i].typ {
	case boolOption:
		if _, err := parseBool(value); err != nil {
			return messagef("Parameter '%s' expects 'on' or 'off'", name)
		}
	case numberOption:
		n, err := strconv.ParseUint(strings.TrimPrefix(value, "-"), 0, 64)
		if strings.HasPrefix(value, "-") {
			n = -n // as strtoull has it
		}
		if errors.Is(err, strconv.ErrRange) {
			return messagef("Value '%s' is too large for parameter '%s'", value, name)
		}
		if err != nil {
			return messagef("Parameter '%s' expects a number", name)
		}
		value = strconv.FormatUint(n, 10)
	case sizeOption:
		n, err := parseSize(value)
		if errors.Is(err, errSizeRange) {
			return messagef("Value '%s' is out of range for parameter '%s'", value, name)
		}
		if err != nil {
			return withHint(messagef("Parameter '%s' expects a non-negative number below 2^64", name),
				"Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively.\n")
		}
		value = strconv.FormatUint(n, 10)
	}
	l.values[name] = value
	return nil
}

func parseBool(s string) (bool, error) {
	switch s {
	case "on", "yes", "true", "y":
		return true, nil
	case "off", "no", "false", "n":
		return false, nil
	}
	return false, errors.New("neither on nor off")
}

// has reports whether an option was given.
func (l *optionList) has(name string) bool { _, ok := l.values[name]; return ok }

// str returns the value of an option, or its default.
func (l *optionList) str(name string) string {
	if v, ok := l.values[name]; ok {
		return v
	}
	if i := l.index(name); i >= 0 {
		return l.descs[i].def
	}
	return ""
}

// bool returns whether an option is on.
func (l *optionList) bool(name string) bool {
	on, _ := parseBool(l.str(name))
	return on
}

// uint returns the value of a number or a size.
func (l *optionList) uint(name string) uint64 {
	n, _ := strconv.ParseUint(l.str(name), 10, 64)
	return n
}

// String lists the options that have a value.
func (l *optionList) String() string {
	var parts []string
	for _, d := range l.descs {
		v := l.str(d.name)
		if v == "" && !l.has(d.name) {
			continue
		}
		switch d.typ {
		case stringOption:
			v = strings.ReplaceAll(v, ",", ",,")
		case numberOption, sizeOption:
			v = strconv.FormatInt(int64(l.uint(d.name)), 10) // as QEMU prints them
		}
		parts = append(parts, d.name+"="+v)
	}
	return strings.Join(parts, " ")
}

// printOptionHelp lists the options of a format.
func printOptionHelp(w io.Writer, title string, descs []optionDesc) {
	descs = slices.SortedFunc(slices.Values(descs), func(a, b optionDesc) int { return strings.Compare(a.name, b.name) })
	fmt.Fprintf(w, "%s:\n", title)
	for _, d := range descs {
		fmt.Fprintf(w, "  %-22s - %s\n", fmt.Sprintf("%s=<%s>", d.name, d.typ), d.help)
	}
}

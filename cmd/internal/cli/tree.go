package cli

import (
	"bufio"
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"qimg/cloudimg/guest"
	"qimg/cmd/internal/term"
)

type treeOptions struct {
	open   openOptions
	all    bool
	dirs   bool
	level  int
	output string
}

func newTree(host Host) *cobra.Command {
	o := treeOptions{}
	cmd := &cobra.Command{
		Use:   "tree [-a] [-d] [-L LEVEL] [--output=human|json] IMAGE[@SNAPSHOT][:PART][:/PATH]",
		Short: "Show a directory in an image with all that is below",
		Long: "Show a directory in an image with all that is below, as tree(1) does.\n\n" + placeHelp + "\n" +
			"JSON is an array of two objects. The first is the directory: type (as of ls), name,\n" +
			"target of symlinks, contents of directories: an array of such objects. The second\n" +
			"has type report, directories and files: how many there are.",
		RunE: func(cmd *cobra.Command, args []string) error {
			return runTree(cmd.Context(), host, &o, args)
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.BoolVarP(&o.all, "all", "a", false, "names that begin with a dot, too")
	f.BoolVarP(&o.dirs, "dirs-only", "d", false, "directories only")
	f.IntVarP(&o.level, "level", "L", 0, "so many levels at most; 0: all")
	f.StringVar(&o.output, "output", "human", "human or json")
	o.open.addPlaceFlags(f, host)
	return cmd
}

func runTree(ctx context.Context, host Host, o *treeOptions, args []string) error {
	if len(args) != 1 {
		return usagef("Expecting one directory in an image")
	}
	if err := checkOutput(o.output); err != nil {
		return err
	}
	if o.level < 0 {
		return usagef("--level is 0 or more, not %d", o.level)
	}
	images := &places{open: &o.open}
	defer images.close()
	p := imagePlace(args[0], o.open.imageOpts)
	fsys, f, err := images.file(ctx, &p, true)
	if err != nil {
		return err
	}
	if !f.IsDir() {
		return p.error("", fmt.Errorf("not a directory"))
	}
	w := bufio.NewWriterSize(host.Out, 64<<10)
	t := &treePrinter{
		ctx: ctx, o: o, w: w, fs: fsys, at: &p, json: o.output == "json", escape: term.IsTerminal(host.Out),
		seen: map[uint64]bool{}, problems: problems{host: host},
	}
	err = t.print(f)
	if e := w.Flush(); err == nil {
		err = e
	}
	if err != nil {
		return err
	}
	return t.err()
}

// treePrinter draws a tree.
type treePrinter struct {
	ctx         context.Context
	o           *treeOptions
	w           *bufio.Writer
	fs          guest.FS
	at          *place
	json        bool
	escape      bool
	seen        map[uint64]bool
	dirs, files int64
	problems
}

func (t *treePrinter) print(f *guest.File) error {
	if t.json {
		var o object
		o.addText("name", t.at.path)
		t.w.WriteString("[\n" + t.open("directory", o))
		if err := t.dir(f, "", "  ", 0); err != nil {
			return err
		}
		fmt.Fprintf(t.w, "]},\n{\"type\": \"report\", \"directories\": %d, \"files\": %d}\n]\n", t.dirs, t.files)
		return nil
	}
	fmt.Fprintln(t.w, t.name(t.at.arg))
	if err := t.dir(f, "", "", 0); err != nil {
		return err
	}
	plural := func(n int64, one, many string) string {
		if n == 1 {
			return "1 " + one
		}
		return fmt.Sprintf("%d %s", n, many)
	}
	fmt.Fprintf(t.w, "\n%s", plural(t.dirs, "directory", "directories"))
	if !t.o.dirs {
		fmt.Fprintf(t.w, ", %s", plural(t.files, "file", "files"))
	}
	fmt.Fprintln(t.w)
	return nil
}

func (t *treePrinter) name(s string) string {
	if t.escape {
		return printable(s)
	}
	return s
}

// open begins the object of a file; one of a directory is left open.
func (t *treePrinter) open(typ string, o object) string {
	var b strings.Builder
	appendLineJSON(&b, append(object{{"type", typ}}, o...))
	if typ != "directory" {
		return b.String()
	}
	return strings.TrimSuffix(b.String(), "}") + `, "contents": [`
}

// dir draws what is in a directory. indent is what its lines begin with.
func (t *treePrinter) dir(f *guest.File, path, indent string, depth int) error {
	if f.Ino != 0 {
		t.seen[f.Ino] = true
	}
	if path != "" {
		path += "/"
	}
	// An entry is drawn when it is known whether it is the last.
	var held *guest.Entry
	first := true
	for e, err := range guest.Sorted(t.fs, f) {
		if err := t.ctx.Err(); err != nil {
			return err
		}
		switch {
		case err != nil:
			t.add(t.at.error(path, err))
			continue
		case e.Name[0] == '.' && !t.o.all:
			continue
		case t.o.dirs && e.Type != guest.ModeDir && e.Type != 0:
			continue
		}
		if held != nil {
			if err := t.entry(f, held, path, indent, depth, first, false); err != nil {
				return err
			}
			first = false
		}
		held = &e
	}
	if held == nil {
		return nil
	}
	return t.entry(f, held, path, indent, depth, first, true)
}

// entry draws an entry and what is below.
func (t *treePrinter) entry(dir *guest.File, e *guest.Entry, path, indent string, depth int, first, last bool) error {
	path += e.Name
	typ := e.Type
	var f *guest.File
	var err error
	if typ == 0 || typ == guest.ModeDir || typ == guest.ModeSymlink {
		if f, err = t.fs.Child(dir, e); err == nil {
			typ = f.Type()
		}
	}
	target := ""
	if err == nil && typ == guest.ModeSymlink {
		target, err = t.fs.Readlink(f)
	}
	if err != nil {
		t.add(t.at.error(path, err))
	}
	isDir := typ == guest.ModeDir && err == nil
	if isDir {
		t.dirs++
	} else {
		t.files++
	}
	if t.json {
		var o object
		o.addText("name", e.Name)
		if target != "" {
			o.addText("target", target)
		}
		if !first {
			t.w.WriteByte(',')
		}
		t.w.WriteString("\n" + indent + t.open(typeName(typ), o))
	} else {
		branch := "├── "
		if last {
			branch = "└── "
		}
		t.w.WriteString(indent + branch + t.name(e.Name))
		if target != "" {
			t.w.WriteString(" -> " + t.name(target))
		}
		t.w.WriteByte('\n')
	}
	if !isDir {
		if t.json && typ == guest.ModeDir { // which cannot be read
			t.w.WriteString("]}")
		}
		return nil
	}
	below := indent + "│   "
	switch {
	case t.json:
		below = indent + "  "
	case last:
		below = indent + "    "
	}
	switch {
	case f.Ino != 0 && t.seen[f.Ino]:
		t.add(t.at.error(path, fmt.Errorf("the directory was met before, and is left out")))
	case depth == maxListDepth:
		t.add(t.at.error(path, fmt.Errorf("more than %d directories deep", maxListDepth)))
	case t.o.level == 0 || depth+1 < t.o.level:
		err = t.dir(f, path, below, depth+1)
	}
	if t.json {
		t.w.WriteString("]}")
	}
	return err
}

package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"qimg/cloudimg/guest"
	"qimg/cmd/internal/term"
)

type lsOptions struct {
	open      openOptions
	long      bool
	recursive bool
	all       bool
	directory bool
	escape    bool
	xattrs    bool
	output    string
}

func newLs(host Host) *cobra.Command {
	o := lsOptions{}
	cmd := &cobra.Command{
		Use:   "ls [-l] [-R] [-a] [-d] [-b] [--xattrs] [--output=human|json] IMAGE[@SNAPSHOT][:PART][:/PATH]...",
		Short: "List directories in images",
		Long: "List directories in images, as ls does: by name, in the order of bytes. Owners are\n" +
			"numbers. On a terminal what is not printable in a name is shown as an escape.\n\n" + placeHelp + "\n" +
			"JSON is an array with an object for each entry: path, type (file, directory,\n" +
			"symlink, char-device, block-device, fifo, socket), inode, mode (octal), uid, gid,\n" +
			"size in bytes, blocks of 512 bytes, links, atime-sec and -nsec and the same of\n" +
			"mtime, ctime and crtime (left out where the file system has none), major and minor\n" +
			"of devices, target of symlinks, with --xattrs xattrs: an array of name and value.\n" +
			"A text that is not UTF-8 is in hexadecimal digits under path-hex, target-hex,\n" +
			"name-hex or value-hex. Hidden files are always among them.",
		Example: "  qimg ls -l disk.qcow2:/etc\n" +
			"  qimg ls -R --output=json disk.qcow2@before:1:/var/lib",
		RunE: func(cmd *cobra.Command, args []string) error {
			return runLs(cmd.Context(), host, &o, args)
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.BoolVarP(&o.long, "long", "l", false, "type, mode, links, owner, size and time of modification, too")
	f.BoolVarP(&o.recursive, "recursive", "R", false, "list what is below, too")
	f.BoolVarP(&o.all, "all", "a", false, "list names that begin with a dot, too")
	f.BoolVarP(&o.directory, "directory", "d", false, "list directories themselves, not what is in them")
	f.BoolVarP(&o.escape, "escape", "b", false, "show what is not printable as escapes, whatever the output is")
	f.BoolVar(&o.xattrs, "xattrs", false, "extended attributes, too: of JSON")
	f.StringVar(&o.output, "output", "human", "human or json")
	o.open.addPlaceFlags(f, host)
	return cmd
}

func runLs(ctx context.Context, host Host, o *lsOptions, args []string) error {
	if len(args) == 0 {
		return usagef("Expecting an image file name")
	}
	if err := checkOutput(o.output); err != nil {
		return err
	}
	images := &places{open: &o.open}
	defer images.close()
	w := bufio.NewWriterSize(host.Out, 64<<10)
	l := &lister{ctx: ctx, o: o, w: w, problems: problems{host: host}}
	l.escape = o.escape || term.IsTerminal(host.Out)
	if o.output == "json" {
		l.json = &jsonList{w: w}
	}
	err := l.list(images, args)
	if l.json != nil {
		l.json.close()
	}
	if e := w.Flush(); err == nil {
		err = e
	}
	if err != nil {
		return err
	}
	return l.err()
}

// lister writes lists of files.
type lister struct {
	ctx    context.Context
	o      *lsOptions
	w      *bufio.Writer
	escape bool
	json   *jsonList
	lists  int // directories listed so far, and the files before them
	problems

	// Of the operand that is listed.
	at   *place
	fs   guest.FS
	seen map[uint64]bool // directories on the way and before
}

// list lists the operands: first the files, then the directories.
func (l *lister) list(images *places, args []string) error {
	type dir struct {
		at   place
		fs   guest.FS
		file *guest.File
	}
	var files []row
	var dirs []dir
	for _, arg := range args {
		at := imagePlace(arg, l.o.open.imageOpts)
		fsys, f, err := images.file(l.ctx, &at, !l.o.long && !l.o.directory)
		if err != nil {
			l.add(err)
			continue
		}
		if f.IsDir() && !l.o.directory {
			dirs = append(dirs, dir{at, fsys, f})
			continue
		}
		l.at, l.fs = &at, fsys
		if l.json != nil {
			l.writeJSON(at.path, "", f)
			continue
		}
		files = append(files, l.row(arg, f))
	}
	if len(files) > 0 {
		l.writeRows(files)
		l.lists++
	}
	headers := l.o.recursive || len(args) > 1
	for i := range dirs {
		d := &dirs[i]
		l.at, l.fs, l.seen = &d.at, d.fs, map[uint64]bool{}
		if err := l.dir(d.file, "", headers, 0); err != nil {
			return err
		}
	}
	return nil
}

// dir lists a directory, whose path is one from the operand on.
func (l *lister) dir(f *guest.File, path string, header bool, depth int) error {
	if l.json == nil {
		if l.lists++; l.lists > 1 {
			l.w.WriteByte('\n')
		}
		if header {
			fmt.Fprintf(l.w, "%s:\n", l.name(l.at.join(path)))
		}
	}
	if f.Ino != 0 {
		l.seen[f.Ino] = true
	}
	prefix := path
	if prefix != "" {
		prefix += "/"
	}
	var dots []row
	if l.o.all && l.json == nil {
		dots = l.dots(f, path)
	}
	var dirs []guest.Entry
	for batch, err := range guest.Batches(l.fs, f) {
		if err == nil {
			err = l.ctx.Err()
			if err != nil {
				return err
			}
		}
		if err != nil {
			l.add(l.at.error(path, err))
			continue
		}
		rows := l.rows(f, prefix, batch, &dirs)
		if dots != nil {
			rows = append(dots, rows...)
			slices.SortStableFunc(rows, func(a, b row) int { return strings.Compare(a.name, b.name) })
			dots = nil
		}
		l.writeRows(rows)
	}
	l.writeRows(dots)
	if !l.o.recursive {
		return nil
	}
	for i := range dirs {
		e := &dirs[i]
		sub, err := l.fs.Child(f, e)
		switch {
		case err != nil:
		case !sub.IsDir():
			continue
		case sub.Ino != 0 && l.seen[sub.Ino]:
			err = errors.New("the directory was met before, and is left out")
		case depth == maxListDepth:
			err = fmt.Errorf("more than %d directories deep", maxListDepth)
		}
		if err != nil {
			l.add(l.at.error(prefix+e.Name, err))
			continue
		}
		if err := l.dir(sub, prefix+e.Name, header, depth+1); err != nil {
			return err
		}
	}
	return nil
}

// maxListDepth is how deep ls -R goes, so that a damaged tree does not fill
// memory.
const maxListDepth = 4096

// rows makes the rows of entries, and adds those that can be directories to
// dirs. JSON is written at once.
func (l *lister) rows(dir *guest.File, prefix string, batch []guest.Entry, dirs *[]guest.Entry) []row {
	var rows []row
	for i := range batch {
		e := &batch[i]
		if e.Name[0] == '.' && !l.o.all && l.json == nil {
			continue
		}
		if l.o.recursive && (e.Type == guest.ModeDir || e.Type == 0) {
			*dirs = append(*dirs, *e)
		}
		if !l.o.long && l.json == nil {
			rows = append(rows, row{name: e.Name})
			continue
		}
		f, err := l.fs.Child(dir, e)
		if err != nil {
			l.add(l.at.error(prefix+e.Name, err))
			continue
		}
		if l.json != nil {
			l.writeJSON(strings.TrimSuffix(l.at.path, "/")+"/"+prefix+e.Name, prefix+e.Name, f)
			continue
		}
		rows = append(rows, l.row(e.Name, f))
	}
	return rows
}

// dots are the rows of "." and "..".
func (l *lister) dots(dir *guest.File, path string) []row {
	parent, err := l.fs.Lookup(strings.TrimSuffix(l.at.path, "/")+"/"+path+"/..", true)
	if err != nil {
		l.add(l.at.error(path, err))
		return []row{l.row(".", dir)}
	}
	return []row{l.row(".", dir), l.row("..", parent)}
}

// row is a line of a list.
type row struct {
	name, target string
	mode         string // "": the name alone
	links        string
	uid, gid     string
	size         string
	major, minor string // of a device, in place of the size
	time         string
	acl          bool
}

// row tells of a file.
func (l *lister) row(name string, f *guest.File) row {
	if !l.o.long {
		return row{name: name}
	}
	r := row{
		name: name, mode: modeText(f.Mode), links: strconv.Itoa(int(f.Links)),
		uid: strconv.FormatUint(uint64(f.UID), 10), gid: strconv.FormatUint(uint64(f.GID), 10),
		time: f.Mtime.Local().Format("2006-01-02 15:04"),
	}
	switch f.Type() {
	case guest.ModeChar, guest.ModeBlock:
		r.major, r.minor = strconv.Itoa(int(f.Major)), strconv.Itoa(int(f.Minor))
	case guest.ModeSymlink:
		r.size = strconv.FormatInt(f.Size, 10)
		target, err := l.fs.Readlink(f)
		if err != nil {
			l.add(l.at.error("", fmt.Errorf("%s: %w", name, err)))
		}
		r.target = target
	default:
		r.size = strconv.FormatInt(f.Size, 10)
	}
	for x, err := range l.fs.Xattrs(f) {
		if err == nil && strings.HasPrefix(x.Name, "system.posix_acl_") {
			r.acl = true
		}
	}
	return r
}

// writeRows writes lines in columns.
func (l *lister) writeRows(rows []row) {
	var links, uid, gid, size, major, minor int
	acl := false
	for i := range rows {
		r := &rows[i]
		links, uid, gid = max(links, len(r.links)), max(uid, len(r.uid)), max(gid, len(r.gid))
		size, major, minor = max(size, len(r.size)), max(major, len(r.major)), max(minor, len(r.minor))
		acl = acl || r.acl
	}
	if major > 0 {
		size = max(size, major+2+minor)
	}
	for i := range rows {
		r := &rows[i]
		if r.mode != "" {
			l.w.WriteString(r.mode)
			switch {
			case r.acl:
				l.w.WriteByte('+')
			case acl:
				l.w.WriteByte(' ')
			}
			what := r.size
			if r.minor != "" {
				what = fmt.Sprintf("%s, %*s", r.major, minor, r.minor)
			}
			fmt.Fprintf(l.w, " %*s %*s %*s %*s %s ", links, r.links, uid, r.uid, gid, r.gid, size, what, r.time)
		}
		l.w.WriteString(l.name(r.name))
		if r.target != "" {
			l.w.WriteString(" -> ")
			l.w.WriteString(l.name(r.target))
		}
		l.w.WriteByte('\n')
	}
}

// name is a name as it is shown.
func (l *lister) name(s string) string {
	if l.escape {
		return printable(s)
	}
	return s
}

// writeJSON writes the object of a file. below is its path from the operand on.
func (l *lister) writeJSON(path, below string, f *guest.File) {
	var o object
	o.addText("path", path)
	o, err := fileJSON(o, l.fs, f, l.o.xattrs)
	if err != nil {
		l.add(l.at.error(below, err))
	}
	l.json.add(o)
}

// jsonList is an array of JSON that is written as it comes.
type jsonList struct {
	w io.Writer
	n int
}

func (j *jsonList) add(v any) {
	var b strings.Builder
	if j.n++; j.n == 1 {
		b.WriteString("[\n    ")
	} else {
		b.WriteString(",\n    ")
	}
	appendJSON(&b, v, 1)
	io.WriteString(j.w, b.String())
}

func (j *jsonList) close() {
	if j.n == 0 {
		io.WriteString(j.w, "[]\n")
		return
	}
	io.WriteString(j.w, "\n]\n")
}

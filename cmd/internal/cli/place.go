package cli

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/pflag"

	"qimg/cloudimg/guest"
)

// placeHelp tells how files in images are named.
const placeHelp = "A file in an image is named IMAGE[@SNAPSHOT][:PART]:/PATH. PART is the number of a\n" +
	"partition, or label=, uuid=, partlabel= or partuuid= with a value; without it the only\n" +
	"file system is meant, or the one that holds an operating system. SNAPSHOT is the id or\n" +
	"name of one inside the image. An image whose own name has @ or : in it is found, too:\n" +
	"of all ways to read the argument the one with the longest name of a file that is there\n" +
	"is taken. Symlinks in the image are followed inside the image.\n"

// place is a file in an image, as an argument names it.
type place struct {
	arg             string // all of it
	image, snapshot string
	part            string // "": the default
	path            string // begins with a slash
}

// parsePlace reads an argument. It is not ok if it is no place in an image: there
// is no ":/" in it, or a file of that name is there.
func parsePlace(arg string, imageOpts bool) (p place, ok bool) {
	named := imageOpts || strings.HasPrefix(arg, "json:") // not by the path of a file
	if !named && isFile(arg) {
		return place{}, false
	}
	for end := len(arg); ; {
		i := strings.LastIndex(arg[:end], ":/")
		if i < 0 {
			break
		}
		p := place{arg: arg, path: arg[i+1:]}
		if p.parseImage(arg[:i], named) {
			return p, true
		}
		end = i + 1
	}
	i := strings.LastIndex(arg, ":/")
	if i < 1 {
		return place{}, false
	}
	return place{arg: arg, image: arg[:i], path: arg[i+1:]}, true
}

// parseImage reads what is in front of the path, and reports whether the file
// of the image is there.
func (p *place) parseImage(s string, named bool) bool {
	try := func(image, part string) bool {
		p.part = part
		if named || isFile(image) {
			p.image, p.snapshot = image, ""
			return true
		}
		for i := len(image) - 1; i > 0; i-- {
			if image[i] == '@' && i < len(image)-1 && isFile(image[:i]) {
				p.image, p.snapshot = image[:i], image[i+1:]
				return true
			}
		}
		return false
	}
	if !named && isFile(s) {
		return try(s, "")
	}
	for i := len(s) - 1; i > 0; i-- {
		if s[i] == ':' && guest.IsSelector(s[i+1:]) && try(s[:i], s[i+1:]) {
			return true
		}
	}
	return try(s, "")
}

// isFile reports whether a path of the host is that of something.
func isFile(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// imagePlace is parsePlace for an argument that is an image at least: without a
// path it is the root directory.
func imagePlace(arg string, imageOpts bool) place {
	if p, ok := parsePlace(arg, imageOpts); ok {
		return p
	}
	p := place{arg: arg, path: "/"}
	if !p.parseImage(arg, imageOpts || strings.HasPrefix(arg, "json:")) {
		p.image, p.snapshot, p.part = arg, "", ""
	}
	return p
}

// join returns the argument that names a file below the place, or the place for
// "".
func (p *place) join(path string) string {
	if path == "" {
		return p.arg
	}
	arg := p.arg
	if strings.LastIndex(arg, ":/") < 0 || !strings.HasSuffix(arg, p.path) {
		arg += ":/"
	}
	return strings.TrimSuffix(arg, "/") + "/" + path
}

// addPlaceFlags adds the options of the commands that look at files in images.
func (o *openOptions) addPlaceFlags(f *pflag.FlagSet, host Host) {
	o.addFlags(f, host)
	o.addForceShare(f)
	o.chain = true
}

// places are the images that a command looks into. Each is opened once.
type places struct {
	open   *openOptions
	fs     guest.FSOptions
	images []*openPlace
	shared string // an image that the command has open for writing
}

// openPlace is an image that was taken apart.
type openPlace struct {
	image, snapshot string
	img             *image
	disk            *guest.Disk
	trees           map[int]guest.FS // by number of the partition
}

// close closes all images.
func (o *places) close() {
	for _, p := range o.images {
		p.img.close()
	}
}

// disk opens the image of a place.
func (o *places) disk(ctx context.Context, p *place) (*openPlace, error) {
	for _, d := range o.images {
		if d.image == p.image && d.snapshot == p.snapshot {
			return d, nil
		}
	}
	open := *o.open
	open.forceShare = open.forceShare || o.shared != "" && p.image == o.shared
	img, err := openImage(ctx, p.image, &open)
	if err != nil {
		return nil, couldNotOpen(p.image, err)
	}
	d := &openPlace{p.image, p.snapshot, img, nil, map[int]guest.FS{}}
	if img.inUse != nil && !open.forceShare {
		err = img.inUse
	}
	if err == nil {
		d.img, err = useSnapshot(ctx, img, &snapshotArg{any: p.snapshot}, &open)
	}
	if err == nil {
		d.disk, err = guest.Open(d.img.reader())
	}
	if err != nil {
		d.img.close()
		return nil, couldNotOpen(p.image, err)
	}
	o.images = append(o.images, d)
	return d, nil
}

// tree opens the file system of a place.
func (o *places) tree(ctx context.Context, p *place) (guest.FS, error) {
	d, err := o.disk(ctx, p)
	if err != nil {
		return nil, err
	}
	v, err := d.disk.Select(p.part)
	if err != nil {
		return nil, selectError(p, err)
	}
	if t := d.trees[v.Number]; t != nil {
		return t, nil
	}
	t, err := d.disk.FS(v, &o.fs)
	if err != nil {
		return nil, prefixError(p.image, err)
	}
	d.trees[v.Number] = t
	return t, nil
}

// selectError lists what there is to choose from.
func selectError(p *place, err error) error {
	err = prefixError(p.image, err)
	var sel *guest.SelectError
	if !errors.As(err, &sel) || len(sel.Volumes) < 2 {
		return err
	}
	var hint strings.Builder
	hint.WriteString("Partitions are named as in " + printable(p.image) + ":1:/path. There are:\n")
	for i := range sel.Volumes {
		v := &sel.Volumes[i]
		fmt.Fprintf(&hint, "%4d  %-9s  %s\n", v.Number, humanSize(uint64(v.Size)), printable(volumeText(v)))
	}
	return withHint(err, hint.String())
}

// volumeText tells what a volume is filled with.
func volumeText(v *guest.Volume) string {
	s := v.FS.Type
	if s == "" {
		s = "nothing known"
		if v.PartType != "" {
			s += " (" + v.PartType + ")"
		}
	}
	if v.FS.Label != "" {
		s += ", label " + v.FS.Label
	}
	return s
}

// file returns the file of a place and the file system that it is in.
func (o *places) file(ctx context.Context, p *place, follow bool) (guest.FS, *guest.File, error) {
	t, err := o.tree(ctx, p)
	if err != nil {
		return nil, nil, err
	}
	f, err := t.Lookup(p.path, follow)
	if err != nil {
		return nil, nil, p.error("", err)
	}
	return t, f, nil
}

// error is an error about a file at or below the place.
func (p *place) error(path string, err error) error {
	var pe *guest.PathError
	if errors.As(err, &pe) {
		path, err = pe.Path, pe.Err
	}
	if errors.Is(err, fs.ErrNotExist) {
		err = errors.New("no such file or directory")
	}
	return fmt.Errorf("%s: %w", printable(p.join(path)), err)
}

// problems are errors that do not stop a command, but make it fail at its end.
type problems struct {
	host Host
	n    int
}

func (p *problems) add(err error) {
	message(p.host.Err, p.host.name, errors.New(printable(err.Error())))
	p.n++
}

// err is the error of the command.
func (p *problems) err() error {
	if p.n == 0 {
		return nil
	}
	return exit(exitFailed)
}

// addText adds a text that can have any bytes. One that is not UTF-8 is in
// hexadecimal digits, under a key of its own.
func (o *object) addText(key, s string) {
	if utf8.ValidString(s) {
		o.add(key, s)
	} else {
		o.add(key+"-hex", hex.EncodeToString([]byte(s)))
	}
}

// typeName is a type in JSON.
func typeName(mode uint16) string {
	switch mode {
	case guest.ModeRegular:
		return "file"
	case guest.ModeDir:
		return "directory"
	case guest.ModeSymlink:
		return "symlink"
	case guest.ModeChar:
		return "char-device"
	case guest.ModeBlock:
		return "block-device"
	case guest.ModeFifo:
		return "fifo"
	case guest.ModeSocket:
		return "socket"
	}
	return "unknown"
}

// fileTime is a time under the name that it has in JSON.
type fileTime struct {
	name string
	at   time.Time
}

// fileTimes are the times of a file. Those that its file system does not keep
// are zero.
func fileTimes(f *guest.File) []fileTime {
	return []fileTime{{"atime", f.Atime}, {"mtime", f.Mtime}, {"ctime", f.Ctime}, {"crtime", f.Crtime}}
}

// fileJSON is all that is told of a file, behind what names it.
func fileJSON(o object, fsys guest.FS, f *guest.File, xattrs bool) (object, error) {
	o = append(o, object{
		{"type", typeName(f.Type())},
		{"inode", f.Ino},
		{"mode", fmt.Sprintf("%04o", f.Mode&0o7777)},
		{"uid", int64(f.UID)},
		{"gid", int64(f.GID)},
		{"size", f.Size},
		{"blocks", f.Blocks},
		{"links", int64(f.Links)},
	}...)
	for _, t := range fileTimes(f) {
		if !t.at.IsZero() {
			o.add(t.name+"-sec", t.at.Unix())
			o.add(t.name+"-nsec", int64(t.at.Nanosecond()))
		}
	}
	switch f.Type() {
	case guest.ModeChar, guest.ModeBlock:
		o.add("major", int64(f.Major))
		o.add("minor", int64(f.Minor))
	case guest.ModeSymlink:
		target, err := fsys.Readlink(f)
		if err != nil {
			return o, err
		}
		o.addText("target", target)
	}
	if !xattrs {
		return o, nil
	}
	list := []any{}
	for x, err := range fsys.Xattrs(f) {
		if err != nil {
			return o, err
		}
		var e object
		e.addText("name", x.Name)
		e.addText("value", x.Value)
		list = append(list, e)
	}
	o.add("xattrs", list)
	return o, nil
}

// modeText is a mode as ls writes it.
func modeText(mode uint16) string {
	b := []byte("?rwxrwxrwx")
	if i := strings.IndexByte("\x01\x02\x04\x06\x08\x0a\x0c", byte(mode>>12)); i >= 0 {
		b[0] = "pcdb-ls"[i]
	}
	for i := range 9 {
		if mode>>(8-i)&1 == 0 {
			b[1+i] = '-'
		}
	}
	for i, bit := range []uint16{0o4000, 0o2000, 0o1000} {
		if mode&bit == 0 {
			continue
		}
		at := 3 + 3*i
		c := "sst"[i]
		if b[at] == '-' {
			c -= 'a' - 'A'
		}
		b[at] = c
	}
	return string(b)
}

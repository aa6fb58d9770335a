package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"

	"qimg/qcow2/blockdev"
)

// ExtractOptions say how an Extractor works. The zero value is the default: contents,
// holes, permissions, times, symlinks and hard links are kept.
type ExtractOptions struct {
	// Archive keeps owners, setuid, setgid and sticky bits, extended attributes
	// and ACLs, too. Owners need root.
	Archive bool
	// Devices makes device nodes, which need root; else they are left out.
	Devices bool
	// Problem is told what cannot be read or made, which does not stop the rest.
	// Nil: the first such error ends the work.
	Problem func(path string, err error)
	// Skipped is told what is left out, and what of all files was not kept.
	Skipped func(path, why string)
}

// maxExtractDepth is how deep a tree is made: each level holds two open files.
const maxExtractDepth = 200

// Extractor copies files of guests to a directory of the host. Whatever a guest
// holds, nothing outside of the directory is touched, and no symlink is followed,
// in the guest or in the directory. Each file is complete or not there: it is made
// under a name of its own, and renamed. It is not safe for concurrent use.
type Extractor struct {
	root  *os.Root
	opts  ExtractOptions
	links map[linkKey]string // paths from root of files that have several names
	paths map[string]linkKey // the other way round
	lost  map[string]bool
	buf   []byte

	// Of the copy that runs.
	ctx  context.Context
	fs   FS
	dirs []*extractDir
}

// linkKey tells files of several file systems apart.
type linkKey struct {
	fs FS // nil: the host, whose files tell their file system
	fileKey
}

func newLinkKey(fsys FS, f *File) linkKey {
	if _, ok := fsys.(hostFS); ok {
		fsys = nil
	}
	return linkKey{fsys, f.key()}
}

// NewExtractor returns an Extractor to root, which stays open.
func NewExtractor(root *os.Root, opts *ExtractOptions) *Extractor {
	x := &Extractor{root: root, links: map[linkKey]string{}, paths: map[string]linkKey{}, lost: map[string]bool{}}
	if opts != nil {
		x.opts = *opts
	}
	return x
}

// Copy copies a file, and all below it if it is a directory, to the name in the
// directory; "." is the directory itself. What is there of another type than a
// directory is replaced at once; directories that are there stay, and get what
// they lack: one keeps its mode and times unless Archive is set. Names of one file
// are linked if an earlier call made the others, too.
func (x *Extractor) Copy(ctx context.Context, name string, fsys FS, from *File) error {
	x.ctx, x.fs = ctx, fsys
	return x.walk(name, from)
}

// Close tells what of all files was not kept.
func (x *Extractor) Close() {
	for _, what := range []string{lostOwner, lostXattrs} {
		if x.lost[what] && x.opts.Skipped != nil {
			x.opts.Skipped("", what)
		}
	}
}

// What can get lost of all files.
const (
	lostOwner  = "owners were not kept: that needs root"
	lostXattrs = "some extended attributes were not kept: the file system or the user cannot have them"
)

// extractDir is a directory that is being filled.
type extractDir struct {
	root *os.Root
	fd   *os.File
	path string // from the root on
	node *Node  // nil: it is not of the guest
	kept bool   // it was there before, and keeps what it is but for what is in it
}

func (d *extractDir) close() {
	d.fd.Close()
	d.root.Close()
}

// join is the path of a name in the directory.
func (d *extractDir) join(name string) string {
	if d.path == "" {
		return name
	}
	return d.path + "/" + name
}

func (x *Extractor) walk(name string, from *File) (err error) {
	defer func() {
		for _, d := range x.dirs {
			d.close()
		}
		x.dirs = nil
	}()
	if err := x.push(x.root, ".", "", nil); err != nil {
		return err
	}
	skip := -1 // depth below which nothing can be made
	for n, err := range Walk(x.ctx, x.fs, from) {
		if err == nil && skip >= 0 && n.Depth > skip {
			continue
		}
		if err == nil {
			skip = -1
			// What was filled is done: x.dirs[0] holds the file at depth 0.
			for len(x.dirs) > n.Depth+1 {
				if err := x.pop(); err != nil {
					return err
				}
			}
			err = x.node(name, n)
			if err != nil && n.IsDir() {
				skip = n.Depth
			}
		}
		if err != nil {
			path := ""
			if n != nil {
				path = n.Path
			}
			if err := x.problem(path, err); err != nil {
				return err
			}
		}
	}
	for len(x.dirs) > 1 {
		if err := x.pop(); err != nil {
			return err
		}
	}
	return nil
}

// problem tells of an error, or returns it if that ends the work.
func (x *Extractor) problem(path string, err error) error {
	var pe *PathError
	if errors.As(err, &pe) {
		path, err = pe.Path, pe.Err
	} else if x.ctx.Err() != nil {
		return x.ctx.Err()
	}
	if x.opts.Problem == nil {
		return &PathError{path, err}
	}
	x.opts.Problem(path, err)
	return nil
}

// push opens a directory to fill it.
func (x *Extractor) push(parent *os.Root, name, path string, n *Node) error {
	before, err := parent.Lstat(name)
	if err != nil {
		return err
	}
	if !before.IsDir() {
		return &fs.PathError{Op: "open", Path: name, Err: errNotDir}
	}
	root, err := parent.OpenRoot(name)
	if err != nil {
		return err
	}
	fd, err := root.Open(".")
	if err != nil {
		root.Close()
		return err
	}
	d := &extractDir{root: root, fd: fd, path: path, node: n}
	if now, err := fd.Stat(); err != nil || !os.SameFile(before, now) {
		d.close()
		return errors.Join(fmt.Errorf("%s: it was replaced meanwhile", name), err)
	}
	x.dirs = append(x.dirs, d)
	return nil
}

// pop ends a directory: its own times change as long as it is filled.
func (x *Extractor) pop() error {
	d := x.dirs[len(x.dirs)-1]
	var err error
	if !d.kept {
		err = x.attributes(d.fd, d.fd, ".", d.node)
	}
	x.dirs = x.dirs[:len(x.dirs)-1]
	d.close()
	if err != nil {
		err = x.problem(d.node.Path, err)
	}
	return err
}

// node makes a file in the directory on top.
func (x *Extractor) node(name string, n *Node) error {
	if n.Depth > 0 {
		name = n.Name
	}
	if n.Depth > maxExtractDepth {
		return fmt.Errorf("more than %d directories deep", maxExtractDepth)
	}
	// What is a name in the guest can be a path here.
	if name != "." && (!filepath.IsLocal(name) || strings.ContainsAny(name, `/`+string(filepath.Separator))) {
		return fmt.Errorf("%q cannot be a name here", name)
	}
	d := x.dirs[len(x.dirs)-1]
	if n.IsDir() {
		err := d.root.Mkdir(name, 0o700)
		made := err == nil
		if err != nil && !errors.Is(err, fs.ErrExist) && name != "." {
			return err
		}
		path := d.join(name)
		if name == "." {
			path = d.path
		}
		if err := x.push(d.root, name, path, n); err != nil {
			return err
		}
		x.dirs[len(x.dirs)-1].kept = !made && !x.opts.Archive
		return nil
	}
	if n.Links > 1 && n.Ino != 0 {
		if first, ok := x.links[newLinkKey(x.fs, n.File)]; ok {
			return x.replace(d, name, func(temp string) error { return x.root.Link(first, d.join(temp)) })
		}
	}
	make := func(temp string) error { return x.special(d, temp, n) }
	switch n.Type() {
	case ModeRegular:
		make = func(temp string) error { return x.file(d, temp, n) }
	case ModeSymlink:
		target, err := x.fs.Readlink(n.File)
		if err != nil {
			return err
		}
		make = func(temp string) error {
			if err := d.root.Symlink(target, temp); err != nil {
				return err
			}
			return x.attributes(nil, d.fd, temp, n)
		}
	case ModeChar, ModeBlock:
		if !x.opts.Devices {
			x.skipped(n.Path, "a device is left out")
			return nil
		}
	case ModeFifo:
	case ModeSocket:
		x.skipped(n.Path, "a socket is left out")
		return nil
	default:
		return fmt.Errorf("a file of type %#x", n.Type())
	}
	if err := x.replace(d, name, make); err != nil {
		return err
	}
	if n.Links > 1 && n.Ino != 0 {
		key, path := newLinkKey(x.fs, n.File), d.join(name)
		x.links[key], x.paths[path] = path, key
	}
	return nil
}

func (x *Extractor) skipped(path, why string) {
	if x.opts.Skipped != nil {
		x.opts.Skipped(path, why)
	}
}

// replace makes something under a name of its own and renames it.
func (x *Extractor) replace(d *extractDir, name string, make func(temp string) error) error {
	temp := fmt.Sprintf(".qimg-%016x.tmp", rand.Uint64())
	if err := make(temp); err != nil {
		if !errors.Is(err, fs.ErrExist) {
			d.root.Remove(temp)
		}
		return err
	}
	if err := d.root.Rename(temp, name); err != nil {
		d.root.Remove(temp)
		return err
	}
	if key, ok := x.paths[d.join(name)]; ok { // what had the name is no more
		delete(x.links, key)
		delete(x.paths, d.join(name))
	}
	// The rename of one name of a file to another does nothing.
	if err := d.root.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// file makes a regular file.
func (x *Extractor) file(d *extractDir, name string, n *Node) (err error) {
	c, err := x.fs.Content(n.File)
	if err != nil {
		return err
	}
	defer c.Close()
	f, err := d.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if e := f.Close(); err == nil {
			err = e
		}
	}()
	if err := x.content(f, c); err != nil {
		return err
	}
	return x.attributes(f, d.fd, name, n)
}

// content copies what a file holds, and leaves out its holes.
func (x *Extractor) content(f *os.File, c Content) error {
	size, err := CopyContent(x.ctx, f, c, &x.buf)
	if err == nil && size < c.Size() {
		err = f.Truncate(c.Size())
	}
	return err
}

// CopyContent writes what a file holds, but for its holes, and returns the end
// of what was written. The buffer is made if there is none.
func CopyContent(ctx context.Context, w io.WriterAt, c Content, buf *[]byte) (end int64, err error) {
	if *buf == nil {
		*buf = make([]byte, 1<<20)
	}
	for off := int64(0); off < c.Size(); {
		x, err := blockdev.NextExtent(c, off)
		if err != nil {
			return end, err
		}
		for next := off + x.Len; off < next; {
			if err := ctx.Err(); err != nil {
				return end, err
			}
			if x.Kind.ReadsZero() {
				off = next
				break
			}
			b := (*buf)[:min(int64(len(*buf)), next-off)]
			if err := readFull(c, b, off); err != nil {
				return end, fmt.Errorf("offset %d: %w", off, err)
			}
			if _, err := w.WriteAt(b, off); err != nil {
				return end, err
			}
			off += int64(len(b))
			end = off
		}
	}
	return end, nil
}

// permissions are the bits of the mode that a file gets.
func (x *Extractor) permissions(n *Node, owned bool) uint32 {
	if x.opts.Archive && owned {
		return uint32(n.Mode & 0o7777)
	}
	return uint32(n.Mode & 0o777)
}

package cli

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"qimg/cloudimg/guest"
	"qimg/ext4img"
)

// parseOwner reads UID[:GID].
func parseOwner(s string) (*ext4img.Owner, error) {
	if s == "" {
		return nil, nil
	}
	u, g, ok := strings.Cut(s, ":")
	if !ok {
		g = u
	}
	uid, err := strconv.ParseUint(u, 10, 32)
	gid, err2 := strconv.ParseUint(g, 10, 32)
	if err != nil || err2 != nil {
		return nil, usagef("--owner '%s': expected numbers UID[:GID]", printable(s))
	}
	return &ext4img.Owner{UID: uint32(uid), GID: uint32(gid)}, nil
}

// copySource is what is copied into an image.
type copySource struct {
	arg  string // for messages
	fs   guest.FS
	file *guest.File
	name string // in a directory; "." is what lies in the source
	end  *place // nil: of the host
}

// error names a file of the source in an error.
func (s *copySource) error(err error) error {
	if s.end != nil {
		return s.end.error("", err)
	}
	p, full := "", s.arg
	if pe := (*guest.PathError)(nil); errors.As(err, &pe) {
		p, err = pe.Path, pe.Err
	}
	if fe, ok := err.(*fs.PathError); ok { // another one in it is about the image
		err = fe.Err
	}
	if p != "" {
		full = strings.TrimSuffix(full, "/") + "/" + p
	}
	return fmt.Errorf("%s: %w", printable(full), err)
}

// in copies files into an image.
func (c *copying) in(sources []endpoint, to *place) (err error) {
	owner, err := parseOwner(c.o.owner)
	if err != nil {
		return err
	}
	e, err := openEditing(c.ctx, c.bad.host, to, &c.o.open, c.o.dryRun)
	if err != nil {
		return err
	}
	defer e.img.closeTo(&err)
	// Sources in the same image are read by way of it, but for its snapshots: what
	// these hold does not change.
	c.images.images = append(c.images.images, &openPlace{to.image, "", e.img, e.disk, map[int]guest.FS{e.volume.Number: guest.Ext(e.fs)}})
	c.images.shared = to.image
	var list []*copySource
	for i := range sources {
		s, err := c.source(&sources[i], to)
		if err != nil {
			return err
		}
		list = append(list, s)
	}
	self, err := os.Stat(to.image)
	if err != nil { // it is not named by a path
		self = nil
	}
	err = e.run(c.ctx, func(x *guest.Edits) error {
		dir, base, old, err := copyTarget(e.fs, x.Tx(), to.path)
		if err != nil {
			return to.error("", err)
		}
		if len(list) > 1 && (old == nil || !old.IsDir()) {
			return to.error("", errors.New("not a directory"))
		}
		var now *copySource
		below := "" // the destination of what is copied now
		m := guest.NewImporter(x, &guest.ImportOptions{
			Archive: c.o.archive,
			Owner:   owner,
			Self:    self,
			Skipped: func(path, why string) {
				c.bad.host.warn("%s", now.error(&guest.PathError{Path: path, Err: errors.New(why)}))
			},
			Made: func(p string, replaced bool) {
				letter := "A"
				if replaced {
					letter = "M"
				}
				e.tell(x, letter, path.Join(below, p))
			},
		})
		for _, now = range list {
			name := base
			below = path.Clean(to.path)
			if old != nil && old.IsDir() {
				if name = now.name; name == "" {
					return to.error("", errors.New("is a directory, and standard input has no name"))
				}
				below = path.Join(below, name)
			}
			if err := m.Copy(dir, name, now.fs, now.file); err != nil {
				if c.ctx.Err() != nil {
					return c.ctx.Err()
				}
				return now.error(err)
			}
		}
		return nil
	})
	return err
}

// source finds what is copied.
func (c *copying) source(s *endpoint, to *place) (*copySource, error) {
	switch {
	case s.host == "-":
		return c.stdin()
	case s.host != "":
		return c.hostSource(s.host)
	}
	if sameFile(s.image, to.image) {
		s.image = to.image
	}
	fsys, f, err := c.images.file(c.ctx, &s.place, !c.o.recursive)
	if err != nil {
		return nil, err
	}
	out := &copySource{arg: s.arg, fs: fsys, file: f, name: path.Base(s.path), end: &s.place}
	if f.IsDir() && (path.Clean(s.path) == "/" || strings.HasSuffix(s.path, "/.")) {
		out.name = "."
	}
	return out, c.checkSource(out)
}

// checkSource refuses what is not copied without -r.
func (c *copying) checkSource(s *copySource) error {
	switch {
	case c.o.recursive || s.file.Type() == guest.ModeRegular:
		return nil
	case s.file.IsDir():
		return s.error(errors.New("is a directory, which is copied with -r"))
	}
	return s.error(errors.New("is no regular file, and copied with -r alone"))
}

// hostSource finds a file of the host.
func (c *copying) hostSource(name string) (*copySource, error) {
	real := name
	info, err := os.Lstat(name)
	if err == nil && info.Mode()&fs.ModeSymlink != 0 && (!c.o.recursive || strings.HasSuffix(name, "/")) {
		real, err = filepath.EvalSymlinks(name)
		if err == nil {
			info, err = os.Lstat(real)
		}
	}
	if err != nil {
		return nil, err
	}
	dir, base := real, "."
	out := &copySource{arg: name, name: filepath.Base(filepath.Clean(name))}
	if !info.IsDir() {
		if dir, base = filepath.Split(real); dir == "" {
			dir = "."
		}
	} else if out.name == ".." || strings.HasSuffix(name, "/.") || strings.HasSuffix(name, "/..") {
		out.name = "."
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	c.roots = append(c.roots, root)
	out.fs = guest.Host(root)
	if out.file, err = out.fs.Lookup(base, false); err != nil {
		return nil, out.error(err)
	}
	return out, c.checkSource(out)
}

// stdin copies standard input to a file, which is read twice.
func (c *copying) stdin() (*copySource, error) {
	if c.bad.host.In == nil {
		c.bad.host.In = strings.NewReader("")
	}
	dir, err := os.MkdirTemp("", "qimg-")
	if err != nil {
		return nil, err
	}
	c.temps = append(c.temps, dir)
	f, err := os.OpenFile(filepath.Join(dir, "-"), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return nil, err
	}
	_, err = io.Copy(f, contextReader{c.ctx, c.bad.host.In})
	if err == nil {
		err = f.Chmod(0o644)
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err != nil {
		return nil, fmt.Errorf("standard input: %w", err)
	}
	s, err := c.hostSource(f.Name())
	if err == nil {
		s.arg, s.name = "standard input", ""
	}
	return s, err
}

// sameFile reports whether two paths are those of one file.
func sameFile(a, b string) bool {
	if a == b {
		return true
	}
	x, err := os.Stat(a)
	y, err2 := os.Stat(b)
	return err == nil && err2 == nil && os.SameFile(x, y)
}

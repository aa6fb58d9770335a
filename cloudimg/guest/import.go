package guest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"qimg/ext4img"
)

// ImportOptions say what an Importer keeps. The zero value is the default:
// contents, holes, owners, permissions, times, symlinks and hard links.
type ImportOptions struct {
	// Archive keeps setuid, setgid and sticky bits, extended attributes and ACLs,
	// too, and gives files that are there all that the source has.
	Archive bool
	// Owner, if not nil, is that of all that is made.
	Owner *ext4img.Owner
	// Self, if not nil, is the file of the host that the file system lies in. It
	// is an error to copy it.
	Self fs.FileInfo
	// Skipped is told what of a file was not kept.
	Skipped func(path, why string)
	// Made is told the path of each file that is made, or replaced, from the
	// source on. Directories that are there are none.
	Made func(path string, replaced bool)
}

// Importer copies files into an ext file system, as changes of a transaction.
// No symlink is followed, neither in the source nor in the file system. The
// first error ends the work, and the changes are to be discarded then. It is not
// safe for concurrent use.
type Importer struct {
	c     *Edits
	opts  ImportOptions
	links map[linkKey]ext4img.Ino // files of the source that have several names
	keys  map[ext4img.Ino]linkKey // the other way round
	made  map[ext4img.Ino]bool    // directories

	// Of the copy that runs.
	fs   FS
	dirs []importDir
}

// importDir is a directory that is being filled.
type importDir struct {
	ino  ext4img.Ino
	node *Node // what it is a copy of
	kept bool  // it was there before, and keeps its attributes
}

// NewImporter returns an Importer that makes its changes by c.
func NewImporter(c *Edits, opts *ImportOptions) *Importer {
	m := &Importer{c: c, links: map[linkKey]ext4img.Ino{}, keys: map[ext4img.Ino]linkKey{}, made: map[ext4img.Ino]bool{}}
	if opts != nil {
		m.opts = *opts
	}
	return m
}

var (
	errSameFile = errors.New("source and destination are the same file")
	errIntoSelf = errors.New("a directory is copied into itself")
	errIsImage  = errors.New("the image cannot be copied into itself")
)

// Copy copies a file, and all below it if it is a directory, to a name in a
// directory; with "." a directory is copied to the directory itself. A directory
// that is there gets what it lacks. Anything else that is there is replaced, but
// not by a directory: without Archive a regular file keeps its owner, permissions
// and extended attributes then. Names of one file are linked if an earlier call
// made the others, too. A source that changes meanwhile is an error that matches
// ext4img.ErrChanged.
func (m *Importer) Copy(dir ext4img.Ino, name string, fsys FS, from *File) error {
	m.fs, m.dirs = fsys, nil
	for n, err := range Walk(m.c.ctx, fsys, from) {
		if err != nil {
			return err
		}
		for len(m.dirs) > n.Depth {
			if err := m.pop(); err != nil {
				return err
			}
		}
		up, as := dir, name
		if n.Depth > 0 {
			up, as = m.dirs[len(m.dirs)-1].ino, n.Name
		}
		if err = m.node(up, as, n); err == nil {
			err = m.c.Step()
		}
		if err != nil {
			return &PathError{n.Path, err}
		}
	}
	for len(m.dirs) > 0 {
		if err := m.pop(); err != nil {
			return err
		}
	}
	return nil
}

// pop ends a directory: its own times change as long as it is filled.
func (m *Importer) pop() error {
	d := m.dirs[len(m.dirs)-1]
	m.dirs = m.dirs[:len(m.dirs)-1]
	if d.kept {
		return nil
	}
	if err := m.attributes(d.ino, d.node); err != nil {
		return &PathError{d.node.Path, err}
	}
	return m.c.Step()
}

// node makes a file in a directory.
func (m *Importer) node(dir ext4img.Ino, name string, n *Node) error {
	old, err := m.existing(dir, name)
	if err != nil {
		return err
	}
	if e, ok := m.fs.(extFS); ok && e.fs == m.c.tx.FS() {
		switch {
		case old != nil && uint64(old.Ino) == n.Ino:
			return errSameFile
		case n.IsDir() && m.made[ext4img.Ino(n.Ino)]:
			return errIntoSelf
		}
	}
	if _, ok := m.fs.(hostFS); ok && m.opts.Self != nil && os.SameFile(n.own.(hostNode).info, m.opts.Self) {
		return errIsImage
	}
	if m.opts.Made != nil && !(n.IsDir() && old != nil) {
		m.opts.Made(n.Path, old != nil)
	}
	if n.IsDir() {
		return m.dir(dir, name, n, old)
	}
	if old != nil {
		if old.IsDir() {
			return errIsDir
		}
		if key, ok := m.keys[old.Ino]; ok { // it is another file from now on
			if key == newLinkKey(m.fs, n.File) {
				return nil
			}
			if old.Links == 1 {
				delete(m.links, key)
				delete(m.keys, old.Ino)
			}
		}
	}
	linked := n.Links > 1 && n.Ino != 0
	if first, ok := m.links[newLinkKey(m.fs, n.File)]; ok && linked {
		if old != nil {
			if err := m.c.tx.Remove(dir, name); err != nil {
				return err
			}
		}
		return m.c.tx.Link(dir, name, first)
	}
	ino, err := m.file(dir, name, n, old)
	if err == nil && linked {
		key := newLinkKey(m.fs, n.File)
		m.links[key], m.keys[ino] = ino, key
	}
	return err
}

// existing returns the inode that has a name, nil if there is none.
func (m *Importer) existing(dir ext4img.Ino, name string) (*ext4img.Inode, error) {
	fsys := m.c.tx.FS()
	if name == "." {
		return fsys.Inode(dir)
	}
	e, err := fsys.LookupIn(dir, name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return fsys.Inode(e.Ino)
}

// dir makes a directory, or finds it, to be filled.
func (m *Importer) dir(dir ext4img.Ino, name string, n *Node, old *ext4img.Inode) error {
	d := importDir{node: n, kept: old != nil && !m.opts.Archive}
	switch {
	case old == nil:
		ino, err := m.c.tx.Mkdir(dir, name, m.attr(n))
		if err != nil {
			return err
		}
		d.ino = ino
		m.made[ino] = true
	case !old.IsDir():
		return errNotDir
	default:
		d.ino = old.Ino
	}
	m.dirs = append(m.dirs, d)
	return nil
}

// file makes anything but a directory, and returns its inode.
func (m *Importer) file(dir ext4img.Ino, name string, n *Node, old *ext4img.Inode) (ext4img.Ino, error) {
	tx := m.c.tx
	attr := m.attr(n)
	var xattrs []Xattr
	if old != nil {
		if n.Type() == ModeRegular && old.IsRegular() && !m.opts.Archive {
			if old.Links == 1 {
				return old.Ino, m.content(old.Ino, n)
			}
			// Its other names keep what they have.
			attr.Mode, attr.UID, attr.GID = old.Mode&0o7777, old.UID, old.GID
			for x, err := range tx.FS().Xattrs(old.Ino) {
				if err != nil {
					return 0, err
				}
				xattrs = append(xattrs, Xattr(x))
			}
		}
		if err := tx.Remove(dir, name); err != nil {
			return 0, err
		}
	}
	var ino ext4img.Ino
	var err error
	switch n.Type() {
	case ModeRegular:
		if ino, err = tx.Create(dir, name, attr); err == nil {
			err = m.content(ino, n)
		}
	case ModeSymlink:
		var target string
		if target, err = m.fs.Readlink(n.File); err == nil {
			ino, err = tx.Symlink(dir, name, target, attr)
		}
	case ModeChar:
		ino, err = tx.Mknod(dir, name, ext4img.TypeChar, n.Major, n.Minor, attr)
	case ModeBlock:
		ino, err = tx.Mknod(dir, name, ext4img.TypeBlock, n.Major, n.Minor, attr)
	case ModeFifo:
		ino, err = tx.Mknod(dir, name, ext4img.TypeFifo, 0, 0, attr)
	case ModeSocket:
		ino, err = tx.Mknod(dir, name, ext4img.TypeSocket, 0, 0, attr)
	default:
		err = fmt.Errorf("a file of type %#x", n.Type())
	}
	if err != nil {
		return 0, err
	}
	for _, x := range xattrs {
		if err := tx.SetXattr(ino, x.Name, x.Value); err != nil {
			return 0, fmt.Errorf("xattr %s: %w", x.Name, err)
		}
	}
	if m.opts.Archive {
		return ino, m.attributes(ino, n)
	}
	return ino, nil
}

// content gives a file its content, and its times.
func (m *Importer) content(ino ext4img.Ino, n *Node) error {
	c, err := m.fs.Content(n.File)
	if err != nil {
		return err
	}
	defer c.Close()
	if c.Size() != n.Size {
		return ext4img.ErrChanged
	}
	if err := m.c.tx.SetContent(m.c.ctx, ino, c); err != nil {
		return err
	}
	if h, ok := m.fs.(hostFS); ok {
		if err := h.unchanged(n.File); err != nil {
			return err
		}
	}
	var set ext4img.SetAttr
	m.times(&set, n)
	return m.c.tx.SetAttr(ino, set)
}

// attr is what a new file begins with.
func (m *Importer) attr(n *Node) ext4img.Attr {
	uid, gid := m.owner(n)
	return ext4img.Attr{Mode: m.permissions(n), UID: uid, GID: gid, Atime: m.atime(n), Mtime: n.Mtime}
}

func (m *Importer) permissions(n *Node) uint16 {
	if m.opts.Archive {
		return n.Mode & 0o7777
	}
	return n.Mode & 0o777
}

func (m *Importer) owner(n *Node) (uid, gid uint32) {
	if o := m.opts.Owner; o != nil {
		return o.UID, o.GID
	}
	return n.UID, n.GID
}

// atime is a time of access; file systems that do not keep one have that of
// modification.
func (m *Importer) atime(n *Node) time.Time {
	if n.Atime.IsZero() {
		return n.Mtime
	}
	return n.Atime
}

func (m *Importer) times(set *ext4img.SetAttr, n *Node) {
	if at, mt := m.atime(n), n.Mtime; !mt.IsZero() {
		set.Atime, set.Mtime = &at, &mt
	}
}

// attributes gives a file what it has besides its content.
func (m *Importer) attributes(ino ext4img.Ino, n *Node) error {
	tx := m.c.tx
	if m.opts.Archive {
		for x, err := range m.fs.Xattrs(n.File) {
			if err == nil {
				err = tx.SetXattr(ino, x.Name, x.Value)
			}
			switch {
			case errors.Is(err, errors.ErrUnsupported):
				if m.opts.Skipped != nil && m.c.plan {
					m.opts.Skipped(n.Path, fmt.Sprintf("the extended attribute %q is left out", x.Name))
				}
			case err != nil:
				return fmt.Errorf("xattr %s: %w", x.Name, err)
			}
		}
	}
	var set ext4img.SetAttr
	if n.Type() != ModeSymlink {
		mode := m.permissions(n)
		set.Mode = &mode
	}
	uid, gid := m.owner(n)
	set.UID, set.GID = &uid, &gid
	m.times(&set, n)
	return tx.SetAttr(ino, set)
}

package ext4img

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"time"

	"qimg/qcow2/blockdev"
)

var (
	// ErrNotEmpty: a directory that is to go has entries.
	ErrNotEmpty = errors.New("directory not empty")
	// ErrTooManyLinks: an inode has as many names as it can have.
	ErrTooManyLinks = errors.New("too many links")
	// ErrNameTooLong: a name has more than 255 bytes.
	ErrNameTooLong = errors.New("name too long")

	errInvalid = fs.ErrInvalid // as the kernel's EINVAL
)

// Attr is what a new file has besides its content.
type Attr struct {
	Mode     uint16 // the twelve bits of permissions
	UID, GID uint32
	// Times; zero: that of the transaction.
	Atime, Mtime, Crtime time.Time
}

// SetAttr says what Tx.SetAttr changes: what is not nil.
type SetAttr struct {
	Mode         *uint16 // the twelve bits of permissions
	UID, GID     *uint32
	Atime, Mtime *time.Time
	Crtime       *time.Time // of inodes that have room for it
	ProjID       *uint32    // with the project feature
}

// checkName refuses what cannot be the name of a new entry.
func checkName(name string) error {
	switch {
	case name == "" || strings.ContainsAny(name, "/\x00"):
		return fmt.Errorf("ext4: name %q: %w", name, errInvalid)
	case name == "." || name == "..":
		return fmt.Errorf("ext4: name %q: %w", name, fs.ErrExist)
	case len(name) > maxNameLen:
		return fmt.Errorf("ext4: name of %d bytes: %w", len(name), ErrNameTooLong)
	}
	return nil
}

// directory returns the inode of a directory whose entries may be changed.
func (t *Tx) directory(ino Ino) (*Inode, error) {
	n, err := t.editable(ino)
	switch {
	case err != nil:
		return nil, err
	case !n.IsDir():
		return nil, ErrNotDir
	case n.Flags&encryptFl != 0:
		return nil, &FormatError{"names", ino, -1, "", "are encrypted", ErrEncrypted}
	case n.Flags&casefoldFl != 0:
		return nil, place{"directory", ino, -1}.unsupported("i_flags", "%#x: casefold", n.Flags)
	}
	return n, nil
}

// entryType is the file_type of an entry that leads to an inode.
func (t *Tx) entryType(n *Inode) uint8 {
	if t.sb().Incompat&IncompatFiletype == 0 {
		return 0
	}
	return fileType(n.Mode)
}

// create makes an inode under a new name. init gives it its content.
func (t *Tx) create(dir Ino, name string, mode uint16, a Attr, init func(n *Inode) error) (ino Ino, err error) {
	err = t.do(func() error {
		d, err := t.directory(dir)
		if err != nil {
			return err
		}
		if err := checkName(name); err != nil {
			return err
		}
		switch _, err := t.fs.lookup(d, name); {
		case err == nil:
			return fmt.Errorf("ext4: name %q: %w", name, fs.ErrExist)
		case !errors.Is(err, fs.ErrNotExist):
			return err
		}
		isDir := mode == modeDir
		if isDir && t.linksFull(d) {
			return ErrTooManyLinks
		}
		n, err := t.allocInode(dir, mode|a.Mode&0o7777)
		if err != nil {
			return err
		}
		n.UID, n.GID = a.UID, a.GID
		for _, at := range [...]struct {
			to *time.Time
			v  time.Time
		}{{&n.Atime, a.Atime}, {&n.Mtime, a.Mtime}, {&n.Crtime, a.Crtime}} {
			if !at.v.IsZero() {
				*at.to = clampTime(at.v, n)
			}
		}
		if err := init(n); err != nil {
			return err
		}
		if err := t.addEntry(d, name, n.Ino, t.entryType(n)); err != nil {
			return err
		}
		if isDir {
			t.addLink(d)
		}
		t.gained[dir] = true
		t.modified(d)
		t.dirty(n)
		ino = n.Ino
		return nil
	})
	return ino, err
}

// clampTime is the time nearest to one that an inode can hold.
func clampTime(v time.Time, n *Inode) time.Time {
	limit := int64(maxTime)
	if n.extraIsize < 12 { // no i_mtime_extra
		limit = 1<<31 - 1
	}
	switch {
	case v.Unix() < minTime:
		return time.Unix(minTime, 0)
	case v.Unix() > limit:
		return time.Unix(limit, 0)
	}
	return v
}

// Create makes an empty regular file under a name that is new in a directory.
func (t *Tx) Create(dir Ino, name string, a Attr) (Ino, error) {
	return t.create(dir, name, modeReg, a, func(*Inode) error { return nil })
}

// Mkdir makes an empty directory.
func (t *Tx) Mkdir(dir Ino, name string, a Attr) (Ino, error) {
	return t.create(dir, name, modeDir, a, func(n *Inode) error {
		n.Links = 2
		return t.initDir(n, dir)
	})
}

// Mknod makes a device node, a fifo or a socket; the last two have no numbers.
func (t *Tx) Mknod(dir Ino, name string, typ FileType, major, minor uint32, a Attr) (Ino, error) {
	mode := map[FileType]uint16{TypeChar: modeChar, TypeBlock: modeBlock, TypeFifo: modeFifo, TypeSocket: modeSocket}[typ]
	device := typ == TypeChar || typ == TypeBlock
	if mode == 0 || major >= 1<<12 || minor >= 1<<20 {
		return 0, fmt.Errorf("ext4: a node of type %d, numbers %d:%d: %w", typ, major, minor, errInvalid)
	}
	return t.create(dir, name, mode, a, func(n *Inode) error {
		if device {
			n.setRdev(major, minor)
		}
		return nil
	})
}

// Symlink makes a symlink.
func (t *Tx) Symlink(dir Ino, name, target string, a Attr) (Ino, error) {
	a.Mode = 0o777
	return t.create(dir, name, modeLink, a, func(n *Inode) error { return t.setTarget(n, target) })
}

// linksFull reports whether a directory can have no more directories (kernel:
// fs/ext4/namei.c, EXT4_DIR_LINK_MAX).
func (t *Tx) linksFull(d *Inode) bool {
	return d.Links >= maxLinks && (t.sb().ROCompat&ROCompatDirNlink == 0 || d.Flags&indexFl == 0)
}

// addLink counts a directory below another. With an index, too many are not
// counted (kernel: fs/ext4/namei.c, ext4_inc_count).
func (t *Tx) addLink(d *Inode) {
	d.Links++
	if d.Flags&indexFl != 0 && (d.Links > maxLinks || d.Links == 2) {
		d.Links = 1
	}
	t.dirty(d)
}

// dropLink counts one directory less below another.
func (t *Tx) dropLink(d *Inode) {
	if d.Links > 2 {
		d.Links--
	}
	t.dirty(d)
}

// Link gives an inode that is no directory another name.
func (t *Tx) Link(dir Ino, name string, ino Ino) error {
	return t.do(func() error {
		d, err := t.directory(dir)
		if err != nil {
			return err
		}
		n, err := t.editable(ino)
		if err != nil {
			return err
		}
		if err := checkName(name); err != nil {
			return err
		}
		switch _, err := t.fs.lookup(d, name); {
		case err == nil:
			return fmt.Errorf("ext4: name %q: %w", name, fs.ErrExist)
		case !errors.Is(err, fs.ErrNotExist):
			return err
		case n.IsDir():
			return fmt.Errorf("ext4: a link to a directory: %w", fs.ErrPermission)
		case n.Links >= maxLinks:
			return ErrTooManyLinks
		}
		if err := t.addEntry(d, name, ino, t.entryType(n)); err != nil {
			return err
		}
		n.Links++
		n.Ctime = t.now
		t.gained[dir] = true
		t.dirty(n)
		t.modified(d)
		return nil
	})
}

// find returns a directory that may be changed, an entry of it, and the inode
// of that.
func (t *Tx) find(dir Ino, name string) (d, n *Inode, err error) {
	if d, err = t.directory(dir); err != nil {
		return nil, nil, err
	}
	if name == "." || name == ".." || name == "" {
		return nil, nil, fmt.Errorf("ext4: name %q: %w", name, errInvalid)
	}
	e, err := t.fs.lookup(d, name)
	if err != nil {
		return nil, nil, fmt.Errorf("ext4: name %q: %w", name, err)
	}
	n, err = t.editable(e.Ino)
	return d, n, err
}

// Remove removes a name, and with the last name what it leads to. A directory
// has to be empty.
func (t *Tx) Remove(dir Ino, name string) error {
	return t.do(func() error {
		d, n, err := t.find(dir, name)
		if err != nil {
			return err
		}
		if n.IsDir() {
			if empty, err := t.dirEmpty(n); err != nil {
				return err
			} else if !empty {
				return ErrNotEmpty
			}
		}
		return t.remove(d, name, n)
	})
}

// remove removes an entry, and what nothing else leads to then.
func (t *Tx) remove(d *Inode, name string, n *Inode) error {
	if err := t.removeEntry(d, name); err != nil {
		return err
	}
	t.lost[d.Ino] = true
	t.modified(d)
	if n.IsDir() {
		t.dropLink(d)
	}
	return t.unlink(n)
}

// unlink takes a name away from an inode, and frees one that has none left. A
// directory has no other.
func (t *Tx) unlink(n *Inode) error {
	n.Ctime = t.now
	t.dirty(n)
	if !n.IsDir() && n.Links > 1 {
		n.Links--
		return nil
	}
	if err := t.dropXattrs(n); err != nil {
		return err
	}
	if err := t.dropContent(n); err != nil {
		return err
	}
	return t.freeInode(n)
}

// RemoveAll removes a name and, if it leads to a directory, all that is below.
func (t *Tx) RemoveAll(ctx context.Context, dir Ino, name string) error {
	return t.do(func() error {
		d, n, err := t.find(dir, name)
		if err != nil {
			return err
		}
		if n.IsDir() {
			if err := t.unlinkBelow(ctx, n, 0); err != nil {
				return err
			}
		}
		return t.remove(d, name, n)
	})
}

// maxDepth is how many directories may lie in each other where all of them are
// looked at.
const maxDepth = 10000

// unlinkBelow takes away the names in a directory, which is freed next: its
// entries stay as they are.
func (t *Tx) unlinkBelow(ctx context.Context, d *Inode, depth int) error {
	if depth > maxDepth {
		return place{"directory", d.Ino, -1}.corrupt("", "lies below %d others", depth)
	}
	if _, err := t.directory(d.Ino); err != nil {
		return err
	}
	var list []Ino
	for e, err := range t.fs.Entries(d.Ino) {
		if err != nil {
			return err
		}
		list = append(list, e.Ino)
	}
	for _, ino := range list {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := t.editable(ino)
		if err != nil {
			return err
		}
		if n.IsDir() {
			if err := t.unlinkBelow(ctx, n, depth+1); err != nil {
				return err
			}
		}
		if err := t.unlink(n); err != nil {
			return err
		}
	}
	return nil
}

// Rename gives an entry another name, in the same directory or another. What
// has that name goes, as by Remove: a directory takes the place of an empty
// directory alone, and anything else that of anything but a directory. Two
// names of one inode stay as they are.
func (t *Tx) Rename(oldDir Ino, oldName string, newDir Ino, newName string) error {
	return t.do(func() error {
		from, n, err := t.find(oldDir, oldName)
		if err != nil {
			return err
		}
		to, err := t.directory(newDir)
		if err != nil {
			return err
		}
		if err := checkName(newName); err != nil {
			return err
		}
		if n.IsDir() {
			if err := t.checkLoop(n, to); err != nil {
				return err
			}
		}
		var old *Inode
		switch e, err := t.fs.lookup(to, newName); {
		case err == nil:
			if old, err = t.editable(e.Ino); err != nil {
				return err
			}
		case !errors.Is(err, fs.ErrNotExist):
			return err
		}
		switch {
		case old == nil:
		case old.Ino == n.Ino:
			return nil
		case n.IsDir() && !old.IsDir():
			return ErrNotDir
		case !n.IsDir() && old.IsDir():
			return ErrIsDir
		case old.IsDir():
			if empty, err := t.dirEmpty(old); err != nil {
				return err
			} else if !empty {
				return ErrNotEmpty
			}
		}
		moved := n.IsDir() && from != to
		if moved && old == nil && t.linksFull(to) {
			return ErrTooManyLinks
		}
		if old != nil {
			err = t.setEntry(to, newName, n.Ino, t.entryType(n))
		} else {
			err = t.addEntry(to, newName, n.Ino, t.entryType(n))
		}
		if err != nil {
			return err
		}
		if err := t.removeEntry(from, oldName); err != nil {
			return err
		}
		t.gained[to.Ino], t.lost[from.Ino] = true, true
		if moved {
			if err := t.setParent(n, to.Ino); err != nil {
				return err
			}
			t.dropLink(from)
			if old == nil { // else one takes the place of the other
				t.addLink(to)
			}
		}
		n.Ctime = t.now
		t.dirty(n)
		t.modified(from)
		t.modified(to)
		if old == nil {
			return nil
		}
		if old.IsDir() && !moved {
			t.dropLink(to)
		}
		return t.unlink(old)
	})
}

// checkLoop refuses a directory that lies in n, or is n, as its new place.
func (t *Tx) checkLoop(n, to *Inode) error {
	for range maxDepth {
		if to.Ino == n.Ino {
			return fmt.Errorf("ext4: a directory moved into itself: %w", errInvalid)
		}
		if to.Ino == RootIno {
			return nil
		}
		up, err := t.fs.parent(to)
		if err != nil {
			return err
		}
		if to, err = t.fs.dir(up.Ino); err != nil {
			return err
		}
	}
	return place{"directory", to.Ino, -1}.corrupt("", "lies below %d others", maxDepth)
}

// SetAttr changes mode, owner and times of an inode. An access ACL gets the
// permissions of a new mode, as by chmod.
func (t *Tx) SetAttr(ino Ino, a SetAttr) error {
	return t.do(func() error {
		n, err := t.editable(ino)
		if err != nil {
			return err
		}
		if a.Mode != nil {
			n.Mode = n.Mode&modeType | *a.Mode&0o7777
			if err := t.chmodACL(n); err != nil {
				return err
			}
		}
		n.UID, n.GID = *cmp.Or(a.UID, &n.UID), *cmp.Or(a.GID, &n.GID)
		for _, at := range [...]struct{ to, v *time.Time }{{&n.Atime, a.Atime}, {&n.Mtime, a.Mtime}, {&n.Crtime, a.Crtime}} {
			if at.v != nil {
				*at.to = clampTime(*at.v, n)
			}
		}
		if a.ProjID != nil {
			if t.sb().ROCompat&ROCompatProject == 0 {
				return place{"superblock", 0, -1}.unsupported("s_feature_ro_compat", "a project id needs the project feature")
			}
			n.ProjID = *a.ProjID
		}
		n.Ctime = t.now
		t.dirty(n)
		return nil
	})
}

// SetXattr gives an inode an extended attribute, or another value for one.
// POSIX ACLs have the form that programs use; an access ACL sets the
// permissions of the mode, as the kernel does.
func (t *Tx) SetXattr(ino Ino, name, value string) error {
	return t.do(func() error {
		n, err := t.editable(ino)
		if err != nil {
			return err
		}
		index, rest, ok := splitXattr(name)
		if !ok {
			return fmt.Errorf("ext4: xattr %q: %w", name, errors.ErrUnsupported)
		}
		if _, err := xattrSet(nil).with(index, rest, value); err != nil {
			return err
		}
		n.Ctime = t.now
		t.dirty(n)
		if index == xattrACLAccess || index == xattrACLDefault {
			if index == xattrACLDefault && !n.IsDir() {
				return fmt.Errorf("ext4: a default ACL on %s: %w", typeName(n.Mode), fs.ErrPermission)
			}
			stored, err := aclToExt4(value, 0o777, &ScanOptions{})
			if err != nil {
				return err
			}
			if index == xattrACLAccess && !t.setModeOfACL(n, value) || len(stored) == 4 {
				if err := t.removeXattr(n, index, rest); !errors.Is(err, fs.ErrNotExist) {
					return err
				}
				return nil
			}
			value = stored
		}
		return t.setXattr(n, index, rest, value)
	})
}

// RemoveXattr takes an extended attribute away. One that is not there is an
// error that matches fs.ErrNotExist.
func (t *Tx) RemoveXattr(ino Ino, name string) error {
	return t.do(func() error {
		n, err := t.editable(ino)
		if err != nil {
			return err
		}
		index, rest, ok := splitXattr(name)
		if !ok {
			return fmt.Errorf("ext4: xattr %q: %w", name, errors.ErrUnsupported)
		}
		n.Ctime = t.now
		t.dirty(n)
		return t.removeXattr(n, index, rest)
	})
}

// Parent returns the directory that the last element of a path lies in, and
// that element. Symlinks on the way are followed inside the file system.
func (t *Tx) Parent(path string) (dir Ino, name string, err error) {
	path = strings.TrimRight(path, "/")
	i := strings.LastIndexByte(path, '/')
	name = path[i+1:]
	if name == "" || name == "." || name == ".." {
		return 0, "", fmt.Errorf("ext4: path %q: %w", path, errInvalid)
	}
	dir, err = t.fs.Resolve(path[:i+1], true)
	return dir, name, err
}

// WriteFile makes the regular file at a path hold data. One that is there keeps
// its owner, mode and xattrs; one that is not is made, owned by root.
func (t *Tx) WriteFile(path string, data []byte, mode uint16) error {
	return t.at("write", path, func() error {
		ino, err := t.fs.Resolve(path, true)
		if errors.Is(err, fs.ErrNotExist) {
			var dir Ino
			var name string
			if dir, name, err = t.Parent(path); err == nil {
				ino, err = t.Create(dir, name, Attr{Mode: mode})
			}
		}
		if err != nil {
			return err
		}
		return t.SetContent(context.Background(), ino, bytesReader{bytes.NewReader(data)})
	})
}

// bytesReader is bytes as a disk.
type bytesReader struct{ *bytes.Reader }

var _ blockdev.Reader = bytesReader{}

// MkdirAll makes a directory, with those on the way that are missing, all of
// them owned by root. What is there stays as it is.
func (t *Tx) MkdirAll(path string, mode uint16) error {
	return t.at("mkdir", path, func() error {
		done := ""
		for name := range strings.SplitSeq(path, "/") {
			if name == "" {
				continue
			}
			next := done + "/" + name
			ino, err := t.fs.Resolve(next, true)
			if errors.Is(err, fs.ErrNotExist) && name != "." && name != ".." {
				var dir Ino
				if dir, err = t.fs.Resolve(done, true); err == nil {
					ino, err = t.Mkdir(dir, name, Attr{Mode: mode})
				}
			}
			if err != nil {
				return err
			}
			if n, err := t.fs.Inode(ino); err != nil {
				return err
			} else if !n.IsDir() {
				return ErrNotDir
			}
			done = next
		}
		return nil
	})
}

// at runs an operation on a path, which its error names.
func (t *Tx) at(op, path string, fn func() error) error {
	if err := t.do(fn); err != nil {
		return &fs.PathError{Op: op, Path: path, Err: err}
	}
	return nil
}

// aclEntryLen is the length of an entry in the form that programs use:
// e_tag, e_perm, e_id.
const aclEntryLen = 8

// setModeOfACL gives an inode the permissions that an access ACL in the form
// of programs has. more is false for one that says nothing else, which the
// kernel does not keep (kernel: fs/posix_acl.c, posix_acl_equiv_mode).
func (t *Tx) setModeOfACL(n *Inode, acl string) (more bool) {
	masked := false
	for at := 4; at+aclEntryLen <= len(acl); at += aclEntryLen {
		perm := uint16(acl[at+2]) & 7
		switch acl[at] {
		case aclUserObj:
			n.Mode = n.Mode&^0o700 | perm<<6
		case aclGroupObj:
			if !masked {
				n.Mode = n.Mode&^0o070 | perm<<3
			}
		case aclMask:
			masked, more = true, true
			n.Mode = n.Mode&^0o070 | perm<<3
		case aclOther:
			n.Mode = n.Mode&^0o007 | perm
		default:
			more = true
		}
	}
	return more
}

// chmodACL gives the access ACL of an inode, if it has one, the permissions of
// its mode (kernel: fs/posix_acl.c, __posix_acl_chmod_masq).
func (t *Tx) chmodACL(n *Inode) error {
	var value string
	var failure error
	found := false
	t.fs.eachXattr(n, func(e xattrEntry, err error) bool {
		if err == nil && e.index == xattrACLAccess && e.name == "" {
			found = true
			value, err = t.fs.xattrValue(n, e)
		}
		failure = err
		return err == nil && !found
	})
	if failure != nil || !found {
		return failure
	}
	text, err := aclFromExt4(value)
	if err != nil {
		return err
	}
	acl := []byte(text)
	group, mask := 0, 0
	for at := 4; at+aclEntryLen <= len(acl); at += aclEntryLen {
		switch acl[at] {
		case aclUserObj:
			acl[at+2] = byte(n.Mode >> 6 & 7)
		case aclGroupObj:
			group = at
		case aclMask:
			mask = at
		case aclOther:
			acl[at+2] = byte(n.Mode & 7)
		}
	}
	if at := cmp.Or(mask, group); at > 0 {
		acl[at+2] = byte(n.Mode >> 3 & 7)
	}
	if value, err = aclToExt4(string(acl), 0o777, &ScanOptions{}); err != nil {
		return err
	}
	return t.setXattr(n, xattrACLAccess, "", value)
}

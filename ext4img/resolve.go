package ext4img

import (
	"cmp"
	"fmt"
	"io/fs"
	"strings"
)

// maxSymlinks is how many symlinks a path may lead through (kernel:
// include/linux/namei.h, MAXSYMLINKS).
const maxSymlinks = 40

// maxPathLen is PATH_MAX without the NUL: no symlink is longer.
const maxPathLen = 4095

// LookupIn returns the entry of a directory that has a name. "." and ".." are
// names, too. A name that is not there is an error that matches
// fs.ErrNotExist; where damage leaves open whether it is there, an error that
// tells the damage instead.
//
// An index is used where the directory has one; where the index is damaged, or
// of a kind that is not known, all blocks are searched. In a directory whose
// names are the same in upper and lower case, an entry of exactly the name is
// preferred; else the first one that strings.EqualFold finds equal. The
// kernel's rule, which normalizes Unicode as well, finds more.
func (f *FS) LookupIn(dir Ino, name string) (Dirent, error) {
	n, err := f.dir(dir)
	if err != nil {
		return Dirent{}, err
	}
	return f.lookup(n, name)
}

// lookup finds a name in a directory whose names can be read.
func (f *FS) lookup(n *Inode, name string) (Dirent, error) {
	switch {
	case name == ".":
		return Dirent{n.Ino, TypeDir, "."}, nil
	case name == "..":
		return f.parent(n)
	case len(name) > maxNameLen || name == "":
		return Dirent{}, fs.ErrNotExist
	}
	if d := f.fc.dir(n.Ino); d != nil {
		if e, ok := d.names[name]; ok && e.Ino != 0 {
			return e, nil
		} else if ok || d.created {
			return Dirent{}, fs.ErrNotExist
		}
	}
	var damage error
	if n.Flags&indexFl != 0 && f.sb.Compat&CompatDirIndex != 0 && n.Flags&(casefoldFl|inlineDataFl) == 0 {
		d, _, err := f.dxFind(n, name)
		switch {
		case d != nil:
			return Dirent{d.ino, FileType(d.ftype), name}, nil
		case err == nil:
			return Dirent{}, fs.ErrNotExist
		}
		damage = err
	}
	var found, folded *Dirent
	f.eachEntry(n, func(d Dirent, err error) bool {
		switch {
		case err != nil:
			damage = cmp.Or(damage, err)
		case d.Name == name:
			found = &d
		case folded == nil && n.Flags&casefoldFl != 0 && strings.EqualFold(d.Name, name):
			folded = &d
		}
		return found == nil
	})
	switch {
	case found != nil:
		return *found, nil
	case damage != nil:
		return Dirent{}, damage
	case folded != nil:
		return *folded, nil
	}
	return Dirent{}, fs.ErrNotExist
}

// parent returns the entry ".." of a directory.
func (f *FS) parent(n *Inode) (Dirent, error) {
	if d := f.fc.dir(n.Ino); d != nil && d.created {
		return Dirent{d.parent, TypeDir, ".."}, nil
	}
	if n.Flags&inlineDataFl != 0 {
		return Dirent{inlineDirParent(n), TypeDir, ".."}, nil
	}
	b, block, err := f.dirBlockAt(n, 0)
	if err != nil {
		return Dirent{}, err
	}
	p := place{"directory block", n.Ino, block}
	d, err := parseDirent(p, f.sb, b, 0)
	if err == nil {
		d, err = parseDirent(p, f.sb, b, d.recLen)
	}
	if err == nil && string(d.name) != ".." {
		err = p.corrupt("name", `%q of the second entry, expected ".."`, d.name)
	}
	return Dirent{d.ino, TypeDir, ".."}, err
}

// Readlink returns where a symlink leads.
func (f *FS) Readlink(ino Ino) (string, error) {
	n, err := f.Inode(ino)
	if err != nil {
		return "", err
	}
	return f.readlink(n)
}

func (f *FS) readlink(n *Inode) (string, error) {
	p := place{"symlink", n.Ino, -1}
	limit := min(maxPathLen, int64(f.sb.BlockSize)-1)
	switch {
	case !n.IsSymlink():
		return "", fmt.Errorf("ext4: inode %d: %s, expected a symlink", n.Ino, typeName(n.Mode))
	case n.Flags&encryptFl != 0:
		return "", &FormatError{p.name, n.Ino, -1, "", "is encrypted", ErrEncrypted}
	case n.Size == 0 || n.Size > limit:
		return "", p.corrupt("i_size", "%d, expected 1 to %d", n.Size, limit)
	}
	var target string
	if f.isFastSymlink(n) {
		target = string(n.block()[:n.Size])
	} else {
		c, err := f.content(n)
		if err != nil {
			return "", err
		}
		b := make([]byte, n.Size) // at most maxPathLen
		if err := readFull(c, b, 0); err != nil {
			return "", err
		}
		target = string(b)
	}
	if strings.IndexByte(target, 0) >= 0 {
		return "", p.corrupt("", "%q has a NUL", target)
	}
	return target, nil
}

// isFastSymlink reports whether i_block holds the target itself (kernel:
// fs/ext4/inode.c, ext4_inode_is_fast_symlink).
func (f *FS) isFastSymlink(n *Inode) bool {
	if n.Size >= inodeBlockLen || n.Flags&(inlineDataFl|extentsFl) != 0 {
		return false
	}
	if f.sb.Incompat&IncompatEAInode != 0 {
		return true
	}
	var xattrBlocks int64
	if n.FileACL != 0 {
		xattrBlocks = int64(f.sb.ClusterSize / 512)
	}
	return n.Blocks == xattrBlocks
}

// Resolve returns the inode that a path leads to, from the root directory on,
// with or without a slash at its beginning. Symlinks on the way are followed
// inside the file system, 40 at most; follow says whether one at the end is.
// ".." of the root is the root.
func (f *FS) Resolve(path string, follow bool) (Ino, error) {
	n, err := f.resolve(path, follow)
	if err != nil {
		return 0, err
	}
	return n.Ino, nil
}

func (f *FS) resolve(path string, follow bool) (*Inode, error) {
	root, err := f.Inode(RootIno)
	if err != nil {
		return nil, err
	}
	stack := []*Inode{root} // directories, and at the end what was found
	links := 0
	rest := path
	for rest != "" {
		name, tail, slash := strings.Cut(rest, "/")
		rest = tail
		n := stack[len(stack)-1]
		switch name {
		case "":
			continue
		case ".", "..":
			if !n.IsDir() {
				return nil, ErrNotDir
			}
			if name == ".." && len(stack) > 1 {
				stack = stack[:len(stack)-1]
			}
			continue
		}
		child, err := f.child(stack, name)
		if err != nil {
			return nil, err
		}
		if child.IsSymlink() && (slash || follow) {
			if links++; links > maxSymlinks {
				return nil, ErrLoop
			}
			target, err := f.readlink(child)
			if err != nil {
				return nil, err
			}
			if strings.HasPrefix(target, "/") {
				stack = stack[:1]
			}
			if slash {
				target += "/" + rest
			}
			rest = target
			continue
		}
		if slash && !child.IsDir() {
			return nil, ErrNotDir
		}
		stack = append(stack, child)
	}
	return stack[len(stack)-1], nil
}

// child returns the inode of a name in the last of the directories that lead
// to it. A directory that is among them itself is an error.
func (f *FS) child(stack []*Inode, name string) (*Inode, error) {
	dir := stack[len(stack)-1]
	if !dir.IsDir() {
		return nil, ErrNotDir
	}
	if dir.Flags&encryptFl != 0 {
		return nil, &FormatError{"names", dir.Ino, -1, "", "are encrypted", ErrEncrypted}
	}
	d, err := f.lookup(dir, name)
	if err != nil {
		return nil, err
	}
	for _, up := range stack {
		if up.Ino == d.Ino {
			return nil, place{"directory", dir.Ino, -1}.corrupt("", "entry %q leads back to directory %d on the way to it", name, d.Ino)
		}
	}
	return f.Inode(d.Ino)
}

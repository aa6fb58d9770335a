package guest

import (
	"errors"
	"io/fs"
	"strings"
)

// maxSymlinks is how many symlinks a path may lead through, as in Linux.
const maxSymlinks = 40

var (
	errNotDir = errors.New("not a directory")
	errIsDir  = errors.New("is a directory")
	errLoops  = errors.New("too many levels of symbolic links")
)

// lookup is FS.Lookup for a file system that has nothing better. equal says
// which names are the same.
func lookup(fsys FS, root *File, path string, follow bool, equal func(a, b string) bool) (*File, error) {
	stack := []*File{root}
	links := 0
	for rest := path; rest != ""; {
		name, tail, slash := strings.Cut(rest, "/")
		rest = tail
		dir := stack[len(stack)-1]
		if name == "" {
			continue
		}
		if !dir.IsDir() {
			return nil, errNotDir
		}
		switch name {
		case ".":
			continue
		case "..":
			stack = stack[:max(len(stack)-1, 1)]
			continue
		}
		f, err := child(fsys, dir, name, equal)
		if err != nil {
			return nil, err
		}
		if f.Type() == ModeSymlink && (slash || follow) {
			if links++; links > maxSymlinks {
				return nil, errLoops
			}
			target, err := fsys.Readlink(f)
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
		if slash && !f.IsDir() {
			return nil, errNotDir
		}
		if len(stack) == maxDepth {
			return nil, errLoop
		}
		stack = append(stack, f)
	}
	return stack[len(stack)-1], nil
}

// child finds a name in a directory.
func child(fsys FS, dir *File, name string, equal func(a, b string) bool) (*File, error) {
	var damage error
	for e, err := range fsys.Entries(dir) {
		switch {
		case err != nil:
			damage = err
		case equal(e.Name, name):
			return fsys.Child(dir, &e)
		}
	}
	if damage != nil {
		return nil, damage
	}
	return nil, fs.ErrNotExist
}

package guest

import (
	"context"
	"errors"
	"fmt"
	"iter"
)

// Node is a file that Walk found.
type Node struct {
	Path  string // from the directory that the walk began with, names joined by slashes; "" is that directory
	Name  string // the last part of Path
	Depth int    // 0 is the directory that the walk began with
	*File
}

// errLoop is the error of a directory that was met before.
var errLoop = errors.New("the directory was met before, and is left out")

// Walk returns a file and, where it is a directory, everything below it: each
// directory before what is in it, entries by name. Symlinks are not followed.
// What cannot be read is an error in their midst, with the path, and the rest
// follows. A directory that has two names is an error at the second, so that
// the walk has an end whatever the image holds.
func Walk(ctx context.Context, fsys FS, from *File) iter.Seq2[*Node, error] {
	return func(yield func(*Node, error) bool) {
		w := &walker{ctx: ctx, fs: fsys, seen: map[fileKey]bool{}, yield: yield}
		if yield(&Node{File: from}, nil) && from.IsDir() {
			w.dir(from, "", 0)
		}
	}
}

type walker struct {
	ctx   context.Context
	fs    FS
	seen  map[fileKey]bool // directories
	yield func(*Node, error) bool
}

// PathError is an error about a file of a guest.
type PathError struct {
	Path string // from the directory that the work began with
	Err  error
}

func (e *PathError) Error() string { return fmt.Sprintf("%q: %v", "/"+e.Path, e.Err) }
func (e *PathError) Unwrap() error { return e.Err }

func (w *walker) fail(path string, err error) bool { return w.yield(nil, &PathError{path, err}) }

// dir walks what is in a directory; it returns false to stop.
func (w *walker) dir(dir *File, path string, depth int) bool {
	switch {
	case depth == maxDepth:
		return w.fail(path, fmt.Errorf("more than %d directories deep", maxDepth))
	case dir.Ino != 0 && w.seen[dir.key()]:
		return w.fail(path, errLoop)
	}
	if dir.Ino != 0 {
		w.seen[dir.key()] = true
	}
	prefix := path
	if prefix != "" {
		prefix += "/"
	}
	for e, err := range Sorted(w.fs, dir) {
		if err == nil {
			err = w.ctx.Err()
			if err != nil {
				w.yield(nil, err)
				return false
			}
		}
		var f *File
		if err == nil {
			f, err = w.fs.Child(dir, &e)
		}
		if err != nil {
			name := path
			if e.Name != "" {
				name = prefix + e.Name
			}
			if !w.fail(name, err) {
				return false
			}
			continue
		}
		if !w.yield(&Node{prefix + e.Name, e.Name, depth + 1, f}, nil) {
			return false
		}
		if f.IsDir() && !w.dir(f, prefix+e.Name, depth+1) {
			return false
		}
	}
	return true
}

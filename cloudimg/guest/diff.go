package guest

import (
	"bytes"
	"context"
	"errors"
	"iter"
	"maps"
	"os"

	"qimg/qcow2/blockdev"
)

// Change is a file that two trees do not have alike.
type Change struct {
	Path string // from the files that were compared on; "" is these
	// Old and New are the file in both trees; nil where there is none.
	Old, New *File
	// What tells what is different of a file that both have: type, content,
	// size, mode, owner, mtime, links, device, target, xattrs.
	What []string
}

// DiffOptions say how Diff compares. The zero value is the default.
type DiffOptions struct {
	// Whole yields all that is below a directory that only one tree has; without
	// it the directory alone.
	Whole bool
}

// Diff compares two files, and all below if they are directories: in the order
// of names it yields what only one has, or what is different. Contents are
// compared by their extents first: bytes that lie in the same place of the same
// file of the host are not read, as those of a snapshot that did not change; see
// FSOptions.Below. Times of access and of change, inode numbers, and links of
// directories do not count. What cannot be read is an error in their midst, a
// *PathError.
func Diff(ctx context.Context, a, b FS, fromA, fromB *File, opts *DiffOptions) iter.Seq2[*Change, error] {
	return func(yield func(*Change, error) bool) {
		d := &differ{ctx: ctx, yield: yield, hosts: map[[2]*blockdev.File]bool{}}
		d.sides[0].fs, d.sides[1].fs = a, b
		d.sides[0].seen, d.sides[1].seen = map[fileKey]bool{}, map[fileKey]bool{}
		if opts != nil {
			d.whole = opts.Whole
		}
		d.both("", fromA, fromB, 0)
	}
}

type differ struct {
	ctx   context.Context
	sides [2]struct {
		fs   FS
		seen map[fileKey]bool // directories
	}
	whole bool
	yield func(*Change, error) bool
	hosts map[[2]*blockdev.File]bool // whether they are the same file; a few
	bufs  [2][]byte
}

func (d *differ) fail(path string, err error) bool { return d.yield(nil, &PathError{path, err}) }

// both compares a file that both have; it returns false to stop.
func (d *differ) both(path string, a, b *File, depth int) bool {
	if err := d.ctx.Err(); err != nil {
		d.yield(nil, err)
		return false
	}
	what, err := d.compare(a, b)
	if err != nil && !d.fail(path, err) {
		return false
	}
	if len(what) > 0 && !d.yield(&Change{path, a, b, what}, nil) {
		return false
	}
	if !a.IsDir() || !b.IsDir() {
		return (!a.IsDir() || d.below(0, path, a)) && (!b.IsDir() || d.below(1, path, b))
	}
	for i, f := range []*File{a, b} {
		if f.Ino == 0 {
			continue
		}
		if d.sides[i].seen[f.key()] {
			return d.fail(path, errLoop)
		}
		d.sides[i].seen[f.key()] = true
	}
	if depth == maxDepth {
		return d.fail(path, errLoop)
	}
	return d.dirs(path, a, b, depth)
}

// dirs compares two directories, entry by entry.
func (d *differ) dirs(path string, a, b *File, depth int) bool {
	if path != "" {
		path += "/"
	}
	nextA, stopA := iter.Pull2(Sorted(d.sides[0].fs, a))
	defer stopA()
	nextB, stopB := iter.Pull2(Sorted(d.sides[1].fs, b))
	defer stopB()
	// next returns the next entry of a directory; ok is false at its end.
	next := func(pull func() (Entry, error, bool)) (e Entry, ok, more bool) {
		for {
			e, err, ok := pull()
			if err == nil {
				return e, ok, true
			}
			if !d.fail(path, err) {
				return e, false, false
			}
		}
	}
	ea, okA, more := next(nextA)
	if !more {
		return false
	}
	eb, okB, more := next(nextB)
	for more && (okA || okB) {
		inA := okA && (!okB || ea.Name <= eb.Name)
		inB := okB && (!okA || eb.Name <= ea.Name)
		var fa, fb *File
		var err error
		name := path + eb.Name
		if inA {
			name = path + ea.Name
			fa, err = d.sides[0].fs.Child(a, &ea)
		}
		if inB && err == nil {
			fb, err = d.sides[1].fs.Child(b, &eb)
		}
		switch {
		case err != nil:
			more = d.fail(name, err)
		case inA && inB:
			more = d.both(name, fa, fb, depth+1)
		case inA:
			more = d.yield(&Change{Path: name, Old: fa}, nil) && d.below(0, name, fa)
		default:
			more = d.yield(&Change{Path: name, New: fb}, nil) && d.below(1, name, fb)
		}
		if more && inA {
			ea, okA, more = next(nextA)
		}
		if more && inB {
			eb, okB, more = next(nextB)
		}
	}
	return more
}

// below yields what is in a directory that one side has.
func (d *differ) below(side int, path string, f *File) bool {
	if !d.whole || !f.IsDir() {
		return true
	}
	for n, err := range Walk(d.ctx, d.sides[side].fs, f) {
		if pe := (*PathError)(nil); errors.As(err, &pe) {
			pe.Path = path + "/" + pe.Path
		}
		if err != nil {
			if !d.yield(nil, err) {
				return false
			}
			continue
		}
		if n.Path == "" {
			continue
		}
		c := &Change{Path: path + "/" + n.Path}
		if side == 0 {
			c.Old = n.File
		} else {
			c.New = n.File
		}
		if !d.yield(c, nil) {
			return false
		}
	}
	return true
}

// compare tells what is different of two files.
func (d *differ) compare(a, b *File) (what []string, err error) {
	add := func(different bool, name string) {
		if different {
			what = append(what, name)
		}
	}
	if a.Type() != b.Type() {
		return []string{"type"}, nil
	}
	switch a.Type() {
	case ModeRegular:
		if a.Size != b.Size {
			what = append(what, "content", "size")
			break
		}
		var same bool
		same, err = d.sameContent(a, b)
		add(!same && err == nil, "content")
	case ModeSymlink:
		var ta, tb string
		if ta, err = d.sides[0].fs.Readlink(a); err == nil {
			tb, err = d.sides[1].fs.Readlink(b)
		}
		add(ta != tb && err == nil, "target")
	case ModeChar, ModeBlock:
		add(a.Major != b.Major || a.Minor != b.Minor, "device")
	}
	add(a.Mode != b.Mode, "mode")
	add(a.UID != b.UID || a.GID != b.GID, "owner")
	add(!a.Mtime.Equal(b.Mtime), "mtime")
	add(!a.IsDir() && a.Links != b.Links, "links")
	if err != nil {
		return what, err
	}
	xa, err := xattrMap(d.sides[0].fs, a)
	if err != nil {
		return what, err
	}
	xb, err := xattrMap(d.sides[1].fs, b)
	add(err == nil && !maps.Equal(xa, xb), "xattrs")
	return what, err
}

func xattrMap(fsys FS, f *File) (map[string]string, error) {
	var m map[string]string
	for x, err := range fsys.Xattrs(f) {
		if err != nil {
			return nil, err
		}
		if m == nil {
			m = map[string]string{}
		}
		m[x.Name] = x.Value
	}
	return m, nil
}

// diffPiece is how many bytes are compared at once.
const diffPiece = 256 << 10

// sameContent compares files of the same size.
func (d *differ) sameContent(a, b *File) (bool, error) {
	if a.Size == 0 {
		return true, nil
	}
	ca, err := d.sides[0].fs.Content(a)
	if err != nil {
		return false, err
	}
	defer ca.Close()
	cb, err := d.sides[1].fs.Content(b)
	if err != nil {
		return false, err
	}
	defer cb.Close()
	if ca.Size() != cb.Size() {
		return false, nil
	}
	for off := int64(0); off < ca.Size(); {
		if err := d.ctx.Err(); err != nil {
			return false, err
		}
		xa, err := blockdev.NextExtent(ca, off)
		if err != nil {
			return false, err
		}
		xb, err := blockdev.NextExtent(cb, off)
		if err != nil {
			return false, err
		}
		n := min(xa.Len, xb.Len)
		if xa.Kind.ReadsZero() && xb.Kind.ReadsZero() || d.samePlace(&xa, &xb) {
			off += n
			continue
		}
		n = min(n, diffPiece)
		for i, c := range []Content{ca, cb} {
			if d.bufs[i] == nil {
				d.bufs[i] = make([]byte, diffPiece)
			}
			if err := readFull(c, d.bufs[i][:n], off); err != nil {
				return false, err
			}
		}
		if !bytes.Equal(d.bufs[0][:n], d.bufs[1][:n]) {
			return false, nil
		}
		off += n
	}
	return true, nil
}

// samePlace reports whether two extents are the same bytes of the same file.
func (d *differ) samePlace(a, b *blockdev.Extent) bool {
	if a.Kind != blockdev.Data || b.Kind != blockdev.Data || a.HostOff != b.HostOff {
		return false
	}
	fa, okA := a.Host.(*blockdev.File)
	fb, okB := b.Host.(*blockdev.File)
	if !okA || !okB {
		return false
	}
	pair := [2]*blockdev.File{fa, fb}
	same, known := d.hosts[pair]
	if !known {
		ia, errA := fa.OS().Stat()
		ib, errB := fb.OS().Stat()
		same = errA == nil && errB == nil && os.SameFile(ia, ib)
		d.hosts[pair] = same
	}
	return same
}

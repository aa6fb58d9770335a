package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"qimg/cloudimg/guest"
	"qimg/ext4img"
	"qimg/qcow2/blockdev"
)

// editing is a file system in an image that is open to be changed.
type editing struct {
	place  *place
	host   Host
	dryRun bool
	img    *image
	disk   *guest.Disk
	volume *guest.Volume
	editor *ext4img.Editor
	fs     *ext4img.FS
}

// placeGroups are places by file system.
type placeGroups [][]*place

func (g *placeGroups) add(p *place) {
	for i, have := range *g {
		if q := have[0]; sameFile(q.image, p.image) && q.part == p.part && q.snapshot == p.snapshot {
			(*g)[i] = append(have, p)
			return
		}
	}
	*g = append(*g, []*place{p})
}

// openEditing opens the file system of a place. For a dry run the image is
// opened for reading alone, and what is written is held in memory.
func openEditing(ctx context.Context, host Host, p *place, o *openOptions, dryRun bool) (_ *editing, err error) {
	if p.snapshot != "" {
		return nil, p.error("", errors.New("a snapshot cannot be changed"))
	}
	open := *o
	open.write = !dryRun
	e := &editing{place: p, host: host, dryRun: dryRun}
	if e.img, err = openImage(ctx, p.image, &open); err != nil {
		return nil, couldNotOpen(p.image, err)
	}
	if err = e.open(ctx); err != nil {
		e.img.close()
		return nil, err
	}
	return e, nil
}

func (e *editing) open(ctx context.Context) (err error) {
	p := e.place
	if e.img.inUse != nil {
		return couldNotOpen(p.image, e.img.inUse)
	}
	if e.disk, err = guest.Open(e.img.reader()); err != nil {
		return couldNotOpen(p.image, err)
	}
	if e.volume, err = e.disk.Select(p.part); err != nil {
		return selectError(p, err)
	}
	if !e.volume.IsExt() {
		holds := e.volume.FS.Type
		if holds == "" {
			holds = "nothing known"
		}
		return prefixError(p.image, messagef("%s holds %s: only the files of ext2, ext3 and ext4 can be changed", e.volume, holds))
	}
	dev, ok := e.img.reader().(blockdev.Device)
	switch {
	case e.dryRun:
		dev = &scratch{e.img.reader(), map[int64][]byte{}}
	case !ok:
		return couldNotOpen(p.image, messagef("Images in format %s are read only", e.img.format))
	}
	if dev, err = e.disk.WritableDevice(dev, e.volume); err != nil {
		return prefixError(p.image, err)
	}
	if e.editor, err = ext4img.OpenEditor(ctx, dev, nil); err != nil {
		return prefixError(p.image, err)
	}
	tx, err := e.editor.Begin()
	if err != nil {
		return prefixError(p.image, err)
	}
	e.fs = tx.FS()
	tx.Discard()
	return nil
}

// run makes changes, which work does.
func (e *editing) run(ctx context.Context, work func(*guest.Edits) error) error {
	opts := &guest.EditOptions{DryRun: e.dryRun, TooLarge: func(err error) {
		e.host.warn("%s: %v; it is made in several transactions, each of them wholly or not at all", printable(e.place.image), err)
	}}
	n, err := guest.Edit(ctx, e.editor, opts, work)
	if err != nil && n > 0 {
		if errors.Is(err, context.Canceled) { // something is left behind, which exitInterrupted denies
			err = fmt.Errorf("%s: interrupted", printable(e.place.image))
		}
		err = withHint(err, fmt.Sprintf("%d transactions were done before: a part of the files is changed\n", n))
	}
	return err
}

// tell prints what a dry run would change, as diff does.
func (e *editing) tell(c *guest.Edits, letter, path string) {
	if c.Planned() && e.dryRun {
		fmt.Fprintf(e.host.Out, "%s %s\n", letter, printable(path))
	}
}

// scratch is a disk whose changes are held in memory.
type scratch struct {
	blockdev.Reader
	chunks map[int64][]byte // by number; what was written
}

const scratchChunk = 4096

func (s *scratch) ReadAt(p []byte, off int64) (int, error) {
	n, err := s.Reader.ReadAt(p, off)
	for at := off &^ (scratchChunk - 1); at < off+int64(n); at += scratchChunk {
		if c := s.chunks[at/scratchChunk]; c != nil {
			from := max(at, off)
			copy(p[from-off:n], c[from-at:])
		}
	}
	return n, err
}

func (s *scratch) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || off > s.Size()-int64(len(p)) {
		return 0, io.ErrShortWrite
	}
	for done := 0; done < len(p); {
		at := (off + int64(done)) &^ (scratchChunk - 1)
		c := s.chunks[at/scratchChunk]
		if c == nil {
			c = make([]byte, scratchChunk)
			if _, err := s.Reader.ReadAt(c, at); err != nil && err != io.EOF {
				return done, err
			}
			s.chunks[at/scratchChunk] = c
		}
		done += copy(c[off+int64(done)-at:], p[done:])
	}
	return len(p), nil
}

// maxLinksFollowed is how many symlinks the last element of a path may lead
// through, as in Linux.
const maxLinksFollowed = 40

// copyTarget returns the directory and the name that a path leads to, symlinks at
// its end followed, and the inode, or nil if nothing is there yet. The name of
// a directory is ".", with its own number.
func copyTarget(fsys *ext4img.FS, tx *ext4img.Tx, path string) (dir ext4img.Ino, name string, n *ext4img.Inode, err error) {
	for links := range maxLinksFollowed {
		ino, err := fsys.Resolve(path, false)
		switch {
		case errors.Is(err, fs.ErrNotExist) && links > 0:
			return 0, "", nil, errors.New("is a symlink that leads nowhere")
		case errors.Is(err, fs.ErrNotExist):
			dir, name, err = tx.Parent(path)
			if err == nil && strings.HasSuffix(path, "/") {
				err = fs.ErrNotExist // of a directory
			}
			return dir, name, nil, err
		case err != nil:
			return 0, "", nil, err
		}
		if n, err = fsys.Inode(ino); err != nil {
			return 0, "", nil, err
		}
		switch {
		case n.IsDir():
			return ino, ".", n, nil
		case !n.IsSymlink():
			dir, name, err = tx.Parent(path)
			return dir, name, n, err
		}
		to, err := fsys.Readlink(ino)
		if err != nil {
			return 0, "", nil, err
		}
		if !strings.HasPrefix(to, "/") {
			path = strings.TrimRight(path, "/")
			to = path[:strings.LastIndexByte(path, '/')+1] + to
		}
		path = to
	}
	return 0, "", nil, errors.New("too many levels of symbolic links")
}

package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
)

// convertSources are the inputs, which are read one behind the other.
type convertSources struct {
	joined
	images []*image
	files  []string // what they lie in, with their backing and data files
}

func (s *convertSources) close() {
	for _, img := range s.images {
		img.close()
	}
}

// openSources opens the inputs. What it returns is to be closed, also after an
// error.
func (o *convertOptions) openSources(ctx context.Context, names []string, output string) (*convertSources, error) {
	s := &convertSources{}
	o.source.complete = true
	for _, name := range names {
		img, err := o.openSource(ctx, s, name, output)
		if err != nil {
			return s, couldNotOpen(name, err)
		}
		s.images = append(s.images, img)
	}
	if err := o.useSnapshot(ctx, s, names); err != nil {
		return s, err
	}
	for _, img := range s.images {
		unit := int64(512)
		if img.qcow2 != nil {
			h := img.qcow2.Header()
			unit = h.ClusterSize()
		}
		s.add(img.reader(), img.size(), unit)
	}
	return s, nil
}

// openSource opens an input, which nobody else may write meanwhile.
func (o *convertOptions) openSource(ctx context.Context, s *convertSources, name, output string) (*image, error) {
	if !o.source.imageOpts && (name == "-" || isPipe(name)) {
		return o.readPipe(ctx, name, output)
	}
	open := o.source
	open.chain = true
	open.opened = func(path string) { s.files = append(s.files, path) }
	chain := []string{""} // paths by depth
	open.layer = func(b qcow2.BackingFile) bool {
		open.opened(b.Path)
		chain = append(chain, b.Path)
		return false
	}
	img, err := openImage(ctx, name, &open)
	if err != nil {
		return nil, err
	}
	if img.inUse != nil && !open.forceShare {
		img.close()
		return nil, img.inUse
	}
	chain[0] = img.file.Name()
	im := img.qcow2
	for depth := 0; im != nil && depth < len(chain); depth++ {
		h := im.Header()
		if data := h.DataFile(); data != "" {
			open.opened(combinePath(chain[depth], data))
		}
		im, _ = im.Backing().(*qcow2.Image)
	}
	return img, nil
}

// isPipe reports whether a path is that of a pipe.
func isPipe(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode()&os.ModeNamedPipe != 0
}

// readPipe reads a raw disk from a pipe into a file that has no name, or a
// temporary one, in the directory of the output.
func (o *convertOptions) readPipe(ctx context.Context, name, output string) (*image, error) {
	if o.source.hasFormat && o.source.format != "raw" {
		return nil, messagef("only a raw disk can be read from a pipe, format '%s' needs a file", o.source.format)
	}
	in := o.host.In
	if name != "-" {
		f, err := unlessDone(ctx, 0, func() (*os.File, error) { return os.Open(name) })
		if err != nil {
			return nil, openError(name, err)
		}
		defer f.Close()
		in = f
	}
	if in == nil {
		in = eofReader{}
	}
	dir := filepath.Dir(output)
	if o.targetOpts || output == "-" || isPipe(output) {
		dir = os.TempDir()
	}
	out, err := newFile(filepath.Join(dir, "qimg-input"), &blockdev.CreateOptions{NoSync: true, NoLock: true})
	if err != nil {
		return nil, err
	}
	img := &image{arg: name, name: name, format: "raw", file: out.File(), dev: out.File(), closers: []io.Closer{closeFunc(out.Abort)}}
	_, err = blockdev.Spool(out.File(), &input{ctx: ctx, r: in})
	if err == nil && !o.source.hasFormat {
		if img.format, err = probe(img.dev); err == nil && img.format != "raw" {
			err = messagef("it is in format %s, and only a raw disk can be read from a pipe (with -f raw it is taken byte by byte)", img.format)
		}
	}
	if err != nil {
		img.close()
		return nil, err
	}
	return img, nil
}

type eofReader struct{}

func (eofReader) Read([]byte) (int, error) { return 0, io.EOF }

type closeFunc func() error

func (f closeFunc) Close() error { return f() }

// useSnapshot opens the first input anew, with the content of the snapshot.
func (o *convertOptions) useSnapshot(ctx context.Context, s *convertSources, names []string) (err error) {
	if o.snapshot.selected == nil && o.snapshot.any != "" && len(names) > 1 {
		return messagef("No support for concatenating multiple snapshot")
	}
	s.images[0], err = useSnapshot(ctx, s.images[0], &o.snapshot, &o.source)
	return err
}

// useSnapshot opens an image anew, with the content of the snapshot, if -l names
// one. It returns the image that is open then, also after an error.
func useSnapshot(ctx context.Context, img *image, a *snapshotArg, o *openOptions) (*image, error) {
	if a.selected == nil && a.any == "" {
		return img, nil
	}
	fail := func(err error) (*image, error) { return img, prefixError("Failed to load snapshot", err) }
	if img.qcow2 == nil {
		return fail(messagef("Block format '%s' used by device '' does not support temporarily loading internal snapshots", img.format))
	}
	sn, err := a.find(img.qcow2.Snapshots())
	if err != nil {
		return fail(err)
	}
	open := *o
	open.chain, open.host.Err = true, io.Discard // what is to be said was said
	if open.snapshot = sn.ID; sn.ID == "" {
		open.snapshot = sn.Name
	}
	again, err := openImage(ctx, img.arg, &open)
	if err != nil {
		return fail(err)
	}
	img.close()
	return again, nil
}

// find returns the snapshot that -l names.
func (a *snapshotArg) find(list []qcow2.Snapshot) (*qcow2.Snapshot, error) {
	id, byID := a.selected["snapshot.id"]
	name, byName := a.selected["snapshot.name"]
	if a.selected == nil {
		id, byID = a.any, true
	}
	if !byID && !byName {
		return nil, messagef("snapshot_id and name are both NULL")
	}
	i := slices.IndexFunc(list, func(s qcow2.Snapshot) bool {
		return (!byID || s.ID == id) && (!byName || s.Name == name)
	})
	if i < 0 && a.selected == nil {
		i = slices.IndexFunc(list, func(s qcow2.Snapshot) bool { return s.Name == a.any })
	}
	if i < 0 {
		return nil, messagef("Can't find snapshot")
	}
	return &list[i], nil
}

// overlapping returns the path of the input, or of the file in the chain of one, that
// a file has bytes in common with; "" if there is none.
func (s *convertSources) overlapping(info os.FileInfo) string {
	for _, path := range s.files {
		if other, err := os.Stat(path); err == nil && blockdev.Overlap(info, other) {
			return path
		}
	}
	return ""
}

// joined are disks one behind the other, each in whole sectors.
type joined struct {
	parts []joinedPart
	size  int64
	// split: extents end here, so that what lies behind can be told apart.
	split int64
}

type joinedPart struct {
	r      blockdev.Reader
	off, n int64
	unit   int64
}

// add adds a disk. Its extents end at multiples of unit, and what is left of one is
// another, as qemu-img has it: it looks for zeroes in each by itself.
func (j *joined) add(r blockdev.Reader, size, unit int64) {
	j.parts = append(j.parts, joinedPart{r, j.size, size, unit})
	j.size += size
}

// Size returns the size of all disks together.
func (j *joined) Size() int64 { return j.size }

// part returns the disk at off.
func (j *joined) part(off int64) (joinedPart, error) {
	i := slices.IndexFunc(j.parts, func(p joinedPart) bool { return off >= p.off && off < p.off+p.n })
	if i < 0 {
		return joinedPart{}, fmt.Errorf("offset %d of %d: %w", off, j.size, blockdev.ErrRange)
	}
	return j.parts[i], nil
}

// ReadAt implements io.ReaderAt. What a disk lacks of its last sector is zeroes.
func (j *joined) ReadAt(b []byte, off int64) (n int, err error) {
	for n < len(b) {
		at := off + int64(n)
		if at == j.size {
			return n, io.EOF
		}
		p, err := j.part(at)
		if err != nil {
			return n, err
		}
		piece := b[n:min(int64(len(b)), int64(n)+p.off+p.n-at)]
		m, err := p.r.ReadAt(piece, at-p.off)
		if m < len(piece) && err != nil && !errors.Is(err, io.EOF) {
			return n + m, err
		}
		if at-p.off+int64(m) < p.r.Size() && m < len(piece) {
			return n + m, io.ErrUnexpectedEOF // it was cut off meanwhile
		}
		clear(piece[m:])
		n += len(piece)
	}
	return n, nil
}

// NextExtent implements blockdev.ExtentReader.
func (j *joined) NextExtent(off int64) (blockdev.Extent, error) {
	p, err := j.part(off)
	if err != nil {
		return blockdev.Extent{}, err
	}
	e := blockdev.Extent{Off: off, Len: p.off + p.n - off, Kind: blockdev.Zero}
	if at := off - p.off; at < p.r.Size() {
		if e, err = blockdev.NextExtent(p.r, at); err != nil {
			return e, err
		}
		if tail := (at + e.Len) % p.unit; e.Len > tail {
			e.Len -= tail
		}
		e.Off = off
	}
	if off < j.split {
		e.Len = min(e.Len, j.split-off)
	}
	return e, nil
}

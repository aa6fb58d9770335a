package oci

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"

	"qimg/cloudimg/decomp"
)

// store is where the files of an image lie.
type store interface {
	// open returns a regular file by its slash-separated path.
	open(name string) (file, error)
	io.Closer
}

// file is a regular file. It is closed with its store.
type file struct {
	io.ReaderAt
	size int64
	stat func() (fs.FileInfo, error)
}

// Size implements blockdev.Reader.
func (f file) Size() int64 { return f.size }

// openStore opens a directory, or a tar archive.
func openStore(ctx context.Context, name, tempDir string) (store, error) {
	fi, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if fi.IsDir() {
		root, err := os.OpenRoot(name)
		if err != nil {
			return nil, err
		}
		return &dirStore{root: root}, nil
	}
	if !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: %w: neither a directory nor a file", name, ErrFormat)
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	s := &tarStore{file: f, r: file{f, fi.Size(), f.Stat}, stat: f.Stat}
	if err := s.index(ctx, tempDir); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", name, err), s.Close())
	}
	return s, nil
}

// dirStore is a directory. Nothing leads out of it.
type dirStore struct {
	root  *os.Root
	files []*os.File
}

func (s *dirStore) open(name string) (file, error) {
	fi, err := s.root.Stat(name)
	if err != nil {
		return file{}, err
	}
	if !fi.Mode().IsRegular() { // which opening might wait for
		return file{}, fmt.Errorf("%s: not a regular file", name)
	}
	f, err := s.root.Open(name)
	if err != nil {
		return file{}, err
	}
	s.files = append(s.files, f)
	return file{f, fi.Size(), f.Stat}, nil
}

func (s *dirStore) Close() error {
	errs := []error{s.root.Close()}
	for _, f := range s.files {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

// tarStore is a tar archive.
type tarStore struct {
	file  *os.File
	disk  *decomp.Disk // what file decompresses to; nil: it is not compressed
	r     file
	stat  func() (fs.FileInfo, error)
	files map[string]tarMember
}

// tarMember is a file in the archive, or a link to one.
type tarMember struct {
	off, size int64
	link      string // path from the root
}

const (
	// maxMembers bounds the files of an archive, which are a few for a layer.
	maxMembers = 100_000
	maxHops    = 10 // links to links
)

// index finds the files of the archive.
func (s *tarStore) index(ctx context.Context, tempDir string) error {
	format, err := decomp.Detect(s.r)
	if err != nil {
		return err
	}
	if format != "" {
		if s.disk, err = decomp.Open(ctx, s.r, tempDir, nil); err != nil {
			return err
		}
		s.r = file{s.disk, s.disk.Size(), s.stat}
	}
	s.files = make(map[string]tarMember)
	r := io.NewSectionReader(s.r, 0, s.r.size)
	t := tar.NewReader(r)
	for {
		h, err := t.Next()
		if err == io.EOF {
			return ctx.Err()
		}
		if err != nil {
			return fmt.Errorf("%w: %w", ErrFormat, err)
		}
		if len(s.files) == maxMembers {
			return fmt.Errorf("over %d files: %w", maxMembers, ErrFormat)
		}
		off, err := r.Seek(0, io.SeekCurrent)
		if err != nil {
			return err
		}
		name := clean(h.Name)
		switch h.Typeflag {
		case tar.TypeReg:
			s.files[name] = tarMember{off: off, size: h.Size}
		case tar.TypeLink:
			s.files[name] = tarMember{link: clean(h.Linkname)}
		case tar.TypeSymlink: // docker-save has layers twice by these
			s.files[name] = tarMember{link: clean(path.Join(path.Dir(name), h.Linkname))}
		}
	}
}

func clean(name string) string { return path.Clean("/" + name)[1:] }

func (s *tarStore) open(name string) (file, error) {
	m, ok := s.files[clean(name)]
	for range maxHops {
		if !ok || m.link == "" {
			break
		}
		m, ok = s.files[m.link]
	}
	if !ok || m.link != "" {
		return file{}, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	return file{io.NewSectionReader(s.r, m.off, m.size), m.size, s.stat}, nil
}

func (s *tarStore) Close() error {
	err := s.file.Close()
	if s.disk != nil {
		err = errors.Join(err, s.disk.Close())
	}
	return err
}

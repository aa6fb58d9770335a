package formats

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"sync"

	"github.com/klauspost/compress/zlib"

	"qimg/qcow2/blockdev"
)

// maxInflaters bounds the grains that are kept: each takes three times the size of
// a grain, and 40 KiB.
const maxInflaters = 8

// inflater reads the compressed grains of a VMDK image. Those that were read last
// are kept, since a grain is often read in parts.
type inflater struct {
	file    blockdev.Reader
	grain   int64
	markers bool // before each grain is a marker with its length

	mu   sync.Mutex
	free []*inflated // the one that was used last at the end
}

// inflated is a grain, and what is needed to read another one.
type inflated struct {
	host int64  // of the grain in the file; 0: none
	data []byte // may be shorter than a grain, at the end of the disk
	in   []byte
	z    io.ReadCloser
}

// read reads len(p) bytes at off, in the grain of r.
func (f *inflater) read(p []byte, off int64, r run) error {
	g := f.take(r.host)
	defer f.put(g)
	if g.host != r.host {
		g.host = 0
		if err := f.load(g, r.host); err != nil {
			return err
		}
		g.host = r.host
	}
	in := off % f.grain
	if in+int64(len(p)) > int64(len(g.data)) {
		return f.where(r.host).corrupt("", "has %d bytes, expected %d at least", len(g.data), in+int64(len(p)))
	}
	copy(p, g.data[in:])
	return nil
}

func (f *inflater) where(host int64) at { return at{VMDK, "grain", host} }

// take returns the grain at host if it is kept, another one to be used anew, or
// a new one.
func (f *inflater) take(host int64) *inflated {
	f.mu.Lock()
	defer f.mu.Unlock()
	i := -1
	for j, g := range f.free {
		if g.host == host {
			i = j
		}
	}
	if i < 0 && len(f.free) == maxInflaters {
		i = 0
	}
	if i < 0 {
		return &inflated{}
	}
	g := f.free[i]
	f.free = append(f.free[:i], f.free[i+1:]...)
	return g
}

func (f *inflater) put(g *inflated) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.free) < maxInflaters {
		f.free = append(f.free, g)
	}
}

// load reads the grain at host: a marker of 12 bytes, if there are some, and a
// zlib stream. As in QEMU both are in twice the size of a grain, and a stream
// without a marker is in the size of one.
func (f *inflater) load(g *inflated, host int64) error {
	where := f.where(host)
	size := f.file.Size()
	if host >= size {
		return where.corrupt("", "lies behind the end of the file at %#x", size)
	}
	if g.data == nil {
		g.data, g.in = make([]byte, f.grain), make([]byte, 2*f.grain)
	}
	in := g.in[:min(2*f.grain, size-host)]
	if n, err := f.file.ReadAt(in, host); n < len(in) {
		return err
	}
	n := f.grain
	if f.markers {
		const header = 12 // the sector of the disk, the length
		if len(in) < header {
			return where.corrupt("marker", "has %d bytes, the file ends at %#x", header, size)
		}
		n, in = int64(binary.LittleEndian.Uint32(in[8:])), in[header:]
		if n == 0 || n > int64(len(in)) {
			return where.corrupt("size", "%d bytes, expected 1 to %d", n, len(in))
		}
	}
	in = in[:min(n, int64(len(in)))]
	var err error
	if g.z == nil {
		g.z, err = zlib.NewReader(bytes.NewReader(in))
	} else {
		err = g.z.(zlib.Resetter).Reset(bytes.NewReader(in), nil)
	}
	if err != nil {
		return where.corrupt("", "compressed data: %v", err)
	}
	g.data = g.data[:f.grain]
	m, err := io.ReadFull(g.z, g.data)
	switch {
	case err == nil:
		// What is longer than a grain is wrong; this also checks the sum.
		if k, e := g.z.Read(make([]byte, 1)); k > 0 || e != io.EOF {
			return where.corrupt("", "compressed data: longer than a grain, or %v", e)
		}
	case errors.Is(err, io.ErrUnexpectedEOF) && streamEnded(g.z):
	default:
		return where.corrupt("", "compressed data: %v", err)
	}
	g.data = g.data[:m]
	return nil
}

// streamEnded reports whether a stream ended as it should: it says io.EOF again,
// where one that was cut says io.ErrUnexpectedEOF.
func streamEnded(z io.Reader) bool {
	_, err := z.Read(make([]byte, 1))
	return err == io.EOF
}

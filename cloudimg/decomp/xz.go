package decomp

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"hash/crc64"
	"io"
	"runtime"
	"slices"
	"sync"

	"github.com/ulikunitz/xz/lzma"

	"qimg/qcow2/blockdev"
)

// The .xz container, read from its end: each stream has an index of its blocks, so
// that the size of the content is known before anything is decoded, and blocks can
// be decoded side by side ("The .xz File Format", version 1.2.1).
const (
	xzMagic       = "\xfd7zXZ\x00"
	xzFooterMagic = "YZ"
	xzHeaderSize  = 12 // of a stream, and of its footer
	xzLZMA2       = 0x21
	xzMinDict     = 4 << 10
	// The dictionaries that are in memory at a time, if there is more than one.
	xzDictBudget = 32 << 20
)

func corruptf(off int64, format string, args ...any) error {
	return fmt.Errorf("at %#x: %s: %w", off, fmt.Sprintf(format, args...), ErrCorrupt)
}

// xzStream is a stream of an input.
type xzStream struct {
	off       int64 // of its header
	index     int64 // where its index begins
	indexSize int64
	check     byte // how blocks are checked
}

// xzBlock is a block of an input.
type xzBlock struct {
	off      int64
	unpadded int64 // size without the padding at the end
	size     int64 // of its content
	out      int64 // where the content goes
	check    byte
}

// decodeXZ writes what an input decompresses to.
func decodeXZ(ctx context.Context, dst spool, src blockdev.Reader, limit int64) error {
	streams, size, err := xzStreams(ctx, src, limit)
	if err != nil {
		return err
	}
	if err := dst.Truncate(size); err != nil {
		return err
	}
	d := &xzDecoder{ctx: ctx, dst: dst, src: src, workers: runtime.GOMAXPROCS(0)}
	d.ready.L = &d.mu
	out := int64(0)
	for i := range streams {
		s := &streams[i]
		at := s.off + xzHeaderSize
		err := s.readIndex(src, func(unpadded, size int64) error {
			b := xzBlock{at, unpadded, size, out, s.check}
			at += (unpadded + 3) &^ 3
			out += size
			return d.start(b)
		})
		if err != nil {
			d.fail(err)
			break
		}
	}
	d.wg.Wait()
	return d.err
}

// readAt reads n bytes of the input.
func readAt(src blockdev.Reader, off, n int64) ([]byte, error) {
	b := make([]byte, n)
	if m, err := src.ReadAt(b, off); m < len(b) {
		if err == io.EOF {
			return nil, corruptf(off, "the end is missing")
		}
		return nil, &ioError{err}
	}
	return b, nil
}

// xzStreams finds the streams, from the end on, and returns them from the
// beginning on, with the size of the content of all, which may not be more than limit
// bytes.
func xzStreams(ctx context.Context, src blockdev.Reader, limit int64) (streams []xzStream, total int64, err error) {
	le := binary.LittleEndian
	for end := src.Size(); end > 0; {
		if err := ctx.Err(); err != nil {
			return nil, 0, err
		}
		if end, err = skipPadding(src, end); err != nil {
			return nil, 0, err
		}
		if end < 2*xzHeaderSize {
			return nil, 0, corruptf(0, "the footer of a stream is missing")
		}
		footer, err := readAt(src, end-xzHeaderSize, xzHeaderSize)
		if err != nil {
			return nil, 0, err
		}
		if string(footer[10:]) != xzFooterMagic || crc32.ChecksumIEEE(footer[4:10]) != le.Uint32(footer) {
			return nil, 0, corruptf(end-xzHeaderSize, "no footer of a stream: the end is missing, or is followed by something else")
		}
		s := xzStream{check: footer[9], indexSize: (int64(le.Uint32(footer[4:])) + 1) * 4}
		if s.index = end - xzHeaderSize - s.indexSize; s.index < xzHeaderSize {
			return nil, 0, corruptf(end-xzHeaderSize, "the index of %d bytes is not in the file", s.indexSize)
		}
		blocks := int64(0) // bytes
		err = s.readIndex(src, func(unpadded, size int64) error {
			if unpadded > s.index-blocks {
				return corruptf(s.index, "the index has more bytes than lie before it")
			}
			blocks += (unpadded + 3) &^ 3
			if size > limit-total {
				return &SizeError{limit}
			}
			total += size
			return nil
		})
		if err != nil {
			return nil, 0, err
		}
		if s.off = s.index - blocks - xzHeaderSize; s.off < 0 {
			return nil, 0, corruptf(s.index, "the index has more bytes than lie before it")
		}
		header, err := readAt(src, s.off, xzHeaderSize)
		if err != nil {
			return nil, 0, err
		}
		if !bytes.HasPrefix(header, []byte(xzMagic)) || crc32.ChecksumIEEE(header[6:8]) != le.Uint32(header[8:]) {
			return nil, 0, corruptf(s.off, "no header of a stream, where one has to be by the index")
		}
		if !bytes.Equal(header[6:8], footer[8:10]) {
			return nil, 0, corruptf(s.off, "flags of header and footer differ")
		}
		if _, err := newCheck(s.check); err != nil || header[6] != 0 {
			return nil, 0, fmt.Errorf("at %#x: check %#x%02x: %w", s.off, header[6], header[7], ErrUnsupported)
		}
		streams = append(streams, s)
		if s.off == 0 {
			break
		}
		end = s.off
	}
	slices.Reverse(streams)
	return streams, total, nil
}

// skipPadding returns where the stream before end ends: zeroes, in fours, can be
// between them.
func skipPadding(src blockdev.Reader, end int64) (int64, error) {
	from := end
	for size := int64(4); ; size = min(2*size, 64<<10) {
		n := min(from, size)
		b, err := readAt(src, from-n, n)
		if err != nil {
			return 0, err
		}
		trimmed := bytes.TrimRight(b, "\x00")
		from -= n
		if len(trimmed) == 0 && from > 0 {
			continue
		}
		padding := end - from - int64(len(trimmed))
		return end - padding&^3, nil
	}
}

// readIndex calls record for each block of the stream: its size without padding,
// and that of its content.
func (s *xzStream) readIndex(src blockdev.Reader, record func(unpadded, size int64) error) error {
	sum := crc32.NewIEEE()
	in := io.NewSectionReader(src, s.index, s.indexSize)
	r := &summingReader{r: bufio.NewReaderSize(in, int(min(s.indexSize, 16<<10))), sum: sum}
	indicator, err := r.ReadByte()
	if err == nil && indicator != 0 {
		return corruptf(s.index, "no index of a stream")
	}
	count, err2 := binary.ReadUvarint(r)
	if err = errors.Join(err, err2); err != nil {
		return corruptf(s.index, "index: %v", err)
	}
	for range count {
		unpadded, err := binary.ReadUvarint(r)
		size, err2 := binary.ReadUvarint(r)
		switch err = errors.Join(err, err2); {
		case err != nil:
			return corruptf(s.index, "index: %v", err)
		case unpadded < 5 || unpadded > 1<<62 || size > 1<<62:
			return corruptf(s.index, "index: a block of %d bytes with %d bytes of content", unpadded, size)
		}
		if err := record(int64(unpadded), int64(size)); err != nil {
			return err
		}
	}
	for r.n%4 != 0 {
		if b, err := r.ReadByte(); err != nil || b != 0 {
			return corruptf(s.index, "index: padding is not zero")
		}
	}
	want := sum.Sum32()
	var tail [4]byte
	if r.n+4 != s.indexSize {
		return corruptf(s.index, "index: has %d bytes, by the footer %d", r.n+4, s.indexSize)
	}
	if _, err := io.ReadFull(r.r, tail[:]); err != nil || binary.LittleEndian.Uint32(tail[:]) != want {
		return corruptf(s.index, "index: checksum does not fit")
	}
	return nil
}

// summingReader counts and sums what is read through it.
type summingReader struct {
	r   *bufio.Reader
	sum hash.Hash32
	n   int64
	b   [1]byte
}

func (r *summingReader) ReadByte() (byte, error) {
	b, err := r.r.ReadByte()
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	if err == nil {
		r.b[0] = b
		r.sum.Write(r.b[:])
		r.n++
	}
	return b, err
}

// newCheck returns the hash that blocks are checked by; nil for none.
func newCheck(id byte) (hash.Hash, error) {
	switch id {
	case 0:
		return nil, nil
	case 1:
		return crc32.NewIEEE(), nil
	case 4:
		return crc64.New(crc64.MakeTable(crc64.ECMA)), nil
	case 10:
		return sha256.New(), nil
	}
	return nil, ErrUnsupported
}

// xzDecoder decodes blocks side by side.
type xzDecoder struct {
	ctx     context.Context
	dst     spool
	src     blockdev.Reader
	workers int
	wg      sync.WaitGroup

	mu      sync.Mutex
	ready   sync.Cond
	running int
	dicts   int64 // bytes of their dictionaries
	spent   int64 // bytes of those that are no longer used
	err     error
}

func (d *xzDecoder) fail(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err == nil {
		d.err = err
	}
}

// start has a block decoded when its turn comes. Its error is that of an earlier
// block.
func (d *xzDecoder) start(b xzBlock) error {
	h, err := readBlockHeader(d.src, &b)
	if err != nil {
		return err
	}
	d.mu.Lock()
	for d.running > 0 && (d.running >= d.workers || d.dicts+h.dict > xzDictBudget) {
		d.ready.Wait()
	}
	err = d.err
	if err == nil {
		err = d.ctx.Err()
	}
	collect := false
	if err == nil {
		d.running++
		d.dicts += h.dict
		if collect = d.spent > 0 && d.spent+h.dict > xzDictBudget/2; collect {
			d.spent = 0
		}
	}
	d.mu.Unlock()
	if err != nil {
		return err
	}
	if collect { // else the heap grows to twice its size before that
		runtime.GC()
	}
	d.wg.Go(func() {
		if err := d.decode(&b, &h); err != nil {
			d.fail(err)
		}
		d.mu.Lock()
		d.running--
		d.dicts -= h.dict
		d.spent += h.dict
		d.ready.Signal()
		d.mu.Unlock()
	})
	return nil
}

// blockHeader is what the header of a block says.
type blockHeader struct {
	size int64 // of the header
	dict int64 // bytes of dictionary that are needed
}

func readBlockHeader(src blockdev.Reader, b *xzBlock) (blockHeader, error) {
	bad := func(format string, args ...any) (blockHeader, error) {
		return blockHeader{}, corruptf(b.off, "block header: "+format, args...)
	}
	first, err := readAt(src, b.off, 1)
	if err != nil {
		return blockHeader{}, err
	}
	size := (int64(first[0]) + 1) * 4
	if first[0] == 0 || size >= b.unpadded {
		return bad("has %d bytes, the block %d", size, b.unpadded)
	}
	raw, err := readAt(src, b.off, size)
	if err != nil {
		return blockHeader{}, err
	}
	body, sum := raw[:size-4], binary.LittleEndian.Uint32(raw[size-4:])
	if crc32.ChecksumIEEE(body) != sum {
		return bad("checksum does not fit")
	}
	flags := body[1]
	r := bytes.NewReader(body[2:])
	if flags&0x3c != 0 {
		return blockHeader{}, fmt.Errorf("at %#x: block flags %#x: %w", b.off, flags, ErrUnsupported)
	}
	if flags&0x40 != 0 { // the size of the compressed data
		n, err := binary.ReadUvarint(r)
		if want := b.unpadded - size - checkSize(b.check); err != nil || int64(n) != want {
			return bad("compressed size %d, by the index %d", n, want)
		}
	}
	if flags&0x80 != 0 {
		n, err := binary.ReadUvarint(r)
		if err != nil || int64(n) != b.size {
			return bad("uncompressed size %d, by the index %d", n, b.size)
		}
	}
	id, err := binary.ReadUvarint(r)
	n, err2 := binary.ReadUvarint(r)
	switch err = errors.Join(err, err2); {
	case err != nil:
		return bad("%v", err)
	case id != xzLZMA2 || flags&3 != 0:
		return blockHeader{}, fmt.Errorf("at %#x: filter %#x besides LZMA2: %w", b.off, id, ErrUnsupported)
	case n != 1:
		return bad("%d bytes of properties of LZMA2, expected 1", n)
	}
	prop, err := r.ReadByte()
	if err != nil || prop > 40 {
		return bad("size %d of the dictionary", prop)
	}
	for r.Len() > 0 {
		if c, _ := r.ReadByte(); c != 0 {
			return blockHeader{}, fmt.Errorf("at %#x: block header: padding is not zero: %w", b.off, ErrUnsupported)
		}
	}
	// More than the content is never looked at.
	dict := max(min((2|int64(prop&1))<<(prop/2+11), b.size), xzMinDict)
	if dict > maxWindow {
		return blockHeader{}, fmt.Errorf("at %#x: a dictionary of %d bytes, at most %d are allowed: %w", b.off, dict, maxWindow, ErrLimit)
	}
	return blockHeader{size, dict}, nil
}

func checkSize(id byte) int64 {
	if h, _ := newCheck(id); h != nil {
		return int64(h.Size())
	}
	return 0
}

// decode writes the content of a block, and checks it.
func (d *xzDecoder) decode(b *xzBlock, h *blockHeader) error {
	n := b.unpadded - h.size - checkSize(b.check)
	if n < 1 {
		return corruptf(b.off, "a block of %d bytes has no data", b.unpadded)
	}
	section := io.NewSectionReader(d.src, b.off+h.size, n)
	in := bufio.NewReaderSize(&contextReader{d.ctx, section, nil}, int(min(n, 64<<10)))
	z, err := lzma.Reader2Config{DictCap: int(h.dict)}.NewReader2(in)
	if err != nil {
		return blockError(b, err)
	}
	sum, _ := newCheck(b.check)
	buf := make([]byte, min(b.size+1, 256<<10))
	for done := int64(0); ; {
		m, err := io.ReadFull(z, buf)
		if int64(m) > b.size-done {
			return corruptf(b.off, "a block has more content than the %d bytes of the index", b.size)
		}
		if sum != nil {
			sum.Write(buf[:m])
		}
		if e := blockdev.WriteData(d.dst, buf[:m], b.out+done); e != nil {
			return e
		}
		done += int64(m)
		if err == io.ErrUnexpectedEOF && m > 0 {
			if _, err = z.Read(buf[:1]); err == nil {
				err = io.ErrUnexpectedEOF
			}
		}
		if err == io.EOF && done == b.size {
			break
		}
		if err == io.EOF {
			return corruptf(b.off, "a block has %d bytes of content, by the index %d", done, b.size)
		}
		if err != nil {
			return blockError(b, err)
		}
	}
	if _, err := in.ReadByte(); err != io.EOF {
		return corruptf(b.off, "something follows the data of a block")
	}
	return d.checkEnd(b, sum)
}

// checkEnd checks what follows the data of a block: padding, and the check.
func (d *xzDecoder) checkEnd(b *xzBlock, sum hash.Hash) error {
	size := checkSize(b.check)
	padding := -(b.unpadded - size) & 3
	tail, err := readAt(d.src, b.off+b.unpadded-size, padding+size)
	if err != nil {
		return err
	}
	if !bytes.Equal(tail[:padding], make([]byte, padding)) {
		return corruptf(b.off, "padding of a block is not zero")
	}
	if sum == nil {
		return nil
	}
	got := sum.Sum(nil)
	if b.check != 10 {
		slices.Reverse(got) // the CRCs are little-endian
	}
	if !bytes.Equal(got, tail[padding:]) {
		return corruptf(b.off, "check of a block does not fit")
	}
	return nil
}

func blockError(b *xzBlock, err error) error {
	if own := (*ioError)(nil); errors.As(err, &own) {
		return err
	}
	return corruptf(b.off, "%v", err)
}

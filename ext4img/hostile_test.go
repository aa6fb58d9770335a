package ext4img

import (
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/oracle"
)

// explore reads all that there is to read of a file system, within bounds, and
// returns how many errors that met. Reading has to have an end whatever the
// file system says.
func explore(t testing.TB, f *FS) (files, failures int) {
	note := func(err error) {
		if err == nil {
			files++
			return
		}
		failures++
		_ = err.Error()
	}
	for g := range min(f.sb.Groups(), 16) {
		d, err := f.groupDesc(g)
		note(err)
		if err == nil {
			_, err := f.blockBitmap(g, d)
			note(err)
			_, err = f.inodeBitmap(g, d)
			note(err)
		}
	}
	buf := make([]byte, 16<<10)
	for ino := Ino(1); ino <= Ino(min(f.sb.InodesCount, 300)); ino++ {
		n, err := f.Inode(ino)
		note(err)
		if err != nil {
			continue
		}
		for _, err := range f.Xattrs(ino) {
			note(err)
		}
		switch {
		case n.IsDir():
			names := 0
			for d, err := range f.Entries(ino) {
				note(err)
				if names++; names > 200 {
					break
				}
				if err == nil && names%8 == 0 {
					_, err := f.LookupIn(ino, d.Name)
					note(err)
				}
			}
			for _, name := range []string{"not there", "..", "."} {
				_, err := f.LookupIn(ino, name)
				note(err)
			}
		case n.IsSymlink():
			_, err := f.Readlink(ino)
			note(err)
		case n.IsRegular():
			c, err := f.File(ino)
			note(err)
			if err != nil {
				continue
			}
			for _, off := range []int64{0, 100, c.Size() / 2, c.Size() - 1000, c.Size() - 1} {
				if off >= 0 {
					if _, err := c.ReadAt(buf, off); err != io.EOF {
						note(err)
					}
				}
			}
			for off, k := int64(0), 0; off < c.Size() && k < 200; k++ {
				e, err := c.NextExtent(off)
				note(err)
				if err != nil {
					break
				}
				if e.Off != off || e.Len < 1 || off+e.Len > c.Size() {
					t.Fatalf("extent %+v at %d of %d", e, off, c.Size())
				}
				off += e.Len
			}
		}
	}
	entries := 0
	for e, err := range f.Walk(RootIno) {
		note(err)
		if entries++; entries > 2000 {
			break
		}
		if err == nil && entries%4 == 0 {
			_, err := f.Resolve(e.Path, true)
			note(err)
		}
	}
	entries = 0
	fs.WalkDir(f, ".", func(_ string, _ fs.DirEntry, err error) error {
		note(err)
		if entries++; entries > 500 {
			return fs.SkipAll
		}
		return nil
	})
	return files, failures
}

// TestDamagedImages reads the damaged file systems of e2fsprogs's own tests,
// whose sources E2FSPROGS_SRC names, by several ways of opening.
func TestDamagedImages(t *testing.T) {
	src := os.Getenv("E2FSPROGS_SRC")
	if src == "" {
		t.Skip("E2FSPROGS_SRC does not name the sources of e2fsprogs")
	}
	images, err := filepath.Glob(filepath.Join(src, "tests", "*", "image.gz"))
	if err != nil || len(images) < 200 {
		t.Fatalf("%d images in %s: %v", len(images), src, err)
	}
	opened := 0
	for _, image := range images {
		name := filepath.Base(filepath.Dir(image))
		dev := gunzipDevice(t, image)
		for _, opts := range []OpenOptions{{}, {IgnoreChecksums: true}, {IgnoreJournal: true}} {
			start := time.Now()
			f, err := Open(dev, &opts)
			if err != nil {
				t.Logf("%s: %v", name, err)
				if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrFormat) && !errors.Is(err, ErrUnsupported) {
					t.Errorf("%s: an error of no class: %v", name, err)
				}
				continue
			}
			files, failures := explore(t, f)
			opened++
			if d := time.Since(start); d > time.Second {
				t.Errorf("%s: took %v", name, d)
			}
			t.Logf("%s: %d things are sound, %d are not", name, files, failures)
		}
	}
	if opened < 300 {
		t.Errorf("%d images could be opened", opened)
	}
}

func gunzipDevice(t testing.TB, path string) *blockdev.Memory {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	return loadDevice(t, z)
}

// loadDevice reads a device into memory.
func loadDevice(t testing.TB, r io.Reader) *blockdev.Memory {
	t.Helper()
	dev := blockdev.NewMemory(0)
	buf := make([]byte, 64<<10)
	for off := int64(0); ; {
		n, err := io.ReadFull(r, buf)
		if n > 0 {
			if err := dev.Truncate(off + int64(n)); err != nil {
				t.Fatal(err)
			}
			if !isZero(buf[:n]) {
				if _, err := dev.WriteAt(buf[:n], off); err != nil {
					t.Fatal(err)
				}
			}
			off += int64(n)
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return dev
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// fuzzSeed is a small file system and the blocks of its metadata.
type fuzzSeed struct {
	dev    *blockdev.Memory
	blocks []int64
	size   int64 // of a block
}

// fuzzSeeds makes small file systems by mke2fs that together have all
// structures.
func fuzzSeeds(t testing.TB) []fuzzSeed {
	oracle.Require(t, "mke2fs", "debugfs", "e2fsck")
	dir := t.TempDir()
	tree := filepath.Join(dir, "tree")
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(os.MkdirAll(filepath.Join(tree, "big"), 0o755))
	for i := range 60 {
		check(os.WriteFile(filepath.Join(tree, "big", fmt.Sprintf("%s%d", strings.Repeat("n", i), i)), nil, 0o644))
	}
	check(os.MkdirAll(filepath.Join(tree, "a/b/c"), 0o755))
	check(os.WriteFile(filepath.Join(tree, "a/file"), []byte(strings.Repeat("content", 5000)), 0o644))
	check(os.WriteFile(filepath.Join(tree, "a/b/small"), []byte("in the inode, if it can hold it"), 0o644))
	check(os.Symlink("../../a/file", filepath.Join(tree, "a/b/link")))
	check(os.Symlink("/a/"+strings.Repeat("./", 60)+"b", filepath.Join(tree, "long")))
	f, err := os.Create(filepath.Join(tree, "a/comb"))
	check(err)
	for i := range int64(12) {
		_, err := f.WriteAt([]byte("tooth"), i*8192)
		check(err)
	}
	check(f.Close())

	var seeds []fuzzSeed
	for i, c := range []struct{ args, debugfs string }{
		{"-t ext2 -b 1024 -I 128 -N 128", ""},
		{"-t ext4 -b 1024 -O ^has_journal,inline_data,ea_inode,large_dir -N 128", "ea_set -f " + filepath.Join(tree, "a/file") + " a/b/small user.big\nea_set a/file user.x y"},
		{"-t ext4 -b 1024 -O ^has_journal,^metadata_csum,uninit_bg,meta_bg,^resize_inode -N 128", ""},
		{"-t ext4 -b 1024 -O fast_commit -J size=1 -N 128", "jo -c -v 3\njw -b 2000-2009 " + filepath.Join(tree, "a/file") + "\njw -r 2000,2001\njc"},
	} {
		image := filepath.Join(dir, fmt.Sprintf("image%d", i))
		args := append([]string{"-q", "-F", "-d", tree, "-U", "00000000-0000-0000-0000-000000000001"}, strings.Fields(c.args)...)
		oracle.MustRun(t, "mke2fs", append(args, image, "2500k")...)
		oracle.Run(t, "e2fsck", "-fyD", image) // makes indexes
		if c.debugfs != "" {
			cmds := filepath.Join(dir, "cmds")
			check(os.WriteFile(cmds, []byte(c.debugfs), 0o600))
			oracle.MustRun(t, "debugfs", "-w", "-f", cmds, image)
		}
		in, err := os.Open(image)
		check(err)
		seeds = append(seeds, newFuzzSeed(t, loadDevice(t, in)))
		check(in.Close())
	}
	return seeds
}

// newFuzzSeed finds the blocks of metadata of a file system.
func newFuzzSeed(t testing.TB, dev *blockdev.Memory) fuzzSeed {
	f, err := Open(dev, &OpenOptions{IgnoreJournal: true})
	if err != nil {
		t.Fatal(err)
	}
	s := fuzzSeed{dev: dev, size: int64(f.sb.BlockSize)}
	add := func(n int64) { s.blocks = append(s.blocks, n) }
	add(superblockOff / s.size)
	for g := range f.sb.Groups() {
		block, _ := f.sb.groupDescPlace(g)
		d, err := f.groupDesc(g)
		if err != nil {
			t.Fatal(err)
		}
		add(block)
		add(d.inodeTable)
		add(d.inodeTable + 1)
	}
	for ino := Ino(1); ino <= Ino(f.sb.InodesCount); ino++ {
		n, err := f.Inode(ino)
		if err != nil {
			continue
		}
		block, _, _ := f.inodePlace(ino)
		add(block)
		if n.FileACL != 0 {
			add(n.FileACL)
		}
		if n.IsDir() && n.Flags&inlineDataFl == 0 {
			f.eachDirBlock(n, func(_, block int64, _ []byte, _ error) bool { add(block); return true })
		}
		if !n.IsSymlink() && n.Flags&inlineDataFl == 0 {
			eachMapBlock(f, n, add)
		}
		if ino == journalIno {
			for k := range int64(24) {
				if m, err := f.mapping(n, k); err == nil {
					add(m.at(k).physical)
				}
			}
		}
	}
	return s
}

// eachMapBlock calls fn with the blocks of the first levels of a file's map.
func eachMapBlock(f *FS, n *Inode, fn func(int64)) {
	b := n.block()
	if n.Flags&extentsFl == 0 {
		for i := directBlocks; i < directBlocks+indirectLevels; i++ {
			if p := int64(binary.LittleEndian.Uint32(b[4*i:])); p > 0 && p < f.sb.BlocksCount {
				fn(p)
			}
		}
		return
	}
	h, err := parseExtentHeader(place{}, b)
	if err != nil || h.depth == 0 {
		return
	}
	for i := range h.entries {
		if _, child := parseIndex(b[extentHeaderLen+i*extentLen:]); child < f.sb.BlocksCount {
			fn(child)
		}
	}
}

// fixChecksums makes the checksums of a damaged file system right, so that
// damage gets to what is behind them.
func fixChecksums(dev *blockdev.Memory) {
	le := binary.LittleEndian
	sb := make([]byte, superblockSize)
	dev.ReadAt(sb, superblockOff)
	le.PutUint32(sb[0x3fc:], crc32c(^uint32(0), sb[:superblockSize-4]))
	dev.WriteAt(sb, superblockOff)
	s, err := parseSuperblock(sb, dev.Size(), true)
	if err != nil || s.ROCompat&(ROCompatMetadataCsum|ROCompatGDTCsum) == 0 {
		return
	}
	bs := int64(s.BlockSize)
	f := &FS{dev: dev, sb: s, ignoreChecksums: true, cache: blockCache{limit: 16}}
	update := func(block int64, off, n int, fn func(b []byte)) {
		if block >= 0 && block < s.BlocksCount && off+n <= s.BlockSize {
			b := make([]byte, n)
			dev.ReadAt(b, block*bs+int64(off))
			fn(b)
			dev.WriteAt(b, block*bs+int64(off))
		}
	}
	for g := range min(s.Groups(), 8) {
		block, off := s.groupDescPlace(g)
		update(block, off, s.DescSize, func(b []byte) {
			d := parseGroupDesc(s, b)
			d.put(s, b, g)
		})
	}
	if !s.hasCsum() {
		return
	}
	for ino := Ino(1); ino <= Ino(min(s.InodesCount, 800)); ino++ {
		block, off, err := f.inodePlace(ino)
		if err != nil {
			continue
		}
		update(block, off, s.InodeSize, func(b []byte) {
			if !isZero(b) {
				putInodeChecksum(s, ino, b)
			}
		})
		f.cache = blockCache{limit: 16}
		n, err := f.Inode(ino)
		if err != nil {
			continue
		}
		seed := s.inodeSeed(ino, n.Generation)
		update(n.FileACL, 0, s.BlockSize, func(b []byte) {
			if n.FileACL > 0 {
				le.PutUint32(b[16:], xattrBlockChecksum(s, b, n.FileACL))
			}
		})
		if n.Flags&inlineDataFl != 0 || n.IsSymlink() {
			continue
		}
		if n.Flags&extentsFl != 0 {
			eachMapBlock(f, n, func(block int64) {
				update(block, 0, s.BlockSize, func(b []byte) {
					if h, err := parseExtentHeader(place{}, b); err == nil && extentTailOff(h)+4 <= len(b) {
						le.PutUint32(b[extentTailOff(h):], crc32c(seed, b[:extentTailOff(h)]))
					}
				})
			})
		}
		if n.IsDir() {
			blocks := 0
			f.eachDirBlock(n, func(logical, block int64, _ []byte, err error) bool {
				update(block, 0, s.BlockSize, func(b []byte) {
					if n.Flags&indexFl != 0 && isDxBlock(b, logical) {
						if d, err := parseDxNode(place{}, s, b); err == nil {
							le.PutUint32(b[d.off+d.limit*dxEntryLen+4:], dxChecksum(s, n, d))
						}
						return
					}
					le.PutUint32(b[len(b)-4:], crc32c(seed, b[:len(b)-direntTailLen]))
				})
				blocks++
				return err == nil && blocks < 50
			})
		}
		if ino == journalIno {
			if m, err := f.mapping(n, 0); err == nil && m.at(0).physical > 0 {
				update(m.at(0).physical, 0, superblockSize, func(b []byte) {
					clear(b[0xfc:0x100])
					binary.BigEndian.PutUint32(b[0xfc:], crc32c(^uint32(0), b))
				})
			}
		}
	}
}

// FuzzFS damages the metadata of small file systems, five bytes for each
// change: block, offset, value. The first byte tells the file system and
// whether checksums are made right afterwards.
func FuzzFS(f *testing.F) {
	seeds := fuzzSeeds(f)
	for i := range seeds {
		f.Add([]byte{byte(i)})
		for k := range seeds[i].blocks {
			// A change in each block, at a place that differs.
			off := uint16(k*37) % uint16(seeds[i].size)
			f.Add([]byte{byte(i), byte(k), byte(k >> 8), byte(off), byte(off >> 8), byte(k * 11)})
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) == 0 || len(data) > 500 {
			return
		}
		s := seeds[int(data[0]&0x7f)%len(seeds)]
		dev := s.dev.Clone()
		for e := data[1:]; len(e) >= 5; e = e[5:] {
			block := s.blocks[int(binary.LittleEndian.Uint16(e))%len(s.blocks)]
			off := int64(binary.LittleEndian.Uint16(e[2:])) % s.size
			if _, err := dev.WriteAt(e[4:5], block*s.size+off); err != nil {
				t.Fatal(err)
			}
		}
		if data[0]&0x80 == 0 {
			fixChecksums(dev)
		}
		fs, err := Open(dev, nil)
		if err != nil {
			return
		}
		explore(t, fs)
	})
}

// FuzzCheck checks what FuzzFS reads. What Check finds no error in, and can be
// edited, is sound again after an edit.
func FuzzCheck(f *testing.F) {
	seeds := fuzzSeeds(f)
	for i := range seeds {
		f.Add([]byte{byte(i)})
		for k := range seeds[i].blocks {
			off := uint16(k*53) % uint16(seeds[i].size)
			f.Add([]byte{byte(i), byte(k), byte(k >> 8), byte(off), byte(off >> 8), byte(k * 7)})
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) == 0 || len(data) > 500 {
			return
		}
		s := seeds[int(data[0]&0x7f)%len(seeds)]
		dev := s.dev.Clone()
		for e := data[1:]; len(e) >= 5; e = e[5:] {
			block := s.blocks[int(binary.LittleEndian.Uint16(e))%len(s.blocks)]
			off := int64(binary.LittleEndian.Uint16(e[2:])) % s.size
			if _, err := dev.WriteAt(e[4:5], block*s.size+off); err != nil {
				t.Fatal(err)
			}
		}
		if data[0]&0x80 == 0 {
			fixChecksums(dev)
		}
		sound := func() bool {
			start := time.Now()
			errs := 0
			for f, err := range Check(t.Context(), dev, &CheckOptions{MaxFindings: 50}) {
				if err != nil || f.Severity == Error {
					errs++
				}
			}
			if d := time.Since(start); d > 10*time.Second {
				t.Errorf("took %v", d)
			}
			return errs == 0
		}
		if !sound() {
			return
		}
		e, err := OpenEditor(t.Context(), dev, nil)
		if err != nil {
			return
		}
		tx, err := e.Begin()
		if err != nil {
			t.Fatal(err)
		}
		ino, err := tx.Mkdir(RootIno, "fuzz", Attr{Mode: 0o755})
		if err == nil {
			_, err = tx.Create(ino, "file", Attr{})
		}
		if err != nil {
			tx.Discard()
			return
		}
		if err := tx.Commit(t.Context()); err != nil {
			return
		}
		if !sound() {
			t.Error("an edit has damaged the file system")
		}
	})
}

// FuzzFastCommit replays fast commits of any content.
func FuzzFastCommit(f *testing.F) {
	seeds := fuzzSeeds(f)
	base := seeds[len(seeds)-1].dev
	tag := func(tag, n uint16, v ...byte) []byte {
		b := binary.LittleEndian.AppendUint16(nil, tag)
		b = binary.LittleEndian.AppendUint16(b, n)
		return append(b, v...)
	}
	f.Add(tag(fcCreat, 9, 2, 0, 0, 0, 12, 0, 0, 0, 'x'))
	f.Add(tag(fcUnlink, 9, 2, 0, 0, 0, 12, 0, 0, 0, 'a'))
	f.Add(tag(fcAddRange, 16, 13, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 100, 0, 0, 0))
	f.Add(tag(fcDelRange, 12, 13, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0))
	inode := make([]byte, 4+256)
	inode[0], inode[5], inode[4+0x1a], inode[4+0x80] = 12, 0x41, 2, 32
	f.Add(append(tag(fcInode, 260, inode...), tag(fcCreat, 9, 2, 0, 0, 0, 12, 0, 0, 0, 'd')...))
	f.Fuzz(func(t *testing.T, data []byte) {
		dev := base.Clone()
		if !putFastCommit(t, dev, data) {
			return
		}
		fs, err := Open(dev, nil)
		if err != nil {
			return
		}
		explore(t, fs)
	})
}

// putFastCommit makes the fast commit area of a file system hold tags, with a
// head, and a tail whose checksum is right.
func putFastCommit(t testing.TB, dev *blockdev.Memory, tags []byte) bool {
	f, err := Open(dev, &OpenOptions{IgnoreJournal: true})
	if err != nil {
		t.Fatal(err)
	}
	r, err := f.openJournal(journalIno)
	if err != nil {
		t.Fatal(err)
	}
	for _, pass := range [...]recoveryPass{passScan} {
		if err := r.run(pass); err != nil {
			t.Fatal(err)
		}
	}
	_, phys, _, err := r.log.run(0)
	if err != nil {
		t.Fatal(err)
	}
	sb := make([]byte, superblockSize)
	dev.ReadAt(sb, phys)
	binary.BigEndian.PutUint32(sb[0x28:], r.incompat|jbd2IncompatFastCommit)
	binary.BigEndian.PutUint32(sb[0x54:], 64)
	clear(sb[0xfc:0x100])
	binary.BigEndian.PutUint32(sb[0xfc:], crc32c(^uint32(0), sb))
	dev.WriteAt(sb, phys)
	r, err = f.openJournal(journalIno)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.run(passScan); err != nil {
		t.Fatal(err)
	}

	le := binary.LittleEndian
	b := le.AppendUint16(nil, fcHead)
	b = le.AppendUint16(b, 8)
	b = le.AppendUint32(b, 0)
	b = le.AppendUint32(b, r.end)
	b = append(b, tags...)
	if len(b)+12 > int(r.blockSize) {
		return false
	}
	b = le.AppendUint16(b, fcTail)
	b = le.AppendUint16(b, 8)
	b = le.AppendUint32(b, r.end)
	b = le.AppendUint32(b, crc32c(0, b))
	_, phys, _, err = r.log.run((r.last + 1) * r.blockSize)
	if err != nil {
		t.Fatal(err)
	}
	dev.WriteAt(b, phys)
	return true
}

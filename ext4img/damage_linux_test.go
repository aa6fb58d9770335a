package ext4img

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"testing"

	"qimg/qcow2/blockdev"
)

// damageTree is a file system of what TestReadDamage damages.
func damageTree(t *testing.T) *blockdev.Memory {
	image, _ := writeImage(t, scanFake(t, damageRoot(), 1, nil), &LayoutOptions{Size: 32 << 20}, nil)
	in, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	return loadDevice(t, in)
}

func damageRoot() *fakeEntry {
	root := fakeRoot()
	root.put("dir/file", fakeReg(10000))
	comb := root.put("dir/comb", fakeReg(1000*8192))
	for i := range int64(1000) {
		comb.spans = append(comb.spans, span{i * 8192, i*8192 + 4096})
	}
	for i := range 500 {
		root.put(fmt.Sprintf("big/%s%d", strings.Repeat("n", 50), i), fakeReg(0))
	}
	root.put("a/b/c/file", fakeReg(5))
	root.put("xattr", fakeReg(1)).xattr = map[string]string{"user.big": strings.Repeat("v", 1000)}
	root.put("value", fakeReg(1)).xattr = map[string]string{"user.huge": strings.Repeat("v", 50000)}
	target := func(name, to string) {
		root.put(name, &fakeEntry{stat: stat{mode: modeLink | 0o777, links: 1, size: int64(len(to))}, target: to})
	}
	target("link", "dir/file")
	target("slow", strings.Repeat("./", 50)+"dir/file")
	for i := range 41 {
		target(fmt.Sprintf("chain%d", i), fmt.Sprintf("/chain%d", i+1))
	}
	target("chain41", "dir/file")
	target("loop", "loop")
	return root
}

// TestReadDamage damages one structure after the other: what depends on it is
// an error of the right class, and the rest can be read.
func TestReadDamage(t *testing.T) {
	good := damageTree(t)
	g, err := Open(good, nil)
	if err != nil {
		t.Fatal(err)
	}
	le := binary.LittleEndian
	ino := func(path string) Ino {
		n, err := g.Resolve(path, false)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	inodeAt := func(path string) int64 {
		block, off, err := g.inodePlace(ino(path))
		if err != nil {
			t.Fatal(err)
		}
		return block*4096 + int64(off)
	}
	blockAt := func(path string, logical int64) int64 {
		n, err := g.Inode(ino(path))
		if err != nil {
			t.Fatal(err)
		}
		m, err := g.mapping(n, logical)
		if err != nil || m.at(logical).physical == 0 {
			t.Fatal(err)
		}
		return m.at(logical).physical * 4096
	}
	index := func(path string) int64 {
		n, err := g.Inode(ino(path))
		if err != nil {
			t.Fatal(err)
		}
		_, child := parseIndex(n.block()[extentHeaderLen:])
		return child * 4096
	}
	put32 := func(v uint32) []byte { return le.AppendUint32(nil, v) }
	put16 := func(v uint16) []byte { return le.AppendUint16(nil, v) }
	xattr, err := g.Inode(ino("xattr"))
	if err != nil {
		t.Fatal(err)
	}
	value, err := g.Inode(ino("value"))
	if err != nil {
		t.Fatal(err)
	}
	valueIno := Ino(0)
	g.eachXattr(value, func(e xattrEntry, err error) bool { valueIno = e.inum; return true })
	valueBlock, valueOff, err := g.inodePlace(valueIno)
	if err != nil {
		t.Fatal(err)
	}
	valueAt := valueBlock*4096 + int64(valueOff)
	hugeSize := []byte{0, 0, 2, 0} // 128 KiB
	resolve := func(path string) func(*FS) error {
		return func(f *FS) error { _, err := f.Resolve(path, true); return err }
	}
	read := func(path string) func(*FS) error {
		return func(f *FS) error { _, err := f.ReadFile(path); return err }
	}
	readDir := func(path string) func(*FS) error {
		return func(f *FS) error { _, err := f.ReadDir(path); return err }
	}
	xattrs := func(path string) func(*FS) error {
		return func(f *FS) error {
			var first error
			for _, err := range f.Xattrs(ino(path)) {
				first = errors.Join(first, err)
			}
			return first
		}
	}
	firstName := func(path string) int64 { return blockAt(path, 0) + 24 }

	for _, c := range []struct {
		name string
		off  int64
		put  []byte
		fix  bool // checksums are made right
		use  func(*FS) error
		want error
		text string
	}{
		// Checksums.
		{"superblock", 1024 + 0x78, []byte("x"), false, nil, ErrChecksum, "superblock: checksum"},
		{"descriptor", 4096 + 0xc, []byte("x"), false, resolve("dir"), ErrChecksum, "descriptor of group 0 at block 1: checksum"},
		{"inode", inodeAt("dir/file") + 8, []byte("xx"), false, read("dir/file"), ErrChecksum, "inode "},
		{"extent block", index("dir/comb") + 1000, []byte("xx"), false, read("dir/comb"), ErrChecksum, "extent block of inode"},
		{"directory block", blockAt("dir", 0) + 9, []byte("xx"), false, readDir("dir"), ErrChecksum, "directory block of inode"},
		{"no tail", blockAt("dir", 0) + 4095 - 4, []byte{0}, false, readDir("dir"), ErrChecksum, "has no entry with a checksum"},
		{"htree root", blockAt("big", 0) + 37, []byte("xx"), false, resolve("big/missing"), ErrChecksum, "htree block of inode"},
		{"xattr block", xattr.FileACL*4096 + 4090, []byte("xx"), false, xattrs("xattr"), ErrChecksum, "xattr block of inode"},
		{"xattr value", valueAt + 8, []byte("xx"), true, xattrs("value"), ErrChecksum, "xattr inode of inode"},

		// Fields, with checksums that are right.
		{"magic", 1024 + 0x38, []byte("xx"), true, nil, ErrFormat, "s_magic 0x7878, expected 0xef53"},
		{"s_rev_level", 1024 + 0x4c, put32(2), true, nil, ErrUnsupported, "s_rev_level 2"},
		{"s_log_block_size", 1024 + 0x18, put32(7), true, nil, ErrCorrupt, "s_log_block_size 7, expected at most 6"},
		{"s_log_block_size huge", 1024 + 0x18, put32(1 << 31), true, nil, ErrCorrupt, "s_log_block_size"},
		{"s_blocks_count", 1024 + 4, put32(8193), true, nil, ErrCorrupt, "s_blocks_count 8193 blocks of 4096 bytes, and the device has 33554432 bytes"},
		{"s_blocks_count high", 1024 + 0x150, put32(1 << 31), true, nil, ErrCorrupt, "s_blocks_count"},
		{"s_inodes_count", 1024, put32(1 << 31), true, nil, ErrCorrupt, "s_inodes_count"},
		{"s_inodes_per_group", 1024 + 0x28, put32(0), true, nil, ErrCorrupt, "s_inodes_per_group"},
		{"s_blocks_per_group", 1024 + 0x20, put32(0), true, nil, ErrCorrupt, "s_clusters_per_group"},
		{"s_inode_size", 1024 + 0x58, put16(257), true, nil, ErrCorrupt, "s_inode_size"},
		{"s_desc_size", 1024 + 0xfe, put16(65), true, nil, ErrCorrupt, "s_desc_size"},
		{"s_first_data_block", 1024 + 0x14, put32(1), true, nil, ErrCorrupt, "s_first_data_block"},
		{"unknown feature", 1024 + 0x60, put32(uint32(g.sb.Incompat) | 1<<30), true, nil, ErrUnsupported, "incompat bit 30"},
		{"compression", 1024 + 0x60, put32(uint32(g.sb.Incompat) | 1), true, nil, ErrUnsupported, "not known: compression"},
		{"journal_dev", 1024 + 0x60, put32(uint32(IncompatJournalDev)), true, nil, ErrUnsupported, "journal of another file system"},
		{"clean journal", 1024 + 0x60, put32(uint32(g.sb.Incompat | IncompatRecover)), true, nil, nil, ""},
		{"bg_inode_table", 4096 + 8, put32(9000), true, resolve("dir"), ErrCorrupt, "bg_inode_table 9000"},
		{"inode number", firstName("dir"), put32(1 << 30), true, readDir("dir"), ErrCorrupt, "inode 1073741824 at offset"},
		{"rec_len 0", firstName("dir") + 4, put16(0), true, readDir("dir"), ErrCorrupt, "rec_len 0"},
		{"rec_len odd", firstName("dir") + 4, put16(13), true, readDir("dir"), ErrCorrupt, "rec_len 13"},
		{"rec_len long", firstName("dir") + 4, put16(4096), true, readDir("dir"), ErrCorrupt, "rec_len 4096"},
		{"name_len", firstName("dir") + 6, []byte{255}, true, readDir("dir"), ErrCorrupt, "name_len 255"},
		{"name", firstName("dir") + 8, []byte("/"), true, readDir("dir"), ErrCorrupt, `name "/`},
		{"directory loop", firstName("a/b/c"), put32(uint32(ino("a"))), true, resolve("a/b/c/file/b"), ErrCorrupt, "leads back to directory"},
		{"free inode", inodeAt("dir/file") + 0x1a, put16(0), true, read("dir/file"), ErrCorrupt, "not in use"},
		{"i_extra_isize", inodeAt("dir/file") + 0x80, put16(200), true, read("dir/file"), ErrCorrupt, "i_extra_isize 200"},
		{"i_size", inodeAt("dir/file") + 0x6c, put32(1 << 20), true, read("dir/file"), ErrCorrupt, "i_size"},
		{"i_size of directory", inodeAt("dir") + 4, put32(1 << 30), true, readDir("dir"), ErrCorrupt, "i_size"},
		{"directory with a hole", inodeAt("dir") + 4, put32(4096 * 3), true, readDir("dir"), ErrCorrupt, "has a hole of"},
		{"eh_magic", inodeAt("dir/file") + 0x28, put16(1), true, read("dir/file"), ErrCorrupt, "eh_magic 0x1"},
		{"eh_entries", inodeAt("dir/file") + 0x2a, put16(5), true, read("dir/file"), ErrCorrupt, "eh_entries 5"},
		{"eh_max", inodeAt("dir/file") + 0x2c, put16(5), true, read("dir/file"), ErrCorrupt, "eh_max 5"},
		{"eh_depth", inodeAt("dir/comb") + 0x2e, put16(6), true, read("dir/comb"), ErrCorrupt, "eh_depth 6, expected at most 5"},
		{"eh_depth of child", inodeAt("dir/comb") + 0x2e, put16(2), true, read("dir/comb"), ErrCorrupt, "eh_depth 0, expected 1"},
		{"ei_leaf", inodeAt("dir/comb") + 0x28 + 16, put32(9000), true, read("dir/comb"), ErrCorrupt, "ei_leaf 9000"},
		{"ei_block", inodeAt("dir/comb") + 0x28 + 24, put32(0), true, read("dir/comb"), ErrCorrupt, "ei_block 0 of entry 1"},
		{"ee_len", inodeAt("dir/file") + 0x28 + 16, put16(0), true, read("dir/file"), ErrCorrupt, "ee_len 0"},
		{"ee_start", inodeAt("dir/file") + 0x28 + 20, put32(8190), true, read("dir/file"), ErrCorrupt, "ee_start 8190"},
		{"ee_block order", index("dir/comb") + 24, put32(0), true, read("dir/comb"), ErrCorrupt, "ee_block 0 of entry 1"},
		{"symlink size", inodeAt("link") + 4, put32(0), true, resolve("link"), ErrCorrupt, "i_size 0, expected 1 to 4095"},
		{"symlink length", inodeAt("slow") + 4, put32(4096), true, resolve("slow"), ErrCorrupt, "i_size 4096, expected 1 to 4095"},
		{"symlink with NUL", inodeAt("link") + 0x28 + 2, []byte{0}, true, resolve("link"), ErrCorrupt, "has a NUL"},
		{"xattr magic", xattr.FileACL * 4096, put32(1), true, xattrs("xattr"), ErrCorrupt, "h_magic"},
		{"xattr size", xattr.FileACL*4096 + 32 + 8, put32(1 << 20), true, xattrs("xattr"), ErrCorrupt, "e_value_size 1048576"},
		{"xattr offset", xattr.FileACL*4096 + 32 + 2, put16(40), true, xattrs("xattr"), ErrCorrupt, "e_value_offs 40"},
		{"xattr offset end", xattr.FileACL*4096 + 32 + 2, put16(4000), true, xattrs("xattr"), ErrCorrupt, "e_value_offs 4000"},
		{"i_file_acl", inodeAt("xattr") + 0x68, put32(9000), true, xattrs("xattr"), ErrCorrupt, "block at block 9000"},
		{"xattr inode size", valueAt + 4, hugeSize, true, xattrs("value"), ErrCorrupt, "xattr inode of inode"},
		{"dx limit", blockAt("big", 0) + 32, put16(600), true, nil, nil, ""},
		{"41 symlinks", 0, nil, true, resolve("chain1"), ErrLoop, ""},
		{"40 symlinks", 0, nil, true, resolve("chain2"), nil, ""},
		{"symlink loop", 0, nil, true, resolve("loop/x"), ErrLoop, ""},
		{"encrypted file", inodeAt("dir/file") + 0x20, put32(extentsFl | encryptFl), true, read("dir/file"), ErrEncrypted, "encrypted"},
		{"encrypted directory", inodeAt("dir") + 0x20, put32(extentsFl | encryptFl), true, resolve("dir/file"), ErrEncrypted, "encrypted"},
		{"encrypted symlink", inodeAt("link") + 0x20, put32(encryptFl), true, resolve("link"), ErrEncrypted, "encrypted"},
		{"inline data without xattr", inodeAt("dir/file") + 0x20, put32(inlineDataFl), true, read("dir/file"), ErrCorrupt, "has no xattr system.data"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dev := good.Clone()
			if _, err := dev.WriteAt(c.put, c.off); err != nil {
				t.Fatal(err)
			}
			if c.fix {
				fixChecksums(dev)
			}
			f, err := Open(dev, nil)
			if err == nil {
				if c.use == nil && c.want != nil {
					t.Fatal("opened")
				}
				if c.use != nil {
					err = c.use(f)
				}
			}
			if !errors.Is(err, c.want) || err != nil && !strings.Contains(err.Error(), c.text) {
				t.Fatalf("%v, want %v: %q", err, c.want, c.text)
			}
			if e := (*FormatError)(nil); c.text != "" && !errors.As(err, &e) {
				t.Errorf("%v is no FormatError", err)
			}
			if f == nil {
				return
			}
			explore(t, f)
			// What does not depend on the damage is there.
			sound := 0
			for _, path := range []string{"dir/file", "dir/comb", "a/b/c/file", "xattr", "big/" + strings.Repeat("n", 50) + "7"} {
				if _, err := f.ReadFile(path); err == nil {
					sound++
				}
			}
			if sound < 2 && c.name != "descriptor" && c.name != "bg_inode_table" {
				t.Errorf("%d files can be read", sound)
			}
			if !c.fix {
				f, err := Open(dev, &OpenOptions{IgnoreChecksums: true})
				if err != nil {
					t.Fatal(err)
				}
				if _, err := f.ReadFile("dir/file"); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// TestDamagedIndex finds names in a directory whose index is damaged.
func TestDamagedIndex(t *testing.T) {
	dev := damageTree(t)
	f, err := Open(dev, nil)
	if err != nil {
		t.Fatal(err)
	}
	big, err := f.Resolve("big", true)
	if err != nil {
		t.Fatal(err)
	}
	n, err := f.Inode(big)
	if err != nil {
		t.Fatal(err)
	}
	root, block, err := f.dirBlockAt(n, 0)
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(b []byte){
		"hash version": func(b []byte) { b[dxRootInfoOff+4] = 6 },
		"entry":        func(b []byte) { binary.LittleEndian.PutUint32(b[dxRootEntries+12:], 1<<20) },
		"levels":       func(b []byte) { b[dxRootInfoOff+6] = 2 },
		"count":        func(b []byte) { binary.LittleEndian.PutUint16(b[dxRootEntries+2:], 0) },
		"limit":        func(b []byte) { binary.LittleEndian.PutUint16(b[dxRootEntries:], 600) },
		"leads to root": func(b []byte) {
			for i := range 8 {
				binary.LittleEndian.PutUint32(b[dxRootEntries+8*i+4:], 0)
			}
		},
	} {
		damaged := dev.Clone()
		b := slices.Clone(root)
		change(b)
		if _, err := damaged.WriteAt(b, block*4096); err != nil {
			t.Fatal(err)
		}
		fixChecksums(damaged)
		f, err := Open(damaged, &OpenOptions{IgnoreChecksums: name == "limit" || name == "count"})
		if err != nil {
			t.Fatal(err)
		}
		found, errs := 0, 0
		for i := range 500 {
			_, err := f.LookupIn(big, fmt.Sprintf("%s%d", strings.Repeat("n", 50), i))
			switch {
			case err == nil:
				found++
			case !errors.Is(err, fs.ErrNotExist):
				errs++
			}
		}
		if found+errs < 500 || found < 100 {
			t.Errorf("%s: %d names are found, %d are errors", name, found, errs)
		}
	}
}

// TestWalkLoops walks a tree in which directories have two names.
func TestWalkLoops(t *testing.T) {
	dev := damageTree(t)
	f, err := Open(dev, nil)
	if err != nil {
		t.Fatal(err)
	}
	a, err := f.Resolve("a", true)
	if err != nil {
		t.Fatal(err)
	}
	c, err := f.Inode(func() Ino { n, _ := f.Resolve("a/b/c", true); return n }())
	if err != nil {
		t.Fatal(err)
	}
	_, block, err := f.dirBlockAt(c, 0)
	if err != nil {
		t.Fatal(err)
	}
	// The entry "file" becomes a directory that is above it.
	b := binary.LittleEndian.AppendUint32(nil, uint32(a))
	dev.WriteAt(b, block*4096+24)
	dev.WriteAt([]byte{2}, block*4096+24+7)
	fixChecksums(dev)
	if f, err = Open(dev, nil); err != nil {
		t.Fatal(err)
	}
	files, failures := 0, 0
	for e, err := range f.Walk(RootIno) {
		if err == nil {
			files++
			continue
		}
		failures++
		if !errors.Is(err, ErrCorrupt) || e.Path != "a/b/c/file" {
			t.Errorf("%q: %v", e.Path, err)
		}
	}
	if failures != 1 || files < 500 {
		t.Errorf("%d files, %d errors", files, failures)
	}
}

// TestFeatureNames names features, known or not.
func TestFeatureNames(t *testing.T) {
	for _, c := range []struct {
		features fmt.Stringer
		want     string
	}{
		{CompatHasJournal | CompatOrphanFile, "has_journal,orphan_file"},
		{IncompatFiletype | IncompatCasefold | 1<<5, "filetype,incompat bit 5,casefold"},
		{ROCompatMetadataCsum | ROCompatGDTCsum | 1<<31, "uninit_bg,metadata_csum,ro_compat bit 31"},
	} {
		if got := c.features.String(); got != c.want {
			t.Errorf("%q, want %q", got, c.want)
		}
	}
}

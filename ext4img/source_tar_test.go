package ext4img

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// dump lists what a tree holds, a line for each name: hard links have the number
// of the first of them. Times are left out where they are 5.
func dump(t testing.TB, tree *Tree) []string {
	t.Helper()
	var out []string
	first := map[uint32]string{}
	var walk func(d uint32)
	line := func(path string, i uint32) {
		n := tree.inodes.at(i)
		s := fmt.Sprintf("%s %o %d:%d", path, n.mode, n.uid, n.gid)
		if n.sec != 5 || n.nsec != 0 {
			s += fmt.Sprintf(" t=%d.%09d", n.sec, n.nsec)
		}
		if f, ok := first[i]; ok {
			out = append(out, path+" = "+f)
			return
		}
		first[i] = path
		switch n.mode & modeType {
		case modeLink:
			s += " -> " + string(tree.target(n))
		case modeChar, modeBlock:
			s += fmt.Sprintf(" dev=%#x", n.rdev)
		case modeReg:
			s += fmt.Sprintf(" %d", n.size)
			for _, sp := range tree.dataSpans(i) {
				o, err := tree.openFile(i)
				if err != nil {
					t.Fatal(err)
				}
				b := make([]byte, sp.end-sp.off)
				if err := o.read(b, sp.off); err != nil {
					t.Fatal(err)
				}
				if err := o.check(); err != nil {
					t.Fatal(err)
				}
				o.close()
				s += fmt.Sprintf(" @%d:%.30q", sp.off, b)
			}
		}
		if n.xattr != 0 {
			for _, x := range tree.xattrs[n.xattr-1] {
				s += fmt.Sprintf(" %d.%s=%.40q", x.index, x.name, x.value)
			}
		}
		out = append(out, s)
	}
	walk = func(d uint32) {
		dr := tree.dirs.at(d)
		for e := dr.first; e < dr.first+dr.count; e++ {
			en := tree.entries.at(e)
			path := join(tree.dirPath(d), string(tree.name(en)))
			line(path, en.inode)
			if n := tree.inodes.at(en.inode); n.isDir() {
				walk(n.ref)
			}
		}
	}
	line(".", 0)
	walk(0)
	return out
}

// member is an entry of an archive that a test makes.
type member struct {
	typ  byte
	name string
	text string // content, or where a link leads
	mod  func(h *tar.Header)
}

// makeTar makes an archive.
func makeTar(t testing.TB, members ...member) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, m := range members {
		h := &tar.Header{Typeflag: m.typ, Name: m.name, Mode: 0o644, ModTime: time.Unix(5, 0), Format: tar.FormatPAX}
		switch m.typ {
		case tar.TypeDir:
			h.Mode = 0o755
		case tar.TypeReg:
			h.Size = int64(len(m.text))
		case tar.TypeXGlobalHeader:
			h = &tar.Header{Typeflag: m.typ, Name: m.name}
		default:
			h.Linkname = m.text
		}
		if m.mod != nil {
			m.mod(h)
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := io.WriteString(w, m.text); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	// archive/tar does not write these records as they are asked for.
	out := b.Bytes()
	for _, key := range []string{"uid", "mtime"} {
		out = bytes.ReplaceAll(out, []byte(" "+strings.ToUpper(key)+"="), []byte(" "+key+"="))
	}
	return bytes.ReplaceAll(out, []byte(" XXX.sparse"), []byte(" GNU.sparse"))
}

// rawTar is one entry as it lies in an archive.
func rawTar(magic string, typ byte, name, content string, change func(h []byte)) string {
	h := make([]byte, tarBlockLen)
	copy(h, name)
	copy(h[100:], "0000644\x000000000\x000000000\x00")
	copy(h[124:], fmt.Sprintf("%011o\x00%011o\x00", len(content), 5))
	h[156] = typ
	copy(h[257:], magic)
	if change != nil {
		change(h)
	}
	return string(patch(h, 0, func([]byte) {})) + content + strings.Repeat("\x00", (tarBlockLen-len(content)%tarBlockLen)%tarBlockLen)
}

const gnuMagic, posixMagic = "ustar  \x00", "ustar\x0000"

var tarEnd = strings.Repeat("\x00", 2*tarBlockLen)

func paxRecords(pairs ...string) string {
	var b strings.Builder
	for i := 0; i < len(pairs); i += 2 {
		rest := " " + pairs[i] + "=" + pairs[i+1] + "\n"
		n := len(rest) + 1
		for len(fmt.Sprint(n))+len(rest) != n {
			n = len(fmt.Sprint(n)) + len(rest)
		}
		fmt.Fprint(&b, n, rest)
	}
	return b.String()
}

// gnuSamples are archives in forms that archive/tar does not write: a file of
// 3000 bytes, "one" at 1000, "two!" at 2000.
var gnuSamples = map[string]func() string{
	"old": func() string {
		return rawTar(gnuMagic, 'S', "s", "onetwo!", func(h []byte) {
			copy(h[386:], "00000001750\x0000000000003\x00"+"00000003720\x0000000000004\x00"+"00000005670\x0000000000000\x00")
			copy(h[483:], "00000005670\x00")
		})
	},
	"old, extended": func() string {
		s := rawTar(gnuMagic, 'S', "s", "onetwo!", func(h []byte) {
			copy(h[386:], "00000001750\x0000000000003\x00")
			h[482] = 1
			copy(h[483:], "00000005670\x00")
		})
		ext := make([]byte, tarBlockLen)
		copy(ext, "00000003720\x0000000000004\x00")
		return s[:tarBlockLen] + string(ext) + s[tarBlockLen:]
	},
	"0.0": func() string {
		return rawTar(posixMagic, 'x', "x", paxRecords("GNU.sparse.size", "3000", "GNU.sparse.numblocks", "2", "GNU.sparse.offset", "1000", "GNU.sparse.numbytes", "3",
			"GNU.sparse.offset", "2000", "GNU.sparse.numbytes", "4"), nil) + rawTar(posixMagic, '0', "s", "onetwo!", nil)
	},
	"0.1": func() string {
		return rawTar(posixMagic, 'x', "x", paxRecords("GNU.sparse.name", "s", "GNU.sparse.size", "3000", "GNU.sparse.numblocks", "2", "GNU.sparse.map", "1000,3,2000,4"), nil) +
			rawTar(posixMagic, '0', "GNUSparseFile.1/s", "onetwo!", nil)
	},
	"1.0": func() string {
		m := "2\n1000\n3\n2000\n4\n"
		return rawTar(posixMagic, 'x', "x", paxRecords("GNU.sparse.major", "1", "GNU.sparse.minor", "0", "GNU.sparse.name", "s", "GNU.sparse.realsize", "3000"), nil) +
			rawTar(posixMagic, '0', "GNUSparseFile.1/s", m+strings.Repeat("\x00", tarBlockLen-len(m))+"onetwo!", nil)
	},
}

// signedSum gives a header the checksum of programs that took bytes as signed.
func signedSum(s string) string {
	h := []byte(s)
	copy(h[148:156], "        ")
	sum := 0
	for _, c := range h[:tarBlockLen] {
		sum += int(int8(c))
	}
	copy(h[148:156], fmt.Sprintf("%06o\x00 ", sum))
	return string(h)
}

// TestTarForms has the same file in every form of sparse files, and headers of
// every age.
func TestTarForms(t *testing.T) {
	for name, sample := range gnuSamples {
		tree := merge(t, nil, tarOf([]byte(sample()+tarEnd)))
		if got := dump(t, tree); len(got) != 2 || !strings.HasPrefix(got[1], "s 100644 0:0 3000 @0:") {
			t.Errorf("%s: %q", name, got)
			continue
		}
		o, err := tree.openFile(1)
		if err != nil {
			t.Fatal(err)
		}
		b, content := make([]byte, 3000), make([]byte, 3000)
		if err := o.read(b, 0); err != nil {
			t.Fatal(err)
		}
		copy(content[1000:], "one")
		copy(content[2000:], "two!")
		if !bytes.Equal(b, content) {
			t.Errorf("%s: %q", name, b)
		}
		if err := o.read(b[:5], 1998); err != nil || string(b[:5]) != "\x00\x00two" {
			t.Errorf("%s: %q, %v", name, b[:5], err)
		}
	}
	long := strings.Repeat("long/", 60) + "name"
	for name, c := range map[string]struct{ data, want string }{
		"v7":             {rawTar("", 0, "f", "x", nil), `f 100644 0:0 1 @0:"x"`},
		"v7 directory":   {rawTar("", 0, "d/", "", nil), "d 40644 0:0"},
		"contiguous":     {rawTar(posixMagic, '7', "f", "x", nil), `f 100644 0:0 1 @0:"x"`},
		"prefix":         {rawTar(posixMagic, '0', "f", "x", func(h []byte) { copy(h[345:], "a") }), "a 40755 0:0"},
		"no prefix":      {rawTar(gnuMagic, '0', "f", "x", func(h []byte) { copy(h[345:], "14000000000\x00") }), `f 100644 0:0 1 @0:"x"`},
		"star":           {rawTar(posixMagic, '0', "f", "x", func(h []byte) { copy(h[476:], "14000000000\x00"); copy(h[508:], "tar\x00") }), `f 100644 0:0 1 @0:"x"`},
		"star's prefix":  {rawTar(posixMagic, '0', "f", "x", func(h []byte) { copy(h[345:], strings.Repeat("p", 131)+"14000000000"); copy(h[508:], "tar\x00") }), strings.Repeat("p", 131) + " 40755"},
		"size of a link": {rawTar(posixMagic, '0', "f", "x", nil) + rawTar(posixMagic, '1', "l", "", func(h []byte) { copy(h[124:], "00000010000"); h[157] = 'f' }), `f 100644 0:0 1 @0:"x"`},
		"long name":      {rawTar(gnuMagic, 'L', "././@LongLink", long+"\x00", nil) + rawTar(gnuMagic, '0', "cut", "x", nil), "long 40755 0:0"},
		"long link":      {rawTar(gnuMagic, 'K', "././@LongLink", long+"\x00", nil) + rawTar(gnuMagic, '2', "l", "", nil), "l 120777 0:0 -> " + long},
		"volume":         {rawTar(gnuMagic, 'V', "label", "", nil) + rawTar(gnuMagic, '0', "f", "x", nil), `f 100644 0:0 1 @0:"x"`},
		"dump directory": {rawTar(gnuMagic, 'D', "d/", "Yfile\x00\x00", nil) + rawTar(gnuMagic, '0', "f", "x", nil), "d 40644 0:0"},
		"binary numbers": {rawTar(gnuMagic, '0', "f", "x", func(h []byte) {
			copy(h[108:], "\x80\x00\x00\x00\xee\x6b\x28\x00")
			copy(h[136:], "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe")
		}), `f 100644 4000000000:0 t=-2.000000000 1 @0:"x"`},
		"blanks":      {rawTar("", '0', "f", "x", func(h []byte) { copy(h[108:], "   12 \x00\x00     7 \x00") }), `f 100644 10:7 1 @0:"x"`},
		"signed sum":  {signedSum(rawTar("", '0', "\xe9\xe9", "x", nil)), "\xe9\xe9 100644"},
		"name of 100": {rawTar(posixMagic, '0', strings.Repeat("n", 100), "", nil), strings.Repeat("n", 100) + " 100644 0:0 0"},
	} {
		tree := merge(t, nil, tarOf([]byte(c.data+tarEnd)))
		if got := dump(t, tree); !strings.HasPrefix(got[1], c.want) {
			t.Errorf("%s: %q, want %q", name, got[1:], c.want)
		}
	}
}

func tarOf(b []byte) Source { return Tar(bytes.NewReader(b), int64(len(b))) }

func file(name, text string) member { return member{tar.TypeReg, name, text, nil} }
func folder(name string) member     { return member{tar.TypeDir, name, "", nil} }
func symlink(name, to string) member {
	return member{tar.TypeSymlink, name, to, nil}
}
func hardLink(name, to string) member { return member{tar.TypeLink, name, to, nil} }

func merge(t testing.TB, opts *ScanOptions, sources ...Source) *Tree {
	t.Helper()
	if opts == nil {
		opts = &ScanOptions{Warn: func(text string) { t.Error("warning:", text) }}
	}
	tree, err := Merge(t.Context(), sources, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tree.Close() })
	return tree
}

// TestTarOrder has entries in every order, and later ones replace earlier ones.
func TestTarOrder(t *testing.T) {
	for name, c := range map[string]struct {
		members []member
		want    []string
	}{
		"file before its directory": {
			[]member{file("a/b/f", "x"), {tar.TypeDir, "a/b/", "", func(h *tar.Header) { h.Uid, h.Mode = 7, 0o2750 }}},
			[]string{". 40755 0:0", "a 40755 0:0", "a/b 42750 7:0", `a/b/f 100644 0:0 1 @0:"x"`},
		},
		"root": {
			[]member{file("./f", "x"), {tar.TypeDir, "./", "", func(h *tar.Header) { h.Uid, h.Mode = 7, 0o1777 }}},
			[]string{". 41777 7:0", `f 100644 0:0 1 @0:"x"`},
		},
		"absolute and odd names": {
			[]member{file("/a//./f", "x"), file(".///g", "y")},
			[]string{". 40755 0:0", "a 40755 0:0", `a/f 100644 0:0 1 @0:"x"`, `g 100644 0:0 1 @0:"y"`},
		},
		"later entries replace": {
			[]member{file("f", "one"), hardLink("g", "f"), file("f", "two"), folder("d"), file("d/x", "x"), folder("d"), file("e", ""), folder("e"), symlink("f2", "x"), file("f2", "no link")},
			[]string{". 40755 0:0", "d 40755 0:0", `d/x 100644 0:0 1 @0:"x"`, "e 40755 0:0", `f 100644 0:0 3 @0:"two"`, `f2 100644 0:0 7 @0:"no link"`, `g 100644 0:0 3 @0:"one"`},
		},
		"a directory goes with what is in it": {
			[]member{file("d/x", "x"), file("d", "file"), folder("d"), file("d/y", "y")},
			[]string{". 40755 0:0", "d 40755 0:0", `d/y 100644 0:0 1 @0:"y"`},
		},
		"hard links before their target": {
			[]member{hardLink("a", "b"), hardLink("b", "d/c"), hardLink("z", "later"), file("z", "kept"), file("later", "l"), file("d/c", "x")},
			[]string{". 40755 0:0", `a 100644 0:0 1 @0:"x"`, "b = a", "d 40755 0:0", "d/c = a", `later 100644 0:0 1 @0:"l"`, `z 100644 0:0 4 @0:"kept"`},
		},
		"symlinks on the way": {
			[]member{symlink("lib", "usr/lib"), file("lib/x", "x"), symlink("abs", "/usr/../usr/lib"), file("abs/y", "y"), symlink("usr/up", "../../../.."),
				file("usr/up/top", "t"), hardLink("lib/z", "abs/y"), folder("usr/lib")},
			[]string{". 40755 0:0", "abs 120777 0:0 -> /usr/../usr/lib", "lib 120777 0:0 -> usr/lib", `top 100644 0:0 1 @0:"t"`, "usr 40755 0:0", "usr/lib 40755 0:0",
				`usr/lib/x 100644 0:0 1 @0:"x"`, `usr/lib/y 100644 0:0 1 @0:"y"`, "usr/lib/z = usr/lib/y", "usr/up 120777 0:0 -> ../../../.."},
		},
		"a directory in place of a symlink": {
			[]member{symlink("l", "d"), file("l/x", "x"), folder("l"), file("l/y", "y")},
			[]string{". 40755 0:0", "d 40755 0:0", `d/x 100644 0:0 1 @0:"x"`, "l 40755 0:0", `l/y 100644 0:0 1 @0:"y"`},
		},
		"a symlink to itself is replaced": {
			[]member{symlink("p", "."), file("p/x", "x"), folder("p/p"), file("p/z", "z"), symlink("q", "."), file("q/y", "y"), file("q/q", "q"), file("r", "")},
			[]string{". 40755 0:0", "p 40755 0:0", `p/z 100644 0:0 1 @0:"z"`, `q 100644 0:0 1 @0:"q"`, "r 100644 0:0 0", `x 100644 0:0 1 @0:"x"`, `y 100644 0:0 1 @0:"y"`},
		},
		"a symlink is linked": {
			[]member{symlink("l", "nowhere"), hardLink("m", "l")},
			[]string{". 40755 0:0", "l 120777 0:0 -> nowhere", "m = l"},
		},
		"global headers": {
			[]member{{tar.TypeXGlobalHeader, "", "", func(h *tar.Header) {
				h.PAXRecords = map[string]string{"uid": "4000000000", "comment": "c", "mtime": "9.5", "path": "no"}
			}}, file("f", ""), {tar.TypeReg, "g", "", func(h *tar.Header) { h.PAXRecords = map[string]string{"UID": "3", "MTIME": "-1.25"} }}},
			[]string{". 40755 0:0 t=9.500000000", "f 100644 4000000000:0 t=9.500000000 0", "g 100644 3:0 t=-2.750000000 0"},
		},
		"xattrs": {
			[]member{{tar.TypeReg, "f", "", func(h *tar.Header) {
				h.PAXRecords = map[string]string{"SCHILY.xattr.user.a": "1\x00\n=", "SCHILY.xattr.user.empty": "", "SCHILY.xattr.user.p%25%3D%41": "2", "LIBARCHIVE.xattr.user.b%3D": "AAEC", "LIBARCHIVE.xattr.user.a": "eA", "RHT.security.selinux": "ctx"}
			}}},
			[]string{". 40755 0:0", `f 100644 0:0 0 1.a="1\x00\n=" 1.b=="\x00\x01\x02" 1.empty="" 1.p%=%41="2" 6.selinux="ctx\x00"`},
		},
	} {
		t.Run(name, func(t *testing.T) {
			tree := merge(t, nil, tarOf(makeTar(t, c.members...)))
			if diff := cmp.Diff(c.want, dump(t, tree)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestTarACL has ACLs as text, as GNU tar and star write them, with names that
// the archive's own /etc/passwd and /etc/group know.
func TestTarACL(t *testing.T) {
	acl := func(name, access, def string) member {
		typ := byte(tar.TypeReg)
		if def != "" {
			typ = tar.TypeDir
		}
		return member{typ, name, "", func(h *tar.Header) {
			h.PAXRecords = map[string]string{}
			for k, v := range map[string]string{"SCHILY.acl.access": access, "SCHILY.acl.default": def} {
				if v != "" {
					h.PAXRecords[k] = v
				}
			}
		}}
	}
	var warnings []string
	tree := merge(t, &ScanOptions{Warn: func(s string) { warnings = append(warnings, s) }}, tarOf(makeTar(t,
		acl("a", "user::rw-\nuser:lisa:rwx\t#effective:r-x\ngroup::r--\nmask::r-x\nother::---\n", ""),
		acl("b", "user::rw-,user:nobody:r--:65534,group::r--,group:77:rw-,mask::rw-,other::r--", ""),
		acl("c", "user::rw-,group::r--,other::r--", ""),
		acl("d", "user::rwx,group::r-x,other::r-x", "user::rwx,group:wheel:rwx,group::r-x,mask::rwx,other::r-x"),
		acl("e", "user::rw-,user:stranger:rwx,group::r--,mask::r-x,other::---", ""),
		acl("f", "user::rw-,user:5:rwx,group::r--,other::---", ""),
		acl("g", "", "user::rwx,user:5:rwx,group::r-x,mask::rwx,other::r-x"), folder("g"),
		file("etc/passwd", "root:x:0:0::/:/bin/sh\nlisa:x:1001:100::/:/bin/sh\n"), file("etc/group", "wheel:x:10:\n"),
	)))
	got := map[string]string{}
	for _, name := range []string{"a", "b", "c", "d", "e", "f", "g"} {
		for d := range tree.dirs.at(0).count {
			e := tree.entries.at(d)
			if n := tree.inodes.at(e.inode); string(tree.name(e)) == name && n.xattr != 0 {
				for _, x := range tree.xattrs[n.xattr-1] {
					v, err := aclFromExt4(x.value)
					if err != nil {
						t.Fatal(err)
					}
					got[fmt.Sprint(name, x.index)] = v
				}
			}
		}
	}
	entry := func(list ...aclEntry) string { return encodeACL(list) }
	want := map[string]string{
		"a2": entry(aclEntry{aclUserObj, 6, 0}, aclEntry{aclUser, 7, 1001}, aclEntry{aclGroupObj, 4, 0}, aclEntry{aclMask, 5, 0}, aclEntry{aclOther, 0, 0}),
		"b2": entry(aclEntry{aclUserObj, 6, 0}, aclEntry{aclUser, 4, 65534}, aclEntry{aclGroupObj, 4, 0}, aclEntry{aclGroup, 6, 77}, aclEntry{aclMask, 6, 0}, aclEntry{aclOther, 4, 0}),
		"d3": entry(aclEntry{aclUserObj, 7, 0}, aclEntry{aclGroupObj, 5, 0}, aclEntry{aclGroup, 7, 10}, aclEntry{aclMask, 7, 0}, aclEntry{aclOther, 5, 0}),
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if len(warnings) != 2 || !strings.Contains(warnings[0], `e: the ACL is left out: ACL entry "user:stranger:rwx"`) || !strings.HasPrefix(warnings[1], "f: ") {
		t.Errorf("warnings %q", warnings)
	}
}

// patch changes a header and its checksum.
func patch(b []byte, off int, change func(h []byte)) []byte {
	b = bytes.Clone(b)
	h := b[off : off+tarBlockLen]
	change(h)
	copy(h[148:156], "        ")
	sum := 0
	for _, c := range h {
		sum += int(c)
	}
	copy(h[148:156], fmt.Sprintf("%06o\x00 ", sum))
	return b
}

// TestTarErrors has archives that lie, or try to get out of the tree. Errors
// name the entry and where it is.
func TestTarErrors(t *testing.T) {
	pax := func(records map[string]string) member {
		return member{tar.TypeReg, "f", "0123456789", func(h *tar.Header) { h.PAXRecords = records }}
	}
	two := makeTar(t, file("one", "1"), file("two", "2"))
	sparse := func(pairs, size string) []byte {
		return makeTar(t, pax(map[string]string{"XXX.sparse.map": pairs, "XXX.sparse.size": size}))
	}
	for name, c := range map[string]struct {
		data []byte
		text string
	}{
		"dotdot":        {makeTar(t, file("a", ""), file("b/../../x", "")), `tar entry 2 at offset 512 ("b/../../x"): an element of the path is ".."`},
		"dotdot link":   {makeTar(t, file("a", ""), hardLink("b", "../a")), `".."`},
		"missing link":  {makeTar(t, hardLink("b", "a"), file("c", "")), `tar entry 1 at offset 0 ("b"): hard link to "a": there is no such file`},
		"link loop":     {makeTar(t, hardLink("b", "a"), hardLink("a", "b")), "there is no such file"},
		"link to dir":   {makeTar(t, folder("d"), hardLink("b", "d")), "it is a directory"},
		"symlink loop":  {makeTar(t, symlink("a", "b"), symlink("b", "a"), file("a/x", "")), "over 40 symlinks"},
		"file on way":   {makeTar(t, file("a", ""), file("a/x", "")), `"a" on the way is not a directory`},
		"file as root":  {makeTar(t, symlink(".", "x")), "the root of the tree is a directory"},
		"truncated":     {two[:1100], `tar entry 2 at offset 1024`},
		"no end":        {two[:2048], "ends at offset 2048, behind entry 2"},
		"cut content":   {two[:512], "tar entry 1 at offset 0"},
		"checksum":      {append(bytes.Clone(two[:1024]), bytes.Repeat([]byte{7}, 1024)...), "tar entry 2 at offset 1024: not a tar header"},
		"type":          {patch(two, 1024, func(h []byte) { h[156] = 'Z' }), `tar entry 2 at offset 1024 ("two"): type 'Z' is not known`},
		"multi-volume":  {patch(two, 1024, func(h []byte) { h[156] = 'M' }), "volume"},
		"size":          {patch(two, 1024, func(h []byte) { copy(h[124:136], "77777777777\x00") }), "8589934591 bytes from offset 1536 on: the archive ends at offset"},
		"huge size":     {patch(two, 1024, func(h []byte) { copy(h[124:136], "\x80\x00\x00\x00\x7f\xff\xff\xff\xff\xff\xff\xff") }), "9223372036854775807 bytes"},
		"negative size": {patch(two, 1024, func(h []byte) { copy(h[124:136], bytes.Repeat([]byte{0xff}, 12)) }), "size: below 0"},
		"number":        {patch(two, 1024, func(h []byte) { copy(h[108:116], "12x4567\x00") }), `uid: "12x4567" is not an octal number`},
		"uid":           {makeTar(t, pax(map[string]string{"UID": "4294967296"})), "uid 4294967296"},
		"device": {makeTar(t, member{tar.TypeChar, "c", "", func(h *tar.Header) { h.Devmajor = 4096 }}),
			"the device number does not fit"},
		"long name":     {makeTar(t, file(strings.Repeat("n", 256), "")), "256 bytes"},
		"long path":     {makeTar(t, file(strings.Repeat("n/", 40000)+"n", "")), "a path of 80001 bytes"},
		"empty symlink": {patch(makeTar(t, symlink("l", "x")), 0, func(h []byte) { h[157] = 0 }), "a symlink to nothing"},
		"long symlink":  {makeTar(t, symlink("l", strings.Repeat("x", 4096))), "a symlink of 4096 bytes"},
		"xattr name":    {makeTar(t, pax(map[string]string{"SCHILY.xattr.user.": "x"})), "the name of an xattr"},
		"xattr value":   {makeTar(t, pax(map[string]string{"SCHILY.xattr.user.x": strings.Repeat("x", 65537)})), "65537 bytes"},
		"mtime":         {makeTar(t, pax(map[string]string{"MTIME": "12z"})), `"12z" is not a time`},
		"sparse":        {sparse("0,5,3,5", "10"), "5 bytes at 3: expected them from 5 on"},
		"sparse end":    {sparse("0,5,8,5", "10"), "5 bytes at 8"},
		"sparse odd":    {sparse("0,5,8", "10"), "no pairs"},
		"sparse sum":    {sparse("0,5", "10"), "10 bytes of a sparse file are stored, and its map has 5"},
		"sparse minus":  {sparse("-1,10", "10"), "below 0"},
		"sparse far":    {sparse("9223372036854775800,10", "10"), "expected them from 0 on"},
		"lost+found":    {makeTar(t, file("lost+found", "")), "lost+found"},
	} {
		t.Run(name, func(t *testing.T) {
			tree, err := Merge(t.Context(), []Source{tarOf(c.data)}, nil)
			if err == nil {
				t.Fatalf("no error: %q", dump(t, tree))
			}
			if !strings.Contains(err.Error(), c.text) {
				t.Errorf("%v: want %q", err, c.text)
			}
			se := (*SourceError)(nil)
			if name != "lost+found" && !errors.As(err, &se) {
				t.Errorf("%v is no SourceError", err)
			}
		})
	}
}

// TestTarCaps has archives that make more than is allowed.
func TestTarCaps(t *testing.T) {
	var many []member
	for i := range 100 {
		many = append(many, file(fmt.Sprint(i), ""))
	}
	for name, data := range map[string][]byte{
		"entries":     makeTar(t, many...),
		"directories": makeTar(t, file(strings.Repeat("d/", 100)+"f", "")),
		"xattrs": makeTar(t, member{tar.TypeReg, "f", "", func(h *tar.Header) {
			h.PAXRecords = map[string]string{"SCHILY.xattr.user.x": strings.Repeat("x", 60000)}
		}}),
	} {
		if _, err := Merge(t.Context(), []Source{tarOf(data)}, &ScanOptions{MaxEntries: 99}); !errors.Is(err, ErrTooManyEntries) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := Merge(t.Context(), []Source{tarOf(data)}, &ScanOptions{MaxEntries: 300}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A path that symlinks make long, walked again and again.
	members := []member{folder("d"), symlink("d/l", strings.Repeat("../d/", 800)), symlink("d/m", strings.Repeat("l/", 30))}
	for i := range 1000 {
		members = append(members, file(fmt.Sprintf("d/m/%d/x", i%2), ""))
	}
	if _, err := Merge(t.Context(), []Source{tarOf(makeTar(t, members...))}, &ScanOptions{MaxEntries: 10000}); !errors.Is(err, ErrTooManyEntries) {
		t.Errorf("long walks: %v", err)
	}
}

// TestTarExclude leaves out what the patterns say, but not the content of a file
// that has another name.
func TestTarExclude(t *testing.T) {
	data := makeTar(t, file("keep/a.o", "object"), hardLink("b", "keep/a.o"), file("keep/c", "c"), file("drop/x/y", ""), folder("drop"))
	tree := merge(t, &ScanOptions{Exclude: []string{"*.o", "/drop"}, Owner: &Owner{1, 2}, ModeMask: 0o700}, tarOf(data))
	want := []string{". 40700 1:2", `b 100600 1:2 6 @0:"object"`, "keep 40700 1:2", `keep/c 100600 1:2 1 @0:"c"`}
	if diff := cmp.Diff(want, dump(t, tree)); diff != "" {
		t.Error(diff)
	}
}

// TestLayers applies whiteouts, which are about lower layers alone.
func TestLayers(t *testing.T) {
	base := []member{folder("a"), file("a/1", "1"), file("a/2", "2"), file("b/c/d", "d"), file("b/e", "e"), symlink("s", "a"), file("top", "t")}
	for name, c := range map[string]struct {
		layer []member
		want  string
	}{
		"file":                  {[]member{file("a/.wh.1", "")}, "a a/2 b b/c b/c/d b/e s top"},
		"directory":             {[]member{file(".wh.b", "")}, "a a/1 a/2 s top"},
		"symlink":               {[]member{file(".wh.s", ""), file(".wh.nothing", "")}, "a a/1 a/2 b b/c b/c/d b/e top"},
		"replaced before":       {[]member{file("a/1", "new"), file("a/.wh.1", "")}, "a a/1 a/2 b b/c b/c/d b/e s top"},
		"replaced behind":       {[]member{file("a/.wh.1", ""), file("a/1", "new")}, "a a/1 a/2 b b/c b/c/d b/e s top"},
		"directory made again":  {[]member{file("b/new", ""), file(".wh.b", "")}, "a a/1 a/2 b b/new s top"},
		"opaque":                {[]member{file("b/.wh..wh..opq", "")}, "a a/1 a/2 b s top"},
		"opaque and new":        {[]member{file("b/new", ""), file("b/.wh..wh..opq", ""), file("b/c/x", "")}, "a a/1 a/2 b b/c b/c/x b/new s top"},
		"opaque below":          {[]member{file("b/c/x", ""), file("b/.wh..wh..opq", "")}, "a a/1 a/2 b b/c b/c/x s top"},
		"opaque root":           {[]member{file(".wh..wh..opq", ""), file("n", "")}, "n"},
		"aufs":                  {[]member{file(".wh..wh.plnk", ""), file(".wh..wh.aufs", "")}, "a a/1 a/2 b b/c b/c/d b/e s top"},
		"link to lower":         {[]member{hardLink("l", "a/1"), file("a/.wh.1", "")}, "a a/2 b b/c b/c/d b/e l s top"},
		"link into a whiteout":  {[]member{hardLink("l", "b/c/d"), file(".wh.b", "")}, "a a/1 a/2 l s top"},
		"through a symlink":     {[]member{file("s/.wh.1", "")}, "a a/2 b b/c b/c/d b/e s top"},
		"directory for a file":  {[]member{folder("top"), file("top/x", "")}, "a a/1 a/2 b b/c b/c/d b/e s top top/x"},
		"file for a directory":  {[]member{file("b", "")}, "a a/1 a/2 b s top"},
		"whiteout not in a tar": {nil, ""},
	} {
		t.Run(name, func(t *testing.T) {
			lower := makeTar(t, base...)
			b := makeTar(t, c.layer...)
			names := func(tree *Tree) string {
				var names []string
				for _, line := range dump(t, tree)[1:] {
					path, _, _ := strings.Cut(line, " ")
					names = append(names, path)
				}
				return strings.Join(names, " ")
			}
			if c.layer == nil {
				tree := merge(t, nil, tarOf(makeTar(t, file(".wh.x", ""))))
				if got := names(tree); got != ".wh.x" {
					t.Error(got)
				}
				return
			}
			tree := merge(t, nil, Layer(bytes.NewReader(lower), int64(len(lower))), Layer(bytes.NewReader(b), int64(len(b))))
			if got := names(tree); got != c.want {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
		})
	}
	for _, bad := range []string{".wh.", ".wh..", ".wh...", "a/.wh.b/c"} {
		b := makeTar(t, file(bad, ""))
		if _, err := Merge(t.Context(), []Source{Layer(bytes.NewReader(b), int64(len(b)))}, nil); err == nil {
			t.Errorf("%s is accepted", bad)
		}
	}
}

// TestMerge lays sources of every kind one over another.
func TestMerge(t *testing.T) {
	dir := fakeRoot()
	dir.stat.uid = 9
	dir.stat.sec = 5
	put := func(path string, n *fakeEntry) { dir.put(path, n).stat.sec = 5; dir.children["d"].stat.sec = 5 }
	reg := func() *fakeEntry {
		e := fakeReg(0)
		e.stat.nsec = 0
		return e
	}
	put("d/both", reg())
	put("d/dir", reg())
	put("d/link", &fakeEntry{stat: stat{mode: modeLink | 0o777, links: 1}, target: "x"})
	base := makeTar(t, file("d/base", "b"), file("d/both", "old"), file("d/dir/x", ""), file("d/link/x", ""), file("h", "hard"))
	over := makeTar(t, hardLink("d/h2", "h"), file("h", "new"), member{tar.TypeDir, "d", "", func(h *tar.Header) { h.Gid = 3 }})
	tree := merge(t, nil, tarOf(base), opened{fakeDir{dir, 1}}, tarOf(over))
	want := []string{
		". 40755 9:0", "d 40755 0:3", `d/base 100644 0:0 1 @0:"b"`, "d/both 100644 0:0 0", "d/dir 100644 0:0 0", `d/h2 100644 0:0 4 @0:"hard"`,
		"d/link 120777 0:0 -> x", `h 100644 0:0 3 @0:"new"`,
	}
	if diff := cmp.Diff(want, dump(t, tree)); diff != "" {
		t.Error(diff)
	}
}

// TestIDMaps gives owners and ACLs other ids, and refuses those in no map.
func TestIDMaps(t *testing.T) {
	owned := func(uid, gid int) member {
		return member{tar.TypeReg, "f", "", func(h *tar.Header) { h.Uid, h.Gid = uid, gid }}
	}
	maps := &ScanOptions{UIDMap: []IDMap{{0, 100000, 1000}, {5000, 0, 1}}, GIDMap: []IDMap{{0, 200000, 65536}}}
	for _, c := range []struct {
		uid, gid int
		want     string
	}{{0, 7, "100000:200007"}, {999, 65535, "100999:265535"}, {5000, 0, "0:200000"}, {1000, 0, "the uid 1000 is in no id map"}, {0, 65536, "the gid 65536"}} {
		tree, err := Merge(t.Context(), []Source{tarOf(makeTar(t, owned(c.uid, c.gid)))}, maps)
		got := fmt.Sprint(err)
		if err == nil {
			got = strings.Fields(dump(t, tree)[1])[2]
		}
		if !strings.Contains(got, c.want) {
			t.Errorf("%d:%d: %s, want %s", c.uid, c.gid, got, c.want)
		}
	}
	acl := member{tar.TypeReg, "f", "", func(h *tar.Header) {
		h.PAXRecords = map[string]string{"SCHILY.acl.access": "user::rw-,user:7:r--,group::r--,group:9:r--,mask::r--,other::---"}
	}}
	tree := merge(t, maps, tarOf(makeTar(t, acl)))
	got, err := aclFromExt4(tree.xattrs[0][0].value)
	if want := encodeACL([]aclEntry{{aclUserObj, 6, 0}, {aclUser, 4, 100007}, {aclGroupObj, 4, 0}, {aclGroup, 4, 200009}, {aclMask, 4, 0}, {aclOther, 0, 0}}); err != nil || got != want {
		t.Errorf("ACL: %q, %v, want %q", got, err, want)
	}
	for _, bad := range [][]IDMap{{{0, 0, 0}}, {{1 << 31, 0, 1 << 31}}, {{0, 0, 10}, {9, 100, 1}}} {
		if _, err := Merge(t.Context(), []Source{tarOf(makeTar(t, owned(0, 0)))}, &ScanOptions{UIDMap: bad}); err == nil {
			t.Errorf("%v is accepted", bad)
		}
	}
}

// changing is an archive in a file that tells when it was changed.
type changing struct {
	*bytes.Reader
	info tar.Header
}

func (c *changing) Stat() (fs.FileInfo, error) {
	now := c.info
	return now.FileInfo(), nil
}

// TestTarChanged notices an archive that is written to.
func TestTarChanged(t *testing.T) {
	data := makeTar(t, file("f", strings.Repeat("x", 5000)))
	r := &changing{bytes.NewReader(data), tar.Header{Name: "x", ModTime: time.Unix(1, 0)}}
	tree := merge(t, nil, Tar(r, int64(len(data))))
	l, err := NewLayout(t.Context(), tree, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Write(t.Context(), discard{}, nil); err != nil {
		t.Error(err)
	}
	r.info.ModTime = time.Unix(2, 0)
	if err := l.Write(t.Context(), discard{}, nil); !errors.Is(err, ErrChanged) {
		t.Errorf("a changed archive: %v", err)
	}
}

// FuzzTar reads archives of any bytes, alone and over another one.
func FuzzTar(f *testing.F) {
	for _, members := range [][]member{
		{file("a/b", "x"), hardLink("c", "a/b"), symlink("d", "a"), file("d/e", "y"), folder("a")},
		{hardLink("x", "y"), file("y", ""), file(".wh.base", ""), file("dir/.wh..wh..opq", "")},
	} {
		f.Add(makeTar(f, members...))
	}
	for _, name := range slices.Sorted(maps.Keys(gnuSamples)) {
		f.Add([]byte(gnuSamples[name]() + tarEnd))
	}
	base := makeTar(f, file("base", "b"), file("dir/f", "f"), symlink("l", "dir"))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, sources := range [][]Source{
			{tarOf(data)}, {tarOf(base), Layer(bytes.NewReader(data), int64(len(data)))},
		} {
			tree, err := Merge(context.Background(), sources, &ScanOptions{MaxEntries: 10000})
			if err != nil {
				continue
			}
			l, err := NewLayout(context.Background(), tree, &LayoutOptions{Minimize: true})
			if err == nil && l.Size() < 64<<20 {
				if err := l.Write(context.Background(), discard{}, nil); err != nil {
					t.Error(err)
				}
			}
			tree.Close()
		}
	})
}

package ext4img

import (
	"bufio"
	"cmp"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"path/filepath"
	"strconv"
	"strings"
)

// Manifest is a list of changes to what the sources before it hold, in the format
// of mtree(5): a line tells a path and keywords, "/set" and "/unset" keywords of
// the lines that follow. A path with a slash counts from the root; one without
// lies in the last directory that was named so, which ".." leaves.
//
//	type=       dir, file, link, char, block, fifo, socket
//	mode=       octal
//	uid= gid=   numbers; uname= and gname= count only if they are numbers, too
//	time=       SECONDS.NANOSECONDS since 1970
//	device=     linux,MAJOR,MINOR
//	link=       where a symlink leads
//	contents=   a file, relative to dir: what the file holds
//	xattr.NAME= an xattr, in base64
//	optional    there is nothing to do if the path is not there
//
// What is there already is changed in what the keywords tell, or replaced if it
// is of another type or has other contents. What is not there is made, with the
// directories on the way; it belongs to root, has mode 755 (directories) or 644,
// and the time of its contents or 0. An empty file has size=0. Other keywords of
// mtree(5), as checksums, are not looked at. ScanOptions change nothing of what a
// manifest tells.
//
// Errors name the line, as one of the file name.
func Manifest(r io.Reader, name, dir string) Source { return &mtreeSource{r, name, dir} }

type mtreeSource struct {
	r         io.Reader
	name, dir string
}

// maxMtreeLine bounds lines, with those that go on; xattrs are the longest.
const maxMtreeLine = 1 << 20

// mtreeScan lays a manifest into a tree.
type mtreeScan struct {
	*builder
	c        *fileContent
	dir      string // of contents
	defaults map[string]string
	cwd      string // clean path
}

func (s *mtreeSource) lay(b *builder) error {
	scan := &mtreeScan{builder: b, c: &fileContent{}, dir: s.dir, defaults: make(map[string]string)}
	b.addContent(scan.c)
	lines := bufio.NewScanner(s.r)
	lines.Buffer(nil, maxMtreeLine)
	number, first := 0, 0
	var long strings.Builder
	for lines.Scan() {
		number++
		if long.Len() == 0 {
			first = number
		}
		line := strings.TrimRight(lines.Text(), " \t\r")
		if rest, ok := strings.CutSuffix(line, "\\"); ok && !strings.HasSuffix(rest, "\\") {
			long.WriteString(rest + " ")
			if long.Len() > maxMtreeLine {
				return fmt.Errorf("%s:%d: over %d bytes in one line", s.name, first, maxMtreeLine)
			}
			continue
		}
		long.WriteString(line)
		if err := scan.line(long.String()); err != nil {
			return fmt.Errorf("%s:%d: %w", s.name, first, err)
		}
		long.Reset()
		if err := b.ctx.Err(); err != nil {
			return err
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("%s:%d: %w", s.name, number+1, err)
	}
	if long.Len() > 0 {
		return fmt.Errorf("%s:%d: the last line goes on", s.name, first)
	}
	return nil
}

// mtreeKeywords are the keywords, and whether they mean something here.
var mtreeKeywords = map[string]bool{
	"contents": true, "device": true, "gid": true, "gname": true, "link": true, "mode": true, "optional": true,
	"size": true, "time": true, "type": true, "uid": true, "uname": true,

	"cksum": false, "flags": false, "ignore": false, "inode": false, "md5": false, "md5digest": false, "nlink": false,
	"nochange": false, "resdevice": false, "ripemd160digest": false, "rmd160": false, "rmd160digest": false,
	"sha1": false, "sha1digest": false, "sha256": false, "sha256digest": false, "sha384": false, "sha384digest": false,
	"sha512": false, "sha512digest": false, "tags": false,
}

func (s *mtreeScan) line(line string) error {
	words := strings.Fields(line)
	if len(words) == 0 || strings.HasPrefix(words[0], "#") {
		return nil
	}
	switch words[0] {
	case "/set":
		return setKeywords(s.defaults, words[1:])
	case "/unset":
		for _, w := range words[1:] {
			if w == "all" {
				clear(s.defaults)
			}
			delete(s.defaults, w)
		}
		return nil
	case "..":
		if len(words) > 1 {
			return errors.New("keywords behind \"..\"")
		}
		if s.cwd == "" {
			return errors.New("\"..\" leads out of the root")
		}
		s.cwd = strings.TrimPrefix(path.Dir("/"+s.cwd), "/")
		return nil
	}
	name, err := unvis(words[0])
	if err != nil {
		return err
	}
	full := name
	if !strings.Contains(name, "/") {
		full = path.Join(s.cwd, name)
	}
	if full, err = cleanPath(full); err != nil {
		return err
	}
	keys := make(map[string]string, len(s.defaults)+len(words))
	for k, v := range s.defaults {
		keys[k] = v
	}
	if err := setKeywords(keys, words[1:]); err != nil {
		return err
	}
	if err := s.entry(full, keys); err != nil {
		return fmt.Errorf("%s: %w", cmp.Or(full, "."), err)
	}
	if !strings.Contains(name, "/") && keys["type"] == "dir" {
		s.cwd = full
	}
	return nil
}

func setKeywords(keys map[string]string, words []string) error {
	for _, w := range words {
		k, v, ok := strings.Cut(w, "=")
		matters, known := mtreeKeywords[k]
		switch {
		case strings.HasPrefix(k, "xattr."):
			matters = true
		case !known:
			return fmt.Errorf("the keyword %q is not known", k)
		}
		if matters {
			if !ok && k != "optional" {
				return fmt.Errorf("%s without a value", k)
			}
			keys[k] = v
		}
	}
	return nil
}

var mtreeTypes = map[string]uint16{
	"block": modeBlock, "char": modeChar, "dir": modeDir, "fifo": modeFifo, "file": modeReg, "link": modeLink, "socket": modeSocket,
}

// entry makes or changes what has a path.
func (s *mtreeScan) entry(full string, keys map[string]string) error {
	if err := s.charge(1); err != nil {
		return err
	}
	typ := keys["type"]
	mode, ok := mtreeTypes[typ]
	if typ != "" && !ok {
		return fmt.Errorf("the type %q is not known", typ)
	}
	_, optional := keys["optional"]
	_, contents := keys["contents"]
	if full == "" {
		if typ != "" && typ != "dir" || contents {
			return errors.New("the root is a directory")
		}
		return s.change(0, keys)
	}
	mkdir := func() (inode, error) { return inode{mode: modeDir | 0o755}, nil }
	if optional {
		mkdir = nil
	}
	dir, name, err := s.walk(full, mkdir)
	if err != nil {
		if optional && err == fs.ErrNotExist {
			return nil
		}
		return err
	}
	var old *inode
	i := s.lookup(dir, name)
	if i != none {
		old = s.tree.inodes.at(i)
	}
	if old != nil && !contents && (typ == "" || old.mode&modeType == mode) {
		if typ == "link" && keys["link"] != "" {
			target, err := unvis(keys["link"])
			if err == nil {
				err = s.setTarget(old, target)
			}
			if err != nil {
				return err
			}
		}
		return s.change(i, keys)
	}
	if old == nil && optional {
		return nil
	}
	if contents && typ == "" {
		typ, mode = "file", modeReg
	}
	n := inode{mode: mode | 0o644}
	var spans []span
	switch {
	case typ == "":
		return errors.New("there is no such path in the sources, and no type= to make it")
	case contents && typ != "file":
		return fmt.Errorf("contents= of a %s", typ)
	}
	switch typ {
	case "dir":
		n.mode = modeDir | 0o755
	case "link":
		n.mode = modeLink | 0o777
		target, err := unvis(keys["link"])
		if err == nil {
			err = s.setTarget(&n, target)
		}
		if err != nil {
			return err
		}
	case "file":
		switch {
		case contents:
			if spans, err = s.contents(&n, keys["contents"]); err != nil {
				return err
			}
		case keys["size"] != "0":
			return errors.New("a new file needs contents=, or size=0")
		}
	case "char", "block":
		if keys["device"] == "" {
			return errors.New("a device without device=")
		}
	}
	place, err := s.slot(dir, name)
	if err != nil {
		return err
	}
	i = s.put(place, n)
	if spans != nil {
		s.tree.spans[i] = spans
	}
	return s.change(i, keys)
}

// change gives an inode what the keywords tell.
func (s *mtreeScan) change(i uint32, keys map[string]string) error {
	n := s.tree.inodes.at(i)
	number := func(key string, base, bits int) (uint64, bool, error) {
		v, ok := keys[key]
		if !ok {
			return 0, false, nil
		}
		x, err := strconv.ParseUint(v, base, bits)
		if err != nil {
			err = fmt.Errorf("%s=%s is no number of the kind", key, v)
		}
		return x, err == nil, err
	}
	mode, ok, err := number("mode", 8, 12)
	if err != nil {
		return err
	}
	if ok && !n.isSymlink() {
		n.mode = n.mode&modeType | uint16(mode)
	}
	for _, id := range [...]struct {
		key, name string
		to        *uint32
	}{{"uid", "uname", &n.uid}, {"gid", "gname", &n.gid}} {
		v, ok, err := number(id.key, 10, 32)
		if err != nil {
			return err
		}
		if !ok && keys[id.name] != "" {
			if v, err = strconv.ParseUint(keys[id.name], 10, 32); err != nil {
				return fmt.Errorf("%s=%s: names have no number here; use %s=", id.name, keys[id.name], id.key)
			}
			ok = true
		}
		if ok {
			*id.to = uint32(v)
		}
	}
	if v, ok := keys["time"]; ok {
		sec, nsec, _ := strings.Cut(v, ".")
		a, err1 := strconv.ParseInt(sec, 10, 64)
		b, err2 := strconv.ParseUint(nsec, 10, 32)
		if nsec == "" {
			b, err2 = 0, nil
		}
		if err1 != nil || err2 != nil || b > 999999999 {
			return fmt.Errorf("time=%s: expected SECONDS.NANOSECONDS", v)
		}
		n.sec, n.nsec = a, uint32(b)
		s.checkTime("time="+v, n)
	}
	if v, ok := keys["device"]; ok && (n.mode&modeType == modeChar || n.mode&modeType == modeBlock) {
		f := strings.Split(v, ",")
		if len(f) == 3 { // its first tells a system; the numbers are those of Linux
			f = f[1:]
		}
		if len(f) != 2 {
			return fmt.Errorf("device=%s: expected linux,MAJOR,MINOR", v)
		}
		major, err1 := strconv.ParseUint(f[0], 0, 32)
		minor, err2 := strconv.ParseUint(f[1], 0, 32)
		if err1 != nil || err2 != nil {
			return fmt.Errorf("device=%s: expected linux,MAJOR,MINOR", v)
		}
		var ok bool
		if n.rdev, ok = newEncodeDev(uint32(major), uint32(minor)); !ok {
			return errDevice
		}
	}
	return s.changeXattrs(n, keys)
}

func (s *mtreeScan) changeXattrs(n *inode, keys map[string]string) error {
	var set xattrSet
	if n.xattr != 0 {
		set = append(set, s.tree.xattrs[n.xattr-1]...)
	}
	changed := false
	for k, v := range keys {
		name, ok := strings.CutPrefix(k, "xattr.")
		if !ok {
			continue
		}
		name, err := unvis(name)
		if err != nil {
			return err
		}
		b, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(v, "="))
		if err != nil {
			return fmt.Errorf("xattr.%s: %w", name, err)
		}
		index, short, ok := splitXattr(name)
		if !ok {
			return fmt.Errorf("xattr.%s: ext4 has no such namespace", name)
		}
		value := string(b)
		if index == xattrACLAccess || index == xattrACLDefault {
			if value, err = aclToExt4(value, 0o7777, &ScanOptions{}); err != nil {
				return fmt.Errorf("xattr.%s: %w", name, err)
			}
		}
		if set, err = set.with(index, short, value); err != nil {
			return err
		}
		changed = true
	}
	if changed {
		n.xattr = 0
		s.setXattrs(n, set)
	}
	return nil
}

// contents makes an inode one of a file of the host.
func (s *mtreeScan) contents(n *inode, value string) ([]span, error) {
	name, err := unvis(value)
	if err != nil {
		return nil, err
	}
	if !filepath.IsAbs(name) {
		name = filepath.Join(s.dir, name)
	}
	if name, err = filepath.EvalSymlinks(name); err != nil {
		return nil, err
	}
	dir, err := openSourceDir(filepath.Dir(name))
	if err != nil {
		return nil, err
	}
	defer dir.close()
	st, err := dir.lstat(filepath.Base(name))
	if err != nil {
		return nil, pathError("stat", name, err)
	}
	if st.mode&modeType != modeReg {
		return nil, pathError("read", name, errors.New("not a regular file"))
	}
	s.c.paths = append(s.c.paths, name)
	n.ref, n.id = uint32(len(s.c.paths)-1), st.id()
	n.size, n.sec, n.nsec = st.size, st.sec, st.nsec
	f, err := dir.open(filepath.Base(name))
	if err != nil {
		return nil, pathError("open", name, err)
	}
	defer f.close()
	if !st.sparse || st.size == 0 {
		return nil, nil
	}
	data, err := f.spans(st.size)
	if err != nil {
		return nil, pathError("read", name, err)
	}
	return s.findData(f, st.size, data)
}

// fileContent opens files of the host. A file's ref is an index of its paths.
type fileContent struct{ paths []string }

func (c *fileContent) open(n *inode) (sourceFile, error) {
	name := c.paths[n.ref]
	dir, err := openSourceDir(filepath.Dir(name))
	if err != nil {
		return nil, err
	}
	defer dir.close()
	return dir.open(filepath.Base(name))
}

func (c *fileContent) close() error { return nil }

// unvis decodes a word as vis(3) encodes it.
func unvis(s string) (string, error) {
	if !strings.Contains(s, "\\") {
		return s, nil
	}
	var b []byte
	for i := 0; i < len(s); i++ {
		if s[i] != '\\' {
			b = append(b, s[i])
			continue
		}
		rest := s[i+1:]
		isOctal := func(k int) bool { return k < len(rest) && rest[k] >= '0' && rest[k] <= '7' }
		letter := -1
		if rest != "" {
			letter = strings.IndexByte(visLetters, rest[0])
		}
		switch {
		case isOctal(0) && isOctal(1) && isOctal(2):
			v, err := strconv.ParseUint(rest[:3], 8, 8)
			if err != nil {
				return "", fmt.Errorf("%q: \\%s is no byte", s, rest[:3])
			}
			b = append(b, byte(v))
			i += 3
		case letter >= 0:
			b = append(b, visBytes[letter])
			i++
		case len(rest) >= 2 && rest[0] == '^':
			b = append(b, control(rest[1]))
			i += 2
		case len(rest) >= 3 && rest[:2] == "M-":
			b = append(b, rest[2]|0x80)
			i += 3
		case len(rest) >= 3 && rest[:2] == "M^":
			b = append(b, control(rest[2])|0x80)
			i += 3
		default:
			return "", fmt.Errorf("%q: a backslash without a meaning; it is written as \\\\ or \\134", s)
		}
	}
	return string(b), nil
}

// What a backslash and a letter stand for.
const (
	visLetters = "\\#sntrabfvE0"
	visBytes   = "\\# \n\t\r\a\b\f\v\x1b\x00"
)

func control(c byte) byte {
	if c == '?' {
		return 0x7f
	}
	return c & 0x1f
}

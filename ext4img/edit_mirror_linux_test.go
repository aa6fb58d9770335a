package ext4img

import (
	"bytes"
	"cmp"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"qimg/qcow2/blockdev/oracle"
)

var editSeed = flag.Uint64("edit.seed", 9, "of the random edits")

var editLong = flag.Bool("edit.long", false, "10,000 random edits in file systems of each kind")

// mirror makes random changes by an Editor, and the same by the kernel in a
// copy of the image that is mounted.
type mirror struct {
	t     *testing.T
	r     *rand.Rand
	x     *Tx
	root  string // of the mount; empty: there is none
	dirs  []string
	files []string
	log   []string
	opts  mirrorOptions
}

type mirrorOptions struct {
	name, args, size string
	maxWrite         int
	noXattr          bool
	bigXattr         int // bytes of the largest value; 0: 3000
	oldInodes        bool
	// other are the arguments for the copy, where they differ: the kernel can
	// hang when files that lie in their inodes become shorter.
	other string
}

// both makes one change on both sides, and wants the same outcome.
func (m *mirror) both(what string, ours, theirs func() error) bool {
	m.t.Helper()
	m.log = append(m.log, what)
	err := ours()
	kerr := theirs()
	if (err == nil) != (kerr == nil) {
		m.fatal("%s: %v, and the kernel says %v", what, err, kerr)
	}
	return err == nil
}

func (m *mirror) fatal(format string, args ...any) {
	m.t.Helper()
	last := slices.Clone(m.log[max(0, len(m.log)-60):])
	for i := range last {
		last[i] = fmt.Sprintf("%.200s", last[i])
	}
	m.t.Fatalf("%s\nafter %d changes, the last:\n%s", fmt.Sprintf(format, args...), len(m.log), strings.Join(last, "\n"))
}

func (m *mirror) in(p string) string { return filepath.Join(m.root, p) }

func (m *mirror) ino(p string) Ino {
	ino, err := m.x.FS().Resolve(p, false)
	if err != nil {
		m.fatal("%s: %v", p, err)
	}
	return ino
}

func (m *mirror) content(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(m.r.Uint32())
	}
	if n > 4 && m.r.IntN(3) == 0 {
		copy(b, "\xc0\x3b\x39\x98")
	}
	return b
}

func (m *mirror) pick(list []string) string { return list[m.r.IntN(len(list))] }

// name is a new path, or now and then one that exists.
func (m *mirror) name() string {
	if len(m.files) > 0 && m.r.IntN(20) == 0 {
		return m.pick(m.files)
	}
	n := 1 + m.r.IntN(30)
	if m.r.IntN(8) == 0 {
		n = 1 + m.r.IntN(250)
	}
	return path.Join(m.pick(m.dirs), strings.Repeat(string(rune('a'+m.r.IntN(26))), n)+fmt.Sprint(m.r.IntN(100000)))[:]
}

func (m *mirror) split(p string) (Ino, string) {
	dir, name, err := m.x.Parent(p)
	if err != nil {
		m.fatal("%s: %v", p, err)
	}
	return dir, name
}

func (m *mirror) size() int64 {
	switch m.r.IntN(6) {
	case 0:
		return int64(m.r.IntN(70))
	case 1:
		return int64(m.r.IntN(300))
	case 2:
		return int64(m.r.IntN(m.opts.maxWrite*20 + 1))
	}
	return int64(m.r.IntN(m.opts.maxWrite + 1))
}

// forget takes a path, and what is below it, out of the lists.
func (m *mirror) forget(p string) {
	gone := func(q string) bool { return q == p || strings.HasPrefix(q, p+"/") }
	m.dirs, m.files = slices.DeleteFunc(m.dirs, gone), slices.DeleteFunc(m.files, gone)
}

func (m *mirror) renamed(from, to string) {
	for _, list := range [][]string{m.dirs, m.files} {
		for i, q := range list {
			if q == from || strings.HasPrefix(q, from+"/") {
				list[i] = to + q[len(from):]
			}
		}
	}
}

func (m *mirror) regular(p string) bool {
	n, err := m.x.FS().Inode(m.ino(p))
	if err != nil {
		m.fatal("%s: %v", p, err)
	}
	return n.IsRegular()
}

func (m *mirror) step() {
	x := m.x
	k := m.r.IntN(100)
	if len(m.files) < 8 {
		k = m.r.IntN(30)
	}
	switch {
	case k < 14: // a new file
		p, b := m.name(), m.content(int(m.size()))
		dir, name := m.split(p)
		if m.both("create "+p, func() error {
			_, err := x.Create(dir, name, Attr{Mode: 0o640})
			return err
		}, func() error {
			f, err := os.OpenFile(m.in(p), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o640)
			if err == nil {
				err = f.Close()
			}
			return err
		}) {
			m.files = append(m.files, p)
			m.write(p, b, 0)
		}
	case k < 20:
		p := m.name()
		dir, name := m.split(p)
		if m.both("mkdir "+p, func() error { _, err := x.Mkdir(dir, name, Attr{Mode: 0o755}); return err },
			func() error {
				if err := os.Mkdir(m.in(p), 0o755); err != nil {
					return err
				}
				// What the kernel gives it of a directory with setgid.
				if err := unix.Chown(m.in(p), 0, 0); err != nil {
					return err
				}
				return unix.Chmod(m.in(p), 0o755)
			}) {
			m.dirs = append(m.dirs, p)
		}
	case k < 24:
		p, target := m.name(), strings.Repeat("t/", 200)[:1+m.r.IntN(150)]
		dir, name := m.split(p)
		if m.both("symlink "+p, func() error { _, err := x.Symlink(dir, name, target, Attr{}); return err },
			func() error { return os.Symlink(target, m.in(p)) }) {
			m.files = append(m.files, p)
		}
	case k < 27:
		p, major, minor := m.name(), uint32(m.r.IntN(4096)), uint32(m.r.IntN(1<<20))
		dir, name := m.split(p)
		typ, mode := TypeChar, uint32(unix.S_IFCHR)
		if k == 25 {
			typ, mode, major, minor = TypeFifo, unix.S_IFIFO, 0, 0
		}
		if m.both("mknod "+p, func() error { _, err := x.Mknod(dir, name, typ, major, minor, Attr{Mode: 0o600}); return err },
			func() error { return unix.Mknod(m.in(p), mode|0o600, int(unix.Mkdev(major, minor))) }) {
			m.files = append(m.files, p)
		}
	case k < 29: // many names in one directory
		d := m.pick(m.dirs)
		ino, n := m.ino(d), m.r.IntN(60)
		for i := range n {
			name := fmt.Sprintf("%s%d-%d", strings.Repeat("n", m.r.IntN(40)), m.r.IntN(1e6), i)
			p := path.Join(d, name)
			if m.both("create "+p, func() error { _, err := x.Create(ino, name, Attr{Mode: 0o600}); return err }, func() error {
				f, err := os.OpenFile(m.in(p), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
				if err == nil {
					err = f.Close()
				}
				return err
			}) {
				m.files = append(m.files, p)
			}
		}
	case k < 30: // not a file, a hole
		m.many()
	case k < 45: // write somewhere
		p := m.pick(m.files)
		if m.regular(p) {
			n, _ := x.FS().Inode(m.ino(p))
			off := int64(0)
			switch m.r.IntN(4) {
			case 0:
				off = n.Size
			case 1:
				off = n.Size + m.size()
			case 2:
				off = int64(m.r.IntN(int(n.Size) + 1))
			}
			m.write(p, m.content(int(m.size())), off)
		}
	case k < 51:
		p, size := m.pick(m.files), m.size()
		if m.regular(p) {
			if n, _ := x.FS().Inode(m.ino(p)); m.r.IntN(2) == 0 {
				size = int64(m.r.IntN(int(n.Size) + 1))
			}
			m.both(fmt.Sprintf("truncate %s to %d", p, size), func() error { return x.Truncate(m.ino(p), size) },
				func() error { return os.Truncate(m.in(p), size) })
		}
	case k < 62:
		p := m.pick(m.files)
		dir, name := m.split(p)
		if m.both("remove "+p, func() error { return x.Remove(dir, name) }, func() error { return os.Remove(m.in(p)) }) {
			m.forget(p)
		}
	case k < 66:
		if len(m.dirs) < 3 {
			return
		}
		p := m.pick(m.dirs[1:])
		dir, name := m.split(p)
		if m.both("rmdir "+p, func() error { return x.Remove(dir, name) }, func() error { return unix.Rmdir(m.in(p)) }) {
			m.forget(p)
		}
	case k < 68:
		if len(m.dirs) < 8 {
			return
		}
		p := m.pick(m.dirs[1:])
		dir, name := m.split(p)
		if m.both("remove all "+p, func() error { return x.RemoveAll(m.t.Context(), dir, name) }, func() error { return os.RemoveAll(m.in(p)) }) {
			m.forget(p)
		}
	case k < 80:
		from := m.pick(m.files)
		if m.r.IntN(4) == 0 && len(m.dirs) > 1 {
			from = m.pick(m.dirs[1:])
		}
		to := m.name()
		if m.r.IntN(6) == 0 {
			to = m.pick(m.dirs)
			if to == "" {
				return
			}
		}
		m.rename(from, to)
	case k < 84:
		from, to := m.pick(m.files), m.name()
		dir, name := m.split(to)
		if m.both("link "+from+" "+to, func() error { return x.Link(dir, name, m.ino(from)) }, func() error { return os.Link(m.in(from), m.in(to)) }) {
			m.files = append(m.files, to)
		}
	case k < 88:
		p, mode := m.pick(append(m.dirs[1:], m.files...)), uint16(m.r.IntN(0o10000))
		if n, _ := x.FS().Inode(m.ino(p)); n.IsSymlink() {
			return
		}
		m.both("chmod "+p, func() error { return x.SetAttr(m.ino(p), SetAttr{Mode: &mode}) }, func() error { return unix.Chmod(m.in(p), uint32(mode)) })
	case k < 91:
		p, uid, gid := m.pick(m.files), m.r.Uint32()>>1, m.r.Uint32()>>1
		n, _ := x.FS().Inode(m.ino(p))
		mode := n.Mode & 0o7777
		m.both("chown "+p, func() error { return x.SetAttr(m.ino(p), SetAttr{UID: &uid, GID: &gid}) }, func() error {
			if err := unix.Lchown(m.in(p), int(uid), int(gid)); err != nil || n.IsSymlink() {
				return err
			}
			return unix.Chmod(m.in(p), uint32(mode)) // chown takes setuid
		})
	case k < 94:
		p, at := m.pick(m.files), time.Unix(int64(m.r.Uint32()>>1), int64(m.r.IntN(1e9)))
		if m.opts.oldInodes {
			at = at.Truncate(time.Second)
		}
		m.utimes(p, at)
	case k < 98:
		p := m.pick(m.files)
		n, _ := x.FS().Inode(m.ino(p))
		if m.opts.noXattr || !n.IsRegular() {
			return
		}
		name, size := fmt.Sprintf("user.%s%d", strings.Repeat("x", m.r.IntN(30)), m.r.IntN(4)), m.r.IntN(100)
		if m.r.IntN(3) == 0 {
			size = m.r.IntN(m.opts.bigXattr)
		}
		value := m.content(size)
		m.both(fmt.Sprintf("setxattr %s %s %d", p, name, size), func() error { return x.SetXattr(m.ino(p), name, string(value)) },
			func() error { return unix.Lsetxattr(m.in(p), name, value, 0) })
	default:
		p := m.pick(m.files)
		var names []string
		for a, err := range x.FS().Xattrs(m.ino(p)) {
			if err != nil {
				m.fatal("%s: %v", p, err)
			}
			names = append(names, a.Name)
		}
		if len(names) > 0 {
			name := m.pick(names)
			m.both("removexattr "+p+" "+name, func() error { return x.RemoveXattr(m.ino(p), name) }, func() error { return unix.Lremovexattr(m.in(p), name) })
		}
	}
}

func (m *mirror) rename(from, to string) {
	d1, n1 := m.split(from)
	d2, n2 := m.split(to)
	same := false
	if a, err := m.x.FS().Resolve(to, false); err == nil {
		same = a == m.ino(from)
	}
	if m.both("rename "+from+" "+to, func() error { return m.x.Rename(d1, n1, d2, n2) }, func() error { return unix.Rename(m.in(from), m.in(to)) }) && !same {
		m.forget(to)
		m.renamed(from, to)
	}
}

func (m *mirror) utimes(p string, at time.Time) {
	m.both("utimes "+p, func() error { return m.x.SetAttr(m.ino(p), SetAttr{Mtime: &at, Atime: &at}) }, func() error {
		ts := unix.NsecToTimespec(at.UnixNano())
		return unix.UtimesNanoAt(unix.AT_FDCWD, m.in(p), []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
	})
}

func (m *mirror) write(p string, b []byte, off int64) {
	m.both(fmt.Sprintf("write %s %d+%d", p, off, len(b)), func() error { return m.x.WriteAt(m.ino(p), b, off) }, func() error {
		f, err := os.OpenFile(m.in(p), os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		_, err = f.WriteAt(b, off)
		return errors.Join(err, f.Close())
	})
}

// many gives a file many extents, or takes them away.
func (m *mirror) many() {
	p := m.name()
	dir, name := m.split(p)
	if !m.both("create "+p, func() error { _, err := m.x.Create(dir, name, Attr{Mode: 0o640}); return err }, func() error {
		f, err := os.OpenFile(m.in(p), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o640)
		if err == nil {
			err = f.Close()
		}
		return err
	}) {
		return
	}
	m.files = append(m.files, p)
	bs := int64(m.x.sb().BlockSize)
	for range m.r.IntN(100) {
		m.write(p, m.content(1+m.r.IntN(int(bs))), int64(m.r.IntN(400))*bs)
	}
}

var blocksField = regexp.MustCompile(` blocks \d+ `)
var dirSize = regexp.MustCompile(`^(04.*) size \d+ `)

// comparable takes out of a manifest what may differ: how many blocks a file
// has, and how large a directory is.
func comparable(m manifest) manifest {
	for p, line := range m {
		m[p] = dirSize.ReplaceAllString(blocksField.ReplaceAllString(line, " "), "$1 ")
	}
	return m
}

func (m *mirror) run(image string, changes int) {
	t := m.t
	e := editAt(t, image)
	for len(m.log) < changes {
		x, err := e.Begin()
		if err != nil {
			t.Fatal(err)
		}
		m.x = x
		for range 1 + m.r.IntN(50) {
			m.step()
		}
		if err := x.Commit(t.Context()); err != nil {
			m.fatal("commit: %v", err)
		}
		if r := oracle.Run(t, "e2fsck", "-fn", image); r.Code != 0 {
			m.fatal("e2fsck: %d\n%s%s", r.Code, r.Stdout, r.Stderr)
		}
		for f, err := range Check(t.Context(), e.dev, nil) {
			if err != nil || f.Severity == Error {
				m.fatal("Check, unlike e2fsck: %v, %v", f, err)
			}
		}
	}
	// Times are those of when it was done, so set them all.
	x, err := e.Begin()
	if err != nil {
		t.Fatal(err)
	}
	m.x = x
	at := time.Unix(1600000000, 0)
	for _, p := range append(slices.Clone(m.files), m.dirs...) {
		m.utimes(cmp.Or(p, "/"), at)
	}
	m.utimes("/lost+found", at)
	if err := x.Commit(t.Context()); err != nil {
		m.fatal("commit: %v", err)
	}
	fsck(t, image)
}

// TestMirror makes random changes in file systems of all kinds, and has the
// kernel make them, too. e2fsck and Check look at what each transaction leaves.
func TestMirror(t *testing.T) {
	oracle.Require(t, "mke2fs", "e2fsck")
	for i, c := range []mirrorOptions{
		{name: "ext4", args: "-t ext4 -b 4096", size: "64M", maxWrite: 20000},
		{name: "ext4-1k", args: "-t ext4 -b 1024", size: "40M", maxWrite: 9000},
		{name: "ext3", args: "-t ext3 -b 1024", size: "40M", maxWrite: 20000, bigXattr: 200},
		{name: "inline", args: "-t ext4 -b 1024 -O inline_data", other: "-t ext4 -b 1024", size: "40M", maxWrite: 3000, bigXattr: 100},
		{name: "ext2", args: "-t ext2 -b 1024 -I 128", size: "40M", maxWrite: 20000, oldInodes: true, bigXattr: 200},
		{name: "bigalloc", args: "-t ext4 -b 1024 -O bigalloc -C 8192", size: "64M", maxWrite: 20000},
		{name: "bigalloc-4k", args: "-t ext4 -b 4096 -O bigalloc -C 65536", size: "400M", maxWrite: 20000},
		{name: "uninit", args: "-t ext4 -b 1024 -O ^metadata_csum,uninit_bg,^64bit,^flex_bg", size: "40M", maxWrite: 9000},
		{name: "no-journal", args: "-t ext4 -b 2048 -O ^has_journal", size: "40M", maxWrite: 9000},
		{name: "no-journal-ext2", args: "-t ext2 -b 4096 -O dir_index", size: "40M", maxWrite: 9000},
		{name: "ea_inode", args: "-t ext4 -b 1024 -O ea_inode,metadata_csum_seed,large_dir", size: "40M", maxWrite: 9000, bigXattr: 9000},
		{name: "inline-4k", args: "-t ext4 -b 4096 -I 512 -O inline_data,ea_inode", other: "-t ext4 -b 4096 -I 512 -O ea_inode", size: "64M", maxWrite: 3000, bigXattr: 100},
		{name: "fast_commit", args: "-t ext4 -b 4096 -O fast_commit,orphan_file,mmp,project,stable_inodes", other: "-t ext4 -b 4096", size: "64M", maxWrite: 20000},
		{name: "meta_bg", args: "-t ext4 -b 1024 -O meta_bg,^resize_inode,sparse_super2", size: "40M", maxWrite: 9000},
		{name: "casefold", args: "-t ext4 -b 2048 -O casefold,verity,encrypt", other: "-t ext4 -b 2048", size: "40M", maxWrite: 9000},
	} {
		t.Run(c.name, func(t *testing.T) {
			if i > 3 && testing.Short() {
				t.Skip("short")
			}
			image, copied := makeImage(t, c.args+" -N 4000", c.size), ""
			if c.other != "" {
				copied = makeImage(t, c.other+" -N 4000", c.size)
			} else {
				copied = filepath.Join(t.TempDir(), "copy")
				oracle.MustRun(t, "cp", "--sparse=always", image, copied)
			}
			c.bigXattr = cmp.Or(c.bigXattr, 3000)
			m := &mirror{t: t, r: rand.New(rand.NewPCG(uint64(i), *editSeed)), dirs: []string{""}, opts: c}
			m.root = mountAt(t, copied, "noatime")
			changes := 150
			if *editLong {
				changes = 10000
			}
			m.run(image, changes)
			f := openImage(t, image, nil)
			got, want := comparable(readManifest(t, f)), comparable(dirManifest(t, m.root))
			if !strings.HasPrefix(c.name, "inline") {
				compareManifests(t, got, want)
				if c.other == "" {
					goOn(t, image)
				}
				return
			}
			// What lies in an inode has no holes.
			ours := mountAt(t, image, "ro,noload")
			for p, line := range got {
				if !isRegularLine(line) {
					continue
				}
				a, err := os.ReadFile(filepath.Join(ours, p))
				b, other := os.ReadFile(m.in(p))
				if err != nil || other != nil || !bytes.Equal(a, b) {
					t.Errorf("%s: %d bytes, %v, and %d, %v", p, len(a), err, len(b), other)
				}
			}
			compareManifests(t, withoutContent(got), withoutContent(want))
		})
	}
}

// goOn has the kernel change what an Editor has left.
func goOn(t *testing.T, image string) {
	t.Helper()
	dir := mountAt(t, image, "noatime")
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for i, e := range list {
		if i%2 == 0 && e.Name() != lostFoundName {
			if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("kernel%d", i)), make([]byte, 5000*(i%4)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	umountAt(t, dir)
	if r := oracle.Run(t, "e2fsck", "-fn", image); r.Code != 0 {
		t.Fatalf("e2fsck: %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
}

// withoutContent takes the contents of regular files out of a manifest.
func withoutContent(m manifest) manifest {
	for p, line := range m {
		if isRegularLine(line) {
			m[p] = line[:strings.LastIndexByte(line, ' ')]
		}
	}
	return m
}

// isRegularLine reports whether a line of a manifest is that of a regular file,
// whose mode has seven digits.
func isRegularLine(line string) bool { return strings.HasPrefix(line, "010") && line[7] == ' ' }

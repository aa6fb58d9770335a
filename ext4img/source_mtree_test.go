package ext4img

import (
	"archive/tar"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestManifest(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "my file"), []byte("contents"), 0o600); err != nil {
		t.Fatal(err)
	}
	base := makeTar(t, folder("etc"), member{tar.TypeReg, "etc/shadow", "root", func(h *tar.Header) {
		h.PAXRecords = map[string]string{"SCHILY.xattr.user.old": "1"}
	}}, hardLink("etc/shadow-", "etc/shadow"), symlink("link", "a"), file("usr/bin/su", "su"), file("old", "old"), symlink("lib", "usr/lib"))
	const text = `#mtree v2.0
# by hand
/set uid=0 gid=0 time=5
. type=dir mode=0711 uid=3 nlink=7
./etc/shadow mode=0640 gid=42 uname=root xattr.user.new=AAEC \
    xattr.user.old=Mg== time=12.5
./usr/bin/su mode=4755 type=file sha256digest=00
./dev/null type=char mode=666 device=linux,1,3
./dev/sda type=block device=8,0 uname=5 gid=6
./dev/pts/ptmx type=char device=native,5,2
./run/fifo type=fifo mode=0600
./run/socket type=socket
./link type=link link=b\040c
./newlink type=link link=usr/lib
./etc/new\s\303\251\\ type=file contents=my\040file mode=0444
./etc/empty type=file size=0
./old type=dir
./gone/away type=file contents=nothing optional
./lib/through type=file size=0
./etc/none type=file mode=0600 optional

/unset gid
/set type=file
home type=dir mode=0755
    user type=dir mode=0700 uid=1000
        .profile size=0 mode=0600
    ..
    other type=dir
    ..
..
etc type=dir
    shadow- mode=0600 uid=1
`
	tree := merge(t, &ScanOptions{Owner: &Owner{77, 78}, ModeMask: 0o777, Warn: func(s string) { t.Error(s) }}, tarOf(base), Manifest(strings.NewReader(text), "m", dir))
	want := []string{
		". 40711 3:0", "dev 40755 0:0 t=0.000000000", "dev/null 20666 0:0 dev=0x103", "dev/pts 40755 0:0 t=0.000000000", "dev/pts/ptmx 20644 0:0 dev=0x502",
		"dev/sda 60644 0:6 dev=0x800", "etc 40755 0:78", "etc/empty 100644 0:0 0",
		"etc/new \u00e9\\ 100444 0:0 8 @0:\"contents\"",
		`etc/shadow 100600 1:42 4 @0:"root" 1.new="\x00\x01\x02" 1.old="2"`, "etc/shadow- = etc/shadow",
		"home 40755 0:0", "home/other 40755 0:0", "home/user 40700 1000:0", "home/user/.profile 100600 0:0 0",
		"lib 120777 77:78 -> usr/lib", "link 120777 0:0 -> b c", "newlink 120777 0:0 -> usr/lib", "old 40755 0:0", "run 40755 0:0 t=0.000000000", "run/fifo 10600 0:0", "run/socket 140644 0:0",
		"usr 40755 77:78", "usr/bin 40755 77:78", `usr/bin/su 104755 0:0 2 @0:"su"`, "usr/lib 40755 0:0 t=0.000000000", "usr/lib/through 100644 0:0 0",
	}
	if diff := cmp.Diff(want, dump(t, tree)); diff != "" {
		t.Error(diff)
	}
}

func TestManifestErrors(t *testing.T) {
	base := makeTar(t, file("f", "f"), folder("d"))
	for text, want := range map[string]string{
		"./x mode=755":                              "m:1: x: there is no such path",
		"\n\n./x \\\n type=file":                    "m:3: x: a new file needs contents=",
		"./x type=file contents=nothing":            "no such file",
		"./x type=file contents=.":                  "not a regular file",
		"./x type=door":                             `the type "door" is not known`,
		"./x type=char":                             "a device without device=",
		"./x type=char device=linux,4096,0":         "does not fit",
		"./x type=char device=259":                  "expected linux,MAJOR,MINOR",
		"./x type=link":                             "a symlink to nothing",
		"./x type=dir contents=m":                   "contents= of a dir",
		"./f mode=0x755":                            "mode=0x755 is no number",
		"./f mode=10000":                            "mode=10000",
		"./f mode=u+s":                              "mode=u+s",
		"./f uid=-1":                                "uid=-1",
		"./f uid=4294967296":                        "uid=4294967296",
		"./f uname=root":                            "names have no number here; use uid=",
		"./f time=yesterday":                        "time=yesterday",
		"./f time=1.1234567890":                     "time=1.1234567890",
		"./f xattr.user.a=!":                        "xattr.user.a: illegal base64",
		"./f xattr.system.a=AA==":                   "no such namespace",
		"./f xattr.system.posix_acl_access=AAAA":    "malformed POSIX ACL",
		"./f modes=1":                               `the keyword "modes" is not known`,
		"./f mode":                                  "mode without a value",
		"./../f mode=755":                           `".."`,
		"..":                                        "leads out of the root",
		"d type=dir\n.. mode=1":                     `m:2: keywords behind ".."`,
		"./f/x type=dir":                            `"f" on the way is not a directory`,
		`./\x type=dir`:                             "a backslash without a meaning",
		`./\400 type=dir`:                           "is no byte",
		"./a \\":                                    "the last line goes on",
		". type=file":                               "the root is a directory",
		"./" + strings.Repeat("n", maxMtreeLine+10): "token too long",
	} {
		_, err := Merge(t.Context(), []Source{tarOf(base), Manifest(strings.NewReader(text), "m", t.TempDir())}, nil)
		if err == nil || !strings.Contains(err.Error(), want) || !strings.HasPrefix(err.Error(), "m:") {
			t.Errorf("%.60q: %v, want %q", text, err, want)
		}
	}
}

func TestUnvis(t *testing.T) {
	for in, want := range map[string]string{
		`plain`: "plain", `\040\s\t\n\\\#`: "  \t\n\\#", `\M-a\M^A\^A\^?`: "\xe1\x81\x01\x7f", `\377\0`: "\xff\x00",
	} {
		if got, err := unvis(in); err != nil || got != want {
			t.Errorf("%s: %q, %v; want %q", in, got, err, want)
		}
	}
}

func FuzzManifest(f *testing.F) {
	f.Add("/set uid=0\n./a type=dir mode=1\n  b type=char device=linux,1,2\n..\n./l type=link link=\\040x xattr.user.a=AA==\n")
	base := makeTar(f, file("f", "f"), folder("d"), symlink("l", "d"))
	f.Fuzz(func(t *testing.T, text string) {
		if strings.Contains(text, "contents") {
			return // which reads files
		}
		tree, err := Merge(t.Context(), []Source{tarOf(base), Manifest(strings.NewReader(text), "m", "")}, nil)
		if err == nil {
			tree.Close()
		}
	})
}

package cli_test

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/oracle"
)

// fields splits a line into arguments; "" is an empty one, and ~ a blank.
func fields(line string) []string {
	args := strings.Fields(line)
	for i, a := range args {
		args[i] = strings.ReplaceAll(a, "~", " ")
		if a == `""` {
			args[i] = ""
		}
	}
	return args
}

// sparseFile makes a file of size bytes with data at some offsets.
func sparseFile(t testing.TB, name string, size int64, data map[int64]string) {
	t.Helper()
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	for off, s := range data {
		if _, err := f.WriteAt([]byte(s), off); err != nil {
			t.Fatal(err)
		}
	}
}

// chain changes to a folder of images made by QEMU: a, b over a; hole and odd,
// raw images with holes; ov over odd; sub/o2 over sub/o1 over sub/odd; and data,
// whose external data file is df.
func chain(t *testing.T) {
	t.Helper()
	oracle.Require(t, "qemu-img", "qemu-io")
	t.Chdir(t.TempDir())
	if err := os.Mkdir("sub", 0o777); err != nil {
		t.Fatal(err)
	}
	writeFile(t, "tx", "xx")
	sparseFile(t, "hole", 1<<20, map[int64]string{8192: strings.Repeat("x", 5000), 300000: strings.Repeat("y", 70000)})
	sparseFile(t, "odd", 100001, map[int64]string{8192: strings.Repeat("x", 5000)})
	writeFile(t, "sub/odd", strings.Repeat("z", 70001))
	for _, line := range []string{
		"qemu-img create -q -f qcow2 a 1M",
		"qemu-img create -q -f qcow2 -b a -F qcow2 b",
		"qemu-img create -q -f qcow2 -b odd -F raw ov 1M",
		"qemu-io -c write~300k~64k ov",
		"qemu-img create -q -f qcow2 -b odd -F raw sub/o1 300k",
		"qemu-img create -q -f qcow2 -b o1 -F qcow2 sub/o2 1M",
		"qemu-io -c write~400k~64k -c write~-z~64k~64k sub/o2",
		"qemu-img create -q -f qcow2 -o data_file=df data 1M",
		"qemu-io -c write~100k~64k -c write~900k~1 -c write~-z~256k~4k data",
		"qemu-img create -q -f qcow2 -u -b nope -F qcow2 miss 1M",
		"qemu-img create -q -f qcow2 -u -b miss -F qcow2 miss2 1M",
		"qemu-img create -q -f qcow2 -u -b tx -F qcow2 badbase 1M",
	} {
		args := fields(line)
		oracle.MustRun(t, args[0], args[1:]...)
	}
}

// TestObjects makes secrets, and objects that cannot be made.
func TestObjects(t *testing.T) {
	chain(t)
	for _, object := range []string{
		"", "foo", "foo,id=x", "secret", "secret,id=x", "secret,id=x,data=y", "qom-type=secret,id=x,data=y", "secret,id=x,data=y,file=z",
		"secret,id=x,file=nope", "secret,id=x,file=tx", "secret,id=x,data=y,foo=z,bar=1", "secret,id=x,data=y,format=base64",
		"secret,id=x,data=y*,format=base64", "secret,id=x,data=y,format=b", "secret,id=1 x,data=y", "secret,id=,data=x", "secret,data=x",
		"secret,id=x,data", "secret,=x", "secret,i*d=x", "secret,id=x,data=y,keyid=z", "secret,id=x,data=y,iv=z", "secret,help",
		`{"qom-type":"secret","id":"x","data":"y"}`, `{"qom-type":"secret","id":"x","data":5}`, `{"qom-type":"secret","id":"x"`,
	} {
		same(t, "info", "--object", object, "a")
	}
	key := "secret,id=k,data=0123456789abcdef0123456789abcdef"
	for _, object := range []string{
		"secret,id=k,data=z", "secret,id=x,data=abc,keyid=k", "secret,id=x,data=abc,keyid=k,iv=AAAA",
		"secret,id=x,data=abc,keyid=k,iv=AAAAAAAAAAAAAAAAAAAAAA==",
		"secret,id=x,data=AAAAAAAAAAAAAAAAAAAAAA==,format=base64,keyid=k,iv=AAAAAAAAAAAAAAAAAAAAAA==",
	} {
		same(t, "info", "--object", key, "--object", object, "a")
	}
	same(t, "info", "--object", "secret,id=k,data=short", "--object", "secret,id=x,data=a,keyid=k", "a")
}

// TestImageOpts names images by options.
func TestImageOpts(t *testing.T) {
	chain(t)
	for _, opts := range []string{
		"", "a", "file=a", "filename=a", "file.filename=a", "driver=", "driver=foo,file.filename=a", "driver=qcow2",
		"driver=qcow2,filename=a", "driver=file,filename=a", "driver=raw,file.filename=a", "file.driver=file", "file.filename=nbd://x/",
		"driver=raw,file.driver=file,file.filename=a,offset=512,size=1024", "driver=raw,file.filename=a,offset=5",
		"driver=raw,file.filename=a,size=1G", "driver=raw,file.filename=a,size=1000", "driver=raw,file.filename=a,offset=1G",
		"driver=raw,file.filename=a,offset=x", "driver=qcow2,,file.filename=a", "file.filename=a,read-only", "file.filename=a,noread-only",
		"driver=qcow2,file.driver=qcow2,file.filename=a", "driver=qcow2,file.driver=raw,file.file.filename=a", "driver=qcow2,file.filename=nope",
	} {
		same(t, "info", "--image-opts", opts)
	}
	for _, opt := range []string{
		"foo=bar", "foo=bar,zap=1,id=x,backing.x=y", "id=1", "file.foo=bar", "lazy-refcounts=on", "lazy-refcounts=x", "backing=",
		"backing.driver=raw", "file.locking=off", "file.locking=x", "read-only=on", "read-only=x", "force-share=on",
		"cache-size=1M,l2-cache-size=2M", "cache-size=1M,refcount-cache-size=2M", "cache-size=1M,l2-cache-size=1,refcount-cache-size=2",
		"l2-cache-entry-size=3", "node-name=x", "node-name=1x", "discard=unmap,detect-zeroes=unmap", "detect-zeroes=unmap", "detect-zeroes=foo",
		"discard=x", "size=1M", "overlap-check=all", "overlap-check=foo", "overlap-check.template=all,overlap-check=none", "cache.direct=x",
		"aio=native", "file.aio=native", "file.aio=threads", "file.aio=x", "data-file.filename=x", "encrypt.key-secret=x", "file.pr-manager=x",
	} {
		same(t, "info", "--image-opts", "driver=qcow2,file.filename=a,"+opt)
	}
	for _, opt := range []string{
		"backing.driver=raw,backing.file.filename=tx", "backing.file.filename=nope", "backing=a", "backing.driver=qcow2",
		"backing.lazy-refcounts=on", "backing.foo=on", "data-file.filename=tx", "backing=",
	} {
		same(t, "map", "--output=json", "--image-opts", "driver=qcow2,file.filename=b,"+opt)
	}
	for _, opts := range []string{
		"driver=raw,file.filename=b,backing.filename=tx", "driver=raw,file.filename=hole,offset=4608", "driver=raw,file.filename=odd,offset=512",
		"driver=raw,file.filename=hole,offset=4096,size=8192", "driver=file,filename=odd", "driver=file,filename=tx,offset=1",
		"driver=qcow2,file.driver=raw,file.file.filename=ov", "driver=qcow2,file.filename=data,data-file.filename=hole",
	} {
		same(t, "map", "--output=json", "--image-opts", opts)
	}
	same(t, "info", "--image-opts", "-f", "raw", "a")
	same(t, "info", "--image-opts", "-U", "file.filename=a,force-share=off")
}

// TestNames opens images by names other than paths.
func TestNames(t *testing.T) {
	chain(t)
	for _, name := range []string{
		"foo:bar", "file:a", "file:no:pe", "file:no:pe/x", "./a", "sub/../a", "json:[]", "json:{", "json:{}x", "json:", `json:{"filename":"a"}`, `json:{"file.filename":"a"}`,
		`json:{"file.filename":"a","file":{"filename":"b"}}`, `json:{"driver":"qcow2","file":"x"}`,
		`json:{"driver":"qcow2","file":{"driver":"file","filename":"a","foo":1}}`, `json:{"driver":"qcow2","file":{"driver":"qcow2","file":{"filename":"a"}}}`,
		`json:{"driver":"raw","offset":512,"file":{"filename":"a"}}`, `json:{"driver":"raw","offset":"x","file":{"filename":"a"}}`,
	} {
		same(t, "info", name)
	}
	same(t, "info", "-f", "raw", `json:{"driver":"qcow2","file.filename":"a"}`)
	same(t, "info", "-f", "file", "a")
	same(t, "info", "-f", "", "a")
	same(t, "resize", "-f", "", "a", "2M")
	same(t, "info", "--image-opts", "-f", "", "file.filename=a")
	same(t, "map", "--output=json", `json:{"driver":"qcow2","file":{"filename":"b"},"backing":null}`)
	for _, name := range []string{"nbd:localhost:10809", "ssh://host/x", "https://host/x", "nbd+unix:///x"} {
		r := run(t, "info", name)
		if r.Code != 1 || !strings.Contains(r.Stderr, "is not supported: qimg opens images of the formats qcow2, raw, vmdk, vdi, vpc, vhdx, gzip, xz, zstd, bzip2 in local files") {
			t.Errorf("%s: %d %s", name, r.Code, r.Stderr)
		}
	}
}

// TestGetopt gives options in all ways that getopt knows.
func TestGetopt(t *testing.T) {
	chain(t)
	for _, line := range []string{
		"info --bac --for raw a", "info --ob a", "info --backing-chain=x a", "info --form=raw a", "info --fo=raw a", "info --o=json a",
		"info --ou=json a", "info --out json a", "info -Uf raw a", "info -Ufraw a", "info -fraw -- a", "info -- -f raw", "info a -f raw -Z", "info a -ZU",
		"info -UZ a", "info -UZU a", "info a b -ZU", "info -", "info -f=raw a", "info a --nope -U", "info -U -f", "info a -Uf", "info -f -- a",
		"info --output", `info --output "" a`, "info -é a", "check -Tnone -q a", "check -T x a", "map -Zs 0 a", "map -s0 -l0x10 --output=json a", "map --m 0 a",
		"-Z", "-x", "--versio=x", "-T", "--trace", "--nope", "create --object", "create -f qcow2 -o , -Z", "create -f qcow2 --object x -Z",
	} {
		same(t, fields(line)...)
	}
}

// TestHelp looks at what --help and --version print first.
func TestHelp(t *testing.T) {
	for _, c := range []struct{ line, want string }{
		{"qemu-img --version", "qemu-img version 7.2.0 (qimg "},
		{"qemu-img -Vx", "qemu-img version 7.2.0 (qimg "},
		{"/usr/bin/qimg -V", "qimg version "},
		{"qemu-img --help", "qemu-img version 7.2.0 (qimg "},
		{"qimg -h", "qimg makes, converts"},
		{"qimg -T x --help", "qimg makes, converts"},
		{"qimg create -f qcow2 -h x -Z", "Make an empty image\n\nUsage:\n  qimg create [-f"},
		{"qimg map --he", "Tell where the data"},
		{"qimg help map", "Tell where the data"},
	} {
		r := runAs(t, t.Context(), nil, strings.Fields(c.line)...)
		if r.Code != 0 || r.Stderr != "" || !strings.HasPrefix(r.Stdout, c.want) {
			t.Errorf("%s: exit %d, want %q:\n%s%s", c.line, r.Code, c.want, r.Stdout, r.Stderr)
		}
	}
	r := runAs(t, t.Context(), nil, "qemu-img", "--help")
	if !strings.Contains(r.Stdout, "\nusage: qemu-img [standard options] command [command options]\n") || !strings.Contains(r.Stdout, "\nSupported formats:") {
		t.Errorf("help of qemu-img:\n%s", r.Stdout)
	}
}

// TestLockedImage opens an image that another process writes to.
func TestLockedImage(t *testing.T) {
	chain(t)
	for _, name := range []string{"a", "hole"} {
		f, err := blockdev.OpenFile(name, &blockdev.FileOptions{Write: true})
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range []string{"info", "info -U", "map", "map -U --output=json", "check", "check -U", "create -f qcow2", "create -f raw"} {
			args := append(strings.Fields(line), name)
			if args[0] == "create" {
				args = append(args, "1M")
			}
			same(t, args...)
		}
		same(t, "info", "--image-opts", "file.locking=off,file.filename="+name)
		same(t, "map", "b") // its backing file is a
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestProbedRaw warns of a raw image whose format was not given, when it is
// written to.
func TestProbedRaw(t *testing.T) {
	chain(t)
	for _, args := range [][]string{{"resize", "hole", "2M"}, {"resize", "-f", "raw", "hole", "2M"}, {"resize", "--image-opts", "file.filename=hole", "2M"},
		{"resize", "--image-opts", "driver=raw,file.filename=hole,read-only=on", "2M"}, {"resize", "--image-opts", "driver=raw,file.read-only=on,file.filename=hole", "2M"},
		{"resize", "--image-opts", "driver=qcow2,file.filename=a,force-share=on", "2M"}} {
		same(t, args...) // the second one finds the size as it is to be
	}
	var want, got oracle.Result
	want, got = oracle.Run(t, "qemu-img", "resize", "tx", "1M"), run(t, "resize", "tx", "1M")
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-qemu-img +qimg\n%s", diff)
	}
}

// TestDevice uses a block device as large as its image, which cannot grow, and
// then one that takes no writes.
func TestDevice(t *testing.T) {
	oracle.RequireRoot(t)
	oracle.Require(t, "losetup")
	chain(t)
	for _, flag := range []string{"--sector-size=512", "-r"} {
		out, err := exec.Command("losetup", "-f", "--show", flag, "a").Output()
		if err != nil {
			oracle.Missing(t, "a kernel with loop devices")
		}
		dev := strings.TrimSpace(string(out))
		for _, line := range []string{"info", "check", "map", "snapshot -c x", "resize -f raw", "snapshot -l"} {
			args := append(strings.Fields(line), dev)
			if args[0] == "resize" {
				args = append(args, "1G")
			}
			same(t, args...)
		}
		if flag != "-r" {
			oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", dev, "-F", "qcow2", "over")
			oracle.MustRun(t, "qemu-io", "-c", "write 0 1M", "over")
			same(t, "commit", "over")
		}
		if err := exec.Command("losetup", "-d", dev).Run(); err != nil {
			t.Fatal(err)
		}
	}
}

package cli_test

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"qimg/qcow2/blockdev/oracle"
)

// luksRandom is what is not the same in two LUKS images that are made alike.
var luksRandom = regexp.MustCompile(`(iters|uuid): .*`)

// TestCreateEncrypted makes the same encrypted images with qemu-img and with
// qimg: the same is printed, and both programs say the same of both.
func TestCreateEncrypted(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	t.Chdir(t.TempDir())
	writeFile(t, "key", "YWJj")
	for _, secret := range []string{"data=abc", "file=key,format=base64"} {
		for _, options := range []string{
			"encryption=on",
			"encryption=off,encrypt.format=aes,compat=0.10",
			"encrypt.format=luks,encrypt.iter-time=10,encrypt.cipher-alg=aes-128,encrypt.hash-alg=sha1,encrypt.ivgen-hash-alg=sha256,cluster_size=4k",
		} {
			luks := strings.Contains(options, "luks")
			if luks && secret != "data=abc" {
				continue // it takes QEMU seconds
			}
			args := []string{"create", "-f", "qcow2", "--object", "secret,id=s," + secret, "-o", options + ",encrypt.key-secret=s", "x", "1M"}
			want := oracle.Run(t, "qemu-img", args...)
			for range 20 { // it measures how fast it is, and fails where it cannot
				if !strings.Contains(want.Stderr, "Unable to get accurate CPU usage") {
					break
				}
				want = oracle.Run(t, "qemu-img", args...)
			}
			wantInfo := oracle.MustRun(t, "qemu-img", "info", "x")
			os.Remove("x")
			if diff := cmp.Diff(want, run(t, args...)); diff != "" {
				t.Errorf("%s: -qemu-img +qimg\n%s", options, diff)
				continue
			}
			for _, info := range []string{oracle.MustRun(t, "qemu-img", "info", "x"), mustRun(t, "info", "x")} {
				r := oracle.Result{Stdout: luksRandom.ReplaceAllString(info, "$1")}
				w := oracle.Result{Stdout: luksRandom.ReplaceAllString(wantInfo, "$1")}
				if diff := cmp.Diff(withoutDiskSize(w), withoutDiskSize(r)); diff != "" {
					t.Errorf("%s: info: -qemu-img +qimg\n%s", options, diff)
				}
			}
			imageOpts := []string{"--object", "secret,id=s," + secret, "--image-opts", "driver=qcow2,encrypt.key-secret=s,file.filename=x"}
			oracle.MustRun(t, "qemu-img", append([]string{"check"}, imageOpts...)...)
			oracle.MustRun(t, "qemu-io", append(imageOpts, "-c", "write -P 3 70000 1000")...)
			same(t, append([]string{"map"}, imageOpts...)...)
			os.Remove("x")
		}
	}
}

// TestWithoutPassphrase: commands that do not read the disk need none, unlike
// those of qemu-img; one that is given has to be right.
func TestWithoutPassphrase(t *testing.T) {
	dir := oracle.Input(t, "zoo")
	t.Chdir(t.TempDir())
	for _, name := range []string{"luks-snapshot", "aes-legacy"} {
		b, err := os.ReadFile(dir + "/" + name + ".qcow2")
		if err != nil {
			t.Fatal(err)
		}
		writeFile(t, name, string(b))
		mustRun(t, "info", name)
		mustRun(t, "check", name)
		mustRun(t, "snapshot", "-c", "new", name)
		if !strings.Contains(mustRun(t, "snapshot", "-l", name), "new") {
			t.Errorf("%s: no snapshot", name)
		}
		mustRun(t, "snapshot", "-d", "new", name)
		r := run(t, "check", "--object", "secret,id=s,data=wrong", "--image-opts", "driver=qcow2,encrypt.key-secret=s,file.filename="+name)
		if wrong := r.Code == 1 && strings.Contains(r.Stderr, "Invalid password"); wrong != (name == "luks-snapshot") {
			t.Errorf("%s: %+v with a wrong passphrase", name, r)
		}
	}
}

// TestEncryptErrors: what is said of secrets and options that are wrong.
func TestEncryptErrors(t *testing.T) {
	oracle.Require(t, "qemu-img")
	dir := oracle.Input(t, "zoo")
	t.Chdir(t.TempDir())
	writeFile(t, "bad", "\xff")
	writeFile(t, "zero", "a\x00b")
	const create = "create -f qcow2 --object secret,id=s,data=abc -o "
	open := "driver=qcow2,encrypt.key-secret=s,file.filename=" + dir + "/"
	for _, line := range []string{
		create + "encrypt.format=luks x 1M",
		create + "encrypt.format=luks,encrypt.key-secret=nope x 1M",
		create + "encrypt.format=foo,encrypt.key-secret=s x 1M",
		create + "encrypt.format=,encrypt.key-secret=s x 1M",
		create + "encrypt.key-secret=s x 1M",
		create + "encrypt.iter-time=10 x 1M",
		create + "encrypt.iter-time=x x 1M",
		create + "encryption=on x 1M",
		create + "encryption=maybe x 1M",
		create + "encryption=on,encrypt.format=luks,encrypt.key-secret=s x 1M",
		create + "encrypt.format=aes,encrypt.key-secret=s,encrypt.iter-time=10 x 1M",
		create + "encrypt.format=aes,encrypt.key-secret=s,encrypt.cipher-alg=aes-256 x 1M",
		create + "encrypt.format=luks,encrypt.key-secret=s,encrypt.cipher-alg=foo x 1M",
		create + "encrypt.format=luks,encrypt.key-secret=s,encrypt.cipher-alg= x 1M",
		create + "encrypt.format=luks,encrypt.key-secret=s,encrypt.cipher-alg=des x 1M",
		create + "encrypt.format=luks,encrypt.key-secret=s,encrypt.cipher-mode=foo x 1M",
		create + "encrypt.format=luks,encrypt.key-secret=s,encrypt.ivgen-alg=foo x 1M",
		create + "encrypt.format=luks,encrypt.key-secret=s,encrypt.ivgen-hash-alg=foo x 1M",
		create + "encrypt.format=luks,encrypt.key-secret=s,encrypt.hash-alg=foo x 1M",
		create + "encrypt.format=luks,encrypt.key-secret=s,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha1 x 1M",
		"create -f qcow2 --object secret,id=s,file=bad -o encrypt.format=luks,encrypt.key-secret=s x 1M",
		"create -f qcow2 --object secret,id=s,file=zero -o encrypt.format=luks,encrypt.key-secret=s x 1M",
		"create -f qcow2 --object secret,id=s -o encrypt.format=luks,encrypt.key-secret=s x 1M",
		"create -f raw -o encrypt.format=luks x 1M",
		"map " + dir + "/luks.qcow2",
		"map " + dir + "/aes-legacy.qcow2",
		"map --image-opts " + open + "luks.qcow2",
		"map --object secret,id=s,data=wrong --image-opts " + open + "luks.qcow2",
		"map --object secret,id=s,data=wrong --image-opts " + open + "aes-legacy.qcow2",
		"map --object secret,id=s,data=zoo-secret --image-opts " + open + "luks-2keys.qcow2",
		"map --object secret,id=s,file=bad --image-opts " + open + "luks.qcow2",
		"check --object secret,id=s,data=zoo-secret --image-opts encrypt.format=aes," + open + "luks.qcow2",
		"check --object secret,id=s,data=zoo-secret --image-opts encrypt.format=luks," + open + "luks.qcow2",
		"check --object secret,id=s,data=zoo-secret --image-opts encrypt.format=luks," + open + "aes-legacy.qcow2",
		"check --object secret,id=s,data=zoo-secret --image-opts encrypt.format=luks," + open + "v3-plain.qcow2",
	} {
		same(t, strings.Fields(line)...)
	}
	// A backing file whose name tells a secret is looked at without it.
	over := `json:{"driver":"qcow2","encrypt.key-secret":"s","file.filename":"` + dir + `/luks.qcow2"}`
	for _, object := range []string{"secret,id=s,data=zoo-secret", "secret,id=s,data=wrong", "secret,id=x,data=zoo-secret"} {
		same(t, "create", "-f", "qcow2", "--object", object, "-b", over, "-F", "qcow2", "x")
	}
}

// TestAmendPassphrases changes the passphrases of an image with qemu-img and
// with qimg, which refuse the same.
func TestAmendPassphrases(t *testing.T) {
	oracle.Require(t, "qemu-img")
	t.Chdir(t.TempDir())
	secrets := strings.Fields("--object secret,id=s,data=abc --object secret,id=n,data=new --object secret,id=w,data=wrong")
	image := func(secret, file string) []string {
		return append(secrets, "--image-opts", "driver=qcow2,encrypt.key-secret="+secret+",file.filename="+file)
	}
	mustRun(t, append(append([]string{"create", "-q", "-f", "qcow2"}, secrets...), "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1", "luks", "1M")...)
	mustRun(t, append(append([]string{"create", "-q", "-f", "qcow2"}, secrets...), "-o", "encryption=on,encrypt.key-secret=s", "aes", "1M")...)
	mustRun(t, "create", "-q", "-f", "qcow2", "plain", "1M")
	amend := func(file, options string) []string {
		return append(append([]string{"amend"}, image("s", file)...), "-o", options)
	}
	for _, options := range []string{
		"encrypt.new-secret=n",
		"encrypt.keyslot=1",
		"encrypt.state=foo",
		"encrypt.state=active",
		"encrypt.state=active,encrypt.new-secret=nope",
		"encrypt.state=active,encrypt.new-secret=n,encrypt.old-secret=s",
		"encrypt.state=active,encrypt.new-secret=n,encrypt.keyslot=0",
		"encrypt.state=active,encrypt.new-secret=n,encrypt.keyslot=8",
		"encrypt.state=active,encrypt.new-secret=n,encrypt.keyslot=x",
		"encrypt.state=inactive",
		"encrypt.state=inactive,encrypt.keyslot=0",
		"encrypt.state=inactive,encrypt.keyslot=1",
		"encrypt.state=inactive,encrypt.keyslot=9",
		"encrypt.state=inactive,encrypt.old-secret=w",
		"encrypt.state=inactive,encrypt.old-secret=s",
		"encrypt.state=inactive,encrypt.old-secret=s,encrypt.new-secret=n",
		"encrypt.state=inactive,encrypt.old-secret=s,encrypt.iter-time=10",
		"encrypt.state=inactive,encrypt.keyslot=0,encrypt.old-secret=w",
		"encrypt.state=inactive,encrypt.keyslot=1,encrypt.old-secret=w",
	} {
		same(t, amend("luks", options)...)
	}
	same(t, amend("aes", "encrypt.state=active,encrypt.new-secret=n")...)
	same(t, append(append([]string{"amend"}, secrets...), "-o", "encrypt.state=active,encrypt.new-secret=n", "plain")...)

	opens := func(secret string) bool {
		args := append([]string{"map"}, image(secret, "luks")...)
		r := oracle.Run(t, "qemu-img", args...)
		if diff := cmp.Diff(r, run(t, args...)); diff != "" {
			t.Errorf("%s: -qemu-img +qimg\n%s", secret, diff)
		}
		return r.Code == 0
	}
	// Not if something else is refused.
	if r := run(t, amend("luks", "encrypt.state=active,encrypt.new-secret=n,encrypt.iter-time=1,refcount_bits=3")...); r.Code == 0 || opens("n") {
		t.Errorf("%+v, or the passphrase was added", r)
	}
	mustRun(t, amend("luks", "encrypt.state=active,encrypt.new-secret=n,encrypt.iter-time=1,lazy_refcounts=on")...)
	if !opens("s") || !opens("n") || !strings.Contains(mustRun(t, "info", "luks"), "lazy refcounts: true") {
		t.Error("the passphrase was not added, or lazy_refcounts not set")
	}
	mustRun(t, amend("luks", "encrypt.state=inactive,encrypt.old-secret=s")...)
	if opens("s") || !opens("n") {
		t.Error("the passphrase was not erased")
	}
}

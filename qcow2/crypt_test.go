package qcow2_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/oracle"
)

// TestLocked: without a passphrase there is no guest data, and a wrong one
// opens no LUKS image.
func TestLocked(t *testing.T) {
	dir := oracle.Input(t, "zoo")
	no := errors.New("no")
	for _, name := range []string{"luks", "luks-2keys", "luks-cbc-essiv", "luks-snapshot", "aes-legacy"} {
		path := filepath.Join(dir, name+".qcow2")
		var asked qcow2.SecretRequest
		answer := func(p []byte, err error) *qcow2.OpenOptions {
			return &qcow2.OpenOptions{Secret: func(r qcow2.SecretRequest) ([]byte, error) { asked = r; return p, err }}
		}
		for _, opts := range []*qcow2.OpenOptions{nil, answer(nil, nil)} {
			im, err := qcow2.Open(path, opts)
			if err != nil {
				t.Fatal(name, err)
			}
			if _, err := im.ReadAt(make([]byte, 512), 0); !errors.Is(err, qcow2.ErrEncrypted) {
				t.Errorf("%s: read without a passphrase: %v", name, err)
			}
			im.Close()
		}
		if want := (qcow2.SecretRequest{File: path}); asked != want {
			t.Errorf("%s: asked for %+v, expected %+v", name, asked, want)
		}
		if _, err := qcow2.Open(path, answer(nil, no)); !errors.Is(err, no) {
			t.Errorf("%s: %v, expected the error of Secret", name, err)
		}
		im, err := qcow2.Open(path, answer([]byte("wrong"), nil))
		if name == "aes-legacy" {
			if err != nil {
				t.Error(err)
			}
			im.Close()
		} else if !errors.Is(err, qcow2.ErrPassphrase) {
			t.Errorf("%s: %v with a wrong passphrase", name, err)
		}
	}
}

// TestReadPartsOfSectors reads encrypted images at any offset.
func TestReadPartsOfSectors(t *testing.T) {
	dir := oracle.Input(t, "zoo")
	for _, name := range []string{"luks", "luks-cbc-essiv", "aes-legacy"} {
		im, err := qcow2.Open(filepath.Join(dir, name+".qcow2"), unlocked("zoo-secret"))
		if err != nil {
			t.Fatal(err)
		}
		defer im.Close()
		whole := make([]byte, im.Size())
		if _, err := im.ReadAt(whole, 0); err != nil {
			t.Fatal(err)
		}
		r := rand.New(rand.NewPCG(1, 2))
		for range 500 {
			off := r.Int64N(300000)
			p := make([]byte, r.IntN(3000))
			if _, err := im.ReadAt(p, off); err != nil || !bytes.Equal(p, whole[off:off+int64(len(p))]) {
				t.Fatalf("%s: %d bytes at %d differ: %v", name, len(p), off, err)
			}
		}
	}
}

// secretArgs are the arguments of QEMU's programs for an encrypted image.
func secretArgs(path, passphrase string) []string {
	return []string{"--object", "secret,id=s,data=" + passphrase, "--image-opts", "driver=qcow2,encrypt.key-secret=s,file.filename=" + path}
}

// rawCopy is what qemu-img reads of an encrypted image.
func rawCopy(t *testing.T, path, passphrase string) []byte {
	t.Helper()
	out := path + ".raw"
	oracle.MustRun(t, "qemu-img", append(append([]string{"convert", "-O", "raw"}, secretArgs(path, passphrase)...), out)...)
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	os.Remove(out)
	return b
}

// writtenByQEMU writes parts of an image with qemu-io and of content the same.
func writtenByQEMU(t *testing.T, path, passphrase string, content []byte) {
	t.Helper()
	args := secretArgs(path, passphrase)
	for _, w := range []struct{ pattern, off, n int }{{0x11, 70000, 100}, {0x22, 131072, 65536}, {0x33, 299999, 70001}} {
		args = append(args, "-c", fmt.Sprintf("write -P %d %d %d", w.pattern, w.off, w.n))
		copy(content[w.off:], bytes.Repeat([]byte{byte(w.pattern)}, w.n))
	}
	oracle.MustRun(t, "qemu-io", args...)
}

func readAll(t *testing.T, path, passphrase string) []byte {
	t.Helper()
	im, err := qcow2.Open(path, unlocked(passphrase))
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	b := make([]byte, im.Size())
	if _, err := im.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// create makes an image file.
func create(t *testing.T, path string, f func(dst *blockdev.File) error) {
	t.Helper()
	out, err := blockdev.CreateFile(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Abort()
	if err := f(out.File()); err != nil {
		t.Fatal(err)
	}
	if err := out.Commit(); err != nil {
		t.Fatal(err)
	}
}

// encryptions are all that qemu-img creates with AES.
func encryptions() map[string]qcow2.FormatOptions {
	list := map[string]qcow2.FormatOptions{}
	add := func(name string, o qcow2.FormatOptions) {
		o.Encrypt.Passphrase = []byte("abc")
		if o.Encrypt.Method == qcow2.CryptLUKS {
			o.Encrypt.IterTime = 1
		}
		list[name] = o
	}
	luks := func(alg, mode, ivgen, ivhash, hash string) qcow2.FormatOptions {
		return qcow2.FormatOptions{Encrypt: qcow2.EncryptOptions{
			Method: qcow2.CryptLUKS, CipherAlg: alg, CipherMode: mode, IVGenAlg: ivgen, IVGenHashAlg: ivhash, HashAlg: hash}}
	}
	for _, mode := range []string{"xts", "cbc", "ctr", "ecb"} {
		for _, iv := range []string{"plain64", "plain", "essiv", "essiv:md5"} {
			gen, hash, _ := strings.Cut(iv, ":")
			add("aes-256-"+mode+"-"+iv, luks("aes-256", mode, gen, hash, ""))
		}
		add("aes-128-"+mode, luks("aes-128", mode, "essiv", "", ""))
	}
	add("aes-192-xts", luks("aes-192", "xts", "", "", ""))
	for _, hash := range []string{"md5", "sha1", "sha224", "sha384", "sha512", "ripemd160"} {
		add(hash, luks("", "", "", "", hash))
	}
	add("plain with a hash", luks("", "xts", "plain64", "sha1", ""))
	for _, m := range []qcow2.CryptMethod{qcow2.CryptAES, qcow2.CryptLUKS} {
		add(m.String(), qcow2.FormatOptions{Encrypt: qcow2.EncryptOptions{Method: m}})
		add(m.String()+" version 2", qcow2.FormatOptions{Version: 2, Encrypt: qcow2.EncryptOptions{Method: m}})
		add(m.String()+" 512", qcow2.FormatOptions{ClusterSize: 512, RefcountBits: 1, Encrypt: qcow2.EncryptOptions{Method: m}})
		add(m.String()+" 2M", qcow2.FormatOptions{ClusterSize: 2 << 20, ExtendedL2: true, Encrypt: qcow2.EncryptOptions{Method: m}})
	}
	return list
}

// TestEncryptions: images of every kind are written here and read by QEMU,
// written on by QEMU and read here.
func TestEncryptions(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	dir := t.TempDir()
	for name, format := range encryptions() {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(dir, strings.ReplaceAll(name, ":", "-")+".qcow2")
			content := make([]byte, 600<<10)
			rand.NewChaCha8([32]byte{1}).Read(content[10<<10 : 400<<10])
			create(t, path, func(dst *blockdev.File) error {
				w, err := qcow2.NewWriter(t.Context(), dst, int64(len(content)), &qcow2.WriterOptions{FormatOptions: format,
					Extents: func(yield func(int64, int64) bool) { yield(0, int64(len(content))) }})
				if err != nil {
					return err
				}
				if _, err := w.WriteAt(content, 0); err != nil {
					return err
				}
				return w.Finish()
			})
			if !bytes.Equal(rawCopy(t, path, "abc"), content) {
				t.Error("qemu-img reads something else of what was written here")
			}
			writtenByQEMU(t, path, "abc", content)
			if !bytes.Equal(readAll(t, path, "abc"), content) {
				t.Error("what QEMU has written reads as something else")
			}
			oracle.MustRun(t, "qemu-img", append([]string{"check"}, secretArgs(path, "abc")...)...)
		})
	}
}

// TestCreateEncrypted: what Create makes is empty for QEMU and here, however
// much of it is preallocated, and can be written.
func TestCreateEncrypted(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	dir := t.TempDir()
	const size = 600 << 10
	for name, o := range map[string]qcow2.CreateOptions{
		"off":                {},
		"metadata":           {Preallocation: qcow2.PreallocationMetadata},
		"falloc":             {Preallocation: qcow2.PreallocationFalloc},
		"full":               {Preallocation: qcow2.PreallocationFull},
		"extended":           {FormatOptions: qcow2.FormatOptions{ExtendedL2: true}, Preallocation: qcow2.PreallocationMetadata},
		"small":              {FormatOptions: qcow2.FormatOptions{ClusterSize: 1024}, Preallocation: qcow2.PreallocationMetadata},
		"version 2":          {FormatOptions: qcow2.FormatOptions{Version: 2}},
		"data file":          {DataFile: "data"},
		"data file metadata": {DataFile: "data metadata", Preallocation: qcow2.PreallocationMetadata},
		"raw data file":      {DataFile: "raw data", DataFileRaw: true},
	} {
		for _, m := range []qcow2.CryptMethod{qcow2.CryptLUKS, qcow2.CryptAES} {
			t.Run(name+" "+m.String(), func(t *testing.T) {
				path := filepath.Join(dir, name+m.String()+".qcow2")
				createEncrypted(t, path, size, m, "", o)
				content := make([]byte, size)
				if !bytes.Equal(readAll(t, path, ""), content) {
					t.Error("does not read as zeroes")
				}
				if !bytes.Equal(rawCopy(t, path, ""), content) {
					t.Error("does not read as zeroes with qemu-img")
				}
				writtenByQEMU(t, path, "", content)
				if !bytes.Equal(readAll(t, path, ""), content) {
					t.Error("what QEMU has written reads as something else")
				}
				oracle.MustRun(t, "qemu-img", append([]string{"check"}, secretArgs(path, "")...)...)
			})
		}
	}
}

// TestEncryptedChain reads an encrypted image over another with a passphrase of
// its own, which is named as QEMU has it.
func TestEncryptedChain(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	dir := t.TempDir()
	base, top := filepath.Join(dir, "base.qcow2"), filepath.Join(dir, "top.qcow2")
	const size = 600 << 10
	encrypt := func(passphrase string) qcow2.EncryptOptions {
		return qcow2.EncryptOptions{Method: qcow2.CryptLUKS, Passphrase: []byte(passphrase), IterTime: 1}
	}
	create(t, base, func(dst *blockdev.File) error {
		return qcow2.Create(t.Context(), dst, size, &qcow2.CreateOptions{FormatOptions: qcow2.FormatOptions{Encrypt: encrypt("below")}})
	})
	content := make([]byte, size)
	writtenByQEMU(t, base, "below", content)
	name := fmt.Sprintf(`json:{"driver":"qcow2","encrypt.key-secret":"s1","file.filename":%q}`, base)
	create(t, top, func(dst *blockdev.File) error {
		return qcow2.Create(t.Context(), dst, size, &qcow2.CreateOptions{FormatOptions: qcow2.FormatOptions{
			Encrypt: encrypt("above"), BackingFile: name, BackingFormat: "qcow2"}})
	})
	oracle.MustRun(t, "qemu-io", "--object", "secret,id=s1,data=below", "--object", "secret,id=s,data=above", "--image-opts",
		"driver=qcow2,encrypt.key-secret=s,file.filename="+top, "-c", "write -P 9 70050 5000")
	copy(content[70050:], bytes.Repeat([]byte{9}, 5000))
	opts := follow()
	var asked []qcow2.SecretRequest
	opts.Secret = func(r qcow2.SecretRequest) ([]byte, error) {
		asked = append(asked, r)
		return []byte([]string{"above", "below"}[r.Depth]), nil
	}
	im, err := qcow2.Open(top, opts)
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	if d := cmp.Diff([]qcow2.SecretRequest{{File: top}, {File: base, Depth: 1, ID: "s1"}}, asked); d != "" {
		t.Error(d)
	}
	got := make([]byte, size)
	if _, err := im.ReadAt(got, 0); err != nil || !bytes.Equal(got, content) {
		t.Errorf("something else was read: %v", err)
	}
	im.Close()
	opts.Write, opts.WriteBacking = true, func(qcow2.BackingFile) bool { return true }
	if im, err = qcow2.Open(top, opts); err != nil {
		t.Fatal(err)
	}
	if err := im.Commit(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(readAll(t, base, "below"), content) || !bytes.Equal(rawCopy(t, base, "below"), content) {
		t.Error("the commit wrote something else")
	}
	opts = follow()
	opts.Secret = func(r qcow2.SecretRequest) ([]byte, error) { return []byte("above"), nil }
	if _, err := qcow2.Open(top, opts); !errors.Is(err, qcow2.ErrPassphrase) || !strings.Contains(err.Error(), base) {
		t.Errorf("%v with the wrong passphrase for the backing file", err)
	}
}

// TestEncryptOptions: what qemu-img says of options that are wrong.
func TestEncryptOptions(t *testing.T) {
	luks := qcow2.EncryptOptions{Method: qcow2.CryptLUKS, Passphrase: []byte("abc"), IterTime: 1}
	for want, change := range map[string]func(o *qcow2.EncryptOptions){
		"Parameter 'encrypt.format' is missing":                     func(o *qcow2.EncryptOptions) { o.Method = qcow2.CryptNone },
		"Parameter 'encrypt.iter-time' is unexpected":               func(o *qcow2.EncryptOptions) { o.Method = qcow2.CryptAES },
		"Parameter 'encrypt.cipher-mode' is unexpected":             func(o *qcow2.EncryptOptions) { o.Method, o.CipherMode = qcow2.CryptAES, "xts" },
		"Parameter 'format' does not accept value 'CryptMethod(3)'": func(o *qcow2.EncryptOptions) { o.Method = 3 },
		"Parameter 'encrypt.key-secret' is required for cipher":     func(o *qcow2.EncryptOptions) { o.Passphrase = nil },
		"Parameter 'cipher-alg' does not accept value 'foo'":        func(o *qcow2.EncryptOptions) { o.CipherAlg = "foo" },
		"Parameter 'cipher-mode' does not accept value 'foo'":       func(o *qcow2.EncryptOptions) { o.CipherMode = "foo" },
		"Parameter 'ivgen-alg' does not accept value 'foo'":         func(o *qcow2.EncryptOptions) { o.IVGenAlg = "foo" },
		"Parameter 'ivgen-hash-alg' does not accept value 'foo'":    func(o *qcow2.EncryptOptions) { o.IVGenHashAlg = "foo" },
		"Parameter 'hash-alg' does not accept value 'foo'":          func(o *qcow2.EncryptOptions) { o.HashAlg = "foo" },
		"Algorithm 'serpent-256' not supported":                     func(o *qcow2.EncryptOptions) { o.CipherAlg = "serpent-256" },
		"Algorithm 'aes-192' not supported with cipher mode 'cbc'":  func(o *qcow2.EncryptOptions) { o.CipherAlg, o.CipherMode = "aes-192", "cbc" },
		"No AES cipher with key size 20 available":                  func(o *qcow2.EncryptOptions) { o.IVGenAlg, o.IVGenHashAlg = "essiv", "sha1" },
		"larger than 67108864: Numerical result out of range":       func(o *qcow2.EncryptOptions) { o.IterTime, o.CipherMode, o.HashAlg = 1<<62, "cbc", "sha1" },
		"qcow2: random bytes for keys: unexpected EOF":              func(o *qcow2.EncryptOptions) { o.Random = strings.NewReader("short") },
		"Compression and encryption not supported at the same time": nil,
	} {
		o := luks
		if change != nil {
			change(&o)
		}
		dst := blockdev.NewMemory(0)
		_, err := qcow2.NewWriter(t.Context(), dst, 1<<20, &qcow2.WriterOptions{FormatOptions: qcow2.FormatOptions{Encrypt: o}, Compress: change == nil})
		if err == nil || !strings.HasSuffix(err.Error(), want) {
			t.Errorf("%v, expected %s", err, want)
		}
		if dst.Size() != 0 {
			t.Errorf("%s: the device has been written", want)
		}
	}
}

// TestEncryptRandom: the same random bytes give the same image.
func TestEncryptRandom(t *testing.T) {
	images := make([][]byte, 3)
	for i := range images {
		dst := blockdev.NewMemory(0)
		if err := qcow2.Create(t.Context(), dst, 1<<20, &qcow2.CreateOptions{FormatOptions: qcow2.FormatOptions{Encrypt: qcow2.EncryptOptions{
			Method: qcow2.CryptLUKS, Passphrase: []byte("abc"), IterTime: 1, Random: rand.NewChaCha8([32]byte{byte(i / 2)})}}}); err != nil {
			t.Fatal(err)
		}
		images[i] = make([]byte, dst.Size())
		if _, err := dst.ReadAt(images[i], 0); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(images[0], images[1]) || bytes.Equal(images[0], images[2]) {
		t.Error("the image does not depend on Random alone")
	}
}

// TestIterTime: iterations are as many as take the time that was asked for.
func TestIterTime(t *testing.T) {
	dst := blockdev.NewMemory(0)
	err := qcow2.Create(t.Context(), dst, 1<<20, &qcow2.CreateOptions{FormatOptions: qcow2.FormatOptions{Encrypt: qcow2.EncryptOptions{
		Method: qcow2.CryptLUKS, Passphrase: []byte("abc"), IterTime: 400 * time.Millisecond}}})
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	im, err := qcow2.New(dst, unlocked("abc"))
	if err != nil {
		t.Fatal(err)
	}
	h, _, err := im.LUKS()
	if err != nil {
		t.Fatal(err)
	}
	if d, n := time.Since(start), h.KeySlots[0].Iterations; d < 40*time.Millisecond || n < 3*h.MasterKeyIterations {
		t.Errorf("opened in %v with %d and %d iterations", d, n, h.MasterKeyIterations)
	}
}

// TestWriteEncrypted: random changes of encrypted images of every kind read
// back, here and in QEMU.
func TestWriteEncrypted(t *testing.T) {
	oracle.Require(t, "qemu-img")
	for i, o := range []qcow2.CreateOptions{
		{},
		{FormatOptions: qcow2.FormatOptions{Version: 2}},
		{FormatOptions: qcow2.FormatOptions{ClusterSize: 512}},
		{FormatOptions: qcow2.FormatOptions{ClusterSize: 2 << 20}},
		{FormatOptions: qcow2.FormatOptions{ExtendedL2: true}},
		{FormatOptions: qcow2.FormatOptions{ExtendedL2: true, ClusterSize: 16384}, Preallocation: qcow2.PreallocationMetadata},
		{Preallocation: qcow2.PreallocationMetadata},
		{FormatOptions: qcow2.FormatOptions{BackingFile: "base.raw", BackingFormat: "raw", ClusterSize: 4096}},
		{DataFile: "data"},
		{DataFile: "data", DataFileRaw: true},
	} {
		for _, m := range []qcow2.CryptMethod{qcow2.CryptLUKS, qcow2.CryptAES} {
			t.Run(fmt.Sprintf("%d %s", i, m), func(t *testing.T) {
				o, dir := o, t.TempDir()
				name := filepath.Join(dir, "a.qcow2")
				r := rand.New(rand.NewPCG(uint64(i), 1))
				want := make([]byte, 3<<20+512*7)
				if o.BackingFile != "" {
					rand.NewChaCha8([32]byte{1}).Read(want[:2<<20+512])
					o.BackingFile = filepath.Join(dir, o.BackingFile)
					write(t, o.BackingFile, want[:2<<20+512])
				}
				createEncrypted(t, name, int64(len(want)), m, "abc", o)
				opts := unlocked("abc")
				opts.Write = true
				changes := 25
				if oracle.SlowBuild {
					changes = 5
				}
				for range 2 {
					im, err := qcow2.Open(name, opts)
					if err != nil {
						t.Fatal(err)
					}
					for range changes {
						if what, err := change(r, im, want, 100000); err != nil {
							t.Fatalf("%s: %v", what, err)
						}
					}
					if !bytes.Equal(bytesOf(t, im), want) {
						t.Fatal("open image reads something else")
					}
					if err := im.Close(); err != nil {
						t.Fatal(err)
					}
					if !bytes.Equal(readAll(t, name, "abc"), want) {
						t.Fatal("image reads something else")
					}
				}
				oracle.MustRun(t, "qemu-img", append([]string{"check"}, secretArgs(name, "abc")...)...)
				if !bytes.Equal(rawCopy(t, name, "abc"), want) {
					t.Error("qemu-img reads something else")
				}
				// Without the passphrase nothing is written.
				im, err := qcow2.Open(name, &qcow2.OpenOptions{Write: true, Backing: qcow2.BackingFollow})
				if err != nil {
					t.Fatal(err)
				}
				defer im.Close()
				if _, err := im.WriteAt(make([]byte, 512), 0); !errors.Is(err, qcow2.ErrEncrypted) {
					t.Errorf("write without a passphrase: %v", err)
				}
			})
		}
	}
}

// createEncrypted makes an image file, and its data file beside it.
func createEncrypted(t *testing.T, path string, size int64, m qcow2.CryptMethod, passphrase string, o qcow2.CreateOptions) {
	t.Helper()
	o.Encrypt = qcow2.EncryptOptions{Method: m, Passphrase: []byte(passphrase)}
	if m == qcow2.CryptLUKS {
		o.Encrypt.IterTime = 1
	}
	make := func(dst *blockdev.File) error { return qcow2.Create(t.Context(), dst, size, &o) }
	if o.DataFile == "" {
		create(t, path, make)
		return
	}
	o.DataFile = path + ".data"
	create(t, o.DataFile, func(data *blockdev.File) error {
		o.Data = data
		create(t, path, make)
		return nil
	})
}

// TestReadEncryptedTogether reads an encrypted image from many goroutines.
func TestReadEncryptedTogether(t *testing.T) {
	dir := oracle.Input(t, "zoo")
	for _, name := range []string{"luks", "luks-cbc-essiv", "aes-legacy"} {
		im, err := qcow2.Open(filepath.Join(dir, name+".qcow2"), unlocked("zoo-secret"))
		if err != nil {
			t.Fatal(err)
		}
		defer im.Close()
		want := bytesOf(t, im)
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				r := rand.New(rand.NewPCG(uint64(i), 2))
				p := make([]byte, 3000)
				for range 100 {
					off := r.Int64N(262144)
					if _, err := im.ReadAt(p, off); err != nil || !bytes.Equal(p, want[off:off+int64(len(p))]) {
						t.Errorf("%s: at %d: %v", name, off, err)
					}
				}
			})
		}
		wg.Wait()
	}
}

// TestChangeEncrypted: operations on the metadata of encrypted images keep what
// the disk reads as, here and in QEMU.
func TestChangeEncrypted(t *testing.T) {
	oracle.Require(t, "qemu-img")
	for i, o := range []qcow2.CreateOptions{
		{FormatOptions: qcow2.FormatOptions{ClusterSize: 4096, BackingFile: "base", BackingFormat: "raw"}},
		{FormatOptions: qcow2.FormatOptions{ClusterSize: 16384, ExtendedL2: true, BackingFile: "base", BackingFormat: "raw"}},
		{FormatOptions: qcow2.FormatOptions{ClusterSize: 4096, Version: 2}},
		{FormatOptions: qcow2.FormatOptions{ClusterSize: 4096}, DataFile: "data"},
		{FormatOptions: qcow2.FormatOptions{ClusterSize: 4096}, DataFile: "data", DataFileRaw: true},
	} {
		for _, m := range []qcow2.CryptMethod{qcow2.CryptLUKS, qcow2.CryptAES} {
			t.Run(fmt.Sprintf("%d %s", i, m), func(t *testing.T) {
				o, dir := o, t.TempDir()
				name := filepath.Join(dir, "a.qcow2")
				want := make([]byte, 500<<10+512)
				if o.BackingFile != "" {
					rand.NewChaCha8([32]byte{1}).Read(want[:300<<10])
					o.BackingFile = filepath.Join(dir, "base")
					write(t, o.BackingFile, want[:300<<10])
				}
				createEncrypted(t, name, int64(len(want)), m, "abc", o)
				opts := unlocked("abc")
				opts.Write = true
				im, err := qcow2.Open(name, opts)
				if err != nil {
					t.Fatal(err)
				}
				defer im.Close()
				r := rand.New(rand.NewPCG(uint64(i), 1))
				step := func(what string, err error) {
					t.Helper()
					if err != nil {
						t.Fatalf("%s: %v", what, err)
					}
					if !bytes.Equal(bytesOf(t, im), want) {
						t.Fatalf("%s: something else is read", what)
					}
				}
				for range 20 {
					step(change(r, im, want, 50000))
				}
				if o.DataFile == "" {
					state := make([]byte, 70000)
					rand.NewChaCha8([32]byte{2}).Read(state)
					before := bytes.Clone(want)
					_, err := im.CreateSnapshot(t.Context(), "s", &qcow2.SnapshotOptions{VMState: bytes.NewReader(state)})
					step("create snapshot", err)
					for range 10 {
						step(change(r, im, want, 50000))
					}
					step("sync", im.Sync())
					so := unlocked("abc")
					so.Snapshot, so.ForceShare = "s", true
					sn, err := qcow2.Open(name, so)
					if err != nil {
						t.Fatal(err)
					}
					vm, err := sn.VMState()
					if err != nil {
						t.Fatal(err)
					}
					if !bytes.Equal(bytesOf(t, sn), before) || !bytes.Equal(bytesOf(t, vm), state) {
						t.Error("the snapshot holds something else")
					}
					sn.Close()
					want = bytes.Clone(before)
					step("apply snapshot", im.ApplySnapshot(t.Context(), "s"))
					step("delete snapshot", im.DeleteSnapshot(t.Context(), "s"))
				}
				if o.BackingFile == "" || o.ExtendedL2 {
					want = append(want, make([]byte, 100<<10)...)
					step("grow with preallocation", im.Resize(t.Context(), int64(len(want)), &qcow2.ResizeOptions{Preallocation: qcow2.PreallocationMetadata}))
				}
				if o.DataFile != "" {
					want = append(want, make([]byte, 10<<10+512)...)
					step("grow with full preallocation", im.Resize(t.Context(), int64(len(want)), &qcow2.ResizeOptions{Preallocation: qcow2.PreallocationFull}))
				}
				want = append(want, make([]byte, 100<<10)...)
				step("grow", im.Resize(t.Context(), int64(len(want)), nil))
				want = want[:len(want)-50<<10-512]
				step("shrink", im.Resize(t.Context(), int64(len(want)), &qcow2.ResizeOptions{Shrink: true}))
				if !o.ExtendedL2 && o.DataFile == "" {
					_, err := im.Amend(t.Context(), &qcow2.AmendOptions{Version: 2})
					step("version 2", err)
				}
				for range 10 {
					step(change(r, im, want, 50000))
				}
				if err := im.Close(); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(readAll(t, name, "abc"), want) || !bytes.Equal(rawCopy(t, name, "abc"), want) {
					t.Error("the image reads as something else")
				}
				oracle.MustRun(t, "qemu-img", append([]string{"check"}, secretArgs(name, "abc")...)...)
			})
		}
	}
}

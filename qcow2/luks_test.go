package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// newLUKS makes a header with its first key slot, for the passphrase "abc".
func newLUKS(t testing.TB, o EncryptOptions) (*LUKSHeader, []byte) {
	t.Helper()
	o.Method, o.Passphrase, o.IterTime = CryptLUKS, []byte("abc"), 1
	o.Random = rand.NewChaCha8([32]byte{})
	h, err := o.check()
	if err != nil {
		t.Fatal(err)
	}
	_, area, err := o.create(h)
	if err != nil {
		t.Fatal(err)
	}
	return h, area
}

// areaReader reads an encryption header of which area is the beginning.
func areaReader(area []byte) func(p []byte, off int64) error {
	return func(p []byte, off int64) error { return readFull(bytes.NewReader(area), p, off) }
}

func TestLUKSRoundTrip(t *testing.T) {
	h, area := newLUKS(t, EncryptOptions{})
	b := h.appendTo(nil)
	if len(b) != luksHeaderSize || !bytes.Equal(b, area[:luksHeaderSize]) {
		t.Errorf("header of %d bytes, expected %d", len(b), luksHeaderSize)
	}
	got, err := parseLUKS(b)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(*h, got); d != "" {
		t.Error(d)
	}
}

// TestHostileLUKS: a case for each way in which a LUKS header is refused, by
// looking at it or with a passphrase. None takes long.
func TestHostileLUKS(t *testing.T) {
	_, area := newLUKS(t, EncryptOptions{CipherAlg: "aes-128", CipherMode: "cbc", IVGenAlg: "essiv"})
	put := func(off int, v uint32) func(b []byte) {
		return func(b []byte) { binary.BigEndian.PutUint32(b[off:], v) }
	}
	text := func(off int, s string) func(b []byte) {
		return func(b []byte) { copy(b[off:off+32], append([]byte(s), make([]byte, 32)...)) }
	}
	slot := func(i, field int, v uint32) func(b []byte) { return put(208+48*i+field, v) }
	both := func(f ...func(b []byte)) func(b []byte) {
		return func(b []byte) {
			for _, f := range f {
				f(b)
			}
		}
	}
	const big = maxKeyWork
	for _, c := range []struct {
		name   string
		change func(b []byte)
		want   error // nil: good
		text   string
		locked bool // found only with a passphrase
	}{
		{"good", func([]byte) {}, nil, "", false},
		{"magic", put(0, 0), ErrCorrupt, "no magic number", false},
		{"version", func(b []byte) { b[7] = 2 }, ErrUnsupported, "version 2, expected 1", false},
		{"cipher name", text(8, "0123456789abcdef0123456789abcdef"), ErrCorrupt, "cipher-name", false},
		{"cipher mode", text(40, "0123456789abcdef0123456789abcdef"), ErrCorrupt, "cipher-mode", false},
		{"hash", text(72, "0123456789abcdef0123456789abcdef"), ErrCorrupt, "hash-spec", false},
		{"no key", put(108, 0), ErrLimit, "key-bytes 0", false},
		{"long key", put(108, 65), ErrLimit, "key-bytes 65, expected 1 to 64", false},
		{"huge key", put(108, 1<<32-1), ErrLimit, "key-bytes", false},
		{"no digest iterations", put(164, 0), ErrCorrupt, "mk-digest-iter 0", false},
		{"payload in the header", put(104, 7), ErrCorrupt, "key slot 0 with 65536 bytes at 0x1000", false},
		{"payload in a slot", put(104, 1030), ErrCorrupt, "key slot 7", false},
		{"stripes", slot(3, 44, 4001), ErrCorrupt, "key slot 3 of 4001 stripes", false},
		{"state", slot(2, 0, 1), ErrCorrupt, "key slot 2 is in state 0x1", false},
		{"no iterations", slot(0, 4, 0), ErrCorrupt, "key slot 0 of 0 iterations", false},
		{"slot in the header", slot(0, 40, 7), ErrCorrupt, "key slot 0 with 65536 bytes at 0xe00", false},
		{"slot far away", slot(1, 40, 1<<32-1), ErrCorrupt, "key slot 1", false},
		{"slots overlap", slot(5, 40, 8+127), ErrCorrupt, "key slot 5 with 65536 bytes at 0x10e00 overlaps with key slot 0 at 0x1000", false},

		{"cipher", text(8, "twofish"), ErrUnsupported, `cipher "twofish", expected aes`, true},
		{"mode", text(40, "xts"), ErrUnsupported, `cipher mode "xts"`, true},
		{"unknown mode", text(40, "lrw-plain64"), ErrUnsupported, `cipher mode "lrw"`, true},
		{"vectors", text(40, "cbc-benbi"), ErrUnsupported, `"benbi"`, true},
		{"essiv without a hash", text(40, "cbc-essiv"), ErrUnsupported, "without a hash", true},
		{"essiv with an unknown hash", text(40, "cbc-essiv:x"), ErrUnsupported, `hash "x"`, true},
		{"essiv with a hash that is no key", text(40, "cbc-essiv:sha1"), ErrUnsupported, "essiv:sha1: aes with a key of 20 bytes", true},
		{"key of no cipher", put(108, 15), ErrUnsupported, "aes with a key of 15 bytes", true},
		{"odd key of two ciphers", both(put(108, 15), text(40, "xts-plain64")), ErrUnsupported, "aes-xts with a key of 15 bytes", true},
		{"short key of two ciphers", text(40, "xts-plain64"), ErrUnsupported, "aes with a key of 8 bytes", true},
		{"key derivation", text(72, "whirlpool"), ErrUnsupported, `hash "whirlpool"`, true},
		{"too many iterations", slot(0, 4, big+1), ErrLimit, "key slot 0: a key of 16 bytes by 134217729 iterations", true},
		{"most iterations", slot(0, 4, 1<<32-1), ErrLimit, "4294967295 iterations", true},
		{"too many digest iterations", put(164, big), ErrLimit, "a key of 20 bytes by 134217728 iterations, after 1000 of", true},
		{"too many in all", both(put(112, 0), slot(1, 0, luksSlotActive), slot(1, 4, big-1999)), ErrLimit, "key slot 1: a key of 16 bytes by 134215729 iterations, after 2000 of", true},
		{"no slot", slot(0, 0, luksSlotDisabled), ErrPassphrase, "", true},
		{"other digest", put(112, 0), ErrPassphrase, "", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := bytes.Clone(area)
			c.change(b)
			open := func(opts *OpenOptions) error {
				im, err := hostile(t, opts, func(x *Tiny) {
					x.Image = append(x.Image, b...)
					x.Header.CryptMethod = CryptLUKS
					x.Header.Extensions = []Extension{{extCrypto, CryptoExtension{TinyEnd, luksAlignment + 8*65536}.appendTo(nil)}}
				})
				if err == nil {
					_, _, err = im.LUKS()
				}
				return err
			}
			start := time.Now()
			err := open(nil)
			if !c.locked {
				refusedWith(t, err, c.want, c.text)
			} else if err != nil {
				t.Errorf("%v without a passphrase", err)
			}
			err = open(&OpenOptions{Secret: func(SecretRequest) ([]byte, error) { return []byte("abc"), nil }})
			if !errors.Is(err, c.want) || err != nil && !bytes.Contains([]byte(err.Error()), []byte(c.text)) {
				t.Errorf("%v, expected %v with %q", err, c.want, c.text)
			}
			if d := time.Since(start); d > time.Second {
				t.Errorf("it took %v", d)
			}
		})
	}
}

// TestLUKSBeyondTheHeader: key material has to lie in what the encryption
// extension names.
func TestLUKSBeyondTheHeader(t *testing.T) {
	_, area := newLUKS(t, EncryptOptions{})
	for _, n := range []uint64{0, luksHeaderSize - 1, luksHeaderSize, luksAlignment + 255999, luksAlignment + 256000} {
		_, err := hostile(t, &OpenOptions{Secret: func(SecretRequest) ([]byte, error) { return []byte("abc"), nil }}, func(x *Tiny) {
			x.Image = append(x.Image, area...)
			x.Header.CryptMethod = CryptLUKS
			x.Header.Extensions = []Extension{{extCrypto, CryptoExtension{TinyEnd, n}.appendTo(nil)}}
		})
		if good := n == luksAlignment+256000; good != (err == nil) || !good && !errors.Is(err, ErrCorrupt) {
			t.Errorf("encryption header of %d bytes: %v", n, err)
		}
	}
	if _, err := hostile(t, &OpenOptions{Secret: func(SecretRequest) ([]byte, error) { return []byte("abc"), nil }}, func(x *Tiny) {
		x.Header.CryptMethod = CryptLUKS
	}); !errors.Is(err, ErrCorrupt) {
		t.Errorf("no encryption extension: %v", err)
	}
}

// FuzzLUKS opens LUKS headers with a passphrase, with little work at most.
func FuzzLUKS(f *testing.F) {
	for _, o := range []EncryptOptions{{}, {CipherAlg: "aes-128", CipherMode: "cbc", IVGenAlg: "essiv", HashAlg: "sha1"}, {CipherMode: "ctr"}, {CipherMode: "ecb", IVGenAlg: "plain"}} {
		h, _ := newLUKS(f, o)
		h.KeySlots[0].Iterations, h.MasterKeyIterations = 1, 1
		f.Add(h.appendTo(nil))
	}
	material := make([]byte, maxLUKSKeySize*luksStripes)
	f.Fuzz(func(t *testing.T, b []byte) {
		h, bad := parseLUKS(b)
		if bad != nil {
			return
		}
		if again, bad := parseLUKS(h.appendTo(nil)); bad != nil || again != h {
			t.Fatalf("%+v %v, expected %+v", again, bad, h)
		}
		c, err := newLUKSCrypt(&h, []byte("abc"), 5000, areaReader(material))
		if c != nil || !errors.Is(err, ErrPassphrase) && !errors.Is(err, ErrUnsupported) && !errors.Is(err, ErrLimit) {
			t.Fatal(c, err)
		}
	})
}

func TestSectorsOnly(t *testing.T) {
	c, err := newAESCrypt([]byte("abc"))
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct{ n, guest, host int64 }{{511, 0, 0}, {512, 1, 0}, {512, 0, 1}} {
		if c.encrypt(make([]byte, x.n), x.guest, x.host) == nil || c.decrypt(make([]byte, x.n), x.guest, x.host) == nil {
			t.Errorf("%+v is no whole sector", x)
		}
	}
}

// TestSectorNumbers: plain counts sectors in 32 bits, plain64 in 64, and essiv
// makes of them what plain64 does not.
func TestSectorNumbers(t *testing.T) {
	for spec, same := range map[string]bool{"xts-plain": true, "cbc-plain": true, "ctr-plain": true, "xts-plain64": false, "cbc-plain64": false,
		"ctr-plain64": false, "xts-essiv:sha256": false, "cbc-essiv:sha256": false} {
		c, err := newSectorCipher(spec, []byte("0123456789abcdef0123456789ABCDEF"))
		if err != nil {
			t.Fatal(err)
		}
		var sectors [3][512]byte
		for i, n := range []uint64{5, 1<<32 + 5, 6} {
			c.encrypt(sectors[i][:], n)
		}
		if (sectors[0] == sectors[1]) != same || sectors[0] == sectors[2] {
			t.Errorf("%s: sectors 5, 1<<32+5 and 6 encrypt to %x %x %x", spec, sectors[0][:16], sectors[1][:16], sectors[2][:16])
		}
		again := sectors[1]
		c.decrypt(again[:], 1<<32+5)
		if again != [512]byte{} {
			t.Errorf("%s: decrypts to something else", spec)
		}
	}
}

func BenchmarkDecrypt(b *testing.B) {
	for _, spec := range []string{"xts-plain64", "cbc-plain64", "cbc-essiv:sha256"} {
		b.Run(spec, func(b *testing.B) {
			n := 32
			if spec[0] == 'x' {
				n = 64
			}
			s, err := newSectorCipher(spec, make([]byte, n))
			if err != nil {
				b.Fatal(err)
			}
			c, p := newCrypt(s, false), make([]byte, 64<<10)
			b.SetBytes(int64(len(p)))
			b.ReportAllocs()
			for b.Loop() {
				if err := c.decrypt(p, 0, 1<<20); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

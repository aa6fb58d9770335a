package qcow2

import (
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/subtle"
	"fmt"
	"io"
	"math"
	"slices"
	"time"
)

// EncryptOptions says how a new image is encrypted. The strings are QEMU's
// names; what is empty is what qemu-img chooses: aes-256, xts, plain64, sha256.
type EncryptOptions struct {
	// Method is CryptNone, CryptLUKS, or CryptAES, which is for old programs:
	// its key is the passphrase itself, of which it takes 16 bytes.
	Method CryptMethod
	// Passphrase opens the image. It can be empty, but not nil.
	Passphrase []byte

	// The rest is for LUKS alone.

	CipherAlg    string // aes-128, aes-192 or aes-256
	CipherMode   string // xts, cbc, ctr or ecb; the last two are not for use
	IVGenAlg     string // plain64, plain or essiv
	IVGenHashAlg string // hash of essiv: sha256, or md5
	HashAlg      string // hash that makes keys of passphrases
	// IterTime is how long it shall take to make the key of the passphrase on
	// this machine, which is measured. 0: two seconds. There are never fewer
	// than 1000 iterations.
	IterTime time.Duration
	// Random is where keys and salts come from. Nil: crypto/rand.
	Random io.Reader
}

const (
	defaultIterTime = 2 * time.Second
	// minIterations is QEMU's QCRYPTO_BLOCK_LUKS_MIN_SLOT_KEY_ITERS.
	minIterations = 1000
)

// check returns the LUKS header for the options, without what is random or
// measured. Without LUKS it is nil.
func (o *EncryptOptions) check() (*LUKSHeader, error) {
	if o.Method == CryptNone {
		if o.Passphrase != nil || o.luksOption() != "" {
			return nil, OptionError("Parameter 'encrypt.format' is missing")
		}
		return nil, nil
	}
	if o.Method > CryptLUKS {
		return nil, optionError("Parameter 'format' does not accept value '%s'", o.Method)
	}
	if name := o.luksOption(); o.Method == CryptAES && name != "" {
		return nil, optionError("Parameter 'encrypt.%s' is unexpected", name)
	}
	for _, p := range []struct {
		name, value string
		values      []string
	}{
		{"cipher-alg", o.CipherAlg, []string{"aes-128", "aes-192", "aes-256", "des", "3des", "cast5-128", "serpent-128", "serpent-192", "serpent-256", "twofish-128", "twofish-192", "twofish-256"}},
		{"cipher-mode", o.CipherMode, []string{"ecb", "cbc", "xts", "ctr"}},
		{"ivgen-alg", o.IVGenAlg, []string{"plain", "plain64", "essiv"}},
		{"ivgen-hash-alg", o.IVGenHashAlg, hashNames()},
		{"hash-alg", o.HashAlg, hashNames()},
	} {
		if p.value != "" && !slices.Contains(p.values, p.value) {
			return nil, optionError("Parameter '%s' does not accept value '%s'", p.name, p.value)
		}
	}
	if o.Passphrase == nil {
		return nil, OptionError("Parameter 'encrypt.key-secret' is required for cipher")
	}
	if o.Method == CryptAES {
		return nil, nil
	}
	return o.luksHeader()
}

func hashNames() []string {
	return []string{"md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160"}
}

// luksOption names an option that is set and for LUKS alone, or is "".
func (o *EncryptOptions) luksOption() string {
	switch {
	case o.CipherAlg != "":
		return "cipher-alg"
	case o.CipherMode != "":
		return "cipher-mode"
	case o.IVGenAlg != "":
		return "ivgen-alg"
	case o.IVGenHashAlg != "":
		return "ivgen-hash-alg"
	case o.HashAlg != "":
		return "hash-alg"
	case o.IterTime != 0:
		return "iter-time"
	}
	return ""
}

func (o *EncryptOptions) luksHeader() (*LUKSHeader, error) {
	or := func(s, def string) string {
		if s == "" {
			return def
		}
		return s
	}
	h := &LUKSHeader{CipherName: "aes", HashSpec: or(o.HashAlg, "sha256")}
	mode, ivgen, ivhash := or(o.CipherMode, "xts"), or(o.IVGenAlg, "plain64"), o.IVGenHashAlg
	if ivgen == "essiv" {
		ivhash = or(ivhash, "sha256")
	}
	h.CipherMode = mode + "-" + ivgen
	if ivhash != "" {
		h.CipherMode += ":" + ivhash
	}
	switch alg := or(o.CipherAlg, "aes-256"); alg {
	case "aes-128":
		h.MasterKeyLen = 16
	case "aes-192":
		h.MasterKeyLen = 24
		if mode != "xts" { // the key material is not whole sectors, and QEMU 7.2 aborts
			return nil, optionError("Algorithm '%s' not supported with cipher mode '%s'", alg, mode)
		}
	case "aes-256":
		h.MasterKeyLen = 32
	default:
		return nil, optionError("Algorithm '%s' not supported", alg)
	}
	if mode == "xts" {
		h.MasterKeyLen *= 2
	}
	if _, err := newSectorCipher(h.CipherMode, make([]byte, h.MasterKeyLen)); err != nil {
		// The one that is left: essiv with a hash that gives no key.
		hash, _ := newHash(ivhash) // the names are known
		return nil, optionError("No AES cipher with key size %d available", hash().Size())
	}
	size := h.keySlotSize()
	for i := range h.KeySlots {
		h.KeySlots[i].KeyOffset = luksAlignment + int64(i)*size
		h.KeySlots[i].Stripes = luksStripes
	}
	h.PayloadOffset = luksAlignment + luksKeySlots*size
	return h, nil
}

// create makes the keys of a new image. h is what check returned; area is the
// beginning of the encryption header, which is zero after it.
func (o *EncryptOptions) create(h *LUKSHeader) (c *crypt, area []byte, err error) {
	switch o.Method {
	case CryptNone:
		return nil, nil, nil
	case CryptAES:
		c, err = newAESCrypt(o.Passphrase)
		return c, nil, err
	}
	k := keyMaker{random: o.Random, iterTime: o.IterTime}
	if k.keyDeriver, err = newKeyDeriver(h.HashSpec, maxKeyWork); err != nil {
		return nil, nil, err
	}
	master, uuid := make([]byte, h.MasterKeyLen), make([]byte, 16)
	for _, p := range [][]byte{master, uuid, h.MasterKeySalt[:]} {
		if err := k.read(p); err != nil {
			return nil, nil, err
		}
	}
	uuid[6], uuid[8] = uuid[6]&0x0f|0x40, uuid[8]&0x3f|0x80 // version 4, RFC 9562
	h.UUID = fmt.Sprintf("%x-%x-%x-%x-%x", uuid[:4], uuid[4:6], uuid[6:8], uuid[8:10], uuid[10:])

	// QEMU gives the digest an eighth of the time.
	if h.MasterKeyIterations, err = k.iterations(luksDigestSize, 8); err != nil {
		return nil, nil, err
	}
	digest, err := k.key(master, h.MasterKeySalt[:], h.MasterKeyIterations, luksDigestSize)
	if err != nil {
		return nil, nil, err
	}
	copy(h.MasterKeyDigest[:], digest)
	material, err := k.fillSlot(h, 0, o.Passphrase, master)
	if err != nil {
		return nil, nil, err
	}
	area = make([]byte, h.KeySlots[0].KeyOffset, h.KeySlots[0].KeyOffset+int64(len(material)))
	copy(area, h.appendTo(nil))
	c, err = newMasterCrypt(h, master)
	return c, append(area, material...), err
}

// keyMaker makes key slots.
type keyMaker struct {
	*keyDeriver
	random   io.Reader     // nil: crypto/rand
	iterTime time.Duration // 0: defaultIterTime
}

// read fills p with random bytes.
func (k *keyMaker) read(p []byte) error {
	random := k.random
	if random == nil {
		random = rand.Reader
	}
	if _, err := io.ReadFull(random, p); err != nil {
		return fmt.Errorf("qcow2: random bytes for keys: %w", err)
	}
	return nil
}

// fillSlot makes slot i of the header one of the passphrase, and returns its
// key material.
func (k *keyMaker) fillSlot(h *LUKSHeader, i int, passphrase, master []byte) ([]byte, error) {
	n := len(master)
	s := &h.KeySlots[i]
	split := make([]byte, roundUp(n*luksStripes, luksSector))
	for _, p := range [][]byte{s.Salt[:], split[:n*(luksStripes-1)]} {
		if err := k.read(p); err != nil {
			return nil, err
		}
	}
	var err error
	if s.Iterations, err = k.iterations(n, 1); err != nil {
		return nil, err
	}
	key, err := k.key(passphrase, s.Salt[:], s.Iterations, n)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	// The last stripe is what makes all of them together give the master key.
	subtle.XORBytes(split[n*(luksStripes-1):], mergeKey(k.hash, split[:n*luksStripes], n), master)
	c, err := newSectorCipher(h.CipherMode, key)
	if err != nil {
		return nil, err
	}
	if err := newCrypt(c, false).encrypt(split, 0, 0); err != nil {
		return nil, err
	}
	s.Active = true
	return split[:n*luksStripes], nil
}

// iterations returns how many make a key of n bytes in a part of the time that
// it shall take, which is measured. More than this package would open are
// refused.
func (k *keyMaker) iterations(n int, part float64) (uint32, error) {
	if k.rate == 0 {
		var err error
		if k.rate, err = k.measure(); err != nil {
			return 0, err
		}
	}
	t := k.iterTime
	if t == 0 {
		t = defaultIterTime
	}
	work := k.work(n, 1)
	iterations, limit := k.rate*t.Seconds()/part/float64(work), float64(maxKeyWork/2/work)
	if iterations > limit {
		return 0, optionError("PBKDF iterations %.0f larger than %.0f: Numerical result out of range", iterations, limit)
	}
	return uint32(max(minIterations, iterations)), nil
}

// measure returns how many hashes, counted as maxKeyWork, PBKDF2 makes in a
// second: the best of some short runs, as other programs can only slow it down.
func (d *keyDeriver) measure() (float64, error) {
	const run = 10 * time.Millisecond
	best, long := 0.0, 0
	for n := minIterations; long < 4 && n < math.MaxInt32/2; {
		start := time.Now()
		if _, err := pbkdf2.Key(d.hash, "passphrase", make([]byte, luksSaltSize), n, int(d.size)); err != nil {
			return 0, err
		}
		took := time.Since(start)
		if took < run {
			n *= 2
			continue
		}
		best = max(best, float64(n)/took.Seconds())
		long++
	}
	return best, nil
}

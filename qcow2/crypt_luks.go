package qcow2

import (
	"crypto/md5"
	"crypto/pbkdf2"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/subtle"
	"encoding/binary"
	"fmt"
	"hash"

	"golang.org/x/crypto/ripemd160" //lint:ignore SA1019 old LUKS headers name it
)

// newHash returns a hash by the name that LUKS headers have for it.
func newHash(name string) (func() hash.Hash, error) {
	switch name {
	case "md5":
		return md5.New, nil
	case "sha1":
		return sha1.New, nil
	case "sha224":
		return sha256.New224, nil
	case "sha256":
		return sha256.New, nil
	case "sha384":
		return sha512.New384, nil
	case "sha512":
		return sha512.New, nil
	case "ripemd160":
		return ripemd160.New, nil
	}
	return nil, fmt.Errorf("hash %q: %w", name, ErrUnsupported)
}

// keyDeriver derives keys from passphrases by PBKDF2 until the work set for it
// is used up.
type keyDeriver struct {
	hash func() hash.Hash
	size int64   // of a hash in bytes
	max  int64   // hashes, see maxKeyWork
	left int64   // of max
	rate float64 // hashes in a second, 0: not measured
}

func newKeyDeriver(hashSpec string, work int64) (*keyDeriver, error) {
	h, err := newHash(hashSpec)
	if err != nil {
		return nil, err
	}
	return &keyDeriver{hash: h, size: int64(h().Size()), max: work, left: work}, nil
}

// work returns what a key of n bytes takes, counted as maxKeyWork.
func (d *keyDeriver) work(n int, iterations uint32) int64 {
	return int64(iterations) * ((int64(n) + d.size - 1) / d.size)
}

func (d *keyDeriver) key(secret, salt []byte, iterations uint32, n int) ([]byte, error) {
	work := d.work(n, iterations)
	if work > d.left {
		return nil, fmt.Errorf("a key of %d bytes by %d iterations, after %d of %d hashes for the slots before: %w",
			n, iterations, d.max-d.left, d.max, ErrLimit)
	}
	d.left -= work
	return pbkdf2.Key(d.hash, string(secret), salt, int(iterations), n) // iterations <= maxKeyWork, an int
}

// newLUKSCrypt opens the first key slot of a LUKS header that the passphrase
// fits, as QEMU does, with so much work at most. read fills p from an offset
// behind the header's start.
func newLUKSCrypt(h *LUKSHeader, passphrase []byte, work int64, read func(p []byte, off int64) error) (*crypt, error) {
	if h.CipherName != "aes" {
		return nil, fmt.Errorf("cipher %q, expected aes: %w", h.CipherName, ErrUnsupported)
	}
	d, err := newKeyDeriver(h.HashSpec, work)
	if err != nil {
		return nil, err
	}
	// Nothing is derived for a cipher that is not known in the end.
	if _, err := newSectorCipher(h.CipherMode, make([]byte, h.MasterKeyLen)); err != nil {
		return nil, err
	}
	for i, s := range h.KeySlots {
		if !s.Active {
			continue
		}
		master, err := h.openSlot(d, &s, passphrase, read)
		if err != nil {
			return nil, fmt.Errorf("key slot %d: %w", i, err)
		}
		if master == nil {
			continue
		}
		return newMasterCrypt(h, master)
	}
	return nil, ErrPassphrase
}

// newMasterCrypt returns the encryption of an image by its master key.
func newMasterCrypt(h *LUKSHeader, master []byte) (*crypt, error) {
	s, err := newSectorCipher(h.CipherMode, master)
	if err != nil {
		return nil, err
	}
	c := newCrypt(s, false)
	c.master = master
	return c, nil
}

// openSlot returns the master key, nil if the passphrase is not that of the
// slot.
func (h *LUKSHeader) openSlot(d *keyDeriver, s *LUKSKeySlot, passphrase []byte, read func(p []byte, off int64) error) ([]byte, error) {
	n := int(h.MasterKeyLen) // at most maxLUKSKeySize
	key, err := d.key(passphrase, s.Salt[:], s.Iterations, n)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	slot, err := newSectorCipher(h.CipherMode, key)
	if err != nil {
		return nil, err
	}
	split := make([]byte, roundUp(n*luksStripes, luksSector))
	defer clear(split)
	if err := read(split[:n*luksStripes], s.KeyOffset); err != nil {
		return nil, err
	}
	if err := newCrypt(slot, false).decrypt(split, 0, 0); err != nil {
		return nil, err
	}
	master := mergeKey(d.hash, split[:n*luksStripes], n)
	digest, err := d.key(master, h.MasterKeySalt[:], h.MasterKeyIterations, luksDigestSize)
	if err != nil || subtle.ConstantTimeCompare(digest, h.MasterKeyDigest[:]) == 0 {
		clear(master)
		return nil, err
	}
	return master, nil
}

// roundUp rounds up to a multiple of a power of two.
func roundUp[N int | int64 | uint64](n, to N) N { return (n + to - 1) &^ (to - 1) }

// mergeKey undoes the anti-forensic split of a key of n bytes: all stripes go
// through the hash one after the other, and the last gives the key.
func mergeKey(h func() hash.Hash, split []byte, n int) []byte {
	key := make([]byte, n)
	diffuser := h()
	for len(split) > n {
		subtle.XORBytes(key, key, split[:n])
		diffuse(diffuser, key)
		split = split[n:]
	}
	subtle.XORBytes(key, key, split)
	return key
}

// diffuse replaces each part of b, of the size of a hash, by the hash of its
// number and itself.
func diffuse(h hash.Hash, b []byte) {
	var number [4]byte
	sum := make([]byte, 0, h.Size())
	for i := uint32(0); len(b) > 0; i++ {
		part := b[:min(len(b), h.Size())]
		binary.BigEndian.PutUint32(number[:], i)
		h.Reset()
		h.Write(number[:])
		h.Write(part)
		copy(part, h.Sum(sum))
		b = b[len(part):]
	}
}

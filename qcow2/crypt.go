package qcow2

import (
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"fmt"
	"hash"
	"math"
	"strings"
	"sync"

	"golang.org/x/crypto/xts"

	"qimg/qcow2/blockdev"
)

// crypt encrypts and decrypts the guest data of an image. It is safe for
// concurrent use.
type crypt struct {
	cipher sectorCipher
	// guest: sectors are numbered by their place in the guest, else by that in
	// the file (qcow2.txt, crypt_method; block/qcow2.h, crypt_physical_offset).
	guest   bool
	master  []byte    // the key, with LUKS
	buffers sync.Pool // of *[sectorSize]byte
}

func newCrypt(cipher sectorCipher, guest bool) *crypt {
	c := &crypt{cipher: cipher, guest: guest}
	c.buffers.New = func() any { return new([sectorSize]byte) }
	return c
}

// sectorCipher encrypts and decrypts one sector of 512 bytes in place.
type sectorCipher interface {
	encrypt(p []byte, sector uint64)
	decrypt(p []byte, sector uint64)
}

// decrypt decrypts whole sectors in place. guestOff is where p lies in the
// guest, hostOff where it lies in the data file.
func (c *crypt) decrypt(p []byte, guestOff, hostOff int64) error {
	return c.sectors(p, guestOff, hostOff, c.cipher.decrypt)
}

// encrypt is the reverse of decrypt.
func (c *crypt) encrypt(p []byte, guestOff, hostOff int64) error {
	return c.sectors(p, guestOff, hostOff, c.cipher.encrypt)
}

func (c *crypt) sectors(p []byte, guestOff, hostOff int64, f func([]byte, uint64)) error {
	if (int64(len(p))|guestOff|hostOff)&(sectorSize-1) != 0 {
		return fmt.Errorf("qcow2: encryption of %d bytes at guest offset %#x, host offset %#x: expected whole sectors", len(p), guestOff, hostOff)
	}
	off := hostOff
	if c.guest {
		off = guestOff
	}
	for sector := uint64(off) / sectorSize; len(p) > 0; sector++ {
		f(p[:sectorSize:sectorSize], sector)
		p = p[sectorSize:]
	}
	return nil
}

// newAESCrypt returns the legacy encryption: AES-128-CBC, whose key is the
// passphrase itself, cut or padded with zeroes.
func newAESCrypt(passphrase []byte) (*crypt, error) {
	var key [16]byte
	copy(key[:], passphrase)
	c, err := newSectorCipher("cbc-plain64", key[:])
	if err != nil {
		return nil, err
	}
	return newCrypt(c, true), nil
}

// newSectorCipher returns AES in a mode that is named as in LUKS headers: mode
// of the cipher, way of making initialization vectors, and the hash of essiv.
func newSectorCipher(spec string, key []byte) (sectorCipher, error) {
	mode, ivgen, ok := strings.Cut(spec, "-")
	if !ok {
		return nil, fmt.Errorf("cipher mode %q, expected one like xts-plain64: %w", spec, ErrUnsupported)
	}
	iv, err := newIVGenerator(ivgen, key)
	if err != nil {
		return nil, err
	}
	if mode == "xts" {
		return newXTS(iv, key)
	}
	block, err := newAES(key)
	if err != nil {
		return nil, err
	}
	switch mode {
	case "cbc":
		return newCBC(iv, block)
	case "ctr":
		return &ctrCipher{iv, block}, nil
	case "ecb":
		return ecbCipher{block}, nil
	}
	return nil, fmt.Errorf("cipher mode %q, expected xts, cbc, ctr or ecb: %w", mode, ErrUnsupported)
}

// newAES says which keys AES takes, as an error of this package.
func newAES(key []byte) (cipher.Block, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, fmt.Errorf("aes with a key of %d bytes: %w", len(key), ErrUnsupported)
	}
	return block, nil
}

// ivGenerator makes the initialization vector of a sector: its number in little
// endian, and with essiv that encrypted with a hash of the key.
type ivGenerator struct {
	mask  uint64       // of sector numbers
	essiv cipher.Block // nil without
}

func newIVGenerator(name string, key []byte) (ivGenerator, error) {
	name, hashName, hashed := strings.Cut(name, ":")
	switch name {
	case "plain": // the hash, if there is one, is not used
		return ivGenerator{math.MaxUint32, nil}, nil
	case "plain64":
		return ivGenerator{math.MaxUint64, nil}, nil
	case "essiv":
	default:
		return ivGenerator{}, fmt.Errorf("initialization vectors %q, expected plain, plain64 or essiv: %w", name, ErrUnsupported)
	}
	if !hashed {
		return ivGenerator{}, fmt.Errorf("initialization vectors essiv without a hash: %w", ErrUnsupported)
	}
	h, err := newHash(hashName)
	if err != nil {
		return ivGenerator{}, err
	}
	block, err := newAES(sum(h, key))
	if err != nil {
		return ivGenerator{}, fmt.Errorf("essiv:%s: %w", hashName, err)
	}
	return ivGenerator{math.MaxUint64, block}, nil
}

func sum(h func() hash.Hash, b []byte) []byte {
	x := h()
	x.Write(b)
	return x.Sum(nil)
}

// fill sets iv, of the size of an AES block.
func (g *ivGenerator) fill(iv []byte, sector uint64) {
	clear(iv)
	binary.LittleEndian.PutUint64(iv, sector&g.mask)
	if g.essiv != nil {
		g.essiv.Encrypt(iv, iv)
	}
}

// xtsCipher is AES-XTS.
type xtsCipher struct {
	cipher *xts.Cipher
	mask   uint64
}

func newXTS(iv ivGenerator, key []byte) (sectorCipher, error) {
	if len(key)%2 != 0 {
		return nil, fmt.Errorf("aes-xts with a key of %d bytes: %w", len(key), ErrUnsupported)
	}
	first := true
	c, err := xts.NewCipher(func(half []byte) (cipher.Block, error) {
		block, err := newAES(half)
		if err == nil && !first && iv.essiv != nil {
			return essivTweak{block, iv.essiv}, nil
		}
		first = false
		return block, err
	}, key)
	if err != nil {
		return nil, err
	}
	return &xtsCipher{c, iv.mask}, nil
}

func (c *xtsCipher) encrypt(p []byte, sector uint64) { c.cipher.Encrypt(p, p, sector&c.mask) }
func (c *xtsCipher) decrypt(p []byte, sector uint64) { c.cipher.Decrypt(p, p, sector&c.mask) }

// essivTweak is the second cipher of XTS, which gets the sector number as it
// is, with essiv before it.
type essivTweak struct {
	cipher.Block
	essiv cipher.Block
}

func (t essivTweak) Encrypt(dst, src []byte) {
	t.essiv.Encrypt(dst, src)
	t.Block.Encrypt(dst, dst)
}

// cbcCipher is AES-CBC.
type cbcCipher struct {
	iv     ivGenerator
	states sync.Pool // of *cbcState
}

// cbcState is what encrypts or decrypts sectors in one goroutine.
type cbcState struct {
	iv       [aes.BlockSize]byte
	enc, dec cbcMode
}

// cbcMode is what crypto/cipher returns for AES.
type cbcMode interface {
	cipher.BlockMode
	SetIV(iv []byte)
}

func newCBC(iv ivGenerator, block cipher.Block) (sectorCipher, error) {
	newState := func() (*cbcState, bool) {
		s := &cbcState{}
		var ok1, ok2 bool
		s.enc, ok1 = cipher.NewCBCEncrypter(block, s.iv[:]).(cbcMode)
		s.dec, ok2 = cipher.NewCBCDecrypter(block, s.iv[:]).(cbcMode)
		return s, ok1 && ok2
	}
	if _, ok := newState(); !ok {
		return nil, fmt.Errorf("aes-cbc without SetIV in crypto/cipher: %w", ErrUnsupported)
	}
	c := &cbcCipher{iv: iv}
	c.states.New = func() any { s, _ := newState(); return s }
	return c, nil
}

func (c *cbcCipher) encrypt(p []byte, sector uint64) {
	s := c.states.Get().(*cbcState)
	c.iv.fill(s.iv[:], sector)
	s.enc.SetIV(s.iv[:])
	s.enc.CryptBlocks(p, p)
	c.states.Put(s)
}

func (c *cbcCipher) decrypt(p []byte, sector uint64) {
	s := c.states.Get().(*cbcState)
	c.iv.fill(s.iv[:], sector)
	s.dec.SetIV(s.iv[:])
	s.dec.CryptBlocks(p, p)
	c.states.Put(s)
}

// ctrCipher is AES-CTR, which QEMU offers; nobody should use it for disks.
type ctrCipher struct {
	iv    ivGenerator
	block cipher.Block
}

func (c *ctrCipher) encrypt(p []byte, sector uint64) {
	var iv [aes.BlockSize]byte
	c.iv.fill(iv[:], sector)
	cipher.NewCTR(c.block, iv[:]).XORKeyStream(p, p)
}

func (c *ctrCipher) decrypt(p []byte, sector uint64) { c.encrypt(p, sector) }

// ecbCipher is AES-ECB, which QEMU offers; nobody should use it for disks.
type ecbCipher struct{ block cipher.Block }

func (c ecbCipher) encrypt(p []byte, _ uint64) {
	for ; len(p) > 0; p = p[aes.BlockSize:] {
		c.block.Encrypt(p, p)
	}
}

func (c ecbCipher) decrypt(p []byte, _ uint64) {
	for ; len(p) > 0; p = p[aes.BlockSize:] {
		c.block.Decrypt(p, p)
	}
}

// unlock sets im.crypt if the image is encrypted and the options give its
// passphrase. id is the secret that the name of the image gives.
func (im *Image) unlock(id string) error {
	secret := im.shared.opts.Secret
	if im.header.CryptMethod == CryptNone || secret == nil {
		return nil
	}
	r := SecretRequest{Depth: im.id, ID: id}
	if f, ok := im.dev.(*blockdev.File); ok {
		r.File = f.Name()
	}
	passphrase, err := secret(r)
	if err != nil || passphrase == nil {
		return err
	}
	if im.header.CryptMethod == CryptAES {
		im.crypt, err = newAESCrypt(passphrase)
		return err
	}
	h, _, err := im.LUKS()
	if err != nil {
		return err
	}
	if im.crypt, err = newLUKSCrypt(&h, passphrase, maxKeyWork, im.readCryptHeader); err != nil {
		x, _ := im.header.Crypto()
		return fmt.Errorf("qcow2: luks header at %#x: %w", x.Offset, err)
	}
	return nil
}

// readCryptHeader fills p from an offset in the encryption header, of a key
// slot of what LUKS returns.
func (im *Image) readCryptHeader(p []byte, off int64) error {
	x, _ := im.header.Crypto() // LUKS has checked that it is there
	if uint64(off+int64(len(p))) > x.Length {
		return fmt.Errorf("%d bytes at %#x, which the encryption header of %d bytes has not: %w", len(p), off, x.Length, ErrCorrupt)
	}
	return readFull(im.dev, p, int64(x.Offset)+off)
}

// readSectors fills p with decrypted data. off is its place in the guest, host
// that in the data file; both are the same distance from the start of a
// sector.
func (im *Image) readSectors(p []byte, off, host int64) error {
	var one *[sectorSize]byte // for what is not a whole sector
	for len(p) > 0 {
		skip := off & (sectorSize - 1)
		if n := int64(len(p)) &^ (sectorSize - 1); skip == 0 && n > 0 {
			if err := readFull(im.data, p[:n], host); err != nil {
				return err
			}
			if err := im.crypt.decrypt(p[:n], off, host); err != nil {
				return err
			}
			p, off, host = p[n:], off+n, host+n
			continue
		}
		if one == nil {
			one = im.crypt.buffers.Get().(*[sectorSize]byte)
			defer im.crypt.buffers.Put(one)
		}
		sector := one[:]
		if err := readFull(im.data, sector, host-skip); err != nil {
			return err
		}
		if err := im.crypt.decrypt(sector, off-skip, host-skip); err != nil {
			return err
		}
		n := int64(copy(p, sector[skip:]))
		p, off, host = p[n:], off+n, host+n
	}
	return nil
}

package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"time"

	"qimg/qcow2/blockdev"
)

// KeySlotOptions says how a key slot is changed. The zero value, and nil, mean:
// the first that is free, and nothing that could lock the image for ever.
type KeySlotOptions struct {
	// Slot is the number of a key slot. Nil: AddPassphrase takes the first that
	// is free, ErasePassphrase all that the passphrase opens.
	Slot *int
	// Force lets a slot be overwritten, and the last one be erased: nobody will
	// read the image again.
	Force bool
	// IterTime and Random are those of EncryptOptions, for AddPassphrase.
	IterTime time.Duration
	Random   io.Reader
}

// keySlots is the encryption header of an image whose key slots are changed.
type keySlots struct {
	im     *Image
	header LUKSHeader
	off    int64 // of the encryption header
	length int64 // its bytes
}

// AddPassphrase lets a LUKS image be opened with one more passphrase. The image
// has to be open for writing and unlocked. What is refused is an OptionError, in
// the words of qemu-img amend.
//
// Order: key material and the slot, marked as not in use; sync; the mark. A crash
// leaves the passphrases of before, with or without the new one. A slot that is
// overwritten is erased first; if no other is in use the new passphrase goes to
// a free one as well for as long.
func (im *Image) AddPassphrase(ctx context.Context, passphrase []byte, opts *KeySlotOptions) error {
	return im.changeKeySlots(opts, func(k *keySlots, o *KeySlotOptions) error {
		switch {
		case passphrase == nil:
			return OptionError("'new-secret' is required to activate a keyslot")
		case o.Slot != nil && (*o.Slot < 0 || *o.Slot >= luksKeySlots):
			return optionError("Invalid keyslot %d specified, must be between 0 and %d", *o.Slot, luksKeySlots-1)
		}
		free := k.find(false)
		slot := free
		if o.Slot != nil {
			slot = *o.Slot
		}
		switch {
		case slot < 0:
			return OptionError("Can't add a keyslot - all keyslots are in use")
		case k.header.KeySlots[slot].Active && !o.Force:
			return optionError("Refusing to overwrite active keyslot %d - please erase it first", slot)
		}
		d, err := newKeyDeriver(k.header.HashSpec, maxKeyWork)
		if err != nil {
			return err
		}
		maker := &keyMaker{d, o.Random, o.IterTime}
		spare := k.header.KeySlots[slot].Active && k.active() == 1
		if spare {
			if err := k.add(ctx, maker, free, passphrase); err != nil {
				return err
			}
		}
		if err := k.add(ctx, maker, slot, passphrase); err != nil || !spare {
			return err
		}
		return k.erase(maker, free)
	})
}

// ErasePassphrase makes key slots of a LUKS image useless: the one that the
// options name, which the passphrase has to fit unless it is nil, or all that
// the passphrase fits. The image has to be open for writing and unlocked. What is
// refused is an OptionError, in the words of qemu-img amend.
//
// Order: the mark that the slot is in use, sync, then the key material is
// overwritten, sync. What the storage below keeps of it is out of reach.
func (im *Image) ErasePassphrase(ctx context.Context, passphrase []byte, opts *KeySlotOptions) error {
	return im.changeKeySlots(opts, func(k *keySlots, o *KeySlotOptions) error {
		slots, err := k.toErase(ctx, passphrase, o)
		if err != nil {
			return err
		}
		for _, i := range slots {
			if err := k.erase(&keyMaker{random: o.Random}, i); err != nil {
				return err
			}
		}
		return nil
	})
}

// changeKeySlots runs a change of the key slots.
func (im *Image) changeKeySlots(opts *KeySlotOptions, change func(*keySlots, *KeySlotOptions) error) error {
	if opts == nil {
		opts = &KeySlotOptions{}
	}
	if im.w != nil {
		im.mu.Lock()
		defer im.mu.Unlock()
	}
	switch im.header.CryptMethod {
	case CryptNone:
		return OptionError("Can't amend encryption options - encryption not present")
	case CryptAES:
		return OptionError("Only LUKS encryption options can be amended")
	}
	if err := im.mayChange("change of key slots"); err != nil {
		return err
	}
	if err := im.readable(); err != nil {
		return err
	}
	h, _, err := im.LUKS()
	if err != nil {
		return err
	}
	if im.header.AutoclearFeatures&^(AutoclearBitmaps|AutoclearDataFileRaw) != 0 {
		if err := im.prepare(); err != nil {
			return im.fail(err)
		}
	}
	x, _ := im.header.Crypto() // LUKS has checked that it is there
	return change(&keySlots{im, h, int64(x.Offset), int64(x.Length)}, opts)
}

// find returns the first slot that is in use, or not; -1 if there is none.
func (k *keySlots) find(active bool) int {
	for i, s := range k.header.KeySlots {
		if s.Active == active {
			return i
		}
	}
	return -1
}

// active returns how many slots are in use.
func (k *keySlots) active() (n int) {
	for _, s := range k.header.KeySlots {
		if s.Active {
			n++
		}
	}
	return n
}

// fits tells whether a passphrase opens a slot.
func (k *keySlots) fits(d *keyDeriver, i int, passphrase []byte) (bool, error) {
	s := &k.header.KeySlots[i]
	if !s.Active {
		return false, nil
	}
	master, err := k.header.openSlot(d, s, passphrase, k.im.readCryptHeader)
	clear(master)
	return master != nil, err
}

func (k *keySlots) toErase(ctx context.Context, passphrase []byte, o *KeySlotOptions) ([]int, error) {
	d, err := newKeyDeriver(k.header.HashSpec, maxKeyWork)
	if err != nil {
		return nil, err
	}
	if o.Slot == nil {
		if passphrase == nil {
			return nil, OptionError("To erase keyslot(s), either explicit keyslot index or the password currently contained in them must be given")
		}
		var slots []int
		for i := range k.header.KeySlots {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			ok, err := k.fits(d, i, passphrase)
			if err != nil {
				return nil, err
			}
			if ok {
				slots = append(slots, i)
			}
		}
		switch {
		case len(slots) == 0:
			return nil, OptionError("No keyslots match given (old) password for erase operation")
		case len(slots) == k.active() && !o.Force:
			return nil, OptionError("All the active keyslots match the (old) password that was given and erasing them will erase all the data in the image irreversibly - refusing operation")
		}
		return slots, nil
	}
	i := *o.Slot
	if i < 0 || i >= luksKeySlots {
		return nil, optionError("Invalid keyslot %d specified, must be between 0 and %d", i, luksKeySlots-1)
	}
	if passphrase != nil {
		ok, err := k.fits(d, i, passphrase)
		if err != nil {
			return nil, err
		}
		if !ok {
			return nil, optionError("Given keyslot %d doesn't contain the given old password for erase operation", i)
		}
	}
	switch {
	case !o.Force && !k.header.KeySlots[i].Active:
		return nil, optionError("Given keyslot %d is already erased (inactive) ", i)
	case !o.Force && k.active() == 1:
		return nil, optionError("Attempt to erase the only active keyslot %d which will erase all the data in the image irreversibly - refusing operation", i)
	}
	return []int{i}, nil
}

// add makes slot i one of the passphrase.
func (k *keySlots) add(ctx context.Context, maker *keyMaker, i int, passphrase []byte) error {
	h := k.header
	material, err := maker.fillSlot(&h, i, passphrase, k.im.crypt.master)
	if err != nil {
		return err
	}
	if end := h.KeySlots[i].KeyOffset + int64(len(material)); end > k.length {
		return fmt.Errorf("qcow2: key slot %d ends at %#x, the encryption header has %d bytes: %w", i, end, k.length, ErrCorrupt)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if k.header.KeySlots[i].Active {
		if err := k.erase(maker, i); err != nil {
			return err
		}
	}
	h.KeySlots[i].Active = false
	if err := k.write(material, h.KeySlots[i].KeyOffset); err != nil {
		return err
	}
	if err := k.writeSlot(&h, i); err != nil {
		return err
	}
	return k.mark(i, true)
}

// erase makes slot i useless.
func (k *keySlots) erase(maker *keyMaker, i int) error {
	if err := k.mark(i, false); err != nil {
		return err
	}
	h := k.header
	s := &h.KeySlots[i]
	material := make([]byte, int64(h.MasterKeyLen)*luksStripes)
	if err := maker.read(material); err != nil {
		return err
	}
	if err := k.write(material, s.KeyOffset); err != nil {
		return err
	}
	s.Iterations, s.Salt = 0, [luksSaltSize]byte{}
	return k.writeSlot(&h, i)
}

// luksSlot is where slot i lies in a LUKS header.
func luksSlot(i int) int { return 208 + 48*i }

// mark says whether slot i is in use, in one sector.
func (k *keySlots) mark(i int, active bool) error {
	state := uint32(luksSlotDisabled)
	if active {
		state = luksSlotActive
	}
	if err := k.write(binary.BigEndian.AppendUint32(nil, state), int64(luksSlot(i))); err != nil {
		return err
	}
	k.header.KeySlots[i].Active = active
	return k.sync()
}

// writeSlot writes slot i of h, which is not in use.
func (k *keySlots) writeSlot(h *LUKSHeader, i int) error {
	at := luksSlot(i)
	b := bytes.Clone(h.appendTo(nil)[at : at+48])
	if err := k.write(b, int64(at)); err != nil {
		return err
	}
	k.header.KeySlots[i] = h.KeySlots[i]
	return k.sync()
}

// write writes at an offset in the encryption header.
func (k *keySlots) write(p []byte, off int64) error {
	if _, err := k.im.w.dev.WriteAt(p, k.off+off); err != nil {
		return k.im.fail(fmt.Errorf("qcow2: write encryption header: %w", err))
	}
	return nil
}

func (k *keySlots) sync() error { return k.im.fail(blockdev.Sync(k.im.w.dev)) }

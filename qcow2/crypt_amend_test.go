package qcow2_test

import (
	"bytes"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/blocktest"
	"qimg/qcow2/blockdev/oracle"
)

// opensWith tells whether an image opens with a passphrase.
func opensWith(t testing.TB, dev blockdev.Reader, passphrase string) bool {
	t.Helper()
	im, err := qcow2.New(dev, unlocked(passphrase))
	if errors.Is(err, qcow2.ErrPassphrase) {
		return false
	}
	if err != nil {
		t.Fatal(err)
	}
	im.Close()
	return true
}

// slotOptions are those of key slot i; below 0 none is named.
func slotOptions(i int, force bool) *qcow2.KeySlotOptions {
	o := &qcow2.KeySlotOptions{Force: force, IterTime: 1}
	if i >= 0 {
		o.Slot = &i
	}
	return o
}

// luksMemory is an empty image of 64 KiB with the passphrase "old", in slot 0.
func luksMemory(t testing.TB) *blockdev.Memory {
	t.Helper()
	dev := blockdev.NewMemory(0)
	if err := qcow2.Create(t.Context(), dev, 64<<10, &qcow2.CreateOptions{FormatOptions: qcow2.FormatOptions{
		Encrypt: qcow2.EncryptOptions{Method: qcow2.CryptLUKS, Passphrase: []byte("old"), IterTime: 1, CipherAlg: "aes-128"}}}); err != nil {
		t.Fatal(err)
	}
	return dev
}

func openUnlocked(t testing.TB, dev blockdev.Device, passphrase string) *qcow2.Image {
	t.Helper()
	opts := unlocked(passphrase)
	opts.Write = true
	im, err := qcow2.New(dev, opts)
	if err != nil {
		t.Fatal(err)
	}
	return im
}

// TestPassphrases adds and erases passphrases in turn with QEMU, which opens the
// image with each of them and finds the same data.
func TestPassphrases(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	path := filepath.Join(t.TempDir(), "a.qcow2")
	createEncrypted(t, path, 600<<10, qcow2.CryptLUKS, "one", qcow2.CreateOptions{})
	content := make([]byte, 600<<10)
	writtenByQEMU(t, path, "one", content)
	opts := unlocked("one")
	opts.Write = true
	im, err := qcow2.Open(path, opts)
	if err != nil {
		t.Fatal(err)
	}
	for i, slot := range map[string]int{"two": -1, "three": 6, "four": 7} {
		if err := im.AddPassphrase(t.Context(), []byte(i), slotOptions(slot, false)); err != nil {
			t.Fatal(err)
		}
	}
	if err := im.ErasePassphrase(t.Context(), []byte("one"), nil); err != nil {
		t.Fatal(err)
	}
	copy(content, "more")
	if _, err := im.WriteAt([]byte("more"), 0); err != nil {
		t.Fatal(err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{"two", "three", "four"} {
		if !bytes.Equal(rawCopy(t, path, p), content) || !bytes.Equal(readAll(t, path, p), content) {
			t.Errorf("passphrase %s: the data is not the same", p)
		}
	}
	r := oracle.Run(t, "qemu-img", append([]string{"map"}, secretArgs(path, "one")...)...)
	if _, err := qcow2.Open(path, unlocked("one")); !errors.Is(err, qcow2.ErrPassphrase) || r.Code == 0 {
		t.Errorf("the erased passphrase opens it: %v, %+v", err, r)
	}
}

// TestPassphraseErrors: what qemu-img says where it refuses.
func TestPassphraseErrors(t *testing.T) {
	im := openUnlocked(t, luksMemory(t), "old")
	defer im.Close()
	add := func(p string, slot int) error {
		return im.AddPassphrase(t.Context(), []byte(p), slotOptions(slot, false))
	}
	erase := func(p []byte, slot int) error { return im.ErasePassphrase(t.Context(), p, slotOptions(slot, false)) }
	is := func(err error, want string) {
		t.Helper()
		if x := qcow2.OptionError(""); !errors.As(err, &x) || err.Error() != want {
			t.Errorf("%v, expected %s", err, want)
		}
	}
	is(add("x", 0), "Refusing to overwrite active keyslot 0 - please erase it first")
	is(add("x", 8), "Invalid keyslot 8 specified, must be between 0 and 7")
	is(im.AddPassphrase(t.Context(), nil, nil), "'new-secret' is required to activate a keyslot")
	is(erase(nil, -1), "To erase keyslot(s), either explicit keyslot index or the password currently contained in them must be given")
	is(erase(nil, 0), "Attempt to erase the only active keyslot 0 which will erase all the data in the image irreversibly - refusing operation")
	is(erase(nil, 1), "Given keyslot 1 is already erased (inactive) ")
	is(erase(nil, 8), "Invalid keyslot 8 specified, must be between 0 and 7")
	is(erase([]byte("x"), 0), "Given keyslot 0 doesn't contain the given old password for erase operation")
	is(erase([]byte("x"), -1), "No keyslots match given (old) password for erase operation")
	is(erase([]byte("old"), -1), "All the active keyslots match the (old) password that was given and erasing them will erase all the data in the image irreversibly - refusing operation")
	for range 7 {
		if err := add("x", -1); err != nil {
			t.Fatal(err)
		}
	}
	is(add("x", -1), "Can't add a keyslot - all keyslots are in use")
	long := slotOptions(0, true)
	long.IterTime = 1e5 * time.Hour
	if err := im.AddPassphrase(t.Context(), []byte("x"), long); err == nil || !strings.HasPrefix(err.Error(), "PBKDF iterations") {
		t.Error(err)
	}

	locked, err := qcow2.New(luksMemory(t), &qcow2.OpenOptions{Write: true})
	if err != nil {
		t.Fatal(err)
	}
	defer locked.Close()
	if err := locked.AddPassphrase(t.Context(), []byte("x"), nil); !errors.Is(err, qcow2.ErrEncrypted) {
		t.Error(err)
	}
	reader, err := qcow2.New(luksMemory(t), unlocked("old"))
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	if err := reader.AddPassphrase(t.Context(), []byte("x"), nil); !errors.Is(err, blockdev.ErrReadOnly) {
		t.Error(err)
	}
	for m, want := range map[qcow2.CryptMethod]string{
		qcow2.CryptNone: "Can't amend encryption options - encryption not present",
		qcow2.CryptAES:  "Only LUKS encryption options can be amended",
	} {
		dev := blockdev.NewMemory(0)
		o := qcow2.EncryptOptions{Method: m}
		if m != qcow2.CryptNone {
			o.Passphrase = []byte("old")
		}
		if err := qcow2.Create(t.Context(), dev, 64<<10, &qcow2.CreateOptions{FormatOptions: qcow2.FormatOptions{Encrypt: o}}); err != nil {
			t.Fatal(err)
		}
		other := openUnlocked(t, dev, "old")
		is(other.ErasePassphrase(t.Context(), nil, nil), want)
		other.Close()
	}
}

// everySlotOpens fails the test if one of the passphrases does not open each key
// slot that is in use.
func everySlotOpens(t *testing.T, s blocktest.CrashState, passphrases ...string) {
	t.Helper()
	im, err := qcow2.New(s.Dev(), nil)
	if err != nil {
		t.Fatal(err)
	}
	h, _, err := im.LUKS()
	if err != nil {
		t.Fatal(err)
	}
	header := im.Header()
	x, _ := header.Crypto()
	for i := range h.KeySlots {
		if !h.KeySlots[i].Active {
			continue
		}
		dev := s.Dev().Clone()
		for j := range h.KeySlots {
			if j == i {
				continue
			}
			if _, err := dev.WriteAt([]byte{0, 0, 0xde, 0xad}, int64(x.Offset)+208+48*int64(j)); err != nil {
				t.Fatal(err)
			}
		}
		if !slices.ContainsFunc(passphrases, func(p string) bool { return opensWith(t, dev, p) }) {
			t.Fatalf("%v: key slot %d is in use, and no passphrase opens it", s, i)
		}
	}
}

// TestCrashPassphrases: whatever a crash leaves of a change, a passphrase of
// before or after opens the image.
func TestCrashPassphrases(t *testing.T) {
	two := luksMemory(t)
	im := openUnlocked(t, two, "old")
	if err := im.AddPassphrase(t.Context(), []byte("second"), slotOptions(6, false)); err != nil {
		t.Fatal(err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		dev    *blockdev.Memory
		change func(im *qcow2.Image) error
		always []string // passphrases that open every state
		either []string // one of them does
	}{
		"add": {luksMemory(t), func(im *qcow2.Image) error {
			return im.AddPassphrase(t.Context(), []byte("new"), slotOptions(-1, false))
		}, []string{"old"}, nil},
		"add across sectors": {luksMemory(t), func(im *qcow2.Image) error {
			return im.AddPassphrase(t.Context(), []byte("new"), slotOptions(6, false))
		}, []string{"old"}, nil},
		"erase": {two, func(im *qcow2.Image) error {
			return im.ErasePassphrase(t.Context(), []byte("second"), nil)
		}, []string{"old"}, nil},
		"overwrite the only one": {luksMemory(t), func(im *qcow2.Image) error {
			return im.AddPassphrase(t.Context(), []byte("new"), slotOptions(0, true))
		}, nil, []string{"old", "new"}},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := blocktest.NewRecorder(c.dev.Clone())
			if err != nil {
				t.Fatal(err)
			}
			im := openUnlocked(t, r, "old")
			if err := c.change(im); err != nil {
				t.Fatal(err)
			}
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			states := 0
			for s, err := range r.CrashStates(&blocktest.CrashOptions{Subsets: 32, Tears: 4}) {
				if err != nil {
					t.Fatal(err)
				}
				states++
				for _, p := range c.always {
					if !opensWith(t, s.Dev(), p) {
						t.Fatalf("%v: passphrase %s does not open it", s, p)
					}
				}
				everySlotOpens(t, s, "old", "new", "second")
				ok := len(c.either) == 0
				for _, p := range c.either {
					ok = ok || opensWith(t, s.Dev(), p)
				}
				if !ok {
					t.Fatalf("%v: no passphrase opens it", s)
				}
			}
			if states < 20 {
				t.Errorf("%d states only", states)
			}
			t.Log(states, "states")
		})
	}
}

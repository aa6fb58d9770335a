package qcow2_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"qimg/qcow2"
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

package qcow2_test

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"qimg/qcow2"
)

// infoWant is the part of qemu-img info --output=json that comes from the
// header and the tables.
type infoWant struct {
	Backing       string `json:"backing-filename"`
	BackingFormat string `json:"backing-filename-format"`
	ClusterSize   int64  `json:"cluster-size"`
	Dirty         bool   `json:"dirty-flag"`
	Encrypted     bool
	Size          int64 `json:"virtual-size"`
	Format        string
	Specific      struct {
		Data struct {
			Compat       string
			Compression  string `json:"compression-type"`
			Lazy         bool   `json:"lazy-refcounts"`
			RefcountBits int    `json:"refcount-bits"`
			Corrupt      bool
			ExtendedL2   bool   `json:"extended-l2"`
			DataFile     string `json:"data-file"`
			DataFileRaw  bool   `json:"data-file-raw"`
			Bitmaps      []struct {
				Flags       []string
				Granularity uint64
				Name        string
			}
			Encrypt json.RawMessage
		}
	} `json:"format-specific"`
}

func TestZooInfo(t *testing.T) {
	zoo(t, func(t *testing.T, path string, e expected) {
		var want infoWant
		b := e.Info
		if len(b) > 0 && b[0] == '[' {
			var list []json.RawMessage
			if err := json.Unmarshal(b, &list); err != nil {
				t.Fatal(err)
			}
			b = list[0]
		}
		if err := json.Unmarshal(b, &want); err != nil {
			t.Fatal(err)
		}
		im, err := qcow2.Open(path, &qcow2.OpenOptions{Backing: qcow2.BackingIgnore, ForceShare: true})
		if want.Format == "" { // refused
			if err == nil {
				t.Error("opened")
			}
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		defer im.Close()
		h := im.Header()
		var got infoWant
		got.Backing, got.BackingFormat = h.BackingFile, h.BackingFormat()
		got.ClusterSize, got.Size, got.Format = h.ClusterSize(), im.Size(), "qcow2"
		got.Dirty = h.IncompatibleFeatures&qcow2.IncompatDirty != 0
		got.Encrypted = h.CryptMethod != qcow2.CryptNone
		d := &got.Specific.Data
		d.Compat = map[uint32]string{2: "0.10", 3: "1.1"}[h.Version]
		d.Compression, d.RefcountBits = h.CompressionType.String(), 1<<h.RefcountOrder
		d.Lazy = h.CompatibleFeatures&qcow2.CompatLazyRefcounts != 0
		d.Corrupt = h.IncompatibleFeatures&qcow2.IncompatCorrupt != 0
		d.ExtendedL2 = h.IncompatibleFeatures&qcow2.IncompatExtendedL2 != 0
		d.DataFile = h.DataFile()
		d.DataFileRaw = h.AutoclearFeatures&qcow2.AutoclearDataFileRaw != 0
		bitmaps, err := im.Bitmaps()
		if err != nil {
			t.Error(err)
		}
		for _, b := range bitmaps {
			d.Bitmaps = append(d.Bitmaps, struct {
				Flags       []string
				Granularity uint64
				Name        string
			}{b.Flags.Names(), b.Granularity(), b.Name})
		}
		encrypt := want.Specific.Data.Encrypt
		want.Specific.Data.Encrypt = nil
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("info: -qemu-img +got:\n%s", d)
		}
		if h.CryptMethod == qcow2.CryptLUKS {
			compareLUKS(t, im, encrypt)
		}
	})
}

func compareLUKS(t *testing.T, im *qcow2.Image, raw json.RawMessage) {
	t.Helper()
	type slot struct {
		Active    bool
		Iters     uint32
		KeyOffset int64 `json:"key-offset"`
		Stripes   uint32
	}
	type encrypt struct {
		CipherMode string `json:"cipher-mode"`
		Hash       string `json:"hash-alg"`
		Iters      uint32 `json:"master-key-iters"`
		Payload    int64  `json:"payload-offset"`
		UUID       string
		Slots      []slot
	}
	var want, got encrypt
	if err := json.Unmarshal(raw, &want); err != nil {
		t.Fatal(err)
	}
	h, ok, err := im.LUKS()
	if err != nil || !ok {
		t.Fatal(ok, err)
	}
	mode, _, _ := strings.Cut(h.CipherMode, "-")
	got = encrypt{mode, h.HashSpec, h.MasterKeyIterations, h.PayloadOffset, h.UUID, nil}
	for _, s := range h.KeySlots {
		x := slot{s.Active, s.Iterations, s.KeyOffset, s.Stripes}
		if !s.Active {
			x.Iters, x.Stripes = 0, 0
		}
		got.Slots = append(got.Slots, x)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("luks: -qemu-img +got:\n%s", d)
	}
}

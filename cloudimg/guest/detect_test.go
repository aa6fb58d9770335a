package guest_test

import (
	"testing"

	"qimg/cloudimg/guest"
	"qimg/qcow2/blockdev"
)

// TestDetectShort: a magic number at the very end of a disk is none.
func TestDetectShort(t *testing.T) {
	for _, c := range []struct {
		off   int64
		magic string
	}{{0x8000, "\x01CD001"}, {0x10040, "_BHRfS_M"}, {0x438, "\x53\xef"}, {0, "XFSB"}, {0, "hsqs"}, {4086, "SWAPSPACE2"}, {0, "LUKS\xba\xbe"}, {0x1fe, "\x55\xaa"}, {0x218, "LVM2 001"}} {
		for size := c.off + int64(len(c.magic)); size < c.off+2048; size += 61 {
			dev := blockdev.NewMemory(size)
			if _, err := dev.WriteAt([]byte(c.magic), c.off); err != nil {
				t.Fatal(err)
			}
			if _, err := guest.Detect(dev); err != nil {
				t.Errorf("%q in %d bytes: %v", c.magic, size, err)
			}
		}
	}
}

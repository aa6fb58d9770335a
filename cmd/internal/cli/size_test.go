package cli_test

import (
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"qimg/qcow2/blockdev/oracle"
)

// TestSizes has qemu-img and qimg read the same sizes. Those that no image can
// have are told by the line that is printed before the image is made.
func TestSizes(t *testing.T) {
	oracle.Require(t, "qemu-img")
	t.Chdir(t.TempDir())
	for _, size := range []string{
		"0", "1", "511", "512", "513", "1000", "007", "+5k", " 5k", "5k ", "1 k", "-1", "--1", "-0",
		"1b", "1B", "1k", "1K", "1m", "1M", "1g", "1t", "1T", "1p", "1e0", "1E", "7E", "8E", "9e", "15E", "16E", "17E",
		"1.5", "1.0", "1.", "1.5b", "1.0b", "1.5k", "1.5G", "1.k", ".5k", "0.5k", "0.00048828125k", "0.0004k", "1.5e3", "1.5E", "1.5e",
		"1.9999999999999k", "0.123456789123456789G", "7.99999E",
		"0x", "0x10", "0X1f", "0x10k", "0x1.8k", "0xg", "0x1b", "08", "00x10",
		"9223372036854774784", "18446744073709551616",
		"99999999999999999999", "99999999999999999999k", "9999999999E", "9999999999Ex",
		"", " ", "k", "x", "1x", "1kb", "1KiB", "1,5k", "1..5k", "inf", "nan",
	} {
		for _, args := range [][]string{
			{"create", "-f", "qcow2", "-o", "cluster_size=2M", "x", "--", size},
			{"create", "-f", "qcow2", "-o", "cluster_size=2M,size=" + size, "x"},
		} {
			want := oracle.Run(t, "qemu-img", args...)
			os.Remove("x")
			got := run(t, args...)
			if strings.Contains(want.Stderr, "Could not resize") {
				// QEMU comes to that after it has taken a size above 2^63 for
				// a negative one.
				want.Stdout, want.Stderr, got.Stdout, got.Stderr = "", "", "", ""
			}
			if want.Code == 0 {
				want.Stderr = "" // a suffix on a hexadecimal number is deprecated
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%q: -qemu-img +qimg\n%s", args, diff)
			}
			os.Remove("x")
		}
	}
}

func TestHumanSizes(t *testing.T) {
	oracle.Require(t, "qemu-img")
	t.Chdir(t.TempDir())
	for _, size := range []int64{
		0, 512, 1024, 1536, 999 << 10, 1000 << 10, 1001 << 10, 1023 << 10, 1023590 &^ 511, 1 << 20, 1<<20 + 512, 1234567 &^ 511,
		999<<20 + 512<<10, 1000 << 20, 1 << 30, 3 << 29, 10 << 30, 12345678901 &^ 511, 1 << 40, 1<<40 - 512, 15 << 40,
	} {
		f, err := os.Create("x")
		if err != nil {
			t.Fatal(err)
		}
		if err := f.Truncate(size); err != nil {
			t.Fatal(err)
		}
		f.Close()
		same(t, "info", "-f", "raw", "x")
	}
}

package cli_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"qimg/qcow2/blockdev/oracle"
)

// TestMapZoo maps all images of the zoo that qemu-img can map.
func TestMapZoo(t *testing.T) {
	files := zoo(t)
	// qemu-img does not end on these.
	files = slices.DeleteFunc(files, func(f string) bool { return f == "chain-loop.qcow2" || f == "huge-1e-cs2m.qcow2" })
	failed := 0
	for _, file := range files {
		for _, args := range [][]string{{"map", file}, {"map", "-U", "--output=json", file}} {
			want, got := oracle.Run(t, "qemu-img", args...), run(t, args...)
			if want.Code != 0 {
				failed++
				if i := strings.Index(want.Stderr, "qemu-img: "); i > 0 {
					want.Stderr = want.Stderr[i:] // what the format driver says itself
				}
				want.Stderr, got.Stderr = firstPart(want.Stderr), firstPart(got.Stderr)
				if strings.Contains(want.Stderr, "Could not read file metadata: ") {
					want.Stderr, got.Stderr = want.Stderr[:38], got.Stderr[:38]
				}
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%q: -qemu-img +qimg\n%s", args, diff)
			}
		}
	}
	if failed < 20 && !oracle.SlowBuild {
		t.Errorf("%d maps failed, expected more", failed)
	}
}

// TestMapHuge maps a disk of 1 EiB, in time in proportion to its tables.
func TestMapHuge(t *testing.T) {
	zoo(t)
	const tail = `"present": true, "zero": false, "data": true, "offset": 33554432}]` + "\n"
	if got := mustRun(t, "map", "--output=json", "huge-1e-cs2m.qcow2"); strings.Count(got, "\n") != 5 || !strings.HasSuffix(got, tail) {
		t.Errorf("got\n%s", got)
	}
	if r := run(t, "map", "chain-loop.qcow2"); r.Code != 1 || !strings.Contains(r.Stderr, "loop") {
		t.Errorf("an image that is its own backing file: %+v", r)
	}
}

// TestMapEncrypted maps encrypted images with their passphrases.
func TestMapEncrypted(t *testing.T) {
	chain(t)
	oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=abc", "-o", "encrypt.format=aes,encrypt.key-secret=s", "aes", "1M")
	opts := "driver=qcow2,file.filename=aes,encrypt.key-secret=s"
	oracle.MustRun(t, "qemu-io", "--object", "secret,id=s,data=abc", "--image-opts", opts, "-c", "write 100k 100k")
	for _, output := range []string{"human", "json"} {
		same(t, "map", "--output", output, "--object", "secret,id=s,data=abc", "--image-opts", opts)
		same(t, "map", "--output", output, "--image-opts", opts)
		same(t, "map", "--output", output, "aes")
	}
}

// TestMap maps raw images with holes, backing chains, preallocated metadata,
// external data files and parts of disks.
func TestMap(t *testing.T) {
	chain(t)
	for _, line := range []string{
		"metadata meta", "metadata,cluster_size=512 meta512", "metadata,extended_l2=on metax", "falloc falloc", "full full",
		"metadata,data_file=d1 metad", "off,data_file=d2,data_file_raw=on metar",
	} {
		options, name, _ := strings.Cut(line, " ")
		oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation="+options, name, "3M")
		oracle.MustRun(t, "qemu-io", "-c", "write 100k 64k", "-c", "write 2M 1", "-c", "write -z 1M 64k", name)
	}
	oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "meta", "-F", "qcow2", "overmeta", "4M")
	for _, file := range []string{"tx", "hole", "odd", "ov", "./sub/o2", "sub/../sub/o2", "data", "meta", "meta512", "metax", "falloc", "full",
		"metad", "metar", "overmeta", "miss", "miss2", "badbase", "nope"} {
		same(t, "map", file)
		same(t, "map", "--output=json", file)
	}
	for _, line := range []string{"-s 5000", "-s 5000 -l 100", "-s 1G", "-l 0", "-l 70000", "-s x", "-l -1", "--max-length 1T --start-offset=8E",
		"--max-length 9223372036854775807 --start-offset=9223372036854775807", "--start-offset 0x10000 --max-length 1.5k"} {
		for _, output := range []string{"human", "json"} {
			for _, file := range []string{"hole", "sub/o2"} {
				same(t, append(strings.Fields(line), "--output", output, file)...)
				same(t, append([]string{"map"}, append(strings.Fields(line), "--output", output, file)...)...)
			}
		}
	}
	for _, line := range []string{"map", "map a b", "map --output=x a", "map -f raw a", "map -f qcow2 tx", "map -f foo a", "map -s", "map ."} {
		same(t, strings.Fields(line)...)
	}
}

// TestMapStreams maps a disk of many runs: all that is between two of them is
// told once.
func TestMapStreams(t *testing.T) {
	chain(t)
	oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "frag", "2M")
	var args []string
	for i := range 200 {
		args = append(args, "-c", fmt.Sprintf("write %d 512", i*5120), "-c", fmt.Sprintf("write -z %d 512", i*5120+2048))
	}
	oracle.MustRun(t, "qemu-io", append(args, "frag")...)
	same(t, "map", "frag")
	same(t, "map", "--output=json", "frag")
}

package main

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"qimg/qcow2/blockdev/oracle"
)

const exampleDir = "../../testdata/example"

// A module of its own converts an image by the packages, tells how far it is,
// and reads a range of the disk.
func TestLibraryExample(t *testing.T) {
	oracle.Require(t, "go", "qemu-img", "qemu-io")
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	oracle.MustRun(t, "go", "build", "-C", exampleDir, "-o", in("example"), ".")
	oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", in("base.qcow2"), "8M")
	oracle.MustRun(t, "qemu-io", "-c", "write -P 1 0 3M", "-c", "write -P 2 5M 64k", in("base.qcow2"))
	oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", in("base.qcow2"), "-F", "qcow2", in("top.qcow2"))
	oracle.MustRun(t, "qemu-io", "-c", "write -P 3 2M 1M", in("top.qcow2"))

	r := oracle.Run(t, in("example"), in("top.qcow2"), in("out.qcow2"), "0x1ffffe", "4")
	if r.Code != 0 || r.Stdout != "\x01\x01\x03\x03" {
		t.Errorf("%+v", r)
	}
	if want := regexp.MustCompile(`^(\d+ of 8388608 bytes\n)+$`); !want.MatchString(r.Stderr) || !strings.HasSuffix(r.Stderr, "\n8388608 of 8388608 bytes\n") {
		t.Errorf("progress: %q", r.Stderr)
	}
	oracle.MustRun(t, "qemu-img", "compare", in("top.qcow2"), in("out.qcow2"))
	oracle.MustRun(t, "qemu-img", "check", in("out.qcow2"))

	// What cannot be read to the end leaves the output as it was.
	oracle.MustRun(t, "qemu-img", "convert", "-c", "-O", "qcow2", in("top.qcow2"), in("bad.qcow2"))
	bad, err := os.OpenFile(in("bad.qcow2"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer bad.Close()
	if _, err := bad.WriteAt(bytes.Repeat([]byte{0xff}, 64), 5<<16); err != nil { // the first cluster of data
		t.Fatal(err)
	}
	before, err := os.ReadFile(in("out.qcow2"))
	if err != nil {
		t.Fatal(err)
	}
	if r := oracle.Run(t, in("example"), in("bad.qcow2"), in("out.qcow2"), "0", "1"); r.Code != 1 || r.Stdout != "" {
		t.Errorf("%+v", r)
	}
	if after, err := os.ReadFile(in("out.qcow2")); err != nil || !bytes.Equal(after, before) {
		t.Error("the output is not what it was", err)
	}
}

// README shows what is compiled.
func TestReadmeExample(t *testing.T) {
	program, err := os.ReadFile(filepath.Join(exampleDir, "main.go"))
	if err != nil {
		t.Fatal(err)
	}
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	convert := regexp.MustCompile(`(?ms)^func convert\(.*?^}\n`).FindString(string(program))
	shown := regexp.MustCompile(`(?m)^    func convert\((.*\n)+?    }\n`).FindString(string(readme))
	indented := "    " + strings.ReplaceAll(strings.TrimSuffix(strings.ReplaceAll(convert, "\t", "    "), "\n"), "\n", "\n    ") + "\n"
	if convert == "" || shown != indented {
		t.Errorf("README has\n%s\nthe example\n%s", shown, indented)
	}
}

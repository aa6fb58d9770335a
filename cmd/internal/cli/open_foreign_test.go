package cli_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"qimg/qcow2/blockdev/oracle"
)

// foreignImages makes a raw disk and the same in the formats that are only read,
// and returns their names and formats.
func foreignImages(t *testing.T) map[string]string {
	oracle.Require(t, "qemu-img")
	t.Chdir(t.TempDir())
	data := map[int64]string{0: "boot", 5<<20 + 100: strings.Repeat("data", 100_000), 9<<20 - 3: "end"}
	sparseFile(t, "raw", 9<<20, data)
	formats := map[string]string{}
	for _, v := range []string{
		"vmdk,subformat=monolithicSparse", "vmdk,subformat=streamOptimized", "vdi,static=off", "vdi,static=on",
		"vpc,subformat=dynamic", "vpc,subformat=fixed,force_size=on", "vpc,subformat=dynamic,force_size=on",
		"vhdx,subformat=dynamic", "vhdx,subformat=fixed",
	} {
		format, options, _ := strings.Cut(v, ",")
		name := strings.NewReplacer(",", "-", "=", "-").Replace(v)
		oracle.MustRun(t, "qemu-img", "convert", "-f", "raw", "-O", format, "-o", options, "raw", name)
		formats[name] = format
	}
	return formats
}

// TestForeign does with images of other formats what qemu-img does.
func TestForeign(t *testing.T) {
	for name, format := range foreignImages(t) {
		same(t, "info", name)
		same(t, "info", "--output=json", "-f", format, name)
		same(t, "info", "--output=json", "--image-opts", "driver="+format+",file.filename="+name)
		same(t, "info", "--image-opts", "driver="+format+",file.filename="+name+",foo=1")
		same(t, "info", fmt.Sprintf(`json:{"driver":"%s","file":{"filename":"%s"}}`, format, name))
		same(t, "snapshot", "-l", name)
		same(t, "compare", "-f", format, name, "raw")
		same(t, "compare", "-f", format, "-F", format, name, name)
		same(t, "resize", "-f", "raw", "nope", "1M")
		if format != "vhdx" { // of which qemu-img tells no extents
			same(t, "map", "--output=json", "-f", format, name)
			same(t, "map", "-f", format, name)
			same(t, "measure", "-O", "qcow2", "-f", format, name)
		}
		if format == "vpc" { // for the others qemu-img has checks
			same(t, "check", "-f", format, name)
		} else if r := run(t, "check", name); r.Code != 63 || !strings.Contains(r.Stderr, "This image format does not support checks") {
			t.Errorf("check %s: %d %s", name, r.Code, r.Stderr)
		}
		for _, target := range []string{"raw", "qcow2"} {
			mustRun(t, "convert", "-f", format, "-O", target, name, "out")
			oracle.MustRun(t, "qemu-img", "convert", "-f", format, "-O", target, name, "want")
			oracle.MustRun(t, "qemu-img", "compare", "-s", "-f", target, "-F", target, "want", "out")
		}
	}
}

// TestForeignRefused asks for what is not done with other formats.
func TestForeignRefused(t *testing.T) {
	oracle.Require(t, "qemu-img")
	t.Chdir(t.TempDir())
	sparseFile(t, "raw", 1<<20, map[int64]string{0: "x"})
	for _, format := range []string{"vmdk", "vdi", "vpc", "vhdx"} {
		oracle.MustRun(t, "qemu-img", "convert", "-f", "raw", "-O", format, "raw", format)
		oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", format, "-F", format, "above-"+format)
		before, err := os.ReadFile(format)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range []struct{ args, text string }{
			{"resize " + format + " 2M", "reads and does not write"},
			{"resize -f " + format + " " + format + " 2M", "reads and does not write"},
			{"commit above-" + format, `format "` + format + `": unsupported`},
			{"map above-" + format, `format "` + format + `": unsupported`},
			{"convert -O raw above-" + format + " out", `format "` + format + `": unsupported`},
			{"create -f qcow2 -b " + format + " -F " + format + " new", "reads backing files in qcow2 and raw"},
			{"map --image-opts driver=qcow2,file.filename=above-" + format + ",backing.driver=" + format, "reads backing files in qcow2 and raw"},
			{"rebase -b " + format + " -F " + format + " above-" + format, "unsupported"},
			{"convert -f raw -O " + format + " raw out", ""},
			{"amend -o compat=1.1 " + format, ""},
			{"bitmap --add " + format + " b", ""},
			{"snapshot -c s " + format, ""},
			{"dump " + format, ""},
		} {
			if r := run(t, strings.Fields(c.args)...); r.Code != 1 || !strings.Contains(r.Stderr, c.text) {
				t.Errorf("%s: exit %d, %s, want %q", c.args, r.Code, r.Stderr, c.text)
			}
		}
		if after, err := os.ReadFile(format); err != nil || !bytes.Equal(before, after) {
			t.Errorf("%s was changed: %v", format, err)
		}
		for _, name := range []string{"new", "out"} {
			if _, err := os.Stat(name); err == nil {
				t.Errorf("%s: %s was left behind", format, name)
			}
		}
		// As QEMU says it.
		if format != "vdi" { // which tells the signature in its own words
			same(t, "info", "-f", format, "above-"+format)
		}
	}
	sparseFile(t, "descriptor", 600, map[int64]string{0: "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\nRW 2048 FLAT \"raw\" 0\n"})
	if r := run(t, "info", "descriptor"); r.Code != 1 || !strings.Contains(r.Stderr, `createType "monolithicFlat": its data lies in other files`) {
		t.Errorf("descriptor: exit %d, %s", r.Code, r.Stderr)
	}
}

// TestCompressed reads raw disks that are compressed.
func TestCompressed(t *testing.T) {
	oracle.Require(t, "qemu-img")
	t.Chdir(t.TempDir())
	noise := make([]byte, 300_000)
	rand.NewChaCha8([32]byte{}).Read(noise)
	sparseFile(t, "raw", 5<<20+100, map[int64]string{1 << 20: string(noise), 5<<20 + 90: "end"})
	oracle.MustRun(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", "raw", "image")
	temp := t.TempDir()
	env := map[string]string{"TMPDIR": temp}
	for _, program := range []string{"gzip", "xz", "zstd", "bzip2"} {
		compress := func(from, to string) {
			b, err := exec.CommandContext(t.Context(), oracle.Path(t, program), "-q", "-c", from).Output()
			if err != nil {
				t.Fatal(err)
			}
			writeFile(t, to, string(b))
		}
		compress("raw", "raw.c")
		runs := func(code int, text string, args ...string) {
			t.Helper()
			r := runAs(t, t.Context(), env, append([]string{"qimg"}, args...)...)
			if r.Code != code || !strings.Contains(r.Stdout+r.Stderr, text) {
				t.Errorf("%s: %q: exit %d\n%s%s", program, args, r.Code, r.Stdout, r.Stderr)
			}
			if left, _ := filepath.Glob(filepath.Join(temp, "*")); len(left) > 0 {
				t.Errorf("%s: %q left %q", program, args, left)
			}
		}
		runs(0, "file format: "+program+"\nvirtual size: 5 MiB (5243392 bytes)", "info", "raw.c")
		runs(0, `"start": 0, "length": 1048576, "depth": 0, "present": true, "zero": true, "data": false}`, "map", "--output=json", "raw.c")
		runs(0, "Images are identical.", "compare", "-F", "raw", "raw.c", "raw")
		runs(0, "", "convert", "-O", "qcow2", "raw.c", "out")
		oracle.MustRun(t, "qemu-img", "compare", "-s", "image", "out")
		runs(0, "", "convert", "-f", program, "-O", "raw", "raw.c", "out")
		oracle.MustRun(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", "raw", "out")
		runs(0, "file format: raw", "info", "-f", "raw", "raw.c")
		runs(1, "does not write", "resize", "raw.c", "9M")
		option := "driver=" + program + ",file.filename=raw.c,max-size="
		runs(0, "virtual size", "info", "--image-opts", option+"6M")
		runs(1, "the content has more than 1048576 bytes: limit exceeded\nWith --image-opts driver="+program+",max-size=SIZE,file.filename=raw.c it can", "info", "--image-opts", option+"1M")
		runs(1, "expects a size from 1 on", "info", "--image-opts", option+"0")
		runs(1, "expects a non-negative number", "info", "--image-opts", option+"x")
		// What is within is not looked into.
		compress("image", "image.c")
		runs(1, "the content is in format qcow2", "convert", "-O", "raw", "image.c", "new")
		runs(0, "virtual size", "info", "-f", program, "image.c")
		b, err := os.ReadFile("raw.c")
		if err != nil {
			t.Fatal(err)
		}
		writeFile(t, "raw.c", string(b[:len(b)/2]))
		runs(1, "the end is missing", "convert", "-O", "raw", "raw.c", "new")
		if _, err := os.Stat("new"); err == nil {
			t.Errorf("%s: an output was left", program)
		}
	}
}

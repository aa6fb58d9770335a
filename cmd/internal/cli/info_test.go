package cli_test

import (
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"qimg/qcow2/blockdev/oracle"
)

func TestInfoZoo(t *testing.T) {
	files := zoo(t)
	for _, file := range files {
		for _, args := range [][]string{{"info", file}, {"info", "--output=json", file}, {"info", "--backing-chain", file}, {"info", "--output=json", "--backing-chain", file}} {
			want, got := oracle.Run(t, "qemu-img", args...), run(t, args...)
			if want.Code != 0 {
				// QEMU's words for a broken image are its own.
				want.Stderr, got.Stderr = firstPart(want.Stderr), firstPart(got.Stderr)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%q: -qemu-img +qimg\n%s", args, diff)
			}
		}
	}
}

// firstPart is an error up to what qemu-img says of the cause.
func firstPart(s string) string {
	if i := strings.Index(s, "': "); i >= 0 {
		return s[:i]
	}
	return s
}

func TestInfoMore(t *testing.T) {
	oracle.Require(t, "qemu-img")
	t.Chdir(t.TempDir())
	if err := os.Mkdir("sub", 0o777); err != nil {
		t.Fatal(err)
	}
	writeFile(t, "sub/raw", strings.Repeat("raw ", 300))
	writeFile(t, "empty", "")
	oracle.MustRun(t, "qemu-img", "create", "-f", "qcow2", "-b", "raw", "-F", "raw", "sub/o1")
	oracle.MustRun(t, "qemu-img", "create", "-f", "qcow2", "-b", "o1", "-F", "qcow2", "sub/o2 \"é\xff\x01")
	oracle.MustRun(t, "qemu-img", "create", "-f", "qcow2", "-b", "o1", "-F", "qcow2", "sub/o3")
	oracle.MustRun(t, "qemu-img", "snapshot", "-c", "é", "sub/o3")
	for _, file := range []string{"sub/raw", "empty", "sub/o1", "sub/o2 \"é\xff\x01", "sub/o3", "./sub/o3", "file:sub/o3",
		`json:{"driver":"qcow2","file":{"driver":"file","filename":"sub/o3"}}`} {
		same(t, "info", file)
		same(t, "info", "-U", "--backing-chain", file)
		same(t, "info", "--output=json", file)
		same(t, "info", "--output", "json", "--backing-chain", file)
		same(t, "info", "-f", "raw", file)
	}
}

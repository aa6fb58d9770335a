package cli_test

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"qimg/cmd/internal/cli"
	"qimg/qcow2/blockdev/oracle"
)

func TestMain(m *testing.M) {
	time.Local = time.UTC // as the oracles have it
	goleak.VerifyTestMain(m)
}

// run runs a command in-process under the name of qemu-img.
func run(t testing.TB, args ...string) oracle.Result {
	t.Helper()
	return runAs(t, t.Context(), nil, append([]string{"qemu-img"}, args...)...)
}

func runAs(t testing.TB, ctx context.Context, env map[string]string, args ...string) oracle.Result {
	t.Helper()
	var stdout, stderr bytes.Buffer
	code := cli.Run(ctx, args, cli.Host{Out: &stdout, Err: &stderr, Getenv: func(k string) string { return env[k] }})
	return oracle.Result{Stdout: stdout.String(), Stderr: stderr.String(), Code: code}
}

// mustRun is run for a command that has to succeed; it returns what it prints.
func mustRun(t testing.TB, args ...string) string {
	t.Helper()
	r := run(t, args...)
	if r.Code != 0 {
		t.Fatalf("%q: exit %d\n%s%s", args, r.Code, r.Stdout, r.Stderr)
	}
	return r.Stdout
}

// zoo changes to the folder of images made by QEMU and lists them, in a slow
// build some of them.
func zoo(t *testing.T) []string {
	t.Helper()
	oracle.Require(t, "qemu-img")
	t.Chdir(oracle.Input(t, "zoo"))
	files, err := filepath.Glob("*.qcow2")
	if err != nil || len(files) < 138 {
		t.Fatalf("%d images, %v", len(files), err)
	}
	if !oracle.SlowBuild {
		return files
	}
	var some []string
	for i := 0; i < len(files); i += 4 {
		some = append(some, files[i])
	}
	return some
}

// same compares what qimg and qemu-img do with the same arguments.
func same(t *testing.T, args ...string) {
	t.Helper()
	theirs := oracle.Run(t, "qemu-img", args...)
	// Where it makes a LUKS header, qemu-img measures its own speed, and gives up
	// when that fails: it is asked again.
	for range 20 {
		if !strings.HasSuffix(theirs.Stderr, "Unable to get accurate CPU usage\n") {
			break
		}
		theirs = oracle.Run(t, "qemu-img", args...)
	}
	if diff := cmp.Diff(theirs, run(t, args...)); diff != "" {
		t.Errorf("%q: -qemu-img +qimg\n%s", args, diff)
	}
}

// diskSize is the part of an output that depends on how a file came to be.
var diskSize = regexp.MustCompile(`(disk size: |"actual-size": ).*`)

func withoutDiskSize(r oracle.Result) oracle.Result {
	r.Stdout = diskSize.ReplaceAllString(r.Stdout, "$1")
	return r
}

func writeFile(t testing.TB, name, content string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(content), 0o666); err != nil {
		t.Fatal(err)
	}
}

func TestUsageErrors(t *testing.T) {
	oracle.Require(t, "qemu-img")
	t.Chdir(t.TempDir())
	writeFile(t, "text", strings.Repeat("text", 200))
	for _, line := range []string{
		"",
		"-Z",
		"foo",
		"create",
		"create -f",
		"create -fqcow2 -qZ x 1M",
		"create x 1M 2M",
		"create -f foo x 1M",
		"create foo:x 1M",
		"create -f qcow2 x",
		"create -f raw -b y x 1M",
		"create -f raw -F raw x 1M",
		"create -f qcow2 -b x -F raw x 1M",
		"create -f qcow2 -b nope -F qcow2 x",
		"create -f qcow2 -u -b nope x 1M",
		"create -f qcow2 -b text x 1M",
		"create -f qcow2 -F raw x 1M",
		"create -f qcow2 nope/x 1M",
		"create -f qcow2 -o foo x 1M",
		"create -f qcow2 -o ,,foo x 1M",
		"create -f qcow2 -o size=1M x 2M",
		"create -f qcow2 -o cluster_size=3000 x 1M",
		"create -f qcow2 -o cluster_size=0 x 1M",
		"create -f qcow2 -o cluster_size=x x 1M",
		"create -f qcow2 -o cluster_size=99999999999999999999 x 1M",
		"create -f qcow2 -o refcount_bits=3 x 1M",
		"create -f qcow2 -o refcount_bits=x x 1M",
		"create -f qcow2 -o refcount_bits=99999999999999999999 x 1M",
		"create -f qcow2 -o lazy_refcounts=maybe x 1M",
		"create -f qcow2 -o compat=0.9 x 1M",
		"create -f qcow2 -o compat=0.10,lazy_refcounts=on x 1M",
		"create -f qcow2 -o compat=0.10,extended_l2=on x 1M",
		"create -f qcow2 -o compat=0.10,refcount_bits=8 x 1M",
		"create -f qcow2 -o compat=0.10,compression_type=zstd x 1M",
		"create -f qcow2 -o compression_type=lzo x 1M",
		"create -f qcow2 -o preallocation=foo x 1M",
		"create -f raw -o preallocation=foo x 1M",
		"create -f qcow2 x 9P",
		"create -f qcow2 -o cluster_size=512 x 1T",
		"info",
		"info -f",
		"info --output",
		"info --bogus x",
		"info --output=xml x",
		"info nope",
		"info .",
		"info -f foo text",
		"info -f qcow2 text",
		"info text text",
	} {
		same(t, strings.Fields(line)...)
	}
	if files, _ := filepath.Glob("*"); len(files) != 1 {
		t.Errorf("files were left behind: %q", files)
	}
}

func TestProgramName(t *testing.T) {
	got := runAs(t, t.Context(), nil, "/usr/bin/qimg", "foo")
	want := oracle.Result{Stderr: "qimg: Command not found: foo\nTry 'qimg --help' for more information\n", Code: 1}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestOutputError(t *testing.T) {
	var stderr bytes.Buffer
	full := fullWriter{}
	if code := cli.Run(t.Context(), []string{"qimg", "--help"}, cli.Host{Out: full, Err: &stderr}); code != 1 {
		t.Errorf("exit %d, want 1: %s", code, stderr.String())
	}
}

type fullWriter struct{}

func (fullWriter) Write([]byte) (int, error) { return 0, os.ErrClosed }

package cli_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"qimg/cmd/internal/cli"
	"qimg/qcow2/blockdev/oracle"
)

// canceller cancels when something is written to it.
type canceller struct {
	bytes.Buffer
	cancel func()
}

func (c *canceller) Write(p []byte) (int, error) {
	c.cancel()
	return c.Buffer.Write(p)
}

// TestBuildInterrupted stops a build after its first progress: nothing is left
// behind and an older output is as it was.
func TestBuildInterrupted(t *testing.T) {
	t.Chdir(t.TempDir())
	if err := os.Mkdir("tree", 0o777); err != nil {
		t.Fatal(err)
	}
	for i := range 40 {
		writeFile(t, fmt.Sprintf("tree/%d", i), strings.Repeat(fmt.Sprintf("%08d", i*7919), 1<<17))
	}
	for _, args := range [][]string{{"new.qcow2"}, {"old.qcow2"}, {"new.raw"}, {"-c", "new.qcow2"}, {"-c", "--compression", "zstd", "old.qcow2"},
		{"--partition", "gpt", "new.raw"}, {"--partition", "mbr", "old.qcow2"}, {"--partition", "gpt", "-c", "new.qcow2"}} {
		writeFile(t, "old.qcow2", "what was there before")
		ctx, cancel := context.WithCancel(t.Context())
		stderr := &canceller{cancel: cancel}
		code := cli.Run(ctx, append([]string{"qimg", "build", "--progress=plain", "tree"}, args...),
			cli.Host{Out: io.Discard, Err: stderr, Getenv: func(string) string { return "" }})
		cancel()
		if code != 130 || !strings.HasSuffix(stderr.String(), "qimg: interrupted\n") {
			t.Errorf("%q: exit %d: %s", args, code, stderr.String())
		}
		if strings.Contains(stderr.String(), "100%") {
			t.Errorf("%q: the build came to its end: %s", args, stderr.String())
		}
		if b, err := os.ReadFile("old.qcow2"); err != nil || string(b) != "what was there before" {
			t.Errorf("%q: the older output: %q, %v", args, b, err)
		}
		files, err := os.ReadDir(".")
		if err != nil || len(files) != 2 {
			t.Errorf("%q: left behind: %v, %v", args, files, err)
		}
	}
}

// TestBuildChanged shortens a file while it is built: an error that names it,
// and no output, also where many workers wait for each other.
func TestBuildChanged(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(48))
	t.Chdir(t.TempDir())
	if err := os.Mkdir("tree", 0o777); err != nil {
		t.Fatal(err)
	}
	rng := rand.NewChaCha8([32]byte{1})
	data := make([]byte, 1<<20)
	for i := range 150 {
		rng.Read(data)
		writeFile(t, fmt.Sprintf("tree/%03d", i), string(data))
	}
	for _, args := range [][]string{{"x.raw"}, {"x.qcow2"}, {"-c", "x.qcow2"}, {"--partition", "gpt", "x.raw"}, {"--partition", "mbr", "-c", "x.qcow2"}} {
		writeFile(t, "tree/130", string(data))
		var once sync.Once
		stderr := &canceller{cancel: func() { once.Do(func() { os.Truncate("tree/130", 1000) }) }}
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second) // workers that wait forever are an error
		code := cli.Run(ctx, append([]string{"qimg", "build", "--progress=plain", "tree"}, args...),
			cli.Host{Out: io.Discard, Err: stderr, Getenv: func(string) string { return "" }})
		cancel()
		if code != 1 || !strings.Contains(stderr.String(), "130: ") || !strings.Contains(stderr.String(), "changed while it was read") {
			t.Errorf("%q: exit %d: %s", args, code, stderr.String())
		}
		if files, err := os.ReadDir("."); err != nil || len(files) != 1 {
			t.Errorf("%q: left behind: %v, %v", args, files, err)
		}
	}
}

// TestBuildLocked refuses to replace an image that a QEMU program has open.
func TestBuildLocked(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io")
	t.Chdir(t.TempDir())
	if err := os.Mkdir("tree", 0o777); err != nil {
		t.Fatal(err)
	}
	oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "data.qcow2", "1M")
	before, err := os.ReadFile("data.qcow2")
	if err != nil {
		t.Fatal(err)
	}
	holder := exec.CommandContext(t.Context(), "qemu-io", "-f", "qcow2", "data.qcow2")
	stdin, err := holder.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := holder.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	defer holder.Wait()
	defer stdin.Close()
	if _, err := io.ReadFull(stdout, make([]byte, len("qemu-io> "))); err != nil {
		t.Fatal(err)
	}
	const hint = "Is another process using the image [data.qcow2]?\n"
	for _, args := range [][]string{
		{"build", "tree", "data.qcow2"},
		{"create", "-q", "-f", "qcow2", "data.qcow2", "1M"},
		{"info", "data.qcow2"},
		{"check", "data.qcow2"},
	} {
		r := run(t, args...)
		if r.Code != 1 || !strings.Contains(r.Stderr, "lock\n"+hint) || r.Stdout != "" {
			t.Errorf("%q: %+v", args, r)
		}
	}
	same(t, "info", "data.qcow2")
	same(t, "check", "data.qcow2")
	same(t, "info", "-U", "data.qcow2")
	same(t, "check", "-U", "data.qcow2")
	if after, err := os.ReadFile("data.qcow2"); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the image was touched: %v", err)
	}
}

// TestBuildUnreadable names what cannot be read, or warns and leaves it out.
func TestBuildUnreadable(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Skip("root reads everything; .ci/run runs this as another user too")
	}
	t.Chdir(t.TempDir())
	if err := os.MkdirAll("tree/sub", 0o777); err != nil {
		t.Fatal(err)
	}
	writeFile(t, "tree/secret", "secret")
	writeFile(t, "tree/open", "open")
	if err := os.Chmod("tree/secret", 0); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod("tree/sub", 0); err != nil {
		t.Fatal(err)
	}
	defer os.Chmod("tree/sub", 0o777)
	r := run(t, "build", "tree", "data.raw")
	if r.Code != 1 || !strings.Contains(r.Stderr, "permission denied\nUse --skip-unreadable") {
		t.Errorf("%+v", r)
	}
	if _, err := os.Stat("data.raw"); err == nil {
		t.Error("an output was left behind")
	}
	r = run(t, "build", "--skip-unreadable", "tree", "data.raw")
	if r.Code != 0 || !strings.Contains(r.Stderr, "secret") || !strings.Contains(r.Stderr, "sub") {
		t.Errorf("%+v", r)
	}
}

// TestBuildIsExt4 builds as whoever runs the test, and has e2fsck judge.
func TestBuildIsExt4(t *testing.T) {
	oracle.Require(t, "e2fsck", "qemu-img", "debugfs")
	dir := t.TempDir()
	tree, err := filepath.Abs("../../../testdata/workload")
	if err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	mustRun(t, "build", "--owner", "1000:100", "--label", "a disk", tree, "data.qcow2")
	oracle.MustRun(t, "qemu-img", "convert", "-O", "raw", "data.qcow2", "data.raw")
	oracle.MustRun(t, "e2fsck", "-fn", "data.raw")
	stat := oracle.MustRun(t, "debugfs", "-R", "stat /run.sh", "data.raw")
	for _, want := range []string{"Mode:  0755", "User:  1000", "Group:   100"} {
		if !strings.Contains(stat, want) {
			t.Errorf("no %q in\n%s", want, stat)
		}
	}
}

// Package oracle runs the programs that nobody here wrote (qemu-img, qemu-io,
// e2fsck, debugfs, the kernel's mount) for tests to be judged by.
//
// Where a program is missing the test that needs it is skipped by name. With
// QIMG_REQUIRE_TOOLS=1, which CI sets, it fails instead: an oracle that is
// skipped unnoticed is no oracle.
package oracle

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// Require skips the test, or fails it under QIMG_REQUIRE_TOOLS=1, unless every
// named program is found.
func Require(t testing.TB, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := look(p); err != nil {
			Missing(t, "program "+p)
		}
	}
}

// Path returns where a program is, for a test that runs it itself. It requires
// the program.
func Path(t testing.TB, program string) string {
	t.Helper()
	Require(t, program)
	path, err := look(program)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// Missing ends the test because what is not there: it is skipped, or fails
// under QIMG_REQUIRE_TOOLS=1.
func Missing(t testing.TB, what string) {
	t.Helper()
	if os.Getenv("QIMG_REQUIRE_TOOLS") == "1" {
		t.Fatalf("%s is missing, and QIMG_REQUIRE_TOOLS=1", what)
	}
	t.Skipf("%s is missing", what)
}

// RequireRoot ends the test, as Missing does, unless it runs as root.
func RequireRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		Missing(t, "root, which a kernel mount needs,")
	}
}

// Tool returns the path of one of the shared test tools (make-qcow2-zoo,
// make-manysmall, ext4-fidelity, make-cloud-image), which lie in the folder
// that QIMG_TOOLS names or, without it, in ../shared/tools beside the module.
func Tool(t testing.TB, name string) string {
	t.Helper()
	dir := os.Getenv("QIMG_TOOLS")
	if dir == "" {
		dir = filepath.Join(moduleRoot(t), "..", "shared", "tools")
	}
	p := filepath.Join(dir, name)
	if _, err := os.Stat(p); err != nil {
		Missing(t, "shared tool "+name)
	}
	return p
}

// Input returns the path of one of the large test inputs (rootfs, manysmall,
// plain, zoo) that .ci/inputs makes once in the folder that QIMG_INPUTS names
// or, without it, qimg-inputs in the user's cache folder.
func Input(t testing.TB, name string) string {
	t.Helper()
	dir := os.Getenv("QIMG_INPUTS")
	if dir == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			Missing(t, "a cache folder for test inputs")
		}
		dir = filepath.Join(cache, "qimg-inputs")
	}
	p := filepath.Join(dir, name)
	if _, err := os.Stat(p); err != nil {
		Missing(t, "test input "+name+" (.ci/inputs makes it)")
	}
	return p
}

// Result is what a program did.
type Result struct {
	Stdout, Stderr string
	Code           int // exit status
}

// Run runs a program and returns what it did, whatever its exit status.
func Run(t testing.TB, program string, args ...string) Result {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), Path(t, program), args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "TZ=UTC")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s: %v", program, err)
	}
	return Result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// MustRun is Run for a program that has to succeed; it returns its standard
// output.
func MustRun(t testing.TB, program string, args ...string) string {
	t.Helper()
	r := Run(t, program, args...)
	if r.Code != 0 {
		t.Fatalf("%s %q: exit %d\n%s%s", program, args, r.Code, r.Stdout, r.Stderr)
	}
	return r.Stdout
}

// look finds a program in PATH or in the folders of the system
// administrator's programs, which the PATH of other users often lacks.
func look(program string) (string, error) {
	p, err := exec.LookPath(program)
	if err == nil {
		return p, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if p, e := exec.LookPath(filepath.Join(dir, program)); e == nil {
			return p, nil
		}
	}
	return "", err
}

func moduleRoot(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for d := dir; ; d = filepath.Dir(d) {
		if _, err := os.Stat(filepath.Join(d, "go.mod")); err == nil {
			return d
		}
		if d == filepath.Dir(d) {
			t.Fatalf("no go.mod above %s", dir)
		}
	}
}

//go:build unix

package cli_test

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"testing"
	"time"

	"qimg/cmd/internal/cli"
)

// stdioArgs is the variable that makes TestStdio the process that is looked at: its
// arguments.
const stdioArgs = "QIMG_TEST_STDIO"

// stdioProcess is a process with the arguments of a line, begun by a shell command
// that has "$0" "$1" in it.
func stdioProcess(t *testing.T, shell, line string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "sh", "-c", shell, os.Args[0], "-test.run=^TestStdio$")
	cmd.Env = append(os.Environ(), stdioArgs+"=qimg "+line)
	return cmd
}

// An image that is written to a closed standard output, or a full one, is an error.
func TestStdio(t *testing.T) {
	if args := os.Getenv(stdioArgs); args != "" {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
		context.AfterFunc(ctx, stop)
		os.Exit(cli.Run(ctx, strings.Fields(args), cli.Host{In: os.Stdin, Out: os.Stdout, Err: os.Stderr, Getenv: os.Getenv}))
	}
	t.Chdir(t.TempDir())
	randomFile(t, "disk", 1<<20)
	for _, c := range []struct {
		shell, line string
		code        int
		text        string
	}{
		{`"$0" "$1" >&-`, "convert -f raw -O raw disk -", 1, "standard output is closed"},
		{`"$0" "$1" >/dev/null`, "convert -f raw -O raw disk -", 0, ""},
		{`"$0" "$1" >/dev/full`, "convert -f raw -O raw disk -", 1, "No space left on device"},
		{`"$0" "$1" >/dev/full`, "info -f raw disk", 1, "no space left on device"},
		{`"$0" "$1" >/dev/full`, "map -f raw disk", 1, "no space left on device"},
		{`"$0" "$1" 1<>/dev/null`, "info -f raw disk", 0, ""}, // as programs have it that drop the text
		{`"$0" "$1" >disk.out`, "convert -f raw -O raw disk -", 0, ""},
	} {
		if _, err := os.Stat("/dev/full"); err != nil && strings.Contains(c.shell, "full") {
			continue
		}
		cmd := stdioProcess(t, c.shell, c.line)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		cmd.Run() // its exit is looked at
		if code := cmd.ProcessState.ExitCode(); code != c.code || !strings.Contains(stderr.String(), c.text) || c.code == 0 && stderr.Len() > 0 {
			t.Errorf("%s %s: exit %d, %q", c.line, c.shell, code, stderr.String())
		}
	}
}

// One signal ends a command that waits for the other end of a pipe.
func TestStdioInterrupt(t *testing.T) {
	t.Chdir(t.TempDir())
	disk := strings.Repeat(strings.Repeat("data", 1<<10)+strings.Repeat("\x00", 4<<10), 3<<10)
	writeFile(t, "disk", disk)
	sparse := map[int64]string{}
	for at := int64(0); at < 64<<20; at += 16 << 10 {
		sparse[at] = "data"
	}
	sparseFile(t, "holes", 64<<20, sparse)
	mustRun(t, "convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", "disk", "image")
	for _, name := range []string{"fifo", "fifo2"} {
		if err := syscall.Mkfifo(name, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct{ shell, line string }{
		{`exec "$0" "$1"`, "convert -f raw -O raw disk -"},
		{`exec "$0" "$1" 2>&1`, "convert -f raw -O raw disk -"},
		{`exec "$0" "$1"`, "map -f raw holes"},
		{`exec "$0" "$1"`, "map --output=json -f raw holes"},
		{`exec "$0" "$1" 2>&1`, "dump --what=all --output=json image"},
		{`exec "$0" "$1"`, "convert -f raw -O raw disk fifo"},
		{`exec "$0" "$1"`, "convert -f raw -O raw fifo out"},
		{`exec "$0" "$1" <>fifo2`, "convert -f raw -O raw - out"},
	} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		cmd := stdioProcess(t, c.shell, c.line)
		var stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = w, &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		w.Close()
		time.Sleep(300 * time.Millisecond) // it waits then
		start := time.Now()
		cmd.Process.Signal(os.Interrupt)
		kill := time.AfterFunc(5*time.Second, func() { cmd.Process.Kill() })
		cmd.Wait() // its exit is looked at
		kill.Stop()
		if code := cmd.ProcessState.ExitCode(); code != 130 || time.Since(start) > 4*time.Second ||
			!strings.Contains(c.shell, "2>&1") && stderr.String() != "qimg: interrupted\n" {
			t.Errorf("%s: exit %d after %v, %q", c.line, code, time.Since(start), stderr.String())
		}
		r.Close()
	}
}

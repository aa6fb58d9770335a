package qcow2_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/oracle"
)

// qemuOpener opens an image by a program of QEMU, which keeps it until the func
// is called. The error is what the program says when it cannot.
type qemuOpener struct {
	name  string
	write bool
	open  func(t *testing.T, path string) (release func(), err error)
}

// startQEMU starts a program that writes ready to its standard output once it
// has an image open.
func startQEMU(t *testing.T, ready, say, program string, args ...string) (func(), error) {
	t.Helper()
	cmd := exec.Command(oracle.Path(t, program), args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var done bool
	release := func() {
		if !done {
			done = true
			stdin.Close()
			cmd.Process.Kill()
			cmd.Wait()
		}
	}
	t.Cleanup(release)
	io.WriteString(stdin, say)
	for lines := bufio.NewScanner(stdout); lines.Scan(); {
		if strings.Contains(lines.Text(), ready) {
			go io.Copy(io.Discard, stdout)
			return release, nil
		}
	}
	cmd.Wait()
	done = true
	return nil, errors.New(stderr.String())
}

func qemuOpeners() []qemuOpener {
	qemuIO := func(args ...string) func(t *testing.T, path string) (func(), error) {
		return func(t *testing.T, path string) (func(), error) {
			return startQEMU(t, "MiB", "length\n", "qemu-io", append(args, "-f", "qcow2", path)...)
		}
	}
	machine := func(more ...string) func(t *testing.T, path string) (func(), error) {
		return func(t *testing.T, path string) (func(), error) {
			args := []string{"-accel", "tcg", "-m", "64", "-nodefaults", "-display", "none", "-qmp", "stdio",
				"-drive", "format=qcow2,if=none,id=d,file=" + path + more[0], "-device", "virtio-blk-pci,drive=d"}
			return startQEMU(t, `"return"`, `{"execute":"qmp_capabilities"}`, "qemu-system-x86_64", append(args, more[1:]...)...)
		}
	}
	nbd := func(args ...string) func(t *testing.T, path string) (func(), error) {
		return func(t *testing.T, path string) (func(), error) {
			dir := t.TempDir()
			// It is written when all is ready.
			ready := filepath.Join(dir, "pid")
			cmd := exec.Command(oracle.Path(t, "qemu-nbd"), append(args, "-t", "-f", "qcow2", "-k", filepath.Join(dir, "s"), "--pid-file", ready, path)...)
			var stderr strings.Builder
			cmd.Stderr = &stderr
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- cmd.Wait() }()
			var done bool
			release := func() {
				if !done {
					done = true
					cmd.Process.Kill()
					<-ended
				}
			}
			t.Cleanup(release)
			for range 1000 {
				select {
				case <-ended:
					done = true
					return nil, errors.New(stderr.String())
				case <-time.After(10 * time.Millisecond):
				}
				if _, err := os.Stat(ready); err == nil {
					return release, nil
				}
			}
			return nil, errors.New("qemu-nbd is not ready")
		}
	}
	return []qemuOpener{
		{"qemu-io", true, qemuIO()},
		{"qemu-io read-only", false, qemuIO("-r")},
		{"qemu-nbd", true, nbd()},
		{"qemu-nbd read-only", false, nbd("-r")},
		{"machine that waits", true, machine("", "-S")},
		{"machine that runs", true, machine("")},
		{"machine with snapshot=on", false, machine(",snapshot=on")},
	}
}

// lockedImages makes an image, and what else is locked with it: path is what
// QEMU opens, and locked what qimg opens.
func lockedImages(t *testing.T) map[string]func(t *testing.T) (path, locked string) {
	create := func(t *testing.T, path string, args ...string) {
		oracle.MustRun(t, "qemu-img", append(append([]string{"create", "-q", "-f", "qcow2"}, args...), path, "4M")...)
	}
	return map[string]func(t *testing.T) (path, locked string){
		"image": func(t *testing.T) (string, string) {
			path := filepath.Join(t.TempDir(), "i.qcow2")
			create(t, path)
			return path, path
		},
		"overlay": func(t *testing.T) (string, string) {
			path := filepath.Join(t.TempDir(), "i.qcow2")
			create(t, path+".base")
			create(t, path, "-b", path+".base", "-F", "qcow2")
			return path, path
		},
		"data file": func(t *testing.T) (string, string) {
			path := filepath.Join(t.TempDir(), "i.qcow2")
			create(t, path, "-o", "data_file="+path+".data")
			return path, path
		},
	}
}

// TestLocks opens images by QEMU's programs and by this package, in both
// orders: a writer goes with nobody but who shares by force, readers with each
// other.
func TestLocks(t *testing.T) {
	oracle.Require(t, "qemu-img", "qemu-io", "qemu-nbd", "qemu-system-x86_64")
	ours := []struct {
		name         string
		write, force bool
	}{{"read", false, false}, {"write", true, false}, {"force-share", false, true}}
	for kind, images := range lockedImages(t) {
		for i, theirs := range qemuOpeners() {
			if kind != "image" && i > 1 {
				continue // the same locks
			}
			t.Run(fmt.Sprintf("%s by %s", kind, theirs.name), func(t *testing.T) {
				path, locked := images(t)
				open := func(write, force bool) (*qcow2.Image, error) {
					return qcow2.Open(locked, &qcow2.OpenOptions{Write: write, ForceShare: force, Backing: qcow2.BackingFollow})
				}
				for _, o := range ours {
					good := o.force || !o.write && !theirs.write
					// QEMU first.
					release, err := theirs.open(t, path)
					if err != nil {
						t.Fatal(err)
					}
					im, err := open(o.write, o.force)
					if good != (err == nil) || !good && !errors.Is(err, blockdev.ErrLocked) {
						t.Errorf("%s while %s has it: %v", o.name, theirs.name, err)
					}
					if err == nil {
						im.Close()
					}
					release()
					// We first.
					if im, err = open(o.write, o.force); err != nil {
						t.Fatal(err)
					}
					if o.write {
						if _, err := im.WriteAt([]byte("ours"), 1<<20); err != nil {
							t.Error(err)
						}
					}
					release, err = theirs.open(t, path)
					if good != (err == nil) || !good && !strings.Contains(err.Error(), "lock") {
						t.Errorf("%s while we %s: %v", theirs.name, o.name, err)
					}
					if err == nil {
						release()
					}
					if err := im.Close(); err != nil {
						t.Error(err)
					}
				}
				// Both are gone.
				im, err := open(true, false)
				if err != nil {
					t.Fatal(err)
				}
				im.Close()
				release, err := theirs.open(t, path)
				if err != nil {
					t.Fatal(err)
				}
				release()
				oracle.MustRun(t, "qemu-img", "check", "-q", "-f", "qcow2", path)
			})
		}
	}
}

// TestLocksBelow: while an overlay is open, its backing file and a data file
// are locked too, against writers.
func TestLocksBelow(t *testing.T) {
	dir := t.TempDir()
	base, top := filepath.Join(dir, "base.qcow2"), filepath.Join(dir, "top.qcow2")
	data, withData := filepath.Join(dir, "data.raw"), filepath.Join(dir, "data.qcow2")
	oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", base, "4M")
	oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
	oracle.MustRun(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file="+data, withData, "4M")
	for _, c := range []struct {
		name, path, below, format string
	}{{"backing file", top, base, "qcow2"}, {"data file", withData, data, "raw"}} {
		t.Run(c.name, func(t *testing.T) {
			for _, write := range []bool{false, true} {
				im, err := qcow2.Open(c.path, &qcow2.OpenOptions{Write: write, Backing: qcow2.BackingFollow})
				if err != nil {
					t.Fatal(err)
				}
				if r := oracle.Run(t, "qemu-io", "-f", c.format, "-c", "write 0 512", c.below); r.Code == 0 || !strings.Contains(r.Stderr, "lock") {
					t.Errorf("write %v: qemu-io writes below: %+v", write, r)
				}
				// Any number of overlays share a backing file; a data file has
				// one image.
				r := oracle.Run(t, "qemu-io", "-r", "-f", c.format, "-c", "read 0 512", c.below)
				if c.format == "qcow2" && r.Code != 0 {
					t.Errorf("write %v: qemu-io cannot read below: %+v", write, r)
				}
				if err := im.Close(); err != nil {
					t.Error(err)
				}
			}
			// QEMU has it.
			release, err := startQEMU(t, "MiB", "length\n", "qemu-io", "-f", "qcow2", c.path)
			if err != nil {
				t.Fatal(err)
			}
			defer release()
			if f, err := blockdev.OpenFile(c.below, &blockdev.FileOptions{Write: true}); !errors.Is(err, blockdev.ErrLocked) {
				t.Errorf("writing below: %v", err)
				if err == nil {
					f.Close()
				}
			}
		})
	}
}

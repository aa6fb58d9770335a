package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
)

// openOptions says how an image is opened for a command that reads it.
type openOptions struct {
	format     string // "": found by the first bytes
	forceShare bool
	// chain opens the backing and data files too.
	chain bool
}

// image is an image that is open for reading.
type image struct {
	arg    string // as it was given
	name   string // its path
	format string
	file   *blockdev.File
	qcow2  *qcow2.Image // nil: raw
}

// openImage opens an image. Errors are in qemu-img's words where it has some.
func openImage(arg string, o *openOptions) (*image, error) {
	name, format, err := resolveName(arg)
	if err != nil {
		return nil, err
	}
	if o.format != "" {
		format = o.format
	}
	if format != "" && format != "raw" && format != "qcow2" {
		return nil, messagef("Unknown driver '%s'", format)
	}
	f, err := blockdev.OpenFile(name, &blockdev.FileOptions{ForceShare: o.forceShare})
	if err != nil {
		return nil, openError(name, err)
	}
	img := &image{arg: arg, name: name, format: format, file: f}
	if format == "" {
		if img.format, err = probe(f); err != nil {
			f.Close()
			return nil, err
		}
	}
	if img.format == "raw" {
		return img, nil
	}
	policy := qcow2.BackingIgnore
	if o.chain {
		policy = qcow2.BackingFollow
	}
	img.qcow2, err = qcow2.New(f, &qcow2.OpenOptions{ForceShare: o.forceShare, Backing: policy})
	if err != nil {
		f.Close()
		if errors.Is(err, qcow2.ErrFormat) {
			return nil, messagef("Image is not in qcow2 format")
		}
		return nil, err
	}
	return img, nil
}

func (img *image) close() {
	if img.qcow2 != nil {
		img.qcow2.Close()
	}
	img.file.Close()
}

// size returns the virtual size; that of a raw image is in whole sectors.
func (img *image) size() int64 {
	if img.qcow2 != nil {
		return img.qcow2.Size()
	}
	return (img.file.Size() + 511) &^ 511
}

// probe tells the format of a file by its first bytes. A format that qimg does
// not read is no raw disk either: its size would be taken for the disk's.
func probe(f *blockdev.File) (string, error) {
	format, err := qcow2.Probe(f)
	if err == nil && format != "raw" && format != "qcow2" {
		err = fmt.Errorf("it is in format %s; qimg reads qcow2 and raw (with -f raw it is taken byte by byte)", format)
	}
	return format, err
}

// couldNotOpen is the message of a command whose image cannot be opened.
func couldNotOpen(name string, err error) error {
	var cmd *cmdError
	if errors.As(err, &cmd) {
		return withHint(messagef("Could not open '%s': %w", name, cmd.err), cmd.hint)
	}
	return messagef("Could not open '%s': %w", name, err)
}

// openError puts an error of the file system in qemu-img's words.
func openError(name string, err error) error {
	var lock *blockdev.LockError
	var errno syscall.Errno
	if errors.As(err, &lock) {
		return withHint(errors.New(lock.Reason()), lockHint(name))
	}
	if info, e := os.Stat(name); e == nil && !info.Mode().IsRegular() && info.Mode()&os.ModeDevice == 0 {
		return fmt.Errorf("'file' driver requires '%s' to be a regular file", name)
	}
	if errors.As(err, &errno) {
		return messagef("Could not open '%s': %s", name, strerror(errno))
	}
	return err
}

func lockHint(name string) string {
	return fmt.Sprintf("Is another process using the image [%s]?\n", name)
}

// strerror is the text of C for an error number, which begins in upper case.
func strerror(errno syscall.Errno) string {
	s := errno.Error()
	return strings.ToUpper(s[:1]) + s[1:]
}

// resolveName returns the path that a name of an image means, and the format
// that it says, or "": a path, file:PATH, or QEMU's json: with a driver over a
// file.
func resolveName(name string) (path, format string, err error) {
	js, ok := strings.CutPrefix(name, "json:")
	if !ok {
		path, err = localPath(name)
		return path, "", err
	}
	var o struct {
		Driver   string
		Filename string
		File     struct{ Driver, Filename string }
		FileName string `json:"file.filename"`
	}
	if err := json.Unmarshal([]byte(js), &o); err != nil {
		return "", "", messagef("Could not parse the JSON options: %w", err)
	}
	if o.Driver == "file" {
		return o.Filename, "", nil
	}
	path = o.File.Filename
	if path == "" {
		path = o.FileName
	}
	if path == "" {
		return "", "", messagef("JSON options name no file: %s", js)
	}
	return path, o.Driver, nil
}

// combinePath is the path of a file that the image at base names.
func combinePath(base, name string) string {
	if _, ok := protocol(name); ok || isAbs(name) {
		return name
	}
	i := strings.LastIndexFunc(base, func(r rune) bool { return r < 0x80 && os.IsPathSeparator(uint8(r)) })
	return base[:i+1] + name
}

// isAbs reports whether QEMU takes a path for absolute.
func isAbs(path string) bool { return path != "" && os.IsPathSeparator(path[0]) }

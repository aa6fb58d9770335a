package cli

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"qimg/qcow2"
)

// snapshotStep is one change of the snapshots of an image.
type snapshotStep func(tx *qcow2.SnapshotTxn) error

// steps returns what is to be done to each image.
func (o *snapshotOptions) steps(ctx context.Context, host Host) ([]snapshotStep, error) {
	tag := o.action.tag
	switch o.action.letter {
	case 'c':
		return []snapshotStep{createStep(tag)}, nil
	case 'a':
		return []snapshotStep{applyStep(tag)}, nil
	case 'd':
		return []snapshotStep{deleteStep(tag)}, nil
	case 'f':
		return readSteps(host, tag)
	case 'i':
		return []snapshotStep{o.importStep(ctx, host)}, nil
	}
	return nil, nil
}

func createStep(tag string) snapshotStep {
	// qemu-img cuts a name that is too long.
	name := cut(tag, maxSnapshotName)
	return func(tx *qcow2.SnapshotTxn) error {
		_, err := tx.Create(name, &qcow2.SnapshotOptions{Date: now()})
		if err != nil {
			return createError(tag, err)
		}
		return nil
	}
}

// now is the time as qemu-img notes it, in microseconds.
func now() time.Time { return time.Now().Truncate(time.Microsecond) }

func applyStep(tag string) snapshotStep {
	return func(tx *qcow2.SnapshotTxn) error {
		if err := tx.Apply(tag); err != nil {
			return applyError(tag, err)
		}
		return nil
	}
}

func deleteStep(tag string) snapshotStep {
	return func(tx *qcow2.SnapshotTxn) error { return deleteError(tag, tx.Delete(tag)) }
}

func deleteIDStep(id string) snapshotStep {
	return func(tx *qcow2.SnapshotTxn) error { return deleteError(id, tx.DeleteID(id)) }
}

// readSteps reads --from.
func readSteps(host Host, path string) ([]snapshotStep, error) {
	in, err := openInput(host, path)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	name := path
	if path == "-" {
		name = "standard input"
	}
	var steps []snapshotStep
	lines := bufio.NewScanner(in)
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSuffix(lines.Text(), "\r")
		if line == "" {
			continue
		}
		word, tag, ok := strings.Cut(line, " ")
		kinds := map[string]func(string) snapshotStep{"create": createStep, "apply": applyStep, "delete": deleteStep, "delete-id": deleteIDStep}
		kind := kinds[word]
		if kind == nil || !ok {
			return nil, fmt.Errorf("%s:%d: expected create, apply, delete or delete-id, a blank and a snapshot, not '%s'", name, n, printable(line))
		}
		step := kind(tag)
		steps = append(steps, func(tx *qcow2.SnapshotTxn) error {
			if err := step(tx); err != nil {
				return prefixError(fmt.Sprintf("%s:%d", name, n), err)
			}
			return nil
		})
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return steps, nil
}

// openInput opens a file to be read, - being standard input.
func openInput(host Host, path string) (io.ReadCloser, error) {
	if path != "-" {
		f, err := os.Open(path)
		if errno := syscall.Errno(0); errors.As(err, &errno) {
			return nil, messagef("Could not open '%s': %s", path, strerror(errno))
		}
		return f, err
	}
	if host.In == nil {
		return io.NopCloser(strings.NewReader("")), nil
	}
	return io.NopCloser(host.In), nil
}

// importStep creates a snapshot from files.
func (o *snapshotOptions) importStep(ctx context.Context, host Host) snapshotStep {
	tag := o.action.tag
	return func(tx *qcow2.SnapshotTxn) (err error) {
		defer func() {
			if err != nil {
				err = prefixError(fmt.Sprintf("Could not import snapshot '%s'", tag), err)
			}
		}()
		if o.disk == "" && o.vmState == "" {
			return errors.New("there is neither --vmstate nor --disk")
		}
		// -loadvm takes the first of a name, and that id's disk before that name's.
		if slices.ContainsFunc(tx.Snapshots(), func(s qcow2.Snapshot) bool { return s.Name == tag || s.ID == tag }) {
			return errors.New("there is a snapshot of that name or id")
		}
		so := &qcow2.SnapshotOptions{Date: now(), ICount: qcow2.NoICount}
		if o.vmState != "" {
			in, err := openInput(host, o.vmState)
			if err != nil {
				return err
			}
			defer in.Close()
			if so.VMState, err = migrationStream(contextReader{ctx, in}); err != nil {
				return err
			}
		}
		if o.disk != "" {
			img, err := openImage(ctx, o.disk, &openOptions{chain: true, secrets: o.open.secrets, host: host})
			if err != nil {
				return couldNotOpen(o.disk, err)
			}
			defer img.close()
			so.Disk = img.reader()
		}
		_, err = tx.Create(tag, so)
		return err
	}
}

// migrationMagic is what a migration stream of QEMU begins with.
const migrationMagic = "QEVM"

// migrationStream checks how a vm state begins, and returns it.
func migrationStream(r io.Reader) (io.Reader, error) {
	head := make([]byte, len(migrationMagic))
	n, err := io.ReadFull(r, head)
	if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
		return nil, err
	}
	if string(head[:n]) != migrationMagic {
		return nil, fmt.Errorf("the vm state begins with %q, expected %q: it is no migration stream of QEMU", head[:n], migrationMagic)
	}
	return io.MultiReader(bytes.NewReader(head), r), nil
}

// contextReader stops reading once ctx is done.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (r contextReader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.r.Read(p)
}

// changeSnapshots does the steps to all images or to none.
func changeSnapshots(ctx context.Context, o *snapshotOptions, names []string, steps []snapshotStep) (err error) {
	o.open.write = true
	of := func(i int, err error) error {
		if err == nil || len(names) == 1 || ctx.Err() != nil {
			return err
		}
		return prefixError(names[i], err)
	}
	var images []*image
	for _, name := range names {
		img, openErr := openImage(ctx, name, &o.open)
		if openErr != nil {
			return couldNotOpen(name, openErr)
		}
		defer img.closeTo(&err)
		images = append(images, img)
	}
	var txns []*qcow2.SnapshotTxn
	defer func() { // before the images are closed
		for _, tx := range txns {
			tx.Abort()
		}
	}()
	for i, img := range images {
		if len(steps) == 0 {
			continue
		}
		if img.qcow2 == nil {
			return of(i, o.unsupported())
		}
		tx, err := img.qcow2.BeginSnapshots(ctx)
		if err != nil {
			return of(i, err)
		}
		txns = append(txns, tx)
		for _, step := range steps {
			if err := step(tx); err != nil {
				if ctx.Err() != nil {
					return ctx.Err()
				}
				return of(i, err)
			}
		}
		if err := tx.Prepare(); err != nil {
			return of(i, o.error(err))
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	for i, tx := range txns {
		if err := tx.Commit(); err != nil {
			if i > 0 {
				err = fmt.Errorf("%w (changed already: %s)", err, strings.Join(names[:i], ", "))
			}
			return of(i, o.error(err))
		}
	}
	return nil
}

// error puts an error that comes after the steps in the words of the action.
func (o *snapshotOptions) error(err error) error {
	switch o.action.letter {
	case 'c':
		return createError(o.action.tag, err)
	case 'a':
		return applyError(o.action.tag, err)
	case 'd':
		return deleteError(o.action.tag, err)
	}
	return err
}

// unsupported is the error of an image that has no snapshots.
func (o *snapshotOptions) unsupported() error {
	switch o.action.letter {
	case 'a':
		return messagef("Could not apply snapshot '%s': Block driver does not support snapshots", o.action.tag)
	case 'd':
		return deleteError(o.action.tag, qcow2.ErrNotFound)
	case 'c':
		return createError(o.action.tag, qcow2.ErrUnsupported)
	}
	return messagef("Block driver does not support snapshots")
}

// errnoOf is the number of C, and its text, that QEMU has for an error; 0 if it
// has none.
func errnoOf(err error) (int, string) {
	var errno syscall.Errno
	switch {
	case errors.As(err, &errno):
		return int(errno), strerror(errno)
	case errors.Is(err, qcow2.ErrNotFound):
		return 2, "No such file or directory"
	case errors.Is(err, qcow2.ErrSnapshots):
		return 27, "File too large"
	case errors.Is(err, qcow2.ErrUnsupported):
		return 95, "Operation not supported"
	case errors.Is(err, qcow2.ErrLimit):
		return 22, "Invalid argument"
	}
	return 0, ""
}

func createError(tag string, err error) error {
	if n, text := errnoOf(err); n != 0 {
		return messagef("Could not create snapshot '%s': %d (%s)", tag, -n, text)
	}
	return messagef("Could not create snapshot '%s': %w", tag, err)
}

func applyError(tag string, err error) error {
	if errors.Is(err, qcow2.ErrBitmaps) {
		return messagef("Could not apply snapshot '%s': Device has active dirty bitmaps", tag)
	}
	if n, text := errnoOf(err); n != 0 {
		return messagef("Could not apply snapshot '%s': Failed to load snapshot: %s", tag, text)
	}
	return messagef("Could not apply snapshot '%s': Failed to load snapshot: %w", tag, err)
}

func deleteError(tag string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, qcow2.ErrNotFound):
		return messagef("Could not delete snapshot '%s': snapshot not found", tag)
	}
	return messagef("Could not delete snapshot '%s': %w", tag, err)
}

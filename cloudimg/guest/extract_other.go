//go:build !linux

package guest

import (
	"errors"
	"os"
)

// attributes gives a file its permissions and times. Owners and extended
// attributes get lost.
func (x *Extractor) attributes(f, _ *os.File, name string, n *Node) error {
	if x.opts.Archive {
		x.lost[lostOwner] = true
	}
	if n.Type() == ModeSymlink {
		return nil
	}
	d := x.dirs[len(x.dirs)-1]
	if err := d.root.Chmod(name, os.FileMode(x.permissions(n, false))); err != nil {
		return err
	}
	if n.Mtime.IsZero() {
		return nil
	}
	atime := n.Atime
	if atime.IsZero() {
		atime = n.Mtime
	}
	return d.root.Chtimes(name, atime, n.Mtime)
}

// special makes a fifo or a device.
func (x *Extractor) special(*extractDir, string, *Node) error {
	return errors.ErrUnsupported
}

package blockdev

import (
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxStack bounds how deep devices lie on each other.
const maxStack = 16

// stack returns the places where the bytes of a file lie: in itself, and for a block
// device in what it lies on, as far as sysfs tells.
func stack(info fs.FileInfo) []place {
	list := []place{{info, 0, math.MaxInt64}}
	for len(list) < maxStack {
		p, ok := list[len(list)-1].below()
		if !ok {
			break
		}
		list = append(list, p)
	}
	return list
}

// below returns what a block device lies on.
func (p place) below() (place, bool) {
	st, ok := p.info.Sys().(*syscall.Stat_t)
	if !ok || p.info.Mode()&(fs.ModeDevice|fs.ModeCharDevice) != fs.ModeDevice {
		return p, false
	}
	// The folder of the device; that of a partition lies in that of its disk.
	dir, err := filepath.EvalSymlinks(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(uint64(st.Rdev)), unix.Minor(uint64(st.Rdev))))
	if err != nil {
		return p, false
	}
	const sector = 512 // of sysfs, whatever the device has
	end := min(p.end, attribute(dir, "size", sector))
	if path, err := os.ReadFile(filepath.Join(dir, "loop", "backing_file")); err == nil {
		info, err := os.Stat(strings.TrimSuffix(string(path), "\n"))
		off := attribute(dir, "loop/offset", 1)
		return place{info, off + p.off, off + end}, err == nil
	}
	if _, err := os.Stat(filepath.Join(dir, "partition")); err != nil {
		return p, false
	}
	disk, err := os.ReadFile(filepath.Join(dir, "..", "dev"))
	if err != nil {
		return p, false
	}
	var major, minor uint32
	if _, err := fmt.Sscanf(string(disk), "%d:%d", &major, &minor); err != nil {
		return p, false
	}
	off := attribute(dir, "start", sector)
	return place{device{p.info, &syscall.Stat_t{Rdev: unix.Mkdev(major, minor)}}, off + p.off, off + end}, true
}

// attribute reads a number of a device, in units of so many bytes; 0 where there is
// none, or one that cannot be.
func attribute(dir, name string, unit int64) int64 {
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return 0
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	if err != nil || n < 0 || n > math.MaxInt64/4/unit {
		return 0
	}
	return n * unit
}

// device is a block device of which only the number is known.
type device struct {
	fs.FileInfo // of a block device
	st          *syscall.Stat_t
}

func (d device) Sys() any { return d.st }

package guest

import (
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"slices"
	"strconv"
	"strings"
)

// Machine is what a disk tells of the operating system on it. What is not told
// is empty.
type Machine struct {
	Volume    *Volume // that of the root directory
	ID        string  // ID of os-release: debian, ubuntu, fedora
	Name      string  // PRETTY_NAME, or NAME
	Version   string  // VERSION_ID
	Codename  string  // VERSION_CODENAME
	Arch      string  // of the shell, as Go and Debian name it: amd64, arm64
	Hostname  string
	MachineID string // 32 hexadecimal digits
	Kernels   []Kernel
}

// Kernel is a kernel that a boot loader can load.
type Kernel struct {
	Version string // what follows "vmlinuz-" in the name
	Volume  *Volume
	Path    string
}

// Caps of what is read of a guest's files.
const (
	maxSmallFile = 64 << 10
	maxKernels   = 256
)

// Machine looks for an operating system; nil if there is none, or several.
func (d *Disk) Machine(ctx context.Context) (*Machine, error) {
	var m *Machine
	for i := range d.Volumes {
		v := &d.Volumes[i]
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if d.isRoot(v) {
			if m != nil {
				return nil, nil
			}
			m = &Machine{Volume: v}
		}
	}
	if m == nil {
		return nil, nil
	}
	fsys, err := d.FS(m.Volume, nil)
	if err != nil {
		return nil, err
	}
	text, err := osRelease(fsys)
	if err != nil {
		return nil, err
	}
	m.parseRelease(text)
	line := func(path string) string {
		b, err := ReadFile(fsys, path, maxSmallFile)
		if err != nil {
			return ""
		}
		first, _, _ := strings.Cut(string(b), "\n")
		return strings.TrimSpace(first)
	}
	m.Hostname = line("/etc/hostname")
	if id := line("/etc/machine-id"); len(id) == 32 {
		m.MachineID = id
	}
	m.Arch = arch(fsys)
	for i := range d.Volumes {
		d.kernels(m, &d.Volumes[i])
	}
	slices.SortFunc(m.Kernels, func(a, b Kernel) int { return compareVersions(b.Version, a.Version) })
	return m, nil
}

// osRelease returns the file that names the operating system.
func osRelease(fsys FS) (string, error) {
	b, err := ReadFile(fsys, "/etc/os-release", maxSmallFile)
	if err != nil {
		b, err = ReadFile(fsys, "/usr/lib/os-release", maxSmallFile)
	}
	return string(b), err
}

// errTooLarge is the error of a file that is larger than what is asked for can
// be.
var errTooLarge = errors.New("the file is too large")

// ReadFile reads a regular file of at most limit bytes.
func ReadFile(fsys FS, path string, limit int64) ([]byte, error) {
	f, err := fsys.Lookup(path, true)
	if err != nil {
		return nil, err
	}
	if f.Type() != ModeRegular {
		return nil, errors.New("not a regular file")
	}
	c, err := fsys.Content(f)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if c.Size() > limit {
		return nil, errTooLarge
	}
	b := make([]byte, c.Size())
	return b, readFull(c, b, 0)
}

// parseRelease reads os-release (systemd, os-release(5)).
func (m *Machine) parseRelease(text string) {
	for line := range strings.SplitSeq(text, "\n") {
		key, value, ok := strings.Cut(strings.TrimSpace(line), "=")
		if !ok {
			continue
		}
		value = unquote(value)
		switch key {
		case "ID":
			m.ID = value
		case "PRETTY_NAME":
			m.Name = value
		case "NAME":
			if m.Name == "" {
				m.Name = value
			}
		case "VERSION_ID":
			m.Version = value
		case "VERSION_CODENAME":
			m.Codename = value
		}
	}
}

// unquote takes the quotes of a shell off a value.
func unquote(s string) string {
	if len(s) < 2 || s[0] != s[len(s)-1] || s[0] != '"' && s[0] != '\'' {
		return s
	}
	if s[0] == '\'' {
		return s[1 : len(s)-1]
	}
	return strings.NewReplacer(`\"`, `"`, `\$`, "$", `\\`, `\`, "\\`", "`").Replace(s[1 : len(s)-1])
}

// arch is the processor that the programs of a system are for.
func arch(fsys FS) string {
	for _, path := range []string{"/bin/sh", "/usr/bin/env", "/usr/lib/systemd/systemd", "/sbin/init"} {
		f, err := fsys.Lookup(path, true)
		if err != nil || f.Type() != ModeRegular {
			continue
		}
		c, err := fsys.Content(f)
		if err != nil {
			continue
		}
		b := make([]byte, 20)
		err = readFull(c, b, 0)
		c.Close()
		if err != nil || string(b[:4]) != elf.ELFMAG {
			continue
		}
		var order binary.ByteOrder = binary.LittleEndian
		if elf.Data(b[elf.EI_DATA]) == elf.ELFDATA2MSB {
			order = binary.BigEndian
		}
		machine := elf.Machine(order.Uint16(b[18:]))
		if name := archNames[machine]; name != "" {
			if machine == elf.EM_PPC64 && order == binary.LittleEndian {
				name += "le"
			}
			return name
		}
		return strings.ToLower(strings.TrimPrefix(machine.String(), "EM_"))
	}
	return ""
}

var archNames = map[elf.Machine]string{
	elf.EM_X86_64: "amd64", elf.EM_386: "386", elf.EM_AARCH64: "arm64", elf.EM_ARM: "arm",
	elf.EM_RISCV: "riscv64", elf.EM_PPC64: "ppc64", elf.EM_S390: "s390x", elf.EM_LOONGARCH: "loong64",
}

// kernels adds the kernels in /boot of a volume, or in the root directory of
// one that is mounted there.
func (d *Disk) kernels(m *Machine, v *Volume) {
	if !v.readable() {
		return
	}
	fsys, err := d.FS(v, nil)
	if err != nil {
		return
	}
	dirs := []string{"/boot"}
	if v != m.Volume {
		dirs = append(dirs, "/")
	}
	for _, path := range dirs {
		dir, err := fsys.Lookup(path, true)
		if err != nil || !dir.IsDir() {
			continue
		}
		for e, err := range fsys.Entries(dir) {
			version, ok := strings.CutPrefix(e.Name, "vmlinuz-")
			if err != nil || !ok || e.Type != 0 && e.Type != ModeRegular {
				continue
			}
			if len(m.Kernels) == maxKernels {
				return
			}
			m.Kernels = append(m.Kernels, Kernel{version, v, strings.TrimSuffix(path, "/") + "/" + e.Name})
		}
	}
}

// compareVersions compares names with numbers in them.
func compareVersions(a, b string) int {
	for a != "" && b != "" {
		na, nb := digits(a), digits(b)
		if na > 0 && nb > 0 {
			x, errX := strconv.ParseUint(a[:na], 10, 64)
			y, errY := strconv.ParseUint(b[:nb], 10, 64)
			if errX == nil && errY == nil && x != y {
				if x < y {
					return -1
				}
				return 1
			}
			a, b = a[na:], b[nb:]
			continue
		}
		if a[0] != b[0] {
			return int(a[0]) - int(b[0])
		}
		a, b = a[1:], b[1:]
	}
	return len(a) - len(b)
}

// digits is how many digits a text begins with.
func digits(s string) int {
	return len(s) - len(strings.TrimLeft(s, "0123456789"))
}

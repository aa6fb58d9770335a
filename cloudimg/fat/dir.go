package fat

import (
	"encoding/binary"
	"time"
	"unicode/utf16"
)

// Attributes of an entry.
const (
	attrLabel   = 0x08
	attrDir     = 0x10
	attrArchive = 0x20
	attrLong    = 0x0f
)

func utf16Of(name string) []uint16 { return utf16.Encode([]rune(name)) }

// encodeDir returns the entries of a directory.
func (v *Volume) encodeDir(dir *node) []byte {
	b := make([]byte, 0, v.dirSize(dir))
	if dir.parent == nil {
		if v.hasLabel() {
			b = appendEntry(b, v.label, attrLabel, dir, 0, 0)
		}
	} else {
		parent := dir.parent.cluster
		if dir.parent.parent == nil {
			parent = 0 // the root, also of a FAT32
		}
		b = appendEntry(b, join83(".", ""), attrDir, dir, dir.cluster, 0)
		b = appendEntry(b, join83("..", ""), attrDir, dir.parent, parent, 0)
	}
	for _, n := range dir.entries {
		if !n.whole {
			b = appendLong(b, n.name, n.short)
		}
		attr := byte(attrArchive)
		if n.dir {
			attr = attrDir
		}
		b = appendEntry(b, n.short, attr, n, n.cluster, n.size)
	}
	return b
}

// appendEntry appends an entry of 32 bytes, with the times of n.
func appendEntry(b []byte, short [11]byte, attr byte, n *node, cluster, size int64) []byte {
	le := binary.LittleEndian
	b = append(b, short[:]...)
	b = append(b, attr, 0, 0)
	b = le.AppendUint16(b, n.clock) // created
	b = le.AppendUint16(b, n.date)
	b = le.AppendUint16(b, n.date) // accessed
	b = le.AppendUint16(b, uint16(cluster>>16))
	b = le.AppendUint16(b, n.clock) // written
	b = le.AppendUint16(b, n.date)
	b = le.AppendUint16(b, uint16(cluster))
	return le.AppendUint32(b, uint32(size))
}

// dosTime returns the two halves of a time that scanner.time has limited.
func dosTime(t time.Time) (date, clock uint16) {
	date = uint16((t.Year()-1980)<<9 | int(t.Month())<<5 | t.Day())
	clock = uint16(t.Hour()<<11 | t.Minute()<<5 | t.Second()/2)
	return date, clock
}

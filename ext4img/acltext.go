package ext4img

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// aclEntry is an entry of an ACL. id is for aclUser and aclGroup.
type aclEntry struct {
	tag, perm uint16
	id        uint32
}

// parseACL reads an ACL in text form: entries "user:NAME:rwx", separated by
// commas or lines, maybe with a number behind them (acl(5); star(1) adds the
// number of the user or group). A name without a number is one of what names
// knows. The ACL of which a mode says all is none.
func parseACL(text string, names func(tag uint16, name string) (uint32, bool)) ([]aclEntry, error) {
	var list []aclEntry
	for line := range strings.FieldsFuncSeq(text, func(r rune) bool { return r == ',' || r == '\n' }) {
		line, _, _ = strings.Cut(line, "#")
		line = strings.TrimSpace(line)
		if line == "" {
			continue
		}
		f := strings.Split(line, ":")
		if len(f) < 3 || len(f) > 4 {
			return nil, fmt.Errorf("ACL entry %q: expected TYPE:NAME:PERMISSIONS", line)
		}
		var e aclEntry
		switch f[0] {
		case "user", "u":
			e.tag = aclUserObj
		case "group", "g":
			e.tag = aclGroupObj
		case "mask", "m":
			e.tag = aclMask
		case "other", "o":
			e.tag = aclOther
		default:
			return nil, fmt.Errorf("ACL entry %q: its type is not known", line)
		}
		if f[1] != "" {
			switch e.tag {
			case aclUserObj:
				e.tag = aclUser
			case aclGroupObj:
				e.tag = aclGroup
			default:
				return nil, fmt.Errorf("ACL entry %q: a name that it cannot have", line)
			}
			number := f[1]
			if len(f) == 4 {
				number = f[3]
			}
			id, err := strconv.ParseUint(number, 10, 32)
			e.id = uint32(id)
			if err != nil {
				var ok bool
				if e.id, ok = names(e.tag, f[1]); !ok {
					return nil, fmt.Errorf("ACL entry %q: there is no number for the name", line)
				}
			}
		}
		for _, c := range f[2] {
			switch c {
			case 'r':
				e.perm |= 4
			case 'w':
				e.perm |= 2
			case 'x':
				e.perm |= 1
			case '-':
			default:
				return nil, fmt.Errorf("ACL entry %q: %q is no permission", line, c)
			}
		}
		list = append(list, e)
	}
	slices.SortFunc(list, func(a, b aclEntry) int {
		return cmp.Or(cmp.Compare(a.tag, b.tag), cmp.Compare(a.id, b.id))
	})
	for i := 1; i < len(list); i++ {
		if a, b := list[i-1], list[i]; a.tag == b.tag && a.id == b.id {
			return nil, fmt.Errorf("an ACL with two entries for the same: %q", text)
		}
	}
	return list, nil
}

// encodeACL makes the xattr that programs see of an ACL.
func encodeACL(list []aclEntry) string {
	b := binary.LittleEndian.AppendUint32(nil, aclVersionXattr)
	for _, e := range list {
		if e.tag != aclUser && e.tag != aclGroup {
			e.id = none
		}
		b = binary.LittleEndian.AppendUint16(b, e.tag)
		b = binary.LittleEndian.AppendUint16(b, e.perm)
		b = binary.LittleEndian.AppendUint32(b, e.id)
	}
	return string(b)
}

// checkACL returns an error for an ACL that the kernel would not take: each of
// owner, group and others once, and a mask where it is needed.
func checkACL(list []aclEntry) error {
	count := make(map[uint16]int)
	for _, e := range list {
		count[e.tag]++
	}
	named := count[aclUser] + count[aclGroup]
	if count[aclUserObj] != 1 || count[aclGroupObj] != 1 || count[aclOther] != 1 || count[aclMask] > 1 || named > 0 && count[aclMask] != 1 {
		return errACL
	}
	return nil
}

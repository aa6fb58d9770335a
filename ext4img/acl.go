package ext4img

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// ext4 keeps POSIX ACLs in a form of its own: version 1, and no id in the
// entries that need none. The xattr that programs see is version 2 with an id
// in every entry (kernel: fs/ext4/acl.c, include/uapi/linux/posix_acl_xattr.h).
const (
	aclVersionXattr = 2
	aclVersionExt4  = 1

	aclUserObj  = 0x01
	aclUser     = 0x02
	aclGroupObj = 0x04
	aclGroup    = 0x08
	aclMask     = 0x10
	aclOther    = 0x20
)

var errACL = errors.New("malformed POSIX ACL")

// aclToExt4 turns the xattr form of an ACL into ext4's. Permissions outside
// mask, which is of the form of a mode, are dropped, as they are from the
// mode, and ids are mapped as opts say.
func aclToExt4(value string, mask uint16, opts *ScanOptions) (string, error) {
	b := []byte(value)
	if len(b) < 4 || len(b)%8 != 4 || binary.LittleEndian.Uint32(b) != aclVersionXattr {
		return "", errACL
	}
	out := binary.LittleEndian.AppendUint32(nil, aclVersionExt4)
	for b = b[4:]; len(b) > 0; b = b[8:] {
		tag, perm := binary.LittleEndian.Uint16(b), binary.LittleEndian.Uint16(b[2:])
		switch tag {
		case aclUserObj:
			perm &= mask >> 6
		case aclOther:
			perm &= mask
		default:
			perm &= mask >> 3
		}
		out = binary.LittleEndian.AppendUint16(out, tag)
		out = binary.LittleEndian.AppendUint16(out, perm)
		if tag == aclUser || tag == aclGroup {
			maps := opts.UIDMap
			if tag == aclGroup {
				maps = opts.GIDMap
			}
			id := binary.LittleEndian.Uint32(b[4:])
			to, ok := mapID(maps, id)
			if !ok {
				return "", fmt.Errorf("the id %d of the ACL %w", id, errUnmapped)
			}
			out = binary.LittleEndian.AppendUint32(out, to)
		}
	}
	return string(out), nil
}

// aclFromExt4 is the reverse of aclToExt4.
func aclFromExt4(value string) (string, error) {
	b := []byte(value)
	if len(b) < 4 || binary.LittleEndian.Uint32(b) != aclVersionExt4 {
		return "", corruptACL()
	}
	out := binary.LittleEndian.AppendUint32(nil, aclVersionXattr)
	for b = b[4:]; len(b) > 0; {
		if len(b) < 4 {
			return "", corruptACL()
		}
		out = append(out, b[:4]...)
		tag := binary.LittleEndian.Uint16(b)
		b = b[4:]
		if tag != aclUser && tag != aclGroup {
			out = binary.LittleEndian.AppendUint32(out, ^uint32(0))
			continue
		}
		if len(b) < 4 {
			return "", corruptACL()
		}
		out = append(out, b[:4]...)
		b = b[4:]
	}
	return string(out), nil
}

func corruptACL() error { return fmt.Errorf("%w: %w", errACL, ErrCorrupt) }

package parttable

import (
	"encoding/hex"
	"fmt"
	"iter"
	"slices"
	"strconv"
	"strings"
)

// GUID is a GUID in the order of its text.
type GUID [16]byte

// ParseGUID reads the usual form, in either case, with or without hyphens.
func ParseGUID(s string) (GUID, error) {
	var g GUID
	b, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
	if err != nil || len(b) != len(g) {
		return g, fmt.Errorf("guid %q: expected 32 hexadecimal digits, as in 0fc63daf-8483-4772-8e79-3d69d8477de4", s)
	}
	copy(g[:], b)
	return g, nil
}

func (g GUID) String() string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", g[:4], g[4:6], g[6:8], g[8:10], g[10:])
}

// guidFromDisk reads a GUID as GPT stores it: the first three fields are in
// little-endian order.
func guidFromDisk(b []byte) (g GUID) {
	copy(g[:], b)
	slices.Reverse(g[:4])
	slices.Reverse(g[4:6])
	slices.Reverse(g[6:8])
	return g
}

// Type is the type of a partition: GUID is that of a GPT, Byte that of an MBR.
type Type struct {
	GUID GUID
	Byte byte
}

func (t Type) String() string {
	if t.GUID != (GUID{}) {
		return t.GUID.String()
	}
	return fmt.Sprintf("0x%02x", t.Byte)
}

// Name returns the name that ParseType takes, or "" if the type has none.
func (t Type) Name() string {
	for _, k := range knownTypes() {
		if t.GUID != (GUID{}) && t.GUID.String() == k.guid || t.GUID == (GUID{}) && t.Byte != 0 && t.Byte == k.mbr {
			return k.name
		}
	}
	return ""
}

// ParseType reads a type of a kind of table: one of TypeNames, or a GUID for GPT
// and a byte in hexadecimal digits for MBR.
func ParseType(kind Kind, s string) (Type, error) {
	var t Type
	for _, k := range knownTypes() {
		if k.name != strings.ToLower(s) {
			continue
		}
		if kind == MBR {
			if k.mbr == 0 {
				return t, fmt.Errorf("partition type '%s' is one of GPT alone", s)
			}
			return Type{Byte: k.mbr}, nil
		}
		if k.guid == "" {
			return t, fmt.Errorf("partition type '%s' is one of MBR alone", s)
		}
		g, err := ParseGUID(k.guid)
		return Type{GUID: g}, err
	}
	if kind == MBR {
		n, err := strconv.ParseUint(strings.TrimPrefix(strings.ToLower(s), "0x"), 16, 8)
		if err != nil || n == 0 {
			return t, fmt.Errorf("partition type '%s' is neither a known name nor a hexadecimal number from 1 to ff", s)
		}
		return Type{Byte: byte(n)}, nil
	}
	g, err := ParseGUID(s)
	if err != nil || g == (GUID{}) {
		return t, fmt.Errorf("partition type '%s' is neither a known name nor a GUID", s)
	}
	return Type{GUID: g}, nil
}

// TypeNames returns the names that ParseType takes for a kind of table.
func TypeNames(kind Kind) iter.Seq[string] {
	return func(yield func(string) bool) {
		for _, k := range knownTypes() {
			if (kind == MBR && k.mbr != 0 || kind == GPT && k.guid != "") && !yield(k.name) {
				return
			}
		}
	}
}

type knownType struct {
	name string
	guid string // "": none
	mbr  byte   // 0: none
}

// knownTypes are the types that have names: those of the UEFI specification and
// of the Discoverable Partitions Specification. The first of a value gives the
// name.
func knownTypes() []knownType {
	return []knownType{
		{"linux", "0fc63daf-8483-4772-8e79-3d69d8477de4", 0x83},
		{"esp", "c12a7328-f81f-11d2-ba4b-00a0c93ec93b", 0xef},
		{"swap", "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f", 0x82},
		{"bios-boot", "21686148-6449-6e6f-744e-656564454649", 0},
		{"xbootldr", "bc13c2ff-59e6-4262-a352-b275fd6f7172", 0xea},
		{"linux-root-x86-64", "4f68bce3-e8cd-4db1-96e7-fbcaf984b709", 0x83},
		{"linux-root-x86", "44479540-f297-41b2-9af7-d131d5f0458a", 0x83},
		{"linux-root-arm64", "b921b045-1df0-41c3-af44-4c6f280d3fae", 0x83},
		{"linux-root-arm", "69dad710-2ce4-4e3c-b16c-21a1d49abed3", 0x83},
		{"linux-root-riscv64", "72ec70a6-cf74-40e6-bd49-4bda08e8f224", 0x83},
		{"linux-root-ppc64-le", "c31c45e6-3f39-412e-80fb-4809c4980599", 0x83},
		{"linux-root-s390x", "5eead9a9-fe09-4a1e-a1d7-520d00531306", 0x83},
		{"linux-usr-x86-64", "8484680c-9521-48c6-9c11-b0720656f69e", 0x83},
		{"linux-usr-arm64", "b0e01050-ee5f-4390-949a-9101b17104e9", 0x83},
		{"linux-home", "933ac7e1-2eb4-4f13-b844-0e14e2aef915", 0x83},
		{"linux-srv", "3b8f8425-20e0-4f3b-907f-1a25a76f98e8", 0x83},
		{"linux-var", "4d21b016-b534-45c2-a9fb-5c16e091fd2d", 0x83},
		{"linux-tmp", "7ec6f557-3bc5-4aca-b293-16ef5df639d1", 0x83},
		{"lvm", "e6d6d379-f507-44c2-a23c-238f2a3df928", 0x8e},
		{"raid", "a19d880f-05fc-4d3b-a006-743f0f84911e", 0xfd},
		{"luks", "ca7d7ccb-63ed-4c53-861c-1742536059cc", 0xe8},
		{"prep", "9e1a2d38-c612-4316-aa26-8b49521e5a8b", 0x41},
		{"ms-data", "ebd0a0a2-b9e5-4433-87c0-68b6b72699c7", 0x07},
		{"ms-reserved", "e3c9e316-0b5c-4db8-817d-f92df00215ae", 0},
		{"fat12", "", 0x01},
		{"fat16", "", 0x0e},
		{"fat32", "", 0x0c},
	}
}

package fat

import (
	"errors"
	"fmt"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// checkName reports why FAT cannot hold a name.
func checkName(name string) error {
	switch {
	case !utf8.ValidString(name):
		return errors.New("the name is not UTF-8")
	case len(utf16.Encode([]rune(name))) > 255:
		return errors.New("the name has more than 255 UTF-16 units")
	case strings.HasSuffix(name, ".") || strings.HasSuffix(name, " "):
		return errors.New("the name ends in a dot or a blank, which FAT does not keep")
	}
	if i := strings.IndexFunc(name, func(r rune) bool { return r < 0x20 || r == 0x7f || strings.ContainsRune(`"*/:<>?\|`, r) }); i >= 0 {
		return fmt.Errorf("the name has the character %q, which FAT cannot hold", name[i])
	}
	return nil
}

// shortNames are the short names of one directory.
type shortNames struct {
	used map[[11]byte]bool
	next map[string]int // number to try next, by beginning of the name
}

// plain returns the short name of a file whose name has that form, but for its
// case; whole says that the case is right, too. Names that differ in more than
// case have different ones.
func (s *shortNames) plain(name string) (short [11]byte, whole, ok bool) {
	base, ext := cutExt(name)
	b, lossyBase := shortPart(base, 8)
	e, lossyExt := shortPart(ext, 3)
	short = join83(b, e)
	if lossyBase || lossyExt || s.used[short] {
		return short, false, false
	}
	s.used[short] = true
	return short, name == b || e != "" && name == b+"."+e, true
}

// numbered makes a short name for any other file. It is called when all that have
// a plain one have it, so that no file is found by the short name of another.
func (s *shortNames) numbered(name string) (short [11]byte, err error) {
	base, ext := cutExt(name)
	b, _ := shortPart(base, 8)
	e, _ := shortPart(ext, 3)
	limit := 1
	for digits := 1; digits <= 6; digits++ {
		limit *= 10
		stem := b[:min(len(b), 8-1-digits)]
		key := fmt.Sprintf("%s~%d.%s", stem, digits, e)
		for n := max(s.next[key], limit/10); n < limit; n++ {
			short = join83(fmt.Sprintf("%s~%d", stem, n), e)
			if !s.used[short] {
				s.used[short] = true
				s.next[key] = n + 1
				return short, nil
			}
		}
		s.next[key] = limit
	}
	return short, errors.New("no short name is left in its directory")
}

// cutExt cuts a name at its last dot, unless only dots are before it.
func cutExt(name string) (base, ext string) {
	i := strings.LastIndexByte(name, '.')
	if i < 0 || strings.Trim(name[:i], ".") == "" {
		return name, ""
	}
	return name[:i], name[i+1:]
}

// shortPart makes n characters at most of a part of a name. lossy reports that
// something got lost besides case.
func shortPart(part string, n int) (short string, lossy bool) {
	var b strings.Builder
	for _, r := range strings.ToUpper(part) {
		switch {
		case r == ' ' || r == '.':
			lossy = true
			continue
		case r >= 0x80 || strings.ContainsRune("+,;=[]", r):
			r, lossy = '_', true
		}
		b.WriteRune(r)
	}
	short = b.String()
	if len(short) > n {
		return short[:n], true
	}
	return short, lossy
}

// join83 makes the form that is stored.
func join83(base, ext string) (s [11]byte) {
	copy(s[:], "           ")
	copy(s[:8], base)
	copy(s[8:], ext)
	return s
}

// checksum is what the entries of a long name have of the short one.
func checksum(short [11]byte) (sum byte) {
	for _, c := range short {
		sum = sum>>1 | sum<<7
		sum += c
	}
	return sum
}

// appendLong appends the entries of a long name, last part first.
func appendLong(b []byte, name string, short [11]byte) []byte {
	units := utf16.Encode([]rune(name))
	n := longEntries(units)
	if len(units)%13 != 0 {
		units = append(units, 0)
	}
	for len(units) < n*13 {
		units = append(units, 0xffff)
	}
	sum := checksum(short)
	for i := n; i > 0; i-- {
		var e [32]byte
		e[0] = byte(i)
		if i == n {
			e[0] |= 0x40
		}
		e[11], e[13] = attrLong, sum
		for k, u := range units[(i-1)*13 : i*13] {
			at := 1 + 2*k
			if k >= 5 {
				at += 3
			}
			if k >= 11 {
				at += 2
			}
			e[at], e[at+1] = byte(u), byte(u>>8)
		}
		b = append(b, e[:]...)
	}
	return b
}

func longEntries(units []uint16) int { return (len(units) + 12) / 13 }

// label makes the stored form of a volume label.
func label(s string) (l [11]byte, err error) {
	s = strings.ToUpper(s)
	if len(s) > 11 || strings.HasPrefix(s, " ") {
		return l, fmt.Errorf("FAT label %q: at most 11 characters, the first no blank, are possible", s)
	}
	for _, r := range s {
		if r < 0x20 || r >= 0x7f || strings.ContainsRune(`"*+,./:;<=>?[\]|`, r) {
			return l, fmt.Errorf("FAT label %q: the character %q is not possible", s, r)
		}
	}
	copy(l[:], "           ")
	copy(l[:], s)
	return l, nil
}

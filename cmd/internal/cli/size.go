package cli

import (
	"errors"
	"math"
	"math/bits"
	"strconv"
	"strings"
)

// What can be wrong with a size.
var (
	errSizeSyntax = errors.New("not a size")
	errSizeRange  = errors.New("size out of range")
)

// parseSize reads a size in qemu-img's notation: a decimal number, a fraction
// if a suffix follows, or a hexadecimal number; then one of the suffixes b, k,
// M, G, T, P, E (powers of 1024) in either case. Blanks may stand before it.
// The error is errSizeSyntax or errSizeRange.
func parseSize(s string) (uint64, error) {
	rest := strings.TrimLeft(s, " \t\n\v\f\r")
	rest = strings.TrimPrefix(rest, "+")
	n := digits(rest, isDecimal)
	if n == 0 {
		return 0, errSizeSyntax
	}
	val, err := strconv.ParseUint(rest[:n], 10, 64)
	rest = rest[n:]
	var frac uint64 // in units of 2^-64
	switch {
	case err != nil:
		if rest != "" {
			return 0, errSizeSyntax
		}
		return 0, errSizeRange
	case n == 1 && val == 0 && rest != "" && rest[0]|0x20 == 'x':
		// "0x" without digits is a zero and rubbish.
		if n = digits(rest[1:], isHex); n == 0 {
			return 0, errSizeSyntax
		}
		if val, err = strconv.ParseUint(rest[1:1+n], 16, 64); err != nil {
			return 0, errSizeRange
		}
		rest = rest[1+n:]
	case rest != "" && rest[0] == '.':
		n = digits(rest[1:], isDecimal)
		f, _ := strconv.ParseFloat("0."+rest[1:1+n]+"0", 64)
		frac = uint64(min(f*0x1p64, math.Nextafter(0x1p64, 0)))
		rest = rest[1+n:]
	}
	mul := uint64(1)
	if rest != "" {
		i := strings.IndexByte("bkmgtpe", rest[0]|0x20)
		if i < 0 {
			return 0, errSizeSyntax
		}
		mul, rest = 1<<(10*i), rest[1:]
	}
	if rest != "" || mul == 1 && frac != 0 {
		return 0, errSizeSyntax
	}
	over, val := bits.Mul64(val, mul)
	whole, frac := bits.Mul64(frac, mul)
	val, c1 := bits.Add64(val, whole, 0)
	val, c2 := bits.Add64(val, frac>>63, 0) // round half up
	if over != 0 || c1 != 0 || c2 != 0 {
		return 0, errSizeRange
	}
	return val, nil
}

func isDecimal(c byte) bool { return '0' <= c && c <= '9' }
func isHex(c byte) bool     { return isDecimal(c) || 'a' <= c|0x20 && c|0x20 <= 'f' }

// digits counts the digits that s begins with.
func digits(s string, is func(byte) bool) int {
	n := 0
	for n < len(s) && is(s[n]) {
		n++
	}
	return n
}

// sizeArg reads the size of an image or the like, as an argument or a flag;
// what names it in the message.
func sizeArg(what, s string) (int64, error) { return sizeArgIn(what, s, 0, math.MaxInt64) }

// sizeArgIn is sizeArg for a size from low to high.
func sizeArgIn(what, s string, low, high int64) (int64, error) {
	v, err := parseSize(s)
	if errors.Is(err, errSizeSyntax) {
		return 0, messagef("Invalid %s specified. You may use k, M, G, T, P or E suffixes for\n"+
			"kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes.", what)
	}
	if err != nil || v < uint64(low) || v > uint64(high) {
		return 0, messagef("Invalid %s specified. Must be between %d and %d.", what, low, high)
	}
	return int64(v), nil
}

// humanSize formats a number of bytes as qemu-img does: three digits, and the
// next unit from 1000 on.
func humanSize(n uint64) string {
	_, exp := math.Frexp(float64(n) / (1000.0 / 1024.0))
	unit := max(exp-1, 0) / 10
	prefix := []string{"", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"}[unit]
	return strconv.FormatFloat(math.Ldexp(float64(n), -10*unit), 'g', 3, 64) + " " + prefix + "B"
}

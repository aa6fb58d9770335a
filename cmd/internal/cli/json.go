package cli

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// member is a key with its value: a string, bool, int64, uint64, object or
// []any.
type member struct {
	key   string
	value any
}

// object is a JSON object whose keys keep their order, which is that of the
// hash tables of qemu-img.
type object []member

// add appends a member.
func (o *object) add(key string, value any) { *o = append(*o, member{key, value}) }

// prettyJSON writes a value in the way of qemu-img: four blanks a level, one
// member a line, all in ASCII.
func prettyJSON(v any) string {
	var b strings.Builder
	appendJSON(&b, v, 0)
	b.WriteByte('\n')
	return b.String()
}

func appendJSON(b *strings.Builder, v any, depth int) {
	item := func(i int) {
		if i > 0 {
			b.WriteByte(',')
		}
		fmt.Fprintf(b, "\n%*s", 4*(depth+1), "")
	}
	switch v := v.(type) {
	case object:
		b.WriteByte('{')
		for i, m := range v {
			item(i)
			appendJSONString(b, m.key)
			b.WriteString(": ")
			appendJSON(b, m.value, depth+1)
		}
		fmt.Fprintf(b, "\n%*s}", 4*depth, "")
	case []any:
		b.WriteByte('[')
		for i, e := range v {
			item(i)
			appendJSON(b, e, depth+1)
		}
		fmt.Fprintf(b, "\n%*s]", 4*depth, "")
	case string:
		appendJSONString(b, v)
	case bool:
		b.WriteString(strconv.FormatBool(v))
	case int64:
		b.WriteString(strconv.FormatInt(v, 10))
	case uint64:
		b.WriteString(strconv.FormatUint(v, 10))
	default:
		panic(fmt.Sprintf("cli: internal error: %T in JSON", v))
	}
}

// appendLineJSON writes a value in one line, as qemu-img does in names.
func appendLineJSON(b *strings.Builder, v any) {
	switch v := v.(type) {
	case object:
		b.WriteByte('{')
		for i, m := range v {
			if i > 0 {
				b.WriteString(", ")
			}
			appendJSONString(b, m.key)
			b.WriteString(": ")
			appendLineJSON(b, m.value)
		}
		b.WriteByte('}')
	case nil:
		b.WriteString("null")
	case json.Number:
		b.WriteString(v.String())
	default:
		appendJSON(b, v, 0)
	}
}

func appendJSONString(b *strings.Builder, s string) {
	b.WriteByte('"')
	for len(s) > 0 {
		r, n := utf8.DecodeRuneInString(s)
		s = s[n:]
		switch {
		case r == '"' || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r == '\b':
			b.WriteString(`\b`)
		case r == '\f':
			b.WriteString(`\f`)
		case r == '\n':
			b.WriteString(`\n`)
		case r == '\r':
			b.WriteString(`\r`)
		case r == '\t':
			b.WriteString(`\t`)
		case ' ' <= r && r < 0x7f:
			b.WriteRune(r)
		case r > 0xffff:
			r1, r2 := utf16.EncodeRune(r)
			fmt.Fprintf(b, `\u%04X\u%04X`, r1, r2)
		default:
			fmt.Fprintf(b, `\u%04X`, r)
		}
	}
	b.WriteByte('"')
}

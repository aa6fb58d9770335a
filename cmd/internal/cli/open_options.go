package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
)

// blockOptions are options of QEMU that describe an image, those of what lies
// below it with a prefix: "driver", "file.filename", "backing.driver". Values
// are strings, bools, json.Numbers, or nil.
type blockOptions map[string]any

// parseImageOpts reads the argument of --image-opts.
func parseImageOpts(arg string, host Host) (blockOptions, error) {
	opts := blockOptions{}
	if i := strings.IndexAny(arg, "=,"); arg != "" && (i < 0 || arg[i] == ',') {
		opts["file"], arg = optionValue(arg)
	}
	pairs := splitOptions(arg)
	host.warnShort(pairs)
	for _, p := range pairs {
		opts[p.name] = p.value
	}
	if id, ok := opts.str("id"); ok && !wellFormedID(id) {
		return nil, &bareError{badID("id")}
	}
	return opts, nil
}

// warnShort warns of options without a value.
func (h Host) warnShort(pairs []optionPair) {
	for _, p := range pairs {
		if !p.short {
			continue
		}
		given := p.name
		if p.value == "off" {
			given = "no" + given
		}
		h.warn("short-form boolean option '%s' deprecated", given)
		fmt.Fprintf(h.Err, "Please use %s=%s instead\n", p.name, p.value)
	}
}

// parseJSONName reads what stands behind json: in the name of an image.
func parseJSONName(js string) (blockOptions, error) {
	d := json.NewDecoder(strings.NewReader(js))
	d.UseNumber()
	var v any
	err := d.Decode(&v)
	if err == nil {
		if _, e := d.Token(); e != io.EOF {
			err = messagef("Expecting at most one JSON value")
		}
	} else {
		err = jsonError(err)
	}
	if err != nil {
		return nil, messagef("Could not parse the JSON options: %w", err)
	}
	tree, ok := v.(map[string]any)
	if !ok {
		return nil, messagef("Invalid JSON object given")
	}
	opts := blockOptions{}
	opts.flatten("", tree)
	return opts, nil
}

// jsonError puts an error of the JSON decoder in QEMU's words where it has some.
func jsonError(err error) error {
	switch err {
	case io.EOF:
		return messagef("Expecting a JSON value")
	case io.ErrUnexpectedEOF:
		return messagef("JSON parse error, premature EOI")
	}
	return messagef("JSON parse error, %w", err)
}

// flatten turns objects and lists into names with dots. A name in an object
// wins over the same name with dots.
func (o blockOptions) flatten(name string, v any) {
	dot := ""
	if name != "" {
		dot = "."
	}
	switch v := v.(type) {
	case map[string]any:
		for _, deep := range []bool{false, true} {
			for key, value := range v {
				switch value.(type) {
				case map[string]any, []any:
					if deep {
						o.flatten(name+dot+key, value)
					}
				default:
					if !deep {
						o[name+dot+key] = value
					}
				}
			}
		}
	case []any:
		for i, value := range v {
			o.flatten(name+dot+strconv.Itoa(i), value)
		}
	default:
		o[name] = v
	}
}

// str returns an option that is a string.
func (o blockOptions) str(name string) (string, bool) {
	s, ok := o[name].(string)
	return s, ok
}

// take moves out the options with a prefix.
func (o blockOptions) take(prefix string) blockOptions {
	sub := blockOptions{}
	for name, value := range o {
		if rest, ok := strings.CutPrefix(name, prefix); ok {
			sub[rest] = value
			delete(o, name)
		}
	}
	return sub
}

// absorb moves the options that are described into a list, with their values
// checked.
func (o blockOptions) absorb(descs []optionDesc) (*optionList, error) {
	l := newOptionList(descs)
	for _, name := range qdictOrder(o) {
		if l.index(name) < 0 {
			continue
		}
		var value string
		switch v := o[name].(type) {
		case string:
			value = v
		case bool:
			value = "off"
			if v {
				value = "on"
			}
		case json.Number:
			value = v.String()
		default:
			continue
		}
		if err := l.set(name, value); err != nil {
			return nil, err
		}
		delete(o, name)
	}
	return l, nil
}

// qdictOrder returns the keys of a map in the order of QEMU's hash tables, which
// is that of its messages and JSON.
func qdictOrder[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, func(a, b string) int {
		if d := int(qdictBucket(a)) - int(qdictBucket(b)); d != 0 {
			return d
		}
		return strings.Compare(a, b)
	})
	return keys
}

// qdictBucket is the place of a key in a hash table (qobject/qdict.c,
// tdb_hash).
func qdictBucket(key string) uint32 {
	h := uint32(0x238F13AF) * uint32(len(key))
	for i := range len(key) {
		h += uint32(key[i]) << (i * 5 % 24)
	}
	return (1103515243*h + 12345) % 512
}

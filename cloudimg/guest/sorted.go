package guest

import (
	"fmt"
	"iter"
	"slices"
	"strings"
)

// sortedEntries is how many entries of a directory are held at once, twice for
// a moment.
const sortedEntries = 1 << 15

// maxDepth is how deep a walk goes: far deeper than programs can name, so that
// a damaged tree does not fill memory.
const maxDepth = 4096

// Sorted returns the entries of a directory by name, in the order of bytes. A
// directory of more than some ten thousand entries is read several times, so
// that memory has a bound. Errors come before the entries.
func Sorted(fsys FS, dir *File) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		for batch, err := range Batches(fsys, dir) {
			if err != nil && !yield(Entry{}, err) {
				return
			}
			for i := range batch {
				if !yield(batch[i], nil) {
					return
				}
			}
		}
	}
}

// Batches returns the entries of a directory in sorted pieces, as Sorted does; each is
// valid until the next one.
func Batches(fsys FS, dir *File) iter.Seq2[[]Entry, error] {
	return func(yield func([]Entry, error) bool) {
		var batch []Entry
		after := "" // entries up to this name were yielded; no name is empty
		for more := true; more; {
			batch, more = batch[:0], false
			limit := "" // entries from this name on have no place in the batch
			cut := func() {
				slices.SortFunc(batch, func(a, b Entry) int { return strings.Compare(a.Name, b.Name) })
				if len(batch) > sortedEntries {
					batch = batch[:sortedEntries]
					limit, more = batch[len(batch)-1].Name, true
				}
			}
			for e, err := range fsys.Entries(dir) {
				switch {
				case err != nil:
					if after == "" && !yield(nil, err) {
						return
					}
				case !validName(e.Name):
					if after == "" && !yield(nil, fmt.Errorf("entry %q is no name", e.Name)) {
						return
					}
				case e.Name <= after || limit != "" && e.Name > limit:
				default:
					if batch = append(batch, e); len(batch) == 2*sortedEntries {
						cut()
					}
				}
			}
			cut()
			if len(batch) == 0 {
				return
			}
			if !yield(batch, nil) {
				return
			}
			after = batch[len(batch)-1].Name
		}
	}
}

// validName reports whether a file can have a name.
func validName(name string) bool {
	return name != "" && name != "." && name != ".." && strings.IndexByte(name, '/') < 0 && strings.IndexByte(name, 0) < 0
}

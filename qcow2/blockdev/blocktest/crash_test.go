package blocktest_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/blocktest"
)

func recorder(t *testing.T, size int64) *blocktest.Recorder {
	t.Helper()
	r, err := blocktest.NewRecorder(blockdev.NewMemory(size))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func writeAt(t *testing.T, d blockdev.Device, p []byte, off int64) {
	t.Helper()
	if _, err := d.WriteAt(p, off); err != nil {
		t.Fatal(err)
	}
}

func syncDev(t *testing.T, d blockdev.Device) {
	t.Helper()
	if err := blockdev.Sync(d); err != nil {
		t.Fatal(err)
	}
}

// sector is a sector that is full of a letter.
func sector(letters string) []byte {
	var b []byte
	for _, c := range []byte(letters) {
		b = append(b, bytes.Repeat([]byte{c}, blocktest.SectorSize)...)
	}
	return b
}

// letters tells what the sectors of a state hold: . is nothing, ? is garbage.
func letters(t *testing.T, d blockdev.Reader) string {
	t.Helper()
	b := read(t, d)
	var s strings.Builder
	for part := range slices.Chunk(b, blocktest.SectorSize) {
		switch {
		case bytes.Count(part, part[:1]) != len(part):
			s.WriteByte('?')
		case part[0] == 0:
			s.WriteByte('.')
		default:
			s.WriteByte(part[0])
		}
	}
	return s.String()
}

// crashes returns the states with their marks, each once, sorted.
func crashes(t *testing.T, r *blocktest.Recorder, opts *blocktest.CrashOptions) []string {
	t.Helper()
	found := map[string]bool{}
	for s, err := range r.CrashStates(opts) {
		if err != nil {
			t.Fatal(err)
		}
		var text []string
		for _, d := range s.Devs {
			text = append(text, letters(t, d))
		}
		if s.Mark != nil {
			text = append(text, fmt.Sprint(s.Mark))
		}
		found[strings.Join(text, " ")] = true
	}
	return slices.Sorted(maps.Keys(found))
}

func TestCrashStates(t *testing.T) {
	for _, c := range []struct {
		name string
		opts *blocktest.CrashOptions
		run  func(t *testing.T, r *blocktest.Recorder)
		want []string
	}{
		{"nothing", nil, func(*testing.T, *blocktest.Recorder) {}, []string{"...."}},
		{"subsets", nil, func(t *testing.T, r *blocktest.Recorder) {
			writeAt(t, r, sector("a"), 0)
			writeAt(t, r, sector("b"), 512)
			writeAt(t, r, sector("c"), 512)
		}, []string{"....", ".b..", ".c..", "a...", "ab..", "ac.."}},
		{"sync", nil, func(t *testing.T, r *blocktest.Recorder) {
			writeAt(t, r, sector("a"), 0)
			writeAt(t, r, sector("b"), 512)
			syncDev(t, r)
			writeAt(t, r, sector("c"), 0)
		}, []string{"....", ".b..", "a...", "ab..", "cb.."}},
		{"marks", nil, func(t *testing.T, r *blocktest.Recorder) {
			r.Mark("old")
			writeAt(t, r, sector("a"), 0)
			syncDev(t, r)
			r.Mark("new")
			writeAt(t, r, sector("b"), 512)
			r.Mark("last")
		}, []string{".... old", "a... last", "a... new", "a... old", "ab.. last"}},
		{"mark without a sync", nil, func(t *testing.T, r *blocktest.Recorder) {
			writeAt(t, r, sector("a"), 0)
			r.Mark("safe")
			writeAt(t, r, sector("b"), 512)
		}, []string{"....", ".... safe", ".b.. safe", "a... safe", "ab.. safe"}},
		{"torn", nil, func(t *testing.T, r *blocktest.Recorder) {
			writeAt(t, r, sector("xyz"), 0)
			writeAt(t, r, sector("q"), 1536)
		}, []string{"....", "...q", "..z.", "..zq", ".yz.", ".yzq", "x...", "x..q", "xy..", "xy.q", "xyz.", "xyzq"}},
		{"at the end", &blocktest.CrashOptions{AtEnd: true}, func(t *testing.T, r *blocktest.Recorder) {
			writeAt(t, r, sector("a"), 0)
			writeAt(t, r, sector("b"), 512)
			syncDev(t, r)
			writeAt(t, r, sector("c"), 1024)
			writeAt(t, r, sector("d"), 1536)
		}, []string{"ab..", "ab.d", "abc.", "abcd"}},
		{"torn with garbage", &blocktest.CrashOptions{Garbage: true, Tears: 1, Seed: 1}, func(t *testing.T, r *blocktest.Recorder) {
			writeAt(t, r, sector("xy"), 512)
		}, []string{"....", ".?y.", ".x?.", ".xy."}},
		{"discard", nil, func(t *testing.T, r *blocktest.Recorder) {
			writeAt(t, r, sector("abcd"), 0)
			syncDev(t, r)
			if err := r.Discard(512, 1024); err != nil {
				t.Fatal(err)
			}
		}, []string{"....", "...d", "..cd", ".bcd", "a...", "a..d", "a.cd", "ab..", "ab.d", "abc.", "abcd"}},
		{"truncate", nil, func(t *testing.T, r *blocktest.Recorder) {
			if err := r.Truncate(512); err != nil {
				t.Fatal(err)
			}
			if err := r.Truncate(1024); err != nil {
				t.Fatal(err)
			}
			writeAt(t, r, sector("ab"), 0)
		}, []string{".", "..", "....", ".b", "a.", "ab", "ab.."}},
		{"unaligned", nil, func(t *testing.T, r *blocktest.Recorder) {
			writeAt(t, r, sector("aa")[:700], 0)
			writeAt(t, r, sector("a")[:324], 700)
			// The second write goes with the bytes of the first in its sector.
		}, []string{"....", ".?..", ".a..", "a...", "a?..", "aa.."}},
		{"two devices", nil, func(t *testing.T, r *blocktest.Recorder) {
			q, err := r.Beside(blockdev.NewMemory(512))
			if err != nil {
				t.Fatal(err)
			}
			writeAt(t, r, sector("a"), 0)
			writeAt(t, q, sector("b"), 0)
			syncDev(t, r)
			writeAt(t, r, sector("c"), 0)
		}, []string{".... .", ".... b", "a... .", "a... b", "c... .", "c... b"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := recorder(t, 2048)
			c.run(t, r)
			if got := crashes(t, r, c.opts); !slices.Equal(got, c.want) {
				t.Errorf("states\n%q, want\n%q", got, c.want)
			}
		})
	}
}

// Where there are too many subsets, there are as many as was asked for, and no
// two runs differ.
func TestCrashStatesBounded(t *testing.T) {
	r := recorder(t, 64<<10)
	for i := range int64(40) {
		writeAt(t, r, sector("aa"), i*1024)
	}
	opts := &blocktest.CrashOptions{Subsets: 100, Tears: 2}
	var first []string
	for range 2 {
		var list []string
		for s, err := range r.CrashStates(opts) {
			if err != nil {
				t.Fatal(err)
			}
			list = append(list, letters(t, s.Dev()))
			writeAt(t, s.Dev(), sector("spoil"), 0) // is of no matter
		}
		// 41 prefixes, 100 subsets of which few are prefixes, 4 or 2 tears.
		if n := len(list); n < 41+90+78*2 || n > 41+100+80*2 {
			t.Errorf("%d states", n)
		}
		if first == nil {
			first = list
		}
		if !slices.Equal(first, list) {
			t.Error("another run has other states")
		}
	}
}

func TestCrashStateString(t *testing.T) {
	r := recorder(t, 4096)
	r.Mark("m")
	writeAt(t, r, sector("abc"), 512)
	if err := r.Truncate(8192); err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for s, err := range r.CrashStates(nil) {
		if err != nil {
			t.Fatal(err)
		}
		seen[s.String()] = true
	}
	for _, want := range []string{
		"crash after 1 operations, mark m\n\tkept 0: write 512+1536",
		"crash before operation 2, mark m\n\tlost 0: write 512+1536\n\tkept 1: truncate 0+8192",
		"crash before operation 2, mark m\n\ttorn 0: write 512+1536, kept sectors 1 to 2 of 3\n\tlost 1: truncate 0+8192",
	} {
		if !seen[want] {
			t.Errorf("no state %q in %q", want, slices.Sorted(maps.Keys(seen)))
		}
	}
}

// store is a value of three sectors that is written in a new place each time,
// with a pointer to it in the first sector.
type store struct {
	d        blockdev.Device
	n        byte
	noFirst  bool // no sync before the pointer
	noLast   bool // no sync before it says that all is safe
	tooEarly bool // the pointer goes first
	inPlace  bool // always in the same place
	torn     bool // the pointer is two sectors long
}

func (s *store) put(mark func(any)) error {
	s.n++
	place := int64(s.n%2)*4096 + 4096
	if s.inPlace {
		place = 4096
	}
	value := func() error {
		_, err := s.d.WriteAt(bytes.Repeat([]byte{s.n}, 3*blocktest.SectorSize), place)
		if err == nil && !s.noFirst {
			err = blockdev.Sync(s.d)
		}
		return err
	}
	pointer := func() error {
		p := binary.BigEndian.AppendUint64(nil, uint64(place))
		p = append(p, s.n)
		off := int64(0)
		if s.torn {
			off = blocktest.SectorSize - 8
		}
		_, err := s.d.WriteAt(p, off)
		if err == nil && !s.noLast {
			err = blockdev.Sync(s.d)
		}
		return err
	}
	steps := []func() error{value, pointer}
	if s.tooEarly {
		slices.Reverse(steps)
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	mark(int(s.n))
	return nil
}

// get checks a state against the value that has to be safe at least.
func (s *store) get(d blockdev.Reader, safe any) error {
	p := make([]byte, 9)
	off := int64(0)
	if s.torn {
		off = blocktest.SectorSize - 8
	}
	if _, err := d.ReadAt(p, off); err != nil {
		return err
	}
	n := int(p[8])
	if least, _ := safe.(int); n < least || n > least+1 {
		return fmt.Errorf("value %d, %v was safe", n, safe)
	}
	if n == 0 {
		return nil
	}
	value := make([]byte, 3*blocktest.SectorSize)
	if _, err := d.ReadAt(value, int64(binary.BigEndian.Uint64(p))); err != nil {
		return err
	}
	if bytes.Count(value, p[8:]) != len(value) {
		return fmt.Errorf("value %d is not whole", n)
	}
	return nil
}

// deaf loses every Sync.
type deaf struct{ blockdev.Device }

func (deaf) Sync() error { return nil }

// TestCrashStatesFind: the right order of writes holds in every state, and each
// wrong one is found.
func TestCrashStatesFind(t *testing.T) {
	for _, c := range []struct {
		name  string
		store store
		deaf  bool
		bad   bool
	}{
		{name: "right"},
		{name: "no sync before the pointer", store: store{noFirst: true}, bad: true},
		{name: "no sync at the end", store: store{noLast: true}, bad: true},
		{name: "pointer first", store: store{tooEarly: true}, bad: true},
		{name: "in place", store: store{inPlace: true}, bad: true},
		{name: "pointer in two sectors", store: store{torn: true}, bad: true},
		{name: "a device that loses syncs", deaf: true, bad: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := recorder(t, 16<<10)
			c.store.d = r
			if c.deaf {
				c.store.d = deaf{r}
			}
			for range 3 {
				if err := c.store.put(r.Mark); err != nil {
					t.Fatal(err)
				}
			}
			var first error
			states, bad := 0, 0
			for s, err := range r.CrashStates(nil) {
				if err != nil {
					t.Fatal(err)
				}
				states++
				if err := c.store.get(s.Dev(), s.Mark); err != nil {
					if bad++; first == nil {
						first = fmt.Errorf("%w\n%v", err, s)
					}
				}
			}
			t.Logf("%d of %d states are bad: %v", bad, states, first)
			if (bad > 0) != c.bad {
				t.Errorf("bad: %v, expected %v", bad > 0, c.bad)
			}
		})
	}
}

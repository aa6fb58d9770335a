package ext4img

import (
	"encoding/binary"
	"errors"
	"testing"
	"time"
)

// editAll does one of everything to a file system, and returns how much of it
// was done. Editing has to have an end whatever the file system says.
func editAll(t testing.TB, e *Editor) (done int) {
	x, err := e.Begin()
	if err != nil {
		t.Fatal(err)
	}
	note := func(err error) {
		if err == nil {
			done++
			return
		}
		_ = err.Error()
	}
	note(x.MkdirAll("/new/dir", 0o755))
	note(x.WriteFile("/new/file", make([]byte, 20000), 0o644))
	note(x.WriteFile("/a", []byte("text"), 0o644))
	// What is there, as it comes.
	type entry struct {
		dir Ino
		Dirent
	}
	var list []entry
	for w, err := range x.FS().Walk(RootIno) {
		if err == nil {
			list = append(list, entry{w.Parent, Dirent{Ino: w.Ino, Name: w.Name}})
		}
		if len(list) == 40 {
			break
		}
	}
	mode := uint16(0o4755)
	for i, d := range list {
		switch i % 10 {
		case 0:
			note(x.WriteAt(d.Ino, []byte("in the midst"), 3000))
			note(x.SetXattr(d.Ino, "user.name", "value"))
		case 1:
			note(x.Truncate(d.Ino, 100))
		case 2:
			note(x.Rename(d.dir, d.Name, RootIno, "moved"))
		case 3:
			note(x.Remove(d.dir, d.Name))
		case 4:
			note(x.SetAttr(d.Ino, SetAttr{Mode: &mode}))
			note(x.RemoveXattr(d.Ino, "user.big"))
		case 5:
			note(x.Link(d.dir, "other", d.Ino))
			note(x.Append(d.Ino, make([]byte, 10000)))
		case 6:
			note(x.RemoveAll(t.Context(), d.dir, d.Name))
		case 7:
			_, err := x.Create(d.Ino, "below", Attr{})
			note(err)
			note(x.Truncate(d.Ino, 1<<40))
		case 8:
			_, err := x.Symlink(d.dir, "symlink", "to", Attr{})
			note(err)
			note(x.WriteAt(d.Ino, []byte{1}, 1<<30))
		case 9:
			note(x.SetContent(t.Context(), d.Ino, x.e.dev))
		}
	}
	err = x.Commit(t.Context())
	if err != nil && !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrTooLarge) && !errors.Is(err, ErrUnsupported) {
		t.Fatal(err)
	}
	return done
}

// FuzzEdit edits file systems that are damaged as by FuzzFS, and that nobody
// has checked before.
func FuzzEdit(f *testing.F) {
	seeds := fuzzSeeds(f)
	for i := range seeds {
		f.Add([]byte{byte(i)})
		for k := range seeds[i].blocks {
			off := uint16(k*37) % uint16(seeds[i].size)
			f.Add([]byte{byte(i), byte(k), byte(k >> 8), byte(off), byte(off >> 8), byte(k * 11)})
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) == 0 || len(data) > 500 {
			return
		}
		s := seeds[int(data[0]&0x7f)%len(seeds)]
		dev := s.dev.Clone()
		for e := data[1:]; len(e) >= 5; e = e[5:] {
			block := s.blocks[int(binary.LittleEndian.Uint16(e))%len(s.blocks)]
			off := int64(binary.LittleEndian.Uint16(e[2:])) % s.size
			if _, err := dev.WriteAt(e[4:5], block*s.size+off); err != nil {
				t.Fatal(err)
			}
		}
		if data[0]&0x80 == 0 {
			fixChecksums(dev)
		}
		e, err := openEditor(t.Context(), dev, &EditOptions{Now: func() time.Time { return time.Unix(1700000000, 0) }}, false)
		if err != nil {
			return
		}
		done := editAll(t, e)
		if len(data) == 1 && done < 5 {
			t.Errorf("%d changes of a sound file system", done)
		}
	})
}

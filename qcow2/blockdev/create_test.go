package blockdev_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/blocktest"
	"qimg/qcow2/blockdev/oracle"
)

// create begins a file that holds text.
func create(t *testing.T, path, text string) *blockdev.Output {
	t.Helper()
	o, err := blockdev.CreateFile(path, &blockdev.CreateOptions{NoLock: runtime.GOOS != "linux"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { o.Abort() })
	if o.File().Name() != path {
		t.Errorf("Name() is %s, want %s", o.File().Name(), path)
	}
	if err := o.File().Truncate(int64(len(text))); err != nil {
		t.Fatal(err)
	}
	if _, err := o.File().WriteAt([]byte(text), 0); err != nil {
		t.Fatal(err)
	}
	return o
}

func commit(t *testing.T, o *blockdev.Output) {
	t.Helper()
	if err := o.Commit(); err != nil {
		t.Fatal(err)
	}
	if err := o.Abort(); err != nil {
		t.Errorf("Abort after Commit: %v", err)
	}
	if err := o.Commit(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Commit after Commit: %v", err)
	}
	if _, err := o.File().WriteAt([]byte{1}, 0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("WriteAt after Commit: %v", err)
	}
}

// wantDir checks that dir holds the named files and nothing else.
func wantDir(t *testing.T, dir string, want map[string]string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if _, ok := want[e.Name()]; !ok {
			t.Errorf("%s is left in the directory", e.Name())
		}
	}
	for name, text := range want {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != text {
			t.Errorf("%s holds %q (%v), want %q", name, got, err, text)
		}
	}
}

func write(t *testing.T, path, text string, mode fs.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

func TestOutput(t *testing.T) {
	blocktest.TestDevice(t, func(t *testing.T) blockdev.Device {
		return create(t, filepath.Join(t.TempDir(), "new"), strings.Repeat("x", 300_000)).File()
	})
}

func TestCreateFileNew(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "new")
	o := create(t, path, "hello")
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the file is there before Commit: %v", err)
	}
	commit(t, o)
	wantDir(t, dir, map[string]string{"new": "hello"})

	// The mode is what any new file here gets.
	plain, err := os.OpenFile(filepath.Join(t.TempDir(), "plain"), os.O_CREATE|os.O_RDWR, 0o666)
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	want, err := plain.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := os.Stat(path); err != nil || got.Mode() != want.Mode() {
		t.Errorf("mode %v, want %v (%v)", got.Mode(), want.Mode(), err)
	}
}

func TestCreateFileAbort(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "old"), "old", 0o640)
	for _, name := range []string{"new", "old"} {
		o := create(t, filepath.Join(dir, name), "unfinished")
		for range 2 {
			if err := o.Abort(); err != nil {
				t.Fatal(err)
			}
		}
		if err := o.Commit(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("Commit after Abort: %v", err)
		}
	}
	wantDir(t, dir, map[string]string{"old": "old"})
}

func TestCreateFileReplaces(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "old")
	for _, mode := range []fs.FileMode{0o640, 0o600, 0o777} {
		write(t, path, "old", mode)
		o := create(t, path, "new")
		if got, _ := os.ReadFile(path); string(got) != "old" {
			t.Errorf("before Commit the file holds %q", got)
		}
		commit(t, o)
		if st, err := os.Stat(path); err != nil || runtime.GOOS != "windows" && st.Mode() != mode {
			t.Errorf("mode %v, want %v (%v)", st.Mode(), mode, err)
		}
		wantDir(t, dir, map[string]string{"old": "new"})
	}
}

func TestCreateFileSymlink(t *testing.T) {
	dir := t.TempDir()
	for _, d := range []string{"a", "b", "c"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o777); err != nil {
			t.Fatal(err)
		}
	}
	write(t, filepath.Join(dir, "a", "disk"), "old", 0o666)
	for link, target := range map[string]string{
		"c/rel":    "../a/disk",
		"c/abs":    filepath.Join(dir, "a", "disk"),
		"c/twice":  "rel",
		"c/no":     "../a/none",
		"dirlink":  "b",
		"b/parent": "../a",
		"up":       "b/parent/../a/disk", // a's parent, not b's
		"loop":     "loop",
	} {
		if err := os.Symlink(filepath.FromSlash(target), filepath.Join(dir, filepath.FromSlash(link))); err != nil {
			oracle.Missing(t, "a system that lets open files be renamed and links be made: "+err.Error())
		}
	}
	for path, at := range map[string]string{
		"c/rel": "a/disk", "c/abs": "a/disk", "c/twice": "a/disk", "up": "a/disk", "c/no": "a/none", "dirlink/x": "b/x",
	} {
		o := create(t, filepath.Join(dir, path), path)
		commit(t, o)
		if st, err := os.Lstat(filepath.Join(dir, at)); err != nil || !st.Mode().IsRegular() {
			t.Errorf("%s: what it leads to is %v (%v)", path, st, err)
		}
		if got, err := os.ReadFile(filepath.Join(dir, at)); string(got) != path {
			t.Errorf("%s: %s holds %q (%v)", path, at, got, err)
		}
		if got, err := os.ReadFile(filepath.Join(dir, path)); string(got) != path {
			t.Errorf("%s leads to %q (%v)", path, got, err)
		}
	}
	for _, path := range []string{"c/rel", "c/abs", "c/twice", "c/no", "up"} {
		if st, err := os.Lstat(filepath.Join(dir, path)); err != nil || st.Mode()&fs.ModeSymlink == 0 {
			t.Errorf("the symlink %s is gone: %v (%v)", path, st, err)
		}
	}
	if _, err := blockdev.CreateFile(filepath.Join(dir, "loop"), nil); err == nil {
		t.Error("a symlink loop: no error")
	}
}

func TestCreateFileRefuses(t *testing.T) {
	dir := t.TempDir()
	for _, path := range []string{dir, dir + "/", dir + "/.", dir + "/..", ".", "", dir + "/new/", os.DevNull} {
		o, err := blockdev.CreateFile(path, nil)
		if err == nil {
			o.Abort()
			t.Errorf("%q: no error", path)
		}
	}
	if _, err := blockdev.CreateFile(filepath.Join(dir, "none", "new"), nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
	wantDir(t, dir, nil)
}

// What comes to the place meanwhile is not replaced.
func TestCreateFileMeanwhile(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "old"), "old", 0o666)
	for _, name := range []string{"new", "old"} {
		path := filepath.Join(dir, name)
		o := create(t, path, "ours")
		write(t, path+".2", "theirs", 0o666)
		if err := os.Rename(path+".2", path); err != nil {
			oracle.Missing(t, "a system that lets open files be renamed and links be made: "+err.Error())
		}
		if err := o.Commit(); !errors.Is(err, fs.ErrExist) {
			t.Errorf("%s: %v", name, err)
		}
	}
	wantDir(t, dir, map[string]string{"new": "theirs", "old": "theirs"})
	// That the old file has gone is no reason not to make the new one.
	path := filepath.Join(dir, "old")
	o := create(t, path, "ours")
	if err := os.Remove(path); err != nil {
		oracle.Missing(t, "a system that lets open files be renamed and links be made: "+err.Error())
	}
	commit(t, o)
	wantDir(t, dir, map[string]string{"new": "theirs", "old": "ours"})
}

// The longest name still has a temporary name.
func TestCreateFileLongName(t *testing.T) {
	dir := t.TempDir()
	name := strings.Repeat("n", 255)
	for _, text := range []string{"first", "second"} {
		o := create(t, filepath.Join(dir, name), text)
		commit(t, o)
	}
	wantDir(t, dir, map[string]string{name: "second"})
}

func TestCreateFileLarge(t *testing.T) {
	path := filepath.Join(t.TempDir(), "large")
	o, err := blockdev.CreateFile(path, &blockdev.CreateOptions{NoSync: true})
	if err != nil {
		t.Fatal(err)
	}
	defer o.Abort()
	const size = 5 << 30 // more than 32 bits
	if err := o.File().Truncate(size); err != nil {
		t.Fatal(err)
	}
	if _, err := o.File().WriteAt([]byte("end"), size-3); err != nil {
		t.Fatal(err)
	}
	commit(t, o)
	f := openFile(t, path, nil)
	got := make([]byte, 4)
	if _, err := f.ReadAt(got, size-4); err != nil || !bytes.Equal(got, []byte("\x00end")) {
		t.Errorf("read %q, %v", got, err)
	}
}

// Where no file can be without a name.
func TestCreateFileNamed(t *testing.T) {
	dir := t.TempDir()
	named := func(name, text string) *blockdev.Output {
		t.Helper()
		o := create(t, filepath.Join(dir, name), "")
		if err := o.UseNamed(); err != nil {
			t.Fatal(err)
		}
		if err := o.File().Truncate(int64(len(text))); err != nil {
			t.Fatal(err)
		}
		if _, err := o.File().WriteAt([]byte(text), 0); err != nil {
			t.Fatal(err)
		}
		return o
	}
	write(t, filepath.Join(dir, "old"), "old", 0o666)
	for _, name := range []string{"new", "old"} {
		o := named(name, "unfinished")
		if temps, err := fs.Glob(os.DirFS(dir), "."+name+".??????.tmp"); err != nil || len(temps) != 1 {
			t.Errorf("temporary files %q, %v", temps, err)
		}
		if err := o.Abort(); err != nil {
			t.Error(err)
		}
	}
	wantDir(t, dir, map[string]string{"old": "old"})
	for _, name := range []string{"new", "old"} {
		commit(t, named(name, "done"))
	}
	wantDir(t, dir, map[string]string{"old": "done", "new": "done"})
	o := named("late", "ours")
	write(t, filepath.Join(dir, "late"), "theirs", 0o666)
	if err := o.Commit(); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a file that came meanwhile: %v", err)
	}
	wantDir(t, dir, map[string]string{"old": "done", "new": "done", "late": "theirs"})
}

// Of two that make the same new file at once, one does: neither is replaced by
// the other.
func TestCreateFileNamedRace(t *testing.T) {
	for i := range 200 {
		path := filepath.Join(t.TempDir(), "new")
		var committed atomic.Int32
		var group sync.WaitGroup
		start := make(chan struct{})
		for range 3 {
			o, err := blockdev.CreateFile(path, &blockdev.CreateOptions{NoLock: true, NoSync: true})
			if err != nil {
				t.Fatal(err)
			}
			if err := o.UseNamed(); err != nil {
				t.Fatal(err)
			}
			group.Go(func() {
				<-start
				if err := o.Commit(); err == nil {
					committed.Add(1)
				} else if !errors.Is(err, fs.ErrExist) {
					t.Error(err)
				}
			})
		}
		close(start)
		group.Wait()
		if n := committed.Load(); n != 1 {
			t.Fatalf("round %d: %d were committed", i, n)
		}
		wantDir(t, filepath.Dir(path), map[string]string{"new": ""})
	}
}

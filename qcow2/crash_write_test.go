package qcow2_test

import (
	"context"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/blocktest"
	"qimg/qcow2/blockdev/oracle"
)

// A long run looks at every sequence of two operations, and at all states of
// single ones: an hour or two in place of seconds.
var crashLong = flag.Bool("crash.long", false, "look at all crash states that there are tests for")

// variant is a kind of image that is written to.
type variant struct {
	name string
	qcow2.FormatOptions
	compressed bool // has compressed clusters
	snapshot   bool // has a snapshot
	backing    bool // has a raw backing file, shorter than itself
	data       bool // has an external data file
}

func variants() []variant {
	f := func(version int, cluster int64, bits int) qcow2.FormatOptions {
		return qcow2.FormatOptions{Version: version, ClusterSize: cluster, RefcountBits: bits}
	}
	ext := f(3, 16<<10, 16)
	ext.ExtendedL2 = true
	lazy := f(3, 4096, 16)
	lazy.LazyRefcounts = true
	aes := f(3, 4096, 16)
	aes.Encrypt = qcow2.EncryptOptions{Method: qcow2.CryptAES, Passphrase: []byte("abc")}
	zstd := f(3, 4096, 16)
	zstd.Compression = qcow2.CompressionZstd
	return []variant{
		{name: "512", FormatOptions: f(3, 512, 16), compressed: true},
		{name: "512-v2", FormatOptions: f(2, 512, 16), compressed: true},
		{name: "512-snapshot", FormatOptions: f(3, 512, 16), compressed: true, snapshot: true},
		{name: "512-backing", FormatOptions: f(3, 512, 16), backing: true},
		{name: "512-v2-backing", FormatOptions: f(2, 512, 16), backing: true, snapshot: true},
		{name: "512-rb1", FormatOptions: f(3, 512, 1)},
		{name: "512-rb64", FormatOptions: f(3, 512, 64), compressed: true, snapshot: true},
		{name: "4096", FormatOptions: f(3, 4096, 16), compressed: true},
		{name: "4096-v2-snapshot", FormatOptions: f(2, 4096, 16), compressed: true, snapshot: true},
		{name: "4096-rb1", FormatOptions: f(3, 4096, 1)},
		{name: "4096-rb64", FormatOptions: f(3, 4096, 64), snapshot: true},
		{name: "4096-zstd", FormatOptions: zstd, compressed: true, snapshot: true},
		{name: "4096-backing-snapshot", FormatOptions: f(3, 4096, 16), backing: true, snapshot: true},
		{name: "4096-lazy", FormatOptions: lazy, compressed: true},
		{name: "extl2", FormatOptions: ext, compressed: true},
		{name: "extl2-backing", FormatOptions: ext, backing: true},
		{name: "extl2-snapshot", FormatOptions: ext, compressed: true, snapshot: true},
		{name: "4096-aes", FormatOptions: aes, snapshot: true},
		{name: "data", FormatOptions: f(3, 4096, 16), data: true},
		{name: "extl2-data", FormatOptions: ext, data: true},
	}
}

// clusters is the guest of a fixture, in clusters: at least two L2 tables with
// clusters of 512 bytes.
const fixtureClusters = 144

// fixture is an image with something of everything.
type fixture struct {
	dev  *blockdev.Memory
	data *blockdev.Memory
	open qcow2.OpenOptions
	c    int64 // cluster size
}

// trial begins a trial on a copy of the fixture.
func (f *fixture) trial(t testing.TB) *qcow2.Trial {
	t.Helper()
	opts := &qcow2.TrialOptions{Open: f.open}
	if f.data != nil {
		opts.Data = f.data.Clone()
	}
	return qcow2.NewTrial(t, f.dev.Clone(), opts)
}

// Where a fixture has what, in clusters. The rest is unallocated.
const (
	plainAt      = 0  // 4 clusters of data
	compressedAt = 4  // 4 compressed clusters, or data
	zeroAt       = 8  // 2 clusters of zeroes
	zeroAllocAt  = 10 // 2 clusters of zeroes that keep their place
	emptyAt      = 12 // 4 clusters of nothing
	mixedAt      = 16 // data and nothing in turn, 8 clusters
	emptyTableAt = 80 // no L2 table from here on with clusters of 512 bytes
)

func newFixture(t testing.TB, v variant) *fixture {
	t.Helper()
	f := &fixture{dev: blockdev.NewMemory(0), c: v.ClusterSize}
	size := fixtureClusters*f.c - 512
	format := v.FormatOptions
	if v.backing {
		path := filepath.Join(t.TempDir(), "base.raw")
		if err := os.WriteFile(path, noise(9, int(size/2+1536)), 0o600); err != nil {
			t.Fatal(err)
		}
		format.BackingFile, format.BackingFormat = path, "raw"
		f.open.Backing = qcow2.BackingFollow
	}
	if format.Encrypt.Method != qcow2.CryptNone {
		f.open.Secret = func(qcow2.SecretRequest) ([]byte, error) { return format.Encrypt.Passphrase, nil }
	}
	var err error
	switch {
	case v.data:
		f.data = blockdev.NewMemory(0)
		err = qcow2.Create(t.Context(), f.dev, size, &qcow2.CreateOptions{FormatOptions: format, DataFile: "data.raw", Data: f.data})
	case v.compressed:
		err = f.compress(t, size, format)
	default:
		err = qcow2.Create(t.Context(), f.dev, size, &qcow2.CreateOptions{FormatOptions: format})
	}
	if err != nil {
		t.Fatal(err)
	}
	tr := qcow2.NewTrial(t, f.dev, &qcow2.TrialOptions{Open: f.open, Data: f.data})
	tr.Write(plainAt*f.c, noise(1, int(4*f.c)))
	if !v.compressed {
		tr.Write(compressedAt*f.c, noise(2, int(4*f.c)))
	}
	tr.Zero(zeroAt*f.c, 2*f.c)
	tr.Write(zeroAllocAt*f.c, noise(3, int(2*f.c)))
	tr.Sync()
	tr.Zero(zeroAllocAt*f.c, 2*f.c)
	for i := int64(0); i < 8; i += 2 {
		tr.Write((mixedAt+i)*f.c, noise(byte(10+i), int(f.c)))
	}
	if v.snapshot {
		tr.Do("snapshot create", func() error { return snapshotCreate(tr, "first") })
	}
	if err := tr.Image.Close(); err != nil {
		t.Fatal(err)
	}
	return f
}

// compress makes an image with four compressed clusters.
func (f *fixture) compress(t testing.TB, size int64, format qcow2.FormatOptions) error {
	at, n := compressedAt*f.c, 4*f.c
	w, err := qcow2.NewWriter(t.Context(), f.dev, size, &qcow2.WriterOptions{FormatOptions: format, Compress: true,
		Extents: func(yield func(off, n int64) bool) { yield(at, n) }})
	if err != nil {
		return err
	}
	if _, err := w.WriteAt([]byte(strings.Repeat("compressed clusters lie side by side\n", int(n)/37+1)[:n]), at); err != nil {
		return err
	}
	return w.Finish()
}

func saveFile(t testing.TB, m *blockdev.Memory, path string) {
	t.Helper()
	b := make([]byte, m.Size())
	if n, err := m.ReadAt(b, 0); n != len(b) {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func loadFile(t testing.TB, path string) *blockdev.Memory {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	m := blockdev.NewMemory(int64(len(b)))
	if _, err := m.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return m
}

// noise is bytes that are those of no other seed.
func noise(seed byte, n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

// crashOp is an operation of a trial. salt makes its data differ from that of
// others.
type crashOp struct {
	name string
	run  func(tr *qcow2.Trial, c int64, salt byte)
}

func guestOps() []crashOp {
	write := func(at, more int64, n func(c int64) int64) func(tr *qcow2.Trial, c int64, salt byte) {
		return func(tr *qcow2.Trial, c int64, salt byte) {
			off := at*c + more
			if n := min(n(c), tr.Image.Size()-off); n > 0 { // the disk may have become smaller
				tr.Write(off, noise(100+salt, int(n)))
			}
		}
	}
	pack := func(at, n int64) func(tr *qcow2.Trial, c int64, salt byte) {
		return func(tr *qcow2.Trial, c int64, salt byte) {
			if h := tr.Image.Header(); h.CryptMethod != qcow2.CryptNone || h.IncompatibleFeatures&qcow2.IncompatDataFile != 0 {
				return
			}
			b := noise(200+salt, int(n*c))
			for i := range b {
				if i%3 > 0 || i < int(c/2) { // some clusters are smaller than others
					b[i] = 'x'
				}
			}
			tr.Pack(at*c, b)
		}
	}
	times := func(num, den int64) func(c int64) int64 { return func(c int64) int64 { return c * num / den } }
	return []crashOp{
		{"write clusters", write(plainAt, 0, times(2, 1))},
		{"write parts", write(plainAt+1, 100, times(1, 1))},
		{"write over compressed", write(compressedAt, 70, times(3, 2))},
		{"write over zeroes", write(zeroAt, 5, times(1, 2))},
		{"write over kept zeroes", write(zeroAllocAt, 300, times(1, 1))},
		{"write where nothing is", write(emptyAt, 10, times(5, 2))},
		{"write across", write(mixedAt, 200, times(6, 1))},
		{"write without a table", write(emptyTableAt, 10, times(1, 1))},
		{"write many", write(emptyTableAt, 0, func(c int64) int64 { return min(60*c, 64<<10) })},
		{"write the end", write(fixtureClusters-1, 0, func(c int64) int64 { return c - 512 })},
		{"pack clusters", pack(plainAt+2, 5)},
		{"pack across", pack(mixedAt-2, 9)},
		{"zero data", func(tr *qcow2.Trial, c int64, _ byte) { tr.Zero(plainAt*c+100, 2*c) }},
		{"zero compressed", func(tr *qcow2.Trial, c int64, _ byte) { tr.Zero((compressedAt+1)*c, c) }},
		{"zero across", func(tr *qcow2.Trial, c int64, _ byte) { tr.Zero(mixedAt*c, 6*c) }},
		{"discard data", func(tr *qcow2.Trial, c int64, _ byte) { tr.Discard(plainAt*c, 3*c) }},
		{"discard compressed", func(tr *qcow2.Trial, c int64, _ byte) { tr.Discard(compressedAt*c, 2*c) }},
		{"discard across", func(tr *qcow2.Trial, c int64, _ byte) { tr.Discard((zeroAt-1)*c+9, 12*c) }},
		{"clear across", func(tr *qcow2.Trial, c int64, _ byte) { tr.Clear(mixedAt*c-9, 7*c) }},
	}
}

func snapshotCreate(tr *qcow2.Trial, name string) error {
	_, err := tr.Image.CreateSnapshot(context.Background(), name, nil)
	return err
}

// wholeOps are operations that a crash leaves undone or done, as far as a
// variant has them.
func wholeOps(v variant) []crashOp {
	ctx := context.Background()
	var list []crashOp
	do := func(name string, op func(tr *qcow2.Trial, salt byte) error) {
		list = append(list, crashOp{name, func(tr *qcow2.Trial, _ int64, salt byte) {
			tr.DoOrRefuse(name, func() error { return op(tr, salt) })
		}})
	}
	if !v.data && v.RefcountBits > 1 {
		do("snapshot create", func(tr *qcow2.Trial, salt byte) error { return snapshotCreate(tr, fmt.Sprint("new", salt)) })
	}
	if v.snapshot {
		do("snapshot apply", func(tr *qcow2.Trial, _ byte) error { return tr.Image.ApplySnapshot(ctx, "first") })
		do("snapshot replace", func(tr *qcow2.Trial, _ byte) error {
			tx, err := tr.Image.BeginSnapshots(ctx)
			if err != nil {
				return err
			}
			defer tx.Abort()
			if err := tx.Delete("first"); err != nil {
				return err
			}
			if _, err := tx.Create("first", nil); err != nil {
				return err
			}
			return tx.Commit()
		})
	}
	if v.Version == 3 && !v.data {
		do("bitmap add", func(tr *qcow2.Trial, salt byte) error {
			return tr.Image.AddBitmap(ctx, fmt.Sprint("bitmap", salt), nil)
		})
		do("bitmap remove", func(tr *qcow2.Trial, _ byte) error { return tr.Image.RemoveBitmap(ctx, "bitmap1") })
	}
	do("grow", func(tr *qcow2.Trial, _ byte) error {
		return tr.Image.Resize(ctx, tr.Image.Size()+70*v.ClusterSize, nil)
	})
	do("shrink", func(tr *qcow2.Trial, _ byte) error {
		return tr.Image.Resize(ctx, (emptyTableAt+2)*v.ClusterSize+512, &qcow2.ResizeOptions{Shrink: true})
	})
	do("amend", func(tr *qcow2.Trial, salt byte) error {
		o := qcow2.AmendOptions{Version: 2, RefcountBits: 16}
		if salt == 2 {
			o = qcow2.AmendOptions{Version: 3, RefcountBits: 32}
		}
		_, err := tr.Image.Amend(ctx, &o)
		return err
	})
	if v.backing {
		list = append(list, crashOp{"rebase", func(tr *qcow2.Trial, c int64, _ byte) {
			if list, err := tr.Image.Bitmaps(); err != nil || len(list) > 0 {
				return // which are saved before the backing file changes, by themselves
			}
			tr.Zero(mixedAt*c, c) // it may leak as any guest write
			tr.Do("rebase", func() error { return tr.Image.Rebase(ctx, nil, "", "", nil) })
		}})
	}
	return list
}

// TestCrashSequences looks at what a crash leaves of every operation, and of
// sequences of two, with and without a sync between them, on every variant.
func TestCrashSequences(t *testing.T) {
	one := &blocktest.CrashOptions{Subsets: 16, Tears: 2}
	two, share := one, 100 // of the sequences one in so many is run
	if *crashLong {
		one, two, share = nil, &blocktest.CrashOptions{Subsets: 32, Tears: 2}, 1
	} else if oracle.SlowBuild {
		share = 1000
	}
	states, faults, all := 0, 0, true
	for vi, v := range variants() {
		t.Run(v.name, func(t *testing.T) {
			f := newFixture(t, v)
			ops := append(guestOps(), wholeOps(v)...)
			run := func(name string, opts *blocktest.CrashOptions, steps func(tr *qcow2.Trial)) {
				t.Run(name, func(t *testing.T) {
					defer func() { all = all && !t.Skipped() }()
					tr := f.trial(t)
					steps(tr)
					states += tr.Verify(opts)
					faults += tr.RepairFaults
				})
			}
			n := vi
			for _, a := range ops {
				if n++; n%min(share, 4) == 0 && (!oracle.SlowBuild || n%16 == 0) {
					run(a.name, one, func(tr *qcow2.Trial) { a.run(tr, f.c, 1); tr.Sync() })
				}
				for _, b := range ops {
					for _, sync := range []bool{false, true} {
						if n++; n%share != 0 {
							continue
						}
						run(fmt.Sprintf("%s, %s, sync %v", a.name, b.name, sync), two, func(tr *qcow2.Trial) {
							a.run(tr, f.c, 1)
							if sync {
								tr.Sync()
							}
							b.run(tr, f.c, 2)
							tr.Sync()
						})
					}
				}
			}
		})
	}
	t.Logf("%d states, %d faults while one was repaired", states, faults)
	if !t.Failed() && all && !oracle.SlowBuild && (states < 5000 || faults < 200) {
		t.Errorf("%d states, %d faults while one was repaired; expected 5000 and 200 at least", states, faults)
	}
}

// TestCrashGrowth looks at what a crash leaves where the writes of the guest
// need new refcount blocks and a larger refcount table.
func TestCrashGrowth(t *testing.T) {
	opts := &blocktest.CrashOptions{Subsets: 32, Tears: 2}
	if *crashLong {
		opts = nil
	} else if oracle.SlowBuild {
		opts.Subsets = 4
	}
	for _, format := range []qcow2.FormatOptions{
		{ClusterSize: 512, RefcountBits: 64},
		{ClusterSize: 512, RefcountBits: 16},
		{ClusterSize: 512, Version: 2},
	} {
		t.Run(fmt.Sprint(format.Version, " ", format.RefcountBits), func(t *testing.T) {
			bits := int64(max(format.RefcountBits, 16))
			block := int64(512) * (512 * 8 / bits) // what a refcount block counts
			table := block * (512 / 8)             // and a refcount table of a cluster
			m := blockdev.NewMemory(0)
			if err := qcow2.Create(t.Context(), m, table+64<<10, &qcow2.CreateOptions{FormatOptions: format}); err != nil {
				t.Fatal(err)
			}
			im, err := qcow2.New(m, &qcow2.OpenOptions{Write: true})
			if err != nil {
				t.Fatal(err)
			}
			// Up to where the table, and its last block, are nearly full.
			at := int64(0)
			for ; m.Size() < table-6<<10; at += 2048 {
				if _, err := im.WriteAt(noise(byte(at>>11), 2048), at); err != nil {
					t.Fatal(err)
				}
			}
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			tables := im.Header().RefcountTableClusters
			tr := qcow2.NewTrial(t, m, &qcow2.TrialOptions{EveryWrite: 50})
			tr.Write(at, noise(60, 1024))
			tr.Sync()
			for i := range int64(4) {
				tr.Write(at+2048+3072*i, noise(byte(61+i), 3072))
			}
			tr.Sync()
			tr.Write(at+20<<10, noise(70, 3072))
			if n := tr.Image.Header().RefcountTableClusters; n == tables {
				t.Errorf("the refcount table has %d clusters as before", n)
			}
			t.Logf("%d states", tr.Verify(opts))
		})
	}
}

// deaf loses every Sync.
type deaf struct{ *blocktest.Recorder }

func (deaf) Sync() error { return nil }

// forgetful syncs only every other time.
type forgetful struct {
	*blocktest.Recorder
	calls int
}

func (f *forgetful) Sync() error {
	if f.calls++; f.calls%2 == 0 {
		return nil
	}
	return f.Recorder.Sync()
}

// late keeps small writes back until something is synced, and does them then in
// the opposite order, after the sync.
type late struct {
	*blocktest.Recorder
	kept []blocktest.Op
}

func (l *late) WriteAt(p []byte, off int64) (int, error) {
	if len(p) <= 512 {
		l.kept = append(l.kept, blocktest.Op{Off: off, Data: append([]byte(nil), p...)})
		return len(p), nil
	}
	return l.Recorder.WriteAt(p, off)
}

func (l *late) ReadAt(p []byte, off int64) (int, error) {
	n, err := l.Recorder.ReadAt(p, off)
	for _, op := range l.kept {
		if lo, hi := max(op.Off, off), min(op.Off+int64(len(op.Data)), off+int64(len(p))); lo < hi {
			copy(p[lo-off:hi-off], op.Data[lo-op.Off:])
		}
	}
	if err == io.EOF && n == len(p) {
		err = nil
	}
	return n, err
}

func (l *late) Sync() error {
	if err := l.Recorder.Sync(); err != nil {
		return err
	}
	for _, op := range l.kept {
		if _, err := l.Recorder.WriteAt(op.Data, op.Off); err != nil {
			return err
		}
	}
	l.kept = nil
	return nil
}

// TestCrashTrialFinds: work that is right on a device that keeps its promises
// is found wrong on those that do not.
func TestCrashTrialFinds(t *testing.T) {
	f := newFixture(t, variant{FormatOptions: qcow2.FormatOptions{ClusterSize: 512}})
	for name, wrap := range map[string]func(r *blocktest.Recorder) blockdev.Device{
		"right":     func(r *blocktest.Recorder) blockdev.Device { return r },
		"deaf":      func(r *blocktest.Recorder) blockdev.Device { return deaf{r} },
		"forgetful": func(r *blocktest.Recorder) blockdev.Device { return &forgetful{Recorder: r} },
		"late":      func(r *blocktest.Recorder) blockdev.Device { return &late{Recorder: r} },
	} {
		t.Run(name, func(t *testing.T) {
			tr := qcow2.NewTrial(t, f.dev.Clone(), &qcow2.TrialOptions{EveryOracle: -1,
				Wrap: func(d blockdev.Device) blockdev.Device { return wrap(d.(*blocktest.Recorder)) }})
			tr.Write(emptyAt*f.c, noise(50, 1500))
			tr.Sync()
			tr.Discard(plainAt*f.c, 3*f.c)
			tr.Write(emptyTableAt*f.c, noise(51, 700))
			tr.Sync()
			tr.Write(mixedAt*f.c, noise(52, 3000))
			tr.Sync()
			n, err := tr.TryVerify(&blocktest.CrashOptions{Subsets: 64, Tears: 4})
			t.Logf("%d states: %v", n, err)
			if (err == nil) != (name == "right") {
				t.Errorf("%v", err)
			}
		})
	}
}

// newImage makes an empty image in memory.
func newImage(t testing.TB, size int64, o qcow2.FormatOptions) *blockdev.Memory {
	t.Helper()
	m := blockdev.NewMemory(0)
	if err := qcow2.Create(t.Context(), m, size, &qcow2.CreateOptions{FormatOptions: o}); err != nil {
		t.Fatal(err)
	}
	return m
}

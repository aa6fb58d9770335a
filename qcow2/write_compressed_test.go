package qcow2_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/oracle"
	"qimg/qcow2/transfer"
)

// Clusters that are written compressed, among other changes, read as they were
// written, and qemu-img finds nothing wrong with them.
func TestWriteCompressed(t *testing.T) {
	oracle.Require(t, "qemu-img")
	for i, o := range []qcow2.FormatOptions{
		{}, {Version: 2}, {ClusterSize: 512}, {ClusterSize: 4096, RefcountBits: 1}, {ClusterSize: 4096, RefcountBits: 2},
		{ClusterSize: 2 << 20}, {Compression: qcow2.CompressionZstd}, {ExtendedL2: true},
	} {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			cluster := o.ClusterSize
			if cluster == 0 {
				cluster = 65536
			}
			size := 40*cluster - cluster/2&^511
			path := filepath.Join(t.TempDir(), "image")
			saveFile(t, newImage(t, size, o), path)
			im, err := qcow2.Open(path, &qcow2.OpenOptions{Write: true})
			if err != nil {
				t.Fatal(err)
			}
			defer im.Close()
			want := make([]byte, size)
			r := rand.New(rand.NewPCG(uint64(i), 3))
			for step := range min(150, 64<<20/cluster) {
				at := r.Int64N(40)
				off := at * cluster
				p := want[off:min(size, off+cluster*(1+r.Int64N(3)))]
				switch r.IntN(8) {
				case 0:
					clear(p)
					err = im.WriteZeroes(off, int64(len(p)))
				case 1:
					copy(p, noise(byte(step), len(p)))
					_, err = im.WriteAt(p, off)
				case 2:
					err = im.Sync()
				default:
					text := fmt.Sprintf("%d compressed %d\n", step, r.IntN(1000))
					for n := range p {
						p[n] = text[n%len(text)]
					}
					copy(p[r.IntN(len(p)):], noise(byte(step), int(r.Int64N(cluster))))
					if r.IntN(9) == 0 {
						clear(p)
					}
					err = im.WriteCompressed(p, off)
				}
				if err != nil {
					t.Fatalf("step %d: %v", step, err)
				}
			}
			got := make([]byte, size)
			if _, err := im.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
				t.Errorf("the guest reads something else, %v", err)
			}
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			if r := oracle.Run(t, "qemu-img", "check", path); r.Code != 0 {
				t.Errorf("check: %+v", r)
			}
			if err := os.WriteFile(path+".raw", want, 0o600); err != nil {
				t.Fatal(err)
			}
			oracle.MustRun(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", path, path+".raw")
		})
	}
}

// Several goroutines compress side by side, and while the header changes, and the
// clusters share the clusters of the file.
func TestWriteCompressedTogether(t *testing.T) {
	m := newImage(t, 16<<20, qcow2.FormatOptions{})
	im, err := qcow2.New(m, &qcow2.OpenOptions{Write: true, CompressionLevel: 1})
	if err != nil {
		t.Fatal(err)
	}
	p := []byte(strings.Repeat("compressed clusters lie side by side\n", 65536/37+1)[:65536])
	var wg sync.WaitGroup
	for w := range int64(4) {
		wg.Go(func() {
			for i := w; i < 256; i += 4 {
				if err := im.WriteCompressed(p, i<<16); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Go(func() {
		if err := im.AddBitmap(t.Context(), "b", nil); err != nil {
			t.Error(err)
		}
	})
	wg.Wait()
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	if m.Size() > 14*65536 {
		t.Errorf("the image has %d bytes", m.Size())
	}
	if err := intact(t, m, nil, bytes.Repeat(p, 256), true); err != nil {
		t.Error(err)
	}
}

func TestWriteCompressedRefuses(t *testing.T) {
	m := newImage(t, 1<<20, qcow2.FormatOptions{})
	im, err := qcow2.New(m, &qcow2.OpenOptions{Write: true})
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	for _, c := range [][2]int64{{0, 100}, {512, 65536}, {15 << 16, 2 << 16}, {16 << 16, 65536}} {
		if err := im.WriteCompressed(make([]byte, c[1]), c[0]); err == nil {
			t.Errorf("%d bytes at %d were written", c[1], c[0])
		}
	}
	f := newFixture(t, variant{FormatOptions: qcow2.FormatOptions{ClusterSize: 4096}, data: true})
	im, err = qcow2.New(f.dev, &qcow2.OpenOptions{Write: true, DataDevice: f.data})
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	if err := im.WriteCompressed(make([]byte, 4096), 0); !errors.Is(err, qcow2.ErrUnsupported) {
		t.Errorf("with a data file: %v", err)
	}
}

// A cluster of the file that was given up gets no more compressed clusters.
func TestWriteCompressedFreed(t *testing.T) {
	const cluster = 65536
	m := newImage(t, 8*cluster, qcow2.FormatOptions{})
	im, err := qcow2.New(m, &qcow2.OpenOptions{Write: true})
	if err != nil {
		t.Fatal(err)
	}
	want := make([]byte, 8*cluster)
	a, b := want[cluster:2*cluster], want[2*cluster:3*cluster]
	copy(a, noise(1, cluster))
	copy(b, noise(2, 100))
	for _, do := range []func() error{
		func() error { return im.WriteCompressed(b, 0) },
		func() error { return im.WriteZeroes(0, cluster) },
		im.Sync,
		func() error { _, err := im.WriteAt(a, cluster); return err },
		func() error { return im.WriteCompressed(b, 2*cluster) },
		im.Close,
	} {
		if err := do(); err != nil {
			t.Fatal(err)
		}
	}
	if err := intact(t, m, nil, want, true); err != nil {
		t.Error(err)
	}
}

// What a CompressedWriter writes from many goroutines does not depend on them, and
// reads as it was written.
func TestCompressedWriter(t *testing.T) {
	oracle.Require(t, "qemu-img")
	const cluster, size = 4096, 300*4096 - 512
	disk := make([]byte, size)
	r := rand.New(rand.NewPCG(1, 7))
	for at := 0; at < size; at += cluster {
		part := disk[at:min(size, at+cluster)]
		switch r.IntN(4) {
		case 0:
		case 1:
			copy(part, noise(byte(at>>12), len(part)))
		default:
			copy(part, bytes.Repeat([]byte{byte(r.Uint32())}, r.IntN(len(part))))
		}
	}
	path := filepath.Join(t.TempDir(), "image")
	saveFile(t, newImage(t, size, qcow2.FormatOptions{ClusterSize: cluster}), path)
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var first []byte
	for run := range 6 {
		if err := os.WriteFile(path, before, 0o600); err != nil {
			t.Fatal(err)
		}
		im, err := qcow2.Open(path, &qcow2.OpenOptions{Write: true})
		if err != nil {
			t.Fatal(err)
		}
		w, err := im.NewCompressedWriter()
		if err != nil {
			t.Fatal(err)
		}
		src := blockdev.NewMemory(size)
		if _, err := src.WriteAt(disk, 0); err != nil {
			t.Fatal(err)
		}
		if err := transfer.Copy(t.Context(), w, src, &transfer.Options{Workers: 1 + 3*run}); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, size)
		if _, err := im.ReadAt(got, 0); err != nil || !bytes.Equal(got, disk) {
			t.Errorf("the guest reads something else, %v", err)
		}
		if err := im.Close(); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if first == nil {
			first = b
			if r := oracle.Run(t, "qemu-img", "check", path); r.Code != 0 {
				t.Errorf("check: %+v", r)
			}
		}
		if !bytes.Equal(b, first) {
			t.Errorf("run %d makes another image than the first", run)
		}
	}
}

// An error, and Abort, end those who wait for their turn.
func TestCompressedWriterAbort(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image")
	saveFile(t, newImage(t, 1<<20, qcow2.FormatOptions{}), path)
	im, err := qcow2.Open(path, &qcow2.OpenOptions{Write: true})
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	for _, end := range []func(w *qcow2.CompressedWriter) error{
		func(w *qcow2.CompressedWriter) error { w.Abort(); return os.ErrClosed },
		func(w *qcow2.CompressedWriter) error { return w.WriteZeroes(0, 2<<20) },
	} {
		w, err := im.NewCompressedWriter()
		if err != nil {
			t.Fatal(err)
		}
		waits := make(chan error)
		go func() { _, err := w.WriteAt(make([]byte, 65536), 65536); waits <- err }()
		want := end(w)
		if err := <-waits; want == nil || !errors.Is(err, want) {
			t.Errorf("%v, want %v", err, want)
		}
		if err := w.Skip(0, 65536); !errors.Is(err, want) {
			t.Errorf("%v, want %v", err, want)
		}
	}
}

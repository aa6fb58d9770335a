package qcow2_test

import (
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/oracle"
)

// filesImage makes an image whose guest data is that of files, one after the
// other, and returns its path.
func filesImage(b *testing.B, size int64, compress bool) string {
	b.Helper()
	name := filepath.Join(b.TempDir(), "files.qcow2")
	out, err := blockdev.CreateFile(name, &blockdev.CreateOptions{NoSync: true})
	if err != nil {
		b.Fatal(err)
	}
	w, err := qcow2.NewWriter(b.Context(), out.File(), size, &qcow2.WriterOptions{
		Compress: compress,
		Extents:  func(yield func(off, n int64) bool) { yield(0, size) },
	})
	if err != nil {
		b.Fatal(err)
	}
	r, pw := io.Pipe()
	go func() {
		err := filepath.WalkDir(filepath.Join(oracle.Input(b, "rootfs"), "usr"), func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			data, err := os.ReadFile(path)
			if err == nil {
				_, err = pw.Write(data)
			}
			return err
		})
		pw.CloseWithError(err)
	}()
	buf := make([]byte, 1<<20)
	for off := int64(0); off < size; off += int64(len(buf)) {
		if _, err := io.ReadFull(r, buf); err != nil {
			b.Fatal(err)
		}
		if _, err := w.WriteAt(buf, off); err != nil {
			b.Fatal(err)
		}
	}
	r.Close()
	if err := w.Finish(); err != nil {
		b.Fatal(err)
	}
	if err := out.Commit(); err != nil {
		b.Fatal(err)
	}
	return name
}

// Random reads of 4 KiB from all cores, from an image in the page cache.
func BenchmarkReadAt(b *testing.B) {
	for _, c := range []struct {
		name     string
		compress bool
	}{{"plain", false}, {"zlib", true}} {
		b.Run(c.name, func(b *testing.B) {
			im, err := qcow2.Open(filesImage(b, 256<<20, c.compress), nil)
			if err != nil {
				b.Fatal(err)
			}
			defer im.Close()
			var seed atomic.Uint64
			b.ResetTimer()
			b.RunParallel(func(pb *testing.PB) {
				r := rand.New(rand.NewPCG(seed.Add(1), 0))
				p := make([]byte, 4096)
				for pb.Next() {
					if _, err := im.ReadAt(p, r.Int64N(im.Size()/4096)*4096); err != nil {
						b.Error(err)
						return
					}
				}
			})
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "reads/s")
		})
	}
}

// Reads of 4 KiB with the offsets of qemu-img bench, against it: the time of a
// read here in proportion to one there. Each pair runs back to back.
func BenchmarkReadAtQEMU(b *testing.B) {
	oracle.Require(b, "qemu-img")
	const reads, step, size = 20000, 1<<20 + 4096*5, 256 << 20
	name := filesImage(b, size, true)
	im, err := qcow2.Open(name, nil)
	if err != nil {
		b.Fatal(err)
	}
	defer im.Close()
	var sum float64
	for b.Loop() {
		out := oracle.MustRun(b, "qemu-img", "bench", "-U", "-c", strconv.Itoa(reads), "-s", "4096", "-S", strconv.Itoa(step), "-t", "writeback", name)
		_, rest, _ := strings.Cut(out, "Run completed in ")
		theirs, err := strconv.ParseFloat(strings.Fields(rest)[0], 64)
		if err != nil {
			b.Fatalf("%v: %s", err, out)
		}
		start := time.Now()
		var next atomic.Int64
		done := make(chan error)
		const workers = 2
		for range workers {
			go func() {
				p := make([]byte, 4096)
				for i := next.Add(1) - 1; i < reads; i = next.Add(1) - 1 {
					if _, err := im.ReadAt(p, i*step%size&^4095); err != nil {
						done <- err
						return
					}
				}
				done <- nil
			}()
		}
		for range workers {
			if err := <-done; err != nil {
				b.Fatal(err)
			}
		}
		sum += theirs / time.Since(start).Seconds()
	}
	b.ReportMetric(sum/float64(b.N), "times-qemu-img")
}

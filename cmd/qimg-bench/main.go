// Command qimg-bench measures qimg against the programs that people use
// instead, on the same input, in turn, in one run. It prints medians and
// ratios: absolute times are the machine's, ratios are qimg's.
//
//	go run ./cmd/qimg-bench [-n RUNS] [-tmp DIR] TREE...
//	go run ./cmd/qimg-bench [-n RUNS] [-tmp DIR] -images TREE
//	go run ./cmd/qimg-bench [-n RUNS] [-tmp DIR] -transfer [-only PATTERN] TREE
//
// For every TREE it makes a disk with `qimg build` (qcow2) and with
// `mke2fs -t ext4 -d` (raw). Both end with the disk on stable storage. Source
// trees are read once before, so that both find them in memory. With -images it
// measures the commands for images against those of qemu-img instead, on an
// image made from TREE and on images of metadata alone. With -transfer it
// measures what moves data (convert, compare) on a disk of 2 GiB made from TREE,
// 1 GiB of noise and a sparse disk of 8 GiB, against qemu-img, and plain copies
// against cp; neither syncs what it writes. It takes 10 GB of space for that.
// Only those cases are measured whose name fits PATTERN, a regular expression. It
// needs Go, e2fsprogs and qemu-img.
package main

import (
	"cmp"
	"context"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	runs := flag.Int("n", 5, "counted runs of each program")
	tmp := flag.String("tmp", "", "folder for the disks (default: the system's)")
	images := flag.Bool("images", false, "measure the commands for images against qemu-img")
	transfer := flag.Bool("transfer", false, "measure what moves data against qemu-img and cp")
	only := flag.String("only", "", "with -transfer: a regular expression for the names of the cases")
	flag.Parse()
	pattern, err := regexp.Compile(*only)
	if flag.NArg() == 0 || *runs < 1 || (*images || *transfer) && flag.NArg() != 1 || *images && *transfer || err != nil {
		fmt.Fprintln(os.Stderr, "usage: qimg-bench [-n RUNS] [-tmp DIR] [-images | -transfer [-only PATTERN]] TREE...")
		os.Exit(1)
	}
	err = bench(ctx, *tmp, func(dir, qimg string) error {
		switch {
		case *images:
			return benchImages(ctx, dir, qimg, *runs, flag.Arg(0))
		case *transfer:
			return benchTransfer(ctx, dir, qimg, *runs, flag.Arg(0), pattern)
		}
		return benchBuild(ctx, dir, qimg, *runs, flag.Args())
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, "qimg-bench:", err)
		os.Exit(1)
	}
}

// bench runs do with a folder for the disks and the program that is measured.
func bench(ctx context.Context, tmp string, do func(dir, qimg string) error) error {
	dir, err := os.MkdirTemp(tmp, "qimg-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	qimg := filepath.Join(dir, "qimg")
	build := exec.CommandContext(ctx, "go", "build", "-o", qimg, "./cmd/qimg")
	build.Stderr = os.Stderr
	if err := build.Run(); err != nil {
		return fmt.Errorf("go build: %w", err)
	}
	return do(dir, qimg)
}

// benchBuild measures build against mke2fs.
func benchBuild(ctx context.Context, dir, qimg string, runs int, trees []string) error {
	fmt.Printf("medians of %d pairs; ratios are qimg / mke2fs, pair by pair\n\n", runs)
	fmt.Printf("| tree | CPU qimg | CPU mke2fs | CPU ratio (min..max) | wall qimg | wall mke2fs | wall ratio (min..max) | peak MiB qimg | mke2fs |\n")
	fmt.Printf("|---|---|---|---|---|---|---|---|---|\n")
	for _, tree := range trees {
		bytes, err := measure(tree)
		if err != nil {
			return err
		}
		ours, theirs := filepath.Join(dir, "disk.qcow2"), filepath.Join(dir, "disk.raw")
		var a, b []sample
		for i := range runs + 1 {
			x, err := run(ctx, qimg, "build", "-q", tree, ours)
			if err != nil {
				return err
			}
			size := fmt.Sprintf("%dm", bytes>>20*3/2+256)
			y, err := run(ctx, "mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-d", tree, theirs, size)
			if err != nil {
				return err
			}
			for _, name := range []string{ours, theirs} {
				if err := os.Remove(name); err != nil {
					return err
				}
			}
			if i > 0 { // the first pair warms up
				a, b = append(a, x), append(b, y)
			}
		}
		fmt.Printf("| %s | %.2f s | %.2f s | %s | %.2f s | %.2f s | %s | %.0f | %.0f |\n", filepath.Base(tree),
			median(a, cpu), median(b, cpu), ratio(a, b, cpu), median(a, wall), median(b, wall), ratio(a, b, wall),
			median(a, peak), median(b, peak))
	}
	return nil
}

// sample is what one run took.
type sample struct {
	cpu, wall time.Duration
	peak      int64 // bytes of memory
	image     int64 // bytes of what was made; 0: not known
}

// run runs a program.
func run(ctx context.Context, program string, args ...string) (sample, error) {
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Stderr = os.Stderr
	start := time.Now()
	err := cmd.Run()
	s := sample{wall: time.Since(start)}
	if err != nil {
		return s, fmt.Errorf("%s: %w", program, err)
	}
	s.cpu = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	s.peak = peakMemory(cmd.ProcessState)
	return s, nil
}

// measure reads a tree and returns the bytes that its files and inodes take,
// as mke2fs gives a disk one inode for every 16 KiB.
func measure(tree string) (int64, error) {
	var sum int64
	err := filepath.WalkDir(tree, func(path string, d fs.DirEntry, err error) error {
		sum += 16 << 10
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		n, err := allocated(path)
		sum += n
		return err
	})
	return sum, err
}

func cpu(s sample) float64 { return s.cpu.Seconds() }

func wall(s sample) float64 { return s.wall.Seconds() }

// peak is in MiB.
func peak(s sample) float64 { return float64(s.peak) / (1 << 20) }

// image is in MiB.
func image(s sample) float64 { return float64(s.image) / (1 << 20) }

func median(s []sample, of func(sample) float64) float64 {
	v := make([]float64, len(s))
	for i := range s {
		v[i] = of(s[i])
	}
	slices.Sort(v)
	return v[len(v)/2]
}

// ratio is the median of the ratios of the pairs, with the least and greatest.
func ratio(a, b []sample, of func(sample) float64) string {
	v := make([]float64, len(a))
	for i := range a {
		v[i] = of(a[i]) / of(b[i])
	}
	slices.SortFunc(v, cmp.Compare[float64])
	return fmt.Sprintf("%.2f (%.2f..%.2f)", v[len(v)/2], v[0], v[len(v)-1])
}

// warm reads a file unless it is mostly holes, which reading would fill memory
// with.
func warm(path string, allocated int64) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || allocated < fi.Size()/2 {
		return err
	}
	_, err = io.Copy(io.Discard, f)
	return err
}

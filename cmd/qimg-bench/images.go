package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// imageCase is a command that both programs have.
type imageCase struct {
	name    string
	image   string   // IMAGE in args is a copy of it, or, if it is "", a file to be made
	program string   // that is measured against; "": qemu-img
	args    []string // of both programs
	qimg    []string // if they are others for qimg
	calls   int      // of qemu-img, N in args being their number; what they take is scaled to 1,000. 0: one, as it is
}

// benchImages measures the commands for images.
func benchImages(ctx context.Context, dir, qimg string, runs int, tree string) error {
	root, meta, many := filepath.Join(dir, "root.qcow2"), filepath.Join(dir, "meta.qcow2"), filepath.Join(dir, "many.qcow2")
	var create strings.Builder
	for i := range 1000 {
		fmt.Fprintf(&create, "create s%d\n", i)
	}
	list := filepath.Join(dir, "create.list")
	if err := os.WriteFile(list, []byte(create.String()), 0o666); err != nil {
		return err
	}
	for _, args := range [][]string{
		{qimg, "build", "-q", "--size", "2G", tree, root},
		{"cp", root, many},
		{qimg, "snapshot", "--from", list, many},
		{"qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", meta, "2T"},
	} {
		if _, err := run(ctx, args[0], args[1:]...); err != nil {
			return err
		}
	}
	cases := []imageCase{
		{name: "info", image: root, args: []string{"info", "IMAGE"}},
		{name: "create 16 TiB", args: []string{"create", "-q", "-f", "qcow2", "IMAGE", "16T"}},
		{name: "check, 2 TiB of metadata", image: meta, args: []string{"check", "-q", "IMAGE"}},
		{name: "map, 2 TiB of metadata", image: meta, args: []string{"map", "--output=json", "IMAGE"}},
		{name: "snapshot -l, 1,000 snapshots", image: many, args: []string{"snapshot", "-l", "IMAGE"}},
		{name: "snapshot -d, one of 1,000", image: many, args: []string{"snapshot", "-d", "s500", "IMAGE"}},
		{name: "amend compat=0.10, a root of 2 GiB", image: root, args: []string{"amend", "-o", "compat=0.10", "IMAGE"}},
		{name: "snapshot -c, 1,000 times (qemu-img: 20, scaled)", image: root,
			args: []string{"snapshot", "-c", "sN", "IMAGE"}, qimg: []string{"snapshot", "--from", list, "IMAGE"}, calls: 20},
	}
	printImageHeader(runs)
	for _, c := range cases {
		if err := c.bench(ctx, dir, qimg, runs); err != nil {
			return err
		}
	}
	return nil
}

func printImageHeader(runs int) {
	fmt.Printf("medians of %d pairs; ratios are qimg / the other, pair by pair\n\n", runs)
	fmt.Printf("| command | CPU qimg | CPU qemu-img | CPU ratio (min..max) | wall qimg | wall qemu-img | wall ratio (min..max) | peak MiB qimg | qemu-img | image MiB qimg | qemu-img | ratio |\n")
	fmt.Printf("|---|---|---|---|---|---|---|---|---|---|---|---|\n")
}

// bench measures both programs, in turn, and prints a line of the table.
func (c *imageCase) bench(ctx context.Context, dir, qimg string, runs int) error {
	ours, program := c.args, cmp.Or(c.program, "qemu-img")
	if c.qimg != nil {
		ours = c.qimg
	}
	var a, b []sample
	for i := range runs + 1 {
		x, err := c.run(ctx, dir, 1, qimg, ours)
		if err != nil {
			return err
		}
		y, err := c.run(ctx, dir, max(c.calls, 1), program, c.args)
		if err != nil {
			return err
		}
		if c.calls > 0 {
			y = y.scaled(1000 / float64(c.calls))
		}
		if i > 0 { // the first pair warms up
			a, b = append(a, x), append(b, y)
		}
	}
	sizes := "| |"
	if median(a, image) > 0 {
		sizes = fmt.Sprintf("%.1f | %.1f | %.3f", median(a, image), median(b, image), median(a, image)/median(b, image))
	}
	fmt.Printf("| %s | %.3f s | %.3f s | %s | %.3f s | %.3f s | %s | %.0f | %.0f | %s |\n", c.name,
		median(a, cpu), median(b, cpu), ratio(a, b, cpu), median(a, wall), median(b, wall), ratio(a, b, wall),
		median(a, peak), median(b, peak), sizes)
	return nil
}

// run runs a program on a new copy of the image, and adds up what its calls
// take.
func (c *imageCase) run(ctx context.Context, dir string, calls int, program string, args []string) (sum sample, err error) {
	image := filepath.Join(dir, "copy.qcow2")
	defer os.Remove(image)
	if c.image != "" {
		if err := exec.CommandContext(ctx, "cp", "--reflink=auto", c.image, image).Run(); err != nil {
			return sum, fmt.Errorf("cp: %w", err)
		}
		// The copy is not written back while others are measured.
		if err := exec.CommandContext(ctx, "sync", image).Run(); err != nil {
			return sum, fmt.Errorf("sync: %w", err)
		}
	}
	for i := range calls {
		now := make([]string, len(args))
		for j, arg := range args {
			now[j] = strings.NewReplacer("IMAGE", image, "sN", fmt.Sprintf("s%d", i)).Replace(arg)
		}
		s, err := run(ctx, program, now...)
		if err != nil {
			return sum, err
		}
		sum = sample{cpu: sum.cpu + s.cpu, wall: sum.wall + s.wall, peak: max(sum.peak, s.peak)}
	}
	if fi, err := os.Stat(image); err == nil { // else it has made none
		sum.image = fi.Size()
	}
	return sum, nil
}

// scaled is s with times that are k times as long.
func (s sample) scaled(k float64) sample {
	s.cpu, s.wall = time.Duration(float64(s.cpu)*k), time.Duration(float64(s.wall)*k)
	return s
}

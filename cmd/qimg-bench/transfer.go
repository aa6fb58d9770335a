package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"qimg/qcow2/blockdev"
)

// transferCases are what moves data. IN.KIND in args is a file that is made
// from the disk: see transferBench.
func transferCases() []imageCase {
	convert := func(args ...string) []string { return append([]string{"convert"}, args...) }
	zlib := convert("-f", "raw", "-O", "qcow2", "-c", "IN.raw", "IMAGE")
	zstd := convert("-f", "raw", "-O", "qcow2", "-c", "-o", "compression_type=zstd", "IN.raw", "IMAGE")
	slower := func(args []string) []string {
		return convert(append([]string{"--compression-level", "8"}, args[1:]...)...)
	}
	return []imageCase{
		{name: "raw->qcow2", args: convert("-f", "raw", "-O", "qcow2", "IN.raw", "IMAGE")},
		{name: "qcow2->raw", args: convert("-f", "qcow2", "-O", "raw", "IN.qcow2", "IMAGE")},
		{name: "zlib->raw", args: convert("-f", "qcow2", "-O", "raw", "IN.zlib", "IMAGE")},
		{name: "zstd->raw", args: convert("-f", "qcow2", "-O", "raw", "IN.zstd", "IMAGE")},
		{name: "raw->zlib", args: zlib},
		{name: "raw->zlib, slower level", args: zlib, qimg: slower(zlib)},
		{name: "raw->zstd", args: zstd},
		{name: "raw->zstd, slower level", args: zstd, qimg: slower(zstd)},
		{name: "snapshot->qcow2", args: convert("-l", "first", "-f", "qcow2", "-O", "qcow2", "IN.snapshot", "IMAGE")},
		{name: "chain->qcow2", args: convert("-f", "qcow2", "-O", "qcow2", "IN.chain", "IMAGE")},
		{name: "compare", args: []string{"compare", "-f", "raw", "-F", "qcow2", "IN.raw", "IN.qcow2"}},
		{name: "copy (cp --sparse=always)", program: "cp", args: []string{"--sparse=always", "IN.raw", "IMAGE"},
			qimg: convert("-f", "raw", "-O", "raw", "IN.raw", "IMAGE")},
	}
}

// transferBench makes what is copied, when it is first needed.
type transferBench struct {
	ctx        context.Context
	dir        string
	qimg, tree string
}

// benchTransfer measures what moves data, in those cases whose name, after that
// of the disk, fits only.
func benchTransfer(ctx context.Context, dir, qimg string, runs int, tree string, only *regexp.Regexp) error {
	b := transferBench{ctx, dir, qimg, tree}
	printImageHeader(runs)
	for _, disk := range []string{"root", "noise", "sparse"} {
		for _, c := range transferCases() {
			c.name = disk + " " + c.name
			if !only.MatchString(c.name) {
				continue
			}
			for _, args := range [][]string{c.args, c.qimg} {
				for i, arg := range args {
					kind, ok := strings.CutPrefix(arg, "IN.")
					if !ok {
						continue
					}
					var err error
					if args[i], err = b.file(disk, kind); err != nil {
						return err
					}
				}
			}
			if err := c.bench(ctx, dir, qimg, runs); err != nil {
				return err
			}
		}
		files, err := filepath.Glob(filepath.Join(dir, disk+".*"))
		if err != nil {
			return err
		}
		for _, name := range files {
			if err := os.Remove(name); err != nil {
				return err
			}
		}
	}
	return nil
}

// file returns the name of a file that holds a disk, in one of the kinds raw,
// qcow2, zlib, zstd, snapshot (of an image that was written to since) and chain
// (an image that holds some, over the qcow2 one). All but the raw one are
// qemu-img's.
func (b *transferBench) file(disk, kind string) (string, error) {
	name := filepath.Join(b.dir, disk+"."+kind)
	if _, err := os.Stat(name); err == nil {
		return name, nil
	}
	if kind == "raw" {
		return name, b.makeRaw(disk, name)
	}
	raw, err := b.file(disk, "raw")
	if err != nil {
		return "", err
	}
	convert := []string{"qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, name}
	var steps [][]string
	switch kind {
	case "qcow2":
		steps = [][]string{convert}
	case "zlib":
		steps = [][]string{append(convert, "-c")}
	case "zstd":
		steps = [][]string{append(convert, "-c", "-o", "compression_type=zstd")}
	case "snapshot":
		steps = [][]string{convert, {"qemu-img", "snapshot", "-c", "first", name}, append([]string{"qemu-io", "-f", "qcow2", name}, writes(raw)...)}
	case "chain":
		base, err := b.file(disk, "qcow2")
		if err != nil {
			return "", err
		}
		steps = [][]string{
			{"qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", name},
			append([]string{"qemu-io", "-f", "qcow2", name}, writes(raw)...),
		}
	default:
		return "", fmt.Errorf("%s: no such kind of file", kind)
	}
	for _, args := range steps {
		if _, err := run(b.ctx, args[0], args[1:]...); err != nil {
			return "", err
		}
	}
	// It is not written back while others are measured.
	_, err = run(b.ctx, "sync", name)
	return name, err
}

// writes are the commands of qemu-io that write 128 places of a disk, 1 MiB each
// or less.
func writes(raw string) []string {
	fi, err := os.Stat(raw)
	if err != nil {
		return nil
	}
	var args []string
	step := fi.Size() / 128
	for i := range int64(128) {
		args = append(args, "-c", fmt.Sprintf("write -P %d %d %d", 1+i, i*step&^511, min(1<<20, step&^511)))
	}
	return args
}

// makeRaw makes a disk.
func (b *transferBench) makeRaw(disk, name string) error {
	if disk == "root" {
		_, err := run(b.ctx, b.qimg, "build", "-q", "-f", "raw", "--size", "2G", b.tree, name)
		return err
	}
	size, part, every := int64(1<<30), int64(1<<30), int64(1<<30) // 1 GiB of noise
	if disk == "sparse" {
		size, part, every = 8<<30, 2<<20, 64<<20
	}
	out, err := blockdev.CreateFile(name, nil)
	if err != nil {
		return err
	}
	if err = out.File().Truncate(size); err == nil {
		r := rand.NewChaCha8([32]byte{1})
		for off := int64(0); off < size && err == nil; off += every {
			_, err = io.CopyN(io.NewOffsetWriter(out.File(), off), r, part)
		}
	}
	if err != nil {
		return errors.Join(err, out.Abort())
	}
	return out.Commit()
}

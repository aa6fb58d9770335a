// Command example is a program outside of the module qimg that uses its
// packages: it converts a qcow2 image, tells how far it is, and prints a range
// of the disk in the new image.
//
//	go run . IN OUT OFFSET LENGTH
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"

	"qimg/qcow2"
	"qimg/qcow2/blockdev"
	"qimg/qcow2/transfer"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "example:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) != 4 {
		return fmt.Errorf("%d arguments, expected IN OUT OFFSET LENGTH", len(args))
	}
	off, err := strconv.ParseInt(args[2], 0, 64)
	if err != nil {
		return err
	}
	n, err := strconv.ParseInt(args[3], 0, 64)
	if err != nil {
		return err
	}
	err = convert(ctx, args[0], args[1], func(done, total int64) {
		fmt.Fprintf(os.Stderr, "%d of %d bytes\n", done, total)
	})
	if err != nil {
		return err
	}
	return printRange(args[1], off, n)
}

// convert makes a compressed image of what the guest of another one reads. A file
// that is there already is replaced at the end, if nothing went wrong.
func convert(ctx context.Context, in, out string, progress func(done, total int64)) error {
	src, err := qcow2.Open(in, &qcow2.OpenOptions{Backing: qcow2.BackingFollow})
	if err != nil {
		return err
	}
	defer src.Close()
	file, err := blockdev.CreateFile(out, nil)
	if err != nil {
		return err
	}
	defer file.Abort()
	dst, err := qcow2.NewWriter(ctx, file.File(), src.Size(), &qcow2.WriterOptions{InOrder: true, Compress: true})
	if err != nil {
		return err
	}
	if err := transfer.Copy(ctx, dst, src, &transfer.Options{Progress: progress}); err != nil {
		return err
	}
	if err := dst.Finish(); err != nil {
		return err
	}
	return file.Commit()
}

// printRange prints a range of the disk that an image holds.
func printRange(path string, off, n int64) error {
	im, err := qcow2.Open(path, nil)
	if err != nil {
		return err
	}
	defer im.Close()
	_, err = io.Copy(os.Stdout, io.NewSectionReader(im, off, n))
	return err
}

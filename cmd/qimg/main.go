// Command qimg makes, converts, inspects, changes and repairs disk images without
// root, mounts or any other program. See README.md.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"qimg/cmd/internal/cli"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the program at once
	code := cli.Run(ctx, os.Args, cli.Host{In: os.Stdin, Out: os.Stdout, Err: os.Stderr, Getenv: os.Getenv})
	stop()
	os.Exit(code)
}

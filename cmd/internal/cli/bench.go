package cli

import (
	"context"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"qimg/qcow2/blockdev"
)

// maxBenchMemory bounds the buffers of all requests that are under way, in bytes.
const maxBenchMemory = 1 << 30

type benchOptions struct {
	host     Host
	open     openOptions
	count    benchNumber
	depth    benchNumber
	pattern  benchNumber
	interval benchNumber // of flushes, in requests; 0: none
	size     benchSize
	step     benchSize // 0: size
	offset   byteCount
	aio      aioMode
	cache    benchCache
	native   bool
	noDrain  bool
	write    bool
	quiet    bool
}

func newBench(host Host) *cobra.Command {
	o := benchOptions{
		host:  host,
		count: benchNumber{"request count", math.MaxInt32, 75000}, depth: benchNumber{"queue depth", math.MaxInt32, 64},
		pattern: benchNumber{"pattern byte", 255, 0}, interval: benchNumber{"flush interval", math.MaxInt32, 0},
		size: benchSize{"buffer size", 4096}, step: benchSize{"step_size", 0}, offset: byteCount{what: "offset"},
	}
	cmd := &cobra.Command{
		Use: "bench [-c COUNT] [-d DEPTH] [-s SIZE] [-S STEP] [-o OFFSET] [-w [--pattern BYTE]\n" +
			"  [--flush-interval COUNT [--no-drain]]] [-f FORMAT] [-U] FILE",
		Short: "Measure how fast an image is read or written",
		Long: "Measure how fast an image is read, or with -w written: so many requests, one behind\n" +
			"the other from the offset on and around the end, of which as many as the depth says\n" +
			"are under way at the same time. What -w writes over is lost.",
		RunE: func(cmd *cobra.Command, args []string) error { return runBench(cmd.Context(), &o, args) },
	}
	f := cmd.Flags()
	o.open.addFlags(f, host)
	o.open.addForceShare(f)
	f.VarP(&o.count, "count", "c", "requests (default 75000)")
	f.VarP(&o.depth, "depth", "d", "requests that are under way at the same time (default 64)")
	f.VarP(&o.size, "buffer-size", "s", "bytes of a request (default 4096)")
	f.VarP(&o.step, "step-size", "S", "bytes from the beginning of a request to that of the next (default: those of a request)")
	f.VarP(&o.offset, "offset", "o", "where the first request begins")
	f.BoolVarP(&o.write, "write", "w", false, "write")
	f.Var(&o.pattern, "pattern", "byte to write (default 0)")
	f.Var(&o.interval, "flush-interval", "flush after so many requests")
	f.BoolVar(&o.noDrain, "no-drain", false, "do not wait for the requests under way before a flush")
	f.VarP(&o.cache, "cache", "t", "cache mode, for qemu-img's sake: it changes nothing")
	f.VarP(&o.aio, "aio", "i", "threads, native or io_uring, for qemu-img's sake: it changes nothing")
	f.BoolVarP(&o.native, "native", "n", false, "as -i native")
	f.BoolVarP(&o.quiet, "quiet", "q", false, "for qemu-img's sake: it changes nothing")
	return cmd
}

// benchNumber is an option that is a number, checked as it is read.
type benchNumber struct {
	what   string // for messages
	max, n int64
}

func (b *benchNumber) String() string { return "" }
func (b *benchNumber) Type() string   { return "number" }

// Set reads the number as C's strtoul does.
func (b *benchNumber) Set(arg string) error {
	s := strings.TrimPrefix(strings.TrimLeft(arg, " \t\n\v\f\r"), "+")
	base := 10
	if len(s) > 1 && s[0] == '0' {
		if base, s = 8, s[1:]; s[0]|0x20 == 'x' {
			base, s = 16, s[1:]
		}
	}
	n, err := strconv.ParseInt(s, base, 64)
	if err != nil || n < 0 || n > b.max {
		return messagef("Invalid %s specified", b.what)
	}
	b.n = n
	return nil
}

// benchSize is an option that is a size of at most 2 GiB - 1.
type benchSize byteCount

func (b *benchSize) String() string { return "" }
func (b *benchSize) Type() string   { return "size" }

func (b *benchSize) Set(arg string) (err error) {
	b.n, err = sizeArgIn(b.what, arg, 0, math.MaxInt32)
	return err
}

// aioMode is -i.
type aioMode struct{ native bool }

func (m *aioMode) String() string { return "" }
func (m *aioMode) Type() string   { return "string" }

func (m *aioMode) Set(arg string) error {
	if !slices.Contains([]string{"threads", "native", "io_uring"}, arg) {
		return messagef("Invalid aio option: %s", arg)
	}
	m.native = m.native || arg == "native"
	return nil
}

// benchCache is -t.
type benchCache string

func (c *benchCache) String() string { return "writeback" }
func (c *benchCache) Type() string   { return "string" }

func (c *benchCache) Set(arg string) error {
	if checkCache("cache", arg) != nil {
		return messagef("Invalid cache mode")
	}
	*c = benchCache(arg)
	return nil
}

// direct reports whether QEMU goes around the cache of the system.
func (c benchCache) direct() bool { return c == "none" || c == "off" || c == "directsync" }

func runBench(ctx context.Context, o *benchOptions, args []string) error {
	switch {
	case len(args) != 1:
		return usagef("Expecting one image file name")
	case !o.write && o.interval.n > 0:
		return messagef("--flush-interval is only available in write tests")
	case o.interval.n > 0 && o.interval.n < o.depth.n:
		return messagef("Flush interval can't be smaller than depth")
	case o.depth.n == 0 && o.count.n > 0: // qemu-img waits forever
		return messagef("Invalid queue depth specified")
	case min(o.depth.n, o.count.n)*o.size.n > maxBenchMemory:
		return fmt.Errorf("%d requests of %d bytes at the same time take more memory than the limit of %d bytes", o.depth.n, o.size.n, maxBenchMemory)
	}
	o.open.chain, o.open.write = true, o.write
	img, err := openImage(ctx, args[0], &o.open)
	if err != nil {
		return couldNotOpen(args[0], err)
	}
	if (o.native || o.aio.native) && !o.cache.direct() {
		img.close()
		return couldNotOpen(args[0], messagef("aio=native was specified, but it requires cache.direct=on, which was not specified."))
	}
	err = o.bench(ctx, img)
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	img.closeTo(&err)
	return err
}

func (o *benchOptions) bench(ctx context.Context, img *image) error {
	b := &bench{benchOptions: o, disk: newGuestDisk(img), size: uint64(img.size())}
	kind := "read"
	if o.write {
		kind = "write"
		b.dev, _ = img.reader().(blockdev.Device)
	}
	if o.step.n == 0 {
		o.step.n = o.size.n
	}
	fmt.Fprintf(o.host.Out, "Sending %d %s requests, %d bytes each, %d in parallel (starting at offset %d, step size %d)\n",
		o.count.n, kind, o.size.n, o.depth.n, o.offset.n, o.step.n)
	if o.interval.n > 0 {
		fmt.Fprintf(o.host.Out, "Sending flush every %d requests\n", o.interval.n)
	}
	for range min(o.depth.n, o.count.n) {
		if o.write && len(b.buf) > 0 {
			break // one for all
		}
		b.buf = append(b.buf, make([]byte, o.size.n))
	}
	if o.write && len(b.buf) > 0 {
		for i := range b.buf[0] {
			b.buf[0][i] = byte(o.pattern.n)
		}
	}
	start := time.Now()
	if err := b.run(ctx); err != nil {
		return err
	}
	fmt.Fprintf(o.host.Out, "Run completed in %3.3f seconds.\n", time.Since(start).Seconds())
	return nil
}

// bench is a measurement.
type bench struct {
	*benchOptions
	disk *guestDisk
	dev  blockdev.Device // to write to
	size uint64          // of the disk
	buf  [][]byte        // of the requests under way; of writes there is one

	next   atomic.Int64 // request to send
	failed atomic.Pointer[error]
	flush  sync.WaitGroup // flushes that nobody waits for
}

// run sends all requests, with flushes in between.
func (b *bench) run(ctx context.Context) error {
	// Requests are left over at a flush in multiples of the interval. As in
	// qemu-img the first ones are sent without a look at that.
	left := int64(0)
	if b.interval.n > 0 && !b.noDrain {
		left = (b.count.n - min(b.depth.n, b.count.n)) / b.interval.n * b.interval.n
	}
	for ; left >= 0 && b.next.Load() < b.count.n; left -= max(b.interval.n, 1) {
		b.requests(ctx, b.count.n-left)
		if b.interval.n > 0 && !b.noDrain && left > 0 {
			b.sync()
		}
		if err := b.failed.Load(); err != nil {
			return *err
		}
	}
	return ctx.Err()
}

// requests sends those before end, as many at the same time as the depth says,
// and waits for them.
func (b *bench) requests(ctx context.Context, end int64) {
	var wg sync.WaitGroup
	for i := range min(b.depth.n, end-b.next.Load()) {
		buf := b.buf[min(int(i), len(b.buf)-1)]
		wg.Go(func() {
			for ctx.Err() == nil && b.failed.Load() == nil {
				n := b.next.Add(1) - 1
				if n >= end {
					return
				}
				b.request(n, buf)
				if b.noDrain && b.interval.n > 0 && (b.count.n-n-1)%b.interval.n == 0 {
					b.flush.Go(b.sync)
				}
			}
		})
	}
	wg.Wait()
	b.next.Store(end)
	b.flush.Wait()
}

// request sends request n.
func (b *bench) request(n int64, buf []byte) {
	off := uint64(b.offset.n) // + n*step is below 2^64
	if n > 0 && b.size > 0 {
		off = (off + uint64(n)*uint64(b.step.n)) % b.size
	}
	var err error
	switch {
	case off+uint64(len(buf)) > b.size:
		err = syscall.EIO // as qemu-img has it
	case b.dev != nil:
		_, err = b.dev.WriteAt(buf, int64(off))
	default:
		if _, err = b.disk.ReadAt(buf, int64(off)); err == io.EOF {
			err = nil
		}
	}
	b.fail("Failed request", err)
}

func (b *bench) sync() { b.fail("Failed flush request", blockdev.Sync(b.dev)) }

// fail keeps the first error.
func (b *bench) fail(what string, err error) {
	if err != nil {
		err = messagef("%s: %w", what, &ioError{err})
		b.failed.CompareAndSwap(nil, &err)
	}
}

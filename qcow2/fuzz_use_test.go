package qcow2

import (
	"runtime/metrics"
	"testing"
	"time"

	"qimg/qcow2/blockdev"
	"qimg/qcow2/blockdev/oracle"
)

// Use is what the library has used in a fuzz test: bytes allocated and processor time.
type Use struct {
	bytes uint64
	time  time.Duration
}

// Of adds what f uses.
func (u *Use) Of(f func()) {
	before, start := allocated(), used()
	f()
	u.time += used() - start
	u.bytes += allocated() - before
}

// Bounded asks for a second at most, ten in a slow build, and 64 MiB and four
// times the n bytes of input. What a device in memory has allocated as the file
// became longer is not the library's.
func (u *Use) Bounded(t *testing.T, dev blockdev.Reader, n int) {
	t.Helper()
	limit := time.Second
	if oracle.SlowBuild {
		limit *= 10
	}
	if u.time > limit {
		t.Fatalf("%v for an image of %d bytes", u.time, n)
	}
	if longer := max(dev.Size()-int64(n), 0); u.bytes > uint64(64<<20+4*int64(n)+longer) {
		t.Fatalf("%d bytes allocated for an image of %d, now %d bytes longer", u.bytes, n, longer)
	}
}

func allocated() uint64 {
	s := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}

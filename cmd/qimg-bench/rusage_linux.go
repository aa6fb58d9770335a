package main

import (
	"os"
	"syscall"
)

// peakMemory is the most that a process had in memory, in bytes.
func peakMemory(s *os.ProcessState) int64 {
	if u, ok := s.SysUsage().(*syscall.Rusage); ok {
		return int64(u.Maxrss) << 10
	}
	return 0
}

// allocated reads a file, which brings it into memory, and returns the bytes
// that it takes on disk.
func allocated(path string) (int64, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return 0, err
	}
	n := fi.Sys().(*syscall.Stat_t).Blocks * 512
	return n, warm(path, n)
}

//go:build !linux

package qcow2

import "time"

var started = time.Now()

func used() time.Duration { return time.Since(started) }

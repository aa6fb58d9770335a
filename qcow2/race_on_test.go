//go:build race

package qcow2_test

// raceOn: the race detector makes tests ten times slower. Those that run in one
// goroutine do less then.
const raceOn = true

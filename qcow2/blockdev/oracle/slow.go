package oracle

import "testing"

// PlainBuild skips a test of how much memory or time something takes in a slow
// build, which has figures of its own.
func PlainBuild(t testing.TB) {
	t.Helper()
	if SlowBuild {
		t.Skip("memory and time are measured in the plain build")
	}
}

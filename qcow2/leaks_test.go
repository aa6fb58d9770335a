package qcow2

import (
	"fmt"
	"testing"
)

// CheckLeaks returns how many clusters of an image have leaked. Anything else that
// check finds is an error.
func CheckLeaks(t testing.TB, im *Image) (leaks int64, err error) {
	t.Helper()
	var first string
	res, err := im.Check(t.Context(), &CheckOptions{Found: func(f Finding) {
		if first == "" || f.Severity != Leak {
			first = f.String()
		}
	}})
	if err != nil {
		return 0, err
	}
	if res.Corruptions != 0 || res.CheckErrors != 0 {
		return 0, fmt.Errorf("check: %d corruptions, %d errors: %s", res.Corruptions, res.CheckErrors, first)
	}
	return res.Leaks, nil
}

// MustHaveLeaks fails the test unless so many clusters of an image have leaked and
// check finds nothing else.
func MustHaveLeaks(t testing.TB, im *Image, leaks int64) {
	t.Helper()
	if n, err := CheckLeaks(t, im); err != nil || n != leaks {
		t.Errorf("%d leaks, want %d; %v", n, leaks, err)
	}
}

package qcow2_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"qimg/qcow2"
)

// checkMap gives a result the form of qemu-img check --output=json.
func checkMap(r qcow2.CheckResult) map[string]any {
	m := map[string]any{
		"image-end-offset": float64(r.ImageEndOffset),
		"check-errors":     float64(r.CheckErrors),
	}
	for key, n := range map[string]int64{
		"total-clusters": r.TotalClusters, "allocated-clusters": r.AllocatedClusters, "fragmented-clusters": r.FragmentedClusters,
		"compressed-clusters": r.CompressedClusters, "corruptions": r.Corruptions, "leaks": r.Leaks,
	} {
		if n != 0 {
			m[key] = float64(n)
		}
	}
	return m
}

// checkExit is the exit status of qemu-img check.
func checkExit(r qcow2.CheckResult) int {
	switch {
	case r.Corruptions > 0:
		return 2
	case r.CheckErrors > 0:
		return 1
	case r.Leaks > 0:
		return 3
	}
	return 0
}

func TestZooCheck(t *testing.T) {
	zoo(t, func(t *testing.T, path string, want expected) {
		im, err := qcow2.Open(path, nil)
		if want.CheckRC == nil || *want.CheckRC == 1 {
			if err == nil {
				t.Fatal("opened")
			}
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		defer im.Close()
		var lines []string
		count := int64(0)
		got, err := im.Check(t.Context(), &qcow2.CheckOptions{Found: func(f qcow2.Finding) {
			lines = append(lines, f.String())
			count += f.Count
		}})
		if err != nil {
			t.Fatal(err)
		}
		delete(want.Check, "filename")
		delete(want.Check, "format")
		if d := cmp.Diff(want.Check, checkMap(got)); d != "" {
			t.Errorf("check: -qemu-img +got:\n%s", d)
		}
		if count != got.Corruptions+got.Leaks+got.CheckErrors {
			t.Errorf("%d findings, but totals %+v", count, got)
		}
		if rc := checkExit(got); rc != *want.CheckRC {
			t.Errorf("exit status %d, expected %d", rc, *want.CheckRC)
		}
		// The expectation holds the first 300 bytes of what qemu-img said.
		text := strings.Join(lines, "\n")
		if e := want.CheckError; e != nil && *e != text[:min(300, len(text))] && !strings.HasPrefix(*e, text) {
			t.Errorf("findings:\n%s\nexpected:\n%s", text, *e)
		}
	})
}

func TestCheckCancel(t *testing.T) {
	im := open(t, qcow2.NewTiny().Bytes())
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := im.Check(ctx, nil); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
}

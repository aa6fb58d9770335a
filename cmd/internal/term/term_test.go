package term_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"qimg/cmd/internal/term"
)

func TestProgress(t *testing.T) {
	var b strings.Builder
	for _, mode := range []term.Mode{term.Auto, term.None} {
		p, err := term.NewProgress(&b, mode, "x")
		if err != nil {
			t.Fatal(err)
		}
		p.Update(1, 2)
		p.Update(2, 2)
		p.Close()
		if b.Len() > 0 {
			t.Errorf("mode %s writes to a pipe: %q", mode, b.String())
		}
	}
	p, err := term.NewProgress(&b, term.Plain, "x")
	if err != nil {
		t.Fatal(err)
	}
	for _, done := range []int64{0, 1, 50, 51, 100} {
		p.Update(done<<55, 100<<55)
	}
	p.Update(0, 0)
	p.Close()
	if diff := cmp.Diff("x: 0%\nx: 50%\nx: 100%\n", b.String()); diff != "" {
		t.Error(diff)
	}
	if _, err := term.NewProgress(&b, "bar", "x"); err == nil {
		t.Error("an unknown mode is accepted")
	}
}

// Package term shows the progress of long work: a bar on a terminal, lines
// where they are asked for, and nothing where nobody looks.
package term

import (
	"fmt"
	"io"
	"os"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"
)

// Mode is how progress is shown.
type Mode string

const (
	Auto  Mode = "auto"  // a bar if the output is a terminal
	Plain Mode = "plain" // a line for every tenth
	None  Mode = "none"
)

// Progress shows how much of one piece of work is done. It is not safe for
// concurrent use.
type Progress struct {
	w     io.Writer
	label string
	mode  Mode
	tenth int64
	bar   *progressbar.ProgressBar
}

// NewProgress shows progress on w under a label. It is an error if mode is
// none of the three.
func NewProgress(w io.Writer, mode Mode, label string) (*Progress, error) {
	switch mode {
	case Plain, None:
	case Auto:
		if !IsTerminal(w) {
			mode = None
		}
	default:
		return nil, fmt.Errorf("progress is auto, plain or none, not %q", mode)
	}
	return &Progress{w: w, label: label, mode: mode, tenth: -1}, nil
}

// Update tells that done of total bytes are done.
func (p *Progress) Update(done, total int64) {
	if total <= 0 {
		return
	}
	switch p.mode {
	case Plain:
		// total can be above 2^63/100
		if tenth := int64(10 * (float64(done) / float64(total))); tenth > p.tenth {
			p.tenth = tenth
			fmt.Fprintf(p.w, "%s: %d%%\n", p.label, 10*tenth)
		}
	case Auto:
		if p.bar == nil {
			p.bar = progressbar.NewOptions64(total,
				progressbar.OptionSetWriter(p.w),
				progressbar.OptionSetDescription(p.label),
				progressbar.OptionShowBytes(true),
				progressbar.OptionUseIECUnits(true),
				progressbar.OptionThrottle(100*time.Millisecond),
				progressbar.OptionSetWidth(30),
				progressbar.OptionClearOnFinish())
		}
		p.bar.Set64(done)
	}
}

// Close takes the bar away, so that what is printed next begins a line.
func (p *Progress) Close() {
	if p.bar != nil {
		p.bar.Clear()
	}
}

// IsTerminal reports whether what is written to w, or to what it unwraps to, is shown
// on a terminal.
func IsTerminal(w io.Writer) bool {
	if u, ok := w.(interface{ Unwrap() io.Writer }); ok {
		w = u.Unwrap()
	}
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

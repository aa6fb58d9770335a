package cli

import "fmt"

// progress prints how much of a piece of work is done, as qemu-img -p does.
type progress struct {
	host Host
	show bool
	skip float64 // in percent: nothing is printed before as much was done
	last float64
}

// newProgress begins at 0.
func newProgress(host Host, show bool, skip float64) *progress {
	p := &progress{host: host, show: show, skip: skip}
	p.print(0)
	return p
}

// update is told how much is done.
func (p *progress) update(done, total int64) {
	if percent := float64(done) / float64(total) * 100; percent > p.last+p.skip || percent == 100 && p.last < 100 {
		p.print(percent)
	}
}

func (p *progress) print(percent float64) {
	p.last = percent
	if p.show {
		fmt.Fprintf(p.host.Out, "    (%3.2f/100%%)\r", percent)
	}
}

// end ends the line, at 100 % if all is done.
func (p *progress) end(done bool) {
	if done && p.last < 100 {
		p.print(100)
	}
	if p.show {
		fmt.Fprintln(p.host.Out)
	}
}

package qcow2

type repairer struct {
	all bool
}

func (r *repairer) beyond(off, n, k int64) {}

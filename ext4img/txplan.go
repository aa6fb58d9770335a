package ext4img

// Plan makes the transaction one that is only tried: the content of files is
// neither read nor written, and Commit is an error. All else is as it would be,
// so that what the transaction lacks, space or names, is an error of the
// operation that lacks it, before anything has changed. It is called before the
// first operation.
func (t *Tx) Plan() { t.plan = true }

// Fits returns the error of a Commit that would not fit the journal, which
// matches ErrTooLarge.
func (t *Tx) Fits() error {
	if t.e == nil || t.e.tx != t {
		return errTxOver
	}
	if err := t.seal(); err != nil || t.e.journal == nil {
		return err
	}
	return t.e.journal.fits(t.logged())
}

// Room returns how many more blocks a Commit could write to the journal, and
// how many it has room for in all. Without a journal nothing bounds them, and
// both are 0.
func (t *Tx) Room() (left, all int64) {
	j := t.e.journal
	if j == nil {
		return 0, 0
	}
	all = j.last - j.first - 2
	all -= ceilDiv(all, j.tagsPerBlock())
	return all - t.logged() - int64(len(t.unflushed)) - int64(len(t.descs)), all
}

// logged is how many blocks go through the journal as of now.
func (t *Tx) logged() int64 {
	n := int64(0)
	for _, s := range t.staged {
		if !s.fresh {
			n++
		}
	}
	return n
}

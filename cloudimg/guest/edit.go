package guest

import (
	"context"
	"errors"
	"fmt"

	"qimg/ext4img"
)

// Edits are changes of an ext file system that belong together.
type Edits struct {
	ctx   context.Context
	ed    *ext4img.Editor
	tx    *ext4img.Tx
	plan  bool
	split bool
	steps int // since the room was looked at
	count int // transactions that were committed
}

// EditOptions say how Edit works.
type EditOptions struct {
	// DryRun tries the changes alone.
	DryRun bool
	// TooLarge, if not nil, is told the error of changes that do not fit the
	// journal as one transaction, before they are made in several.
	TooLarge func(err error)
}

// Edit makes changes in one transaction: all that work does, or nothing. work is
// called twice: at first as a plan, which reads and writes no content of files,
// so that want of space is an error before anything has changed. What does
// not fit the journal as one transaction is made in several, where work calls Step
// between changes that can be told apart; count is how many were committed.
func Edit(ctx context.Context, ed *ext4img.Editor, opts *EditOptions, work func(*Edits) error) (count int, err error) {
	if opts == nil {
		opts = &EditOptions{}
	}
	c := &Edits{ctx: ctx, ed: ed, plan: true}
	if c.tx, err = ed.Begin(); err != nil {
		return 0, err
	}
	c.tx.Plan()
	if err = work(c); err == nil {
		if err = c.tx.Fits(); errors.Is(err, ext4img.ErrTooLarge) {
			if opts.TooLarge != nil {
				opts.TooLarge(err)
			}
			c.split, err = true, nil
		}
	}
	c.tx.Discard()
	if err != nil || opts.DryRun {
		return 0, err
	}
	c.plan = false
	if c.tx, err = ed.Begin(); err != nil {
		return 0, err
	}
	if err = work(c); err != nil {
		c.tx.Discard()
		return c.count, err
	}
	if err = c.tx.Commit(ctx); err == nil {
		c.count++
	}
	return c.count, err
}

// Tx returns the transaction that a change belongs to. Step ends it.
func (c *Edits) Tx() *ext4img.Tx { return c.tx }

// Planned reports whether nothing is changed yet.
func (c *Edits) Planned() bool { return c.plan }

// stepSize is how many steps are made before the room in the journal is looked
// at again.
const stepSize = 16

// Step says that what was changed up to now can be committed if need be.
func (c *Edits) Step() error {
	if err := c.ctx.Err(); err != nil {
		return err
	}
	if c.steps++; !c.split || c.steps%stepSize != 0 {
		return nil
	}
	if left, all := c.tx.Room(); left > all/2 {
		return nil
	}
	if err := c.tx.Commit(c.ctx); err != nil {
		return err
	}
	c.count++
	var err error
	c.tx, err = c.ed.Begin()
	return err
}

// Remove removes a name from a directory, and what is below if it leads to a
// directory.
func (c *Edits) Remove(dir ext4img.Ino, name string) error {
	if !c.split {
		return c.tx.RemoveAll(c.ctx, dir, name)
	}
	return c.removeParts(dir, name, 0)
}

// removeParts removes a name in steps, what is below first.
func (c *Edits) removeParts(dir ext4img.Ino, name string, depth int) error {
	e, err := c.tx.FS().LookupIn(dir, name)
	if err != nil {
		return err
	}
	n, err := c.tx.FS().Inode(e.Ino)
	switch {
	case err != nil:
		return err
	case depth > maxDepth:
		return fmt.Errorf("more than %d directories deep", maxDepth)
	case n.IsDir():
		var names []string
		for e, err := range c.tx.FS().Entries(n.Ino) {
			if err != nil {
				return err
			}
			if e.Name != "." && e.Name != ".." {
				names = append(names, e.Name)
			}
		}
		for _, name := range names {
			if err := c.removeParts(n.Ino, name, depth+1); err != nil {
				return err
			}
		}
	}
	if err := c.tx.Remove(dir, name); err != nil {
		return err
	}
	return c.Step()
}

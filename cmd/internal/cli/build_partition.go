package cli

import (
	"context"
	"fmt"

	"qimg/cloudimg/parttable"
	"qimg/cmd/internal/term"
	"qimg/ext4img"
	"qimg/qcow2/blockdev"
)

// buildTable is the table of a disk with one partition.
type buildTable struct {
	spec   parttable.Spec
	align  int64
	size   int64 // of the disk; 0: what is needed
	target *buildTarget
}

// newTable reads the options about a partition, and makes the file system as large
// as its partition if the disk has a size. Nil: there is no table.
func (o *buildOptions) newTable(d *disk, target *buildTarget, given func(flag string) bool) (*buildTable, error) {
	if o.partition == "none" {
		for _, flag := range []string{"partition-type", "align"} {
			if given(flag) {
				return nil, fmt.Errorf("--%s goes with --partition only", flag)
			}
		}
		return nil, nil
	}
	t := &buildTable{target: target, size: d.layout.Size}
	if target.device != nil {
		t.size = target.size() // a GPT has a part at the end
	}
	var err error
	if t.spec.Kind, err = parseTable(o.partition); err != nil {
		return nil, fmt.Errorf("--partition: %w", err)
	}
	part := parttable.Partition{Size: 1}
	if part.Type, err = parttable.ParseType(t.spec.Kind, o.partitionType); err != nil {
		return nil, err
	}
	if t.align, err = parseAlign(o.align); err != nil {
		return nil, err
	}
	if d.layout.Size > 0 {
		part.Size = 0 // the rest
	}
	t.spec.Partitions = []parttable.Partition{part}
	if _, err := t.spec.Place(t.align, t.size); err != nil {
		return nil, err
	}
	if d.layout.Size > 0 {
		whole := d.layout.Size
		d.layout.Size = t.spec.Partitions[0].Size
		d.around = func(size int64) int64 {
			if size == d.layout.Size {
				return whole
			}
			spec := t.spec
			spec.Partitions = []parttable.Partition{{Start: t.spec.Partitions[0].Start, Size: (size + 4095) &^ 4095}}
			need, err := spec.Place(t.align, 0)
			if err != nil {
				return size
			}
			return need
		}
	}
	return t, nil
}

// writeLayout writes the disk with a file system in its partition.
func (t *buildTable) writeLayout(ctx context.Context, layout *ext4img.Layout, progress *term.Progress, source func(error) error) error {
	uuid := layout.UUID()
	t.spec.Seed = uuid[:]
	t.spec.Partitions[0].Size = max((layout.Size()+511)&^511, t.spec.Partitions[0].Size)
	size, err := t.spec.Place(t.align, t.size)
	if err != nil {
		return t.target.error(err)
	}
	whole, err := parttable.NewDisk(size, &t.spec, []blockdev.Reader{&sourceReader{layout.Reader(), source}})
	if err != nil {
		return t.target.error(err)
	}
	return t.target.writeDisk(ctx, whole, progress)
}

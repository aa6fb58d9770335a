package qcow2

import "context"

// repairDirty makes the refcounts of an image with its dirty bit set right.
func (im *Image) repairDirty(ctx context.Context) error {
	return headerError(ErrUnsupported, "incompatible_features", "has the dirty bit: the refcounts have to be repaired first")
}

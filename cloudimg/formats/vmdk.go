package formats

// VMDKInfo is what a VMDK image says of itself.
type VMDKInfo struct {
	// CID changes whenever the content does.
	CID, ParentCID uint32
	CreateType     string // monolithicSparse or streamOptimized
	Compressed     bool
}

package ext4img

import (
	"testing"

	"qimg/qcow2/blockdev"
)

// TestFromExt4 makes a file system of another one, with everything in it.
func TestFromExt4(t *testing.T) {
	tree := scanFake(t, tortureTree(4096), 1, nil)
	image, _ := writeImage(t, tree, &LayoutOptions{}, nil)
	dev, err := blockdev.OpenFile(image, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	fsys, err := Open(dev, nil)
	if err != nil {
		t.Fatal(err)
	}
	again := merge(t, &ScanOptions{Exclude: []string{"/lost+found"}, Warn: func(s string) { t.Error("warning:", s) }}, FromFS(fsys))
	if tree.digest("") != again.digest("") {
		t.Errorf("another tree; %d entries, want %d", again.Entries(), tree.Entries())
	}
}

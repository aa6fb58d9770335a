package ext4img

import (
	"os"
	"testing"

	"qimg/qcow2/blockdev"
)

// BenchmarkWalk walks the file system in the image that QIMG_EXT4_IMAGE names,
// reads every inode and, with data, every file.
func BenchmarkWalk(b *testing.B) {
	image := os.Getenv("QIMG_EXT4_IMAGE")
	if image == "" {
		b.Skip("QIMG_EXT4_IMAGE names no image")
	}
	for _, data := range []bool{false, true} {
		name := "inodes"
		if data {
			name = "data"
		}
		b.Run(name, func(b *testing.B) {
			buf := make([]byte, 1<<20)
			for b.Loop() {
				dev, err := blockdev.OpenFile(image, nil)
				if err != nil {
					b.Fatal(err)
				}
				f, err := Open(dev, nil)
				if err != nil {
					b.Fatal(err)
				}
				files, bytes := 0, int64(0)
				for e, err := range f.Walk(RootIno) {
					if err != nil {
						b.Fatal(err)
					}
					n, err := f.Inode(e.Ino)
					if err != nil {
						b.Fatal(err)
					}
					files++
					if !data || !n.IsRegular() {
						continue
					}
					c, err := f.file(n)
					if err != nil {
						b.Fatal(err)
					}
					for off := int64(0); off < c.Size(); {
						m, err := c.ReadAt(buf, off)
						if m == 0 {
							b.Fatal(err)
						}
						off += int64(m)
						bytes += int64(m)
					}
				}
				b.ReportMetric(float64(files), "files")
				b.SetBytes(bytes)
				dev.Close()
			}
		})
	}
}

package fat

import (
	"fmt"
	"math"
)

const (
	sectorSize = 512
	// Counts of clusters that tell the widths of a FAT apart; those that are
	// made keep a distance, as those of mkfs.fat do.
	maxClusters12 = 4080
	minClusters16 = 4087
	maxClusters16 = 65520
	minClusters32 = 65525
	maxClusters32 = 0x0ffffff0

	// fat32From is the size from which on a file system is a FAT32 if the
	// options leave it open.
	fat32From = 512 << 20
	// maxSize is what a count of sectors of 32 bits reaches.
	maxSize = math.MaxUint32 * sectorSize
)

// geometry says where on the disk everything is, in sectors.
type geometry struct {
	bits        int   // 12, 16 or 32
	sectors     int64 // of the disk
	perCluster  int64
	reserved    int64 // with the boot sector
	fatSectors  int64 // of each of two FATs
	rootSectors int64 // of the root directory; 0: it is in clusters
	clusters    int64 // of data
}

func (g *geometry) clusterSize() int64 { return g.perCluster * sectorSize }
func (g *geometry) rootStart() int64   { return g.reserved + 2*g.fatSectors }
func (g *geometry) dataStart() int64   { return g.rootStart() + g.rootSectors }

// fill decides the length of the FATs, and reports whether the number of clusters
// is one of the width.
func (g *geometry) fill() bool {
	align := func(n int64) int64 { return (n + g.perCluster - 1) / g.perCluster * g.perCluster }
	if g.bits == 32 {
		g.reserved = 32
		g.rootSectors = 0
	} else {
		g.reserved = align(1)
	}
	// A longer FAT leaves fewer clusters, so this ends.
	for g.fatSectors = align(1); ; {
		g.clusters = (g.sectors - g.dataStart()) / g.perCluster
		if g.clusters <= 0 {
			return false
		}
		need := align(((g.clusters+2)*int64(g.bits) + 8*sectorSize - 1) / (8 * sectorSize))
		if need <= g.fatSectors {
			break
		}
		g.fatSectors = need
	}
	switch g.bits {
	case 12:
		return g.clusters <= maxClusters12
	case 16:
		return g.clusters >= minClusters16 && g.clusters <= maxClusters16
	}
	return g.clusters >= minClusters32 && g.clusters <= maxClusters32
}

// newGeometry chooses the width, if bits is 0, and the size of clusters for a disk
// of size bytes whose root directory has so many entries of 32 bytes.
func newGeometry(size int64, bits int, rootEntries int64) (*geometry, error) {
	if size > maxSize {
		return nil, fmt.Errorf("a FAT file system has at most %d bytes, not %d", int64(maxSize), size)
	}
	root := max(512, (rootEntries+15)/16*16) / (sectorSize / 32)
	if bits == 32 || bits == 0 && size >= fat32From {
		g := &geometry{bits: 32, sectors: size / sectorSize}
		switch {
		case size > 32<<30:
			g.perCluster = 64
		case size > 16<<30:
			g.perCluster = 32
		case size > 8<<30:
			g.perCluster = 16
		case size >= 260<<20:
			g.perCluster = 8
		default:
			g.perCluster = 1
		}
		if !g.fill() {
			return nil, fmt.Errorf("%d bytes give %d clusters; a FAT32 has at least %d", size, g.clusters, minClusters32)
		}
		return g, nil
	}
	for per := int64(4); per <= 128; per *= 2 {
		for _, b := range []int{16, 12} {
			g := &geometry{bits: b, sectors: size / sectorSize, perCluster: per, rootSectors: root}
			if (bits == 0 || bits == b) && root*16 <= math.MaxUint16 && g.fill() {
				return g, nil
			}
		}
	}
	// A FAT16 of less than 8 MiB needs smaller clusters.
	for per := int64(2); per >= 1 && bits == 16; per /= 2 {
		g := &geometry{bits: bits, sectors: size / sectorSize, perCluster: per, rootSectors: root}
		if g.fill() {
			return g, nil
		}
	}
	name := "FAT"
	if bits > 0 {
		name = fmt.Sprintf("FAT%d", bits)
	}
	return nil, fmt.Errorf("%d bytes, with %d entries in the root directory, cannot be a %s", size, rootEntries, name)
}

package blockdev

// SameHost reports whether two devices are files, and one file, of which a place in
// one is that place in the other.
func SameHost(a, b Reader) bool {
	f, ok := a.(*File)
	g, both := b.(*File)
	switch {
	case !ok || !both:
		return false
	case f == g:
		return true
	}
	x, err := f.f.Stat()
	y, err2 := g.f.Stat()
	return err == nil && err2 == nil && SameFile(x, y)
}

//go:build !linux

package ext4img

// openSourceDir opens the root directory of a source.
func openSourceDir(path string) (sourceDir, error) { return openRootDir(path) }

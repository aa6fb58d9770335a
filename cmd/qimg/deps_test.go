package main

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// TestDependencies holds each library to what it may import besides the
// standard library. What is not listed is under cmd and free to choose, but
// nothing imports it.
func TestDependencies(t *testing.T) {
	const klauspost, sys, blockdev = "github.com/klauspost/compress", "golang.org/x/sys", "qimg/qcow2/blockdev"
	const xcrypto = "golang.org/x/crypto"
	allowed := map[string][]string{
		"qcow2/blockdev":           {sys},
		"qcow2/blockdev/blocktest": {blockdev},
		"qcow2/blockdev/oracle":    {sys},
		"qcow2/transfer":           {blockdev},
		"qcow2/internal/inflate":   {},
		"qcow2/internal/deflate":   {},
		"qcow2":                    {blockdev, "qimg/qcow2/transfer", "qimg/qcow2/internal", klauspost, xcrypto},
		"ext4img":                  {blockdev, sys},
		"cloudimg/formats":         {"qimg/cloudimg/decomp", "qimg/qcow2", blockdev, klauspost},
		"cloudimg/oci":             {"qimg/cloudimg/decomp", blockdev},
		"cloudimg/decomp":          {blockdev, klauspost, "github.com/ulikunitz/xz"},
		"cloudimg/fat":             {blockdev},
		"cloudimg/guest":           {blockdev, "qimg/cloudimg/parttable", "qimg/ext4img", sys},
		"cloudimg/parttable":       {blockdev, "github.com/diskfs/go-diskfs/partition"},
	}
	forbidden := []string{"os/exec", "os/signal", "log", "flag", "reflect", "unsafe", "C"}
	root := filepath.Join("..", "..")
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && d.Name() == "testdata" {
			return filepath.SkipDir
		}
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		dir := filepath.ToSlash(filepath.Dir(rel))
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		library := !strings.HasPrefix(dir, "cmd/")
		if _, known := allowed[dir]; library && !known {
			t.Errorf("%s: the package is not in the list of this test", rel)
		}
		for _, spec := range file.Imports {
			name, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			first, _, _ := strings.Cut(name, "/")
			outside := strings.Contains(first, ".") || first == "qimg"
			within := func(prefix string) bool { return name == prefix || strings.HasPrefix(name, prefix+"/") }
			switch {
			case name == "unsafe" || name == "C":
				t.Errorf("%s imports %s", rel, name)
			case !library:
			case outside && !slices.ContainsFunc(allowed[dir], within):
				t.Errorf("%s imports %s", rel, name)
			case slices.Contains(forbidden, name) && dir != "qcow2/blockdev/oracle":
				t.Errorf("%s imports %s", rel, name)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

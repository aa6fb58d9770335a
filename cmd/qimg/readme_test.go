package main

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// Every test that README names is there, in the package that it says.
func TestReadmePromises(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, promises, _ := strings.Cut(string(readme), "\n## Promises")
	promises, _, _ = strings.Cut(promises, "\n## ")
	named := regexp.MustCompile("`(\\w+)`")
	n := 0
	for _, list := range regexp.MustCompile("((?:`\\w+`, )*`\\w+`) \\(([\\w/]+)\\)").FindAllStringSubmatch(promises, -1) {
		tests := testsOf(t, filepath.Join("../..", list[2]))
		for _, name := range named.FindAllStringSubmatch(list[1], -1) {
			if n++; !strings.Contains(tests, "\nfunc "+name[1]+"(") {
				t.Errorf("README names %s, which %s does not have", name[1], list[2])
			}
		}
	}
	if all := len(regexp.MustCompile("`(Test|Fuzz)").FindAllString(promises, -1)); n < all {
		t.Errorf("%d of %d tests have a package", n, all)
	}
}

// testsOf returns the text of all tests of a package.
func testsOf(t *testing.T, dir string) string {
	var all strings.Builder
	files, err := fs.Glob(os.DirFS(dir), "*_test.go")
	for _, name := range files {
		var b []byte
		if b, err = os.ReadFile(filepath.Join(dir, name)); err != nil {
			break
		}
		all.Write(b)
	}
	if err != nil {
		t.Fatal(err)
	}
	return all.String()
}

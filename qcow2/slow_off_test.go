//go:build !race && !386

package qcow2_test

const slowBuild = false

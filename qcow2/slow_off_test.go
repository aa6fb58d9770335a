//go:build !race && !386

package qcow2

const SlowBuild = false

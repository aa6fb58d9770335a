//go:build !race && !386

package oracle

const SlowBuild = false

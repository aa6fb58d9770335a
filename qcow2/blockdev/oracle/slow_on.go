//go:build race || 386

package oracle

// SlowBuild: the race detector makes tests ten times slower, and a 32-bit build
// some of them. They run fewer cases then; all are run by the plain build.
const SlowBuild = true

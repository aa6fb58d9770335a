package decomp

// Declared is declared.
var Declared = declared

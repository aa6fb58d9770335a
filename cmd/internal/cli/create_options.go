package cli

import (
	"math"
	"slices"
	"time"

	"qimg/qcow2"
)

// qcow2Options turns -o into the options of a new image. What the options say
// together is for qcow2.Create to check.
func qcow2Options(l *optionList, s *secrets) (*qcow2.CreateOptions, error) {
	co := &qcow2.CreateOptions{DataFile: l.str("data_file"), DataFileRaw: l.bool("data_file_raw")}
	co.ExtendedL2 = l.bool("extended_l2")
	co.LazyRefcounts = l.bool("lazy_refcounts")
	co.BackingFile = l.str("backing_file")
	co.BackingFormat = l.str("backing_fmt")
	var err error
	if co.ClusterSize, err = clusterSize(l.uint("cluster_size")); err != nil {
		return nil, err
	}
	if l.has("preallocation") {
		if co.Preallocation, err = parsePreallocation(l.str("preallocation")); err != nil {
			return nil, err
		}
	}
	if co.Compression, err = parseCompression(l.str("compression_type")); err != nil {
		return nil, err
	}
	if l.has("compat") {
		if co.Version, err = parseCompat(l.str("compat")); err != nil {
			return nil, err
		}
	}
	if f := co.BackingFormat; l.has("backing_fmt") && checkDriver(f) != nil && !slices.Contains(qemuDrivers(), f) {
		return nil, notAccepted("backing-fmt", f)
	}
	if l.has("data_file") && co.DataFile == "" {
		return nil, messagef("Could not create '': No such file or directory")
	}
	n := l.uint("refcount_bits")
	if n == 0 || n > 64 {
		return nil, messagef("Refcount width must be a power of two and may not exceed 64 bits")
	}
	co.RefcountBits = int(n)
	co.Encrypt, err = encryptOptions(l, s)
	return co, err
}

// encryptOptions turns encryption and encrypt.* into the options of a new image.
func encryptOptions(l *optionList, s *secrets) (o qcow2.EncryptOptions, err error) {
	format := l.str("encrypt.format")
	switch {
	case l.bool("encryption") && l.has("encrypt.format"):
		return o, messagef("'encrypt.format' and its alias 'encryption' can't be used at the same time")
	case l.bool("encryption"), format == "aes", format == "qcow":
		o.Method = qcow2.CryptAES
	case format == "luks":
		o.Method = qcow2.CryptLUKS
	case l.has("encrypt.format"):
		return o, notAccepted("format", format)
	}
	for _, x := range []struct {
		name string
		to   *string
	}{{"cipher-alg", &o.CipherAlg}, {"cipher-mode", &o.CipherMode}, {"ivgen-alg", &o.IVGenAlg},
		{"ivgen-hash-alg", &o.IVGenHashAlg}, {"hash-alg", &o.HashAlg}} {
		if *x.to = l.str("encrypt." + x.name); *x.to == "" && l.has("encrypt."+x.name) {
			return o, notAccepted(x.name, "") // what is empty is the default
		}
	}
	o.IterTime = iterTime(l)
	if o.Method == qcow2.CryptNone && !l.has("encrypt.key-secret") {
		return o, nil
	}
	if o.Method == qcow2.CryptNone {
		o.Passphrase = []byte{} // Create says that the format is missing
		return o, nil
	}
	o.Passphrase, err = s.passphrase(l.str("encrypt.key-secret"))
	return o, err
}

// iterTime returns encrypt.iter-time, 0 if it was not given.
func iterTime(l *optionList) time.Duration {
	if !l.has("encrypt.iter-time") {
		return 0
	}
	ms := min(l.uint("encrypt.iter-time"), math.MaxInt64/uint64(time.Millisecond))
	return max(time.Duration(ms)*time.Millisecond, 1) // 0 is not the default here
}

// clusterSize checks what qcow2.FormatOptions would take for its default, or
// cannot hold.
func clusterSize(n uint64) (int64, error) {
	if n == 0 || n > math.MaxInt64 {
		return 0, messagef("Cluster size must be a power of two between 512 and 2048k")
	}
	return int64(n), nil
}

func parseCompat(s string) (version int, err error) {
	switch s {
	case "0.10", "v2":
		return 2, nil
	case "1.1", "v3":
		return 3, nil
	}
	return 0, notAccepted("version", s)
}

func parseCompression(s string) (qcow2.CompressionType, error) {
	for _, c := range []qcow2.CompressionType{qcow2.CompressionZlib, qcow2.CompressionZstd} {
		if c.String() == s {
			return c, nil
		}
	}
	return 0, notAccepted("compression-type", s)
}

func parsePreallocation(s string) (qcow2.Preallocation, error) {
	for p := range qcow2.PreallocationFull + 1 {
		if p.String() == s {
			return p, nil
		}
	}
	return 0, notAccepted("preallocation", s)
}

func notAccepted(name, value string) error {
	return messagef("Parameter '%s' does not accept value '%s'", name, value)
}

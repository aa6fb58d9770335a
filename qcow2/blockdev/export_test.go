package blockdev

// UseNamed exchanges the file without a name for one that has a temporary
// name, as on a system that has only those.
func (o *Output) UseNamed() error {
	if o.temp != "" {
		return nil
	}
	if err := o.file.f.Close(); err != nil {
		return err
	}
	f, err := o.openNamed(0o666)
	if err == nil {
		o.file.f = f
	}
	return err
}

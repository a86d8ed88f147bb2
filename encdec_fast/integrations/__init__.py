"""Models of other libraries on this package's engine; each file here needs the library it names."""
